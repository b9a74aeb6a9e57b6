"""Images in verl's launches: how many tokens stand for them, what they cost, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.base.settings import Lengths
from hydra_plugins.memfit.frameworks.verl.images import per_prompt
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.memory.states import lora_parameters
from hydra_plugins.memfit.memory.vision import Images
from hydra_plugins.memfit.model.resolve import load
from support.verl_problem import ARR, read_problem

MODEL = f"{ARR}.model.path"
FREEZE = f"{ARR}.actor.freeze_vision_tower"
STATIC: dict[str, Any] = {
    f"{ARR}.actor.use_dynamic_bsz": False,
    f"{ARR}.actor.ppo_micro_batch_size_per_gpu": 4,
    f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu": 4,
    f"{ARR}.model.use_remove_padding": True,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 1024,
    "data.train_batch_size": 64,
    f"{ARR}.actor.ppo_mini_batch_size": 64,
}


def batch(**changed: Any) -> Batch:
    """Four sequences of up to 3000 tokens, packed."""
    values: dict[str, Any] = {
        "dynamic": False,
        "budget": 8192,
        "micro_batch": 4,
        "local_sequences": 32,
        "sequence_parallel": 1,
        "max_length": 3000,
        "packed": True,
        "hard_budget": True,
        "lengths": Lengths(),
    }
    return Batch(**{**values, **changed})


@pytest.mark.parametrize(
    ("changed", "prompt", "tokens"),
    [
        ({}, 1000, 4000),  # the prompts of the micro-batch are nothing but images
        ({}, 0, 0),
        ({"micro_batch": None}, 1000, 32000),  # unset: all sequences of the rank
        ({"micro_batch": 64}, 1000, 32000),  # no more sequences than there are
        ({"sequence_parallel": 2}, 1000, 4000),  # each rank sees the images of all
        ({"dynamic": True}, 1000, 8192),  # many short answers: a budget full of prompts
        ({"dynamic": True}, 100, 3200),  # and never more than the images of all sequences
        ({"dynamic": True, "sequence_parallel": 2}, 1000, 16384),
        ({"dynamic": True, "lengths": Lengths(mean=2048)}, 1000, 4000),  # as many sequences as the mean lets in
        ({"max_length": 800, "local_sequences": 4}, 1000, 3200),  # never more than the tokens
    ],
)
def test_images_of_a_micro_batch_are_bounded_by_its_prompts(changed: dict[str, Any], prompt: int, tokens: int):
    """Image tokens are in the prompts: sequences times the prompt's share, within the tokens of the micro-batch."""
    assert batch(**changed).image_tokens(prompt=prompt) == tokens


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [(Lengths(), 1024), (Lengths(image=256), 256), (Lengths(image=4096), 1024), (Lengths(image=0), 0)],
)
def test_a_prompt_is_all_image_unless_the_user_knows_better(lengths: Lengths, tokens: int):
    """The worst case counts where nothing is said; what is said never exceeds the prompt."""
    assert per_prompt(lengths, 1024) == tokens


def peak(model: str, values: dict[str, Any] | None = None, **settings: Any) -> int:
    """The predicted peak of the update on GPUs of 80 GB."""
    return (
        read_problem({**STATIC, MODEL: model, **(values or {})}, **settings)
        .estimate({})
        .phase("update_actor")
        .peak_bytes
    )


@pytest.mark.parametrize("model", ["qwen2-vl-7b", "qwen3-vl-30b-a3b"])
def test_more_images_need_more_memory(model: str):
    """Nothing but images, which counts where nothing is said, needs more than none."""
    none, most = (peak(model, lengths=Lengths(image=tokens)) for tokens in (0, 1024))

    assert none < most == peak(model)


def test_images_of_a_text_model_cost_nothing():
    """A model without a tower is counted as before, whatever the setting says."""
    assert peak("qwen2.5-7b", lengths=Lengths(image=1024)) == peak("qwen2.5-7b")


@pytest.mark.parametrize(
    ("version", "strategy", "saves"),
    [("0.7.1", "fsdp2", True), ("0.6.1", "fsdp", False), ("0.9.1", "fsdp2", False)],
)
def test_a_frozen_tower_keeps_no_activations_under_fsdp2_alone(version: str, strategy: str, saves: bool):
    """FSDP1's root has gradients, which flow through the tower all the same; the engine classes do not read the key."""
    values = {f"{ARR}.actor.strategy": strategy, FREEZE: True}
    gained = peak("qwen2.5-vl-7b", {**values, FREEZE: False}, version=version) - peak(
        "qwen2.5-vl-7b", values, version=version
    )
    tower = load("qwen2.5-vl-7b").vision
    assert tower is not None
    kept = Images(tower=tower, text_width=3584, tokens=4096, embedded=8192).saved_bytes(checkpointing=True)

    assert (gained >= kept) is saves
    assert (gained > 0) is (version != "0.9.1")


@pytest.mark.parametrize(
    ("version", "exclude", "adapted", "kept"),
    [
        ("0.9.1", None, True, True),
        ("0.9.1", ".*visual.*", False, True),  # transformers 5 makes the patches ask for gradients
        ("0.7.1", ".*visual.*", False, False),
        ("0.7.1", "visual", True, True),  # a pattern has to match a whole name
    ],
)
def test_adapters_are_on_the_tower_unless_they_are_excluded(
    version: str, exclude: str | None, adapted: bool, kept: bool
):
    """all-linear means the tower's modules, too; without adapters it keeps nothing where its inputs ask for no gradients."""
    model = load("qwen2.5-vl-7b")
    assert model.vision is not None
    sites = (*model.lora_sites, *(model.vision.lora_sites if adapted else ()))
    values = {**STATIC, MODEL: model.name, f"{ARR}.model.lora_rank": 32, f"{ARR}.model.exclude_modules": exclude}
    estimate = read_problem(values, version=version).estimate({})
    tower = Images(tower=model.vision, text_width=model.hidden_size, tokens=4096, embedded=8192)

    assert estimate.phase("optimizer_step").components.gradients == lora_parameters(sites=sites, rank=32) * 4 // 8
    both = tower.saved_bytes(checkpointing=True) + 2 * model.hidden_size * model.num_hidden_layers * 8192
    assert (estimate.phase("update_actor").components.activations >= both) is kept


@pytest.mark.parametrize(
    ("model", "values", "lengths", "says"),
    [
        ("qwen2.5-7b", {}, Lengths(), ""),
        ("qwen2.5-vl-7b", {}, Lengths(), "1024 image tokens (data.max_prompt_length). memfit.lengths.image=N says"),
        ("qwen2.5-vl-7b", {}, Lengths(image=0), ""),
        ("qwen2.5-vl-7b", {FREEZE: True}, Lengths(image=0), f"{FREEZE}=true is read by none of verl 0.9.1's workers"),
        (
            "gemma-3-4b",
            {},
            Lengths(),
            "the activations of images are not. Keep more room for them with memfit.margin=0.15.",
        ),
    ],
)
def test_what_is_counted_for_images_is_said(model: str, values: dict[str, Any], lengths: Lengths, says: str):
    """The assumption and how to do better; a tower that is not modelled by name; nothing where nothing is assumed."""
    found = [
        line
        for line in read_problem({**STATIC, MODEL: model, **values}, lengths=lengths).warnings
        if "image" in line or "vision" in line
    ]

    assert says in " ".join(found) if says else not found
