"""Reading keys of config.json: class defaults for what is missing, one clear error for what is not usable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.model.families import Flag


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """The keys of one config.json (or of one part of it) over the defaults of its class."""

    given: Mapping[str, object]
    defaults: Mapping[str, object]
    owner: str
    """Whose values these are, for messages."""

    def get(self, key: str) -> object:
        """Return the value; an explicit null stays None, as the classes treat it."""
        return self.given[key] if key in self.given else self.defaults.get(key)

    def flag(self, flag: Flag) -> bool:
        """Return whether ``flag`` is set: itself, or the key that it names; raises `ModelNotFound` for no truth value."""
        value = self.get(flag) if isinstance(flag, str) else flag
        if value not in (None, False, True):
            raise ModelNotFound(f"{self.owner}: {flag} is {value!r}; true or false is needed.")
        return bool(value)

    def optional(self, key: str) -> int | None:
        """Return a number >= 0, or None where the key is null; raises `ModelNotFound` for anything else."""
        value = self.get(key)
        if value is None:
            return None
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ModelNotFound(f"{self.owner}: {key} is {value!r}, which is not a whole number >= 0.")
        return number

    def count(self, key: str) -> int:
        """Return a number >= 0, 0 where the key is null."""
        return self.optional(key) or 0

    def size(self, key: str) -> int:
        """Return a number > 0; raises `ModelNotFound` where it is null or 0."""
        number = self.optional(key)
        if not number:
            raise ModelNotFound(f"{self.owner}: {key} is {number!r}; a size > 0 is needed.")
        return number

    def number(self, key: str) -> float:
        """Return a number > 0, whole or not; raises `ModelNotFound` for anything else."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelNotFound(f"{self.owner}: {key} is {value!r}; a number > 0 is needed.")
        return value

    def items(self, key: str) -> Sequence[object] | None:
        """Return a list, or None where the key is null; raises `ModelNotFound` for anything else."""
        value = self.get(key)
        if value is not None and (isinstance(value, (str, Mapping)) or not isinstance(value, Sequence)):
            raise ModelNotFound(f"{self.owner}: {key} is {value!r}, which is not a list.")
        return value
