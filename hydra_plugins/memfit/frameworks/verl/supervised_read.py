"""verl's configs of supervised fine-tuning -> `SupervisedRun`: which keys lead to which fact. No formula lives here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.verl import defaults, images, supervised_keys, surroundings
from hydra_plugins.memfit.frameworks.verl.checks import has_flash_attention
from hydra_plugins.memfit.frameworks.verl.choices import refuse_unknown_strategy
from hydra_plugins.memfit.frameworks.verl.read import FSDP_STRATEGIES, master_bytes
from hydra_plugins.memfit.frameworks.verl.supervised_keys import LEGACY, Keys
from hydra_plugins.memfit.frameworks.verl.tokens import Batch
from hydra_plugins.memfit.frameworks.verl.versions import Behaviour, behaviour, parse
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.allocator import asks_for_expandable
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.states import lora_parameters
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.roles import Role
from hydra_plugins.memfit.planning.supervised import SupervisedRun

TORCHRUN = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
"""What torchrun tells each of its processes; verl's entries take the number of GPUs from it and from nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch(surroundings.EntryLaunch):
    """One launch of supervised fine-tuning."""

    entry: str
    keys: Keys
    behaviour: Behaviour

    @property
    def is_legacy(self) -> bool:
        """Whether this is ``fsdp_sft_trainer``, which has a loop and a loss of its own."""
        return self.entry == LEGACY

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share one sequence."""
        return self.view.integer(self.keys.sequence_parallel, 1)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.world_size // self.sequence_parallel)

    @property
    def train_batch(self) -> int:
        """Sequences of one optimizer step, all ranks together."""
        return self.view.integer("data.train_batch_size", 256)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.view.integer("data.max_length", 1024)

    @property
    def removes_padding(self) -> bool:
        """Whether padding is removed; ``fsdp_sft_trainer`` does so for sequence parallelism only."""
        asked = self.view.flag(self.keys.remove_padding, False)
        return asked and (self.sequence_parallel > 1 or not self.is_legacy)

    @property
    def strategy(self) -> str:
        """``fsdp`` or ``fsdp2``."""
        return self.view.text(self.keys.strategy, self.keys.strategy_default)

    @property
    def lora_rank(self) -> int:
        """Rank of the adapters; 0 without."""
        return self.view.integer("model.lora_rank", 0, minimum=0)

    @property
    def host_policy(self) -> bool:
        """Whether parameters, gradients and optimizer live on the host."""
        if not self.view.flag(self.keys.host_policy, False):
            return False
        return self.view.flag("model.fsdp_config.offload_params", False) if self.is_legacy else self.strategy == "fsdp2"

    @property
    def batch(self) -> Batch:
        """The micro-batches of one optimizer step."""
        dynamic = not self.is_legacy and self.view.flag("data.use_dynamic_bsz", True)
        return Batch(
            dynamic=dynamic,
            budget=self.view.integer("data.max_token_len_per_gpu", 8192),
            micro_batch=self.view.optional_integer("data.micro_batch_size_per_gpu"),
            local_sequences=max(1, self.train_batch // self.ranks),
            sequence_parallel=self.sequence_parallel,
            max_length=self.max_length,
            packed=self.removes_padding,
            hard_budget=self.behaviour.hard_token_budget,
            lengths=self.context.settings.lengths,
            pad_to=self.view.integer("engine.pad_to_length_bucket", 1024)
            if self.view.flag("engine.pad_to_length", False)
            else 1,
        )


def read_launch(view: View, context: Context) -> Launch:
    """Return the launch that the config describes; raises `ConfigError` and `NotModelled`."""
    surroundings.refuse_other_than_gpus(context.hardware)
    context = replace(context, expandable_segments=asks_for_expandable(context.environ))
    version = defaults.pick_version(context.settings.framework_version or defaults.installed_version())
    entry = supervised_keys.require(version, supervised_keys.entry_of(view))
    keys = supervised_keys.keys_of(entry)
    gpus, nodes = _gpus(view, context)
    launch = Launch(
        view=view,
        overrides={},
        context=context,
        version=version,
        entry=entry,
        keys=keys,
        behaviour=behaviour(version, engine_workers=True),
        model=surroundings.model(view, context, keys.path, context.model),
        gpus_per_node=gpus,
        nodes=nodes,
    )
    _refuse_unmodelled(launch)
    return launch


def _gpus(view: View, context: Context) -> tuple[int, int]:
    """GPUs of a node and nodes: as told, else as torchrun says, else as the config says."""
    local, world = (context.environ.get(name, "") for name in TORCHRUN)
    if context.gpus_per_node or not (local.isdigit() and world.isdigit() and int(local) > 0):
        return surroundings.gpus(view, context)
    return int(local), context.nodes or max(1, int(world) // int(local))


def _refuse_unmodelled(launch: Launch) -> None:
    unplanned = "or go on unplanned with memfit.strict=false."
    view, key = launch.view, launch.keys.strategy
    refuse_unknown_strategy(view, key, launch.version)
    if launch.strategy not in FSDP_STRATEGIES:
        raise NotModelled(
            f"{key}={launch.strategy}: memfit models supervised fine-tuning with fsdp and fsdp2. Set {key}=fsdp, {unplanned}"
        )
    if view.text("model.lora_adapter_path", ""):
        raise NotModelled(
            "model.lora_adapter_path: the rank of a given adapter is not read. Launch without the hardware group, "
            f"{unplanned}"
        )
    if launch.is_legacy and view.flag(launch.keys.host_policy, False) and launch.strategy == "fsdp2":
        raise ConfigError(
            f"{launch.keys.host_policy}=true with {key}=fsdp2 hands FSDP2 an object of FSDP1, which fails in the first "
            f"step. Set {key}=fsdp, or {launch.keys.host_policy}=false."
        )


def read_run(launch: Launch) -> SupervisedRun:
    """Return what is where, for the values that the launch is turned to."""
    return SupervisedRun(
        budget_bytes=launch.context.budget_bytes,
        host_budget_bytes=launch.context.host_budget_bytes,
        world_size=launch.world_size,
        gpus_per_node=launch.gpus_per_node,
        role=_role(launch),
        expandable_segments=launch.context.margin.expandable_segments,
        tied_load=launch.model.tie_word_embeddings,
    )


def _role(launch: Launch) -> Role:
    view, model, keys, batch = launch.view, launch.model, launch.keys, launch.batch
    sites = (*model.lora_sites, *(model.expert_lora_sites if launch.behaviour.expert_linears else ()))
    rank = launch.lora_rank
    head = _legacy_head(launch) if launch.is_legacy else _engine_head(launch)
    image = images.per_prompt(launch.context.settings.lengths, launch.max_length) if model.vision else 0
    return Role(
        model=model,
        sharding=_sharding(launch),
        trainable_parameters=lora_parameters(sites=sites, rank=rank) if rank else model.parameters,
        master_bytes=master_bytes(view, keys.section),
        param_offload=not launch.host_policy and view.flag("engine.param_offload", False),
        optimizer_offload=not launch.host_policy and view.flag("engine.optimizer_offload", False),
        cpu_policy=launch.host_policy,
        checkpointing=view.flag("model.enable_gradient_checkpointing", True),
        activation_offload=view.flag("model.enable_activation_offload", False),
        forward_head=head,
        update_head=head,
        forward_tokens=batch.tokens(),
        update_tokens=batch.tokens(),
        sequence_parallel=batch.sequence_parallel,
        update_image_tokens=batch.image_tokens(prompt=image),
        accumulates=batch.accumulates(),
        unsharded_gradients=view.flag("engine.use_no_sync_for_gradient_accumulation", False),
    )


def _sharding(launch: Launch) -> Sharding:
    view, world = launch.view, launch.world_size
    asked = view.integer("engine.fsdp_size", -1, minimum=-1)
    sharding = Sharding.of(
        launch.model,
        version=2 if launch.strategy == "fsdp2" else 1,
        ranks=world if asked <= 0 or asked >= world else asked,
        trainable=not launch.lora_rank,
    )
    return replace(
        sharding,
        reshard_after_forward=view.flag("engine.reshard_after_forward", True),
        forward_prefetch=view.flag("engine.forward_prefetch", False),
    )


def _legacy_head(launch: Launch) -> Head:
    """transformers' logits into torch's cross entropy; without sequence parallelism a shifted copy of them comes first."""
    return Head(log_prob="autocast_ce", extra_copies=0 if launch.removes_padding else 1)


def _engine_head(launch: Launch) -> Head:
    """The log-probabilities of the engine classes, at temperature 1 and without an entropy."""
    view, fused = launch.view, "none"
    if view.flag("model.use_fused_kernels", False) and parse(launch.version) >= (0, 7):
        fused = "triton" if view.text("model.fused_kernel_options.impl_backend", "torch") == "triton" else "torch"
    flash = has_flash_attention(launch.context.hardware)
    flash = flash and launch.context.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    return Head(
        log_prob="flash_ce" if flash else "torch",
        fused=fused,
        scaled="in_place" if launch.behaviour.divides_in_place else "no",
        extra_copies=0 if launch.removes_padding else 1,
    )


def whole_sequence(launch: Launch) -> int:
    """Return the smallest token budget for each GPU that holds the longest sequence."""
    batch = launch.batch
    return ceil_div(batch.longest, batch.sequence_parallel)
