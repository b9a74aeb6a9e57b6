"""Whatever stands in a config: a plan or one clear error. A few hundred cases here, 100,000 in the tier ``fuzz``."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, example, given, seed, settings

from support import fuzz
from support.fuzz import GONE, Case

SHARDS = 20
CASES = int(os.environ.get("MEMFIT_FUZZ_CASES", "100000"))
"""Cases of the long tier, over all shards."""
SEED = int(os.environ.get("MEMFIT_FUZZ_SEED", "0"))
"""Another number draws other cases."""
ALL = list(HealthCheck)
PHASES = (Phase.generate, Phase.shrink)
"""Without `Phase.explain`, which keeps a trace of every case: gigabytes, once one of thousands has failed."""
NAN, INFINITE = float("nan"), float("inf")
FOUND = (
    Case(base="verl 0.9.1", settings=(("hardware.capacity_range_bytes", NAN),)),
    Case(base="verl 0.9.1", settings=(("hardware.sources", "none"),)),
    Case(base="areal 1.0.4", settings=(("model", -1.5),)),
    Case(base="areal 1.0.4", values=(("gconfig", {}),), settings=(("goal", "fast"),)),
    Case(base="mllm-jax", values=(("num_pre_q", -INFINITE),)),
    Case(base="mllm-jax", values=(("rollout.n", 10**400),)),
    Case(base="mllm-jax", values=(("rollout.batch_size", 42553232),)),
    Case(base="jax", values=(("per_device", 10**9),)),
    Case(base="transformers", values=(("generation.num_return_sequences", 10**9),)),
    Case(base="mllm-jax", settings=(("hardware.capacity_bytes", 16 << 30),)),
    Case(base="mllm-jax variables", values=(("NUM_PRE_Q", 1),), pins=("NUM_PRE_Q",)),
)
"""Cases that once ended in a traceback, ran without end, or gave an error about something that nobody asked for."""
LAZY = (
    Case(
        base="verl 0.9.1", lazy=True,
        values=(("reward.reward_model.enable", "${actor_rollout_ref}"), ("actor_rollout_ref.rollout.layered_summon", "${reward}")),
    ),
    Case(base="verl 0.9.1", values=(("trainer.nnodes", "${trainer.nnodes}"),), lazy=True),
    Case(
        base="verl 0.9.1", lazy=True,
        values=(("trainer.nnodes", "${trainer.n_gpus_per_node}"), ("trainer.n_gpus_per_node", "${trainer.nnodes}")),
    ),
    Case(base="areal 1.0.4", values=(("actor", "${actor}"),), lazy=True),
    Case(base="areal 1.0.4", values=(("actor", "${rollout}"), ("rollout", "${actor}")), lazy=True),
    Case(base="verl 0.9.1", values=(("data", GONE),), lazy=True),
)  # fmt: skip
"""Interpolations in a circle, and a section that is gone."""


@settings(max_examples=60, suppress_health_check=ALL)
@given(case=fuzz.cases())
def test_every_config_ends_in_a_plan_or_one_error(case: Case) -> None:
    """Values of other types, missing keys, absurd numbers, other frameworks' sections, circular interpolations."""
    fuzz.answer(case)


@pytest.mark.parametrize("case", [*FOUND, *LAZY], ids=repr)
def test_what_once_failed(case: Case) -> None:
    """The examples that were found stay found."""
    fuzz.answer(case)


@pytest.mark.parametrize("base", list(fuzz.BASES))
def test_the_bases_plan(base: str) -> None:
    """Each launch that is distorted is one that plans, plainly and through OmegaConf, to the same values."""
    plain, lazy = (fuzz.planned(fuzz.launch(Case(base=base, lazy=way))) for way in (False, True))

    assert plain.changes == lazy.changes


@pytest.mark.fuzz
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_hundred_thousand_configs(shard: int) -> None:
    """The same, at length; the seeds are fixed, so that a failure can be seen again."""
    count = 0

    @seed(SEED * SHARDS + shard)
    @settings(max_examples=CASES // SHARDS, suppress_health_check=ALL, phases=PHASES)
    @given(case=fuzz.cases())
    def run(case: Case) -> None:
        nonlocal count
        count += 1
        fuzz.answer(case)

    run()
    assert count >= CASES // SHARDS


def test_the_fuzz_can_fail() -> None:
    """A defect in the planner is seen, and not taken for an error of the user's."""

    @settings(max_examples=50, suppress_health_check=ALL)
    @example(case=Case(base="verl 0.9.1"))
    @given(case=fuzz.cases())
    def run(case: Case) -> None:
        assert not isinstance(fuzz.answer(case), fuzz.Plan)

    with pytest.raises(AssertionError):
        run()
