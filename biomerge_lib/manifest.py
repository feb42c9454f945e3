"""Knows ``biomerge.json``, which stands beside a model's weights and says how the model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from biomerge_lib.errors import ModelError
from biomerge_lib.prompt_format import check_style

FILE = "biomerge.json"


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What the folder's ``biomerge.json`` says; nothing where there is none.

    Raises:
        ModelError: it names an anchor style that is gone.
    """
    path = Path(folder) / FILE
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    try:
        check_style(said.get("offset_anchors", "none"))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    return said
