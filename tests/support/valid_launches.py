"""Launches that somebody might write: every value is one that the framework takes. Drawn for the properties of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from hydra_plugins.memfit.planning.problem import SOLVE, Change, Knob, Plan
from support import fuzz
from support.fuzz import Case

_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
_POWERS = st.integers(0, 5).map(lambda n: 2**n)
_MODELS = st.sampled_from(
    ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct")
)
_LENGTH = st.integers(1, 16).map(lambda n: 256 * n)
_FLAG = st.booleans()

_VERL: dict[str, st.SearchStrategy[Any]] = {
    "actor_rollout_ref.model.path": _MODELS,
    "actor_rollout_ref.model.enable_gradient_checkpointing": _FLAG,
    "data.max_prompt_length": _LENGTH,
    "data.max_response_length": _LENGTH,
    "trainer.n_gpus_per_node": st.sampled_from((1, 2, 4, 8)),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": _POWERS,
    f"{_ACTOR}.use_kl_loss": _FLAG,
    f"{_ACTOR}.fsdp_config.param_offload": _FLAG,
    f"{_ACTOR}.fsdp_config.optimizer_offload": _FLAG,
    f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu": _POWERS,
    f"{_REF}.log_prob_micro_batch_size_per_gpu": _POWERS,
    f"{_ROLLOUT}.gpu_memory_utilization": st.integers(2, 18).map(lambda n: n / 20),
}
_AREAL: dict[str, st.SearchStrategy[Any]] = {
    "actor.path": _MODELS,
    "actor.gradient_checkpointing": _FLAG,
    "actor.mb_spec.max_tokens_per_mb": st.integers(8, 64).map(lambda n: 512 * n),
    "gconfig.max_new_tokens": _LENGTH,
    "train_dataset.max_length": st.integers(1, 8).map(lambda n: 256 * n),
    "sglang.mem_fraction_static": st.integers(4, 18).map(lambda n: n / 20),
}
_JAX: dict[str, st.SearchStrategy[Any]] = {"per_device": _POWERS, "length": _LENGTH}
_TPU: dict[str, st.SearchStrategy[Any]] = {
    "rollout.global_length": _LENGTH,
    "rollout.max_length_sample": _LENGTH,
    "train.micro_batch_size_per_device": _POWERS,
}
_GENERATE: dict[str, st.SearchStrategy[Any]] = {
    "generation.num_return_sequences": st.integers(1, 32),
    "generation.max_prompt_length": _LENGTH,
    "generation.max_new_tokens": _LENGTH,
    "generation.micro_batch_size": st.integers(1, 64),
    "generation.chunk_size": st.integers(1, 32),
}
SPACES: Mapping[str, dict[str, st.SearchStrategy[Any]]] = {
    "verl": _VERL, "areal": _AREAL, "jax": _JAX, "mllm-jax": _TPU, "transformers": _GENERATE,
}  # fmt: skip
TOKENS: Mapping[str, tuple[str, ...]] = {
    "verl": (
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu", f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu",
        "data.max_response_length", "data.max_prompt_length",
    ),
    "areal": ("actor.mb_spec.max_tokens_per_mb",),
    "jax": ("per_device", "length"),
    "mllm-jax": ("rollout.global_length", "rollout.max_length_sample"),  # a whole batch needs no buffer to accumulate in
    "transformers": ("generation.micro_batch_size", "generation.max_prompt_length", "generation.max_new_tokens"),
}  # fmt: skip
"""Keys whose growth never lowers what a phase needs."""
_BASES = ("areal 0.4.1", "areal 1.0.4", "jax", "mllm-jax", "transformers", "verl 0.6.1 with a critic", "verl 0.9.1")


@st.composite
def cases(draw: st.DrawFn, *, framework: str | None = None, goals: tuple[str, ...] = ("fit", "fast")) -> Case:
    """Draw a launch with valid values of its size, on an accelerator of 16 to 180 GiB."""
    base = draw(st.sampled_from([name for name in _BASES if framework in (None, framework_of(name))]))
    space = SPACES[framework_of(base)]
    chosen = draw(st.lists(st.sampled_from(sorted(space)), unique=True))
    values = tuple((key, draw(space[key])) for key in chosen)
    goal = draw(st.sampled_from(goals))
    capacity = draw(st.integers(16, 180)) << 30
    own = (("goal", goal), ("hardware.capacity_bytes", capacity))
    pins = tuple(draw(st.lists(st.sampled_from(chosen), max_size=1))) if chosen else ()
    return Case(base=base, values=values, settings=own, pins=pins)


def framework_of(base: str) -> str:
    """Return the name of a base's framework."""
    return fuzz.BASES[base].framework


def value(case: Case, key: str) -> Any:
    """Return the value that a case gives a key, else the base's."""
    return dict(case.values).get(key, fuzz.value_at(fuzz.resolved(case.base), key))


def setting(case: Case, key: str, new: Any) -> Case:
    """Return the case with one key set."""
    return replace(case, values=(*(pair for pair in case.values if pair[0] != key), (key, new)))


def applied(case: Case, changes: tuple[Change, ...]) -> Case:
    """Return the case with the changes of its plan asked for."""
    for change in changes:
        case = setting(case, change.key, change.new)
    return case


def with_capacity(case: Case, capacity_bytes: int) -> Case:
    """Return the case on an accelerator of another size."""
    own = dict(case.settings) | {"hardware.capacity_bytes": capacity_bytes}
    return replace(case, settings=tuple(own.items()))


def slower(plan: Plan, other: Plan) -> str:
    """Return what makes ``plan`` slower than ``other``, a plan of the same launch: the dearest knob in which they differ.

    Empty where nothing does. Under ``memfit.goal=fit`` what was asked for is no loss, and nor is anything faster. Shares that
    are solved for come last: they take what the other knobs leave.
    """
    knobs = sorted((*plan.problem.knobs, *other.problem.knobs), key=lambda knob: (_is_share([knob]), -knob.cost))
    for key in dict.fromkeys(knob.key for knob in knobs if knob.kind == "neutral" and knob.key not in _COSTS_NOTHING):
        same = [knob for knob in knobs if knob.key == key]
        mine, others = _loss(plan, same), _loss(other, same)
        if abs(mine - others) > (_SOLVED_STEP * max(_scale(plan, same), _scale(other, same)) if _is_share(same) else 0):
            said = f"{key}={_planned(plan, same[0])} where the other plan has {_planned(other, same[0])}"
            return said if mine > others else ""
    return ""


_COSTS_NOTHING = {"actor_rollout_ref.rollout.max_model_len"}
"""Offered only as prompt + response, which no sequence of these launches passes."""

_SOLVED_STEP = 0.02
"""A solved share is rounded to a hundredth of its GPU, in each of two plans."""


def _is_share(knobs: list[Knob]) -> bool:
    return SOLVE in knobs[0].candidates


def _scale(plan: Plan, knobs: list[Knob]) -> int:
    """Return the unit of a loss: of shares of two GPUs the bytes count, but what was asked for is a share."""
    return plan.problem.hardware.capacity_bytes if _is_share(knobs) and plan.problem.settings.goal == "fast" else 1


def _planned(plan: Plan, knob: Knob) -> Any:
    return {change.key: change.new for change in plan.changes}.get(knob.key, knob.requested)


def _loss(plan: Plan, knobs: list[Knob]) -> float:
    """Return how slow the planned value of a knob is: more is slower."""
    value, asked = _planned(plan, knobs[0]), knobs[0].requested
    if plan.problem.settings.goal == "fit" and asked is not None:
        return 0.0 if value == asked else max(0.0, _place(value, knobs) - _place(asked, knobs))
    return _place(value, knobs) * _scale(plan, knobs)


def _place(value: Any, knobs: list[Knob]) -> float:
    """Return a number for a knob's value, larger where it is slower, and the same whatever the size of the GPU."""
    ladder = [*(v for k in knobs for v in k.fast), knobs[0].requested, *(v for k in knobs for v in k.candidates)]
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ladder.index(value)
    numbers = [v for v in ladder if isinstance(v, (int, float))]
    return -value if SOLVE in ladder or numbers[0] > numbers[-1] else value
