"""Engines that tokenise documents: the tokenizer itself, or gigatoken where it is proven to give the same tokens.

gigatoken (MIT) is many times faster and young. It is used for the encodings below, whose tokens were compared on entire
corpora; and while it runs, tiktoken tokenises about one document in a thousand too. After a single difference it is not
used again, and the writer of the shard starts it over.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amlaunch.preprocess.shards.shard_format import Tokens
from amlaunch.preprocess.tokenizers.tokenizer import TiktokenTokenizer, Tokenizer, repair_surrogates
from amlaunch.recipes.errors import BadInput

GIGATOKEN_PRETOKENIZERS = {"gpt2": "gpt2", "r50k_base": "gpt2"}
"""Encodings for which gigatoken gives the same tokens -> gigatoken's name for their pattern."""
CHECK_INTERVAL = 1000
"""One document in this many is compared, and also the first of each shard."""


class TokenMismatch(Exception):
    """The fast engine and the reference gave different tokens."""


class Engine:
    """A tokeniser of documents that puts BOS first unless ``bos`` is false."""

    def __init__(self, tokenizer: Tokenizer, bos: bool = True, fast_encode: Callable[[str], Any] | None = None):
        self.tokenizer = tokenizer
        self.fast_encode = fast_encode
        self.bos = bos
        self.compared = 0
        """Documents that both engines tokenised."""
        self._documents_until_check = 0
        # The property makes a new object at each access.
        self._dtype = tokenizer.dtype

    def begin_shard(self) -> None:
        """Compare the next document in any case."""
        self._documents_until_check = 0

    def encode_document(self, text: str) -> Tokens:
        """Return the document's tokens. Raises TokenMismatch if a comparison finds a difference."""
        encode = self.fast_encode
        ids = self.tokenizer.token_ids(text) if encode is None else self._checked_ids(encode, text)
        if not self.bos:
            return ids.astype(self._dtype, copy=False)
        tokens = np.empty(len(ids) + 1, dtype=self._dtype)
        tokens[0] = self.tokenizer.bos
        tokens[1:] = ids
        return tokens

    def _checked_ids(self, encode: Callable[[str], Any], text: str) -> npt.NDArray[Any]:
        try:
            ids: npt.NDArray[Any] = encode(text)
        except (TypeError, UnicodeEncodeError):
            # Lone surrogates.
            ids = encode(repair_surrogates(text))

        self._documents_until_check -= 1
        if self._documents_until_check < 0:
            self._documents_until_check = CHECK_INTERVAL
            self.compared += 1
            if not np.array_equal(ids, self.tokenizer.token_ids(text)):
                self.fast_encode = None
                raise TokenMismatch
        return ids


def choose_engine(name: str, tokenizer: Tokenizer) -> str:
    """Return the engine to use for ``preprocess.engine: name``. Raises BadInput if gigatoken cannot be used."""
    supported = tokenizer.name in GIGATOKEN_PRETOKENIZERS
    installed = importlib.util.find_spec("gigatoken") is not None
    if name == "gigatoken" and not supported:
        raise BadInput(
            f"preprocess.engine: gigatoken supports only {', '.join(GIGATOKEN_PRETOKENIZERS)}, not {tokenizer.name}; "
            f"set it to auto"
        )
    if name == "gigatoken" and not installed:
        raise BadInput(
            'preprocess.engine: gigatoken is not installed. Run pip install "amlaunch[fast]", or set it to auto'
        )
    return "gigatoken" if supported and installed and name != "tiktoken" else "tiktoken"


def open_engine(name: str, tokenizer: Tokenizer, bos: bool) -> Engine:
    """Create an engine of the type that :func:`choose_engine` returned, for this process."""
    if name == "gigatoken" and isinstance(tokenizer, TiktokenTokenizer):
        return Engine(tokenizer, bos, load_gigatoken(tokenizer))
    return Engine(tokenizer, bos)


def load_gigatoken(tokenizer: TiktokenTokenizer) -> Callable[[str], Any]:
    """Return gigatoken's ``encode`` with the merge ranks of ``tokenizer`` and no special tokens: they are text."""
    import gigatoken

    ranks = sorted(tokenizer.vocabulary["mergeable_ranks"].items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))
        pretokenizer = GIGATOKEN_PRETOKENIZERS[tokenizer.name]
        encode: Callable[[str], Any] = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=pretokenizer).encode
    return encode
