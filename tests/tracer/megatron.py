"""One pipeline stage of real megatron-core modules, traced op by op without data: linears, transformer blocks, DDP's buffers.

Needs megatron-core and torch, neither verl nor Transformer Engine. What Transformer Engine or a CUDA kernel would run is a
stand-in that allocates and keeps what the kernel does: norms, attention, rotary embedding, the fused SwiGLU; for experts they
are in `tracer.megatron_experts`. The loss is Megatron's own vocab-parallel cross entropy behind verl's order of operations.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tracer import megatron_experts as experts
from tracer.kernels import FlashAttention
from tracer.models import SHAPES
from tracer.report import PhasePeak, Recording, peaks


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronCase:
    """One stage on one rank."""

    model: str = "qwen2.5-0.5b"
    """A name of `tracer.models.SHAPES`."""
    layers: int = 4
    """Decoder layers of the stage."""
    tokens: int = 4096
    """Tokens of one micro-batch before tensor parallelism divides them."""
    tensor: int = 1
    expert: int = 1
    """Ranks that share the experts of a mixture, whose tensor parallelism is 1."""
    permute_fusion: bool = False
    sequence_parallel: bool = True
    first: bool = True
    last: bool = True
    recompute: str = "none"
    """``none``, or ``full``: uniform, layer by layer."""
    in_flight: int = 1
    """Forward passes before the first backward pass, as the schedule of a pipeline has them."""
    entropy: bool = False
    temperature: bool = True
    """verl 0.6 and later divide by the temperature, and clone the logits before an entropy."""


class Norm(Function):
    """RMSNorm as Apex and Transformer Engine compute it: keeps its input and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[1])


class FusedNorm(torch.nn.Module):
    """Megatron builds norms with these arguments."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        out: torch.Tensor = Norm.apply(x.contiguous(), self.weight)
        return out


class Attention(torch.nn.Module):
    """The core of attention: flash-attn on packed tokens."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Attend; one sequence, batch 1."""
        flat = [x.reshape(-1, x.shape[-2], x.shape[-1]) for x in (q, k, v)]
        out = FlashAttention.apply(*flat, 1)
        result: torch.Tensor = out.view(q.shape[0], q.shape[1], -1)
        return result


class Rotary(Function):
    """The fused rotary embedding: a new tensor, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(grad)


def _swiglu(y: torch.Tensor) -> torch.Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)


def _swiglu_back(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(y)


class Entropy(Function):
    """verl's vocab-parallel entropy: keeps the logits and a softmax, whose storage becomes the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        softmax = torch.empty_like(logits)
        rows = logits.new_empty(*logits.shape[:-1], 1)
        ctx.save_for_backward(logits, softmax, rows)
        return logits.new_empty(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        softmax: torch.Tensor = ctx.saved_tensors[1]
        return softmax.mul_(-1)


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """Let megatron-core run where there is no CUDA: its devices are the CPU, its random states are left alone."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import attention

    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "current_device", lambda: cpu),
            (torch.nn.Module, "_apply", lambda module, *_, **__: module),  # already in bf16; no data to convert
            (random, "_get_all_rng_states", lambda *_: ()),
            (random, "_set_all_rng_states", lambda *_: None),
            (random, "_fork_rng", contextlib.nullcontext),
            (random.CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
            (attention, "apply_rotary_pos_emb", lambda x, *_, **__: Rotary.apply(x)),
            (fused_bias_swiglu, "swiglu", _swiglu),
            (fused_bias_swiglu, "swiglu_back", _swiglu_back),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def _groups(case: MegatronCase) -> Iterator[None]:
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=case.tensor * case.expert, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor,
        expert_model_parallel_size=case.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _config(case: MegatronCase) -> Any:
    from megatron.core.transformer import TransformerConfig

    shape = SHAPES[case.model]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        kv_channels=shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"]),
        tensor_model_parallel_size=case.tensor,
        sequence_parallel=case.sequence_parallel and case.tensor > 1,
        bf16=True,
        params_dtype=torch.bfloat16,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape["model_type"] == "qwen2",
        qk_layernorm=_norms_heads(shape),
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        **(full if case.recompute == "full" else {}),
        **(experts.config(shape, expert=case.expert) if _mixture(shape) else {}),
    )


def _mixture(shape: dict[str, Any]) -> bool:
    return bool(shape.get("num_experts"))


def _norms_heads(shape: dict[str, Any]) -> bool:
    """Whether queries and keys are normalised head by head."""
    return str(shape["model_type"]).startswith("qwen3")


def _spec(case: MegatronCase) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    shape = SHAPES[case.model]
    qk = _norms_heads(shape)
    spec = get_gpt_layer_local_spec(num_experts=shape.get("num_experts"), normalization="RMSNorm", qk_layernorm=qk)
    if _mixture(shape):
        experts.layer(spec)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = FusedNorm
    spec.submodules.self_attention.submodules.core_attention = Attention
    if qk:
        spec.submodules.self_attention.submodules.q_layernorm = FusedNorm
        spec.submodules.self_attention.submodules.k_layernorm = FusedNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * case.layers, layer_norm=FusedNorm)


def _module(case: MegatronCase) -> Any:
    """Return the stage in Megatron's own wrappers: bf16, and the contiguous buffers of its data-parallel class."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    shape, config = SHAPES[case.model], _config(case)
    model = GPTModel(
        config,
        _spec(case),
        vocab_size=shape["vocab_size"],
        max_sequence_length=case.tokens,
        pre_process=case.first,
        post_process=case.last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape["tie_word_embeddings"] and case.first and case.last,
    )
    if _mixture(shape):
        experts.routers_in_bf16(model)
        config.moe_permute_fusion = case.permute_fusion
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, buffers, Float16Module(config, model))


def _forward(case: MegatronCase, module: Any, *, entropy: bool) -> torch.Tensor:
    """Return something to begin a backward pass at: log-probabilities (and entropies), or what goes to the next stage."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    ids = torch.zeros(1, case.tokens, dtype=torch.long)
    positions = torch.zeros(1, case.tokens, dtype=torch.long)
    if not case.first:
        part = case.tensor if case.sequence_parallel else 1
        hidden = SHAPES[case.model]["hidden_size"]
        received = torch.empty(case.tokens // part, 1, hidden, dtype=torch.bfloat16, requires_grad=True)
        module.module.module.set_input_tensor(received)
    out: torch.Tensor = module(ids, positions, None, fp32_output=case.last)
    if not case.last:
        return out
    logits = out
    if case.temperature:
        logits.div_(torch.ones(1, case.tokens, 1))
    kept = logits.clone() if entropy and case.temperature else logits
    entropies = Entropy.apply(logits) if entropy else None
    del logits, out
    log_probs: torch.Tensor = -vocab_parallel_cross_entropy(kept, ids)
    return log_probs if entropies is None else log_probs + entropies


def _run(case: MegatronCase, recording: Recording) -> set[tuple[int, ...]]:
    module = _module(case)
    shapes = {tuple(p.shape) for p in module.parameters()}
    gc.collect()
    for buffer in module.buffers + module.expert_parallel_buffers:
        recording.label(buffer.param_data, "weights")
        recording.label(buffer.grad_data, "gradients")
    module.eval()
    recording.mark("log_prob")
    with torch.no_grad():
        _forward(case, module, entropy=case.last)
    module.train()
    gc.collect()
    recording.mark("update")
    outputs = [_forward(case, module, entropy=case.entropy) for _ in range(case.in_flight)]
    first = outputs.pop(0)
    with recording.backward_pass():
        first.backward(torch.empty_like(first))
    recording.mark("end")
    return shapes


def trace(case: MegatronCase) -> dict[str, PhasePeak]:
    """Run one case on tensors without data; return the peak of each phase."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recording = Recording()
    rows = case.tokens // case.tensor * SHAPES[case.model].get("num_experts_per_tok", 0)
    kernels = experts.without_kernels(rows)
    with _groups(case), _without_cuda(), kernels, FakeTensorMode(allow_non_fake_inputs=True), recording:
        recording.mark("setup")
        shapes = _run(case, recording)
    return peaks(recording, -(-SHAPES[case.model]["vocab_size"] // case.tensor), shapes)


if __name__ == "__main__":
    import sys

    found = MegatronCase(**{k: eval(v) for k, v in (word.split("=") for word in sys.argv[1:])})
    for name, peak in trace(found).items():
        print(name, {k: v for k, v in asdict(peak).items() if k != "largest"})
        for row in peak.largest:
            print("   ", row)
