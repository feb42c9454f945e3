"""BioMerge: generative biomedical NER with LoRA-tuned language models, as notebooks over a thin library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biomerge_lib.apply.tagger import load_tagger as load_tagger

__version__ = "0.1.0"


def predict(
    texts: str | Iterable[str], *, threshold: float | None = None, spaced: bool | None = None, **model: Any
) -> Any:
    """The mentions of a text, or of each of several, of any length: each has ``start, end, text, score``.

    ``model``: ``adapter``, ``model``, ``base_url`` or ``cue``, as :func:`~biomerge_lib.apply.tagger.load_tagger` takes
    them; nothing is the shipped adapter (chemicals and diseases). The model is loaded anew (some seconds): for many
    calls, ``tagger = load_tagger()`` once, and ``tagger.predict(texts)``.

    >>> [mention.text for mention in predict("Aspirin can trigger asthma attacks .")]  # doctest: +SKIP
    ['Aspirin', 'asthma']
    """
    from biomerge_lib.apply.tagger import load_tagger

    return load_tagger(**model).predict(texts, threshold=threshold, spaced=spaced)


def __getattr__(name: str) -> Any:
    if name != "load_tagger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from biomerge_lib.apply.tagger import load_tagger

    return load_tagger
