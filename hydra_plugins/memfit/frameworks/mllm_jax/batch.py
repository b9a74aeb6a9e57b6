"""The runner's rules about batches and lengths: buckets, what must divide what, and what a micro-batch holds."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import ceil_div, round_up
from hydra_plugins.memfit.frameworks.mllm_jax.keys import NEWEST, Request
from hydra_plugins.memfit.frameworks.view import listable
from hydra_plugins.memfit.frameworks.xla import Slice

BUCKETS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Prompts are padded to the first that holds them, and so is the room for the response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one device sees. Lengths are padded tokens."""

    local: int
    """Sequences of one process in one step, after the runner's padding."""
    completions: int
    """Completions per prompt, after the runner's padding."""
    rollout_per_device: int
    update_per_device: int
    """Sequences of one micro-batch on one device; at most `rollout_per_device`."""
    accumulates: bool
    """Whether the training state holds the buffer of gradient accumulation."""
    prefill_tokens: int
    decode_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of one sequence in the update: always padded to both buckets."""
        return self.prefill_tokens + self.decode_tokens


def bucket(tokens: int, key: str) -> int:
    """Return the padded length; raises `ConfigError` above the runner's largest bucket.

    >>> bucket(480, "GLOBAL_LENGTH")
    512
    """
    for size in BUCKETS:
        if tokens <= size:
            return size
    raise ConfigError(f"{key}={tokens} is above the runner's largest bucket; use {key}={BUCKETS[-1]} or less.")


def split(request: Request, devices: Slice) -> Batch:
    """Return what one device sees of ``request``; raises `ConfigError` where the runner would refuse to start."""
    listable(request.prompts * request.completions, request.key["prompts"])
    local, completions = _local(request, devices)
    micro = _micro(request, local, devices)
    return Batch(
        local=local,
        completions=completions,
        rollout_per_device=local // devices.per_host,
        update_per_device=(micro or local) // devices.per_host,
        accumulates=request.accumulation > 1 or (micro is not None and micro < local),
        prefill_tokens=bucket(request.prompt_tokens, request.key["prompt_tokens"]),
        decode_tokens=bucket(request.response_tokens, request.key["response_tokens"]),
    )


def _local(request: Request, devices: Slice) -> tuple[int, int]:
    """Return sequences of one process and completions per prompt, both padded as the runner pads them."""
    if request.version == NEWEST:
        prompts = ceil_div(request.prompts, devices.hosts)
        while prompts * request.completions % devices.per_host:
            prompts += 1
        return prompts * request.completions, request.completions
    local = request.prompts * request.completions
    padded = round_up(local, devices.per_host)
    if padded % request.prompts:
        prompts, key = request.prompts, request.key["completions"]
        fitting = next(n for n in range(request.completions, padded + 1) if n * prompts % devices.per_host == 0)
        raise ConfigError(
            f"{request.key['prompts']}={prompts} x {key}={request.completions} gives {local} sequences a host, which "
            f"{devices.per_host} devices cannot share, and the runner cannot pad it. Use {key}={fitting}."
        )
    return padded, padded // request.prompts


def _micro(request: Request, local: int, devices: Slice) -> int | None:
    """Return the sequences of one process in a micro-batch, ``None`` when the whole batch is one."""
    own, per_device = request.micro, request.micro_per_device
    spread = per_device * devices.per_host if per_device else None
    if own and spread and own != spread:
        raise ConfigError(
            f"{request.key['micro']}={own} and {request.key['micro_per_device']}={per_device} contradict each other on "
            f"{devices.per_host} devices ({spread} sequences). Keep one: {request.key['micro_per_device']}=null"
        )
    micro = own or spread
    if micro is None or micro == local:
        return None
    key = request.key["micro" if own else "micro_per_device"]
    if micro % devices.per_host or local % micro:
        sizes = [n for n in range(devices.per_host, local + 1, devices.per_host) if local % n == 0]
        near = max([n for n in sizes if n <= micro] or sizes[:1])
        raise ConfigError(
            f"{key}={own or per_device} makes micro-batches of {micro}: they must divide the {local} sequences of one host and "
            f"be shared by its {devices.per_host} devices. Use {key}={near if own else near // devices.per_host}."
        )
    return micro
