"""Names that verl takes as plain text, by release: a slip in one is said before a GPU is touched."""

from __future__ import annotations

from collections.abc import Mapping

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled, guess
from hydra_plugins.memfit.frameworks.verl import defaults
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, REF, ROLLOUT
from hydra_plugins.memfit.frameworks.verl.versions import Version, parse
from hydra_plugins.memfit.frameworks.view import MISSING, View

_EVER: Version = (10**6,)

_ESTIMATORS: Mapping[str, Version] = {
    **dict.fromkeys(("gae", "grpo", "grpo_passk", "opo", "reinforce_plus_plus", "remax", "rloo"), (0, 4)),
    "reinforce_plus_plus_baseline": (0, 4),
    "gpg": (0, 5),
    **dict.fromkeys(("grpo_vectorized", "rloo_vectorized"), (0, 6)),
    **dict.fromkeys(("gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"), (0, 7)),
}
"""Advantage estimators and the first release line that has them (``AdvantageEstimator`` in trainer/ppo/core_algos.py)."""

_STRATEGIES: Mapping[str, Version] = {
    **dict.fromkeys(("fsdp", "fsdp2", "megatron"), (0, 4)),
    **dict.fromkeys(("torchtitan", "veomni"), (0, 7)),
    **dict.fromkeys(("automodel", "mindspeed_fsdp", "mindspeed_megatron"), (0, 8)),
    "fsdp_turbo": (0, 9),
}
"""Training strategies and the first release line that has them (trainer/main_ppo.py, workers/config/engine.py)."""

_FUSED: Mapping[str, Version] = {"torch": (0, 4), "triton": (0, 4), "liger": (0, 9)}
"""Fused heads (models/transformers/monkey_patch.py); under any other name verl goes on with the unfused one."""

_ASYNC_ONLY = (0, 7)
"""First release whose config class refuses every other rollout.mode (workers/config/rollout.py)."""

_ROLLOUTS: Mapping[str, tuple[Version, Version, str]] = {
    "hf": ((0, 4), (0, 6), "it generates inside the trainer, whose model is one FSDP unit then"),
    "trtllm": ((0, 7), _EVER, "what TensorRT-LLM takes of a GPU is not known"),
}
"""Rollouts that are not modelled: the first release that has one, the first that has it no more, and why."""


def refuse_unknown_names(view: View, version: str) -> None:
    """Raise `ConfigError` for a name that the release does not have, `NotModelled` for a rollout that is not modelled."""
    _refuse_rollout(view, version)
    for section in (ACTOR, REF, "critic"):
        refuse_unknown_strategy(view, f"{section}.strategy", version)
    _refuse(view, f"{ROLLOUT}.mode", ("async",) if parse(version) >= _ASYNC_ONLY else ("async", "sync"), version)
    if view.flag(f"{MODEL}.use_fused_kernels", False):
        _refuse(view, f"{MODEL}.fused_kernel_options.impl_backend", _known(_FUSED, version), version)


def refuse_unknown_strategy(view: View, key: str, version: str) -> None:
    """Raise `ConfigError` where ``key`` names a training strategy that the release does not have."""
    _refuse(view, key, _known(_STRATEGIES, version), version)


def unknown_estimator(view: View, version: str) -> tuple[str, ...]:
    """Return what to say of an advantage estimator that is none of verl's: it may be registered by the user's own code."""
    key, known = "algorithm.adv_estimator", _known(_ESTIMATORS, version)
    name = view.text(key, "gae")
    if name in known:
        return ()
    return (
        f"{key}={name} is none of verl {version}'s ({', '.join(known)}).{guess(name, known)} Unless your own code registers "
        "it, verl stops after the first rollout.",
    )


def _known(since: Mapping[str, Version], version: str) -> tuple[str, ...]:
    return tuple(sorted(name for name, first in since.items() if first <= parse(version)))


def _refuse(view: View, key: str, known: tuple[str, ...], version: str) -> None:
    name = view.raw(key)
    if name in (MISSING, None, "???", *known):
        return
    near = guess(str(name), known) or f" Set {key}={known[0]}."
    raise ConfigError(
        f"{key}={name}: verl {version} has no such {key.rpartition('.')[2]}; it has {', '.join(known)}.{near}"
    )


def _refuse_rollout(view: View, version: str) -> None:
    key, instead = f"{ROLLOUT}.name", f"Set {ROLLOUT}.name=vllm"
    name = view.text(key, "vllm").removesuffix("_async")
    if name in defaults.ENGINES:
        return
    present = {other: why for other, (first, end, why) in _ROLLOUTS.items() if first <= parse(version) < end}
    if name in present:
        raise NotModelled(
            f"{key}={name} is not modelled: {present[name]}. {instead}, or go on unplanned with memfit.strict=false."
        )
    known = sorted((*defaults.ENGINES, *present))
    near = guess(name, known) or f" {instead}."
    raise ConfigError(f"{key}={name}: verl {version} has no such rollout; it has {', '.join(known)}.{near}")
