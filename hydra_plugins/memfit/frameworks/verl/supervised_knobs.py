"""The keys of verl's supervised fine-tuning that the planner may set, and what verl refuses before it trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.common_knobs import bf16_states, host_policy, shorter, switch
from hydra_plugins.memfit.frameworks.linear_attention import kernel_note
from hydra_plugins.memfit.frameworks.verl.batches import PassKeys
from hydra_plugins.memfit.frameworks.verl.checks import fused_over_fsdp2
from hydra_plugins.memfit.frameworks.verl.images import assumed, not_counted
from hydra_plugins.memfit.frameworks.verl.micro_batches import batch_knobs, divisors
from hydra_plugins.memfit.frameworks.verl.supervised_read import TORCHRUN, Launch, whole_sequence
from hydra_plugins.memfit.frameworks.verl.surroundings import ulysses_sizes
from hydra_plugins.memfit.frameworks.verl.versions import parse
from hydra_plugins.memfit.frameworks.view import unpinned
from hydra_plugins.memfit.memory.breakdown import Shortfall
from hydra_plugins.memfit.planning.problem import Change, Knob

WRITABLE_KEYS = frozenset(
    {
        "data.max_length",
        "data.max_token_len_per_gpu",
        "data.micro_batch_size_per_gpu",
        "data.truncation",
        "engine.model_dtype",
        "engine.offload_policy",
        "engine.strategy",
        "engine.ulysses_sequence_parallel_size",
        "model.enable_activation_offload",
        "model.enable_gradient_checkpointing",
        "model.fsdp_config.cpu_offload",
        "model.fsdp_config.model_dtype",
        "model.fsdp_config.offload_params",
        "model.strategy",
        "model.use_fused_kernels",
        "model.use_remove_padding",
        "ulysses_sequence_parallel_size",
        "use_remove_padding",
    }
)
"""Every key that memfit may write for these entries; a test keeps the list and docs/verl.md together."""
_PASS = PassKeys(section="data", micro="micro_batch_size", budget="max_token_len_per_gpu", dynamic="use_dynamic_bsz")
_MICRO, _BUDGET = f"{_PASS.micro_key}_per_gpu", _PASS.budget_key
_FUSED = "model.use_fused_kernels"
_FEWER = "fewer tokens in a micro-batch; gradients are accumulated over more of them"


# -- what may be turned ---------------------------------------------------------------------------------------------
def knobs(launch: Launch) -> Iterator[Knob]:
    """Yield the knobs in the order in which they are spent."""
    yield from batch_knobs(launch.view, _PASS, launch.batch, 22, _FEWER)
    yield from _memory_for_compute(launch)
    yield from _host(launch)
    yield from _semantic(launch)


def _switch(
    launch: Launch, key: str, cost: int, why: str, *, default: bool = False, back: bool = True
) -> Iterator[Knob]:
    if launch.view.has(key):
        yield from switch(launch.view, key, cost=cost, why=why, default=default, back=back)


def _memory_for_compute(launch: Launch) -> Iterator[Knob]:
    if not launch.is_legacy:
        why = "no compute and no memory for padding"
        yield from _switch(launch, launch.keys.remove_padding, 42, why, back=False)
    why = "one more forward pass instead of keeping every layer's activations"
    yield from _switch(launch, "model.enable_gradient_checkpointing", 44, why, default=True)
    yield from _ulysses(launch)
    if launch.model.num_hidden_layers >= 3:
        why = "saved layer inputs wait in host memory"
        yield from _switch(launch, "model.enable_activation_offload", 48, why)
    if parse(launch.version) >= (0, 7):
        why = "log-probabilities in chunks, without the matrix of all logits"
        yield from _switch(launch, _FUSED, 52, why, back=False)


def _ulysses(launch: Launch) -> Iterator[Knob]:
    key, padding, now = launch.keys.sequence_parallel, launch.keys.remove_padding, launch.sequence_parallel
    possible = ulysses_sizes(
        launch.model,
        above=now,
        gpus_per_node=launch.gpus_per_node,
        world_size=launch.world_size,
        sequences=launch.train_batch,
    )
    sizes = tuple(size for size in possible if _divides(launch, size))
    if sizes:
        yield Knob(
            key=key,
            requested=launch.view.requested(key),
            candidates=sizes,
            cost=46,
            why="a sequence is spread over several GPUs",
            companions=lambda value: {padding: True} if value != now else {},
        )


def _divides(launch: Launch, size: int) -> bool:
    """Whether static micro-batches still divide a rank's sequences."""
    micro = launch.batch.micro_batch
    return launch.batch.dynamic or not micro or (launch.train_batch * size // launch.world_size) % micro == 0


def _host(launch: Launch) -> Iterator[Knob]:
    """FSDP2's policy for the engine classes, FSDP1's offload for ``fsdp_sft_trainer``."""
    key, strategy = launch.keys.host_policy, launch.keys.strategy
    if launch.host_policy or launch.lora_rank or not launch.view.has(key):
        return
    follow: dict[str, object] = {strategy: "fsdp2"}
    if launch.is_legacy:
        follow = {strategy: "fsdp", "model.fsdp_config.offload_params": True}
    yield host_policy(launch.view, key, cost=60, whose="", follow=follow)


def _semantic(launch: Launch) -> Iterator[Knob]:
    view, key = launch.view, f"{launch.keys.section}.model_dtype"
    if view.text(key, "fp32") in ("fp32", "float32"):
        yield bf16_states(view, key)
    now = launch.max_length
    cut = {"data.truncation": "right"} if view.text("data.truncation", "error") == "error" else {}
    why = "longer sequences are cut"
    yield from shorter(view, "data.max_length", now, why=why, companions=lambda value: cut if value != now else {})


# -- what verl would refuse -----------------------------------------------------------------------------------------
def fixes(launch: Launch, pinned: Collection[str]) -> tuple[Change, ...]:
    """Return the changes without which the launch would fail at any size; raises `ConfigError` where one is pinned."""
    return unpinned([*_budget_fix(launch), *_micro_batch_fix(launch)], pinned)


def _budget_fix(launch: Launch) -> Iterator[Change]:
    batch, need = launch.batch, whole_sequence(launch)
    if batch.dynamic and batch.budget < need:
        why = f"one sequence of {batch.longest} tokens must fit into a micro-batch"
        yield Change(key=_BUDGET, old=launch.view.requested(_BUDGET), new=need, kind="neutral", why=why)


def _micro_batch_fix(launch: Launch) -> Iterator[Change]:
    """Both entries split a rank's sequences evenly; the engine of 0.6 alone takes a remainder."""
    batch = launch.batch
    now, local = batch.micro_batch, batch.local_sequences
    if batch.dynamic or now is None or local % now == 0 or (not launch.is_legacy and parse(launch.version) < (0, 7)):
        return
    fitting = next(size for size in divisors(local) if size <= now)
    why = f"verl splits the {local} sequences of a rank evenly"
    yield Change(key=_MICRO, old=now, new=fitting, kind="neutral", why=why)


def blockers(launch: Launch) -> tuple[str, ...]:
    """Return why the launch would die whatever its size; each with the fix."""
    found, ranks, batch = [], launch.ranks, launch.train_batch
    if batch < ranks or (launch.is_legacy and batch % ranks):
        found.append(
            f"data.train_batch_size={batch} cannot be shared out among {ranks} data-parallel ranks. "
            f"Write data.train_batch_size={max(1, ceil_div(batch, ranks)) * ranks}."
        )
    if launch.sequence_parallel > 1 and not launch.view.flag(launch.keys.remove_padding, False):
        found.append(
            f"{launch.keys.sequence_parallel}={launch.sequence_parallel} needs {launch.keys.remove_padding}=true: verl "
            "refuses sequence parallelism on padded batches."
        )
    return tuple(found)


def broken_heads(launch: Launch) -> tuple[Shortfall, ...]:
    """Return the combination in which the engine cannot read lm_head, as in training with a rollout."""
    fused = not launch.is_legacy and launch.view.flag(_FUSED, False)
    if not fused or launch.model.tie_word_embeddings or launch.strategy != "fsdp2":
        return ()
    return (fused_over_fsdp2(_FUSED, launch.keys.strategy, phase="train_step"),)


def notes(launch: Launch) -> tuple[str, ...]:
    """Return what a user should know about the reading of the config."""
    lines = list(launch.context.hardware.warnings)
    if not launch.context.gpus_per_node and TORCHRUN[0] not in launch.context.environ:
        lines.append(
            f"{launch.gpus_per_node} GPUs a node, as trainer.n_gpus_per_node says; torchrun does not read it. Another number: "
            "--gpus on the console."
        )
    if launch.is_legacy:
        lines.append(
            f"{launch.entry} averages the loss over each micro-batch: other micro-batches weight the tokens slightly "
            "differently, as another number of GPUs does."
        )
    if launch.model.vision_parameters and launch.model.vision is None:
        lines.append(not_counted(launch.model))
    elif launch.model.vision and launch.context.settings.lengths.image is None:
        lines.append(assumed(launch.model, "data.max_length", launch.max_length))
    lines += kernel_note(launch.model)
    if launch.view.flag("model.use_liger", False):
        lines.append("model.use_liger=true is not counted: Liger's kernels need less than predicted.")
    return tuple(lines)
