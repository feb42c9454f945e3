"""Knows a saved ``tokenizer.json`` without transformers, which imports torch.

So preflight and the scoring of a served model start in 0.4 s of CPU time instead of 5. The ids are the same, because
both are the ``tokenizers`` library underneath (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer

from biomerge_lib.core.errors import ModelError
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.prompts.tokenizer import check_tokenizer


class PlainTokenizer:
    """``PreTrainedTokenizerFast`` reduced to encoding texts, decoding, and the ids of EOS and pad."""

    def __init__(self, folder: Path):
        config = read_values(folder / "tokenizer_config.json", OBJECT, raises=ModelError)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # check_tokenizer refuses None.
        self.eos_token_id = cast(int, self._id_of(config.get("eos_token")))
        self.pad_token_id = cast(int, self._id_of(config.get("pad_token")))

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, list]:
        texts = [text] if isinstance(text, str) else list(text)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        columns: dict[str, list] = {"input_ids": [encoding.ids for encoding in encoded]}
        if return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets for encoding in encoded]
        return {name: column[0] for name, column in columns.items()} if isinstance(text, str) else columns

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return len(self.get_vocab())

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def _id_of(self, token: str | dict | None) -> int | None:
        content = token["content"] if isinstance(token, dict) else token
        return None if content is None else self._tokenizer.token_to_id(content)


def load_plain_tokenizer(folder: Path | str) -> PlainTokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: the folder has no tokenizer, it cannot be read, or the five tokens or EOS are missing.
    """
    folder = Path(folder)
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: no tokenizer here ({', '.join(missing)} missing). Run 01_tokenizer first (`python -m "
            f"biomerge_lib run 01_tokenizer tokenizer_dir={folder}`, with the training's model=); to score a model, "
            "name its merged folder."
        )
    try:
        tokenizer = PlainTokenizer(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error}).") from None
    check_tokenizer(tokenizer, str(folder))
    return tokenizer
