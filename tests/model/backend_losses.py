"""Run apart by test_backends.py (Unsloth patches transformers and peft on import): losses of a backend, as JSON.

usage: backend_losses.py BACKEND PREPARED_BACKBONE OUT_DIR [ADAPTER_DIR]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from biomerge_lib.decoding.greedy import decoding_mode
from biomerge_lib.model.unsloth_lora_ner import import_backend, load_lora_model

backend, prepared, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
import_backend(backend)

import torch  # noqa: E402

from biomerge_lib.core.prompt_format import PromptFormat  # noqa: E402
from biomerge_lib.corpora.readers import read_corpus  # noqa: E402
from biomerge_lib.model.packing import PackedCollator  # noqa: E402
from biomerge_lib.prompts.ner_span import SpanCollator, encode_example  # noqa: E402
from biomerge_lib.prompts.tokenizer import load_tokenizer  # noqa: E402

START = PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512)
tokenizer = load_tokenizer(prepared)
settings = {
    "backend": backend,
    "dtype": "float32",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "token_head": True,
    "head_loss_weight": 1.0,
    "max_length": 512,
    "seed": 5,
}
model = load_lora_model(prepared, gradient_checkpointing=False, **settings)
if len(sys.argv) > 4:
    model.load_adapter(sys.argv[4], adapter_name="default", is_trainable=True)
model.train()
records = [record for record in read_corpus("sample")["train"] if len(record.text) < 120][:8]
examples = [encode_example(r, tokenizer, START) for r in records]
batch = {name: t.to(model.device) for name, t in SpanCollator(tokenizer.pad_token_id)(examples).items()}
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)


def gradients(rows) -> tuple[float, dict[str, torch.Tensor]]:
    optimizer.zero_grad()
    loss = model(**{name: values.to(model.device) for name, values in rows.items()})["loss"]
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in trained.items()}


packed_gap = {}
for anchors in ("none", "start"):
    rows = [encode_example(r, tokenizer, replace(START, offset_anchors=anchors)) for r in records]
    padded_loss, padded = gradients(SpanCollator(tokenizer.pad_token_id)(rows))
    packed_loss, packed = gradients(PackedCollator(tokenizer.pad_token_id)(rows))
    gaps = [float((packed[name] - gradient).abs().max()) for name, gradient in padded.items()]
    packed_gap[anchors] = max(abs(packed_loss - padded_loss), *gaps)
losses, heads = [], []
for _ in range(4):
    output = model(**batch)
    losses.append(output["loss"].item())
    heads.append(output["head_loss"].item())
    optimizer.zero_grad()
    output["loss"].backward()
    optimizer.step()
model.save_pretrained(out)
shapes = sorted(tuple(p.shape) for p in trained.values())


def state(model) -> tuple[bool, bool]:
    return model.training, any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


checkpointed = load_lora_model(prepared, gradient_checkpointing=True, **settings)
checkpointed.train()
states = [state(checkpointed)]
with decoding_mode(checkpointed):
    states.append(state(checkpointed))
states.append(state(checkpointed))
print(
    json.dumps(
        {"losses": losses, "heads": heads, "shapes": shapes, "states": states, "packed_gap": packed_gap}
    )
)
