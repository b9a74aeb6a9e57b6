"""Images in verl's batches: how many of a micro-batch's tokens stand for them, and whether the vision tower is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hydra_plugins.memfit.base.settings import Lengths
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import is_megatron
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.model.spec import ModelSpec

FREEZE = f"{ACTOR}.freeze_vision_tower"
_MODULES = ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv")
"""A module of the tower, by its names since and before transformers 4.52."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """The vision tower of a model that is trained."""

    frozen_parameters: int = 0
    """Its parameters without gradients and moments, on one unsharded copy."""
    has_gradients: bool = True
    """Gradients flow through it, so that its activations are kept."""
    lora_sites: tuple[tuple[int, int, int], ...] = ()
    """Its linear modules that adapters are put on."""


def per_prompt(lengths: Lengths, prompt: int) -> int:
    """Return the image tokens that one prompt of up to ``prompt`` tokens has at most: all of it, unless the user knows better."""
    return prompt if lengths.image is None else min(lengths.image, prompt)


def actor_tower(view: View, launch: Launch, *, version: int) -> Tower:
    """
    Return what is trained of the actor's tower under FSDP of that version.

    A frozen tower keeps nothing for a backward pass under FSDP2. Under FSDP1 its patch embedding and mergers are views of
    the root's flat parameter, which has gradients because the embedding has them; so its blocks' inputs are kept all the
    same, and only the blocks go without gradients and moments.
    """
    tower, model = launch.actor_model.vision, launch.actor_model
    if tower is None or not is_frozen(view, launch):
        return Tower()
    if version == 2:
        return Tower(frozen_parameters=model.vision_parameters, has_gradients=False)
    return Tower(frozen_parameters=tower.num_layers * tower.layer_parameters)


def adapted_tower(view: View, launch: Launch) -> Tower:
    """
    Return what is trained of the actor's tower under LoRA: adapters on all of its linear modules, unless they are excluded.

    verl makes the embeddings' output ask for gradients; transformers 5 (verl 0.9) does that to the patch embedding as well, so
    that activations are kept even without adapters in the tower.
    """
    tower = launch.actor_model.vision
    if tower is None:
        return Tower()
    if view.raw(f"{MODEL}.target_modules") in (MISSING, None, "all-linear") and not _excluded(view):
        return Tower(lora_sites=tower.lora_sites)
    return Tower(has_gradients=parse(launch.version) >= (0, 9))


def _excluded(view: View) -> bool:
    """Whether peft leaves the tower's modules out: it matches a text as a pattern against whole names, a list against ends."""
    pattern = view.raw(f"{MODEL}.exclude_modules")
    if not isinstance(pattern, str):
        return False
    try:
        return any(re.fullmatch(pattern, name) is not None for name in _MODULES)
    except re.error:
        return False


def is_frozen(view: View, launch: Launch) -> bool:
    """Whether the release's workers freeze the tower where they are asked to: 0.6 and 0.7 do, the engine classes do not."""
    return view.flag(FREEZE, False) and launch.behaviour.legacy_workers and parse(launch.version) >= (0, 6)


def notes(view: View, launch: Launch) -> Iterator[str]:
    """Yield what a user should know about how images are counted."""
    model = launch.actor_model
    if not model.vision_parameters:
        return
    if model.vision is None or is_megatron(view):
        yield not_counted(model)
        return
    if view.flag(FREEZE, False) and not is_frozen(view, launch):
        yield f"{FREEZE}=true is read by none of verl {launch.version}'s workers: the vision tower is trained, and counted so."
    if launch.settings.lengths.image is None:
        yield assumed(model, "data.max_prompt_length", view.integer("data.max_prompt_length", 512))


def not_counted(model: ModelSpec) -> str:
    """Return the warning where a tower's activations are not modelled."""
    return (
        f"{model.name} has a vision tower: its weights are counted, the activations of images are not. "
        "Keep more room for them with memfit.margin=0.15."
    )


def assumed(model: ModelSpec, key: str, tokens: int) -> str:
    """Return the note on how many image tokens are counted where the user has not said it."""
    return (
        f"{model.name} sees images: each prompt is counted as nothing else, {tokens} image tokens ({key}). "
        "memfit.lengths.image=N says what one prompt has at most; 0 for data without images."
    )
