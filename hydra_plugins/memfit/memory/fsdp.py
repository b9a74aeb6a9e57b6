"""What FSDP adds to the model states while a pass runs: gathered parameters, and gradients on their way to the shards.

Symbols: n parameters of one decoder layer (one FSDP unit), R parameters of the root unit (embedding, lm_head if untied,
last norm), E parameters of one vocabulary matrix, N ranks of the shard group. bf16 compute (2 bytes), fp32 reductions.

FSDP1 keeps the root unit gathered from its first use to its last. FSDP2 gives an untied embedding and lm_head units of
their own and reshards them at once, but holds the all-gather result and the input of the last reduce-scatter until the
next collective needs the stream.

Sources: torch ``_runtime_utils.py`` and ``_flat_param.py`` (FSDP1), ``_fsdp_param_group.py`` and ``_fsdp_collectives.py``
(FSDP2), run op by op (docs/validation/trainer.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.base.units import ceil_div
from hydra_plugins.memfit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How one model is wrapped and sharded. All methods return bytes on one rank."""

    version: int
    """1: ``FullyShardedDataParallel``; 2: ``fully_shard``."""
    ranks: int
    """Ranks that share one copy of the parameters."""
    layer: int
    """n: parameters of the largest decoder layer."""
    root: int
    """R: parameters of the root unit."""
    embedding: int
    """E: parameters of one vocabulary matrix."""
    layers: int
    tied: bool
    """The vocabulary matrix belongs to the root unit; FSDP2 gives an untied embedding and lm_head units of their own."""
    vocabulary_head: bool = True
    """False for a critic: no lm_head, so no gradient of one."""
    trainable: bool = True
    """False for a frozen base (LoRA): its units are gathered, no gradient of theirs is reduced."""
    reshard_after_forward: bool = True
    forward_prefetch: bool = False
    vision_layer: int = 0
    """Parameters of one block of a vision tower, a unit as well; 0 without a tower."""
    vision_root: int = 0
    """Parameters of the tower outside its blocks; `root` has them too."""

    @classmethod
    def of(
        cls, model: ModelSpec, *, version: int, ranks: int, trainable: bool = True, vocabulary_head: bool = True
    ) -> Sharding:
        """Return how ``model`` is wrapped: a unit for each decoder layer, and what is left in the root."""
        tower = model.vision
        return cls(
            version=version,
            ranks=ranks,
            layer=model.layer_parameters,
            root=model.root_unit_parameters,
            vision_layer=tower.layer_parameters if tower else 0,
            vision_root=tower.root_parameters if tower else 0,
            embedding=model.embedding_parameters,
            layers=model.num_hidden_layers,
            tied=model.tie_word_embeddings,
            vocabulary_head=vocabulary_head,
            trainable=trainable,
        )

    @property
    def single(self) -> bool:
        """Whether there is nothing to shard: FSDP1 turns into NO_SHARD, FSDP2 only casts."""
        return self.ranks == 1

    @property
    def _kept(self) -> int:
        """Layers that stay gathered because ``reshard_after_forward`` is off."""
        if self.reshard_after_forward or self.single:
            return 0
        return 2 * self.layer * self.layers + (2 * self.embedding if self.version == 2 and not self.tied else 0)

    # -- forward ----------------------------------------------------------------------------------------------------
    def root_during_layers_bytes(self) -> int:
        """Return the gathered root while decoder layers run: 2R; FSDP2 has resharded an untied embedding by then."""
        return 2 * self.root if self.version == 1 or self.tied else 2 * self.vision_root

    def root_during_product_bytes(self) -> int:
        """Return what is gathered in the matrix product of lm_head."""
        if self.version == 1:
            return 2 * self.root + self._kept
        if self.tied:
            return 2 * self.root + (0 if self.single else max(2 * self.layer, self._kept))
        if not self.vocabulary_head:
            return 2 * self.vision_root + self._kept
        return (2 if self.single else 4) * self.embedding + 2 * self.vision_root + self._kept

    def root_during_loss_bytes(self) -> int:
        """Return what stays gathered while the loss is computed: FSDP1's root (not under NO_SHARD)."""
        if self.version == 1 and not self.single:
            return 2 * self.root + self._kept
        return self._kept

    def root_gather_bytes(self) -> int:
        """Return the all-gather of the root unit: 2R and the cast shard 2R/N (FSDP1); result, copy and the first layer (FSDP2)."""
        if self.single:
            return 2 * self.root
        if self.version == 1:
            return 2 * self.root + ceil_div(2 * self.root, self.ranks)
        if self.tied:
            return 4 * self.root + 4 * self.layer
        return max(4 * self.embedding, 2 * self.embedding + 4 * self.layer)

    def forward_unit_bytes(self) -> int:
        """Return the gathered copies while one layer computes: 2n (FSDP1); all-gather result and copy, 4n (FSDP2)."""
        prefetch = 2 * self.layer if self.forward_prefetch else 0
        if self.single:
            return 2 * self.layer
        if self.version == 1:
            return max(2 * self.layer, self._kept) + prefetch
        return max(4 * self.layer, self._kept + 2 * self.layer) + prefetch

    def forward_gather_bytes(self) -> int:
        """Return the gathered copies while the next layer is gathered: 2n and the cast shard 2n/N (FSDP1); 6n (FSDP2)."""
        if self.single:
            return self.forward_unit_bytes()
        extra = ceil_div(2 * self.layer, self.ranks) if self.version == 1 else 2 * self.layer
        return self.forward_unit_bytes() + extra

    def vision_forward_bytes(self) -> int:
        """Return the gathered root and block while a vision tower computes."""
        unit = 2 * self.vision_layer * (1 if self.single or self.version == 1 else 2)
        return self.root_during_layers_bytes() + unit

    # -- backward ---------------------------------------------------------------------------------------------------
    def product_backward_bytes(self, *, gradient: bool) -> int:
        """Return gathered parameters, and the gradient of lm_head (2E), in the backward pass of its matrix product."""
        whole = self.version == 1 or self.tied
        unit, beside = (self.root, 0) if whole else (self.embedding * self.vocabulary_head, 2 * self.vision_root)
        if self.version == 2 and not self.trainable:
            return max(4 * unit, self._kept) + beside
        gathered = 2 * unit + beside
        last_layer = 0 if self.single and self.version == 2 else 2 * self.layer
        written = 2 * self.embedding if gradient and self.trainable else 0
        return gathered + max(last_layer, self._kept) + written

    def product_reduction_bytes(self) -> int:
        """Return the reduction of an untied lm_head's gradient by FSDP2: 2E, its fp32 copy 4E and the shard 4E/N."""
        if self.version == 1 or self.tied or not self.trainable or not self.vocabulary_head:
            return 0
        shard = (0 if self.single else ceil_div(4 * self.embedding, self.ranks)) + 2 * self.vision_root
        return max(0 if self.single else 2 * self.layer, self._kept) + 6 * self.embedding + shard

    def layer_backward_bytes(self, *, left: int, mlp: int) -> int:
        """
        Return what is gathered or waits for reduction at the activation peak inside one layer's backward pass.

        ``left`` layers are not through with it yet, this one included. ``mlp`` is the size of the
        weight gradient that exists at that point (down projection, 2 bytes an element).
        """
        gradient = 2 * mlp if self.trainable else 0
        pending = self._pending(left == self.layers) if self.version == 2 and self.trainable else 0
        return self._root_in_backward() + self._gathered_in_backward(left) + pending + gradient

    def layer_reduction_bytes(self, *, left: int) -> int:
        """Return the same while a layer's gradient (2n) is copied into the fp32 reduce buffer (4n, result 4n/N)."""
        root = self._root_in_backward()
        if not self.trainable:
            return root + self._gathered_in_backward(left)
        shard = 0 if self.single else ceil_div(4 * self.layer, self.ranks)
        if self.version == 1:
            prefetched = 0 if self.single or left == 1 else 2 * self.layer
            return root + max(prefetched, self._still_kept(left - 1)) + 6 * self.layer + shard
        prefetched = 0 if left == 1 or self.single else 4 * self.layer
        pending = self._pending(left == self.layers)
        kept = max(prefetched, self._still_kept(left - 1))
        return root + kept + 2 * self.layer + max(4 * self.layer + shard, pending)

    def vision_backward_bytes(self, *, first: bool, feed_forward: int) -> int:
        """
        Return what is gathered or waits for reduction inside the backward pass of a vision tower's block.

        The gradients of the mergers wait for the end of the pass with the root's; ``feed_forward`` is the size of the weight
        gradient that exists at that point. ``first``: the unit before was a decoder layer.
        """
        gradients = 2 * feed_forward + 2 * self.vision_root if self.trainable else 0
        gathered = 2 * self.vision_layer * (1 if self.single else 2)
        pending = 4 * (self.layer if first else self.vision_layer) if self.version == 2 and self.trainable else 0
        return self._root_in_backward() + gathered + pending + gradients

    def root_reduction_bytes(self, *, accumulates: bool) -> int:
        """
        Return the reduction of the root's gradient at the end of the backward pass: 2R and its fp32 copy 4R.

        A single rank keeps that copy as its gradient (FSDP1), or casts without a second one (FSDP2). The reduced shard
        4R/N is new where gradients accumulate. Without an lm_head the embedding's own gradient (2R) and its flat copy (2R)
        come at the same moment.
        """
        if not self.trainable:
            return 2 * self.root
        if self.version == 1 and self.single:
            return (6 if accumulates else 2) * self.root
        unit = self.root if self.version == 1 or self.tied else self.embedding
        shard = ceil_div(4 * unit, self.ranks) if accumulates and not self.single else 0
        if self.version == 1 and not self.vocabulary_head:
            return 10 * unit + shard
        return (4 if self.single and self.version == 2 else 6) * unit + shard

    def reduced_first(self) -> int:
        """Return the parameters whose gradients are reduced before the last decoder layer's: FSDP2's untied lm_head."""
        return 0 if self.version == 1 or self.tied else self.embedding * self.vocabulary_head

    def _root_in_backward(self) -> int:
        """The gathered root, and the gradient of a vocabulary matrix that waits for the end of the pass."""
        if self.version == 2 and not self.tied:
            return 2 * self.vision_root
        return 2 * self.root + (2 * self.embedding if self.trainable and self.vocabulary_head else 0)

    def _gathered_in_backward(self, left: int) -> int:
        """The layer in use and the prefetched one; after the last layer a vision block, or FSDP2's untied embedding."""
        last = left == 1
        if self.version == 2:
            after = self.vision_layer or (self.layer if self.tied else self.embedding)
            prefetched = 2 * (after if last else self.layer)
            return max(2 * self.layer + (0 if self.single else prefetched), self._still_kept(left))
        prefetched = 0 if self.single else 2 * (self.vision_layer if last else self.layer)
        return max(2 * self.layer + prefetched, self._still_kept(left))

    def _still_kept(self, left: int) -> int:
        """What ``reshard_after_forward=False`` keeps gathered of the ``left`` layers whose backward pass is not over."""
        return self._kept - 2 * self.layer * (self.layers - left) if self._kept else 0

    def _pending(self, first: bool) -> int:
        """FSDP2's reduce-scatter input of the unit before, held until the next reduction."""
        if first:
            return 0 if self.tied else 4 * self.embedding * self.vocabulary_head
        return 4 * self.layer
