"""``amlaunch image check`` on a node of a real Slurm, and what a submit learns of a registry's images."""

from __future__ import annotations

import json

import pytest
from container_image import wanted
from image_helpers import layer, make_certificate, need, registry_config, write_layout
from slurm_cluster import REPOSITORY, Cluster
from slurm_runs import Place


@pytest.mark.slow
def test_an_image_is_looked_at_on_a_node(cluster: Cluster):
    """By srun, where the profile sends training; with GPUs asked for, on a node that has them."""
    image = str(wanted())
    place = Place(cluster, "images", USER="lab")
    profile = {
        "container": {"runtime": "charliecloud"},
        "setup": [f"touch {place.folder}/set-up"],
        "srun": ["--comment=looked at"],
    }
    place.write("clusters.yaml", json.dumps({"lab": profile}))
    seen = json.loads(place.amlaunch("image", "check", image, "--cluster", "lab", "--json").stdout)
    assert seen["runtime"] == "charliecloud" and (place.folder / "set-up").exists(), "as the site's profile has it"
    assert (
        seen["host"].startswith("cpu")
        and seen["torch"]["version"]
        and seen["user"]["uid"] != 0
        and seen["verdict"] == "warn"
    )
    assert (place.folder / "images" / "checks").is_dir()
    oci = json.loads(place.amlaunch("image", "check", image, "--cluster", "lab", "--runtime", "slurm", "--json").stdout)
    assert (
        oci["runtime"] == "slurm"
        and oci["torch"]["version"]
        and not list((place.folder / "images" / "checks").glob(".bundle-*"))
    )
    gpu = place.amlaunch(
        "image", "check", image, "--cluster", "slurm", "--runtime", "charliecloud", "--gpus", "1", "--json"
    )
    assert json.loads(gpu.stdout)["host"].startswith("gpu")
    many = place.amlaunch(
        "image", "check", image, "--cluster", "slurm", "--runtime", "charliecloud", "--gpus", "99", check=False
    )
    assert many.returncode == 2 and "--gpus 99: nodes of partition" in many.stderr
    gone = place.amlaunch("image", "check", "/nowhere", "--cluster", "slurm", check=False)
    assert gone.returncode == 2 and "file /nowhere" in gone.stderr


@pytest.mark.slow
def test_a_submit_asks_the_registry(cluster: Cluster):
    """A tag that is not there is refused at once; of one that is, the jobs know how large it is."""
    need("docker-registry", "skopeo")
    place, name = Place(cluster, "registry", USER="lab"), "127.0.0.1:5443"
    trust = {"SSL_CERT_FILE": str(make_certificate(place.folder))}
    for file in (*place.folder.iterdir(), registry_config(place.folder, name, tls=True)):
        file.chmod(0o644)
    layout = write_layout(place.folder / "oci", [layer([("a", b"1")])])
    server = cluster.popen("docker-registry", "serve", str(place.folder / "registry.yml"), cwd=place.folder)
    try:
        push = [
            "skopeo",
            "copy",
            "-q",
            "--retry-times=5",
            "--dest-tls-verify=false",
            f"oci:{layout}",
            f"docker://{name}/team/tiny:1",
        ]
        cluster.run(*push, cwd=place.folder)
        place.write("clusters.yaml", json.dumps({"lab": {"container": {"runtime": "enroot"}}}))
        place.write(
            "r.yaml",
            f"container:\n  image: {name}/team/tiny:1\n{(REPOSITORY / 'recipes' / 'quickstart.yaml').read_text()}",
        )
        words = ["submit", "r.yaml", "--cluster", "lab", "--preprocess.data_files", f"{REPOSITORY}/README.md"]
        missing = place.amlaunch(*words, "--dry-run", "--container.image", f"{name}/team/tiny:2", check=False, **trust)
        assert (
            missing.returncode == 2
            and f"{name} has no such image (404 Not Found): {name}/team/tiny:2. Check the name" in missing.stderr
        )
        place.amlaunch(*words, **trust)
        [plan] = place.folder.glob("runs/*/plan.json")
        facts = [stage["container"]["facts"] for stage in json.loads(plan.read_text())["stages"]]
        assert all(one["bytes"] > 0 and one["architectures"] == ["amd64"] for one in facts)
    finally:
        server.terminate()
        server.wait()
