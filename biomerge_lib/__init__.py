"""BioMerge: generative biomedical NER with LoRA-tuned language models, as notebooks over a thin library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__version__ = "0.1.0"


def predict(texts: Iterable[str], *, spaced: bool = True, **model: Any) -> list[list[tuple[int, int]]]:
    """The mentions of each text as sorted ``(start, end)`` offsets in it; documents may be of any length.

    ``model``: ``adapter``, ``model``, ``base_url`` or ``cue``, as :func:`~biomerge_lib.apply.tagger.load_tagger` takes
    them; nothing is the shipped adapter (chemicals and diseases). The model is loaded anew (some seconds): for many
    calls, or texts that come one by one, load a tagger once and use its ``find_mentions``.

    >>> predict(["Aspirin can trigger asthma attacks ."])  # doctest: +SKIP
    [[(0, 7), (20, 26)]]
    """
    from biomerge_lib.apply.tagger import load_tagger

    if isinstance(texts, str):
        raise TypeError("predict takes a list of texts; give [text] for one.")
    return list(load_tagger(**model).find_mentions(texts, spaced=spaced))
