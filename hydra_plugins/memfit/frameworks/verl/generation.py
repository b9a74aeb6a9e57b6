"""verl's own generation entries: rollout engines without a trainer's step.

``main_generation`` (up to 0.6.1, its own generation.yaml) builds FSDP workers with the role ``rollout``: they load the model
themselves and start an engine in the same process. Up to 0.5 the engine is put to sleep and gets the worker's weights for each
batch; in 0.6 it loads its own and stays awake. ``main_generation_server`` (0.6.1 and later) reads ppo_trainer's config and
starts stand-alone servers only, so nothing in its config tells it from training: ``memfit.framework=verl-generation`` does.
File and line of each fact: docs/verl.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.verl import checks, defaults, keys
from hydra_plugins.memfit.frameworks.verl.versions import Behaviour, behaviour, engine_share, parse
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import Estimate, MemoryBreakdown
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.overheads import (
    CUDA_CONTEXT_BYTES,
    HOST_DRIVER_BYTES,
    HOST_PROCESS_BYTES,
    trainer_context_bytes,
)
from hydra_plugins.memfit.memory.states import sharded_bytes
from hydra_plugins.memfit.memory.weight_sync import sync_moments
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import SOLVE, Change, Knob, Problem, Value
from hydra_plugins.memfit.planning.serving import ServingRun, estimate

NAME = "verl-generation"
YAML_VERSIONS = ("0.4.1", "0.5.0", "0.6.1")
"""Releases with ``main_generation`` and its generation.yaml."""
SERVER_VERSIONS = ("0.6.1", "0.7.1", "0.8.0", "0.9.1")
"""Releases with ``main_generation_server``."""
PPO_SECTION = "actor_rollout_ref"

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


def load(version: str) -> dict[str, Any]:
    """Return generation.yaml of one release in `YAML_VERSIONS`, nested, a fresh copy."""
    text = (defaults.DATA / "generation.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)["versions"][version]
    return config


@dataclass(frozen=True)
class VerlGenerationAdapter:
    """Reads verl's ``main_generation`` and, when it is named, ``main_generation_server``."""

    name: str = NAME
    versions: tuple[str, ...] = defaults.VERSIONS

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether the config has the sections of generation.yaml; a server's config is one of training, and is not."""
        sections = [config.get(name) for name in ("rollout", "model", "data", "trainer")]
        return (
            PPO_SECTION not in config
            and all(isinstance(s, Mapping) for s in sections)
            and "n_samples" in config["data"]
        )

    def defaults(self, version: str) -> Mapping[str, Any]:
        """Return generation.yaml of that release; empty from 0.7 on, which has none (see `defaults_with`)."""
        version = defaults.pick_version(version)
        return load(version) if version in YAML_VERSIONS else {}

    def defaults_with(self, version: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return generation.yaml, or ppo_trainer's config for keys below ``actor_rollout_ref`` and for 0.7 and later."""
        version = defaults.pick_version(version)
        is_server = version not in YAML_VERSIONS or any(key.split(".")[0] == PPO_SECTION for key in asked)
        return defaults.load(version) if is_server else load(version)

    def pick_version(self, asked: str | None) -> str:
        """Return the known release that stands for ``asked``, else for the installed one, else the newest."""
        return defaults.pick_version(asked or defaults.installed_version())

    def versions_with(self, key: str) -> tuple[str, ...]:
        """Return the releases in which one of the two entries has ``key``."""
        return tuple(v for v in self.versions if _knows(v, key))

    def problem(self, config: Mapping[str, Any], context: Context) -> Problem:
        """Read the resolved config of one launch; raises `ConfigError` and `NotModelled`."""
        launch = _read_launch(View(config), context)
        needed = _fixes(launch, context.pinned)
        launch = launch.turned({change.key: change.new for change in needed})
        known: dict[frozenset[tuple[str, object]], Estimate] = {}

        def predict(values: Mapping[str, object]) -> Estimate:
            asked = frozenset(values.items())
            if asked not in known:
                known[asked] = estimate(_run(launch.turned(values)))
            return known[asked]

        return Problem(
            framework=self.name,
            framework_version=launch.version,
            hardware=context.hardware,
            model=launch.model,
            gpus_per_node=launch.gpus_per_node,
            nodes=launch.nodes,
            settings=context.settings,
            knobs=tuple(_knobs(launch)),
            estimate=predict,
            composed=lambda key: _value(launch.view, key),
            fixes=needed,
            warnings=tuple(context.hardware.warnings),
            blockers=_blockers(launch),
        )


@cache
def _yaml_view(version: str) -> View:
    return View(load(version))


def _knows(version: str, key: str) -> bool:
    if key.split(".")[0] in (
        "rollout",
        "model",
        "actor",
    ):  # sections of training, without what generation.yaml leaves out
        return version in YAML_VERSIONS and (
            _yaml_view(version).has(key) or keys.known(version, f"{PPO_SECTION}.{key}")
        )
    is_own = version in YAML_VERSIONS and _yaml_view(version).has(key)
    return is_own or (version in SERVER_VERSIONS and keys.known(version, key))


def _value(view: View, key: str) -> Value:
    value = view.composed(key)
    return None if value is MISSING else value


# -- what the launch is ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """One generation launch; ``overrides`` are the values that the plan has set so far."""

    view: View
    overrides: Mapping[str, object]
    context: Context
    version: str
    engine_version: str
    model: ModelSpec
    gpus_per_node: int
    nodes: int
    is_server: bool

    def turned(self, values: Mapping[str, object]) -> _Launch:
        """Return the launch with some keys set to other values."""
        overrides = {**self.overrides, **values}
        return _Launch(
            view=self.view.with_values(overrides),
            overrides=overrides,
            context=self.context,
            version=self.version,
            engine_version=self.engine_version,
            model=self.model,
            gpus_per_node=self.gpus_per_node,
            nodes=self.nodes,
            is_server=self.is_server,
        )

    @property
    def behaviour(self) -> Behaviour:
        """What the release does."""
        return behaviour(self.version)

    @property
    def world_size(self) -> int:
        """GPUs of the launch."""
        return self.gpus_per_node * self.nodes

    @property
    def hands_over(self) -> bool:
        """Whether the worker sends its own weights to the engine for each batch (main_generation up to 0.5)."""
        return not self.is_server and parse(self.version) < (0, 6)

    @property
    def sleeps(self) -> bool:
        """Whether the engine is off the GPU when the worker's weights arrive."""
        return self.hands_over and self.view.flag(self.key("free_cache_engine"), True)

    def key(self, name: str) -> str:
        """Return the dotted key of a rollout setting."""
        return f"{PPO_SECTION}.rollout.{name}" if self.is_server else f"rollout.{name}"

    def number(self, name: str, default: int) -> int:
        """Return a whole number of the rollout section."""
        return self.view.integer(self.key(name), default)

    @property
    def tensor_parallel(self) -> int:
        """Ranks of one engine."""
        return self.number("tensor_model_parallel_size", 2 if self.is_server else 1)

    @property
    def lengths(self) -> int:
        """Prompt and answer together."""
        return self.number("prompt_length", 512) + self.number("response_length", 512)

    @property
    def model_len(self) -> int:
        """The sequence length that the engine is started with; the server of 0.6 reads no key for it."""
        if self.is_server and parse(self.version) < (0, 7):
            return self.lengths
        unset = self.model.max_position_embeddings if self.is_server else self.lengths
        return self.number("max_model_len", unset)

    @property
    def is_chunked(self) -> bool:
        """Whether a prefill is split into chunks of max_num_batched_tokens."""
        return self.view.flag(self.key("enable_chunked_prefill"), True)

    @property
    def refuses_small_batches(self) -> bool:
        """verl itself refuses fewer batched tokens than the sequence length (main_generation)."""
        return self.is_chunked and not self.is_server

    @property
    def graphs(self) -> bool:
        """Whether the engine captures CUDA graphs."""
        return not self.view.flag(self.key("enforce_eager"), not self.is_server)

    @property
    def concurrent(self) -> int:
        """Sequences that one engine has in flight: its part of a batch, or everything at once in a server."""
        most = self.number("max_num_seqs", 1024)
        if self.is_server:
            return most
        replicas = max(1, self.world_size // self.tensor_parallel)
        return min(most, ceil_div(self.view.integer("data.batch_size", 128), replicas))


def _read_launch(view: View, context: Context) -> _Launch:
    settings, hardware = context.settings, context.hardware
    if hardware.kind != "gpu":
        raise NotModelled(
            f"verl on {hardware.name} ({hardware.kind}) is not modelled; name a GPU, e.g. +hardware=h200."
        )
    is_server = view.section(PPO_SECTION)
    section = f"{PPO_SECTION}." if is_server else ""
    version = defaults.pick_version(settings.framework_version or defaults.installed_version())
    entry, known = ("main_generation_server", SERVER_VERSIONS) if is_server else ("main_generation", YAML_VERSIONS)
    if version not in known:
        raise ConfigError(
            f"verl {version} has no {entry} that memfit knows; releases that have one: {', '.join(known)}. Name yours with "
            f"memfit.framework_version={known[-1]}."
        )
    engine = _engine_name(view, section)
    _refuse_unmodelled(view, section, is_server=is_server)
    installed = settings.engine_version or defaults.installed_engine_version(engine)
    return _Launch(
        view=view,
        overrides={},
        context=context,
        version=version,
        engine_version=installed or defaults.engine_pin(version, engine),
        model=_model(view, context, f"{section}model.path"),
        gpus_per_node=_gpus(view, context),
        nodes=context.nodes or view.integer("trainer.nnodes", 1),
        is_server=is_server,
    )


def _engine_name(view: View, section: str) -> str:
    key = f"{section}rollout.name"
    name = view.text(key, "vllm").removesuffix("_async")
    if name not in defaults.ENGINES:
        raise NotModelled(
            f"{key}={name}: memfit models generation with vllm and sglang. Set {key}=vllm, or go on unplanned with "
            "memfit.strict=false."
        )
    return name


def _refuse_unmodelled(view: View, section: str, *, is_server: bool) -> None:
    unplanned = "or go on unplanned with memfit.strict=false."
    for name in ("data_parallel_size", "pipeline_model_parallel_size", "expert_parallel_size"):
        key = f"{section}rollout.{name}"
        if view.integer(key, 1) > 1:
            raise NotModelled(f"{key}={view.raw(key)} is not modelled for generation. Set {key}=1, {unplanned}")
    if view.integer(f"{section}model.lora_rank", 0, minimum=0):
        raise NotModelled(
            f"{section}model.lora_rank > 0 is not modelled for generation. Merge the adapter, {unplanned}"
        )
    if not is_server and view.text("rollout.mode", "sync") != "sync":
        raise NotModelled(
            f"rollout.mode={view.raw('rollout.mode')}: main_generation runs with sync. Set it, {unplanned}"
        )


def _model(view: View, context: Context, key: str) -> ModelSpec:
    if context.model is not None:
        return context.model
    path = view.text(key, "")
    if not path:
        raise ConfigError(f"{key} is not set, so the model is unknown. Set it, or add +model=qwen2.5-7b.")
    return context.resolve_model(path)


def _gpus(view: View, context: Context) -> int:
    gpus = context.gpus_per_node or view.integer("trainer.n_gpus_per_node", 8)
    present = context.hardware.gpus_per_node
    if present is not None and gpus > present:
        raise ConfigError(
            f"trainer.n_gpus_per_node={gpus}, but this node shows {present} ({context.hardware.product}, "
            f"{context.hardware.source}). Set trainer.n_gpus_per_node={present}."
        )
    return gpus


# -- what is where --------------------------------------------------------------------------------------------------
def _run(launch: _Launch) -> ServingRun:
    hardware, settings = launch.context.hardware, launch.context.settings
    engine, sharding = _engine(launch), _sharding(launch)
    master = 2 if launch.hands_over else 4  # 0.6 builds the module with FSDPEngineConfig's own model_dtype, fp32
    moments = sync_moments(sharding, parameters=launch.model.parameters, master_bytes=master, bucket_bytes=0)
    return ServingRun(
        capacity_bytes=hardware.capacity_bytes,
        budget_bytes=max(1, int(hardware.capacity_bytes * (1 - settings.margin)) - hardware.held_bytes),
        held_bytes=hardware.held_bytes,
        host_peak_bytes=_host_bytes(launch, engine, master),
        host_budget_bytes=settings.host_memory_bytes or hardware.host_memory_bytes or 0,
        engine=engine,
        beside=_server_worker(launch) if launch.is_server else _fsdp_worker(launch, sharding, master),
        handover=moments if launch.hands_over else (),
        fraction_key=launch.key("gpu_memory_utilization"),
    )


def _server_worker(launch: _Launch) -> MemoryBreakdown:
    """From 0.7 on a worker of its own sits beside the server's and sets its device; in 0.6 it is the engine's process."""
    return MemoryBreakdown(context=CUDA_CONTEXT_BYTES if parse(launch.version) >= (0, 7) else 0)


def _fsdp_worker(launch: _Launch, sharding: Sharding, master: int) -> MemoryBreakdown:
    """The sharded module, which is never offloaded: only a worker that trains reads param_offload."""
    weights = sharded_bytes(parameters=launch.model.parameters, bytes_per_parameter=master, ranks=sharding.ranks)
    return MemoryBreakdown(weights=weights, context=trainer_context_bytes(world_size=launch.world_size))


def _sharding(launch: _Launch) -> Sharding:
    view, model, world = launch.view, launch.model, launch.world_size
    asked = view.integer("actor.fsdp_config.fsdp_size", -1, minimum=-1)
    return Sharding(
        version=2 if view.text("actor.strategy", "fsdp") == "fsdp2" else 1,
        ranks=world if asked <= 0 or asked >= world else asked,
        layer=model.layer_parameters,
        root=model.root_parameters,
        embedding=model.embedding_parameters,
        layers=model.num_hidden_layers,
        tied=model.tie_word_embeddings,
    )


def _engine(launch: _Launch) -> Engine:
    view, settings = launch.view, launch.context.settings
    fraction_key = launch.key("gpu_memory_utilization")
    is_solved = view.raw(fraction_key) is SOLVE
    asked = view.composed(fraction_key)
    name = _engine_name(view, f"{PPO_SECTION}." if launch.is_server else "")
    batched = launch.number("max_num_batched_tokens", 8192)
    element = 4 if view.text(launch.key("dtype"), "bfloat16") in ("float32", "fp32", "float") else 2
    return Engine(
        model=launch.model,
        share_of=engine_share(name, launch.engine_version),
        fraction=None if is_solved else view.number(fraction_key, 0.5, low=0.0, high=1.0),
        requested_fraction=float(asked) if is_solved and isinstance(asked, (int, float)) else None,
        at_least_useful=settings.goal == "fast",
        tensor_parallel=launch.tensor_parallel,
        max_model_len=launch.model_len,
        max_num_seqs=launch.number("max_num_seqs", 1024),
        max_num_batched_tokens=batched if launch.is_chunked else max(batched, launch.model_len),
        concurrent_sequences=launch.concurrent,
        tokens_per_sequence=min(launch.lengths, launch.model_len),
        graphs=launch.graphs,
        weight_bytes_per_parameter=1.0 if view.text(launch.key("quantization"), "none") == "fp8" else float(element),
        kv_bytes_per_element=element,
        in_process=not launch.is_server,
        sleeps=launch.sleeps,
        weights_on_host=launch.sleeps,
    )


def _host_bytes(launch: _Launch, engine: Engine, master: int) -> int:
    """Processes of one host, and what they load: every rank the whole model where embeddings are tied, else the first."""
    ranks = launch.gpus_per_node
    if launch.is_server:
        return 2 * ranks * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES
    copies = ranks if launch.model.tie_word_embeddings else 1
    loading = copies * master * launch.model.parameters
    asleep = ranks * engines.weight_bytes(engine) if engine.weights_on_host else 0
    return max(loading, asleep) + ranks * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES


# -- what may be turned ---------------------------------------------------------------------------------------------
def _knobs(launch: _Launch) -> Iterator[Knob]:
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
    launch: _Launch,
    key: str,
    candidates: tuple[object, ...],
    cost: int,
    why: str,
    *,
    kind: str = "neutral",
    fast: tuple[object, ...] = (),
) -> Knob:
    requested = _value(launch.view, key)
    return Knob(key=key, requested=requested, candidates=candidates, cost=cost, why=why, kind=kind, fast=fast)


def _sequences(launch: _Launch) -> Iterator[Knob]:
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


def _batched_tokens(launch: _Launch) -> Iterator[Knob]:
    now = launch.number("max_num_batched_tokens", 8192)
    least = launch.model_len if launch.refuses_small_batches else 1
    smaller = tuple(size for size in (4096, 2048) if least <= size < now)
    if smaller and launch.is_chunked:
        why = "a smaller prefill chunk: less workspace in the engine"
        yield _knob(launch, launch.key("max_num_batched_tokens"), smaller, 32, why)


def _parallel(launch: _Launch) -> Iterator[Knob]:
    now, heads = launch.tensor_parallel, launch.model.num_attention_heads
    sizes = tuple(s for s in (2, 4, 8, 16) if s > now and launch.gpus_per_node % s == 0 and heads % s == 0)
    faster = tuple(s for s in (1, 2, 4) if s < now and launch.world_size % s == 0)
    if sizes or faster:
        why = "the engine's weights and cache are spread over more GPUs"
        yield _knob(launch, launch.key("tensor_model_parallel_size"), sizes, 40, why, fast=faster)


def _lengths(launch: _Launch) -> Iterator[Knob]:
    """What changes the answers: a server that refuses longer prompts, and shorter answers."""
    if launch.is_server and launch.lengths < launch.model_len:
        why = "prompt_length + response_length; the server then refuses longer prompts, which this entry does not cut"
        yield _knob(launch, launch.key("max_model_len"), (launch.lengths,), 80, why, kind="semantic")
    response = launch.number("response_length", 512)
    halves = tuple(response >> i for i in range(1, response.bit_length()))
    yield _knob(launch, launch.key("response_length"), halves, 90, "shorter answers", kind="semantic")


# -- what verl would refuse -----------------------------------------------------------------------------------------
def _fixes(launch: _Launch, pinned: Collection[str]) -> tuple[Change, ...]:
    """Return the changes without which verl refuses the launch at any size; raises `ConfigError` where one is pinned."""
    changes = [*_fitting_parallel(launch), *_enough_tokens(launch), *_no_graphs(launch)]
    for change in changes:
        if change.key in pinned:
            raise ConfigError(
                f"{change.key}={change.old} is pinned, but {change.why}. Pin {change.key}={change.new} instead, or leave "
                "it to memfit."
            )
    return tuple(changes)


def _fitting_parallel(launch: _Launch) -> Iterator[Change]:
    size, world, key = launch.tensor_parallel, launch.world_size, launch.key("tensor_model_parallel_size")
    if world % size:
        fitting = max(s for s in range(1, min(size, world) + 1) if world % s == 0)
        why = f"the engines' tensor parallel size must divide the {world} GPU{'s' * (world > 1)}"
        yield Change(key=key, old=_value(launch.view, key), new=fitting, kind="neutral", why=why)


def _enough_tokens(launch: _Launch) -> Iterator[Change]:
    key, now = launch.key("max_num_batched_tokens"), launch.number("max_num_batched_tokens", 8192)
    if launch.refuses_small_batches and now < launch.model_len:
        why = f"verl refuses chunked prefill with fewer batched tokens than the {launch.model_len} of a sequence"
        yield Change(key=key, old=_value(launch.view, key), new=launch.model_len, kind="neutral", why=why)


def _no_graphs(launch: _Launch) -> Iterator[Change]:
    if parse(launch.version) < (0, 5) and launch.sleeps and launch.graphs:
        why = f"verl {launch.version} refuses CUDA graphs in an engine that frees its cache"
        yield Change(key=launch.key("enforce_eager"), old=False, new=True, kind="neutral", why=why)


def _blockers(launch: _Launch) -> tuple[str, ...]:
    return tuple(message for message in (_missing_key(launch), _expandable(launch)) if message)


def _missing_key(launch: _Launch) -> str:
    key = "rollout.pipeline_model_parallel_size"
    if launch.is_server or parse(launch.version)[:2] != (0, 6) or launch.view.has(key):
        return ""
    return f"verl {launch.version} reads {key}, which its generation.yaml lacks, and stops. Add +{key}=1 to the launch."


def _expandable(launch: _Launch) -> str:
    """The allocator setting that torch's own OOM message recommends, and that breaks vLLM's memory pool."""
    pooled = launch.is_server or launch.view.flag("rollout.free_cache_engine", True)
    name = _engine_name(launch.view, f"{PPO_SECTION}." if launch.is_server else "")
    if name != "vllm" or not pooled or parse(launch.engine_version)[:2] > checks.EXPANDABLE_REFUSED:
        return ""
    for variable in checks.ALLOCATOR_VARIABLES:
        value = launch.context.environ.get(variable, "")
        if checks.EXPANDABLE in value.replace(" ", ""):
            return (
                f'{variable}={value}: vLLM {launch.engine_version} stops at start with "Expandable segments are not '
                f'compatible with memory pool". Unset it (`unset {variable}`).'
            )
    return ""
