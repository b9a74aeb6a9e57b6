"""How AReaL's releases differ where memory is concerned, and which one a config is for.

The wheel on PyPI called 1.0.4 holds later work than the git tag v1.0.4: it stores parameters, gradients and Adam states in
``actor.optimizer_dtype`` (float32 by default). Every tag up to v1.0.4 stores them in ``actor.dtype`` (bfloat16). The field
tells them apart, the version does not: the git tag reads as 1.0.3 here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from dataclasses import dataclass

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.frameworks.view import View

VERSIONS = ("0.3.1", "0.3.4", "0.4.1", "0.5.3", "1.0.0", "1.0.3", "1.0.4")
"""Releases whose keys and defaults are known, oldest first; 1.0.4 is the wheel on PyPI."""
ANY = "(any release)"
"""Stands for no release named and none installed: the config's own keys decide."""
BEFORE_BACKENDS = "0.4.1"
"""What a config without any layout is read as: from 1.0.3 on AReaL requires rollout.backend and actor.backend."""

_SERIES = re.compile(r"v?(\d+)\.(\d+)\.?(\d+)?")


def parse(version: str) -> tuple[int, int, int]:
    """Return the numbers of a release: ``0.5.3`` -> (0, 5, 3)."""
    found = _SERIES.match(version.strip())
    if found is None:
        raise ConfigError(f"AReaL {version!r} is no version. Known: {', '.join(VERSIONS)}.")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def pick(version: str) -> str:
    """Return the known release that stands for ``version``: the newest that is not newer. Raises `ConfigError`."""
    if version == ANY:
        return ANY
    asked = parse(version)
    older = [known for known in VERSIONS if parse(known) <= asked]
    if asked[:2] == (0, 3) and asked < (0, 3, 2):
        older = ["0.3.1"]
    if not older or asked[:2] > (1, 0):
        raise ConfigError(
            f"AReaL {version} is not a release that memfit knows. Known: {', '.join(VERSIONS)} (and the ones between). "
            f"Name the closest one with memfit.framework_version={VERSIONS[-1]} (console: --framework-version)."
        )
    return older[-1]


def installed() -> str | None:
    """Return the known release that is installed, by the schema that is loaded or lies in the package; ``None``: none."""
    try:
        found = importlib.metadata.distribution("areal")
    except importlib.metadata.PackageNotFoundError:
        return None
    version = pick(found.version)
    if version != VERSIONS[-1]:
        return version
    return version if _has_storage_field(found) else VERSIONS[-2]


def _has_storage_field(found: importlib.metadata.Distribution) -> bool:
    schema = getattr(sys.modules.get("areal.api.cli_args"), "TrainEngineConfig", None)
    if schema is not None and dataclasses.is_dataclass(schema):
        return "optimizer_dtype" in {field.name for field in dataclasses.fields(schema)}
    try:
        source = open(str(found.locate_file("areal/api/cli_args.py")), encoding="utf-8")  # noqa: SIM115
    except OSError:  # an editable install of the repository: its tags have no such field
        return False
    with source:
        return "optimizer_dtype" in source.read()


def of_config(view: View) -> str:
    """Return the release that the keys of a config are for."""
    if view.has("actor.mb_spec.max_tokens_per_gpu") or view.has("model.mb_spec.max_tokens_per_gpu"):
        return "0.3.1"
    if view.has("rollout.backend") or view.has("actor.optimizer_dtype") or ":" in view.text("actor.backend", ""):
        return VERSIONS[-1]
    if view.has("weight_update_mode") or view.text("actor.backend", ""):  # a bare name: it was free text up to 0.4.0
        return "0.3.4"
    modern = ":" in view.text("allocation_mode", "")
    return "0.5.3" if modern else BEFORE_BACKENDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """What one release does."""

    tokens_field: str
    """Name of the micro-batch's token limit in ``mb_spec``."""
    checkpointing: bool
    """Default of ``gradient_checkpointing``."""
    storage_bytes: int
    """Bytes of a stored parameter where the config does not say."""
    sync_key: str | None
    """Where the way of the weights to the server is chosen."""
    sync_default: str
    launcher: bool
    """A launcher starts servers first, then trainer ranks; otherwise one controller starts the trainer first."""
    unsharded_gradients: bool
    """Gradients stay unsharded until the last micro-batch."""
    fused_optimizer: bool
    efficient_load: bool
    """``fsdp.memory_efficient_load`` exists."""
    layerwise_step: bool
    """``fsdp.per_layer_optim_step`` exists."""
    storage_key: bool
    """``optimizer_dtype`` exists."""
    vllm_eager: bool
    """Default of ``vllm.enforce_eager``."""


def behaviour(version: str) -> Behaviour:
    """Return how one of `VERSIONS` behaves."""
    v = parse(version)
    key = None if v < (0, 3, 4) else "weight_update_mode" if v < (0, 4, 0) else "actor.weight_update_mode"
    return Behaviour(
        tokens_field="max_tokens_per_gpu" if v < (0, 3, 2) else "max_tokens_per_mb",
        checkpointing=v <= (0, 3, 4),
        storage_bytes=4 if v >= (1, 0, 4) else 2,
        sync_key=key,
        sync_default="disk" if v < (0, 5, 0) else "xccl",
        launcher=v < (1, 0, 0),
        unsharded_gradients=v < (0, 3, 3),
        fused_optimizer=v >= (0, 4, 1),
        efficient_load=v >= (0, 5, 3),
        layerwise_step=v >= (1, 0, 2),
        storage_key=v >= (1, 0, 4),
        vllm_eager=v <= (0, 3, 4),
    )
