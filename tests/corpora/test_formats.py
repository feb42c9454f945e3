"""What people's files look like: annotation tools, Windows and Mac, packed files, and formats that are not read."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.records import Record
from biomerge_lib.corpora.readers import Corpus, read_corpus
from biomerge_lib.corpora.sources import FORMATS
from tests.conftest import ROOT

_CODE = re.compile(r"`([^`]+)`")


def read(folder: Path, files: dict[str, str | bytes], **options) -> Corpus:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_corpus(folder, splits=("train",), **options)


def mentions(records: list[Record]) -> list[tuple[str, str]]:
    return [
        (record.text[start:end], kind)
        for record in records
        for (start, end), kind in zip(record.spans, record.types, strict=True)
    ]


def examples() -> list[tuple[str, dict[str, str]]]:
    """The format and the files of each row of the page's table."""
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1]
        for line in (ROOT / "docs/corpora.md").read_text("utf-8").split("\n")
        if line.startswith("| `") and line.count("`") > 3 and "`train" in line
    ]
    found = []
    for form, _, _, example in rows:
        code = [
            part.replace("\\n", "\n").replace("\\t", "\t").replace("\\|", "|")
            for part in _CODE.findall(example)
        ]
        found.append((form.strip(" `"), dict(zip(code[::2], code[1::2], strict=True))))
    return found


EXAMPLES = examples()


def test_every_format_has_an_example():
    assert {form for form, _ in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_pages_examples_say_what_it_says(tmp_path, number):
    form, files = EXAMPLES[number]
    corpus = read(tmp_path / "mine", files)
    assert corpus.source.format == form
    assert mentions(corpus["train"]) == [("Aspirin", "Drug")]
    assert corpus["train"][0].text.startswith("Aspirin helps")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_files_may_be_packed_and_come_from_windows_or_a_mac(tmp_path, number):
    form, files = EXAMPLES[number]
    expected = read(tmp_path / "mine", files)["train"]
    if form != "hub":  # datasets unpacks no file whose ending is in capitals
        windows = {
            (name if name.startswith("train/") else name.upper()).replace(".ann", ".ANN"): (
                "\ufeff" + content.replace("\n", "\r\n")
            )
            for name, content in files.items()
        }
        assert mentions(read(tmp_path / "windows" / "mine", windows)["train"]) == mentions(expected)
    mac = {str(Path(name).with_name("._" + Path(name).name)): b"\0\x05\x16\x07\xb0" for name in files}
    mac |= {f"{name}.gz": gzip.compress(content.encode()) for name, content in files.items()} | {
        ".DS_Store": b"\0\xb0"
    }
    corpus = read(tmp_path / "mac" / "mine", mac)
    assert corpus["train"] == expected and corpus.source.format == form


def test_a_packed_file_that_is_cut_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.tsv\.gz: cannot be unpacked"):
        read(tmp_path, {"train.tsv.gz": gzip.compress(b"IL\tB\n" * 99)[:-9]})


# --- Annotation tools -------------------------------------------------------------------------------------------

TEXT = "Σ 😀 IL-2 rose in mice."
TOOLS = {
    "doccano": {"id": 1, "text": TEXT, "label": [[4, 8, "Gene"], [17, 21, "Species"]], "Comments": []},
    "doccano with relations": {
        "id": 1,
        "text": TEXT,
        "entities": [
            {"id": 5, "label": "Gene", "start_offset": 4, "end_offset": 8},
            {"id": 6, "label": "Species", "start_offset": 17, "end_offset": 21},
        ],
        "relations": [{"id": 1, "from_id": 5, "to_id": 6, "type": "in"}],
    },
    "Label Studio": {
        "id": 1,
        "data": {"note": TEXT, "score": 3},
        "annotations": [
            {"was_cancelled": True, "result": []},
            {
                "result": [
                    {"type": "labels", "value": {"start": 5, "end": 9, "text": "IL-2", "labels": ["Gene"]}},
                    {
                        "type": "labels",
                        "value": {"start": 18, "end": 22, "text": "mice", "labels": ["Species"]},
                    },
                    {"type": "choices", "value": {"choices": ["sure"]}},
                ]
            },
        ],
    },
    "Label Studio, JSON_MIN": {
        "text": TEXT,
        "label": [
            {"start": 4, "end": 8, "labels": ["Gene"]},
            {"start": 17, "end": 21, "labels": ["Species"]},
        ],
    },
    "Prodigy": {
        "text": TEXT,
        "tokens": [{"text": "Σ", "start": 0, "end": 1, "id": 0}],
        "spans": [{"start": 4, "end": 8, "label": "Gene"}, {"start": 17, "end": 21, "label": "Species"}],
        "answer": "accept",
    },
    "PubAnnotation": {
        "text": TEXT,
        "sourcedb": "PubMed",
        "sourceid": "77",
        "denotations": [
            {"id": "T1", "span": {"begin": 4, "end": 8}, "obj": "Gene"},
            {"id": "T2", "span": {"begin": 17, "end": 21}, "obj": "Species"},
        ],
    },
    "GLiNER": {
        "tokenized_text": ["Σ", "😀", "IL-2", "rose", "in", "mice."],
        "ner": [[2, 2, "Gene"], [5, 5, "Species"]],
    },
    "spaCy": [TEXT, {"entities": [[4, 8, "Gene"], [17, 21, "Species"]]}],
    "Doc.to_json": {
        "text": TEXT,
        "ents": [{"start": 4, "end": 8, "label": "Gene"}, {"start": 17, "end": 21, "label": "Species"}],
        "tokens": [{"id": 0, "start": 0, "end": 1, "tag": "X"}],
    },
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("form", ["list", "lines", "indented"])
def test_annotation_tools_rows(tmp_path, tool, form):
    row, second = TOOLS[tool], json.loads(json.dumps(TOOLS[tool]))
    content = json.dumps([row, second], indent=1 if form == "indented" else None)
    if form == "lines" and isinstance(row, dict):
        content = "".join(f"{json.dumps(one)}\n" for one in (row, second))
    corpus = read(tmp_path / "mine", {"train.json": content})
    assert corpus.source.format == "json"
    expected = [("IL-2", "Gene"), ("mice." if tool == "GLiNER" else "mice", "Species")]
    assert mentions(corpus["train"]) == 2 * expected
    assert {record.text for record in corpus["train"]} == {TEXT}
    ids = ["77", "77"] if tool == "PubAnnotation" else ["mine_train_00001", "mine_train_00002"]
    assert [record.doc_id for record in corpus["train"]] == ids
    assert corpus.counts["train"].offset_units == ({"utf-16 units": 2} if tool == "Label Studio" else {})


def test_mentions_are_found_wherever_a_tool_has_put_them(tmp_path):
    gene, species = [4, 8, "Gene"], {"start": 17, "end": 21, "label": "Species"}
    rows = [
        {"text": TEXT, "entities": [], "label": [gene, species]},
        {"text": TEXT, "labels": ["Gene", "Species"], "ner": [gene, species]},
        {
            "text": TEXT,
            "tokenized_text": TOOLS["GLiNER"]["tokenized_text"],
            "ner": [[2, 2, "Gene"], [4, 5, "Species"]],
        },
        {
            "text": TEXT,
            "ents": [{"start": 4, "end": 8, "label": "Gene"}],
            "spans": {"sc": [species]},
            "tokens": [],
        },
    ]
    rows += [{"document": TEXT, name: [gene, species]} for name in ("annotation", "mentions")]
    for row in rows:
        corpus = read(tmp_path, {"train.json": json.dumps([row])})
        found = ("in mice." if "tokenized_text" in row else "mice", "Species")
        assert mentions(corpus["train"]) == [("IL-2", "Gene"), found]
    raw = [{"label": number, "start_offset": 4, "end_offset": 8, "user": 1} for number in (0, 3)]
    doccano = {"text": TEXT, "annotations": raw, "meta": {}}
    assert mentions(read(tmp_path, {"train.json": json.dumps([doccano])})["train"]) == [("IL-2", "0|3")]
    for name in ("tag", "category", "entity"):
        row = {"text": TEXT, "entities": [{"start": 4, "end": 8, name: "Gene", "value": "Interleukin-2"}]}
        assert mentions(read(tmp_path, {"train.json": json.dumps([row])})["train"]) == [("IL-2", "Gene")]
    wrapped = {
        "classes": ["GENE"],
        "annotations": [[TEXT, {"entities": [gene]}]],
    }  # as tools for spaCy write it
    assert mentions(read(tmp_path, {"train.json": json.dumps(wrapped)})["train"]) == [("IL-2", "Gene")]


def test_label_studio_says_more_of_a_mention_than_its_label(tmp_path):
    place, task = {"start": 5, "end": 9}, json.loads(json.dumps(TOOLS["Label Studio"]))
    task["annotations"][1]["result"] += [
        {"type": "choices", "value": place | {"text": "IL-2", "choices": ["sure"]}},
        {"type": "textarea", "value": place | {"text": ["a note"]}},
    ]
    corpus = read(tmp_path, {"train.json": json.dumps([task])})
    assert mentions(corpus["train"]) == [("IL-2", "Gene"), ("mice", "Species")]
    assert corpus.counts["train"].other_lines == 3 and not corpus.counts["train"].duplicates


def test_what_an_annotator_did_not_accept_is_no_text(tmp_path):
    rejected = [TOOLS["Prodigy"] | {"answer": answer} for answer in ("reject", "ignore")]
    untouched = TOOLS["Label Studio"] | {"annotations": []}
    empty = {"text": "Nothing here.", "tokens": [], "answer": "accept"}
    with pytest.raises(DataError, match="no entity in train"):
        read(tmp_path, {"train.jsonl": f"{json.dumps(empty)}\n"})
    rows = [TOOLS["Prodigy"], *rejected, untouched, empty, empty | {"spans": None}]
    corpus = read(tmp_path, {"train.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows)})
    assert [record.text for record in corpus["train"]] == [TEXT, "Nothing here.", "Nothing here."]
    assert corpus.counts["train"].other_lines == 3


def test_a_mention_of_several_parts_or_overlapping_ones(tmp_path):
    spans = [[{"begin": 0, "end": 3}, {"begin": 8, "end": 13}], {"begin": 0, "end": 13}]
    row = {"text": "Hip and elbow pain", "denotations": [{"span": span, "obj": "Part"} for span in spans]}
    corpus = read(tmp_path, {"train/1.json": json.dumps(row)})
    assert mentions(corpus["train"]) == [("Hip and elbow", "Part")]
    assert corpus.counts["train"].discontinuous_skipped == 1


def test_a_document_of_pubannotation_without_mentions_is_one(tmp_path):
    empty = {"text": "No.", "sourcedb": "PubMed", "sourceid": "78"}
    files = {f"train/{n}.json": json.dumps(row) for n, row in enumerate((TOOLS["PubAnnotation"], empty))}
    assert [record.doc_id for record in read(tmp_path, files)["train"]] == ["77", "78"]
    with pytest.raises(DataError, match=r"1\.json item 1: no mentions \(spans, "):
        read(tmp_path, {"train/1.json": json.dumps(empty | {"tracks": []})})


TWO = {"data": {"text": "IL"}, "annotations": [{"result": []}, {"result": []}]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"text": "IL", "label": [[0, 2, "X"]]}\n{"text": "IL"}',
            r"train.json:2: no mentions \(spans, entities, ",
        ),
        ('[{"text": "IL", "label": [[0, 2, "X"]]}, 7]', r"train.json item 2: no text \(tokenized_text, "),
        ('[{"text": 7, "label": []}]', r"train.json item 1: the text cannot be '7'"),
        ('[{"text": "IL", "spans": [{"start": 0}]}]', r"train.json item 1: no end \(end, end_offset\) in"),
        ('[{"text": "IL", "spans": [{"start": "0", "end": 2}]}]', r"item 1: the start cannot be '0'"),
        ('[{"text": "IL", "spans": [7]}]', r"item 1: no start \(start, "),
        (
            '[{"text": "IL", "label": [[0, 3, "X"]]}]',
            r"item 1: offsets 0-3 are not inside the text of 2 characters",
        ),
        ('[{"tokenized_text": ["IL"], "ner": [[0, 1, "X"]]}]', r"item 1: offsets -1--1 are not inside"),
        ('[{"text": "IL",\n "label": [[0, 2}', r"train.json:2: not JSON \(.* at column 17\)"),
        (json.dumps([TWO]), r"item 1: 2 annotations of one task; mark one as ground truth"),
        (
            '[{"text": "\\ud83d IL", "label": [[0, 2, "X"]]}]',
            r"train.json:1: not JSON \(unexpected end of hex",
        ),
        ('{"text": "IL", "label": 7}', r"item 1: the mentions cannot be '7'"),
        (
            '{"text": "IL", "label": [[0, 2, "X"]], "ents": [[0, 2, "Y"]]}',
            r"item 1: mentions stand in ents and in label",
        ),
        ('[["IL 2", {"entities": [[0, 2, "B-X"], [3, 4, "O"]]}]]', r"item 1: a mention has type O"),
        ('{"text": "IL", "label": [[0, 2, 0.5]]}', r"item 1: the type cannot be '0.5'"),
        (
            '{"text": "IL 2", "label": [[1, 3, "X", "IL"]]}',
            r"item 1: the mention is 'IL', but the text at 1-3",
        ),
        (
            '{"text": "IL", "ents": [{"start": 0, "end": 1, "value": "IL"}]}',
            r"item 1: the mention is 'IL', but",
        ),
        (
            '[{"data": {"text": "IL"}, "annotations": [{"result": [{"value": 7}, 7]}, 7]}]',
            "no entity in train",
        ),
        ('[{"tokenized_text": [7, null], "ner": [[0]]}]', r"item 1: no end"),
        ('[{"id": 7, "passages": [{"infons": 7, "offset": 0, "text": [1]}]}]', "no entity in train"),
        (
            '[{"id": 7, "infons": {}, "passages": [{"offset": 0, "text": "IL", "annotations": [{"locations": 7}]}]}]',
            r"item 1: expected an offset",
        ),
        ('[{"text": "IL", "label": ' + "[" * 99999, r"train.json:1: not JSON \(recursion limit"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, content, problem):
    with pytest.raises(DataError, match=problem):
        read(tmp_path, {"train.json": content})


def test_the_ground_truth_is_taken_of_two_annotations(tmp_path):
    value = {"start": 0, "end": 2, "labels": ["X"]}
    chosen = {"ground_truth": True, "result": [{"type": "labels", "value": value}]}
    task = TWO | {"annotations": [*TWO["annotations"], chosen]}
    assert mentions(read(tmp_path, {"train.json": json.dumps([task])})["train"]) == [("IL", "X")]


def test_a_docbin_needs_spacy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"train.spacy: only spaCy reads a DocBin, and is not installed"):
        read(tmp_path, {"train.spacy": b"x"})


def test_a_docbin_is_read_through_spacy(tmp_path):
    spacy = pytest.importorskip("spacy")
    doc = spacy.blank("en")(TEXT)
    doc.set_ents([doc.char_span(4, 8, label="Gene")])
    doc.spans["sc"] = [doc.char_span(17, 21, label="Species")]
    content = spacy.tokens.DocBin(docs=[doc], store_user_data=True).to_bytes()
    assert mentions(read(tmp_path, {"train.spacy": content})["train"]) == [
        ("IL-2", "Gene"),
        ("mice", "Species"),
    ]


def test_bioc_json_is_bioc(tmp_path):
    location = {"offset": 16, "length": 4}
    annotations = [
        {"infons": {"type": "Gene", "n": 3}, "text": "IL-2", "locations": [location]},
        {"infons": {}},
    ]
    passages = [
        {
            "offset": 0,
            "infons": {"type": "title"},
            "text": "About a gene.",
            "annotations": [],
            "sentences": [],
        },
        {"offset": 14, "text": "A IL-2 rose.", "annotations": annotations, "relations": [{"id": "R"}]},
    ]
    document = {"_id": "7|None", "id": "7", "infons": {}, "passages": passages, "relations": []}
    collection = {"source": "x", "documents": [document]}
    for wrapped in ({"PubTator3": [document]}, collection, [collection], document):
        corpus = read(tmp_path, {"train.json": json.dumps(wrapped)})
        assert [(record.text, record.doc_id) for record in corpus["train"]] == [
            ("About a gene.", "7"),
            ("A IL-2 rose.", "7"),
        ]
        assert mentions(corpus["train"]) == [("IL-2", "Gene")]
        counts = corpus.counts["train"]
        assert (counts.without_location, counts.other_lines) == (1, 1)
    annotations[0]["infons"]["type"] = None
    assert mentions(read(tmp_path, {"train.json": json.dumps(document)})["train"]) == [("IL-2", "Entity")]
    location["length"] = 9
    with pytest.raises(DataError, match=r"train.json:item 1: offsets 2-11 .*|.*the mention is 'IL-2'"):
        read(tmp_path, {"train.json": json.dumps(document)})


WEBANNO = """#FORMAT=WebAnno TSV 3.2
#T_SP=de.POS|coarse|pos
#T_RL=webanno.custom.Link|kind|BT_POS
#T_SP=webanno.custom.NamedEntity|identifier|value


#Text=😀 IL-2 and IL-4.
1-1\t0-2\t😀\t*\tX\t_\t_\t_\t_\t
1-2\t3-7\tIL-2\t*\tN\tr\t1-1\t*[1]|*[2]\tGene[1]|Any\\_one[2]\t
1-3\t8-11\tand\t*\tC\t_\t_\t*[2]\tAny\\_one[2]\t
1-4\t12-16\tIL-4\t*\tN\t_\t_\t*[2]\tAny\\_one[2]\t
1-4.1\t12-14\tIL\t_\t_\t_\t_\thttp://x\t*\t
1-5\t16-17\t.\t*\t.\t_\t_\t_\t_\t

#Text=No.
2-1\t18-20\tNo\t*\tX\t_\t_\t_\t_\t
"""


def test_webanno_layers_and_stacked_mentions(tmp_path):
    corpus = read(tmp_path, {"train.tsv": WEBANNO.replace("http://x", "*")})
    assert corpus.source.format == "webanno"
    assert [record.text for record in corpus["train"]] == ["😀 IL-2 and IL-4.", "No."]
    assert mentions(corpus["train"]) == [("IL-2", "Gene"), ("IL-2 and IL-4", "Any_one"), ("IL", "Entity")]
    with pytest.raises(
        DataError, match=r"train.tsv: 2 layers hold spans \(de.POS, webanno.custom.Named\); export one"
    ):
        read(tmp_path, {"train.tsv": WEBANNO.replace("NamedEntity|", "Named|")})
    with pytest.raises(DataError, match=r"train.tsv:10: expected a token of '😀 IL-2 and IL-4.', found '1-3"):
        read(tmp_path, {"train.tsv": WEBANNO.replace("\tand\t", "\tor\t")})
    with pytest.raises(DataError, match=r"train.tsv:10: expected a token of .* found '1-3.t8-11'"):
        read(tmp_path, {"train.tsv": re.sub("\tand\t.*", "", WEBANNO.replace("IL-4.\n", "\0IL-4.\n"))})


@pytest.mark.parametrize(
    ("layers", "cells"),
    [
        ("#T_SP=x.Drug|label|note|uri", "Gene\tsure\thttp://x"),
        ("#T_SP=x.Named|note|Named", "sure\tGene"),
        ("#T_SP=x.Named|kind|ROLE_x.Named:of_x.Link|x.Other", "Gene\trole\t1-2"),
        ("#T_SP=org.dkpro.core.api.pdf.type.PdfPage|height|width\n#T_SP=x.Named|kind", "*\t7\tGene"),
        ("#T_SP=de.tudarmstadt.ukp.dkpro.core.api.ner.type.NamedEntity|identifier|value", "*\tGene"),
    ],
)
def test_webanno_s_types_are_in_the_feature_that_is_called_so(tmp_path, layers, cells):
    row = f"\n#Text=IL-2\n1-1\t0-4\tIL-2\t{cells}\t\n"
    corpus = read(tmp_path, {"train.tsv": f"#FORMAT=WebAnno TSV 3.3\n{layers}\n\n{row}"})
    assert mentions(corpus["train"]) == [("IL-2", "Gene")]


def test_webanno_escapes(tmp_path):
    rows = ["A\\\\B\t*\tX\t_\t_\t_\tX\\|Y\\[1\\]\t", "IL-2\t*\tX\t_\t_\t_\tGene\t"]
    tokens = "".join(f"3-{n}\t0-0\t{row}\n" for n, row in enumerate(rows, start=1))
    content = f"{WEBANNO}\n#Text=A\\\\B\\nIL-2\\t.\n{tokens}"
    records = read(tmp_path, {"train.tsv": content})["train"]
    assert records[2].text == "A\\B\nIL-2\t."
    assert mentions(records[2:]) == [("A\\B", "X|Y[1]"), ("IL-2", "Gene")]


def test_a_mention_over_a_webanno_sentence_s_end_is_refused(tmp_path):
    head = "#FORMAT=WebAnno TSV 3.3\n#T_SP=x.NamedEntity|value\n\n"
    sentences = (
        "\n#Text=E.\n1-1\t0-2\tE.\tX[1]\t\n\n#Text=coli rose\n2-1\t3-7\tcoli\tX[{}]\t\n2-2\t8-12\trose\t_\t\n"
    )
    corpus = read(tmp_path, {"train.tsv": head + sentences.format(2)})
    assert mentions(corpus["train"]) == [("E.", "X"), ("coli", "X")]
    with pytest.raises(DataError, match=r"train.tsv:9: the mention 'X\[1\]' begins in the sentence before"):
        read(tmp_path, {"train.tsv": head + sentences.format(1)})


# --- Folders ----------------------------------------------------------------------------------------------------


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"tokens": ["IL-2", "rose"], "ner_tags": ["B-Gene", "O"]}])
    DatasetDict(train=data, validation=data, test=data).save_to_disk(tmp_path / "mine")
    corpus = read_corpus(tmp_path / "mine")
    assert corpus.source.format == "hub" and len(corpus.source.file_hashes()) == 1
    assert [mentions(records) for records in corpus.values()] == 3 * [[("IL-2", "Gene")]]


def test_a_lone_sub_folder_is_looked_into(tmp_path):
    files = {f"mine/{split}/ann1/{split}1.{end}": text for split in ("train", "dev", "test")
             for end, text in (("txt", "IL 2"), ("ann", "T1\tX 0 2\tIL"))}  # fmt: skip
    read(tmp_path, files)
    corpus = read_corpus(tmp_path)
    assert [mentions(records) for records in corpus.values()] == 3 * [[("IL", "X")]]
    assert list(corpus.source.file_hashes()) == [f"mine/{split}/ann1/" for split in ("train", "dev", "test")]
    for split in ("train", "dev", "test"):  # of two annotators none is chosen
        (tmp_path / f"mine/{split}/ann2").mkdir()
    with pytest.raises(DataError, match="Found: sub-folder dev/ann1, sub-folder dev/ann2"):
        read_corpus(tmp_path / "mine", splits=("train",))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"train/a.con": 'c="asthma" 1:3 1:3||t="problem"', "train/a.txt": "IL"},
            "a.con is i2b2 concepts: .* BRAT",
        ),
        (
            {"train_annotations.tsv": "7\tT\t0\t7\tAspirin\tTRIVIAL\n", "train_text.tsv": "7\tA b\tC d.\n"},
            "CHEMDNER",
        ),
        ({"train.eval": "P00001606T0076|14 33|IL\n"}, "train.eval is BC2GM's raw sentences, .* IOB version"),
        (
            {"train/concept/a.con": 'c="asthma" 1:3 1:3||t="problem"', "train/txt/a.txt": "IL"},
            "a.con is i2b2",
        ),
        ({"train.in": "P00001606T0076 Comparison\n"}, "BC2GM"),
        ({"train.csv": "token,tag\nIL,O\n"}, "train.csv is a CSV table: .* .tsv"),
        ({"train.tar.gz": gzip.compress(b"x")}, "train.tar.gz is an archive"),
        ({"train.zip": "PK"}, "train.zip is an archive: unpack it"),
        ({"train.pdf": "x"}, "train.pdf is no text file"),
        ({"train.foo": "x"}, r"Found: .foo\. Read are brat: .txt .ann .a1; .*jsonl: .jsonl"),
        ({"train.jsonl": '{"sentence": "IL"}'}, "Found: .jsonl"),
        (
            {"train.tsv": "IL\tb-gene\nrose\to\n"},
            "Found: .tsv. .*iob needs a column of tags, such as O and B-Type",
        ),
        ({"a/train.tsv": "IL\tB\n", "b/train.tsv": "IL\tB\n"}, "Found: sub-folder a, sub-folder b"),
        ({}, "Found: no file"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, files, named):
    with pytest.raises(DataError, match=named):
        read(tmp_path, files)


@pytest.mark.parametrize("name", ["train.tsv", "train.json"])
@pytest.mark.parametrize("code", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"])
def test_utf_16_is_named(tmp_path, code, name):
    named = rf"train.tsv: {code} text; convert it: iconv -f {code} |{name} is no text in UTF-8: .* with iconv"
    with pytest.raises(DataError, match=named):
        read(tmp_path, {name: "IL\tB-X\n".encode(code)})
