"""Punctuation set apart: every span of the new text is one of the old."""

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.punctuation import find_tokens, map_back, set_apart
from biomerge_lib.core.records import Record, read_records
from biomerge_lib.corpora.conversion import write_corpus


def test_punctuation_is_set_apart_and_each_span_is_found_in_the_original_text():
    record = Record(
        "(Aspirin), β-blocker NSAIDs.", ((1, 8), (11, 20), (21, 26)), "doc", "corpus", types=("A", "B", "C")
    )
    apart = set_apart(record)
    assert apart.text == "( Aspirin ) , β - blocker NSAIDs ."
    assert [apart.text[start:end] for start, end in apart.spans] == ["Aspirin", "β - blocker", "NSAID"]
    tokens = find_tokens(record.text)
    assert tuple(map_back(span, tokens) for span in apart.spans) == record.spans
    assert apart.types == record.types and set_apart(apart) == apart


def test_a_span_with_white_space_at_its_edge_is_refused():
    with pytest.raises(DataError, match=r"corpus/doc: a mention in 'a  b' begins or ends with white space"):
        set_apart(Record("a  b", ((0, 2),), "doc", "corpus"))


def test_a_corpus_is_written_with_its_punctuation_apart(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    for number, split in enumerate(("train", "dev", "test")):
        said = f"{number}|t|Aspirin ({split}).\n{number}|a|It harms.\n{number}\t0\t7\tAspirin\tDrug\n"
        (source / f"{split}.txt").write_text(said)
    card = write_corpus([str(source)], tmp_path / "ner", punctuation="apart")
    texts = [record.text for record in read_records(tmp_path / "ner/train.jsonl")]
    assert texts == ["Aspirin ( train ) .", "It harms ."]
    assert card["union"]["options"]["punctuation"] == "apart"
