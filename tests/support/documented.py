"""The commands in README and docs: what a reader is shown is what the commands print.

A block marked ``console`` holds commands behind ``$ `` (continued by a backslash) and their output, all of it.
``<!-- exit 3 -->`` on the line before the block is the exit status of its last command, 0 where nothing is said.
``python -m support.documented`` (with ``tests`` on the path) writes the output of today into the files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(r"(?:<!-- exit (?P<exit>\d+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)

_ALONE = """\
import importlib.metadata as metadata

def _alone(cls, name, find=metadata.Distribution.from_name):
    if name in ("verl", "areal", "transformers", "vllm", "sglang"):
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = classmethod(_alone)
"""
"""The frameworks of the tests' environment are not there: a page shows what a reader sees who has memfit alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    kind: str
    body: str
    exit_status: int

    @property
    def commands(self) -> tuple[str, ...]:
        """What a reader would type, one entry a command."""
        joined = re.sub(r"\\\n", "\\\n\0", self.body)
        found = re.findall(r"^\$ (.*(?:\n\0.*)*)", joined, re.MULTILINE)
        return tuple(command.replace("\0", "") for command in found)


def blocks(page: str, kind: str = "console") -> Iterator[Block]:
    """Yield the blocks of ``kind`` in ``page``, a path below the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if match["kind"] == kind:
            yield Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                kind=kind,
                body=match["body"],
                exit_status=int(match["exit"] or 0),
            )


def run(block: Block) -> tuple[str, int]:
    """Return the block as it should stand, commands and today's output, and the last command's exit status."""
    written, status = [], 0
    with tempfile.TemporaryDirectory() as folder:
        environ = _environment(Path(folder))
        for command in block.commands:
            result = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command],
                cwd=folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            written.append(f"$ {command}\n{result.stdout}")
            status = result.returncode
    return re.sub(r"[ \t]+$", "", "".join(written), flags=re.MULTILINE), status


def _environment(folder: Path) -> Mapping[str, str]:
    """Return the environment of an empty machine on which memfit, and nothing else, is installed."""
    scripts = folder / "scripts"
    scripts.mkdir()
    for name, target in (("memfit", "-m hydra_plugins.memfit.cli.main"), ("python", "")):
        script = scripts / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {target} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    (folder / "home").mkdir()
    (scripts / "sitecustomize.py").write_text(_ALONE, encoding="utf-8")
    return {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(scripts), str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONIOENCODING": "utf-8",
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
    }


def main() -> None:
    """Write what the commands print today into the pages."""
    for page in PAGES:
        for block in blocks(page):
            text, status = run(block)
            path = ROOT / page
            path.write_text(path.read_text(encoding="utf-8").replace(block.body, text, 1), encoding="utf-8")
            if status != block.exit_status:
                print(f"{page}:{block.line}: exit status {status}, not {block.exit_status}", file=sys.stderr)


if __name__ == "__main__":
    main()
