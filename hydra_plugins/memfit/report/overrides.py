"""Changes as overrides: text that a user can paste behind ``+hardware=`` on the command line of a launch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from hydra_plugins.memfit.planning.problem import Change, Value

_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NOT_TEXT = frozenset({"true", "false", "null", "nan", "inf", "none"})


def value_text(value: Value) -> str:
    """Return ``value`` in the grammar of Hydra's overrides, such that it is read back with the same type.

    >>> value_text(None), value_text(True), value_text(0.55), value_text("a b")
    ('null', 'true', '0.55', "'a b'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    return repr(value)


def override(key: str, value: Value, *, prefix: str = "") -> str:
    """Return ``key=value``, quoted for a shell where that is needed; ``prefix`` is Hydra's ``+``, ``++`` or nothing."""
    return shlex.quote(f"{prefix}{key}={value_text(value)}")


def overrides(changes: Iterable[Change], *, absent: frozenset[str] = frozenset()) -> list[str]:
    """Return one override for each change; keys in ``absent`` are not in the framework's yaml and get ``++``."""
    return [override(c.key, c.new, prefix="++" if c.key in absent else "") for c in changes]


def _is_plain(text: str) -> bool:
    return bool(_PLAIN_TEXT.fullmatch(text)) and text.lower() not in _NOT_TEXT


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
