"""Knows where parameters' values come from: Hydra's files and overrides, papermill, a notebook's parameters cell."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biomerge_lib.core.errors import ParameterError, nearest
from biomerge_lib.core.parameters import (
    PARAMETER_NAMES,
    PARAMETERS_DIR,
    PLACES,
    Parameters,
    check_names,
    check_parameters,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What stands where a path may stand, and is none: the bundled corpus, backbone and adapter.
NO_PLACES = ("sample", "smollm2-135m", "shipped")
_GROUPS = frozenset(path.name for path in PARAMETERS_DIR.iterdir() if path.is_dir())


def compose_parameters(overrides: Sequence[str] = ()) -> Parameters:
    """Compose ``parameters/`` with Hydra; ``overrides`` are ``group=choice`` and ``name=value``.

    ``+name=value`` and ``--name value`` mean the same as ``name=value``. A relative path among them is one of the
    current folder where that is there, and else of the project, as all paths of notebooks and YAML files are.

    Raises:
        ParameterError: an unknown name or choice, a wrong type, a contradiction; a corpus that is in neither place.
    """
    parameters = check_parameters(_compose(tuple(_normalise_overrides(overrides))))
    names = override_names(overrides)
    places = parameters.model_dump(include={*PLACES, "deepspeed"} & names, exclude_none=True)
    here: dict[str, Any] = {name: _find_here(place, must_exist=False) for name, place in places.items()}
    if "corpora" in names:
        here["corpora"] = [_find_here(corpus, must_exist=True) for corpus in parameters.corpora]
    return parameters.model_copy(update=here)


def override_names(overrides: Sequence[str]) -> frozenset[str]:
    """The parameter names that overrides set directly (choices of a group are not among them)."""
    names = {word.partition("=")[0] for word in _normalise_overrides(overrides)}
    return frozenset(names & PARAMETER_NAMES)


def as_override(value: Any) -> str:
    """A value as it stands behind ``name=``: ``null``, ``true``, ``[a,b]``, ``0.001``."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``["learning_rate=0.001", ...]``: the words that give these values on a command line."""
    return [f"{name}={as_override(value)}" for name, value in values.items()]


def read_notebook_parameters(namespace: Mapping[str, Any]) -> tuple[Parameters, frozenset[str]]:
    """The parameters of a running notebook, and the names that it or papermill set.

    Reads the names assigned in the parameters cell (its first line begins ``# Parameters``) and in the cell that
    papermill injected after it; what neither sets has the default of ``runtime=cpu_debug``.

    Args:
        namespace: the notebook's ``globals()``.

    Raises:
        ParameterError: as :func:`check_parameters`; or no parameters cell has run.
    """
    cells = [cell for cell in namespace.get("In", []) if cell.lstrip().startswith("# Parameters")]
    own = max((i for i, cell in enumerate(cells) if not _is_injected(cell)), default=None)
    if own is None:
        raise ParameterError(
            "run the notebook's parameters cell first (its first line begins '# Parameters')."
        )
    # A cell executed again replaces its earlier version; an injected one counts only after the cell it follows.
    cells = [cells[own], *(cell for cell in cells[own + 1 :] if _is_injected(cell))]
    names = {name for cell in cells for name in _assigned_names(cell)}
    check_names(sorted(names))
    given = {name: namespace[name] for name in names}
    return check_parameters({**_compose(()), **given}), frozenset(names)


def notebook_parameter_names(notebook: Path | str) -> list[str]:
    """The names in a notebook file's parameters cell, in order."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return [name for cell in tagged for name in _assigned_names("".join(cell["source"]))]


def _find_here(place: str, *, must_exist: bool) -> str:
    """A path, or the one in ``brat:path``, as it is or, where it is the current folder's and no name, from the root."""
    told = place.rpartition(":")[2]
    path = Path(told).expanduser()
    here, at_project = Path.cwd() / path, PARAMETERS_DIR.parent / path
    if place in NO_PLACES or place.startswith("hub:") or not told:
        return place
    if must_exist and not (here.exists() or at_project.exists()):
        near = nearest(path.name, [*NO_PLACES, *(other.name for other in here.parent.glob("*"))])
        both = " and no ".join(map(str, dict.fromkeys((here, at_project))))
        raise ParameterError(f"corpora: there is no {both}.{near}")
    if here == at_project:
        return place
    return place.removesuffix(told) + str(here) if here.exists() else place


@cache
def _compose(overrides: tuple[str, ...]) -> Mapping[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Hydra would take deepspeed=FILE for a choice of the folder parameters/deepspeed.
    named_as_group = [word for word in overrides if word.partition("=")[0] in _GROUPS & PARAMETER_NAMES]
    choices = tuple(word for word in overrides if word.partition("=")[0] in _GROUPS - PARAMETER_NAMES)
    try:
        config = _compose_choices(choices).copy()
        parser = OverridesParser.create()
        for word in [word for word in overrides if word not in {*named_as_group, *choices}]:
            try:
                value = parser.parse_override(word)
            except HydraException:  # at ~ or ä, say, that are not in quotes
                value = parser.parse_override(_quote(word))
            if value.is_sweep_override():
                raise ParameterError(f"{value.input_line}: one value is wanted. A list is written [a,b].")
            config[value.key_or_group] = value.value()
        for name, _, file in (word.partition("=") for word in named_as_group):
            config[name] = None if file == "null" else file
        for name, given in cast(Mapping[str, Any], OmegaConf.to_container(config)).items():
            if re.search(r"\$\{[^}]*:", str(given)):
                raise ParameterError(
                    f"{name}: what ${{...:...}} gives would be stored with the run; write it out."
                )
        return cast(Mapping[str, Any], OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ParameterError(str(error).strip().partition("\n")[0][:200]) from None


def _quote(word: str) -> str:
    """``corpora=[~/ä,b]`` as ``corpora=['~/ä','b']``; raises ParameterError where a bracket or quote is not closed."""
    name, _, value = word.partition("=")
    if value[:1] in ("'", '"') or any(value.count(one) != value.count(other) for one, other in ("[]", "{}")):
        raise ParameterError(f"{word}: a bracket or quote is not closed. A list is written {name}=[a,b].")
    listed = re.fullmatch(r"\[(.*)\]", value, re.DOTALL)
    items = re.findall(r"""\s*('[^']*'|"[^"]*"|[^,]+)""", listed[1]) if listed else [value]
    quoted = [
        item if item[:1] in ("'", '"', "") else "'" + item.strip().replace("'", "\\'") + "'" for item in items
    ]
    return f"{name}=[{','.join(quoted)}]" if listed else f"{name}={quoted[0]}"


@cache
def _compose_choices(choices: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of the files that the groups' choices name; a sweep asks for the same ones at each point."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(PARAMETERS_DIR), version_base="1.3"):
        config = compose("config", overrides=list(choices))
    OmegaConf.set_struct(config, False)
    return config


def _normalise_overrides(overrides: Sequence[str]) -> list[str]:
    words = iter(overrides)
    normalised = []
    for word in words:
        if word.startswith("--") and "=" not in word:
            value = next(words, None)
            if value is None:
                raise ParameterError(f"{word} has no value.")
            word = f"{word}={value}"
        word = word.lstrip("-+")
        name, separator, choice = word.partition("=")
        if not separator:
            raise ParameterError(f"{word!r} is no override; write name=value or group=choice.")
        if name not in _GROUPS - PARAMETER_NAMES:
            check_names([name])
        elif choice not in (choices := sorted(path.stem for path in (PARAMETERS_DIR / name).glob("*.yaml"))):
            known = ", ".join(choices)
            raise ParameterError(f"unknown {name}={choice}.{nearest(choice, choices)} There are: {known}.")
        normalised.append(word)
    return normalised


def _is_injected(cell: str) -> bool:
    return cell.lstrip().partition("\n")[0].strip() == "# Parameters"


def _assigned_names(source: str) -> list[str]:
    targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
