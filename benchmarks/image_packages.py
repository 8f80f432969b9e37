"""Measure the cost of packages that an image lacks: finding them, and copying them into the code snapshot.

Usage: python benchmarks/image_packages.py

Prints CPU milliseconds, the best of several tries. The first look is the one
after a package was installed; later looks use a cache.
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
    """Return the CPU milliseconds of the fastest try."""
    times = []
    for _ in range(tries):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    """Print one line per measurement."""
    with tempfile.TemporaryDirectory() as temp:
        os.environ["XDG_CACHE_HOME"] = temp
        from amlaunch.containers.images.image_facts import facts_from_name
        from amlaunch.launcher.runs.packages import packages_for_image, required_packages, resolve
        from amlaunch.launcher.runs.snapshot import take_snapshot
        from amlaunch.recipes.format.loader import load
        from amlaunch.recipes.shipped import shipped_recipes

        for recipe in ("quickstart", "llama-350m"):
            wants, facts = required_packages(load(shipped_recipes()[recipe]), STAGES), facts_from_name(IMAGE)
            first = best(lambda wants=wants, facts=facts: resolve(wants, facts), 3)
            packages_for_image(wants, facts)
            again = best(lambda wants=wants, facts=facts: packages_for_image(wants, facts))
            print(f"{recipe:12} packages that the image lacks: first look {first:.1f} ms, later {again:.1f} ms")

        packages = packages_for_image(
            required_packages(load(shipped_recipes()["quickstart"]), STAGES), facts_from_name(IMAGE)
        )
        code = Path(temp) / "code"

        def snapshot(with_packages: bool) -> None:
            shutil.rmtree(code, ignore_errors=True)
            take_snapshot(code, None, packages if with_packages else None)

        without_packages, with_packages = best(lambda: snapshot(False)), best(lambda: snapshot(True))
        names = ", ".join(package.name for package in packages.copied)
        print(
            f"code snapshot: {without_packages:.1f} ms without packages, "
            f"{with_packages:.1f} ms with {len(packages.files())} files of {names}"
        )


if __name__ == "__main__":
    main()
