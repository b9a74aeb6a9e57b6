"""Build and wrap the model as verl's FSDP engine does, on torch's own FSDP and a process group without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tracer import vision
from tracer.case import Case
from tracer.kernels import ATTENTION
from tracer.models import build

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextlib.contextmanager
def process_group(case: Case, device: str = "cpu") -> Iterator[Any]:
    """Yield a device mesh of ``case.ranks``; collectives return at once and move nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from verl.utils import ulysses

    world = max(case.ranks, case.ulysses)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        group = dist.new_group(list(range(case.ulysses))) if case.ulysses > 1 else None
        ulysses.set_ulysses_sequence_parallel_group(group)
        yield init_device_mesh(device, (case.ranks,), mesh_dim_names=("fsdp",))
    finally:
        ulysses.set_ulysses_sequence_parallel_group(None)
        dist.destroy_process_group()


def build_module(case: Case) -> Any:
    """Return the unwrapped model: checkpointing, fused forward and adapters as asked for."""
    dtype = DTYPES[case.master_dtype]
    model: Any = build(case.model, dtype=dtype, attention=ATTENTION, value_head=case.role == "critic")
    if vision.tower(case):
        vision.patch(model, case)
    elif case.fused != "none":
        model.forward = MethodType(_fused_forward(case.fused), model)
    if case.checkpointing and case.trains:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if (
        case.frozen_vision and case.checkpointing
    ):  # transformers 5 alone makes patches ask for gradients; verl 0.7 runs 4
        model.disable_input_require_grads()
    return _with_adapters(model, case.lora_rank, dtype) if case.lora_rank else model


def _fused_forward(backend: str) -> Any:
    from verl.models.transformers import dense_common

    return getattr(dense_common, f"forward_with_{backend}_backend")


def _with_adapters(model: Any, rank: int, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    model.enable_input_require_grads()
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=16, target_modules="all-linear", bias="none")
    # peft moves modules to the device where they already are; tensors without data refuse even that
    with mock.patch.object(torch.nn.Module, "_apply", lambda module, *_, **__: module):
        model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)  # verl does the same: one dtype in one flat parameter
    return model


def shard(model: Any, case: Case, mesh: Any) -> Any:
    """Wrap with FSDP1 or FSDP2: bf16 computing, fp32 reduction, one unit a decoder layer, by verl's own policies."""
    from verl.utils import fsdp_utils

    compute = DTYPES[case.compute_dtype]
    if case.strategy == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=True)
        options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": case.reshard_after_forward}
        fsdp_utils.apply_fsdp2(model, options, {})
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_utils.get_fsdp_wrap_policy(model, None, is_lora=case.lora_rank > 0),
        sharding_strategy=ShardingStrategy.FULL_SHARD if case.reshard_after_forward else ShardingStrategy.SHARD_GRAD_OP,
        mixed_precision=MixedPrecision(param_dtype=compute, reduce_dtype=torch.float32, buffer_dtype=torch.float32),
        device_id=torch.device("cpu" if mesh.device_type == "cpu" else f"{mesh.device_type}:0"),
        device_mesh=mesh,
        forward_prefetch=False,
        use_orig_params=case.frozen_vision,
    )


def lazy_init(module: Any, case: Case) -> None:
    """Let FSDP1 finish its construction now: in a run it does so once, in the first forward pass."""
    if case.strategy == "fsdp":
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        _lazy_init(module, module)


def reshard(module: Any, case: Case) -> None:
    """Give up the root unit after a forward pass without gradients, as verl does on leaving its eval mode."""
    if case.ranks == 1:
        return
    if case.strategy == "fsdp":
        module._handle.reshard(True)
    else:
        module.reshard()


@contextlib.contextmanager
def gradient_sync(module: Any, case: Case, *, last: bool) -> Iterator[None]:
    """Defer the reduction of gradients to the last micro-batch where ``no_sync`` asks for it."""
    if last or not case.no_sync:
        yield
    elif case.strategy == "fsdp":
        with module.no_sync():
            yield
    else:
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)


def clip_gradients(module: Any, case: Case) -> None:
    """Clip to a norm as verl does for this strategy."""
    if case.strategy == "fsdp":
        module.clip_grad_norm_(1.0)
    else:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
