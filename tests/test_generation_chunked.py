"""The loop that apps use: every answer, in order, the same samples whatever the chunks, and nothing lost when memory runs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.generation.chunked import (
    GenerationOutOfMemory,
    generate_in_chunks,
    is_out_of_memory,
    iterate_in_chunks,
)
from hydra_plugins.memfit.generation.sampler import OwnDraws, sampling_chain, sequence_seed

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [31, 32]]
SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12, "seed": 3}
CHUNKS = [(None, None), (1, 1), (1, 3), (2, 4), (3, 2), (4, 7), (9, 9)]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A two-layer Llama in fp32 whose weights come from a fixed seed."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    yield transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_num_threads(threads)


class Hunger:
    """A model on a device whose allocator fails for more than ``limit`` rows at once; lists the rows of each forward."""

    def __init__(self) -> None:
        self.limit = 3
        self.rows: list[int] = []

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        self.rows.append(kwargs["input_ids"].shape[0])
        if self.rows[-1] > self.limit:
            torch.empty(1 << 60, dtype=torch.uint8)

    @property
    def failed(self) -> list[int]:
        """Rows of the forwards that failed."""
        return [rows for rows in self.rows if rows > 3]


@pytest.fixture
def hungry(model: Any) -> Iterator[Hunger]:
    """Let torch's own allocator fail for more than three rows at once."""
    hunger = Hunger()
    handle = model.register_forward_pre_hook(hunger, with_kwargs=True)
    yield hunger
    handle.remove()


@pytest.mark.verl
class TestSampling:
    """What is promised about the samples."""

    @pytest.mark.parametrize(("micro_batch_size", "chunk_size"), CHUNKS)
    def test_same_samples_whatever_the_chunks(
        self, model: Any, micro_batch_size: int | None, chunk_size: int | None
    ) -> None:
        """In fp32 on one device the answers are equal, token for token, for every chunking."""
        whole = generate_in_chunks(model, PROMPTS, num_return_sequences=7, **SAMPLE)
        parts = generate_in_chunks(
            model,
            PROMPTS,
            num_return_sequences=7,
            micro_batch_size=micro_batch_size,
            chunk_size=chunk_size,
            **SAMPLE,
        )

        assert parts == whole
        assert [len(answers) for answers in whole] == [7] * 4
        assert len({answer for answers in whole for answer in answers}) > 20

    def test_more_answers_keep_the_first_ones(self, model: Any) -> None:
        """Asking for more answers later repeats those that are there and adds to them."""
        few = generate_in_chunks(model, PROMPTS, num_return_sequences=2, **SAMPLE)
        many = generate_in_chunks(model, PROMPTS, num_return_sequences=5, chunk_size=2, **SAMPLE)

        assert [answers[:2] for answers in many] == few

    def test_another_seed_gives_other_answers(self, model: Any) -> None:
        """The seed reaches the draws."""
        one = generate_in_chunks(model, PROMPTS, **SAMPLE)
        other = generate_in_chunks(model, PROMPTS, **{**SAMPLE, "seed": 4})

        assert one != other

    def test_global_random_state_is_left_alone(self, model: Any) -> None:
        """Neither sampling nor beam sampling moves torch's own generator."""
        import torch

        before = torch.random.get_rng_state()
        generate_in_chunks(model, PROMPTS, **SAMPLE)
        generate_in_chunks(model, PROMPTS, **{**SAMPLE, "num_beams": 2})

        assert torch.equal(before, torch.random.get_rng_state())

    def test_one_candidate_is_greedy_search(self, model: Any) -> None:
        """top_k=1 leaves one token: the answers are those of transformers' greedy search."""
        import torch

        sampled = generate_in_chunks(model, PROMPTS, do_sample=True, top_k=1, max_new_tokens=10)
        for prompt, (answer,) in zip(PROMPTS, sampled, strict=True):
            greedy = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)[0, len(prompt) :]
            assert answer == tuple(greedy.tolist())

    def test_draws_follow_the_softmax(self) -> None:
        """The share of each token is its probability, within four standard deviations of 20000 draws."""
        import torch

        scores = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
        count = 20_000
        drawn = OwnDraws([sequence_seed(0, 0, i) for i in range(count)], "cpu")(None, scores.repeat(count, 1))
        shares = Counter(drawn.argmax(dim=-1).tolist())

        for token, probability in enumerate(torch.softmax(scores, dim=0).tolist()):
            spread = 4 * (probability * (1 - probability) / count) ** 0.5
            assert abs(shares[token] / count - probability) <= spread, token

    def test_warpers_are_those_of_transformers(self, model: Any) -> None:
        """An unset top_k means 50, as in generate; neutral values add no work; the draw comes last."""
        from transformers import GenerationConfig

        config = GenerationConfig(do_sample=True, temperature=0.7, top_k=50, top_p=1.0, min_p=0.1)
        names = [type(step).__name__ for step in sampling_chain(config, [1], "cpu")]

        assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "OwnDraws"]

    def test_settings_that_would_be_lost_are_refused(self, model: Any) -> None:
        """A way of sampling that the chain does not have is an error, not another distribution."""
        with pytest.raises(ConfigError, match="eta_cutoff"):
            generate_in_chunks(model, PROMPTS, **{**SAMPLE, "eta_cutoff": 0.1})

    def test_static_cache_gives_the_same_answers(self, model: Any) -> None:
        """What else generate takes is passed on."""
        dynamic = generate_in_chunks(model, PROMPTS, num_return_sequences=3, chunk_size=2, **SAMPLE)
        static = generate_in_chunks(
            model, PROMPTS, num_return_sequences=3, chunk_size=2, cache_implementation="static", **SAMPLE
        )

        assert static == dynamic


@pytest.mark.verl
class TestShape:
    """Order, ends, progress, searches."""

    def test_answers_are_ordered_and_trimmed(self, model: Any) -> None:
        """Answers come by question and number, end with the first end of sequence, and hold no padding."""
        answers = list(iterate_in_chunks(model, PROMPTS, num_return_sequences=30, chunk_size=8, **SAMPLE))

        assert [(a.question, a.sequence) for a in answers] == [(q, s) for q in range(4) for s in range(30)]
        for answer in answers:
            assert 2 not in answer.tokens[:-1]
            assert len(answer.tokens) == 12 or answer.tokens[-1] == 2
        assert any(len(answer.tokens) < 12 for answer in answers)

    def test_progress_counts_every_answer(self, model: Any) -> None:
        """The caller's function sees what is done after each chunk."""
        seen: list[tuple[int, int]] = []
        generate_in_chunks(
            model,
            PROMPTS,
            num_return_sequences=3,
            micro_batch_size=2,
            chunk_size=2,
            progress=lambda done, total: seen.append((done, total)),
            **SAMPLE,
        )

        assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]

    def test_bar_is_shown_on_request(self, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """progress=True draws a bar on stderr."""
        generate_in_chunks(model, PROMPTS, progress=True, **SAMPLE)

        assert "4/4" in capsys.readouterr().err

    def test_beam_search_keeps_its_answers_together(self, model: Any) -> None:
        """The answers of a search are those of transformers, whatever the number of questions at once."""
        import torch

        search = {"num_beams": 4, "do_sample": False, "max_new_tokens": 8}
        found = generate_in_chunks(model, PROMPTS, num_return_sequences=3, micro_batch_size=1, **search)
        for prompt, answers in zip(PROMPTS, found, strict=True):
            wanted = model.generate(torch.tensor([prompt]), num_return_sequences=3, **search)[:, len(prompt) :]
            assert [list(a) for a in answers] == [[t for t in row if t != 0] for row in wanted.tolist()]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"num_beams": 4, "num_return_sequences": 4, "chunk_size": 2}, "answers of one beam search come together"),
            ({"do_sample": False, "num_return_sequences": 2}, "equal answers"),
            ({"chunk_size": 0}, "chunk_size=0"),
            ({"micro_batch_size": 1.5}, "micro_batch_size=1.5"),
            ({"num_return_sequences": True}, "num_return_sequences=True"),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, model: Any, options: dict[str, Any], text: str) -> None:
        """The error names the option and the way out."""
        with pytest.raises(ConfigError, match=text):
            generate_in_chunks(model, PROMPTS, max_new_tokens=2, **options)

    def test_no_questions_no_answers(self, model: Any) -> None:
        """An empty list is not an error."""
        assert generate_in_chunks(model, [], **SAMPLE) == []


@pytest.mark.verl
class TestOutOfMemory:
    """A chunk that does not fit is halved; what is done stays done."""

    def test_nothing_is_lost_and_nothing_changes(self, model: Any, hungry: Hunger) -> None:
        """The answers equal those of a run that never failed."""
        found = generate_in_chunks(model, PROMPTS, num_return_sequences=7, **SAMPLE)
        failed = hungry.failed
        calm = generate_in_chunks(model, PROMPTS, num_return_sequences=7, micro_batch_size=1, chunk_size=1, **SAMPLE)

        assert found == calm
        assert failed[0] == 28
        assert hungry.failed == failed

    def test_smaller_size_is_kept(self, model: Any, hungry: Hunger, caplog: pytest.LogCaptureFixture) -> None:
        """After 8, 4 fail once each, no chunk above the limit is tried again, and each step down is logged."""
        generate_in_chunks(model, PROMPTS, num_return_sequences=8, micro_batch_size=1, **SAMPLE)

        assert hungry.failed == [8, 4]
        assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]

    def test_questions_are_halved_once_answers_are_single(self, model: Any, hungry: Hunger) -> None:
        """With one answer each, the questions are split."""
        found = generate_in_chunks(model, PROMPTS, **SAMPLE)

        assert [len(answers) for answers in found] == [1] * 4
        assert hungry.failed == [4]

    def test_beam_search_splits_questions_alone(self, model: Any, hungry: Hunger) -> None:
        """Two questions of three beams do not fit, one does."""
        found = generate_in_chunks(
            model, PROMPTS, num_beams=3, num_return_sequences=3, micro_batch_size=2, max_new_tokens=4
        )

        assert [len(answers) for answers in found] == [3] * 4
        assert hungry.failed == [6]

    def test_one_sequence_that_does_not_fit_is_an_error(self, model: Any, hungry: Hunger) -> None:
        """A search whose beams do not fit cannot be split: the error says which question, and what to lower."""
        with pytest.raises(GenerationOutOfMemory, match="question 0: a search with 4 beams of 3 prompt tokens"):
            generate_in_chunks(model, PROMPTS, num_beams=4, max_new_tokens=4)

    def test_finished_questions_are_handed_out_before_the_failure(self, model: Any, hungry: Hunger) -> None:
        """A caller that writes as it goes has every question that was complete."""

        def tighten(done: int, total: int) -> None:
            hungry.limit = 0 if done == 2 else 3

        kept = []
        with pytest.raises(GenerationOutOfMemory, match="question 2"):
            for answer in iterate_in_chunks(model, PROMPTS, micro_batch_size=1, progress=tighten, **SAMPLE):
                kept.append(answer.question)

        assert kept == [0, 1]

    def test_other_errors_are_not_swallowed(self, model: Any) -> None:
        """Only an exhausted allocator is an out-of-memory."""
        with pytest.raises(ValueError, match="not_an_option"):
            generate_in_chunks(model, PROMPTS, not_an_option=1, **SAMPLE)

    def test_allocator_errors_are_recognised(self) -> None:
        """The CPU allocator's own error, torch's, and Python's count; an ordinary RuntimeError does not."""
        import torch

        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60, dtype=torch.uint8)

        assert is_out_of_memory(caught.value)
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        assert is_out_of_memory(MemoryError())
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_sequence_seeds_are_distinct_and_stable() -> None:
    """Each (seed, question, sequence) has its own seed, and it is the same on every machine."""
    seeds = {sequence_seed(s, q, i) for s in range(5) for q in range(20) for i in range(20)}

    assert len(seeds) == 2000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sequence_seed(0, 0, 0) == 3051931488724851722
