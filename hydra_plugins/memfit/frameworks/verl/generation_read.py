"""verl's generation configs -> `ServingRun`: which keys lead to which fact. No formula lives here."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.verl import defaults, surroundings
from hydra_plugins.memfit.frameworks.verl.engines import engine_name
from hydra_plugins.memfit.frameworks.verl.versions import engine_share, parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory import engine as engines
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
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
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import SOLVE
from hydra_plugins.memfit.planning.serving import ServingRun

YAML_VERSIONS = ("0.4.1", "0.5.0", "0.6.1")
"""Releases with ``main_generation`` and its generation.yaml."""
SERVER_VERSIONS = ("0.6.1", "0.7.1", "0.8.0", "0.9.1")
"""Releases with ``main_generation_server``."""
PPO_SECTION = "actor_rollout_ref"


# -- what the launch is ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Launch(surroundings.EntryLaunch):
    """One generation launch."""

    engine_version: str
    is_server: bool

    @property
    def engine(self) -> str:
        """Name of the inference engine."""
        return _engine_name(self.view, is_server=self.is_server)

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


def read_launch(view: View, context: Context) -> Launch:
    """Return the launch that the config describes; raises `ConfigError` and `NotModelled`."""
    settings = context.settings
    surroundings.refuse_other_than_gpus(context.hardware)
    is_server = view.section(PPO_SECTION)
    section = f"{PPO_SECTION}." if is_server else ""
    version = defaults.pick_version(settings.framework_version or defaults.installed_version())
    entry, known = ("main_generation_server", SERVER_VERSIONS) if is_server else ("main_generation", YAML_VERSIONS)
    if version not in known:
        raise ConfigError(
            f"verl {version} has no {entry} that memfit knows; releases that have one: {', '.join(known)}. Name yours with "
            f"memfit.framework_version={known[-1]}."
        )
    engine = _engine_name(view, is_server=is_server)
    _refuse_unmodelled(view, section, is_server=is_server)
    gpus, nodes = surroundings.gpus(view, context)
    return Launch(
        view=view,
        overrides={},
        context=context,
        version=version,
        engine_version=defaults.engine_in_use(version, engine, asked=settings.engine_version),
        model=surroundings.model(view, context, f"{section}model.path", context.model),
        gpus_per_node=gpus,
        nodes=nodes,
        is_server=is_server,
    )


def _engine_name(view: View, *, is_server: bool) -> str:
    return engine_name(view, f"{PPO_SECTION}.rollout" if is_server else "rollout", why="generation")


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


# -- what is where --------------------------------------------------------------------------------------------------
def read_run(launch: Launch) -> ServingRun:
    """Return what is where, for the values that the launch is turned to."""
    hardware = launch.context.hardware
    engine, sharding = _engine(launch), _sharding(launch)
    master = 2 if launch.hands_over else 4  # 0.6 builds the module with FSDPEngineConfig's own model_dtype, fp32
    moments = sync_moments(sharding, parameters=launch.model.parameters, master_bytes=master, bucket_bytes=0)
    return ServingRun(
        capacity_bytes=hardware.capacity_bytes,
        budget_bytes=launch.context.budget_bytes,
        held_bytes=hardware.held_bytes,
        host_peak_bytes=_host_bytes(launch, engine, master),
        host_budget_bytes=launch.context.host_budget_bytes,
        engine=engine,
        beside=_server_worker(launch) if launch.is_server else _fsdp_worker(launch, sharding, master),
        handover=moments if launch.hands_over else (),
        fraction_key=launch.key("gpu_memory_utilization"),
    )


def _server_worker(launch: Launch) -> MemoryBreakdown:
    """From 0.7 on a worker of its own sits beside the server's and sets its device; in 0.6 it is the engine's process."""
    return MemoryBreakdown(context=CUDA_CONTEXT_BYTES if parse(launch.version) >= (0, 7) else 0)


def _fsdp_worker(launch: Launch, sharding: Sharding, master: int) -> MemoryBreakdown:
    """The sharded module, which is never offloaded: only a worker that trains reads param_offload."""
    weights = sharded_bytes(parameters=launch.model.parameters, bytes_per_parameter=master, ranks=sharding.ranks)
    return MemoryBreakdown(weights=weights, context=trainer_context_bytes(world_size=launch.world_size))


def _sharding(launch: Launch) -> Sharding:
    view, model, world = launch.view, launch.model, launch.world_size
    asked = view.integer("actor.fsdp_config.fsdp_size", -1, minimum=-1)
    version = 2 if view.text("actor.strategy", "fsdp") == "fsdp2" else 1
    return Sharding.of(model, version=version, ranks=world if asked <= 0 or asked >= world else asked)


def _engine(launch: Launch) -> Engine:
    view, settings = launch.view, launch.context.settings
    fraction_key = launch.key("gpu_memory_utilization")
    is_solved = view.raw(fraction_key) is SOLVE
    asked = view.composed(fraction_key)
    name = launch.engine
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


def _host_bytes(launch: Launch, engine: Engine, master: int) -> int:
    """Processes of one host, and what they load: every rank the whole model where embeddings are tied, else the first."""
    ranks = launch.gpus_per_node
    if launch.is_server:
        return 2 * ranks * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES
    copies = ranks if launch.model.tie_word_embeddings else 1
    loading = copies * master * launch.model.parameters
    asleep = ranks * engines.weight_bytes(engine) if engine.weights_on_host else 0
    return max(loading, asleep) + ranks * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES
