"""Knows how the typed parameters read as a page, ``docs/parameters.md``; knows no value of its own."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from biomerge_lib.core.parameters import NOT_IDENTITY, PARAMETERS_DIR, SCORING, Parameters, compose_parameters

HEAD = """# Parameters

Written by `python -m biomerge_lib parameters --markdown > docs/parameters.md`; do not edit.

Values stand in [parameters/](../parameters), one file a choice of `task`, `model` and `runtime`; `name=value` on the
command line, `-p name value` (papermill) or a notebook's parameters cell override them. `null` in a file is `None` in
a notebook. Without any choice it is `task=ner_span model=smollm2_135m runtime=cpu_debug`, the defaults below; the last
column names the files that say otherwise. Where several speak, runtime wins over model, and model over task.

Marks: **s** may be set anew when a trained run is scored (04, 05); **n** does not change what is trained, and so not
the run's name.

| parameter | meaning | values | default | elsewhere |
|---|---|---|---|---|
"""


def parameters_as_markdown() -> str:
    """All parameters as a Markdown table: meaning, values, default, and what other files of ``parameters/`` say."""
    defaults = compose_parameters([]).model_dump()
    rows = [
        f"| `{name}`{_marks(name)} | {_escape(field.description or '')} | {_values(field)} | {_code(defaults[name])} | "
        f"{_elsewhere(name, defaults[name])} |"
        for name, field in Parameters.model_fields.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def _marks(name: str) -> str:
    mark = "s" if name in SCORING else "n" if name in NOT_IDENTITY else ""
    return f" **{mark}**" if mark else ""


def _values(field: FieldInfo) -> str:
    """``number > 0, ≤ 1`` for a float with bounds, the choices of a Literal."""
    return ", ".join([_type_name(field.annotation), *_bounds(field.metadata)])


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return " ".join([_type_name(arguments[0]), *_bounds(arguments[1].metadata)])
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{choice}`" for choice in arguments)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(
            "`null`" if choice is type(None) else _type_name(choice)
            for choice in sorted(arguments, key=lambda choice: choice is type(None))
        )
    if get_origin(annotation) is list:
        return "list of texts" if arguments[0] is str else "list of numbers > 0"
    return {int: "whole number", float: "number", bool: "`true` \\| `false`", str: "text"}[annotation]


def _bounds(metadata: Iterable[Any]) -> list[str]:
    signs = {"Gt": "> {0.gt}", "Ge": "≥ {0.ge}", "Lt": "< {0.lt}", "Le": "≤ {0.le}", "MinLen": "not empty"}
    names = [(type(bound).__name__, bound) for bound in metadata]  # pydantic's, from annotated_types
    bounds = [signs[name].format(bound) for name, bound in names if name in signs]
    patterns = [pattern for bound in metadata if (pattern := getattr(bound, "pattern", None))]
    return [*bounds, *(f"like `{pattern}`" for pattern in patterns)]


def _elsewhere(name: str, default: Any) -> str:
    """``runtime=a100: `true` `` for each file of another choice that says something else than the default."""
    said = []
    for path in sorted(PARAMETERS_DIR.glob("*/*.yaml")):
        if path.parent.name in ("task", "model", "runtime"):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if name in values and values[name] != default:
                said.append(f"`{path.parent.name}={path.stem}`: {_code(values[name])}")
    return "; ".join(said)


def _code(value: Any) -> str:
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
