"""Which tensor was it? The size in an out-of-memory message, taken apart into the dimensions of a launch.

    size = tokens x vocabulary x bytes        logits, their fp32 copies, gradients, entropy
    size = tokens x width x bytes             activations of a decoder layer
    size = parameters x bytes [/ ranks]       a gathered unit, a shard, a vocabulary matrix

torch takes blocks from the device, so a message names the block and not the tensor: up to 1 MiB are 2 MiB, up to 10 MiB are
20 MiB, and larger ones are rounded up to 2 MiB. Source: torch c10/cuda/CUDACachingAllocator (kSmallBuffer, kLargeBuffer,
kMinLargeAlloc, kRoundLarge).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra_plugins.memfit.base.units import MIB, round_up
from hydra_plugins.memfit.diagnosis.amount import Amount
from hydra_plugins.memfit.model.spec import ModelSpec

SMALL_BLOCKS = (2 * MIB, 20 * MIB)
"""Blocks that say nothing about the tensor: many sizes share them."""

_WIDTHS = {2: "bf16", 4: "fp32"}
_LEAST_TOKENS = 64
_TELLING = 16
"""A sequence must be so many times larger than the rounding of the message for a whole number of them to mean something."""
_MOST_TERMS = 3
_ROUND_TOKENS = 1024
"""Without a launch only whole multiples of this are believed to be a number of tokens."""

LOSS_FUNCTIONS = ("logprob", "log_prob", "entropy", "cross_entropy", "softmax", "logsumexp", "lm_head", "logits")
"""Parts of function names in which a vocabulary dimension is at work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One reading of a size."""

    what: str
    formula: str
    """``24576 tokens x 151936 x 4 B``"""
    num_bytes: int
    """What the formula gives: the tensor, before torch rounds its block."""
    certain: bool
    """All factors are dimensions of this launch; otherwise the number of tokens is solved for, or the model is not known."""
    source: str = ""
    """Where a number of tokens comes from."""


def block_bytes(num_bytes: int) -> int:
    """Return what torch asks the device for to hold a tensor of ``num_bytes``.

    >>> block_bytes(5 * 2**20) // 2**20, block_bytes(593 * 2**20) // 2**20
    (20, 594)
    """
    if num_bytes <= MIB:
        return SMALL_BLOCKS[0]
    return SMALL_BLOCKS[1] if num_bytes < 10 * MIB else round_up(num_bytes, 2 * MIB)


def readings(
    size: Amount,
    *,
    model: ModelSpec | None = None,
    ranks: int = 1,
    tokens: Mapping[int, str] | None = None,
    lengths: Sequence[int] = (),
    vocabularies: Sequence[int] = (),
    in_loss: bool = False,
) -> tuple[Term, ...]:
    """Return up to three readings of ``size``, the surest first.

    ``tokens`` are the numbers of tokens that the launch may put into one pass, each with its key; ``lengths`` are those of one
    sequence. Without a ``model`` the known ``vocabularies`` are tried, the most common first, and only when the failure was
    ``in_loss``.
    """
    if size.num_bytes in SMALL_BLOCKS:
        return ()
    if model is None:
        found = list(_guessed(size, vocabularies)) if in_loss else []
        return tuple(found[:_MOST_TERMS])
    sure = [term for term in _known(model, ranks, tokens or {}) if _matches(term.num_bytes, size)]
    distinct = list({term.what: term for term in reversed(sure)}.values())[::-1]
    most = max(tokens, default=0) if tokens else 0
    if in_loss and not any("logits" in term.what for term in distinct):
        distinct = [*_solved(size, model, most, lengths), *distinct]
    return tuple(distinct[:_MOST_TERMS])


def _matches(num_bytes: int, size: Amount) -> bool:
    return any(abs(value - size.num_bytes) <= size.slack_bytes for value in (block_bytes(num_bytes), num_bytes))


def _known(model: ModelSpec, ranks: int, tokens: Mapping[int, str]) -> Iterator[Term]:
    for count, key in tokens.items():
        yield from _token_terms(model, count, key)
    yield from _parameter_terms(model, ranks)


def _token_terms(model: ModelSpec, count: int, key: str) -> Iterator[Term]:
    for width, name in _WIDTHS.items():
        yield _term(f"one {name} copy of the logits", count, model.vocab_size, width, key)
    rows = (
        ("the gate and up projections of a layer", 2 * model.intermediate_size),
        ("one projection of a layer's MLP", model.intermediate_size),
        ("the hidden states", model.hidden_size),
    )
    for what, columns in rows:
        for width, name in _WIDTHS.items():
            yield _term(f"{what}, {name}", count, columns, width, key)


def _term(what: str, count: int, columns: int, width: int, key: str, *, certain: bool = True) -> Term:
    return Term(
        what=what,
        formula=f"{count} tokens x {columns} x {width} B",
        num_bytes=count * columns * width,
        certain=certain,
        source=key,
    )


def _parameter_terms(model: ModelSpec, ranks: int) -> Iterator[Term]:
    units = (
        ("the vocabulary matrix (embedding or lm_head)", model.vocab_size * model.hidden_size),
        ("all parameters outside the layers", model.root_unit_parameters),
        ("one decoder layer", model.layer_parameters),
        ("one matrix of a layer's MLP", model.hidden_size * model.intermediate_size),
        ("all parameters", model.parameters),
    )
    for what, count in units:
        for width, name in _WIDTHS.items():
            yield _parameters(f"{what}, {name}", count, width)
            if ranks > 1:
                yield _parameters(f"one rank's shard of {what}, {name}", count, width, ranks)


def _parameters(what: str, count: int, width: int, ranks: int = 1) -> Term:
    shared = f" / {ranks} ranks" if ranks > 1 else ""
    return Term(
        what=what,
        formula=f"{count} parameters x {width} B{shared}",
        num_bytes=-(-count * width // ranks),
        certain=True,
    )


def _solved(size: Amount, model: ModelSpec, most: int, lengths: Sequence[int]) -> Iterator[Term]:
    """The logits of a number of tokens that the launch does not name: whole padded sequences, else any number."""
    for length in lengths:
        for width, name in _WIDTHS.items():
            row = length * model.vocab_size * width
            count = round(size.num_bytes / row)
            if row > _TELLING * size.slack_bytes and count and _matches(count * row, size):
                what = f"one {name} copy of the logits of {count} padded sequences of {length} tokens"
                yield _term(what, count * length, model.vocab_size, width, "", certain=False)
    for width, name in ((4, "fp32"), (2, "bf16")):
        count = size.num_bytes // (model.vocab_size * width)
        if count >= _LEAST_TOKENS and (not most or count <= most):
            what = f"one {name} copy of the logits of about {count} tokens"
            yield _term(what, count, model.vocab_size, width, "", certain=False)
            return


def _guessed(size: Amount, vocabularies: Iterable[int]) -> Iterator[Term]:
    for vocabulary in vocabularies:
        for width, name in ((4, "fp32"), (2, "bf16")):
            low = size.num_bytes - size.slack_bytes - 2 * MIB
            count = round_up(max(1, -(-low // (vocabulary * width))), _ROUND_TOKENS)
            if _matches(count * vocabulary * width, size):
                what = f"one {name} copy of the logits, for a vocabulary of {vocabulary}"
                yield _term(what, count, vocabulary, width, "", certain=False)
