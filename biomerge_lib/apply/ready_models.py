"""Knows which model answers: an adapter merged once into the user's cache folder, a run's model, or a vLLM server.

    adapter folder --[merge_for_use]--> <cache>/models/<name>-<hash>/, a plain causal LM that vLLM serves, too

The cache folder is ``$BIOMERGE_CACHE``, or ``biomerge`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A merged SmolLM2-135M
takes 540 MB there; deleting the folder is safe. Loading it takes neither PEFT nor the adapter.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, file_sha256, locked, read_values
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import Prompt, RawAnswer
from biomerge_lib.model.adapters import CONFIG, SHIPPED, WEIGHTS, read_adapter
from biomerge_lib.prompts.manifest import FILE, Manifest, read_manifest, read_model_folder

NOTES = Path(__file__).with_name("corpus_notes.yaml")
ADAPTER_FILES = (WEIGHTS, CONFIG, FILE)
# Of a container, in microseconds: "200000 100000" are two cores, or "max".
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
SPINS = "100000"
Answerer = Callable[[list[Prompt]], list[RawAnswer]]
log = logging.getLogger("biomerge")


def cache_dir() -> Path:
    """The user's cache folder of BioMerge; not made here."""
    if chosen := os.environ.get("BIOMERGE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "biomerge"


def merge_for_use(adapter: Path) -> Path:
    """The adapter and its backbone as one merged model, made on first use (some 10 s and 540 MB for SmolLM2-135M).

    The folder's name holds a hash of the adapter, so that a changed one is merged anew.

    Raises:
        ModelError: the adapter or its backbone is missing, or the cache folder cannot be written.
    """
    manifest = read_adapter(adapter)
    digest = file_sha256(*(adapter / name for name in ADAPTER_FILES))[:12]
    folder = cache_dir() / "models" / f"{adapter.resolve().name}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    try:
        with locked(folder.with_name(f".{folder.name}.lock")):  # another process may be making it
            if not (folder / "config.json").is_file():
                log.info("first use of %s: merging it into %s (once)", adapter.name, folder)
                _merge(adapter, folder, manifest)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.strerror}). Set BIOMERGE_CACHE to a folder with 1 GB free."
        ) from error
    return folder


def find_model(*, adapter: Path | str | None = None, model: Path | str | None = None) -> Path:
    """The merged model of the shipped adapter, of another ``adapter``, or of a ``model`` folder.

    Raises:
        ModelError: no model or adapter in the folder, or it cannot be merged.
    """
    return read_model_folder(Path(model))[0] if model is not None else merge_for_use(Path(adapter or SHIPPED))


def find_manifest(*, adapter: Path | str | None = None, model: Path | str | None = None) -> Manifest:
    """How the model of :func:`find_model` is asked; merges nothing, and raises ModelError where it finds none."""
    if model is not None:
        folder, said = read_model_folder(Path(model))
        return Manifest.of(said, where=folder)
    return read_adapter(Path(adapter or SHIPPED))


def describe_cues(manifest: Manifest) -> str:
    """A line for each cue that a model may be asked with, and the entities of its corpus where they are noted."""
    notes = read_values(NOTES, OBJECT)
    found = {cue: notes.get(cue, {}).get("entities", "") for cue in manifest.known_cues}
    found |= {cue: f"{found[cue]} (the default)".strip() for cue in found if cue == manifest.default_cue}
    width = max(map(len, found), default=0)
    lines = [f"{cue:<{width}}  {entities}".rstrip() for cue, entities in found.items()]
    return "\n".join(lines) or "This model was trained without corpus cues: ask it without --cue."


def decode_here(folder: Path, *, max_new_tokens: int, batch_size: int) -> tuple[Any, Answerer]:
    """A merged model's tokenizer, and greedy decoding with it in float32: on a CPU a Llama's without transformers.

    Each batch takes as many of PyTorch's threads as there are free cores: where threads wait for one that another
    program has put off, two are slower than one.
    """
    free = FreeCores()
    # A thread that waits for another spins a third as long as by OpenMP's default, then leaves it the core.
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    import torch

    from biomerge_lib.decoding.greedy import greedy_decode
    from biomerge_lib.decoding.plain_llama import load_plain_llama
    from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer

    tokenizer: Any = load_plain_tokenizer(folder)
    model: Any = None
    if not torch.cuda.is_available():
        model = load_plain_llama(folder, eos_token_id=tokenizer.eos_token_id)
    if model is None:
        from biomerge_lib.model.unsloth_lora_ner import load_causal_lm

        model = load_causal_lm(folder, dtype="float32")

    def answer(prompts: list[Prompt]) -> list[RawAnswer]:
        threads = torch.get_num_threads()
        torch.set_num_threads(free.count(threads))
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        try:
            return greedy_decode(model, tokenizer, prompts, **options, progress=None)
        finally:
            torch.set_num_threads(threads)

    return tokenizer, answer


class FreeCores:
    """Counts the cores that this process had or could have had since the last count, of those that it may use."""

    def __init__(self) -> None:
        self._at, self._own, self._free = time.monotonic(), time.process_time(), 1e3
        psutil.cpu_percent(percpu=True)
        quota, period = CPU_QUOTA.read_text().split() if CPU_QUOTA.is_file() else ("max", "1")
        self._most = 1e3 if quota == "max" else int(quota) / int(period)

    def count(self, most: int) -> int:
        """At least one and at most ``most``; a tenth of a second must have passed since the last count."""
        now, own = time.monotonic(), time.process_time()
        if (passed := now - self._at) >= 0.1:
            busy = dict(enumerate(psutil.cpu_percent(percpu=True)))
            idle = sum(1 - busy.get(core, 0) / 100 for core in os.sched_getaffinity(0))
            self._free = idle + (own - self._own) / passed
            self._at, self._own = now, own
        return max(1, min(most, round(min(self._free, self._most))))


def ask_server(folder: Path, base_url: str, *, max_new_tokens: int) -> tuple[Any, Answerer]:
    """A merged model's tokenizer, and a vLLM server that serves this model (key: ``$VLLM_API_KEY``).

    Raises:
        ServerError: no server there, or one that serves several models or refuses.
    """
    from biomerge_lib.decoding.vllm_client import GreedyClient, RunningServer
    from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer

    tokenizer = load_plain_tokenizer(folder)
    client = GreedyClient(server=RunningServer(base_url), tokenizer=tokenizer, max_new_tokens=max_new_tokens)

    def answer(prompts: list[Prompt]) -> list[RawAnswer]:
        answers: dict[int, RawAnswer] = {}
        client.answer_all(dict(enumerate(prompts)), answers.__setitem__)
        return [answers[number] for number in range(len(prompts))]

    return tokenizer, answer


def _merge(adapter: Path, folder: Path, manifest: Manifest) -> None:
    from biomerge_lib.model.merging import merge_checkpoint
    from biomerge_lib.prompts.prompt import encode
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    backbone = _prepare(str(manifest.backbone))
    probe = Record("Aspirin can trigger asthma attacks .", (), "probe", "probe")
    probe_ids = encode(probe, load_tokenizer(backbone), manifest.prompt_format).prompt_ids
    merge_checkpoint(backbone, adapter, folder, dtype="float32", manifest=manifest, probe_ids=probe_ids)


def _prepare(backbone: str) -> Path:
    """The prepared backbone: the project's where there is one, else one in the cache folder."""
    from biomerge_lib.core.composition import compose_parameters
    from biomerge_lib.experiment.provenance import PROJECT_DIR
    from biomerge_lib.model.backbones import backbone_name, build_tokenizer, prepare_backbone
    from biomerge_lib.model.reach_ins import gguf_opened_once

    name = backbone_name(backbone)
    prepared = PROJECT_DIR / compose_parameters([]).backbones_dir / name
    if read_manifest(prepared).get("backbone") == backbone:
        return prepared
    tokenizer_dir = cache_dir() / "tokenizers" / name
    with gguf_opened_once():
        build_tokenizer(backbone, tokenizer_dir)
        return prepare_backbone(backbone, tokenizer_dir, cache_dir() / "backbones")
