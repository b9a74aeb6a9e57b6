"""Megatron's formulas against op-level traces of megatron-core, its published sum, and mbridge's four measured points.

``support.validate`` writes docs/validation/megatron.md from here. Traces: tests/data/megatron_traces.json
(``python -m tracer.megatron_data``). Nothing is fitted to any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.memory.megatron import Layout, Optimizer, Split, Stage, held, stages
from hydra_plugins.memfit.memory.megatron_layers import Layer, Recompute, kept_bytes
from hydra_plugins.memfit.memory.megatron_pass import StagePass, VocabularyHead, forward_moments, update_moments
from hydra_plugins.memfit.memory.trainer import peak
from hydra_plugins.memfit.model.resolve import load
from hydra_plugins.memfit.model.spec import ModelSpec
from support.trainer_validation import Comparison, summary

TRACES = Path(__file__).resolve().parents[1] / "data" / "megatron_traces.json"


def rows() -> list[dict[str, Any]]:
    """Return the traced rows."""
    found: list[dict[str, Any]] = json.loads(TRACES.read_text(encoding="utf-8"))["rows"]
    return found


def comparisons() -> Iterator[Comparison]:
    """Yield every phase of every traced stage, predicted and traced."""
    for row in rows():
        predicted = predict(row["case"])
        for phase, traced in row["phases"].items():
            yield Comparison(row["case"], "", phase, traced["peak_allocated_bytes"], predicted[phase])


def predict(case: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of the rank's tensors at the peak of each phase: parameters, gradient buffer, and the pass."""
    pass_ = _pass(case)
    params = held(pass_.model, pass_.layout, pass_.stage)
    states = (2 + Optimizer().gradient_bytes) * params.total
    forward = replace(pass_, head=replace(pass_.head, entropy="whole"))
    return {
        "log_prob": states + peak(forward_moments(forward)).total_bytes,
        "update": states + peak(update_moments(pass_)).total_bytes,
    }


def _pass(case: dict[str, Any]) -> StagePass:
    index, pipeline = (0 if case["first"] else 1), 1 if case["first"] and case["last"] else 3
    model, expert = load(case["model"]), case["expert"]
    layout = Layout(
        world=pipeline * case["tensor"] * expert,
        tensor=case["tensor"],
        expert=expert,
        pipeline=1 if pipeline == 1 else case["in_flight"] + index,
        sequence_parallel=case["sequence_parallel"] and case["tensor"] > 1,
    )
    moe = case["layers"] if model.num_experts else 0
    stage = Stage(index=index, layers=case["layers"], moe_layers=moe, first=case["first"], last=case["last"])
    scaled = case["temperature"]
    return StagePass(
        model=model,
        imbalance=1.0,
        layout=layout,
        stage=stage,
        tokens=case["tokens"],
        micro_batches=case["in_flight"],
        head=VocabularyHead(entropy="whole" if case["entropy"] else "none", copied=scaled, scaled=scaled),
        recompute=Recompute(granularity=case["recompute"]),
    )


# -- published figures ----------------------------------------------------------------------------------------------
MBRIDGE = ((2, 1, 5.3, 1.3), (2, 2, 5.3, 2.7), (1, 1, 8.8, 2.4), (1, 2, 8.8, 5.0))
"""Tensor-parallel size, sequences of 4096 tokens, measured GiB of the model's states and of activations, on 8 GPUs."""


def small_mixtral() -> ModelSpec:
    """Return the model of mbridge's measurements: its sizes are those of the modules that the README prints.

    The README does not say how many heads there are; 32 are assumed, which counts for their log-sum-exp alone.
    """
    h, m, layers, vocabulary, experts = 2048, 5440, 4, 32000, 8
    routed = experts * 3 * h * m
    layer = routed + 12_582_912 + experts * h + 2 * h
    root = 2 * vocabulary * h + h
    return ModelSpec(
        name="mixtral-8x2b, 4 layers",
        source="mbridge memory_estimator/README.md",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        hidden_size=h,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=m,
        num_moe_layers=layers,
        parameters=layers * layer + root,
        embedding_parameters=vocabulary * h,
        root_parameters=root,
        layer_parameters=layer,
        expert_parameters=layers * routed,
        active_parameters=layers * (layer - routed * 3 // 4) + root,
    )


def measured() -> Iterator[tuple[str, float, float, float, float]]:
    """Yield each of mbridge's points: name, states measured and predicted, activations measured and predicted, GiB."""
    model = small_mixtral()
    for tensor, sequences, states, activations in MBRIDGE:
        layout = Layout(world=8, tensor=tensor, expert_tensor=tensor, sequence_parallel=tensor > 1)
        stage = stages(model, layout, Split())[0]
        params = held(model, layout, stage)
        own = 6 * params.total + Optimizer().state_bytes(params, layout)
        pass_ = StagePass(
            model=model,
            layout=layout,
            stage=stage,
            tokens=4096 * sequences,
            head=VocabularyHead(scaled=False, copied=False),
        )
        used = peak(update_moments(pass_)).total_bytes
        yield f"TP {tensor}, {sequences} x 4096 tokens", states, own / GIB, activations, used / GIB


# -- the page -------------------------------------------------------------------------------------------------------
TRACED = """\
`TORCHDYNAMO_DISABLE=1 PYTHONPATH=tests python -m tracer.megatron_data` builds one pipeline stage of real megatron-core modules
(GPTModel with its tensor-parallel linears and checkpointing, Float16Module, vocab-parallel cross entropy, the contiguous
buffers of its DistributedDataParallel) on a process group without a network, and logs every allocation. Norms, attention,
rotary embedding and the fused SwiGLU are stand-ins for kernels of Transformer Engine; so are the grouped product and the fused
permutation of experts, whose router, dispatcher (all-to-all) and layer are Megatron's. Routing is balanced, so the predictions
compared here are too. What is compared is everything that the rank has allocated at its peak: parameters, gradient buffer and
pass. Optimizer, latent attention and DeepEP's dispatcher are not traced. The first comparisons showed forgotten terms: v as a view
of the projection's whole output, two in the forward pass, and the rows on their way to the experts, whose sum over a layer (four
copies of 2h a row) is more than its backward pass holds."""
FORMULA = """\
Megatron-LM's `theoretical_memory_usage.py` has 18 bytes a parameter, 6 + 12 / DP with the distributed optimizer: the same as
here. For activations with sequence parallelism it has 18h + 4m a token and layer, divided by TP:"""
DIFFERENCE = """\
Its 18h include 2h of dropout masks, and count keys and values as wide as queries; its 4m are those of GELU, where SwiGLU
keeps 6m."""


def page() -> str:
    """Return docs/validation/megatron.md."""
    found = list(comparisons())
    made = ", ".join(f"{name} {version}" for name, version in rows()[0]["versions"].items())
    lines = [
        "# Megatron: formulas against traces and published figures",
        "",
        f"Written by `python -m support.validate --write`. Traces: {made}, {rows()[0]['date']}, on CPU tensors without data.",
        *("", "## Op-level traces of megatron-core", "", TRACED, ""),
        "| phase | cases | median error | 95th percentile | lowest | highest |",
        "|---|---|---|---|---|---|",
        *(_summary_row(phase, [c for c in found if c.phase == phase]) for phase in ("log_prob", "update")),
        *("", "The largest errors of all phases; a stage has the embedding, the head, both, or layers alone.", ""),
        "| stage | phase | traced GiB | predicted GiB | error |",
        "|---|---|---|---|---|",
        *(_row(c) for c in sorted(found, key=lambda c: -abs(c.error))[:20]),
        *("", "## Published measurements", ""),
        "mbridge's README (memory_estimator) has four points, measured on 8 GPUs: a Mixtral of four layers, no recomputation.",
        "",
        "| run | states, measured | predicted | activations, measured | predicted |",
        "|---|---|---|---|---|",
        *(f"| {name} | {s:.1f} GiB | {p:.2f} GiB | {a:.1f} GiB | {q:.2f} GiB |" for name, s, p, a, q in measured()),
        *("", "## Published formula", "", FORMULA, ""),
        "| model | Megatron-LM | here | difference |",
        "|---|---|---|---|",
        *(_formula_row(name) for name in ("llama-3.1-8b", "qwen2.5-7b", "qwen2.5-32b")),
        *("", DIFFERENCE),
    ]
    return "\n".join(lines) + "\n"


def _summary_row(phase: str, found: list[Comparison]) -> str:
    s = summary(found)
    return f"| {phase} | {s['phases']:.0f} | {s['median']:.2%} | {s['p95']:.2%} | {s['lowest']:+.2%} | {s['highest']:+.2%} |"


def _row(c: Comparison) -> str:
    case = c.case
    parts = {(True, True): "both", (True, False): "embedding", (False, True): "head", (False, False): "layers alone"}
    extra = [f"TP {case['tensor']}", parts[case["first"], case["last"]], f"recompute {case['recompute']}"]
    extra += [] if case["sequence_parallel"] else ["no sequence parallelism"]
    extra += [f"EP {case['expert']}"] if case["expert"] > 1 else []
    extra += ["fused permutation"] if case["permute_fusion"] else []
    extra += ["entropy"] if case["entropy"] else []
    name = f"{case['model']}, {case['tokens']} tokens x {case['in_flight']}, {', '.join(extra)}"
    return f"| {name} | {c.phase} | {c.traced_bytes / GIB:.2f} | {c.predicted_bytes / GIB:.2f} | {c.error:+.2%} |"


def _formula_row(name: str) -> str:
    model = load(name)
    published = 18 * model.hidden_size + 4 * model.intermediate_size
    here = kept_bytes(Layer.of(model, Layout(world=1), moe=False))
    return f"| {name} | {published} | {here} | {here / published - 1:+.1%} |"
