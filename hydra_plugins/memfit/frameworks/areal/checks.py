"""What AReaL itself would refuse, and what would kill a launch for another reason than its size."""

from __future__ import annotations

from collections.abc import Collection

from hydra_plugins.memfit.frameworks.areal import read as r
from hydra_plugins.memfit.frameworks.areal.read import Launch
from hydra_plugins.memfit.frameworks.areal.versions import BEFORE_BACKENDS
from hydra_plugins.memfit.frameworks.linear_attention import kernel_note
from hydra_plugins.memfit.frameworks.view import View, unpinned
from hydra_plugins.memfit.planning.problem import Change


def fixes(view: View, launch: Launch, *, pinned: Collection[str]) -> tuple[Change, ...]:
    """Return the changes without which the launch would fail at any size; raises `ConfigError` where one is pinned."""
    changes = [*_transfer(view, launch), *_limits(view, launch)]
    return unpinned(changes, pinned)


def _transfer(view: View, launch: Launch) -> list[Change]:
    key = launch.behaviour.sync_key
    if not launch.shares or key != "actor.weight_update_mode" or r.sync_mode(view, launch) == "disk":
        return []
    why = "trainer and server share a GPU, and NCCL refuses two ranks on one GPU: the weights go through files"
    return [Change(key=key, old=view.requested(key), new="disk", kind="neutral", why=why)]


def _limits(view: View, launch: Launch) -> list[Change]:
    floor = r.floor_tokens(view, launch)
    if floor is None:
        return []
    tokens = r.longest(view, launch)
    changes = []
    for section in (launch.section, "ref", "critic"):
        key = r.tokens_key(section, launch)
        now = view.optional_integer(key)
        if now is not None and tokens is not None and now < tokens:
            why = f"a sequence has up to {tokens} tokens, and AReaL stops at the first one above the limit"
            changes.append(Change(key=key, old=now, new=floor, kind="neutral", why=why))
    return changes


def blockers(view: View, launch: Launch) -> tuple[str, ...]:
    """Return why the launch would die whatever its size; each with the fix."""
    return (*_layout(launch), *_batches(view, launch), *_server_length(view, launch), *_turns(view, launch))


def _layout(launch: Launch) -> list[str]:
    server, trainer = launch.layout.server, launch.layout.trainer
    total = trainer.world + (0 if server is None or launch.layout.colocated else server.world)
    found = []
    for side, what in ((server, "servers"), (trainer, "trainer")):
        if side is not None and side.world > launch.gpus:
            found.append(
                f"the layout gives the {what} {side.world} GPUs, and the launch has {launch.gpus} "
                f"({launch.nodes} x {launch.gpus_per_node}). Make the sizes multiply to {launch.gpus} or less, "
                f"for example {side.name}:d{launch.gpus}."
            )
    if not found and launch.nodes > 1 and total != launch.gpus:
        found.append(
            f"the layout uses {total} GPUs and the launch has {launch.nodes} x {launch.gpus_per_node} = {launch.gpus}: "
            "AReaL's Ray and Slurm launchers refuse that. Change the sizes, cluster.n_nodes or cluster.n_gpus_per_node."
        )
    return found


def _batches(view: View, launch: Launch) -> list[str]:
    batch, d = view.optional_integer("train_dataset.batch_size"), launch.layout.trainer.d
    if batch is None or batch % d == 0:
        return []
    return [
        f"train_dataset.batch_size={batch} is not a multiple of the {d} data parallel ranks: AReaL refuses that. "
        f"Write train_dataset.batch_size={max(d, batch - batch % d)}."
    ]


def _server_length(view: View, launch: Launch) -> list[str]:
    tokens = r.longest(view, launch)
    if launch.layout.server is None or tokens is None or tokens <= r.context_length(view, launch):
        return []
    key = "sglang.context_length" if launch.layout.server.name == "sglang" else "vllm.max_model_len"
    return [
        f"{key}={r.context_length(view, launch)} is below the longest request, {tokens} tokens. Write {key}={tokens}."
    ]


def _turns(view: View, launch: Launch) -> list[str]:
    asked = view.text("rollout.scheduling_strategy.type", "") == "colocation"
    if not asked or view.flag("enable_offload", False):
        return []
    return ["rollout.scheduling_strategy.type=colocation needs enable_offload=true: AReaL refuses it otherwise."]


def notes(view: View, launch: Launch, *, guessed: bool) -> tuple[str, ...]:
    """Return what a user should know about the reading of the config."""
    lines = []
    if guessed and launch.version == BEFORE_BACKENDS and not view.has("allocation_mode"):
        lines.append(
            f"read as AReaL {launch.version}: 1.0.3 and later require rollout.backend and actor.backend, which this config "
            "lacks. Another release: memfit.framework_version=VERSION (console: --framework-version)."
        )
    if view.has("gradient_checkpointing"):
        lines.append("gradient_checkpointing is read as actor.gradient_checkpointing: AReaL has no key of that name.")
    if launch.shares and not r.turns(view):
        lines.append("server and trainer share GPUs: AReaL deals them in turn and does not check that they are enough.")
    if r.floor_tokens(view, launch) is None:
        lines.append(
            "train_dataset.max_length is not set, so the longest sequence is not known: the limit of a micro-batch is "
            "taken as full and never lowered. memfit.lengths.max=TOKENS says what the data has."
        )
    if launch.model.vision_parameters:
        lines.append(f"{launch.model.name}: images are not counted, only the tokens that they become.")
    return (*lines, *kernel_note(launch.model))
