"""Knows the notebooks: what each is called, reads and writes, and its place in a run; it opens none.

``python -m biomerge_lib.experiment.stages`` prints them for the scripts in ``slurm/``: ``03_train gpu`` a line.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Stage(NamedTuple):
    """A notebook: its place in a run, its cluster job's device, the README's words for what it reads and writes.

    What notebooks ``before`` training wrote stays when the run is replaced. Those that are ``scoring`` its model take
    their parameters from the run and record what they scored; ``decoder`` names their predictions.
    """

    part: Literal["before", "training", "scoring", "after"]
    device: Literal["cpu", "gpu"]
    reads: str
    writes: str
    decoder: str | None = None


DATA, TRAIN, GREEDY, VLLM, REPORT = "02_data", "03_train", "04_greedy_dev", "05_vllm_eval", "06_report"
MERGED = "`runs/<run_id>/merged`"
SPLITS = "`data_dir/{train,dev,test}.jsonl`, `data_card.json`"
TRAINED = "`runs/<run_id>/checkpoints/`, `merged/`, `training.json`, `log_history.json`"
STAGES = {
    "01_tokenizer": Stage("before", "cpu", "the backbone's tokenizer", "`tokenizer_dir`"),
    DATA: Stage("before", "cpu", "the folders in `corpora`", SPLITS),
    TRAIN: Stage("training", "gpu", "`data_dir`, `tokenizer_dir`", TRAINED),
    GREEDY: Stage("scoring", "gpu", MERGED, "`predictions-<split>-greedy.jsonl`", "greedy"),
    VLLM: Stage("scoring", "gpu", MERGED, "`predictions-<split>-vllm.jsonl`", "vllm"),
    REPORT: Stage("after", "cpu", "`runs/`", "`runs/<run_id>/report.html`"),
}
BEFORE_TRAINING = tuple(name for name, stage in STAGES.items() if stage.part == "before")
SCORING_STAGES = tuple(name for name, stage in STAGES.items() if stage.part == "scoring")

if __name__ == "__main__":
    for name, stage in STAGES.items():
        print(name, stage.device)
