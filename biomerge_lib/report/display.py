"""Knows how records, predictions, tables and curves look in a notebook or a page; computes no scores."""

from __future__ import annotations

import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from biomerge_lib.core.spans import Span, is_inside
from biomerge_lib.decoding.predictions import Prediction
from biomerge_lib.scoring.ner_metrics import SpanError, find_errors

if TYPE_CHECKING:
    from IPython.display import HTML

# Okabe and Ito's colour-blind-safe palette: blue, orange, vermilion, purple; the underline's shape repeats the colour.
MARKS = {
    "right": "background-color: #56b4e94d; border-bottom: 3px solid #0072b2;",
    "gold": "background-color: #56b4e94d; border-bottom: 3px solid #0072b2;",
    "missed": "background-color: #e69f004d; border-bottom: 3px dashed #b37400;",
    "spurious": "background-color: #d55e0033; border-bottom: 3px double #d55e00;",
    "overlap": "background-color: #cc79a740; border-bottom: 3px dotted #b8578c;",
}
STYLE = (
    """<style>
.bm-text {line-height: 2.1; margin: 4px 0; max-width: 72em; overflow-wrap: anywhere;}
.bm-text mark {color: inherit; padding: 1px 2px; border-radius: 3px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone;}
.bm-text .bm-note {opacity: .75; font-size: 85%;}
"""
    + "".join(f".bm-text mark.{kind} {{{style}}}\n" for kind, style in MARKS.items())
    + "</style>"
)
LEGEND = (
    '<div class="bm-text"><mark class="right">found</mark> <mark class="missed">missed</mark> '
    '<mark class="spurious">spurious</mark> '
    '<mark class="overlap">gold and predicted, but other boundaries</mark></div>'
)
ERROR_KINDS = {
    "missed": "a gold mention, and nothing predicted there",
    "spurious": "a prediction where gold has nothing",
    "boundary": "the right place with another start or end",
    "merged": "one prediction over several gold mentions",
    "split": "one gold mention in several predictions",
}


def highlight(
    text: str,
    gold: Iterable[Span],
    pred: Iterable[Span] | None = None,
    note: str = "",
    scores: Iterable[float | None] = (),
) -> str:
    """HTML of a text with its spans marked.

    With ``gold`` alone the mentions are marked ``gold``. With ``pred`` a character is ``right`` inside a span that
    both have, ``missed`` inside a gold span that was not predicted, ``spurious`` inside a predicted span that is not
    gold, and ``overlap`` inside both of the last two, i.e. where only the boundaries differ. ``scores``, in the order
    of ``gold``, are shown while the pointer is over a mention.
    """
    gold = list(gold)
    scored = [(span, score) for span, score in zip(gold, scores, strict=False) if score is not None]
    gold = {span for span in gold if is_inside(span, len(text))}
    found = {span for span in pred or () if is_inside(span, len(text))}
    edges = sorted({0, len(text)} | {edge for span in gold | found for edge in span})
    unfound = "gold" if pred is None else "missed"
    layers = {"right": gold & found, "spurious": found - gold, unfound: gold - found}
    pieces = []
    for start, end in pairwise(edges):
        kinds = [kind for kind in layers if any(first <= start < last for first, last in layers[kind])]
        kind = "overlap" if kinds == ["spurious", "missed"] else "".join(kinds[:1])
        piece = html.escape(text[start:end])
        said = ", ".join(f"{score:.2f}" for (first, last), score in scored if first <= start < last)
        title = f' title="score {said}"' if said else ""
        pieces.append(f'<mark class="{kind}"{title}>{piece}</mark>' if kind else piece)
    label = f' <span class="bm-note">{html.escape(note)}</span>' if note else ""
    return f'<div class="bm-text">{"".join(pieces)}{label}</div>'


def bracket(text: str, spans: Iterable[Span], *, colour: bool = False) -> str:
    """A text for a terminal with its spans in brackets, or in bold blue.

    >>> bracket("Aspirin can", [(0, 7)])
    '[Aspirin] can'
    """
    before, after = ("\033[1;34m", "\033[0m") if colour else ("[", "]")
    spans = list(spans)
    starts, ends = Counter(start for start, _ in spans), Counter(end for _, end in spans)
    pieces = []
    for position, letter in enumerate([*text, ""]):
        pieces.append(after * ends[position] + before * starts[position] + letter)
    return "".join(pieces)


def highlight_errors(
    predictions: Sequence[Prediction], *, most: int = 12
) -> dict[str, tuple[int, list[str]]]:
    """For each kind of error its count and up to ``most`` highlighted sentences, spread evenly over the split."""
    by_index = {prediction.index: prediction for prediction in predictions}
    by_kind = defaultdict(list)
    for error in find_errors(predictions):
        by_kind[error.kind].append(error)
    examples = {}
    for kind in ERROR_KINDS:
        errors = by_kind[kind]
        firsts = list({error.index: error for error in reversed(errors)}.values())[::-1]  # one a sentence
        chosen = firsts[:: max(1, -(-len(firsts) // most))]
        examples[kind] = len(errors), [_highlight_error(by_index[error.index], error) for error in chosen]
    return examples


def _highlight_error(prediction: Prediction, error: SpanError, *, around: int = 240) -> str:
    text = prediction.text
    spans = [span for span in error.gold + error.pred if is_inside(span, len(text))] or [(0, 0)]
    start = max(0, min(span[0] for span in spans) - around)
    end = min(len(text), max(span[1] for span in spans) + around)
    inside = lambda found: [(a - start, b - start) for a, b in found if start <= a < b <= end]  # noqa: E731
    said = [
        f"{word} " + ", ".join(f"{a}-{b} “{text[a:b][:60]}”" for a, b in found)
        for word, found in (("gold", error.gold), ("predicted", error.pred))
        if found
    ]
    cut = [f"cut out of {len(text)} characters"] if (start, end) != (0, len(text)) else []
    note = "; ".join([f"{prediction.doc_id}: " + ", ".join(said), *cut])
    return highlight(text[start:end], inside(prediction.gold), inside(prediction.pred), note)


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; cells are markup already, whole numbers get their commas, and None is an empty cell.

    >>> print(markdown_table(["corpus", "sentences"], [["bc5cdr", 4560], ["mine", None]]))
    | corpus | sentences |
    |---|---|
    | bc5cdr | 4,560 |
    | mine |  |
    """
    header = list(header)
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(header), *body])


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def show_html(parts: Iterable[str]) -> HTML:
    """An IPython HTML object of highlighted texts; Lab takes style sheets out of notebooks that were run elsewhere."""
    from IPython.display import HTML

    text = "".join(parts)
    for kind, style in MARKS.items():
        marked = f'<span style="{style}" class="{kind}">\\1</span>'
        text = re.sub(f'<mark class="{kind}">(.*?)</mark>', marked, text, flags=re.DOTALL)
    return HTML(STYLE + text)
