"""``amlaunch doctor``: what this machine or its cluster has, a profile of it; with ``--gpu`` what a GPU node does."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from amlaunch.launcher.commands._shared import add_json
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding, worst
from amlaunch.launcher.display.live_report import make_report
from amlaunch.launcher.doctor import diagnosis, gpu_job
from amlaunch.launcher.doctor.probe import Place, SlurmSite, read_folders, read_host, read_site
from amlaunch.launcher.doctor.profile_writer import Proposal, check_place, propose, save
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.slurm import client
from amlaunch.launcher.specs.cluster_profile import Cluster, find_cluster
from amlaunch.launcher.specs.profile_files import FILE, config_folder
from amlaunch.recipes.errors import FAILED, BadInput
from amlaunch.recipes.errors import OK as DONE

COLORS = {OK: "green", WARN: "yellow", BAD: "bold red"}
WIDEST = 110
NAMES = 11
"""Columns of a finding's name."""
Check = Callable[[gpu_job.Report], gpu_job.Outcome]


class Report:
    """What was found so far; printed as it comes, but with ``--json`` at the end."""

    def __init__(self, json: bool):
        self.json = json
        self.facts: dict[str, Any] = {}
        self.findings: list[tuple[str, Finding]] = []
        """Each with its topic."""
        self.topic = ""

    def begin(self, topic: str, title: str) -> None:
        """What is added from now on is of ``topic``."""
        self.show(f"\n{title}" if self.topic else title)
        self.topic = topic

    def add(self, findings: Iterable[Finding]) -> None:
        """Keep findings, and show them."""
        for finding in findings:
            self.findings.append((self.topic, finding))
            self.show(_finding_text(finding))

    def show(self, what: Any) -> None:
        """Text or a table for people."""
        if not self.json:
            wording.console().print(what, markup=False)


def _finding_text(finding: Finding) -> Any:
    from rich.text import Text

    lead = f"  {finding.verdict:<4}  {finding.name:<{NAMES}} "
    lines = _wrapped(finding.text, lead) + (_wrapped(finding.advice, " " * len(lead) + "-> ") if finding.advice else [])
    text = Text("\n".join(lines))
    text.stylize(COLORS[finding.verdict], 2, 2 + len(finding.verdict))
    return text


def _wrapped(text: str, lead: str) -> list[str]:
    """Paths and commands stay whole, so that they can be copied."""
    width = min(wording.console().width, WIDEST)
    indent = " " * len(lead)
    return textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch doctor``."""
    parser.add_argument("--cluster", metavar="NAME", help="check this profile")
    parser.add_argument(
        "--gpu", action="store_true", help="run a check on one GPU node: matrix products, memory, all-reduce"
    )
    parser.add_argument("--save", metavar="FILE", help="write the profile to this file (default: print it)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Look at everything and say what was found; exit code 0 if nothing is bad."""
    cluster = find_cluster(options.cluster) if options.cluster else None
    on_cluster = cluster.profile.executor == "slurm" if cluster else client.available()
    if options.save and not on_cluster:
        raise BadInput("--save: only a cluster with Slurm needs a profile; local, for this machine alone, is built in")
    if options.save:
        check_place(Path(options.save).expanduser())
    report = Report(options.json)
    runs = runs_root(None, cluster.profile.runs if cluster else None)
    host, folders = read_host(), read_folders(runs)
    report.facts |= {"machine": dataclasses.asdict(host), "folders": [dataclasses.asdict(one) for one in folders]}
    report.begin("machine", "this machine")
    report.add(diagnosis.host_findings(host))
    report.begin("folders", "folders")
    report.add(diagnosis.folder_findings(folders, on_cluster))
    report.begin("slurm", "Slurm")
    site = _look_at_slurm(report, on_cluster)
    report.facts["slurm"] = dataclasses.asdict(site) if site else None

    proposal = propose(site, folders, runs) if site else None
    if proposal and options.save:
        save(proposal, Path(options.save).expanduser())
    cluster = cluster or (proposal.cluster() if proposal else None)
    if cluster:
        report.begin("profile", f"profile {cluster.name} ({cluster.source})")
        runs = runs_root(None, cluster.profile.runs)
        report.add(diagnosis.profile_findings(cluster, site, runs))
    if options.gpu:
        report.begin("gpu", "GPU check")
        check: Check | None = None
        if not on_cluster or (host.gpus and not options.cluster):
            check = partial(gpu_job.check_here, runs)
        elif cluster and site:
            check = partial(gpu_job.check_node, cluster, site.partitions, runs)
        report.facts["gpu_check"] = _check_gpus(report, check)
    return _finish(report, options, proposal, cluster)


def _look_at_slurm(report: Report, on_cluster: bool) -> SlurmSite | None:
    if not on_cluster:
        report.add([Finding("commands", OK, "not needed: amlaunch local runs everything on this machine")])
        return None
    try:
        site = read_site()
    except SlurmError as error:
        advice = "scontrol ping says whether the controller runs; module load slurm may bring the commands"
        report.add([Finding("controller", BAD, str(error), advice)])
        return None
    report.add(diagnosis.site_findings(site))
    report.show("")
    report.show(partition_table(site.partitions))
    return site


def partition_table(places: Sequence[Place]) -> Any:
    """A row for each partition; columns that say nothing are left out."""
    from rich.table import Table

    rows = [
        {
            "  partition": f"  {place.name}{' *' if place.default else ''}",
            "state": "up" if place.up else "down",
            "limit": place.limit,
            "nodes": str(place.nodes) if place.usable == place.nodes else f"{place.usable} of {place.nodes}",
            "CPUs": str(place.cpus),
            "memory": f"{place.mem_mb / 1024:.0f} GiB" if place.mem_mb > 1 else "",
            "GPUs": place.gpus_each,
            "preempted": "" if place.preempt == "OFF" else place.preempt.lower(),
            "accounts": "" if place.accounts == "ALL" else place.accounts,
        }
        for place in places
    ]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _check_gpus(report: Report, check: Check | None) -> Mapping[str, Any] | None:
    """What was measured, which is shown and judged."""
    try:
        if check is None:
            raise BadInput("there is no cluster to submit it to")
        found, findings = check(make_report(report.json))
    except (BadInput, SlurmError, OSError) as error:
        report.add([Finding("job", BAD, f"no job was submitted: {error}", "correct first what is bad above")])
        return None
    report.add(findings)
    if not found:
        return None
    report.show(gpu_table(found))
    report.add(diagnosis.gpu_findings(found))
    return {**found, "floors": diagnosis.floors_of(found["gpus"][0]["device"])}


def gpu_table(found: Mapping[str, Any]) -> Any:
    """A row for each rank of the check."""
    from rich.table import Table

    table = Table("  GPU" if found["cuda"] else "  rank", "device", box=None, padding=(0, 2, 0, 0))
    for column in ("matrices\nTFLOP/s", "copies\nGB/s", "memory free\nof GiB"):
        table.add_column(column, justify="right")
    for gpu in found["gpus"]:
        memory = f"{gpu['memory_free_bytes'] / 2**30:.1f} of {gpu['memory_total_bytes'] / 2**30:.1f}"
        figures = f"{gpu['gemm_tflops']:,.3g}", f"{gpu['copy_gb_s']:,.4g}"
        table.add_row(f"  {gpu['rank']}", gpu["device"], *figures, memory)
    return table


def _finish(report: Report, options: argparse.Namespace, proposal: Proposal | None, cluster: Cluster | None) -> int:
    """The profile, and how it all went; the exit code."""
    verdict = worst(finding for _, finding in report.findings)
    code = FAILED if verdict == BAD else DONE
    if options.json:
        profile = {"name": proposal.name, "text": proposal.text, "saved": options.save} if proposal else None
        findings = [{"topic": topic, **dataclasses.asdict(finding)} for topic, finding in report.findings]
        print(wording.to_json({"verdict": verdict, **report.facts, "profile": profile, "findings": findings}))
        return code
    if proposal and options.save:
        again = f"{wording.program()} submit quickstart --cluster {_name_of(proposal, options.save)} --dry-run"
        print(f"\nprofile {proposal.name} written to {options.save}\nnext: {again}")
    elif options.save:
        print("\nno profile was written: Slurm did not say enough to make one")
    elif proposal and options.cluster in (None, "slurm"):
        print(f"\na profile of this cluster, to change as you like; --save {FILE} writes it\n\n{proposal.text}", end="")
    counts = Counter(finding.verdict for _, finding in report.findings)
    print("\nnothing to complain of" if verdict == OK else f"\n{counts[BAD]} bad, {counts[WARN]} to look at")
    return code


def _name_of(proposal: Proposal, saved: str) -> str:
    """How ``--cluster`` finds the profile again."""
    usual = {Path(FILE).resolve(), (config_folder() / FILE).resolve()}
    return proposal.name if Path(saved).expanduser().resolve() in usual else f"{saved}:{proposal.name}"
