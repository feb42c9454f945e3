"""A union keeps its corpora's counts, does not leak into what is scored, and does not contradict itself."""

import json
import re
from dataclasses import replace

import pytest

from benchmarks.union_report import write_union_report
from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.files import file_sha256
from biomerge_lib.core.records import SPLITS, Record, read_records, write_records
from biomerge_lib.corpora.conversion import write_corpus
from biomerge_lib.corpora.data_card import (
    conflict_table,
    data_card_table,
    leak_table,
    mention_table,
    published_table,
    read_conflicts,
    reading_table,
    seen_table,
    type_table,
    union_table,
    unseen_share,
)
from biomerge_lib.corpora.draws import draw_sentences, draw_share, draw_splits
from biomerge_lib.corpora.leakage import (
    check_documents,
    find_conflicts,
    find_duplicates,
    find_leaks,
    key_of,
    normalise,
)
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.corpora.union import build_union
from biomerge_lib.experiment.notebooks import run_notebook
from tests.conftest import ROOT
from tests.support.shared_corpora import shared_corpus

# corpora/README.md: sentences / spans of train, devel and test.
COUNTS = {
    "bc5cdr": [(4560, 9385), (4581, 9593), (4797, 9809)],
    "bc2gm": [(12574, 15197), (2519, 3061), (5038, 6325)],
    "jnlpba": [(16813, 46766), (1739, 4551), (3856, 8662)],
    "anatem": [(5861, 6946), (2118, 2139), (3830, 4616)],
    "bionlp13cg": [(3033, 10826), (1003, 3616), (1906, 6881)],
}
# The same file: documents / mentions of train (BioRED's with dev) and test.
DOCUMENT_COUNTS = {
    "biored": [(500, 16884), (100, 3535)],
    "nlmgene": [(450, 13797), (100, 3053)],
    "gnormplus": [(432, 5793), (262, 4849)],
}


def record(text: str, *spans, dataset: str = "a", doc_id: str | None = None) -> Record:
    return Record(text, tuple(spans), doc_id or f"{dataset}-{abs(hash(text))}", dataset)


def corpus(train=(), dev=(), test=()) -> dict[str, list[Record]]:
    return {"train": list(train), "dev": list(dev), "test": list(test)}


def texts(union, split: str = "train") -> list[str]:
    return [item.record.text for item in union.splits[split]]


def keyed(**splits):
    return {split: [key_of(one) for one in records] for split, records in splits.items()}


def test_the_same_sentence_is_known_in_other_spelling():
    assert normalise("IL - 2  Rα") == normalise("IL-2 rΑ") == "il-2rα"
    assert normalise("ﬁbrosis\u00a0₂") == "fibrosis2"
    assert normalise("IL-2") != normalise("IL-3")
    tokens, original = record("IL - 2 Rα binds", (0, 9)), record("IL-2 Rα binds", (0, 7))
    other = record("IL-2 Rα binds", (0, 4))
    assert key_of(tokens).annotated == key_of(original).annotated != key_of(other).annotated
    assert key_of(original).sentence == key_of(other).sentence


def test_leaks_are_counted_both_ways_and_by_document():
    train = [record("One two three four five"), record("Results :"), record("one two three four FIVE")]
    dev = [
        record("One two three four five", doc_id="d1"),
        record("results:", doc_id="d1"),
        record("Something else here", doc_id="d2"),
        record("Results :", doc_id="d2"),
    ]
    [row] = find_leaks(keyed(train=train, dev=dev))
    assert row == {
        "from": "a train",
        "into": "a dev",
        "sentences": 3,
        "verbatim": 2,
        "short": 2,
        "documents": 1,
        "source_sentences": 3,
    }
    assert find_leaks(keyed(train=train, dev=[record("Nothing shared")])) == []


def test_leaking_sentences_leave_train_and_only_train():
    a = corpus([record("Shared one"), record("Own")], [record("shared  ONE")], [record("Test only")])
    b = corpus([record("Test only", dataset="b"), record("B's own", dataset="b")])
    kept = build_union({"a": a, "b": b})
    assert texts(kept) == ["Shared one", "Own", "Test only", "B's own"]
    union = build_union({"a": a, "b": b}, drop_leaks="train")
    assert texts(union) == ["Own", "B's own"]
    assert texts(union, "dev") == ["shared  ONE"] and texts(union, "test") == ["Test only"]
    assert [row["into"] for row in union.report["leaks"]["before"]] == ["a dev", "a test"]
    assert union.report["leaks"]["after"] == []
    assert union.steps[1] == {"step": "drop_leaks", "removed": {"a": 1, "b": 1}, "left": {"a": 1, "b": 1}}


TITLE = "Lithium carbonate toxicity in a newborn infant ."
BODY = "A case of lithium poisoning ( serum level 2.3 mmol ) is described . The infant recovered slowly afterwards ."
OTHER = "Unrelated sentences about quinidine treatment . They describe ventricular tachycardia alone ."


def cut(text: str, dataset: str, doc_id: str = "", ends: str = ".") -> list[Record]:
    """A document's sentences; without a doc_id each is its own, as in corpora that know no documents."""
    sentences = [part.strip() + " ." for part in text.split(f" {ends}") if part.strip()]
    return [record(one, dataset=dataset, doc_id=doc_id or None) for one in sentences]


def test_a_document_is_found_in_another_corpus_by_its_text():
    """Other ids, other sentence ends, other spaces, no documents at all: it is the same abstract."""
    test = [
        replace(one, text=one.text.replace(" .", ".").replace("( ", "(")) for one in cut(TITLE, "b", "77")
    ]
    test += [replace(one, text=one.text.upper()) for one in cut(BODY, "b", "77", ends="!")] + cut(
        OTHER, "b", "78"
    )
    for doc_id in ("PMC1", ""):
        train = cut(TITLE + BODY, "a", doc_id) + cut(
            "Something else entirely was measured here .", "a", "PMC2"
        )
        corpora = {"a": corpus(train), "b": corpus(test=test)}
        union = build_union(corpora)
        assert union.report["documents"]["before"][-1] == {
            "of": "b test",
            "in": "a train",
            "documents": 1,
        }
        [leak] = union.report["leaks"]["before"]
        assert (leak["from"], leak["into"], leak["documents"]) == ("a train", "b test", 1)
        assert len(texts(build_union(corpora, drop_leaks="train"))) == 3  # the title is an equal sentence
        union = build_union(corpora, drop_leaks="documents")
        assert texts(union) == ["Something else entirely was measured here ."]
        assert union.report["leaks"]["after"] == [] and texts(union, "test") == [one.text for one in test]
        union = build_union(corpora, drop_leaks="test")
        assert len(texts(union)) == 4 and {item.record.doc_id for item in union.splits["test"]} == {"78"}
        assert union.report["documents"]["dropped"] == {"b test": 1}


def test_part_of_a_scored_document_in_train_is_told(caplog):
    corpora = {
        "a": corpus(cut(TITLE + BODY, "a", "1")),
        "b": corpus(test=cut(TITLE + BODY, "b", "2", ends="!")),
    }
    build_union(corpora, drop_leaks="train")
    assert "both trained and scored (a train 1): drop_leaks=documents" in caplog.text


def test_only_documents_of_another_corpus_leave_a_test_set():
    own = corpus(cut(TITLE + BODY, "a", "1"), test=cut(TITLE + BODY, "a", "2"))
    assert len(build_union({"a": own}, drop_leaks="test").splits["test"]) == 3
    headings = [
        record("Materials and methods :", dataset="b"),
        record("Aspirin was given to all patients ; no further drugs were used .", dataset="b"),
    ]
    theirs = corpus([replace(one, dataset="c") for one in headings])
    union = build_union({"b": corpus(test=headings), "c": theirs}, drop_leaks="test")
    assert texts(union, "test") == ["Materials and methods :"]


def test_a_split_of_which_nothing_is_left_is_refused_with_the_cause():
    twice = [record("One sentence of this corpus"), record("Another sentence of this corpus")]
    both = {"a": corpus(twice), "b": corpus(test=[replace(one, dataset="b") for one in twice])}
    with pytest.raises(
        DataError,
        match=r"nothing is left of train \(training sentences taken out: drop_leaks 2\)\. drop_leaks=train takes",
    ):
        build_union(both, drop_leaks="train")
    with pytest.raises(
        DataError,
        match=r"nothing is left of test .*drop_leaks=test takes out what also stands in another split",
    ):
        build_union(both, drop_leaks="test")


@pytest.mark.slow
def test_the_abstracts_that_biored_and_bc5cdr_share_are_found_by_text():
    """204 of BioRED's 600 have a PubMed id of BC5CDR, whose IOB version knows no documents."""
    corpora = {
        name: read_corpus(shared_corpus(f"{name}_{form}"), optional=["dev"])
        for name, form in (("bc5cdr", "iob"), ("biored", "pubtator"))
    }
    corpora["biored"]["dev"] = []
    union = build_union(corpora, drop_leaks="documents")
    rows = [row for row in union.report["documents"]["before"] if row["of"].startswith("biored")]
    assert sum(row["documents"] for row in rows if row["in"].startswith("bc5cdr")) == 204
    into = {row["into"]: row["documents"] for row in union.report["leaks"]["before"]}
    assert into["biored test"] == 11  # of bc5cdr dev, the last row
    assert not [row for row in union.report["leaks"]["after"] if " train" in row["from"]]
    union = build_union(corpora, drop_leaks="test")
    assert union.report["documents"]["dropped"]["biored test"] == 10
    left = {item.record.doc_id for item in union.splits["test"] if item.record.dataset == "biored"}
    assert len(left) == 90


def test_conflicts_are_settled_by_the_order_of_the_corpora():
    a = corpus([record("IL-2 gene", (0, 4))])
    b = corpus([record("IL-2 gene", (0, 9), dataset="b"), record("b only", (0, 1), dataset="b")])
    for order, winner in (("ab", (0, 4)), ("ba", (0, 9))):
        corpora = {name: {"a": a, "b": b}[name] for name in order}
        union = build_union(corpora, conflicts="first")
        found = {item.record.text: item.record.spans for item in union.splits["train"]}
        assert found == {"IL-2 gene": (winner,), "b only": ((0, 1),)}
        before, after = union.report["conflicts"]["before"], union.report["conflicts"]["after"]
        assert before["train"] == {"groups": 1, "within": 0, "across": 1, "pairs": {"a / b": 1}}
        assert after["train"]["groups"] == 0
    assert len(build_union({"a": a, "b": b}).splits["train"]) == 3


def test_conflicts_within_one_corpus_and_across_splits_are_found():
    twice = [
        record("x y", (0, 1), doc_id="1"),
        record("x y", (2, 3), doc_id="2"),
        record("x y", (0, 1), doc_id="3"),
    ]
    assert [len(group) for group in find_conflicts(keyed(train=twice))] == [3]
    union = build_union({"a": corpus(twice)}, conflicts="first")
    assert [item.record.doc_id for item in union.splits["train"]] == ["1", "3"]
    assert find_conflicts(keyed(train=twice[:1], dev=twice[1:2]))
    assert find_conflicts(keyed(train=[twice[0], twice[2]])) == []


def test_only_the_same_gold_is_a_duplicate():
    records = [record("x y", (0, 1)), record("X y", (0, 1)), record("x y", (2, 3)), record("z")]
    assert find_duplicates(map(key_of, records)) == {"a": 1}
    union = build_union({"a": corpus(records)}, deduplicate=True)
    assert [(item.record.text, item.record.spans) for item in union.splits["train"]] == [
        ("x y", ((0, 1),)),
        ("x y", ((2, 3),)),
        ("z", ()),
    ]


def documents(dataset: str, count: int, sentences: int = 5) -> list[Record]:
    return [
        record(f"{dataset} document {doc} sentence {number}", dataset=dataset, doc_id=f"d{doc}")
        for doc in range(count)
        for number in range(sentences)
    ]


def sizes(union) -> dict[str, int]:
    return union.steps[-1]["left"]


@pytest.mark.slow
def test_weights_and_caps_draw_whole_documents():
    corpora = {
        "a": corpus(documents("a", 100)),
        "b": corpus(documents("b", 20)),
        "c": corpus(documents("c", 60)),
    }
    assert sizes(build_union(corpora, corpus_weights=[1, 1, 1])) == {"a": 100, "b": 100, "c": 100}
    assert sizes(build_union(corpora, corpus_weights=[2, 0.5, 1])) == {"a": 400, "b": 100, "c": 200}
    assert sizes(build_union(corpora, max_per_corpus=203)) == {"a": 200, "b": 100, "c": 200}
    assert sizes(build_union(corpora, max_per_corpus=3)) == {"a": 5, "b": 5, "c": 5}  # at least a document
    union = build_union(corpora, max_per_corpus=203)
    drawn = {(item.record.dataset, item.record.doc_id) for item in union.splits["train"]}
    assert len(drawn) == 40 + 20 + 40
    order = [texts(build_union(corpora)).index(text) for text in texts(union)]
    assert order == sorted(order)


def test_a_corpus_that_was_merged_before_counts_as_one(caplog):
    corpora = {"merged": corpus(documents("a", 4) + documents("b", 4)), "c": corpus(documents("c", 4))}
    assert sizes(build_union(corpora)) == {"merged": 40, "c": 20} and not caplog.text
    assert sizes(build_union(corpora, corpus_weights=[1, 1])) == {"merged": 20, "c": 20}
    assert sizes(build_union(corpora, max_per_corpus=10)) == {"merged": 10, "c": 10}


def test_a_draw_depends_on_its_seed_and_a_larger_one_holds_the_smaller():
    names = {(dataset, f"d{number}") for dataset in "ab" for number in range(500)}
    tenth, fifth = draw_share(names, 0.1, seed=1), draw_share(names, 0.2, seed=1)
    assert len(tenth) == 100 and len(fifth) == 200 and tenth < fifth
    assert tenth == draw_share(sorted(names), 0.1, seed=1) != draw_share(names, 0.1, seed=2)
    assert {dataset for dataset, _ in tenth} == {"a", "b"}
    assert {name for name in tenth if name[0] == "a"} == draw_share(
        {n for n in names if n[0] == "a"}, 0.1, seed=1
    )
    records = documents("a", 50)
    assert draw_sentences(records, 20, seed=1) < draw_sentences(records, 100, seed=1)
    assert draw_sentences(records, 20, seed=1) != draw_sentences(records, 20, seed=2)


def test_what_cannot_be_merged_is_refused(tmp_path):
    twice = corpus([record("x", doc_id="d1")], [record("y", doc_id="d1")])
    with pytest.raises(DataError, match="a: document 'd1' stands in train and in dev"):
        check_documents(twice)
    check_documents({"train": [record("x", doc_id="d1")], "dev": [record("y", doc_id="d2")]})
    two = {"a": corpus(documents("a", 1)), "b": corpus(documents("b", 1))}
    with pytest.raises(ParameterError, match="corpus_weights has 1 values for 2 corpora"):
        build_union(two, corpus_weights=[1])
    with pytest.raises(DataError, match="no corpus named"):
        write_corpus([], tmp_path)
    with pytest.raises(DataError, match="two corpora are called 'sample'"):
        write_corpus(["sample", "sample"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_corpus_that_loses_all_its_sentences_is_told(caplog):
    a, b = corpus([record("x y", (0, 1))]), corpus([record("x y", (2, 3), dataset="b")])
    build_union({"a": a, "b": b}, conflicts="first")
    assert "b: no training sentence is left" in caplog.text
    with pytest.raises(DataError, match="no training sentence of b is left"):
        build_union({"a": a, "b": b}, conflicts="first", corpus_weights=[1, 1])


def test_the_data_card_tells_sources_splits_and_steps(tmp_path):
    card = write_corpus(
        ["sample"], tmp_path, drop_leaks="train", deduplicate=True, conflicts="first", seed=42
    )
    assert card == json.loads((tmp_path / "data_card.json").read_text())
    assert (tmp_path / "conflicts.jsonl").read_text() == ""
    expected = {"train": (56, 448, 1091), "dev": (10, 86, 261), "test": (10, 90, 288)}
    for split, (docs, sentences, spans) in expected.items():
        counts = card["splits"][split]
        assert (counts["documents"], counts["sentences"], counts["spans"]) == (docs, sentences, spans)
        assert counts["datasets"] == {"sample": {"sentences": sentences, "spans": spans}}
        assert counts["sha256"] == file_sha256(tmp_path / f"{split}.jsonl")
        assert len(read_records(tmp_path / f"{split}.jsonl")) == sentences
    assert len(card["sources"]["sample"]["files"]) == 3
    assert card["union"]["options"]["drop_leaks"] == "train"
    assert list(union_table(card).index) == ["corpora as they are", "drop_leaks", "conflicts", "deduplicate"]
    assert leak_table(card).empty and len(data_card_table(card)) == 3
    assert reading_table(card).loc[("sample", "dev"), "spans"] == 261
    assert conflict_table(card)["groups"].tolist() == [0, 0, 0, 0] and read_conflicts(tmp_path) == []


def test_a_type_is_one_of_any_of_the_corpora(tmp_path):
    for name, kind in (("a", "Chemical"), ("b", "ChemicalEntity")):
        for split in SPLITS:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.tsv").write_text(
                f"{split}\tO\n{name}\tB-{kind}\nin\tO\nman\tB-Species\n"
            )
    sources, out = [str(tmp_path / name) for name in "ab"], tmp_path / "data"
    write_corpus(sources, out, reading={"types": ["Chemical", "ChemicalEntity"]})
    assert [record.types for record in read_records(out / "train.jsonl")] == [
        ("Chemical",),
        ("ChemicalEntity",),
    ]
    for types, where in ((["Chemical"], "b"), (["Species", "Chemicals"], "a, b")):
        with pytest.raises(DataError, match=rf"{where}: no mention has type 'Chemicals?'\. Did you mean"):
            write_corpus(sources, out, reading={"types": types})


def test_the_card_tells_types_unique_mentions_and_what_is_published(tmp_path):
    """Tables of a corpus with types, of one without, and of one that is known by its name."""
    typed = [
        Record("Aspirin and aspirin help", ((0, 7), (12, 19)), "d1", "biored", types=("Drug", "Drug")),
        Record("Asthma and IL-2", ((0, 6), (11, 15)), "d2", "biored", types=("Disease", "Gene|Protein")),
    ]
    for split in SPLITS:
        records = [replace(one, doc_id=f"{split}{one.doc_id}") for one in typed]
        write_records(tmp_path / f"biored/{split}.jsonl", records if split == "train" else records[:1])
        plain = record("IL-2 binds", (0, 4), dataset="plain", doc_id=split)
        write_records(tmp_path / f"plain/{split}.jsonl", [plain])
    card = write_corpus([str(tmp_path / "biored"), str(tmp_path / "plain")], tmp_path / "data")
    train = card["sources"]["biored"]["splits"]["train"]
    assert (train["spans"], train["unique_spans"]) == (4, 3)
    assert train["types"] == {"Drug": 2, "Disease": 1, "Gene|Protein": 1}
    assert type_table(card).to_dict("index") == {
        ("biored", "Drug"): {"train": 2, "dev": 2, "test": 2},
        ("biored", "Disease"): {"train": 1, "dev": 0, "test": 0},
        ("biored", "Gene|Protein"): {"train": 1, "dev": 0, "test": 0},
        ("plain", "(none)"): {"train": 1, "dev": 1, "test": 1},
    }
    table = published_table(card)
    assert table["annotated"].to_dict() == {"biored": 8, "plain": 3}
    assert "20,419 mentions" in table.loc["biored", "published"] and table.loc["plain", "published"] == ""
    mentions = mention_table({"train": read_records(tmp_path / "data/train.jsonl")})
    assert mentions["mention"].tolist() == ["aspirin", "aspirin", "asthma", "il-2", "il-2"]
    assert mentions["type"].tolist() == ["Drug", "Drug", "Disease", "Gene|Protein", ""]
    assert set(mentions["words"]) == {1}


def test_a_corpus_without_splits_is_split_by_document(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    records = documents("mine", 40)
    write_records(folder / "records.jsonl", [replace(one, spans=((0, 4),)) for one in records])
    with pytest.raises(DataError, match="train"):
        write_corpus([str(folder)], tmp_path / "data")
    card = write_corpus([str(folder)], tmp_path / "data", split_shares=[0.8, 0.1, 0.1], seed=1)
    assert [card["splits"][split]["documents"] for split in ("train", "dev", "test")] == [32, 4, 4]
    found = {split: read_records(tmp_path / "data" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    check_documents(found)
    assert sum(map(len, found.values())) == 200
    assert [len(part) for part in draw_splits(documents("a", 3, 1), [0.98, 0.01, 0.01], seed=1)] == [1, 1, 1]
    with pytest.raises(DataError, match="too few documents"):
        write_records(folder / "records.jsonl", [replace(one, spans=((0, 4),)) for one in records[:10]])
        write_corpus([str(folder)], tmp_path / "data", split_shares=[0.8, 0.1, 0.1])
    # A corpus with splits of its own keeps them.
    with pytest.raises(
        DataError, match="holds the data of mine, and would be written over with those of sample"
    ):
        write_corpus(["sample"], tmp_path / "data", split_shares=[1, 1, 1])
    card = write_corpus(["sample"], tmp_path / "other", split_shares=[1, 1, 1])
    assert card["splits"]["train"]["sentences"] == 448


def test_missing_splits_are_drawn_from_train_by_document(tmp_path, caplog):
    folder, seen = tmp_path / "mine", {}
    annotated = [replace(one, spans=((0, 4),)) for one in documents("mine", 50)]
    write_records(folder / "train.jsonl", annotated[:200])
    write_records(folder / "test.jsonl", annotated[200:])
    with pytest.raises(
        DataError, match=r"whose name says dev .*02_data draws it from train with dev_share=0.1"
    ):
        write_corpus([str(folder)], tmp_path / "data")
    for options in (
        {"dev_share": 0.1},
        {"split_shares": [0.9, 0.1, 5]},
        {"dev_share": 0.1, "split_shares": [1, 1, 1]},
    ):
        card = write_corpus([str(folder)], tmp_path / "data", seed=1, **options)
        assert [card["splits"][split]["documents"] for split in SPLITS] == [36, 4, 10]
        check_documents({split: read_records(tmp_path / f"data/{split}.jsonl") for split in SPLITS})
        seen[card["splits"]["dev"]["sha256"]] = options
    assert len(seen) == 1  # the same four, whatever asks for them
    with pytest.raises(DataError, match=r"whose name says test .* split_shares=\[0.8,0.1,0.1\]"):
        (folder / "test.jsonl").unlink()
        write_corpus([str(folder)], tmp_path / "data", dev_share=0.1)
    card = write_corpus([str(folder)], tmp_path / "data", split_shares=[0.8, 0.1, 0.1])
    assert [card["splits"][split]["documents"] for split in SPLITS] == [32, 4, 4]
    with pytest.raises(DataError, match=r"too few documents for dev_share=0.1"):
        write_records(folder / "test.jsonl", annotated[200:])
        write_records(folder / "train.jsonl", annotated[:5])
        write_corpus([str(folder)], tmp_path / "data", dev_share=0.1)
    assert "sentence by sentence" not in caplog.text
    write_records(folder / "train.jsonl", [replace(one, doc_id=one.text) for one in annotated[:200]])
    write_corpus([str(folder)], tmp_path / "data", dev_share=0.1)
    assert "mine: dev is drawn sentence by sentence, as no document has several" in caplog.text


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_conflict_about_a_text_with_a_unicode_line_separator_is_read_back(tmp_path, separator):
    text = f"Aspirin{separator}can help"
    for name, span in (("one", (0, 7)), ("two", (8, 11))):
        for split in ("train", "dev", "test"):
            records = [record(text if split == "train" else f"{name} of {split} text", span, dataset=name)]
            write_records(tmp_path / name / f"{split}.jsonl", records)
    write_corpus([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "data", conflicts="first")
    [versions] = read_conflicts(tmp_path / "data")
    assert [(version["dataset"], version["text"]) for version in versions] == [("one", text), ("two", text)]


def test_no_jsonl_is_read_with_splitlines():
    """What is split so here are messages of programs and errors, notebooks' sources, and listings."""
    places = [
        *ROOT.glob("biomerge_lib/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("notebooks/*.ipynb"),
    ]
    used = [line for path in places for line in path.read_text("utf-8").split("\n") if ".splitlines(" in line]
    assert used
    assert not [line for line in used if re.search(r"json\.loads\(line|jsonl|_stream", line)]


def test_a_corpus_is_not_written_over(tmp_path):
    write_corpus(["sample"], tmp_path / "mine")
    before = file_sha256(tmp_path / "mine/train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl: is read from corpus mine, and would be written over"):
        write_corpus([str(tmp_path / "mine")], tmp_path / "runs/../mine", drop_leaks="train")
    assert file_sha256(tmp_path / "mine/train.jsonl") == before


def test_unseen_mentions_are_counted_by_string():
    train = [record("Aspirin helps", (0, 7))]
    other = [record("aspirin and ASA", (0, 7), (12, 15)), record("nothing")]
    assert unseen_share(train, other) == 0.5
    assert unseen_share(train, [record("nothing")]) == 0
    both = [*train, record("ASA binds", (0, 3), dataset="b")]
    table = seen_table(both, [*other, record("ASA", (0, 3), dataset="b")])
    assert table.to_dict("index") == {
        "a": {"mentions": 2, "a": 0.5, "b": 0.5, "any": 1.0},
        "b": {"mentions": 1, "a": 0.0, "b": 1.0, "any": 1.0},
    }


@pytest.mark.slow
def test_the_union_of_the_five_has_the_published_counts_and_overlaps(tmp_path):
    sources = [str(shared_corpus(f"{name}_iob")) for name in COUNTS]
    card = write_corpus(sources, tmp_path, drop_leaks="train", deduplicate=True, conflicts="first")
    for name, counts in COUNTS.items():
        splits = card["sources"][name]["splits"]
        found = [(splits[split]["sentences"], splits[split]["spans"]) for split in ("train", "dev", "test")]
        assert found == counts, name
    assert card["splits"]["train"]["sentences"] == 39161
    pairs = {(row["from"], row["into"]): row for row in card["union"]["leaks"]["before"]}
    own = pairs["jnlpba train", "jnlpba test"]
    assert (own["verbatim"], own["documents"]) == (106, 10)
    assert pairs["bionlp13cg train", "anatem test"]["verbatim"] == 34
    assert card["union"]["conflicts"]["before"]["train"]["pairs"] == {
        "anatem / bionlp13cg": 2508,
        "bc2gm / jnlpba": 51,
    }
    assert not [row for row in card["union"]["leaks"]["after"] if " train" in row["from"]]
    assert card["union"]["conflicts"]["after"]["train"]["groups"] == 0
    assert card["splits"]["train"]["datasets"]["bionlp13cg"]["sentences"] == 0
    groups = read_conflicts(tmp_path)
    assert len(groups) == card["union"]["conflicts"]["before"]["all splits"]["groups"]
    assert len({version["target"] for version in groups[0]}) > 1
    assert groups[0][0].keys() == {"split", "dataset", "doc_id", "text", "target", "kept"}


@pytest.mark.slow
def test_corpora_without_a_dev_set_have_the_counts_that_their_folder_tells(tmp_path):
    """corpora/README.md: documents and mentions; BioRED's training and dev documents stand in one file."""
    sources = [str(shared_corpus(f"{name}_pubtator")) for name in DOCUMENT_COUNTS]
    reading = {"bad_mentions": "skip"}
    card = write_corpus(sources, tmp_path, reading=reading, dev_share=0.1, drop_leaks="documents")
    for name, expected in DOCUMENT_COUNTS.items():
        read = card["sources"][name]["reading"]
        assert [
            (read[split]["documents"], read[split]["annotated"]) for split in ("train", "test")
        ] == expected
        splits = card["sources"][name]["splits"]
        assert splits["train"]["documents"] + splits["dev"]["documents"] == expected[0][0]
        assert splits["dev"]["documents"] == round(0.1 * expected[0][0])
        assert sum(splits["train"]["types"].values()) == splits["train"]["spans"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "mentions"),
    [
        ("brat:", "anatem_brat", [6946, 2139, 4616]),
        ("bioc:", "bc5cdr_original", [9385, 9591, 9809]),
        ("pubtator:", "bc5cdr_original", [9385, 9591, 9809]),
    ],
)
def test_untokenised_corpora_become_data_sets_without_losing_a_mention(tmp_path, form, name, mentions):
    card = write_corpus([f"{form}{shared_corpus(name)}"], tmp_path, drop_leaks="train", deduplicate=True)
    [source] = card["sources"].values()
    assert [counts["spans"] for counts in source["splits"].values()] == mentions
    assert source["format"] == form.removesuffix(":")
    for split in ("dev", "test"):
        assert card["splits"][split]["spans"] == source["splits"][split]["spans"]


@pytest.mark.integration
def test_the_notebook_runs_on_documents(tmp_path, tiny_prepared):
    words = [
        f"corpora=['pubtator:{shared_corpus('bc5cdr_original')}']",
        "entity_types=[Chemical]",
        f"data_dir={tmp_path}/data",
        f"runs_dir={tmp_path}/runs",
        f"tokenizer_dir={tiny_prepared}",
    ]
    run_notebook("02_data", [*words, "run_id=documents", "max_per_corpus=500"])
    stages = json.loads((tmp_path / "runs" / "documents" / "metrics.json").read_text())["stages"]
    metrics = stages["02_data"]["metrics"]
    assert metrics["test_spans"] == 5385 and 450 < metrics["train_sentences"] <= 500


def test_the_unions_page_is_written_from_its_card(tmp_path, tiny_parameters):
    parameters = tiny_parameters(data_dir=str(tmp_path / "data"))
    page = write_union_report(parameters, "the command", tmp_path / "report").read_text()
    assert "the command" in page and "| sample | 448 / 1,091 | 86 / 261 | 90 / 288 |" in page
    assert "| deduplicate | 448 | 448 | 0 |" in page
    assert json.loads((tmp_path / "report" / "union.json").read_text())["splits"]["dev"]["spans"] == 261


@pytest.mark.parametrize("name", ["union", "union-of-seven"])
def test_the_published_unions_have_the_corpora_counts(name):
    folder = ROOT / "reports" / name
    card = json.loads((folder / "union.json").read_text())
    more = ["biored", "nlmgene", "gnormplus"] if name == "union-of-seven" else []
    assert list(card["sources"]) == ["bc5cdr", "bc2gm", "jnlpba", "anatem", *more]
    for name, source in card["sources"].items():
        splits = source["reading"] if name in DOCUMENT_COUNTS else source["splits"]
        unit, spans = ("documents", "annotated") if name in DOCUMENT_COUNTS else ("sentences", "spans")
        found = [(counts[unit], counts[spans]) for counts in splits.values()]
        assert found == (DOCUMENT_COUNTS | COUNTS)[name]
    assert not [row for row in card["union"]["leaks"]["after"] if " train" in row["from"]]
    page = (folder / "README.md").read_text()
    assert card["command"] in page and "/root" not in page and len(page) < 20_000
    assert card["union"]["conflicts"]["after"]["train"]["groups"] == 0
