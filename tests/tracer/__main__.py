"""``PYTHONPATH=tests python -m tracer --model qwen2.5-3b --tokens 16384``: print one trace as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from tracer.case import parse
from tracer.report import trace


def main() -> None:
    """Trace the case of the command line."""
    case = parse()
    parameters, phases = trace(case)
    result = {"case": asdict(case), "parameters": parameters, "phases": {n: asdict(p) for n, p in phases.items()}}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
