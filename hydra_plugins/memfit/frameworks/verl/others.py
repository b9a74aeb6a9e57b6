"""Models beside the policy: a reward model in the trainer or in an engine, and teachers. Their keys become roles and engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.frameworks.verl import surroundings
from hydra_plugins.memfit.frameworks.verl.batches import SCORES, batch, max_length, sequences_per_step
from hydra_plugins.memfit.frameworks.verl.engines import divides, section_engine, share_knob
from hydra_plugins.memfit.frameworks.verl.launch import REWARD, REWARD_ENGINE, Launch
from hydra_plugins.memfit.frameworks.verl.read import FSDP_STRATEGIES, sharding
from hydra_plugins.memfit.frameworks.verl.versions import Behaviour
from hydra_plugins.memfit.frameworks.view import View
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.engine import Engine, prompt_log_prob_bytes
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.overheads import CUDA_CONTEXT_BYTES, HOST_DRIVER_BYTES, HOST_PROCESS_BYTES
from hydra_plugins.memfit.model.spec import ModelSpec, value_model
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.pools import Guest
from hydra_plugins.memfit.planning.problem import Knob
from hydra_plugins.memfit.planning.roles import Role
from hydra_plugins.memfit.planning.serving import ServingRun

DISTILLATION = "distillation"
TEACHERS = f"{DISTILLATION}.teacher_models"
_ONLY_TEACHER = "teacher_model"
"""The teacher of verl's own yaml: alone it takes the whole pool, beside others verl drops it."""
_TOP_K_LOSS = "forward_kl_topk"
_SCORING_HEADS = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
_UNPLANNED = "or go on unplanned with memfit.strict=false."


# -- which models ---------------------------------------------------------------------------------------------------
def reward_model(view: View, context: Context, behaviour: Behaviour) -> ModelSpec | None:
    """Return the reward model's architecture, ``None`` without one; raises `ConfigError` and `NotModelled`."""
    in_trainer = view.flag(f"{REWARD}.enable", False)
    if in_trainer and not behaviour.reward_in_trainer:
        raise NotModelled(
            f"{REWARD}.enable=true: from 0.7 on verl copies this section to {REWARD_ENGINE}, which is the one that memfit "
            f"reads. Write {REWARD_ENGINE}.enable=true, .model_path and .rollout.* instead, {_UNPLANNED}"
        )
    if in_trainer:
        _refuse_in_trainer(view)
        return surroundings.model(view, context, f"{REWARD}.model.path", None, role="reward")
    if not view.flag(f"{REWARD_ENGINE}.enable", False):
        return None
    return surroundings.model(view, context, f"{REWARD_ENGINE}.model_path", None, role="reward")


def _refuse_in_trainer(view: View) -> None:
    strategy = view.text(f"{REWARD}.strategy", "fsdp")
    if strategy not in FSDP_STRATEGIES:
        raise NotModelled(f"{REWARD}.strategy={strategy} is not modelled. Set {REWARD}.strategy=fsdp, {_UNPLANNED}")
    if view.flag(f"{REWARD}.enable_resource_pool", False):
        raise NotModelled(
            f"{REWARD}.enable_resource_pool=true: a reward model of the trainer on other GPUs is not modelled. Set "
            f"{REWARD}.enable_resource_pool=false, {_UNPLANNED}"
        )


def teachers(view: View, context: Context) -> Mapping[str, ModelSpec]:
    """Return the teachers' architectures by name; empty without distillation. Raises as `reward_model`."""
    if not view.flag(f"{DISTILLATION}.enabled", False):
        return {}
    if view.text(f"{DISTILLATION}.distillation_loss.loss_mode", "k3") == _TOP_K_LOSS:
        raise NotModelled(
            f"{DISTILLATION}.distillation_loss.loss_mode={_TOP_K_LOSS}: its loss over whole rows of logits is not modelled. "
            f"Set {DISTILLATION}.distillation_loss.loss_mode=k3, {_UNPLANNED}"
        )
    return {name: _teacher(view, context, name) for name in _teacher_names(view)}


def _teacher(view: View, context: Context, name: str) -> ModelSpec:
    return surroundings.model(view, context, f"{TEACHERS}.{name}.model_path", None, role="teacher")


def _teacher_names(view: View) -> tuple[str, ...]:
    section = view.raw(TEACHERS)
    names = tuple(section) if isinstance(section, Mapping) else ()
    return names if len(names) < 2 else tuple(name for name in names if name != _ONLY_TEACHER)


# -- a reward model of the trainer ----------------------------------------------------------------------------------
def reward_role(view: View, launch: Launch) -> Role | None:
    """Return the reward model that the trainer runs itself: bf16 on the host, layer by layer on the GPU."""
    if launch.reward_model is None or not launch.behaviour.reward_in_trainer:
        return None
    model, strategy = value_model(launch.reward_model), view.text(f"{REWARD}.strategy", "fsdp")
    return Role(
        model=model,
        sharding=sharding(
            view,
            launch,
            model,
            section=f"{REWARD}.model.fsdp_config",
            strategy=strategy,
            trainable=False,
            vocabulary_head=False,
        ),
        trainable_parameters=0,
        master_bytes=2,
        param_offload=True,
        cpu_policy=True,
        forward_head=Head(vocabulary=False),
        forward_tokens=batch(view, launch, SCORES).tokens(),
    )


# -- engines of other models ----------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """One model in engines of its own, on the trainer's GPUs or on others."""

    section: str
    """Its rollout section."""
    model: ModelSpec
    gpus_per_node: int
    nodes: int
    hosted: bool
    """On the trainer's GPUs."""
    replicas: int | None = None
    """Engines; ``None``: as many as the GPUs hold."""
    lengths: int
    """Tokens of the longest sequence that it is given."""
    scores_prompts: bool = False
    """Returns log-probabilities of the prompt (a teacher)."""

    @property
    def world_size(self) -> int:
        """GPUs that its engines are spread over."""
        return self.gpus_per_node * self.nodes

    @property
    def share_key(self) -> str:
        """Key of its engines' share of a GPU."""
        return f"{self.section}.gpu_memory_utilization"

    @property
    def size_key(self) -> str:
        """Key of the GPUs that one engine is spread over."""
        return f"{self.section}.tensor_model_parallel_size"


def others(view: View, launch: Launch) -> tuple[Other, ...]:
    """Return the models in engines of their own; raises `ConfigError` for a pool without GPUs."""
    reward = () if launch.reward_model is None or launch.behaviour.reward_in_trainer else (_reward(view, launch),)
    return (*reward, *(_taught(view, launch, name, model) for name, model in launch.teachers.items()))


def _reward(view: View, launch: Launch) -> Other:
    section, model = f"{REWARD_ENGINE}.rollout", launch.reward_model
    assert model is not None
    apart = view.flag(f"{REWARD_ENGINE}.enable_resource_pool", False)
    if launch.placement.apart and not apart:
        raise ConfigError(
            f"{REWARD_ENGINE}.enable_resource_pool=false with a rollout pool of its own: verl wants GPUs for the reward model "
            f"too. Write {REWARD_ENGINE}.enable_resource_pool=true {REWARD_ENGINE}.nnodes=1."
        )
    own = view.integer(f"{section}.prompt_length", 2048) + view.integer(f"{section}.response_length", 2048)
    return Other(
        section=section,
        model=value_model(model) if model.architecture.endswith(_SCORING_HEADS) else model,
        gpus_per_node=_pool(view, f"{REWARD_ENGINE}.n_gpus_per_node") if apart else launch.gpus_per_node,
        nodes=_pool(view, f"{REWARD_ENGINE}.nnodes") if apart else launch.nodes,
        hosted=not apart,
        lengths=max(own, max_length(view)),
    )


def _taught(view: View, launch: Launch, name: str, model: ModelSpec) -> Other:
    alone = name == _ONLY_TEACHER
    return Other(
        section=f"{TEACHERS}.{name}.inference",
        model=model,
        gpus_per_node=_pool(view, f"{DISTILLATION}.n_gpus_per_node"),
        nodes=_pool(view, f"{DISTILLATION}.nnodes"),
        hosted=False,
        replicas=None if alone else view.integer(f"{TEACHERS}.{name}.num_replicas", 1),
        lengths=max_length(view) + 1,
        scores_prompts=True,
    )


def _pool(view: View, key: str) -> int:
    count = view.integer(key, 0, minimum=0)
    if count == 0:
        raise ConfigError(f"{key}={view.raw(key)}: this pool needs GPUs of its own. Write e.g. {key}=1.")
    return count


def guest(view: View, launch: Launch) -> Guest | None:
    """Return the engine that shares the trainer's GPUs, if there is one."""
    hosted = next((other for other in others(view, launch) if other.hosted), None)
    if hosted is None:
        return None
    engine = replace(_engine(view, launch, hosted), weights_on_host=True)
    return Guest(engine=engine, worker=MemoryBreakdown(context=CUDA_CONTEXT_BYTES), fraction_key=hosted.share_key)


def pools(view: View, launch: Launch) -> tuple[ServingRun, ...]:
    """Return the engines of other models on GPUs of their own."""
    return tuple(_alone(view, launch, other) for other in others(view, launch) if not other.hosted)


def _alone(view: View, launch: Launch, other: Other) -> ServingRun:
    engine = _engine(view, launch, other)
    scoring = prompt_log_prob_bytes(engine) if other.scores_prompts else 0
    return ServingRun(
        capacity_bytes=launch.capacity_bytes,
        budget_bytes=launch.budget_bytes,
        held_bytes=launch.held_bytes,
        host_peak_bytes=2 * other.gpus_per_node * HOST_PROCESS_BYTES + HOST_DRIVER_BYTES,
        host_budget_bytes=launch.host_budget_bytes,
        engine=engine,
        beside=MemoryBreakdown(context=CUDA_CONTEXT_BYTES),
        working=MemoryBreakdown(logits=scoring),
        fraction_key=other.share_key,
    )


def _engine(view: View, launch: Launch, other: Other) -> Engine:
    replicas = other.replicas or max(1, other.world_size // view.integer(other.size_key, 2))
    return section_engine(
        view,
        launch,
        other.section,
        model=other.model,
        share_key=other.share_key,
        lengths=other.lengths,
        concurrent=ceil_div(sequences_per_step(view), replicas),
    )


def fits_pool(view: View, other: Other, size: int) -> bool:
    """Whether an engine of this model can be spread over ``size`` GPUs of its pool."""
    return divides(view, other.section, other.model, (other.world_size,), size)


# -- knobs ----------------------------------------------------------------------------------------------------------
def knobs(view: View, launch: Launch) -> Iterator[Knob]:
    """Yield the knobs of the engines of other models, which cost the policy nothing."""
    for other in others(view, launch):
        if not view.flag(f"{other.section}.free_cache_engine", True) and other.hosted:
            continue  # it never sleeps: its share is what the user gives it for good
        yield share_knob(view, other.share_key, cost=29)
        yield from _batched_tokens(view, other)
        yield from _larger(view, other)


def _batched_tokens(view: View, other: Other) -> Iterator[Knob]:
    key = f"{other.section}.max_num_batched_tokens"
    now = view.integer(key, 8192)
    smaller = tuple(size for size in (4096, 2048, 1024) if size < now)
    if smaller and view.flag(f"{other.section}.enable_chunked_prefill", True):
        why = "a smaller prefill chunk: less workspace, and fewer logits at once, in this model's engine"
        yield Knob(key=key, requested=view.requested(key), candidates=smaller, cost=31, why=why)


def _larger(view: View, other: Other) -> Iterator[Knob]:
    now = view.integer(other.size_key, 2)
    sizes = [s for s in (2, 4, 8, 16) if s > now and other.gpus_per_node % s == 0 and fits_pool(view, other, s)]
    if sizes and other.replicas is None:
        why = "this model's weights and cache are spread over more GPUs"
        yield Knob(
            key=other.size_key, requested=view.requested(other.size_key), candidates=tuple(sizes), cost=39, why=why
        )
