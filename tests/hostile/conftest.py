"""`pytest --hostile N` tries N inputs and all named moments of kills; otherwise three kills, in test_resume.py."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_kills.py" and config.getoption("hostile") == 2000 else None
