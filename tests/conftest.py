"""What all tests share."""

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
    import setuptools  # noqa: F401  # torch's compiler takes its distutils, which must come before Python's own in a process
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores Ctrl-C, and so would all that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small processes on few cores
for name in ("AMLAUNCH_RUNS", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist, which keeps the tests of a file together and gives files out in this order.

    Files on a cluster mostly wait and take longest: they begin first, in turn with those that compute;
    what has no slow tests fills in at the end.
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
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm cluster. AMLAUNCH_KEEP_CLUSTER=1 leaves it up for the next session."""
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
    """After each test that uses the cluster: no job is left, and what the test broke works again."""
    used = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if used:
        used.tidy()
