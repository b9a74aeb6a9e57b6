"""What one trace is asked to run: every option of a case, with the defaults of verl 0.9.1."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

CHOICES: dict[str, tuple[str, ...]] = {
    "role": ("actor", "ref", "critic"),
    "strategy": ("fsdp", "fsdp2"),
    "master_dtype": ("fp32", "bf16"),
    "compute_dtype": ("bf16", "fp32"),
    "log_prob": ("flash_ce", "torch_v2"),
    "entropy": ("compiled", "eager", "chunked"),
    "fused": ("none", "torch", "triton"),
}


ADDED = ("image_tokens", "frozen_vision")
"""Options that no row of the first traces has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One training step of one rank. Field names follow verl where it has a name for the option."""

    model: str = "qwen2.5-0.5b"
    """A name of `models.SHAPES`."""
    role: str = "actor"
    tokens: int = 4096
    """Packed tokens of one micro-batch on this rank; with Ulysses, of the whole sequence-parallel group."""
    sequences: int = 1
    """Sequences in the pack: flash-attention pads its scratch by 128 rows for each."""
    padded: bool = False
    """``use_remove_padding=False``: ``sequences`` rows of equal length, every one full."""
    ulysses: int = 1
    """Ulysses sequence-parallel size."""
    strategy: str = "fsdp"
    ranks: int = 1
    """FSDP ranks that share parameters."""
    reshard_after_forward: bool = True
    micro_batches: int = 1
    """Micro-batches really run before the optimizer step; from the second on, gradients are resident."""
    no_sync: bool = False
    """``use_no_sync_for_gradient_accumulation``."""
    checkpointing: bool = True
    master_dtype: str = "fp32"
    compute_dtype: str = "bf16"
    lora_rank: int = 0
    temperature: float = 1.0
    log_prob: str = "flash_ce"
    """``flash_ce``: flash-attn's kernel; ``torch_v2``: verl's own row loop, used where flash-attn is missing."""
    entropy: str = "compiled"
    """How an entropy is computed, wherever one is asked for."""
    update_entropy: bool = False
    """``entropy_coeff != 0``: the update needs the entropy and its gradient."""
    log_prob_entropy: bool = True
    """verl asks for the entropy with the old log-probs, and not with those of the reference."""
    entropy_chunk: int = 2048
    entropy_checkpointing: bool = False
    fused: str = "none"
    kl_loss: bool = False
    image_tokens: int = 0
    """Tokens of the pack, of all sequences together, that stand for images; with Ulysses, of the whole group."""
    frozen_vision: bool = False
    """``freeze_vision_tower``: the tower has no gradients."""

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}; valid: {', '.join(valid)}")
        if self.padded and (self.tokens % self.sequences or self.ulysses > 1 or self.fused != "none"):
            raise ValueError("a padded batch needs tokens divisible by sequences, ulysses=1 and fused=none")
        if self.image_tokens > self.tokens:
            raise ValueError(f"image_tokens={self.image_tokens} are more than tokens={self.tokens}")
        if self.tokens % self.ulysses:
            raise ValueError(f"tokens={self.tokens} is not divisible by ulysses={self.ulysses}")

    @property
    def local_tokens(self) -> int:
        """Tokens whose activations this rank holds."""
        return self.tokens // self.ulysses

    @property
    def trains(self) -> bool:
        """Whether the role has an optimizer."""
        return self.role != "ref"

    def stored(self) -> dict[str, object]:
        """Return the options as a row holds them: those that came after the first rows only where they are set."""
        default = Case()
        return {k: v for k, v in asdict(self).items() if k not in ADDED or v != getattr(default, k)}

    def changed(self) -> dict[str, object]:
        """Return the options that differ from the defaults."""
        default = asdict(Case())
        return {k: v for k, v in asdict(self).items() if v != default[k]}


def parser() -> argparse.ArgumentParser:
    """Return a command-line parser with one option a field."""
    cli = argparse.ArgumentParser(prog="tracer", description="Trace the memory of one training step, op by op.")
    for field in fields(Case):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            cli.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            cli.add_argument(flag, type=type(field.default), default=field.default, choices=CHOICES.get(field.name))
    return cli


def parse(argv: Sequence[str] | None = None) -> Case:
    """Return the case that a command line describes."""
    return Case(**vars(parser().parse_args(argv)))
