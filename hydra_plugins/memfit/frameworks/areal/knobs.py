"""The keys of AReaL that the planner may set, in the order in which they are spent, cheapest in speed first.

A key is only offered where its section stands in the config: AReaL builds what a section below ``ref`` or ``critic``
describes. docs/areal.md says what each one relieves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra_plugins.memfit.base.units import GIB, ceil_div
from hydra_plugins.memfit.frameworks.areal import read as r
from hydra_plugins.memfit.frameworks.areal.read import FRACTIONS, Launch
from hydra_plugins.memfit.frameworks.common_knobs import bf16_states, shorter, switch
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.planning.concurrent import pool
from hydra_plugins.memfit.planning.problem import Knob

_SECTIONS = ("actor", "model", "ref", "critic")
_STEP = 0.05
"""AReaL's own configs write a server's share in steps of this."""
_LEAST_KV_SHARE = 8
"""A server keeps a pool for at least one in so many of the sequences in flight."""
_SMALLEST_RUNNING = 16

WRITABLE_KEYS = frozenset(
    {
        *(f"{section}.mb_spec.max_tokens_per_mb" for section in _SECTIONS),
        *(f"{section}.mb_spec.max_tokens_per_gpu" for section in ("actor", "model", "ref")),
        *(f"{section}.gradient_checkpointing" for section in ("actor", "model", "critic")),
        "actor.fsdp.memory_efficient_load",
        *(f"{section}.fsdp.offload_params" for section in ("actor", "model", "critic")),
        "actor.fsdp.per_layer_optim_step",
        "actor.optimizer_dtype",
        "actor.weight_update_mode",
        "gconfig.max_new_tokens",
        "ref.optimizer_dtype",
        "sglang.disable_cuda_graph",
        "sglang.enable_memory_saver",
        "sglang.max_prefill_tokens",
        "sglang.max_running_requests",
        "sglang.mem_fraction_static",
        "vllm.enable_sleep_mode",
        "vllm.enforce_eager",
        "vllm.gpu_memory_utilization",
        "vllm.max_num_seqs",
    }
)
"""Every key that memfit may write into an AReaL config; a test keeps the list and docs/areal.md together."""


def knobs(view: View, launch: Launch) -> tuple[Knob, ...]:
    """Return the knobs of the composed config, with the candidates that AReaL's own checks accept."""
    found = [*_training(view, launch), *_semantic(view, launch)]
    if launch.layout.server is not None:
        found += [*_server(view, launch), *_share(view, launch), *_handover(view, launch)]
    return tuple(knob for knob in found if view.section(knob.key.split(".")[0]))


# -- the server's share ---------------------------------------------------------------------------------------------
def _share(view: View, launch: Launch) -> Iterator[Knob]:
    key = r.fraction_key(launch)
    run = r.read(view, launch)
    assert run.engine is not None
    now, its_pool = run.engine.fraction or 0.0, pool(run)
    base = max(1, its_pool.base)
    useful = (its_pool.inside + engines.useful_kv_bytes(run.engine)) / base
    least = max(engines.minimum_kv_bytes(run.engine), engines.useful_kv_bytes(run.engine) // _LEAST_KV_SHARE)
    lowest = (its_pool.inside + min(least, GIB * 4 if least > 4 * GIB else least)) / base
    lowest = max(lowest, (its_pool.inside + engines.minimum_kv_bytes(run.engine)) / base)
    steps = _steps(now, lowest)
    cheap = tuple(step for step in steps if step >= useful)
    tight = tuple(step for step in steps if step < useful)
    requested = view.requested(key)
    if cheap:
        why = "the pool still holds every sequence in flight, and leaves room for the trainer"
        yield Knob(key=key, requested=requested, candidates=cheap, cost=10, why=why)
    if tight:
        why = "a smaller pool for the server: fewer sequences at once, room for the trainer"
        yield Knob(key=key, requested=requested, candidates=tight, cost=26, why=why)


def _steps(now: float, lowest: float) -> list[float]:
    """Shares below ``now`` and not below ``lowest``, largest first."""
    count = int(now / _STEP + 1e-9)
    steps = [round(n * _STEP, 2) for n in range(count, 0, -1)]
    return [step for step in steps if lowest <= step < now - 1e-9]


# -- the server -----------------------------------------------------------------------------------------------------
def _server(view: View, launch: Launch) -> Iterator[Knob]:
    assert launch.layout.server is not None
    if launch.layout.server.name == "vllm":
        yield from _vllm(view, launch)
        return
    if r.turns(view):
        why = "the server can leave the GPU while the trainer works; without it its release frees nothing"
        yield from switch(view, "sglang.enable_memory_saver", cost=8, why=why)
    longest = view.integer("train_dataset.max_length", 0, minimum=0)
    now = view.integer("sglang.max_prefill_tokens", 32768)
    smaller = tuple(size for size in (4096, 2048) if longest <= size < now) if longest else ()
    if smaller:
        key, why = "sglang.max_prefill_tokens", "fewer prompt tokens at once: less workspace in the server"
        yield Knob(key=key, requested=view.requested(key), candidates=smaller, cost=12, why=why)
    yield from _running(
        view, launch, "sglang.max_running_requests", view.optional_integer("sglang.max_running_requests")
    )
    why = "no CUDA graphs: slower decoding"
    yield from switch(view, "sglang.disable_cuda_graph", cost=48, why=why)


def _vllm(view: View, launch: Launch) -> Iterator[Knob]:
    if r.turns(view):
        why = "the server can leave the GPU while the trainer works"
        yield from switch(view, "vllm.enable_sleep_mode", cost=8, why=why)
    yield from _running(view, launch, "vllm.max_num_seqs", view.integer("vllm.max_num_seqs", 256))
    why = "no CUDA graphs: slower decoding"
    yield from switch(view, "vllm.enforce_eager", cost=48, why=why, default=launch.behaviour.vllm_eager)


def _running(view: View, launch: Launch, key: str, now: int | None) -> Iterator[Knob]:
    most = min(now or 1 << 30, r.concurrent(view, launch))
    fewer = tuple(size for size in (256, 128, 64, 32, _SMALLEST_RUNNING) if size < most)
    if fewer:
        why = "fewer sequences decode at once: less sampling workspace, slower generation"
        yield Knob(key=key, requested=view.requested(key), candidates=fewer, cost=46, why=why)


# -- the trainer ----------------------------------------------------------------------------------------------------
def _trained(view: View, launch: Launch) -> Sequence[str]:
    return (launch.section, "critic") if r.has_critic(view) else (launch.section,)


def _training(view: View, launch: Launch) -> Iterator[Knob]:
    sections = [*_trained(view, launch), *(["ref"] if r.has_reference(view) else [])]
    for section in sections:
        yield from _tokens(view, launch, section)
    if r.has_reference(view) and launch.behaviour.storage_key and r.storage_bytes(view, launch, "ref") == 4:
        key, why = "ref.optimizer_dtype", "the reference computes in bf16; stored so it needs half"
        yield Knob(key=key, requested=view.requested(key), candidates=("bfloat16",), cost=15, why=why)
    if launch.behaviour.efficient_load and launch.section == "actor":
        why = "weights are read on one host and sent in pieces: a slower start, nothing else"
        yield from switch(view, f"{launch.section}.fsdp.memory_efficient_load", cost=14, why=why)
    for section in _trained(view, launch):
        yield from _states(view, launch, section)


def _states(view: View, launch: Launch, section: str) -> Iterator[Knob]:
    key, why = f"{section}.gradient_checkpointing", "one more forward pass instead of every layer's activations"
    if not r.checkpointing(view, launch, section) or view.raw(key) is not MISSING:
        yield from switch(view, key, cost=40, why=why, default=launch.behaviour.checkpointing, back=True)
    adam = view.text(f"{section}.optimizer.type", "adam") == "adam"
    if launch.behaviour.layerwise_step and adam and section == "actor" and not r.turns(view):
        why = "Adam's states live on the host and visit the GPU layer by layer"
        yield from switch(view, f"{section}.fsdp.per_layer_optim_step", cost=54, why=why)
    why = "parameters, gradients and Adam's states live on the host, and the optimizer step runs there"
    yield from switch(view, f"{section}.fsdp.offload_params", cost=60, why=why)


def _tokens(view: View, launch: Launch, section: str) -> Iterator[Knob]:
    floor = r.floor_tokens(view, launch)
    if floor is None:
        return
    key = r.tokens_key(section, launch)
    now = view.optional_integer(key)
    top = now or max(floor, ceil_div(r.whole_tokens(view, launch) or floor, r.ROW_TOKENS) * r.ROW_TOKENS)
    ladder = [size for size in _sizes(top, floor) if size < top]
    faster = tuple(size for size in (32768, 24576, 16384, 12288, 8192) if now is not None and size > max(now, floor))
    cheap, tight = [s for s in ladder if s >= 4096], [s for s in ladder if s < 4096]
    why = "fewer tokens in a micro-batch; gradients are summed over more of them"
    requested = view.requested(key)
    if faster and now is not None:
        cheap = [now, *cheap]
    if cheap or faster:
        yield Knob(key=key, requested=requested, candidates=tuple(cheap), cost=20, why=why, fast=faster)
    if tight:
        yield Knob(key=key, requested=requested, candidates=tuple(tight), cost=24, why=why)


def _sizes(top: int, floor: int) -> list[int]:
    """Limits from ``top`` down to ``floor`` in whole rows, at most some fifty of them."""
    step = max(r.ROW_TOKENS, ceil_div((top - floor) // 48, r.ROW_TOKENS) * r.ROW_TOKENS)
    return [*range(top - top % r.ROW_TOKENS, floor, -step), floor]


# -- the way of the weights -----------------------------------------------------------------------------------------
def _handover(view: View, launch: Launch) -> Iterator[Knob]:
    key = launch.behaviour.sync_key
    if key == "actor.weight_update_mode" and r.sync_mode(view, launch) != "disk":
        why = "weights reach the server through files: seconds a step, no buckets on the GPU"
        yield Knob(key=key, requested=view.requested(key), candidates=("disk",), cost=30, why=why)


# -- what is trained ------------------------------------------------------------------------------------------------
def _semantic(view: View, launch: Launch) -> Iterator[Knob]:
    if launch.behaviour.storage_key and r.storage_bytes(view, launch, launch.section) == 4:
        yield bf16_states(view, f"{launch.section}.optimizer_dtype", what="states")
    if view.section("gconfig"):
        key = "gconfig.max_new_tokens"
        yield from shorter(view, key, view.integer(key, 16384), why="shorter responses")


assert frozenset(FRACTIONS.values()) <= WRITABLE_KEYS
