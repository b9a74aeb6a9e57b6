"""Plans for many launches, each put before verl's own checks, and before those that its workers make later."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.adapter import WRITABLE_KEYS
from hydra_plugins.memfit.frameworks.view import View
from support.case_validation import cases
from support.verl_launch import Composed, Job, compose_jobs, words
from support.verl_model import checkpoint_without_weights
from support.verl_wheels import installed_package

pytestmark = pytest.mark.verl

PARTS = "actor_rollout_ref"
HARDWARE = {"l40s": (1, 4, 8), "a100-40": (1, 2, 4, 8), "a100-80": (1, 2, 4, 8), "h200": (1, 2, 8), "rtx4090": (2, 8)}
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B")
LAUNCHES, PUBLISHED = 32, 6


def draw(number: int) -> tuple[str, dict[str, Any]]:
    """Return (hardware, values) of one launch that verl itself would accept, apart from its size."""
    chance = random.Random(number)
    hardware = chance.choice(sorted(HARDWARE))
    gpus = chance.choice(HARDWARE[hardware])
    batch, samples = chance.choice((64, 256, 1024)), chance.choice((4, 8, 16))
    values: dict[str, Any] = {
        "algorithm.adv_estimator": chance.choice(("grpo", "grpo", "gae")),
        "data.train_batch_size": batch,
        "data.max_prompt_length": chance.choice((256, 1024, 2048)),
        "data.max_response_length": chance.choice((512, 2048, 8192)),
        f"{PARTS}.model.path": chance.choice(MODELS),
        f"{PARTS}.rollout.name": chance.choice(("vllm", "sglang")),
        f"{PARTS}.rollout.n": samples,
        f"{PARTS}.rollout.gpu_memory_utilization": chance.choice((0.4, 0.6, 0.85)),
        f"{PARTS}.actor.ppo_mini_batch_size": chance.choice([size for size in (32, 64, 256) if size <= batch]),
        f"{PARTS}.actor.use_kl_loss": chance.choice((True, False)),
        f"{PARTS}.actor.use_dynamic_bsz": chance.choice((True, False)),
        f"{PARTS}.actor.strategy": chance.choice(("fsdp", "fsdp2")),
        "trainer.n_gpus_per_node": gpus,
    }
    if chance.random() < 0.3:  # verl checks the rank of an adapter for vLLM by importing vLLM
        values |= {f"{PARTS}.model.lora_rank": 32, f"{PARTS}.rollout.load_format": "safetensors"}
        values |= {f"{PARTS}.rollout.name": "sglang"}
    if chance.random() < 0.3:
        values |= {"critic.ppo_micro_batch_size_per_gpu": 4}
    return hardware, values


def published() -> list[tuple[str, dict[str, Any]]]:
    """Return (hardware, values) of public launches, with the keys that the newest release has; the same each time."""
    chosen = random.Random(7).sample([case for case in cases() if _can_be_checked(case)], PUBLISHED)
    newest = View(defaults.load(defaults.VERSIONS[-1]))
    return [
        (
            case["hardware"],
            {
                f"{PARTS}.rollout.name": "vllm",
                "data.train_batch_size": 1024,
                "data.max_prompt_length": 512,
                "data.max_response_length": 512,
                **{key: value for key, value in case["overrides"].items() if newest.has(key)},
                f"{PARTS}.model.path": case["model"] if "/" in case["model"] else f"Qwen/{case['model']}",
                "trainer.n_gpus_per_node": case["gpus"],
            },
        )
        for case in chosen
    ]


def _can_be_checked(case: dict[str, Any]) -> bool:
    """Whether a published run is a step on FSDP, and on one node; adapters would make verl ask for an installed vLLM."""
    values = case["overrides"]
    is_plain = not (case["megatron"] or case.get("framework") or values.get(f"{PARTS}.model.lora_rank"))
    generates = values.get(f"{PARTS}.rollout.name", "vllm") in ("vllm", "sglang")
    return is_plain and generates and case["nodes"] == 1 and values.get("data.train_batch_size") != 0


@cache
def composed() -> list[tuple[dict[str, Any], Composed, Composed]]:
    """Compose every launch without and with its hardware group; verl checks what was planned."""
    config_dir = str(installed_package() / "trainer" / "config")
    drawn = [*(draw(number) for number in range(LAUNCHES)), *published()]
    critic = f"critic.model.path={checkpoint_without_weights(Path(mkdtemp()), '3b')}"  # verl reads it to validate
    lines = [([*words(values), critic], hardware) for hardware, values in drawn]
    before = [Job(config_dir=config_dir, words=line) for line, _ in lines]
    after = [
        Job(config_dir=config_dir, words=[*line, f"+hardware={hardware}", "memfit.report=off"], validate=True)
        for line, hardware in lines
    ]
    done = compose_jobs(before + after, timeout=540)
    return [(drawn[i][1], done[i], done[len(drawn) + i]) for i in range(len(drawn))]


def accepted() -> list[tuple[dict[str, Any], Composed, Composed]]:
    """Return the launches for which there is a plan."""
    return [case for case in composed() if not case[2].error]


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}".lstrip(".")).items()}


def test_verl_accepts_every_plan() -> None:
    """A launch either has a plan that verl's validation accepts, or memfit says that nothing fits."""
    objections = {
        i: after.error
        for i, (_, _, after) in enumerate(composed())
        if after.error and "no plan fits" not in after.error
    }

    assert objections == {}
    assert len(accepted()) >= LAUNCHES // 2, "most of these launches can be made to fit"


def test_plans_change_only_what_the_documents_list() -> None:
    """What differs from the launch without memfit is a writable key, or follows one by verl's own interpolation."""
    for values, before, after in accepted():
        old, new = flat(before.resolved), flat(after.resolved)
        changed = {key for key in new if key not in old or new[key] != old[key]}
        written = changed & WRITABLE_KEYS

        assert {key.rpartition(".")[2] for key in changed} <= {key.rpartition(".")[2] for key in written}, values


def test_what_is_learned_stands() -> None:
    """Batch, mini-batch, samples, lengths, LoRA and the estimator are as they were asked for."""
    never = ("batch_size", ".n", "_length", "lora_rank", "adv_estimator", ".path", "use_kl_loss")
    for values, _, after in accepted():
        new = flat(after.resolved)
        kept = {key: new[key] for key in values if key.endswith(never) and "micro" not in key}

        assert kept == {key: values[key] for key in kept}


def test_the_workers_of_verl_would_go_on() -> None:
    """What verl's workers assert after the GPUs are taken holds for every plan that started from a sound launch."""
    for values, _, after in accepted():
        actor, rollout = after.resolved[PARTS]["actor"], after.resolved[PARTS]["rollout"]
        world = values["trainer.n_gpus_per_node"]
        ranks = world // actor["ulysses_sequence_parallel_size"]
        batch = values["data.train_batch_size"] * rollout["n"]

        assert actor["use_dynamic_bsz"] == rollout["log_prob_use_dynamic_bsz"], values
        assert world % rollout["tensor_model_parallel_size"] == 0, values
        if actor["use_dynamic_bsz"]:
            longest = values["data.max_prompt_length"] + values["data.max_response_length"]
            sequence_parallel = actor["ulysses_sequence_parallel_size"]
            assert actor["ppo_max_token_len_per_gpu"] * sequence_parallel >= longest, values
            assert rollout["log_prob_max_token_len_per_gpu"] * sequence_parallel >= longest, values
        else:
            mini = actor["ppo_mini_batch_size"] * rollout["n"]
            assert mini // ranks % actor["ppo_micro_batch_size_per_gpu"] == 0, values
            assert batch // ranks % rollout["log_prob_micro_batch_size_per_gpu"] == 0, values
