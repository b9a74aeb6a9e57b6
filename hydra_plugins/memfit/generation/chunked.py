"""Generate many answers to many questions in chunks that fit, in order, reproducibly, and without losing any.

    from hydra_plugins.memfit.generation.chunked import generate_in_chunks

    answers = generate_in_chunks(
        model, prompts, num_return_sequences=15, micro_batch_size=cfg.generation.micro_batch_size,
        chunk_size=cfg.generation.chunk_size, seed=0, pad_token_id=tokenizer.pad_token_id, max_new_tokens=120,
    )

``answers[q][i]`` are the new tokens of the i-th answer to question q, without prompt and padding.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError
from hydra_plugins.memfit.generation.sampler import DEFAULTS, make_greedy, sampling_chain, sequence_seed

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each chunk with the answers that are done and the answers in all."""


class GenerationOutOfMemory(MemfitError):
    """One sequence alone does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One generated sequence."""

    question: int
    """Index of the prompt."""
    sequence: int
    """Number of the answer to that prompt, from 0."""
    tokens: tuple[int, ...]
    """New tokens up to and with the first end-of-sequence token; no prompt, no padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rectangle:
    """Questions ``first..first+questions`` x answers ``start..start+sequences``: what one call of generate makes."""

    first: int
    questions: int
    start: int
    sequences: int

    @property
    def rows(self) -> int:
        """Sequences that it makes."""
        return self.questions * self.sequences

    def halves(self, *, keep_answers: bool) -> tuple[_Rectangle, _Rectangle]:
        """Split the answers of each question in two, or the questions where there is one answer (or it is to be kept whole)."""
        if self.sequences > 1 and not keep_answers:
            left = (self.sequences + 1) // 2
            return (
                replace(self, sequences=left),
                replace(self, start=self.start + left, sequences=self.sequences - left),
            )
        left = (self.questions + 1) // 2
        return replace(self, questions=left), replace(self, first=self.first + left, questions=self.questions - left)


def generate_in_chunks(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[tuple[int, ...]]]:
    """Return all answers, ``[question][sequence]``; options and errors as in `iterate_in_chunks`."""
    answers: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    for answer in iterate_in_chunks(model, prompts, **options):
        answers[answer.question].append(answer.tokens)
    return answers


def iterate_in_chunks(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_return_sequences: int = 1,
    micro_batch_size: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    pad_token_id: int | None = None,
    progress: bool | Progress = False,
    **generate: Any,
) -> Iterator[Answer]:
    """Yield every answer, ordered by question and then by number, as soon as its questions are complete.

    ``prompts`` are token ids without padding; they are padded on the left here. ``micro_batch_size`` questions are asked
    at once (``None``: all), and ``chunk_size`` of their ``num_return_sequences`` answers are generated at once (``None``:
    all). Everything else goes to ``model.generate``.

    When sampling, each answer has its own random numbers, a function of ``seed``, question and number: another chunking
    changes no draw. The answers are then the same wherever the model computes the same logits for a row in another batch.

    A chunk that runs out of memory is halved and tried again, and the smaller size is kept for what follows; what is done
    stays done. Raises `GenerationOutOfMemory` when a single sequence does not fit, `ConfigError` for options that cannot
    be kept.
    """
    wanted = _positive("num_return_sequences", num_return_sequences) or 1
    questions = max(1, min(_positive("micro_batch_size", micro_batch_size) or len(prompts), len(prompts)))
    sequences = min(_positive("chunk_size", chunk_size) or wanted, wanted)
    config = _config(model, wanted, chunk_size, generate)
    pad = _pad_token(config, pad_token_id)
    runner = _Runner(model=model, prompts=prompts, config=config, pad=pad, seed=seed, options=generate)
    report, close = _reporter(progress, len(prompts) * wanted)
    done = 0
    try:
        for batch in _batches(len(prompts), questions, wanted, sequences):
            answers: list[Answer] = []
            for chunk in itertools.chain.from_iterable(map(runner.run, batch)):
                answers += chunk
                done += len(chunk)
                report(done, len(prompts) * wanted)
            yield from sorted(answers, key=lambda a: (a.question, a.sequence))
    finally:
        close()


def _batches(prompts: int, questions: int, wanted: int, sequences: int) -> Iterator[list[_Rectangle]]:
    """Yield the chunks of each micro-batch of questions."""
    for first in range(0, prompts, questions):
        count = min(questions, prompts - first)
        yield [
            _Rectangle(first=first, questions=count, start=start, sequences=min(sequences, wanted - start))
            for start in range(0, wanted, sequences)
        ]


class _Runner:
    """Runs rectangles, halves those that do not fit, and remembers the largest size that does."""

    def __init__(
        self, *, model: Any, prompts: Sequence[Sequence[int]], config: Any, pad: int, seed: int, options: Any
    ) -> None:
        self.model, self.prompts, self.config, self.pad, self.seed = model, prompts, config, pad, seed
        self.options = options
        self.beams = config.num_beams > 1
        self.limit: int | None = None
        """Rows that fitted after a failure; ``None`` while nothing has failed."""

    def run(self, work: _Rectangle) -> Iterator[list[Answer]]:
        """Yield the answers of ``work``, in one chunk or in several smaller ones."""
        pending = [work]
        while pending:
            part = pending.pop(0)
            whole = part.questions == 1 and (self.beams or part.sequences == 1)
            if self.limit is not None and part.rows > self.limit and not whole:
                pending[:0] = part.halves(keep_answers=self.beams)
                continue
            answers = self._attempt(part)
            if answers is not None:
                yield answers
                continue
            _release(self.model)
            if whole:
                raise GenerationOutOfMemory(self._refusal(part))
            self.limit = (part.rows + 1) // 2
            logger.warning("a chunk of %d sequences ran out of memory; going on with %d at once", part.rows, self.limit)
            pending[:0] = part.halves(keep_answers=self.beams)

    def _refusal(self, part: _Rectangle) -> str:
        what = f"a search with {self.config.num_beams} beams" if self.beams else "one sequence"
        new = self.config.max_new_tokens or f"up to {self.config.max_length}"
        return (
            f"question {part.first}: {what} of {len(self.prompts[part.first])} prompt tokens and {new} new ones does not "
            "fit in memory. Lower max_new_tokens, free the GPU of other processes, or take a smaller model or a larger GPU."
        )

    def _attempt(self, part: _Rectangle) -> list[Answer] | None:
        """Return the answers, or None when memory ran out (the exception, and all that it keeps alive, is gone by then)."""
        try:
            return self._generate(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _generate(self, part: _Rectangle) -> list[Answer]:
        names = [
            (question, sequence)
            for question in range(part.first, part.first + part.questions)
            for sequence in range(part.start, part.start + part.sequences)
        ]
        config, extra = copy.deepcopy(self.config), dict(self.options)
        ids, mask = self._batch(range(part.first, part.first + part.questions), 1 if self.beams else part.sequences)
        config.num_return_sequences = part.sequences if self.beams else 1
        if config.do_sample and not self.beams:
            chain = sampling_chain(config, [sequence_seed(self.seed, *name) for name in names], ids.device)
            extra["logits_processor"] = [*extra.get("logits_processor", ()), *chain]
            make_greedy(config)
        with self._seeded(part):
            out = self.model.generate(ids, attention_mask=mask, generation_config=config, **extra)
        rows = getattr(out, "sequences", out)[:, ids.shape[1] :].tolist()
        ends = _ends(config)
        return [
            Answer(question=q, sequence=s, tokens=_trim(row, ends)) for (q, s), row in zip(names, rows, strict=True)
        ]

    @contextlib.contextmanager
    def _seeded(self, part: _Rectangle) -> Iterator[None]:
        """Seed torch's own generator for a beam search that samples, and put it back as it was."""
        import torch

        if not (self.beams and self.config.do_sample):
            yield
            return
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sequence_seed(self.seed, part.first, part.start))
            yield

    def _batch(self, questions: Sequence[int], repeat: int) -> tuple[Any, Any]:
        """Return ids and mask of the questions, padded on the left, each repeated."""
        import torch

        chosen = [list(self.prompts[q]) for q in questions]
        length = max(map(len, chosen))
        ids = torch.tensor([[self.pad] * (length - len(p)) + p for p in chosen], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in chosen], device=self.model.device)
        return ids.repeat_interleave(repeat, dim=0), mask.repeat_interleave(repeat, dim=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the accelerator's (or the host's) allocator gave up: accelerate's own judgement where it is installed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    try:
        accelerate: Any = importlib.import_module("accelerate.utils.memory")
    except ImportError:
        said = str(error)
        return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    return isinstance(error, Exception) and bool(accelerate.should_reduce_batch_size(error))


def _release(model: Any) -> None:
    """Give back what the failed call left behind: a static cache kept on the model, garbage, cached blocks."""
    import torch

    if hasattr(model, "_cache"):
        del model._cache
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _config(model: Any, num_return_sequences: int, chunk_size: int | None, generate: dict[str, Any]) -> Any:
    """Return the generation config of the run and take its fields out of ``generate``.

    As in transformers: what is given goes before the model's own config, and that before the defaults.
    """
    transformers: Any = importlib.import_module("transformers")
    given = generate.pop("generation_config", None)
    config = copy.deepcopy(given) if given is not None else transformers.GenerationConfig()
    own = model.generation_config.to_dict()
    for name in ("eos_token_id", "pad_token_id", *DEFAULTS):
        if given is None or getattr(config, name, None) is None:
            setattr(config, name, own[name] if own.get(name) is not None else DEFAULTS.get(name))
    for name in [name for name in generate if hasattr(config, name)]:
        setattr(config, name, generate.pop(name))
    _refuse(config, num_return_sequences, chunk_size)
    return config


def _refuse(config: Any, num_return_sequences: int, chunk_size: int | None) -> None:
    if config.num_beams > 1 and chunk_size is not None and chunk_size < num_return_sequences:
        raise ConfigError(
            f"chunk_size={chunk_size} is less than num_return_sequences={num_return_sequences} with "
            f"num_beams={config.num_beams}: the answers of one beam search come together. Leave chunk_size unset and "
            "lower micro_batch_size."
        )
    if config.num_beams == 1 and not config.do_sample and num_return_sequences > 1:
        raise ConfigError(
            f"num_return_sequences={num_return_sequences} without sampling would be {num_return_sequences} equal answers. "
            "Set do_sample=True, or num_return_sequences=1."
        )


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}={value!r} is not a whole number from 1 on. Leave it unset (None) for all at once.")
    return value


def _pad_token(config: Any, pad_token_id: int | None) -> int:
    """Return the padding token and write it into the config: given, configured, or the first end of sequence."""
    found = pad_token_id if pad_token_id is not None else config.pad_token_id
    config.pad_token_id = found if found is not None else next(iter(_ends(config)), 0)
    return int(config.pad_token_id)


def _ends(config: Any) -> tuple[int, ...]:
    ends = config.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def _trim(tokens: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[: place + 1])
    return tuple(tokens)


def _reporter(progress: bool | Progress, total: int) -> tuple[Progress, Callable[[], None]]:
    """Return what to call after each chunk and at the end: nothing, the caller's function, or a tqdm bar on stderr."""
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda done, total: None, lambda: None
    bar: Any = importlib.import_module("tqdm.auto").tqdm(total=total, unit="answer")
    return lambda done, total: bar.update(done - bar.n) and None, bar.close
