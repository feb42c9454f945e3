"""Knows greedy decoding, batch after batch: prompts in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from biomerge_lib.decoding.answer_grammar import build_grammar
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, margin_of, sum_parts
from biomerge_lib.experiment.jobs import progress_bar

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.decoding.graphed_decoding import GraphedDecoder
    from biomerge_lib.decoding.plain_llama import PlainLlama
    from biomerge_lib.model.backbones import CausalLM
    from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer

# One row in so many may stay unfinished when a batch is left, and goes on with others like it behind the last batch:
# the longest answer is several times as long as most, and would hold up all of its batch.
SHARE_LEFT = 8


def greedy_decode(
    model: CausalLM | PlainLlama,
    tokenizer: PreTrainedTokenizerFast | PlainTokenizer,
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

    eos = cast(int, tokenizer.eos_token_id)
    decoder = _find_decoder(model, eos) if constrained_decoding == "off" else None
    masks_of = _grammar_masks(tokenizer, model.config.vocab_size, constrained_decoding)
    rows = [_Row(prompt) for prompt in prompts]
    with decoding_mode(model), torch.inference_mode(), progress_bar(len(rows), progress) as bar:
        waiting = list(rows)
        # On a CPU a batch takes long, so that one sentence tells rate and time left first.
        one_first = progress is not None and model.device.type == "cpu"
        while waiting:
            waiting.sort(key=lambda row: -len(row.prompt.prompt_ids) - len(row.ids))
            alone = [waiting.pop(len(waiting) // 2)] if one_first else []
            batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
            waiting, one_first = [], False
            for batch in [alone, *batches] if alone else batches:
                leave = len(batch) // SHARE_LEFT if len(batches) > 1 else 0
                masks = masks_of(batch)
                _continue(model, tokenizer, batch, max_new_tokens, masks=masks, decoder=decoder, leave=leave)
                unfinished = [row for row in batch if eos not in row.ids and len(row.ids) < max_new_tokens]
                bar.update(len(batch) - len(unfinished))
                waiting += unfinished
    return [read_answer(row.ids, tokenizer, row.top_two) for row in rows]


@contextmanager
def decoding_mode(model: CausalLM | PeftModel | PlainLlama) -> Iterator[None]:
    """Evaluation mode with a KV cache and nothing compiled inside the block; mode and flags as before after it."""
    import torch

    was_training = model.training
    model.eval()
    try:
        # Importing the compiler takes seconds, and before that nothing is compiled.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
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


def _find_decoder(model: Any, eos_token_id: int) -> GraphedDecoder | PlainLlama | None:
    """What decodes without ``generate``: a model that does it itself, or its CUDA graph where that can be captured."""
    if hasattr(model, "decode"):
        return model
    from biomerge_lib.decoding.graphed_decoding import GraphedDecoder, can_graph

    return GraphedDecoder(model, eos_token_id=eos_token_id) if can_graph(model) else None


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
    tokenizer: PreTrainedTokenizerFast | PlainTokenizer, vocab_size: int, constraint: str
) -> Callable[[Sequence[_Row]], list[Callable]]:
    """What makes the logits processors that mask what each row's grammar forbids; none for ``off``."""
    if constraint == "off":
        return lambda rows: []
    import xgrammar
    from xgrammar.contrib.hf import LogitsProcessor

    info = xgrammar.TokenizerInfo.from_huggingface(
        cast("PreTrainedTokenizerFast", tokenizer),
        vocab_size=vocab_size,
        stop_token_ids=tokenizer.eos_token_id,
    )
    compiler = xgrammar.GrammarCompiler(info)

    def masks(rows: Sequence[_Row]) -> list[Callable]:
        grammars = (cast(str, build_grammar(row.prompt.chunk.record.text, constraint)) for row in rows)
        return [LogitsProcessor([compiler.compile_grammar(grammar) for grammar in grammars])]

    return masks


@dataclass
class _Row:
    """A prompt and what has been written behind it so far, with the two best log-probabilities of each step."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    top_two: list[tuple[float, float]] = field(default_factory=list)


def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerFast | PlainTokenizer,
    rows: list[_Row],
    max_new_tokens: int,
    *,
    masks: list[Callable],
    decoder: GraphedDecoder | PlainLlama | None,
    leave: int,
) -> None:
    """Write on behind each row; with a ``decoder`` as many as ``leave`` may stay unfinished."""
    import torch

    read = [row.prompt.prompt_ids + row.ids for row in rows]
    longest = max(map(len, read))
    # Padding is known by length, not by id: pad and EOS are the same token.
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in read])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in read])
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    if decoder is not None:
        most = max_new_tokens - min(len(row.ids) for row in rows)
        ids, logprobs = decoder.decode(**inputs, max_new_tokens=most, leave=leave)
        written = zip(rows, ids.tolist(), logprobs.tolist(), strict=True)
    else:
        from transformers import LogitsProcessorList

        processor = _TopTwo()
        generated = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([*masks, processor]),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        top_two = torch.stack(processor.steps, dim=1)
        written = zip(rows, generated[:, longest:].tolist(), top_two.tolist(), strict=True)
    for row, new_ids, top in written:
        room = max_new_tokens - len(row.ids)
        row.ids += new_ids[:room]
        row.top_two += top[:room]
