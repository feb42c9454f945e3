"""Knows how finished answers survive a crash: one JSON line each, in a file beside the predictions to come.

The first line says what is being answered (split, model, prompts, limits); only the very same job goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import lock
from biomerge_lib.decoding.predictions import RawAnswer

_ANSWER = [field.name for field in fields(RawAnswer)]


class PartialAnswers:
    """The answers so far of one job, as a context manager; ``answers`` maps a prompt's number to its answer.

    Args:
        path: ``<predictions file>.partial.jsonl``.
        job: what is being answered; JSON scalars.

    Raises:
        DataError: another process writes the file, or a line before the last cannot be read.
    """

    def __init__(self, path: Path | str, job: Mapping[str, str | int | bool | None]):
        self.path = Path(path)
        self.job = dict(job)
        self.answers: dict[int, RawAnswer] = {}

    def __enter__(self) -> PartialAnswers:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        lines, good_bytes = self._read_lines()
        if lines and lines[0] != self.job:
            aside = self._move_aside()
            changed = [name for name in self.job if lines[0].get(name) != self.job[name]]
            print(f"{self.path.name} is of another job ({', '.join(changed)} differ): moved to {aside.name}")
            lines, good_bytes = [], 0
        self.answers = {line.pop("prompt"): RawAnswer(**line) for line in lines[1:]}
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
        self._append({"prompt": prompt_number, **asdict(answer)})
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

    def _read_lines(self) -> tuple[list[dict], int]:
        self._stream.seek(0)
        raw_lines = self._stream.readlines()
        lines: list[dict] = []
        good_bytes = 0
        for number, raw in enumerate(raw_lines, start=1):
            if number == len(raw_lines) and not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
                expected = {"prompt", *_ANSWER} if lines else set(line)
                if set(line) != expected:
                    raise ValueError(f"keys {sorted(line)}")
            except ValueError as error:
                raise DataError(
                    f"{self.path}:{number}: not an answer ({error}). Delete the file to begin again."
                ) from None
            lines.append(line)
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
        self._stream.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
