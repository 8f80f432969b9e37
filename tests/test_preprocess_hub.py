"""The Hugging Face hub as a source, against a server on this machine that fails on purpose."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amlaunch.preprocess.errors import ExternalFailure
from amlaunch.preprocess.sources.remote_file import MAX_ATTEMPTS, RangeReader, RemoteFile, backoff
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.recipes.errors import BadInput
from tests.fake_hub import COMMIT, REPO, Fault, Hub, break_off, ignore_the_range, refuse, serving
from tests.preprocess_helpers import documents

ROOT = Path(__file__).parent.parent
CONTENT = bytes(i * i % 251 for i in range(3_000_000))


def remote(hub: Hub, cache_path: Path | None = None, name: str = "a.bin") -> RemoteFile:
    return RemoteFile(f"{hub.url}/datasets/{REPO}/resolve/{COMMIT}/{name}", name, len(CONTENT), cache_path, "hf_secret")


@pytest.mark.parametrize(
    ("faults", "waits"),
    [
        ([], []),
        ([refuse(503), refuse(500)], [0.5, 1.0]),
        ([refuse(429, Retry_After="7")], [7.0]),
        ([break_off(1000), break_off(0), break_off(2_000_000)], [0.5, 0.5, 0.5]),
        ([break_off(5000), ignore_the_range], [0.5]),
        ([break_off(10), refuse(429, Retry_After="3"), refuse(502), break_off(10)], [0.5, 3.0, 1.0, 0.5]),
    ],
)
def test_whatever_the_server_does_the_bytes_come_once_and_in_order(faults: list[Fault], waits: list[float]) -> None:
    waited: list[float] = []
    with serving(Hub({"a.bin": CONTENT})) as hub:
        hub.faults = list(faults)
        reader = RangeReader(remote(hub), waited.append)
        data = io.BufferedReader(reader, 1 << 16).read()
        assert data == CONTENT
        begins = [begin for _, begin in hub.requests]
        assert begins == sorted(begins), "it goes on where it stopped, never from the start"
    assert hub.tokens == {"Bearer hf_secret"}
    assert len(waited) >= len(waits) and all(
        0.5 * wait <= found <= 2 * wait for wait, found in zip(waits, waited, strict=False)
    )


def test_any_range_is_read(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": CONTENT})) as hub, remote(hub).open() as handle:
        for begin, size in ((2_999_990, 100), (0, 5), (1_500_000, 70_000), (5, 5)):
            handle.seek(begin)
            assert handle.read(size) == CONTENT[begin : begin + size]
        handle.seek(-3, io.SEEK_END)
        assert (handle.read(), handle.read(1)) == (CONTENT[-3:], b"")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (refuse(404), BadInput, "404 .*the file does not exist, or you have no access"),
        (refuse(403), BadInput, "HF_TOKEN"),
        (refuse(418), ExternalFailure, "418"),
        (refuse(503), ExternalFailure, f"{MAX_ATTEMPTS} requests in a row failed"),
    ],
)
def test_what_waiting_cannot_mend_is_said(fault: Fault, error: type[Exception], message: str) -> None:
    with serving(Hub({"a.bin": CONTENT})) as hub:
        hub.faults = [fault] * MAX_ATTEMPTS
        with pytest.raises(error, match=message):
            RangeReader(remote(hub), lambda seconds: None).read(10)
        assert len(hub.requests) == (MAX_ATTEMPTS if "in a row" in message else 1)


def test_waits_double_are_scattered_and_end(tmp_path: Path) -> None:
    waits = [[backoff(attempt) for _ in range(50)] for attempt in range(MAX_ATTEMPTS)]
    assert all(len(set(some)) > 40 for some in waits)
    assert max(waits[0]) <= 0.5 and 0.5 <= min(waits[1]) * 1.01 <= 1.01 and max(waits[-1]) <= 90
    assert sum(map(min, waits)) > 120 and sum(map(max, waits)) < 900


def test_a_download_goes_on_where_a_killed_one_stopped_and_is_kept(tmp_path: Path) -> None:
    cache_path = tmp_path / "cache" / "a.bin"
    cache_path.parent.mkdir()
    cache_path.with_name("a.bin.incomplete").write_bytes(CONTENT[:1_000_000])
    with serving(Hub({"a.bin": CONTENT})) as hub:
        for _ in range(2):
            with remote(hub, cache_path).open() as handle:
                assert handle.read() == CONTENT
        assert hub.requests == [("a.bin", 1_000_000)]


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), buffer, row_group_size=50)
    return buffer.getvalue()


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_read_through_its_failures_in_order(tmp_path: Path) -> None:
    """The real way: ``datasets`` finds the files over the hub's own interface, workers read their row groups."""
    files = {
        f"data/train-{i:05d}-of-00002.parquet": parquet([f"{i} {j} {'word ' * 200}" for j in range(300)])
        for i in range(2)
    }
    hub, gpt2 = Hub({**files, "README.md": b"a dataset"}), load_tokenizer("gpt2")

    def made(name: str, dataset: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HOME": str(tmp_path / f"home-{name}"),
            "HF_TOKEN": "hf_secret",
        }
        options = [
            "--dataset",
            dataset,
            "--output-dir",
            str(tmp_path / name),
            "--num-workers",
            "2",
            "--parts",
            "4",
            "--max-tokens",
            "50K",
        ]
        return subprocess.run(
            [sys.executable, "-m", "amlaunch.preprocess", *options, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    with serving(hub):
        hub.faults = [refuse(503), break_off(100), refuse(429, Retry_After="1"), break_off(3000), ignore_the_range]
        streamed = made("streamed", REPO)
        assert streamed.returncode == 0 and not hub.faults, streamed.stderr
        assert hub.tokens == {"Bearer hf_secret"} and "hf_secret" not in streamed.stdout + streamed.stderr
        requests = len(hub.requests)
        cached = made("cached", REPO, "--data-cache-dir", str(tmp_path / "cache"))
        assert cached.returncode == 0, cached.stderr
        assert len(hub.requests) - requests <= len(files), "each file once"
    expected = [
        token for i in range(2) for j in range(300) for token in (50256, *gpt2.encode(f"{i} {j} {'word ' * 200}"))
    ][:50_000]
    for name in ("streamed", "cached"):
        assert [token for document in documents(tmp_path / name) for token in document] == expected
