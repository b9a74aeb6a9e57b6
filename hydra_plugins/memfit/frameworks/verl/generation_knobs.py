"""The keys of verl's generation configs that the planner may set, and what verl refuses before it generates."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hydra_plugins.memfit.frameworks.verl import checks
from hydra_plugins.memfit.frameworks.verl.generation_read import PPO_SECTION, Launch
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import unpinned
from hydra_plugins.memfit.memory.allocator import ALLOCATOR_VARIABLES, says_expandable
from hydra_plugins.memfit.planning.problem import SOLVE, Change, Knob

_WRITABLE_NAMES = (
    "enforce_eager",
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "response_length",
    "tensor_model_parallel_size",
)
WRITABLE_KEYS = frozenset(
    f"{prefix}rollout.{name}" for prefix in ("", f"{PPO_SECTION}.") for name in _WRITABLE_NAMES
) - {"rollout.max_model_len"}
"""Every key that memfit may write for these entries; a test keeps the list and docs/verl.md together."""


# -- what may be turned ---------------------------------------------------------------------------------------------
def knobs(launch: Launch) -> Iterator[Knob]:
    """Yield the knobs in the order in which they are spent."""
    yield from _sequences(launch)
    key = launch.key("gpu_memory_utilization")
    why = "the largest useful share of the GPU; nothing trains beside the engine"
    yield _knob(launch, key, (SOLVE,), 30, why, fast=(SOLVE,))
    yield from _batched_tokens(launch)
    yield from _parallel(launch)
    if launch.graphs:
        yield _knob(launch, launch.key("enforce_eager"), (True,), 50, "no CUDA graphs; slower decoding")
    yield from _lengths(launch)


def _knob(
    launch: Launch,
    key: str,
    candidates: tuple[object, ...],
    cost: int,
    why: str,
    *,
    kind: str = "neutral",
    fast: tuple[object, ...] = (),
) -> Knob:
    requested = launch.view.requested(key)
    return Knob(key=key, requested=requested, candidates=candidates, cost=cost, why=why, kind=kind, fast=fast)


def _sequences(launch: Launch) -> Iterator[Knob]:
    """The engine's most sequences at once, where verl passes the key on (0.6 and later)."""
    if parse(launch.version) < (0, 6):
        return
    key, now = launch.key("max_num_seqs"), launch.number("max_num_seqs", 1024)
    if max(16, launch.concurrent) < now:
        why = "no more sequences than one engine ever has in flight"
        yield _knob(launch, key, (max(16, launch.concurrent),), 18, why)
    fewer = tuple(size for size in (512, 256, 128, 64, 32) if size < min(now, launch.concurrent))
    if fewer:
        yield _knob(launch, key, fewer, 34, "fewer sequences at once: smaller sampler buffers; the others wait")


def _batched_tokens(launch: Launch) -> Iterator[Knob]:
    now = launch.number("max_num_batched_tokens", 8192)
    least = launch.model_len if launch.refuses_small_batches else 1
    smaller = tuple(size for size in (4096, 2048) if least <= size < now)
    if smaller and launch.is_chunked:
        why = "a smaller prefill chunk: less workspace in the engine"
        yield _knob(launch, launch.key("max_num_batched_tokens"), smaller, 32, why)


def _parallel(launch: Launch) -> Iterator[Knob]:
    now, heads = launch.tensor_parallel, launch.model.num_attention_heads
    sizes = tuple(s for s in (2, 4, 8, 16) if s > now and launch.gpus_per_node % s == 0 and heads % s == 0)
    faster = tuple(s for s in (1, 2, 4) if s < now and launch.world_size % s == 0 and heads % s == 0)
    if sizes or faster:
        why = "the engine's weights and cache are spread over more GPUs"
        yield _knob(launch, launch.key("tensor_model_parallel_size"), sizes, 40, why, fast=faster)


def _lengths(launch: Launch) -> Iterator[Knob]:
    """What changes the answers: a server that refuses longer prompts, and shorter answers."""
    if launch.is_server and launch.lengths < launch.model_len:
        why = "prompt_length + response_length; the server then refuses longer prompts, which this entry does not cut"
        yield _knob(launch, launch.key("max_model_len"), (launch.lengths,), 80, why, kind="semantic")
    response = launch.number("response_length", 512)
    halves = tuple(response >> i for i in range(1, response.bit_length()))
    yield _knob(launch, launch.key("response_length"), halves, 90, "shorter answers", kind="semantic")


# -- what verl would refuse -----------------------------------------------------------------------------------------
def fixes(launch: Launch, pinned: Collection[str]) -> tuple[Change, ...]:
    """Return the changes without which verl refuses the launch at any size; raises `ConfigError` where one is pinned."""
    changes = [*_fitting_parallel(launch), *_enough_tokens(launch), *_no_graphs(launch)]
    return unpinned(changes, pinned)


def _fitting_parallel(launch: Launch) -> Iterator[Change]:
    size, world, heads = launch.tensor_parallel, launch.world_size, launch.model.num_attention_heads
    if world % size or heads % size:
        fitting = max(s for s in range(1, min(size, world) + 1) if world % s == 0 and heads % s == 0)
        why = f"an engine's tensor parallel size must divide {world} GPU{'s' * (world > 1)} and {heads} attention heads"
        key = launch.key("tensor_model_parallel_size")
        yield Change(key=key, old=launch.view.requested(key), new=fitting, kind="neutral", why=why)


def _enough_tokens(launch: Launch) -> Iterator[Change]:
    key, now = launch.key("max_num_batched_tokens"), launch.number("max_num_batched_tokens", 8192)
    if launch.refuses_small_batches and now < launch.model_len:
        why = f"verl refuses chunked prefill with fewer batched tokens than the {launch.model_len} of a sequence"
        yield Change(key=key, old=launch.view.requested(key), new=launch.model_len, kind="neutral", why=why)


def _no_graphs(launch: Launch) -> Iterator[Change]:
    if parse(launch.version) < (0, 5) and launch.sleeps and launch.graphs:
        why = f"verl {launch.version} refuses CUDA graphs in an engine that frees its cache"
        yield Change(key=launch.key("enforce_eager"), old=False, new=True, kind="neutral", why=why)


def blockers(launch: Launch) -> tuple[str, ...]:
    """Return why the launch would die whatever its size; each with the fix."""
    return tuple(message for message in (_missing_key(launch), _expandable(launch)) if message)


def _missing_key(launch: Launch) -> str:
    key = "rollout.pipeline_model_parallel_size"
    if launch.is_server or parse(launch.version)[:2] != (0, 6) or launch.view.has(key):
        return ""
    return f"verl {launch.version} reads {key}, which its generation.yaml lacks, and stops. Add +{key}=1 to the launch."


def _expandable(launch: Launch) -> str:
    """The allocator setting that torch's own OOM message recommends, and that breaks vLLM's memory pool."""
    pooled = launch.is_server or launch.view.flag("rollout.free_cache_engine", True)
    name = launch.engine
    if name != "vllm" or not pooled or parse(launch.engine_version)[:2] > checks.EXPANDABLE_REFUSED:
        return ""
    for variable in ALLOCATOR_VARIABLES:
        setting = launch.context.environ.get(variable, "")
        if says_expandable(setting):
            return (
                f'{variable}={setting}: vLLM {launch.engine_version} stops at start with "Expandable segments are not '
                f'compatible with memory pool". Unset it (`unset {variable}`).'
            )
    return ""
