"""The record of a plan: kept in the ``hydra`` node of the job, written as ``.hydra/memfit.json`` when it starts.

The hardware groups name the resolver of `write_record` in ``hydra.job.env_set``, which Hydra resolves in the process of
the job once its output directory is known. A callback would not do: Hydra drops what a callback raises, takes callbacks
from the config that started a sweep, and from 1.4 on runs only those that the application has allowed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.base.files import write_whole
from hydra_plugins.memfit.compose.pages import copy_page

NODE = "memfit"
FILE = "memfit.json"


def keep_record(config: DictConfig, record: dict[str, Any]) -> None:
    """Put ``record`` into the ``hydra`` node, as one JSON text; Hydra saves it in ``.hydra/hydra.yaml``, too.

    One text, not a node for each of its values: OmegaConf takes longer to build those than the plan took.
    """
    with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
        config.hydra[NODE] = json.dumps(record).replace("${", "\\${")  # no interpolation of ours


def write_record(config: DictConfig) -> str:
    """Write the record of the job that ``config`` starts beside Hydra's own; return its path, for ``MEMFIT_PLAN``.

    Returns an empty text where no job starts (``--cfg all --resolve``), where Hydra keeps no records, or where it cannot be
    written. Raises `MemfitError` when the config names a hardware group and was never planned: such a job must not start.
    """
    record = config.hydra.get(NODE)
    if record is None:
        raise MemfitError("this job names a hardware group and was not planned: it does not start. Please report it.")
    if OmegaConf.is_missing(config.hydra.runtime, "output_dir") or config.hydra.output_subdir is None:
        return ""
    file = Path(config.hydra.runtime.output_dir) / config.hydra.output_subdir / FILE
    text = json.dumps(json.loads(record), indent=2)
    try:
        write_whole(file, (text + "\n").encode())
    except OSError as error:  # a full disk: whether the job can live with it, Hydra's own records will tell
        print(f"memfit: the record of the plan was not written: {error}", file=sys.stderr)
        return ""
    copy_page(config, file.parent)
    return str(file)
