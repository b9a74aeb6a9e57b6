"""Plans built by hand from the project's own types: what a report is given, without a framework or a planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.memory.allocator import EXPANDABLE, Margin
from hydra_plugins.memfit.memory.breakdown import Estimate, HostEstimate, MemoryBreakdown, PhaseEstimate
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.problem import Change, Plan, Problem

HARDWARE = Hardware(
    name="h200",
    product="NVIDIA H200",
    kind="gpu",
    capacity_bytes=150_000_000_000,
    held_bytes=GIB,
    source="conf/hardware/h200.yaml",
)
MODEL = ModelSpec(
    name="Qwen/Qwen2.5-3B-Instruct",
    source="conf/model/qwen2.5-3b.yaml",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
    parameters=3_085_938_688,
    embedding_parameters=311_164_928,
    root_parameters=311_166_976,
    layer_parameters=77_076_992,
    active_parameters=3_085_938_688,
)
BUDGET = 130 * GIB
MICRO_BATCH = Change(
    key="actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    old=32,
    new=4,
    kind="neutral",
    why="fewer sequences in one forward pass",
)
OFFLOAD = Change(
    key="actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    old=False,
    new=True,
    kind="neutral",
    why="the Adam moments wait in host memory between updates",
)
BATCH = Change(key="data.train_batch_size", old=64, new=32, kind="semantic", why="fewer prompts in one step")


def phase(name: str, trainer: Mapping[str, int], engine: Mapping[str, int] | None = None) -> PhaseEstimate:
    """Return a phase whose components are given in GiB."""
    parts = [MemoryBreakdown(**{key: value * GIB for key, value in given.items()}) for given in (trainer, engine or {})]
    return PhaseEstimate(name=name, trainer=parts[0], engine=parts[1], budget_bytes=BUDGET)


ROLLOUT = phase("rollout", {"weights": 3, "context": 1}, {"weights": 6, "kv_cache": 60, "context": 2})
UPDATE = phase(
    "update_actor", {"weights": 12, "gradients": 12, "optimizer_states": 24, "logits": 40}, {"engine_residual": 3}
)
TOO_MUCH = phase("old_log_prob", {"weights": 12, "logits": 190, "context": 1}, {"engine_residual": 3})
ENOUGH = phase("old_log_prob", {"weights": 12, "logits": 24, "context": 1}, {"engine_residual": 3})
HOST = HostEstimate(peak_bytes=90 * GIB, budget_bytes=1500 * GIB)
FITS = Estimate(phases=(ROLLOUT, ENOUGH, UPDATE), host=HOST)
DIES = Estimate(phases=(ROLLOUT, TOO_MUCH, UPDATE), host=HOST)


def make_problem(requested: Estimate = FITS, **values: object) -> Problem:
    """Return a problem that knows one estimate."""
    problem = Problem(
        framework="verl",
        framework_version="0.9.1",
        hardware=HARDWARE,
        model=MODEL,
        gpus_per_node=1,
        nodes=1,
        settings=Settings(),
        margin=Margin(share=0.05, segments=EXPANDABLE),
        knobs=(),
        estimate=lambda _: requested,
    )
    return replace(problem, **values)  # type: ignore[arg-type]


def as_requested(estimate: Estimate = FITS, **values: object) -> Plan:
    """Return a plan that changes nothing."""
    return Plan(problem=make_problem(estimate, **values), requested=estimate, estimate=estimate)


def changed(*changes: Change, **values: object) -> Plan:
    """Return a plan that fits because of ``changes``."""
    plan = Plan(problem=make_problem(DIES), requested=DIES, estimate=FITS, changes=changes)
    return replace(plan, **values)  # type: ignore[arg-type]
