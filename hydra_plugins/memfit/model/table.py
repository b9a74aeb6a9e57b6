"""The table of conf/model for docs/models.md: ``python -m hydra_plugins.memfit.model.table [--write docs/models.md]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_plugins.memfit.model import catalog
from hydra_plugins.memfit.model.config_json import spec_from_config

BEGIN, END = "<!-- begin: model table -->", "<!-- end: model table -->"
_HEAD = (
    "| `+model=` | type | parameters | active | vision | layers | hidden | shape from | hub ids |",
    "|---|---|---:|---:|---:|---:|---:|---|---|",
)


def render() -> str:
    """Return the table as Markdown."""
    return "\n".join((*_HEAD, *(_row(name) for name in catalog.names())))


def _row(name: str) -> str:
    entry = catalog.read(name)
    spec = spec_from_config(entry.config, name=name, source="")
    active = f"{spec.active_parameters:,}" if spec.num_experts else ""
    vision = f"{spec.vision_parameters:,}" if spec.vision_parameters else ""
    cells = (f"`{name}`", spec.model_type, f"{spec.parameters:,}", active, vision)
    shape = (str(spec.num_hidden_layers), str(spec.hidden_size), entry.kind, ", ".join(entry.hub_ids))
    return f"| {' | '.join((*cells, *shape))} |"


def write(page: Path) -> None:
    """Replace what stands between the marks of ``page`` by the table."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{render()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    page = parser.parse_args().write
    if page is None:
        print(render())
    else:
        write(page)


if __name__ == "__main__":
    main()
