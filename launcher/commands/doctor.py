"""``amlaunch doctor``: examine this machine and its cluster, propose a profile, and check a GPU node."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from amlaunch.launcher.commands._shared import add_json_option
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding, FindingsReport, worst
from amlaunch.launcher.display.live_report import make_report
from amlaunch.launcher.doctor import diagnosis, gpu_job
from amlaunch.launcher.doctor.probe import SlurmSite, read_folders, read_host, read_site
from amlaunch.launcher.doctor.profile_writer import Proposal, check_save_path, propose, save
from amlaunch.launcher.doctor.tables import gpu_table, partition_table
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.slurm import client
from amlaunch.launcher.specs.cluster_profile import find_cluster
from amlaunch.launcher.specs.profile_files import FILE, config_folder
from amlaunch.recipes.errors import FAILED, BadInput
from amlaunch.recipes.errors import OK as EXIT_OK

GpuCheck = Callable[[gpu_job.Report], gpu_job.CheckResult]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch doctor``."""
    parser.add_argument("--cluster", metavar="NAME", help="check this cluster profile")
    parser.add_argument(
        "--gpu", action="store_true", help="run a check on one GPU node: matrix products, memory, all-reduce"
    )
    parser.add_argument("--save", metavar="FILE", help="write the profile to this file (default: print it)")
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Examine everything and print the findings; the exit code is 0 if nothing is bad."""
    cluster = find_cluster(options.cluster) if options.cluster else None
    on_cluster = cluster.profile.executor == "slurm" if cluster else client.available()
    if options.save and not on_cluster:
        raise BadInput("--save: only a Slurm cluster needs a profile; for this machine, use the built-in profile local")
    if options.save:
        check_save_path(Path(options.save).expanduser())

    report = FindingsReport(options.json)
    runs = runs_root(None, cluster.profile.runs if cluster else None)
    host, folders = read_host(), read_folders(runs)
    report.facts["machine"] = dataclasses.asdict(host)
    report.facts["folders"] = [dataclasses.asdict(folder) for folder in folders]
    report.begin("machine", "this machine")
    report.add(diagnosis.host_findings(host))
    report.begin("folders", "folders")
    report.add(diagnosis.folder_findings(folders, on_cluster))
    report.begin("slurm", "Slurm")
    site = _examine_slurm(report, on_cluster)
    report.facts["slurm"] = dataclasses.asdict(site) if site else None

    proposal = propose(site, folders, runs) if site else None
    if proposal and options.save:
        save(proposal, Path(options.save).expanduser())
    if cluster is None and proposal:
        cluster = proposal.cluster()
    if cluster:
        report.begin("profile", f"profile {cluster.name} ({cluster.source})")
        runs = runs_root(None, cluster.profile.runs)
        report.add(diagnosis.profile_findings(cluster, site, runs))

    if options.gpu:
        report.begin("gpu", "GPU check")
        check: GpuCheck | None = None
        if not on_cluster or (host.gpus and not options.cluster):
            check = partial(gpu_job.check_here, runs)
        elif cluster and site:
            check = partial(gpu_job.check_node, cluster, site.partitions, runs)
        report.facts["gpu_check"] = _check_gpus(report, check)
    return _finish(report, options, proposal)


def _examine_slurm(report: FindingsReport, on_cluster: bool) -> SlurmSite | None:
    """Report on the cluster; None if there is none, or if Slurm does not answer."""
    if not on_cluster:
        report.add([Finding("commands", OK, "not needed: amlaunch local runs everything on this machine")])
        return None
    try:
        site = read_site()
    except SlurmError as error:
        advice = (
            "run scontrol ping to see whether the controller runs; if the commands are missing, try module load slurm"
        )
        report.add([Finding("controller", BAD, str(error), advice)])
        return None
    report.add(diagnosis.site_findings(site))
    report.show("")
    report.show(partition_table(site.partitions))
    return site


def _check_gpus(report: FindingsReport, check: GpuCheck | None) -> Mapping[str, Any] | None:
    """Run the GPU check and report on it; returns the measurements, None if there are none."""
    try:
        if check is None:
            raise BadInput("Slurm was not found or did not answer")
        measured, findings = check(make_report(report.json_output))
    except (BadInput, SlurmError, OSError) as error:
        report.add([Finding("job", BAD, f"no job was submitted: {error}", "fix the problems marked bad above first")])
        return None

    report.add(findings)
    if not measured:
        return None
    report.show(gpu_table(measured))
    report.add(diagnosis.gpu_findings(measured))
    return {**measured, "floors": diagnosis.floors_of(measured["gpus"][0]["device"])}


def _finish(report: FindingsReport, options: argparse.Namespace, proposal: Proposal | None) -> int:
    """Print the profile and the number of problems, or everything as JSON; returns the exit code."""
    verdict = worst(finding for _, finding in report.findings)
    code = FAILED if verdict == BAD else EXIT_OK
    if options.json:
        profile = {"name": proposal.name, "text": proposal.text, "saved": options.save} if proposal else None
        findings = [{"topic": topic, **dataclasses.asdict(finding)} for topic, finding in report.findings]
        print(wording.to_json({"verdict": verdict, **report.facts, "profile": profile, "findings": findings}))
        return code

    if proposal and options.save:
        command = (
            f"{wording.program()} submit quickstart --cluster {_cluster_argument(proposal, options.save)} --dry-run"
        )
        print(f"\nprofile {proposal.name} written to {options.save}\nnext: {command}")
    elif options.save:
        print("\nno profile was written, because Slurm did not answer")
    elif proposal and options.cluster in (None, "slurm"):
        print(
            f"\nproposed profile of this cluster; to write it to a file, add --save {FILE}\n\n{proposal.text}", end=""
        )

    counts = Counter(finding.verdict for _, finding in report.findings)
    print("\nno problems found" if verdict == OK else f"\n{counts[BAD]} bad, {counts[WARN]} to check")
    return code


def _cluster_argument(proposal: Proposal, saved: str) -> str:
    """Return the value of ``--cluster`` that selects the saved profile."""
    default_files = {Path(FILE).resolve(), (config_folder() / FILE).resolve()}
    return proposal.name if Path(saved).expanduser().resolve() in default_files else f"{saved}:{proposal.name}"
