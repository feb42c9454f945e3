"""LoRA in groups of layers trains what PEFT's own layers train, and leaves all else to them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from biomerge_lib.model.fused_lora import drop, fuse_lora, fused_layers
from biomerge_lib.model.packing import KEPT
from biomerge_lib.model.reach_ins import count_compiled_graphs
from biomerge_lib.model.unsloth_lora_ner import LINEAR_LAYERS

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
IDS = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(1))


def build(kind="llama", dtype=torch.float32, *, device="cpu", hidden=48, inner=None, heads=4, **lora):
    """A random model of two layers in training; Qwen2 has biases, and neither rank nor width is a multiple of 64."""
    config_class, model_class = KINDS[kind]
    sizes = {"hidden_size": hidden, "intermediate_size": inner or hidden + 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = model_class(
        config_class(vocab_size=50, num_attention_heads=heads, num_key_value_heads=2, **sizes)
    )
    adapter = {"r": 3, "lora_alpha": 2, "target_modules": list(LINEAR_LAYERS), "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**adapter | lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("proj.base_layer.bias"):
                parameter.normal_(std=0.1)
            elif "base_layer" in name:
                parameter.mul_(5)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model.to(device).train()


def pass_of(model, ids=IDS):
    """Loss and gradients of one pass, in autocast where the weights are narrow."""
    model.zero_grad()
    ids = ids.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients


def distance(found, expected):
    """Of all gradients together, over their length."""
    apart = sum((found[name].float() - expected[name].float()).square().sum() for name in expected)
    return float((apart / sum(gradient.float().square().sum() for gradient in expected.values())).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_pefts(kind):
    loss, gradients = pass_of(build(kind))
    model = build(kind)
    assert fuse_lora(model) == 14
    fused_loss, fused = pass_of(model)
    torch.testing.assert_close(fused_loss, loss)
    assert fused.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(fused[name], gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_are_as_near_to_the_exact_ones_as_pefts(kind):
    narrow = build(kind, torch.bfloat16)
    _, exact = pass_of(copy.deepcopy(narrow).float())
    _, peft = pass_of(narrow)
    fuse_lora(narrow)
    _, fused = pass_of(narrow)
    assert 0 < distance(fused, exact) < max(0.005, 1.2 * distance(peft, exact)) < 0.03


def test_what_a_step_trained_is_read_by_the_next_pass():
    models = build(), build()
    fuse_lora(models[1])
    losses = []
    for model in models:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=10.0)
        losses.append([])
        for _ in range(4):
            losses[-1].append(float(pass_of(model)[0]))
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][3] < 0.95 * losses[0][0]


def test_checkpointed_layers_give_the_same_gradients_and_keep_nothing():
    _, gradients = pass_of(build())
    model = build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fuse_lora(model)
    _, fused = pass_of(model)
    for name in gradients:
        torch.testing.assert_close(fused[name], gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    groups = {layer.fused_into[0] for layer in fused_layers(model)}
    assert len(groups) == 8 and all(group.held is None for group in groups)


def test_evaluation_a_disabled_and_a_merged_adapter_are_pefts():
    plain, fused = build(), build()
    fuse_lora(fused)
    pass_of(fused)  # which leaves the layers as in training

    def logits(model):
        with torch.no_grad():
            return model(input_ids=IDS).logits

    adapted = logits(plain.eval())
    torch.testing.assert_close(logits(fused.eval()), adapted)
    for model in (plain, fused):
        model.train()
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(pass_loss(fused), pass_loss(plain))
        assert not torch.allclose(logits(fused), adapted)
    fused.merge_adapter()
    torch.testing.assert_close(pass_loss(fused), pass_loss(plain))
    fused.unmerge_adapter()
    torch.testing.assert_close(pass_of(fused)[1], pass_of(plain)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(fused.merge_and_unload()), adapted, rtol=1e-4, atol=1e-4)


def pass_loss(model):
    return model(input_ids=IDS, labels=IDS).loss.detach()


def test_the_saved_adapter_is_pefts_and_the_weights_are_in_memory_once(tmp_path):
    plain, fused = build(), build()
    before = sum(p.numel() for p in fused.parameters())
    fuse_lora(fused)
    assert sum(p.numel() for p in fused.parameters()) == before
    assert list(fused.state_dict()) == list(plain.state_dict())
    for folder, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "fused/adapter_model.safetensors").read_bytes() == (
        tmp_path / "plain/adapter_model.safetensors"
    ).read_bytes()
    for layer in fused_layers(fused):
        weights = layer.base_layer.weight, layer.fused_into[0].weight
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def test_a_layer_alone_stays_where_it_is_if_nothing_is_added_to_its_weight():
    model = build()
    places = {name: p.data_ptr() for name, p in model.named_parameters() if "base_layer" in name}
    fuse_lora(model)
    moved = {
        name.split(".")[-3]
        for name, p in model.named_parameters()
        if p.data_ptr() != places.get(name, p.data_ptr())
    }
    assert moved == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


class KeptValues:
    """Counts what the passes inside keep for their backward pass beside a model's parameters, in bfloat16's bytes."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes, self.of_heads = {}, []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self.of_heads += [tensor.nbytes / storage.nbytes()] if tensor.ndim == 4 else []
        return tensor

    def total(self):
        return sum(self.bytes.values()) / 2


@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_keeps_what_rows_are_planned_with(compiled, fused):
    """In an 8B's proportions; a plan is careful, and not by half."""
    tokens, hidden, inner = 384, 256, 896
    model = build(dtype=torch.bfloat16, hidden=hidden, inner=inner, heads=8, r=2, lora_dropout=0.05)
    if fused:
        fuse_lora(model)
    decoder = model.get_decoder()
    layer = decoder.layers[0]
    if compiled:
        torch._dynamo.reset()
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    kept = KeptValues(model)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(positions % 50, use_cache=False)
        rotations = decoder.rotary_emb(x, positions)
        with kept.hooks:
            layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotations)
    of_hidden, of_inner = KEPT[compiled, fused]
    assert len(kept.of_heads) >= 4 and min(kept.of_heads) > 0.99  # v does not hold q and k
    assert 0.65 < kept.total() / tokens / (of_hidden * hidden + of_inner * inner) < 0.95


def test_weights_that_were_moved_away_are_trained_by_peft():
    model, plain = build().double(), build().double()
    fuse_lora(model)
    model.float()
    for layer in fused_layers(model):
        layer.fused_into[0].weight.data.fill_(torch.nan)  # the earlier place
    torch.testing.assert_close(pass_of(model)[1], pass_of(plain.float())[1])


@pytest.mark.parametrize(
    "lora, fused",
    [
        ({"use_dora": True}, 0),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"rank_pattern": {"k_proj": 5}}, 14),
    ],
    ids=["dora", "two of three", "ranks that differ"],
)
def test_a_layer_that_is_more_or_stands_alone_trains_as_with_peft(lora, fused):
    _, gradients = pass_of(build(**lora))
    model = build(**lora)
    assert fuse_lora(model) == fused
    torch.testing.assert_close(pass_of(model)[1], gradients, rtol=1e-4, atol=1e-6)


def test_a_second_adapter_is_pefts():
    model, plain = build(), build()
    fuse_lora(model)
    for each in (model, plain):
        each.add_adapter("other", LoraConfig(r=2, target_modules=list(LINEAR_LAYERS)))
        each.set_adapter("other")
        torch.manual_seed(5)
        for name, parameter in each.named_parameters():
            if ".other." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    torch.testing.assert_close(pass_of(model)[1], pass_of(plain)[1])


def test_dropout_is_on_the_low_rank_path_alone():
    """One mask for q, k and v: where B is zero it changes nothing, and else something."""
    plain, fused = build(), build(lora_dropout=0.5)
    fuse_lora(fused)
    assert not torch.allclose(pass_loss(fused), pass_loss(plain))
    with torch.no_grad():
        for model in (plain, fused):
            for name, parameter in model.named_parameters():
                parameter.mul_("lora_B" not in name)
    torch.testing.assert_close(pass_loss(fused), pass_loss(plain))


@pytest.fixture(scope="module")
def compiled_drop():
    torch._dynamo.reset()
    return torch.compile(drop, dynamic=True)


@pytest.mark.slow
def test_a_compiled_mask_is_drawn_anew_by_seed_and_is_the_same_backward(compiled_drop):
    x = torch.full((400, 300), 2.0, requires_grad=True)
    torch.manual_seed(3)
    first, second = compiled_drop(x, 0.05), compiled_drop(x, 0.05)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled_drop(x, 0.05), first)
    zeros = [(values == 0).double().flatten() for values in (first.detach(), second.detach())]
    assert first.detach().unique().tolist() == [0.0, pytest.approx(2 / 0.95)]
    for found in zeros:  # 120,000 draws: five standard deviations are 0.0031
        assert float(found.mean()) == pytest.approx(0.05, abs=0.0031)
    rows = zeros[0].reshape(400, 300)
    assert float(rows.mean(0).std()) == pytest.approx((0.0475 / 400) ** 0.5, rel=0.2)
    assert float(rows.mean(1).std()) == pytest.approx((0.0475 / 300) ** 0.5, rel=0.2)
    for one, other in (zeros, (rows[1:].flatten(), rows[:-1].flatten()), (rows[:, 1:], rows[:, :-1])):
        assert float((one * other).mean()) == pytest.approx(0.0025, abs=0.0008)
    first.sum().backward()
    torch.testing.assert_close(x.grad, first.detach() / 2)


@pytest.mark.slow
def test_compiled_layers_are_one_graph_with_the_same_gradients():
    """As Dynamo and AOTAutograd see them; the code that Inductor makes of it runs in tests/gpu."""
    loss, gradients = pass_of(build())
    torch._dynamo.reset()
    model = build()
    model.enable_input_require_grads()  # as the trained rows of the embedding do
    fuse_lora(model)
    before = count_compiled_graphs()
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
    found = pass_of(model)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[1], gradients, rtol=1e-4, atol=1e-6)
    pass_of(model, IDS[:, :9])
    assert count_compiled_graphs() == before + 1
