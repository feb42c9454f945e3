"""Knows how executed notebooks become pages beside a report: rendered by nbconvert, code and outputs as they ran.

runs/<run_id>/03_train.ipynb --[link_notebooks]--> <report>_notebooks/<run_id>/03_train.html
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from biomerge_lib.core.files import file_sha256
from biomerge_lib.core.markup import INERT
from biomerge_lib.report.report_runs import ReportedRun

_SCRIPT = re.compile(r"<script\b.*?</script\s*>", re.DOTALL | re.IGNORECASE)
RENDERED = 15  # notebooks of the best runs, then of the others: a fifth of a second each, and up to 0.5 MB


def link_notebooks(runs: Sequence[ReportedRun], out: Path) -> dict[ReportedRun, list[tuple[str, str]]]:
    """``(name, relative address)`` of each run's executed notebooks.

    The first ``RENDERED`` lead to pages that open in any browser (made anew only where the notebook is another), the
    rest to the .ipynb files themselves, as all do that nbconvert cannot read.
    """
    folder = out.with_name(f"{out.stem}_notebooks")
    links: dict[ReportedRun, list[tuple[str, str]]] = {}
    names = [re.sub(r"[^\w.-]+", "_", run.name) for run in runs]
    left = RENDERED
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:  # as runs/mine and other/mine
            name += "-" + hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:8]
        links[run] = []
        for notebook in sorted(run.folder.glob("0*.ipynb")):
            if notebook.stem in run.outdated:
                continue
            page = folder / name / f"{notebook.stem}.html"
            shown = page if left > 0 and _render(notebook, page) else notebook
            left -= 1
            address = Path(os.path.relpath(shown.resolve(), out.parent.resolve())).as_posix()
            links[run].append((notebook.stem, quote(address)))
    return links


def _render(notebook: Path, page: Path) -> bool:
    head = f"<head>{INERT}<!-- {file_sha256(notebook)} -->"
    if page.is_file() and head in page.read_text(encoding="utf-8"):
        return True
    from nbconvert import HTMLExporter

    quiet = logging.getLogger("nbconvert")
    quiet.setLevel(logging.ERROR)  # plots have no alternative text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scrapbook's scraps have no picture
            html, _ = HTMLExporter(log=quiet).from_filename(str(notebook))
    except Exception:  # a notebook that is cut short: whatever nbformat, jsonschema or jinja2 raise
        return False
    page.parent.mkdir(parents=True, exist_ok=True)
    html = _SCRIPT.sub("", html).replace("<head>", head, 1)  # nbconvert's scripts come from the network
    page.write_text(html, encoding="utf-8")
    return True
