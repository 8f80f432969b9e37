"""Build the tables that ``amlaunch doctor`` prints: partitions, and the GPUs of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amlaunch.launcher.doctor.probe import SitePartition


def partition_table(partitions: Sequence[SitePartition]) -> Any:
    """Return a rich table with a row for each partition, without columns that are empty everywhere."""
    from rich.table import Table

    rows = [_partition_row(partition) for partition in partitions]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _partition_row(partition: SitePartition) -> dict[str, str]:
    all_usable = partition.usable == partition.nodes
    return {
        "  partition": f"  {partition.name}{' *' if partition.default else ''}",
        "state": "up" if partition.up else "down",
        "limit": partition.limit,
        "nodes": str(partition.nodes) if all_usable else f"{partition.usable} of {partition.nodes}",
        "CPUs": str(partition.cpus),
        "memory": f"{partition.mem_mb / 1024:.0f} GiB" if partition.mem_mb > 1 else "",
        "GPUs": partition.gpu_summary,
        "preempted": "" if partition.preempt == "OFF" else partition.preempt.lower(),
        "accounts": "" if partition.accounts == "ALL" else partition.accounts,
    }


def gpu_table(measured: Mapping[str, Any]) -> Any:
    """Return a rich table with a row for each rank of the GPU check."""
    from rich.table import Table

    table = Table("  GPU" if measured["cuda"] else "  rank", "device", box=None, padding=(0, 2, 0, 0))
    for column in ("matrices\nTFLOP/s", "copies\nGB/s", "memory free\nof GiB"):
        table.add_column(column, justify="right")
    for gpu in measured["gpus"]:
        memory = f"{gpu['memory_free_bytes'] / 2**30:.1f} of {gpu['memory_total_bytes'] / 2**30:.1f}"
        table.add_row(
            f"  {gpu['rank']}", gpu["device"], f"{gpu['gemm_tflops']:,.3g}", f"{gpu['copy_gb_s']:,.4g}", memory
        )
    return table
