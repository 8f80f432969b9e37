"""What a run in a stock image costs a submission: the look at what the image lacks, and its copies in the snapshot.

    python benchmarks/image_packages.py

CPU milliseconds, the best of several; the first look of all is the one after something was installed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
STAGES = ("preprocess", "verify", "train", "export")
IMAGE = "nvcr.io/nvidia/pytorch:25.08-py3"


def best(work: Callable[[], object], tries: int = 7) -> float:
    """CPU milliseconds of the quickest try."""
    times = []
    for _ in range(tries):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return 1e3 * min(times)


def main() -> None:
    """Print a line for each part."""
    with tempfile.TemporaryDirectory() as temp:
        os.environ["XDG_CACHE_HOME"] = temp
        from amlaunch.containers.images.image_facts import facts_from_name
        from amlaunch.launcher.runs.packages import inside, resolve, wanted
        from amlaunch.launcher.runs.snapshot import take_snapshot
        from amlaunch.recipes.format.loader import load
        from amlaunch.recipes.shipped import shipped_recipes

        for recipe in ("quickstart", "llama-350m"):
            wants, facts = wanted(load(shipped_recipes()[recipe]), STAGES), facts_from_name(IMAGE)
            first = best(lambda wants=wants, facts=facts: resolve(wants, facts), 3)
            inside(wants, facts)
            again = best(lambda wants=wants, facts=facts: inside(wants, facts))
            print(f"{recipe:12} what the image lacks: first {first:.1f} ms, again {again:.1f} ms")
        found = inside(wanted(load(shipped_recipes()["quickstart"]), STAGES), facts_from_name(IMAGE))
        code = Path(temp) / "code"

        def snapshot(with_packages: bool) -> None:
            shutil.rmtree(code, ignore_errors=True)
            take_snapshot(code, None, found if with_packages else None)

        bare, full = best(lambda: snapshot(False)), best(lambda: snapshot(True))
        print(
            f"snapshot: {bare:.1f} ms without packages, {full:.1f} ms with {len(found.files())} files of {', '.join(one.name for one in found.copied)}"
        )


if __name__ == "__main__":
    main()
