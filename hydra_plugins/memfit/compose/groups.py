"""memfit's groups as Hydra composes them: a hardware file and what it includes are one config, parsed by libyaml.

To Hydra each file of a defaults list costs about 2 % of a large composition, whatever is in it, and its parser is written
in Python. The files stay what they are, ordinary Hydra configs: composed from ``file://`` they give the same launch.
"""

from __future__ import annotations

import os
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

_INCLUDED = "memfit/launch.yaml"
_HEAD = [{"/memfit@_global_": "launch"}, "_self_"]
"""The defaults list of every hardware file: the settings and the hook first, the facts over them."""


def load_group(directory: str, path: str) -> tuple[DictConfig, str]:
    """Return the config of the file ``path`` below ``directory``, and the head of its text, which names its package."""
    content, text = _read(os.path.join(directory, path))
    if content.get("defaults") == _HEAD:
        content = _together(_read(os.path.join(directory, _INCLUDED))[0], content["memfit"]["hardware"])
    return OmegaConf.create(content), text[:512]


def _read(file: str) -> tuple[dict[str, Any], str]:
    with open(file, encoding="utf-8") as stream:
        text = stream.read()
    return yaml.load(
        text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    ), text  # with libyaml, where it was built in


def _together(launch: dict[str, Any], hardware: dict[str, Any]) -> dict[str, Any]:
    """Return the facts beside the settings. Of the sources, only the one that a plan reads is worth nodes of a config."""
    facts = dict(hardware)
    if "sources" in facts:
        facts["sources"] = {"capacity_bytes": facts["sources"]["capacity_bytes"]}
    return {**launch, "memfit": {**launch["memfit"], "hardware": facts}}
