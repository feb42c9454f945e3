"""The pages in docs/ say what the code says."""

import ast
import re
from pathlib import Path

from biomerge_lib.core.parameters import PARAMETER_NAMES
from biomerge_lib.report.parameter_page import parameters_as_markdown
from tests.conftest import ROOT

LIBRARY = ROOT / "biomerge_lib"
MODULES = sorted(LIBRARY.rglob("*.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_parameters_page_is_what_the_command_writes():
    written = page("parameters.md")
    assert written == parameters_as_markdown()
    assert set(re.findall(r"^\| `(\w+)`", written, flags=re.M)) == PARAMETER_NAMES
    assert "| `subsample` | Share of the training documents" in written and "| number > 0, ≤ 1 |" in written


def rooms() -> dict[str, list[str]]:
    """The rooms of the architecture page in its order, and the modules of each."""
    sections = re.findall(r"^## (\w+)/\n(.*?)(?=^## |\Z)", page("architecture.md"), flags=re.M | re.S)
    return {room: re.findall(r"^\| `(\w+)` \|", text, flags=re.M) for room, text in sections}


def test_the_architecture_page_names_every_module_once():
    named = sorted(f"{room}/{module}" for room, modules in rooms().items() for module in modules)
    there = [path.relative_to(LIBRARY).with_suffix("").as_posix() for path in LIBRARY.glob("*/*.py")]
    assert named == sorted(name for name in there if not name.endswith("__init__"))
    assert sorted(path.stem for path in LIBRARY.glob("*.py")) == ["__init__", "__main__", "eval_vllm"]


def test_imports_go_upstream():
    """A module imports only modules that stand above it on the architecture page: no room one above, in no circle."""
    order = [(room, module) for room, modules in rooms().items() for module in modules]
    wrong: list[tuple[str, str]] = []
    for place, (room, module) in enumerate(order):
        imported = _imports(LIBRARY / room / f"{module}.py")
        wrong += [(module, other[1]) for other in sorted(imported) if other not in order[:place]]
    assert not wrong


def test_the_picture_of_the_rooms_is_what_they_import():
    """An arrow for each room that another one imports, but those that follow from others."""
    drawn = set(re.findall(r"^  (\w+) --> (\w+)$", page("architecture.md"), flags=re.M))
    edges = {
        (room, other)
        for room in rooms()
        for path in (LIBRARY / room).glob("*.py")
        for other, _ in _imports(path)
        if other != room
    }

    def reached(room: str, arrows: set[tuple[str, str]]) -> set[str]:
        found: set[str] = set()
        todo = [room]
        while todo:
            for start, end in arrows:
                if start == todo[0] and end not in found:
                    found.add(end)
                    todo.append(end)
            del todo[0]
        return found

    assert drawn == {
        (room, other) for room, other in edges if other not in reached(room, edges - {(room, other)})
    }


def test_every_quoted_message_is_one_that_the_code_raises():
    """Troubleshooting quotes messages in the first column of its tables; … stands for what varies."""
    messages = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting.md"), flags=re.M)
    assert len(messages) > 30
    sources = " ".join(_fixed_text(path) for path in MODULES)
    unknown = [
        part.strip()
        for message in messages
        for part in message.split("…")
        if part.strip() and part.strip() not in sources
    ]
    assert not unknown


def _imports(path: Path) -> set[tuple[str, str]]:
    """The ``(room, module)`` that a module imports anywhere, under TYPE_CHECKING and within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("biomerge_lib."):
            _, room, *module = node.module.split(".")
            found |= {(room, module[0])} if module else {(room, name.name) for name in node.names}
    return found


def _fixed_text(path: Path) -> str:
    """The texts in a module but its docstrings, f-strings with a new line for each value."""
    texts = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "\n" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            texts.append(node.value)
    return "\n".join(texts)
