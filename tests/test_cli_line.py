"""``key=value`` words: Hydra's grammar, and Hydra's refusals."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.cli.line import apply, read_line

DEFAULTS = {"data": {"train_batch_size": 1024, "files": ["a"]}, "trainer": {"nnodes": 1, "name": None}}


def applied(*words: str) -> Any:
    """Return ``DEFAULTS`` after ``words``."""
    config = OmegaConf.create(DEFAULTS)
    apply(config, read_line(words).values, lambda key: "" if key == "trainer.in_a_dataclass" else f"no key {key}.")
    return OmegaConf.to_container(config)


@pytest.mark.parametrize(
    ("word", "section", "expected"),
    [
        ("data.train_batch_size=64", "data", {"train_batch_size": 64, "files": ["a"]}),
        ("++data.train_batch_size=64", "data", {"train_batch_size": 64, "files": ["a"]}),
        ("data.train_batch_size=1e3", "data", {"train_batch_size": 1000.0, "files": ["a"]}),
        ("data.train_batch_size=null", "data", {"train_batch_size": None, "files": ["a"]}),
        ("data.files=[x,'y z']", "data", {"train_batch_size": 1024, "files": ["x", "y z"]}),
        ("data={train_batch_size:8}", "data", {"train_batch_size": 8, "files": ["a"]}),
        ("+data.new.key=true", "data", {"train_batch_size": 1024, "files": ["a"], "new": {"key": True}}),
        ("~data.files", "data", {"train_batch_size": 1024}),
        ("trainer.name=a b", "trainer", {"nnodes": 1, "name": "a b"}),
        ("trainer.in_a_dataclass=3", "trainer", {"nnodes": 1, "name": None, "in_a_dataclass": 3}),
    ],
)
def test_words_set_what_hydra_would_set(word: str, section: str, expected: Any) -> None:
    """Values get Hydra's types; sections merge; a key that only the framework's code knows may be set."""
    assert applied(word)[section] == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "data.train_batchsize=64",
            r"no key data.train_batchsize. Did you mean data.train_batch_size\? .*\+data.train_b",
        ),
        ("dta.train_batch_size=64", r"Did you mean data.train_batch_size\?"),
        ("~data.nothing", "no key data.nothing"),
        ("data.train_batch_size=1,2", "is a sweep"),
        ("data.train_batch_size=range(1,5)", "is a sweep"),
        ("data.train_batch_size", "key=value"),
        ("data.train_batch_size=[1", "quotes around special characters"),
        ("++data.files.x=1", "cannot be set"),
        ("=3", "key=value"),
        ("+actor@actor_rollout_ref.actor=megatron_actor", "chooses a file of a config group"),
        ("model/engine=x", "chooses a file of a config group"),
    ],
)
def test_wrong_words_are_one_clear_error(word: str, message: str) -> None:
    """Each wrong word is a `ConfigError` that says what to write instead."""
    with pytest.raises(ConfigError, match=message) as error:
        applied(word)
    assert "\n" not in str(error.value)


def test_groups_settings_and_hydras_own_words_are_told_apart() -> None:
    """A launch line can be pasted whole: its groups are choices, `memfit.*` settings, `hydra.*` nobody's."""
    words = ["a.b=1", "+hardware=h200", "+model=qwen2.5-3b", "memfit.margin=0.1", "hydra.run.dir=x", "hydra/launcher=y"]
    line = read_line(words)
    assert [override.input_line for override in line.values] == ["a.b=1"]
    assert [override.input_line for override in line.settings] == ["memfit.margin=0.1"]
    assert line.groups == {"hardware": "h200", "model": "qwen2.5-3b"}


def test_two_hardware_groups_contradict_each_other() -> None:
    """The same group chosen twice is an error that names both."""
    with pytest.raises(ConfigError, match="h200 and a40"):
        read_line(["+hardware=h200", "hardware=a40"])


def test_a_section_called_model_is_no_group() -> None:
    """`model={...}` belongs to the framework."""
    assert read_line(["model={path:x}"]).groups == {}
