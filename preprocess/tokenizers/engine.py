"""What turns documents into tokens: the tokenizer itself, or gigatoken where it is proven to give the same.

gigatoken (MIT) is many times faster and young. It is used for the encodings
below, whose tokens were compared on whole corpora, and while it runs about one
document in a thousand is tokenised by tiktoken too. One difference, and it is
not used any more; whoever writes the shard writes it again.
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
from amlaunch.preprocess.tokenizers.tokenizer import TiktokenTokenizer, Tokenizer, repaired
from amlaunch.recipes.errors import BadInput

PROVEN = {"gpt2": "gpt2", "r50k_base": "gpt2"}
"""Encodings for which the tokens are known to be equal, and what gigatoken calls their pattern."""
EVERY = 1000
"""Documents of which one is compared, the first of each shard besides."""


class Differs(Exception):
    """The fast engine gave other tokens than the reference."""


class Engine:
    """Tokenises documents, BOS first unless ``bos`` is false."""

    def __init__(self, tokenizer: Tokenizer, bos: bool = True, fast: Callable[[str], Any] | None = None):
        self.tokenizer = tokenizer
        self.fast = fast
        self.bos = bos
        self.compared = 0
        """Documents that both engines tokenised."""
        self._until = 0
        self._dtype = tokenizer.dtype  # made anew at each look

    def begin_shard(self) -> None:
        """Compare the next document in any case."""
        self._until = 0

    def encode_document(self, text: str) -> Tokens:
        """The document's tokens. Raises Differs where the fast engine is found out."""
        ids = self.tokenizer.ids(text) if self.fast is None else self._fast_ids(self.fast, text)
        if not self.bos:
            return ids.astype(self._dtype, copy=False)
        tokens = np.empty(len(ids) + 1, dtype=self._dtype)
        tokens[0] = self.tokenizer.bos
        tokens[1:] = ids
        return tokens

    def _fast_ids(self, fast: Callable[[str], Any], text: str) -> npt.NDArray[Any]:
        try:
            found: npt.NDArray[Any] = fast(text)
        except (TypeError, UnicodeEncodeError):  # lone surrogates
            found = fast(repaired(text))
        self._until -= 1
        if self._until < 0:
            self._until = EVERY
            self.compared += 1
            if not np.array_equal(found, self.tokenizer.ids(text)):
                self.fast = None
                raise Differs
        return found


def choose(name: str, tokenizer: Tokenizer) -> str:
    """The engine to use where the recipe says ``name``. Raises BadInput for gigatoken where it cannot be used."""
    installed = importlib.util.find_spec("gigatoken") is not None
    if name == "gigatoken" and tokenizer.name not in PROVEN:
        raise BadInput(
            f"preprocess.engine: gigatoken is used for {', '.join(PROVEN)} alone, not for {tokenizer.name}; write auto"
        )
    if name == "gigatoken" and not installed:
        raise BadInput('preprocess.engine: gigatoken is not installed: pip install "amlaunch[fast]", or write auto')
    usable = installed and tokenizer.name in PROVEN
    return "gigatoken" if usable and name != "tiktoken" else "tiktoken"


def open_engine(name: str, tokenizer: Tokenizer, bos: bool) -> Engine:
    """An engine of the kind that :func:`choose` gave, for this process."""
    if name == "gigatoken" and isinstance(tokenizer, TiktokenTokenizer):
        return Engine(tokenizer, bos, load_gigatoken(tokenizer))
    return Engine(tokenizer, bos)


def load_gigatoken(tokenizer: TiktokenTokenizer) -> Callable[[str], Any]:
    """gigatoken's ``encode`` with the very merge ranks of ``tokenizer``, and no special tokens: in a text they are text."""
    import gigatoken

    ranks = sorted(tokenizer.parts["mergeable_ranks"].items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))
        encode: Callable[[str], Any] = gigatoken.Tokenizer.from_tiktoken(
            path, pretokenizer=PROVEN[tokenizer.name]
        ).encode
    return encode
