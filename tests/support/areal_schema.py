"""Writes what keys each AReaL release has, with their defaults, from the source of its ``api/cli_args.py``.

    python tests/support/areal_schema.py 1.0.4=PATH/areal/api/cli_args.py 0.3.4=PATH/cli_args.py ...

writes ``data/<version>.json`` of the adapter: dotted key -> default, ``null`` where there is none or it is computed.
Nothing of AReaL is imported or run; only names and plain defaults are taken.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "hydra_plugins" / "memfit" / "frameworks" / "areal" / "data"
ROOTS = ("GRPOConfig", "PPOConfig", "SFTConfig", "RWConfig", "DPOConfig")
LEFT_OUT = frozenset({"stats_logger", "perf_tracer", "recover", "saver", "evaluator", "checkpointer", "session_tracer"})
"""Subtrees without bytes on a GPU; their root keys are kept."""
_PARAMETERS = re.compile(r"^(def \w+)\[[^\]]*\]\(", re.MULTILINE)
"""Type parameters of a function: a syntax that Python 3.10 and 3.11 do not read."""


class Schema:
    """The dataclasses of one source file."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(_PARAMETERS.sub(r"\1(", source))
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.constants = {
            target.id: _literal(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def keys(self, name: str, prefix: str = "") -> dict[str, Any]:
        """Return dotted key -> default of the dataclass ``name`` and of what it holds."""
        found: dict[str, Any] = {}
        for field, (annotation, value) in self._fields(name).items():
            key = f"{prefix}{field}"
            nested = next((c for c in self._names(annotation) if self._is_config(c)), None)
            default = self._default(value)
            if nested is None:
                found[key] = default
                continue
            found[key] = None
            if field not in LEFT_OUT:
                found.update(self.keys(nested, f"{key}."))
        return found

    def _fields(self, name: str) -> dict[str, tuple[ast.expr, ast.expr | None]]:
        fields: dict[str, tuple[ast.expr, ast.expr | None]] = {}
        node = self.classes[name]
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                fields.update(self._fields(base.id))
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                fields[line.target.id] = (line.annotation, line.value)
        return fields

    def _is_config(self, name: str) -> bool:
        node = self.classes.get(name)
        return node is not None and any("dataclass" in ast.unparse(d) for d in node.decorator_list)

    @staticmethod
    def _names(annotation: ast.expr) -> list[str]:
        text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
        words = "".join(c if c.isalnum() or c == "_" else " " for c in str(text)).split()
        return [] if {"list", "List", "dict", "Dict"} & set(words) else words

    def _default(self, value: ast.expr | None) -> Any:
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
            given = {k.arg: k.value for k in value.keywords}
            return self._default(given["default"]) if "default" in given else None
        if isinstance(value, ast.Name):
            return self.constants.get(value.id)
        return _literal(value)


def _literal(value: ast.expr | None) -> Any:
    try:
        found = None if value is None else ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None
    return found if isinstance(found, (int, float, str, bool)) else None


def read(path: Path) -> dict[str, Any]:
    """Return the keys of every experiment config in one file."""
    schema = Schema(path.read_text(encoding="utf-8"))
    keys: dict[str, Any] = {}
    for root in ROOTS:
        if root in schema.classes:
            for key, default in schema.keys(root).items():
                keys.setdefault(key, default)
    return dict(sorted(keys.items()))


def main(words: list[str]) -> None:
    """Write one file for each ``version=path``."""
    for word in words:
        version, _, path = word.partition("=")
        text = json.dumps(read(Path(path)), indent=0, sort_keys=True)
        (DATA / f"{version}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
