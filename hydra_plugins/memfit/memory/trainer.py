"""Peak memory of one pass of a trained (or reference) model: the moments of a pass at which the peak can be.

A pass has a few points where something large comes to life: the loss head, the matrix product below it, a decoder
layer, the reduction of a gradient. Each is written down as one `MemoryBreakdown`; the peak of the pass is the largest.
Model states (`states`) are not in here: they are resident whatever the pass does.

Symbols: T tokens of the micro-batch on this rank, L layers, n, R, E, N as in `fsdp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.memory.activations import (
    Widths,
    checkpoint_bytes,
    expert_backward_bytes,
    layer_backward_bytes,
    layer_forward_bytes,
    layer_saved_bytes,
    position_bytes,
)
from hydra_plugins.memfit.memory.breakdown import MemoryBreakdown
from hydra_plugins.memfit.memory.delta_net import backward_bytes
from hydra_plugins.memfit.memory.fsdp import Sharding
from hydra_plugins.memfit.memory.head import (
    Head,
    forward_logits_bytes,
    lm_head_logits_bytes,
    update_logits_bytes,
)
from hydra_plugins.memfit.memory.vision import Images

_GROUPS_ON_GPU = 2
"""Layer groups that activation offload keeps on the GPU. Source: verl utils/activation_offload.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward (and backward) pass over one micro-batch on one rank."""

    widths: Widths
    sharding: Sharding
    head: Head
    tokens: int
    layers: int
    linear: Widths | None = None
    """Widths of the layers with linear attention; ``widths`` are those of the others."""
    linear_layers: int = 0
    """How many those are, spread evenly; the last layer of each group is another."""
    vocabulary: int
    checkpointing: bool = True
    activation_offload: bool = False
    """What layers save goes to the host; two groups stay on the GPU."""
    gradients: int = 0
    """Parameters with gradients on one unsharded copy; 0 for a frozen base."""
    gradient_bytes: int = 4
    """Bytes of one resident gradient: that of the stored parameters."""
    accumulates: bool = True
    """Whether sharded gradients of an earlier micro-batch are already resident."""
    images: Images | None = None
    """What a vision tower runs on; ``None``: no tower, or no images."""

    def widths_of(self, layer: int) -> Widths:
        """Return the widths of a layer, counted from 0."""
        if self.linear is None or self.linear_before(layer + 1) == self.linear_before(layer):
            return self.widths
        return self.linear

    def linear_before(self, layer: int) -> int:
        """Return how many of the first ``layer`` layers have linear attention."""
        return ceil_div(layer * self.linear_layers, self.layers)


def peak(moments: tuple[MemoryBreakdown, ...]) -> MemoryBreakdown:
    """Return the largest of the moments."""
    return max(moments, key=lambda moment: moment.total_bytes)


def _moment(
    *, communication: int = 0, per_token: int = 0, tokens: int = 0, images: int = 0, logits: int = 0, gradients: int = 0
) -> MemoryBreakdown:
    return MemoryBreakdown(
        communication_buffers=communication,
        activations=per_token * tokens + images,
        logits=logits,
        gradients=gradients,
    )


def forward_moments(p: Pass) -> tuple[MemoryBreakdown, ...]:
    """Return the moments of a pass without gradients: old and reference log-probabilities, values."""
    w, s, tokens = p.widths, p.sharding, p.tokens
    position = position_bytes(w)
    logits = forward_logits_bytes(p.head, tokens=tokens, vocabulary=p.vocabulary, hidden=w.h)
    product = lm_head_logits_bytes(p.head, tokens=tokens, vocabulary=p.vocabulary)
    pixels = p.images.pixel_bytes() if p.images else 0
    return (
        _moment(
            communication=s.root_during_loss_bytes(), logits=logits, images=pixels if p.head.fused != "none" else 0
        ),
        _moment(
            communication=s.root_during_product_bytes(),
            logits=product,
            per_token=2 * w.h + 37,
            tokens=tokens,
            images=pixels,
        ),
        _moment(
            communication=s.root_during_layers_bytes() + s.forward_unit_bytes(),
            per_token=max(layer_forward_bytes(kind) for kind in (w, p.linear or w)) + position + 8,
            tokens=tokens,
            images=pixels + (p.images.early_feature_bytes() if p.images else 0),
        ),
        *_tower_forward(p),
        _moment(
            communication=s.root_during_layers_bytes() + s.forward_gather_bytes(),
            per_token=4 * w.h + position,
            tokens=tokens,
        ),
        _moment(communication=s.root_gather_bytes()),
    )


def _tower_forward(p: Pass) -> tuple[MemoryBreakdown, ...]:
    """The vision tower, in front of everything else: the largest moment of its pass without gradients."""
    if p.images is None:
        return ()
    tower, position = p.sharding.vision_forward_bytes(), position_bytes(p.widths)
    return (_moment(communication=tower, per_token=position, tokens=p.tokens, images=p.images.forward_bytes()),)


def _tower_update(p: Pass, resident: int) -> tuple[MemoryBreakdown, ...]:
    """The vision tower of an update: its forward pass, and the backward pass of its last block and of its first."""
    if p.images is None:
        return ()
    s, images, position = p.sharding, p.images, position_bytes(p.widths)
    ahead = images.update_forward_bytes(checkpointing=p.checkpointing)
    moments = [
        _moment(
            communication=s.vision_forward_bytes(),
            per_token=position,
            tokens=p.tokens,
            images=ahead,
            gradients=resident,
        )
    ]
    blocks = images.tower.num_layers if images.trained else 0
    feed_forward = images.tower.hidden_size * images.tower.intermediate_size
    for left in sorted({blocks, min(1, blocks)} - {0}):
        reduced = s.layer * p.layers + s.reduced_first() + s.vision_layer * (blocks - left)
        moments.append(
            _moment(
                communication=s.vision_backward_bytes(first=left == blocks, feed_forward=feed_forward),
                images=images.backward_bytes(left=left, checkpointing=p.checkpointing),
                gradients=resident or ceil_div(p.gradient_bytes * min(p.gradients, reduced), s.ranks),
            )
        )
    return tuple(moments)


def _tower_keeps(p: Pass) -> int:
    """Bytes that the vision tower has saved for its backward pass, the last of all."""
    return p.images.saved_bytes(checkpointing=p.checkpointing) if p.images else 0


def forward_progress(p: Pass) -> tuple[MemoryBreakdown, ...]:
    """Return the forward pass of an update, layer by layer, up to the logits: where a pass dies that is far too large."""
    w, s = p.widths, p.sharding
    resident = ceil_div(p.gradient_bytes * p.gradients, s.ranks) if p.accumulates else 0
    gathered = s.root_during_layers_bytes() + s.forward_unit_bytes()
    layers = [
        _moment(
            communication=gathered,
            per_token=_saved(p, done) + position_bytes(w),
            tokens=p.tokens,
            images=_tower_keeps(p),
            gradients=resident,
        )
        for done in range(1, p.layers + 1)
    ]
    product = lm_head_logits_bytes(p.head, tokens=p.tokens, vocabulary=p.vocabulary)
    return (*layers, replace(layers[-1], logits=product))


def update_moments(p: Pass) -> tuple[MemoryBreakdown, ...]:
    """Return the moments of the forward and backward pass of an update."""
    w, s, tokens = p.widths, p.sharding, p.tokens
    position = position_bytes(w)
    resident = ceil_div(p.gradient_bytes * p.gradients, s.ranks) if p.accumulates else 0
    body = _saved(p, p.layers) + w.norm * w.h + position
    logits = update_logits_bytes(p.head, tokens=tokens, vocabulary=p.vocabulary, hidden=w.h)
    product = lm_head_logits_bytes(p.head, tokens=tokens, vocabulary=p.vocabulary)
    fused = p.head.fused != "none"
    in_loss = s.product_backward_bytes(gradient=False) if fused else s.root_during_loss_bytes()
    tower = _tower_keeps(p)
    moments = [
        _moment(communication=in_loss, per_token=body, tokens=tokens, images=tower, logits=logits, gradients=resident),
        _moment(
            communication=s.product_backward_bytes(gradient=p.head.vocabulary),
            per_token=body + 2 * w.h,
            tokens=tokens,
            images=tower,
            logits=product,
            gradients=resident,
        ),
        _moment(
            communication=s.product_reduction_bytes(), per_token=body, tokens=tokens, images=tower, gradients=resident
        ),
    ]
    for done in sorted({0, min(1, p.layers - 1), max(0, p.layers - 2), p.layers - 1}):
        moments += _layer_moments(p, done, position)
    moments += _tower_update(p, resident)
    reduced = ceil_div(p.gradient_bytes * p.gradients, s.ranks)
    moments.append(
        _moment(
            communication=s.root_reduction_bytes(accumulates=p.accumulates or p.gradient_bytes < 4), gradients=reduced
        )
    )
    return tuple(moments)


def _saved(p: Pass, layers: int) -> int:
    """Bytes a token that ``layers`` layers have saved for their backward pass."""
    if p.activation_offload:
        layers = min(layers, _GROUPS_ON_GPU)
    linear = p.linear_before(layers)
    return linear * _layer_keeps(p, p.linear or p.widths) + (layers - linear) * _layer_keeps(p, p.widths)


def _layer_keeps(p: Pass, widths: Widths) -> int:
    """Bytes a token that one layer saves for its backward pass."""
    return checkpoint_bytes(widths) if p.checkpointing else layer_saved_bytes(widths)


def host_activation_bytes(p: Pass) -> int:
    """Return what activation offload holds in host memory at the end of one forward pass."""
    if not p.activation_offload:
        return 0
    return p.tokens * (_saved(replace(p, activation_offload=False), p.layers) - _saved(p, p.layers))


def _layer_moments(p: Pass, done: int, position: int) -> list[MemoryBreakdown]:
    """The peak inside the backward pass of layer L - 1 - done, and the reduction of its gradient."""
    left, s = p.layers - done, p.sharding
    w = p.widths_of(left - 1)
    reduced = p.gradients if p.accumulates else min(p.gradients, s.layer * done + s.reduced_first())
    gradients = ceil_div(p.gradient_bytes * reduced, s.ranks)
    inside = layer_backward_bytes(w, checkpointing=p.checkpointing)
    waiting = p.images.early_feature_bytes() if p.images and p.images.trained and left == 1 else 0
    images = _tower_keeps(p) + waiting
    return [
        _moment(
            communication=s.layer_backward_bytes(left=left, mlp=w.h * w.mlp_rows),
            per_token=_saved(p, left) + inside + position,
            tokens=p.tokens,
            images=images,
            gradients=gradients,
        ),
        *(replace(moment, activations=moment.activations + images) for moment in _other_moments(p, left, gradients)),
        _moment(
            communication=s.layer_reduction_bytes(left=left),
            per_token=_saved(p, left - 1) + 2 * w.h + position,
            tokens=p.tokens,
            images=images,
            gradients=gradients,
        ),
    ]


def _other_moments(p: Pass, left: int, gradients: int) -> list[MemoryBreakdown]:
    """Where experts begin their backward pass, and inside a delta net's, when the rest of its layer has its gradients."""
    w, s = p.widths_of(left - 1), p.sharding
    position, found = position_bytes(w), []
    if w.experts:
        inside = _saved(p, left) + expert_backward_bytes(w, checkpointing=p.checkpointing)
        found.append((0, inside))
    if w.delta is not None:
        below = _saved(p, left - 1) + (checkpoint_bytes(w) if p.checkpointing else 0)
        found.append((s.layer, below + backward_bytes(w.delta, hidden=w.h)))
    return [
        _moment(
            communication=s.layer_backward_bytes(left=left, mlp=written),
            per_token=per_token + position,
            tokens=p.tokens,
            gradients=gradients,
        )
        for written, per_token in found
    ]
