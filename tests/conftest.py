"""What all tests share: no test leaves its traces in the process or in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hydra.core.global_hydra import GlobalHydra


def pytest_configure(config: pytest.Config) -> None:
    """Draw the same values in each run, however slow the machine: what fails once fails again."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True, deadline=None)
        settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_process_state() -> Iterator[None]:
    """Give each test an environment without memfit's variables, and a process in which nothing was planned yet."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MEMFIT_") and name != "MEMFIT_VERL_WHEELS"]:
        del os.environ[name]
    os.environ["MEMFIT_STORE"] = os.path.join(os.sep, "nonexistent", "memfit.sqlite3")  # not the developer's own
    from hydra_plugins.memfit.compose import hook

    hook.forget()
    yield
    GlobalHydra.instance().clear()
    os.environ.clear()
    os.environ.update(before)
