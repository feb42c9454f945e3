"""Keeps the last result of the tests on a card: reports/gpu_tests.md."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from biomerge_lib.experiment.runs import PROJECT_DIR, provenance
from tests.gpu.train_on_card import COMBINATIONS, name_of

REPORT = PROJECT_DIR / "reports" / "gpu_tests.md"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_STARTED] = time.monotonic()


_STARTED = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    import torch

    if not torch.cuda.is_available():
        return
    counts = Counter(
        {what: len(terminalreporter.stats.get(what, [])) for what in ("passed", "failed", "error")}
    )
    where = provenance()
    pins = read_pins()
    versions = {
        name: f"{found}, pinned {pins[name]}" if pins.get(name, found) != found.partition("+")[0] else found
        for name, found in where["versions"].items()
    }
    lines = [
        "# The last run of the tests on a card",
        "",
        f"`make gpu-test`: {counts['passed']} passed, {counts['failed']} failed, {counts['error']} errors, "
        f"{time.monotonic() - config.stash[_STARTED]:.0f} seconds.",
        "",
        f"Commit {where['commit']}, {where['device']}, Python {where['python']}.",
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {name} | {found} |" for name, found in versions.items()),
        "",
        "Trained, resumed, decoded and merged with a tiny Llama:",
        "",
        *(f"- {name_of(combination)}" for combination in COMBINATIONS),
    ]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pins() -> dict[str, str]:
    """The versions in requirements/cuda.txt by package."""
    lines = (PROJECT_DIR / "requirements" / "cuda.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(";")[0].strip().partition("==") for line in lines if "==" in line)
    return {name.lower(): pinned.split()[0] for name, _, pinned in pairs if pinned}
