"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import pytest
from slurm_cluster import Cluster

with suppress(ImportError):
    # torch's compiler uses its distutils, which a process must import before Python's own.
    import setuptools  # noqa: F401
# A background job of a shell ignores Ctrl-C, and so would all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Many small processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("AMLAUNCH_RUNS", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files for pytest-xdist, which keeps the tests of a file together and distributes files in this order.

    Files that use the cluster mostly wait and take longest: they come first, alternating with files that compute.
    Files without slow tests fill in at the end.
    """
    clusters = Counter(item.path for item in items if "cluster" in getattr(item, "fixturenames", ()))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    waiting = sorted(clusters, key=lambda path: -clusters[path])
    computing = sorted((path for path in slow if path not in clusters), key=lambda path: -slow[path])
    pairs = [path for pair in zip_longest(waiting, computing) for path in pair if path]
    place = {path: i for i, path in enumerate(pairs)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture
def root() -> Path:
    """Return the root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start a real Slurm cluster. AMLAUNCH_KEEP_CLUSTER=1 keeps it for the next session."""
    obstacle = Cluster.obstacle()
    if obstacle and os.environ.get("CI") == "true":
        pytest.fail(f"the Slurm tests must run here: {obstacle}")
    if obstacle:
        pytest.skip(obstacle)
    cluster = Cluster()
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down(keep=os.environ.get("AMLAUNCH_KEEP_CLUSTER") == "1")


@pytest.fixture(autouse=True)
def tidy_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel all jobs and repair what the test broke, after each test that uses the cluster."""
    used = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if used:
        used.tidy()
