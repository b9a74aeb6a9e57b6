"""The launch behind a log: what the command line says, else what the log shows; and the plan that would have fitted."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from hydra_plugins.memfit.base.errors import HardwareNotDetected, MemfitError, NotModelled
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.cli.launch import Question
from hydra_plugins.memfit.cli.logged import Source, named_hardware, read_source, source_of
from hydra_plugins.memfit.compose.plain import leaves, value_at
from hydra_plugins.memfit.diagnosis.devices import exact_capacity
from hydra_plugins.memfit.diagnosis.diagnose import Diagnosis, devices_of, remarks_of, terms_of
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.diagnosis.logged import LoggedLaunch
from hydra_plugins.memfit.diagnosis.remedy import remedy
from hydra_plugins.memfit.diagnosis.scan import Scan
from hydra_plugins.memfit.diagnosis.tokens import sequence_lengths, token_counts
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.model.resolve import resolve_model
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import Problem
from hydra_plugins.memfit.report.overrides import overrides

_CAPACITY, _HELD, _HOST = "memfit.hardware.capacity_bytes", "memfit.hardware.held_bytes", "memfit.host_memory_bytes"

_SAME = 0.02
"""Share of the capacity by which drivers differ."""
_NO_LAUNCH = (
    "The log does not show its launch. Give it as for memfit plan (--config FILE or key=value words, --framework) to see what "
    "would have fitted."
)
_NO_HARDWARE = (
    "Which accelerator it was is not known here, so nothing is planned: --hardware NAME (h100, a100-80, ...) says it."
)
_PLANNED = (
    "The launch names a hardware group, so memfit planned other values than its words ask for, and the log does not show them: "
    "give the config as it ran, --config .hydra/config.yaml."
)


def diagnosis(args: argparse.Namespace, scan: Scan) -> Diagnosis:
    """Return the answer for a scanned log; raises `MemfitError` for what is wrong in the launch that the user gives."""
    cause = scan.cause
    answer = Diagnosis(log=args.log, scan=scan, cause=cause, notes=scan.notes)
    if cause is None:
        return answer
    _check(args)
    terms = terms_of(cause, model=_model(args))
    answer = replace(answer, devices=devices_of(cause), remarks=remarks_of(cause), terms=terms)
    own = bool(args.config or args.overrides)
    launch = None
    try:
        launch = source_of(args, scan.launch, args.log)
        if launch is None:
            return replace(answer, notes=(*answer.notes, _NO_LAUNCH))
        return _planned(args, answer, launch, cause)
    except HardwareNotDetected:
        said = _NO_HARDWARE
    except MemfitError as error:
        if own and not isinstance(error, NotModelled):
            raise
        said = f"No plan for the launch{_shown_in(launch, scan.launch)}: {error}"
    return replace(answer, notes=(*answer.notes, said))


def _check(args: argparse.Namespace) -> None:
    """Refuse names that nobody knows, whatever the log holds."""
    if args.hardware not in (None, catalog.AUTO):
        catalog.node(args.hardware)
    if args.framework is not None:
        registry.adapter(args.framework)


def _shown_in(launch: Source | None, logged: LoggedLaunch | None) -> str:
    where = launch.name if launch is not None else None if logged is None else logged.where
    return "" if where is None else f" ({where})"


def _planned(args: argparse.Namespace, answer: Diagnosis, launch: Source, cause: Finding) -> Diagnosis:
    question = _read(args, answer, launch, cause)
    problem = question.problem
    found = remedy(
        problem, question.pinned, cause, with_held=lambda held: _read(args, answer, launch, cause, held).problem
    )
    values = {key: value_at(question.config, key) for key in leaves(question.config) if key}
    changes = found.plan.changes if found.plan is not None and found.explained and not found.refusal else ()
    return replace(
        answer,
        terms=terms_of(
            cause,
            model=problem.model,
            ranks=problem.gpus_per_node * problem.nodes,
            tokens=token_counts(values, cause.phase),
            lengths=sequence_lengths(values),
        ),
        launch_source=launch.name,
        hardware=problem.hardware.name,
        notes=(
            *answer.notes,
            *([_PLANNED] if launch.was_planned else []),
            *_one_of_many(args, answer, problem.hardware.name),
            *_other_capacity(problem, cause),
        ),
        remedy=found,
        overrides=tuple(overrides(changes, absent=question.absent)),
    )


def _read(args: argparse.Namespace, answer: Diagnosis, launch: Source, cause: Finding, held: int = 0) -> Question:
    """Return the launch on the hardware of the log; ``held`` bytes of each device count as taken."""
    given = any(word.lstrip("+").startswith("hardware=") for word in args.overrides)
    named = named_hardware(args, launch) or os.environ.get("MEMFIT_HARDWARE") or next(iter(answer.devices), None)
    hardware = args.hardware if given else named
    return read_source(args, launch, hardware, *_observed(args, hardware, cause, held))


def _observed(args: argparse.Namespace, hardware: str | None, cause: Finding, held: int) -> list[str]:
    """Return what the log says about the machine, as settings; what the user says himself stands above it."""
    said: dict[str, int] = {_HELD: held} if held else {}
    capacity = cause.amounts.get("capacity")
    if capacity is not None and hardware not in (None, catalog.AUTO) and cause.kind.name == "gpu_oom":
        exact = exact_capacity(str(hardware), capacity)
        said |= {} if exact is None else {_CAPACITY: exact}
    total = cause.amounts.get("total")
    if total is not None and cause.kind.resource == "host":
        said[_HOST] = total.num_bytes
    given = {word.lstrip("+").split("=")[0] for word in args.overrides}
    return [f"{key}={value}" for key, value in said.items() if key not in given]


def _model(args: argparse.Namespace) -> ModelSpec | None:
    return resolve_model(args.model, environ=os.environ) if args.model else None


def _one_of_many(args: argparse.Namespace, answer: Diagnosis, used: str) -> tuple[str, ...]:
    """Return a sentence where the capacity fits several products and the user did not choose one."""
    if args.hardware or used not in answer.devices or len(answer.devices) == 1:
        return ()
    others = ", ".join(name for name in answer.devices if name != used)
    return (f"Planned for {used}; by its capacity it may also be {others} (--hardware NAME).",)


def _other_capacity(problem: Problem, cause: Finding) -> tuple[str, ...]:
    """Return a sentence where the message names another capacity than the product has: another product, or a part of one."""
    name, capacity = problem.hardware.name, cause.amounts.get("capacity")
    own = catalog.node(name).get("capacity_bytes") if name in catalog.names() else None
    if capacity is None or own is None or abs(capacity.num_bytes - own) <= _SAME * own:
        return ()
    planned = gib(problem.hardware.capacity_bytes)
    return (f"{name} has {gib(own)}, and the message names {gib(capacity.num_bytes)}: planned for {planned}.",)
