"""Where tests find real corpora: ``../shared/corpora`` beside the repository, which the project does not ship."""

import os
from pathlib import Path

import pytest

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"


def shared_corpus(name: str) -> Path:
    """A corpus folder. Without it the test is skipped, on a CI machine (``CI=true``) it fails."""
    folder = CORPORA / name
    if not folder.is_dir():
        missing = f"the corpus {name} is not in ../shared/corpora beside the repository"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return folder
