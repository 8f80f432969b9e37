"""The distribution installs one import package, ``amlaunch``, and works beside others that own our old names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"launcher", "trainer", "preprocess", "containers", "recipes"}
TINY = """\
preprocess: {data_files: "text/*.txt", tokenizer: byte, max_tokens: 2K, val_tokens: 200, num_workers: 1}
model:
  _target_: trainer.models.gpt2.build_gpt2_model
  vocab_size: 257
  n_positions: 16
  n_embd: 16
  n_layer: 1
  n_head: 2
dataset: {seq_len: 16}
step_scheduler: {local_batch_size: 2, max_steps: 2, val_batches: 1}
distributed: {strategy: none}
resources: {train: {gpus_per_node: 0}}
export: null
"""


def copy_of_the_sources(target: Path) -> Path:
    """Copy what git tracks, links as links, to a folder of another name: a build leaves files beside its sources."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(names).split("\0")):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    return target


def run(*argv: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program without the variables that would lead it back to this checkout."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AMLAUNCH_"))}
    done = subprocess.run(
        list(map(str, argv)), cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done


def dummy_wheel(folder: Path, name: str, package: str) -> Path:
    """Write a wheel of a foreign distribution that owns a top-level package."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{package}/__init__.py": f"OWNER = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_of_the_sources(folder / "a checkout of any name")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", cwd=sources)
    (built,) = folder.glob("amlaunch-*.whl")
    return built


def top_level_names(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_all_its_parts(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert top_level_names(names) == {"amlaunch"}
    assert {name.split("/")[1] for name in names if name.count("/") > 1 and name.startswith("amlaunch/")} == PARTS
    data = (
        "py.typed",
        "recipes/quickstart.yaml",
        "containers/Dockerfile",
        "containers/runtimes/enroot_scripts/exec.sh",
    )
    assert {f"amlaunch/{name}" for name in data} <= set(names)
    tracked = subprocess.run(["git", "ls-files", *PARTS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = {f"amlaunch/{name}" for name in tracked.split() if name.endswith(".py") and (ROOT / name).exists()}
    assert modules <= set(names)


@pytest.mark.slow
def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "sources")
    tool = tmp_path / "tool"
    run(sys.executable, "-m", "venv", tool, cwd=tmp_path)
    run(tool / "bin" / "python", "-m", "pip", "install", "-q", "setuptools>=68", cwd=tmp_path)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(tool / "bin" / "python", "-c", build, cwd=sources)
    (archive,) = tmp_path.glob("amlaunch-*.tar.gz")
    with tarfile.open(archive) as sdist:
        assert not [member.name for member in sdist if member.issym() or member.islnk()]
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "again", archive, cwd=tmp_path)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_it_runs_outside_a_checkout_beside_packages_with_our_old_names(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python, amlaunch = environment / "bin" / "python", environment / "bin" / "amlaunch"
    foreign = [dummy_wheel(tmp_path, "foreign_tuner", "recipes"), dummy_wheel(tmp_path, "foreign_coach", "trainer")]
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, *foreign, cwd=tmp_path)
    site = next((environment / "lib").glob("python*/site-packages"))
    # Dependencies come from the environment of the tests; .pth files there, such as ours, are not followed from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    (work / "tiny.yaml").write_text(TINY)
    (work / "text").mkdir()
    for i in range(8):
        (work / "text" / f"{i}.txt").write_text("to be or not to be, that is the question\n" * 10)
    # A user's own modules beside the recipe stay the user's.
    (work / "trainer.py").write_text("raise SystemExit('the wrong trainer')\n")

    shown = run(amlaunch, "show", "quickstart", cwd=work)
    assert "amlaunch.trainer.models.gpt2.build_gpt2_model" in shown.stdout
    place = run(python, "-P", "-c", "import amlaunch; print(amlaunch.__file__)", cwd=work).stdout
    assert Path(place.strip()).is_relative_to(environment)
    run(amlaunch, "local", "tiny.yaml", cwd=work, OMP_NUM_THREADS="1")
    (checkpoint,) = (work / "runs").glob("tiny-*/checkpoints/*/step-*2")
    assert checkpoint.is_dir()
    owners = run(python, "-P", "-c", "import recipes, trainer; print(recipes.OWNER, trainer.OWNER)", cwd=work).stdout
    assert owners.split() == ["foreign_tuner", "foreign_coach"]
