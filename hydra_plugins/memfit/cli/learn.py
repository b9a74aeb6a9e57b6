"""``memfit learn``: what did this run really need? Later plans of the same kind of run know it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.memfit.cli.options import add_launch_options

if TYPE_CHECKING:
    from hydra_plugins.memfit.learning.observe import Death

_EPILOG = """\
RUN          the run's folder with .hydra/memfit.json, its console log, jsonl, TensorBoard file, or csv of nvidia-smi; several
             are read together. Without a memfit.json: the launch itself, as for memfit plan.

examples:
  memfit learn outputs/2026-11-21/10-00-00 console.log
  memfit learn console.log --framework-version 0.9.1 --hardware h200 --gpus 8 actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct
  memfit learn --list
  memfit learn --forget 3f2a9c01de

exit status: 0 done, 2 the input is wrong
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``memfit``."""
    says = "Keep what a run really needed beside what was planned: later plans of the same kind of run use it."
    parser = subparsers.add_parser("learn", help=says, description=says, allow_abbrev=False)
    add_launch_options(parser)
    parser.add_argument("--list", action="store_true", help="show what was learned, and the margin that follows")
    parser.add_argument("--forget", metavar="KIND", help="forget the runs of one kind (its name in --list), or all")
    parser.usage, parser.epilog = f"{parser.prog} [options] RUN [FILE ...] [key=value ...]", _EPILOG


def run(args: argparse.Namespace) -> int:
    """Learn from one run, or show or forget what was learned; return 0."""
    from hydra_plugins.memfit.learning.where import store_path

    file = store_path(os.environ)
    if args.forget:
        return _forget(file, args)
    if not args.list:
        _learn(file, args)
    return _show(file, args)


def _learn(file: Path, args: argparse.Namespace) -> None:
    from hydra_plugins.memfit.base.errors import ConfigError
    from hydra_plugins.memfit.learning import store
    from hydra_plugins.memfit.learning.observe import expectation_in, files_of, observe

    words = [word for word in args.overrides if "=" not in word or os.path.exists(word)]
    args.overrides = [word for word in args.overrides if word not in words]
    paths = [Path(word).expanduser() for word in words]
    if not paths:
        raise ConfigError(
            "memfit learn needs a run: its folder, or its log. Example: memfit learn outputs/run console.log"
        )
    record, files = files_of(paths)
    expected = expectation_in(record) if record else _asked(args)
    name = str((record or paths[0]).resolve())
    seen = observe(name, expected, files, _death(files))
    store.add(file, seen)
    args.kind = seen.kind


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """Return what memfit would have expected of the launch that the command line describes; raises `ConfigError`."""
    from hydra_plugins.memfit.base.errors import ConfigError
    from hydra_plugins.memfit.cli.launch import read_launch
    from hydra_plugins.memfit.learning.kind import expectation
    from hydra_plugins.memfit.planning.search import check

    problem = read_launch(args).problem
    if problem.version_assumed:  # what one release needs beyond another's formulas is no lesson
        raise ConfigError(f"which release of {problem.framework} ran is not known: --framework-version X.Y.Z.")
    return expectation(check(problem))


def _death(files: list[Path]) -> Death | None:
    """Return the out-of-memory message of a GPU in the logs among ``files``."""
    from hydra_plugins.memfit.diagnosis.scan import scan
    from hydra_plugins.memfit.diagnosis.stream import open_log
    from hydra_plugins.memfit.learning.observe import Death

    for file in files:
        if file.suffix in (".csv", ".jsonl") or "tfevents" in file.name:
            continue
        with open_log(str(file)) as log:
            cause = scan(log).cause
        if cause is not None and cause.kind.resource == "gpu":
            capacity = cause.amounts.get("capacity")
            return Death(
                phase=cause.phase,
                needed_bytes=cause.needed_bytes or 0,
                capacity_bytes=capacity.num_bytes if capacity else 0,
            )
    return None


def _forget(file: Path, args: argparse.Namespace) -> int:
    from hydra_plugins.memfit.base.errors import UnknownName
    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.learning import store

    known = {seen.kind for seen in store.read(file)}
    if args.forget != "all" and args.forget not in known:
        raise UnknownName("kind of run", args.forget, {*known, "all"})
    count = store.forget(file, None if args.forget == "all" else args.forget)
    if args.json:
        print_json({"forgotten": count})
    else:
        print(f"forgotten: {count} run{'s' * (count != 1)}")
    return 0


def _show(file: Path, args: argparse.Namespace) -> int:
    from hydra_plugins.memfit.cli.output import print_json
    from hydra_plugins.memfit.learning import store
    from hydra_plugins.memfit.report import learned

    kind = getattr(args, "kind", None)
    kinds = learned.kinds(store.read(file, kind))
    if args.json:
        print_json([learned.as_dict(one) for one in kinds])
    else:
        print(*(learned.lines(kinds) or [f"nothing was learned yet ({file})"]), sep="\n")
    return 0
