"""``amlaunch image check`` on a node of a real Slurm."""

from __future__ import annotations

import json
import os

import pytest
from container_image import bundle, obstacle
from slurm_cluster import Cluster
from slurm_runs import Place


@pytest.mark.slow
def test_an_image_is_looked_at_on_a_node(cluster: Cluster):
    """By srun, where the profile sends training; with GPUs asked for, on a node that has them."""
    missing = obstacle()
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    place = Place(cluster, "images", USER="lab")
    image = str(bundle())
    profile = {"container": {"runtime": "charliecloud"}, "setup": [f"touch {place.folder}/set-up"], "srun": ["--comment=looked at"]}
    place.write("clusters.yaml", json.dumps({"lab": profile}))
    seen = json.loads(place.amlaunch("image", "check", image, "--cluster", "lab", "--json").stdout)
    assert seen["runtime"] == "charliecloud" and (place.folder / "set-up").exists(), "as the site's profile has it"
    assert seen["host"].startswith("cpu") and seen["torch"]["version"] and seen["user"]["uid"] != 0 and seen["verdict"] == "warn"
    assert (place.folder / "images" / "checks").is_dir()
    oci = json.loads(place.amlaunch("image", "check", image, "--cluster", "lab", "--runtime", "slurm", "--json").stdout)
    assert oci["runtime"] == "slurm" and oci["torch"]["version"] and not list((place.folder / "images" / "checks").glob(".bundle-*"))
    gpu = place.amlaunch("image", "check", image, "--cluster", "slurm", "--runtime", "charliecloud", "--gpus", "1", "--json")
    assert json.loads(gpu.stdout)["host"].startswith("gpu")
    many = place.amlaunch("image", "check", image, "--cluster", "slurm", "--runtime", "charliecloud", "--gpus", "99", check=False)
    assert many.returncode == 2 and "--gpus 99: a node of partition" in many.stderr
    gone = place.amlaunch("image", "check", "/nowhere", "--cluster", "slurm", check=False)
    assert gone.returncode == 2 and "there is no file /nowhere" in gone.stderr
