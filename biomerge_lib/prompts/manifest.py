"""Knows ``biomerge.json``, which stands beside a model's weights and says how the model is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from biomerge_lib.core.errors import ModelError, ParameterError, nearest
from biomerge_lib.core.files import read_values, write_json
from biomerge_lib.core.prompt_format import PromptFormat, check_style
from biomerge_lib.experiment.recorded import load_run_parameters

FILE = "biomerge.json"
ASKED_WITH = ("offset_anchors", "corpus_cue", "max_input_tokens", "max_new_tokens")


class _Said(BaseModel, extra="allow"):
    offset_anchors: str = ""
    corpus_cue: bool = False
    max_input_tokens: PositiveInt = 1
    max_new_tokens: PositiveInt = 1
    backbone: str | None = None
    cues: list[str] | None = None
    default_cue: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How a model is asked: its prompts, its longest answer, and the corpora that it was trained to be asked by.

    ``default_cue`` stands for all other corpora. Both are None for a model without cues.
    """

    prompt_format: PromptFormat
    max_new_tokens: int
    backbone: str | None = None
    cues: list[str] | None = None
    default_cue: str | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any], *, where: Path) -> Manifest:
        """From the values of ``biomerge.json`` (or of a run's parameters) in the folder ``where``.

        Raises:
            ModelError: some are missing.
        """
        if not said.keys() >= set(ASKED_WITH):
            raise ModelError(f"{where / FILE} does not say how to ask the model; name its run's folder.")
        if said["corpus_cue"] and not said.keys() >= {"cues", "default_cue"}:
            raise ModelError(
                f"{where / FILE} does not say with which corpus cues the model was trained (03_train.ipynb writes it): "
                "give --no-corpus-cue to ask without."
            )
        prompt_format = PromptFormat(**{field.name: said[field.name] for field in fields(PromptFormat)})
        own = {field.name: said[field.name] for field in fields(cls) if field.name in said}
        return cls(prompt_format=prompt_format, **own)

    def as_said(self) -> dict[str, Any]:
        """The values of ``biomerge.json``."""
        values = asdict(self)
        values |= values.pop("prompt_format")
        return {name: value for name, value in values.items() if value is not None}

    @property
    def known_cues(self) -> list[str]:
        """The cues that a text may be asked with, sorted; none for a model without."""
        return sorted({*(self.cues or []), str(self.default_cue)}) if self.prompt_format.corpus_cue else []

    def cue_options(self, cue: str | None = None) -> dict[str, Any] | None:
        """How ``cue_record`` marks texts for a model that was trained with corpus cues; None for one that was not.

        ``cue`` names the corpus whose annotation policy is wanted; without it the model's default one.

        Raises:
            ParameterError: the model knows no cues, or not this one.
        """
        known = self.known_cues
        if not known:
            if cue:
                raise ParameterError(f"cue={cue}: this model was trained without corpus cues; leave it out.")
            return None
        if cue and cue not in known:
            raise ParameterError(f"cue={cue} is none of {', '.join(known)}.{nearest(cue, known)}")
        return {"trained": self.cues, "default_cue": cue or self.default_cue}


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What the folder's ``biomerge.json`` says; nothing where there is none.

    That of a tokenizer or a prepared backbone names its ``backbone`` alone.

    Raises:
        ModelError: it is broken, or names an anchor style that is gone.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    cure = " 03_train writes it anew; export-adapter beside an adapter."
    said = read_values(path, _Said, cure=cure, raises=ModelError).model_dump(exclude_unset=True)
    try:
        check_style(said.get("offset_anchors", "none"))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    return said


def write_manifest(folder: Path | str, said: Manifest | Mapping[str, Any]) -> None:
    write_json(Path(folder) / FILE, said.as_said() if isinstance(said, Manifest) else dict(said))


def read_model_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """The merged model's folder of a run folder (or the folder itself), and what is said of how it is asked.

    That stands beside the weights and, for earlier models, in the run's ``parameters.yaml`` alone.

    Raises:
        ModelError: neither a run nor a model, or one of an anchor style that is gone.
    """
    is_run = (path / "parameters.yaml").is_file()
    model_dir = path / "merged" if is_run else path
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir}: no model (config.json is missing). Name a run or a merged model.")
    said = read_manifest(model_dir)
    if is_run and not said.keys() >= set(ASKED_WITH):
        parameters = load_run_parameters(path)
        said |= {name: getattr(parameters, name) for name in ASKED_WITH}
    return model_dir, said
