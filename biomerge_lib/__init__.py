"""BioMerge: generative biomedical NER with LoRA-tuned language models, as notebooks over a thin library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"


def predict(texts: Sequence[str], *, spaced: bool = True, **model: Any) -> list[list[tuple[int, int]]]:
    """The mentions of each text as sorted ``(start, end)`` offsets.

    ``model``: ``adapter``, ``model`` or ``base_url``, as :func:`biomerge_lib.tagger.load_tagger` takes them; nothing
    is the shipped adapter (chemicals and diseases). ``spaced`` as in :meth:`biomerge_lib.tagger.Tagger.find_mentions`.
    """
    from biomerge_lib.tagger import load_tagger

    return list(load_tagger(**model).find_mentions(texts, spaced=spaced))
