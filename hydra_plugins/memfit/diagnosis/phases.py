"""From the functions of a traceback to the phase of a training step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FRAME = re.compile(r'File "(?P<file>[^"]{1,400})", line \d{1,7}, in (?P<function>[\w<>.]{1,120})')
_RICH_FRAME = re.compile(r"(?P<file>[\w./~-]{1,400}\.py):\d{1,7} in (?P<function>\w{1,120})")
_RAY_TASK = re.compile(r"ray::(?:\w{1,80}\.)?(?P<function>\w{1,120})\(\)")

RULES: tuple[tuple[str, str], ...] = (
    ("kv_resume", r":(?:wake_up|resume_memory_occupation|resume_kv\w*|create_and_map)$"),
    (
        "launch",
        r":(?:determine_num_available_blocks|determine_available_memory|profile_run|_initialize_kv_caches|initialize_cache"
        r"|init_device|init_device_graphs|init_cuda_graphs|capture_model|init_memory_pool|profile_max_num_token|init_model"
        r"|init_workers|_build_model_optimizer|_build_rollout|from_pretrained|load_model|init_engine)$"
        r"|[:_]init_model$|engine\.py:initialize$",
    ),
    (
        "weight_sync",
        r":(?:rollout_mode|_?update_weights\w*|sync_rollout_weights|load_dtensor_weights|get_per_tensor_param"
        r"|per_tensor_generator|collect_lora_params|sync_weights)$|sharding_manager/\w+\.py:__enter__$",
    ),
    ("update_critic", r"[:_]update_critic$|critic\.py:(?:ppo_update|train_batch)$"),
    ("values", r"[:_]compute_values$"),
    ("optimizer_step", r"torch/optim/\w+\.py:|:_?optimizer_step$"),
    ("ref_log_prob", r"[:_]compute_ref_log_?prob$|[:_]compute_ref_logp$"),
    ("old_log_prob", r"[:_]compute_(?:old_)?log_?prob$|[:_](?:re)?compute_logp$"),
    ("update_actor", r"[:_]update_(?:actor|policy)$|:(?:ppo_update|train_batch|train_mini_batch|train_lm)$"),
    ("generate", r"transformers/generation/\w+\.py:"),
    (
        "rollout",
        r"[:_](?:generate_sequences|execute_model|forward_batch_generation|generate_rollout|agenerate|async_generate)$",
    ),
    ("train_step", r":(?:training_step|train_step|_train_step)$"),
)
"""(phase, pattern), the most specific first: an optimizer step happens inside an update, a wake-up inside a sync."""

_RULES = tuple((phase, re.compile(pattern)) for phase, pattern in RULES)
_LIBRARIES = re.compile(r"(?:^|/)(?:torch|ray|transformers|asyncio|concurrent|flash_attn|triton|jax|_src)/")


RAY = "ray"
"""Stands for the file of a task of Ray."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One function in a traceback."""

    file: str
    """The last parts of the path."""
    function: str

    @property
    def place(self) -> str:
        """What the rules are matched against."""
        return f"{self.file}:{self.function}"


def frame_in(text: str) -> Frame | None:
    """Return the frame that a line of a traceback names; a task of Ray counts as one."""
    match = _FRAME.search(text) or _RICH_FRAME.search(text)
    if match is not None:
        return Frame(file="/".join(match["file"].replace("\\", "/").split("/")[-4:]), function=match["function"])
    task = _RAY_TASK.search(text)
    return None if task is None else Frame(file=RAY, function=task["function"])


def phase_of(frames: Sequence[Frame]) -> str | None:
    """Return the phase that the functions belong to; ``None`` where none is known."""
    for phase, pattern in _RULES:
        if any(pattern.search(frame.place) for frame in frames):
            return phase
    return None


def innermost(frames: Sequence[Frame]) -> str:
    """Return the innermost function that is not one of a library; empty without a traceback."""
    own = [frame for frame in frames if not _LIBRARIES.search(frame.file)]
    return (own or list(frames))[-1].function if frames else ""
