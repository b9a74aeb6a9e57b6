"""The console command on verl's embedded defaults: answers, exit status, and every wrong input as one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.base.settings import Settings
from hydra_plugins.memfit.cli import main as console
from hydra_plugins.memfit.compose.settings import NOT_SETTINGS, read_settings
from hydra_plugins.memfit.frameworks import registry
from support.contract import inconsistencies, violations
from support.fake_driver import A40, Driver

ROOT = Path(__file__).parents[1]
MODEL = "actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct"
MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
LOG_PROB = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
TENSOR = "actor_rollout_ref.rollout.tensor_model_parallel_size=1"
GRPO = "algorithm.adv_estimator=grpo"
VLLM = "actor_rollout_ref.rollout.name=vllm"
ONE = ("--framework", "verl", "--hardware", "h200", "--gpus", "1")
SMALL = (*ONE, MODEL, GRPO, VLLM, TENSOR, f"{MICRO}=1", f"{LOG_PROB}=1")
LARGE = (
    "--framework",
    "verl",
    "--hardware",
    "a40",
    "--gpus",
    "1",
    MODEL,
    GRPO,
    TENSOR,
    f"{MICRO}=64",
    f"{LOG_PROB}=256",
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a host without accelerator, network and allocator settings."""
    for name in ("MEMFIT_HARDWARE", "MEMFIT_DETECTED", "MEMFIT_DEBUG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Answer:
    """What one command line gives."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.status = status_of(arguments)
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        """The document on stdout."""
        return json.loads(self.out)


def status_of(arguments: tuple[str, ...]) -> int:
    """Return the exit status, also where argparse leaves by itself."""
    try:
        return console.main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize("launch", [SMALL, LARGE], ids=["small", "large"])
def test_json_keeps_the_contract_and_agrees_with_the_exit_status(
    command: str, launch: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the answer, stdout is one document of the contract, and the exit status says whether it fits."""
    answer = Answer(capsys, command, *launch, "--json")
    assert violations(answer.json) == []
    assert inconsistencies(answer.json) == []
    assert answer.status == (0 if answer.json["fits"] else 3)


@pytest.mark.parametrize(("launch", "status"), [(SMALL, 0), (LARGE, 3)], ids=["fits", "does not"])
def test_check_judges_and_changes_nothing(
    launch: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` answers for the values as they are."""
    answer = Answer(capsys, "check", *launch, "--json")
    assert answer.status == status
    assert answer.json["changes"] == []


def test_an_unset_micro_batch_is_named_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    """verl does not start without micro-batches: `check` judges the size and says so beside it, `plan` fills them in."""
    critic = "critic.ppo_micro_batch_size_per_gpu"
    model = "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct"
    launch = ("--framework", "verl", "--hardware", "h200", "--gpus", "1", model, TENSOR, "data.train_batch_size=8")

    judged = Answer(capsys, "check", *launch)
    as_json = Answer(capsys, "check", *launch, "--json")
    planned = Answer(capsys, "plan", *launch, "--json")
    filled = {change["key"]: change["to"] for change in planned.json["changes"]}

    assert judged.status == as_json.status == 0
    assert "fits by size, but does not start: " in judged.out
    assert as_json.json["fits"] and MICRO in as_json.json["warnings"][0]
    assert all(f"memfit: {key} is unset" in judged.err for key in (MICRO, LOG_PROB))
    assert "let memfit plan fill in" in judged.err
    assert planned.status == 0
    assert all(isinstance(filled[key], int) for key in (MICRO, LOG_PROB, critic))


def test_a_micro_batch_that_is_pinned_unset_stops_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """What may not be filled in is an error that names the key, not a plan that verl refuses."""
    answer = Answer(capsys, "plan", *SMALL, f"{MICRO}=null", f"memfit.pin=[{MICRO}]")

    assert answer.status == 2
    assert f"{MICRO} is unset" in answer.err


def test_overrides_of_a_plan_make_the_launch_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Pasted back, the printed overrides give a launch that fits with the peak that the plan predicted."""
    launch = ("--hardware", "a100-80", "--gpus", "4", MODEL, GRPO, f"{MICRO}=64", f"{LOG_PROB}=256")
    assert Answer(capsys, "check", *launch).status == 3
    plan = Answer(capsys, "plan", *launch, "--json").json
    text = Answer(capsys, "plan", *launch).out
    pasted = [line.strip() for line in text.split("As overrides:\n")[1].splitlines()]
    assert len(pasted) == len(plan["changes"]) > 0
    judged = Answer(capsys, "check", *launch, *pasted, "--json")
    assert judged.status == 0
    assert judged.json["peak_bytes"] == plan["peak_bytes"]


def test_training_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan changes neutral knobs only."""
    launch = ("--hardware", "a100-80", "--gpus", "4", MODEL, GRPO, f"{MICRO}=64", f"{LOG_PROB}=256")
    changes = Answer(capsys, "plan", *launch, "--json").json["changes"]
    assert {change["kind"] for change in changes} == {"neutral"}


def test_a_file_and_words_give_the_same_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested keys, dotted keys and words are the same launch; words win over the file."""
    values = {
        key: int(text) if text.isdecimal() else text for key, _, text in (w.partition("=") for w in SMALL) if text
    }
    dotted, nested = tmp_path / "dotted.json", tmp_path / "nested.yaml"
    dotted.write_text(json.dumps({**values, "trainer.n_gpus_per_node": 8}))
    nested.write_text(
        "defaults: [ppo_trainer]\nhydra: {run: {dir: x}}\nmemfit: {margin: 0.05}\n"
        "algorithm.adv_estimator: grpo\nactor_rollout_ref:\n  model: {path: Qwen/Qwen2.5-3B-Instruct}\n"
        "  actor.ppo_micro_batch_size_per_gpu: 1\n  rollout: {name: vllm, log_prob_micro_batch_size_per_gpu: 1}\n"
        "  rollout.tensor_model_parallel_size: 1\ntrainer: {n_gpus_per_node: 1}\n"
    )
    options = ("--framework", "verl", "--hardware", "h200", "--json")
    answers = [
        Answer(capsys, "check", *SMALL, "--json").json,
        Answer(capsys, "check", *options, "--config", str(dotted), "trainer.n_gpus_per_node=1").json,
        Answer(capsys, "check", *options, "--config", str(nested)).json,
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_pasted_launch_line_pins_what_stands_behind_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    """`+hardware=` among the words is the flag, and the rule of order holds."""
    words = (MODEL, GRPO, "trainer.n_gpus_per_node=4", f"{LOG_PROB}=256", "+hardware=a100-80", f"{MICRO}=4")
    document = Answer(capsys, "plan", *words, "--json").json
    assert document["hardware"]["name"] == "a100-80"
    assert document["pinned"] == [MICRO]
    assert MICRO not in {change["key"] for change in document["changes"]}


@pytest.mark.parametrize(
    "words",
    [
        ("--gpus", "2"),
        ("trainer.n_gpus_per_node=2",),
        ("trainer.n_gpus_per_node=2", "--gpus", "2"),
        ("--gpus=2", "a=1"),
    ],
)
def test_options_and_words_stand_in_any_order(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Options may stand between the words; `--gpus` stands for the config's count."""
    words = tuple(f"+{word}" if word == "a=1" else word for word in words)
    document = Answer(
        capsys, "check", MODEL, GRPO, *words, "--hardware", "h200", f"{MICRO}=1", f"{LOG_PROB}=1", "--json"
    ).json
    assert document["hardware"]["gpus_per_node"] == 2


def test_a_whole_launch_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m module` in front of the words is no word of the launch."""
    words = tuple(word for word in SMALL if "=" in word)
    pasted = ("python3", "-m", "verl.trainer.main_ppo", *words, "trainer.logger=['console','wandb']")
    document = Answer(capsys, "check", *pasted, "trainer.n_gpus_per_node=1", "+hardware=h200", "--json").json
    assert document == Answer(capsys, "check", *SMALL, "--json").json


@pytest.mark.parametrize("words", [("--model", "qwen2.5-0.5b"), ("+model=qwen2.5-0.5b",)])
def test_a_model_given_by_name_wins(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """`--model` and `+model=` answer for the policy, whatever path the launch has."""
    document = Answer(capsys, "check", *SMALL, *words, "--json").json
    assert document["model"]["parameters"] == 494_032_768


def test_facts_of_the_accelerator_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    """`memfit.hardware.*` overrides the file, and the source says so."""
    document = Answer(capsys, "check", *SMALL, "memfit.hardware.capacity_bytes=85899345920", "--json").json
    assert document["hardware"]["capacity_bytes"] == 85_899_345_920
    assert "capacity_bytes" in document["hardware"]["source"]


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (("--framework-version", "0.9.0"), "verl 0.9.0 is read with the keys and defaults of 0.9.1."),
        (("--framework-version", "0.9.1"), None),
    ],
)
def test_a_version_that_stands_for_another_is_said(
    words: tuple[str, ...], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release of the same series stands in for one whose config is not known, and a warning says so."""
    assert Answer(capsys, "check", *SMALL, *words, "--json").json["warnings"] == ([warning] if warning else [])


LONG = ("PYTHONUNBUFFERED=1", "MEMFIT_HARDWARE=h200", "torchrun", "--nnodes", "1", "-m", "verl.trainer.main_ppo")


def test_a_pasted_environment_is_that_of_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    """Variables in front of the program count as if they were set; what was not read is a warning."""
    words = tuple(word for word in SMALL if "=" in word)
    answer = Answer(capsys, "check", *LONG, *words, "trainer.n_gpus_per_node=1", "--cfg", "job", "--json")
    assert answer.json["hardware"]["name"] == "h200"
    (warning,) = answer.json["warnings"]
    assert "torchrun --nnodes 1" in warning and "--cfg job" in warning
    assert "MEMFIT_HARDWARE" not in os.environ


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B-Instruct", "qwen/qwen2.5-0.5b-instruct", "qwen2.5-0.5b"])
def test_a_model_is_also_known_by_its_hub_id(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--model` takes the hub ids that conf/model lists."""
    assert Answer(capsys, "check", *SMALL, "--model", model, "--json").json["model"]["name"] == "qwen2.5-0.5b"


def test_the_counts_of_a_file_lose_against_the_flags_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--gpus` over a composed config asks "what if", and the answer says so."""
    path = tmp_path / "launch.yaml"
    path.write_text("trainer: {n_gpus_per_node: 8, nnodes: 1}\n")
    document = Answer(capsys, "check", *SMALL, "--nodes", "1", "--config", str(path), "--json").json
    assert document["hardware"]["gpus_per_node"] == 1
    assert document["warnings"] == ["--gpus 1 wins over trainer.n_gpus_per_node: 8 (in --config)."]


@pytest.mark.parametrize(
    "entry", ["hardware: a40", "/hardware: a40", "override hardware: a40", "hardware@_global_: a40"]
)
def test_the_hardware_group_in_a_defaults_list_is_read(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a launch: the group counts, and every word of the command line is pinned."""
    path = tmp_path / "launch.yaml"
    path.write_text(f"defaults: [ppo_trainer, {{{entry}}}, _self_]\ntrainer: {{n_gpus_per_node: 1}}\n")
    words = (MODEL, GRPO, TENSOR, f"{LOG_PROB}=1", f"{MICRO}=1", "--framework", "verl", "--config", str(path))
    document = Answer(capsys, "plan", *words, "--json").json
    assert document["hardware"]["name"] == "a40"
    assert MICRO in document["pinned"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train_batchsize: 64}\n",
            "--config: verl 0.9.1 has no key data.train_batchsize. Did you mean data.train_batch_size?",
        ),
        ("critic: {model.fsdp_config.param_offload: true}\n", "It is a key of verl 0.4.1"),
        ("hardware: h200\n", "defaults: [hardware: h200]"),
        (
            "services: {web: {image: x}}\n",
            "none of its keys is one of verl 0.9.1: it is no config of a launch (services)",
        ),
    ],
)
def test_a_key_of_a_file_that_the_framework_does_not_have_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip in a file is an error as on the command line; `+` adds the key, `memfit.strict=false` goes on."""
    path = tmp_path / "slip.yaml"
    path.write_text(text)
    answer = Answer(capsys, "check", *SMALL, "--config", str(path), "--json")
    assert answer.status == 2
    assert message in answer.err
    path.write_text("+data.train_batchsize: 64\n")
    assert Answer(capsys, "check", *SMALL, "--config", str(path), "--json").json["warnings"] == []
    path.write_text("data: {train_batchsize: 64}\n")
    lenient = Answer(capsys, "check", *SMALL, "memfit.strict=false", "--config", str(path), "--json").json
    assert lenient["warnings"] == ["verl 0.9.1 has no key data.train_batchsize (in --config)."]


def test_a_composed_config_may_hold_keys_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What Hydra composed had its `+` once: a key that only a recipe reads is a warning."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**registry.adapter("verl").defaults("0.9.1"), "overlong_buffer": {"len": 5}}))
    warnings = Answer(capsys, "check", *SMALL, "--config", str(path), "--json").json["warnings"]
    assert "verl 0.9.1 has no key overlong_buffer.len (in --config)." in warnings


def test_a_misspelt_key_of_generation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An app's own keys are its business; what is almost a key of `generate` is a slip."""
    words = ("check", "--hardware", "h200", "--model", "qwen2.5-0.5b", "generation.num_return_sequences=2")
    lengths = ("generation.max_prompt_length=64", "+generation.seed=1")
    answer = Answer(capsys, *words, *lengths, "generation.max_new_tokns=64")
    assert answer.status == 2
    assert "Did you mean generation.max_new_tokens?" in answer.err
    assert Answer(capsys, *words, *lengths, "generation.max_new_tokens=64").status == 0


@pytest.mark.parametrize(("name", "hosts"), [("v4-32", 4), ("v5litepod-16", 4), ("v5p-64", 8), ("v6e-32", 8)])
def test_a_slice_without_a_file_is_known_by_its_size(name: str, hosts: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Any size of a known TPU generation is that generation's device, so many times."""
    document = Answer(capsys, "env", "--hardware", name, "--model", "qwen2.5-1.5b", "BATCH_SIZE=1", "--json").json
    assert (document["hardware"]["nodes"], document["hardware"]["gpus_per_node"]) == (hosts, 4)
    assert (conf_dir().parent / document["hardware"]["source"]).is_file()
    assert document["env"]["BATCH_SIZE"] == "1"
    assert violations({key: value for key, value in document.items() if key != "env"}) == []


@pytest.mark.parametrize(("style", "num_lines"), [("off", 0), ("short", 1)])
def test_report_styles(style: str, num_lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """`memfit.report` decides what people see; the exit status stays."""
    answer = Answer(capsys, "check", *SMALL, f"memfit.report={style}")
    assert (answer.status, len(answer.out.splitlines())) == (0, num_lines)


WRONG = {
    "no command": ((), "required: COMMAND"),
    "unknown command": (("chekc",), "invalid choice: 'chekc'"),
    "unknown option": (("check", "--gpu", "1"), "unknown argument '--gpu'"),
    "a config of his own": (("check", "--config-name=mine", "a=1"), "then --config FILE"),
    "words for detect": (("detect", "a=1"), "unknown argument 'a=1'"),
    "no gpus": (("check", "--gpus", "0"), "'0' is not a whole number above 0"),
    "negative nodes": (("check", "--nodes", "-1"), "not a whole number above 0"),
    "gpus in words": (("check", "--gpus", "four"), "'four' is not a whole number above 0"),
    "unknown framework": (("check", "--framework", "verll"), "unknown framework 'verll'. Did you mean 'verl'?"),
    "unknown version": (("check", *SMALL, "--framework-version", "0.3.0"), "0.3.0"),
    "unknown hardware": (("check", *SMALL[:2], "--hardware", "h20x", MODEL), "unknown hardware 'h20x'"),
    "a path as hardware": (("check", *SMALL[:2], "--hardware", "../model/x", MODEL), "unknown hardware '../model/x'"),
    "two counts": (
        ("check", *SMALL, "trainer.n_gpus_per_node=4"),
        "--gpus 1 and trainer.n_gpus_per_node=4 contradict each other",
    ),
    "a size that no slice has": (("check", *SMALL[:2], "--hardware", "v4-7", MODEL), "unknown hardware 'v4-7'"),
    "a hub id that is not known": (("check", *SMALL, "--model", "me/mine"), "actor_rollout_ref.model.path=PATH"),
    "a shell script": (("check", "bash", "run.sh"), "run.sh is a shell script"),
    "two hardware": (("check", *SMALL, "+hardware=a40"), "--hardware h200 and hardware=a40 contradict each other"),
    "unknown model": (("check", *SMALL, "--model", "qwen9"), "unknown model 'qwen9'"),
    "model not found": (("check", *SMALL, "actor_rollout_ref.model.path=nobody/nothing"), "nobody/nothing"),
    "no accelerator": (("check", "--framework", "verl", MODEL), "no accelerator"),
    "no framework": (("check", "--hardware", "h200", "foo.bar=1"), "of no framework that memfit knows"),
    "misspelt setting": (("check", *SMALL, "memfit.margn=0.1"), "memfit.margn is not a setting of memfit"),
    "margin too large": (("check", *SMALL, "memfit.margin=2"), "memfit.margin is 2"),
    "a number for a version": (
        ("check", *SMALL, "memfit.framework_version=0.9"),
        "memfit.framework_version is 0.9; it must be a text in quotes",
    ),
    "a number for a framework": (("check", *SMALL[2:], "memfit.framework=1"), "memfit.framework is 1"),
    "a word for memfit": (("check", *SMALL, "memfit=1"), "memfit"),
    "unknown goal": (("check", *SMALL, "memfit.goal=small"), "memfit.goal is 'small'"),
    "unknown pin": (("plan", *SMALL, "memfit.pin=[a.b]"), "memfit.pin names 'a.b'"),
    "unknown fact": (("check", *SMALL, "memfit.hardware.capacity=1"), "memfit.hardware.capacity is not a key"),
    "negative capacity": (("check", *SMALL, "memfit.hardware.capacity_bytes=-1"), "must be at least 1"),
    "hardware as a setting": (("check", *SMALL, "memfit.hardware=h200"), "To choose a file: --hardware h200"),
    "unknown backend": (("check", *SMALL, "model_engine=veomni"), "model_engine=veomni is not modelled"),
    "group of the framework": (("check", *SMALL, "+actor@x=y"), "chooses a file of a config group"),
    "key of another version": (
        ("check", *SMALL, "critic.model.fsdp_config.param_offload=true"),
        "verl 0.9.1 has no key critic.model.fsdp_config.param_offload. It is a key of verl 0.4.1, 0.5.0, 0.6.1, 0.7.1.",
    ),
    "sweep": (("check", *SMALL, "trainer.nnodes=1,2"), "is a sweep"),
    "no value": (("check", *SMALL, "trainer.nnodes"), "key=value"),
    "no such file": (("check", *SMALL, "--config", "/nowhere.yaml"), "cannot be read: No such file"),
    "text for a number": (("check", *SMALL, "data.train_batch_size=many"), "data.train_batch_size"),
    "negative number": (("check", *SMALL, "data.max_response_length=-5"), "data.max_response_length"),
    "a section for a number": (("check", *SMALL, "data.train_batch_size={a:1}"), "data.train_batch_size"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong input gives exit status 2, nothing on stdout, and one message on stderr that says what is wrong."""
    answer = Answer(capsys, *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_a_directory_without_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model path that is a directory without config.json is an error that names the directory."""
    answer = Answer(capsys, "check", *SMALL, f"actor_rollout_ref.model.path={tmp_path}")
    assert answer.status == 2
    assert str(tmp_path) in answer.err and "config.json" in answer.err


def test_what_would_kill_a_launch_for_another_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expandable segments beside vLLM: exit status 2 with the fix; under `memfit.strict=false` a warning."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for command in ("check", "plan"):
        stopped = Answer(capsys, command, *SMALL, "memfit.engine_version=0.11.0")
        assert stopped.status == 2
        assert "expandable_segments" in stopped.err
        warned = Answer(capsys, command, *SMALL, "memfit.engine_version=0.11.0", "memfit.strict=false", "--json")
        assert warned.status == 0
        assert any("expandable_segments" in warning for warning in warned.json["warnings"])


def test_a_bug_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of memfit itself is exit status 1 and says how to see more; MEMFIT_DEBUG shows it."""
    broken = types.ModuleType("broken")
    broken.add_parser = lambda subparsers: subparsers.add_parser("broken")  # type: ignore[attr-defined]
    broken.run = lambda args: 1 // 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_plugins.memfit.cli.broken", broken)
    monkeypatch.setattr(console, "COMMANDS", ("broken",))
    answer = Answer(capsys, "broken")
    assert answer.status == 1
    assert "ZeroDivisionError" in answer.err and "MEMFIT_DEBUG=1" in answer.err
    monkeypatch.setenv("MEMFIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        console.main(["broken"])


def test_detect_answers_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`detect` prints what `auto` would take, with its source."""
    monkeypatch.setenv("MEMFIT_HARDWARE", "h200")
    document = Answer(capsys, "detect", "--json").json
    assert document["name"] == "h200"
    assert "MEMFIT_HARDWARE=h200" in document["source"]
    assert "139.70 GiB by one process on one device" in Answer(capsys, "detect").out


def test_detect_shows_what_the_driver_says(tmp_path: Path) -> None:
    """Through a driver library, every visible device is listed, with what others hold of it."""
    environ = Driver(gpus=(A40, replace(A40, used=10000))).environ(tmp_path)
    result = _console("detect", environ=environ)
    assert result.returncode == 0
    shown = result.stdout.splitlines()
    assert shown[0] == "NVIDIA A40 (a40)"
    assert [line.split(":")[0].strip() for line in shown if " device " in line and "GiB usable" in line] == [
        "device 0",
        "device 1",
    ]
    assert "9.77 GiB held by others" in result.stdout
    answer = json.loads(_console("detect", "--json", environ=environ).stdout)
    assert answer["gpus_per_node"] == len(answer["devices"]) == 2
    assert answer["held_bytes"] == 10000 << 20


def test_settings_without_a_word_are_those_of_a_launch() -> None:
    """The console's defaults are the ones that a hardware group composes."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "memfit" / "launch.yaml"), resolve=False)
    assert isinstance(node, dict)
    assert read_settings({k: v for k, v in node["memfit"].items() if k not in NOT_SETTINGS}) == Settings()


def _console(
    *arguments: str, code: str = "", environ: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    run = "import sys; from hydra_plugins.memfit.cli.main import main; status = main(sys.argv[1:])"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", f"{run}\n{code}\nraise SystemExit(status)", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**environ, "PYTHONPATH": path}, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (("detect", "--json"), ("hydra", "rich", "numpy", "torch")),
        (("check", *SMALL, "--json"), ("rich", "numpy", "torch", "verl", "transformers")),
    ],
)
def test_only_what_is_needed_is_imported(arguments: tuple[str, ...], absent: tuple[str, ...]) -> None:
    """A command loads no library that its answer does not need."""
    result = _console(*arguments, code=f"print([m for m in {absent!r} if m in sys.modules], file=sys.stderr)")
    assert result.stderr.strip().splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`memfit check --json | head -n 1` ends quietly."""
    check = f"'{sys.executable}' -m hydra_plugins.memfit.cli.main check {' '.join(SMALL)} --json"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        ["bash", "-c", f"{check} | head -n 1"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (result.stdout, result.stderr) == ("{\n", "")


@pytest.mark.parametrize(
    ("left_out", "warning"),
    [
        (VLLM, "actor_rollout_ref.rollout.name is not set, and verl 0.9.1 stops without it"),
        (MODEL, "actor_rollout_ref.model.path is verl's own placeholder"),
    ],
)
def test_what_a_launch_leaves_open_is_said(left_out: str, warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine or a checkpoint that nobody named is counted as verl's example would have it, and a warning names the key."""
    words = [word for word in SMALL if word != left_out]
    assert warning in " ".join(Answer(capsys, "check", *words, "--json").json["warnings"])
