"""Knows greedy decoding: prompts in, answers out, with transformers or a decoder of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from biomerge_lib.decoding.answer_grammar import build_grammar
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, margin_of, show_progress, sum_parts

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.model.backbones import CausalLM
    from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer

    Written = tuple[
        torch.Tensor, torch.Tensor
    ]  # ids (B, N), and each step's two best log-probabilities (B, N, 2)

# One row in so many may stay unfinished when a batch is left, and goes on with others like it behind the last batch:
# the longest answer is several times as long as most, and would hold up all of its batch.
SHARE_LEFT = 8


def greedy_decode(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    constrained_decoding: str = "off",
    progress: str | None = "decoding",
) -> list[RawAnswer]:
    """Answer each prompt greedily; answers come in the prompts' order.

    Prompts are batched by length (longest first: memory is at its peak in the first batch) and padded on the
    left. ``constrained_decoding`` (``answer_grammar``) masks what the grammar forbids. ``progress`` names the
    progress bar; None shows none. The model is left in the mode it was in.
    """
    import torch

    from biomerge_lib.decoding.graphed_decoding import GraphedDecoder, can_graph

    graphed = constrained_decoding == "off" and can_graph(model)
    decoder = GraphedDecoder(model, eos_token_id=cast(int, tokenizer.eos_token_id)) if graphed else None
    masks_of = _grammar_masks(tokenizer, model.config.vocab_size, constrained_decoding)

    def decode(batch: Sequence[Prompt], *inputs: torch.Tensor, max_new_tokens: int, leave: int) -> Written:
        ids, mask = (values.to(model.device) for values in inputs)
        if decoder is not None:
            return decoder.decode(ids, mask, max_new_tokens=max_new_tokens, leave=leave)
        return _generate(model, tokenizer, ids, mask, max_new_tokens, masks_of(batch))

    limits: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "progress": progress,
    }
    one_first = progress is not None and model.device.type == "cpu"  # where a batch takes long
    with decoding_mode(model), torch.inference_mode():
        return decode_batches(decode, tokenizer, prompts, **limits, one_first=one_first)


def decode_batches(
    decode: Callable[..., Written],
    tokenizer: PreTrainedTokenizerFast | PlainTokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None,
    one_first: bool = False,
) -> list[RawAnswer]:
    """What :func:`greedy_decode` does, whoever decodes; ``one_first``: rate and time left are wanted in a second.

    ``decode`` takes a batch's prompts, and all that ``GraphedDecoder.decode`` takes, which says what it gives back.
    """
    eos = cast(int, tokenizer.eos_token_id)
    rows = [_Row(prompt) for prompt in prompts]
    with show_progress(len(rows), name=progress) as count:
        waiting = list(rows)
        while waiting:
            waiting.sort(key=lambda row: -len(row.prompt.prompt_ids) - len(row.ids))
            alone, one_first = [waiting.pop(len(waiting) // 2)] if one_first else [], False
            batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
            batches, waiting = [alone, *batches] if alone else batches, []
            for batch in batches:
                leave = len(batch) // SHARE_LEFT if len(batches) > 1 else 0
                _continue(decode, cast(int, tokenizer.pad_token_id), batch, max_new_tokens, leave)
                unfinished = [row for row in batch if eos not in row.ids and len(row.ids) < max_new_tokens]
                count(len(batch) - len(unfinished))
                waiting += unfinished
    return [read_answer(row.ids, tokenizer, row.top_two) for row in rows]


@contextmanager
def decoding_mode(model: CausalLM | PeftModel) -> Iterator[None]:
    """Evaluation mode with a KV cache and nothing compiled inside the block; mode and flags as before after it."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def read_answer(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerFast | PlainTokenizer,
    top_two: Sequence[tuple[float, float]] = (),
) -> RawAnswer:
    """The answer in generated ids: everything before the first EOS; without one it ran into the length limit.

    ``top_two`` are the log-probabilities of the tokens and of the runners-up.
    """
    ids = list(token_ids)
    finish: Literal["eos", "length"] = "length"
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
        finish = "eos"
    text = cast(str, tokenizer.decode(ids, skip_special_tokens=False))
    top_two = top_two[: len(ids) + (finish == "eos")]
    logprobs = [best for best, _ in top_two]
    return RawAnswer(
        token_ids=ids,
        text=text,
        finish=finish,
        logprobs=[round(logprob, 6) for logprob in logprobs],
        margins=[margin_of(best, second) for best, second in top_two],
        part_logprobs=sum_parts(ids, logprobs, tokenizer),
    )


class _TopTwo:
    """A logits processor that changes nothing and keeps each step's two best log-probabilities.

    The first is the chosen token's (decoding is greedy); keeping all scores would take vocabulary x steps floats.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []  # of (batch, 2)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().log_softmax(-1).topk(2).values.cpu())
        return scores


def _grammar_masks(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, constraint: str
) -> Callable[[Sequence[Prompt]], list[Callable]]:
    """What makes the logits processors that mask what each prompt's grammar forbids; none for ``off``."""
    if constraint == "off":
        return lambda prompts: []
    import xgrammar
    from xgrammar.contrib.hf import LogitsProcessor

    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=tokenizer.eos_token_id
    )
    compiler = xgrammar.GrammarCompiler(info)

    def masks(prompts: Sequence[Prompt]) -> list[Callable]:
        grammars = (cast(str, build_grammar(prompt.chunk.record.text, constraint)) for prompt in prompts)
        return [LogitsProcessor([compiler.compile_grammar(grammar) for grammar in grammars])]

    return masks


@dataclass
class _Row:
    """A prompt and what has been written behind it so far, with the two best log-probabilities of each step."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    top_two: list[tuple[float, float]] = field(default_factory=list)


def _continue(
    decode: Callable[..., Written],
    pad: int,
    rows: list[_Row],
    max_new_tokens: int,
    leave: int,
) -> None:
    """Write on behind each row; as many as ``leave`` may stay unfinished."""
    import torch

    read = [row.prompt.prompt_ids + row.ids for row in rows]
    longest = max(map(len, read))
    # Padding is known by length, not by id: pad and EOS are the same token.
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in read])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in read])
    batch, most = [row.prompt for row in rows], max_new_tokens - min(len(row.ids) for row in rows)
    ids, logprobs = decode(batch, input_ids, attention_mask, max_new_tokens=most, leave=leave)
    for row, new_ids, top in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
        room = max_new_tokens - len(row.ids)
        row.ids += new_ids[:room]
        row.top_two += top[:room]


def _generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    masks: list[Callable],
) -> Written:
    import torch
    from transformers import LogitsProcessorList

    processor = _TopTwo()
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([*masks, processor]),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return generated[:, input_ids.shape[1] :], torch.stack(processor.steps, dim=1)
