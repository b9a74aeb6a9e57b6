"""What verl or Megatron would refuse about batches, and what a user should know about the layout."""

from __future__ import annotations

from hydra_plugins.memfit.frameworks.verl import batches
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, ROLLOUT, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import CRITIC_MEGATRON, MEGATRON, PARALLEL, REF_MEGATRON, layout
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory.megatron import Layout


def indivisible(view: View, launch: Launch) -> list[str]:
    """Return the batches that cannot be shared out among the data-parallel ranks, each with a size that can."""
    size, n = layout(view, launch), view.integer(f"{ROLLOUT}.n", 1)
    found, ranks = _schedule(view, launch, size), size.data
    prompts, mini = batches.prompts_per_step(view), view.integer(f"{ACTOR}.ppo_mini_batch_size", 256)
    static = not view.flag(f"{ACTOR}.use_dynamic_bsz", False) or parse(launch.version) < (0, 5)
    micro = batches.batch(view, launch, batches.UPDATE_ACTOR).micro_batch or 1
    if static and prompts * n % (ranks * micro):
        found.append(
            f"data.train_batch_size={prompts} x {ROLLOUT}.n={n} is not a multiple of {ranks} data-parallel ranks x "
            f"{ACTOR}.ppo_micro_batch_size_per_gpu={micro}: verl refuses that. Write e.g. "
            f"data.train_batch_size={-(-prompts // (ranks * micro)) * ranks * micro}."
        )
    if mini * n % ranks:
        found.append(
            f"{ACTOR}.ppo_mini_batch_size={mini} x {ROLLOUT}.n={n} cannot be shared out among {ranks} data-parallel "
            f"ranks: verl stops in the first update. Write e.g. {ACTOR}.ppo_mini_batch_size={-(-mini // ranks) * ranks}."
        )
    return found


def _schedule(view: View, launch: Launch, size: Layout) -> list[str]:
    """The interleaved schedule runs whole rounds of the pipeline; verl sees to it where micro-batches are dynamic."""
    update = batches.batch(view, launch, batches.UPDATE_ACTOR)
    if size.virtual == 1 or update.dynamic or update.count() % size.pipeline == 0:
        return []
    return [
        f"{update.count()} micro-batches of an update are not a multiple of {size.pipeline} pipeline stages: Megatron's "
        f"interleaved schedule refuses that. Write {ACTOR}.use_dynamic_bsz=true, or "
        f"{MEGATRON}.virtual_pipeline_model_parallel_size=null."
    ]


def layout_notes(view: View, launch: Launch) -> list[str]:
    """Return the parallel sizes of other roles that differ from the actor's, which all of a process have."""
    sections = [
        *([REF_MEGATRON] if batches.uses_reference(view) else []),
        *([CRITIC_MEGATRON] if launch.critic_model else []),
    ]
    different = [
        f"{section}.{name}={view.raw(f'{section}.{name}')}"
        for section in sections
        for name in PARALLEL
        if view.raw(f"{section}.{name}") not in (MISSING, None, "None", 1, view.raw(f"{MEGATRON}.{name}"))
    ]
    if not different:
        return []
    return [
        f"{', '.join(different)}: Megatron makes its groups once in a process, and verl's roles share one; the prediction "
        "has the actor's sizes for all of them."
    ]
