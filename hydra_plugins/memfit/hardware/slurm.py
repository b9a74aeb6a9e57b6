"""The GPUs of a Slurm partition or job, on a host that has none itself: a login node, the CPU node of a job.

Asks ``sinfo`` (the manual page: ``%N`` node, ``%G`` generic resources, ``%m`` memory in MB, ``%f`` features, ``%R`` partition) and
trusts what the administrator calls a GPU only where the name means one file of ``conf/hardware``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.units import MIB
from hydra_plugins.memfit.hardware import cluster
from hydra_plugins.memfit.hardware.cluster import Node
from hydra_plugins.memfit.hardware.spec import Hardware

TIMEOUT_S = 10.0
VARIABLE = "MEMFIT_HARDWARE"
_PARTITION_VARIABLES = ("SLURM_JOB_PARTITION", "SBATCH_PARTITION", "SLURM_PARTITION", "SALLOC_PARTITION")
"""A job's own, then what sbatch, srun and salloc take for their option ``--partition``."""
_GRES = re.compile(r"(?:^|,)gpu(?::(?P<type>[^:,()]+?))?:(?P<count>\d+)(?:\([^)]*\))?(?=,|$)")
_FORMAT = "%N|%G|%m|%f|%R"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """One node with GPUs of one type."""

    node: str
    gpu_type: str
    count: int
    memory_bytes: int
    features: tuple[str, ...]
    partition: str


def is_here(environ: Mapping[str, str]) -> bool:
    """Return whether this host can ask a Slurm controller."""
    return shutil.which("sinfo", path=environ.get("PATH")) is not None


def detect(environ: Mapping[str, str]) -> Hardware:
    """Return the smallest GPU of the job's nodes, else of the partition; raises `HardwareNotDetected`.

    Inside a job ``SLURM_JOB_NODELIST`` says which nodes; elsewhere the partition that the variables of sbatch, srun or salloc
    name; without one, all partitions, as long as they have GPUs of one kind.
    """
    where, options = _scope(environ)
    lines = [line for text in _sinfo(options, environ) for line in _parse(text)]
    if not lines:
        raise HardwareNotDetected(f"Slurm lists no GPUs in {where}.")
    if where == _EVERYWHERE:
        _check_one_kind(lines)
    return _in_job(cluster.smallest([_node(line) for line in lines], source=f"Slurm, {where}"), environ)


_EVERYWHERE = "its partitions"


def _scope(environ: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return what is asked about, in words and as options of ``sinfo``."""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if nodes:
        return f"the nodes {nodes} of this job", (f"--nodes={nodes}",)
    partition = next((environ[name] for name in _PARTITION_VARIABLES if environ.get(name)), None)
    return (f"partition {partition}", (f"--partition={partition}",)) if partition else (_EVERYWHERE, ())


def _sinfo(options: tuple[str, ...], environ: Mapping[str, str]) -> list[str]:
    command = ["sinfo", "--noheader", "--Node", f"--format={_FORMAT}", *options]
    try:
        answer = subprocess.run(
            command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HardwareNotDetected(f"Slurm: sinfo gave no answer ({error}).") from error
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip()[:200] or f"exit status {answer.returncode}"
        raise HardwareNotDetected(f"Slurm: sinfo failed: {said}.")
    return answer.stdout.decode(errors="replace").splitlines()


def _parse(text: str) -> Iterator[_Line]:
    fields = text.strip().split("|")
    if len(fields) != _FORMAT.count("|") + 1:
        return
    node, gres, memory, features, partition = fields
    for found in _GRES.finditer(gres):
        yield _Line(
            node=node,
            gpu_type=found["type"] or "",
            count=int(found["count"]),
            memory_bytes=int(memory.rstrip("+")) * MIB if memory.rstrip("+").isdecimal() else 0,
            features=tuple(features.split(",")),
            partition=partition,
        )


def _node(line: _Line) -> Node:
    where = f"Slurm ({line.node}, partition {line.partition})"
    known = cluster.listed(line.gpu_type or " ".join(line.features), line.features, where=where, variable=VARIABLE)
    return Node(
        name=line.node,
        hardware=replace(known, gpus_per_node=line.count, host_memory_bytes=line.memory_bytes or None),
    )


def _check_one_kind(lines: list[_Line]) -> None:
    kinds = {line.gpu_type: line.partition for line in lines}
    if len(kinds) > 1:
        said = ", ".join(f"{kind or 'without a type'} in {partition}" for kind, partition in sorted(kinds.items()))
        raise HardwareNotDetected(
            f"Slurm has GPUs of several kinds ({said}): say SBATCH_PARTITION=<partition>, or {VARIABLE}=<name>."
        )


def _in_job(found: Hardware, environ: Mapping[str, str]) -> Hardware:
    """Return ``found`` with what this job was given of its nodes, where its variables say so."""
    given: dict[str, Any] = {
        "gpus_per_node": _count(environ.get("SLURM_GPUS_ON_NODE")),
        "nodes": _count(environ.get("SLURM_JOB_NUM_NODES")) if environ.get("SLURM_JOB_ID") else None,
        "host_memory_bytes": _count(environ.get("SLURM_MEM_PER_NODE"), MIB),
    }
    nodes = found.nodes if environ.get("SLURM_JOB_ID") else None  # a partition's size is not the launch's
    return replace(found, **{"nodes": nodes, **{key: value for key, value in given.items() if value is not None}})


def _count(text: str | None, unit: int = 1) -> int | None:
    return int(text) * unit if text and text.isdecimal() and int(text) > 0 else None
