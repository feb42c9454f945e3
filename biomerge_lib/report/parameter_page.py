"""Knows how the typed parameters read as a page, ``docs/parameters.md``; knows no value of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.core.parameters import NOT_IDENTITY, PARAMETERS_DIR, SCORING, Parameters
from biomerge_lib.report.display import markdown_table

HEAD = Path(__file__).with_name("parameters_head.md")
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true` \\| `false`",
    "null": "`null`",
}
LIMITS = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
    "minLength": "(not empty)",
    "pattern": "like `{}`",
}


def parameters_as_markdown() -> str:
    """All parameters as a Markdown table: meaning, values, default, and what other files of ``parameters/`` say."""
    defaults = compose_parameters([]).model_dump()
    rows = [
        [
            f"`{name}`{_mark(name)}",
            schema["description"].replace("|", "\\|"),
            _values(schema),
            _code(defaults[name]),
            _elsewhere(name, defaults[name]),
        ]
        for name, schema in Parameters.model_json_schema()["properties"].items()
    ]
    table = markdown_table(["parameter", "meaning", "values", "default", "elsewhere"], rows)
    return f"{HEAD.read_text(encoding='utf-8')}{table}\n"


def _mark(name: str) -> str:
    mark = "s" if name in SCORING else "n" if name in NOT_IDENTITY else ""
    return f" **{mark}**" if mark else ""


def _values(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows.

    >>> _values({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}]})
    'number > 0, ≤ 1 or `null`'
    """
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return " \\| ".join(f"`{choice}`" for choice in choices)
    if schema["type"] == "array":
        item, _, limits = _values(schema["items"]).partition(" ")
        return f"list of {item}s {limits}".rstrip()
    limits = ", ".join(LIMITS[name].format(schema[name]) for name in LIMITS if name in schema)
    return f"{TYPES[schema['type']]} {limits}".rstrip()


def _elsewhere(name: str, default: Any) -> str:
    """``runtime=a100: `true` `` for each file of another choice that says something else than the default."""
    said = []
    for path in sorted(PARAMETERS_DIR.glob("*/*.yaml")):
        if path.parent.name in ("task", "model", "runtime"):
            values = read_values(path, OBJECT)
            if name in values and values[name] != default:
                said.append(f"`{path.parent.name}={path.stem}`: {_code(values[name])}")
    return "; ".join(said)


def _code(value: Any) -> str:
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"
