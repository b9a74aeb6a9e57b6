"""Any Hydra app that samples with Hugging Face ``generate``: how many questions, and how many answers, at once.

``generation.micro_batch_size`` questions are asked at once and ``generation.chunk_size`` of their ``num_return_sequences``
answers are generated at once. memfit fills both; all answers of all tokens are generated whatever it chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.transformers import versions
from hydra_plugins.memfit.frameworks.transformers.keys import (
    DEFAULTS,
    SECTION,
    Keys,
    attention,
    cache,
    element_bytes,
    is_misspelt,
    refuse_quantization,
)
from hydra_plugins.memfit.frameworks.view import MISSING, View, listable
from hydra_plugins.memfit.memory.allocator import asks_for_expandable
from hydra_plugins.memfit.memory.breakdown import Estimate, PhaseEstimate
from hydra_plugins.memfit.memory.generation import Call, process
from hydra_plugins.memfit.memory.sampling import Sampler
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Knob, Problem

_MICRO_BATCHES = (256, 192, 128, 96, 64, 48, 40, 32, 28, 24, 20, *range(16, 0, -1))
_MOST_ROWS = 1024
"""Sequences at once above which decoding on one GPU is no longer limited by reading the weights; nothing is gained there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    view: View
    keys: Keys
    context: Context
    model: ModelSpec
    version: str
    element_bytes: int

    def count(self, name: str, default: int, view: View | None = None) -> int:
        """Return a whole number of the app's config."""
        return (view or self.view).integer(self.keys[name], default)

    @property
    def wanted(self) -> int:
        """Answers to each question."""
        return self.count("num_return_sequences", 1)

    @property
    def beams(self) -> int:
        """Beams of a search, 1 without."""
        return self.count("num_beams", 1)

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt; raises `ConfigError` where nobody says it."""
        key, longest = self.keys["max_prompt_length"], self.context.settings.lengths.max
        found = self.view.optional_integer(key)
        if found is None and longest is None:
            raise ConfigError(
                f"{key} is not set, so the length of the prompts is unknown. Set it (+{key}=512), name the app's own key "
                "(memfit.mapping.max_prompt_length=KEY), or give memfit.lengths.max, prompt and answer together, in tokens."
            )
        if found is None and longest is not None:
            return max(1, longest - self.new_tokens(self.view))
        return min(found or 1, longest or found or 1)

    def new_tokens(self, view: View) -> int:
        """Longest answer; raises `ConfigError` where the app does not limit it."""
        key = self.keys["max_new_tokens"]
        found = view.optional_integer(key)
        if found is None:
            raise ConfigError(
                f"{key} is not set, so the length of the answers is unknown. Set it (+{key}=512), or name the app's own "
                "key: memfit.mapping.max_new_tokens=KEY"
            )
        return found

    def call(self, view: View) -> Call:
        """Return the call of generate that ``view`` asks for, at its largest."""
        questions = self.count("micro_batch_size", 1, view)
        answers = self.beams if self.beams > 1 else min(self.wanted, self.count("chunk_size", self.wanted, view))
        keys = self.keys
        return Call(
            rows=questions * answers,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens(view),
            element_bytes=self.element_bytes,
            attention=attention(view, keys["attn_implementation"]),
            cache=cache(view, keys["cache_implementation"], use_cache=view.flag(keys["use_cache"], True)),
            padded=questions > 1,
            sampler=self._sampler(view),
            software=versions.software(self.version),
        )

    def _sampler(self, view: View) -> Sampler:
        keys = self.keys
        return Sampler(
            do_sample=view.flag(keys["do_sample"], True),
            temperature=view.number(keys["temperature"], 1.0, low=0.0, high=1e6) != 1.0,
            top_k=view.integer(keys["top_k"], 50, minimum=0) > 0,
            top_p=view.number(keys["top_p"], 1.0, low=0.0, high=1.0) < 1.0,
            beams=self.beams > 1,
            keeps_scores=view.flag(keys["output_scores"], False),
        )

    def estimate(self, values: Mapping[str, object]) -> Estimate:
        """Return the prediction for ``values`` by the app's keys."""
        call = self.call(self.view.with_values(values))
        peak = process(self.model, call, expandable_segments=asks_for_expandable(self.context.environ))
        return Estimate(phases=(PhaseEstimate(name="generate", trainer=peak, budget_bytes=self.context.budget_bytes),))


class TransformersAdapter:
    """Hugging Face ``generate`` in an app of the user's own."""

    name = "transformers"
    versions = versions.VERSIONS

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a section ``generation`` says how many answers or how many tokens to generate."""
        section = config.get(SECTION)
        return isinstance(section, Mapping) and bool({"num_return_sequences", "max_new_tokens"} & set(section))

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return the documented keys with the values that hold where an app has none."""
        versions.pick(version)
        return deepcopy(DEFAULTS)

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return all versions, and none for what is almost a key that is read here: an app's other keys are its own."""
        return () if is_misspelt(key) else self.versions

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the launch; raises `ConfigError` and `NotModelled` with the key, the value and the fix."""
        if context.hardware.kind != "gpu":
            raise NotModelled(
                f"generate on {context.hardware.name} ({context.hardware.kind}) is not modelled; name a "
                "GPU, e.g. +hardware=h200."
            )
        view = View(config)
        keys = Keys(view, context.settings.mapping)
        version = versions.pick(context.settings.framework_version)
        refuse_quantization(view, keys["quantization"])
        size, assumed = element_bytes(view, keys["dtype"], major=versions.numbers(version)[0])
        launch = _Launch(
            view=view,
            keys=keys,
            context=context,
            model=_model(view, keys["model"], context),
            version=version,
            element_bytes=size,
        )
        launch.call(view)  # what cannot be read is an error now, not in the middle of a search
        return Problem(
            framework=self.name,
            framework_version=version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=context.gpus_per_node or context.hardware.gpus_per_node or 1,
            nodes=context.nodes or 1,
            settings=context.settings,
            margin=context.margin,
            knobs=tuple(_knobs(launch)),
            estimate=launch.estimate,
            warnings=(*([assumed] if assumed else []), *_warnings(launch)),
        )


def _model(view: View, key: str, context: Context) -> ModelSpec:
    if context.model is not None:
        return context.model
    path = view.raw(key)
    if not isinstance(path, str) or path == "???":
        raise ConfigError(
            f"{key} is not set, so the model is unknown. Set it, add +model=qwen2.5-7b, or name the app's own key: "
            "memfit.mapping.model=KEY"
        )
    return context.resolve_model(path)


def _knobs(launch: _Launch) -> list[Knob]:
    """Fewer questions at once come first: a single question needs no padding. Then its answers are split."""
    knobs = []
    if launch.view.raw(launch.keys["micro_batch_size"]) is not MISSING:
        knobs.append(_questions(launch))
    if launch.view.raw(launch.keys["chunk_size"]) is not MISSING and launch.beams == 1:
        knobs.append(_answers(launch))
    if launch.view.raw(launch.keys["max_new_tokens"]) is not MISSING:
        tokens = launch.new_tokens(launch.view)
        halves = tuple(tokens >> i for i in range(1, tokens.bit_length()))
        knobs.append(
            Knob(
                key=launch.keys["max_new_tokens"],
                requested=tokens,
                candidates=halves,
                cost=90,
                kind="semantic",
                why="shorter answers",
            )
        )
    return knobs


def _questions(launch: _Launch) -> Knob:
    requested = launch.view.optional_integer(launch.keys["micro_batch_size"])
    every = launch.view.optional_integer(launch.keys["num_questions"])
    most = max(1, min(every or _MOST_ROWS, _MOST_ROWS // max(launch.wanted, launch.beams)))
    sizes = sorted({n for n in (*_MICRO_BATCHES, most) if n <= most}, reverse=True)
    lower = [n for n in sizes if requested is None or n < requested]
    return Knob(
        key=launch.keys["micro_batch_size"],
        requested=requested,
        candidates=tuple(lower) if requested is None else (requested, *lower),
        fast=() if requested is None else tuple(n for n in sizes if n > requested),
        cost=1,
        why="questions asked at once",
        required=True,
    )


def _answers(launch: _Launch) -> Knob:
    wanted = listable(launch.wanted, launch.keys["num_return_sequences"])
    requested = launch.view.optional_integer(launch.keys["chunk_size"])
    sizes = sorted({ceil_div(wanted, parts) for parts in range(1, wanted + 1)}, reverse=True)
    lower = [n for n in sizes if requested is None or n < requested]
    return Knob(
        key=launch.keys["chunk_size"],
        requested=requested,
        candidates=tuple(lower) if requested is None else (requested, *lower),
        fast=() if requested is None else tuple(n for n in sizes if n > requested),
        cost=2,
        why=f"answers generated at once; all {wanted} are generated in turn",
        required=True,
    )


def _warnings(launch: _Launch) -> list[str]:
    view, keys = launch.view, launch.keys
    said = list(launch.context.hardware.warnings)
    for name in ("micro_batch_size", "chunk_size"):
        if view.raw(keys[name]) is MISSING and not (name == "chunk_size" and (launch.beams > 1 or launch.wanted == 1)):
            said.append(
                f"the config has no {keys[name]}, so memfit cannot set it: add `{keys[name]}: null` to the app, or name "
                f"its own key with memfit.mapping.{name}=KEY"
            )
    if versions.newer_than_known(launch.version):
        said.append(f"transformers {launch.version} is newer than the newest release read ({versions.VERSIONS[-1]})")
    if view.raw(keys["device_map"]) in ("auto", "balanced", "sequential"):
        said.append(f"{keys['device_map']} may spread the model over several GPUs; the plan takes it to be on one")
    if launch.model.num_linear_attention_layers:
        said.append("the recurrent states of linear-attention layers are not counted")
    return said
