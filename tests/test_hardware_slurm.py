"""`auto` on a host without an accelerator that belongs to a Slurm cluster: a real `sinfo` on PATH answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.units import GIB, MIB
from hydra_plugins.memfit.hardware.cluster import candidates
from hydra_plugins.memfit.hardware.resolve import resolve
from support.fake_driver import Driver

NO_GPU = Driver(extra=("fail=nvmlInitWithFlags:9",))
A100 = "n1|gpu:a100:4(S:0-1)|512000|a100_80gb,nvlink|gpu"
H100 = "n2|gpu:nvidia_h100_80gb_hbm3:8|2048000+|(null)|big"
L40S = "n3|gpu:l40s:4|512000|(null)|gpu"
CPU = "c1|(null)|256000|(null)|cpu"


def environ_with(tmp_path: Path, *lines: str, script: str = "", **variables: str) -> dict[str, str]:
    """Return an environment in which `sinfo` prints ``lines`` (or runs ``script``), and writes down how it was asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    printed = "\n".join(f"echo '{line}'" for line in lines)
    (tools / "sinfo").write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n{script or printed}\n')
    (tools / "sinfo").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in NO_GPU.environ(tmp_path).items() if not k.startswith(("SLURM_", "SBATCH_", "RAY_"))}
    return {**clean, "PATH": path, "RAY_TMPDIR": str(tmp_path), **variables}


@pytest.mark.parametrize(
    ("gpu_type", "hints", "names"),
    [
        ("a100", (), ("a100-40", "a100-80")),
        ("a100", ("gpu_mem:80gb",), ("a100-80",)),
        ("A100-40G", (), ("a100-40",)),
        ("nvidia_a100-sxm4-80gb", (), ("a100-80",)),
        ("nvidia_h100_80gb_hbm3", (), ("h100",)),
        ("h100", (), ("h100",)),
        ("H200", (), ("h200",)),
        ("rtx_4090", (), ("rtx4090",)),
        ("tesla_v100", ("32g",), ("v100-32",)),
        ("a10", (), ("a10",)),
        ("A10G", (), ("a10g",)),
        ("l4", (), ("l4",)),
        ("L40S", (), ("l40s",)),
        ("mi300x", (), ()),
    ],
)
def test_a_schedulers_name_means_the_file_of_that_chip(gpu_type: str, hints: tuple[str, ...], names: object) -> None:
    """Administrators and Ray write names freely; a size, or a feature of the node, tells two boards apart."""
    assert candidates(gpu_type, hints) == names


def test_the_partition_that_sbatch_would_use_is_asked(tmp_path: Path) -> None:
    """On a login node SBATCH_PARTITION says where the launch will run; the partition's size is not the launch's."""
    environ = environ_with(tmp_path, A100, A100.replace("n1", "n9"), SBATCH_PARTITION="gpu")

    found = resolve("auto", environ=environ)

    assert (found.name, found.gpus_per_node, found.nodes) == ("a100-80", 4, None)
    assert (found.host_memory_bytes, found.source) == (512000 * MIB, "Slurm, partition gpu")
    assert "--partition=gpu" in (tmp_path / "asked").read_text()


def test_a_jobs_own_nodes_and_shares_count(tmp_path: Path) -> None:
    """Inside a job the node list is asked about, and its GPUs, nodes and memory are those that the job was given."""
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[2-3]", "SLURM_JOB_NUM_NODES": "2"}
    environ = environ_with(tmp_path, H100, **given, SLURM_GPUS_ON_NODE="2", SLURM_MEM_PER_NODE="65536")

    found = resolve("auto", environ=environ)

    assert (found.name, found.gpus_per_node, found.nodes, found.host_memory_bytes) == ("h100", 2, 2, 64 * GIB)
    assert "--nodes=n[2-3]" in (tmp_path / "asked").read_text()


def test_in_a_mixed_partition_the_smallest_decides(tmp_path: Path) -> None:
    """Nodes of several kinds give one answer, the smallest of everything, with a warning that says so."""
    found = resolve("auto", environ=environ_with(tmp_path, CPU, H100, L40S, SBATCH_PARTITION="all"))

    assert (found.name, found.gpus_per_node, found.host_memory_bytes) == ("l40s", 4, 512000 * MIB)
    assert any("The smallest counts for all: NVIDIA L40S (n3)" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("lines", "script", "message"),
    [
        (
            (A100, H100),
            "",
            r"GPUs of several kinds \(a100 in gpu, nvidia_h100_80gb_hbm3 in big\): say SBATCH_PARTITION",
        ),
        (
            (A100.replace("a100_80gb", "fast"),),
            "",
            "'a100', which may be a100-40 or a100-80: say MEMFIT_HARDWARE=a100-40 or",
        ),
        (("n1|gpu:mi300x:8|1|x|gpu",), "", "'mi300x', which is no accelerator that memfit knows"),
        (("n1|gpu:8|1|x|gpu",), "", "which is no accelerator that memfit knows"),
        ((CPU,), "", "Slurm lists no GPUs in its partitions"),
        ((), "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        (("nonsense", "a|b|c", "|||||"), "", "Slurm lists no GPUs"),
    ],
)
def test_what_slurm_cannot_answer_is_one_clear_error(
    tmp_path: Path, lines: tuple[str, ...], script: str, message: str
) -> None:
    """Names that mean two boards or none, several kinds without a partition, no controller: an error with the way out."""
    with pytest.raises(HardwareNotDetected, match=message) as caught:
        resolve("auto", environ=environ_with(tmp_path, *lines, script=script))
    assert "MEMFIT_HARDWARE=<name>" in str(caught.value)


def test_an_untyped_gpu_is_known_by_the_nodes_features(tmp_path: Path) -> None:
    """`gpu:8` with the feature `h200` is an H200."""
    assert resolve("auto", environ=environ_with(tmp_path, "n1|gpu:8|1|h200,ib|gpu")).name == "h200"


def test_a_host_with_gpus_does_not_ask(tmp_path: Path) -> None:
    """On a compute node the driver answers, with Slurm's tools on the path."""
    from support.fake_driver import H200

    environ = environ_with(tmp_path, A100, SLURM_JOB_ID="7")
    environ |= {key: value for key, value in Driver(gpus=(H200,)).environ(tmp_path).items() if key == "NVML_STUB"}
    assert resolve("auto", environ=environ).name == "h200"
    assert not (tmp_path / "asked").exists()
