"""A notebook of a few cells, as papermill takes it."""

from pathlib import Path

import nbformat


def write_notebook(path: Path, *sources: str) -> Path:
    """A parameters cell with ``x = 1``, and a code cell for each of ``sources``."""
    cells = [nbformat.v4.new_code_cell(source) for source in ("# Parameters\nx = 1", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path
