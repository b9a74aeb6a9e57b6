"""The micro-batches of each pass, from verl's batch keys: which key feeds which pass is the release's own choice."""

from __future__ import annotations

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, MODEL, REF, ROLLOUT, Launch
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.view import LARGEST, View


def max_length(view: View) -> int:
    """Prompt and response together, as configured."""
    return view.integer("data.max_prompt_length", 512) + view.integer("data.max_response_length", 512)


def prompts_per_step(view: View) -> int:
    """Prompts of one training step; raises `NotModelled` for a fully asynchronous launch, which has none."""
    prompts = view.integer("data.train_batch_size", 1024, minimum=0)
    if prompts == 0:
        raise NotModelled(
            "data.train_batch_size=0 (fully asynchronous training): trainer and rollout on separate GPUs are not modelled "
            "yet. Launch without the hardware group, or go on unplanned with memfit.strict=false."
        )
    return prompts


def sequences_per_step(view: View) -> int:
    """Sequences of one training step: prompts times n."""
    return _sequences(view, prompts_per_step(view))


def mini_sequences(view: View) -> int:
    """Sequences of one optimizer step."""
    return _sequences(view, view.integer(f"{ACTOR}.ppo_mini_batch_size", 256))


def _sequences(view: View, prompts: int) -> int:
    samples = view.integer(f"{ROLLOUT}.n", 1)
    if prompts * samples > LARGEST:
        raise ConfigError(
            f"{prompts} prompts times {ROLLOUT}.n={samples} are more than {LARGEST} sequences. Is it a slip?"
        )
    return prompts * samples


def _batch(
    view: View, launch: Launch, *, dynamic: bool, budget: int, micro_key: str, sequences: int, sp: int, packed: bool
) -> Batch:
    dp = max(1, launch.world_size // sp)
    micro = view.optional_integer(f"{micro_key}_per_gpu")
    if micro is None:
        whole = view.optional_integer(micro_key)
        micro = None if whole is None else max(1, whole // dp)
    return Batch(
        dynamic=dynamic,
        budget=budget,
        micro_batch=micro,
        local_sequences=max(1, -(-sequences // dp)),
        sequence_parallel=sp,
        max_length=max_length(view),
        packed=packed,
        hard_budget=launch.behaviour.hard_token_budget,
        lengths=launch.settings.lengths,
    )


def _normalised(sequences: int, launch: Launch, sp: int) -> int:
    """Sequences of a mini-batch that verl trains on: up to 0.7 it drops what does not divide among the ranks."""
    dp = max(1, launch.world_size // sp)
    return sequences - sequences % dp if launch.behaviour.legacy_workers and sequences > dp else sequences


def actor_batch(view: View, launch: Launch) -> Batch:
    """Return the micro-batches of the actor's update."""
    return _batch(
        view,
        launch,
        dynamic=view.flag(f"{ACTOR}.use_dynamic_bsz", False),
        budget=view.integer(f"{ACTOR}.ppo_max_token_len_per_gpu", 16384),
        micro_key=f"{ACTOR}.ppo_micro_batch_size",
        sequences=_normalised(mini_sequences(view), launch, sequence_parallel(view)),
        sp=sequence_parallel(view),
        packed=view.flag(f"{MODEL}.use_remove_padding", False),
    )


def rollout_log_prob_batch(view: View, launch: Launch) -> Batch:
    """Return the micro-batches of the old log-probabilities."""
    actor_dynamic = view.flag(f"{ACTOR}.use_dynamic_bsz", False)
    return _batch(
        view,
        launch,
        dynamic=view.flag(f"{ROLLOUT}.log_prob_use_dynamic_bsz", actor_dynamic),
        budget=view.integer(f"{ROLLOUT}.log_prob_max_token_len_per_gpu", 16384),
        micro_key=f"{ROLLOUT}.log_prob_micro_batch_size",
        sequences=sequences_per_step(view),
        sp=sequence_parallel(view),
        packed=view.flag(f"{MODEL}.use_remove_padding", False),
    )


def reference_batch(view: View, launch: Launch) -> Batch:
    """Return the micro-batches of the reference's log-probabilities."""
    actor_dynamic = view.flag(f"{ACTOR}.use_dynamic_bsz", False)
    return _batch(
        view,
        launch,
        dynamic=view.flag(f"{REF}.log_prob_use_dynamic_bsz", actor_dynamic),
        budget=view.integer(f"{REF}.log_prob_max_token_len_per_gpu", 16384),
        micro_key=f"{REF}.log_prob_micro_batch_size",
        sequences=sequences_per_step(view),
        sp=view.integer(f"{REF}.ulysses_sequence_parallel_size", sequence_parallel(view)),
        packed=view.flag(f"{MODEL}.use_remove_padding", False),
    )


def critic_batch(view: View, launch: Launch) -> Batch:
    """Return the micro-batches of the critic's update."""
    single = launch.behaviour.critic_single_budget
    key = "critic.ppo_infer_max_token_len_per_gpu" if single else "critic.ppo_max_token_len_per_gpu"
    mini = view.integer("critic.ppo_mini_batch_size", view.integer(f"{ACTOR}.ppo_mini_batch_size", 256))
    return _batch(
        view,
        launch,
        dynamic=launch.behaviour.critic_always_dynamic
        or view.flag("critic.use_dynamic_bsz", view.flag(f"{ACTOR}.use_dynamic_bsz", False)),
        budget=view.integer(key, 32768),
        micro_key="critic.ppo_micro_batch_size",
        sequences=_normalised(mini * view.integer(f"{ROLLOUT}.n", 1), launch, critic_sequence_parallel(view, launch)),
        sp=critic_sequence_parallel(view, launch),
        packed=view.flag("critic.model.use_remove_padding", False),
    )


def critic_forward_batch(view: View, launch: Launch) -> Batch:
    """Return the micro-batches of the values."""
    update = critic_batch(view, launch)
    own = view.integer(launch.behaviour.critic_forward_budget, 32768)
    budget = update.budget if launch.behaviour.critic_single_budget else own
    return _batch(
        view,
        launch,
        dynamic=update.dynamic,
        budget=budget,
        micro_key="critic.forward_micro_batch_size",
        sequences=sequences_per_step(view),
        sp=update.sequence_parallel,
        packed=update.packed,
    )


def sequence_parallel(view: View) -> int:
    """Return the actor's Ulysses size."""
    return view.integer(f"{ACTOR}.ulysses_sequence_parallel_size", 1)


def critic_sequence_parallel(view: View, launch: Launch) -> int:
    """Return the critic's Ulysses size, from where the release reads it."""
    section = launch.behaviour.critic_fsdp
    key = "critic.ulysses_sequence_parallel_size"
    if section == "critic.fsdp":
        key = f"{section}.ulysses_sequence_parallel_size"
    return view.integer(key, 1)
