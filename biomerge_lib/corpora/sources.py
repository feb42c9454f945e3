"""Knows how a corpus is spelled and where its splits are; of the files it knows no more than the first line.

A corpus is a folder with one file (or one sub-folder of files) for each of train, dev and test, in one of ``FORMATS``;
docs/corpora.md has the whole of it. A file or sub-folder belongs to a split when its name holds one split's word
(``SPLIT_WORDS``). One that names train and dev (``traindev.PubTator``) is train where neither has a file of its own;
else it holds the same sentences again (BioBERT's ``train_dev.tsv``) and is left unread, as is any other that names two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path

from biomerge_lib.core.errors import DataError, nearest
from biomerge_lib.core.records import SPLITS
from biomerge_lib.corpora.format_bioc import BIOC
from biomerge_lib.corpora.format_brat import BRAT
from biomerge_lib.corpora.format_hub import HUB, find_hub, hub_files
from biomerge_lib.corpora.format_iob import IOB
from biomerge_lib.corpora.format_json import JSON
from biomerge_lib.corpora.format_jsonl import JSONL
from biomerge_lib.corpora.format_pubtator import PUBTATOR
from biomerge_lib.corpora.format_webanno import WEBANNO
from biomerge_lib.corpora.formats import (
    SPLIT_WORDS,
    Format,
    Source,
    ending_of,
    entries_of,
    first_line,
    splits_of,
    stem_of,
)

# A file is of the first format that has its ending and takes it for its own.
FORMATS: dict[str, Format] = {
    "brat": BRAT,
    "pubtator": PUBTATOR,
    "webanno": WEBANNO,
    "iob": IOB,
    "bioc": BIOC,
    "json": JSON,
    "hub": HUB,
    "jsonl": JSONL,
}
SAMPLE = "sample"
SAMPLE_DIR = Path(__file__).parent / "sample_corpus"
_ABOUT = re.compile(r"readme|licen[cs]e|notice|source", re.IGNORECASE)
# What is not read: how a file's name ends, how its first line begins, what it is and the nearest way.
FOREIGN = (
    (r"\.con", "", "i2b2 concepts: turn line and token numbers into offsets, and write BRAT"),
    ("", r"\S+\t[TA]\t\d+\t\d+\t", "CHEMDNER's annotations, apart from the texts: write PubTator"),
    ("", r"P\d{8}[TA]\d{4}[ |]", "BC2GM's raw sentences, offsets without blanks: take its IOB version"),
    ("", "\ufffd|.?\0", "no text in UTF-8: unpack it, or convert it with iconv"),
    (r"\.csv", "", "a CSV table: write token and tag with a tab between, as .tsv"),
    (r"\.(zip|tar|tgz|7z|rar)(\.gz)?", "", "an archive: unpack it"),
    (r"\.(docx?|xlsx?|pdf|rtf)", "", "no text file: save it as UTF-8 text"),
)


def find_source(
    source: str | Path, *, splits: Sequence[str] = SPLITS, optional: Collection[str] = ()
) -> Source:
    """Find a corpus: a folder, ``format:folder``, ``hub:owner/name``, or ``sample`` for the bundled one.

    Of ``splits`` the ``optional`` ones may be missing. With one that may not the source may also be that split's file,
    or a folder whose names tell no split.

    Raises:
        DataError: there is no such folder or no known format, or a split has no file, or two.
    """
    name, forced = str(source), None
    head, colon, rest = name.partition(":")
    if colon and head in FORMATS:
        name, forced = rest, head
    folder = SAMPLE_DIR if name == SAMPLE else Path(name).expanduser()
    if forced == "hub" and not folder.is_dir():
        repository, _, config = name.partition("#")
        return find_hub(name, "_".join(filter(None, [Path(repository).name, config])), splits, optional)
    if not (name and folder.exists()):
        forms = f"a folder, FORMAT:folder ({', '.join(FORMATS)}), hub:owner/name, or {SAMPLE}"
        hint = nearest(name, [SAMPLE, *map(str, folder.parent.glob("*"))]) or nearest(head, FORMATS)
        said = folder.absolute() if name else f"corpora: {str(source)!r}"
        raise DataError(f"{said}: no such corpus folder.{hint} A corpus is {forms}.")
    kind = forced or _find_format(folder)
    own_name = stem_of(folder) if folder.is_file() else folder.resolve().name
    dataset = SAMPLE if name == SAMPLE else own_name.removesuffix(f"_{kind}")
    if kind == "hub":
        return find_hub(str(folder), dataset, splits, optional)
    required = [split for split in splits if split not in optional]
    candidates, unread = _find_candidates(folder, kind, splits, required, is_forced=forced is not None)
    for split in splits:
        if len(candidates[split]) != 1 and (split in required or candidates[split]):
            raise DataError(_explain_splits(folder, kind, split, candidates[split], unread))
    files = {split: candidates[split][0] for split in splits if candidates[split]}
    for path in chain.from_iterable(files.values()):
        if re.search("[\ud800-\udfff]", path.name):  # documents are called as their files
            raise DataError(f"{str(path)!r}: the file's name is not UTF-8; rename it.")
    for entry in entries_of(folder) if folder.is_dir() else []:
        for split in splits_of(entry.name) if entry.is_dir() else []:
            _refuse_strays(entry, files.get(split, ()), kind)
    return Source(dataset, kind, str(folder), files)


def _find_format(folder: Path) -> str:
    """The one format that the folder's files have."""
    if any(path.suffix in (".parquet", ".arrow") for path in hub_files(folder)):
        return "hub"
    places = [folder] if folder.is_file() else []
    for entry in [] if folder.is_file() else entries_of(folder):
        places += entries_of(entry) if entry.is_dir() and splits_of(entry.name) else [entry]
    formats = list(dict.fromkeys(filter(None, map(_format_of, places))))
    if len(formats) > 1:  # a stray table or text beside the corpus names no split
        named = [kind for kind in formats if any(_find_candidates(folder, kind, SPLITS, SPLITS)[0].values())]
        formats = named or formats
    if "brat" in formats:  # a .txt without its .ann would look like something else, or like nothing
        formats = [kind for kind in formats if kind != "iob"]
    if not formats:
        raise DataError(f"{folder}: no corpus in a known format. {_explain_files(folder, places)}")
    if len(formats) > 1:
        ways = " or ".join(f"{kind}:{folder}" for kind in formats)
        raise DataError(f"{folder}: holds a corpus in {len(formats)} formats; say which: {ways}.")
    return formats[0]


def _explain_files(folder: Path, places: Sequence[Path]) -> str:
    """What the files are that were found, and which ones are read."""
    for path in filter(Path.is_file, folder.rglob("*") if folder.is_dir() else places):
        for name, line, what in FOREIGN:
            if re.search(f"{name}$", path.name.lower()) and re.match(line, first_line(path)):
                return f"{path.name} is {what}."
    inner = [f"sub-folder {path.relative_to(folder)}" for path in places if path.is_dir()]
    found = ", ".join(sorted({path.suffix for path in places if path.suffix}) or inner or ["no file"])
    read = "; ".join(f"{name}: {' '.join(form.endings)}" for name, form in FORMATS.items())
    read += " (also .gz; iob needs a column of tags, such as O and B-Type)"
    return f"Found: {found}. Read are {read}. If it is one: FORMAT:{folder}."


def _format_of(path: Path) -> str | None:
    """The format of a file by its ending and first line; None where it is no corpus file."""
    ending = ending_of(path) if path.is_file() else ""
    candidates = (name for name, form in FORMATS.items() if ending in form.endings)
    return next((name for name in candidates if (has := FORMATS[name].has) is None or has(path)), None)


def _find_candidates(
    folder: Path, kind: str, splits: Sequence[str], required: Sequence[str], *, is_forced: bool = False
) -> tuple[dict[str, list[list[Path]]], list[Path]]:
    """What each split could be (each a list of files), and what is in the format but of no one split."""
    form = FORMATS[kind]

    def is_ours(path: Path) -> bool:
        if ending_of(path) not in form.endings or not path.is_file():
            return False
        found = _format_of(path)
        if form.is_document_a_file:
            return found == kind or not _ABOUT.fullmatch(stem_of(path))
        return found in ((kind, None) if is_forced else (kind,))

    if folder.is_file():
        return {split: [[folder]] if [split] == required else [] for split in splits}, []
    files = {
        entry: sorted(filter(is_ours, entries_of(entry) if entry.is_dir() else [entry]))
        for entry in entries_of(folder)
    }
    told = {
        entry: [] if form.is_document_a_file and entry.is_file() else splits_of(entry.name)
        for entry, own in files.items()
        if own
    }
    if ["train"] not in told.values() and ["dev"] not in told.values():
        told = {entry: ["train"] if names == ["train", "dev"] else names for entry, names in told.items()}
    candidates = {
        split: [files[entry] for entry, names in told.items() if names == [split]] for split in splits
    }
    unread = [entry for entry, names in told.items() if len(names) != 1]
    is_loose = all(entry.is_file() and not told[entry] for entry in unread)
    if len(required) == 1 and unread and is_loose and not any(candidates.values()):
        candidates[required[0]], unread = [unread], []
    return candidates, unread


def _refuse_strays(folder: Path, own: Sequence[Path], kind: str) -> None:
    """Raise DataError where a split's folder holds more than its files in the corpus's format: it would be lost."""
    entries = set(entries_of(folder))
    for path in sorted(entries - {*own} if not entries.isdisjoint(own) else ()):
        inside = path.rglob("*") if path.is_dir() else [path] if not _ABOUT.fullmatch(stem_of(path)) else []
        if any(ending_of(one) in FORMATS[kind].endings for one in inside):
            lies = f"it lies in a split's folder and is not read as {kind}"
            raise DataError(f"{path}: {lies}; mend it, or move it elsewhere.")


def _explain_splits(folder: Path, kind: str, split: str, found: list[list[Path]], unread: list[Path]) -> str:
    if found:
        names = ", ".join(paths[0].name if len(paths) == 1 else paths[0].parent.name + "/" for paths in found)
        return f"{folder}: {split} has {len(found)} candidates ({names}); keep one of them in the folder."
    what = f"{kind} file or sub-folder"
    if FORMATS[kind].is_document_a_file:
        what = f"sub-folder of {' and '.join(FORMATS[kind].endings)} files"
    words = ", ".join(SPLIT_WORDS[split])
    left = f" Not read: {', '.join(path.name for path in unread[:5])}." if unread else ""
    drawn = {"dev": "dev_share=0.1", "test": "split_shares=[0.8,0.1,0.1]"}.get(split)
    way = f"; 02_data draws it from train with {drawn}" if drawn else ""
    reads = f" {kind} reads {', '.join(FORMATS[kind].endings)}."
    return f"{folder}: no {what} whose name says {split} ({words}){way}.{left}{reads}"
