"""How long a plan takes: ``python -m support.speed`` prints it (run with ``PYTHONPATH=tests``).

A plan is reading the composed config, searching, and the final prediction; composing the config and importing memfit are
not in it. Wall-clock time of one process, median and largest of the repetitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import NoPlanFits
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.compose.launch import Launch
from hydra_plugins.memfit.compose.overrides import Order
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks import registry

LAUNCHES = {
    "7B, 8 x A100-80": ("a100-80", 8, 1, "Qwen/Qwen2.5-7B-Instruct", ("algorithm.adv_estimator=grpo",)),
    "7B with critic and reference, 8 x A40": (
        "a40", 8, 1, "Qwen/Qwen2.5-7B-Instruct", ("actor_rollout_ref.actor.use_kl_loss=true",),
    ),
    "671B MoE, 1024 x H200": (
        "h200", 8, 128, "deepseek-ai/DeepSeek-V3",
        ("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.ppo_mini_batch_size=1024",
         "actor_rollout_ref.rollout.tensor_model_parallel_size=8"),
    ),
}  # fmt: skip


def launch(hardware: str, gpus: int, nodes: int, model: str, words: Sequence[str]) -> Launch:
    """Return a composed verl launch, ready to be read."""
    config = OmegaConf.create(dict(registry.adapter("verl").defaults("0.9.1")))
    given = [
        "actor_rollout_ref.rollout.name=vllm",
        "data.max_response_length=8192",
        f"actor_rollout_ref.model.path={model}",
        f"trainer.n_gpus_per_node={gpus}",
        f"trainer.nnodes={nodes}",
        *words,
    ]
    config.merge_with_dotlist(given)
    facts = plain(OmegaConf.load(conf_dir() / "hardware" / f"{hardware}.yaml"))["memfit"]["hardware"]
    node = {"hardware": facts, "framework": "verl", "framework_version": "0.9.1"}
    order = Order(explicit=frozenset(), pinned=frozenset(), settings=frozenset())
    return Launch(config=plain(config), node=node, order=order)


def plan_seconds(name: str, repetitions: int = 30) -> list[float]:
    """Return the seconds of each repetition."""
    composed = launch(*LAUNCHES[name])
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        try:
            composed.plan()
        except NoPlanFits as refusal:
            assert refusal.plan is not None
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    for name in LAUNCHES:
        taken = plan_seconds(name)
        print(f"{name:42s} median {1e3 * statistics.median(taken):5.1f} ms   largest {1e3 * max(taken):5.1f} ms")
