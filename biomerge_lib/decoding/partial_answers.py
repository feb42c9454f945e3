"""Knows how finished answers survive a crash: one JSON line each, in a file beside the predictions to come.

The first line says what is being answered (split, model, prompts, limits); only the very same job goes on from it.
Each line ends with a checksum of itself and of all lines before it, so that none can change or go unseen.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import OBJECT, lock, parse_json
from biomerge_lib.decoding.predictions import RawAnswer

AGAIN = " Delete the file to begin again."
SUM = b"\t%08x\n"  # ends a line: CRC-32 of all before it; JSON written here holds no tab


@dataclass(frozen=True, slots=True)
class _Line:
    prompt: int
    answer: RawAnswer


class PartialAnswers:
    """The answers so far of one job, as a context manager; ``answers`` maps a prompt's number to its answer.

    Args:
        path: ``<predictions file>.partial.jsonl``.
        job: what is being answered; JSON scalars.

    Raises:
        DataError: another process writes the file, or a line before the last was changed, cut or lost.
    """

    def __init__(self, path: Path | str, job: Mapping[str, str | int | bool | None]):
        self.path = Path(path)
        self.job = dict(job)
        self.answers: dict[int, RawAnswer] = {}

    def __enter__(self) -> PartialAnswers:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        lines, good_bytes = self._read_lines()
        job = parse_json(lines[0], f"{self.path}:1", OBJECT) if lines else self.job
        if job != self.job:
            aside = self._move_aside()
            changed = [name for name in self.job if job.get(name) != self.job[name]]
            print(f"{self.path.name} is of another job ({', '.join(changed)} differ): moved to {aside.name}")
            lines, good_bytes, self._sum = [], 0, 0
        for number, raw in enumerate(lines[1:], start=2):
            line = parse_json(raw, f"{self.path}:{number}", _Line, cure=AGAIN)
            self.answers[line.prompt] = line.answer
        # What follows the last whole line was being written when the process died.
        self._stream.truncate(good_bytes)
        self._stream.seek(good_bytes)
        if not lines:
            self._append(self.job)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, prompt_number: int, answer: RawAnswer) -> None:
        """Keep an answer; it is with the operating system when this returns."""
        if prompt_number in self.answers:
            raise ValueError(f"prompt {prompt_number} was answered twice")
        self._append(asdict(_Line(prompt_number, answer)))
        self.answers[prompt_number] = answer

    def remove(self) -> None:
        """Delete the file: the predictions have been written."""
        self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        self._stream = self.path.open("a+b")
        taken = DataError(f"{self.path}: another evaluation is writing it. Wait, or choose another --out.")
        try:
            lock(self._stream, or_raise=taken)
        except DataError:
            self._stream.close()
            raise

    def _read_lines(self) -> tuple[list[bytes], int]:
        """The whole lines without their checksums, and how many bytes they have with them."""
        self._stream.seek(0)
        raw_lines = self._stream.readlines()
        lines: list[bytes] = []
        good_bytes = self._sum = 0
        for number, raw in enumerate(raw_lines, start=1):
            if number == len(raw_lines) and not raw.endswith(b"\n"):
                break
            said = raw.rpartition(b"\t")[0]
            if raw[len(said) :] != SUM % zlib.crc32(said, self._sum):
                raise DataError(f"{self.path}:{number}: not an answer as it was written (checksum).{AGAIN}")
            self._sum = zlib.crc32(said, self._sum)
            lines.append(said)
            good_bytes += len(raw)
        return lines, good_bytes

    def _move_aside(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        self._stream.close()
        self._open()
        return aside

    def _append(self, fields: Mapping) -> None:
        said = json.dumps(fields, ensure_ascii=False).encode()
        self._sum = zlib.crc32(said, self._sum)
        self._stream.write(said + SUM % self._sum)
        self._stream.flush()
