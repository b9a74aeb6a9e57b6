"""Numbers of tokens that a launch may put into one pass, each with the key that it comes from."""

from __future__ import annotations

from collections.abc import Mapping

_BUDGETS = ("max_token_len_per_gpu", "max_tokens_per_mb", "max_num_batched_tokens", "chunked_prefill_size")
"""Ends of keys that hold a number of tokens."""
_SEQUENCES = ("micro_batch_size_per_gpu",)
"""Ends of keys that hold a number of sequences."""
_LENGTHS = {
    "data.max_prompt_length": "prompt",
    "data.max_response_length": "response",
    "gconfig.max_new_tokens": "response",
    "train_dataset.max_length": "prompt",
}
_FIRST = {
    "update_actor": ("actor.ppo_", "actor.mb_spec"),
    "old_log_prob": ("rollout.log_prob", "actor.mb_spec"),
    "ref_log_prob": ("ref.",),
    "values": ("critic.forward", "critic.ppo_"),
    "update_critic": ("critic.ppo_",),
    "rollout": ("rollout.max_num_batched_tokens",),
    "launch": ("rollout.max_num_batched_tokens",),
}
"""Parts of the keys that count first in a phase."""
_WITHOUT_CRITIC = {"update_actor", "old_log_prob", "ref_log_prob", "optimizer_step"}
"""Phases in which no batch of the critic runs."""


def token_counts(leaves: Mapping[str, object], phase: str | None) -> dict[int, str]:
    """Return tokens -> where they come from; of keys with the same product the one that ``phase`` reads."""
    lengths = {name: value for key, name in _LENGTHS.items() if isinstance(value := leaves.get(key), int) and value > 0}
    found: dict[int, str] = {}
    for key in sorted(leaves, key=lambda key: not any(part in key for part in _FIRST.get(phase or "", ()))):
        value = leaves[key]
        if key.startswith("critic.") and phase in _WITHOUT_CRITIC:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            continue
        if key.endswith(_BUDGETS):
            found.setdefault(value, f"{key}={value}")
        elif key.endswith(_SEQUENCES):
            for count, how in _products(value, lengths):
                found.setdefault(count, f"{key}={value} x {how}")
    for count, how in _products(1, lengths):
        found.setdefault(count, f"one sequence of {how}")
    return found


def sequence_lengths(leaves: Mapping[str, object]) -> tuple[int, ...]:
    """Return the lengths to which sequences are padded: the response alone, prompt and response."""
    lengths = _lengths(leaves)
    response = lengths.get("response", 0)
    return (response, response + lengths.get("prompt", 0)) if response else ()


def _lengths(leaves: Mapping[str, object]) -> dict[str, int]:
    return {name: value for key, name in _LENGTHS.items() if isinstance(value := leaves.get(key), int) and value > 0}


def _products(sequences: int, lengths: Mapping[str, int]) -> list[tuple[int, str]]:
    prompt, response = lengths.get("prompt", 0), lengths.get("response", 0)
    whole = [(sequences * (prompt + response), f"(prompt + response {prompt + response})")] if response else []
    return [*whole, *((sequences * length, f"{name} {length}") for name, length in lengths.items())]
