"""Memory of this host: what the machine has, and what the container or job may use of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from hydra_plugins.memfit.base.units import KIB

ROOT = Path("/")


def host_memory_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that processes of this host may use; ``None`` where the host does not say.

    The smallest of MemTotal and of every cgroup limit (v1, v2) from this process's group up to the root: a limit of a
    parent group binds as well. ``root`` is where ``proc`` and ``sys`` lie.
    """
    total = _mem_total_bytes(root)
    return min((value for value in (total, *_cgroup_limits(root)) if value is not None), default=None)


def shm_bytes(root: Path = ROOT) -> int | None:
    """Return the size of ``/dev/shm``, which a container may have cut to 64 MiB; ``None`` where there is none."""
    try:
        stat = os.statvfs(root / "dev" / "shm")
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks


def _mem_total_bytes(root: Path) -> int | None:
    for line in _lines(root / "proc" / "meminfo"):
        key, _, rest = line.partition(":")
        if key == "MemTotal" and rest.split() and rest.split()[0].isdecimal():
            return int(rest.split()[0]) * KIB
    return None


def _cgroup_limits(root: Path) -> Iterator[int]:
    mount = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield from _limits_upwards(mount, group, "memory.max")
            yield from _limits_upwards(mount / "unified", group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(mount / "memory", group, "memory.limit_in_bytes")


def _limits_upwards(mount: Path, group: str, filename: str) -> Iterator[int]:
    """Yield the limits of a group and of its parents; a path of the host that a container cannot see yields none."""
    inside = PurePosixPath("/", group).relative_to("/")
    if ".." in inside.parts:
        inside = PurePosixPath()
    for directory in (inside, *inside.parents):
        text = "".join(_lines(mount / directory / filename)).strip()
        if text.isdecimal():
            yield int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
