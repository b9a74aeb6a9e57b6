"""The scores of one decoding step of Hugging Face ``generate``: everything of shape (B, V).

Symbols: B sequences in the batch (beams included), V vocabulary, b bytes of one element of the model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
INT64 = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How the next token is chosen; flags say which processors of the scores run."""

    do_sample: bool = True
    temperature: bool = False
    """Temperature is set and not 1."""
    top_k: bool = False
    top_p: bool = False
    beams: bool = False
    """Beam search: the scores of a step outlive it."""
    keeps_scores: bool = False
    """``output_scores`` or ``output_logits``: one fp32 (B, V) tensor stays for each token."""

    @property
    def processed(self) -> bool:
        """Whether any processor makes new scores."""
        return self.do_sample and (self.temperature or self.top_k or self.top_p)


def held_scores(sampler: Sampler) -> int:
    """
    Return the fp32 (B, V) tensors of one step that are alive in the next forward.

    ``_sample`` binds the raw logits, the processed scores and the probabilities to names, ``_beam_search`` the logits and
    the accumulated log-probabilities; a name keeps its tensor until it is bound again.
    """
    if sampler.beams:
        return 2
    return 1 + sampler.processed + sampler.do_sample


def sampler_bytes(sampler: Sampler, *, rows: int, held: int, logits: int) -> int:
    """
    Return the bytes for each of the B · V scores while the next token is chosen; ``logits`` is an element of the model's own.

        greedy        b + 4                      the logits and their fp32 copy
        sampling      b + 4 + 4p + 8             copy, processed scores (p = 1 with any processor), probabilities, draws
        temperature   b + 8
        top-k         b + 8 + 4i + 1             one more copy and a boolean
        top-p         b + 4 + 4i + 12 + scratch  sorted scores (4) and indices (8), and the sort's own scratch
        beam search   b + 8, or 12; 16 when it samples: logits, log-probabilities, sums, probabilities, draws

    i = 1 where another processor made new scores before. The step before still holds `held` tensors (4 each), until the
    same names are bound again.
    Source: ``GenerationMixin._sample``, ``_beam_search``, ``logits_process.py``; ATen ``multinomial`` and
    ``SortStable.cu`` (`sort_scratch_bytes`).
    """
    if sampler.beams:
        chosen = max(logits + FP32 * (2 + (held > 0)), FP32 * (4 if sampler.do_sample else 3))
        return max(chosen, logits + FP32 + max(_processor_stages(sampler, rows), default=0))
    if not sampler.do_sample:
        return logits + FP32 * (1 + (held > 0))
    before = FP32 * (held - 1) if sampler.processed and held else 0
    stages = [FP32 * (1 + held), FP32 * (3 + sampler.processed)]
    stages += [before + stage for stage in _processor_stages(sampler, rows)]
    return logits + max(stages)


def _processor_stages(sampler: Sampler, rows: int) -> list[int]:
    """Bytes a score while each processor runs, with the scores that the chain was given."""
    if not sampler.do_sample:
        return []
    stages = [FP32]
    if sampler.temperature:
        stages.append(2 * FP32)
    if sampler.top_k:
        stages.append(2 * FP32 + FP32 * sampler.temperature + 1)
    if sampler.top_p:
        earlier = FP32 * (sampler.temperature or sampler.top_k)
        stages.append(2 * FP32 + earlier + INT64 + sort_scratch_bytes(rows))
    return stages


def sort_scratch_bytes(rows: int) -> int:
    """
    Return the scratch of CUDA's sort for each score of (rows, V) scores, V > 4096.

        2..127 rows   32    sorted as one list: two (index, row) pairs of 8 bytes, and cub's copy of key and pair
        else          20    row by row: int64 indices, and cub's copy of key and index

    Source: ATen/native/cuda/SortStable.cu; cub's own temporaries are assumed to be one copy of what is sorted.
    """
    return 32 if 1 < rows < 128 else 20
