"""verl's embedded default configs: they load fast, resolve, and say what the real packages say."""

from __future__ import annotations

import re
import time
import zipfile
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError, UnknownName
from hydra_plugins.memfit.frameworks.verl import defaults
from support.verl_defaults import as_text, extract, wheel_of
from support.verl_wheels import installed_package, package, wheel_directory

EVERY_CONFIG = [(version, trainer) for version in defaults.VERSIONS for trainer in defaults.TRAINERS]


def select(version: str, key: str, trainer: str = "fsdp") -> Any:
    """Return one resolved default."""
    return OmegaConf.select(OmegaConf.create(defaults.load(version, trainer=trainer)), key)


@pytest.mark.parametrize(("version", "trainer"), EVERY_CONFIG)
def test_every_default_resolves(version: str, trainer: str) -> None:
    """What is left out of the data is nothing that a kept key refers to."""
    config = OmegaConf.create(defaults.load(version, trainer=trainer))

    OmegaConf.resolve(config)

    assert config.actor_rollout_ref.actor.strategy == trainer
    assert config.actor_rollout_ref.rollout.prompt_length == config.data.max_prompt_length


@pytest.mark.parametrize(
    ("key", "values"),
    [
        # One value for each of 0.4.1 0.5.0 0.6.1 0.7.1 0.8.0 0.9.1: changed defaults that decide whether a launch fits.
        ("actor_rollout_ref.rollout.max_num_seqs", (1024, 1024, 1024, 1024, 1024, 256)),
        ("actor_rollout_ref.rollout.enforce_eager", (True, True, False, False, False, False)),
        ("actor_rollout_ref.rollout.mode", ("sync", "sync", "sync", "async", "async", "async")),
        ("actor_rollout_ref.model.use_remove_padding", (False, False, False, True, True, True)),
        ("actor_rollout_ref.rollout.update_weights_bucket_megabytes", (None, 512, 512, None, None, None)),
        (
            "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes",
            (None, None, None, 2048, 2048, 2048),
        ),
        ("critic.fsdp.fsdp_size", (None, None, None, None, -1, -1)),
        ("critic.model.fsdp_config.fsdp_size", (-1, -1, -1, -1, None, None)),
    ],
)
def test_defaults_follow_the_version(key: str, values: tuple[Any, ...]) -> None:
    """The defaults that moved between versions are the ones of their version."""
    assert tuple(select(version, key) for version in defaults.VERSIONS) == values


def test_the_engine_has_no_default() -> None:
    """From 0.6 on verl leaves the rollout engine to the user: the value is missing, not null."""
    missing = {v: OmegaConf.is_missing(OmegaConf.create(defaults.load(v)).actor_rollout_ref.rollout, "name")
               for v in defaults.VERSIONS}  # fmt: skip

    assert missing == {"0.4.1": False, "0.5.0": False, "0.6.1": True, "0.7.1": True, "0.8.0": True, "0.9.1": True}


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("0.9.1", "critic.ppo_infer_max_token_len_per_gpu", 32768),
        ("0.7.1", "critic.ppo_infer_max_token_len_per_gpu", 32768),
        ("0.9.1", "actor_rollout_ref.rollout.enable_sleep_mode", True),
        ("0.9.1", "actor_rollout_ref.actor.fsdp_config.use_dynamic_bsz", True),
    ],
)
def test_fields_that_only_dataclasses_know(version: str, key: str, value: Any) -> None:
    """A field without a line in the yaml is listed apart, with its own default."""
    assert defaults.dataclass_only(version)[key] == value
    assert select(version, key) is None


def test_each_load_is_a_fresh_copy() -> None:
    """A caller may write into what it loaded."""
    defaults.load("0.9.1")["data"]["train_batch_size"] = 1

    assert defaults.load("0.9.1")["data"]["train_batch_size"] == 1024


@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_loading_takes_less_than_5_ms(version: str) -> None:
    """Reading one version's defaults costs a launch nothing that a user would notice (best of ten)."""

    def seconds() -> float:
        start = time.perf_counter()
        defaults.load(version)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(10)) < 0.005


@pytest.mark.parametrize(
    ("asked", "picked"),
    [
        *((version, version) for version in defaults.VERSIONS),
        ("0.6.0", "0.6.1"),
        ("0.9.2", "0.9.1"),
        ("0.9", "0.9.1"),
        ("v0.9.1", "0.9.1"),
        ("0.8.0.dev0", "0.8.0"),
        ("0.7.0.post1", "0.7.1"),
        (None, "0.9.1"),
    ],
)
def test_a_release_stands_for_its_series(asked: str | None, picked: str) -> None:
    """Another release of a known minor series gets that series' data; nothing known gives the newest."""
    assert defaults.pick_version(asked) == picked


@pytest.mark.parametrize("asked", ["0.3", "0.3.0.post1", "0.10.0.dev0", "1.0.0", "0.91", "main", ""])
def test_an_unknown_series_is_an_error(asked: str) -> None:
    """The message names the version, the known ones, and the override that chooses one."""
    with pytest.raises(ConfigError) as caught:
        defaults.pick_version(asked)

    for part in (asked, *defaults.VERSIONS, "memfit.framework_version=0.9.1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: defaults.load("0.9.0"),
        lambda: defaults.load("0.9.1", trainer="fsdp2"),
        lambda: defaults.engine_pin("0.9.0", "vllm"),
        lambda: defaults.engine_pin("0.9.1", "hf"),
        lambda: defaults.installed_engine_version("torch"),
    ],
)
def test_unknown_names_are_errors(call: Any) -> None:
    """A name that is not in the data is refused with the names that are."""
    with pytest.raises(UnknownName, match="Known: "):
        call()


@pytest.mark.parametrize("version", defaults.VERSIONS)
@pytest.mark.parametrize("engine", defaults.ENGINES)
def test_every_version_pins_its_engines(version: str, engine: str) -> None:
    """There is an engine release to assume for each version when none is installed."""
    assert re.match(r"\d+\.\d+\.\d+", defaults.engine_pin(version, engine))


@pytest.mark.verl
def test_the_installed_package_gives_the_committed_data() -> None:
    """Extracting again from the installed verl gives the committed file, byte for byte."""
    version = defaults.pick_version(defaults.installed_version())
    assert version == defaults.installed_version(), "install one of the supported versions"

    text = as_text(extract(installed_package(), version))

    assert text == (defaults.DATA / f"{version}.json").read_text(encoding="utf-8")


@pytest.mark.verl
@pytest.mark.parametrize("version", defaults.VERSIONS)
def test_the_wheel_gives_the_committed_data(version: str) -> None:
    """Extracting again from the released wheel gives the committed file, byte for byte."""
    text = as_text(extract(package(version), version))

    assert text == (defaults.DATA / f"{version}.json").read_text(encoding="utf-8")


@pytest.mark.verl
@pytest.mark.parametrize("version", defaults.VERSIONS)
@pytest.mark.parametrize("engine", defaults.ENGINES)
def test_engine_pins_are_those_of_the_wheel(version: str, engine: str) -> None:
    """engines.yaml quotes the requirement in the wheel's METADATA and ends at its newest release."""
    package(version)  # downloads the wheel when it is not there
    wheel = wheel_of(version, wheel_directory())
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"verl-{version}.dist-info/METADATA").decode()
    found = re.search(rf'^Requires-Dist: {engine}(?:\[[^]]*\])?([^;]*); extra == "{engine}"$', metadata, re.MULTILINE)
    assert found is not None
    quoted = OmegaConf.load(defaults.DATA / "engines.yaml").versions[version][engine]

    assert quoted.requirement == found[1].strip()
    assert defaults.engine_pin(version, engine) in re.findall(r"[<=]=([\w.]+)", found[1])
