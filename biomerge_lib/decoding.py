"""Knows greedy decoding with transformers: prompts in, answers out. Knows nothing of records or scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from biomerge_lib.predictions import Prompt, RawAnswer
from biomerge_lib.unsloth_lora_ner import decoding_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def greedy_decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = "decoding",
) -> list[RawAnswer]:
    """Answer each prompt greedily; answers come in the prompts' order.

    Prompts are batched by length (longest first: memory is at its peak in the first batch) and padded on the
    left. ``progress`` names the progress bar; None shows none. The model is left in the mode it was in.
    """
    import torch
    from tqdm.auto import tqdm

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].prompt_ids))
    answers: list[RawAnswer | None] = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, unit="sentence", disable=progress is None, mininterval=2.0)
    with decoding_mode(model), torch.inference_mode(), bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            rows = _generate(model, tokenizer, [prompts[i].prompt_ids for i in indices], max_new_tokens)
            for index, row in zip(indices, rows, strict=True):
                answers[index] = read_answer(row, tokenizer)
            bar.update(len(indices))
    return answers


def read_answer(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> RawAnswer:
    """The answer in generated ids: everything before the first EOS; without one it ran into the length limit."""
    ids = list(token_ids)
    finish = "length"
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
        finish = "eos"
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return RawAnswer(token_ids=ids, text=text, finish=finish)


def _generate(model, tokenizer, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    import torch

    longest = max(map(len, prompt_ids))
    # Padding is known by length, not by id: pad and EOS are the same token.
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompt_ids])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    generated = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return generated[:, longest:].tolist()
