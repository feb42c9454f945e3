"""Parameters mean the same on every way they arrive, and nothing wrong gets past the door."""

import ast
import logging
import re

import pytest
import yaml

from biomerge_lib.core.composition import (
    compose_parameters,
    notebook_parameter_names,
    override_names,
    read_notebook_parameters,
)
from biomerge_lib.core.errors import ParameterError
from biomerge_lib.core.parameters import PARAMETER_NAMES, PARAMETERS_DIR, Parameters, check_parameters
from tests.conftest import ROOT, notebook_cells

NOTEBOOKS = ROOT / "notebooks"
GROUPS = {group: sorted((PARAMETERS_DIR / group).glob("*.yaml")) for group in ("task", "model", "runtime")}


def choices(group: str) -> list[str]:
    return [path.stem for path in GROUPS[group]]


def test_the_groups_are_the_contracts():
    assert choices("task") == ["ner_span"]
    assert choices("model") == ["lora_ner_unsloth", "qwen2_5_coder_1_5b", "smollm2_135m"]
    assert choices("runtime") == ["a100", "cpu_debug", "h100", "h200"]
    assert (PARAMETERS_DIR / "sweep/lora_ner_span.yaml").is_file()
    for stage in (2, 3):
        assert (PARAMETERS_DIR / f"deepspeed/zero{stage}_offload.json").is_file()


@pytest.mark.parametrize("model", ["lora_ner_unsloth", "smollm2_135m", "qwen2_5_coder_1_5b"])
@pytest.mark.parametrize("runtime", ["a100", "cpu_debug", "h100", "h200"])
def test_every_combination_composes(model, runtime):
    assert isinstance(compose_parameters([f"model={model}", f"runtime={runtime}"]), Parameters)


def test_the_a100_run_has_the_briefs_values():
    parameters = compose_parameters(["task=ner_span", "model=lora_ner_unsloth", "runtime=a100"])
    brief = {
        "backbone": "aaditya/Llama3-OpenBioLLM-8B",
        "backend": "unsloth",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "linear",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "logging_steps": 50,
        "eval_steps": 500,
        "save_steps": 500,
        "save_total_limit": 2,
        "max_target_tokens": 64,
        "max_new_tokens": 64,
        "early_stopping_patience": 3,
        "early_stopping_threshold": 0.001,
        "num_workers": 8,
        "pin_memory": True,
        "data_dir": "data/union_span/ner",
        "tokenizer_dir": "tokenizers/llama3_biomerge_tok",
        "wandb_project": "TaskMerge",
    }
    assert {name: getattr(parameters, name) for name in brief} == brief
    for runtime in ("a100", "h100", "h200"):
        step = compose_parameters([f"runtime={runtime}"])
        assert step.per_device_train_batch_size * step.gradient_accumulation_steps == 32


def test_each_group_file_is_a_flat_papermill_file_of_known_names():
    seen = set()
    for path in [path for paths in GROUPS.values() for path in paths]:
        values = yaml.safe_load(path.read_text())  # PyYAML, as papermill reads it
        assert values.keys() <= PARAMETER_NAMES, path
        numbers = [value for value in values.values() if isinstance(value, str) and value[:1].isdigit()]
        assert not numbers, f"{path}: {numbers} are text to PyYAML"
        seen |= values.keys()
    assert seen == PARAMETER_NAMES


def test_the_papermill_files_and_hydra_give_the_same_values():
    values = {}
    for name in ("task/ner_span", "model/lora_ner_unsloth", "runtime/a100"):
        values |= yaml.safe_load((PARAMETERS_DIR / f"{name}.yaml").read_text())
    composed = compose_parameters(["model=lora_ner_unsloth", "runtime=a100"])
    assert check_parameters(values) == composed


def parameters_cell(notebook: str) -> str:
    [cell] = [cell for cell in notebook_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    return "".join(cell["source"])


@pytest.mark.parametrize("notebook", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebooks_defaults_are_those_of_cpu_debug(notebook):
    defaults = compose_parameters([]).model_dump()
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters_cell(notebook)).body
    }
    assert assigned
    assert assigned == {name: defaults[name] for name in assigned}


@pytest.mark.parametrize("notebook", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_papermill_sees_every_parameter_of_a_notebook(notebook, capfd):
    import papermill

    inspected = papermill.inspect_notebook(str(NOTEBOOKS / notebook))
    assert list(inspected) == notebook_parameter_names(NOTEBOOKS / notebook)


def test_papermill_knows_every_name_of_the_files_that_it_is_given(tmp_path, caplog, monkeypatch):
    """It warns of each that the parameters cell does not list; a name that is none is the next cell's to refuse."""
    import papermill

    monkeypatch.setattr(logging.getLogger("papermill"), "disabled", False)  # as an interrupted run leaves it
    values = {"learning_rat": 3e-4}
    for name in ("task/ner_span", "model/lora_ner_unsloth", "runtime/a100"):
        values |= yaml.safe_load((PARAMETERS_DIR / f"{name}.yaml").read_text())
    with caplog.at_level("WARNING", logger="papermill"):
        notebook = papermill.execute_notebook(
            NOTEBOOKS / "03_train.ipynb", tmp_path / "out.ipynb", values, prepare_only=True
        )
    assert caplog.messages == ["Passed unknown parameter: learning_rat"]
    cells = [
        cell.source
        for cell in notebook.cells
        if {"parameters", "injected-parameters"} & {*cell.metadata.tags}
    ]
    with pytest.raises(ParameterError, match=r"'learning_rat'\. Did you mean 'learning_rate'"):
        read_notebook_parameters(namespace(cells))
    assert notebook_parameter_names(NOTEBOOKS / "03_train.ipynb") == list(dict.fromkeys(assigned(cells[0])))
    assert {*assigned(cells[0])} == PARAMETER_NAMES


def assigned(cell: str) -> list[str]:
    return [node.targets[0].id for node in ast.parse(cell).body]


def namespace(cells: list[str]) -> dict:
    values: dict = {}
    for cell in cells:
        exec(cell, values)
    return values | {"In": ["", *cells]}


def test_jupyterlab_papermill_and_hydra_are_the_same_run():
    own = parameters_cell("03_train.ipynb")
    injected = "# Parameters\nlearning_rate = 0.001\nsubsample = 0.5\n"
    jupyter, _ = read_notebook_parameters(namespace([own]))
    papermill, given = read_notebook_parameters(namespace([own, injected]))
    hydra = compose_parameters(["learning_rate=1e-3", "--subsample", "0.5"])
    assert jupyter == compose_parameters([])
    assert papermill == hydra and papermill.run_name == hydra.run_name != jupyter.run_name
    assert {"learning_rate", "subsample", "backbone"} <= given


def test_a_path_of_a_command_line_is_the_current_folders_or_else_the_projects(tmp_path, monkeypatch):
    for name in ("mine/ner", "sample", "parameters"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    own, corpora = str(tmp_path / "mine"), ["mine", "brat:mine", "sample", "hub:owner/name", "docs", "/"]
    found = compose_parameters([f"corpora=[{','.join(corpora)}]", "data_dir=mine/ner", "runs_dir=mine/runs"])
    assert found.corpora == [own, f"brat:{own}", "sample", "hub:owner/name", "docs", "/"]
    assert (found.data_dir, found.runs_dir) == (f"{own}/ner", "mine/runs")
    assert compose_parameters(["corpora=['',brat:]"]).corpora == [
        "",
        "brat:",
    ]  # no folder, not the current one
    with pytest.raises(ParameterError) as error:
        compose_parameters(["corpora=[mina]"])
    assert str(error.value) == f"corpora: there is no {own[:-1]}a and no {ROOT}/mina. Did you mean 'mine'?"
    zero = "parameters/deepspeed/zero2_offload.json"
    assert compose_parameters([f"deepspeed={zero}", "backend=peft"]).deepspeed == zero
    monkeypatch.chdir(ROOT)
    assert compose_parameters(["corpora=[docs]"]).corpora == ["docs"]
    with pytest.raises(ParameterError, match=f"there is no {ROOT}/mina\\.$"):
        compose_parameters(["corpora=[mina]"])
    with pytest.raises(ParameterError, match=r"there is no /nowhere/mine\.$"):
        compose_parameters(["corpora=[brat:/nowhere/mine]"])


def test_only_the_last_version_of_the_parameters_cell_counts():
    own = parameters_cell("03_train.ipynb")
    typo = own + "\nlearning_rat = 1.0\n"
    with pytest.raises(ParameterError, match="Did you mean 'learning_rate'"):
        read_notebook_parameters(namespace([typo]))
    mended, _ = read_notebook_parameters(namespace([typo, own]))
    assert mended == compose_parameters([])


def test_names_made_by_later_cells_are_no_parameters():
    values = namespace([parameters_cell("03_train.ipynb")]) | {"records": [], "learning_rat": 1}
    assert read_notebook_parameters(values)[0] == compose_parameters([])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1e-3"], "unknown parameter 'learning_rat'. Did you mean 'learning_rate'"),
        (["Dropout=0.1"], "Did you mean 'lora_dropout'"),
        (["train_fraction=0.1"], "Did you mean 'subsample'"),
        (["runtime=a10"], "unknown runtime=a10. Did you mean 'a100'"),
        (["lora_rank=8.5"], "lora_rank=8.5: Input should be a valid integer"),
        (["fast_metrics=maybe"], "fast_metrics='maybe': Input should be a valid boolean"),
        (["subsample=2"], "subsample=2: Input should be less than or equal to 1"),
        (
            ["offset_anchors=begin"],
            "offset_anchors='begin': 'begin' is none of none, start, echo_start, echo_pieces",
        ),
        (
            ["offset_anchors=start_end"],
            "offset_anchors='start_end': the anchor style 'start_end' was removed",
        ),
        (["max_new_tokens=16"], "max_new_tokens=16 is below max_target_tokens=64"),
        (["save_steps=700"], "no multiple of eval_steps=500"),
        (["head_loss_weight=0"], "would score an untrained token head"),
        (
            ["watch_metric=token_head", "fast_metrics=false"],
            "watch_metric=token_head needs fast_metrics=true",
        ),
        (["train_on=train_dev"], "leaves no dev to choose a checkpoint by: set keep_checkpoint=last"),
        (["deepspeed=none.json", "backend=peft"], "deepspeed=none.json: no such file"),
        (["num_processes=2", "backend=unsloth"], "num_processes > 1 needs backend=peft"),
        (["run_id=../../etc"], "run_id"),
        (["subsample"], "write name=value"),
        (["learning_rate=1e-3,2e-3"], "learning_rate=1e-3,2e-3: one value is wanted"),
    ],
)
def test_what_is_wrong_is_refused_and_named(overrides, message):
    with pytest.raises(ParameterError) as error:
        compose_parameters(overrides)
    assert message in str(error.value)


def test_the_last_checkpoint_is_kept_whenever_it_is_saved():
    assert compose_parameters(["save_steps=700", "keep_checkpoint=last"]).save_steps == 700


def test_a_number_that_yaml_reads_as_text_is_explained():
    values = compose_parameters([]).model_dump()
    with pytest.raises(ParameterError, match=r"write 1\.0e-4"):
        check_parameters(values | {"learning_rate": "1e-4"})


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ParameterError) as error:
        check_parameters(compose_parameters([]).model_dump() | {"lora_rank": 0, "seed": -1})
    assert "lora_rank=0" in str(error.value) and "seed=-1" in str(error.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[hub:owner/name#config]", ["hub:owner/name#config"]),
        ("[hub:Größe/a, 'hub:b,c']", ["hub:Größe/a", "hub:b,c"]),
        ("[hub:it's (1)/a=b&c]", ["hub:it's (1)/a=b&c"]),
        ("hub:~/コーパス", ["hub:~/コーパス"]),
    ],
)
def test_a_value_needs_no_quotes(written, value):
    assert compose_parameters([f"corpora={written}"]).corpora == value


@pytest.mark.parametrize("word", ["corpora=[a,b", "entity_types=a]", "run_id='x", "data_dir={a"])
def test_a_bracket_or_quote_that_is_not_closed_is_no_letter(word):
    with pytest.raises(ParameterError, match=re.escape(word) + ": a bracket or quote is not closed"):
        compose_parameters([word])


def test_overrides_may_be_spelled_as_in_the_brief():
    expected = compose_parameters(["subsample=0.1", "run_test_eval=true"])
    assert compose_parameters(["--subsample", "0.1", "+run_test_eval=true"]) == expected
    assert compose_parameters(["--subsample=0.1", "++run_test_eval=true"]) == expected
    assert override_names(["runtime=a100", "--subsample", "0.1"]) == {"subsample"}


def test_the_run_name_changes_with_what_is_trained_and_with_nothing_else():
    base = compose_parameters([]).run_name
    # Older runs are found again.
    assert base == "smollm2-135m-sample-echo_start-74668cc6"
    a100 = compose_parameters(["model=lora_ner_unsloth", "runtime=a100"])
    assert a100.run_name == "Llama3-OpenBioLLM-8B-union_span-echo_start-7acd44dc"
    assert compose_parameters(["learning_rate=1e-3"]).run_name != base
    assert compose_parameters(["keep_checkpoint=last"]).run_name != base
    assert compose_parameters(["num_workers=4", "wandb_mode=offline", "split=test"]).run_name == base
    assert compose_parameters(["run_id=mine"]).run_name == "mine"


def test_every_sweep_key_is_a_parameter():
    sweep = yaml.safe_load((PARAMETERS_DIR / "sweep/lora_ner_span.yaml").read_text())
    assert sweep["metric"] == {"name": "eval_ner_f1", "goal": "maximize"} and sweep["method"] == "grid"
    grid = {name: entry["values"] for name, entry in sweep["parameters"].items()}
    assert grid == {
        "learning_rate": [1e-4, 2e-4, 3e-4],
        "lora_rank": [4, 8, 16],
        "lora_dropout": [0.05, 0.1],
        "subsample": [0.2],
    }
    for name, values in grid.items():
        for value in values:
            assert getattr(compose_parameters([f"{name}={value}"]), name) == value
