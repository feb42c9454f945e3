"""Raw texts get offsets of their own characters, whatever the model was shown."""

import pytest

from biomerge_lib.__main__ import main
from biomerge_lib.apply.tagger import Tagger, find_pieces, map_back
from biomerge_lib.decoding.predictions import RawAnswer
from biomerge_lib.report.display import bracket
from tests.conftest import START, spans_of


@pytest.mark.parametrize("sentence", ["asthma attacks.", "N-acetyl (5-HT), β-blocker_2!", "x"])
def test_every_shown_span_maps_back_to_the_same_words(sentence):
    pieces = find_pieces(sentence, spaced=True)
    shown = " ".join(sentence[start:end] for start, end in pieces)
    for index, (start, _) in enumerate(pieces):
        for _, end in pieces[index:]:
            before = sum(b - a + 1 for a, b in pieces[:index])
            count = [b for _, b in pieces].index(end) - index + 1
            length = sum(b - a + 1 for a, b in pieces[index : index + count]) - 1
            assert map_back((before, before + length), pieces) == (start, end)
            assert shown[before : before + length].replace(" ", "") == sentence[start:end].replace(" ", "")


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
