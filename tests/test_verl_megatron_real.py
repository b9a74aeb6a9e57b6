"""verl 0.9.1's own Megatron config, composed by Hydra with a hardware group and put before verl's own checks."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.frameworks.verl.adapter import WRITABLE_KEYS
from support.verl_launch import Composed, Job, compose_jobs, words
from support.verl_wheels import installed_package

pytestmark = pytest.mark.verl

PARTS = "actor_rollout_ref"
MEGATRON = f"{PARTS}.actor.megatron"
LAUNCH = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 128,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 7168,
    f"{PARTS}.model.path": "Qwen/Qwen2.5-14B-Instruct",
    f"{PARTS}.actor.ppo_mini_batch_size": 64,
    f"{PARTS}.actor.use_dynamic_bsz": True,
    f"{PARTS}.actor.use_kl_loss": True,
    f"{MEGATRON}.tensor_model_parallel_size": 2,
    f"{PARTS}.rollout.name": "vllm",
    f"{PARTS}.rollout.n": 4,
}
WAYS = {"model_engine": ("ppo_trainer", ["model_engine=megatron"]), "config name": ("ppo_megatron_trainer", [])}


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Return a config by dotted key."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {
        key: value for name, child in node.items() for key, value in flat(child, f"{path}.{name}".lstrip(".")).items()
    }


def compose(way: str, *more: str) -> Composed:
    """Compose the launch in one of the two ways to verl's Megatron config."""
    name, choice = WAYS[way]
    config_dir = str(installed_package() / "trainer" / "config")
    job = Job(config_dir=config_dir, config_name=name, words=[*choice, *words(LAUNCH), *more], validate=True)
    return compose_jobs([job])[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_planned_launch_passes_verls_own_checks(way: str) -> None:
    """On 40 GB cards the launch does not fit as asked; what is written is listed, and verl accepts it."""
    before, after = compose(way), compose(way, "+hardware=a100-40")
    old, new = flat(before.resolved), flat(after.resolved)
    changed = {key for key in new if key not in old or new[key] != old[key]} - {key for key in new if "memfit" in key}

    assert (before.error, after.error) == ("", "")
    assert changed & WRITABLE_KEYS
    assert {key.rpartition(".")[2] for key in changed} <= {key.rpartition(".")[2] for key in WRITABLE_KEYS}
    assert "memfit" not in after.resolved
    assert "hardware" not in after.resolved


def test_impossible_sizes_stop_the_launch() -> None:
    """Three pipeline stages of two GPUs do not divide eight: the reason is said before anything starts."""
    wrong = compose("model_engine", f"{MEGATRON}.pipeline_model_parallel_size=3", "+hardware=h100")

    assert "does not divide the 8 GPUs" in wrong.error
