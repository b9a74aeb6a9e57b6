"""One model of the trainer: what it keeps resident, and what its passes take on top. Calendars put roles into phases."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.activations import Widths
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import Head
from hydra_plugins.memfit.memory.states import adam_state_bytes, adam_step_temporary_bytes, sharded_bytes
from hydra_plugins.memfit.memory.trainer import (
    Pass,
    forward_moments,
    forward_progress,
    host_activation_bytes,
    peak,
    update_moments,
)
from hydra_plugins.memfit.memory.vision import Images
from hydra_plugins.memfit.memory.weight_sync import adapter_moments, sync_moments
from hydra_plugins.memfit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """How trained weights go to the inference engine."""

    bucket_bytes: int = 0
    """Buffer of the weight transfer on the trainer's side."""
    merged: bool = False
    """LoRA: the engine receives whole weights with the adapters merged into them."""
    layered: bool = False
    """LoRA: adapters are collected layer by layer (layered_summon)."""


class Occupant(Protocol):
    """One model of the trainer as a calendar sees it, whatever backend trains it. Bytes of one rank."""

    def at_launch(self) -> MemoryBreakdown:
        """Return what is on the GPU when the engine starts, before the first step."""

    def resting(self) -> MemoryBreakdown:
        """Return what the model leaves on the GPU while others run."""

    def loaded(self, *, optimizer: bool) -> MemoryBreakdown:
        """Return its states during its own pass; ``optimizer``: with what an update needs."""

    def forward_pass(self) -> MemoryBreakdown:
        """Return the peak of a pass without gradients, on top of the states."""

    def update_pass(self) -> MemoryBreakdown:
        """Return the peak of an update's forward and backward passes, on top of the states."""

    def step(self) -> MemoryBreakdown:
        """Return what the optimizer step has on top of the states."""

    def left_root(self) -> MemoryBreakdown:
        """Return what a pass without gradients leaves behind."""

    def sending(self) -> MemoryBreakdown:
        """Return its states while the weights go to the engine."""

    def buffers(self, handover: Handover) -> MemoryBreakdown:
        """Return what is gathered and buffered while the weights go to the engine."""

    def left_in_cache(self) -> MemoryBreakdown:
        """Return what torch's allocator still reserves after an update if nobody empties its cache."""

    def host_bytes(self) -> int:
        """Return what one rank keeps in host memory."""

    def host_load_bytes(self) -> int:
        """Return what one whole copy takes on the host while the model is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One model of the trainer under FSDP: the policy, its reference, or the critic."""

    model: ModelSpec
    sharding: Sharding
    trainable_parameters: int
    """Parameters with gradients; 0 for a reference, the adapters alone under LoRA."""
    master_bytes: int = 4
    """Bytes of a stored parameter, of its gradient and of each of its moments."""
    optimizer_bytes: int | None = None
    """Bytes of optimizer states a trained parameter; ``None``: two moments of `master_bytes`."""
    step_copy: bool = True
    """The optimizer step writes a temporary copy of a moment (foreach); a fused one does not."""
    param_offload: bool = False
    optimizer_offload: bool = False
    cpu_policy: bool = False
    """FSDP2's CPUOffloadPolicy: parameters, gradients and moments live on the host; layers visit the GPU."""
    checkpointing: bool = True
    activation_offload: bool = False
    forward_head: Head = field(default_factory=Head)
    update_head: Head = field(default_factory=Head)
    forward_tokens: int
    """Tokens of the largest micro-batch of a pass without gradients, on one rank."""
    update_tokens: int = 0
    sequence_parallel: int = 1
    """Ranks that share the tokens of a micro-batch; each of them sees all of its images."""
    forward_image_tokens: int = 0
    """Image tokens of the largest such micro-batch, of all ranks that share it."""
    update_image_tokens: int = 0
    trains_vision: bool = True
    """A vision tower has gradients."""
    accumulates: bool = True
    """Whether a mini-batch takes more than one micro-batch."""
    moved_output: bool = False
    """Attention runs on another layout than its projections: padded batches, sequence parallelism."""
    unsharded_gradients: bool = False
    """Gradients stay unsharded until the last micro-batch (no_sync)."""
    keeps_root: bool = False
    """The gathered root unit stays on the GPU after a pass without gradients."""

    @property
    def parameter_bytes(self) -> int:
        """The rank's share of the stored parameters."""
        return sharded_bytes(
            parameters=self.model.parameters + self._adapters,
            bytes_per_parameter=self.master_bytes,
            ranks=self.sharding.ranks,
        )

    @property
    def moment_bytes(self) -> int:
        """The rank's share of the optimizer's states."""
        if self.optimizer_bytes is not None:
            return sharded_bytes(
                parameters=self.trainable_parameters,
                bytes_per_parameter=self.optimizer_bytes,
                ranks=self.sharding.ranks,
            )
        return adam_state_bytes(
            trainable_parameters=self.trainable_parameters,
            bytes_per_parameter=self.master_bytes,
            ranks=self.sharding.ranks,
        )

    @property
    def gradient_bytes(self) -> int:
        """Sharded gradients, or the unsharded ones that no_sync keeps (bf16 under FSDP1, fp32 under FSDP2)."""
        if self.unsharded_gradients and self.accumulates and not self.sharding.single:
            return self.trainable_parameters * (2 if self.sharding.version == 1 else 4)
        return sharded_bytes(
            parameters=self.trainable_parameters,
            bytes_per_parameter=self.master_bytes,
            ranks=self.sharding.ranks,
        )

    @property
    def _adapters(self) -> int:
        return 0 if self.sharding.trainable else self.trainable_parameters

    def at_launch(self) -> MemoryBreakdown:
        """Return the parameters unless they are offloaded; there is no optimizer state yet."""
        if self.cpu_policy or self.param_offload:
            return MemoryBreakdown()
        return MemoryBreakdown(weights=self.parameter_bytes)

    def resting(self) -> MemoryBreakdown:
        """Return what the role leaves on the GPU while others run."""
        if self.cpu_policy:
            return MemoryBreakdown()
        return MemoryBreakdown(
            weights=0 if self.param_offload else self.parameter_bytes,
            optimizer_states=0 if self.optimizer_offload else self.moment_bytes,
        )

    def loaded(self, *, optimizer: bool) -> MemoryBreakdown:
        """Return the role's states during its own pass: parameters always, moments if they are not offloaded or needed."""
        if self.cpu_policy:
            return MemoryBreakdown()
        moments = self.moment_bytes if optimizer or not self.optimizer_offload else 0
        return MemoryBreakdown(weights=self.parameter_bytes, optimizer_states=moments)

    def forward_pass(self) -> MemoryBreakdown:
        """Return the peak of a pass without gradients, on top of the states."""
        return self._staged(
            peak(forward_moments(self._pass(self.forward_tokens, self.forward_head, self.forward_image_tokens)))
        )

    def update_pass(self) -> MemoryBreakdown:
        """Return the peak of forward and backward of one micro-batch, gradients included, on top of the states."""
        moment = peak(update_moments(self._update()))
        if self.cpu_policy:
            return self._staged(_without(moment, gradients=True))
        if self.unsharded_gradients and self.accumulates and not self.sharding.single:
            return _without(moment, gradients=True) + MemoryBreakdown(gradients=self.gradient_bytes)
        return moment

    def update_timeline(self) -> tuple[MemoryBreakdown, ...]:
        """Return the moments of an update in their order, on top of the states: its first micro-batch, then one of the others."""
        pass_ = self._update()
        passes = (replace(pass_, accumulates=False), pass_) if pass_.accumulates else (pass_,)
        moments = [moment for p in passes for moment in (*forward_progress(p), *update_moments(p))]
        if self.cpu_policy:
            return tuple(self._staged(_without(moment, gradients=True)) for moment in moments)
        if self.unsharded_gradients and self.accumulates and not self.sharding.single:
            whole = MemoryBreakdown(gradients=self.gradient_bytes)
            return tuple(_without(moment, gradients=True) + whole for moment in moments)
        return tuple(moments)

    def step(self) -> MemoryBreakdown:
        """Return gradients and temporaries of the optimizer step, on top of the states."""
        if self.cpu_policy:
            return MemoryBreakdown()
        temporary = adam_step_temporary_bytes(
            trainable_parameters=self.trainable_parameters,
            bytes_per_parameter=self.master_bytes,
            ranks=self.sharding.ranks,
        )
        sharded = sharded_bytes(
            parameters=self.trainable_parameters, bytes_per_parameter=self.master_bytes, ranks=self.sharding.ranks
        )
        return MemoryBreakdown(gradients=sharded, optimizer_states=temporary if self.step_copy else 0)

    def _staged(self, moment: MemoryBreakdown) -> MemoryBreakdown:
        """Add the fp32 shard of two layers on its way from the host, where the parameters live there."""
        if not self.cpu_policy:
            return moment
        staging = 2 * ceil_div(self.master_bytes * self.sharding.layer, self.sharding.ranks)
        return moment + MemoryBreakdown(communication_buffers=staging)

    def _update(self) -> Pass:
        return self._pass(self.update_tokens, self.update_head, self.update_image_tokens)

    def _pass(self, tokens: int, head: Head, image_tokens: int) -> Pass:
        return Pass(
            images=self._images(tokens, image_tokens),
            widths=Widths.of(self.model, moved_output=self.moved_output),
            sharding=self.sharding,
            head=head,
            tokens=tokens,
            layers=self.model.num_hidden_layers,
            linear=Widths.of_linear(self.model),
            linear_layers=self.model.num_linear_attention_layers,
            vocabulary=self.model.vocab_size,
            checkpointing=self.checkpointing,
            activation_offload=self.activation_offload,
            gradients=self.trainable_parameters,
            gradient_bytes=self.master_bytes,
            accumulates=self.accumulates,
        )

    def _images(self, tokens: int, image_tokens: int) -> Images | None:
        if self.model.vision is None or not image_tokens:
            return None
        return Images(
            tower=self.model.vision,
            text_width=self.model.hidden_size,
            tokens=image_tokens,
            embedded=tokens * self.sequence_parallel,
            trained=self.trains_vision,
        )

    def left_root(self) -> MemoryBreakdown:
        """Return the gathered root that a pass without gradients left on the GPU."""
        if not self.keeps_root or self.sharding.single:
            return MemoryBreakdown()
        return MemoryBreakdown(communication_buffers=self.sharding.root_during_layers_bytes())

    def sending(self) -> MemoryBreakdown:
        """Return its states while the weights go to the engine."""
        return self.loaded(optimizer=False)

    def buffers(self, handover: Handover) -> MemoryBreakdown:
        """Return what is gathered and buffered while the weights, or the adapters, go to the engine."""
        if self.sharding.trainable or handover.merged:
            moments = sync_moments(
                self.sharding,
                parameters=self.model.parameters,
                master_bytes=self.master_bytes,
                bucket_bytes=handover.bucket_bytes,
            )
            return peak(moments)
        moments = adapter_moments(
            self.sharding,
            parameters=self.model.parameters,
            adapters=self.trainable_parameters,
            master_bytes=self.master_bytes,
            bucket_bytes=handover.bucket_bytes,
            layered=handover.layered,
        )
        return peak(moments)

    def left_in_cache(self) -> MemoryBreakdown:
        """Return what torch's allocator still reserves after an update if nobody empties its cache."""
        moved = self.moment_bytes if self.optimizer_offload else 0
        if self.param_offload:
            return MemoryBreakdown(fragmentation=moved)
        freed = max(self.update_pass().total_bytes, self.step().total_bytes)
        return MemoryBreakdown(fragmentation=freed + moved)

    def host_load_bytes(self) -> int:
        """Return the whole model in fp32, as a rank materialises it before it is sharded."""
        return 4 * self.model.parameters

    def host_bytes(self) -> int:
        """Return what one rank keeps in host memory."""
        activations = host_activation_bytes(self._update())
        if self.cpu_policy:
            return self.parameter_bytes + 2 * self.moment_bytes + activations
        parameters = self.parameter_bytes if self.param_offload else 0
        return parameters + (self.moment_bytes if self.optimizer_offload else 0) + activations


def _without(moment: MemoryBreakdown, *, gradients: bool) -> MemoryBreakdown:
    parts = moment.as_dict()
    if gradients:
        parts["gradients"] = 0
    return MemoryBreakdown(**parts)
