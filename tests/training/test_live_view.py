"""What a training shows in a notebook: curves that say their numbers, and a row an evaluation."""

import re
from base64 import b64decode

from biomerge_lib.training.trainer_callbacks import training_as_html

LOG = [
    {"step": 2, "loss": 4.0, "learning_rate": 0.1},
    {"step": 4, "loss": 1.0},
    {"step": 4, "eval_loss": 0.5, "eval_answer_ner_f1": 0.25, "eval_runtime": 3.0},
    {"step": 8, "loss": 0.5},
    {"step": 8, "greedy_dev_ner_f1": 0.75},
]


def test_the_view_has_the_last_numbers_a_curve_each_and_a_row_an_evaluation():
    page = training_as_html(LOG, 8, "step 8 of 8")
    picture = b64decode(re.search(r'<img alt="Curves[^>]*base64,([^"]*)"', page)[1]).decode()
    loss, answer, greedy = re.findall(r'points="([^"]*)"', picture)
    assert loss == "140.0,0.0 280.0,112.5 560.0,131.2"  # of 4, the highest loss, over 8 steps
    assert (answer, greedy) == ("280.0,112.5", "560.0,37.5")  # F1 has the whole of 0 to 1
    assert "step 8 of 8" in page and "training loss 0.500</b> (0 to 4)" in page
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in page.split("</tr>")]
    assert cells[1:3] == [["4", "1.0000", "0.5000", "0.2500", ""], ["8", "0.5000", "", "", "0.7500"]]
    assert "eval_runtime" not in page


def test_a_training_without_numbers_yet_and_a_long_one_can_be_shown():
    assert "<table" not in training_as_html([], 100, "step 0 of 100")
    long = [{"step": step, "loss": 0.0, "eval_loss": 1.0} for step in range(1, 101)]
    assert training_as_html(long, 100, "").count("<tr") == 20 + 1
