"""The memfit node: defaults, and one clear error for each kind of wrong value."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.paths import conf_dir
from hydra_plugins.memfit.base.settings import Lengths, Settings
from hydra_plugins.memfit.compose.settings import is_strict, read_settings


def composed() -> dict[str, Any]:
    """Return the node as conf/memfit/launch.yaml brings it, without its guard."""
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "memfit" / "launch.yaml"))
    assert isinstance(node, dict)
    return {key: value for key, value in node["memfit"].items() if key != "unplanned"}


def test_the_composed_defaults_are_the_defaults() -> None:
    """conf/memfit/launch.yaml names every setting, with the default that the code has."""
    assert read_settings(composed()) == Settings()
    assert set(composed()) == set(Settings.__dataclass_fields__)


def test_values_are_taken() -> None:
    """Each setting arrives, as the type that the planner reads."""
    node = {
        "goal": "fast",
        "margin": 0,
        "strict": False,
        "allow_semantic": True,
        "pin": ["a.b"],
        "report": "short",
        "lengths": {"mean": 345, "max": 1100, "image": 0},
        "framework": "verl",
        "framework_version": "0.9.1",
        "engine_version": "0.11.0",
        "host_memory_bytes": 1 << 40,
        "exact": True,
        "mapping": {"batch_size": "my.batch"},
        "hardware": {"name": "h200"},
        "model": {"hidden_size": 8},
    }

    assert read_settings(node) == Settings(
        goal="fast",
        margin=0.0,
        strict=False,
        allow_semantic=True,
        pin=("a.b",),
        report="short",
        lengths=Lengths(mean=345, max=1100, image=0),
        framework="verl",
        framework_version="0.9.1",
        engine_version="0.11.0",
        host_memory_bytes=1 << 40,
        exact=True,
        mapping={"batch_size": "my.batch"},
    )


WRONG = [
    ("goal", "fastest", "one of fit, fast"),
    ("goal", None, "one of fit, fast"),
    ("margin", 1, "from 0 to below 1"),
    ("margin", -0.1, "from 0 to below 1"),
    ("margin", math.nan, "from 0 to below 1"),
    ("margin", math.inf, "from 0 to below 1"),
    ("margin", "0.1", "from 0 to below 1"),
    ("margin", True, "from 0 to below 1"),
    ("strict", "no", "true or false"),
    ("strict", 1, "true or false"),
    ("allow_semantic", "yes", "true or false"),
    ("exact", 0, "true or false"),
    ("pin", "a.b", "a list of config keys"),
    ("pin", [1], "a list of config keys"),
    ("pin", {"a": 1}, "a list of config keys"),
    ("report", "fulll", "one of full, short, html, off"),
    ("lengths", 345, "mean, max and image"),
    ("lengths", {"avg": 1}, "mean, max and image"),
    ("lengths", {"mean": 0}, "a whole number above 0"),
    ("lengths", {"max": 1.5}, "a whole number above 0"),
    ("lengths", {"image": -1}, "a whole number, or null"),
    ("lengths", {"mean": 9, "max": 8}, "the mean cannot be the larger"),
    ("framework", 3, "a text"),
    ("framework_version", 0.9, "a text"),
    ("engine_version", True, "a text"),
    ("engine_version", "latest", "the number of a release"),
    ("host_memory_bytes", -1, "a whole number above 0"),
    ("host_memory_bytes", "1TB", "a whole number above 0"),
    ("host_memory_bytes", True, "a whole number above 0"),
    ("mapping", [], "a mapping"),
    ("mapping", {"a": 1}, "a mapping"),
    ("margn", 0.1, "Settings: .*margin"),
]


@pytest.mark.parametrize(("key", "value", "says"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_a_wrong_value_is_one_clear_error(key: str, value: object, says: str) -> None:
    """The message names the key, shows the value, and says what is valid."""
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings({**composed(), key: value})

    assert f"memfit.{key}" in str(caught.value)


@pytest.mark.parametrize(("node", "strict"), [({}, True), ({"strict": False}, False), ({"strict": "no"}, True)])
def test_strictness_of_a_broken_node(node: dict[str, Any], strict: bool) -> None:
    """Only a plain false makes an error a warning; a typing error in it does not."""
    assert is_strict(node) is strict
