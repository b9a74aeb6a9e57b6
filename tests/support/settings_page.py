"""The table of all settings in docs/settings.md, written from ``conf/memfit/launch.yaml``: keys, defaults and comments.

``python -m support.settings_page`` (with ``tests`` on the path) writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from omegaconf import OmegaConf

from support.documented import ROOT

PAGE = ROOT / "docs/settings.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"
_SOURCE = ROOT / "conf/memfit/launch.yaml"
_NOT_A_SETTING = "unplanned"
_LINE = re.compile(r"^  (?:# (?P<comment>.*)|(?P<key>\w+):.*)$", re.MULTILINE)


def table() -> str:
    """Return the rows, one a setting: its key, its default, and the comment above it."""
    rows = [f"| `{key}` | `{default}` | {comment} |\n" for key, default, comment in _settings()]
    return "".join(["| setting | default | meaning |\n", "|---|---|---|\n", *rows])


def written(page: str) -> str:
    """Return the page with today's table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


def _settings() -> Iterator[tuple[str, str, str]]:
    node = OmegaConf.to_container(OmegaConf.load(_SOURCE), resolve=False)
    assert isinstance(node, dict)
    said: list[str] = []
    for line in _LINE.finditer(_SOURCE.read_text(encoding="utf-8").split("\nhydra:")[0]):
        if line["key"] is None:
            said.append(line["comment"])
            continue
        value = node["memfit"][line["key"]]
        inner = list(value) if isinstance(value, dict) else []
        key = "`, `.".join([f"memfit.{line['key']}", *inner]).replace("`, `.", ".", 1)
        if line["key"] != _NOT_A_SETTING:
            yield key, "null" if inner else value if isinstance(value, str) else json.dumps(value), " ".join(said)
        said = []


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
