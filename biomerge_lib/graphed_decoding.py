"""Knows greedy decoding on a GPU as one CUDA graph a token: a static KV cache and no waiting between tokens.

prompt ids (B, P) --[prefill]--> cache --[one launch a token]--> token ids and log-probabilities (B, N)

A decoder of 30 layers issues thousands of kernels a token, so that ``generate`` spends its time on launching them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import StaticCache

    from biomerge_lib.backbones import CausalLM

STEPS_A_LOOK = 8  # tokens between two looks at whether all rows have ended, each of which waits for the GPU


def can_graph(model: CausalLM) -> bool:
    """Whether decoding can be captured: on a GPU, with attention over all that was read, without Unsloth's kernels."""
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return (
        model.device.type == "cuda"
        and layer_types == {"full_attention"}
        and not hasattr(model, "max_seq_length")
    )


def decode_graphed(
    model: CausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations of prompts that are padded on the left, until every row has written EOS.

    Args:
        input_ids: (B, P), as is ``attention_mask`` (0 on the padding). Without a GPU the same is done launch by launch.

    Returns:
        ids (B, N), meaningless behind a row's first EOS, and the log-probabilities of each step's two best tokens
        (B, N, 2), the first of which is the one in ``ids``. N <= ``max_new_tokens``.
    """
    from transformers import StaticCache

    longest = input_ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=longest + max_new_tokens)
    step = _Step(model, cache, attention_mask, max_new_tokens, eos_token_id)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    step.choose(logits[:, -1])
    graph = None
    for number in range(1, max_new_tokens):
        if number % STEPS_A_LOOK == 0 and bool(step.ended.all()):
            break
        if graph is not None:
            graph.replay()
        elif (
            number == 1 or not input_ids.is_cuda
        ):  # as it is, so that what a first call sets up is not captured
            step()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            graph.replay()  # a capture computes nothing
    written = int(step.written)
    return step.ids[:, :written], step.logprobs[:, :written]


class _Step:
    """One token for each row: all that changes lives in tensors that stay in place."""

    def __init__(
        self,
        model: CausalLM,
        cache: StaticCache,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        eos_token_id: int,
    ):
        batch, longest = attention_mask.shape
        device = attention_mask.device
        self.model, self.cache, self.eos_token_id = model, cache, eos_token_id
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = attention_mask.sum(-1, keepdim=True)  # of the token that is read next
        self.mask = torch.zeros(batch, 1, 1, longest + max_new_tokens, dtype=torch.bool, device=device)
        self.mask[:, 0, 0, :longest] = attention_mask.bool()
        self.slot = torch.full((1,), longest, device=device)  # of the cache
        self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ids = torch.full((batch, max_new_tokens), eos_token_id, device=device)
        self.logprobs = torch.zeros(batch, max_new_tokens, 2, device=device)

    def __call__(self) -> None:
        self.mask.index_fill_(-1, self.slot, True)
        output = self.model(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position += 1
        self.slot += 1
        self.choose(output.logits[:, -1])

    def choose(self, logits: torch.Tensor) -> None:
        """Take the best token of logits (B, V) for each row and write it down."""
        best = logits.float().log_softmax(-1).topk(2)
        chosen = best.indices[:, :1]
        self.token.copy_(chosen)
        self.ids.index_copy_(1, self.written, chosen)
        self.logprobs.index_copy_(1, self.written, best.values[:, None])
        self.ended |= chosen[:, 0] == self.eos_token_id
        self.written += 1
