"""How verl's releases differ where memory is concerned. File and line of each row: docs/verl.md."""

from __future__ import annotations

from dataclasses import dataclass

Version = tuple[int, ...]


def parse(version: str) -> Version:
    """Return the leading numbers of a version: ``0.9.1.dev3`` -> (0, 9, 1)."""
    numbers: list[int] = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """What one release does."""

    legacy_workers: bool
    """fsdp_workers.py with dp_actor.py (the default up to 0.7.1) instead of the engine classes."""
    hard_token_budget: bool
    """A dynamic micro-batch never exceeds its budget (0.9); before, the number of micro-batches alone is set."""
    divides_in_place: bool
    """Logits are divided by the temperature in place, whatever it is (up to 0.8)."""
    engine_in_process: bool
    """The rollout engine lives in the trainer's process unless rollout.mode says async (up to 0.6)."""
    null_model_len_is_model_limit: bool
    """rollout.max_model_len=null means the model's max_position_embeddings (0.7 and later), not prompt + response."""
    keeps_root_after_inference: bool
    """With fsdp_size=-1 the root unit stays gathered after log-probabilities (engine classes)."""
    expert_linears: bool
    """Routed experts are linear modules, which target_modules=all-linear adapts (transformers before 5)."""
    reference_dtype_key: bool
    """The reference has a model_dtype (fp32 by default); before 0.6 it is loaded in bf16."""
    sleep_copies_weights: bool
    """Sleep level 1: the engine's weights go to pinned host memory instead of being dropped."""
    expandable_in_trainer: bool
    """verl switches expandable segments on in the trainer's allocator after the first weight sync."""
    sync_over_reserved: bool
    """No empty_cache before the engine maps its weights (engine classes up to 0.8)."""
    engine_share_is_own: bool
    """The engine's share covers its own process only (server mode), so what it keeps asleep comes on top of the trainer."""
    reward_in_trainer: bool
    """A reward model is one more FSDP model of the trainer (up to 0.6); later it is in an engine."""
    travels_in_bf16: bool
    """Weights are cast before they are sent (engine classes up to 0.8); else they travel as they are stored."""
    whole_tensors: bool
    """A tensor larger than a bucket cannot be sent to engines on other GPUs (0.7)."""
    bucket_key: str | None
    bucket_default: int
    """MiB."""
    critic_fsdp: str
    """Where the critic's FSDP section is."""
    critic_always_dynamic: bool
    """The critic's micro-batches have a token budget whatever critic.use_dynamic_bsz says (engine classes)."""
    critic_forward_budget: str
    """Name of the token budget of the values, below ``critic``."""
    critic_single_budget: bool
    """ppo_infer_max_token_len_per_gpu is the critic's only budget, and it is always dynamic (0.9's trainer)."""
    entropy_section: str
    """Where entropy chunking and checkpointing are read."""
    compile_key: str


def behaviour(version: str, *, engine_workers: bool = False) -> Behaviour:
    """
    Return how the release behaves; ``version`` is one of the supported ones.

    ``engine_workers``: trainer.use_legacy_worker_impl=disable, which has an effect in 0.6 and 0.7.
    """
    v = parse(version)
    actor = "actor_rollout_ref.actor"
    engine_classes = v >= (0, 8) or (engine_workers and v >= (0, 6))
    buckets: dict[Version, tuple[str | None, int]] = {
        (0, 4): (None, 0),
        (0, 5): ("actor_rollout_ref.rollout.update_weights_bucket_megabytes", 512),
        (0, 6): ("actor_rollout_ref.rollout.update_weights_bucket_megabytes", 512),
    }
    bucket_key, bucket = buckets.get(
        v[:2], ("actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes", 2048)
    )
    return Behaviour(
        legacy_workers=not engine_classes,
        hard_token_budget=v >= (0, 9),
        divides_in_place=v < (0, 9),
        engine_in_process=v < (0, 7),
        null_model_len_is_model_limit=v >= (0, 7),
        keeps_root_after_inference=engine_classes,
        expert_linears=v < (0, 9),
        reference_dtype_key=v >= (0, 6),
        sleep_copies_weights=v < (0, 6),
        expandable_in_trainer=v >= (0, 6),
        sync_over_reserved=engine_classes and v < (0, 9),
        engine_share_is_own=v >= (0, 6),
        reward_in_trainer=v < (0, 7),
        travels_in_bf16=engine_classes and v < (0, 9),
        whole_tensors=v < (0, 8),
        bucket_key=bucket_key,
        bucket_default=bucket,
        critic_fsdp="critic.fsdp" if v >= (0, 8) else "critic.model.fsdp_config",
        critic_always_dynamic=v >= (0, 8),
        critic_forward_budget="ppo_infer_max_token_len_per_gpu" if v >= (0, 8) else "forward_max_token_len_per_gpu",
        critic_single_budget=v >= (0, 9),
        entropy_section=f"{actor}.fsdp_config" if engine_classes else actor,
        compile_key=f"{actor}.fsdp_config.use_torch_compile" if engine_classes else f"{actor}.use_torch_compile",
    )


def engine_share(engine: str, engine_version: str) -> str:
    """Return what the engine's memory fraction is a fraction of (`memory.engine.SHARES`)."""
    if engine == "sglang":
        return "free"
    version = parse(engine_version)
    if version < (0, 11):
        return "device"
    return "own" if version < (0, 21) else "own_with_graphs"
