"""Knows tokenizers: adds the five BioMerge tokens once and saves the folder; knows nothing of weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ADDED_TOKENS = ("<NER>", "<TAG>", "<O>", "<B>", "<I>")
# All of such a tokenizer is in tokenizer.json.
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
NOT_NEEDED = ("scipy", "sklearn", "torchao")


def import_transformers() -> None:
    """Let transformers find itself without the packages that it imports only because they are there (2 s).

    Whoever imports them later gets them. Where transformers is imported already (Unsloth does), or a release asks
    in another way, nothing changes.
    """
    if "transformers" in sys.modules:
        return
    hidden = [name for name in NOT_NEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        utils = importlib.import_module("transformers.utils")
        for name in NOT_NEEDED:
            getattr(utils, f"is_{name}_available", bool)()  # remembers its answer
    finally:
        for name in hidden:
            del sys.modules[name]


def add_biomerge_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add the five tokens that are missing and set pad to EOS; return how many were added.

    They are ordinary added tokens, not special ones: decoding with ``skip_special_tokens`` keeps them.

    Raises:
        ModelError: the tokenizer has no EOS token, or is not a fast one (no character offsets).
    """
    from transformers import AddedToken

    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: a fast tokenizer is needed (character offsets of tokens).")
    if tokenizer.eos_token is None:
        raise ModelError(f"{name}: the tokenizer has no EOS token; answers could never end.")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ADDED_TOKENS if token not in vocabulary]
    added = tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False
    return added


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path | str) -> None:
    """Save a tokenizer with the five tokens; :func:`load_tokenizer` reads it back."""
    check_tokenizer(tokenizer, str(folder))
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer and check that it can be used.

    Raises:
        ModelError: the folder has no tokenizer, or the five tokens or EOS are missing.
    """
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(
            f"{folder}: no tokenizer here (tokenizer_config.json is missing). "
            "notebooks/01_tokenizer.ipynb writes one; or set tokenizer_dir."
        )
    import_transformers()
    import transformers

    config = read_values(folder / "tokenizer_config.json", OBJECT, raises=ModelError)
    # AutoTokenizer comes to the same class, and imports generation and torch's compiler on the way (3 s).
    is_generic = config.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in config
    loader: Any = transformers.PreTrainedTokenizerFast if is_generic else transformers.AutoTokenizer
    tokenizer = loader.from_pretrained(folder)
    check_tokenizer(tokenizer, str(folder))
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise ModelError unless each of the five tokens is one id and prompts do not end with EOS.

    ``tokenizer`` is one of transformers or a ``PlainTokenizer``, which stands downstream of this module.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ADDED_TOKENS if token not in vocabulary]
    again = "run notebooks/01_tokenizer.ipynb."
    if missing:
        raise ModelError(f"{name}: tokens {', '.join(missing)} are missing; {again}")
    ids = {vocabulary[token] for token in ADDED_TOKENS}
    if shared := [word for word, index in vocabulary.items() if index in ids and word not in ADDED_TOKENS]:
        raise ModelError(
            f"{name}: one of the five tokens has the id of {shared[0]!r}, as the vocabulary has a hole before it. "
            "Number the tokens in tokenizer.json without gaps, or take another backbone."
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ModelError(f"{name}: EOS or pad token is not set; {again}")
    if tokenizer("<NER> x")["input_ids"][-1] == tokenizer.eos_token_id:
        raise ModelError(f"{name}: the tokenizer appends EOS to every text; prompts must stay open.")
