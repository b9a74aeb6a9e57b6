"""Any JAX runner that names its keys: memfit.framework=jax and memfit.mapping."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits, NotModelled
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Problem
from hydra_plugins.memfit.planning.search import check, make_plan
from support.tpu_models import model

CONFIG: dict[str, Any] = {
    "model": {"path": "somewhere"},
    "train": {"per_device": 8, "accumulate": 1, "batch": 8, "length": 2048, "remat": "layer", "optimizer": "adamw"},
}
NAMES = {"model": "model.path", "micro_batch_size": "train.per_device", "tokens": "train.length"}


def problem(
    mapping: dict[str, str], config: dict[str, Any] = CONFIG, hardware: str = "v4-16", goal: str = "fit", **more: Any
) -> Problem:
    """Return the adapter's problem for a runner with these names."""
    context = Context(
        hardware=catalog.load(hardware),
        settings=Settings(mapping=mapping, goal=goal),
        resolve_model=lambda _: model("qwen2.5-7b"),
        **more,
    )
    return registry.adapter("jax").problem(config, context)


def test_accumulation_follows_the_micro_batch() -> None:
    """With a key for the accumulation steps, both change together and an optimizer step sees the same batch."""
    plan = make_plan(problem(NAMES | {"accumulation_steps": "train.accumulate"}))
    new = {change.key: change.new for change in plan.changes}
    assert plan.fits
    assert plan.trains_the_same
    assert new["train.per_device"] * new["train.accumulate"] == 8
    assert new["train.per_device"] < 8


def test_goal_fast_grows_the_micro_batch() -> None:
    """With memfit.goal=fast the micro-batch takes over from the accumulation as far as it fits."""
    names = NAMES | {"accumulation_steps": "train.accumulate", "remat": "train.remat"}
    train = CONFIG["train"] | {"per_device": 1, "accumulate": 16, "length": 1024}
    plan = make_plan(problem(names, CONFIG | {"train": train}, goal="fast"))
    new = {change.key: change.new for change in plan.changes}
    assert plan.fits
    assert new["train.per_device"] > 1
    assert new["train.per_device"] * new["train.accumulate"] == 16


def test_runner_that_accumulates_by_itself() -> None:
    """With the batch of an optimizer step alone, only the micro-batch changes, and divides it."""
    plan = make_plan(problem(NAMES | {"batch_size": "train.batch"}))
    assert [change.key for change in plan.changes] == ["train.per_device"]
    assert 8 % plan.changes[0].new == 0  # type: ignore[operator]
    assert plan.trains_the_same


def test_without_accumulation_a_smaller_batch_changes_training() -> None:
    """Where nothing accumulates, a smaller batch is proposed, and not taken."""
    with pytest.raises(NoPlanFits) as caught:
        make_plan(problem(NAMES))
    proposals = caught.value.plan.proposals  # type: ignore[attr-defined]
    assert [(change.key, change.kind) for change in proposals] == [("train.per_device", "semantic")]


def test_pinned_accumulation_is_not_moved() -> None:
    """With the accumulation steps pinned, the micro-batch is no neutral knob any more."""
    pins = frozenset({"train.accumulate"})
    with pytest.raises(NoPlanFits):
        make_plan(problem(NAMES | {"accumulation_steps": "train.accumulate"}, pinned=pins), pinned=pins)


def test_checkpointing_of_each_layer_needs_less() -> None:
    """A runner that says that it checkpoints each layer needs far less than one that does not say."""
    silent = check(problem(NAMES)).estimate.binding_phase.peak_bytes
    spoken = check(problem(NAMES | {"remat": "train.remat"})).estimate.binding_phase.peak_bytes
    assert spoken < 0.5 * silent


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({}, "needs micro_batch_size, tokens, model"),
        ({"tokens": "train.length"}, "needs micro_batch_size, model"),
        (NAMES | {"batch": "train.batch"}, "does not know batch"),
        (
            NAMES | {"tokens": "train.lenght"},
            "memfit.mapping.tokens names train.lenght, and the config has no such key",
        ),
        (NAMES | {"optimizer": "model.path"}, "model.path=somewhere is not modelled on TPU; known: sgd, lion, adamw"),
    ],
)
def test_incomplete_mappings_are_refused(mapping: dict[str, str], text: str) -> None:
    """A mapping that misses a name, has an unknown one, or points nowhere is one clear error."""
    with pytest.raises(ConfigError) as caught:
        check(problem(mapping))
    assert text in str(caught.value)


def test_model_without_a_key() -> None:
    """With +model= or --model the runner needs no key for it."""
    names = {name: key for name, key in NAMES.items() if name != "model"}
    assert problem(names, model=model("qwen2.5-3b")).model.name == "qwen2.5-3b"


def test_gpu_is_not_modelled() -> None:
    """JAX on a GPU is another compiler's business."""
    with pytest.raises(NotModelled):
        problem(NAMES, hardware="h100")


def test_nothing_is_recognised_by_its_keys() -> None:
    """No config is claimed: only memfit.framework=jax chooses this adapter."""
    assert not registry.adapter("jax").recognises(CONFIG)
