"""Knows the notebooks: what each is called, reads and writes, and its place in a run; it opens none.

``python -m biomerge_lib.experiment.stages`` prints them for the scripts in ``slurm/``: ``03_train gpu`` a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TRAIN, DATA, GREEDY, VLLM, REPORT = "03_train", "02_data", "04_greedy_dev", "05_vllm_eval", "06_report"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A notebook.

    ``part``: ``before`` training (what it wrote stays when the run is replaced), the training itself, ``scoring`` of
    its model (parameters come from the run, and what was scored is recorded), or ``after``, which looks at runs.
    ``decoder`` names a scoring stage's predictions. ``reads`` and ``writes`` are the README's words.
    """

    part: Literal["before", "training", "scoring", "after"]
    device: Literal["cpu", "gpu"]
    reads: str
    writes: str
    decoder: str | None = None


STAGES = {
    "01_tokenizer": Stage(
        part="before", device="cpu", reads="the backbone's tokenizer", writes="`tokenizer_dir`"
    ),
    DATA: Stage(
        part="before",
        device="cpu",
        reads="the folders in `corpora`",
        writes="`data_dir/{train,dev,test}.jsonl`, `data_card.json`",
    ),
    TRAIN: Stage(
        part="training",
        device="gpu",
        reads="`data_dir`, `tokenizer_dir`",
        writes="`runs/<run_id>/checkpoints/`, `merged/`, `training.json`, `log_history.json`",
    ),
    GREEDY: Stage(
        part="scoring",
        device="gpu",
        reads="`runs/<run_id>/merged`",
        writes="`predictions-<split>-greedy.jsonl`",
        decoder="greedy",
    ),
    VLLM: Stage(
        part="scoring",
        device="gpu",
        reads="`runs/<run_id>/merged`",
        writes="`predictions-<split>-vllm.jsonl`",
        decoder="vllm",
    ),
    REPORT: Stage(part="after", device="cpu", reads="`runs/`", writes="`runs/<run_id>/report.html`"),
}
BEFORE_TRAINING = tuple(name for name, stage in STAGES.items() if stage.part == "before")
SCORING_STAGES = tuple(name for name, stage in STAGES.items() if stage.part == "scoring")

if __name__ == "__main__":
    for name, stage in STAGES.items():
        print(name, stage.device)
