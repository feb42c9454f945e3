"""Knows the record, one JSON object a line; knows nothing of corpora, prompts or models.

{"task": "NER", "input": "<NER> Aspirin can ...", "target": "<TAG> 0-7", "doc_id": "d1", "dataset": "bc5cdr"}

Where the gold types are known, ``"types": ["Chemical"]`` follows: one for each span, in their order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import open_bytes, parse_json, whole_file
from biomerge_lib.core.spans import Span, format_spans, is_inside, parse_answer

NER_PREFIX = "<NER> "
SPLITS = ("train", "dev", "test")
# The last key of a line; inside a string its quotes would be escaped.
_TYPES = re.compile(rb', "types": \[.*\]}$')


class _Line(BaseModel):
    input: str
    target: str
    doc_id: str
    dataset: str
    task: Literal["NER"] = "NER"
    cue: str | None = Field(None, pattern=r"\S")  # a name; without the key it is the data set's
    types: list[str] = []


@dataclass(frozen=True, slots=True)
class Record:
    """One sentence (or passage) with its gold spans.

    ``spans`` are offsets in ``text``, the input without its ``<NER> `` prefix. ``doc_id`` names the
    document inside ``dataset``: splitting and sampling go by document. ``cue`` names the annotation policy that is
    wanted, where it is not the data set's own (the key ``cue`` of a JSONL line, which may be left out). ``types`` are
    the spans' gold types (``Chemical``; ``Cell|Tissue`` for a span that has two), or empty where they are not known:
    neither prompt nor answer has them.
    """

    text: str
    spans: tuple[Span, ...]
    doc_id: str
    dataset: str
    cue: str | None = None
    types: tuple[str, ...] = ()

    @property
    def input(self) -> str:
        return NER_PREFIX + self.text

    @property
    def target(self) -> str:
        return format_spans(self.spans)

    def to_json(self) -> str:
        fields: dict[str, Any] = {
            "task": "NER",
            "input": self.input,
            "target": self.target,
            "doc_id": self.doc_id,
            "dataset": self.dataset,
        }
        if self.cue is not None:
            fields["cue"] = self.cue
        if self.types:
            fields["types"] = self.types
        return json.dumps(fields, ensure_ascii=False)


def parse_record(line: str, where: str) -> Record:
    """Read one JSONL line; ``where`` (``file:line``) goes into the error.

    Raises:
        DataError: not JSON, a key missing or of the wrong type, a span string that cannot be read,
            an offset outside the text, or ``start >= end``.
    """
    fields = parse_json(line, where, _Line, cure=" A record has task, input, target, doc_id, dataset.")
    if not fields.input.startswith(NER_PREFIX):
        raise DataError(f"{where}: input must begin with '<NER> '; it begins {fields.input[:12]!r}.")
    text = fields.input[len(NER_PREFIX) :]
    if not text.strip():
        raise DataError(f"{where}: the text after '<NER> ' is empty.")
    answer = parse_answer(fields.target, len(text))
    if answer.unreadable:
        raise DataError(
            f"{where}: cannot read {answer.unreadable[0]!r} in target; spans look like '0-7 ; 20-34'."
        )
    if answer.out_of_text:
        start, end = answer.out_of_text[0]
        raise DataError(f"{where}: span {start}-{end} is not inside the text of {len(text)} characters.")
    if len(fields.types) not in (0, len(answer.spans)):
        names = f"{len(answer.spans)} names, one for each span"
        raise DataError(f"{where}: types must be {names}; or leave the key out.")
    spans, types = tuple(answer.spans), tuple(fields.types)
    return Record(text, spans, fields.doc_id, fields.dataset, fields.cue, types)


def iter_records(path: Path | str) -> Iterator[Record]:
    """Read a JSONL file record by record, in order (memory does not grow with the file).

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a line is bad (named as ``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. notebooks/02_data.ipynb writes it; or set data_dir.")
    found = False
    for number, line in iter_lines(path):
        found = True
        yield parse_record(line, f"{path}:{number}")
    if not found:
        raise DataError(f"{path}: the file has no records.")


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers; DataError where one is not UTF-8."""
    with open_bytes(path) as lines:  # a text file's lines would also end at a lone carriage return
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line).") from None
            if line.strip():
                yield number, line


def records_sha256(path: Path | str) -> str:
    """SHA-256 of a JSONL file without its types: what is trained and scored is the same with them and without."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as lines:
        for line in lines:
            digest.update(_TYPES.sub(b"}", line) if b'"types"' in line else line)
    return digest.hexdigest()


def read_records(path: Path | str) -> list[Record]:
    """All records of a JSONL file; the inverse of :func:`write_records`."""
    return list(iter_records(path))


def write_records(path: Path | str, records: Iterable[Record]) -> int:
    """Write records as JSONL, atomically (a crash leaves the old file); return how many.

    Raises:
        DataError: a record's span is outside its text.
    """
    count = 0
    with whole_file(path) as out:
        for record in records:
            for span in record.spans:
                if not is_inside(span, len(record.text)):
                    raise DataError(
                        f"{record.dataset}/{record.doc_id}: span {span} is not inside {record.text!r}."
                    )
            out.write(record.to_json() + "\n")
            count += 1
    return count
