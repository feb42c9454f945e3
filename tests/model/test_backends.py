"""Unsloth and PEFT are one behaviour: same parameters, same losses, checkpoints that each reads from the other."""

import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.unsloth_lora_ner import UNSLOTH_VERSION, import_backend, refuse_narrow_card
from tests.conftest import ROOT
from tests.model.backend_losses import measure


def test_only_the_pinned_unsloth_is_used(monkeypatch):
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"unsloth=={UNSLOTH_VERSION}" in pins
    monkeypatch.setattr("biomerge_lib.model.unsloth_lora_ner.version", lambda name: "2026.1.1")
    with pytest.raises(ModelError, match=rf"Unsloth 2026\.1\.1 is installed and {UNSLOTH_VERSION} is needed"):
        import_backend("unsloth")

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("biomerge_lib.model.unsloth_lora_ner.version", missing)
    with pytest.raises(ModelError, match="Unsloth is not installed"):
        import_backend("unsloth")


def test_unsloth_is_imported_without_a_look_at_vllm(monkeypatch):
    seen = []
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: seen.append((name, importlib.util.find_spec("vllm")))
    )
    import_backend("unsloth")
    assert seen == [("unsloth", None)]
    assert importlib.util.find_spec("vllm") is not None


def test_a_card_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(
        ModelError, match=r"dtype=bfloat16, and Tesla T4 cannot compute in it\. Set dtype=float32"
    ):
        refuse_narrow_card("bfloat16")
    refuse_narrow_card("float32")


@pytest.mark.slow
@pytest.mark.integration
def test_both_backends_train_alike_and_read_each_others_checkpoints(tiny_prepared, tmp_path):
    peft = measure("peft", tiny_prepared, tmp_path / "peft")
    command = [sys.executable, "-m", "tests.model.backend_losses"]
    command += [str(path) for path in (tiny_prepared, tmp_path / "unsloth", tmp_path / "peft")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    unsloth, crossed = json.loads(done.stdout.splitlines()[-1])
    assert peft["shapes"] == unsloth["shapes"] and len(peft["shapes"]) == 2 * 7 * 2 + 1 + 2
    assert peft["losses"] == pytest.approx(unsloth["losses"], abs=1e-4)
    assert peft["heads"] == pytest.approx(unsloth["heads"], abs=1e-4)
    assert peft["losses"][-1] < peft["losses"][0]
    for backend in (peft, unsloth):
        # Loss and every gradient of a packed batch against the padded one.
        assert backend["packed_gap"] == pytest.approx({"none": 0.0, "start": 0.0}, abs=1e-5)
        # (training, gradient checkpointing) before, in and after decoding.
        assert backend["states"][0] == backend["states"][2] == [True, True], backend["states"]
        assert not backend["states"][1][0]
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("peft", "unsloth")]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]
    own = measure("peft", tiny_prepared, tmp_path / "own", tmp_path / "unsloth")
    assert crossed["losses"] == pytest.approx(own["losses"], abs=1e-4)
    assert crossed["losses"][0] < peft["losses"][-1]
