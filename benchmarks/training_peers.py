"""Knows the peers of this project's training step, as their own pages write them: transformers + peft, TRL, Unsloth.

    load_peer(way, folder) -> PEFT model;  build_peer(way, model, tokenizer, dataset, ...) -> Trainer

All get the same token ids and labels and LoRA r = 8 on all linear layers, and none a token head or trained rows of the
embedding, which this project's own ways have.

    brief     the brief's Trainer arguments: rows padded to 256 + 64 tokens, four parts a step, gradient checkpointing
    tuned     the same libraries at their best: grouped by length, padded to the batch's longest, no checkpointing
    trl       SFTTrainer with packing ("bfd") and no checkpointing. Without flash-attn TRL warns that sentences might
              see each other; they do not: transformers builds a block-diagonal mask from the position ids for
              PyTorch's SDPA (tests/project/test_training_peers.py), at the price of a dense mask.
    unsloth   FastLanguageModel and SFTTrainer of its notebooks: their checkpointing, no dropout, padding-free where
              they choose it
    unsloth tuned  the same without checkpointing
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from biomerge_lib.model.unsloth_lora_ner import LINEAR_LAYERS
from biomerge_lib.prompts.prompt import IGNORE

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast, Trainer

PEERS = ("brief", "tuned", "trl", "unsloth", "unsloth tuned")
BRIEF_ROW = 256 + 64  # the brief's limits for the sentence and for the span string
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(LINEAR_LAYERS)}


def parts_of(way: str, batch: int) -> int:
    """In how many parts a way computes a step of ``batch`` sentences."""
    return 4 if way == "brief" and batch >= 4 else 1


def load_peer(way: str, folder: str) -> PeftModel:
    """The backbone with a peer's fresh adapter."""
    import torch

    if way.startswith("unsloth"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=2048, dtype=None, load_in_4bit=False
        )
        checkpointing = False if way == "unsloth tuned" else "unsloth"
        return FastLanguageModel.get_peft_model(
            model, **LORA, lora_dropout=0, bias="none", use_gradient_checkpointing=checkpointing
        )
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation="sdpa",
    )
    model.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type]  # transformers' wrapper of `to` loses self
    return get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.05, task_type="CAUSAL_LM"))


def build_peer(
    way: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    *,
    batch: int,
) -> Trainer:
    """A peer's Trainer over examples of ``build_dataset``, with ``batch`` sentences an optimiser step.

    TRL's rows hold as many tokens as ``batch`` sentences have on average, a row a step.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    on_gpu = torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch // parts_of(way, batch),
        "gradient_accumulation_steps": parts_of(way, batch),
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 0.05,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "dataloader_num_workers": 2,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    examples = dataset.select_columns(["input_ids", "labels"])
    if way in ("brief", "tuned"):
        arguments = common | {"remove_unused_columns": False}
        if way == "brief":
            model.enable_input_require_grads()
            arguments |= {"gradient_checkpointing": True}
        else:
            arguments |= {"train_sampling_strategy": "group_by_length"}
        row = BRIEF_ROW if way == "brief" else None
        return Trainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=examples,
            data_collator=lambda chosen: pad(chosen, tokenizer.pad_token_id, row),
            processing_class=tokenizer,
        )
    from trl import SFTConfig, SFTTrainer

    if way.startswith("unsloth"):
        if way == "unsloth":
            del common["gradient_checkpointing"]  # as their notebooks, which leave it to the model
        config = SFTConfig(**common, max_length=2048, packing=False)
    else:
        lengths = dataset["length"]
        row = max(round(sum(lengths) / len(lengths) * batch), max(lengths))
        one_row = {"per_device_train_batch_size": 1}
        config = SFTConfig(
            **common | one_row, max_length=row, packing=True, packing_strategy="bfd", padding_free=True
        )
    return SFTTrainer(model, args=config, train_dataset=examples, processing_class=tokenizer)


def pad(examples: list[dict[str, Any]], pad_token_id: int, row: int | None) -> dict[str, torch.Tensor]:
    """A batch padded on the right to ``row`` tokens, longer examples cut there; None pads to its longest example."""
    import torch

    row = row or max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), row)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for index, example in enumerate(examples):
        size = min(len(example["input_ids"]), row)
        for name in ("input_ids", "labels"):
            batch[name][index, :size] = torch.tensor(example[name][:size])
        batch["attention_mask"][index, :size] = 1
    return batch


def count_batch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor | int, torch.Tensor | int]:
    """Real tokens and sentences of a peer's batch, padding left out; nothing waits for the GPU.

    >>> import torch
    >>> rows = torch.tensor([[5, 6, 7], [8, 0, 0]])
    >>> tokens, sentences = count_batch({"input_ids": rows, "attention_mask": (rows > 0).long()})
    >>> int(tokens), int(sentences)
    (4, 2)
    >>> packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0]])}
    >>> tokens, sentences = count_batch(packed)
    >>> int(tokens), int(sentences)
    (4, 2)
    """
    ids = batch["input_ids"]
    if "packed_seq_lengths" in batch:  # Unsloth's
        return batch["packed_seq_lengths"].sum(), len(batch["packed_seq_lengths"])
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum(), ids.shape[0]
    return ids.numel(), (batch["position_ids"] == 0).sum()
