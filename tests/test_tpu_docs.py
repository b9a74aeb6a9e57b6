"""docs/tpu.md shows what the commands print and what the survey holds.

``python tests/test_tpu_docs.py`` (with ``tests`` on the path) writes today's output into the page.
"""

from __future__ import annotations

import re

import pytest

from support.documented import ROOT, Block, blocks, run
from support.tpu_survey import table

PAGE = "docs/tpu.md"
_SURVEY = re.compile(r"<!-- survey -->\n(.*?)<!-- /survey -->", re.DOTALL)


@pytest.mark.parametrize("block", list(blocks(PAGE)), ids=lambda block: f"line {block.line}")
def test_commands_print_what_is_shown(block: Block) -> None:
    """Each console block of the page is what its commands print today."""
    assert run(block) == (block.body, block.exit_status)


def test_survey_of_the_page_is_current() -> None:
    """The table of errors is the one that the formulas and the stored verdicts give."""
    found = _SURVEY.search((ROOT / PAGE).read_text(encoding="utf-8"))
    assert found is not None
    assert found.group(1) == table()


def main() -> None:
    """Write the output of the commands and the table of the survey into the page."""
    path = ROOT / PAGE
    for block in blocks(PAGE):
        path.write_text(path.read_text(encoding="utf-8").replace(block.body, run(block)[0], 1), encoding="utf-8")
    survey = f"<!-- survey -->\n{table()}<!-- /survey -->"
    path.write_text(_SURVEY.sub(lambda _: survey, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
