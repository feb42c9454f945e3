"""Knows how a run reaches Weights & Biases, and that it may not; the run folder holds everything without it.

training --[open_wandb_run]--> the curve; run folder --[upload_stage]--> final numbers and files, added to the same run

``wandb.json`` in the run folder names that run for every job and notebook. W&B's own environment variables
(WANDB_MODE, WANDB_PROJECT, WANDB_RUN_GROUP, ...) are heeded; the API key stays in the environment or ``~/.netrc``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import BioMergeError, DataError
from biomerge_lib.core.files import OBJECT, read_values, write_json
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment.checkpoints import best_checkpoint
from biomerge_lib.experiment.jobs import RunInterrupted
from biomerge_lib.experiment.notebooks import find_notebook, run_notebook
from biomerge_lib.experiment.provenance import PROJECT_DIR, data_hashes, provenance
from biomerge_lib.experiment.recorded import current_stages, read_metrics
from biomerge_lib.experiment.runs import Check
from biomerge_lib.experiment.stages import STAGES, TRAIN

if TYPE_CHECKING:
    import wandb

IDENTITY = "wandb.json"
SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
CURVE_SECONDS, FILES_SECONDS = 60, 600  # how long a notebook's end waits for an upload


def run_tracked_notebook(name: str, overrides: Sequence[str], check: Check | None = None) -> Path:
    """:func:`notebooks.run_notebook`; what it leaves, also when it fails, is added to the run's W&B run."""
    parameters = compose_parameters(overrides)
    folder = PROJECT_DIR / parameters.run_folder
    stage = find_notebook(name).stem
    if stage == TRAIN and not _disabled(parameters) and (reason := _offline_reason(parameters)):
        # The notebook says it too, but a job's log begins here.
        print(_offline_notice(reason, folder), flush=True)
    try:
        executed = run_notebook(name, overrides, check)
    except RunInterrupted:
        raise
    except BioMergeError:
        upload_stage(folder, stage)
        raise
    upload_stage(folder, stage)
    return executed


def open_wandb_run(parameters: Parameters, folder: Path) -> wandb.Run | None:
    """Begin, or go on with, the W&B run of a training; offline without a key or network; None when disabled."""
    if _disabled(parameters):
        return None
    reason = _offline_reason(parameters)
    known = _identity(folder)
    given_id = os.environ.get("WANDB_RUN_ID")  # a sweep's agent hands it out
    resumed = bool(known) and given_id in (None, known["id"])
    made_of = {"run_id": folder.name, "commit": provenance()["commit"]}
    made_of |= {f"data_sha256_{split}": digest for split, digest in data_hashes(parameters.data_dir).items()}
    settings = {
        "id": known["id"] if resumed else given_id,
        "project": os.environ.get("WANDB_PROJECT", parameters.wandb_project),
        "name": os.environ.get("WANDB_NAME") or _sweep_point() or folder.name,
        "group": os.environ.get("WANDB_RUN_GROUP") or os.environ.get("WANDB_SWEEP_ID"),
        "config": parameters.model_dump() | made_of,
    }
    run = None
    if reason is None:
        try:
            run = _init(folder, settings, mode="online", resumed=resumed, seconds=CURVE_SECONDS)
        except Exception as error:  # whatever keeps W&B from working must not keep the training from running
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if run is None:
        run = _init(folder, settings, mode="offline", resumed=False, seconds=CURVE_SECONDS)
        print(_offline_notice(cast(str, reason), folder))
    else:
        print(f"W&B: {run.name} in {run.project}, {run.url}")
    found = {name: getattr(run, name) or None for name in ("id", "project", "entity", "name", "group")}
    write_json(folder / IDENTITY, found | {"online": reason is None})
    return run


def close_run(run: wandb.Run, folder: Path, *, exit_code: int = 0) -> None:
    """End a W&B run, waiting a while for its upload; say how to send what is left."""
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        print(f"W&B: the server did not take everything. Later: {_sync_command(folder)}")


def upload_stage(folder: Path, stage: str) -> None:
    """Add a stage's final numbers, its executed notebook and its files to the run's W&B run, if that is online.

    03_train brings the best checkpoint, 04 and 05 their predictions. Trouble is printed, never raised.
    """
    known = _identity(folder)
    if not known or not known["online"] or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    reason = why_offline()
    if reason:
        print(f"W&B: {stage} was not sent ({reason}). Later: {_sync_command(folder)}")
        return
    try:
        _upload(folder, stage, known)
    except Exception as error:  # the notebook's result stands, whatever becomes of its copy
        print(f"W&B: {stage} was not sent ({type(error).__name__}: {error}). Later: {_sync_command(folder)}")


def sync_run(folder: Path) -> None:
    """Send what a run could not send while it ran: its offline curves (``wandb sync``), then every stage's files.

    Raises:
        DataError: the run never was tracked.
        BioMergeError: W&B cannot be reached from here, either.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder.")
    known = _identity(folder)
    if not known:
        raise DataError(f"{folder}: no {IDENTITY}; this run was not tracked (wandb_mode=disabled).")
    if reason := why_offline():
        raise BioMergeError(f"W&B cannot be reached from here: {reason}.")
    curves = sorted((folder / "wandb").glob("*run-*"))
    if curves:
        command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *map(str, curves)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise BioMergeError(f"wandb sync ended with {done.returncode} (see above).")
    write_json(folder / IDENTITY, known | {"online": True})
    for stage in current_stages(read_metrics(folder)):
        _upload(folder, stage, known)


def why_offline() -> str | None:
    """What keeps this machine from W&B: no key or no network; None if nothing does."""
    import httpx
    import wandb
    from requests.utils import get_netrc_auth

    base_url = wandb.setup().settings.base_url
    host = urlsplit(base_url).hostname
    key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not key and not get_netrc_auth(base_url):
        return "no API key: `wandb login`, or WANDB_API_KEY"
    try:
        httpx.head(base_url, timeout=10, verify=False)  # is anybody there? nothing is sent or believed
    except httpx.HTTPError as error:
        return f"no network: {host} cannot be reached, {error}"
    except (ImportError, ValueError):  # a proxy of a kind that wandb may know
        return None
    return None


def _disabled(parameters: Parameters) -> bool:
    return "disabled" in (os.environ.get("WANDB_MODE"), parameters.wandb_mode)


def _offline_reason(parameters: Parameters) -> str | None:
    if os.environ.get("WANDB_MODE", parameters.wandb_mode) == "offline":
        return "WANDB_MODE or wandb_mode says so"
    return why_offline()


def _offline_notice(reason: str, folder: Path) -> str:
    return f"W&B: offline ({reason}). Later, from a machine that reaches it: {_sync_command(folder)}"


def _upload(folder: Path, stage: str, known: dict[str, Any]) -> None:
    import wandb

    recorded = {"metrics": {}, "status": "", **read_metrics(folder).get("stages", {}).get(stage, {})}
    run = _init(folder, known, mode="online", resumed=True, seconds=FILES_SECONDS)
    try:
        metrics = recorded["metrics"].items()
        run.summary.update({name: value for name, value in metrics if isinstance(value, int | float | str)})
        for kind, name, paths in _files(folder, stage, recorded["metrics"]):
            artifact = wandb.Artifact(f"{name}-{known['id']}", type=kind)
            for path in paths:
                artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact)
    finally:
        close_run(run, folder, exit_code=0 if recorded["status"] == "finished" else 1)


def _files(folder: Path, stage: str, metrics: dict[str, Any]) -> list[tuple[str, str, Sequence[Path]]]:
    """(type, name, files) of a stage's artifacts; those that exist."""
    found = [
        ("notebook", stage, [folder / f"{stage}.ipynb"]),
        ("metrics", "metrics", [folder / "metrics.json"]),
    ]
    if "best_checkpoint" in metrics:
        checkpoint = best_checkpoint(folder, metrics, must_exist=False)
        # An adapter has some MB; a model that was trained whole has gigabytes.
        if (checkpoint / "adapter_model.safetensors").is_file():
            kept = [path for path in sorted(checkpoint.glob("*")) if path.suffix in (".json", ".safetensors")]
            found.append(("model", "checkpoint", kept))
    if stage in STAGES and (decoder := STAGES[stage].decoder):
        predictions = sorted(folder.glob(f"predictions-*-{decoder}.jsonl"))
        found.append(("predictions", f"predictions-{decoder}", predictions))
    return [(kind, name, paths) for kind, name, paths in found if paths and all(map(Path.is_file, paths))]


def _init(
    folder: Path, settings: dict[str, Any], *, mode: Literal["online", "offline"], resumed: bool, seconds: int
) -> wandb.Run:
    import wandb

    names = ("id", "project", "entity", "name", "group", "config")
    with _environment_without(SWEEP_VARIABLES if resumed else ()):  # inside a sweep, W&B would not resume
        return wandb.init(
            **{name: settings[name] for name in names if settings.get(name)},
            dir=str(folder),
            mode=mode,
            resume="allow" if resumed else None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,  # a remote's address may hold a token; the commit is in the config
                x_save_requirements=False,
                init_timeout=30,
                finish_timeout=seconds,
                finish_timeout_raises=True,
            ),
        )


def _sweep_point() -> str | None:
    """``learning_rate=0.0001 lora_rank=8``: the point that a sweep's agent asks for."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).is_file():
        return None
    point = read_values(path, OBJECT)
    return " ".join(f"{name}={found['value']}" for name, found in point.items() if isinstance(found, dict))


class _Identity(BaseModel, extra="allow"):
    id: str
    online: bool


def _identity(folder: Path) -> dict[str, Any]:
    path = folder / IDENTITY
    if not path.is_file():
        return {}
    return read_values(path, _Identity, cure=" Delete it: what follows becomes a new W&B run.").model_dump()


def _sync_command(folder: Path) -> str:
    return f"python -m biomerge_lib wandb-sync {folder.parent.name}/{folder.name}"


@contextmanager
def _environment_without(names: Sequence[str]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
