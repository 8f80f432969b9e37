"""The command line of ``amlaunch preprocess`` and ``amlaunch data``: the launcher knows it, preprocess carries it out.

Every option of ``preprocess`` is a key of the recipe's section with dashes for
underscores; names and meanings are those of the guide's processor where it has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from amlaunch.recipes.errors import BadInput, did_you_mean

PREPROCESS: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"metavar": "NAME"}, "dataset on the Hugging Face hub, or a local dataset folder"),
    "set_name": ({"metavar": "SET"}, "configuration of the dataset, such as sample-10BT"),
    "split": ({}, "split of the dataset (train)"),
    "revision": ({"metavar": "COMMIT"}, "commit, tag or branch of the dataset"),
    "data_files": ({"metavar": "GLOB", "nargs": "+"}, "local .parquet, .jsonl, .jsonl.gz, .jsonl.zst or text files"),
    "exclude": ({"metavar": "GLOB", "nargs": "+"}, "files to leave out"),
    "data_cache_dir": ({"metavar": "DIR"}, "download files of the hub into DIR before they are read"),
    "text_column": ({"metavar": "NAME"}, "column that holds the text (text)"),
    "encoding": ({"metavar": "NAME"}, "of text files (utf-8)"),
    "encoding_errors": (
        {"choices": ["strict", "replace", "skip"]},
        "what a file that cannot be decoded means (strict)",
    ),
    "on_error": ({"choices": ["fail", "skip"]}, "what a damaged record or file means (fail)"),
    "tokenizer": (
        {"metavar": "NAME"},
        "an encoding of tiktoken (gpt2), byte, char:FILE, or a folder with a tokenizer.json",
    ),
    "engine": ({"choices": ["auto", "tiktoken", "gigatoken"]}, "what tokenises; the tokens are the same (auto)"),
    "max_tokens": ({"metavar": "N"}, "tokens in all, such as 500M or 10B (all there are)"),
    "val_tokens": ({"metavar": "N"}, "of which so many, at least, are for validation (0)"),
    "shard_tokens": ({"metavar": "N"}, "the most tokens of a shard (100M)"),
    "parts": ({"metavar": "N", "type": int}, "pieces of the source that are worked on independently (by size)"),
    "num_workers": ({"metavar": "N", "type": int}, "processes (one a CPU)"),
    "chunk_size": ({"metavar": "N", "type": int}, "the most rows that are read at once (256)"),
    "format": (
        {"choices": ["bin", "raw"]},
        "raw: also train.bin and val.bin without headers, as nanoGPT reads them (bin)",
    ),
    "output_dir": ({"metavar": "DIR"}, "where the shards go (data/ and a name made of what is in them)"),
}
SHORT = {"max_tokens": ("-m", "--max_tokens")}
"""As the guide's processor spells them too."""


def add_preprocess_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``amlaunch preprocess``."""
    parser.add_argument("recipe", nargs="?", help="a recipe whose preprocess section is meant; options change its keys")
    for key, (how, text) in PREPROCESS.items():
        names = [f"--{key.replace('_', '-')}", *SHORT.get(key, ())]
        parser.add_argument(*names, dest=key, help=text, **how)
    parser.add_argument(
        "--no-bos",
        dest="bos",
        action="store_const",
        const=False,
        help="no beginning-of-sequence token before each document",
    )
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="let _target_ reach NAME too"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``amlaunch data``."""
    what = parser.add_subparsers(dest="what", required=True, metavar="inspect|verify|peek")
    inspect = what.add_parser(
        "inspect",
        help="counts, tokenizer, shards and statistics of a folder of shards, or of one .bin file",
        allow_abbrev=False,
    )
    verify = what.add_parser("verify", help="read every byte and hold it against the manifest", allow_abbrev=False)
    peek = what.add_parser(
        "peek", help="print the text of a document, or of the tokens at an offset", allow_abbrev=False
    )
    for parser_ in (inspect, verify, peek):
        parser_.add_argument(
            "dir",
            metavar="DIR",
            help="folder of shards, with its manifest.json" + ("" if parser_ is verify else ", or a .bin file"),
        )
        parser_.add_argument("--json", action="store_true", help="as JSON")
    peek.add_argument("--split", choices=["train", "val"], default="train")
    place = peek.add_mutually_exclusive_group()
    place.add_argument("--document", type=int, metavar="N", help="the N-th document of the split, from 0 (default: 0)")
    place.add_argument("--token", type=int, metavar="OFFSET", help="the tokens of the split from OFFSET on")
    peek.add_argument("--tokens", type=int, default=200, metavar="N", help="the most tokens to show (200)")
    peek.add_argument("--tokenizer", metavar="NAME", help="for a .bin file, whose header does not say (gpt2)")


def refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raise BadInput, with the nearest name, for an option that ``parser`` does not know."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise BadInput(
                f"unknown option {name}; {did_you_mean(name, [name for name in known if name.startswith('--')])}"
            )
