"""Which tensor it was: sizes of messages taken apart into the dimensions of a launch."""

from __future__ import annotations

import pytest

from hydra_plugins.memfit.base.units import MIB
from hydra_plugins.memfit.diagnosis.amount import Amount, parse_amount
from hydra_plugins.memfit.diagnosis.devices import by_capacity, exact_capacity
from hydra_plugins.memfit.diagnosis.terms import block_bytes, readings
from hydra_plugins.memfit.diagnosis.tokens import sequence_lengths, token_counts
from hydra_plugins.memfit.hardware import catalog
from hydra_plugins.memfit.model.resolve import load


@pytest.mark.parametrize(
    ("text", "num_bytes", "slack"),
    [
        ("13.91 GiB", 14935748772, 5368710),
        ("572.50 MiB", 600309760, 5243),
        ("0 bytes", 0, 0),
        ("4770354232 bytes", 4770354232, 0),
        ("21.95G", 23568633037, 5368710),
        ("164992kB", 168951808, 512),
        ("32.53GB", 34928821535, 5368710),
    ],
)
def test_sizes_are_read_with_their_rounding(text: str, num_bytes: int, slack: int) -> None:
    """Every program's unit is binary; what was rounded away is half of the last digit."""
    assert parse_amount(text) == Amount(num_bytes=num_bytes, slack_bytes=slack)


@pytest.mark.parametrize("text", ["", "GiB", "12", "1.2.3 GiB", "1e9 bytes", "12 EiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A text without a number and a known unit is an error, not 0."""
    with pytest.raises(ValueError, match="no size"):
        parse_amount(text)


@pytest.mark.parametrize(
    ("tensor", "block"), [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 1, 20), (10 * MIB, 10), (10 * MIB + 1, 12)]
)
def test_torch_takes_blocks(tensor: int, block: int) -> None:
    """What a message names is the block in MiB that torch asks the device for."""
    assert block_bytes(tensor) == block * MIB


@pytest.mark.parametrize(
    ("size", "model", "ranks", "tokens", "what", "formula"),
    [
        ("13.91 GiB", "qwen3-32b", 8, 24576, "one fp32 copy of the logits", "24576 tokens x 151936 x 4 B"),
        ("48.00 MiB", "qwen2.5-0.5b", 1, 5120, "one projection of a layer's MLP, bf16", "5120 tokens x 4864 x 2 B"),
        (
            "1.44 GiB", "qwen2.5-3b", 8, 512, "one rank's shard of all parameters, fp32",
            "3085938688 parameters x 4 B / 8 ranks",
        ),
        (
            "594.00 MiB", "qwen2.5-3b", 1, 512, "the vocabulary matrix (embedding or lm_head), bf16",
            "311164928 parameters x 2 B",
        ),
    ],
)  # fmt: skip
def test_a_size_is_named(size: str, model: str, ranks: int, tokens: int, what: str, formula: str) -> None:
    """With a launch the first reading is exact: each factor is one of its dimensions. The first two are public messages."""
    first = readings(parse_amount(size), model=load(model), ranks=ranks, tokens={tokens: "key"})[0]
    assert (first.what, first.formula, first.certain) == (what, formula, True)


def test_padded_sequences_are_recognised() -> None:
    """A number of tokens that no key names may be whole padded responses (a public message of a launch with 512 of them)."""
    found = readings(
        parse_amount("4.93 GiB"), model=load("qwen2.5-1.5b"), lengths=(512, 2560), tokens={20480: "key"}, in_loss=True
    )
    assert "one bf16 copy of the logits of 34 padded sequences of 512 tokens" in [term.what for term in found]
    assert not any(term.certain for term in found)


def test_without_a_launch_a_reading_is_a_guess() -> None:
    """In a loss function whole thousands of tokens of a common vocabulary are offered, as a guess; elsewhere nothing is."""
    size = parse_amount("13.91 GiB")
    guess = readings(size, vocabularies=(151936, 128256), in_loss=True)[0]
    assert (guess.formula, guess.certain) == ("24576 tokens x 151936 x 4 B", False)
    assert readings(size, vocabularies=(151936,), in_loss=False) == ()


@pytest.mark.parametrize("size", ["2.00 MiB", "20.00 MiB"])
def test_a_small_block_is_not_read(size: str) -> None:
    """Many tensors share torch's small blocks: there is nothing to tell."""
    assert readings(parse_amount(size), model=load("qwen2.5-0.5b"), tokens={4096: "key"}, in_loss=True) == ()


def test_a_size_that_fits_nothing_is_not_named() -> None:
    """No reading is better than a wrong one."""
    assert readings(parse_amount("7.77 GiB"), model=load("qwen2.5-0.5b"), tokens={5120: "key"}) == ()


def test_the_keys_of_the_phase_name_the_tokens() -> None:
    """Two keys with one product: the one that the failing phase reads is shown."""
    leaves = {
        "data.max_prompt_length": 1024,
        "data.max_response_length": 3072,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 16384,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
    }
    old, update = token_counts(leaves, "old_log_prob"), token_counts(leaves, "update_actor")
    assert old[8192] == "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2 x (prompt + response 4096)"
    assert update[8192] == "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2 x (prompt + response 4096)"
    assert update[16384] == "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"
    assert sequence_lengths(leaves) == (3072, 4096)
    critic = {"critic.ppo_max_token_len_per_gpu": 32768}
    assert token_counts(critic, "update_actor") == {} and 32768 in token_counts(critic, "update_critic")
    assert token_counts({}, None) == {} and sequence_lengths({}) == ()


@pytest.mark.parametrize(
    ("capacity", "names"),
    [
        ("139.72 GiB", {"h200"}),
        ("44.42 GiB", {"a40"}),
        ("23.69 GiB", {"rtx3090"}),
        ("79.15 GiB", {"a100-80", "a800", "h100", "h800"}),
        ("6.00 GiB", set()),
    ],
)
def test_the_capacity_tells_the_product(capacity: str, names: set[str]) -> None:
    """Products share sizes, so there may be several; a size that nobody knows is none of them."""
    assert set(by_capacity(parse_amount(capacity))) == names


def test_another_capacity_than_the_files_is_planned_with() -> None:
    """A driver that leaves less is taken at its word, rounded down; the file's own value stays where the message agrees."""
    assert exact_capacity("h200", parse_amount("139.70 GiB")) is None
    smaller = exact_capacity("h200", parse_amount("139.50 GiB"))
    assert smaller is not None and smaller < catalog.load("h200").capacity_bytes - 150 * MIB
