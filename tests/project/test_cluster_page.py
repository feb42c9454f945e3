"""docs/cluster.md: hours follow from the measurements in reports/, settings are those of the site's example."""

import json
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
SENTENCES, A_FIFTH, DEV, EPOCHS = 4560, 912, 4582, 3
# Shares of an H200's speed: bfloat16 products, memory bandwidth.
CARDS = {
    "H200, the whole card": ("job", 1, 1),
    "H200, 48 GB of it": ("a100-echo_start", 1, 1),
    "H100 94 GB, extrapolated": ("job", 1, 2.4 / 4.8),
    "A100 80 GB, extrapolated": ("job", 312 / 989, 2.0 / 4.8),
    "A100 48 GB or less free, extrapolated": ("a100-echo_start", 312 / 989, 2.0 / 4.8),
}


def report(name):
    return json.loads((ROOT / f"reports/{name}.json").read_text())


def tokens_a_sentence():
    """Of BC5CDR with Llama-3's tokenizer: the mean prompt of ``echo_start``, and an answer as trainings had it."""
    means = {
        row["offset_anchors"]: row["mean"]
        for row in report("prompt_lengths")["rows"]
        if (row["tokenizer"], row["corpus"]) == ("Llama-3", "bc5cdr_iob")
    }
    measured = report("training_speed")["runs"][0]
    [way] = [row for row in measured["rows"] if row["way"] == "packed+compiled"]
    answer = way["tokens_a_second"] / way["sentences_a_second"] - means["start"]
    return means["echo_start"] + answer


def test_the_hours_follow_from_the_measurements():
    rows = {row["row"]: row for row in report("brief_job")["rows"]}
    per_sentence = tokens_a_sentence()
    assert f"{per_sentence:.1f} tokens a sentence" in PAGE
    [decoded] = [row["sentences/s"] for row in report("served_speed_8b")["decoded"]]
    a_run = rows["a100-echo_start"]
    assert "subsample=0.25 num_train_epochs=1 eval_limit=32" in a_run["command"]
    start = a_run["seconds"] - SENTENCES / 4 * per_sentence / a_run["tokens_a_second"]
    for card, (measured, products, memory) in CARDS.items():
        rate = rows[measured]["tokens_a_second"] * products
        greedy = EPOCHS * DEV / decoded / memory
        steps, short = (EPOCHS * number * per_sentence / rate for number in (SENTENCES, A_FIFTH))
        hours, point = ((seconds + greedy + start) / 3600 for seconds in (steps, short))
        line = (
            f"| {card} | {rate:,.0f} | {steps:.0f} | {greedy:.0f} | {start:.0f} | {hours:.2f} | {point:.2f} |"
        )
        assert line in PAGE, line


def test_every_setting_of_the_sites_example_is_explained():
    example = (ROOT / "slurm/site.example.sh").read_text(encoding="utf-8")
    names = set(re.findall(r"^#export (\w+)=", example, flags=re.M))
    assert {"SBATCH_PARTITION", "MODULES", "HF_HOME"} <= names
    assert not [name for name in names - {"SBATCH_QOS"} if f"`{name}" not in PAGE]


@pytest.mark.parametrize("name", ["job_single_ner", "job_single_ner_h100", "job_sweep_ner"])
def test_no_job_file_names_anyones_place(name):
    text = (ROOT / f"slurm/{name}.sbatch").read_text() + (ROOT / "slurm/common.sh").read_text()
    assert "$HOME/nmishra" not in text and "envs/taskmerge" not in text
