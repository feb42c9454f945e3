import json

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record, read_records, write_records

GOOD = {
    "task": "NER",
    "input": "<NER> Aspirin can trigger asthma attacks .",
    "target": "<TAG> 0-7 ; 20-34",
    "doc_id": "bc5cdr_014",
    "dataset": "bc5cdr",
}


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_records_survive_writing_and_reading(tmp_path):
    records = [
        Record("IFN-γ and 5′-\U0001d6fc 😀 ends", ((0, 5), (15, 16)), "d1", "greek"),
        Record("Nothing here .", (), "d2", "greek"),
    ]
    assert write_records(tmp_path / "train.jsonl", records) == 2
    assert read_records(tmp_path / "train.jsonl") == records
    assert records[0].text[15:16] == "😀"


def test_the_written_line_is_the_contracts(tmp_path):
    write_records(
        tmp_path / "x.jsonl",
        [Record("Aspirin can trigger asthma attacks .", ((20, 34), (0, 7)), "bc5cdr_014", "bc5cdr")],
    )
    assert json.loads((tmp_path / "x.jsonl").read_text()) == GOOD


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": "<TAG> 0-7 ; 20-99"}, "20-99 is not inside the text of 36 characters"),
        ({"target": "<TAG> 7-7"}, "7-7 is not inside"),
        ({"target": "<TAG> zero"}, "cannot read 'zero'"),
        ({"input": "Aspirin"}, "must begin with '<NER> '"),
        ({"input": "<NER>  "}, "is empty"),
        ({"doc_id": 7}, "doc_id: Input should be a valid string"),
        ({"task": "RE"}, "task: Input should be 'NER'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, change, reason):
    path = write_lines(tmp_path / "dev.jsonl", json.dumps(GOOD), json.dumps(GOOD | change))
    with pytest.raises(DataError, match=r"dev\.jsonl:2: ") as error:
        read_records(path)
    assert reason in str(error.value)


def test_a_missing_key_not_json_and_not_utf8_are_named(tmp_path):
    without = {key: value for key, value in GOOD.items() if key != "dataset"}
    with pytest.raises(DataError, match=r"dataset: Field required\. A record has task"):
        read_records(write_lines(tmp_path / "a.jsonl", json.dumps(without)))
    with pytest.raises(DataError, match=r"b\.jsonl:1: not JSON"):
        read_records(write_lines(tmp_path / "b.jsonl", "{'task'"))
    (tmp_path / "c.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: not UTF-8"):
        read_records(tmp_path / "c.jsonl")


def test_a_missing_and_an_empty_file_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="02_data"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no records"):
        read_records(write_lines(tmp_path / "empty.jsonl", "", ""))


def test_a_crash_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "train.jsonl"
    good = Record("Aspirin .", ((0, 7),), "d", "x")
    write_records(path, [good])
    with pytest.raises(DataError, match="not inside"):
        write_records(path, [good, Record("Aspirin .", ((0, 99),), "d", "x")])
    assert read_records(path) == [good]
