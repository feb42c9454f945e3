"""Whether anything falls over: properties over damaged files, odd values and texts, and trainings killed at 20 moments.

    python -m benchmarks.hostile                    # 50,000 inputs: a quarter of an hour of two cores
    python -m benchmarks.hostile --inputs 4000      # to try it

Runs tests/hostile with other inputs each time. Writes reports/hostile.json and reports/hostile.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from benchmarks.common import REPORTS, origin, write_report
from biomerge_lib.experiment.runs import PROJECT_DIR
from biomerge_lib.report.display import markdown_table

# By hand: what such trials found, and what was done. The first two counts are of earlier calls, 66,700 in all.
FOUND = [
    (
        "our own files: cut, empty, nested, of other shapes",
        "703 of 1,351",
        "one typed reading names file and line",
    ),
    ("what a server answers", "33 of 273", "a schema for `/v1/models` and completions"),
    (
        "checkpoints with a flipped bit or without a file",
        "not counted",
        "checksums of its files; an older one is used",
    ),
    (
        "an epoch's F1 after a kill before its greedy pass",
        "each time",
        "the run that goes on makes the pass up",
    ),
    ("YAML: 100,000 brackets crash the process in C", "each time", "its depth is looked at first"),
    ("YAML: a list that holds itself, `!!timestamp x`", "each time", "refused with the line, or as a value"),
    (
        "partial answers: bytes gone from the middle",
        "another result in silence",
        "a checksum of all lines so far",
    ),
    ("texts: `<TAG>` or `</s>` became tokens of control", "each time", "broken up in every prompt"),
    ("numbers of 5,000 digits, `nan`, `inf`, paths of 300 characters", "not counted", "refused by name"),
    (
        "corpora: offsets of 5,000 digits, XML encodings, external entities",
        "not counted",
        "refused with file and line",
    ),
    ("`--out /dev/null` would replace the device", "seen in the code", "what is no file is written to"),
    ("a run's provenance or notebook metadata that is no table", "2", "part of the typed reading"),
    (
        "`deepspeed=` and a tab, a quote or a control character",
        "3 kinds in 514 overrides",
        "taken as it stands",
    ),
    ("a checkpoint's checksums that name no file", "1 in 462", "only files that are there are compared"),
    ("`a.b. a.b. ...`, 8,000 spans, 60,000 characters: 9 to 21 s", "3", "linear time"),
]


class Outcomes:
    """A plug-in of pytest that counts how tests ended, by their function."""

    def __init__(self) -> None:
        self.failed: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed[report.nodeid.split("::")[1].partition("[")[0]] += report.failed


def describe(report: dict[str, Any]) -> list[str]:
    """The page's lines."""
    rows = [[name, f"{tried:,}"] for name, tried in report["tried"].items()]
    rows.append(["**all**", f"**{sum(report['tried'].values()):,}**"])
    failed = "; ".join(f"`{name}`" for name in report["failed"]) or "none"
    return [
        "# Hostile inputs",
        "",
        f"Written by `{report['command']}` on {report['device']}, commit `{report['commit']}`. Every input must end in "
        "what a function promises, or in an error that says where and what to do. Tests that failed in this run: "
        f"{failed}.",
        "",
        *markdown_table(["what", "tried"], rows).splitlines(),
        "",
        "What such trials found before, all of it mended (smallest cases: `tests/hostile/test_cases.py`):",
        "",
        *markdown_table(["found", "how often", "mended"], [list(row) for row in FOUND]).splitlines(),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=50_000, help="inputs in all (%(default)s)")
    options = parser.parse_args()
    import pytest

    outcomes = Outcomes()
    words = ["-q", "-p", "no:cacheprovider", "--timeout=0", f"--hostile={options.inputs}", "tests/hostile"]
    status = pytest.main(words, plugins=[outcomes])
    tried = dict(sys.modules["tests.hostile.damage"].TRIED)
    report = {
        **origin("hostile"),
        "tried": tried,
        "failed": [name for name, count in outcomes.failed.items() if count],
    }
    write_report(REPORTS / "hostile.json", report, describe(report))
    print(REPORTS.relative_to(PROJECT_DIR) / "hostile.md")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
