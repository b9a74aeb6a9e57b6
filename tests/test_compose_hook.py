"""The hook under ``compose()``, with verl's own config and the real adapter, planner and report."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.compose.plain import leaves, plain, value_at
from support.hydra_app import BATCH, LAUNCH, write_app

ROLLOUT_BATCH = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a config directory with verl's config, and one that asks for the hardware in its defaults list."""
    folder = tmp_path_factory.mktemp("app")
    listed = "defaults: [config, hardware: h200, _self_]\nhydra: {job: {env_copy: [PATH]}}\n"
    nulled = "defaults: [config, hardware: h200, _self_]\nmemfit: null\n"
    write_app(folder, listed=listed, nulled=nulled, **{"extra/small": "# @package _global_\ntrainer: {nnodes: 1}\n"})
    return folder / "conf"


@pytest.fixture
def composed(conf: Path) -> Compose:
    """Return a function that composes the given words, from a config, in this process."""

    def run(*words: str, name: str = "config", hydra: bool = False) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose(name, list(words), return_hydra_config=hydra)

    return run


def kept(config: DictConfig) -> dict[str, Any]:
    """The record of the plan that the hook keeps in the ``hydra`` node."""
    document: dict[str, Any] = json.loads(config.hydra.memfit)
    return document


def changed(composed: Compose, words: Sequence[str], *more: str, name: str = "config") -> dict[str, Any]:
    """Return what the plan changed: the differing leaves of the config with and without the hardware group."""
    before = plain(composed(*words, name="config"))
    after = plain(composed(*words, *more, name=name))
    keys = {*leaves(before), *leaves(after)}
    return {key: value_at(after, key) for key in sorted(keys) if value_at(before, key) != value_at(after, key)}


def refusal(composed: Compose, *words: str, name: str = "config") -> str:
    """Return the message of the exception that stops the composition."""
    with pytest.raises(Exception) as caught:
        composed(*words, name=name)
    return f"{caught.value} {caught.value.__cause__ or ''}"


def test_the_planned_config_is_ordinary(composed: Compose) -> None:
    """Plain values of the same types, no node and no resolver of memfit, nothing but what the record says."""
    config = composed(*LAUNCH, "+hardware=h200", hydra=True)

    record = kept(config)
    assert isinstance(record, dict)
    assert "memfit" not in config
    assert record["changes"] != []
    for change in record["changes"]:
        assert OmegaConf.select(config, change["key"]) == change["to"]
        section, _, name = change["key"].rpartition(".")
        assert not OmegaConf.is_interpolation(OmegaConf.select(config, section), name)
    with_group = {change["key"] for change in record["changes"]}
    assert set(changed(composed, LAUNCH, "+hardware=h200")) <= with_group
    assert "memfit" not in OmegaConf.to_yaml(config.actor_rollout_ref)
    assert isinstance(OmegaConf.select(config, BATCH), int)


def test_it_resolves_where_memfit_does_not_exist(composed: Compose) -> None:
    """A worker that unpickles the config, without memfit on its path, reads the planned values."""
    config = composed(*LAUNCH, "+hardware=h200")
    program = (
        "import pickle, sys; from omegaconf import OmegaConf; c = pickle.load(sys.stdin.buffer); OmegaConf.resolve(c);"
        f"print(OmegaConf.select(c, {BATCH!r}), any('memfit' in m for m in sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(config), capture_output=True, cwd="/")

    assert done.stdout.decode().split() == [str(OmegaConf.select(config, BATCH)), "False"], done.stderr.decode()


def test_a_value_in_front_is_requested_and_one_behind_is_pinned(composed: Compose) -> None:
    """The same words mean two things: in front of the group the value may be changed, behind it never."""
    own = f"{BATCH}=32"
    words = [word for word in LAUNCH if not word.startswith(BATCH)]

    assert changed(composed, [*words, own], "+hardware=h200")[BATCH] < 32

    pinned = composed(*words, "+hardware=h200", own, hydra=True)
    assert OmegaConf.select(pinned, BATCH) == 32
    assert BATCH in kept(pinned)["pinned"]


@pytest.mark.parametrize("pin", [BATCH, "actor_rollout_ref.actor"])
def test_pins_of_the_setting(composed: Compose, pin: str) -> None:
    """memfit.pin holds a key, or everything in a section, wherever the value comes from."""
    config = composed(*LAUNCH, "+hardware=h200", f"memfit.pin=[{pin}]")

    assert OmegaConf.select(config, BATCH) == 32


def test_in_a_defaults_list_every_word_is_pinned(composed: Compose) -> None:
    """With the group in the user's yaml there is no order: the command line is pinned, and env_copy is kept."""
    config = composed(*LAUNCH, name="listed", hydra=True)

    assert OmegaConf.select(config, BATCH) == 32
    assert list(config.hydra.job.env_copy) == ["PATH"]
    assert "PATH" in config.hydra.job.env_set
    assert BATCH in kept(config)["pinned"]


def test_a_group_behind_pins_nothing(composed: Compose) -> None:
    """A config group selects defaults: what its file sets is requested."""
    config = composed(*LAUNCH, "+hardware=h200", "+extra=small", hydra=True)

    assert kept(config)["pinned"] == []


def test_an_unset_value_that_verl_needs_is_filled_in(composed: Compose) -> None:
    """Without any micro-batch verl refuses to start; the plan gives it one."""
    words = [word for word in LAUNCH if "micro_batch_size_per_gpu" not in word]

    filled = changed(composed, words, "+hardware=h200")

    assert filled[BATCH] >= 1
    assert filled[ROLLOUT_BATCH] >= 1


@pytest.mark.parametrize(("rank", "reports"), [("0", True), ("1", False), ("7", False)])
def test_rank_0_reports_for_all_ranks_of_torchrun(
    composed: Compose, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, reports: bool
) -> None:
    """torchrun composes the config once a rank; eight panels would hide the one that counts."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)

    composed(*LAUNCH, "+hardware=h200")

    assert ("memfit: " in capfd.readouterr().err) == reports


def test_one_report_for_two_compositions(composed: Compose, capfd: pytest.CaptureFixture[str]) -> None:
    """The same launch composed twice gives the same config and one report."""
    first = composed(*LAUNCH, "+hardware=h200", "memfit.report=short")
    second = composed(*LAUNCH, "+hardware=h200", "memfit.report=short")

    assert first == second
    assert capfd.readouterr().err.count("memfit: ") == 1


@pytest.mark.parametrize(("style", "lines"), [("full", range(15, 60)), ("short", range(1, 2)), ("off", range(1))])
def test_report_styles(composed: Compose, capfd: pytest.CaptureFixture[str], style: str, lines: range) -> None:
    """The report goes to stderr, as long as was asked for; stdout stays the application's."""
    composed(*LAUNCH, "+hardware=h200", f"memfit.report={style}")

    captured = capfd.readouterr()
    assert len(captured.err.splitlines()) in lines
    assert captured.out == ""


def test_auto_takes_the_answer_of_the_environment(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without an accelerator MEMFIT_HARDWARE answers for auto, and the record says so."""
    monkeypatch.setenv("MEMFIT_HARDWARE", "h200")

    named = composed(*LAUNCH, "+hardware=h200", hydra=True)
    auto = composed(*LAUNCH, "+hardware=auto", hydra=True)

    assert "MEMFIT_HARDWARE" in kept(auto)["hardware"]["source"]
    assert auto.actor_rollout_ref == named.actor_rollout_ref


def test_facts_of_the_hardware_can_be_overridden(composed: Compose) -> None:
    """A smaller capacity from the command line counts, and the record says where it came from."""
    config = composed(*LAUNCH, "+hardware=h200", "memfit.hardware.capacity_bytes=85000000000", hydra=True)

    assert kept(config)["hardware"]["capacity_bytes"] == 85_000_000_000
    assert "capacity_bytes from the command line" in kept(config)["hardware"]["source"]
    assert kept(config)["peak_bytes"] <= 85_000_000_000


BAD = [
    ("unknown hardware", [*LAUNCH, "+hardware=nope"], "Could not find 'hardware/nope'"),
    ("two groups", [*LAUNCH, "+hardware=h200", "+hardware=a40"], "hardware"),
    ("two groups, one overriding", [*LAUNCH, "+hardware=h200", "hardware=a40"], "twice"),
    ("no plus", [*LAUNCH, "hardware=h200"], r"\+hardware=h200"),
    ("unknown setting", [*LAUNCH, "+hardware=h200", "memfit.margn=0.1"], "margn"),
    ("the section taken away", [*LAUNCH, "+hardware=h200", "~memfit"], "Could not delete 'memfit'"),
    ("the hardware taken away", [*LAUNCH, "+hardware=h200", "~memfit.hardware"], r"\+hardware=auto"),
    ("unknown setting, added", [*LAUNCH, "+hardware=h200", "+memfit.margn=0.1"], "memfit.margn is not a setting"),
    ("margin out of range", [*LAUNCH, "+hardware=h200", "memfit.margin=1.5"], "memfit.margin is 1.5"),
    ("margin of a wrong type", [*LAUNCH, "+hardware=h200", "memfit.margin=much"], "memfit.margin is 'much'"),
    ("goal", [*LAUNCH, "+hardware=h200", "memfit.goal=quick"], "one of fit, fast"),
    ("pin of an unknown key", [*LAUNCH, "+hardware=h200", "memfit.pin=[trainer.nodes]"], "trainer.nnodes"),
    ("pin that is no list", [*LAUNCH, "+hardware=h200", "memfit.pin=trainer.nnodes"], "a list of config keys"),
    ("framework", [*LAUNCH, "+hardware=h200", "memfit.framework=verll"], "Did you mean 'verl'"),
    ("framework version", [*LAUNCH, "+hardware=h200", "memfit.framework_version='0.1'"], "0.1"),
    ("capacity", [*LAUNCH, "+hardware=h200", "memfit.hardware.capacity_bytes=141GB"], "capacity_bytes"),
    ("no accelerator here", [*LAUNCH, "+hardware=auto"], "MEMFIT_HARDWARE"),
    ("no room for the pins", ["+hardware=l4", *LAUNCH], "no plan fits"),
    ("another kind of config", ["~actor_rollout_ref", "~critic", "+hardware=h200"], "memfit.framework=NAME"),
]


@pytest.mark.parametrize(("words", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_is_wrong_is_one_clear_error(composed: Compose, words: list[str], says: str) -> None:
    """Each mistake stops the composition with a message that shows the way out."""
    message = refusal(composed, *words)

    assert re.search(says, message), message


def test_a_yaml_that_takes_the_section_away(composed: Compose) -> None:
    """A config that replaces the group's section by something else stops with a message that says so."""
    assert "took it away or replaced it" in refusal(composed, *LAUNCH, name="nulled")


@pytest.mark.parametrize(
    "words",
    [["+hardware=auto", *LAUNCH], ["+hardware=l4", *LAUNCH], [*LAUNCH, "+hardware=h200", "+memfit.margn=1"]],
    ids=["no accelerator here", "no room", "unknown setting"],
)
def test_not_strict_warns_and_goes_on(composed: Compose, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """With memfit.strict=false every reason is a warning, and the config is the one that was composed."""
    as_composed = composed(*LAUNCH)

    config = composed(*words, "memfit.strict=false", hydra=True)

    assert {key: config[key] for key in as_composed} == as_composed
    assert kept(config)["planned"] is False
    assert "without a plan" in capfd.readouterr().err


def test_a_config_that_was_never_planned_does_not_resolve(conf: Path) -> None:
    """If Hydra ever stopped to ask for the plan, the node that stays behind raises when the config is resolved."""
    launch = OmegaConf.load(Path(__file__).parents[1] / "conf" / "memfit" / "launch.yaml")

    with pytest.raises(Exception, match="Hydra did not ask memfit"):
        OmegaConf.to_container(launch.memfit, resolve=True)


def test_unresolvable_neighbours_do_no_harm(composed: Compose) -> None:
    """Interpolations that only the run can resolve, and missing values, stay as they are."""
    own = ["+mine.late=${hydra:runtime.output_dir}", "+mine.need=???", "+mine.own=${my.resolver:1}"]

    config = composed(*LAUNCH, "+hardware=h200", *own)

    assert OmegaConf.to_container(config.mine) == {
        "late": "${hydra:runtime.output_dir}",
        "need": "???",
        "own": "${my.resolver:1}",
    }
