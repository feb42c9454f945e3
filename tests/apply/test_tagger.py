"""Raw texts get offsets of their own characters, whatever the model was shown."""

import pytest

from biomerge_lib.__main__ import main
from biomerge_lib.apply import ready_models
from biomerge_lib.apply.tagger import Tagger
from biomerge_lib.core.punctuation import find_tokens, map_back
from biomerge_lib.decoding.predictions import RawAnswer
from biomerge_lib.report.display import bracket
from tests.conftest import START, spans_of


@pytest.mark.parametrize("sentence", ["asthma attacks.", "N-acetyl (5-HT), β-blocker_2!", "x"])
def test_every_shown_span_maps_back_to_the_same_words(sentence):
    pieces = find_tokens(sentence)
    shown = " ".join(sentence[start:end] for start, end in pieces)
    for index, (start, _) in enumerate(pieces):
        for _, end in pieces[index:]:
            before = sum(b - a + 1 for a, b in pieces[:index])
            count = [b for _, b in pieces].index(end) - index + 1
            length = sum(b - a + 1 for a, b in pieces[index : index + count]) - 1
            assert map_back((before, before + length), pieces) == (start, end)
            assert shown[before : before + length].replace(" ", "") == sentence[start:end].replace(" ", "")


def test_accents_stay_at_their_letters():
    text = "Sjo\u0308gren\u0301s-x" + 70 * "e\u0301"
    pieces = [text[start:end] for start, end in find_tokens(text)]
    assert pieces[:2] == ["Sjo\u0308gren\u0301s", "-"] and "".join(pieces) == text
    assert max(map(len, pieces)) == 60


def test_offsets_are_those_of_the_whole_document(tokenizer):
    seen = []

    def answer(prompts):
        seen.extend(prompt.chunk.record.text for prompt in prompts)
        return [RawAnswer([], " 0-7 ; 900-901", "eos") for _ in prompts]

    tagger = Tagger(tokenizer, START, None, answer)
    text = "Aspirin works.\n\nHeparin, too."
    assert spans_of(tagger.predict([text, ""])) == [[(0, 7), (16, 23)], []]
    assert seen == ["Aspirin works .", "Heparin , too ."]
    assert bracket(text, [(0, 7), (16, 23)]) == "[Aspirin] works.\n\n[Heparin], too."


def test_no_text_is_refused(capsys):
    assert main(["predict", "  "]) == 2
    assert "no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("busy_percent", "own_seconds", "quota", "threads"),
    [
        (0.0, 0.0, None, 4),
        (50.0, 0.0, None, 2),
        (100.0, 4.0, "max 100000", 4),
        (100.0, 1.3, None, 1),
        (100.0, 0.2, None, 1),
        (40.0, 1.0, None, 3),
        (0.0, 1.0, "200000 100000", 2),
    ],
)
def test_a_batch_takes_the_cores_that_nobody_else_uses(
    monkeypatch, tmp_path, busy_percent, own_seconds, quota, threads
):
    """Of the four that it may use of eight, for a second: idle ones, and those that were its own; never none."""
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    clock = {"monotonic": 100.0, "process_time": 5.0}
    for name in clock:
        monkeypatch.setattr(ready_models.time, name, lambda name=name: clock[name])
    load = [busy_percent] * 4 + [0.0] * 4
    monkeypatch.setattr(ready_models.psutil, "cpu_percent", lambda percpu: load)
    monkeypatch.setattr(ready_models.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(ready_models, "CPU_QUOTA", tmp_path / "cpu.max")
    free = ready_models.FreeCores()
    clock["monotonic"] += 1
    clock["process_time"] += own_seconds
    assert free.count(4) == threads
    load[:4] = [0.0] * 4
    clock["monotonic"] += 0.01
    assert free.count(4) == threads  # too soon to say
    assert free.count(2) == min(threads, 2)
