"""Launches that nobody would write: valid ones of every framework with some of their values replaced.

A `Base` is a launch that can be planned. A `Case` replaces values of keys that planning reads or writes, of sections, of
memfit's own settings and of the facts of the hardware. `answer` plans it: a plan, a `MemfitError`, or a bug that raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.compose.launch import Launch
from hydra_plugins.memfit.compose.overrides import Order
from hydra_plugins.memfit.compose.plain import ABSENT, Composed, plain, value_at
from hydra_plugins.memfit.compose.settings import read_settings
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.adapter import HasBackends
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.planning.search import make_plan
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.json import to_dict
from support.areal_launch import grpo
from support.hydra_app import LAUNCH

_ACTOR = "actor_rollout_ref"
_VERL = dict(word.split("=", 1) for word in LAUNCH)
_TPU = {"rollout.batch_size": 2, "rollout.n": 8, "rollout.global_length": 2048, "rollout.max_length_sample": 64}
_RUNNER = {"MODEL_PATH": "Qwen/Qwen2.5-7B-Instruct", "BATCH_SIZE": 1, "NUM_PRE_Q": 4, "GLOBAL_LENGTH": 2048}
_GENERATE = {
    "model.dtype": "bfloat16", "generation.num_return_sequences": 15, "generation.max_prompt_length": 512,
    "generation.max_new_tokens": 120, "generation.micro_batch_size": 16, "generation.chunk_size": 15,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """One launch that plans."""

    framework: str
    version: str
    hardware: str
    values: Mapping[str, Any]
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def _verl(version: str, **values: Any) -> Base:
    given = {**_VERL, **{key.replace("__", "."): value for key, value in values.items()}}
    return Base(framework="verl", version=version, hardware="h200", values=given)


BASES: dict[str, Base] = {
    "verl 0.4.1": _verl("0.4.1"),
    "verl 0.6.1 with a critic": _verl("0.6.1", algorithm__adv_estimator="gae"),
    "verl 0.8.0 dynamic": _verl("0.8.0", actor_rollout_ref__actor__use_dynamic_bsz="true"),
    "verl 0.9.1": _verl("0.9.1"),
    "verl 0.9.1 LoRA": _verl("0.9.1", actor_rollout_ref__model__lora_rank="32"),
    "verl 0.9.1 Megatron": _verl("0.9.1", model_engine="megatron"),
    "verl-sft 0.9.1": Base(
        framework="verl-sft", version="0.9.1", hardware="h200",
        values={"model.path": "Qwen/Qwen2.5-3B-Instruct", "trainer.n_gpus_per_node": 1},
    ),
    "verl-generation 0.5.0": Base(
        framework="verl-generation", version="0.5.0", hardware="a100-80",
        values={"model.path": "Qwen/Qwen2.5-7B-Instruct", "rollout.name": "vllm", "trainer.n_gpus_per_node": 1},
    ),
    "verl-generation 0.9.1": Base(
        framework="verl-generation", version="0.9.1", hardware="a100-80",
        values={f"{_ACTOR}.model.path": "Qwen/Qwen2.5-7B-Instruct", f"{_ACTOR}.rollout.name": "vllm"},
    ),
    "areal 0.4.1": Base(
        framework="areal", version="0.4.1", hardware="h100", values=grpo(allocation_mode="sglang.d4p1t1+d4p1t1"),
    ),
    "areal 1.0.4": Base(
        framework="areal", version="1.0.4", hardware="a100-80",
        values=grpo(rollout__backend="sglang:d4", actor__backend="fsdp:d4", allocation_mode=""),
    ),
    "mllm-jax": Base(
        framework="mllm-jax", version="8b19c02", hardware="v4-16",
        values={**_TPU, "model_path": "Qwen/Qwen2.5-7B-Instruct", "train.micro_batch_size_per_device": 2},
    ),
    "mllm-jax variables": Base(framework="mllm-jax", version="8c45109", hardware="v4-16", values=_RUNNER),
    "jax": Base(
        framework="jax", version="any", hardware="v5e-8", model="qwen2.5-0.5b",
        values={"per_device": 4, "length": 1024, "accumulate": 1},
        settings={"mapping": {"micro_batch_size": "per_device", "tokens": "length", "accumulation_steps": "accumulate"}},
    ),
    "transformers": Base(
        framework="transformers", version="5.10.4", hardware="rtx3090", model="qwen2.5-7b", values=_GENERATE,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One launch to plan: a base, and what is put in the place of its values."""

    base: str
    values: tuple[tuple[str, Any], ...] = ()
    """Dotted key of the framework's config -> value, in order; `GONE` takes the key away."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Dotted key below ``memfit`` -> value."""
    pins: tuple[str, ...] = ()
    """Keys that stand behind the hardware group."""
    lazy: bool = False
    """Read through OmegaConf, as in a launch, so that texts with ``${`` are interpolations."""


class _Gone:
    def __repr__(self) -> str:
        return "GONE"


GONE = _Gone()


@cache
def config(base: str) -> dict[str, Any]:
    """Return the composed config of a base, interpolations unresolved."""
    chosen = BASES[base]
    adapter = registry.adapter(chosen.framework)
    has_backends = isinstance(adapter, HasBackends)
    defaults = (
        adapter.defaults_with(chosen.version, chosen.values) if has_backends else adapter.defaults(chosen.version)  # type: ignore[attr-defined]
    )
    tree = OmegaConf.create(dict(defaults))
    for key, value in chosen.values.items():
        is_word = isinstance(value, str) and chosen.framework == "verl"
        OmegaConf.update(tree, key, OmegaConf.create(f"v: {value}").v if is_word else value, force_add=True)
    raw = OmegaConf.to_container(tree)
    assert isinstance(raw, dict)
    return raw


@cache
def resolved(base: str) -> dict[str, Any]:
    """Return the composed config of a base, resolved."""
    return plain(OmegaConf.create(config(base)))


@cache
def node(base: str) -> dict[str, Any]:
    """Return the ``memfit`` node of a base."""
    chosen = BASES[base]
    facts = plain(OmegaConf.load(conf_dir() / "hardware" / f"{chosen.hardware}.yaml"))["memfit"]["hardware"]  # type: ignore[arg-type]
    model = None
    if chosen.model:
        content = plain(OmegaConf.load(conf_dir() / "model" / f"{chosen.model}.yaml"))  # type: ignore[arg-type]
        model = content.get("memfit", {}).get("model", content)
    settings = {"hardware": facts, "framework": chosen.framework, "framework_version": chosen.version, "report": "off"}
    return {**settings, **({"model": model} if model else {}), **chosen.settings}


def launch(case: Case) -> Launch:
    """Return the launch of a case, ready to be planned."""
    tree = _with(_read(case.base) if case.lazy else resolved(case.base), case.values)
    own = _with(node(case.base), case.settings)
    explicit = frozenset(key for key, _ in case.values)
    order = Order(explicit=explicit | set(case.pins), pinned=frozenset(case.pins))
    return Launch(config=_composed(tree) if case.lazy else tree, node=own, order=order)


@cache
def _read(base: str) -> dict[str, Any]:
    """Return the part of the config that is read: OmegaConf takes tens of milliseconds to build the whole."""
    tree = resolved(base)
    found = {key: value_at(tree, key) for key in keys(base)}
    return _with({}, [(key, value) for key, value in found.items() if value is not ABSENT])


def _composed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return Composed.of(OmegaConf.create(dict(tree)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # no yaml and no command line gets that far
        raise ConfigError(f"OmegaConf refuses it: {error}") from None


def _with(tree: Mapping[str, Any], values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the tree with values set; only what lies on the way to them is copied."""
    copy = dict(tree)
    for key, value in values:
        *way, last = key.split(".")
        target = copy
        for part in way:
            below = target.get(part)
            target[part] = dict(below) if isinstance(below, Mapping) else {}
            target = target[part]
        if value is GONE:
            target.pop(last, None)
        else:
            target[last] = deepcopy(value)
    return copy


def answer(case: Case) -> Plan | MemfitError:
    """Return the plan or the error; any other exception is a bug. Report and JSON of a plan are made, too."""
    try:
        plan = planned(launch(case))
    except MemfitError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return error
    json.dumps(to_dict(plan), allow_nan=False)
    assert words.launch(plan) and words.verdict(plan)
    return plan


def planned(asked: Launch) -> Plan:
    """Return the plan, after the rules that hold for every plan have been checked."""
    problem, pinned = asked.problem()
    plan = make_plan(problem, pinned=pinned)
    changed = {change.key: change.new for change in plan.changes}
    assert plan.fits, "a plan that was returned fits"
    assert not pinned & set(changed), "a pin is never touched"
    assert problem.estimate({**changed}).fits, "and fits by what it says alone"
    assert all(isinstance(value, (int, float, bool, str, type(None))) for value in changed.values())
    return plan


class _Recorded(Mapping[str, Any]):
    """A config that remembers which keys were looked for."""

    def __init__(self, content: Mapping[str, Any], seen: set[str], prefix: str = "") -> None:
        self._content, self._seen, self._prefix = content, seen, prefix

    def __getitem__(self, key: str) -> Any:
        self._seen.add(self._prefix + key)
        value = self._content[key]
        return _Recorded(value, self._seen, f"{self._prefix}{key}.") if isinstance(value, Mapping) else value

    def __contains__(self, key: object) -> bool:
        self._seen.add(f"{self._prefix}{key}")
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@cache
def keys(base: str) -> tuple[str, ...]:
    """Return the keys that planning a base looks for, the sections on the way to them, and the keys of its knobs."""
    seen: set[str] = set()
    recorded = _Recorded(resolved(base), seen)
    asked = Launch(config=recorded, node=node(base), order=Order())
    plan = planned(asked)
    read_settings(node(base))
    return tuple(sorted(seen | {knob.key for knob in plan.problem.knobs}))


SETTINGS = (
    "goal", "margin", "strict", "allow_semantic", "pin", "report", "lengths", "lengths.mean", "lengths.max", "framework",
    "framework_version", "engine_version", "host_memory_bytes", "mapping", "mapping.model", "model", "hardware",
    "hardware.name", "hardware.kind", "hardware.capacity_bytes", "hardware.held_bytes", "hardware.gpus_per_node",
    "hardware.nodes", "hardware.compute_capability", "hardware.host_memory_bytes_per_device", "hardware.typical_gpus_per_node",
    "hardware.memory_bandwidth_bytes_per_s", "hardware.bf16_dense_flops", "hardware.capacity_range_bytes", "margn",
)  # fmt: skip
MODEL_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "num_experts", "moe_intermediate_size", "tie_word_embeddings", "torch_dtype", "architectures",
)  # fmt: skip

_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 5, 7, 8, 13, 64, 100, 1024, 4096, 32768, 10**6, 2**31, 10**9, 10**9 + 1, 10**18, 2**63, 10**30,
    -(10**9), 0.0, -0.0, 0.5, 0.95, 1.0, 2.0, 1e-9, 1e18, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_TEXTS = (
    "", " ", "???", "auto", "null", "none", "None", "true", "0", "1", "-1", "1e3", "0.5", "a" * 5000, "é漢字😀", "\x00", "\n",
    "\u202e", "a.b", "../..", "/dev/zero", "~", "%s%n{0}", "[bold]x[/nope]", "fsdp", "fsdp2", "megatron", "veomni", "vllm",
    "sglang", "hf", "naive", "gae", "grpo", "bfloat16", "float32", "fp8", "1,-1,1", "sglang.d4p1t1+d4p1t1", "fsdp:d8",
    "sglang:d0", "vllm:d2t2", "megatron:d2p2t2", "eager", "sdpa", "flash_attention_2", "dynamic", "static", "dp",
    "Qwen/Qwen2.5-0.5B-Instruct", "qwen3-30b-a3b", "nobody/nothing",
)  # fmt: skip
_INTERPOLATIONS = (
    "${a.b}", "${data.train_batch_size}", "${trainer.n_gpus_per_node}", "${.x}", "${..x}", "${", "${}", "${oc.env:HOME}",
    "${oc.env:MEMFIT_NO_SUCH}", "${oc.env:A,${oc.env:B,${oc.env:C,3}}}", "${nobody:1}", "${hydra:job.num}", "\\${a}",
    "${actor_rollout_ref}", "${actor}", "${" * 200, "${a." * 50, "${oc.select:actor,5}", "x${trainer.nnodes}y",
)  # fmt: skip


def _junk() -> st.SearchStrategy[Any]:
    """Return a strategy for any value that yaml can hold, and some that it cannot."""
    leaf = st.one_of(
        st.sampled_from((None, True, False)), st.sampled_from(_NUMBERS), st.sampled_from(_TEXTS), st.integers(),
        st.floats(), st.text(max_size=8), st.integers(1, 1 << 20),
    )  # fmt: skip
    names = st.sampled_from(("path", "x", "", "a.b", "name", "strategy", "é"))
    return st.one_of(leaf, leaf, leaf, st.lists(leaf, max_size=3), st.dictionaries(names, leaf, max_size=3))


@cache
def _sections(base: str) -> tuple[str, ...]:
    """Return other bases' top-level sections, as (base, section) in one word, to be put below a key of this one."""
    return tuple(f"{other}|{name}" for other in BASES for name in resolved(other) if other != base)


@cache
def _drawn(base: str, *, lazy: bool) -> st.SearchStrategy[Case]:
    key = st.sampled_from(keys(base))
    return st.builds(
        Case,
        base=st.just(base),
        values=st.lists(st.tuples(key, _values(base, lazy=lazy)), max_size=3).map(tuple),
        settings=st.lists(_settings(base), max_size=2).map(tuple),
        pins=st.lists(key, max_size=1).map(tuple),
        lazy=st.just(lazy),
    )


@st.composite
def cases(draw: st.DrawFn, *, lazy: bool | None = None) -> Case:
    """Draw a case: up to three replaced values, up to two settings, at most one pin."""
    base = draw(st.sampled_from(sorted(BASES)))
    return draw(_drawn(base, lazy=draw(st.integers(0, 3)) == 0 if lazy is None else lazy))


def _values(base: str, *, lazy: bool) -> st.SearchStrategy[Any]:
    graft = st.sampled_from(_sections(base)).map(lambda word: resolved(word.split("|")[0])[word.split("|")[1]])
    foreign = st.sampled_from(keys(base)).map(lambda key: value_at(resolved(base), key)).filter(lambda v: v is not None)
    own = foreign.map(lambda v: v if isinstance(v, (int, float, str, bool, list, dict)) else GONE)
    kinds = [_junk(), _junk(), st.just(GONE), graft, own]
    if lazy:
        links = st.sampled_from(keys(base)).map(lambda key: f"${{{key}}}")
        kinds += [links, st.sampled_from(_INTERPOLATIONS)]
    return st.one_of(kinds)


def _settings(base: str) -> st.SearchStrategy[tuple[str, Any]]:
    key = st.sampled_from(keys(base))
    sensible = st.one_of(
        st.tuples(st.just("goal"), st.sampled_from(("fit", "fast"))),
        st.tuples(st.just("allow_semantic"), st.just(True)),
        st.tuples(st.just("strict"), st.just(False)),
        st.tuples(st.just("margin"), st.floats(0, 0.99)),
        st.tuples(st.just("pin"), st.lists(key, max_size=3)),
        st.tuples(st.just("hardware.capacity_bytes"), st.integers(1, 1 << 40)),
        st.tuples(st.just("hardware.held_bytes"), st.integers(0, 1 << 38)),
        st.tuples(
            st.just("lengths"), st.fixed_dictionaries({"mean": st.integers(1, 9000), "max": st.integers(1, 9000)})
        ),
        st.tuples(st.just("framework"), st.sampled_from(sorted({b.framework for b in BASES.values()}))),
    )
    junk = st.tuples(st.sampled_from(SETTINGS), _junk())
    shapes = st.tuples(st.sampled_from(MODEL_KEYS).map(lambda name: f"model.{name}"), _junk())
    return st.one_of(sensible, sensible, junk, shapes)
