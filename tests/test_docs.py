"""The pages in docs/ say what the code says."""

import ast
import re
from pathlib import Path

from biomerge_lib.parameter_page import parameters_as_markdown
from biomerge_lib.parameters import PARAMETER_NAMES

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "biomerge_lib").glob("*.py"))
# token_cache names its files after a hash of ner_span's source, among others; it calls nothing of it.
HASHED_ONLY = {("token_cache", "ner_span")}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_parameters_page_is_what_the_command_writes():
    written = page("parameters.md")
    assert written == parameters_as_markdown()
    assert set(re.findall(r"^\| `(\w+)`", written, flags=re.M)) == PARAMETER_NAMES
    assert "| `subsample` | Share of the training documents" in written and "| number, > 0, ≤ 1 |" in written


def test_the_architecture_page_names_every_module_once():
    named = re.findall(r"^\| `(\w+)` \|", page("architecture.md"), flags=re.M)
    assert sorted(named) == [path.stem for path in MODULES if path.stem not in ("__init__", "__main__")]


def test_imports_go_upstream():
    """A module imports only modules that stand above it on the architecture page."""
    order = re.findall(r"^\| `(\w+)` \|", page("architecture.md"), flags=re.M)
    wrong: list[tuple[str, str]] = []
    for name in order:
        imported = _imports(ROOT / f"biomerge_lib/{name}.py")
        above = order[: order.index(name)]
        wrong += [(name, other) for other in sorted(imported) if other not in above]
    assert set(wrong) == HASHED_ONLY


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


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names = {node.module.split(".")[1] for node in found if node.module.startswith("biomerge_lib.")}
    return names | {a.name for n in found if n.module == "biomerge_lib" for a in n.names if a.name[0] != "_"}


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
