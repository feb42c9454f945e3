"""Knows folders of adapters: the shipped one, exported ones and runs' best ones, and how training goes on from one.

init_adapter=shipped | FOLDER | RUN --[read_init_adapter]--> InitAdapter --[load_into]--> a fresh adapter's weights
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, file_sha256, read_values
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment.checkpoints import best_checkpoint
from biomerge_lib.experiment.recorded import load_run_parameters, read_metrics
from biomerge_lib.experiment.stages import TRAIN
from biomerge_lib.model.backbones import refuse_other_backbone
from biomerge_lib.prompts.manifest import FILE, Manifest, read_manifest

if TYPE_CHECKING:
    from peft import PeftModel

SHIPPED = Path(__file__).parent.parent / "apply/adapters/bc5cdr-smollm2-135m"
BEGUN_WITH = "init_adapter_sha256"  # of a model: the weights that it began with, which may be gone later
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_adapter(adapter: Path) -> Manifest:
    """How an exported adapter's model is asked.

    Raises:
        ModelError: files are missing, or its ``biomerge.json`` says too little or names an anchor style that is gone.
    """
    said = read_manifest(adapter)
    if missing := [name for name in (WEIGHTS, CONFIG, FILE) if not (adapter / name).is_file()]:
        raise ModelError(
            f"{adapter}: no exported adapter ({', '.join(missing)} missing). "
            "`python -m biomerge_lib export-adapter RUN OUT` writes adapter folders."
        )
    return Manifest.of(said, where=adapter)


@dataclass(frozen=True, slots=True)
class InitAdapter:
    """A trained adapter that another training begins with; ``sha256`` is that of its weights."""

    folder: Path
    sha256: str

    def load_into(self, model: PeftModel, backbone_folder: Path | str) -> None:
        """Give a model's fresh adapter these weights; a token head that they lack stays as it is.

        Raises:
            ModelError: they belong to another backbone, or are not of just this adapter's names and shapes.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        refuse_other_backbone(self.folder, backbone_folder)
        own = get_peft_model_state_dict(model)
        try:
            weights = load_file(self.folder / WEIGHTS)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / WEIGHTS}: {error}. Copy or export the adapter anew.") from None
        given = {name: tensor for name, tensor in weights.items() if name in own}
        wrong = [
            name
            for name, fresh in own.items()
            if (name not in given and "token_head" not in name)
            or (name in given and given[name].shape != fresh.shape)
        ]
        if wrong:
            raise ModelError(
                f"init_adapter {self.folder}: its weights do not fit, e.g. {wrong[0]} ({len(wrong)} of {len(own)})."
            )
        set_peft_model_state_dict(model, own | given)
        setattr(model, BEGUN_WITH, self.sha256)


def read_init_adapter(parameters: Parameters) -> InitAdapter | None:
    """The adapter that a training begins with, if it begins with one; no weights are read but for their hash.

    Raises:
        ModelError: there is none, its run is not finished, or its backbone, rank, alpha, anchors or use of a cue are
            not those of ``parameters``.
    """
    if parameters.init_adapter is None:
        return None
    path = SHIPPED if parameters.init_adapter == "shipped" else Path(parameters.init_adapter).expanduser()
    trained: Manifest | Parameters
    if (path / "parameters.yaml").is_file():
        stage = read_metrics(path).get("stages", {}).get(TRAIN, {})
        if stage.get("status") != "finished":
            raise ModelError(f"init_adapter={path}: 03_train of this run has not finished.")
        trained, folder = load_run_parameters(path), best_checkpoint(path, stage["metrics"])
        if not (folder / CONFIG).is_file():
            raise ModelError(f"init_adapter={path}: every weight of this run was trained; it has no adapter.")
    else:
        trained, folder = read_adapter(path), path
    config = read_values(folder / CONFIG, OBJECT, cure=" Copy or export the adapter anew.", raises=ModelError)
    asked, own = parameters.prompt_format, trained.prompt_format
    compared = {
        "backbone": (Path(parameters.backbone).name, Path(str(trained.backbone)).name),
        "lora_rank": (parameters.lora_rank, config.get("r")),
        "lora_alpha": (parameters.lora_alpha, config.get("lora_alpha")),
        "offset_anchors": (asked.offset_anchors, own.offset_anchors),
        "corpus_cue": (asked.corpus_cue, own.corpus_cue),
    }
    differing = [
        f"{name}={theirs} (not {ours})" for name, (ours, theirs) in compared.items() if ours != theirs
    ]
    if differing:
        raise ModelError(
            f"init_adapter={parameters.init_adapter} was trained with {', '.join(differing)}: set these as it has "
            "them, or name another adapter."
        )
    return InitAdapter(folder, file_sha256(folder / WEIGHTS))
