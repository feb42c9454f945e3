"""Knows how to compare two decoders' predictions of the same records, and to name why they differ.

Made for transformers' greedy decoding (04) against vLLM (05): what was trained must be what is served. It
judges from token ids, texts, finish reasons and the dtypes it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import TYPE_CHECKING, cast

from biomerge_lib.decoding.predictions import Prediction, refuse_other_records
from biomerge_lib.scoring.ner_metrics import SpanScore, score_spans

if TYPE_CHECKING:
    from biomerge_lib.prompts.prompt import Tokenizer

F1_TOLERANCE = 0.02
# Log-probabilities of tokens that bfloat16 may swap lie nearer than this.
NEAR_TIE = 1.0
CAUSES = {
    "tokenisation": "other token ids in the prompts (tokenizer, anchors, cue, chunking, a missing <TAG>), or equal ids "
    "that the server's tokenizer reads as another text",
    "truncation": "one answer was cut at max_new_tokens where the other went on",
    "special-token stripping": "equal token ids, and one text lacks some of the other's signs",
    "stop": "one answer ended where the other went on: EOS, pad or stop tokens",
    "dtype": "near ties that other arithmetic rounds differently: one of both is not float32",
    "weights": "equal prompts, other answers, no near tie: another checkpoint, or attention to padding",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """A sentence that two decoders answer differently.

    ``position`` is the first differing token of the answer; ``reference_token`` and ``served_token`` are what
    stands there as text, ``<end>`` after EOS and ``<cut>`` at the length limit. ``margin`` is how far there the
    chosen token's log-probability lay before the runner-up's, in the decoder that was less sure; None if unknown.
    """

    index: int
    position: int
    reference_token: str
    served_token: str
    cause: str
    reference_answer: str
    served_answer: str
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """The verdict on two decoders; ``passed`` is the gate.

    F1 within 0.02 of each other and of the Trainer's metric (when given); and, when both computed in float32, no
    differing sentence.
    """

    reference: SpanScore
    served: SpanScore
    trainer_f1: float | None
    reference_dtype: str | None
    served_dtype: str | None
    records: int
    differences: list[Difference]

    @property
    def f1_gap(self) -> float:
        """The largest distance of the served F1 from the others'."""
        others = [self.reference.f1] + ([] if self.trainer_f1 is None else [self.trainer_f1])
        return max(abs(self.served.f1 - other) for other in others)

    @property
    def is_exact(self) -> bool:
        """Whether both computed in float32, where answers must be equal."""
        return self.reference_dtype == self.served_dtype == "float32"

    @property
    def passed(self) -> bool:
        # 0.82 - 0.80 is a hair over 0.02 in binary.
        return self.f1_gap <= F1_TOLERANCE + 1e-9 and not (self.is_exact and self.differences)

    @property
    def causes(self) -> dict[str, int]:
        """How many sentences differ by each cause, the commonest first."""
        return dict(Counter(difference.cause for difference in self.differences).most_common())

    def rows(self) -> list[dict]:
        """One row a decoder, for a table; scores to four digits."""
        rows: list[dict] = []
        if self.trainer_f1 is not None:
            f1 = round(self.trainer_f1, 4)
            rows.append({"decoder": "Trainer, greedy", "dtype": self.reference_dtype, "F1": f1})
        for decoder, dtype, score in (
            ("transformers, greedy", self.reference_dtype, self.reference),
            ("vLLM", self.served_dtype, self.served),
        ):
            scores = {"F1": score.f1, "precision": score.precision, "recall": score.recall}
            rounded = {name: round(value, 4) for name, value in scores.items()}
            rows.append({"decoder": decoder, "dtype": dtype, **rounded})
        rows[-1]["differing sentences"] = len(self.differences)
        return rows

    def metrics(self) -> dict:
        """What to record of the verdict."""
        return {
            "parity_passed": self.passed,
            "parity_differing_sentences": len(self.differences),
            "parity_f1_gap": self.f1_gap,
            "details": {"parity_causes": self.causes},
        }

    def explain(self) -> str:
        """The verdict in words, with the named causes."""
        rule = "0 differing sentences allowed (float32)" if self.is_exact else "differing sentences allowed"
        lines = [
            f"parity {'passed' if self.passed else 'FAILED'}: F1 gap {self.f1_gap:.4f} (limit {F1_TOLERANCE}), "
            f"{len(self.differences)} of {self.records} sentences differ ({rule})"
        ]
        lines += [f"  {count} x {cause}: {CAUSES[cause]}" for cause, count in self.causes.items()]
        return "\n".join(lines)


def check_parity(
    reference: Sequence[Prediction],
    served: Sequence[Prediction],
    tokenizer: Tokenizer,
    *,
    reference_dtype: str | None,
    served_dtype: str | None,
    trainer_f1: float | None = None,
) -> Parity:
    """Compare two decoders' predictions sentence by sentence; a dtype of None is unknown.

    Raises:
        DataError: they are not predictions of the same records.
    """
    again = "Score the same split and eval_limit with 04_greedy_dev and 05_vllm_eval."
    refuse_other_records(reference, served, again=again)
    both_float32 = reference_dtype == served_dtype == "float32"
    pairs = zip(reference, served, strict=True)
    found = (_find_difference(one, other, tokenizer, both_float32=both_float32) for one, other in pairs)
    return Parity(
        reference=score_spans((p.gold, p.pred) for p in reference),
        served=score_spans((p.gold, p.pred) for p in served),
        trainer_f1=trainer_f1,
        reference_dtype=reference_dtype,
        served_dtype=served_dtype,
        records=len(reference),
        differences=list(filter(None, found)),
    )


def _find_difference(
    one: Prediction, other: Prediction, tokenizer: Tokenizer, *, both_float32: bool
) -> Difference | None:
    answers, other_answers = _readable(one.answers), _readable(other.answers)
    if one.answer_ids == other.answer_ids and one.finish == other.finish and answers == other_answers:
        return None
    if len(one.answer_ids) != len(other.answer_ids):
        whole = " | ".join(one.answers), " | ".join(other.answers)
        return Difference(one.index, 0, "", "", "tokenisation", *whole)
    mine = zip(one.answer_ids, one.finish, answers, strict=True)
    theirs = zip(other.answer_ids, other.finish, other_answers, strict=True)
    chunk = [own != its for own, its in zip(mine, theirs, strict=True)].index(True)
    ids, other_ids = one.answer_ids[chunk], other.answer_ids[chunk]
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(ids, other_ids, strict=False))
    position = sum(1 for _ in equal)
    margins = [p.margins[chunk][position : position + 1] for p in (one, other) if len(p.margins) > chunk]
    margin = min(chain(*margins), default=None)
    return Difference(
        index=one.index,
        position=position,
        reference_token=_token_text(ids, position, one.finish[chunk], tokenizer),
        served_token=_token_text(other_ids, position, other.finish[chunk], tokenizer),
        cause=_name_cause(one, other, chunk, position, margin, both_float32=both_float32),
        reference_answer=one.answers[chunk],
        served_answer=other.answers[chunk],
        margin=margin,
    )


def _name_cause(
    one: Prediction, other: Prediction, chunk: int, position: int, margin: float | None, *, both_float32: bool
) -> str:
    if one.prompt_hashes and other.prompt_hashes and one.prompt_hashes != other.prompt_hashes:
        return "tokenisation"
    ids, other_ids = one.answer_ids[chunk], other.answer_ids[chunk]
    if ids == other_ids and one.finish[chunk] == other.finish[chunk]:
        shorter, longer = sorted((one.answers[chunk], other.answers[chunk]), key=len)
        rest = iter(longer)
        return "special-token stripping" if all(sign in rest for sign in shorter) else "tokenisation"
    # Which of the two ended where the other goes on, if any did.
    ended = [p.finish[chunk] for p, own in ((one, ids), (other, other_ids)) if len(own) == position]
    if "length" in ended:
        return "truncation"
    if not both_float32 if margin is None else margin <= NEAR_TIE:
        return "dtype"
    return "stop" if ended else "weights"


def _readable(answers: Sequence[str]) -> list[str]:
    # An answer cut inside a character: transformers writes U+FFFD for the torn bytes, vLLM holds them back.
    return [answer.rstrip("\ufffd") for answer in answers]


def _token_text(ids: Sequence[int], position: int, finish: str, tokenizer: Tokenizer) -> str:
    if position < len(ids):
        return cast(str, tokenizer.decode([ids[position]]))
    return "<cut>" if finish == "length" else "<end>"
