"""Write a tokenizer as the files that ``transformers.AutoTokenizer`` reads.

Format: ``tokenizer.json`` of Hugging Face's tokenizers (https://huggingface.co/docs/tokenizers). It is written without
that package, which training images may lack.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from amlaunch.preprocess.tokenizers.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharacterTokenizer,
    JsonTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from amlaunch.recipes.files import read_object, write_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COPIED_FILES = (TOKENIZER, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
UNKNOWN = "<|unknown|>"
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, context: int | None) -> None:
    """Write ``tokenizer`` into ``folder``, with the ids of the shards. ``context``: the model's number of positions."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, JsonTokenizer):
        for name in COPIED_FILES:
            if (tokenizer.file.parent / name).is_file():
                shutil.copyfile(tokenizer.file.parent / name, folder / name)
        shutil.copyfile(tokenizer.file, folder / TOKENIZER)
        config |= read_object(tokenizer.file.parent / TOKENIZER_CONFIG)
        bos, eot = (tokenizer.inner.id_to_token(token_id) for token_id in (tokenizer.bos, tokenizer.eot))
    else:
        write_json(folder / TOKENIZER, _json_of(tokenizer))
        bos = eot = END_OF_TEXT
    if isinstance(tokenizer, CharacterTokenizer):
        config["unk_token"] = UNKNOWN
    config |= {"bos_token": bos, "eos_token": eot}
    write_json(folder / TOKENIZER_CONFIG, config if context is None else {**config, "model_max_length": context})


def _json_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``."""
    special_tokens = {END_OF_TEXT: tokenizer.bos}
    decoder, pre_tokenizer = BYTE_LEVEL, BYTE_LEVEL
    if isinstance(tokenizer, TiktokenTokenizer):
        special_tokens = dict(tokenizer.vocabulary["special_tokens"])
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [_split(tokenizer.vocabulary["pat_str"]), BYTE_LEVEL]}
        model = _bpe(tokenizer.vocabulary["mergeable_ranks"])
    elif isinstance(tokenizer, ByteTokenizer):
        model = _bpe({bytes([byte]): byte for byte in range(256)})
    elif isinstance(tokenizer, CharacterTokenizer):
        special_tokens |= {UNKNOWN: len(tokenizer.characters)}
        pre_tokenizer, decoder = _split(r"[\s\S]"), {"type": "Fuse"}
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        model = {"type": "WordLevel", "vocab": vocabulary | special_tokens, "unk_token": UNKNOWN}
    else:
        raise TypeError(f"{type(tokenizer).__name__} has no tokenizer.json")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(*item) for item in sorted(special_tokens.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _split(pattern: str) -> dict[str, Any]:
    """Return the splitter of a text by ``pattern``, in which Oniguruma reads ``{1,3}+`` as a repeated ``{1,3}``."""
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _added_token(content: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _bpe(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """Return a byte-pair model with these tokens. ``ignore_merges``: like tiktoken, look a whole piece up first."""
    letters = _byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    merged_parts = (_merged_parts(token, ranks) for token in by_rank if len(token) > 1)
    merges = [[text(part) for part in parts] for parts in merged_parts if len(parts) == 2]
    vocabulary = {text(token): ranks[token] for token in by_rank}
    return {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges}


def _byte_letters() -> list[str]:
    """Return the visible character that stands for each byte in GPT-2's vocabulary file and its relatives.

    Visible bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    letters, following = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            letters.append(chr(byte))
        else:
            letters.append(chr(following))
            following += 1
    return letters


def _merged_parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the two parts that are merged into ``token``: what merges of lower ranks leave of its bytes.

    More than two for a token that no merge reaches.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks_of_pairs = [ranks.get(left + right) for left, right in pairwise(parts)]
        reachable = [(rank, i) for i, rank in enumerate(ranks_of_pairs) if rank is not None]
        if not reachable:
            break
        place = min(reachable)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
