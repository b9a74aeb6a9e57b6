"""The table of docs/hardware.md, from the files themselves.

python -m hydra_plugins.memfit.hardware.table                      prints it
python -m hydra_plugins.memfit.hardware.table --write FILE         puts it between the markers of FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.base.units import gib
from hydra_plugins.memfit.hardware import catalog

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_HEAD = (
    "| name | product | one process can use | memory TB/s | dense TFLOP/s | capacity is |",
    "|---|---|---|---|---|---|",
)


def markdown() -> str:
    """Return the table of every file in ``conf/hardware``, GPUs first."""
    order = sorted(catalog.names(), key=lambda name: (catalog.load(name).kind, name))
    return "\n".join((*_HEAD, *map(_row, order)))


def replaced(text: str) -> str:
    """Return ``text`` with the table between its markers; raises `ConfigError` where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the file has no pair of lines {BEGIN!r} and {END!r} to put the table between.")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def _row(name: str) -> str:
    hardware = catalog.load(name)
    slice_of = f", {hardware.nodes} x {hardware.gpus_per_node} devices" if hardware.kind == "tpu" else ""
    bandwidth, flops = hardware.memory_bandwidth_bytes_per_s, hardware.bf16_dense_flops
    cells = (
        f"`{name}`",
        hardware.product + slice_of,
        gib(hardware.capacity_bytes),
        f"{bandwidth / 1e12:.3g}" if bandwidth else "unknown",
        f"{flops / 1e12:.4g}" if flops else "unknown",
        catalog.facts(name).capacity_kind,
    )
    return f"| {' | '.join(cells)} |"


def _main(arguments: list[str]) -> None:
    if not arguments:
        print(markdown())
    elif len(arguments) == 2 and arguments[0] == "--write":
        path = Path(arguments[1])
        path.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit("usage: python -m hydra_plugins.memfit.hardware.table [--write FILE]")


if __name__ == "__main__":
    _main(sys.argv[1:])
