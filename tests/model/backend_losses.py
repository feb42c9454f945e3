"""Losses of a backend. Unsloth patches transformers and peft on import, so that its are measured in a process apart:

python -m tests.model.backend_losses PREPARED_BACKBONE OUT_DIR ADAPTER_DIR
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from biomerge_lib.core.prompt_format import PromptFormat
from biomerge_lib.corpora.readers import read_corpus
from biomerge_lib.decoding.greedy import decoding_mode
from biomerge_lib.model.unsloth_lora_ner import import_backend, load_lora_model

START = PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512)


def measure(backend: str, prepared: Path | str, out: Path, adapter: Path | None = None) -> dict:
    """Train for four steps, from ``adapter`` if there is one, and save the adapter to ``out``."""
    import_backend(backend)
    import torch

    from biomerge_lib.model.packing import PackedCollator
    from biomerge_lib.prompts.ner_span import SpanCollator, encode_example
    from biomerge_lib.prompts.tokenizer import load_tokenizer

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
    if adapter:
        model.load_adapter(str(adapter), adapter_name="default", is_trainable=True)
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

    def state() -> list[bool]:
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())
        return [checkpointed.training, checkpointing]

    checkpointed = load_lora_model(prepared, gradient_checkpointing=True, **settings)
    checkpointed.train()
    states = [state()]
    with decoding_mode(checkpointed):
        states.append(state())
    states.append(state())
    shapes = sorted(list(p.shape) for p in trained.values())
    return {"losses": losses, "heads": heads, "shapes": shapes, "states": states, "packed_gap": packed_gap}


if __name__ == "__main__":
    prepared, out, adapter = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    own = measure("unsloth", prepared, out)
    print(json.dumps([own, measure("unsloth", prepared, out.with_name("crossed"), adapter)]))
