"""Knows greedy decoding with transformers: prompts in, answers out. Knows nothing of records or scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

from biomerge_lib.answer_grammar import build_grammar
from biomerge_lib.predictions import Prompt, RawAnswer, margin_of, sum_parts
from biomerge_lib.unsloth_lora_ner import decoding_mode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.backbones import CausalLM


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
    from tqdm.auto import tqdm

    grammars = _Grammars(tokenizer, model.config.vocab_size, constrained_decoding)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].prompt_ids))
    answers: dict[int, RawAnswer] = {}
    bar = tqdm(total=len(prompts), desc=progress, unit="sentence", disable=progress is None, mininterval=2.0)
    with decoding_mode(model), torch.inference_mode(), bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [prompts[index] for index in indices]
            rows, best, second = _continue(model, tokenizer, batch, max_new_tokens, grammars.masks(batch))
            for index, *row in zip(indices, rows, best, second, strict=True):
                answers[index] = read_answer(row[0], tokenizer, *row[1:])
            bar.update(len(indices))
    return [answers[index] for index in range(len(prompts))]


def read_answer(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
    logprobs: Sequence[float] = (),
    second_logprobs: Sequence[float] = (),
) -> RawAnswer:
    """The answer in generated ids: everything before the first EOS; without one it ran into the length limit.

    ``logprobs`` are those of the tokens, ``second_logprobs`` those of the runners-up.
    """
    ids = list(token_ids)
    finish: Literal["eos", "length"] = "length"
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
        finish = "eos"
    text = cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    steps = len(ids) + (finish == "eos")
    logprobs, second_logprobs = logprobs[:steps], second_logprobs[:steps]
    return RawAnswer(
        token_ids=ids,
        text=text,
        finish=finish,
        logprobs=[round(logprob, 6) for logprob in logprobs],
        margins=[margin_of(one, other) for one, other in zip(logprobs, second_logprobs, strict=True)],
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

    def rows(self) -> list[list[list[float]]]:
        """The best and the second log-probabilities: 2 x batch x steps."""
        import torch

        return torch.stack(self.steps).permute(2, 1, 0).tolist()


class _Grammars:
    """The grammars of a batch of prompts as a logits processor, for one tokenizer and one constraint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, constraint: str):
        self.constraint = constraint
        if constraint != "off":
            import xgrammar

            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocab_size, stop_token_ids=tokenizer.eos_token_id
            )
            self.compiler = xgrammar.GrammarCompiler(info)

    def masks(self, prompts: Sequence[Prompt]) -> list[Callable]:
        if self.constraint == "off":
            return []
        from xgrammar.contrib.hf import LogitsProcessor

        texts = [prompt.chunk.record.text for prompt in prompts]
        grammars = [cast(str, build_grammar(text, self.constraint)) for text in texts]
        return [LogitsProcessor([self.compiler.compile_grammar(grammar) for grammar in grammars])]


def _continue(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    max_new_tokens: int,
    masks: list[Callable],
) -> tuple[list, ...]:
    """Generated ids and the two best log-probabilities of each step, as lists of rows."""
    import torch
    from transformers import LogitsProcessorList

    from biomerge_lib.graphed_decoding import can_graph, decode_graphed

    prompt_ids = [prompt.prompt_ids for prompt in prompts]
    longest = max(map(len, prompt_ids))
    # Padding is known by length, not by id: pad and EOS are the same token.
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompt_ids])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    if can_graph(model) and not masks:
        ids, logprobs = decode_graphed(
            model, **inputs, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id
        )
        return ids.tolist(), *logprobs.permute(2, 0, 1).tolist()
    top_two = _TopTwo()
    generated = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([*masks, top_two]),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return generated[:, longest:].tolist(), *top_two.rows()
