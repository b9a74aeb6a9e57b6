"""Which runs are alike, and what a plan expects of one: both are kept beside the plan, for `memfit learn`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.planning.problem import Plan, Problem

RESERVED, DEVICE = "reserved", "device"
"""What can be compared: what torch reserved in the trainer's process, and what is in use on the whole device."""


def kind_of(problem: Problem) -> dict[str, str]:
    """Return what makes two runs alike: they share formulas, constants and allocator, and so their errors.

    Framework and its release line, what the adapter says (training strategy, engine), kind of torch's segments, family and
    size of the model, accelerator, and whether ranks talk to each other. Sizes of batches and lengths are no part of it:
    the formulas know them.
    """
    model = problem.model
    return {
        "framework": f"{problem.framework} {release_line(problem.framework_version)}",
        **problem.alike,
        **({"allocator": problem.margin.segments} if problem.margin.segments else {}),
        "model": f"{model.model_type} {size_class(model.parameters)}",
        "hardware": problem.hardware.name,
        "ranks": "one" if problem.gpus_per_node * problem.nodes == 1 else "several",
    }


def digest(kind: Mapping[str, str]) -> str:
    """Return the short name of a kind."""
    return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:10]


def release_line(version: str) -> str:
    """Return the part of a version within which a framework keeps its memory behaviour.

    >>> release_line("0.9.1"), release_line("8b19c02")
    ('0.9', '8b19c02')
    """
    return ".".join(version.split(".")[:2])


def size_class(parameters: int) -> str:
    """Return the nearest power of two, in billions of parameters.

    >>> size_class(494_032_768), size_class(7_615_616_512), size_class(8_030_261_248)
    ('0.5B', '8B', '8B')
    """
    return f"{2.0 ** round(math.log2(max(1, parameters) / 1e9)):g}B"


def expectation(plan: Plan) -> dict[str, Any]:
    """Return what `memfit learn` needs to know of a plan once the run is over; sizes are bytes of one device."""
    problem, estimate = plan.problem, plan.estimate
    return {
        "memfit": __version__,
        "kind": kind_of(problem),
        "capacity_bytes": problem.hardware.capacity_bytes,
        "held_bytes": problem.hardware.held_bytes,
        "margin": problem.margin.share,
        "predicted": {DEVICE: max(phase.peak_bytes for phase in estimate.phases), RESERVED: _reserved(estimate)},
        "phases": {phase.name: phase.whole_bytes for phase in estimate.phases},
    }


def _reserved(estimate: Estimate) -> int | None:
    """Return what torch reserves at most in the trainer's process; ``None`` where an engine shares that process.

    torch counts the pages of a sleeping engine there as reserved, though they are not mapped: nothing can be compared.
    """
    shares = any(phase.components.kv_cache and not phase.engine.total_bytes for phase in estimate.phases)
    return None if shares else max(phase.trainer.total_bytes - phase.trainer.context for phase in estimate.phases)
