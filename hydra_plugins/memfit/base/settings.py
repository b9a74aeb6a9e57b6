"""The settings of memfit: everything below ``memfit:`` that a user may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GOALS = ("fit", "fast")
REPORTS = ("full", "short", "html", "off")
ROLES = ("critic", "reward", "teacher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens (prompt + response) that the data really has; ``None`` where the user does not know them."""

    mean: int | None = None
    max: int | None = None
    image: int | None = None
    """Tokens that stand for images in one prompt, at most; 0 without images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may say about the plan itself. Defaults and meaning: ``conf/memfit/launch.yaml``."""

    goal: str = "fit"
    """``fit`` keeps what fits and changes the least; ``fast`` retunes every neutral knob for speed."""
    margin: float | None = None
    """Share of the usable capacity that is kept free, 0 <= margin < 1; ``None``: the default of the allocator that runs."""
    learned: bool = True
    """Use what `memfit learn` has kept of earlier runs of the same kind."""
    strict: bool = True
    """Stop a launch that cannot fit or cannot be judged; ``False`` warns and goes on."""
    allow_semantic: bool = False
    """May knobs that change what is learned be reduced when nothing else fits."""
    pin: tuple[str, ...] = ()
    """Config keys that must not be changed."""
    report: str = "full"
    lengths: Lengths = field(default_factory=Lengths)
    models: Mapping[str, str] = field(default_factory=dict)
    """Architectures of models beside the policy (`ROLES`): a name of conf/model, a hub id or a directory."""
    framework: str | None = None
    """Name of the adapter; ``None`` recognises it from the config."""
    framework_version: str | None = None
    """``None``: the installed one, else the newest that the adapter knows."""
    engine_version: str | None = None
    """Version of vLLM or SGLang; ``None``: the installed one, else the one that the framework version pins."""
    host_memory_bytes: int | None = None
    """Memory of one host; ``None``: the detected one, else the one in conf/hardware."""
    exact: bool = False
    """Settle a TPU plan with an ahead-of-time compile."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """For frameworks whose keys memfit cannot know: its own name -> dotted key of the user's config."""
