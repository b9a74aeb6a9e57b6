"""The only module that Hydra's plugin scan runs: where the groups lie, how they are read, and the hook that they name.

Every Hydra application of the environment pays for this import: nothing heavy is imported before a config that names
the hook is composed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


def _fit(*, _root_: Any) -> Any:
    """Plan the launch that ``_root_`` composes (`hydra_plugins.memfit.compose.hook.fit`)."""
    from hydra_plugins.memfit.compose.hook import fit

    return fit(_root_)


def _unplanned() -> None:
    """Raise: the config that is being resolved names a hardware group and was never planned."""
    from hydra_plugins.memfit.compose.hook import refuse_unplanned

    refuse_unplanned()


def _record(*, _root_: Any) -> str:
    """Write the record of the job that starts (`hydra_plugins.memfit.compose.record.write_record`)."""
    from hydra_plugins.memfit.compose.record import write_record

    return write_record(_root_)


def _register(name: str, resolver: Callable[..., Any]) -> None:
    """Register by the name that this OmegaConf has for it: up to 2.4.0.dev2 ``register_resolver`` is an older API."""
    is_new = "replace" in signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if is_new else OmegaConf.register_new_resolver
    register(name, resolver, replace=True, use_cache=False)


class MemfitConfigSource(ConfigSource):
    """Hydra's view of memfit's ``conf/``, ``memfit://<directory>``: files, of which the hardware's are read as one."""

    @staticmethod
    def scheme() -> str:
        """Return what the paths of this source begin with."""
        return "memfit"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of one file (`hydra_plugins.memfit.compose.groups.load_group`)."""
        from hydra_plugins.memfit.compose.groups import load_group

        config, head = load_group(self.path, self._normalize_file_name(config_path))
        return ConfigResult(
            provider=self.provider, path=self.full_path(), config=config, header=self._get_header_dict(head)
        )

    def available(self) -> bool:
        """Whether the directory is there."""
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        """Whether ``config_path`` is a directory."""
        return os.path.isdir(os.path.join(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        """Whether ``config_path``, with or without its ending, is a file."""
        return os.path.isfile(os.path.join(self.path, self._normalize_file_name(config_path)))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return what lies in a directory, sorted: groups, configs, or both."""
        names: list[str] = []
        for name in os.listdir(os.path.join(self.path, config_path)):
            self._list_add_result(names, os.path.join(config_path, name), name, results_filter)
        return sorted(set(names))


class MemfitSearchPathPlugin(SearchPathPlugin):
    """Adds memfit's ``conf/`` behind the application's own config directories."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory of the groups and register the resolvers that they use."""
        from hydra_plugins.memfit.base.paths import conf_dir

        search_path.append("memfit", f"{MemfitConfigSource.scheme()}://{conf_dir()}")
        _register("memfit.fit", _fit)
        _register("memfit.record", _record)
        _register("memfit.unplanned", _unplanned)
