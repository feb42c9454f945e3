"""Where tests find real corpora: ``../shared/corpora`` beside the repository, which the project does not ship."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

CORPORA = Path(__file__).resolve().parents[3] / "shared" / "corpora"


def skip_but_fail_in_ci(missing: str) -> NoReturn:
    """A test that cannot run for what is missing is skipped on a user's machine and fails on a CI machine."""
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def shared_corpus(name: str) -> Path:
    """A corpus folder. Without it the test is skipped, on a CI machine (``CI=true``) it fails."""
    folder = CORPORA / name
    if not folder.is_dir():
        skip_but_fail_in_ci(f"the corpus {name} is not in ../shared/corpora beside the repository")
    return folder
