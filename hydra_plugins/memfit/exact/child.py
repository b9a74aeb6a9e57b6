"""The process that compiles: reads a program as JSON on stdin, prints what the compiler says. Started by `compiler`."""

from __future__ import annotations

import json
import sys

from hydra_plugins.memfit.exact.spec import from_json


def main() -> int:
    """Compile the program on stdin; print ``STATS {json}`` or ``FAILED message`` and return 0."""
    from hydra_plugins.memfit.exact.programs import lower  # imports jax: only here

    lowered = lower(from_json(sys.stdin.read()))
    print("LOWERED", flush=True)
    try:
        analysis = lowered.compile().memory_analysis()
    except Exception as error:  # the compiler's refusal is the answer: jaxlib raises XlaRuntimeError and subclasses
        print("FAILED " + str(error)[:8000], flush=True)
        return 0
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    print("STATS " + json.dumps({name: getattr(analysis, name) for name in names}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
