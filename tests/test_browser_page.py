"""The page of `memfit explain` in a real browser: it shows the plan, answers its sliders, and asks the network for nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.base.units import GIB
from support.hydra_app import BATCH, LAUNCH, ROOT, run, write_app
from support.page_browser import PICTURE, Tab, browser, documented_words, explain, open_page
from support.plans import DIES, as_requested, changed, make_problem

pytestmark = pytest.mark.browser
pytest.importorskip("playwright")
pytest.importorskip("plotly")

WORDS = ("--framework", "verl", "--hardware", "h200", *LAUNCH)
CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """One browser for all tests."""
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page on a launch that is too large as it is asked for."""
    return explain(tmp_path_factory.mktemp("page"), *WORDS)


@pytest.fixture(scope="module")
def tab(running: Any, file: Path) -> Tab:
    """Return that page, open."""
    return open_page(running, file)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """Return what `memfit explain --json` says about the same launch."""
    return _json("explain", *WORDS)


def _json(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "hydra_plugins.memfit.cli.main", *words, "--json"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


def knob_of(tab: Tab, key: str) -> Any:
    """Return the part of the page about one knob."""
    return tab.page.locator(f'.knob[data-key="{key}"]')


def numbers(tab: Tab) -> list[str]:
    """Return the needs that the chart shows beside its bars, from the top."""
    return [text.split()[0] for text in tab.page.locator("#chart .annotation-text").all_text_contents()]


def needs(phases: list[dict[str, Any]]) -> list[str]:
    """Return what the chart should show for ``phases``."""
    return [f"{phase['needed_bytes'] / GIB:.2f}" for phase in phases]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_without_a_complaint(running: Any, file: Path, width: int, scheme: str) -> None:
    """On a laptop and a phone, light and dark: drawn in the scheme's colours, nothing asked for, nothing cut off."""
    shown = open_page(running, file, width=width, scheme=scheme)
    assert (shown.complaints, shown.requests) == ([], [])
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    phases = json.loads(shown.page.locator("#data").inner_text())["plan"]["phases"]
    assert len(shown.page.locator("#chart .ytick").all()) == len(phases)
    assert shown.page.locator("#chart .bars .point path").count() >= 3 * len(phases)
    ground = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    label = shown.page.evaluate("getComputedStyle(document.querySelector('#chart .ytick text')).fill")
    assert (_brightness(ground) > 200, _brightness(label) < 60) == (
        (True, True) if scheme == "light" else (False, False)
    )
    shown.page.close()


def _brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (red + green + blue) / 3


def test_the_chart_follows_a_change_of_the_scheme(tab: Tab) -> None:
    """When the system goes dark while the page is open, the chart goes with it."""
    label = "getComputedStyle(document.querySelector('#chart .ytick text')).fill"
    seen = [tab.page.evaluate(label)]
    for scheme in ("dark", "light"):
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.wait_for_timeout(500)
        seen.append(tab.page.evaluate(label))
    assert seen[0] == seen[2] != seen[1]


def test_embedded_figures_are_the_json_of_the_plan(tab: Tab, data: dict[str, Any]) -> None:
    """The page holds what `memfit plan --json` prints for the launch, and its chart and table show it."""
    embedded = json.loads(tab.page.locator("#data").inner_text())
    assert embedded == data
    assert embedded["plan"] == _json("plan", *WORDS)
    assert list(embedded["plan"]["phases"][0]["components"]) == list(data["plan"]["phases"][0]["components"])
    rows = tab.page.locator("table.phases tbody tr").all()
    assert [row.locator("td").nth(1).inner_text() for row in rows] == needs(data["planned"]["phases"]) == numbers(tab)
    assert [row.locator("td").nth(0).inner_text() for row in rows] == needs(data["asked"]["phases"])
    binding = tab.page.locator("#chart .ytick text", has_text="▶")
    assert binding.text_content() == f"▶ {data['plan']['binding_phase']}"


def test_a_slider_shows_the_prediction_of_its_value(tab: Tab, data: dict[str, Any]) -> None:
    """Moved with the keyboard, a slider changes verdict, bars and its own value; the way back restores the plan."""
    knob = next(knob for knob in data["what_if"] if knob["key"] == BATCH)
    slider = knob_of(tab, BATCH).locator("input")
    slider.focus()
    slider.press("End")
    last = knob["choices"][-1]
    assert knob_of(tab, BATCH).locator("output").inner_text() == last["value"]
    assert slider.get_attribute("aria-valuetext") == last["value"]
    assert f"does not fit: update_actor needs {last['phases'][-4]['needed_bytes'] / GIB:.2f} GiB" in _state(tab)
    assert numbers(tab) == needs(last["phases"]) != needs(data["planned"]["phases"])
    assert (
        _json("check", *WORDS, f"{BATCH}={last['value']}")["phases"][-4]["peak_bytes"]
        == last["phases"][-4]["peak_bytes"]
    )
    tab.page.get_by_role("button", name="Back to the plan").click()
    assert numbers(tab) == needs(data["planned"]["phases"])
    assert knob_of(tab, BATCH).locator("output").inner_text() == knob["choices"][knob["now"]]["value"]


def _state(tab: Tab) -> str:
    return str(tab.page.locator("#state").inner_text())


def test_one_knob_moves_at_a_time(tab: Tab, data: dict[str, Any]) -> None:
    """Another knob puts the first one back: no sum of two effects is ever shown."""
    knob_of(tab, BATCH).locator("input").press("Home")
    knob_of(tab, CHECKPOINTING).locator("input").first.check()
    choices = next(knob for knob in data["what_if"] if knob["key"] == CHECKPOINTING)["choices"]
    assert numbers(tab) == needs(next(choice for choice in choices if choice["value"] == "false")["phases"])
    assert "moved" not in str(knob_of(tab, BATCH).get_attribute("class"))
    tab.page.get_by_role("button", name="As asked").click()
    assert numbers(tab) == needs(data["asked"]["phases"])
    assert "As asked: update_actor needs" in _state(tab)
    tab.page.get_by_role("button", name="The plan").click()


def test_the_overrides_can_be_copied(tab: Tab, data: dict[str, Any]) -> None:
    """The button copies the overrides, or selects them where the browser gives a file no clipboard."""
    button = tab.page.locator(".copy-button").first
    button.click()
    tab.page.get_by_role("button", name=re.compile("Copied|Selected")).wait_for()
    lines = str(tab.page.locator(".copy pre").first.inner_text()).splitlines()
    assert [line.partition("=")[0].lstrip("+") for line in lines] == [
        change["key"] for change in data["plan"]["changes"]
    ]
    if button.inner_text() == "Selected":
        assert tab.page.evaluate("getSelection().toString()").splitlines() == lines


def test_every_component_leads_to_its_formula(tab: Tab) -> None:
    """A link opens the formulas and goes to the heading."""
    link = tab.page.locator("#about-logits .to-formula")
    link.click()
    heading = tab.page.locator(str(link.get_attribute("href")))
    heading.wait_for(state="visible")
    assert "loss head" in heading.inner_text().lower()
    assert (tab.complaints, tab.requests) == ([], [])


def test_paper_and_browsers_without_script_get_the_numbers(running: Any, file: Path, data: dict[str, Any]) -> None:
    """Printed, the knobs are gone and the table stays; without JavaScript, or in an old browser, the table is there."""
    paper = open_page(running, file)
    paper.page.emulate_media(media="print")
    assert not paper.page.locator("#knobs").is_visible() and paper.page.locator("table.phases").is_visible()
    plain = open_page(running, file, drawn=False, java_script_enabled=False)
    old = running.new_page()
    old.add_init_script("delete window.DecompressionStream")
    old.goto(file.as_uri())
    old.get_by_text("The chart needs a newer browser").wait_for()
    for page in (plain.page, old):
        cells = page.locator("table.phases tbody tr td:nth-of-type(2)").all_inner_texts()
        assert cells == needs(data["planned"]["phases"])
        page.close()
    paper.page.close()


def test_what_a_config_says_is_text(running: Any, tmp_path: Path) -> None:
    """Names, keys, values, reasons and warnings with markup in them are shown as they are and run nothing."""
    from dataclasses import replace

    from hydra_plugins.memfit.planning.problem import Change, Knob
    from hydra_plugins.memfit.report.html import write_page

    hostile = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>\"'`{{7*7}}"
    knob = Knob(key=f"a.{hostile}", requested=hostile, candidates=("b", hostile * 2), cost=1, why=hostile)
    change = Change(key=f"k{hostile}", old=hostile, new=f"{hostile}2", kind="neutral", why=hostile)
    plan = changed(change, pinned=(hostile,), warnings=(hostile,), rejected=((hostile, hostile),))
    problem = replace(plan.problem, knobs=(knob,), model=replace(plan.problem.model, name=hostile, source=hostile))
    file = tmp_path / "hostile.html"
    write_page(replace(plan, problem=problem), file)
    shown = open_page(running, file)
    assert shown.page.evaluate("window.ran") is None
    assert (shown.complaints, shown.requests) == ([], [])
    assert shown.page.locator("img").count() == 0 and shown.page.inner_text("body").count("{{7*7}}") >= 8
    shown.page.close()


def test_a_refusal_says_what_would_fit(running: Any, tmp_path: Path) -> None:
    """Where nothing fits, the first sentence says so, the best attempt is drawn, and the way out can be copied."""
    from hydra_plugins.memfit.planning.problem import Plan
    from hydra_plugins.memfit.report.html import write_page
    from support.plans import BATCH as SMALLER
    from support.plans import OFFLOAD

    plan = Plan(problem=make_problem(DIES), requested=DIES, estimate=DIES, changes=(OFFLOAD,), proposals=(SMALLER,))
    write_page(plan, tmp_path / "refusal.html", refusal="no plan fits")
    shown = open_page(running, tmp_path / "refusal.html")
    assert shown.page.inner_text("h1").startswith("It does not fit: old_log_prob needs 206.00 GiB")
    assert shown.page.inner_text("section pre") == "data.train_batch_size=32"
    assert shown.complaints == []
    shown.page.close()


def test_nothing_to_change_is_said(running: Any, tmp_path: Path) -> None:
    """A launch that fits as it is has no changes, and nothing to compare with."""
    from hydra_plugins.memfit.report.html import write_page

    write_page(as_requested(), tmp_path / "fits.html")
    shown = open_page(running, tmp_path / "fits.html")
    assert shown.page.inner_text("h1") == "It fits: 91.00 of 130.00 GiB at update_actor."
    assert "Nothing has to be changed" in shown.page.inner_text("header")
    assert shown.page.get_by_role("button", name="As asked").count() == 0
    shown.page.close()


def test_a_launch_leaves_its_page_with_its_record(running: Any, tmp_path: Path) -> None:
    """`memfit.report=html`: one line, the path, and the page beside the record of the job that ran; a refusal has one, too."""
    script, cache = write_app(tmp_path), {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = run([script, *LAUNCH, "+hardware=h200", "memfit.report=html", f"hydra.run.dir={tmp_path}/job"], environ=cache)
    assert ran.code == 0, ran.err
    beside = tmp_path / "job" / ".hydra" / "memfit.html"
    assert f"memfit: the page of this job: {beside}" in ran.err and "GiB by phase" not in ran.err
    shown = open_page(running, beside)
    plan, record = (
        json.loads(shown.page.locator("#data").inner_text())["plan"],
        json.loads(beside.with_suffix(".json").read_text()),
    )
    assert plan == {key: record[key] for key in plan}
    shown.page.close()

    shows = run([script, *LAUNCH, "+hardware=h200", "memfit.report=html", "--cfg", "job"], environ=cache)
    (line,) = (line for line in shows.err.splitlines() if line.startswith("memfit: the page: "))
    assert Path(line.removeprefix("memfit: the page: ")).is_file() and "memfit" not in shows.out
    stops = run([script, "+hardware=l4", *LAUNCH, "memfit.report=html"], environ=cache)
    assert stops.code == 1 and "memfit: the page: " in stops.err
    assert len(list((tmp_path / "cache").rglob("*.html"))) == 2


def test_the_documented_command_writes_a_page(tmp_path: Path) -> None:
    """What docs/explain.md shows works, and its picture is there and small."""
    assert explain(tmp_path, *documented_words()).stat().st_size < 3_000_000
    assert 10_000 < PICTURE.stat().st_size < 200_000
