"""Every format, exactly: text[start:end] is the annotated mention; what is malformed stops with file and line."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.records import Record, parse_record, records_sha256, write_records
from biomerge_lib.corpora.documents import Document, Mention, ReadCounts, read_spans
from biomerge_lib.corpora.formats import READ_ALL, Format, Reading, splits_of
from biomerge_lib.corpora.readers import Corpus, iter_source, read_corpus
from biomerge_lib.corpora.sentences import find_document, find_lines, find_sentences, join_cut, split_document
from biomerge_lib.corpora.sources import FORMATS, find_source
from tests.support.shared_corpora import shared_corpus

GOOD_IOB = "Aspirin\tB-Chemical\nhelps\tO\n\nNo\tO\n"
SPLITS = {"train": "train", "devel": "dev", "test": "test"}


def mentions(record: Record) -> list[str]:
    return [record.text[start:end] for start, end in record.spans]


def all_mentions(records: list[Record]) -> list[str]:
    return [mention for record in records for mention in mentions(record)]


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read_lines(tmp_path: Path, content: str | bytes, **options) -> tuple[list[Record], ReadCounts]:
    """A TSV file's records."""
    counts = ReadCounts()
    path = write_files(tmp_path, {"train.tsv": content}) / "train.tsv"
    source = replace(find_source(path, splits=("train",)), name="x")
    return list(iter_source(source, "train", Reading(**options), counts)), counts


def unaccounted(counts: ReadCounts) -> int:
    """Annotated mentions that are neither spans nor counted as left out."""
    left_out = counts.other_types + counts.composite_parts + counts.discontinuous_skipped + counts.duplicates
    return counts.annotated - counts.spans - left_out - counts.without_location - len(counts.bad_mentions)


def read_one(tmp_path: Path, files: dict[str, str | bytes], **options) -> tuple[list[Record], ReadCounts]:
    """The records of a corpus that has only a train split."""
    corpus = read_corpus(write_files(tmp_path / "corpus", files), splits=("train",), **options)
    assert unaccounted(corpus.counts["train"]) == 0
    return corpus["train"], corpus.counts["train"]


def brat(text: str, *lines: str) -> dict[str, str | bytes]:
    return {"train/d1.txt": text, "train/d1.ann": "".join(f"{line}\n" for line in lines)}


def pubtator(title: str, abstract: str, *lines: str) -> str:
    return f"1|t|{title}\n1|a|{abstract}\n" + "".join(f"1\t{line}\n" for line in lines)


def bioc(*passages: str) -> str:
    body = "".join(f"<passage>\n{passage}\n</passage>" for passage in passages)
    return f"<?xml version='1.0'?>\n<collection><document>\n<id>1</id>\n{body}</document></collection>\n"


def annotation(offset: int, length: int, words: str, infons: str = "") -> str:
    type_infon = '<infon key="type">Chemical</infon>'
    place = f'<location offset="{offset}" length="{length}"/>'
    return f"<annotation>{type_infon}{infons}{place}<text>{words}</text></annotation>"


# --- The shared corpora: counts, and every mention's words ----------------------------------------------------


@cache
def shared(name: str, spelled: str = "") -> Corpus:
    return read_corpus(f"{spelled}{shared_corpus(name)}")


IOB_COUNTS = {  # sentences, spans of train, devel, test (corpora/README.md)
    "bc5cdr_iob": [(4560, 9385), (4581, 9593), (4797, 9809)],
    "bc2gm_iob": [(12574, 15197), (2519, 3061), (5038, 6325)],
    "jnlpba_iob": [(16813, 46766), (1739, 4551), (3856, 8662)],
    "anatem_iob": [(5861, 6946), (2118, 2139), (3830, 4616)],
    "bionlp13cg_iob": [(3033, 10826), (1003, 3616), (1906, 6881)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IOB_COUNTS)
def test_iob_corpora_have_their_sentences_and_mentions(name):
    corpus = shared(name)
    assert corpus.source.name == name.removesuffix("_iob") and corpus.source.format == "iob"
    assert [(len(records), len(all_mentions(records))) for records in corpus.values()] == IOB_COUNTS[name]
    for split, counts in corpus.counts.items():
        expected = {"begun_by_inside": 1} if (name, split) == ("jnlpba_iob", "train") else {}
        assert counts.annotated == counts.spans == len(all_mentions(corpus[split]))
        assert counts.to_dict().items() >= expected.items() and len(counts.to_dict()) == 5 + len(expected)
    for split, [path] in corpus.source.files.items():
        # The IOB2 tags once more, the plain way: the tokens from a B- to before the next O or B-.
        rows = [
            line.split("\t") for line in path.read_text("utf-8").split("\n") if not line.startswith("-DOC")
        ]
        runs = re.findall(r"[BI]I*", "".join(row[-1][:1] or "O" for row in rows))
        tokens = iter([row[0] for row in rows if row[-1][:1] in ("B", "I")])
        assert all_mentions(corpus[split]) == [" ".join(next(tokens) for _ in run) for run in runs]


def test_anatem_in_brat_has_every_mention_and_every_character():
    corpus = shared("anatem_brat")
    folder = shared_corpus("anatem_brat")
    numbers = [(c.documents, c.annotated, c.spans, c.sentences) for c in corpus.counts.values()]
    assert numbers == [(606, 6946, 6946, 5814), (202, 2139, 2139, 2109), (404, 4616, 4616, 3821)]
    for counts in corpus.counts.values():  # nothing trimmed, joined, covered, left out or counted otherwise
        assert set(counts.to_dict()) == {"documents", "sentences", "annotated", "spans", "types"}
    assert sum(map(cuts_a_word, chain(*corpus.values()))) == 78
    for name, split in SPLITS.items():
        by_document: dict[str, list[Record]] = {}
        for record in corpus[split]:
            by_document.setdefault(record.doc_id, []).append(record)
        for path in (folder / name).glob("*.txt"):
            records = by_document.get(path.stem, [])
            rows = [
                line.split("\t") for line in path.with_suffix(".ann").read_text("utf-8").splitlines() if line
            ]
            rows.sort(key=lambda row: int(row[1].split()[1]))
            assert all_mentions(records) == [row[2] for row in rows]
            text = path.read_text("utf-8")
            assert "".join("".join(record.text.split()) for record in records) == "".join(text.split())
            assert all(record.text in text and record.text == record.text.strip() for record in records)


def test_anatems_sentences_are_those_of_its_iob_version_within_one_percent():
    for split, records in shared("anatem_iob").items():
        assert abs(len(shared("anatem_brat")[split]) / len(records) - 1) < 0.01


@pytest.mark.slow
def test_bc5cdr_in_bioc_and_pubtator_is_the_same_corpus():
    from_bioc, from_pubtator = shared("bc5cdr_original", "bioc:"), shared("bc5cdr_original", "pubtator:")
    assert dict(from_bioc) == dict(from_pubtator)
    for corpus, parts in ((from_bioc, [185, 182, 119]), (from_pubtator, [0, 0, 0])):
        counts = list(corpus.counts.values())
        assert [c.documents for c in counts] == [500, 500, 500]
        assert [c.spans for c in counts] == [9385, 9591, 9809]
        assert [c.composite_parts for c in counts] == parts  # 9385 + 185 annotations in BioC's training set
        assert [c.annotated - c.spans for c in counts] == parts
        assert [c.other_lines for c in counts] == [1038, 1012, 1066]  # relations
        assert [c.sentences for c in counts] == [4553, 4554, 4779]
        assert not any(c.duplicates or c.overlapping or c.boundaries_joined or c.offset_units for c in counts)
    assert sum(map(cuts_a_word, chain(*from_bioc.values()))) == 15
    names = {"Training": "train", "Development": "dev", "Test": "test"}
    for name, split in names.items():
        text = (shared_corpus("bc5cdr_original") / f"CDR_{name}Set.PubTator.txt").read_text("utf-8")
        rows = [line.split("\t") for line in text.split("\n")]
        annotated = [(row[0], int(row[1]), row[3]) for row in rows if len(row) > 4]
        records = from_bioc[split]
        assert [(r.doc_id, words) for r in records for words in mentions(r)] == [
            (doc_id, words) for doc_id, _, words in annotated
        ]


def cuts_a_word(record: Record) -> int:
    """Mentions that begin or end inside a run of letters and digits."""
    text = f" {record.text} "
    edges = [((start, start + 1), (end, end + 1)) for start, end in record.spans]
    return sum(any(text[a].isalnum() and text[b].isalnum() for a, b in pairs) for pairs in edges)


def test_the_bundled_sample_keeps_its_documents():
    corpus = read_corpus("sample")
    assert (corpus.source.name, corpus.source.format, set(corpus)) == (
        "sample",
        "iob",
        {"train", "dev", "test"},
    )
    assert corpus["train"][0] == Record(
        "Aspirin can trigger asthma attacks in sensitive patients .",
        ((0, 7), (20, 34)),
        "sample_001",
        "sample",
        types=corpus["train"][0].types,
    )


# --- IOB ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected", "begun_by_inside"),
    [
        ("B-X I-X O O", ["a b"], 0),
        ("B-X B-X I-X O", ["a", "b c"], 0),  # adjacent mentions stay two
        ("I-X I-X O I-Y", ["a b", "d"], 2),  # I- without B- (or IOB1) begins a mention
        ("B-X I-Y I-Y O", ["a", "b c"], 1),  # of another type too
        ("S-X B-Y I-Y E-Y", ["a", "b c d"], 0),  # IOBES
        ("U-X B-Y L-Y I-Y", ["a", "b c", "d"], 1),  # BILOU: nothing continues after L
        ("E-X E-X O O", ["a", "b"], 2),
        ("B-X M-X E-X W-Y", ["a b c", "d"], 0),  # BMES
        ("B I O B", ["a b", "d"], 0),  # without a type
        ("O O O O", [], 0),
    ],
)
def test_tags_become_mentions(tmp_path, tags, expected, begun_by_inside):
    rows = "".join(f"{token}\t{tag}\n" for token, tag in zip("abcd", tags.split(), strict=True))
    (record,), counts = read_lines(tmp_path, rows)
    assert (record.text, mentions(record)) == ("a b c d", expected)
    assert counts.begun_by_inside == begun_by_inside


def test_a_first_line_of_names_is_no_sentence(tmp_path):
    (record,), _ = read_lines(tmp_path, "token\tLabel\nIL-2\tB-Gene\n")
    assert (record.text, record.spans) == ("IL-2", ((0, 4),))
    (record,), _ = read_lines(tmp_path, "Label\tO\nIL-2\tB-Gene\n")  # a word of the text
    assert (record.text, record.spans) == ("Label IL-2", ((6, 10),))


def test_iob_offsets_are_code_points(tmp_path):
    rows = "e\u0301tude\tO\n😀\tO\n5\u00a0mg\tB-Dose\nIFN-γ\tB-Gene\nIFN-γ\tB-Gene\n"
    (record,), counts = read_lines(tmp_path, rows)
    assert record.text == "e\u0301tude 😀 5\u00a0mg IFN-γ IFN-γ"
    assert record.spans == (
        (7 + 2, 13),
        (14, 19),
        (20, 25),
    )  # é is two code points, 😀 one; a repeated mention is two
    assert counts.types == {"Dose": 1, "Gene": 2}


@pytest.mark.parametrize(
    "content",
    [
        "Aspirin\tB-Chemical\r\nhelps\tO\r\n\r\n\r\nNo\tO",  # CRLF, empty lines, no line end at the end
        "\ufeffAspirin\tB-Chemical\nhelps\tO\n\t\nNo\tO\n\n\n",  # byte order mark, a line of only a tab
        "# sent_id = 1\nAspirin\tB-Chemical\nhelps\tO\n \nNo\tO\n",  # a comment, a line of only a blank
        "Aspirin NN x B-Chemical\nhelps VB x O\n\nNo UH x O\n",  # CoNLL-2003: more columns, by blanks
        "Aspirin\tNN\tB-Chemical\nhelps\tVB\tO\n\nNo\tUH\tO\n",
        "-DOCSTART-\tO\n\nAspirin\tB\nhelps\tO\n\n-DOCSTART-\tO\nNo\tO\n",
        " Aspirin \tB\nhelps\tO\n\u00a0\tO\n\nNo\tO\n",  # white space at a token's edges; a token of nothing else
        "Aspirin\tB\rhelps\tO\r\rNo\tO\r",  # an old Mac's line ends
        "Aspirin\tB\nhelps\tO\n\n\ufeffNo\tO\n",  # files that were joined
    ],
)
def test_iob_in_many_hands(tmp_path, content):
    records, _ = read_lines(tmp_path, content)
    assert [(record.text, record.spans) for record in records] == [("Aspirin helps", ((0, 7),)), ("No", ())]


@pytest.mark.parametrize(
    "content",
    [
        "# text = No Aspirin helps vitamin E\n{}",  # ends as a line with a tag does
        "#hepatitis B\n{}\n#C B\n",  # the width of a row too, but all other tags have types
        "# PMID\t7\n{}\n#x\tY\n",
        "{}\n# global.columns = ID FORM O\n",
    ],
)
@pytest.mark.parametrize("separator", ["\t", " ", "  "])
def test_a_comment_is_no_token(tmp_path, content, separator):
    rows = "Aspirin\tB-Chem\nhelps\tO\n#\tO\n#1\tB-Rank\n".replace("\t", separator)
    (record,), counts = read_lines(tmp_path, content.format(rows))
    assert (record.text, mentions(record)) == ("Aspirin helps # #1", ["Aspirin", "#1"])
    assert counts.documents == 1 and counts.other_lines == content.count("#")


@pytest.mark.parametrize(
    "rows",
    [
        "IL B-Gene +\n2\u00a0R E-Gene -\nfell O +\n",  # flair: whether a blank follows
        "IL\tB-Gene\t\n2\u00a0R\tM-Gene\t\nfell\tO\t\n",  # a tab at each line's end
        "IL\tB-Gene\n2\u00a0R\tI-Gene\t\t\nfell\tO\t\n",  # at some
        "1 IL NN B-Gene _\n2 2\u00a0R NN E-Gene _\n3 fell VBD O _\n",
    ],
)
def test_a_column_without_tags_is_not_taken_for_them(tmp_path, rows):
    (record,), _ = read_lines(tmp_path, rows)
    assert (record.text, record.spans) == ("IL 2\u00a0R fell", ((0, 6),))


def test_a_column_of_ids_before_the_tokens_tells_documents(tmp_path):
    rows = [
        "P7\t1\ta\tO",
        "P7\t2\tb\tB-X",
        "P7\t3\tc\tO",
        "",
        "P7\t1\td\tO",
        "P7\t2\te\tO",
        "",
        "P9\t1\tf\tO",
    ]
    records, _ = read_lines(tmp_path, "\n".join(rows))
    assert [(record.text, record.doc_id) for record in records] == [
        ("a b c", "P7"),
        ("d e", "P7"),
        ("f", "P9"),
    ]
    counted = "\n".join(rows).replace("P7", "0").replace("P9", "1")
    records, _ = read_lines(tmp_path, counted)
    assert [record.doc_id for record in records] == ["x_train_0", "x_train_0", "x_train_1"]
    sentences = "1\ta\tO\n1\tb\tB-X\n1\tc\tO\n\n2\td\tO\n\n3\te\tO\n"
    records, _ = read_lines(tmp_path, sentences)
    assert [record.doc_id for record in records] == [f"x_train_s0000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "rows",
    [
        "1\tIL-2\tB-Gene\n1\trose\tO\n1\t.\tO\n2\tNo\tO\n2\t.\tO\n2\t.\tO\n",  # sentences by their numbers
        "1 IL-2 B-Gene\n2 rose O\n3 . O\n1 No O\n2 . O\n3 . O\n",  # tokens by theirs
        "0 IL-2 B-Gene\n5 rose O\n9 . O\n0 No O\n3 . O\n4 . O\n",  # by where they start
        "1 IL-2 B-Gene\n2-3 rose O\n3 . O\n1 No O\n2 . O\n2.1 . O\n",  # some have two, or none of their own
        "Sentence\tWord\tTag\nSentence: 1\tIL-2\tB-Gene\n\trose\tO\n\t.\tO\nSentence: 2\tNo\tO\n\t.\tO\n\t.\tO\n",
    ],
)
def test_a_column_ends_sentences_where_no_blank_line_does(tmp_path, rows):
    records, _ = read_lines(tmp_path, rows)
    assert [(record.text, mentions(record)) for record in records] == [
        ("IL-2 rose .", ["IL-2"]),
        ("No . .", []),
    ]
    for firsts in ("1 1", "1 2", "x y", "1 2 3", "5 x 5 y z"):  # nothing ends a sentence
        rows = "".join(f"{first}\tno\tO\n" for first in firsts.split())
        [record], _ = read_lines(tmp_path, rows, token_column=1)
        assert record.text.split() == ["no"] * len(firsts.split())
    # Lines are counted as the file has them.
    with pytest.raises(DataError, match=r"train.tsv:4: unknown tag 'X'"):
        read_lines(tmp_path, "1\ta\tB\n2\tb\tO\n1\tc\tO\n2\td\tX\n")


@pytest.mark.parametrize("tag", ["B-X;B-Y", "B-X|B-Y", "B-X,O", "B-X/0.98", "B-X:.5", "B-X 1.0"])
def test_a_tag_of_two_or_with_a_number_is_refused(tmp_path, tag):
    with pytest.raises(
        DataError, match=rf"train.tsv:1: the tag '{re.escape(tag)}' holds two tags, or a probability"
    ):
        read_lines(tmp_path, f"a\t{tag}\nb\tO\n")
    types = ["T103,T038", "Gene/Protein 2", "CD4+B-cell", "ICD:250.0", "E11.9"]
    _, counts = read_lines(tmp_path, "".join(f"{kind[:3]}\tB-{kind}\n" for kind in types))
    assert counts.types == dict.fromkeys(types, 1)


def test_a_piece_of_a_word_is_no_comment(tmp_path):
    (record,), _ = read_lines(tmp_path, "As\tB-X\n##pirin\tI-X\n##in a file\tof pieces\n")
    assert record.text == "As ##pirin"
    with pytest.raises(DataError, match=r"train.tsv:2: unknown tag 'X'"):
        read_lines(tmp_path, "As\tB-X\n##pirin\tX\n")


def test_iob_documents(tmp_path):
    rows = "-DOCSTART- (d (1))\tO\n\na\tO\n\nb\tO\n\n###MEDLINE:95369245\n\nc\tB-X\n\n-DOCSTART-\tO\n\nd\tO\n"
    records, counts = read_lines(tmp_path, rows)
    assert [record.doc_id for record in records] == ["d (1)", "d (1)", "95369245", "x_train_00003"]
    assert (counts.documents, counts.sentences) == (3, 4)
    records, counts = read_lines(tmp_path, "a\tO\n\nb\tO\n")
    assert [record.doc_id for record in records] == ["x_train_s00001", "x_train_s00002"]
    assert (counts.documents, counts.other_lines, counts.blank_tokens) == (2, 0, 0)


@pytest.mark.parametrize(
    "marker", ["# doc_id = {}", "# newdoc id = {}", "#doc_id: {}", "#begin document ({}); part 000"]
)
def test_comments_that_name_a_document_begin_one(tmp_path, marker):
    rows = "".join(f"{marker.format(name)}\nIL\tB-X\n\n# sent_id = 2\nNo\tO\n" for name in ("PM7", "100"))
    records, counts = read_lines(tmp_path, rows)
    brackets = "()" if "begin" in marker else ("", "")
    names = [brackets[0] + name + brackets[1] for name in ("PM7", "100")]
    assert [record.doc_id for record in records] == [name for name in names for _ in "ab"]
    assert (counts.documents, counts.other_lines) == (2, 2)


def test_documents_that_are_only_counted_are_named_after_their_file(tmp_path):
    rows = "# newdoc id = 1\nIL\tB-X\n\n# newdoc id = 2\nNo\tO\n"
    assert [record.doc_id for record in read_lines(tmp_path, rows)[0]] == ["x_train_1", "x_train_2"]


def test_records_keep_the_gold_types(tmp_path):
    records, _ = read_lines(tmp_path, "IL\tB-Gene\n2\tI-Gene\nin\tO\nman\tB-Species\n\nNo\tO\n")
    assert [record.types for record in records] == [("Gene", "Species"), ()]
    assert '"types": ["Gene", "Species"]' in records[0].to_json() and "types" not in records[1].to_json()
    assert [parse_record(record.to_json(), "x") for record in records] == records
    assert records[0].target == "<TAG> 0-4 ; 8-11"
    path = tmp_path / "a.jsonl"
    write_records(path, records)
    typed = records_sha256(path)
    write_records(path, [replace(record, types=()) for record in records])  # as files had it before
    assert records_sha256(path) == typed
    line = records[0].to_json().replace('"Species"', "1")
    with pytest.raises(DataError, match=r"x: types\.1: Input should be a valid string"):
        parse_record(line, "x")


def test_iob_columns_can_be_chosen(tmp_path):
    (record,), _ = read_lines(tmp_path, "B-X\t0\t3\tIL2\nO\t4\t6\tis\n", token_column=3, tag_column=0)
    assert (record.text, record.spans) == ("IL2 is", ((0, 3),))
    with pytest.raises(DataError, match=r"train.tsv:1: tag_column is 2, but there are 2 columns \(0 to 1\)"):
        read_lines(tmp_path, GOOD_IOB, tag_column=2)


INDEXED = "1\tIbuprofen\tB-Drug\n2\teases\tO\n3\tpain\tB-Symptom\n"
LABEL_FIRST = "B-Drug\t0\tIbuprofen\tNN\tB-NP\nO\t10\teases\tVB\tB-VP\nB-Symptom\t16\tpain\tNN\tB-NP\n"
NESTED = "Ibuprofen\tB-Drug\tO\nsodium\tI-Drug\tB-Salt\neases\tO\tO\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "1\tB-Drug\n2\tO\n3\tO\n",
            r"column 0 should be the tokens, but holds running numbers \('1', '2', '3'\)",
        ),
        ("x\tB-Drug\nx\tO\nx\tO\n", r"holds repetitions \('x', .*tag_column"),
        ("B-Drug\tO\nO\tO\nO\tO\n", r"columns 0 and 1 hold tags"),
        (NESTED, r"columns 1 and 2 hold tags: set tag_column"),
        (NESTED.replace("B-Salt", "O"), r"columns 1 and 2 hold tags"),
        ("Ibuprofen\tO\tB-Drug\neases\tO\tO\n", None),  # all O: no annotation, and so no doubt
        ("Ibuprofen NN B-NP B-Drug\neases VB B-VP O\n", None),  # CoNLL-2003: phrases beside entities
        ("Ibuprofen B-Drug B-NP\neases O B-VP\n", None),
        ("B\tB-Vitamin\nI\tB-Iodine\n12\tO\nand\tO\nit\tO\n", None),
    ],
)
def test_columns_that_are_not_what_they_are_taken_for_are_refused(tmp_path, content, problem):
    if problem is None:
        assert len(read_lines(tmp_path, content)[0]) == 1
        return
    with pytest.raises(DataError, match=rf"train.tsv:1: .*{problem}"):
        read_lines(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (INDEXED, {}),
        (INDEXED.replace("2\t", "1\t").replace("3\t", "1\t"), {}),
        (INDEXED.replace("1\tI", "1-1\tI").replace("2\t", "1-2\t"), {}),  # word numbers of a sentence
        (re.sub(r"^\d", "PMID7", INDEXED, flags=re.M), {}),
        ("no\tword\tTag\n" + INDEXED, {}),
        (LABEL_FIRST, {}),  # NERsuite: tag, start, end, token, chunk
        (INDEXED, {"token_column": 1}),
        (INDEXED, {"token_column": -2, "tag_column": -1}),
        ("# made by hand\nno\tword\ttag\n" + INDEXED, {"token_column": "word", "tag_column": "tag"}),
        ("no\tword\ttag\n" + INDEXED, {"token_column": "word"}),
        ("no\tword\ttag\n\n" + INDEXED, {"token_column": 1, "tag_column": "tag"}),
        (LABEL_FIRST, {"token_column": 2, "tag_column": 0}),
    ],
)
def test_columns_have_numbers_or_names(tmp_path, content, columns):
    [record], counts = read_lines(tmp_path, content, **columns)
    assert (record.text, record.spans) == ("Ibuprofen eases pain", ((0, 9), (16, 20)))
    assert counts.types == {"Drug": 1, "Symptom": 1}


@pytest.mark.parametrize(
    ("content", "columns", "problem"),
    [
        (INDEXED, {"token_column": "word"}, "token_column=word is none of 1, Ibuprofen, B-Drug"),
        (
            "word\tlabel\nIbuprofen\tB\n",
            {"tag_column": "labels"},
            "tag_column=labels is none of word, label. Did",
        ),
        (INDEXED, {"token_column": 0, "tag_column": 0}, "token_column and tag_column are both 0"),
        (NESTED, {"token_column": 1}, "columns 1 and 2 hold tags"),
        (NESTED, {"token_column": 1, "tag_column": 2}, "column 1 should be the tokens, but holds tags"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, content, columns, problem):
    with pytest.raises(DataError, match=rf"train.tsv:1: {problem}"):
        read_lines(tmp_path, content, **columns)


def test_hub_columns_have_names(tmp_path):
    rows = [{"text": ["Aspirin", "helps"], "ner_tags": ["B-X", "O"], "labels": ["O", "B-Y"]}]
    folder = write_files(tmp_path / "mine", {f"{split}.jsonl": json_lines(rows) for split in HUB_SPLITS})
    named = {"token_column": "text", "tag_column": "labels"}
    assert read_corpus(f"hub:{folder}", **named)["train"][0].spans == ((8, 13),)
    with pytest.raises(DataError, match="ner_tags and labels may be meant: set tag_column to one of them"):
        read_corpus(f"hub:{folder}", token_column="text")
    with pytest.raises(DataError, match=r"no column tokens or words; it has .* Set token_column"):
        read_corpus(f"hub:{folder}", tag_column="labels")
    rows = [{"tokens": ["1", "2", "3"], "ner_tags": ["B-X", "O", "O"]}]
    write_files(folder, {f"{split}.jsonl": json_lines(rows) for split in HUB_SPLITS})
    with pytest.raises(
        DataError, match="column tokens or words should be the tokens, but holds running numbers"
    ):
        read_corpus(f"hub:{folder}")


# --- Sentences ------------------------------------------------------------------------------------------------


def test_sentences_are_the_documents_own_characters():
    text = "  Title of it \nIL-2 (cf. Fig. 1) rose\u00a0 (p < 0.05).  It fell, e.g. in mice.\r\n\r\nEnd\t"
    expected = ["Title of it", "IL-2 (cf. Fig. 1) rose\u00a0 (p < 0.05).", "It fell, e.g. in mice.", "End"]
    assert [text[start:end] for start, end in find_sentences(text)] == expected
    assert find_lines("a\rb") == find_sentences("a\rb") == [(0, 1), (2, 3)]
    assert [text[start:end] for start, end in find_lines(text)] == [
        expected[0],
        "IL-2 (cf. Fig. 1) rose\u00a0 (p < 0.05).  It fell, e.g. in mice.",
        "End",
    ]
    assert find_document(text) == [(2, len(text) - 1)]
    assert find_sentences(" \n\t\r\n") == find_lines("") == find_document("\ufeff ") == []


def test_a_mention_across_sentences_joins_them():
    assert join_cut([(0, 5), (6, 9), (10, 20)], [(3, 8), (12, 14)]) == [(0, 9), (10, 20)]
    assert join_cut([(0, 5), (6, 9), (10, 20)], [(4, 11), (15, 18)]) == [(0, 20)]
    assert join_cut([(0, 5), (6, 9)], [(0, 5), (6, 9)]) == [(0, 5), (6, 9)]
    text = "We used E. coli. K12 strains.\nThey grew."
    document = Document("d", text, (), "x")
    counts = ReadCounts()
    spans = {(8, 20): "Species", (17, 33): "Strain|Text"}  # "E. coli. K12" and "K12 strains.\nThe"
    (record,) = split_document(document, spans, dataset="x", sentence_split="segtok", counts=counts)
    expected = Record(text, tuple(spans), "d", "x", types=("Species", "Strain|Text"))
    assert record == expected  # the line break stays
    assert record.text[17:33] == "K12 strains.\nThe"
    assert counts.boundaries_joined == len(find_sentences(text)) - 1 == 2


@pytest.mark.parametrize(
    ("sentence_split", "texts"),
    [
        ("segtok", ["Title", "One rose.", "Two fell."]),
        ("lines", ["Title", "One rose. Two fell."]),
        ("document", ["Title\nOne rose. Two fell."]),
    ],
)
def test_sentence_split_is_a_choice(tmp_path, sentence_split, texts):
    records, counts = read_one(
        tmp_path, brat("Title\nOne rose. Two fell.\n", "T1\tX 16 19\tTwo"), sentence_split=sentence_split
    )
    assert [record.text for record in records] == texts
    assert mentions(records[-1]) == ["Two"] and counts.sentences == len(texts)


# --- Mentions of documents ------------------------------------------------------------------------------------


def test_brat_mentions_one_policy_each(tmp_path):
    text = "IFN-gamma and IL-2-induced CD4+ T cells, CD8+ T cells\tand T-cells.\n"
    annotated = [
        "T1\tGene 0 9\tIFN-gamma",
        "T2\tGene 14 18\tIL-2",  # ends inside a word
        "T3\tCell 27 39\tCD4+ T cells",
        "T4\tGene 27 31\tCD4+",  # nested
        "T5\tLine 27 39\tCD4+ T cells",  # the same characters, another type
        "T6\tCell 41 53\tCD8+ T cells",  # repeated words: each where it is
        "T7\tCell 32 39;58 65\tT cells T-cells",  # discontinuous
        "T8\tCell 41 45;46 53\tCD8+ T cells",  # parts with only white space between: T6 once more
        "T9\tCell 53 66\tand T-cells.",  # white space at an edge
        "R1\tBinds Arg1:T1 Arg2:T2",
        "#1\tAnnotatorNotes T1\tsure?",
    ]
    (record,), counts = read_one(tmp_path, brat(text, *annotated))
    assert record.text == text.strip()
    assert mentions(record) == ["IFN-gamma", "IL-2", "CD4+", "CD4+ T cells", "CD8+ T cells", "and T-cells."]
    assert (counts.annotated, counts.spans, counts.duplicates, counts.discontinuous_skipped) == (9, 6, 2, 1)
    assert (counts.overlapping, counts.trimmed, counts.other_lines) == (1, 1, 2)
    assert counts.types == {"Gene": 3, "Cell": 5, "Line": 1}
    (record,), counts = read_one(tmp_path, {}, discontinuous="cover")
    assert "T cells, CD8+ T cells\tand T-cells" in mentions(record)
    assert (counts.discontinuous_covered, counts.discontinuous_skipped, counts.spans) == (1, 0, 7)


def test_a_mention_over_a_line_break_is_written_with_a_blank(tmp_path):
    files = brat(
        "acute\nrenal failure. Next.", "T1\tDisease 0 5;6 19\tacute renal failure", "T2\tX 21 25\tNext"
    )
    records, counts = read_one(tmp_path, files)
    assert [record.text for record in records] == ["acute\nrenal failure.", "Next."]
    assert records[0].spans == ((0, 19),) and mentions(records[0]) == ["acute\nrenal failure"]
    assert (counts.boundaries_joined, counts.respaced, counts.discontinuous_covered) == (1, 1, 0)


EMOJI = "Na\u0308ive 😀 mice got 5\u00a0µg IFN-γ."  # a combining character, an emoji, a non-breaking space
IN_OTHER_UNITS = {
    "code points": (EMOJI, 23, 28),
    "utf-8 bytes": (EMOJI, 29, 35),
    "utf-16 units": (EMOJI, 24, 29),
    "CRLF as one": ("Title\r\nIFN-γ\r\n", 6, 11),
    "no byte order mark": ("\ufeffIFN-γ", 0, 5),
}


@pytest.mark.parametrize("unit", IN_OTHER_UNITS)
def test_offsets_in_other_units_are_found_out_and_counted(tmp_path, unit):
    text, start, end = IN_OTHER_UNITS[unit]
    records, counts = read_one(tmp_path, brat(text, f"T1\tGene {start} {end}\tIFN-γ"))
    assert mentions(records[-1]) == ["IFN-γ"] and records[-1].text[0] in "NI"
    assert counts.offset_units == ({} if unit == "code points" else {unit: 1})


@pytest.mark.parametrize(
    ("text", "start", "unit"),
    [
        ("😀😀 é\r\nIFN-γ", 7, "utf-16 units, CRLF as one"),
        ("😀 é\r\nIFN-γ", 8, "utf-8 bytes, CRLF as one"),
        ("\ufeff😀😀 é\nIFN-γ", 7, "utf-16 units, no byte order mark"),
        ("\ufeffé\r\nIFN-γ", 2, "CRLF as one, no byte order mark"),
        ("\ufeff😀😀😀 é\r\nIFN-γ", 9, "utf-16 units, CRLF as one, no byte order mark"),
    ],
)
def test_offsets_in_two_other_units_at_once(tmp_path, text, start, unit):
    length = 6 if "bytes" in unit else 5
    records, counts = read_one(tmp_path, brat(text, f"T1\tGene {start} {start + length}\tIFN-γ"))
    assert (records[-1].text, records[-1].spans) == ("IFN-γ", ((0, 5),)) and counts.offset_units == {unit: 1}


def test_letters_may_be_written_in_ascii(tmp_path):
    text = "TNF-α, Sjögren and IL‑2 in 5 µg"
    lines = ["T1\tX 0 5\tTNF-a", "T2\tX 7 14\tSjogren", "T3\tX 19 23\tIL 2", "T4\tX 27 31\t5 ug"]
    (record,), counts = read_one(tmp_path, brat(text, *lines))
    assert mentions(record) == ["TNF-α", "Sjögren", "IL‑2", "5 µg"]
    assert (counts.folded, counts.respaced) == (4, 0)
    # One character for several, and no white space where the text has some.
    text, lines = (
        "nai\u0308ve \ufb01ber",
        ["T1\tX 0 6\tna\u00efve", "T2\tX 7 11\tfiber", "T3\tX 0 11\tnaïvefiber"],
    )
    (record,), counts = read_one(tmp_path, brat(text, *lines))
    assert (record.spans, counts.folded) == (((0, 6), (0, 11), (7, 11)), 3)
    records, counts = read_one(tmp_path, brat("Lung\ncancer", "T1\tX 0 11\tLungcancer"))
    assert (records[0].spans, counts.respaced) == (((0, 11),), 1)
    with pytest.raises(DataError, match="the mention is 'TNF-a', but the text at 0-5 is 'TNF-b'"):
        read_one(tmp_path, brat("TNF-b", "T1\tX 0 5\tTNF-a"))


def test_a_unit_in_which_no_letter_is_folded_is_preferred(tmp_path):
    for mention in ("T1\tX 3 4\tA", "T1\tX 3 4\tA\nT2\tX 0 2\tß"):  # bytes; as a code point 3 would be the α
        (record,), counts = read_one(tmp_path, brat("ß Aα", mention))
        assert "A" in mentions(record) and counts.offset_units == {"utf-8 bytes": 1} and not counts.folded


def test_what_is_left_out_anyway_may_be_wrong(tmp_path):
    text = "Colon or rectal cancer in mice"
    lines = [
        "T1\tX 0 5;16 22\tColon cancer",
        "T2\tX 0 5;14 22\tColon cancer",
        "T3\tY 24 99\tmice",
        "T4\tX 9 15\trectal",
    ]
    (record,), counts = read_one(tmp_path, brat(text, *lines), types=["X"])
    assert mentions(record) == ["rectal"]
    assert (counts.discontinuous_skipped, counts.other_types, counts.misplaced) == (2, 1, 2)
    with pytest.raises(DataError, match=r"d1.ann:2: the mention is 'Colon cancer'"):
        read_one(tmp_path, {}, types=["X"], discontinuous="cover")
    with pytest.raises(DataError, match=r"d1.ann:3: offsets 24-99 .*"):
        read_one(tmp_path, {})


def test_bad_mentions_can_be_left_out_and_are_listed(tmp_path):
    files = brat(
        "IL-2 and IL-4 😀 rose", "T1\tX 0 4\tIL-2", "T2\tX 8 12\tIL-4", "T3\tX 9 99\tIL-4", "T4\tX 18 17\tx"
    )
    with pytest.raises(
        DataError, match=r"d1.ann:2: .* is ' IL-'\. .* If it is one of few: bad_mentions=skip"
    ):
        read_one(tmp_path, files)
    (record,), counts = read_one(tmp_path, {}, bad_mentions="skip")
    assert mentions(record) == ["IL-2"] and (counts.annotated, counts.spans) == (4, 1)
    assert [re.search(r"d1.ann:(\d): ", problem)[1] for problem in counts.to_dict()["bad_mentions"]] == [
        "2",
        "3",
        "4",
    ]
    # Where most mentions fit in another unit, that is what the offsets are.
    files = brat("😀 IL-2 IL-4 rose", "T1\tX 3 7\tIL-2", "T2\tX 8 12\tIL-4", "T3\tX 2 6\tIL-2")
    (record,), counts = read_one(tmp_path, files, bad_mentions="skip")
    assert mentions(record) == ["IL-2", "IL-4"] and counts.offset_units == {"utf-16 units": 1}
    with pytest.raises(ParameterError, match="bad_mentions must be one of stop, skip, not 'skipp'"):
        read_one(tmp_path, {}, bad_mentions="skipp")


def test_annotations_without_a_place_or_words(tmp_path):
    heading = '<annotation id="M"><infon key="type">MeSH</infon><text></text></annotation>'
    passage = (
        "<offset>0</offset><text>IL-2 rose</text>" + heading + annotation(0, 4, "") + annotation(0, 0, "")
    )
    (record,), counts = read_one(tmp_path, {"train.xml": bioc(passage)})
    assert mentions(record) == ["IL-2"]
    assert (counts.annotated, counts.without_location, counts.unchecked) == (3, 2, 1)


def test_crlf_counts_two_where_the_file_has_two(tmp_path):
    files = brat("Title\r\nIFN-γ rose.\r\n") | {
        "train/d1.ann": "T1\tGene 7 12\tIFN-γ\r\n\r\nT2\tX 0 5\tTitle\r\n"
    }
    records, counts = read_one(tmp_path, files)
    assert [(record.text, record.spans) for record in records] == [
        ("Title", ((0, 5),)),
        ("IFN-γ rose.", ((0, 5),)),
    ]
    assert not counts.offset_units


def test_pubtator_and_bioc_count_code_points_across_title_and_abstract(tmp_path):
    title, words = "Σ 😀 e\u0301 title ", "5\u00a0µg IFN-γ"  # the blank at the title's end counts too
    start = len(title) + 1 + len("We gave ")
    abstract = f"We gave {words}."
    lines = pubtator(
        title, abstract, "0\t1\tΣ\tGene\tD1", f"{start}\t{start + 10}\t{words}\tGene\tD1\tx|y", "CID\tD1\tD2"
    )
    records, counts = read_one(tmp_path / "p", {"train.PubTator.txt": lines})
    expected = [("Σ 😀 e\u0301 title", ["Σ"]), (abstract, [words])]
    assert [(record.text, mentions(record)) for record in records] == expected
    assert (counts.documents, counts.other_lines, counts.offset_units) == (1, 1, {})
    start, length = len(f"{title} We gave ".encode()), len(words.encode())
    abstract_start = len(title.encode()) + 1
    passages = [
        f"<offset>0</offset><text>{title}</text>{annotation(0, 2, 'Σ')}",
        f"<offset>{abstract_start}</offset><text>{abstract}</text>{annotation(start, length, words)}",
    ]
    records, counts = read_one(tmp_path / "b", {"train.xml": bioc(*passages)})
    assert [(record.text, mentions(record)) for record in records] == expected
    # The title's mention fits as code points too, but for the blank behind it.
    assert (counts.documents, counts.offset_units, counts.trimmed) == (1, {"utf-8 bytes": 1}, 1)


def test_pubtator_documents_end_at_a_blank_line_or_the_next_title(tmp_path):
    text = "1|t|A b\n1|a|\n1\t0\t1\tA\tX\n2|t|C | d\u2028e\r\n2|a|F g.\r\n2\t12\t13\tF\tX\r\n\r\n\r\n3|t|H\n3|a|I\n"
    records, counts = read_one(tmp_path, {"train.txt": text.replace("2\t12\t13", "2\t8\t9")})
    assert [(r.doc_id, r.text, r.spans) for r in records] == [
        ("1", "A b", ((0, 1),)),
        ("2", "C | d\u2028e", ()),
        ("2", "F g.", ((0, 1),)),
        ("3", "H", ()),
        ("3", "I", ()),
    ]
    assert counts.documents == 3


def test_bioc_sentences_composites_and_entities(tmp_path):
    role = '<infon key="CompositeRole">IndividualMention</infon>'
    sentences = (
        "<sentence><offset>0</offset><text>A&amp;B rose. C</text>"
        + annotation(0, 3, "A&amp;B")
        + "</sentence>"
    )
    sentences += "<sentence><offset>13</offset><text>D fell.</text>" + annotation(13, 1, "D") + "</sentence>"
    composite = "<offset>21</offset><text>Ocular and auditory toxicity.</text>"
    composite += annotation(21, 28, "Ocular and auditory toxicity") + annotation(
        32, 16, "auditory toxicit", role
    )
    composite += "<relation/>"
    records, counts = read_one(tmp_path, {"train.xml": bioc(f"<offset>0</offset>{sentences}", composite)})
    assert [(record.text, mentions(record)) for record in records] == [
        ("A&B rose. C", ["A&B"]),  # BioC's own sentences are not cut again
        ("D fell.", ["D"]),
        ("Ocular and auditory toxicity.", ["Ocular and auditory toxicity"]),
    ]
    assert (counts.annotated, counts.spans, counts.composite_parts, counts.other_lines) == (4, 3, 1, 1)


def test_counts_account_for_every_mention():
    counts = ReadCounts()
    parts = [((0, 2),), ((0, 2),), ((1, 3),), ((4, 5), (6, 8)), ((3, 5),), ((0, 1),)]
    kinds = ["X", "Y", "X", "X", "Z", "X"]
    document = Document(
        "d", "abc def gh", tuple(Mention(p, k, None, "f:1") for p, k in zip(parts, kinds, strict=True)), "f"
    )
    spans = read_spans(document, types={"X", "Y"}, discontinuous="skip", counts=counts)
    assert spans == {(0, 1): "X", (0, 2): "X|Y", (1, 3): "X"}
    assert counts.to_dict() == {
        "documents": 0,
        "sentences": 0,
        "annotated": 6,
        "spans": 3,
        "other_types": 1,
        "discontinuous_skipped": 1,
        "duplicates": 1,
        "overlapping": 2,
        "unchecked": 4,
        "types": {"X": 4, "Y": 1, "Z": 1},
    }
    assert unaccounted(counts) == 0


# --- Corpora: how they are spelled, found and filtered --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.reconstructed.tsv", "train"),
        ("CDR_TrainingSet.BioC.xml", "train"),
        ("NCBItrainset_corpus.txt", "train"),
        ("BioNLP-ST-2013_CG_development_data", "dev"),
        ("devel", "dev"),
        ("valid.conll", "dev"),
        ("validation-00000-of-00001.parquet", "dev"),
        ("CDR_TestSet.PubTator.txt", "test"),
        ("train_dev.tsv", None),  # two splits
        ("eng.testa", "dev"),
        ("eng.testb", "test"),
        ("latest.tsv", None),
        ("traindev.PubTator", None),
        ("strains.txt", None),
        ("device.xml", None),
    ],
)
def test_a_name_tells_its_split(name, split):
    assert splits_of(name) == [split] if split else len(splits_of(name)) != 1


def test_biobert_s_train_dev_is_left_unread(tmp_path):
    files = {f"{name}.tsv": GOOD_IOB for name in ("train", "train_dev", "devel", "test")}
    source = find_source(write_files(tmp_path / "ncbi_iob", files | {"README.txt": "About ."}))
    assert (source.name, source.format) == ("ncbi", "iob")
    assert {split: [path.name for path in paths] for split, paths in source.files.items()} == {
        "train": ["train.tsv"],
        "dev": ["devel.tsv"],
        "test": ["test.tsv"],
    }
    assert set(source.file_hashes()) == {"train.tsv", "devel.tsv", "test.tsv"}


@pytest.mark.parametrize(
    "name", ["traindev.tsv", "train_dev.tsv", "TrainDevel.tsv", "training-and-validation"]
)
def test_train_and_dev_in_one_is_train_where_neither_stands_alone(tmp_path, name):
    both = name if name.endswith(".tsv") else f"{name}/a.tsv"
    folder = write_files(tmp_path, {both: GOOD_IOB, "test.tsv": GOOD_IOB})
    source = find_source(folder, optional=("dev",))
    assert {
        split: [path.relative_to(folder).as_posix() for path in paths]
        for split, paths in source.files.items()
    } == {
        "train": [both],
        "test": ["test.tsv"],
    }
    write_files(folder, {"dev.tsv": GOOD_IOB})  # whose sentences the other file may hold
    with pytest.raises(DataError, match=rf"whose name says train .* Not read: {name}"):
        find_source(folder, optional=("dev",))


def test_a_split_may_be_a_folder_and_a_corpus_a_file(tmp_path):
    files = {f"{split}/{n}.iob2": GOOD_IOB for split in SPLITS for n in "ab"}
    folder = write_files(tmp_path / "mine", files)
    corpus = read_corpus(folder)
    assert [len(records) for records in corpus.values()] == [4, 4, 4]
    assert corpus["dev"][2].doc_id == "mine_dev_b_s00001" and corpus["dev"][2].dataset == "mine"
    assert {split: paths[0].parent.name for split, paths in corpus.source.files.items()} == {
        "train": "train",
        "dev": "devel",
        "test": "test",
    }
    assert set(find_source(folder).file_hashes()) == {"train/", "devel/", "test/"}
    for stray, content in (
        ("c.iob2", "IL\tGene\n"),
        ("more/c.iob2", GOOD_IOB),
    ):  # their mentions would be lost
        write_files(folder / "train", {stray: content, "README.txt": "About."})
        with pytest.raises(
            DataError, match=rf"train/{stray.split('/')[0]}: .* is not read as iob; mend it, or move"
        ):
            read_corpus(folder)
        (folder / "train" / stray).unlink()
    (folder / "train/more").rmdir()
    (only,) = read_corpus(folder / "train" / "a.iob2", splits=("test",)).values()
    assert [record.text for record in only] == ["Aspirin helps", "No"] and only[0].dataset == "a"
    loose = read_corpus(folder / "train", splits=("train",))
    assert len(loose["train"]) == 4
    with pytest.raises(
        DataError, match=r"no iob file or sub-folder whose name says train .* Not read: a.iob2"
    ):
        read_corpus(folder / "train")


def test_files_of_one_name_in_the_splits_folders_stay_apart(tmp_path):
    folder = write_files(tmp_path / "x_iob", {f"{split}/data.conll": GOOD_IOB for split in SPLITS})
    corpus = read_corpus(folder)
    assert [records[0].doc_id for records in corpus.values()] == [
        "x_train_data_s00001",
        "x_dev_data_s00001",
        "x_test_data_s00001",
    ]
    assert set(corpus.source.file_hashes()) == {"train/data.conll", "devel/data.conll", "test/data.conll"}


def test_files_whose_endings_tell_the_split_stay_apart(tmp_path):
    names = ("eng.train", "eng.testa", "eng.testb")
    corpus = read_corpus(write_files(tmp_path / "x", dict.fromkeys(names, GOOD_IOB)))
    assert [records[0].doc_id for records in corpus.values()] == [
        "x_train_eng_s00001",
        "x_dev_eng_s00001",
        "x_test_eng_s00001",
    ]


def test_what_a_file_is_shows_in_its_first_lines_however_long(tmp_path):
    rows = "IL B-X\n" + 1300 * "some O\nword O\n"  # 16 kB end inside a word
    assert mentions(read_one(tmp_path / "a", {"train.txt": rows})[0][0]) == ["IL"]
    note = {"text": "IL " + 20_000 * "x", "label": [[0, 2, "X"]]}
    assert mentions(read_one(tmp_path / "b", {"train.jsonl": json_lines([note])})[0][0]) == ["IL"]


def test_a_file_s_name_must_be_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"train_\xe4.tsv")).write_text(GOOD_IOB)
    with pytest.raises(DataError, match=r"train_.udce4\.tsv': the file's name is not UTF-8; rename it"):
        read_corpus(tmp_path, splits=("train",))


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "train.tsv").symlink_to(tmp_path / "nowhere.tsv")
    with pytest.raises(DataError, match=r"train.tsv: neither a file nor a folder, or a link to what is not"):
        read_corpus(tmp_path, splits=("train",))


def test_texts_about_a_corpus_are_no_documents(tmp_path):
    files = brat("IL 2", GOOD_ANN) | {
        "train/README.txt": "About.",
        "train/source1.txt": "IL",
        "train/source1.ann": "",
    }
    records, _ = read_one(tmp_path, files)
    assert [record.doc_id for record in records] == ["d1", "source1"]
    rows = "-DOCSTART- -X- O O\n\nIL NN O B-Gene\n"  # CoNLL-2003's ending
    assert mentions(read_one(tmp_path / "t", {"eng.train.txt": rows, "README.txt": "About."})[0][0]) == ["IL"]


def test_a_folder_in_two_formats_must_say_which(tmp_path):
    files = {
        f"{split}.txt": pubtator("Aspirin.", "", "0\t7\tAspirin\tX")
        .replace("1|", f"{split}|")
        .replace("1\t", f"{split}\t")
        for split in SPLITS
    }
    files |= {f"{split}.tsv": GOOD_IOB for split in SPLITS}
    folder = write_files(tmp_path / "both", files)
    with pytest.raises(DataError, match=rf"2 formats; say which: iob:{folder} or pubtator:{folder}\."):
        read_corpus(folder)
    assert [r.text for r in read_corpus(f"pubtator:{folder}")["test"]] == ["Aspirin."]
    assert len(read_corpus(f"iob:{folder}")["test"]) == 2


def test_a_format_is_known_by_its_entry(tmp_path, monkeypatch):
    def read(source, split, how, counts):
        for path in source.files[split]:
            text, _, words = path.read_text().strip().partition(" # ")
            mention = Mention(((0, len(words)),), "Gene", words, f"{path}:1")
            yield Document(path.stem, text, (mention,), str(path))

    monkeypatch.setitem(FORMATS, "hash", Format((".hash",), read))
    folder = write_files(tmp_path / "x_hash", {f"{split}.hash": "IL-2 rose . # IL-2" for split in SPLITS})
    corpus = read_corpus(folder)
    assert (corpus.source.name, corpus.source.format, corpus.types) == ("x", "hash", {"Gene": 3})
    assert [(r.text, mentions(r), r.doc_id) for r in corpus["dev"]] == [("IL-2 rose .", ["IL-2"], "devel")]
    write_files(folder, {"test.hash": "IL-2 rose . # IL-3"})
    with pytest.raises(
        DataError, match=r"test\.hash:1: the mention is 'IL-3', but the text at 0-4 is 'IL-2'"
    ):
        read_corpus(f"hash:{folder}")


def test_two_formats_in_a_split_s_folder_must_say_which(tmp_path):
    files = brat("IL 2", "T1\tX 0 2\tIL") | {"train/a.pubtator": GOOD_PUBTATOR}
    with pytest.raises(DataError, match=r"2 formats; say which: (brat|pubtator):.* or (brat|pubtator):"):
        read_corpus(write_files(tmp_path, files), splits=("train",))
    assert read_corpus(f"brat:{tmp_path}", splits=("train",))["train"][0].text == "IL 2"


def test_types_are_named_and_filtered(tmp_path):
    rows = "Aspirin\tB-Chemical\nin\tO\nasthma\tB-Disease\n\nNo\tO\n"
    folder = write_files(tmp_path, {f"{split}.tsv": rows for split in SPLITS})
    assert read_corpus(folder).types == {"Chemical": 3, "Disease": 3}
    corpus = read_corpus(folder, types=["Disease"])
    assert dict(corpus) == dict(read_corpus(folder, types="Disease"))
    assert [(r.text, mentions(r)) for r in corpus["train"]] == [("Aspirin in asthma", ["asthma"]), ("No", [])]
    assert corpus.types == {"Chemical": 3, "Disease": 3} and corpus.counts["dev"].other_types == 1
    assert dict(read_corpus(folder, types=[])) == dict(read_corpus(folder))
    with pytest.raises(
        DataError, match=r"no mention has type 'Diseases'. Did you mean 'Disease'\? Types: Chem"
    ):
        read_corpus(folder, types=["Diseases"])


def test_a_split_is_read_record_by_record(tmp_path):
    source = find_source(write_files(tmp_path, {f"{split}.tsv": GOOD_IOB for split in SPLITS}))
    counts = ReadCounts()
    records = iter_source(source, "train", READ_ALL, counts)
    assert next(records).text == "Aspirin helps" and counts.sentences == 1
    with pytest.raises(
        ParameterError, match="sentence_split must be one of segtok, lines, document, not 'line'"
    ):
        read_corpus(tmp_path, sentence_split="line")
    with pytest.raises(ParameterError, match="Did you mean 'cover'"):
        read_corpus(tmp_path, discontinuous="covers")


def test_the_projects_jsonl_comes_back_as_it_was(tmp_path):
    written = {
        split: [
            Record(f"Aspirin😀 {split}", ((0, 8),), f"{split}1", "mine", cue="chem"),
            Record("No", (), split, "b"),
        ]
        for split in ("train", "dev", "test")
    }
    for split, records in written.items():
        write_records(tmp_path / f"{split}.jsonl", records)
    (tmp_path / "data_card.json").write_text('{"sources": {}}')
    corpus = read_corpus(tmp_path)
    assert dict(corpus) == written and corpus.source.format == "jsonl"
    assert corpus.counts["train"].to_dict() == {
        "documents": 2,
        "sentences": 2,
        "annotated": 1,
        "spans": 1,
    }
    with pytest.raises(DataError, match="records are not filtered by entity_types"):
        read_corpus(tmp_path, types=["Chemical"])


# --- Data sets of the hub, in folders -------------------------------------------------------------------------

HUB_SPLITS = ("train", "validation", "test")
HUB_ROWS = [
    {"id": "0", "tokens": ["Aspirin", "and", "IFN", "-", "γ"], "ner_tags": [1, 0, 1, 2, 2]},
    {"id": "1", "tokens": ["No"], "ner_tags": [0]},
]
HUB_README = """---
dataset_info:
  features:
  - name: id
    dtype: string
  - name: tokens
    sequence: string
  - name: ner_tags
    sequence:
      class_label:
        names:
          '0': O
          '1': B-Chemical
          '2': I-Chemical
---
"""


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def hub_parquet(folder: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features, List, Value

    labels = ClassLabel(names=["O", "B-Chemical", "I-Chemical"])
    features = Features({"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(labels)})
    (folder / "data").mkdir(parents=True)
    for split in HUB_SPLITS:
        Dataset.from_list(HUB_ROWS, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    return folder


def hub_jsonl(folder: Path) -> Path:
    return write_files(
        folder, {f"{s}.jsonl": json_lines(HUB_ROWS) for s in HUB_SPLITS} | {"README.md": HUB_README}
    )


def hub_strings(folder: Path) -> Path:
    names = ["O", "B-Chemical", "I-Chemical"]
    rows = [row | {"ner_tags": [names[tag] for tag in row["ner_tags"]]} for row in HUB_ROWS]
    return write_files(folder, {f"{split}.jsonl": json_lines(rows) for split in HUB_SPLITS})


@pytest.mark.parametrize(("make", "spelled"), [(hub_parquet, ""), (hub_jsonl, "hub:"), (hub_strings, "")])
def test_hub_data_sets_are_streamed(tmp_path, make, spelled):
    folder = make(tmp_path / "chem_hub")
    corpus = read_corpus(f"{spelled}{folder}")
    assert (corpus.source.format, corpus.source.name) == ("hub", "chem")
    for split in ("train", "dev", "test"):
        assert [(r.text, r.spans, r.doc_id) for r in corpus[split]] == [
            ("Aspirin and IFN - γ", ((0, 7), (12, 19)), f"chem_{split}_s00000"),
            ("No", (), f"chem_{split}_s00001"),
        ]
        assert corpus.counts[split].annotated == corpus.counts[split].spans == 2
    assert corpus.types == {"Chemical": 6}


def test_hub_documents_in_bigbio_columns(tmp_path):
    row = {
        "id": "a",
        "passages": [
            {"id": "p", "type": "title", "text": ["IFN-γ 😀 rises"], "offsets": [[0, 13]]},
            {"id": "q", "type": "abstract", "text": ["It does. Aspirin helps."], "offsets": [[14, 37]]},
        ],
        "entities": [
            {"id": "e", "type": "Gene", "text": ["IFN-γ"], "offsets": [[0, 5]], "normalized": []},
            {"id": "f", "type": "Chemical", "text": ["Aspirin"], "offsets": [[23, 30]], "normalized": []},
            {
                "id": "g",
                "type": "Gene",
                "text": ["IFN", "rises"],
                "offsets": [[0, 3], [8, 13]],
                "normalized": [],
            },
        ],
    }
    files = {f"{split}.jsonl": json_lines([row | {"document_id": f"PMID{split}"}]) for split in HUB_SPLITS}
    corpus = read_corpus(write_files(tmp_path, files), types=["Gene", "Chemical"])
    assert [(r.text, mentions(r), r.doc_id) for r in corpus["test"]] == [
        ("IFN-γ 😀 rises", ["IFN-γ"], "PMIDtest"),
        ("It does.", [], "PMIDtest"),
        ("Aspirin helps.", ["Aspirin"], "PMIDtest"),
    ]
    assert corpus.counts["test"].discontinuous_skipped == 1 and unaccounted(corpus.counts["test"]) == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (HUB_ROWS[0], r"train row 0: ner_tags has numbers without names; declare a ClassLabel"),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, r"train row 0: 2 tokens but 1 ner_tags"),
        ({"tokens": ["a"], "ner_tags": ["B_X"]}, r"train row 0: unknown tag 'B_X'"),
        (
            {"tokens": ["a"], "classes": [0]},
            r"train row 0: no column ner_tags or tags .* it has classes, tokens",
        ),
        ({"tokens": "ab", "ner_tags": "BO"}, r"train row 0: tokens and ner_tags must be lists"),
        (
            {"tokens": ["a", None], "ner_tags": ["O", "O"]},
            r"train row 0: tokens has an empty entry; was it the word NA",
        ),
        (
            {"tokens": ["a", "b"], "ner_tags": ["O", None]},
            r"train row 0: ner_tags has an empty entry; store O for no",
        ),
        ({"tokens": ["a"], "ner_tags": [["O"]]}, r"train row 0: ner_tags has numbers without names"),
        (
            {"passages": [{"text": ["a"]}], "entities": []},
            r"train row 0: passages or entities are not bigbio's",
        ),
        (
            {
                "passages": [{"text": ["a"], "offsets": [[0, 1]]}],
                "entities": [{"type": "X", "text": ["a"], "offsets": [[0, None]]}],
            },
            r"train row 0: passages or entities are not bigbio's",
        ),
    ],
)
def test_hub_rows_that_cannot_be_read(tmp_path, row, problem):
    folder = write_files(tmp_path, {f"{split}.jsonl": json_lines([row]) for split in HUB_SPLITS})
    with pytest.raises(DataError, match=rf"hub:{folder} {problem}"):
        read_corpus(folder)


def test_hub_data_sets_that_are_not_there(tmp_path):
    files = {"train.jsonl": json_lines(HUB_ROWS), "test.jsonl": '{"tokens": ["a"'}
    folder = write_files(tmp_path, files)
    with pytest.raises(DataError, match=rf"hub:{folder}: no split for dev; it has train, test\."):
        read_corpus(f"hub:{folder}")
    with pytest.raises(DataError, match=rf"hub:{folder} test row 0: datasets cannot read it"):
        read_corpus(f"hub:{folder}", splits=("test",))
    assert list(find_source(f"hub:{folder}", optional=("dev",)).streams) == ["train", "test"]
    with pytest.raises(DataError, match="hub:nobody/nothing: datasets cannot load it"):
        read_corpus("hub:nobody/nothing")


# --- Bad input: file, line, reason ----------------------------------------------------------------------------

GOOD_ANN = "T1\tX 0 2\tIL"
GOOD_PUBTATOR = "1|t|IL 2\n1|a|\n1\t0\t2\tIL\tX\n"
PASSAGE = "<offset>0</offset><text>IL 2</text>"

BAD = {
    "iob: no tab": ({"train.tsv": "IL\tO\nIL 2\n"}, r"train.tsv:2: expected 2 columns by tabs"),
    "iob: one column": ({"train.tsv": "IL\n2\n"}, r"train.tsv:1: expected 2 columns"),
    "iob: a column less": ({"train.tsv": "IL\tN\tO\n2\tO\n"}, r"train.tsv:2: expected 3 columns by tabs"),
    "iob: a column more": ({"train.tsv": "IL\tO\n\n2\tN\tO\n"}, r"train.tsv:3: expected 2 columns by tabs"),
    "iob: no token": ({"train.tsv": "IL\tO\n\tO\n"}, r"train.tsv:2: the token is missing"),
    "iob: no tag": ({"train.tsv": "IL\tO\n2\t\n"}, r"train.tsv:2: unknown tag ''"),
    "iob: unknown tag": (
        {"train.tsv": "IL\tO\n2\tX-Gene\n"},
        r"train.tsv:2: unknown tag 'X-Gene'; tags are O, B-",
    ),
    "iob: not UTF-8": ({"train.tsv": b"IL\tO\n\xe9\tO\n"}, r"train.tsv:2: not UTF-8 \(byte 6 of the file\)"),
    "iob: empty": ({"train.tsv": "\n\n"}, r"train.tsv: the file has no sentences"),
    "iob: no entity": ({"train.tsv": "IL\tO\n"}, r"no entity in train; is this an annotated corpus\?"),
    "brat: .ann alone": (
        {"train/a.ann": "", "train/b.txt": "IL", "train/b.ann": GOOD_ANN},
        r"a.ann: no a.txt beside it",
    ),
    "brat: .txt alone": (
        {"train/a.txt": "IL", "train/b.txt": "IL", "train/b.ann": GOOD_ANN},
        r"a.txt: no a.ann beside",
    ),
    "brat: packed and not": (
        {"train/a.txt": "IL", "train/a.ann": GOOD_ANN, "train/a.ann.gz": b""},
        r"a.ann.gz: a.ann stands beside it",
    ),
    "brat: text not UTF-8": (
        {"train/a.txt": b"IL\n\n\xff", "train/a.ann": GOOD_ANN},
        r"a.txt:3: not UTF-8 \(byte 5",
    ),
    "brat: .ann not UTF-8": ({"train/a.txt": "IL", "train/a.ann": b"T1\tX 0 2\t\xff"}, r"a.ann:1: not UTF-8"),
    "brat: beyond the text": (
        brat("IL 2\n", GOOD_ANN, "T2\tX 3 9\t2"),
        r"d1.ann:2: offsets 3-9 are not inside the text of 5",
    ),
    "brat: empty span": (brat("IL 2\n", "T1\tX 2 2\t"), r"d1.ann:1: offsets 2-2 are not inside"),
    "brat: another mention": (
        brat("IL 2\n", "T1\tX 0 2\tIM"),
        r"d1.ann:1: the mention is 'IM', but the text at 0-2 is 'IL'",
    ),
    "brat: white space": (
        brat("IL 2\n", "T1\tX 2 3\t "),
        r"d1.ann:1: the mention at 2-3 is only white space",
    ),
    "brat: no mention text": (
        brat("IL 2\n", "T1\tX 0 2"),
        r"d1.ann:1: expected ID<TAB>Type START END<TAB>mention",
    ),
    "brat: not numbers": (brat("IL 2\n", "", "T1\tX 0 b\tIL"), r"d1.ann:2: expected ID<TAB>Type START END"),
    "brat: unknown line": (brat("IL 2\n", "Q1\tX 0 2\tIL"), r"d1.ann:1: expected ID<TAB>Type START END"),
    "brat: no text": (brat(" \n"), r"train has no text"),
    "brat: no entity": (brat("IL 2\n"), r"no entity in train"),
    "pubtator: beyond the text": (
        {"train.txt": GOOD_PUBTATOR + "1\t3\t40\t2\tX\n"},
        r"train.txt:4: offsets 3-40 are not inside the text of 5 characters \(.*train.txt:1\)",
    ),
    "pubtator: another mention": (
        {"train.txt": GOOD_PUBTATOR + "1\t3\t4\t3\tX\n"},
        r"train.txt:4: the mention is '3', but",
    ),
    "pubtator: another document": (
        {"train.txt": GOOD_PUBTATOR + "2\t3\t4\t2\tX\n"},
        r"train.txt:4: expected a line of document '1'",
    ),
    "pubtator: no title": ({"train.txt": GOOD_PUBTATOR + "\nIL 2\n"}, r"train.txt:5: expected ID\|t\|title"),
    "pubtator: no type": (
        {"train.txt": GOOD_PUBTATOR + "1\t3\t4\t2\n"},
        r"train.txt:4: expected ID, START, END, mention, type",
    ),
    "pubtator: no number": (
        {"train.txt": GOOD_PUBTATOR + "1\t-3\t4\t2\tX\n"},
        r"train.txt:4: expected ID, START, END, mention, type",
    ),
    "pubtator: not UTF-8": (
        {"train.txt": GOOD_PUBTATOR.encode() + b"\n2|t|\xe9\n"},
        r"train.txt:5: not UTF-8",
    ),
    "bioc: broken XML": (
        {"train.xml": "<collection>\n<document></collection>"},
        r"train.xml:2: broken XML \(mismatched tag, column",
    ),
    "bioc: cut short": (
        {"train.xml": bioc(PASSAGE)[:-30]},
        r"train.xml:7: broken XML|train.xml:6: broken XML",
    ),
    "bioc: empty file": ({"train.xml": ""}, r"train.xml:1: broken XML \(no element found"),
    "bioc: not UTF-8": (
        {"train.xml": bioc(PASSAGE).replace("IL", "I\udcff").encode(errors="surrogateescape")},
        r"train.xml:5: broken XML \(not well-formed",
    ),
    "bioc: other XML": (
        {"train.xml": "<PubmedArticleSet/>"},
        r"train.xml:1: expected BioC's <collection>, found <Pubmed",
    ),
    "bioc: undefined entity": (
        {
            "train.xml": bioc(PASSAGE.replace("IL", "&alpha;")).replace(
                "\n<coll", "<!DOCTYPE collection SYSTEM 'BioC.dtd'>\n<coll", 1
            )
        },
        r"train.xml:5: the entity &alpha; is not defined",
    ),
    "bioc: a file as entity": (
        {
            "train.xml": bioc(PASSAGE.replace("IL", "&f;")).replace(
                "\n<coll", "<!DOCTYPE collection [<!ENTITY f SYSTEM 'f.txt'>]>\n<coll", 1
            )
        },
        r"train.xml:5: the entity &f; is not defined",
    ),
    "bioc: no offset": ({"train.xml": bioc("<text>IL 2</text>")}, r"train.xml:4: <passage> has no <offset>"),
    "bioc: no id": (
        {"train.xml": bioc(PASSAGE).replace("<id>1</id>", "")},
        r"train.xml:2: <document> has no <id>",
    ),
    "bioc: no number": (
        {"train.xml": bioc(PASSAGE + annotation("x", 2, "IL"))},
        r"train.xml:5: expected an offset or length, found 'x'",
    ),
    "bioc: beyond the text": (
        {"train.xml": bioc(PASSAGE + annotation(3, 9, "2"))},
        r"train.xml:5: offsets 3-12 are not inside the text of 4 characters",
    ),
    "bioc: another mention": (
        {"train.xml": bioc(PASSAGE + "\n" + annotation(0, 2, "IM"))},
        r"train.xml:6: the mention is 'IM', but the text at 0-2 is 'IL'",
    ),
    "bioc: annotation outside": (
        {"train.xml": bioc(PASSAGE).replace("</document>", annotation(0, 2, "IL") + "</document>")},
        r"train.xml:6: an annotation beside passages",
    ),
    "bioc: no document": ({"train.xml": "<collection/>"}, r"train has no text"),
    "jsonl: not JSON": ({"train.jsonl": '{"input"\n'}, r"train.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_stop_with_file_line_and_reason(tmp_path, case):
    files, message = BAD[case]
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=message):
        read_corpus(write_files(tmp_path / "corpus", files), splits=("train",))


def test_a_document_belongs_to_one_split(tmp_path):
    folder = write_files(
        tmp_path, {f"{s}/d{s}.txt": "IL 2" for s in SPLITS} | {f"{s}/d{s}.ann": GOOD_ANN for s in SPLITS}
    )
    assert read_corpus(folder)["test"][0].doc_id == "dtest"
    write_files(folder, {"test/dtrain.txt": "Other", "test/dtrain.ann": ""})
    with pytest.raises(
        DataError, match="document 'dtrain' stands in train and in test; a document belongs to one split"
    ):
        read_corpus(folder)


def test_splits_that_are_missing_or_twice(tmp_path):
    with pytest.raises(
        DataError,
        match=r"nowhere: no such corpus folder. A corpus is a folder, FORMAT:folder \(brat, pubtator",
    ):
        read_corpus(tmp_path / "nowhere")
    for nameless in ("", "brat:"):  # not whatever folder is the current one
        with pytest.raises(DataError, match=f"corpora: '{nameless}': no such corpus folder"):
            read_corpus(nameless)
    folder = write_files(tmp_path, {f"{split}.tsv": GOOD_IOB for split in ("train", "test")})
    with pytest.raises(
        DataError,
        match=r"no iob file or sub-folder whose name says dev \(dev, devel, .*\); 02_data draws it .* dev_share=0.1",
    ):
        read_corpus(folder)
    assert list(read_corpus(folder, splits=("train", "test"))) == ["train", "test"]
    write_files(folder, {"valid.tsv": GOOD_IOB, "dev.tsv": GOOD_IOB})
    with pytest.raises(DataError, match=r"dev has 2 candidates \(dev.tsv, valid.tsv\); keep one"):
        read_corpus(folder)


def test_a_forced_format_is_believed(tmp_path):
    folder = write_files(tmp_path, {f"{split}.tsv": GOOD_IOB for split in SPLITS})
    with pytest.raises(DataError, match="no pubtator file or sub-folder whose name says train"):
        read_corpus(f"pubtator:{folder}")
    write_files(folder, {f"{split}.txt": "Just text.\n" for split in SPLITS})
    with pytest.raises(
        DataError, match=r"train.txt:1: expected ID\|t\|title \(PubTator\), found 'Just text.'"
    ):
        read_corpus(f"pubtator:{folder}")
    assert len(read_corpus(folder)["train"]) == 2  # a text beside the tables is no corpus
