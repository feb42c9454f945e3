"""``preflight --site`` says all that a job would miss at once, each with what to do; programs of a site are played."""

import os
import shutil
import subprocess

import httpx
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError

from biomerge_lib.__main__ import main
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.backbones import build_tokenizer, prepare_backbone
from biomerge_lib.training import site

OLD_DRIVER = "| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |"
NEW_DRIVER = "| NVIDIA-SMI 590.44.01    KMD Version: 590.44.01    CUDA UMD Version: 13.1     |"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder that comes first in PATH; the environment is as before afterwards, whatever is taken over."""
    before, folder = dict(os.environ), tmp_path / "bin"
    folder.mkdir()
    for name in ("MODULES", "ARCHIVE", "HF_HOME", "WANDB_MODE", "SLURM_JOB_ID", "VENV"):
        os.environ.pop(name, None)
    os.environ |= {"PATH": f"{folder}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield folder
    os.environ.clear()
    os.environ.update(before)


def write_program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def play(programs, *, gpu=NEW_DRIVER, cuda="13.0.96", sbatch="echo 'sbatch: Job 7 to start at noon' >&2"):
    """Programs of a site: an environment for a CUDA version ("" for the CPU alone), a driver (None for no GPU)."""
    venv = programs.parent / "venv"
    write_program(venv / "bin/python", f"echo {cuda}")
    (venv / "bin/activate").write_text("")
    os.environ["VENV"] = str(venv)
    write_program(programs / "sbatch", sbatch)
    write_program(programs / "sinfo", "echo '; there is partition a100* with gpu:a100:4'")
    smi = 'case "$1" in --query*) echo "NVIDIA A100-SXM4-80GB, 81920 MiB" ;; *) echo "$SMI" ;; esac'
    write_program(programs / "nvidia-smi", "exit 9" if gpu is None else f"SMI='{gpu}'\n{smi}")


def look(*overrides):
    """verdict and text of each check; of one that comes twice, the worst."""
    found = site.check_site(compose_parameters(["wandb_mode=disabled", *overrides])).findings
    order = ("ok", "note", "warning", "refused")
    return {f.check: (f.verdict, f.says) for f in sorted(found, key=lambda f: order.index(f.verdict))}


def test_a_site_that_has_everything_is_ok(programs, tmp_path):
    play(programs)
    archive = tmp_path / "arch\u2028ive"  # what some take for a line's end
    os.environ["ARCHIVE"] = str(archive)
    found = look()
    assert {verdict for check, (verdict, _) in found.items() if check not in ("site", "disk", "context")} == {
        "ok"
    }
    assert found["sbatch"][1] == "slurm/job_single_ner.sbatch: to start at noon"
    assert found["driver"][1] == "NVIDIA A100-SXM4-80GB, 81920 MiB: driver 590.44.01, CUDA 13.1"
    assert found["archive"][1] == f"run folders are kept in {archive}"


def test_all_that_is_missing_is_said_at_once_with_what_to_do(programs, capsys):
    play(programs, gpu=OLD_DRIVER, sbatch="echo 'allocation failure: invalid partition' >&2; exit 1")
    os.environ |= {
        "VENV": "/nowhere/venv",
        "MODULES": "CUDA/99",
        "HF_HOME": "/dev/null/hub",
        "ARCHIVE": "/dev/null/a",
    }
    assert main(["preflight", "--site", "backbone=/no/such/folder", "wandb_mode=disabled"]) == 2
    lines = {
        line.split()[1]: line for line in capsys.readouterr().out.splitlines() if not line.startswith("ok")
    }
    assert (
        "SBATCH_PARTITION" in lines["sbatch"]
        and "there is partition a100* with gpu:a100:4" in lines["sbatch"]
    )
    assert (
        "going on without 'CUDA/99'" in lines["modules"] or "module load CUDA/99 failed" in lines["modules"]
    )
    assert "cannot be written" in lines["archive"] and lines["archive"].startswith("warning")
    assert "cannot be written. Set HF_HOME in slurm/site.sh" in lines["disk"]
    assert "set backbone=/path/to/folder" in lines["backbone"] and lines["backbone"].startswith("refused")


@pytest.mark.parametrize(
    ("gpu", "cuda", "check", "verdict", "says"),
    [
        (
            OLD_DRIVER,
            "13.0.96",
            "driver",
            "refused",
            "driver 535.104.05 serves CUDA 12.2, the environment is built for",
        ),
        (OLD_DRIVER, "12.6.77", "driver", "ok", "driver 535.104.05, CUDA 12.2"),
        (NEW_DRIVER, "", "cuda", "warning", "BIOMERGE_DEVICE=cuda bash slurm/setup_env.sh"),
        (None, "13.0.96", "driver", "note", "On a compute node: sbatch --gres=gpu:1"),
    ],
)
def test_the_driver_is_compared_with_the_environments_cuda(programs, gpu, cuda, check, verdict, says):
    play(programs, gpu=gpu, cuda=cuda)
    found = look()[check]
    assert found[0] == verdict and says in found[1]


def refuse(error):
    def auth_check(self, name):
        raise error

    return auth_check


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/api"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            GatedRepoError("403: access to it is restricted", response=RESPONSE),
            "restricted). Of a gated or private",
        ),
        (httpx.ConnectTimeout("timed out"), "(timed out)"),
        (ConnectionError("offline mode is enabled"), "(offline mode is enabled)"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_with_both_ways_to_it(monkeypatch, error, says):
    monkeypatch.setattr(HfApi, "auth_check", refuse(error))
    verdict, _, said = site._ask_hub("some/model")
    assert verdict == "refused" and says in said
    assert "`hf auth login`, or set HF_TOKEN" in said and "`hf download some/model` (16 GB" in said


def test_a_model_on_the_hub_or_half_here_is_still_to_be_fetched(programs, monkeypatch, tmp_path):
    play(programs)
    asked = []
    monkeypatch.setattr(HfApi, "auth_check", lambda self, name: asked.append(name))
    assert "or else the first job fetches it" in look("backbone=some/model")["backbone"][1]
    snapshot = tmp_path / "hub/models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "hub/models--some--model/refs").mkdir()
    (tmp_path / "hub/models--some--model/refs/main").write_text("abc")
    look("backbone=some/model")
    assert asked == ["some/model"] * 2  # its configuration alone is here
    (snapshot / "pytorch_model.bin").write_bytes(b"weights")
    assert look("backbone=some/model")["backbone"] == ("ok", f"its weights are in {snapshot}")
    assert len(asked) == 2


def test_a_script_that_breaks_off_is_an_error(monkeypatch, capsys, tmp_path):
    write_program(tmp_path / "broken.sh", "echo trouble >&2; exit 3")
    monkeypatch.setattr(site, "SCRIPT", tmp_path / "broken.sh")
    assert main(["preflight", "--site"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/broken.sh ended with 3: trouble\n"


def test_looking_leaves_nothing_behind(programs, tmp_path):
    play(programs)
    os.environ |= {"ARCHIVE": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    before = set(tmp_path.rglob("*"))
    subprocess.run(["bash", site.SCRIPT], check=True, capture_output=True)
    assert set(tmp_path.rglob("*")) == before


def test_the_hubs_copy_may_go_once_the_backbone_is_prepared(tiny_backbone, tmp_path, monkeypatch):
    """docs/cluster.md says so: what 01 and 03 do is then done from the prepared folder alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub/models--some--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(tiny_backbone, cached / "snapshots/abc")
    places = tmp_path / "tok", tmp_path / "backbones"
    build_tokenizer("some/tiny", places[0])
    prepared = prepare_backbone("some/tiny", *places)
    shutil.rmtree(cached)
    assert build_tokenizer("some/tiny", places[0])[1] == 0
    assert prepare_backbone("some/tiny", *places) == prepared
    with pytest.raises(ModelError):
        prepare_backbone("some/tiny", places[0], tmp_path / "elsewhere")
