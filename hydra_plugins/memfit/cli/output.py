"""What a command prints: JSON for programs, the report for people."""

from __future__ import annotations

import json
import sys
from typing import Any

from hydra_plugins.memfit.base.errors import NoPlanFits
from hydra_plugins.memfit.planning.problem import Plan
from hydra_plugins.memfit.report.json import to_dict
from hydra_plugins.memfit.report.text import print_error, print_plan


def print_json(document: Any) -> None:
    """Print ``document`` on stdout, and nothing else."""
    print(json.dumps(document, indent=2, ensure_ascii=False), file=sys.stdout)


def show(plan: Plan, *, as_json: bool) -> None:
    """Print ``plan`` on stdout, as JSON or in the style of ``memfit.report``."""
    if as_json:
        print_json(to_dict(plan))
    else:
        print_plan(plan, _style(plan), stream=sys.stdout)


def show_refusal(error: NoPlanFits, *, as_json: bool) -> None:
    """Print why nothing fits, on stdout; with ``--json`` the best attempt is there, and the reason on stderr."""
    assert isinstance(error.plan, Plan)
    if as_json:
        print_json(to_dict(error.plan))
        print(f"memfit: {error}", file=sys.stderr)
    else:
        print_error(error, _style(error.plan), stream=sys.stdout)


def _style(plan: Plan) -> str:
    """Return how to print: the console writes a page only when ``memfit explain`` asks for it."""
    style = plan.problem.settings.report
    return "full" if style == "html" else style
