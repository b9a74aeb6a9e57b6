"""verl's loss head, run as it is: functions of the installed verl, with the casts that CUDA's autocast would make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tracer.case import Case
from tracer.kernels import CompiledEntropy

LOW = (torch.bfloat16, torch.float16)
TO_FP32 = {"logsumexp", "exp", "log", "pow", "rsqrt", "norm"}
WITH_FP32_DTYPE = {"softmax", "log_softmax", "sum", "cumsum", "prod"}


class CudaAutocast(TorchFunctionMode):
    """
    The fp32 policies of CUDA's autocast for the operators of the head; there is no CUDA here to apply them.

    Source: aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype in LOW:
            if name in TO_FP32:
                args = (args[0].float(), *args[1:])
            elif name in WITH_FP32_DTYPE and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def _autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply the policies inside; torch's checkpointing restores autocast when it runs a function again."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with CudaAutocast():
            return function(*args, **kwargs)

    return inside


@dataclass(slots=True)
class Batch:
    """The inputs of one micro-batch; every tensor has one number a token, except where said."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    temperature: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    ref_log_prob: torch.Tensor | None

    @staticmethod
    def make(case: Case, vocab_size: int) -> Batch:
        """Return a batch of fresh tensors for this rank."""
        rows, tokens = (case.sequences if case.padded else 1), case.local_tokens
        ids = torch.randint(0, vocab_size, (rows, tokens // rows))
        whole = case.tokens
        return Batch(
            input_ids=ids,
            position_ids=torch.arange(tokens // rows).unsqueeze(0).repeat(rows, 1),
            labels=torch.roll(ids, shifts=-1, dims=1).view(-1),
            temperature=torch.full((tokens,), case.temperature),
            old_log_probs=torch.zeros(whole),
            advantages=torch.zeros(whole),
            ref_log_prob=torch.zeros(whole) if case.kl_loss else None,
        )


class NestedRows(torch.autograd.Function):
    """
    A padded batch made nested, taken apart and concatenated: one copy, and a gradient that keeps the input.

    Source: ``unbind_backward_nested_jagged``, torch/csrc/autograd/FunctionsManual.cpp; the nested tensor itself needs the
    lengths of the rows, which tensors without data do not have.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return torch.cat(list(logits.unbind()))

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


class Head:
    """What verl's engine does between the model's output and the loss. Made for one case."""

    def __init__(self, case: Case, *, stand_ins: bool = True) -> None:
        from verl.utils import torch_functional as verl_functions
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

        self.case = case
        self.entropy = {
            "compiled": CompiledEntropy.apply
            if stand_ins
            else torch.compile(verl_functions.entropy_from_logits, dynamic=True),
            "eager": _autocast(verl_functions.entropy_from_logits),
            "chunked": _autocast(verl_functions.entropy_from_logits_with_chunking),
        }[case.entropy]
        self.engine = object.__new__(FSDPEngineWithLMHead)
        self.engine.use_ulysses_sp = case.ulysses > 1
        self.engine.compute_entropy_from_logits = self.entropy
        self.engine.engine_config = SimpleNamespace(
            entropy_checkpointing=case.entropy_checkpointing,
            entropy_from_logits_with_chunking=case.entropy == "chunked",
            entropy_from_logits_chunk_size=case.entropy_chunk,
        )

    def outputs(self, raw: Any, batch: Batch, *, entropy: bool) -> dict[str, torch.Tensor]:
        """Return log-probs and, where asked for, the entropy, one number a token."""
        if self.case.padded:
            return self._padded_outputs(raw, batch, entropy)
        options = {"calculate_entropy": entropy, "use_fused_kernels": self.case.fused != "none"}
        offsets = torch.tensor([0, self.case.tokens])
        micro_batch = {"input_ids": SimpleNamespace(offsets=lambda: offsets), **options}
        output_args = {
            "temperature_is_one": self.case.temperature == 1.0,
            "input_ids_rmpad_rolled": batch.labels,
            "temperature_rmpad": batch.temperature,
            "pad_size": 0,
        }
        with CudaAutocast():
            nested = self.engine.prepare_model_outputs(raw, output_args, micro_batch, None)
        return {name: value.values() for name, value in nested.items()}

    def _padded_outputs(self, raw: Any, batch: Batch, entropy: bool) -> dict[str, torch.Tensor]:
        """``use_remove_padding=False``: verl computes the entropy eagerly and copies the valid rows of the logits."""
        from verl.utils import torch_functional as verl_functions
        from verl.workers.engine.fsdp.transformer_impl import _scale_logits_by_temperature

        one = self.case.temperature == 1.0
        column = batch.temperature[: batch.input_ids.shape[0]].view(-1, 1, 1)
        out: dict[str, torch.Tensor] = {}
        with CudaAutocast():
            logits = _scale_logits_by_temperature(raw.logits, column, is_unit_temperature=one)
            if entropy:
                out["entropy"] = verl_functions.entropy_from_logits(logits).view(-1)
            out["log_probs"] = verl_functions.logprobs_from_logits(NestedRows.apply(logits), batch.labels)
        return out


def policy_loss(out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return PPO's clipped loss, with the entropy bonus and the KL term where there is one."""
    log_probs = out["log_probs"]
    ratio = torch.exp(torch.clamp(log_probs - batch.old_log_probs, -20.0, 20.0))
    loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
    if "entropy" in out:
        loss = loss - 0.001 * out["entropy"].float().mean()
    if batch.ref_log_prob is not None:
        gap = batch.ref_log_prob - log_probs
        loss = loss + 0.001 * (torch.exp(gap) - gap - 1).mean()
    return loss


def value_loss(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the clipped squared error of a critic."""
    clipped = torch.clamp(values, batch.old_log_probs - 0.5, batch.old_log_probs + 0.5)
    return torch.maximum((values - batch.advantages) ** 2, (clipped - batch.advantages) ** 2).mean()
