"""``memfit learn``: what did this run really need? Later plans of the same kind of run know it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.memfit.cli.options import add_launch_options

if TYPE_CHECKING:
    from hydra_plugins.memfit.cli.logged import Source
    from hydra_plugins.memfit.diagnosis.scan import Scan
    from hydra_plugins.memfit.learning.observe import Death

_EPILOG = """\
RUN          the run's folder with .hydra/memfit.json, its console log, jsonl, TensorBoard file, or csv of nvidia-smi; several
             are read together. Without a memfit.json: the launch that the log shows (as memfit diagnose reads it), or the
             launch itself, as for memfit plan.

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
    scans = {file: _scanned(file) for file in files if _is_log(file)}
    expected = expectation_in(record) if record else _asked(args, scans)
    name = str((record or paths[0]).resolve())
    seen = observe(name, expected, files, _death(scans.values()))
    store.add(file, seen)
    args.kind = seen.kind


def _is_log(file: Path) -> bool:
    return file.suffix not in (".csv", ".jsonl") and "tfevents" not in file.name


def _scanned(file: Path) -> Scan:
    from hydra_plugins.memfit.diagnosis.scan import scan
    from hydra_plugins.memfit.diagnosis.stream import open_log

    with open_log(str(file)) as log:
        return scan(log)


def _asked(args: argparse.Namespace, scans: Mapping[Path, Scan]) -> dict[str, Any]:
    """Return what memfit would have expected of the launch that is given, or that a log shows; raises `ConfigError`."""
    from hydra_plugins.memfit.base.errors import ConfigError
    from hydra_plugins.memfit.cli.logged import read_source, source_of
    from hydra_plugins.memfit.learning.kind import expectation
    from hydra_plugins.memfit.planning.search import check

    shown = (source_of(args, scan.launch, str(file)) for file, scan in scans.items())
    source = source_of(args, None, "") or next(filter(None, shown), None)
    if source is None:
        raise ConfigError(
            "the log does not show its launch, and no .hydra/memfit.json is given: name the run's folder, or give the launch as "
            "for memfit plan, --hardware NAME and key=value words or --config FILE."
        )
    if source.was_planned:
        raise ConfigError(
            f"memfit planned this launch ({source.name}), and the log does not show the plan: name the run's folder with its "
            ".hydra/memfit.json."
        )
    problem = read_source(args, source, _hardware(args, source, scans.values())).problem
    unsure = not args.framework_version and len(source.versions) > 1
    if problem.version_assumed or unsure:  # what one release needs beyond another's formulas is no lesson
        raise ConfigError(f"which release of {problem.framework} ran is not known: --framework-version X.Y.Z.")
    return expectation(check(problem))


def _hardware(args: argparse.Namespace, source: Source, scans: Iterable[Scan]) -> str | None:
    """Return the accelerator that is named, else the only one of the capacity in the log; raises `ConfigError` for several."""
    from hydra_plugins.memfit.base.errors import ConfigError
    from hydra_plugins.memfit.cli.logged import named_hardware
    from hydra_plugins.memfit.diagnosis.diagnose import devices_of

    named = named_hardware(args, source)
    if source.own or named is not None:
        return named
    if variable := os.environ.get("MEMFIT_HARDWARE"):
        return variable
    devices = next(filter(None, (devices_of(scan.cause) for scan in scans)), ())
    if not devices:
        return None
    if len(devices) > 1:
        raise ConfigError(
            f"by its capacity the accelerator is one of {', '.join(devices)}: --hardware NAME says which."
        )
    return devices[0]


def _death(scans: Iterable[Scan]) -> Death | None:
    """Return the first out-of-memory message of a GPU in the logs."""
    from hydra_plugins.memfit.learning.observe import Death

    for cause in (scan.cause for scan in scans):
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
