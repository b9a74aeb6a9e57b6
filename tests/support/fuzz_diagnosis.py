"""Coverage-guided fuzzing of the log reader with atheris: ``python -m support.fuzz_diagnosis -max_total_time=60``.

Run with ``PYTHONPATH=tests:.``; all arguments are libFuzzer's. The public logs are the corpus, the catalogue's needles the
dictionary. An exception, a hang or a lost byte ends it with the input that did it.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hydra_plugins.memfit.diagnosis"]):
    from hydra_plugins.memfit.diagnosis.catalogue import NEEDLES
    from hydra_plugins.memfit.diagnosis.scan import scan

LOGS = Path(__file__).resolve().parents[1] / "data" / "logs"


def one_input(data: bytes) -> None:
    """Scan one input."""
    assert scan(io.BytesIO(data)).num_bytes == len(data)


def main() -> None:
    """Fuzz until the arguments say that it is enough."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, words = Path(folder) / "corpus", Path(folder) / "words"
        shutil.copytree(LOGS, corpus, ignore=shutil.ignore_patterns("*.yaml"))
        words.write_text("".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in needle)}"\n' for needle in NEEDLES))
        atheris.Setup([*sys.argv, "-max_len=6000", "-timeout=20", f"-dict={words}", str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
