"""Unsloth and PEFT are one behaviour: same parameters, same losses, checkpoints that each reads from the other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("backend_losses.py")


def run(backend: str, prepared: Path, out: Path, adapter: Path | None = None) -> dict:
    command = [
        sys.executable,
        str(SCRIPT),
        backend,
        str(prepared),
        str(out),
        *([str(adapter)] if adapter else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.integration
def test_both_backends_train_alike_and_read_each_others_checkpoints(tiny_prepared, tmp_path):
    peft = run("peft", tiny_prepared, tmp_path / "peft")
    unsloth = run("unsloth", tiny_prepared, tmp_path / "unsloth")
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
    crossed = run("unsloth", tiny_prepared, tmp_path / "crossed", tmp_path / "peft")
    own = run("peft", tiny_prepared, tmp_path / "own", tmp_path / "unsloth")
    assert crossed["losses"] == pytest.approx(own["losses"], abs=1e-4)
    assert crossed["losses"][0] < peft["losses"][-1]
