"""Knows what ``python -m biomerge_lib predict`` does with its options; the library's way in is ``predict``.

texts, files, folders --[texts]--> a tagger's answers --[writers]--> terminal, JSONL, CoNLL, BRAT, a page
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, tee
from pathlib import Path
from typing import TextIO

from jinja2 import Environment, FileSystemLoader

from biomerge_lib.apply.texts import STDIN, Text, iter_texts
from biomerge_lib.core.errors import DataError, ParameterError
from biomerge_lib.core.files import partial_of, whole_file
from biomerge_lib.core.markup import INERT
from biomerge_lib.corpora.writers import Tagged, write_brat, write_iob, write_jsonl
from biomerge_lib.model.adapters import SHIPPED
from biomerge_lib.report.display import STYLE, bracket, highlight

FORMAT_OF_ENDING = {".jsonl": "jsonl", ".html": "html", ".conll": "conll", ".iob": "conll", ".tsv": "conll"}
LIST_CUES = "list"  # what --cue without a name stands for
LONG = 2_000  # characters that take long enough for a progress bar


def predict_texts(options: Namespace) -> None:
    """Run the command; all files are read once before the model is loaded, so that a broken one is named at once."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of loading weights, for half a second
    if options.print_model_folder:
        from biomerge_lib.apply.ready_models import find_model

        print(find_model(adapter=options.adapter, model=options.model))
        return
    if options.cue == LIST_CUES:
        from biomerge_lib.apply.ready_models import describe_cues, find_manifest

        print(describe_cues(find_manifest(adapter=options.adapter, model=options.model)))
        return
    kind = options.format or FORMAT_OF_ENDING.get(Path(options.out or "").suffix.lower(), "text")
    if kind == "brat" and not options.out:
        raise ParameterError("--format brat writes a .txt and an .ann for each text: give --out FOLDER.")
    if kind != "brat" and options.out and os.path.isdir(options.out):
        raise ParameterError(f"--out {options.out} is a folder: name a file in it, or say --format brat.")
    if options.out and (read := _input_at(Path(options.out), options.file)):
        raise ParameterError(f"--out {options.out} is an input (--file {read}): name another file.")
    if options.batch_size < 1:
        raise ParameterError(f"--batch-size must be at least 1, not {options.batch_size}.")
    if not 0 <= (options.threshold or 0) <= 1:
        raise ParameterError(f"--threshold {options.threshold} is no probability: give one from 0 to 1.")
    for text in options.texts:
        if os.path.exists(text):
            raise ParameterError(f"{text} is there as a file or folder; to read it: predict --file {text}")
    given = [Text(f"text-{number}", text) for number, text in enumerate(options.texts, 1) if text.strip()]
    is_piped = not (options.texts or options.file or sys.stdin.isatty())
    files = [STDIN] if is_piped else list(options.file)
    if STDIN in files:  # can be read once
        given += [text for path in files if path == STDIN for text in iter_texts([path])]
        files = [path for path in files if path != STDIN]
    characters = sum(len(text.text) for text in chain(given, iter_texts(files) if files else ()))
    if not characters:
        raise DataError(
            'no text to read: python -m biomerge_lib predict "Aspirin can trigger asthma attacks ."'
        )
    texts = chain(given, iter_texts(files, name_empty=False) if files else ())
    tagged = _tag(texts, characters, options)
    if kind == "brat":
        write_brat(tagged, options.out)
        return
    with _open_out(options.out) as out:
        if kind == "jsonl":
            write_jsonl(tagged, out)
        elif kind == "html":
            page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
            look = {"inert": INERT, "style": STYLE, "highlight": highlight}
            look |= {"model": options.model or options.adapter or SHIPPED.name, "asked": options}
            for piece in page.get_template("mentions.html.j2").generate(parts=tagged, **look):
                print(piece, file=out, end="", flush=True)
        elif kind == "conll":
            write_iob(tagged, out, spaced=options.spaced is not False)
        else:
            for part in tagged:
                shown = bracket(part.text, part.spans, colour=out.isatty())
                print(shown, file=out, end="\n" if part.is_last else "", flush=True)


def _tag(texts: Iterable[Text], characters: int, options: Namespace) -> Iterator[Tagged]:
    from tqdm import tqdm

    from biomerge_lib.apply.tagger import load_tagger

    names = ("adapter", "model", "base_url", "cue", "batch_size")
    tagger = load_tagger(**{name: getattr(options, name) for name in names})
    texts, again = tee(texts)
    interval = 0.5 if sys.stderr.isatty() else 30
    shown = {"desc": "reading", "unit": " characters", "mininterval": interval, "disable": characters < LONG}
    begun = time.monotonic()

    def note(answered: int) -> None:
        minutes = (time.monotonic() - begun) * characters / answered / 60
        if not (bar.n or bar.disable) and minutes > 1:  # after the first batch, which is small
            faster = "" if options.base_url else " A GPU's vLLM server is far faster: --base-url."
            told = f"{characters:,} characters: up to {minutes:.0f} minutes, as the first ones went.{faster}"
            bar.write(told, sys.stderr)
        bar.update(answered)

    with tqdm(total=characters, **shown) as bar:
        said = (text.text for text in again)
        asked = {"threshold": options.threshold, "spaced": options.spaced, "note": note}
        parts = tagger.find_parts(said, **asked)
        text: Text | None = None
        for part in parts:
            text = text or next(texts)
            spans = [(found.start - part.start, found.end - part.start) for found in part.mentions]
            scores = [found.score for found in part.mentions]
            words = text.text[part.start : part.end]
            yield Tagged(text.doc_id, words, spans, part.start, part.is_last, scores)
            if part.is_last:
                text = None


def _input_at(out: Path, files: Iterable[str]) -> str | None:
    """The ``--file`` that ``out`` is, or lies in as a file that is there."""
    places = [out.resolve(), out.resolve().parent] if out.is_file() else []
    return next((path for path in files if path != STDIN and Path(path).resolve() in places), None)


@contextmanager
def _open_out(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name when it is whole; until then it ends in ``.partial``."""
    if path is None:
        yield sys.stdout
        return
    partial = partial_of(path)
    try:
        with whole_file(path) as out:
            yield out
    except BaseException:  # interrupted, or a server that died
        if partial.is_file() and partial.stat().st_size:
            print(f"what was found so far is in {partial}", file=sys.stderr)
        elif partial.is_file():
            partial.unlink()
        raise
