"""The launch behind a log: what the command line says, else what the log shows; and the plan that would have fitted."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, HardwareNotDetected, MemfitError, NotModelled
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.cli.config_file import ConfigFile, nested, read_config_file
from hydra_plugins.memfit.cli.launch import Question, read_launch
from hydra_plugins.memfit.cli.main import surroundings
from hydra_plugins.memfit.cli.pasted import Pasted, read_pasted
from hydra_plugins.memfit.compose.plain import leaves, value_at
from hydra_plugins.memfit.diagnosis.devices import exact_capacity
from hydra_plugins.memfit.diagnosis.diagnose import Diagnosis, devices_of, remarks_of, terms_of
from hydra_plugins.memfit.diagnosis.finding import Finding
from hydra_plugins.memfit.diagnosis.logged import LoggedLaunch
from hydra_plugins.memfit.diagnosis.remedy import remedy
from hydra_plugins.memfit.diagnosis.scan import Scan
from hydra_plugins.memfit.diagnosis.tokens import sequence_lengths, token_counts
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.adapter import KnowsKeys
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.model.resolve import resolve_model
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import Problem
from hydra_plugins.memfit.report.overrides import overrides

_CAPACITY, _HELD, _HOST = "memfit.hardware.capacity_bytes", "memfit.hardware.held_bytes", "memfit.host_memory_bytes"

_VARIABLES = ("PYTORCH_", "VERL_", "VLLM_", "SGLANG_", "CUDA_", "NCCL_")
"""Beginnings of the variables that are taken from a log: those of the launch, none that says where memfit looks something up."""
_SAME = 0.02
"""Share of the capacity by which drivers differ."""
_NO_LAUNCH = (
    "The log does not show its launch. Give it as for memfit plan (--config FILE or key=value words, --framework) to see what "
    "would have fitted."
)
_NO_HARDWARE = (
    "Which accelerator it was is not known here, so nothing is planned: --hardware NAME (h100, a100-80, ...) says it."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """Where a launch is read."""

    source: str
    own: bool
    """The user gave it; what is wrong in it is his to correct."""
    config: ConfigFile = field(default_factory=ConfigFile)
    pasted: Pasted = field(default_factory=lambda: Pasted(words=()))
    """What a command line in the log holds."""
    framework: str | None = None
    version: str | None = None


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
    try:
        launch = _launch(args, scan.launch)
        if launch is None:
            return replace(answer, notes=(*answer.notes, _NO_LAUNCH))
        return _planned(args, answer, launch, cause)
    except HardwareNotDetected:
        said = _NO_HARDWARE
    except MemfitError as error:
        if own and not isinstance(error, NotModelled):
            raise
        said = f"No plan for the launch{_shown_in(scan.launch)}: {error}"
    return replace(answer, notes=(*answer.notes, said))


def _check(args: argparse.Namespace) -> None:
    """Refuse names that nobody knows, whatever the log holds."""
    if args.hardware not in (None, catalog.AUTO):
        catalog.node(args.hardware)
    if args.framework is not None:
        registry.adapter(args.framework)


def _shown_in(logged: LoggedLaunch | None) -> str:
    return "" if logged is None else f" ({logged.source}, line {logged.line} of the log)"


def _launch(args: argparse.Namespace, logged: LoggedLaunch | None) -> _Launch | None:
    """Return the launch of the command line; without one, the launch that the log shows."""
    words = [word for word in args.overrides if not word.lstrip("+").startswith("memfit.")]
    if args.config or words:
        given = read_config_file(args.config) if args.config else ConfigFile()
        return _Launch(source=f"--config {args.config}" if args.config else "the command line", own=True, config=given)
    if logged is None:
        return None
    values = nested(logged.config or {})
    return _Launch(
        source=f"{logged.source}, line {logged.line} of the log",
        own=False,
        config=ConfigFile(values=values),
        pasted=_pasted(logged),
        framework=args.framework or (None if values else logged.framework),
        version=_likeliest_version(values),
    )


def _pasted(logged: LoggedLaunch) -> Pasted:
    """Return the words of the launch in a log; raises `ConfigError` where they choose a config that the log does not show."""
    if not logged.command:
        return Pasted(words=logged.words)
    pasted = read_pasted([logged.command])
    if any(word.split("=")[0] == "--config" for word in pasted.words):
        raise ConfigError("it names a config file: give it by --config FILE, and the line's key=value words behind it.")
    return replace(pasted, environ={k: v for k, v in pasted.environ.items() if k.startswith(_VARIABLES)})


def _likeliest_version(config: Mapping[str, Any]) -> str | None:
    """Return the newest release that has most of the keys of a printed config; ``None`` where no config was printed."""
    if not config:
        return None
    adapter = registry.recognise(config)
    if not isinstance(adapter, KnowsKeys):
        return None
    counts = dict.fromkeys(adapter.versions, 0)
    for key in leaves(config):
        for version in adapter.versions_with(key):
            counts[version] = counts.get(version, 0) + 1
    return max(reversed(adapter.versions), key=lambda version: counts[version])


def _planned(args: argparse.Namespace, answer: Diagnosis, launch: _Launch, cause: Finding) -> Diagnosis:
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
        launch_source=launch.source,
        hardware=problem.hardware.name,
        notes=(*answer.notes, *_one_of_many(args, answer, problem.hardware.name), *_other_capacity(problem, cause)),
        remedy=found,
        overrides=tuple(overrides(changes, absent=question.absent)),
    )


def _read(args: argparse.Namespace, answer: Diagnosis, launch: _Launch, cause: Finding, held: int = 0) -> Question:
    """Return the launch on the hardware of the log; ``held`` bytes of each device count as taken."""
    words = (*launch.pasted.words, *args.overrides)
    asked = argparse.Namespace(**vars(args))
    asked.framework = args.framework or launch.framework
    asked.framework_version = args.framework_version or launch.version
    if not any(word.lstrip("+").startswith("hardware=") for word in words):
        asked.hardware = args.hardware or os.environ.get("MEMFIT_HARDWARE") or next(iter(answer.devices), None)
    asked.overrides = [*words, *_observed(args, asked.hardware, cause, held)]
    if launch.own:
        return read_launch(asked, launch.config)
    asked.pasted = launch.pasted
    with surroundings(launch.pasted.environ):
        return read_launch(asked, launch.config)


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
