"""verl's own generation entries: their configs are told apart, read, planned and written in their own keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, NoPlanFits, NotModelled
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.compose import hook
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.verl import defaults, generation
from hydra_plugins.memfit.frameworks.verl.generation import (
    SERVER_VERSIONS,
    WRITABLE_KEYS,
    YAML_VERSIONS,
    VerlGenerationAdapter,
)
from hydra_plugins.memfit.hardware.catalog import load as load_hardware
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.resolve import load as load_model
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import SOLVE, Plan, Problem
from hydra_plugins.memfit.planning.search import check, make_plan
from support.verl_defaults import as_text, extract_generation
from support.verl_wheels import package

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "verl.md").read_text(encoding="utf-8")
PIPELINE = "rollout.pipeline_model_parallel_size"
SERVER_ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hook notes in the environment ends with the test."""
    monkeypatch.setenv(hook.REPORTED, "")


def problem(
    values: Mapping[str, Any],
    *,
    version: str = "0.6.1",
    server: bool = False,
    hardware: str = "a100-80",
    model: str = "qwen2.5-7b",
    environ: Mapping[str, str] | None = None,
    pinned: tuple[str, ...] = (),
    **options: Any,
) -> Problem:
    """Read one entry's own defaults with ``values`` set; 0.6.1's gets the key that its yaml lacks."""
    lacking = {f"{SERVER_ROLLOUT}.name": "vllm"} if server else {PIPELINE: 1} if version == "0.6.1" else {}
    config = OmegaConf.create(defaults.load(version) if server else generation.load(version))
    for key, value in {**lacking, **values}.items():
        OmegaConf.update(config, key, value, force_add=True)
    context = Context(
        hardware=load_hardware(hardware),
        settings=Settings(framework_version=version, **options),
        resolve_model=load_model,
        model=load_model(model),
        environ=environ or {},
        pinned=frozenset(pinned),
    )
    return VerlGenerationAdapter().problem(plain(config), context)


def planned(values: Mapping[str, Any], **options: Any) -> Plan:
    """The plan for one entry."""
    return make_plan(problem(values, **options))


def estimate(values: Mapping[str, Any], **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(problem(values, **options)).estimate


def changes(plan: Plan) -> dict[str, object]:
    """What the plan sets."""
    return {change.key: change.new for change in plan.changes}


@pytest.mark.parametrize("version", YAML_VERSIONS)
def test_a_generation_yaml_is_recognised(version: str) -> None:
    """generation.yaml is of verl-generation alone."""
    assert registry.recognise(plain(OmegaConf.create(generation.load(version)))).name == "verl-generation"


@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_a_training_config_stays_verls(version: str) -> None:
    """The server entry shares training's config, so it is taken for training unless it is named."""
    assert registry.recognise(plain(OmegaConf.create(defaults.load(version)))).name == "verl"


@pytest.mark.parametrize(("version", "phases"), [("0.5.0", 3), ("0.6.1", 2)])
def test_the_worker_keeps_its_own_weights_beside_the_engine(version: str, phases: int) -> None:
    """The FSDP module stays: 2 bytes a parameter up to 0.5, which are handed over; 4 in 0.6, which are never used."""
    found = estimate({"trainer.n_gpus_per_node": 4}, version=version)
    names = ["launch", "weight_sync", "generate"] if phases == 3 else ["launch", "generate"]
    parameters = load_model("qwen2.5-7b").parameters
    module = (2 if phases == 3 else 4) * parameters / 4

    assert [phase.name for phase in found.phases] == names
    assert found.phase("generate").components.weights == pytest.approx(module + 2 * parameters, rel=1e-3)
    assert found.phase("generate").components.optimizer_states == 0
    assert found.phase("generate").engine.total_bytes == 0  # one process


@pytest.mark.parametrize(("version", "contexts"), [("0.6.1", 0), ("0.7.1", 1), ("0.9.1", 1)])
def test_a_server_is_the_engine_alone(version: str, contexts: int) -> None:
    """No model beside the engine; from 0.7 on the CUDA context of a worker that waits for weights."""
    found = estimate({"trainer.n_gpus_per_node": 2}, version=version, server=True).phase("generate")

    assert found.engine.weights == pytest.approx(load_model("qwen2.5-7b").parameters, rel=1e-3)  # 2 bytes, TP 2
    assert (found.trainer.weights, found.trainer.context > 0) == (0, bool(contexts))


def test_a_default_launch_of_a_small_model_stays_as_it_is() -> None:
    """Nothing is changed where generation.yaml's own values fit."""
    assert changes(planned({})) == {}


@pytest.mark.parametrize("version", YAML_VERSIONS)
def test_a_model_too_large_for_one_gpu_is_spread(version: str) -> None:
    """The engine's size is what grows, in generation.yaml's own keys, and the plan trains nothing else."""
    plan = planned({}, version=version, model="qwen2.5-72b")

    assert plan.fits and plan.trains_the_same
    assert set(changes(plan)) <= WRITABLE_KEYS
    assert changes(plan)["rollout.tensor_model_parallel_size"] in (4, 8)


def test_the_servers_share_is_solved_for() -> None:
    """0.5 of a small GPU does not hold 14 GiB of weights and one longest sequence; the solved share does."""
    plan = planned({"trainer.n_gpus_per_node": 1}, version="0.9.1", server=True, hardware="rtx3090")
    share = changes(plan)[f"{SERVER_ROLLOUT}.gpu_memory_utilization"]

    assert isinstance(share, float) and 0.6 < share <= 0.95
    assert changes(plan)[f"{SERVER_ROLLOUT}.tensor_model_parallel_size"] == 1
    assert plan.fits and not plan.requested.fits


@pytest.mark.parametrize(("gpus", "asked", "fitting"), [(4, 4, None), (4, 3, 2), (1, 2, 1), (8, 8, 4)])
def test_the_engines_size_divides_gpus_and_heads(gpus: int, asked: int, fitting: int | None) -> None:
    """An engine of qwen2.5-7b, 28 heads, cannot be split in 8, and 3 does not divide 4 GPUs."""
    key = "rollout.tensor_model_parallel_size"
    fixes = problem({key: asked, "trainer.n_gpus_per_node": gpus}).fixes

    assert [change.new for change in fixes] == ([] if fitting is None else [fitting])


def test_a_pinned_share_is_kept() -> None:
    """A pinned share is planned around, or refused; it is never written."""
    key = "rollout.gpu_memory_utilization"
    with pytest.raises(NoPlanFits):
        make_plan(
            problem({key: 0.1, "trainer.n_gpus_per_node": 1}, pinned=(key,)),
            pinned=frozenset({key}),
        )


def test_shorter_answers_and_refused_prompts_need_permission() -> None:
    """What changes the answers is no neutral knob, in either entry."""
    kinds = {knob.key: knob.kind for knob in problem({}).knobs}
    server = {knob.key: knob.kind for knob in problem({}, version="0.9.1", server=True).knobs}

    assert kinds["rollout.response_length"] == "semantic"
    assert server[f"{SERVER_ROLLOUT}.response_length"] == server[f"{SERVER_ROLLOUT}.max_model_len"] == "semantic"
    assert "data.batch_size" not in kinds and "data.n_samples" not in kinds


def test_every_knob_is_writable_and_its_candidates_need_less() -> None:
    """No knob writes a key outside the table; on a GPU that is far too small each candidate is short by less."""
    for options in ({}, {"version": "0.5.0"}, {"version": "0.9.1", "server": True}):
        found = problem({}, model="qwen2.5-72b", hardware="a100-40", **options)
        for knob in found.knobs:
            tried = [{}, *({knob.key: value} for value in knob.candidates if value is not SOLVE)]
            short = [found.estimate(values).violation_bytes for values in tried]
            assert knob.key in WRITABLE_KEYS
            assert short[-1] > 0 or knob.key.endswith("parallel_size"), "the test needs a launch that is too large"
            assert short == sorted(short, reverse=True), knob.key


@pytest.mark.parametrize("length", [4096, 12000])
def test_chunks_shorter_than_a_sequence_are_raised(length: int) -> None:
    """verl refuses max_num_batched_tokens below the sequence; a default that is too small is raised, and never lowered below."""
    found = problem({"rollout.prompt_length": length - 512})
    raised = {change.key: change.new for change in found.fixes}
    knobs = [knob for knob in found.knobs if knob.key == "rollout.max_num_batched_tokens"]

    assert raised == ({} if length < 8192 else {"rollout.max_num_batched_tokens": length})
    assert all(int(str(value)) >= length for knob in knobs for value in knob.candidates)


def test_graphs_that_0_4_refuses_are_switched_off() -> None:
    """verl 0.4 asserts against CUDA graphs in an engine that frees its cache; 0.5 does not."""
    graphs = {"rollout.enforce_eager": False}

    assert [change.key for change in problem(graphs, version="0.4.1").fixes] == ["rollout.enforce_eager"]
    assert problem(graphs, version="0.5.0").fixes == ()


@pytest.mark.parametrize(
    ("options", "values", "said"),
    [
        ({"version": "0.6.1"}, {PIPELINE: None}, ""),
        ({"version": "0.5.0"}, {}, ""),
        ({"environ": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}, {}, "unset PYTORCH_CUDA_ALLOC_CONF"),
    ],
)
def test_launches_that_die_at_any_size_are_stopped(options: Any, values: Any, said: str) -> None:
    """Expandable segments kill vLLM's memory pool and are named with their fix; an ordinary launch is not stopped."""
    found = problem(values, **options).blockers

    assert (found == ()) if not said else any(said in message for message in found)


def test_the_key_that_the_yaml_of_0_6_lacks_is_asked_for() -> None:
    """main_generation 0.6 stops at a missing key; the message is the word to add."""
    config = plain(OmegaConf.create(generation.load("0.6.1")))
    context = Context(
        hardware=load_hardware("h200"),
        settings=Settings(framework_version="0.6.1"),
        resolve_model=load_model,
        model=load_model("qwen2.5-7b"),
    )

    assert any(f"+{PIPELINE}=1" in message for message in VerlGenerationAdapter().problem(config, context).blockers)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"rollout.name": "hf"}, NotModelled, "rollout.name=vllm"),
        ({"rollout.mode": "async"}, NotModelled, "sync"),
        ({"rollout.data_parallel_size": 2}, NotModelled, "data_parallel_size=1"),
        ({"model.lora_rank": 8}, NotModelled, "lora_rank"),
        ({"rollout.gpu_memory_utilization": 2}, ConfigError, "between 0.0 and 1.0"),
    ],
)
def test_what_is_not_modelled_is_refused(values: dict[str, Any], error: type[Exception], said: str) -> None:
    """A refusal names the key and what to write instead."""
    with pytest.raises(error, match=re.escape(said)):
        estimate(values)


@pytest.mark.parametrize(("version", "server"), [("0.7.1", False), ("0.5.0", True)])
def test_a_release_without_the_entry_is_refused(version: str, server: bool) -> None:
    """main_generation ended with 0.6 and its server began there."""
    config = generation.load("0.6.1") if not server else defaults.load(version)
    context = Context(
        hardware=load_hardware("h200"),
        settings=Settings(framework_version=version),
        resolve_model=load_model,
        model=load_model("qwen2.5-7b"),
    )
    with pytest.raises(ConfigError, match="main_generation"):
        VerlGenerationAdapter().problem(plain(OmegaConf.create(config)), context)


def test_the_console_judges_both_entries(capsys: pytest.CaptureFixture[str]) -> None:
    """The framework's name is enough; the keys choose the entry in 0.6, which has both."""
    common = ["check", "--framework", "verl-generation", "--framework-version", "0.6.1", "--hardware", "h200", "--json"]
    codes = [
        main([*common, "--model", "qwen2.5-7b", f"+{PIPELINE}=1"]),
        main([*common, "--model", "qwen2.5-7b", f"{SERVER_ROLLOUT}.name=vllm"]),
    ]
    worker, server = (json.loads(text) for text in re.split(r"(?<=\})\n(?=\{)", capsys.readouterr().out.strip()))

    assert codes == [0, 0]
    assert worker["phases"][-1]["processes"]["engine"] == 0 < server["phases"][-1]["processes"]["engine"]


def compose_entry(directory: Path, name: str, words: list[str]) -> Mapping[str, Any]:
    """Compose a launch as Hydra does, the hook included; return the job's config."""
    hook.forget()
    with initialize_config_dir(str(directory.resolve()), version_base=None):
        composed = compose(name, overrides=words)
    config: Mapping[str, Any] = plain(composed)
    return config


def test_a_launch_is_planned_through_hydra(tmp_path: Path) -> None:
    """+hardware= on generation.yaml: its own keys are written, the pinned one stays, nothing of memfit is left."""
    (tmp_path / "generation.yaml").write_text(json.dumps(generation.load("0.6.1")), encoding="utf-8")
    words = ["model.path=Qwen/Qwen2.5-72B-Instruct", f"+{PIPELINE}=1", "+model=qwen2.5-72b", "+hardware=a100-80"]
    settings = ["memfit.framework_version=0.6.1", "memfit.report=off", "rollout.enforce_eager=true"]
    config = compose_entry(tmp_path, "generation", [*words, *settings])

    assert config["rollout"]["tensor_model_parallel_size"] == 4
    assert config["data"] == generation.load("0.6.1")["data"]
    assert "memfit" not in config


@pytest.mark.verl
@pytest.mark.parametrize("version", YAML_VERSIONS)
def test_the_real_generation_yaml_is_planned(version: str) -> None:
    """verl's own file, composed by Hydra with the hook, gets a plan in its own keys."""
    extra = [f"+{PIPELINE}=1"] if version == "0.6.1" else []
    words = [*extra, "+model=qwen2.5-72b", "+hardware=a100-80", f"memfit.framework_version={version}"]
    config = compose_entry(package(version) / "trainer" / "config", "generation", [*words, "memfit.report=off"])

    assert config["rollout"]["tensor_model_parallel_size"] in (4, 8)
    assert config["data"]["batch_size"] == 128


@pytest.mark.verl
@pytest.mark.parametrize("version", SERVER_VERSIONS)
def test_the_real_server_config_is_planned(version: str) -> None:
    """The setting makes a server of ppo_trainer's config: no key of the trainer is touched."""
    words = [f"{SERVER_ROLLOUT}.name=vllm", "trainer.n_gpus_per_node=1", "+model=qwen2.5-7b", "+hardware=rtx3090"]
    chosen = ["memfit.framework=verl-generation", f"memfit.framework_version={version}", "memfit.report=off"]
    directory = package(version) / "trainer" / "config"
    bare = compose_entry(directory, "ppo_trainer", words[:2])
    config = compose_entry(directory, "ppo_trainer", [*words, *chosen])

    assert config["actor_rollout_ref"]["rollout"]["gpu_memory_utilization"] > 0.6
    assert {**config["actor_rollout_ref"], "rollout": None} == {**bare["actor_rollout_ref"], "rollout": None}


@pytest.mark.verl
def test_the_embedded_yaml_is_that_of_the_wheels() -> None:
    """generation.json is what the wheels say, byte for byte."""
    record = extract_generation({version: package(version) for version in YAML_VERSIONS})

    assert as_text(record) == (defaults.DATA / "generation.json").read_text(encoding="utf-8")


def test_the_table_of_keys_is_the_frozen_list() -> None:
    """Every key that memfit may write for generation stands in docs/verl.md once, and no other."""
    rows = re.findall(r"(?:^\|.*\|\n)+", PAGE[PAGE.index("<!-- generation-keys -->") :], re.MULTILINE)[0].splitlines()
    keys = [key for row in rows[2:] for key in re.findall(r"`([a-z_.]+)`", row.split("|")[1])]

    assert sorted(keys) == sorted(WRITABLE_KEYS)
