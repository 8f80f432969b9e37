"""Define the command line of ``amlaunch preprocess`` and ``amlaunch data``: the launcher parses, preprocess runs it.

Every option of ``preprocess`` is a key of the recipe's section, with dashes for underscores. Names and meanings follow
the processor of NeMo AutoModel's guide if it has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.suggestions import did_you_mean

PREPROCESS_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"metavar": "NAME"}, "dataset on the Hugging Face hub, or a local dataset folder"),
    "set_name": ({"metavar": "SET"}, "configuration of the dataset, such as sample-10BT"),
    "split": ({}, "split of the dataset (train)"),
    "revision": ({"metavar": "COMMIT"}, "commit, tag or branch of the dataset"),
    "data_files": ({"metavar": "GLOB", "nargs": "+"}, "local .parquet, .jsonl, .jsonl.gz, .jsonl.zst or text files"),
    "exclude": ({"metavar": "GLOB", "nargs": "+"}, "files to skip"),
    "data_cache_dir": ({"metavar": "DIR"}, "download the hub's files into DIR before reading them"),
    "text_column": ({"metavar": "NAME"}, "column with the text (text)"),
    "encoding": ({"metavar": "NAME"}, "encoding of text files (utf-8)"),
    "encoding_errors": (
        {"choices": ["strict", "replace", "skip"]},
        "if a file cannot be decoded: fail, replace the bytes, or skip the file (strict)",
    ),
    "on_error": ({"choices": ["fail", "skip"]}, "if a record or file is damaged: fail, or skip it (fail)"),
    "tokenizer": (
        {"metavar": "NAME"},
        "a tiktoken encoding (gpt2), byte, char:FILE, or a folder with a tokenizer.json",
    ),
    "engine": (
        {"choices": ["auto", "tiktoken", "gigatoken"]},
        "tokenising library; the tokens are the same (auto)",
    ),
    "max_tokens": ({"metavar": "N"}, "total tokens, such as 500M or 10B (all of the source)"),
    "val_tokens": ({"metavar": "N"}, "minimum validation tokens, part of the total (0)"),
    "shard_tokens": ({"metavar": "N"}, "maximum tokens of a shard (100M)"),
    "parts": ({"metavar": "N", "type": int}, "parts of the source to process independently (by size)"),
    "num_workers": ({"metavar": "N", "type": int}, "processes (one per CPU)"),
    "chunk_size": ({"metavar": "N", "type": int}, "maximum rows to read at once (256)"),
    "format": (
        {"choices": ["bin", "raw"]},
        "raw also writes train.bin and val.bin without headers, as nanoGPT reads them (bin)",
    ),
    "output_dir": ({"metavar": "DIR"}, "folder for the shards (data/NAME, named by a fingerprint)"),
}
"""Key of the section -> argparse settings and help text."""
SHORT_OPTIONS = {"max_tokens": ("-m", "--max_tokens")}
"""Spellings of the guide's processor."""
OTHER_OPTIONS = ("--no-bos", "--allow-target", "--json", "--help")
"""Options that set no key, or set it in another way."""


def add_preprocess_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``amlaunch preprocess``."""
    parser.add_argument("recipe", nargs="?", help="recipe with a preprocess section; options change its keys")
    for key, (settings, text) in PREPROCESS_OPTIONS.items():
        names = [f"--{key.replace('_', '-')}", *SHORT_OPTIONS.get(key, ())]
        parser.add_argument(*names, dest=key, help=text, **settings)
    parser.add_argument(
        "--no-bos",
        dest="bos",
        action="store_const",
        const=False,
        help="do not begin each document with a beginning-of-sequence token",
    )
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="allow _target_ to name NAME too"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``amlaunch data``."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="inspect|verify|peek")
    inspect = commands.add_parser(
        "inspect",
        help="show counts, tokenizer, shards and statistics of a folder of shards, or of one .bin file",
        allow_abbrev=False,
    )
    verify = commands.add_parser("verify", help="read every byte and compare it with the manifest", allow_abbrev=False)
    peek = commands.add_parser(
        "peek", help="print the text of a document, or of the tokens at an offset", allow_abbrev=False
    )
    for command in (inspect, verify, peek):
        or_file = "" if command is verify else ", or a .bin file"
        command.add_argument("dir", metavar="DIR", help=f"folder of shards with its manifest.json{or_file}")
        command.add_argument("--json", action="store_true", help="print JSON")
    peek.add_argument("--split", choices=["train", "val"], default="train")
    position = peek.add_mutually_exclusive_group()
    position.add_argument("--document", type=int, metavar="N", help="document N of the split, from 0 (default: 0)")
    position.add_argument("--token", type=int, metavar="OFFSET", help="tokens of the split from OFFSET on")
    peek.add_argument("--tokens", type=int, default=200, metavar="N", help="maximum tokens to show (200)")
    peek.add_argument("--tokenizer", metavar="NAME", help="tokenizer of a .bin file, whose header has none (gpt2)")


def refuse_unknown_options(argv: Sequence[str]) -> None:
    """Raise BadInput with the nearest name for an option that ``amlaunch preprocess`` does not have."""
    long_names = [f"--{key.replace('_', '-')}" for key in PREPROCESS_OPTIONS] + list(OTHER_OPTIONS)
    valid = {*long_names, *(name for names in SHORT_OPTIONS.values() for name in names)}
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in valid:
            raise BadInput(f"unknown option {name}; {did_you_mean(name, long_names)}")
