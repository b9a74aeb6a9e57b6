"""Host memory: the smallest limit on the way up counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.hardware import host

MEMINFO = "MemTotal:       67108864 kB\nMemFree:        1 kB\n"
UNLIMITED_V1 = "9223372036854771712"
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"

TREES: list[tuple[str, dict[str, str], int | None]] = [
    ("no limit", {"proc/meminfo": MEMINFO}, 64 * GIB),
    ("nothing known", {}, None),
    ("meminfo without a total", {"proc/meminfo": "MemFree: 1 kB\n"}, None),
    ("meminfo cut short", {"proc/meminfo": "MemTotal:\n"}, None),
    (
        "v2, the own group",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": f"{8 * GIB}\n"},
        8 * GIB,
    ),
    (
        "v2, a parent binds",
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            f"{V2}/a/b/memory.max": "max\n",
            f"{V2}/a/memory.max": f"{6 * GIB}\n",
        },
        6 * GIB,
    ),
    (
        "v2, a container that sees its group as the root",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{4 * GIB}\n"},
        4 * GIB,
    ),
    (
        "v2, no limit anywhere",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n"},
        64 * GIB,
    ),
    (
        "v1, Slurm's step below its job",
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/slurm/job_1/step_0\n3:cpu,cpuacct:/\n",
            f"{V1}/slurm/job_1/step_0/memory.limit_in_bytes": UNLIMITED_V1,
            f"{V1}/slurm/job_1/memory.limit_in_bytes": str(12 * GIB),
            f"{V1}/memory.limit_in_bytes": UNLIMITED_V1,
        },
        12 * GIB,
    ),
    (
        "v1, Docker: the path is the host's, the mount is the container's",
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "9:memory:/docker/0123abcd\n0::/\n",
            f"{V1}/memory.limit_in_bytes": str(3 * GIB),
        },
        3 * GIB,
    ),
    (
        "a limit above the machine",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": str(900 * GIB)},
        64 * GIB,
    ),
    (
        "hybrid: v2 beside v1",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", f"{V2}/unified/a/memory.max": str(5 * GIB)},
        5 * GIB,
    ),
    (
        "a group outside the namespace",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/../../x\n", f"{V2}/memory.max": str(2 * GIB)},
        2 * GIB,
    ),
    (
        "another controller with a similar name",
        {"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memoryx:/a\n", f"{V1}/a/memory.limit_in_bytes": str(GIB)},
        64 * GIB,
    ),
]


@pytest.mark.parametrize(("files", "expected"), [row[1:] for row in TREES], ids=[row[0] for row in TREES])
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    """MemTotal and every limit from the process's group to the root: the smallest, read from real files."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host.host_memory_bytes(tmp_path) == expected


def test_this_host_has_memory() -> None:
    """On the machine that runs the tests the answer is a plausible number of bytes."""
    found = host.host_memory_bytes()
    assert found is not None and 256 * MIB <= found <= 64 * 1024 * GIB


def test_shared_memory(tmp_path: Path) -> None:
    """The size of /dev/shm is a file system's size; a host without one has no answer."""
    assert host.shm_bytes(tmp_path) is None
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    assert (host.shm_bytes(tmp_path) or 0) > 0
