"""The GPUs of the Ray cluster that a launch will connect to.

Ray runs in a short-lived process of its own, as NVML does: a connection that hangs can be ended, and the application's own
``ray.init`` finds nothing of it. A cluster is never started.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.progress import slow
from hydra_plugins.memfit.hardware import cluster, nvml
from hydra_plugins.memfit.hardware.cluster import Node
from hydra_plugins.memfit.hardware.spec import Hardware

VARIABLE = "MEMFIT_HARDWARE"
ADDRESS_VARIABLE = "RAY_ADDRESS"
TIMEOUT_S = 60.0
_TASK_S = 30.0
_TYPE = "accelerator_type:"
_NO_CLUSTER = ("", "local")


def asked_for(environ: Mapping[str, str], config_address: str | None = None) -> str | None:
    """Return the cluster that the launch names: its config's address, else ``RAY_ADDRESS``; ``None``: it names none."""
    address = (config_address or environ.get(ADDRESS_VARIABLE, "")).strip()
    return None if address in _NO_CLUSTER else address


def running_here(environ: Mapping[str, str]) -> str | None:
    """Return the address of the cluster that this host belongs to (``ray start``), which ``ray.init()`` would find."""
    path = Path(environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def detect(address: str, environ: Mapping[str, str]) -> Hardware:
    """Return the smallest GPU of the cluster at ``address``; raises `HardwareNotDetected`.

    Each node's own driver is asked; where it gives no answer, the ``accelerator_type`` resource that Ray set.
    """
    nodes = [_node(answer) for answer in _ask(address, environ)]
    if not nodes:
        raise HardwareNotDetected(f"the Ray cluster at {address} has no node with GPUs.")
    return cluster.smallest(nodes, source=f"Ray cluster at {address}, {nodes[0].hardware.source}")


def _ask(address: str, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    if importlib.util.find_spec("ray") is None:
        raise HardwareNotDetected(f"Ray is not installed here, and {address} is a Ray cluster: pip install ray.")
    command = [sys.executable, str(Path(__file__).with_name("ray_probe.py")), address, str(_TASK_S)]
    silent: Any = {"env": _environ(environ), "stdin": subprocess.DEVNULL, "capture_output": True}
    try:
        with slow(f"asking the Ray cluster at {address} for its GPUs"):
            answer = subprocess.run(command, timeout=TIMEOUT_S, check=False, **silent)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HardwareNotDetected(f"the Ray cluster at {address} gave no answer ({error}).") from error
    lines = answer.stdout.decode(errors="replace").splitlines()
    if answer.returncode or not lines:
        said = answer.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {answer.returncode}"]
        raise HardwareNotDetected(f"the Ray cluster at {address} gave no answer: {said[-1][:200]}.")
    found: list[dict[str, Any]] = json.loads(lines[-1])
    return found


def _environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a driver of its own: this process's packages, and not its Ray job."""
    kept = {key: value for key, value in environ.items() if not key.startswith("RAY_JOB_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _node(answer: Mapping[str, Any]) -> Node:
    name, resources = answer["name"], answer["resources"]
    count = int(resources["GPU"])
    try:
        hardware = _read(answer)
    except HardwareNotDetected as error:
        hardware = _typed(name, resources, str(error))
    return Node(name=name, hardware=replace(hardware, gpus_per_node=min(count, hardware.gpus_per_node or count)))


def _read(answer: Mapping[str, Any]) -> Hardware:
    if "failed" in answer:
        raise HardwareNotDetected(answer["failed"])
    found = nvml.from_report(answer["report"], {})
    return replace(found, host_memory_bytes=answer["host_memory_bytes"])


def _typed(name: str, resources: Mapping[str, Any], why: str) -> Hardware:
    """Return what Ray's own resource says a node has."""
    types = [key.removeprefix(_TYPE) for key in resources if key.startswith(_TYPE)]
    if not types:
        raise HardwareNotDetected(f"Ray node {name}: {why.rstrip('.')}, and it has no accelerator_type.")
    found = cluster.listed(types[0], (), where=f"Ray (node {name})", variable=VARIABLE)
    return replace(found, source=f"accelerator_type {types[0]}")
