"""Knows the page that compares predictions, of runs or files, with the first of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.files import file_sha256
from biomerge_lib.core.markup import code_in_markdown, in_markdown
from biomerge_lib.decoding.predictions import read_predictions
from biomerge_lib.experiment.provenance import provenance
from biomerge_lib.experiment.recorded import outdated_stages, read_metrics
from biomerge_lib.experiment.stages import STAGES
from biomerge_lib.report.display import markdown_table
from biomerge_lib.scoring.significance import PERMUTATIONS, compare_predictions


def compare_runs(
    names: Sequence[str], split: str, decoder: str, *, places: Sequence[str] | None = None
) -> str:
    """A Markdown page; a name is a predictions file, or a run folder, of which ``split`` and ``decoder`` name one.

    ``places`` are where the names' predictions lie, if they are other than that.

    Raises:
        ParameterError: fewer than two places.
        DataError: no such file, or it is out of date, cannot be read, or is about other records than the first one.
    """
    if len(names) < 2:
        raise ParameterError("compare takes two runs or more: the first one, and what is compared with it.")
    paths = [find_predictions(place, split, decoder) for place in places or names]
    first, *others = [read_predictions(path) for path in paths]
    compared = [compare_predictions(first, other) for other in others]
    rows = [{"F1": f"{compared[0].first_f1:.4f}"}, *(comparison.cells() for comparison in compared)]
    header = ["predictions", *rows[1], "SHA-256"]
    cells = [
        [in_markdown(name), *map(row.get, header[1:-1]), file_sha256(path)[:12]]
        for name, path, row in zip(names, paths, rows, strict=True)
    ]
    against, *compared_names = map(in_markdown, names)
    verdicts = [
        f"{name} is {'better' if one.difference > 0 else 'worse'} than {against} by more than chance."
        if one.p <= 0.05
        else f"{name} differs from {against} by no more than chance."
        for name, one in zip(compared_names, compared, strict=True)
    ]
    told = [f"--{option}={value}" for option, value in (("split", split), ("decoder", decoder))]
    words = [*names, *(word for word in told if word not in ("--split=dev", "--decoder=greedy"))]
    command = shlex.join(["python", "-m", "biomerge_lib", "compare", *words])
    units = compared[0].units
    if units.endswith("sentences"):
        units += " (documents are not known, or have one each)"
    return (
        f"{markdown_table(header, cells)}\n\n{' '.join(verdicts)}\n\n"
        f"Exact-span micro F1 of {len(first):,} records; differences from the first line, paired over {units}. p is "
        f"two-sided, by approximate randomisation ({PERMUTATIONS:,} permutations), and not corrected for the number of "
        f"lines; the interval is a bootstrap's.\n\n{code_in_markdown(command)}, commit {provenance()['commit']}."
    )


def find_predictions(place: str, split: str, decoder: str) -> Path:
    """A predictions file, or that of a run folder.

    Raises:
        DataError: the run's is out of date.
    """
    name = f"predictions-{split}-{decoder}.jsonl"
    stage = next(stage for stage, of in STAGES.items() if of.decoder == decoder)
    path = Path(place) / name if Path(place).is_dir() else Path(place)
    if path.name == name and (why := outdated_stages(read_metrics(path.parent), path.parent).get(stage)):
        raise DataError(f"{path} is out of date ({why}). Run {stage} again.")
    return path
