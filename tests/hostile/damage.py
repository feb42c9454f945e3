"""Ways in which files, values and texts go wrong, as hypothesis strategies, and how many inputs a property sees."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("BIOMERGE_HOSTILE", "2000"))  # `pytest --hostile N`
TRIED: Counter[str] = Counter()
LISTED = 2000  # what the shares below are of

HOSTILE_BYTES = [
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\t",
        b" ",
    ),
    *("\u2028".encode(), "\u0085".encode(), "\u202e".encode(), "𝛼é".encode(), b"\x1b[31m", b"\x0b"),
    *(
        b"\\ud800",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0",
        b"99999999999999999999",
        b"9" * 5000,
    ),
    *(b"null", b"true", b"[]", b"{}", b'""', b"[[", b"}", b",", b":", b"-", b";", b'"'),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"- " * 3000,
        b"&a [*a]",
        b"*a",
        b"!!timestamp x",
        b"!!python/name:os.system",
    ),
    *(b"<TAG>", b"<NER> ", b"</s>", b"&x;", b"&#xD800;", b"]]>", b"<!--", b"</document>", b"<a>" * 3000),
    b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
    *(
        b'<?xml version="1.0" encoding="klingon"?>',
        b"~nosuchuser/x",
        b"/dev/null",
        b"../../..",
        b"${oc.env:HOME}",
    ),
]
HOSTILE_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**31, 2**63, 10**40, 0.5, -0.0, float("inf"), float("nan"), 1e308),
    *("", " ", "x", "\x00", "<TAG>", "a" * 300, "~nosuchuser/x", "/dev/null", "../..", "é𝛼\u2028"),
    *([], [None], [[]], [1, 2], ["a"], {}, {"a": 1}, {"": {}}, [[["deep"]]]),
]
odd_text = st.text(st.characters(codec="utf-8"), max_size=40)
hostile_text = st.one_of(
    odd_text,
    st.sampled_from([part.decode("utf-8", "ignore") for part in HOSTILE_BYTES if len(part) < 80]),
    st.lists(st.sampled_from(["<TAG>", "<NER>", "</s>", "<B>", "0-7", ";", "a", "β", " ", "\t", "."])).map(
        "".join
    ),
)
hostile_value = st.one_of(st.sampled_from(HOSTILE_VALUES), hostile_text, st.integers(), st.floats())


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes after one to three accidents: cut, a piece lost or doubled, foreign bytes, a flipped bit."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 2, 8, 60])))
        kind = draw(st.sampled_from(["cut", "lose", "put", "put", "put", "double", "flip"]))
        if kind == "cut":
            content = content[:start]
        elif kind == "lose":
            content = content[:start] + content[end:]
        elif kind == "double":
            content = content[:end] + content[start:]
        elif kind == "put":
            content = content[:start] + draw(st.sampled_from(HOSTILE_BYTES)) + content[end:]
        elif start < len(content):
            flipped = bytes([content[start] ^ (1 << draw(st.integers(0, 7)))])
            content = content[:start] + flipped + content[start + 1 :]
    return content


@st.composite
def distorted(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one to three places hold something else, or nothing."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(hostile_value)
        holder, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw(hostile_value))
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file of a value: damaged as a file, or with other values."""
    whole = json.dumps(value, indent=1).encode()
    return st.one_of(damaged(whole), distorted(value).map(lambda other: json.dumps(other, indent=1).encode()))


def inputs(share: int) -> settings:
    """How many inputs a property sees: ``share`` of 2,000, or of ``--hostile``."""
    return settings(
        max_examples=max(5, share * INPUTS // LISTED),
        deadline=None,
        database=None,
        derandomize=INPUTS == LISTED,
        suppress_health_check=list(HealthCheck),
    )
