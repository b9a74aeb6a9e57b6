"""Activations of a vision tower in bf16 with flash attention, in bytes of one rank.

Symbols (elements of one patch): h width of the tower, f of its feed-forward block, d head dimension, H heads, x values of
the patch; L blocks. A merger makes one image token of ``patches_per_token`` patches.

Each term was read off the towers of Hugging Face's Qwen2-VL, Qwen2.5-VL and Qwen3-VL (transformers 5.10) and of verl's
forward functions for them, and agrees with op-level traces (docs/validation/trainer.md). Windows change which patches attend
to each other, not what is kept. Rotary positions are applied in fp32; under autocast LayerNorm is fp32 as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_plugins.memfit.model.spec import VisionSpec

_KEPT_FEED_FORWARD = {"gated": 8, "gelu": 4, "quick_gelu": 6}
"""Bytes that a block's feed-forward part saves, in widths f: gate, up, activation, product; input, output (and sigmoid)."""
_GRADIENT_FEED_FORWARD = {"gated": 4, "gelu": 2, "quick_gelu": 4}
"""Bytes of its gradients at the peak beyond what is saved, in widths f."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images of one micro-batch. Sequence parallelism does not divide them: each rank runs the tower on all of them."""

    tower: VisionSpec
    text_width: int
    """Hidden size of the text model."""
    tokens: int
    """Image tokens of the whole sequence-parallel group."""
    embedded: int
    """All tokens of the group, which are embedded before they are shared out."""
    trained: bool = True
    """The tower has gradients, of its own or of adapters in it; a frozen one keeps nothing."""

    @property
    def patches(self) -> int:
        """Patches of all images."""
        return self.tokens * self.tower.patches_per_token

    @property
    def _features(self) -> int:
        """Image tokens in the width of the text model, bf16: one output of a merger, or its gradient."""
        return 2 * self.text_width * self.tokens

    def pixel_bytes(self) -> int:
        """Return the bf16 pixels that FSDP hands to the root module, which live through its forward pass: 2x."""
        return 2 * self.tower.pixels * self.patches

    def early_feature_bytes(self) -> int:
        """Return the features (or their gradients) that wait between the tower and the first decoder layers."""
        return self.tower.num_deepstack * self._features

    def forward_bytes(self) -> int:
        """
        Return what the tower's forward pass has at its peak, in the attention of the last block, without gradients.

            block       2h (input) + norm (RMS 2h, Layer 4h) + 6h (qkv) + 24h (q and k in fp32, and their rotation)
            positions   14d + 16; with a table 4h + 32 more
            pixels      2x (bf16) + 4x (fp32)
            tokens      the embedded text and the features made so far
        """
        t = self.tower
        d = t.hidden_size // t.num_attention_heads
        block = (34 if t.rms_norm else 36) * t.hidden_size + 14 * d + 16 + 6 * t.pixels
        table = 4 * t.hidden_size + 32 if t.learned_positions else 0
        return self.patches * (block + table) + 2 * self.text_width * self.embedded + self.early_feature_bytes()

    def saved_bytes(self, *, checkpointing: bool) -> int:
        """Return what the tower keeps until its backward pass: its blocks, its mergers, pixels 2x and positions 8d."""
        if not self.trained:
            return 0
        t = self.tower
        return self.patches * (t.num_layers * self._block_keeps(checkpointing) + self._mergers_keep() + self._inputs())

    def update_forward_bytes(self, *, checkpointing: bool) -> int:
        """Return the peak of the tower's forward pass with gradients: the last block, all others and the early mergers saved."""
        if not self.trained:
            return self.forward_bytes()
        kept = self.saved_bytes(checkpointing=checkpointing) - self.patches * self._merger_keeps()
        d = self.tower.hidden_size // self.tower.num_attention_heads
        shared = 2 * self.tower.hidden_size + 8 * d
        return kept + self.forward_bytes() - self.patches * (shared if checkpointing else self._block_keeps(False))

    def backward_bytes(self, *, left: int, checkpointing: bool) -> int:
        """
        Return the peak inside the backward pass of a block, ``left`` of them not through with it, this one included.

        With checkpointing the block is computed again and the gradients of its feed-forward part and input stand on top;
        without, the backward pass of the last norm, 12h, is the largest. The gradient of all embeddings waits meanwhile.
        """
        t = self.tower
        per_patch = left * self._block_keeps(checkpointing) + self._inputs()
        if left == t.num_layers:
            per_patch += self._mergers_keep() - self._merger_keeps()
        gradients = _GRADIENT_FEED_FORWARD[t.feed_forward] * t.intermediate_size + 2 * t.hidden_size
        if checkpointing:
            per_patch += self._block_saved() + gradients
        else:
            per_patch += max(12 * t.hidden_size + self._merger_keeps(), gradients)
        waiting = 2 * self.text_width * self.embedded + self.early_feature_bytes()
        return self.patches * per_patch + waiting

    def _block_keeps(self, checkpointing: bool) -> int:
        return 2 * self.tower.hidden_size if checkpointing else self._block_saved()

    def _block_saved(self) -> int:
        """12h (qkv, rotated q and k, output), two norms of 8h (RMS) or 6h each, the feed-forward part, 4H log-sum-exp."""
        t = self.tower
        norms = 16 * t.hidden_size + 8 if t.rms_norm else 12 * t.hidden_size + 16
        feed_forward = _KEPT_FEED_FORWARD[t.feed_forward] * t.intermediate_size
        return 12 * t.hidden_size + norms + feed_forward + 4 * t.num_attention_heads

    def _merger_keeps(self) -> int:
        """The norm in fp32, its output, and both sides of the activation: 10h; RMSNorm keeps one more copy, 12h."""
        return (12 if self.tower.rms_norm else 10) * self.tower.hidden_size

    def _mergers_keep(self) -> int:
        return (1 + self.tower.num_deepstack) * self._merger_keeps()

    def _inputs(self) -> int:
        t = self.tower
        return 2 * t.pixels + 8 * t.hidden_size // t.num_attention_heads + (48 if t.learned_positions else 0)
