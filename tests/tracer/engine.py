"""One training step of one rank, phase by phase, under a recorder."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tracer import kernels, sharding, vision
from tracer.case import Case
from tracer.head import Batch, Head, policy_loss, value_loss
from tracer.models import SHAPES


class Recorder(Protocol):
    """What the engine tells its observer."""

    def mark(self, phase: str) -> None:
        """A phase begins, and the one before ends."""

    def label(self, tensor: torch.Tensor, label: str) -> None:
        """``tensor`` is held for a known purpose."""

    def backward_pass(self) -> contextlib.AbstractContextManager[None]:
        """Autograd's engine runs inside."""

    def micro_batch_done(self) -> None:
        """Forward and backward of one micro-batch of the update are over."""


class Engine:
    """The model, its optimizer and the phases of a step. Valid inside `session` only."""

    def __init__(self, case: Case, recorder: Recorder, mesh: Any, *, stand_ins: bool = True) -> None:
        self.case, self.recorder, self.stand_ins = case, recorder, stand_ins
        self.head = Head(case, stand_ins=stand_ins)
        self.vocab_size: int = SHAPES[case.model]["vocab_size"]
        self.images = vision.inputs(case)  # on the host: what FSDP makes of them on its way in is seen, they are not
        model = sharding.build_module(case)
        self.parameter_shapes = {tuple(p.shape) for p in model.parameters()}
        self.parameters = sum(p.numel() for p in model.parameters())
        self.module = sharding.shard(model, case, mesh)
        self.optimizer = self._make_optimizer() if case.trains else None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # torch picks foreach on CUDA, for flat parameters and DTensors alike
        return torch.optim.AdamW(self.module.parameters(), lr=1e-6, weight_decay=0.01, foreach=True)

    def run(self) -> None:
        """Run every phase of the case once, after a first optimizer step that makes the Adam states."""
        self.recorder.mark("setup")
        self.prepare()
        self.infer()
        if self.optimizer is not None:
            self.update()
            self.step(self.optimizer)
        self.recorder.mark("end")

    def prepare(self) -> None:
        """Finish the construction, and make the optimizer's states."""
        self.load()
        if self.optimizer is not None:
            self._first_step(self.optimizer)

    def load(self) -> None:
        """Finish the construction: parameters are where they stay."""
        sharding.lazy_init(self.module, self.case)
        self._label_states()

    def infer(self) -> None:
        """Old log-probs, reference log-probs or values: one micro-batch without gradients, as a phase."""
        self.recorder.mark({"actor": "log_prob", "ref": "ref_log_prob", "critic": "values"}[self.case.role])
        self.forward_only()

    def forward_only(self) -> None:
        """One micro-batch without gradients."""
        self.module.eval()
        with torch.no_grad():
            kept = self._forward(Batch.make(self.case, self.vocab_size), training=False)
        sharding.reshard(self.module, self.case)
        del kept
        self.module.train()

    def update(self) -> None:
        """Forward and backward of every micro-batch."""
        self.recorder.mark("update")
        for index in range(self.case.micro_batches):
            self.micro_batch(last=index == self.case.micro_batches - 1)

    def micro_batch(self, *, last: bool) -> None:
        """Forward and backward of one micro-batch."""
        batch = Batch.make(self.case, self.vocab_size)
        with sharding.gradient_sync(self.module, self.case, last=last):
            loss = self._forward(batch, training=True)
            with self.recorder.backward_pass():
                loss.backward()
        del loss, batch
        gc.collect()
        self._label_states()
        self.recorder.micro_batch_done()

    def resize(self, tokens: int) -> None:
        """Let the passes that follow hold another number of tokens."""
        self.case = replace(self.case, tokens=tokens)
        self.head = Head(self.case, stand_ins=self.stand_ins)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients and step, as a phase."""
        self.recorder.mark("optimizer_step")
        self.clip_and_step(optimizer)

    def clip_and_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients and step."""
        sharding.clip_gradients(self.module, self.case)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()

    def _first_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self._label_states()
        gc.collect()

    def _forward(self, batch: Batch, *, training: bool) -> Any:
        """verl's ``forward_step``: the raw output lives until the loss is there."""
        case = self.case
        extra: dict[str, Any] = {}
        if case.fused != "none":
            extra = {"temperature": case.temperature, "return_dict": True, "shift_labels": batch.labels.unsqueeze(0)}
        ids, positions = batch.input_ids, batch.position_ids
        if vision.tower(case):
            extra |= self.images
            ids = vision.input_ids(ids, case)
            positions = vision.position_ids(ids)
        raw = self.module(input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False, **extra)
        if case.role == "critic":
            values = self._whole(raw.logits.reshape(-1))
            return value_loss(values, batch) if training else values.detach()
        asked = case.update_entropy if training else case.log_prob_entropy and case.role == "actor"
        out = self.head.outputs(raw, batch, entropy=asked)
        return policy_loss(out, batch) if training else {name: value.detach() for name, value in out.items()}

    def _whole(self, values: torch.Tensor) -> torch.Tensor:
        """Gather the values of the sequence-parallel group, as verl does."""
        if self.case.ulysses == 1:
            return values
        from verl.utils.ulysses import gather_outputs_and_unpad

        gathered: torch.Tensor = gather_outputs_and_unpad(values, gather_dim=0, unpad_dim=0, padding_size=0)
        return gathered

    def _label_states(self) -> None:
        if self.case.compute_dtype == "fp32":  # no cast copies the pixels, so that they themselves are seen
            for image in self.images.values():
                self.recorder.label(image, "images")
        for buffer in self.module.buffers():
            self.recorder.label(buffer, "weights")
        for parameter in self.module.parameters():
            self.recorder.label(parameter, "weights")
            if parameter.grad is not None:
                self.recorder.label(parameter.grad, "gradients")
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        for tensor in (t for state in states for t in state.values() if isinstance(t, torch.Tensor)):
            self.recorder.label(tensor, "optimizer_states")


@contextlib.contextmanager
def session(
    case: Case, recorder: Recorder, *, fake: bool = True, device: str = "cpu", stand_ins: bool = True
) -> Iterator[Engine]:
    """Yield an engine on tensors without data (``fake``) or on real ones; ``stand_ins=False`` runs real kernels."""
    from torch.nested._internal.nested_tensor import _nt_view_dummy

    _nt_view_dummy()  # a singleton that has to be real
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(
            kernels.installed(
                flash=case.log_prob == "flash_ce",
                sequences=case.sequences,
                ulysses=case.ulysses,
                padded=case.padded,
                stand_ins=stand_ins,
            )
        )
        if vision.tower(case):
            stack.enter_context(vision.installed(case, kernels.FlashAttention.apply))
        mesh = stack.enter_context(sharding.process_group(case, device))
        if fake:
            stack.enter_context(no_data())
        if device != "cpu":
            stack.enter_context(torch.device(device))
        engine = Engine(case, recorder, mesh, stand_ins=stand_ins)
        gc.collect()
        gc.freeze()  # keeps the collections between phases short
        stack.callback(gc.unfreeze)
        yield engine
        del engine.module, engine.optimizer


@contextlib.contextmanager
def no_data() -> Iterator[None]:
    """Make tensors that have a shape, a dtype and a lifetime, but no data."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())  # the environment is for nested tensors
    # FSDP1 compares addresses to see what is gathered; without data all of them would be 0
    with mock.patch.object(FakeTensor, "data_ptr", address), mode:
        yield
