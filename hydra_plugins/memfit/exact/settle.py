"""Replaces the closed form of a training step by the compiler's own account of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.exact import verdicts
from hydra_plugins.memfit.exact.compiler import CompileFailed, Verdict
from hydra_plugins.memfit.exact.slices import slice_of
from hydra_plugins.memfit.exact.spec import Architecture, Program
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.memory.xla_training import XlaStep, state

MARGIN = 0.02
"""Share of the limit within which the verdict is not trusted: the compiled step is written after the runner's, it is not the
runner's, and another libtpu moves the line. Seen: 30.62 GiB here, 30.77 GiB for the runner's own code (7B, v4-16, 2 x 2176)."""
LEAST_SQUEEZE = 0.45
"""Share of its natural temporaries below which no program was squeezed (0.61 was the least seen): beyond it, do not ask."""
_EVERY_S = 20.0


def settle(
    closed: PhaseEstimate, step: XlaStep, *, mesh: tuple[int, int, int], hardware: Hardware, environ: Mapping[str, str]
) -> tuple[PhaseEstimate, str]:
    """Return the phase by the compiler's account, and a sentence about it; the closed form stands where it gave no verdict.

    Raises `CompilerMissing` when jax or libtpu is not installed.
    """
    resident = state(step).total_bytes + closed.engine.total_bytes
    if resident + LEAST_SQUEEZE * (closed.peak_bytes - resident) > hardware.capacity_bytes:
        return closed, f"{_what(step)}: too large for any verdict of the compiler, it was not asked"
    program = _program(step, mesh, hardware)
    try:
        verdict = verdicts.ask(program, environ=environ, progress=_Progress(_what(step)))
    except CompileFailed as error:
        return closed, f"{_what(step)}: {error}"
    return _phase(closed, step, verdict, hardware.held_bytes), _sentence(step, verdict)


def _program(step: XlaStep, mesh: tuple[int, int, int], hardware: Hardware) -> Program:
    model = step.model
    return Program(
        kind="train_step",
        slice=slice_of(hardware, mesh[0] * mesh[1] * mesh[2]),
        mesh=mesh,
        architecture=Architecture(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            tied=model.tie_word_embeddings and not step.separate_head,
        ),
        sequences_per_device=step.sequences,
        tokens=step.tokens,
        optimizer=step.optimizer,
        accumulate=step.accumulates,
        remat=step.remat,
    )


def _phase(closed: PhaseEstimate, step: XlaStep, verdict: Verdict, held_bytes: int) -> PhaseEstimate:
    """Keep the exact state; what the compiler adds to it has one name, because it does not say which array is which."""
    held = state(step)
    used = verdict.used_bytes if verdict.fits else max(verdict.used_bytes, verdict.capacity_bytes + 1)
    reference = held.weights // 2 if step.reference else 0  # the compiled program has no frozen copy
    rest = max(0, used - (held.total_bytes - reference))
    budget = int(verdict.capacity_bytes * (1 - MARGIN)) - held_bytes
    return replace(closed, trainer=held + MemoryBreakdown(activations=rest), budget_bytes=budget)


def _what(step: XlaStep) -> str:
    return f"train_step of {step.model.name}, {step.sequences} x {step.tokens} tokens a device"


def _sentence(step: XlaStep, verdict: Verdict) -> str:
    if verdict.fits:
        return f"{_what(step)}: the compiler ({verdict.compiler}) uses {gib(verdict.used_bytes)} of {gib(verdict.capacity_bytes)}"
    return f"{_what(step)}: the compiler ({verdict.compiler}) refuses, {gib(verdict.used_bytes)} of {gib(verdict.capacity_bytes)}"


class _Progress:
    """Says on stderr what the compile is doing: at once, and then every `_EVERY_S` seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.said = what, float("-inf")

    def __call__(self, stage: str) -> None:
        if time.monotonic() - self.said >= _EVERY_S:
            self.said = time.monotonic()
            print(f"memfit: asking the TPU compiler about the {self.what}: {stage}", file=sys.stderr, flush=True)
