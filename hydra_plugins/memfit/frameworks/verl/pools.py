"""verl's config -> `PooledRun`: the trainer's GPUs, and the pools of engines beside them. No formula lives here."""

from __future__ import annotations

from dataclasses import replace

from hydra_plugins.memfit.base.errors import NotModelled
from hydra_plugins.memfit.frameworks.verl import others
from hydra_plugins.memfit.frameworks.verl.engines import rollout_engine, rollout_name, serves_adapters
from hydra_plugins.memfit.frameworks.verl.launch import LORA_MERGE, MODEL, Launch
from hydra_plugins.memfit.frameworks.verl.read import bucket_bytes, sent_bytes
from hydra_plugins.memfit.frameworks.verl.read import read as read_trainer
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.overheads import (
    CUDA_CONTEXT_BYTES,
    HOST_DRIVER_BYTES,
    HOST_PROCESS_BYTES,
    NCCL_BYTES,
)
from hydra_plugins.memfit.memory.weight_sync import broadcast_receiver_bytes
from hydra_plugins.memfit.planning.pools import PooledRun
from hydra_plugins.memfit.planning.serving import ServingRun

_LARGEST_NODE = 8
"""GPUs that one host has at most, where the hardware does not say how many it has."""


def read(view: View, launch: Launch) -> PooledRun:
    """Return the launch as the config describes it; raises `ConfigError` and `NotModelled`."""
    rollout = (_rollout_pool(view, launch),) if launch.placement.apart else ()
    reward = others.reward_role(view, launch)
    return PooledRun(
        ranks=tuple(replace(rank, reward=reward) for rank in read_trainer(view, launch)),
        guest=others.guest(view, launch),
        pools=(*rollout, *others.pools(view, launch)),
        one_host=_share_a_host(view, launch),
    )


def _share_a_host(view: View, launch: Launch) -> bool:
    """Whether Ray may put all pools on one host: it has GPUs enough for them."""
    apart = [other for other in others.others(view, launch) if not other.hosted]
    together = launch.gpus_per_node + launch.placement.gpus_per_node + sum(other.gpus_per_node for other in apart)
    nodes = {launch.nodes, launch.placement.nodes or 1, *(other.nodes for other in apart)}
    return nodes == {1} and together <= (launch.gpus_of_a_host or _LARGEST_NODE)


def _rollout_pool(view: View, launch: Launch) -> ServingRun:
    """The policy's engines on GPUs of their own; a worker beside each receives the weights."""
    if serves_adapters(view):
        raise NotModelled(
            f"{MODEL}.lora_rank > 0 with a rollout pool of its own: memfit models merged adapters only. Set "
            f"{LORA_MERGE}=true, or go on unplanned with memfit.strict=false."
        )
    received = broadcast_receiver_bytes(
        embedding=launch.actor_model.embedding_parameters,
        sent_bytes=sent_bytes(view, launch),
        bucket_bytes=bucket_bytes(view, launch),
    )
    return ServingRun(
        capacity_bytes=launch.capacity_bytes,
        budget_bytes=launch.budget_bytes,
        held_bytes=launch.held_bytes,
        host_peak_bytes=2 * launch.placement.gpus_per_node * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES,
        host_budget_bytes=launch.host_budget_bytes,
        engine=_pool_engine(view, launch),
        beside=MemoryBreakdown(context=CUDA_CONTEXT_BYTES + NCCL_BYTES),
        handover=(MemoryBreakdown(communication_buffers=received),),
        fraction_key=launch.placement.share_key,
        phase="rollout",
    )


def _pool_engine(view: View, launch: Launch) -> Engine:
    """The engine of the pool, which never sleeps: at most it gives up its KV pool while weights arrive."""
    engine = rollout_engine(view, launch, share_key=launch.placement.share_key)
    gives_up = engine.sleeps and (rollout_name(view) == "sglang" or parse(launch.version) >= (0, 9))
    return replace(engine, sleeps=gives_up)
