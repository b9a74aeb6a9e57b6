"""The micro-batches of each pass, from verl's batch keys: which key feeds which pass is the release's own choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.verl.launch import ACTOR, ARR, MODEL, REF, REWARD, ROLLOUT, Launch
from hydra_plugins.memfit.frameworks.verl.megatron_keys import MEGATRON, is_megatron, layout
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.view import LARGEST, View


def max_length(view: View) -> int:
    """Prompt and response together, as configured."""
    return view.integer("data.max_prompt_length", 512) + view.integer("data.max_response_length", 512)


def scored_length(view: View) -> int:
    """Return the length that the trainer's own reward model pads its sequences to, where it has another template."""
    return view.integer(f"{REWARD}.max_length", max_length(view))


def prompts_per_step(view: View) -> int:
    """Prompts of one training step; fully asynchronous training waits for a number of mini-batches."""
    if view.section("async_training"):
        return _mini_batch(view) * view.integer("async_training.require_batches", 1)
    prompts = view.integer("data.train_batch_size", 1024, minimum=0)
    if prompts == 0:
        raise ConfigError(
            "data.train_batch_size=0 without the section async_training: fully asynchronous training has both. Compose its "
            "own fully_async_ppo_trainer.yaml; on the console add async_training.require_batches=1."
        )
    return prompts


def sequences_per_step(view: View) -> int:
    """Sequences of one training step: prompts times n."""
    return _sequences(view, prompts_per_step(view))


def mini_sequences(view: View) -> int:
    """Sequences of one optimizer step."""
    return _sequences(view, _mini_batch(view))


def _mini_batch(view: View) -> int:
    return view.integer(f"{ACTOR}.ppo_mini_batch_size", 256)


def critic_mini_sequences(view: View) -> int:
    """Sequences of one optimizer step of the critic."""
    mini = view.integer("critic.ppo_mini_batch_size", view.integer(f"{ACTOR}.ppo_mini_batch_size", 256))
    return mini * view.integer(f"{ROLLOUT}.n", 1)


def _sequences(view: View, prompts: int) -> int:
    samples = view.integer(f"{ROLLOUT}.n", 1)
    if prompts * samples > LARGEST:
        raise ConfigError(
            f"{prompts} prompts times {ROLLOUT}.n={samples} are more than {LARGEST} sequences. Is it a slip?"
        )
    return prompts * samples


@dataclass(frozen=True, kw_only=True, slots=True)
class PassKeys:
    """The keys that lead to the micro-batches of one pass."""

    section: str
    micro: str
    """Name of the deprecated key over all GPUs; with ``_per_gpu`` behind it, of the one for each GPU."""
    budget: str
    """Name of the token budget for each GPU."""
    dynamic: str
    """Name of the switch between the two."""
    budget_default: int = 16384

    @property
    def micro_key(self) -> str:
        """Dotted key of the micro-batch over all GPUs."""
        return f"{self.section}.{self.micro}"

    @property
    def budget_key(self) -> str:
        """Dotted key of the token budget."""
        return f"{self.section}.{self.budget}"


UPDATE_ACTOR, OLD_LOG_PROB, REF_LOG_PROB = "update_actor", "old_log_prob", "ref_log_prob"
UPDATE_CRITIC, VALUES = "update_critic", "values"
SCORES = "scores"
"""The reward model that the trainer runs itself, up to 0.6."""

_ACTOR = PassKeys(
    section=ACTOR, micro="ppo_micro_batch_size", budget="ppo_max_token_len_per_gpu", dynamic="use_dynamic_bsz"
)
_OLD = PassKeys(
    section=ROLLOUT,
    micro="log_prob_micro_batch_size",
    budget="log_prob_max_token_len_per_gpu",
    dynamic="log_prob_use_dynamic_bsz",
)
_CRITIC = replace(_ACTOR, section="critic", budget_default=32768)
_PASSES = {
    UPDATE_ACTOR: _ACTOR,
    OLD_LOG_PROB: _OLD,
    REF_LOG_PROB: replace(_OLD, section=REF),
    UPDATE_CRITIC: _CRITIC,
    VALUES: replace(_CRITIC, micro="forward_micro_batch_size", budget="forward_max_token_len_per_gpu"),
    SCORES: PassKeys(
        section=REWARD,
        micro="micro_batch_size",
        budget="forward_max_token_len_per_gpu",
        dynamic="use_dynamic_bsz",
        budget_default=32768,
    ),
}


def pass_keys(name: str, launch: Launch) -> PassKeys:
    """Return the keys of one pass; the critic's budgets have other names in some releases."""
    keys, b = _PASSES[name], launch.behaviour
    if name == UPDATE_CRITIC and b.critic_single_budget:
        return replace(keys, budget="ppo_infer_max_token_len_per_gpu")
    return replace(keys, budget=b.critic_forward_budget) if name == VALUES else keys


def uses_reference(view: View) -> bool:
    """Whether log-probabilities of a reference model are computed."""
    return view.flag(f"{ACTOR}.use_kl_loss", False) or view.flag("algorithm.use_kl_in_reward", False)


def active(view: View, launch: Launch) -> tuple[str, ...]:
    """Return the passes that a step of this launch takes."""
    reference = (REF_LOG_PROB,) if uses_reference(view) else ()
    critic = (UPDATE_CRITIC, VALUES) if launch.critic_model is not None else ()
    scores = (SCORES,) if launch.reward_model is not None and launch.behaviour.reward_in_trainer else ()
    return (UPDATE_ACTOR, OLD_LOG_PROB, *reference, *critic, *scores)


def batch(view: View, launch: Launch, name: str) -> Batch:
    """Return the micro-batches of one pass."""
    keys, sp = pass_keys(name, launch), _sequence_parallel(view, launch, name)
    dp = _data_ranks(view, launch, sp)
    micro = view.optional_integer(f"{keys.micro_key}_per_gpu")
    if micro is None:
        whole = view.optional_integer(keys.micro_key)
        micro = None if whole is None else max(1, whole // dp)
    model = MODEL if keys.section.startswith(ARR) else f"{keys.section}.model"
    return Batch(
        dynamic=_dynamic(view, launch, keys),
        budget=view.integer(keys.budget_key, keys.budget_default),
        micro_batch=micro,
        local_sequences=max(1, -(-_pass_sequences(view, launch, name, dp) // dp)),
        sequence_parallel=sp,
        max_length=scored_length(view) if name == SCORES else max_length(view),
        packed=packed(view, model),
        hard_budget=launch.behaviour.hard_token_budget,
        lengths=launch.settings.lengths,
        pad_to=_bucket(view, launch, keys.section),
    )


def _bucket(view: View, launch: Launch, section: str) -> int:
    """Tokens to a multiple of which the engine pads packed micro-batches (0.9); 1: it does not."""
    fsdp = launch.behaviour.critic_fsdp if section == "critic" else f"{REF if section == REF else ACTOR}.fsdp_config"
    if not view.flag(f"{fsdp}.pad_to_length", False):
        return 1
    return view.integer(f"{fsdp}.pad_to_length_bucket", 1024)


def packed(view: View, model: str) -> bool:
    """Whether padding is removed; Megatron packs unless told otherwise, and cannot be told before 0.7."""
    if is_megatron(view):
        return view.flag(f"{MEGATRON}.use_remove_padding", True)
    return view.flag(f"{model}.use_remove_padding", False)


def _data_ranks(view: View, launch: Launch, sp: int) -> int:
    """Ranks that a batch is shared out among."""
    return layout(view, launch).data if is_megatron(view) else max(1, launch.world_size // sp)


def _dynamic(view: View, launch: Launch, keys: PassKeys) -> bool:
    if keys.section == "critic" and launch.behaviour.critic_always_dynamic:
        return True
    return view.flag(f"{keys.section}.{keys.dynamic}", view.flag(f"{ACTOR}.use_dynamic_bsz", False))


def _sequence_parallel(view: View, launch: Launch, name: str) -> int:
    if is_megatron(view):
        return view.integer(f"{MEGATRON}.context_parallel_size", 1)
    if name == REF_LOG_PROB:
        return view.integer(f"{REF}.ulysses_sequence_parallel_size", sequence_parallel(view))
    if name == SCORES:
        return view.integer(f"{REWARD}.ulysses_sequence_parallel_size", 1)
    return critic_sequence_parallel(view, launch) if name in (UPDATE_CRITIC, VALUES) else sequence_parallel(view)


def _pass_sequences(view: View, launch: Launch, name: str, dp: int) -> int:
    """Sequences of the whole pass: a mini-batch in an update, else the batch of the step."""
    if name == UPDATE_ACTOR:
        return _normalised(mini_sequences(view), launch, dp)
    if name == UPDATE_CRITIC:
        return _normalised(critic_mini_sequences(view), launch, dp)
    return sequences_per_step(view)


def _normalised(sequences: int, launch: Launch, dp: int) -> int:
    """Sequences of a mini-batch that verl trains on: up to 0.7 it drops what does not divide among the ranks."""
    return sequences - sequences % dp if launch.behaviour.legacy_workers and sequences > dp else sequences


def sequence_parallel(view: View) -> int:
    """Return the actor's Ulysses size."""
    return view.integer(f"{ACTOR}.ulysses_sequence_parallel_size", 1)


def critic_ulysses_key(launch: Launch) -> str:
    """Return where the release reads the critic's Ulysses size."""
    section = launch.behaviour.critic_fsdp if launch.behaviour.critic_fsdp == "critic.fsdp" else "critic"
    return f"{section}.ulysses_sequence_parallel_size"


def critic_sequence_parallel(view: View, launch: Launch) -> int:
    """Return the critic's Ulysses size."""
    return view.integer(critic_ulysses_key(launch), 1)
