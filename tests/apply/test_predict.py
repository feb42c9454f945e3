"""What `predict` reads and writes: readers read back what writers wrote, long texts stream, bad input is named."""

import gzip
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

import biomerge_lib
from biomerge_lib import predict
from biomerge_lib.__main__ import build_parser, main
from biomerge_lib.apply import predict_command, ready_models
from biomerge_lib.apply.tagger import Part, Tagger
from biomerge_lib.apply.texts import Text, iter_texts
from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.markup import INERT
from biomerge_lib.core.records import iter_records
from biomerge_lib.corpora.documents import ReadCounts, read_spans
from biomerge_lib.corpora.format_brat import read_brat
from biomerge_lib.corpora.format_iob import read_iob
from biomerge_lib.corpora.sources import find_source
from biomerge_lib.corpora.writers import Tagged, join_parts, write_brat, write_iob, write_jsonl
from biomerge_lib.decoding.predictions import RawAnswer
from tests.conftest import MANIFEST, START, spans_of

NOTE = MANIFEST.as_said() | {"backbone": "tiny"}
TEXT = "Aspirin-induced asthma (AIA).\r\n\r\nβ-blockers\tmay harm\u2028too; 5-HT𝛼 rose."
SPANS = [(0, 7), (16, 22), (24, 27), (33, 43), (58, 63)]
TAGGED = [Tagged("d 1", TEXT, SPANS), Tagged("d 2", "Nothing here.", [])]


@pytest.fixture
def tagger(tokenizer):
    """One that answers each prompt with its first word, and how many prompts it was asked at a time."""
    asked = []

    def answer(prompts):
        asked.append(len(prompts))
        words = [prompt.chunk.record.text.split()[0] for prompt in prompts]
        return [RawAnswer([], f" 0-{len(word)}", "eos") for word in words]

    return Tagger(tokenizer, START, None, answer, at_once=4), asked


def test_spans_of_the_example_are_its_mentions():
    found = [TEXT[start:end] for start, end in SPANS]
    assert found == ["Aspirin", "asthma", "AIA", "β-blockers", "5-HT𝛼"]


def test_jsonl_reads_back(tmp_path):
    path = tmp_path / "out.jsonl"
    with path.open("w", encoding="utf-8") as out:
        write_jsonl(TAGGED, out)
    records = list(iter_records(path))
    assert [(r.doc_id, r.text, list(r.spans)) for r in records] == [
        (t.doc_id, t.text, t.spans) for t in TAGGED
    ]
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["mentions"][3] == {"start": 33, "end": 43, "text": "β-blockers", "score": None}
    assert first["text"] == TEXT
    assert list(iter_texts([path])) == [Text(t.doc_id, t.text) for t in TAGGED]


def test_brat_reads_back(tmp_path):
    write_brat([*TAGGED, Tagged("d 1", "Line\nbreak", [(0, 10)])], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "d_1-2.ann",
        "d_1-2.txt",
        "d_1.ann",
        "d_1.txt",
        "d_2.ann",
        "d_2.txt",
    ]
    counts = ReadCounts()
    documents = {d.doc_id: d for d in read_brat(sorted(tmp_path.iterdir()), counts)}
    spans = {
        name: list(read_spans(d, types=None, discontinuous="skip", counts=counts))
        for name, d in documents.items()
    }
    assert documents["d_1"].text == TEXT
    assert spans == {"d_1": SPANS, "d_2": [], "d_1-2": [(0, 10)]}
    assert (tmp_path / "d_1-2.ann").read_text() == "T1\tEntity 0 4;5 10\tLine break\n"
    with pytest.raises(DataError, match=r"d_1\.txt is there already"):
        write_brat(TAGGED, tmp_path)


def test_brat_files_of_one_name_make_room_for_each_other(tmp_path):
    write_brat([Tagged(name, name, []) for name in ("a", "a", "a-2", "a")], tmp_path)
    names = sorted((path.stem, path.read_text()) for path in tmp_path.glob("*.txt"))
    assert names == [("a", "a"), ("a-2", "a"), ("a-2-2", "a-2"), ("a-3", "a")]


@pytest.mark.parametrize("spaced", [True, False])
def test_conll_reads_back(tmp_path, spaced):
    path = tmp_path / "out.conll"
    with path.open("w", encoding="utf-8") as out:
        write_iob(TAGGED, out, spaced=spaced)
    records = list(read_iob(path, ReadCounts(), "predicted", dataset="predicted"))
    assert [r.doc_id for r in records] == ["d 1", "d 1", "d 2"]
    words = [r.text[start:end].replace(" ", "") for r in records for start, end in r.spans]
    assert words == ["Aspirin", "asthma", "AIA", "β-blockers", "5-HT𝛼"]
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if "\t" in line]
    assert all(TEXT[int(a) : int(b)] == token for token, a, b, _ in rows[:-3])
    assert rows[0] == ["Aspirin", "0", "7", "B-Entity"]


def test_what_conll_cannot_say_is_counted(tmp_path, caplog):
    with (tmp_path / "out.conll").open("w") as out:
        write_iob([Tagged("d", "lung cancer cell", [(0, 11), (5, 11)])], out)
    (record,) = read_iob(tmp_path / "out.conll", ReadCounts(), "x", dataset="x")
    assert record.spans == ((0, 11),)
    assert "d: 1 overlapping mentions" in caplog.text


def test_every_format_of_texts_is_found(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("Aspirin.")
    (tmp_path / "a.ann").write_text("T1\tDrug 0 7\tAspirin\n")
    (tmp_path / "b.txt").write_text("7|t|Title.\n7|a|Abstract.\n7\t0\t5\tTitle\tDisease\tD1\n")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "One.", "id": 3}\n\n{"input": "<NER> Two .", "target": "<TAG>"}\n'
    )
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.TXT.gz").write_bytes(gzip.compress(b"Packed."))
    assert list(iter_texts([tmp_path])) == [
        Text("a", "Aspirin."),
        Text("7", "Title.\nAbstract."),
        Text("3", "One."),
        Text("c-3", "Two ."),
        Text("e", "Packed."),
    ]
    assert "document 'd' is empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"x\x00y", "a binary file"),
        (
            "a.txt",
            b"fine\ncaf\xe9",
            r"a\.txt:2: not UTF-8 \(byte 9 of the file\)\. If it is Latin-1: iconv -f latin1",
        ),
        ("a.txt", "IL-2".encode("utf-16"), r"a\.txt: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
        (
            "a.txt",
            "IL-2".encode("utf-16-le"),
            r"a\.txt: UTF-16LE text; convert it: iconv -f UTF-16LE -t UTF-8",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: no text"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: not UTF-8"),
        ("a.pubtator", b"7|t|x\n8\t0\t1\tx\tD\tD1", r"a\.pubtator:2: expected a line of document '7'"),
        ("a.docx", b"PK", r"no \.txt, \.jsonl, \.pubtator file in this folder"),
    ],
)
def test_bad_files_are_named_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, name, content, reason):
    monkeypatch.setattr(ready_models, "merge_for_use", lambda _: pytest.fail("a model was loaded"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(iter_texts([tmp_path]))
    assert main(["predict", "--file", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_is_no_prose_or_no_text_is_not_read_as_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("id,text\n1,Aspirin helps\n")
    (tmp_path / "blank.txt").write_text(" \n")
    os.mkfifo("pipe")
    said = {
        ("--file", "pipe"): "pipe: a pipe, which is read once: --file - < pipe",
        ("a.csv",): "a.csv is there as a file or folder; to read it: predict --file a.csv",
        (
            "--file",
            "a.csv",
        ): "a.csv: .txt, .jsonl, .pubtator are read. As plain text, all the same: --file - < a.csv",
        ("--file", "blank.txt"): "no text to read: python -m biomerge_lib predict",
        ("--file", "none.txt"): "none.txt: no such file or folder.",
    }
    for arguments, message in said.items():
        assert main(["predict", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_sentences_of_many_texts_share_a_batch(tagger):
    tagger, asked = tagger
    texts = ["Aspirin.", "", "One. Two."] * 3
    expected = [[(0, 7)], [], [(0, 3), (5, 8)]] * 3
    assert spans_of(tagger.predict(texts)) == expected
    assert asked == [4, 4, 1]


def test_a_long_text_streams_in_bounded_memory(tagger):
    tagger, asked = tagger
    line = "Aspirin can trigger asthma in sensitive patients of every age.\n"
    texts = (line * 4 for _ in range(150))
    notes = []
    tracemalloc.start()
    found = tagger.pipe(texts, note=notes.append)
    first = next(found)
    assert [mention[:2] for mention in first] == [(len(line) * n, len(line) * n + 7) for n in range(4)]
    assert asked == [4]
    peak_of_first = tracemalloc.get_traced_memory()[1]
    assert sum(1 for _ in found) == 149
    assert tracemalloc.get_traced_memory()[1] < peak_of_first + 300_000
    tracemalloc.stop()
    assert sum(notes) == 600 * (len(line) - 1) and len(asked) == 150


def test_a_document_comes_in_parts_that_make_it_up(tagger):
    """The first after a few sentences, then more at a time; a part ends where the next sentence begins."""
    tagger, asked = tagger
    text = " " + "Aspirin helps.  Heparin harms.\n\n" * 10 + "Caffeine wakes. \n"
    parts = tagger.find_parts(["Zinc.", text])
    assert (next(parts), asked) == (Part(0, 5, [(0, 4, "Zinc", None)], True), [4])
    first = [(1, 8, "Aspirin", None), (17, 24, "Heparin", None), (33, 40, "Aspirin", None)]
    assert (next(parts), asked) == (Part(0, 49, first, False), [4])
    rest = list(parts)
    assert asked == [4, 4, 4, 4, 4, 2]
    assert [part.start for part in rest] == [49, *(part.end for part in rest[:-1])]
    assert [part.is_last for part in rest] == [False] * (len(rest) - 1) + [True] and rest[-1].end == len(text)
    found = [mention for part in rest for mention in part.mentions]
    assert tagger.predict(text) == [*first, *found]
    asked.clear()
    list(replace(tagger, at_once=64).find_parts(["It heals. " * 200]))
    assert asked == [4, 16, 64, 64, 52]


def test_conll_of_parts_is_that_of_the_whole(tmp_path):
    whole = Tagged("d", "Aspirin helps.  Heparin (so they say.) harms.\n", [(0, 7), (16, 23)])
    parts = [
        Tagged("d", whole.text[:16], [(0, 7)], 0, False),
        Tagged("d", whole.text[16:], [(0, 7)], 16, True),
    ]
    assert list(join_parts(parts)) == [whole]
    for name, tagged in (("whole", [whole, *TAGGED]), ("parts", [*parts, *TAGGED])):
        with (tmp_path / name).open("w", encoding="utf-8") as out:
            write_iob(tagged, out)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_was_found_before_an_interrupt_is_kept(tokenizer, tmp_path, monkeypatch, capsys, caplog):
    def answer(prompts):
        if len(prompts) > 4:
            raise KeyboardInterrupt
        return [RawAnswer([], " 0-7", "eos") for _ in prompts]

    broken = Tagger(tokenizer, START, None, answer)
    monkeypatch.setattr("biomerge_lib.apply.tagger.load_tagger", lambda **_: broken)
    (tmp_path / "long.txt").write_text("Aspirin helps.\n" * 50)
    command = ["predict", "--file", str(tmp_path / "long.txt"), "--out"]
    assert main(command[:-1]) == 130
    assert capsys.readouterr().out == "[Aspirin] helps.\n" * 4
    assert main([*command, str(tmp_path / "out.jsonl")]) == 130
    assert f"what was found so far is in {tmp_path / 'out.jsonl.partial'}" in capsys.readouterr().err
    (record,) = iter_records(tmp_path / "out.jsonl.partial")
    assert (record.text, record.spans) == ("Aspirin helps.\n" * 4, ((0, 7), (15, 22), (30, 37), (45, 52)))
    assert "long: only its first 60 characters were read" in caplog.text
    assert main([*command, str(tmp_path / "out.conll")]) == 130
    assert len(list(read_iob(tmp_path / "out.conll.partial", ReadCounts(), "x", dataset="x"))) == 4
    assert main([*command, str(tmp_path / "brat"), "--format", "brat"]) == 130
    assert (tmp_path / "brat/long.txt").read_text() == "Aspirin helps.\n" * 4
    assert len((tmp_path / "brat/long.ann").read_text().splitlines()) == 4


def test_punctuation_stays_where_the_model_was_shown_offsets_inside_words(tagger, tokenizer):
    text = "Aspirin/codeine heals."
    assert spans_of([tagger[0].predict(text)]) == [[(0, 7)]]  # "Aspirin" is a word of its own
    pieces = replace(tagger[0], prompt_format=replace(START, offset_anchors="echo_pieces"))
    assert spans_of([pieces.predict(text)]) == [[(0, 15)]]
    assert spans_of([pieces.predict(text, spaced=True)]) == [[(0, 7)]]


def test_a_word_without_end_is_no_end(tagger, caplog):
    tagger, _ = tagger
    sequence = "ACGT" * 3000
    assert [m[:2] for m in tagger.predict(f"{sequence} binds.")][:2] == [(0, 60), (360, 420)]
    found = tagger.predict([f"{sequence} binds.", "It heals."], spaced=False)
    assert spans_of(found) == [[(12001, 12007)], [(0, 2)]]  # the word alone is left out
    assert "a word over 512 tokens is left out" in caplog.text


def test_the_command_reads_a_folder_and_writes_each_format(tagger, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("biomerge_lib.apply.tagger.load_tagger", lambda **_: tagger[0])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Aspirin works.")
    arguments = ["predict", "Heparin.", "--file", str(tmp_path / "in")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "[Heparin].\n[Aspirin] works.\n"
    assert main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [record.target for record in iter_records(tmp_path / "out.jsonl")] == ["<TAG> 0-7", "<TAG> 0-7"]
    assert main([*arguments, "--out", str(tmp_path / "out.conll")]) == 0
    assert [r.doc_id for r in read_iob(tmp_path / "out.conll", ReadCounts(), "x", dataset="x")] == [
        "text-1",
        "a",
    ]
    assert main([*arguments, "--format", "brat", "--out", str(tmp_path / "in")]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert main([*arguments, "--format", "brat", "--out", str(tmp_path / "brat")]) == 0
    assert (tmp_path / "brat/a.ann").read_text() == "T1\tEntity 0 7\tAspirin\n"
    assert main([*arguments, "--format", "brat"]) == 2
    assert predict(["Aspirin works."]) == [[(0, 7, "Aspirin", None)]] == [predict("Aspirin works.")]


@pytest.fixture
def scoring(tokenizer, monkeypatch):
    """A tagger whose first words are mentions of probability 0.9, and whose second ones of 0.3."""

    def answer(prompts):
        answers = []
        for prompt in prompts:
            first, second, *_ = prompt.chunk.record.text.split()
            said = f" 0-{len(first)} ; {len(first) + 1}-{len(first) + 1 + len(second)}"
            answers.append(RawAnswer([], said, "eos", part_logprobs=[math.log(0.9), math.log(0.3)]))
        return answers

    tagger = Tagger(tokenizer, START, None, answer)
    monkeypatch.setattr("biomerge_lib.apply.tagger.load_tagger", lambda **_: tagger)
    return tagger


def test_a_mention_has_its_place_words_and_score(scoring):
    text = "Müdigkeit, Übelkeit."
    first, second = scoring.predict(text)
    assert (first.start, first.end, first.text, first.score) == (0, 9, "Müdigkeit", 0.9)
    assert second == (9, 10, ",", 0.3)
    assert scoring.predict([text, ""]) == [[first, second], []]
    assert scoring.predict("") == scoring.predict([]) == []
    assert scoring.predict(text, threshold=0.5) == predict(text, threshold=0.5) == [first]
    assert biomerge_lib.load_tagger() is scoring


def test_what_is_no_text_or_no_probability_is_named(scoring, capsys):
    with pytest.raises(TypeError, match="text 2 is no string: nan"):
        scoring.predict(["a b", float("nan")])
    assert main(["predict", "caf\udce9 x"]) == 2  # a byte of Latin-1 on the command line
    assert capsys.readouterr().err.startswith(
        "error: text 1 is not Unicode (lone surrogates): 'caf\\udce9 x'"
    )
    with pytest.raises(ParameterError, match=r"threshold=50 is no probability: give one from 0 to 1"):
        scoring.predict("a b", threshold=50)
    for wrong in ("1.5", "nan", "-0.1"):
        assert main(["predict", "a b", f"--threshold={wrong}"]) == 2
        assert f"--threshold {wrong} is no probability" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--file", "-"]])
def test_piped_text_is_read(scoring, monkeypatch, capsys, words):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Übelkeit trat auf.\n".encode())))
    assert main(["predict", *words, "--format", "jsonl", "--threshold", "0.5"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["doc_id"], line["text"]) == ("stdin", "Übelkeit trat auf.\n")
    assert line["mentions"] == [{"start": 0, "end": 8, "text": "Übelkeit", "score": 0.9}]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Nausea".encode("utf-16-le"))))
    assert main(["predict", *words]) == 2
    assert capsys.readouterr().err.startswith("error: standard input: UTF-16LE text; convert it")


def test_a_page_of_mentions_keeps_the_text_and_loads_nothing(scoring, tmp_path, capsys):
    (tmp_path / "a&b.txt").write_text('<b>Aspirin</b>\n\n  works & "helps".\n' * 9)
    assert main(["predict", "--file", str(tmp_path / "a&b.txt"), "--out", str(tmp_path / "x.html")]) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    body = page.partition("<body>")[2]
    assert "<h2>a&amp;b</h2>" in body and INERT in page
    assert 'content="light dark"' in page and "color: inherit" in page
    text = html.unescape(re.sub(r"</?(?:div|mark)[^>]*>", "", body.partition("</h2>")[2]))
    assert text.partition("</body>")[0].strip() == (tmp_path / "a&b.txt").read_text().strip()
    marks = re.findall(r'<mark class="gold" title="score 0.90">(.*?)</mark>', body)
    assert len(marks) > 9 and marks[0] == "&lt;"
    assert "Found by bc5cdr-smollm2-135m." in body and "left out" not in body
    asked = ["--format", "html", "--threshold", "0.5", "--model", "runs/<mine>"]
    assert main(["predict", "Aspirin works.", *asked]) == 0
    page = capsys.readouterr().out
    assert "Found by runs/&lt;mine&gt;." in page and "Those below 0.5 are left out." in page


def test_how_long_a_long_text_takes_is_said_after_its_first_sentences(scoring, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.txt").write_text("Aspirin works.\n" * 200)
    clock = itertools.count(0, 30)
    monkeypatch.setattr(predict_command.time, "monotonic", lambda: next(clock))
    told = r"3,000 characters: up to (\d+) minutes, as the first ones went. A GPU's vLLM server is far faster"
    for path in ("long.txt", "short.txt"):
        (tmp_path / "short.txt").write_text("Aspirin works.\n")
        assert main(["predict", "--file", str(tmp_path / path), "--out", str(tmp_path / "x.jsonl")]) == 0
        minutes = re.findall(told, capsys.readouterr().err)
        # Half a minute for the first four of 200 sentences: 14 of their 15 characters are read.
        assert minutes == (["27"] if path == "long.txt" else [])


def test_predicted_jsonl_is_read_as_the_projects_records(scoring, tmp_path):
    assert main(["predict", "Aspirin works.", "--out", str(tmp_path / "train.jsonl")]) == 0
    source = find_source(tmp_path / "train.jsonl", splits=("train",))
    assert source.format == "jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "x", "--out", "file/out.jsonl"],
            "file: File exists. Is the path right, may you write there?",
        ),
        (
            ["predict", "x", "--out", "folder"],
            "--out folder is a folder: name a file in it, or say --format brat.",
        ),
        (["run", "01_tokenizer", "runs_dir={}/file"], "/file/"),
        (["wandb-sync", "folder/mine"], "folder/mine: no such run folder."),
    ],
)
def test_a_place_that_cannot_be_written_or_is_not_there_is_named(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said


@pytest.mark.parametrize("read", ["texts.jsonl", "."])
def test_a_file_that_is_read_is_not_written_over(tmp_path, capsys, read):
    (tmp_path / "texts.jsonl").write_text('{"text": "Aspirin"}\n')
    out = str(tmp_path / "texts.jsonl")
    assert main(["predict", "--file", str(tmp_path / read), "--out", out]) == 2
    assert "is an input" in capsys.readouterr().err
    assert (tmp_path / "texts.jsonl").read_text() == '{"text": "Aspirin"}\n'


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(options):
        Path("/no/such/file").read_text()

    monkeypatch.setattr("biomerge_lib.apply.predict_command.predict_texts", fail)
    with pytest.raises(FileNotFoundError):
        main(["predict", "x"])


def test_a_cue_must_be_one_that_the_model_knows():
    known = {"cues": ["bc5cdr", "anatem"], "default_cue": "any"}
    manifest = replace(MANIFEST, prompt_format=replace(START, corpus_cue=True), **known)
    assert manifest.cue_options()["default_cue"] == "any"
    assert manifest.cue_options("anatem")["default_cue"] == "anatem"
    with pytest.raises(
        ParameterError, match=r"cue=anatme is none of anatem, any, bc5cdr\. Did you mean 'anatem'"
    ):
        manifest.cue_options("anatme")
    with pytest.raises(ParameterError, match="without corpus cues"):
        MANIFEST.cue_options("anatem")


def test_the_cues_of_a_model_are_listed_with_what_they_find():
    known = {"cues": ["nlmgene", "mine"], "default_cue": "any"}
    manifest = replace(MANIFEST, prompt_format=replace(START, corpus_cue=True), **known)
    lines = ready_models.describe_cues(manifest).split("\n")
    genes = "nlmgene  genes of many species, gene families and domains, and cells"
    assert lines == ["any      (the default)", "mine", genes]
    lines = ready_models.describe_cues(replace(manifest, default_cue="nlmgene")).split("\n")
    assert lines == ["mine", f"{genes} (the default)"]
    assert "without corpus cues" in ready_models.describe_cues(MANIFEST)


def test_an_adapter_is_merged_once_and_anew_when_it_changed(tiny_prepared, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from biomerge_lib.model.unsloth_lora_ner import load_causal_lm

    monkeypatch.setenv("BIOMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ready_models, "_prepare", lambda backbone: tiny_prepared)
    model = get_peft_model(
        load_causal_lm(tiny_prepared, dtype="float32"), LoraConfig(target_modules="all-linear")
    )
    adapter = tmp_path / "mine"
    model.save_pretrained(adapter)
    (adapter / "biomerge.json").write_text(json.dumps(NOTE))
    folder = ready_models.merge_for_use(adapter)
    assert folder.parent == tmp_path / "cache/models" and (folder / "model.safetensors").is_file()
    made = (folder / "config.json").stat().st_mtime_ns
    assert ready_models.merge_for_use(adapter) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    (adapter / "biomerge.json").write_text(json.dumps(NOTE | {"max_new_tokens": 9}))
    assert ready_models.merge_for_use(adapter) != folder
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ready_models.ModelError, match=r"adapter_config\.json missing"):
        ready_models.merge_for_use(adapter)


def test_every_command_shows_examples_that_parse(capsys):
    parser = build_parser()
    with pytest.raises(SystemExit):
        main(["--help"])
    first = re.findall(r"^  python -m biomerge_lib (.*)$", capsys.readouterr().out, flags=re.M)
    commands = [shlex.split(example)[0] for example in first]
    assert {"run", "report", "predict", "sweep", "wandb-sync"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        shown = re.findall(r"^  python -m biomerge_lib (.*)$", capsys.readouterr().out, flags=re.M)
        assert shown and all(shlex.split(example)[0] == command for example in shown)
        for example in shown:
            parser.parse_args(shlex.split(example))


def test_an_interrupt_is_said_in_a_word(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("biomerge_lib.apply.predict_command.predict_texts", interrupt)
    assert main(["predict", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
