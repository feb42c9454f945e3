"""Knows how to ask a running OpenAI-compatible server for the answers to prompts.

    prompt ids --[/v1/completions, greedy, many at a time]--> RawAnswer

The official ``openai`` client does time-outs, retries and the pauses between them.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import openai
from anyio.from_thread import start_blocking_portal
from pydantic import BaseModel, Field

from biomerge_lib.core.errors import ParameterError, ServerError, nearest
from biomerge_lib.core.files import parse_json
from biomerge_lib.core.parameters import find_secret
from biomerge_lib.decoding.answer_grammar import build_grammar
from biomerge_lib.decoding.predictions import Prompt, RawAnswer, margin_of, sum_parts
from biomerge_lib.prompts.plain_tokenizer import PlainTokenizer

HOW_TO_START = (
    "Start one: VLLM_API_KEY=... python -m vllm.entrypoints.openai.api_server --model runs/RUN/merged "
    "--served-model-name RUN --host 127.0.0.1 --port 8001"
)
API_KEY = "VLLM_API_KEY"  # the environment variable
_RETRIED = (408, 409, 429)


class ServedModel(BaseModel, frozen=True):
    """What ``/v1/models`` says: the model's id, the folder it was loaded from, its longest sequence."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[ServedModel]


_Logprob = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]


class _Logprobs(BaseModel):
    token_logprobs: list[_Logprob] | None = None
    top_logprobs: list[Annotated[dict[str, _Logprob], Field(min_length=1)]] | None = None


class _Choice(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: list[int] | None = None
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


def find_served_model(base_url: str, api_key: str, *, names: Sequence[str] | None = None) -> ServedModel:
    """The model that the server serves under one of ``names`` (its id, or the folder it was loaded from).

    ``names=None`` takes the only one.

    Raises:
        ServerError: no server there, it wants another key, or serves something else.
    """
    try:
        with openai.OpenAI(
            base_url=base_url,
            api_key=api_key,
            timeout=20,
            http_client=openai.DefaultHttpxClient(trust_env=_may_use_proxy(base_url)),
        ) as client:
            answer = client.models.with_raw_response.list().content
    except openai.OpenAIError as error:
        raise ServerError(
            f"{base_url}: {_reason(error, openai.DEFAULT_MAX_RETRIES)}. {HOW_TO_START}"
        ) from None
    models = read_models(answer, base_url)
    wanted = [model for model in models if names is None or model.id in names or model.root in names]
    if wanted and (names is not None or len(models) == 1):
        return wanted[0]
    there = ", ".join(f"{model.id!r} (from {model.root})" for model in models) or "no model"
    asked = f", not {names[0]!r}.{nearest(names[0], [model.id for model in models])}" if names else "."
    raise ServerError(f"{base_url} serves {there}{asked} Name one of them, or start another. {HOW_TO_START}")


def read_models(answer: bytes, base_url: str) -> list[ServedModel]:
    """The models that a server's answer to ``/v1/models`` lists.

    Raises:
        ServerError: it is no such answer.
    """
    cure = " This is no list of models: is it a vLLM server?"
    return parse_json(answer, f"{base_url}/models", _Models, cure=cure, raises=ServerError).data


def served_names(model_dir: Path | str) -> list[str]:
    """Under which names a server may serve a model folder: the run's name first, then the folder's path.

    >>> served_names("/data/runs/my-run/merged")
    ['my-run', '/data/runs/my-run/merged']
    """
    folder = Path(model_dir).resolve()
    name = folder.parent.name if folder.name == "merged" else folder.name
    return list(dict.fromkeys([name, str(folder), str(model_dir)]))


class Server(Protocol):
    """Where a model is served and under which name: a ``RunningServer`` or a ``VllmServer``."""

    model_id: str
    api_key: str

    @property
    def base_url(self) -> str: ...


class RunningServer:
    """A server that somebody else started, checked and never stopped; a stand-in for ``VllmServer``.

    It serves the model in ``model_dir``; with None whichever, if it is the only one. The key comes from an environment
    variable: a notebook's parameters are stored in its output.

    Raises:
        ServerError: no server there, it wants another key, or serves something else.
    """

    startup_seconds = 0.0

    def __init__(self, base_url: str, model_dir: Path | str | None = None, *, key_variable: str = API_KEY):
        if secret := find_secret(base_url):
            raise ParameterError(secret)
        self.base_url = base_url.rstrip("/").removesuffix("/v1") + "/v1"  # given with or without it
        self.api_key = os.environ.get(key_variable) or "EMPTY"
        names = None if model_dir is None else served_names(model_dir)
        self.model = find_served_model(self.base_url, self.api_key, names=names)
        self.model_id = self.model.id

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyClient:
    """Asks one served model for greedy answers, ``concurrency`` at a time.

    ``constrained_decoding`` (``answer_grammar``) makes the server refuse what the grammar forbids. Requests that take
    longer than ``request_seconds``, lost connections, 429 and 5xx are retried ``max_retries`` times with growing,
    random pauses.
    """

    server: Server
    tokenizer: PlainTokenizer
    max_new_tokens: int
    concurrency: int = 64
    constrained_decoding: str = "off"
    request_seconds: float = 120
    max_retries: int = 5

    def answer_all(self, prompts: dict[int, Prompt], keep: Callable[[int, RawAnswer], None]) -> int:
        """Answer numbered prompts; give each answer to ``keep`` when it comes; return how many requests were retried.

        Raises:
            ServerError: a prompt is refused, or kept failing after ``max_retries``; names the sentence.
        """
        # A loop in a thread of its own: in Jupyter one runs already, and waiting for a thread can be interrupted.
        with start_blocking_portal() as portal:
            return portal.call(self._answer_all, prompts, keep)

    async def _answer_all(self, prompts: dict[int, Prompt], keep: Callable[[int, RawAnswer], None]) -> int:
        numbers = iter(prompts)
        retries = 0

        async def work(client: openai.AsyncOpenAI) -> None:
            nonlocal retries
            for number in numbers:
                prompt = prompts[number]
                try:
                    answer, retried = await self._answer(client, prompt)
                except (openai.OpenAIError, ServerError) as error:
                    record = prompt.chunk.record
                    raise ServerError(
                        f"sentence {prompt.record_index} ({record.dataset}/{record.doc_id}, {record.text[:50]!r}): "
                        f"{_reason(error, self.max_retries)}."
                    ) from None
                keep(number, answer)
                retries += retried

        try:
            async with self._connect() as client, asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(prompts))):
                    group.create_task(work(client))
        except BaseExceptionGroup as failures:
            # The first failure cancelled the other workers.
            raise failures.exceptions[0] from None
        return retries

    def _connect(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.server.base_url,
            api_key=self.server.api_key,
            timeout=self.request_seconds,
            max_retries=self.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=_may_use_proxy(self.server.base_url)),
        )

    async def _answer(self, client: openai.AsyncOpenAI, prompt: Prompt) -> tuple[RawAnswer, int]:
        grammar = build_grammar(prompt.chunk.record.text, self.constrained_decoding)
        raw = await client.completions.with_raw_response.create(
            model=self.server.model_id,
            prompt=None,  # in the extra body, which openai sends as it is: it looks at each token id of this one
            max_tokens=self.max_new_tokens,
            temperature=0,
            logprobs=2,
            extra_body={
                "prompt": prompt.prompt_ids,
                "stop_token_ids": [self.tokenizer.eos_token_id],
                # A server that takes defaults from the model's generation_config must not bend greedy decoding.
                "repetition_penalty": 1.0,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "return_token_ids": True,
                # Two tokens may have the same text; the log-probabilities come in a dictionary.
                "return_tokens_as_token_ids": True,
                **({"structured_outputs": {"grammar": grammar}} if grammar else {}),
            },
        )
        return self._read_answer(raw, prompt), raw.retries_taken

    def _read_answer(self, raw: Any, prompt: Prompt) -> RawAnswer:
        where, began = "the server's answer is no completion", raw.content[:200]
        answer = parse_json(raw.content, where, _Completion, cure=f" It begins {began!r}", raises=ServerError)
        choice, text = answer.choices[0], answer.choices[0].text
        seen_ids = choice.prompt_token_ids
        if seen_ids is not None and seen_ids != prompt.prompt_ids:
            raise ServerError(
                f"the server read {len(seen_ids)} other token ids than the {len(prompt.prompt_ids)} sent"
            )
        ids = choice.token_ids
        if ids is None:  # not vLLM, or older than return_token_ids
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        finish: Literal["eos", "length"] = "length" if choice.finish_reason == "length" else "eos"
        logprobs, margins = _read_logprobs(choice, len(ids) + (finish == "eos"))
        return RawAnswer(list(ids), text, finish, logprobs, margins, sum_parts(ids, logprobs, self.tokenizer))


def _read_logprobs(choice: _Choice, steps: int) -> tuple[list[float], list[float]]:
    """The log-probabilities of an answer's tokens and their margins; empty from a server that gives none."""
    given = choice.logprobs or _Logprobs()
    if not given.token_logprobs or len(given.token_logprobs) < steps:
        return [], []
    logprobs = [round(logprob, 6) for logprob in given.token_logprobs[:steps]]
    pairs = [
        sorted([*top.values(), -math.inf], reverse=True)[:2] for top in (given.top_logprobs or [])[:steps]
    ]
    return logprobs, [margin_of(*pair) for pair in pairs]


def _reason(error: Exception, retries: int) -> str:
    attempts = f" ({retries + 1} attempts)"
    if isinstance(error, openai.APITimeoutError):
        return "the server did not answer in time" + attempts
    if isinstance(error, openai.APIConnectionError):
        return f"no connection to the server{attempts}: {error.__cause__ or error}"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return "the server refused the API key"
    if isinstance(error, openai.APIStatusError):
        retried = attempts if error.status_code in _RETRIED or error.status_code >= 500 else ""
        return f"the server answered {error.status_code}{retried}: {error.message[:200]}"
    return str(error)


def _may_use_proxy(base_url: str) -> bool:
    # A cluster's http_proxy would send requests for 127.0.0.1 to the proxy's own machine.
    return not any(f"//{host}" in base_url for host in ("127.0.0.1", "localhost", "[::1]"))
