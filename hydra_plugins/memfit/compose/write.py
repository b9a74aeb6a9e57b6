"""Write a plan into the composed config, so that the framework reads exactly what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.compose.plain import ABSENT, read, value_at
from hydra_plugins.memfit.planning.problem import Plan

NOT_OURS = frozenset({"hydra", "memfit"})


def write_plan(config: DictConfig, plan: Plan, pinned: Iterable[str], before: Mapping[str, Any]) -> None:
    """Set the plan's changes in ``config`` and hold every other knob, and every pinned key, at its value ``before``.

    A key whose value is an interpolation of a key that was changed would follow it; the plan was made for the old
    value, so a knob that would move gets its old value in plain. Raises `MemfitError` when a value cannot be set.
    """
    wanted = {change.key: change.new for change in plan.changes}
    still = {knob.key for knob in plan.problem.knobs}.union(pinned).difference(wanted)
    held = {key: value_at(before, key) for key in still}  # read before anything is written: ``before`` may be lazy
    typed = {key: _typed(value, value_at(before, key)) for key, value in wanted.items()}
    for key, value in typed.items():
        _set(config, key, value)
    walked: dict[str, DictConfig | None] = {"": config}
    following = {key: value for key, value in held.items() if value is not ABSENT and _follows(key, walked)}
    moved = {key: value for key, value in following.items() if read(config, key) != value}
    for key, value in moved.items():
        _set(config, key, value)
    _verify(config, {**(following if moved else {}), **wanted})


def _follows(key: str, walked: dict[str, DictConfig | None]) -> bool:
    """Whether ``key``, or a section that it is in, is an interpolation: nothing else can move with another key.

    ``walked``: the sections that were reached without one, by dotted key, with ``""`` for the whole config; knobs share them.
    """
    section, _, name = key.rpartition(".")
    parent = _reached(section, walked)
    return parent is None or name not in parent or OmegaConf.is_interpolation(parent, name)


def _reached(key: str, walked: dict[str, DictConfig | None]) -> DictConfig | None:
    """Return the section, or ``None`` where the way to it holds an interpolation, a list or nothing."""
    if key not in walked:
        above, _, name = key.rpartition(".")
        parent = _reached(above, walked)
        is_own = parent is not None and not OmegaConf.is_interpolation(parent, name)
        node = parent.get(name) if parent is not None and is_own else None
        walked[key] = node if isinstance(node, DictConfig) else None
    return walked[key]


def _verify(config: DictConfig, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if read(config, key) != value:
            raise MemfitError(
                f"{key} was planned as {value!r} and reads as {read(config, key)!r} once written: another key "
                f"of the config sets it. Pin it (memfit.pin=[{key}]) or take the interpolation away."
            )


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Assign in the section that the key names; a top-level section that does not exist is never created."""
    section, _, name = key.rpartition(".")
    parent = _section(config, section.split(".")) if section else config
    if not isinstance(parent, DictConfig):
        raise MemfitError(f"the plan sets {key}, but the config has no section {section!r} to hold it.")
    try:
        with flag_override(parent, ["struct", "readonly"], [False, False]):
            parent[name] = value
    except OmegaConfBaseException as error:
        raise MemfitError(f"{key} cannot hold the planned value {value!r}: {error}") from error


def _section(config: DictConfig, names: list[str]) -> Any:
    """Return the section; below a top-level one that exists, what is missing of it is made (actor -> actor.fsdp)."""
    node: Any = OmegaConf.select(config, names[0])
    for name in names[1:]:
        if not isinstance(node, DictConfig):
            return None
        if name not in node:
            with flag_override(node, ["struct", "readonly"], [False, False]):
                node[name] = {}
        node = node[name]
    return node


def _typed(value: Any, old: Any) -> Any:
    """Return ``value`` as the kind of number that stood there: 1 for 1.0 and the other way round are the same plan."""
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
