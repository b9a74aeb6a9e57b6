"""How many tokens one rank holds in one micro-batch, from verl's batch keys."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from hydra_plugins.memfit.base.settings import Lengths
from hydra_plugins.memfit.base.units import ceil_div, round_up

SOFT_BUDGET_OVERSHOOT = 1.10
"""Up to 0.8 a dynamic micro-batch may exceed its budget: verl's own partition code, run on uniform lengths with a budget of
two or more sequences, overshoots by up to 5-13 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The sequences of one pass on one data-parallel rank."""

    dynamic: bool
    budget: int
    """Token budget per GPU of a dynamic micro-batch."""
    micro_batch: int | None
    """Sequences of a static micro-batch on one rank; ``None``: unset."""
    local_sequences: int
    """Sequences of the whole pass (a mini-batch, or the batch) on one rank."""
    sequence_parallel: int
    max_length: int
    """Prompt + response, as configured."""
    packed: bool
    """Padding is removed; otherwise every sequence counts with the full length."""
    hard_budget: bool
    lengths: Lengths
    pad_to: int = 1
    """A packed micro-batch is padded to a multiple of so many tokens, all ranks of a sequence together."""

    @property
    def moves_output(self) -> bool:
        """Whether attention runs on another layout than its projections: unpadded, or exchanged between ranks."""
        return not self.packed or self.sequence_parallel > 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        known = self.lengths.max
        return min(known, self.max_length) if known else self.max_length

    def tokens(self) -> int:
        """Return the tokens of the largest micro-batch on one rank."""
        everything = self._sequences_tokens(self.local_sequences)
        if not self.dynamic:
            sequences = self.local_sequences if self.micro_batch is None else self.micro_batch
            group = self._sequences_tokens(min(sequences, self.local_sequences))
            return self._on_a_rank(group)
        group = min(self._padded_group() if not self.packed else self._budget_group(), everything)
        return self._on_a_rank(max(group, min(self.longest, everything)))

    def image_tokens(self, *, prompt: int) -> int:
        """
        Return the image tokens of the largest micro-batch, of all ranks that share it, where one prompt has ``prompt`` at most.

        A micro-batch by tokens may hold many short sequences: all of a rank's, where their mean length is not known.
        """
        everything = self.tokens() * self.sequence_parallel
        if not self.dynamic:
            sequences = self.local_sequences if self.micro_batch is None else self.micro_batch
        else:
            mean = self.lengths.mean
            sequences = self.local_sequences if mean is None else ceil_div(everything, mean)
        return min(everything, min(sequences, self.local_sequences) * prompt)

    def _on_a_rank(self, tokens: int) -> int:
        return max(1, ceil_div(round_up(tokens, self.pad_to), self.sequence_parallel))

    def _budget_group(self) -> int:
        """Tokens that a budget lets into one micro-batch; up to 0.8 the longest sequences may meet in one of them."""
        budget = self.budget * self.sequence_parallel
        if self.hard_budget:
            return budget
        batches = ceil_div(self.local_sequences * self.longest, budget)
        together = ceil_div(self.local_sequences, batches) * self.longest
        return max(int(budget * SOFT_BUDGET_OVERSHOOT), together)

    def _padded_group(self) -> int:
        """
        Tokens of a padded micro-batch: the budget counts real tokens, and every sequence takes the full length.

        The shorter the sequences, the more of them share a micro-batch. Where their mean length is not known, all of a
        rank's sequences may.
        """
        if self.lengths.mean is None:
            return self.local_sequences * self.max_length
        return ceil_div(self._budget_group(), self.lengths.mean) * self.max_length

    def accumulates(self) -> bool:
        """Whether the pass takes more than one micro-batch."""
        if self.dynamic:
            mean = self.lengths.mean or self.longest
            return self.local_sequences * mean > self.budget * self.sequence_parallel
        return self.micro_batch is not None and self.micro_batch < self.local_sequences

    def count(self) -> int:
        """Return how many micro-batches the pass takes, with sequences of their mean length."""
        if self.dynamic:
            tokens = self.local_sequences * (self.lengths.mean or self.longest)
            return max(1, ceil_div(tokens, self.budget * self.sequence_parallel))
        return 1 if self.micro_batch is None else ceil_div(self.local_sequences, self.micro_batch)

    def _sequences_tokens(self, sequences: int) -> int:
        """
        Return the tokens of ``sequences`` sequences together.

            B = 1:  max        B > 1:  B · mean + √B · (max - mean) / 2, never above B · max

        The second term is two standard deviations of the sum where one is a quarter of the range.
        """
        longest = self.longest if self.packed else self.max_length
        mean = self.lengths.mean
        if not self.packed or mean is None or mean >= longest or sequences <= 1:
            return sequences * longest
        return min(sequences * longest, ceil(sequences * mean + sqrt(sequences) * (longest - mean) / 2))
