import random

import pytest

from biomerge_lib.core.spans import format_spans, parse_answer, parse_spans, snap_to_words


def test_a_span_string_is_sorted_and_without_duplicates():
    assert format_spans([(20, 34), (0, 7), (0, 7)]) == "<TAG> 0-7 ; 20-34"
    assert format_spans([]) == "<TAG>"


def test_parse_is_the_inverse_of_format():
    draw = random.Random(1)
    for _ in range(200):
        starts = [draw.randrange(2000) for _ in range(draw.randrange(14))]
        spans = sorted({(start, start + draw.randrange(1, 40)) for start in starts})
        assert parse_spans(format_spans(spans)) == spans


@pytest.mark.parametrize("dash", ["-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2212", "\uff0d"])
def test_any_dash_and_loose_white_space_is_read(dash):
    assert parse_spans(f"<TAG>  0{dash}7;20 {dash} 34 ;") == [(0, 7), (20, 34)]


def test_what_cannot_be_read_is_reported_not_hidden():
    answer = parse_answer(" 20-34 ; 0-7 ; x-9 ; 5 ; 30-99", text_length=36)
    assert answer.spans == [(0, 7), (20, 34), (30, 99)]
    assert answer.unreadable == ["x-9", "5"]
    assert answer.out_of_text == [(30, 99)]
    assert not answer.is_sorted


def test_a_span_may_end_with_the_text_and_no_later():
    assert parse_answer(" 0-7 ; 30-36 ; 30-37", text_length=36).out_of_text == [(30, 37)]


def test_start_must_be_before_end():
    assert parse_answer("7-7 ; 9-3", text_length=20).out_of_text == [(7, 7), (9, 3)]


def test_snapping_widens_to_the_words_touched():
    words = [(0, 7), (8, 11), (12, 19), (20, 26), (27, 34)]
    assert snap_to_words((19, 33), words) == (20, 34)
    assert snap_to_words((1, 6), words) == (0, 7)
    assert snap_to_words((90, 95), words) == (90, 95)
