"""verl's supervised fine-tuning: both entries are recognised, read, planned and written in their own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, NotModelled
from hydra_plugins.memfit.base.settings import Lengths, Settings
from hydra_plugins.memfit.cli.main import main
from hydra_plugins.memfit.compose import hook
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.frameworks import registry
from hydra_plugins.memfit.frameworks.verl import defaults, supervised_keys
from hydra_plugins.memfit.frameworks.verl.supervised import WRITABLE_KEYS, VerlSupervisedAdapter
from hydra_plugins.memfit.frameworks.verl.supervised_keys import ENGINE, LEGACY, VERSIONS_OF
from hydra_plugins.memfit.hardware.catalog import load as load_hardware
from hydra_plugins.memfit.memory.breakdown import Estimate
from hydra_plugins.memfit.model.resolve import load as load_model
from hydra_plugins.memfit.planning.context import Context
from hydra_plugins.memfit.planning.problem import Plan, Problem
from hydra_plugins.memfit.planning.search import check, make_plan
from support.verl_defaults import as_text, extract_supervised
from support.verl_wheels import package

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "verl.md").read_text(encoding="utf-8")
EVERY = [(version, entry) for entry in supervised_keys.ENTRIES for version in VERSIONS_OF[entry]]
MICRO, BUDGET = "data.micro_batch_size_per_gpu", "data.max_token_len_per_gpu"
STATIC = {"data.use_dynamic_bsz": False}
every_entry = pytest.mark.parametrize(("version", "entry"), EVERY)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hook notes in the environment ends with the test."""
    monkeypatch.setenv(hook.REPORTED, "")


def problem(
    values: Mapping[str, Any] = {},
    *,
    version: str = "0.9.1",
    entry: str = ENGINE,
    hardware: str = "a100-80",
    model: str = "qwen2.5-7b",
    gpus: int | None = 2,
    environ: Mapping[str, str] = {},
    pinned: tuple[str, ...] = (),
    **options: Any,
) -> Problem:
    """Read one entry's own defaults with ``values`` set."""
    config = OmegaConf.create(supervised_keys.load(version, entry))
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    context = Context(
        hardware=load_hardware(hardware),
        settings=Settings(framework_version=version, **options),
        resolve_model=load_model,
        model=load_model(model),
        gpus_per_node=gpus,
        environ=environ,
        pinned=frozenset(pinned),
    )
    return VerlSupervisedAdapter().problem(plain(config), context)


def estimate(values: Mapping[str, Any] = {}, **options: Any) -> Estimate:
    """The prediction for the launch as it is."""
    return check(problem(values, **options)).estimate


def changes(plan: Plan) -> dict[str, object]:
    """What the plan sets."""
    return {change.key: change.new for change in plan.changes}


@every_entry
def test_each_entrys_own_config_is_recognised(version: str, entry: str) -> None:
    """The composed config of either entry is of verl-sft alone."""
    assert registry.recognise(plain(OmegaConf.create(supervised_keys.load(version, entry)))).name == "verl-sft"


@every_entry
def test_a_step_has_a_pass_and_an_optimizer_step(version: str, entry: str) -> None:
    """Two phases; states of both: 4 + 8 bytes a parameter on two ranks, gradients of 4 in the step."""
    found = estimate(version=version, entry=entry)
    parameters = load_model("qwen2.5-7b").parameters
    step = found.phase("optimizer_step").components

    assert [phase.name for phase in found.phases] == ["train_step", "optimizer_step"]
    assert (step.weights, step.gradients) == (2 * parameters, 2 * parameters)
    assert step.optimizer_states == (4 + 2) * parameters  # two moments, and a temporary of one of them


@pytest.mark.parametrize(
    ("values", "entry", "version", "tokens", "bytes_each"),
    [
        # fsdp_sft_trainer: padded to max_length; the shifted copy and torch's cross entropy in fp32
        ({MICRO: 4}, LEGACY, "0.4.1", 4 * 1024, 16),
        ({MICRO: 4, "use_remove_padding": True}, LEGACY, "0.5.0", 4 * 1024, 16),
        ({MICRO: 4, "use_remove_padding": True, "ulysses_sequence_parallel_size": 2}, LEGACY, "0.6.1", 2 * 1024, 14),
        # sft_trainer: log-probabilities by flash-attn; the division by a temperature in place up to 0.8
        ({}, ENGINE, "0.9.1", 8192, 2),
        ({"model.use_remove_padding": True, **STATIC, MICRO: 4}, ENGINE, "0.8.0", 4 * 1024, 4),
        ({**STATIC, MICRO: 2}, ENGINE, "0.9.1", 2 * 1024, 2),
        ({**STATIC, MICRO: 2, "model.use_remove_padding": False}, ENGINE, "0.9.1", 2 * 1024, 6),
    ],
)  # fmt: skip
def test_logits_at_the_head_of_each_entry(
    values: dict[str, Any], entry: str, version: str, tokens: int, bytes_each: int
) -> None:
    """Where the head decides, a small model's step holds that many bytes for each token and vocabulary entry."""
    found = estimate(values, entry=entry, version=version, model="qwen2.5-0.5b")

    assert found.phase("train_step").components.logits == bytes_each * tokens * load_model("qwen2.5-0.5b").vocab_size


def test_known_lengths_count() -> None:
    """A packed static micro-batch holds what the data has; a padded one holds max_length whatever the data has."""
    short = Lengths(mean=200, max=800)

    def peak(values: dict[str, Any], **options: Any) -> int:
        return estimate(values, model="qwen2.5-0.5b", **options).phase("train_step").peak_bytes

    packed, padded = {**STATIC, MICRO: 16}, {"version": "0.5.0", "entry": LEGACY}
    assert peak(packed, lengths=short) < peak(packed)
    assert peak({MICRO: 16}, lengths=short, **padded) == peak({MICRO: 16}, **padded)


def test_offload_between_steps_lowers_no_phase() -> None:
    """param_offload and optimizer_offload bring everything back for the step; they are no knobs here."""
    off = {"engine.param_offload": True, "engine.optimizer_offload": True}

    assert estimate(off).phases == estimate().phases
    assert not {key for key in off if key in WRITABLE_KEYS}


@pytest.mark.parametrize(
    ("entry", "version", "switch", "expected"),
    [
        (ENGINE, "0.9.1", "engine.offload_policy", {"engine.strategy": "fsdp2"}),
        (LEGACY, "0.5.0", "model.fsdp_config.cpu_offload",
         {"model.strategy": "fsdp", "model.fsdp_config.offload_params": True}),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_go_to_the_host(
    entry: str, version: str, switch: str, expected: dict[str, object]
) -> None:
    """14B in fp32 on two GPUs: only the host holds it, through the switch and companions of each entry."""
    plan = make_plan(problem(entry=entry, version=version, model="qwen2.5-14b"))

    assert plan.fits
    assert changes(plan).items() >= {switch: True, **expected}.items()


def test_unset_and_unfitting_micro_batches_are_filled_in() -> None:
    """An unset micro-batch gets the largest that fits; one that does not divide a rank's sequences, a smaller one."""
    unset = changes(make_plan(problem({**STATIC, MICRO: None}, model="qwen2.5-0.5b")))
    uneven = changes(make_plan(problem({MICRO: 3}, version="0.5.0", entry=LEGACY, model="qwen2.5-0.5b")))

    assert isinstance(unset[MICRO], int) and 128 % unset[MICRO] == 0
    assert uneven == {MICRO: 2}


def test_a_budget_below_one_sequence_is_raised() -> None:
    """verl asserts that the longest sequence fits into a micro-batch; sequence parallelism divides it."""
    assert changes(make_plan(problem({BUDGET: 512})))[BUDGET] == 1024
    assert BUDGET not in changes(make_plan(problem({BUDGET: 512, "engine.ulysses_sequence_parallel_size": 2})))
    with pytest.raises(ConfigError, match="one sequence of 1024 tokens"):
        problem({BUDGET: 512}, pinned=(BUDGET,))


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ({"engine.strategy": "megatron"}, {}, "engine.strategy=megatron"),
        ({"engine.strategy": "veomni"}, {}, "engine.strategy=veomni"),
        (
            {"engine.strategy": "torchtitan"},
            {},
            "Set engine.strategy=fsdp, or go on unplanned with memfit.strict=false",
        ),
        ({"model.lora_adapter_path": "here"}, {}, "the rank of a given adapter is not read"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(values: dict[str, Any], options: dict[str, Any], says: str) -> None:
    """The message names the key, its value and the way on."""
    with pytest.raises(NotModelled, match=re.escape(says)):
        problem(values, **options)


@pytest.mark.parametrize(("strategy", "near"), [("fsdp_2", "fsdp2"), ("megatorn", "megatron")])
def test_a_strategy_that_the_release_lacks_is_a_slip(strategy: str, near: str) -> None:
    """A misspelt name is told from one that is only not modelled."""
    with pytest.raises(ConfigError, match=f"has no such strategy; it has .* Did you mean '{near}'"):
        problem({"engine.strategy": strategy})


def test_what_would_fail_at_any_size_is_said() -> None:
    """Batches that cannot be shared out, sequence parallelism on padding, FSDP1's offload under FSDP2."""
    blocked = problem({"data.train_batch_size": 5}, entry=LEGACY, version="0.4.1").blockers
    padded = problem({"engine.ulysses_sequence_parallel_size": 2, "model.use_remove_padding": False}).blockers

    assert any("Write data.train_batch_size=6" in message for message in blocked)
    assert any("needs model.use_remove_padding=true" in message for message in padded)
    with pytest.raises(ConfigError, match=r"cpu_offload=true with model\.strategy=fsdp2"):
        problem({"model.fsdp_config.cpu_offload": True}, entry=LEGACY, version="0.4.1")


def test_the_entry_must_exist_in_the_release() -> None:
    """A config of one entry read as a release without it is an error that names the releases with it."""
    with pytest.raises(ConfigError, match=r"0\.9\.1 has no fsdp_sft_trainer .*0\.4\.1, 0\.5\.0, 0\.6\.1"):
        config = plain(OmegaConf.create(supervised_keys.load("0.5.0", LEGACY)))
        context = Context(
            hardware=load_hardware("a100-80"),
            settings=Settings(framework_version="0.9.1"),
            resolve_model=load_model,
            model=load_model("qwen2.5-7b"),
        )
        VerlSupervisedAdapter().problem(config, context)


@pytest.mark.parametrize(
    ("environ", "gpus", "counts"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, None, (4, 2)),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 8, (8, 1)),
        ({}, None, (1, 1)),
    ],
)
def test_torchrun_says_how_many_gpus(environ: dict[str, str], gpus: int | None, counts: tuple[int, int]) -> None:
    """What is told on the console counts first, then torchrun's environment, then verl's own unread key, with a word."""
    found = problem(environ=environ, gpus=gpus)

    assert (found.gpus_per_node, found.nodes) == counts
    assert any("torchrun does not read it" in line for line in found.warnings) == (not environ and not gpus)


@pytest.mark.parametrize(
    "words", [["model.path=Qwen/Qwen2.5-0.5B-Instruct"], ["model.partial_pretrain=Qwen/Qwen2.5-0.5B"]]
)
def test_the_console_takes_the_entry_from_the_keys(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """0.6 has both entries: the model's key says which; the other entry's keys are of no use beside it."""
    status = main(["plan", "--framework", "verl-sft", "--framework-version", "0.6.1", "--hardware", "h100", "--gpus", "1",
                   "--json", *words])  # fmt: skip

    assert status == 0
    assert ("averages the loss over each micro-batch" in capsys.readouterr().out) == ("partial" in words[0])


def test_the_table_of_keys_is_the_frozen_list() -> None:
    """Every key that memfit may write for supervised fine-tuning stands in docs/verl.md once, and in some release."""
    rows = re.findall(r"(?:^\|.*\|\n)+", PAGE[PAGE.index("<!-- supervised-keys -->") :], re.MULTILINE)[0].splitlines()
    keys = [key for row in rows[2:] for key in re.findall(r"`([a-z0-9_.]+)`", row.split("|")[1])]

    assert sorted(keys) == sorted(WRITABLE_KEYS)
    assert [key for key in WRITABLE_KEYS if not supervised_keys.versions_with(key)] == []


def compose_entry(version: str, entry: str, words: list[str]) -> Any:
    """Return one entry's real config of that release, composed by Hydra."""
    directory = package(version) / "trainer" / "config"
    with initialize_config_dir(str(directory.resolve()), version_base=None):
        config: DictConfig = compose(supervised_keys.ENTRIES[entry], overrides=words)
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.verl
@every_entry
def test_the_real_config_is_planned(version: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own file, composed by Hydra with the hook as under torchrun, changes in listed keys alone."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = ["data.max_length=8192"] if entry == LEGACY else [f"{BUDGET}=65536"]
    model = f"{supervised_keys.keys_of(entry).path}=Qwen/Qwen2.5-7B-Instruct"
    chosen = ["+hardware=a100-40", f"memfit.framework_version={version}", "memfit.report=off"]
    bare = compose_entry(version, entry, [*words, model])
    config = compose_entry(version, entry, [*words, model, *chosen])
    changed = {key for key in flat(config) if flat(config)[key] != flat(bare).get(key)}

    assert changed and changed <= WRITABLE_KEYS
    assert not {"memfit", "hardware"} & set(config)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}".lstrip(".")).items()}


@pytest.mark.verl
def test_the_embedded_yaml_is_that_of_the_wheels() -> None:
    """supervised.json is what the wheels say, byte for byte."""
    record = extract_supervised({version: package(version) for version in defaults.VERSIONS})

    assert as_text(record) == (defaults.DATA / "supervised.json").read_text(encoding="utf-8")


@pytest.mark.verl
@pytest.mark.parametrize(
    ("shifted", "backward", "bytes_each"), [(True, True, 16), (False, True, 14), (True, False, 12), (False, False, 10)]
)
def test_autocasts_cross_entropy_holds_that_much(shifted: bool, backward: bool, bytes_each: int) -> None:
    """The loss of fsdp_sft_trainer, run op by op: bf16 logits, their shifted copy, and cross entropy in fp32."""
    import torch

    from tracer.ledger import Ledger

    rows, length, vocabulary, hidden = 4, 256, 8192, 64
    head = torch.nn.Parameter(torch.randn(vocabulary, hidden, dtype=torch.bfloat16))
    states = torch.randn(rows, length, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, length))

    def step() -> None:
        logits = states @ head.t()
        kept = logits[..., :-1, :].contiguous() if shifted else logits
        wanted = labels[:, 1:] if shifted else labels
        loss = torch.nn.functional.cross_entropy(  # autocast casts the logits
            kept.view(-1, vocabulary).float(), wanted.reshape(-1), reduction="none"
        )
        if backward:
            loss.sum().backward()

    with Ledger() as ledger, torch.set_grad_enabled(backward):
        step()
    live, peak = 0, 0
    for index, sign in ledger.log:
        live += sign * ledger.blocks[index].num_bytes
        peak = max(peak, live)

    assert peak / (rows * length * vocabulary) == pytest.approx(bytes_each, rel=0.02)
