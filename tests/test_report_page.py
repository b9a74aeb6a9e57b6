"""The data of the page, and what it says where it cannot be made. What a browser shows: test_browser_page.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_plugins.memfit.memory.breakdown import COMPONENTS, Estimate
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.report import formulas
from hydra_plugins.memfit.report.html import FILES
from hydra_plugins.memfit.report.json import to_dict
from hydra_plugins.memfit.report.page_data import page_data
from support.hydra_app import BATCH, LAUNCH, ROOT, run, write_app
from support.plans import BATCH as SEMANTIC
from support.plans import HARDWARE, MICRO_BATCH, OFFLOAD, as_requested, changed, phase

VERL = ("--framework", "verl", "--hardware", "h200", *LAUNCH)
MISSING = "import sys; sys.modules[{0!r}] = None; from hydra_plugins.memfit.cli.main import main; sys.exit(main({1!r}))"


def explain(tmp_path: Path, *words: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run `memfit explain` in a process of its own, in an empty folder, as if the library ``without`` were missing."""
    code = MISSING.format(without or "nothing", ["explain", *words])
    command = [sys.executable, "-c", code]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("plan", [as_requested(), changed(MICRO_BATCH, OFFLOAD), changed(SEMANTIC)])
def test_the_page_holds_the_contract_as_it_is(plan: Plan) -> None:
    """The page's data has the JSON of the plan, unchanged, and the launch as asked beside it."""
    data = page_data(plan)
    assert data["plan"] == to_dict(plan)
    assert [phase["peak_bytes"] for phase in data["asked"]["phases"]] == [p.peak_bytes for p in plan.requested.phases]
    assert json.loads(json.dumps(data)) == data


def test_explain_as_json_is_the_data_of_the_page(tmp_path: Path) -> None:
    """`memfit explain --json` prints the data and writes no file; differences are peaks less the plan's."""
    answer = explain(tmp_path, *VERL, "--json", without="plotly")
    assert (answer.returncode, answer.stderr, list(tmp_path.iterdir())) == (0, "", [])
    data = json.loads(answer.stdout)
    now = {phase["name"]: phase["peak_bytes"] for phase in data["plan"]["phases"]}
    knob = next(knob for knob in data["what_if"] if knob["key"] == BATCH)
    for choice in knob["choices"]:
        then = {phase["name"]: phase["needed_bytes"] for phase in choice["phases"]}
        assert choice["difference_bytes"] == {name: then[name] - now[name] for name in now}
    assert data["what_if"][0]["key"] in {change["key"] for change in data["plan"]["changes"]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "card"])
@pytest.mark.parametrize("text", ["ink", "soft", "link", "good", "warn", "bad"])
def test_text_is_readable_on_its_ground(text: str, ground: str, scheme: str) -> None:
    """Every colour of a text has a contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3), in both schemes."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in _schemes())
    colours = light if scheme == "light" else dark
    brighter, darker = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
    assert (brighter + 0.05) / (darker + 0.05) >= 4.5


def _schemes() -> tuple[str, str]:
    style = (FILES / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    return light, dark


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("library", ["jinja2", pytest.param("plotly", marks=pytest.mark.browser)])
def test_a_missing_library_is_named_with_the_line_that_installs_it(library: str, tmp_path: Path) -> None:
    """Without the extra the page is refused in one sentence, and no half page is left."""
    answer = explain(tmp_path, *VERL, without=library)
    assert answer.returncode == 2 and answer.stdout == ""
    assert f"the page needs {library}" in answer.stderr and "pip install 'memfit[explain]'" in answer.stderr
    assert list(tmp_path.glob("*.html")) == []


def test_a_launch_without_the_libraries_says_so_and_starts(tmp_path: Path) -> None:
    """`memfit.report=html` where the extra is missing: the panel, the reason, and the job runs with its plan."""
    script = write_app(tmp_path)
    script.write_text(
        "import sys\nsys.modules['jinja2'] = None\n" + script.read_text(encoding="utf-8"), encoding="utf-8"
    )
    ran = run(
        [script, *LAUNCH, "+hardware=h200", "memfit.report=html"], environ={"XDG_CACHE_HOME": str(tmp_path / "cache")}
    )
    assert ran.code == 0 and len(ran.jobs) == 1
    assert "memfit: no page: the page needs jinja2" in ran.err and "GiB by phase" in ran.err
    assert list(tmp_path.rglob("memfit.html")) == [] and len(list(tmp_path.rglob("memfit.json"))) == 1


@pytest.mark.parametrize("chapter", [formulas.MODEL, formulas.GENERATION, formulas.TPU], ids=lambda c: c.page)
def test_every_component_leads_to_a_heading_of_the_documentation(chapter: formulas.Chapter) -> None:
    """The formulas are the documentation's own text, and each component has an anchor in it that exists."""
    text = formulas.formulas(chapter)
    assert set(text.anchors) == set(COMPONENTS) == set(formulas.MEANINGS)
    missing = [name for name in text.anchors.values() if f'id="{name}"' not in text.html]
    assert missing == [] and "<a" not in text.html and "<table>" in text.html
    if chapter is formulas.MODEL:
        assert len(set(text.anchors.values())) >= 5


@pytest.mark.parametrize(
    ("plan", "page"),
    [
        (as_requested(), "memory-model.md"),
        (as_requested(hardware=replace(HARDWARE, kind="tpu")), "tpu.md"),
        (as_requested(Estimate(phases=(phase("generate", {"weights": 3}),))), "generation.md"),
    ],
    ids=["training", "tpu", "generation"],
)
def test_the_chapter_follows_the_launch(plan: Plan, page: str) -> None:
    """Each kind of launch is explained by the page that has its formulas."""
    assert formulas.chapter(plan).page == page


@pytest.mark.browser
def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """A folder in the place of the file: the path, the reason, the way out, and nothing left behind."""
    answer = explain(tmp_path, *VERL, "-o", str(tmp_path))
    assert answer.returncode == 2 and "memfit explain -o FILE names another" in answer.stderr
    assert list(tmp_path.iterdir()) == []
