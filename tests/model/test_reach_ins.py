"""Other libraries' private parts are used in one module; where one of them changes, a test here fails."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from biomerge_lib.model import reach_ins
from biomerge_lib.model.reach_ins import WRITTEN_FOR
from tests.conftest import ROOT

LIBRARY = ROOT / "biomerge_lib"
# Names without an underscore, of PEFT, Unsloth and DeepSpeed.
UNDOCUMENTED = {"token_adapter", "token_indices", "trainable_tokens_delta", "disable_adapters", "ds_id"}


@pytest.mark.parametrize("pins", ["cpu", "cuda"])
def test_the_pins_are_what_the_module_was_written_for(pins):
    """With another pin: read what the module says of that library, run the tests, then note the new version."""
    text = (ROOT / f"requirements/{pins}.txt").read_text()
    found = dict(re.findall(r"^([\w-]+)==([^+\s;]+)", text, flags=re.M))
    assert {name: found[name] for name in WRITTEN_FOR} == WRITTEN_FOR


def test_no_other_module_uses_private_parts():
    foreign = set()
    for path in sorted(LIBRARY.rglob("*.py")):
        if path.stem == "reach_ins":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)}
        for node in nodes:
            # A NamedTuple's own methods are public in spite of their names.
            if isinstance(node, ast.Attribute) and node.attr not in own | {"_asdict", "_replace", "_fields"}:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            else:
                continue
            if any(re.match(r"_[^_]", name) or name in UNDOCUMENTED for name in names):
                foreign.add(f"{path.stem}: {ast.unparse(node)}")
    # How papermill interrupts a kernel; the room stands below this one, and test_execution.py watches it.
    # IPython's documentation names the other for errors that render themselves.
    assert foreign <= {"execution: super()._async_interrupt_kernel", "runs: error._render_traceback_"}


def test_the_trainer_overrides_no_private_method():
    from biomerge_lib.training.trainer import NerTrainer

    tree = ast.parse(inspect.getsource(NerTrainer))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)}
    private = {name for name in used | set(vars(NerTrainer)) if re.match(r"_[^_]", name)}
    assert private and not private & set(dir(Trainer))


def test_the_trainer_asks_what_was_taken_over(tiny_prepared, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_prepared)
    model.requires_grad_(False)
    weight = model.model.norm.weight.requires_grad_(True)
    data = [{"input_ids": torch.tensor([n, n + 1]), "labels": torch.tensor([n, n + 1])} for n in range(3, 9)]
    options = {"per_device_train_batch_size": 2, "max_grad_norm": 1e-6, "learning_rate": 0.0, "report_to": []}
    args = TrainingArguments(
        tmp_path, num_train_epochs=1, save_strategy="no", use_cpu=True, logging_steps=1, **options
    )
    trainer = Trainer(model, args, train_dataset=data)
    asked = []

    class Reversed(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(5, -1, -1))

        def __len__(self):
            return 6

    def make_sampler():
        asked.append("order")
        return Reversed()

    reach_ins.take_over_trainer(trainer, trained=[weight], make_sampler=make_sampler)
    clip, drop = trainer._clip_grad_norm, model.zero_grad
    trainer._clip_grad_norm = lambda model: asked.append("clip") or clip(model)
    model.zero_grad = lambda *args, **kwargs: asked.append("drop") or drop(*args, **kwargs)
    firsts = [batch["input_ids"][0, 0].item() for batch in trainer.get_train_dataloader()]
    assert (firsts, asked) == ([8, 6, 4], ["order"])
    trainer.train()
    assert asked[1:] == ["order", "drop", *["clip", "drop"] * 3]
    assert all(entry["grad_norm"] > 1e-6 for entry in trainer.state.log_history if "grad_norm" in entry)
    assert weight.grad is None


def test_a_batch_goes_where_the_trainer_would_put_it(tiny_prepared, tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    trainer = Trainer(LlamaForCausalLM.from_pretrained(tiny_prepared), args)
    batch = {"input_ids": torch.tensor([[3]]), "number": torch.tensor(1)}
    assert reach_ins.to_device(trainer, batch) == batch


def test_the_attention_is_the_one_that_was_set(tiny_prepared):
    from transformers import AttentionInterface

    model = LlamaForCausalLM.from_pretrained(tiny_prepared)
    assert reach_ins.attention_of(model) == "sdpa"
    called = []
    own = AttentionInterface()["sdpa"]
    AttentionInterface.register("of_a_test", lambda *args, **kwargs: called.append(1) or own(*args, **kwargs))
    reach_ins.set_attention(model, "of_a_test")
    model(input_ids=torch.tensor([[3, 4]]))
    assert len(called) == model.config.num_hidden_layers
    assert reach_ins.attention_of(model) == "of_a_test"


def test_layers_recompute_one_by_one(tiny_prepared):
    model = LlamaForCausalLM.from_pretrained(tiny_prepared).train()
    layers = model.get_decoder().layers
    assert reach_ins.count_recomputing(layers) == 0
    recomputed = []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert reach_ins.count_recomputing(layers) == 2
    reach_ins.recompute_none(layers[1:])
    for layer in layers:
        assert isinstance(layer, GradientCheckpointingLayer)
        own = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, own=own: recomputed.append(1) or own(*args)
    model(input_ids=torch.tensor([[3, 4]]))
    assert reach_ins.count_recomputing(layers) == len(recomputed) == 1


def test_a_layer_is_compiled_once_and_counted():
    layer = torch.nn.Linear(2, 2)
    before = reach_ins.count_compiled_graphs()
    reach_ins.compile_once(layer)
    compiled = layer._compiled_call_impl
    reach_ins.compile_once(layer)
    assert compiled is not None and layer._compiled_call_impl is compiled
    torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(3))
    assert reach_ins.count_compiled_graphs() == before + 1


def test_tensors_are_zeroed_in_place():
    tensors = [torch.ones(2), torch.ones(3, 2)]
    kept = [tensor.data_ptr() for tensor in tensors]
    reach_ins.zero_at_once(tensors)
    assert all(not tensor.any() for tensor in tensors) and [t.data_ptr() for t in tensors] == kept


def test_deepspeed_is_known_by_its_hooks_and_weights():
    model = torch.nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda *_: None)
    assert not reach_ins.is_under_deepspeed(model)

    def hook(*_):
        pass

    hook.__module__ = "deepspeed.runtime.engine"
    handle = model.register_forward_pre_hook(hook)
    assert reach_ins.is_under_deepspeed(model)
    handle.remove()
    model.weight.ds_id = 0
    assert reach_ins.is_under_deepspeed(model)


def test_deepspeed_still_names_them_so():
    runtime = Path(pytest.importorskip("deepspeed").__file__).parent / "runtime"
    assert "param.ds_id" in (runtime / "zero/partition_parameters.py").read_text()
    assert "register_forward_pre_hook" in (runtime / "engine.py").read_text()


def test_what_unsloth_leaves_on_a_model_is_taken_off(tiny_prepared):
    model = LlamaForCausalLM.from_pretrained(tiny_prepared)
    model.generate = lambda: "Unsloth's"
    reach_ins.remove_unsloth_generate(model)
    reach_ins.remove_unsloth_generate(model)
    assert model.generate.__func__ is LlamaForCausalLM.generate


def test_frozen_added_rows_train_again(tiny_prepared):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_prepared), config)
    model.requires_grad_(False)
    reach_ins.train_added_rows(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".token_adapter.trainable_tokens_delta.default" in name for name in trained)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_a_gguf_file_is_opened_once(monkeypatch):
    import gguf

    opened = []
    monkeypatch.setattr(gguf, "GGUFReader", opened.append)
    with reach_ins.gguf_opened_once():
        gguf.GGUFReader("x.gguf"), gguf.GGUFReader("x.gguf")
    gguf.GGUFReader("y.gguf")
    assert opened == ["x.gguf", "y.gguf"]
