"""The keys of MLLM-JAX's GRPO runner at both ends of its history, and the launch that they describe.

Three layouts ask for the same things. ``environment`` (commit 8c45109): upper-case variables, which win over the YAML.
``flat`` (the same commit): the same names in lower case. ``nested`` (821fe33 on; 8b19c02 is the newest on main): ``rollout.*``
and ``train.*``. There ``rollout.batch_size`` counts the prompts of all hosts, before it counted those of one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.view import LARGEST

SWEEP, SPLIT, NEWEST = "8c45109", "821fe33", "8b19c02"
"""Commits of the runner: the one of the out-of-memory sweep, the one that split the update, the newest on main."""

_NAMES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # what: (environment, flat, nested); the first key of a layout is the one that a plan would set
    "model": (("MODEL_PATH",), ("model_path",), ("model_path", "model.path")),
    "prompts": (("BATCH_SIZE",), ("batch_size",), ("rollout.batch_size",)),
    "completions": (("NUM_PRE_Q",), ("num_pre_q",), ("rollout.n", "rollout.num_pre_q")),
    "prompt_tokens": (("GLOBAL_LENGTH",), ("global_length",), ("rollout.global_length",)),
    "response_tokens": (("MAX_LENGTH_SAMPLE",), ("max_length_sample",), ("rollout.max_length_sample",)),
    "accumulation": (("GRAD_ACCUM_STEPS",), ("grad_accum_steps",), ("train.grad_accum_steps",)),
    "beta": (("BETA",), ("beta",), ("train.beta", "beta")),
    "mesh": (("MESH_SHAPE_FSDP",), ("mesh_shape",), ("mesh_shape",)),
    "micro": (
        ("TRAIN_MICRO_BATCH_SIZE",),
        ("train.micro_batch_size", "micro_batch_size"),
        ("train.micro_batch_size", "micro_batch_size"),
    ),
    "micro_per_device": (
        ("TRAIN_PER_DEVICE_MICRO_BATCH_SIZE",),
        ("train.micro_batch_size_per_device", "micro_batch_size_per_device"),
        ("train.micro_batch_size_per_device", "micro_batch_size_per_device"),
    ),
    "optimizer": ((), (), ("train.optimizer.name", "optimizer.name", "optimizer")),
    "remat": ((), (), ("train.remat_policy", "remat")),
    "backend": (("ROLLOUT_BACKEND",), ("rollout_backend",), ("rollout.backend", "rollout_backend")),
}
_INERT = (
    "STEPS",
    "MAX_LENGTH_TOTAL",
    "PPO_EPOCHS",
    "EVAL_EVERY_STEPS",
    "EVAL_BATCHES",
    "EVAL_SPLIT",
    "WANDB_PROJECT",
    "WANDB_NAME",
)
"""Variables of the runner that decide no memory; MAX_LENGTH_TOTAL is read and not used by the loss."""
ENVIRONMENT = frozenset((*_INERT, *(key for names in _NAMES.values() for key in names[0])))
"""Every variable that the runner reads."""
_FLAT = ("num_pre_q", "global_length", "max_length_sample")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # plugins/training/config.py and scripts/run_grpo_gsm8k_training.py at 8c45109, plugins/training/config.py at 8b19c02
    "environment": {
        "model": "Qwen/Qwen2.5-7B-Instruct", "prompts": 1, "completions": 8, "prompt_tokens": 512,
        "response_tokens": 64, "accumulation": 1, "beta": 0.0, "mesh": "1,-1,1",
    },
    "nested": {
        "model": "Qwen/Qwen2.5-3B-Instruct", "prompts": 16, "completions": 8, "prompt_tokens": 512,
        "response_tokens": 1024, "accumulation": 1, "beta": 0.0, "mesh": "auto",
    },
}  # fmt: skip
_MICRO_PER_DEVICE = 4
"""Default of train.micro_batch_size_per_device at 8b19c02."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a config asks the runner for. ``key[what]`` is the key that a plan would set."""

    layout: str
    version: str
    model: str
    prompts: int
    completions: int
    prompt_tokens: int
    response_tokens: int
    accumulation: int
    beta: float
    mesh: str
    micro: int | None
    """Sequences of one process in one micro-batch."""
    micro_per_device: int | None
    optimizer: str
    remat: str
    backend: str
    key: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def names(config: Mapping[str, Any]) -> bool:
    """Whether a config has keys that only this runner has."""
    rollout = config.get("rollout")
    nested = isinstance(rollout, Mapping) and {"global_length", "max_length_sample"} & set(rollout)
    return bool(nested) or sum(k in config for k in _FLAT) > 1 or sum(k in config for k in ENVIRONMENT) > 1


def commits(key: str) -> tuple[str, ...]:
    """Return the commits of the runner that may read ``key``: none for a misspelt variable or a near miss of a known key."""
    if key == key.upper():
        return (SWEEP, SPLIT) if key in ENVIRONMENT else ()
    known = {name for names in _NAMES.values() for keys in names[1:] for name in keys}
    if key not in known and difflib.get_close_matches(key, known, n=1, cutoff=0.9):
        return ()
    return (SWEEP, SPLIT, NEWEST)


def read(config: Mapping[str, Any], environ: Mapping[str, str], version: str | None) -> Request:
    """Return what ``config`` asks for; raises `ConfigError` with the key and what would be valid."""
    layout = _layout(config, environ, version)
    source = _Source(config, environ if layout != "nested" else {}, layout)
    default = _DEFAULTS["nested" if layout == "nested" else "environment"]
    micro, per_device = source.count("micro"), source.count("micro_per_device")
    if layout == "nested" and version != SPLIT and micro is None and not source.given("micro_per_device"):
        per_device = _MICRO_PER_DEVICE
    split = micro is not None or per_device is not None
    return Request(
        layout=layout,
        version=version or (NEWEST if layout == "nested" else SPLIT if split else SWEEP),
        model=str(source.value("model") or default["model"]),
        micro=micro,
        micro_per_device=per_device,
        **{name: source.count(name) or default[name] for name in ("prompts", "completions", "accumulation")},
        **{name: source.count(name) or default[name] for name in ("prompt_tokens", "response_tokens")},
        beta=source.number("beta"),
        mesh=str(source.value("mesh") or default["mesh"]),
        optimizer=str(source.value("optimizer") or "lion"),
        remat=str(source.value("remat") or "dots_with_no_batch_dims"),
        backend=str(source.value("backend") or "naive"),
        key={name: source.key(name) for name, keys in _NAMES.items() if any(keys)},
        warnings=tuple(source.shadowed()),
    )


def _layout(config: Mapping[str, Any], environ: Mapping[str, str], version: str | None) -> str:
    given = [key for key in config if key in ENVIRONMENT]
    if version == NEWEST and given:
        raise ConfigError(
            f"the runner at {NEWEST} ignores {', '.join(given)}: it takes its hyper-parameters from YAML (rollout.batch_size, "
            f"train.micro_batch_size_per_device, ...). Give those, or say memfit.framework_version={SWEEP}."
        )
    if given or (version == SWEEP and not _has_flat(config)):
        return "environment"
    if _has_flat(config):
        return "flat"
    ambient = [key for key in ("NUM_PRE_Q", "GLOBAL_LENGTH", "MAX_LENGTH_SAMPLE") if key in environ]
    return "environment" if ambient and "rollout" not in config else "nested"


def _has_flat(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in _FLAT)


class _Source:
    """Looks a quantity up under the names of one layout, and casts it as the runner does (0 and "" mean the default)."""

    def __init__(self, config: Mapping[str, Any], environ: Mapping[str, str], layout: str) -> None:
        self.config, self.environ = config, environ
        self.column = ("environment", "flat", "nested").index(layout)

    def value(self, name: str) -> Any:
        """Return the value: an upper-case key of the config, then the environment, then the layout's own key."""
        variable = _NAMES[name][0][:1]
        for where in (self.config, self.environ):
            for key in variable if self.column < 2 else ():
                if where.get(key) not in (None, ""):
                    return where[key]
        return self._own(name)

    def given(self, name: str) -> bool:
        """Whether one of the names is there at all, be it with null."""
        return any(_has(self.config, key) for key in _NAMES[name][self.column])

    def key(self, name: str) -> str:
        """Return the key that stands for ``name`` in this config."""
        keys = _NAMES[name][self.column]
        return next((key for key in keys if _has(self.config, key)), keys[0] if keys else name)

    def count(self, name: str) -> int | None:
        """Return a whole number >= 1, or ``None`` for 0, "" and null."""
        value = self.value(name)
        if value is None or value == 0:
            return None
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if isinstance(value, bool) or number < 0 or (isinstance(value, float) and number != value):
            raise ConfigError(
                f"{self.key(name)} is {value!r}; it must be a whole number above 0, e.g. {self.key(name)}=8"
            )
        if number > LARGEST:
            raise ConfigError(
                f"{self.key(name)} is above {LARGEST}, the largest value that memfit reads. Is it a slip?"
            )
        return number or None

    def number(self, name: str) -> float:
        """Return a number, 0.0 when there is none."""
        value = self.value(name)
        try:
            return float(value or 0.0)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"{self.key(name)} is {value!r}; it must be a number, e.g. {self.key(name)}=0.0"
            ) from None

    def shadowed(self) -> list[str]:
        """Say which keys of the YAML a variable of the environment replaces."""
        clashes = [(names[0][0], names[1][0]) for names in _NAMES.values() if names[0] and names[1]]
        return [
            f"{variable}={self.environ[variable]} in the environment wins over {key}={_find(self.config, key)}"
            for variable, key in clashes
            if self.column == 1 and self.environ.get(variable) and _has(self.config, key)
        ]

    def _own(self, name: str) -> Any:
        values = (_find(self.config, key) for key in _NAMES[name][self.column])
        return next((value for value in values if value is not None and not isinstance(value, Mapping)), None)


def _find(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _has(config: Mapping[str, Any], key: str) -> bool:
    head, _, last = key.rpartition(".")
    node = _find(config, head) if head else config
    return isinstance(node, Mapping) and last in node
