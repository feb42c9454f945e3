"""Knows greedy decoding on a GPU as one CUDA graph a token: a static KV cache and no waiting between tokens.

prompt ids (B, P) --[prefill]--> cache --[one launch a token]--> token ids and log-probabilities (B, N)

A decoder of 30 layers issues thousands of kernels a token, so that ``generate`` spends its time on launching them; and
where heads share keys and values it copies these for each head at every token, which then takes most of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from biomerge_lib.model.packing import ATTENTION as PACKED
from biomerge_lib.model.reach_ins import attention_of, is_under_deepspeed, set_attention

if TYPE_CHECKING:
    from transformers import StaticCache

    from biomerge_lib.model.backbones import CausalLM

ATTENTION = "biomerge_one_token"
STEPS_A_LOOK = 8  # tokens between two looks at how many rows have ended, each of which waits for the GPU
CACHE_MULTIPLE = 128  # of tokens, so that batches of about the same length share a graph


def can_graph(model: CausalLM) -> bool:
    """Whether decoding can be captured.

    It can on a GPU, with attention over all that was read, and not under DeepSpeed, which hangs a hook before the model
    that waits for the GPU (and with ZeRO-3 fetches the weights layer by layer).
    """
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    full = layer_types == {"full_attention"}
    return model.device.type == "cuda" and full and not is_under_deepspeed(model)


class GraphedDecoder:
    """Greedy continuations by one model, batch after batch; batches of about the same size share cache and graph.

    Without a GPU the same is done launch by launch.
    """

    def __init__(self, model: CausalLM, *, eos_token_id: int):
        self.model = model
        self.eos_token_id = eos_token_id
        self._step: _Step | None = None

    def decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, leave: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue prompts that are padded on the left until every row but ``leave`` has written EOS.

        Args:
            input_ids: (B, P), as is ``attention_mask`` (0 on the padding).

        Returns:
            ids (B, N), meaningless behind a row's first EOS, and the log-probabilities of each step's two best tokens
            (B, N, 2), the first of which is the one in ``ids``. N <= ``max_new_tokens``.
        """
        batch, longest = input_ids.shape
        step = self._prepare(batch, longest, max_new_tokens)
        step.begin(input_ids, attention_mask)
        for number in range(1, max_new_tokens):
            if number % STEPS_A_LOOK == 0 and int((~step.ended).sum()) <= leave:
                break
            step.advance()
        written = int(step.written)
        return step.ids[:, :written].clone(), step.logprobs[:, :written].clone()

    def _prepare(self, batch: int, longest: int, max_new_tokens: int) -> _Step:
        """The step of the batch before, if it fits, or one with a new cache."""
        length = longest + max_new_tokens
        length += -length % CACHE_MULTIPLE
        if self._step is None or not self._step.fits(batch, length, max_new_tokens):
            self._step = None  # frees its cache before the next one is made
            self._step = _Step(self.model, batch, length, max_new_tokens, self.eos_token_id)
        return self._step


class _Step:
    """One token for each row: all that changes lives in tensors that stay in place."""

    def __init__(self, model: CausalLM, batch: int, length: int, max_new_tokens: int, eos_token_id: int):
        from transformers import StaticCache

        device = model.device
        self.model, self.eos_token_id = model, eos_token_id
        self.cache: StaticCache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)  # of the token that is read next
        self.mask = torch.zeros(batch, 1, 1, length, dtype=model.dtype, device=device)  # added to the scores
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # of the cache
        self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ids = torch.zeros(batch, max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, max_new_tokens, 2, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def fits(self, batch: int, length: int, max_new_tokens: int) -> bool:
        """Whether a batch can use these tensors: of just this size, but for a cache that may be half as long again."""
        same = self.ids.shape == (batch, max_new_tokens)
        return same and length <= self.mask.shape[-1] <= 1.5 * length

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Read the prompts and choose each row's first token."""
        longest = input_ids.shape[1]
        if self.cache.is_initialized:
            self.cache.reset()
        self.position.copy_(attention_mask.sum(-1, keepdim=True))
        self.mask.fill_(float("-inf"))
        self.mask[:, 0, 0, :longest].masked_fill_(attention_mask.bool(), 0)
        self.slot.fill_(longest)
        self.written.zero_()
        self.ended.zero_()
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._choose(logits[:, -1])

    def advance(self) -> None:
        """Write one token more: as it is at first, so that what a first call sets up is not captured; then replayed."""
        if self._graph is None and not (self._warm and self.token.is_cuda):
            self._warm = True
            self._run()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._run()  # computes nothing
        self._graph.replay()

    def _run(self) -> None:
        self.mask.index_fill_(-1, self.slot, 0)
        with _shared_heads(self.model):
            output = self.model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.position,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.position += 1
        self.slot += 1
        self._choose(output.logits[:, -1])

    def _choose(self, logits: torch.Tensor) -> None:
        """Take the best token of logits (B, V) for each row and write it down."""
        best = logits.float().log_softmax(-1).topk(2)
        chosen = best.indices[:, :1]
        self.token.copy_(chosen)
        self.ids.index_copy_(1, self.written, chosen)
        self.logprobs.index_copy_(1, self.written, best.values[:, None])
        self.ended |= chosen[:, 0] == self.eos_token_id
        self.written += 1


@contextmanager
def _shared_heads(model: CausalLM) -> Iterator[None]:
    """Attention of one token through :func:`attend_one_token` inside the block, where the model's own is PyTorch's."""
    before = attention_of(model)
    if before in ("sdpa", PACKED):
        set_attention(model, ATTENTION)
    try:
        yield
    finally:
        set_attention(model, before)


def attend_one_token(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row to all that its row has read.

    Query is (B, heads, 1, D), key and value (B, groups, T, D), the mask (B, 1, 1, T) is added to the scores. The heads
    of a group stand as so many queries beside each other, so that its keys and values are read once and not copied for
    each head.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask.to(query.dtype), scale=scaling
    )
    return attended.reshape(batch, 1, heads, width), None


AttentionInterface.register(ATTENTION, attend_one_token)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
