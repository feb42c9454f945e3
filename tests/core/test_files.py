"""Files and folders appear whole or not at all; a lock is waited for, or refused."""

import hashlib

import pytest

from biomerge_lib.core.errors import DataError
from biomerge_lib.core.files import (
    file_sha256,
    locked,
    remember,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def test_what_fails_leaves_the_old_file_and_says_how_far_it_came(tmp_path):
    path = tmp_path / "made" / "a.json"
    write_json(path, {"ä": 1})
    with pytest.raises(RuntimeError), whole_file(path) as out:
        out.write("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == '{\n "ä": 1\n}\n'
    assert (tmp_path / "made" / "a.json.partial").read_text() == "half"


def test_a_folder_that_fails_is_gone_and_one_of_an_earlier_crash_is_no_part_of_the_next(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "left").touch()
    with whole_folder(tmp_path / "model") as partial:
        assert not partial.exists()
        write_json(partial / "a.json", 1)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "model",
        "model/a.json",
    ]


def test_a_lock_that_is_held_is_refused_until_it_is_given_back(tmp_path):
    lock = tmp_path / "made" / ".lock"
    with locked(lock), pytest.raises(DataError, match="held"), locked(lock, or_raise=DataError("held")):
        pass
    with locked(lock, or_raise=DataError("held")):
        pass


def test_several_files_are_hashed_as_one(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, (b"ab", b"c"), strict=True):
        path.write_bytes(content)
    assert file_sha256(*paths) == hashlib.sha256(b"abc").hexdigest()


def test_what_was_made_of_a_file_is_kept_until_the_file_is_another(tmp_path):
    path, seen = tmp_path / "a", []
    look = remember(lambda path: seen.append(path.read_text()) or len(seen))
    for text in ("one", "two"):
        write_text(path, text)
        assert look(path) == look(path)
    assert seen == ["one", "two"]
