"""One plan as one HTML file that needs nothing else: no network, no other file, one script inside.

The chart is drawn in the browser by plotly.js, which is in the file, packed. jinja2 writes the page and escapes what it
is given. Both come with ``pip install 'memfit[explain]'`` and are imported only when a page is asked for.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.memfit import __version__
from hydra_plugins.memfit.base.errors import MemfitError
from hydra_plugins.memfit.base.files import write_whole
from hydra_plugins.memfit.base.units import GIB, gib
from hydra_plugins.memfit.memory.breakdown import COMPONENTS
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.report import words
from hydra_plugins.memfit.report.json import all_warnings
from hydra_plugins.memfit.report.overrides import overrides
from hydra_plugins.memfit.report.page_data import page_data
from hydra_plugins.memfit.report.text import proposals_to_ask

if TYPE_CHECKING:
    from jinja2 import Environment

FILES = Path(__file__).with_name("page")


def write_page(plan: Plan, path: Path, *, refusal: str = "", absent: frozenset[str] = frozenset()) -> None:
    """Write the page on ``plan`` to ``path``, whole or not at all.

    ``refusal`` says why the launch stops, where it does; ``absent`` are keys that the framework's yaml does not have.
    Raises `MemfitError` when a library is missing or the file cannot be written.
    """
    text = page(plan, refusal=refusal, absent=absent)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise MemfitError(
            f"the page cannot be written to {path}: {reason}. memfit explain -o FILE names another."
        ) from None


def page(plan: Plan, *, refusal: str = "", absent: frozenset[str] = frozenset()) -> str:
    """Return the page on ``plan``; raises `MemfitError` when a library is missing."""
    environment, chart = _environment(), _packed_library()
    from hydra_plugins.memfit.report import formulas

    data = page_data(plan)
    text: str = environment.get_template("page.html").render(
        data=data,
        chart=chart,
        version=__version__,
        style=(FILES / "page.css").read_text(encoding="utf-8"),
        script=(FILES / "page.js").read_text(encoding="utf-8"),
        title=words.launch(plan),
        facts=words.facts(plan),
        verdict=_verdict(plan, refusal),
        tone=_tone(plan, refusal),
        overrides=overrides(plan.changes, absent=absent),
        proposals=overrides(proposals_to_ask(plan), absent=absent),
        training=words.training(plan),
        budgets=words.budgets(plan),
        unset=words.unset(plan),
        warnings=all_warnings(plan),
        binding=plan.binding_phase,
        asked_binding=plan.requested.binding_phase,
        plan=plan,
        components=[name for name in COMPONENTS if _is_used(data, name)],
        meanings=formulas.MEANINGS,
        formulas=formulas.formulas(formulas.chapter(plan)),
    )
    return text


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise _missing("jinja2") from None
    environment = Environment(
        loader=FileSystemLoader(FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the order of the contract
    environment.filters.update(gib=gib, number=_number, signed=_signed, shown=words.shown)
    return environment


def _packed_library() -> str:
    """Return plotly.js, compressed; the page unpacks it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise _missing("plotly") from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


def _missing(library: str) -> MemfitError:
    return MemfitError(
        f"the page needs {library}, which is not installed here: pip install 'memfit[explain]'. "
        "memfit plan, and memfit.report=full, need nothing more."
    )


def _number(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _signed(num_bytes: int) -> str:
    return "0" if abs(num_bytes) < GIB // 200 else f"{num_bytes / GIB:+.2f}".replace("-", "−")


def _tone(plan: Plan, refusal: str) -> str:
    if refusal or not plan.fits:
        return "bad"
    return "good" if plan.trains_the_same else "warn"


def _verdict(plan: Plan, refusal: str) -> str:
    """Return the first sentence of the page."""
    if refusal or not plan.fits:
        return f"It does not fit: {words.obstacle(plan.estimate)}." if not plan.fits else refusal
    phase = plan.binding_phase
    return f"It fits: {phase.peak_bytes / GIB:.2f} of {gib(phase.budget_bytes)} at {phase.name}."


def _is_used(data: Mapping[str, Any], component: str) -> bool:
    """Whether any prediction of the page holds bytes of ``component``."""
    sets = [data["asked"], data["planned"], *(choice for knob in data["what_if"] for choice in knob["choices"])]
    return any(phase["components"][component] for estimate in sets for phase in estimate["phases"])
