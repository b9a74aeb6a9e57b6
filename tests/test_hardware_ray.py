"""`auto` through a real Ray cluster: one that this test starts, whose nodes play a driver to the real NVML bindings."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.hardware import ray_cluster
from hydra_plugins.memfit.hardware.resolve import resolve
from support.fake_driver import A40, H200, Driver

NO_GPU = Driver(extra=("fail=nvmlInitWithFlags:9",))
ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.verl


HEAD = """
import json, ray, sys
ray.init(address="local", include_dashboard=False, object_store_memory=10**8, logging_level="ERROR", **json.loads(sys.argv[1]))
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def cluster(environ: dict[str, str], **resources: object) -> Iterator[str]:
    """Start a one-node Ray cluster of this process's own and yield its address; it ends with its standard input."""
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # the path of a socket may have 107 characters
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, json.dumps({"num_cpus": 1, **resources})],
            env={**environ, "RAY_TMPDIR": place},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert head.stdin and head.stdout
        try:
            yield head.stdout.readline().strip()
        finally:
            head.stdin.close()
            head.wait(timeout=60)


def environ_of(driver: Driver, directory: Path, **variables: str) -> dict[str, str]:
    """Return an environment that belongs to no cluster, with the driver's scenario and memfit on the path."""
    directory.mkdir(exist_ok=True)
    environ = {k: v for k, v in driver.environ(directory).items() if not k.startswith(("RAY_", "SLURM_", "SBATCH_"))}
    return {**environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **variables}


@needs_ray
def test_the_nodes_own_driver_answers(tmp_path: Path) -> None:
    """From a host without GPUs, the task on the node reads its NVML; what Ray may give of it is the count."""
    here = environ_of(NO_GPU, tmp_path / "here")
    with cluster(environ_of(Driver(gpus=(H200, H200, A40)), tmp_path / "node"), num_gpus=2) as address:
        found = resolve("auto", environ={**here, "RAY_ADDRESS": address})
        by_config = resolve("auto", environ=here, ray_address=address)

    assert (found.name, found.gpus_per_node, found.nodes) == ("a40", 2, 1)
    assert found.source.startswith(f"Ray cluster at {address}, NVML, driver")
    assert found.host_memory_bytes is not None
    assert (by_config.name, by_config.gpus_per_node) == ("a40", 2)


@needs_ray
def test_rays_own_resource_answers_where_the_driver_does_not(tmp_path: Path) -> None:
    """A node whose driver is silent is known by accelerator_type; a dead address with a GPU here is that GPU, and said."""
    silent = environ_of(NO_GPU, tmp_path / "node")
    with cluster(silent, num_gpus=4, resources={"accelerator_type:A100-80G": 1}) as address:
        found = resolve("auto", environ={**environ_of(NO_GPU, tmp_path / "here"), "RAY_ADDRESS": address})
    assert (found.name, found.gpus_per_node) == ("a100-80", 4)
    assert found.source == f"Ray cluster at {address}, accelerator_type A100-80G"


@needs_ray
def test_a_cluster_without_gpus_is_an_error(tmp_path: Path) -> None:
    """Nodes without GPUs, on a host without one: the error names the cluster and the way out."""
    environ = environ_of(NO_GPU, tmp_path / "here")
    with (
        cluster(environ_of(NO_GPU, tmp_path / "node"), num_gpus=0) as address,
        pytest.raises(HardwareNotDetected, match=rf"Ray cluster at {address} has no node with GPUs.*MEMFIT_HARDWARE"),
    ):
        resolve("auto", environ={**environ, "RAY_ADDRESS": address})


@pytest.mark.parametrize(
    ("environ", "config", "address"),
    [
        ({}, None, None),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, None, "10.0.0.1:6379"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "auto", "auto"),
        ({"RAY_ADDRESS": "local"}, None, None),
        ({"RAY_ADDRESS": " "}, "", None),
    ],
)
def test_which_cluster_a_launch_names(environ: dict[str, str], config: str | None, address: str | None) -> None:
    """The config's address wins over RAY_ADDRESS; `local` and nothing name none."""
    assert ray_cluster.asked_for(environ, config) == address


def test_the_cluster_of_this_host_is_found(tmp_path: Path) -> None:
    """`ray start` leaves the address where ray.init() looks for it; a file that cannot be read is none."""
    assert ray_cluster.running_here({"RAY_TMPDIR": str(tmp_path)}) is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert ray_cluster.running_here({"RAY_TMPDIR": str(tmp_path)}) == "10.0.0.1:6379"
    (tmp_path / "ray" / "ray_current_cluster").write_bytes(b"\xff\xfe")
    assert ray_cluster.running_here({"RAY_TMPDIR": str(tmp_path)}) is None


def test_a_cluster_that_cannot_be_asked_leaves_the_gpu_of_this_host(tmp_path: Path) -> None:
    """Where the named cluster gives no answer, the GPUs here count, and a warning says so."""
    environ = environ_of(Driver(gpus=(H200,)), tmp_path, RAY_ADDRESS="no such place")
    found = resolve("auto", environ=environ)
    assert found.name == "h200"
    assert any("no such place" in warning for warning in found.warnings)
