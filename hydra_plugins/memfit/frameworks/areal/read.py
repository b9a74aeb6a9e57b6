"""AReaL's config -> `ConcurrentRun`: which keys lead to which fact. No formula lives here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.base.units import ceil_div, round_up
from hydra_plugins.memfit.frameworks.areal.allocation import Layout
from hydra_plugins.memfit.frameworks.areal.versions import Behaviour
from hydra_plugins.memfit.frameworks.view import MISSING, View
from hydra_plugins.memfit.memory.allocator import Margin
from hydra_plugins.memfit.memory.engine import Engine
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import SLICE_TOKENS, Head
from hydra_plugins.memfit.memory.overheads import SGLANG_PREFILL_TOKENS
from hydra_plugins.memfit.memory.states import lora_parameters
from hydra_plugins.memfit.model.spec import ModelSpec, value_model
from hydra_plugins.memfit.planning.concurrent import APART, SHARED, TURNS, ConcurrentRun
from hydra_plugins.memfit.planning.roles import Role

ROW_TOKENS = 256
"""A packed micro-batch is padded to a multiple of this (utils/data.py)."""
FRACTIONS = {"sglang": "sglang.mem_fraction_static", "vllm": "vllm.gpu_memory_utilization"}
_STORAGE = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2}
_NO_OPTIMIZER = ("float16", "fp16")
"""Of those, the ones that AReaL keeps no moments in."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What does not change while knobs are turned: the surroundings of one AReaL launch."""

    version: str
    behaviour: Behaviour
    layout: Layout
    model: ModelSpec
    section: str
    """``actor``, or ``model`` (supervised training up to 0.5.1)."""
    settings: Settings
    capacity_bytes: int
    budget_bytes: int
    margin: Margin
    held_bytes: int
    host_budget_bytes: int
    gpus_per_node: int
    nodes: int
    server_first: bool

    @property
    def gpus(self) -> int:
        """GPUs of the whole launch."""
        return self.gpus_per_node * self.nodes

    @property
    def shares(self) -> bool:
        """Whether some GPU gets a server and a trainer: local launches deal GPUs round-robin without a check."""
        layout = self.layout
        if layout.server is None:
            return False
        return layout.colocated or layout.server.world + layout.trainer.world > self.gpus


def read(view: View, launch: Launch) -> ConcurrentRun:
    """Return the run that the config describes; raises `ConfigError`."""
    layout = launch.layout
    takes_turns = launch.shares and turns(view)
    reference = _reference(view, launch) if has_reference(view) else None
    critic = _critic(view, launch) if has_critic(view) else None
    return ConcurrentRun(
        capacity_bytes=launch.capacity_bytes,
        budget_bytes=launch.budget_bytes,
        held_bytes=launch.held_bytes,
        host_budget_bytes=launch.host_budget_bytes,
        placement=TURNS if takes_turns else SHARED if launch.shares else APART,
        server_first=launch.server_first,
        trainers_per_node=min(layout.trainer.world, launch.gpus_per_node),
        servers_per_node=0 if layout.server is None else min(layout.server.world, launch.gpus_per_node),
        actor=_role(view, launch, launch.section),
        reference=reference,
        critic=critic,
        process_each=not launch.behaviour.launcher,
        efficient_load=view.flag(f"{launch.section}.fsdp.memory_efficient_load", False),
        stepwise_optimizer=_stepwise(view, launch.section),
        engine=_engine(view, launch),
        old_log_prob=_recomputes(view),
        sync="disk" if sync_mode(view, launch) == "disk" else "stream",
        expandable_segments=launch.margin.expandable_segments,
    )


def turns(view: View) -> bool:
    """Whether trainer and server are colocated on purpose and leave the GPU to each other."""
    return view.flag("enable_offload", False) and view.text("rollout.scheduling_strategy.type", "") == "colocation"


def sync_mode(view: View, launch: Launch) -> str:
    """Return ``disk``, ``xccl`` or ``nccl``."""
    b = launch.behaviour
    return b.sync_default if b.sync_key is None else view.text(b.sync_key, b.sync_default)


def _recomputes(view: View) -> bool:
    return view.flag("actor.recompute_logprob", False) or view.flag("actor.use_decoupled_loss", False)


def has_reference(view: View) -> bool:
    """Whether a reference is built: the section is there and the KL term counts."""
    return view.section("ref") and view.number("actor.kl_ctl", 0.1, low=0.0, high=1e9) > 0


def has_critic(view: View) -> bool:
    """Whether the launch trains a critic."""
    return view.section("critic")


def _stepwise(view: View, section: str) -> bool:
    return view.flag(f"{section}.fsdp.per_layer_optim_step", False)


# -- lengths --------------------------------------------------------------------------------------------------------
def longest(view: View, launch: Launch) -> int | None:
    """Tokens of the longest sequence as configured, or as the user knows it; ``None`` where the prompts are not bounded."""
    prompt = view.optional_integer("train_dataset.max_length")
    known = launch.settings.lengths.max
    if prompt is None:
        return known
    response = view.integer("gconfig.max_new_tokens", 16384) if view.section("gconfig") else 0
    return min(prompt + response, known) if known else prompt + response


def floor_tokens(view: View, launch: Launch) -> int | None:
    """Smallest limit of a micro-batch that holds every sequence; ``None``: not known."""
    tokens = longest(view, launch)
    return None if tokens is None else round_up(tokens, ROW_TOKENS)


def tokens_key(section: str, launch: Launch) -> str:
    """Return the key of a section's token limit."""
    return f"{section}.mb_spec.{launch.behaviour.tokens_field}"


def whole_tokens(view: View, launch: Launch) -> int | None:
    """Tokens of one rank's share of a batch at full length; ``None``: not known."""
    each = longest(view, launch)
    if each is None:
        return None
    sequences = view.integer("train_dataset.batch_size", 1)
    if view.section("gconfig"):
        sequences *= view.integer("gconfig.n_samples", 1)
    return ceil_div(sequences, launch.layout.trainer.d) * each


def micro_tokens(view: View, launch: Launch, section: str) -> int:
    """Tokens of the largest micro-batch of ``section`` on one rank; raises `ConfigError` where nothing bounds them."""
    limit, whole = view.optional_integer(tokens_key(section, launch)), whole_tokens(view, launch)
    if limit is None and whole is None:
        raise ConfigError(
            f"neither {tokens_key(section, launch)} nor train_dataset.max_length is set, so nothing bounds a micro-batch. "
            f"Set one of them, for example {tokens_key(section, launch)}=8192."
        )
    if limit is not None and view.flag(f"{section}.pad_to_maximum", False):
        whole = None
    tokens = min(t for t in (limit, whole) if t is not None)
    return ceil_div(round_up(tokens, ROW_TOKENS), _sequence_parallel(view, launch, section))


def _sequence_parallel(view: View, launch: Launch, section: str) -> int:
    return launch.layout.trainer.c * view.integer(f"{section}.fsdp.ulysses_sp_size", 1)


# -- roles ----------------------------------------------------------------------------------------------------------
def storage_bytes(view: View, launch: Launch, section: str) -> int:
    """Bytes of a stored parameter, of its gradient and of each moment."""
    default = {2: "bfloat16", 4: "float32"}[launch.behaviour.storage_bytes]
    key = f"{section}.optimizer_dtype"
    dtype = view.choice(key, default, [name for name in _STORAGE if name not in _NO_OPTIMIZER])
    if view.raw(key) in (MISSING, None) and launch.behaviour.storage_bytes == 2:
        dtype = view.choice(f"{section}.dtype", "bfloat16", _STORAGE)
    return _STORAGE[dtype]


def _optimizer_bytes(view: View, launch: Launch, section: str, storage: int) -> int:
    if _stepwise(view, section):
        return 0
    known = {"adam": 2 * storage, "adam_bf16": 6, "sgd": 0}
    return known[view.choice(f"{section}.optimizer.type", "adam", known)]


def _role(view: View, launch: Launch, section: str, model: ModelSpec | None = None) -> Role:
    spec, b = model or launch.model, launch.behaviour
    lora = view.flag(f"{section}.use_lora", False)
    storage = storage_bytes(view, launch, section)
    trained = spec.parameters
    if lora:
        trained = lora_parameters(sites=spec.lora_sites, rank=view.integer(f"{section}.lora_rank", 32))
    tokens, whole = micro_tokens(view, launch, section), whole_tokens(view, launch)
    mini = view.integer(f"{section}.ppo_n_minibatches", 4) if view.section("gconfig") else 1
    head = Head(entropy="slices", chunk_tokens=SLICE_TOKENS) if model is None else Head(vocabulary=False)
    return Role(
        model=spec,
        sharding=_sharding(spec, launch, trainable=not lora, vocabulary_head=section != "critic"),
        trainable_parameters=trained,
        master_bytes=storage,
        optimizer_bytes=_optimizer_bytes(view, launch, section, storage),
        step_copy=not b.fused_optimizer,
        cpu_policy=view.flag(f"{section}.fsdp.offload_params", False),
        checkpointing=checkpointing(view, launch, section),
        forward_head=head,
        update_head=head,
        forward_tokens=tokens,
        update_tokens=tokens,
        accumulates=whole is None or whole > mini * tokens,
        moved_output=_sequence_parallel(view, launch, section) > 1,
        unsharded_gradients=b.unsharded_gradients,
    )


def checkpointing(view: View, launch: Launch, section: str) -> bool:
    """Whether a section checkpoints; the bare key of an older note stands for the trainer's."""
    key = f"{section}.gradient_checkpointing"
    default = view.flag("gradient_checkpointing", launch.behaviour.checkpointing)
    return view.flag(key, default)


def _sharding(model: ModelSpec, launch: Launch, *, trainable: bool, vocabulary_head: bool) -> Sharding:
    side = launch.layout.trainer
    return Sharding.of(model, version=2, ranks=side.d * side.c, trainable=trainable, vocabulary_head=vocabulary_head)


def _reference(view: View, launch: Launch) -> Role:
    role = _role(view, launch, "ref")
    return replace(role, trainable_parameters=0, optimizer_bytes=0)


def _critic(view: View, launch: Launch) -> Role:
    return _role(view, launch, "critic", value_model(launch.model))


# -- the server -----------------------------------------------------------------------------------------------------
def fraction_key(launch: Launch) -> str:
    """Return the key of the server's share; the launch must have a server."""
    assert launch.layout.server is not None
    return FRACTIONS[launch.layout.server.name]


def context_length(view: View, launch: Launch) -> int:
    """Tokens of the longest request that the server accepts."""
    assert launch.layout.server is not None
    key = "sglang.context_length" if launch.layout.server.name == "sglang" else "vllm.max_model_len"
    return view.integer(key, 32768)


def request_tokens(view: View, launch: Launch) -> int:
    """Tokens of the longest request of this launch; where prompts are not bounded, what one micro-batch may hold."""
    limit = context_length(view, launch)
    configured = longest(view, launch) or view.optional_integer(tokens_key("actor", launch)) or limit
    return min(limit, configured)


def concurrent(view: View, launch: Launch) -> int:
    """Sequences that one server has in flight at most."""
    assert launch.layout.server is not None
    prompts = view.optional_integer("rollout.max_concurrent_rollouts")
    if prompts is None:
        prompts = view.integer("rollout.consumer_batch_size", view.integer("train_dataset.batch_size", 1))
    return max(1, ceil_div(prompts * view.integer("gconfig.n_samples", 1), launch.layout.server.d))


def _engine(view: View, launch: Launch) -> Engine | None:
    side = launch.layout.server
    if side is None:
        return None
    if side.name == "vllm":
        return _vllm(view, launch)
    prompts = max(SGLANG_PREFILL_TOKENS, view.integer("train_dataset.max_length", 0, minimum=0))
    chunk = view.integer("sglang.chunked_prefill_size", -1, minimum=-1)
    batched = min(view.integer("sglang.max_prefill_tokens", 32768), prompts, *((chunk,) if chunk > 0 else ()))
    running = view.integer("sglang.max_running_requests", concurrent(view, launch))
    sleeps = view.flag("sglang.enable_memory_saver", False)
    return Engine(
        model=launch.model,
        share_of="free",
        fraction=view.number(FRACTIONS["sglang"], 0.9, low=0.0, high=1.0),
        tensor_parallel=side.t,
        max_model_len=request_tokens(view, launch),
        max_num_seqs=min(running, concurrent(view, launch)),
        max_num_batched_tokens=batched,
        concurrent_sequences=concurrent(view, launch),
        tokens_per_sequence=request_tokens(view, launch),
        graphs=not view.flag("sglang.disable_cuda_graph", False),
        sleeps=sleeps,
        weights_on_host=sleeps,
    )


def _vllm(view: View, launch: Launch) -> Engine:
    side = launch.layout.server
    assert side is not None
    return Engine(
        model=launch.model,
        share_of="own",
        fraction=view.number(FRACTIONS["vllm"], 0.9, low=0.0, high=1.0),
        tensor_parallel=side.t,
        max_model_len=context_length(view, launch),
        max_num_seqs=view.integer("vllm.max_num_seqs", 256),
        max_num_batched_tokens=max(2048, view.integer("vllm.max_num_batched_tokens", 8192)),
        concurrent_sequences=concurrent(view, launch),
        tokens_per_sequence=request_tokens(view, launch),
        graphs=not view.flag("vllm.enforce_eager", launch.behaviour.vllm_eager),
        sleeps=view.flag("vllm.enable_sleep_mode", False),
    )
