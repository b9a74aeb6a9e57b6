"""Run beside each version of Hydra by the package tests: what the installed memfit costs and does. Imports no memfit."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core import plugins
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

HEAVY = ("rich", "numpy", "pynvml", "torch", "transformers", "pandas", "jax")


def unused(conf: str) -> dict[str, object]:
    """Compose a config that does not use memfit: which plugins were found, what their scan cost, what is imported.

    The cost is processor time, by giving Hydra's own statistics that clock, without a garbage collection that happens
    to fall into it: neither other work on the machine nor other people's garbage counts.
    """
    gc.disable()
    plugins.timer = time.process_time
    with initialize_config_dir(conf, version_base="1.3"):
        composed = OmegaConf.to_yaml(compose("config"))
    stats = Plugins.instance().get_stats()
    costs = stats.modules_import_time if stats is not None else {}
    return {
        "plugins": [cls.__name__ for cls in Plugins.instance().discover(SearchPathPlugin)],
        "scan_ms": 1000 * sum(cost for name, cost in costs.items() if name.startswith("hydra_plugins.memfit")),
        "scanned": sorted(name for name in costs if name.startswith("hydra_plugins.memfit")),
        "rooms": sorted(name for name in sys.modules if name.startswith("hydra_plugins.memfit.")),
        "heavy": sorted(name for name in HEAVY if name in sys.modules),
        "composed": composed,
    }


def used(conf: str, words: list[str]) -> dict[str, object]:
    """Compose a launch twice in one process: the configs, and what is left of memfit in them."""
    configs = []
    for _ in range(2):
        GlobalHydra.instance().clear()
        with initialize_config_dir(conf, version_base="1.3"):
            configs.append(OmegaConf.to_container(compose("config", words), resolve=True))
    return {"configs": configs, "where": str(Path(sys.modules["hydra_plugins.memfit"].__file__ or "").parent)}


def main() -> None:
    """``hydra_probe.py unused CONF`` or ``hydra_probe.py used CONF WORD ...``: one JSON document on stdout."""
    mode, conf, *words = sys.argv[1:]
    if "--import-rich" in words:  # shows that the test of the imports can fail
        import rich  # noqa: F401
    print(json.dumps(unused(conf) if mode == "unused" else used(conf, words)))


if __name__ == "__main__":
    main()
