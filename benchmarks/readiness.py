"""Whether an 8B fits: train, decode, merge and reload a Llama-3-8B shape with random weights through 03 and 04.

    python -m benchmarks.readiness                      # one GPU; 50 GB of disk: backbone and two merged models
    python -m benchmarks.readiness --shape tiny         # the same way on a CPU, to try it

The brief's batch (8 x 4), LoRA r = 8 and token head on the real Llama-3 tokenizer, with and without gradient
checkpointing, side by side. Writes reports/readiness.json and reports/readiness.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from biomerge_lib.core.files import write_json
from biomerge_lib.experiment.runs import PROJECT_DIR, provenance, read_metrics

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 128,  # vLLM on a CPU wants heads of 32
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TOKENIZER_DIR = PROJECT_DIR / "tokenizers" / "llama3_random_tok"
REPORT = PROJECT_DIR / "reports" / "readiness.json"
CARDS_GB = {"A100 48 GB": 48, "A100 80 GB": 80, "H100 94 GB": 94}
BESIDE_PEAK_GB = 3  # CUDA's own context, libraries and the allocator's gaps


def llama3_tokenizer():
    """The real Llama-3 tokenizer, from the file that the PyPI package llama-models carries."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("llama_models")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise SystemExit("the PyPI package llama-models is not installed: run `make env`")
    path = Path(folders[0]) / "llama3" / "tokenizer.model"
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(250)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:250], "<|eot_id|>"]
    special += [f"<|unused_{index}|>" for index in range(256 - len(special))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(vocab_file=str(path), extra_special_tokens=special).converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def build_tokenizer(backbone: str) -> None:
    """Save the tokenizer with BioMerge's five tokens as 01_tokenizer would for a backbone of the hub."""
    from biomerge_lib.prompts.tokenizer import add_biomerge_tokens, save_tokenizer

    tokenizer = llama3_tokenizer()
    add_biomerge_tokens(tokenizer)
    save_tokenizer(tokenizer, TOKENIZER_DIR)
    (TOKENIZER_DIR / "biomerge.json").write_text(json.dumps({"backbone": backbone}) + "\n")


def build_backbone(folder: Path, shape: str) -> None:
    """Write a prepared backbone of random bfloat16 weights, embeddings already of the size that training wants."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from biomerge_lib.model.backbones import VOCABULARY_MULTIPLE
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER_DIR)
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = LlamaConfig(
        vocab_size=rows,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[shape],
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def notebook(name: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "biomerge_lib", "run", name, *arguments], cwd=PROJECT_DIR)


def run_notebooks(shape: str) -> None:
    """Run 03 twice side by side, then 04 on the first."""
    backbone = f"random/llama3-{shape}"
    if not (TOKENIZER_DIR / "biomerge.json").is_file():
        build_tokenizer(backbone)
    folder = PROJECT_DIR / "backbones" / f"llama3-{shape}"
    if not (folder / "config.json").is_file():
        code = f"from benchmarks.readiness import *; build_backbone(Path({str(folder)!r}), {shape!r})"
        subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, check=True)  # its memory goes with it
    common = (
        "model=lora_ner_unsloth runtime=a100 backend=peft wandb_mode=disabled num_workers=0 existing_run=replace "
        f"backbone={backbone} tokenizer_dir={TOKENIZER_DIR.relative_to(PROJECT_DIR)} corpora=[sample] "
        "data_dir=data/readiness/ner subsample=0.2 num_train_epochs=1 "
        "eval_limit=16 per_device_eval_batch_size=16 logging_steps=1"
    ).split()
    if not (PROJECT_DIR / "data" / "readiness" / "ner" / "data_card.json").is_file():
        notebook("02_data", *common, "run_id=readiness-data").wait()
    started = [
        notebook("03_train", *common, f"run_id={name}", f"gradient_checkpointing={value}")
        for name, value in run_names(shape).items()
    ]
    codes = [process.wait() for process in started]
    if 0 in codes:  # both merged models have the same shape
        notebook("04_greedy_dev", f"run_id={list(run_names(shape))[codes.index(0)]}").wait()


def run_names(shape: str) -> dict[str, str]:
    return {f"readiness-{shape}-checkpointing": "true", f"readiness-{shape}-plain": "false"}


def read_runs(shape: str) -> dict[str, Any]:
    """What the two runs' ``metrics.json`` say."""
    rows: list[dict[str, Any]] = []
    where = provenance()
    for name, checkpointing in run_names(shape).items():
        run = PROJECT_DIR / "runs" / name
        stages = read_metrics(run).get("stages", {})
        training = stages.get("03_train", {}).get("metrics", {})
        where = stages.get("03_train", {}).get("provenance", where)
        decoded = stages.get("04_greedy_dev", {}).get("status") or "not tried"
        steps = [entry for entry in read_log(run) if "loss" in entry]
        rows.append(
            {
                "gradient_checkpointing": checkpointing == "true",
                "batch": "8 x 4",
                "status": stages.get("03_train", {}).get("status"),
                "steps": training.get("steps"),
                "first_loss": round(steps[0]["loss"], 4) if steps else None,
                "last_loss": round(steps[-1]["loss"], 4) if steps else None,
                "peak_memory_gb": training.get("peak_memory_gb"),
                "fits": fitting_cards(training.get("peak_memory_gb")),
                "trainable_parameters": training.get("trainable_parameters"),
                "merge_max_logit_difference": training.get("merge_max_logit_difference"),
                "reloaded_and_decoded_by_04": decoded.replace("running", "cut off"),
            }
        )
    return {"shape": shape, "provenance": where, "runs": rows}


def fitting_cards(peak_gb: float | None) -> str:
    """The cards whose memory holds a peak and what CUDA needs beside it.

    >>> fitting_cards(58.2)
    'A100 80 GB, H100 94 GB'
    """
    if not peak_gb:
        return "not measured"
    fitting = [name for name, memory in CARDS_GB.items() if peak_gb + BESIDE_PEAK_GB <= memory]
    return ", ".join(fitting) or "none of these"


def read_log(run: Path) -> list[dict]:
    path = run / "log_history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument(
        "--report", action="store_true", help="only write the table of the runs that are there"
    )
    options = parser.parse_args()
    if not options.report:
        run_notebooks(options.shape)
    result = read_runs(options.shape)
    write_json(REPORT, result)
    write_table(result)


def write_table(result: dict) -> None:
    provenance = result["provenance"]
    columns = list(result["runs"][0])
    lines = [
        f"# A Llama-3 of shape {result['shape']}, random weights, trained, merged and reloaded",
        "",
        f"Written by `python -m benchmarks.readiness --shape {result['shape']}` on {provenance['device']}, "
        f"commit `{provenance['commit'][:12]}`. Both trainings ran side by side; memory is each "
        f"process's peak, and a card fits that has {BESIDE_PEAK_GB} GB beside it, of {', '.join(CARDS_GB)}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[name]) for name in columns) + " |" for row in result["runs"]),
    ]
    REPORT.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
