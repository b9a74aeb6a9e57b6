"""The formulas for Hugging Face generate: against traces of the real thing, against hand calculation, and their direction."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.frameworks.transformers.keys import KEYS
from hydra_plugins.memfit.memory.generation import Call, Software, kv_cache_bytes, peak, process
from hydra_plugins.memfit.memory.sampling import Sampler, sort_scratch_bytes
from support.generation_fragmentation import Loop, OutOfMemory, needed_share, replay
from support.generation_specs import shapes, spec
from support.generation_validation import error, traces

DOCS = Path(__file__).parents[1] / "docs"
TRACES = traces()
# What the project asks of this formula; the traces leave out what no tensor of the model's code is.
MEDIAN, WORST = 0.02, 0.08

QWEN = spec("qwen2.5-1.5b", 1_543_714_304)
CALL = Call(rows=15, prompt_tokens=200, new_tokens=120)


@pytest.mark.parametrize("without_weights", [False, True])
@pytest.mark.parametrize("split", ["fit", "held_out"])
def test_formulas_agree_with_traces_of_the_real_generate(split: str, without_weights: bool) -> None:
    """On every traced case the peak is within the bounds, also when the weights, which are easy, are taken out."""
    rows = [row for row in TRACES if row["split"] == split]
    errors = {json.dumps(row["case"]): abs(error(row, without_weights=without_weights)) for row in rows}

    assert len(rows) >= 60
    assert statistics.median(errors.values()) <= MEDIAN
    assert max(errors.values()) <= WORST, max(errors, key=lambda name: errors[name])


def test_documented_keys_are_those_of_the_adapter() -> None:
    """Every name that can be mapped, and every key that is looked at, is in docs/generation.md."""
    text = (DOCS / "generation.md").read_text()

    for name, places in KEYS.items():
        assert f"| `{name}` | {', '.join(f'`{place}`' for place in places)} |" in text


def test_traces_cover_what_the_formulas_distinguish() -> None:
    """Each branch of the formulas is met by traced cases."""
    for key, values in {
        "attention": ("sdpa", "eager", "flash_attention_2"),
        "cache": ("dynamic", "static"),
        "padded": (True, False),
        "do_sample": (True, False),
        "model": tuple(name for name in shapes() if not name.startswith("tiny")),
    }.items():
        for value in values:
            assert sum(row["case"][key] == value for row in TRACES) >= 2, f"{key}={value}"
    assert sum(row["case"]["beams"] > 1 for row in TRACES) >= 9
    assert sum(row["case"]["top_p"] < 1 for row in TRACES) >= 9


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # 2 x 28 layers x 2 heads x 128 x 2 bytes = 28672 a token; 15 rows; 319 tokens
        ({}, 28_672 * 15 * 319),
        ({"cache": "static"}, 28_672 * 15 * 319),
        ({"element_bytes": 4}, 2 * 28_672 * 15 * 319),
        ({"cache": "none"}, 0),
        # two layers of 28 stay on the GPU
        ({"cache": "offloaded"}, 28_672 * 15 * 319 * 2 // 28),
    ],
)
def test_kv_cache_by_hand(change: dict[str, Any], expected: int) -> None:
    """The cache of Qwen2.5-1.5B is what a hand calculation gives."""
    assert kv_cache_bytes(QWEN, replace(CALL, **change), tokens=319) == expected


def test_sliding_window_bounds_the_cache_of_sliding_layers_alone() -> None:
    """A window bounds what decode keeps; the prefill keeps the whole prompt; old releases keep everything."""
    mistral = spec("mistral-7b-v0.1", 7_241_732_096)
    long = Call(rows=1, prompt_tokens=8192, new_tokens=512)
    per_token = 2 * 32 * 8 * 128 * 2

    assert kv_cache_bytes(mistral, long, tokens=8703) == per_token * 4096
    assert kv_cache_bytes(mistral, long, tokens=8192, prefill=True) == per_token * 8192
    old = replace(long, software=Software(sliding_cache=False))
    assert kv_cache_bytes(mistral, old, tokens=8703) == per_token * 8703
    mixed = replace(mistral, num_full_attention_layers=16)
    assert kv_cache_bytes(mixed, long, tokens=8703) == per_token // 2 * (4096 + 8703)


def test_latent_attention_caches_the_expanded_heads() -> None:
    """transformers caches what DeepSeek's attention multiplies, not the compressed latent that vLLM caches."""
    latent = replace(QWEN, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)

    assert kv_cache_bytes(latent, CALL, tokens=10) == 2 * 28 * 12 * (192 + 128) * 15 * 10


@pytest.mark.parametrize(
    "more",
    [
        {"rows": 16},
        {"prompt_tokens": 4000},
        {"new_tokens": 2000},
        {"element_bytes": 4},
        {"padded": True},
        {"attention": "eager"},
        {"cache": "static", "padded": True},
        {"sampler": Sampler(temperature=True)},
        {"sampler": Sampler(temperature=True, top_k=True)},
        {"sampler": Sampler(top_p=True)},
        {"sampler": Sampler(keeps_scores=True)},
        {"software": Software(upcast_logits=True)},
        {"software": Software(upcast_logits=True, all_logits=True)},
        {"software": Software(grouped_query_sdpa=False)},
    ],
)
def test_more_of_anything_never_needs_less(more: dict[str, Any]) -> None:
    """No option that keeps more tensors alive lowers the peak."""
    assert peak(QWEN, replace(CALL, **more)).total_bytes >= peak(QWEN, CALL).total_bytes


def test_each_more_row_needs_more() -> None:
    """Strictly monotone in the rows: what the planner halves is what relieves the GPU."""
    peaks = [peak(QWEN, replace(CALL, rows=rows)).total_bytes for rows in range(1, 200)]

    assert peaks == sorted(set(peaks))


def test_logits_of_the_whole_prompt_dominate_old_releases() -> None:
    """Before 4.45 the prefill holds bf16 and fp32 logits of every position: 6 bytes x V a prompt token."""
    old = replace(CALL, prompt_tokens=4000, software=Software(all_logits=True, upcast_logits=True))

    assert peak(QWEN, old).logits == 6 * 151_936 * 15 * 4000


def test_beams_multiply_rows_and_not_the_sampler() -> None:
    """A search that samples holds 16 bytes a score; a greedy one 12 or the logits and two fp32 copies."""
    greedy = replace(CALL, prompt_tokens=1, new_tokens=2, sampler=Sampler(do_sample=False, beams=True))
    sampled = replace(CALL, prompt_tokens=1, new_tokens=2, sampler=Sampler(do_sample=True, beams=True))

    assert peak(QWEN, greedy).logits == (2 + 12) * 151_936 * 15
    assert peak(QWEN, sampled).logits == 16 * 151_936 * 15


@pytest.mark.parametrize(("rows", "expected"), [(1, 20), (2, 32), (127, 32), (128, 20)])
def test_sort_scratch_follows_the_branches_of_the_kernel(rows: int, expected: int) -> None:
    """One row and 128 rows are sorted row by row, what lies between as one list."""
    assert sort_scratch_bytes(rows) == expected


@pytest.mark.parametrize(
    ("cache", "expandable", "share"),
    [("dynamic", False, 0.26), ("dynamic", True, 0.23), ("static", False, 0.06), ("static", True, 0.01)],
)
def test_process_adds_context_and_fragmentation_of_what_moves(cache: str, expandable: bool, share: float) -> None:
    """The process holds the tensors, a context, and a share of all but the weights; a cache that grows leaves more holes."""
    made = replace(CALL, cache=cache)
    tensors, whole = peak(QWEN, made), process(QWEN, made, expandable_segments=expandable)

    assert whole.context > 0
    assert whole.fragmentation == int((tensors.total_bytes - tensors.weights) * share)
    assert whole.total_bytes == tensors.total_bytes + whole.context + whole.fragmentation


@pytest.mark.parametrize("expandable", [False, True])
def test_growing_cache_fragments_a_full_gpu(expandable: bool) -> None:
    """On the allocator's model, a decode whose cache grows needs more than its tensors, and with that much it runs."""
    loop = Loop(rows=4, prompt=64, new=40, layers=6, kv=256, vocabulary=4096, hidden=256, mlp=1024)
    needed = needed_share(loop, expandable=expandable)

    assert 1.0 < needed < 1.9
    replay(loop, limit=int(replay(loop) * needed), expandable=expandable)
    with pytest.raises(OutOfMemory):
        replay(loop, limit=replay(loop) - 1)


def test_experts_are_copied_for_each_row_in_decode() -> None:
    """On transformers 5 a sampling step holds three matrices of each chosen expert for each row; a search never does."""
    moe = spec("qwen3-30b-a3b", 30_532_122_624)
    many = Call(rows=64, prompt_tokens=1, new_tokens=2)
    copied = 64 * 8 * 3 * 768 * 2048 * 2

    assert peak(moe, many).activations == pytest.approx(copied, rel=0.01)
    search = replace(many, sampler=Sampler(do_sample=False, beams=True))
    assert peak(moe, search).activations < copied / 10
    old = replace(many, software=Software(batched_experts=False))
    assert peak(moe, old).activations < copied / 10
