"""Writing a plan back: the framework reads exactly what was planned, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.compose.plain import plain
from hydra_plugins.memfit.compose.write import write_plan
from hydra_plugins.memfit.planning.problem import Change, Knob, Plan
from support.plans import FITS, make_problem

CONFIG = """
actor:
  tokens: 16384
  share: 0.5
  offload: false
  n: 4
  unset: null
rollout:
  tokens: ${actor.tokens}
  n: ${actor.n}
critic: ???
names: [a, b]
"""


def config() -> DictConfig:
    """Return a closed and read-only config, as an application may compose it."""
    created = OmegaConf.create(CONFIG)
    assert isinstance(created, DictConfig)
    OmegaConf.set_struct(created, True)
    OmegaConf.set_readonly(created, True)
    return created


def write(changes: dict[str, Any], *, knobs: tuple[str, ...] = (), pinned: tuple[str, ...] = ()) -> dict[str, Any]:
    """Write a plan with these changes and knobs, and return the resolved config."""
    composed = config()
    before = plain(composed)
    problem = replace(
        make_problem(), knobs=tuple(Knob(key=key, requested=None, candidates=(), cost=1) for key in knobs)
    )
    plan = Plan(
        problem=problem,
        requested=FITS,
        estimate=FITS,
        changes=tuple(Change(key=key, old=None, new=new, kind="neutral", why="") for key, new in changes.items()),
    )
    write_plan(composed, plan, pinned, before)
    return plain(composed)


def test_values_are_written_and_followers_follow() -> None:
    """A key that the framework copies from a planned one keeps copying it."""
    after = write({"actor.n": 2, "actor.offload": True})

    assert after["actor"]["n"] == after["rollout"]["n"] == 2
    assert after["actor"]["offload"] is True


@pytest.mark.parametrize("still", [{"knobs": ("rollout.tokens",)}, {"pinned": ("rollout.tokens",)}])
def test_a_knob_or_a_pin_does_not_follow(still: dict[str, tuple[str, ...]]) -> None:
    """What the plan was made for stays, although the config would copy the changed value there."""
    after = write({"actor.tokens": 8192}, **still)

    assert after["actor"]["tokens"] == 8192
    assert after["rollout"]["tokens"] == 16384


def test_both_ends_of_a_copy_can_be_planned() -> None:
    """A follower with a value of its own gets it, in whatever order they are written."""
    after = write({"rollout.tokens": 4096, "actor.tokens": 8192})

    assert (after["actor"]["tokens"], after["rollout"]["tokens"]) == (8192, 4096)


@pytest.mark.parametrize(
    ("key", "new", "stands"),
    [
        ("actor.share", 1, 1.0),
        ("actor.tokens", 8192.0, 8192),
        ("actor.offload", True, True),
        ("actor.unset", 4, 4),
        ("actor.unset", 0.5, 0.5),
        ("actor.new", "auto", "auto"),
    ],
)
def test_numbers_keep_their_kind(key: str, new: object, stands: object) -> None:
    """A float stays a float and an int an int; what was unset, or not there, takes the planned kind."""
    value = write({key: new})["actor"][key.removeprefix("actor.")]

    assert (value, type(value)) == (stands, type(stands))


@pytest.mark.parametrize("key", ["critic.tokens", "ref.tokens", "actor.tokens.more", "names.0.x"])
def test_a_section_that_does_not_exist_is_not_made(key: str) -> None:
    """Writing below a missing section is an error that names the key: it would create an engine that nobody asked for."""
    with pytest.raises(MemfitError, match=key):
        write({key: 1})


def test_a_part_of_a_section_is_made() -> None:
    """Below a section that exists, a framework's dataclass may have more than its yaml writes out."""
    assert write({"actor.fsdp.offload_params": True})["actor"]["fsdp"] == {"offload_params": True}


def test_a_value_that_something_else_sets_is_noticed() -> None:
    """Two planned keys that are one node: the second write moves the first, and that is an error, not a wrong plan."""
    composed = OmegaConf.create({"actor": {"n": 4}, "alias": "${actor}"})
    assert isinstance(composed, DictConfig)
    changes = (
        Change(key="alias.n", old=4, new=1, kind="neutral", why=""),
        Change(key="actor.n", old=4, new=2, kind="neutral", why=""),
    )
    plan = Plan(problem=make_problem(), requested=FITS, estimate=FITS, changes=changes)

    with pytest.raises(MemfitError, match=r"alias\.n was planned as 1 and reads as 2"):
        write_plan(composed, plan, (), plain(composed))
