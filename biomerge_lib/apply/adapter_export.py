"""Knows how a finished run becomes an adapter folder to share: small weights, no machine paths, a model card.

    runs/<run_id>/ --[export_adapter]--> OUT/{adapter_model.safetensors, adapter_config.json, biomerge.json, README.md}

Knows nothing of decoding.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from biomerge_lib.apply.ready_models import NOTES
from biomerge_lib.core.composition import as_override
from biomerge_lib.core.errors import DataError, ModelError
from biomerge_lib.core.files import OBJECT, read_values, write_json
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.core.parameters import OF_THE_DATA, Parameters
from biomerge_lib.core.records import SPLITS
from biomerge_lib.experiment.checkpoints import best_checkpoint
from biomerge_lib.experiment.recorded import current_stages, load_run_parameters, read_metrics
from biomerge_lib.model.adapters import CONFIG, WEIGHTS
from biomerge_lib.model.backbones import BACKBONE_NOTE
from biomerge_lib.prompts.manifest import ASKED_WITH, FILE, Manifest, read_manifest, write_manifest
from biomerge_lib.prompts.ner_span import trained_datasets
from biomerge_lib.report.report_runs import changed_words

DECODERS = {"greedy": "transformers", "vllm": "vLLM"}
# Where a run was made, not what it is.
PLACES = OF_THE_DATA | {
    "data_dir",
    "runs_dir",
    "run_id",
    "existing_run",
    "backbones_dir",
    "tokenizer_dir",
    "cache_dir",
    "wandb_mode",
    "wandb_project",
}


def export_adapter(run_folder: Path | str, out: Path | str) -> Path:
    """Write a run's best adapter to ``out``, in bfloat16 and without the token head (decoding does not use it).

    ``biomerge.json`` names the backbone and how prompts are rendered; ``README.md`` is the model card.

    Raises:
        DataError: training has not finished, or trained all weights; or ``out`` holds other things.
        ModelError: the best checkpoint is gone.
    """
    import torch
    from safetensors.torch import load_file, save_file

    run_folder, out = Path(run_folder), Path(out).resolve()  # the adapter is called as the folder
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / FILE).is_file())):
        raise DataError(f"{out}: is there and holds no exported adapter; name another folder.")
    parameters, metrics = load_run_parameters(run_folder), read_metrics(run_folder)
    metrics |= {"stages": current_stages(metrics)}
    stage = metrics.get("stages", {}).get("03_train", {})
    if stage.get("status") != "finished":
        raise DataError(f"{run_folder}: 03_train has not finished here; only finished runs are exported.")
    if parameters.trainable == "all":
        raise DataError(
            f"{run_folder}: every weight was trained (trainable=all), so there is no adapter. Share "
            f"{run_folder}/merged, the whole model."
        )
    checkpoint = best_checkpoint(run_folder, stage["metrics"])
    named = Path(parameters.backbone)
    backbone = named.name if named.is_absolute() else parameters.backbone
    config = read_values(checkpoint / CONFIG, OBJECT, raises=ModelError)
    config |= {"base_model_name_or_path": backbone, "modules_to_save": None}
    weights = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in load_file(checkpoint / WEIGHTS).items()
        if "token_head" not in name
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
    if (checkpoint / BACKBONE_NOTE).is_file():
        shutil.copy(checkpoint / BACKBONE_NOTE, out)
    asked = {name: getattr(parameters, name) for name in ASKED_WITH}
    merged = run_folder / "merged"  # knows the cues
    said = read_manifest(merged) | asked | {"backbone": backbone}
    write_manifest(out, Manifest.of(said, where=merged))
    size = (out / WEIGHTS).stat().st_size
    card = build_card(out.name, parameters, metrics, backbone=backbone, megabytes=f"{size / 1e6:.1f}")
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


def build_card(
    name: str, parameters: Parameters, metrics: Mapping[str, Any], *, backbone: str, megabytes: str
) -> str:
    """The model card, from a run's parameters and ``metrics.json`` and from ``corpus_notes.yaml``."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True)
    templates.filters |= {"text": in_markdown, "code": code_in_markdown}
    stages = metrics["stages"]
    known = read_values(NOTES, OBJECT)
    names = _corpora(parameters, metrics)
    notes = [known.get(corpus.rsplit("_", 1)[0]) or _unknown(corpus) for corpus in names]
    scores = _scores(stages)
    return templates.get_template("model_card.md.j2").render(
        name=name,
        run_id=metrics["run_id"],
        p=parameters,
        backbone=backbone,
        megabytes=megabytes,
        names=names,
        notes=notes,
        scores=scores,
        has_test=any(row["split"] == "test" for row in scores),
        out_of_text=stages["03_train"]["metrics"].get("greedy_dev_out_of_text_rate"),
        data=metrics.get("data", {}),
        training=stages["03_train"]["metrics"],
        provenance=stages["03_train"]["provenance"],
        commands=code_in_markdown("\n".join(_commands(name, parameters, names)), block=True),
    )


def _scores(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a split and decoder; 04's measurement replaces the same one made at the end of 03."""
    rows = {}
    for metrics in (stages[name].get("metrics", {}) for name in sorted(stages)):
        for decoder, title in DECODERS.items():
            for split in SPLITS[1:]:
                prefix = f"{decoder}_{split}_"
                if f"{prefix}ner_f1" in metrics:
                    row = {end: metrics[f"{prefix}ner_{end}"] for end in ("precision", "recall", "f1")}
                    row |= {end: metrics[f"{prefix}ner_f1_{end}"] for end in ("low", "high")}
                    row |= {"split": split, "decoder": title, "records": metrics[f"{prefix}records"]}
                    rows[split, decoder] = row
    return list(rows.values())


def _corpora(parameters: Parameters, metrics: Mapping[str, Any]) -> list[str]:
    """The names of the corpora that were trained on; that of the data's folder, where they are not there any more."""
    folder = Path(parameters.data_dir)
    known = trained_datasets(folder, metrics.get("data", {}))
    return known or [folder.parent.name if folder.name == "ner" else folder.name]


def _commands(name: str, parameters: Parameters, names: Sequence[str]) -> list[str]:
    corpora = [corpus if corpus == "sample" else f"path/to/{corpus}" for corpus in names]
    words = changed_words(parameters.model_dump(), leave_out=PLACES)
    data_dir = f"data_dir={parameters.data_dir}"
    card = Path(parameters.data_dir) / "data_card.json"
    # Of data that 02_data did not make.
    told = read_values(card, OBJECT).get("command") if card.is_file() else None
    commands = [
        ["run", "02_data", f"corpora={as_override(corpora)}", data_dir],
        ["run", "03_train", data_dir, *words, f"run_id={name}"],
        ["export-adapter", f"runs/{name}", name],
    ]
    lines = [shlex.join(["python", "-m", "biomerge_lib", *command]) for command in commands]
    return [told or lines[0], *lines[1:]]


def _unknown(corpus: str) -> dict[str, str]:
    corpus = in_markdown(corpus)
    return {
        "title": corpus,
        "entities": f"the entities annotated in {corpus}",
        "source": "Not described in corpus_notes.yaml.",
        "licence": "not known to BioMerge; find it out before you share this adapter.",
    }
