"""A model trained by Megatron-Core as the calendar sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.megatron import PARAMETER_BYTES, Held, Layout, Optimizer, Stage, held
from hydra_plugins.memfit.memory.megatron_layers import Recompute
from hydra_plugins.memfit.memory.megatron_pass import StagePass, VocabularyHead, forward_moments, update_moments
from hydra_plugins.memfit.memory.trainer import peak
from hydra_plugins.memfit.memory.weight_sync import exported_bytes
from hydra_plugins.memfit.model.spec import ModelSpec
from hydra_plugins.memfit.planning.roles import Handover


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronRole:
    """One stage of the policy, its reference, or the critic. Parameters and gradients leave the GPU together."""

    model: ModelSpec
    layout: Layout
    stage: Stage
    trained: bool = True
    """False for a reference: bf16 parameters alone, in no gradient buffer."""
    vocabulary_head: bool = True
    optimizer: Optimizer = field(default_factory=Optimizer)
    param_offload: bool = False
    optimizer_offload: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    forward_head: VocabularyHead = field(default_factory=VocabularyHead)
    update_head: VocabularyHead = field(default_factory=VocabularyHead)
    forward_tokens: int
    update_tokens: int = 0
    micro_batches: int = 1
    """Micro-batches of one optimizer step on one data-parallel rank: how full the pipeline gets."""
    gradients_while_sending: bool = False
    """Offloaded gradients come back with the parameters for the weight transfer."""

    @property
    def params(self) -> Held:
        """Parameters of this rank."""
        return held(self.model, self.layout, self.stage, vocabulary_head=self.vocabulary_head)

    def _states(self, *, parameters: bool, gradients: bool, optimizer: bool) -> MemoryBreakdown:
        params, trained = self.params, self.trained
        return MemoryBreakdown(
            weights=PARAMETER_BYTES * params.total if parameters else 0,
            gradients=self.optimizer.gradient_bytes * params.total if gradients and trained else 0,
            optimizer_states=self.optimizer.state_bytes(params, self.layout) if optimizer and trained else 0,
        )

    def at_launch(self) -> MemoryBreakdown:
        """Return parameters, gradients and the fp32 master copy unless they are offloaded; moments come with the first step."""
        here = not self.param_offload
        states = self._states(parameters=here, gradients=here, optimizer=False)
        if self.optimizer_offload or not self.trained:
            return states
        return states + MemoryBreakdown(optimizer_states=self.optimizer.master_copy_bytes(self.params, self.layout))

    def resting(self) -> MemoryBreakdown:
        """Return what the role leaves on the GPU while others run."""
        here = not self.param_offload
        return self._states(parameters=here, gradients=here, optimizer=not self.optimizer_offload)

    def loaded(self, *, optimizer: bool) -> MemoryBreakdown:
        """Return the role's states during its own pass; without ``optimizer`` offloaded gradients stay away too."""
        return self._states(
            parameters=True,
            gradients=optimizer or not self.param_offload,
            optimizer=optimizer or not self.optimizer_offload,
        )

    def forward_pass(self) -> MemoryBreakdown:
        """Return the peak of a pass without gradients, on top of the states."""
        return peak(forward_moments(self._pass(self.forward_tokens, self.forward_head)))

    def update_pass(self) -> MemoryBreakdown:
        """Return the peak of forward and backward, on top of the states, the gradient buffer among them."""
        return peak(update_moments(self._pass(self.update_tokens, self.update_head)))

    def _pass(self, tokens: int, head: VocabularyHead) -> StagePass:
        return StagePass(
            model=self.model,
            layout=self.layout,
            stage=self.stage,
            tokens=tokens,
            micro_batches=self.micro_batches,
            head=head,
            recompute=self.recompute,
        )

    def step(self) -> MemoryBreakdown:
        """Return the temporaries of the optimizer step."""
        return MemoryBreakdown(gradients=self.optimizer.step_bytes(self.params, self.layout))

    def left_root(self) -> MemoryBreakdown:
        """Return nothing: no parameter is gathered."""
        return MemoryBreakdown()

    def sending(self) -> MemoryBreakdown:
        """Return the states while the weights go to the engine."""
        return self.loaded(optimizer=False) if not self.gradients_while_sending else self._sending_all()

    def _sending_all(self) -> MemoryBreakdown:
        return self._states(parameters=True, gradients=True, optimizer=not self.optimizer_offload)

    def buffers(self, handover: Handover) -> MemoryBreakdown:
        """Return the largest tensor, gathered from the tensor-parallel ranks, and the transfer's bucket."""
        gathered = exported_bytes(self.model, tensor_parallel=self.layout.tensor, pipeline=self.layout.pipeline)
        return MemoryBreakdown(communication_buffers=gathered + handover.bucket_bytes)

    def left_in_cache(self) -> MemoryBreakdown:
        """Return what torch's allocator still reserves after an update; offloading empties its cache."""
        if self.param_offload or self.optimizer_offload:
            return MemoryBreakdown()
        return MemoryBreakdown(fragmentation=self.update_pass().total_bytes)

    def host_bytes(self) -> int:
        """Return what one rank keeps in host memory; states that are stepped there have an fp32 gradient beside them."""
        params = self.params
        parameters = PARAMETER_BYTES * params.total if self.param_offload else 0
        if not self.trained:
            return parameters
        moved = self.optimizer.state_bytes(params, self.layout) if self.optimizer_offload else 0
        lives = self.optimizer.state_bytes(params, self.layout, host=True)
        each = self.optimizer.master_bytes + self.optimizer.moment_bytes
        return parameters + moved + lives + lives * self.optimizer.gradient_bytes // each

    def host_load_bytes(self) -> int:
        """Return one bf16 copy of the checkpoint, which is read once and dealt out tensor by tensor."""
        return PARAMETER_BYTES * self.model.parameters
