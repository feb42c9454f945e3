"""Run apart by test_card.py, a process a backend (Unsloth patches transformers and peft on import).

usage: train_on_card.py BACKEND PREPARED_BACKBONE FOLDER FIRST EVERY

Trains every so many of the backend's ``COMBINATIONS``, from the first named on, and writes FOLDER/<name>.json as it
goes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STEPS = 24
# Every pair of values that is allowed stands in one of them (test_every_allowed_pair_is_trained).
COMBINATIONS: list[dict[str, Any]] = [
    {"backend": backend, "fast_metrics": head, "packing": packing, "gradient_checkpointing": checkpointing}
    | {"step_launch": launch}
    for backend, head, packing, checkpointing, launch in (
        ("unsloth", True, True, True, "eager"),
        ("unsloth", False, False, True, "eager"),
        ("unsloth", True, False, False, "eager"),
        ("unsloth", False, True, False, "graphed"),
        ("peft", True, True, True, "eager"),
        ("peft", False, True, False, "eager"),
        ("peft", False, False, True, "eager"),
        ("peft", True, False, False, "compiled"),
        ("peft", False, True, True, "compiled"),
        ("peft", True, True, False, "graphed"),
        ("peft", False, True, False, "graphed"),
        ("peft", True, True, False, "compiled_graphed"),
        ("peft", False, True, False, "compiled_graphed"),
    )
]


def name_of(combination: dict[str, Any]) -> str:
    return "-".join(
        [
            combination["backend"],
            "head" if combination["fast_metrics"] else "headless",
            "packed" if combination["packing"] else "padded",
            "checkpointed" if combination["gradient_checkpointing"] else "kept",
            combination["step_launch"],
        ]
    )


def train_one(combination: dict[str, Any], prepared: Path, folder: Path) -> dict[str, Any]:
    """Train, go on from the middle, decode and merge; what test_card.py looks at."""
    import torch
    from transformers import TrainerCallback

    from biomerge_lib.core.composition import compose_parameters
    from biomerge_lib.core.parameters import check_parameters
    from biomerge_lib.corpora.readers import read_corpus
    from biomerge_lib.decoding.greedy import greedy_decode
    from biomerge_lib.decoding.predictions import build_prompts
    from biomerge_lib.model.merging import merge_checkpoint
    from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
    from biomerge_lib.prompts.ner_span import describe_model
    from biomerge_lib.prompts.prompt import encode
    from biomerge_lib.prompts.tokenizer import load_tokenizer
    from biomerge_lib.training.run import build_model, build_trainer, train

    started = time.monotonic()
    folder.mkdir(parents=True)
    parameters = check_parameters(
        compose_parameters([]).model_dump()
        | {
            "dtype": "bfloat16",
            "lora_dropout": 0.0,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "row_tokens": 4096,
            "num_train_epochs": 1.0,
            "eval_steps": STEPS // 2,
            "save_steps": STEPS // 2,
            "cache_dir": None,
            "run_id": "card",
            "offset_anchors": "start",
            "max_input_tokens": 512,
            "max_target_tokens": 64,
            "max_new_tokens": 64,
        }
        | combination
    )
    tokenizer = load_tokenizer(prepared)
    corpus = read_corpus("sample")
    short = [record for record in corpus["train"] if record.spans and len(record.text) < 200]
    records = {"train": short[: 8 * STEPS], "dev": [r for r in corpus["dev"] if r.spans][:8]}

    def trainer_of(checkpoints: Path) -> Any:
        model = build_model(parameters, prepared)
        trainer = build_trainer(model, tokenizer, records, parameters, checkpoints=checkpoints)
        # As row_tokens=auto has it where memory is left: the last layer keeps its activations.
        model.get_base_model().model.layers[-1].gradient_checkpointing = False
        return trainer

    def losses(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    class LayersAsTheyTrain(TrainerCallback):
        """Whether each layer was in training at a step's end, and recomputed its activations."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for layer in kwargs["model"].get_base_model().model.layers:
                trained_as.add((layer.training, layer.gradient_checkpointing))

    trained_as: set[tuple[bool, bool]] = set()
    whole = trainer_of(folder / "checkpoints")
    whole.add_callback(LayersAsTheyTrain())
    metrics = train(whole, folder)
    middle = f"checkpoint-{STEPS // 2}"
    shutil.copytree(folder / "checkpoints" / middle, folder / "resumed" / middle)
    resumed = trainer_of(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "resumed" / middle))

    parameters_of = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    prompts = build_prompts(records["dev"], tokenizer, parameters.prompt_format)
    best = folder / "checkpoints" / metrics["best_checkpoint"]
    probe = encode(records["dev"][0], tokenizer, parameters.prompt_format).prompt_ids
    check = merge_checkpoint(
        prepared,
        best,
        folder / "merged",
        dtype="bfloat16",
        manifest=describe_model(parameters),
        probe_ids=probe,
    )
    merged = load_causal_lm(folder / "merged", dtype="bfloat16")
    answers = greedy_decode(merged, tokenizer, prompts, max_new_tokens=64, batch_size=8, progress=None)
    result = {
        "losses": losses(whole),
        "resumed_losses": losses(resumed),
        "trainable": sum(p.numel() for p in parameters_of.values()),
        "shapes": sorted(
            [n.replace("base_model.model.", ""), list(p.shape)] for n, p in parameters_of.items()
        ),
        "unmoved": sorted(
            name for name, p in parameters_of.items() if "lora_B" in name and not p.detach().any()
        ),
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float | str)},
        "trained_as": sorted(trained_as),
        "relative_change": check.relative_change,
        "answers": [answer.text for answer in answers],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "seconds": round(time.monotonic() - started, 1),
    }
    del whole, resumed, merged
    torch.cuda.empty_cache()
    return result


def main() -> None:
    backend, prepared, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    from biomerge_lib.experiment.runs import quiet_libraries
    from biomerge_lib.model.unsloth_lora_ner import import_backend

    quiet_libraries()
    import_backend(backend)
    import torch

    torch.set_float32_matmul_precision("high")
    first, every = map(int, sys.argv[4:])
    for combination in [one for one in COMBINATIONS if one["backend"] == backend][first::every]:
        name = name_of(combination)
        try:
            result = train_one(combination, prepared, out / "runs" / name)
        except Exception:
            result = {"error": traceback.format_exc()}
        (out / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
        print(name, result.get("seconds"), result.get("error", "")[-300:], flush=True)


if __name__ == "__main__":
    main()
