"""What a process imports: libraries that take seconds are there only where they are used."""

import ast
import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from biomerge_lib.prompts.tokenizer import load_tokenizer
from tests.conftest import ROOT, notebook_cells

pytestmark = pytest.mark.integration


def imported_by(program: str, *names: str) -> list[str]:
    """Which of the packages are there when a new interpreter has run the program."""
    program += f"\nimport json, sys; print(json.dumps(sorted(set({names!r}) & sys.modules.keys())))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tokenizer_needs_neither_generation_nor_what_comes_with_it(tiny_prepared):
    program = (
        f"from biomerge_lib.prompts.tokenizer import load_tokenizer; load_tokenizer({str(tiny_prepared)!r})"
    )
    dear = ("scipy", "sklearn", "sympy", "torchao", "transformers.generation.utils")
    assert imported_by(program, "transformers", *dear) == ["transformers"]


def test_it_is_the_one_that_transformers_would_choose(tiny_prepared):
    ours, theirs = load_tokenizer(tiny_prepared), AutoTokenizer.from_pretrained(tiny_prepared)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.init_kwargs, ours.special_tokens_map) == (theirs.init_kwargs, theirs.special_tokens_map)


def test_a_model_is_loaded_without_packages_for_others_which_can_still_be_imported(tiny_prepared):
    folder = str(tiny_prepared)
    program = (
        "from biomerge_lib.prompts.tokenizer import load_tokenizer\n"
        "from biomerge_lib.model.unsloth_lora_ner import load_causal_lm\n"
        f"load_tokenizer({folder!r}); load_causal_lm({folder!r}, dtype='float32')\n"
        "import sys; assert 'sklearn' not in sys.modules; import sklearn"
    )
    # scikit-learn, which is wanted here, wants scipy
    assert imported_by(program, "torch", "sklearn", "torchao", "peft") == ["sklearn", "torch"]


def test_a_release_of_transformers_that_asks_otherwise_starts_all_the_same(tmp_path):
    (tmp_path / "transformers").mkdir()
    for name in ("__init__.py", "utils.py"):
        (tmp_path / "transformers" / name).touch()
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from biomerge_lib.prompts.tokenizer import import_transformers; import_transformers()"
    )
    assert imported_by(program, "transformers", "sklearn", "scipy") == ["transformers"]


def test_texts_are_answered_on_a_cpu_without_transformers(tiny_prepared):
    program = (
        "from biomerge_lib.apply.ready_models import decode_here\n"
        f"decode_here(__import__('pathlib').Path({str(tiny_prepared)!r}), max_new_tokens=4, batch_size=1)"
    )
    dear = ("transformers", "torch._dynamo", "sympy", "scipy", "peft", "pandas")
    assert imported_by(program, "torch", *dear) == ["torch"]


def test_notebooks_without_a_model_import_nothing_of_the_training_stack():
    """02, 05 and 06: all of their imports, in one process."""
    statements = [
        ast.unparse(node)
        for name in ("02_data", "05_vllm_eval", "06_report")
        for cell in notebook_cells(f"{name}.ipynb")
        if cell["cell_type"] == "code"
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert len(statements) > 20
    stack = ("torch", "transformers", "peft", "datasets", "accelerate", "unsloth", "vllm", "wandb")
    assert imported_by("\n".join(statements), "pandas", *stack) == ["pandas"]
