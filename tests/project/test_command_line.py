"""The command line helps: examples in every help, the nearest word for a misspelt one, one version."""

import tomllib

import pytest

import biomerge_lib
from biomerge_lib.__main__ import build_parser, main
from biomerge_lib.core.errors import DataError
from biomerge_lib.corpora.sources import find_source
from tests.conftest import ROOT

[COMMANDS] = [action.choices for action in build_parser()._actions if action.dest == "command"]


def refused(words, capsys):
    """What a refused command line prints last."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_examples_that_it_takes(name):
    _, _, examples = COMMANDS[name].format_help().partition("examples:\n")
    assert examples.splitlines()
    for line in examples.splitlines():
        assert line.startswith(f"  python -m biomerge_lib {name}"), line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["predcit", "x"], "'predict'"),
        (["predict", "x", "--fromat", "jsonl"], "'--format'"),
        (["predict", "x", "--format", "jsn"], "'jsonl'"),
        (["compare", "runs/a", "--split", "tset"], "'test'"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(words, hint, capsys):
    assert refused(words, capsys).endswith(f"Did you mean {hint}?")


def test_help_behind_overrides_is_help(capsys):
    for words in (["run", "03_train", "seed=1", "--help"], ["sweep", "x.yaml", "-h"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out


def test_a_misspelt_corpus_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "bc5cdr_iob").mkdir()
    near = {
        str(tmp_path / "bc5cdr_iop"): str(tmp_path / "bc5cdr_iob"),
        "sampel": "sample",
        f"pubtater:{tmp_path}": "pubtator",
    }
    for given, meant in near.items():
        with pytest.raises(DataError, match="no such corpus folder") as error:
            find_source(given)
        assert f"Did you mean {meant!r}?" in str(error.value)


def test_the_version_is_said_once(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"BioMerge {biomerge_lib.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "biomerge_lib.__version__"}}
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{biomerge_lib.__version__}]" in changes
