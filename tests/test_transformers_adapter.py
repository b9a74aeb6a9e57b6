"""The adapter for apps that call Hugging Face generate: what it reads, what it plans, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError, MemfitError, NoPlanFits, NotModelled
from hydra_plugins.memfit.base.settings import Lengths, Settings
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.transformers.adapter import TransformersAdapter
from hydra_plugins.memfit.frameworks.transformers.keys import DEFAULTS, KEYS, WRITABLE
from hydra_plugins.memfit.frameworks.transformers.versions import VERSIONS, pick, software
from hydra_plugins.memfit.hardware.spec import Hardware
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Plan, Problem
from hydra_plugins.memfit.planning.search import make_plan
from support.generation_specs import spec

MODEL = spec("smollm2-135m", 134_515_008)


def _config(**generation: Any) -> dict[str, Any]:
    section = {
        "micro_batch_size": None,
        "chunk_size": None,
        "num_return_sequences": 15,
        "max_prompt_length": 256,
        "max_new_tokens": 120,
        **generation,
    }
    return {"model": {"path": "some/model", "dtype": "bfloat16"}, "generation": section}


def _context(capacity: float = 80, held: float = 0, **settings: Any) -> Context:
    settings.setdefault("framework_version", "5.10.4")
    return Context(
        hardware=Hardware(
            name="test",
            product="test",
            kind="gpu",
            capacity_bytes=int(capacity * GIB),
            held_bytes=int(held * GIB),
            source="test",
        ),
        settings=Settings(**settings),
        resolve_model=lambda path: MODEL,
    )


def _problem(config: dict[str, Any], **context: Any) -> Problem:
    return TransformersAdapter().problem(config, _context(**context))


def _plan(config: dict[str, Any], pinned: tuple[str, ...] = (), **context: Any) -> Plan:
    return make_plan(_problem(config, **context), pinned=pinned)


def _need(**generation: Any) -> float:
    """GiB that a launch needs as it is."""
    return _problem(_config(**generation)).estimate({}).phases[0].peak_bytes / GIB


def _planned(plan: Plan) -> dict[str, Any]:
    return {change.key.rpartition(".")[2]: change.new for change in plan.changes}


def test_registry_knows_the_adapter() -> None:
    """The adapter has the name that --framework and memfit.framework take, and claims a generation section."""
    assert isinstance(registry.adapter("transformers"), TransformersAdapter)
    assert registry.recognise(_config()).name == "transformers"


@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        (_config(), True),
        ({"generation": {"num_return_sequences": 4}}, True),
        ({"generation": {"max_new_tokens": 4}}, True),
        ({"generation": {"temperature": 1.0}}, False),
        ({"generation": 3}, False),
        ({"generation": None}, False),
        ({"trainer": {"n_gpus_per_node": 8}, "rollout": {"response_length": 3}}, False),
        ({"num_return_sequences": 4, "max_new_tokens": 3}, False),
        ({}, False),
    ],
)
def test_only_a_generation_section_is_recognised(config: dict[str, Any], claimed: bool) -> None:
    """Apps without such a section are not claimed; they name the framework themselves."""
    assert TransformersAdapter().recognises(config) is claimed


def test_defaults_are_read_back_by_the_adapter() -> None:
    """What --framework transformers starts from is a config of the adapter, and every documented section is in it."""
    defaults = TransformersAdapter().defaults(VERSIONS[-1])

    assert TransformersAdapter().recognises(defaults)
    assert defaults == DEFAULTS
    assert defaults is not DEFAULTS
    assert {key for section, keys in DEFAULTS.items() for key in (f"{section}.{name}" for name in keys)} <= {
        key for places in KEYS.values() for key in places
    }


class TestRejectionSampling:
    """The case that memfit must solve: 15 answers of 120 tokens to each question, on what is free of a shared GPU."""

    def test_roomy_gpu_takes_all_answers_at_once(self) -> None:
        """Where all fits, no chunk is cut and several questions are asked at once."""
        plan = _plan(_config())

        assert plan.fits
        assert _planned(plan)["chunk_size"] == 15
        assert _planned(plan)["micro_batch_size"] > 1

    @pytest.mark.parametrize("rows", [1, 5, 15, 60])
    def test_other_processes_memory_counts(self, rows: int) -> None:
        """The less others leave, the fewer sequences at once; the answers and their length stay what was asked for."""
        config = _config(micro_batch_size=8, chunk_size=15)
        room = _need(micro_batch_size=max(1, rows // 15), chunk_size=min(15, rows))
        held = 80 - room - 0.001
        plan = _plan(config, capacity=80, held=held, margin=0.0)

        assert plan.fits
        assert plan.changes
        assert {change.key for change in plan.changes} <= {
            f"generation.{n}" for n in ("micro_batch_size", "chunk_size")
        }
        assert plan.trains_the_same
        assert plan.estimate.phase("generate").peak_bytes <= (80 - held) * GIB

    def test_questions_are_given_up_before_answers(self) -> None:
        """One question at a time needs no padding; only then its answers are split, into equal parts."""
        config = _config(micro_batch_size=8, chunk_size=15)
        two = _plan(config, capacity=_need(micro_batch_size=2, chunk_size=15), margin=0.0)
        parts = _plan(config, capacity=_need(micro_batch_size=1, chunk_size=7), margin=0.0)

        assert _planned(two) == {"micro_batch_size": 2}
        assert _planned(parts) == {"micro_batch_size": 1, "chunk_size": 5}

    def test_nothing_changes_when_the_request_fits(self) -> None:
        """A launch that fits is left alone under memfit.goal=fit."""
        assert _plan(_config(micro_batch_size=2, chunk_size=15)).changes == ()

    def test_goal_fast_raises_what_is_slow(self) -> None:
        """memfit.goal=fast asks more questions, and all answers, at once."""
        planned = _planned(_plan(_config(micro_batch_size=1, chunk_size=5), goal="fast"))

        assert planned["chunk_size"] == 15
        assert planned["micro_batch_size"] > 1

    def test_pinned_chunk_is_kept(self) -> None:
        """A pinned chunk stays; the questions make room."""
        config = _config(micro_batch_size=64, chunk_size=15)
        room = _need(micro_batch_size=32, chunk_size=15)
        plan = _plan(config, pinned=("generation.chunk_size",), capacity=room, margin=0.0)

        assert set(_planned(plan)) == {"micro_batch_size"}

    def test_too_small_a_gpu_is_refused_with_the_phase(self) -> None:
        """Where one sequence does not fit, the launch stops and says what generate needs."""
        with pytest.raises(NoPlanFits, match="generate needs"):
            _plan(_config(), capacity=1.0)

    def test_shorter_answers_only_with_leave(self) -> None:
        """The length of the answers is a matter of the data set: changed with memfit.allow_semantic=true alone."""
        config = _config(max_new_tokens=4096, micro_batch_size=1, chunk_size=1)
        room = _need(max_new_tokens=1024, micro_batch_size=1, chunk_size=1)
        context: dict[str, Any] = {"capacity": room, "margin": 0.0}
        with pytest.raises(NoPlanFits):
            _plan(config, **context)

        plan = _plan(config, allow_semantic=True, **context)
        assert _planned(plan) == {"max_new_tokens": 1024}
        assert not plan.trains_the_same


def test_beam_search_has_no_chunks() -> None:
    """The beams of a search come together: rows are beams times questions, and only the questions can be fewer."""
    problem = _problem(_config(num_beams=4, do_sample=False, chunk_size=15, micro_batch_size=8))

    assert "generation.chunk_size" not in {knob.key for knob in problem.knobs}
    single = _problem(_config(num_beams=4, micro_batch_size=1)).estimate({}).phases[0].components
    double = _problem(_config(num_beams=8, micro_batch_size=1)).estimate({}).phases[0].components
    assert double.kv_cache == 2 * single.kv_cache


def test_missing_knob_is_a_warning_and_is_never_written() -> None:
    """An app without the keys is judged as it is, and told what to add."""
    config = _config()
    del config["generation"]["micro_batch_size"], config["generation"]["chunk_size"]
    problem = _problem(config)

    assert {knob.key for knob in problem.knobs} == {"generation.max_new_tokens"}
    assert any("generation.chunk_size: null" in text for text in problem.warnings)
    assert any("memfit.mapping.micro_batch_size=KEY" in text for text in problem.warnings)


def test_mapping_names_the_apps_own_keys() -> None:
    """Every documented name can be mapped; the plan writes the app's own keys."""
    config = {
        "checkpoint": "some/model",
        "sampling": {"batch": 64, "parts": 15, "answers": 15, "limit": 120, "prompt": 256, "precision": "bf16"},
    }
    mapping = {
        "model": "checkpoint",
        "micro_batch_size": "sampling.batch",
        "chunk_size": "sampling.parts",
        "num_return_sequences": "sampling.answers",
        "max_new_tokens": "sampling.limit",
        "max_prompt_length": "sampling.prompt",
        "dtype": "sampling.precision",
    }
    plan = _plan(config, mapping=mapping, capacity=_need(micro_batch_size=32, chunk_size=15), margin=0.0)

    assert {change.key for change in plan.changes} <= {"sampling.batch", "sampling.parts"}
    assert plan.changes
    assert plan.fits


def test_only_listed_keys_are_written() -> None:
    """No knob has another key than the documented ones."""
    keys = {knob.key for knob in _problem(_config()).knobs}

    assert keys == {KEYS[name][0] for name in WRITABLE}


def test_lengths_stand_in_for_an_unknown_prompt() -> None:
    """memfit.lengths.max, prompt and answer together, says how long the prompts are where the app does not."""
    known = _problem(_config(max_prompt_length=300, micro_batch_size=1)).estimate({})
    derived = _problem(_config(max_prompt_length=None, micro_batch_size=1), lengths=Lengths(max=420)).estimate({})

    assert derived == known


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (_config(max_prompt_length=None), ConfigError, "generation.max_prompt_length is not set"),
        (_config(max_new_tokens=None), ConfigError, "generation.max_new_tokens is not set"),
        (_config(micro_batch_size=0), ConfigError, "generation.micro_batch_size=0 is below 1"),
        (_config(chunk_size="many"), ConfigError, "generation.chunk_size='many' is not a whole number"),
        (_config(top_p=2.0), ConfigError, "generation.top_p=2.0 is not a number between"),
        (_config(do_sample="yes"), ConfigError, "generation.do_sample='yes' is not true or false"),
        (_config(cache_implementation="quantized"), NotModelled, "generation.cache_implementation=quantized"),
        ({**_config(), "model": {"path": "m", "dtype": "int7"}}, ConfigError, "model.dtype=int7"),
        ({**_config(), "model": {"path": "???"}}, ConfigError, "model.path is not set"),
        (
            {**_config(), "model": {"path": "m", "attn_implementation": "flex_attention"}},
            NotModelled,
            "model.attn_implementation=flex_attention",
        ),
        ({**_config(), "model": {"path": "m", "load_in_4bit": True}}, NotModelled, "model.load_in_4bit=True"),
    ],
)
def test_what_cannot_be_judged_is_one_clear_error(config: dict[str, Any], error: type[MemfitError], text: str) -> None:
    """Each error names the key, the value and what to write instead."""
    with pytest.raises(error) as caught:
        _problem(config)

    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"batch": "generation.chunk_size"}, "memfit.mapping does not know batch"),
        ({"chunk_size": "sampling.nowhere"}, "names sampling.nowhere, and the config has no such key"),
    ],
)
def test_wrong_mapping_is_refused(mapping: dict[str, str], text: str) -> None:
    """An unknown name, or a key that the config does not have, is an error and not a silent default."""
    with pytest.raises(ConfigError, match=text):
        _problem(_config(), mapping=mapping)


def test_tpu_is_not_modelled() -> None:
    """generate on a TPU slice is refused, not guessed."""
    context = _context()
    tpu = Context(
        hardware=Hardware(name="v4-8", product="v4", kind="tpu", capacity_bytes=GIB, source="test"),
        settings=context.settings,
        resolve_model=context.resolve_model,
    )
    with pytest.raises(NotModelled, match="v4-8"):
        TransformersAdapter().problem(_config(), tpu)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.44.2", (True, True, False, False, False)),
        ("4.45.2", (False, True, False, False, False)),
        ("4.53.3", (False, False, False, False, False)),
        ("4.55.0", (False, False, True, False, False)),
        ("4.57.1", (False, False, True, True, False)),
        ("5.10.4", (False, False, True, True, True)),
    ],
)
def test_releases_differ_where_their_source_does(version: str, expected: tuple[bool, ...]) -> None:
    """All logits, fp32 logits, grouped queries, sliding layers, copied experts: in which release each came or went."""
    found = software(version)

    assert expected == (
        found.all_logits,
        found.upcast_logits,
        found.grouped_query_sdpa,
        found.sliding_cache,
        found.batched_experts,
    )


def test_older_release_needs_more_for_a_long_prompt() -> None:
    """The version reaches the estimate: logits of every prompt position before 4.45."""
    config = _config(max_prompt_length=4096, micro_batch_size=1)
    old = _problem(config, framework_version="4.44.2").estimate({})
    new = _problem(config, framework_version="5.10.4").estimate({})

    assert old.phases[0].components.logits > 10 * new.phases[0].components.logits


@pytest.mark.parametrize("version", ["4.39.0", "3.5", "main"])
def test_unknown_release_is_refused(version: str) -> None:
    """Releases before the first one read, and what is no version, are errors."""
    with pytest.raises(ConfigError):
        pick(version)


@pytest.mark.parametrize(
    ("version", "dtype", "size"), [("4.57.1", None, 4), ("5.10.4", None, 2), ("4.57.1", "auto", 2)]
)
def test_unset_dtype_follows_the_release_and_is_said(version: str, dtype: str | None, size: int) -> None:
    """transformers 4 loads float32 where nothing is said, 5 what the checkpoint has; both are assumptions and reported."""
    config = {**_config(micro_batch_size=1), "model": {"path": "m", "dtype": dtype}}
    problem = _problem(config, framework_version=version)

    assert problem.estimate({}).phases[0].components.weights == size * MODEL.parameters
    assert any("model.dtype" in text for text in problem.warnings)


def test_expandable_segments_lower_the_fragmentation() -> None:
    """PYTORCH_CUDA_ALLOC_CONF of the launch is read."""
    context = _context()
    told = Context(
        hardware=context.hardware,
        settings=context.settings,
        resolve_model=context.resolve_model,
        environ={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )
    config = _config(micro_batch_size=8)
    plain = TransformersAdapter().problem(config, context).estimate({}).phases[0].components
    expandable = TransformersAdapter().problem(config, told).estimate({}).phases[0].components

    assert expandable.fragmentation < plain.fragmentation
    assert expandable.kv_cache == plain.kv_cache
