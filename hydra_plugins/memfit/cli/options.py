"""The options that describe a launch; every command that plans one has the same."""

from __future__ import annotations

import argparse

from hydra_plugins.memfit.frameworks import registry

WORDS_HELP = """\
key=value    values of the launch, in the grammar of Hydra's command line: key=value, +key=value, ++key=value, ~key.
             memfit.KEY=value are memfit's own settings (memfit.margin=0.08, memfit.pin=[trainer.nnodes]).
             A launch line can be pasted as it is, with the variables, python -m MODULE, torchrun or ray job submit in
             front of it: what stands behind +hardware=NAME is pinned, also here.

examples:
  %(examples)s

exit status: 0 it fits, 3 it does not fit, 2 the input is wrong
"""
EXAMPLES = (
    "memfit {command} --hardware h200 --gpus 8 actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct",
    "memfit {command} --config .hydra/config.yaml --hardware a100-80",
    "memfit {command} --framework areal --hardware a40 --model qwen2.5-1.5b --config gsm8k_grpo.yaml",
    "memfit {command} python3 -m verl.trainer.main_ppo data.train_batch_size=64 ... +hardware=h200",
)


def add_launch_options(parser: argparse.ArgumentParser, *examples: str, several: bool = False) -> None:
    """Add the options of one launch to ``parser``; `hydra_plugins.memfit.cli.launch.read_launch` reads them.

    ``examples``: command lines for its help instead of the usual ones. ``several``: accelerators and counts are lists.
    """
    lines = examples or [example.format(command=parser.prog.split()[-1]) for example in EXAMPLES]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = WORDS_HELP % {"examples": "\n  ".join(lines)}
    parser.usage = f"{parser.prog} [options] [key=value ...]"
    add = parser.add_argument
    add("--framework", metavar="NAME", help=f"{', '.join(registry.names())}; recognised from the keys when left out")
    add("--framework-version", metavar="X.Y.Z", help="the installed one when left out, else the newest known")
    more, names_type, number = (",...", names, counts) if several else ("", str, count)
    hardware = "h200, a100-80, ... or auto (default: auto, the accelerator of this machine)"
    add("--hardware", type=names_type, metavar=f"NAME{more}", help=hardware)
    add("--gpus", type=number, metavar=f"N{more}", help="devices of one node; the config's own count when left out")
    add("--nodes", type=number, metavar=f"N{more}", help="nodes; the config's own count when left out")
    add(
        "--model",
        metavar="NAME",
        help="architecture of the policy, a name or a hub id of conf/model; the model path of the launch when left out",
    )
    add("--config", metavar="FILE", help="yaml or json of nested or dotted keys, below the key=value ones")
    add("--json", action="store_true", help="print the plan as JSON on stdout, and nothing else")
    parser.set_defaults(takes_overrides=True)


def count(text: str) -> int:
    """Return a whole number above 0; the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Return whole numbers above 0, separated by commas, each once."""
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Return names that are separated by commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no name")
    return found
