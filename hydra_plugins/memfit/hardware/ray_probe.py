"""Ask a Ray cluster for its GPUs and print the answers as one line of JSON. Run as a program, in a process of its own.

    python ray_probe.py ADDRESS SECONDS

One task a node with GPUs, which takes no resource, reads NVML there with the memfit of that node. What the application
itself does with Ray is not touched: this process connects, asks and leaves.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def read_node() -> dict[str, Any]:
    """Return what a node's driver and host say; runs on the node."""
    import os

    try:
        from hydra_plugins.memfit.hardware import host, nvml
    except ImportError as error:
        return {"failed": f"memfit is not installed on it ({error})"}
    try:
        return {"report": nvml.report(os.environ), "host_memory_bytes": host.host_memory_bytes()}
    except Exception as error:  # whatever a node's driver does, the others are still asked
        return {"failed": str(error)}


def ask(address: str, seconds: float) -> list[dict[str, Any]]:
    """Return each living node with GPUs: its name, its resources, and its own reading or why there is none."""
    ray: Any = importlib.import_module("ray")
    place: Any = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="memfit")
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(read_node)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        asked = [task.options(scheduling_strategy=place(node["NodeID"], soft=False)).remote() for node in nodes]
        end = time.monotonic() + seconds
        return [_answer(ray, node, reading, end) for node, reading in zip(nodes, asked, strict=True)]
    finally:
        ray.shutdown()


def _answer(ray: Any, node: dict[str, Any], reading: Any, end: float) -> dict[str, Any]:
    found = {"name": node["NodeManagerAddress"], "resources": node["Resources"]}
    try:
        return {**found, **ray.get(reading, timeout=max(0.1, end - time.monotonic()))}
    except Exception as error:  # a node that dies meanwhile, a worker that cannot start, a timeout
        return {**found, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    print("\n" + json.dumps(ask(sys.argv[1], float(sys.argv[2]))), flush=True)
