"""What is compiled: one program of a GRPO run on a described TPU slice, as plain data that can be sent and cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from math import prod

from hydra_plugins.memfit.base.errors import ConfigError

PROGRAMS = ("train_step", "prefill", "decode", "probe")
OPTIMIZERS = ("lion", "adamw", "sgd")
REMAT = ("dots_with_no_batch_dims", "nothing_saveable", "layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A TPU slice as libtpu describes it without a TPU."""

    topology: str
    """Name for ``jax.experimental.topologies``: ``v4:2x2x2``."""
    chip_config: str
    """``megacore`` where the two cores of a chip are one JAX device (v4, v5p), else ``default``."""
    chips_per_host: tuple[int, int, int]
    devices: int
    capacity_bytes: int
    """The limit that the compiler checks against, a device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shapes of a Llama-like decoder with biases on q, k and v (Qwen2)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tied: bool = False
    """Whether the lm_head shares the embedding's array; the runner kept two arrays whatever the checkpoint says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One jitted program and the slice that it is compiled for."""

    kind: str
    slice: Slice
    mesh: tuple[int, int, int]
    """Sizes of the axes (dp, fsdp, tp); their product is the number of devices."""
    architecture: Architecture
    sequences_per_device: int
    tokens: int
    """Padded tokens of one sequence, prompt and response together."""
    new_tokens: int = 0
    """Decode bucket: prefill sees ``tokens - new_tokens``."""
    optimizer: str = "lion"
    accumulate: bool = False
    """Whether the state holds the fp32 buffer of gradient accumulation."""
    remat: str = "dots_with_no_batch_dims"

    def __post_init__(self) -> None:
        for value, valid in ((self.kind, PROGRAMS), (self.optimizer, OPTIMIZERS), (self.remat, REMAT)):
            if value not in valid:
                raise ConfigError(f"the TPU compile knows no {value!r}; valid: {', '.join(valid)}")
        if prod(self.mesh) != self.slice.devices:
            raise ConfigError(f"mesh {self.mesh} has {prod(self.mesh)} places for {self.slice.devices} devices")

    def as_json(self) -> str:
        """Return the program as JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    def digest(self, *versions: str) -> str:
        """Return the name under which a verdict of these compiler versions is kept."""
        return hashlib.sha256("\n".join((self.as_json(), *versions)).encode()).hexdigest()[:24]


def from_json(text: str) -> Program:
    """Return the program that `Program.as_json` wrote."""
    data = json.loads(text)
    place = data.pop("slice")
    place["chips_per_host"] = tuple(place["chips_per_host"])
    return Program(
        slice=Slice(**place),
        architecture=Architecture(**data.pop("architecture")),
        mesh=tuple(data.pop("mesh")),
        **data,
    )
