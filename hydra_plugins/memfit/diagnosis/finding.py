"""What a log says went wrong: one message, who said it, when, and the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hydra_plugins.memfit.diagnosis.amount import Amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One sort of failure."""

    name: str
    title: str
    resource: str
    """What ran out: ``gpu``, ``host``, ``shm``, ``disk``, ``engine`` (its share of the GPU), or ``none``."""
    advice: str
    """What helps, where no plan can be made. One or two sentences."""
    consequence: bool = False
    """Usually follows from another failure, of another process."""
    phase: str | None = None
    """Where it always happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """One of the large buffers that the XLA compiler lists."""

    size: Amount
    shape: str = ""
    operator: str = ""


@dataclass(kw_only=True, slots=True)
class Finding:
    """One failure in a log; the same one of other processes is merged into it."""

    kind: Kind
    line: int
    text: str
    phase: str | None = None
    """A phase of memfit's calendar (`memory.breakdown.PHASES`), ``None`` where the log does not tell."""
    function: str = ""
    """The innermost function of the trainer or engine in the traceback."""
    functions: tuple[str, ...] = ()
    """All functions of the traceback, outermost first."""
    step: int | None = None
    """The last training step that the log reported before."""
    amounts: Mapping[str, Amount] = field(default_factory=dict)
    """``asked``, ``capacity``, ``free``, ``process``, ``allocated``, ``reserved`` (and unused), ``total``, ``used``."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Other numbers of the message, as printed."""
    others: tuple[tuple[int, Amount], ...] = ()
    """Other processes on the same device: (pid, size)."""
    buffers: list[Buffer] = field(default_factory=list)
    processes: set[str] = field(default_factory=set)
    messages: int = 1

    @property
    def needed_bytes(self) -> int | None:
        """What was in use and what was asked for, together: at least this is needed at that moment."""
        if not {"asked", "capacity", "free"} <= set(self.amounts):
            return None
        in_use = self.amounts["capacity"].num_bytes - self.amounts["free"].num_bytes
        return in_use + self.amounts["asked"].num_bytes
