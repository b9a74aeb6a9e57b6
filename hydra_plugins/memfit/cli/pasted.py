"""A launch line as people paste it: environment, launcher, ``python -m module``, Hydra's own flags, and the values.

``PYTHONUNBUFFERED=1 torchrun --nproc_per_node 8 -m verl.trainer.main_ppo a=1 --cfg job`` holds one value. What is in
front of the program belongs to the environment, Hydra's flags that start no other launch are left out, and flags that
choose another config are refused: only Hydra can compose that one.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hydra_plugins.memfit.base.errors import ConfigError

SHIPPED = (
    "ppo_trainer",
    "ppo_megatron_trainer",
    "fully_async_ppo_trainer",
    "fully_async_ppo_megatron_trainer",
    "one_step_off_ppo_trainer",
    "one_step_off_ppo_megatron_trainer",
    "generation",
    "sft_trainer",
    "sft_trainer_engine",
)
"""Configs that a framework chooses by name and whose values memfit has: ``--config-name`` of one of them is read."""

_QUIET = frozenset({"env", "exec", "nohup", "time", "nice", "stdbuf"})
_WRAPPERS = _QUIET | {"uv", "srun", "ray"}
_PYTHON = re.compile(r"(python(\d+(\.\d+)?)?|torchrun|accelerate|deepspeed)")
_SHELLS = frozenset({"bash", "sh", "zsh", "source"})
_LAUNCHER_MODULES = ("torch.distributed.", "accelerate.", "deepspeed.")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_LINE = re.compile(r"\s-m\s|\.py(\s|$)")
_SHELL_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_END_OF_COMMAND = re.compile(r"[|&;].*|\d?>.*|2>&1")
_ARGUMENTS = frozenset({"$@", "$*"})
_ALONE = frozenset({"-m", "--multirun", "--resolve", "-r", "--run", "--hydra-help"})
_WITH_VALUE = frozenset({"-c", "--cfg", "-p", "--package", "-i", "--info", "--experimental-rerun"})
_NAME = frozenset({"-cn", "--config-name"})
_PATH = frozenset({"-cp", "--config-path"})
_OWN_FOLDER = frozenset({"config", "./config"})
"""How scripts of verl name the folder of its shipped configs, relative to its own module."""
_COMPOSES = frozenset({*_PATH, "-cd", "--config-dir"})
_HIDDEN = "\0"
_COMPOSE_FIRST = "A config of your own is composed by Hydra: COMMAND --cfg job > FILE, then --config FILE."


@dataclass(frozen=True, kw_only=True, slots=True)
class Pasted:
    """What is left of a pasted line."""

    words: tuple[str, ...]
    """Values of the launch, and flags that are not Hydra's."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables that stood in front of the program."""
    config_name: str | None = None
    """One of `SHIPPED`."""
    left_out: tuple[str, ...] = ()
    """What was not read, for people."""


def hidden(words: Sequence[str]) -> list[str]:
    """Return ``words`` with the flags of a launcher (``srun --nodes=2 python -m x``) marked, so that no parser takes them."""
    start = next((i for i, word in enumerate(words) if _is_program(word)), None)
    if start is None:
        return list(words)
    try:
        end = _target(words, start)
    except ConfigError:  # `read_pasted` says it
        end = start
    return [f"{_HIDDEN}{word}" if start <= i < end and word.startswith("-") else word for i, word in enumerate(words)]


def shown(words: Sequence[str]) -> list[str]:
    """Return ``words`` without the marks of `hidden`."""
    return [word.removeprefix(_HIDDEN) for word in words]


def read_pasted(words: Sequence[str]) -> Pasted:
    """Return the values among ``words``; raises `ConfigError` for a shell script and for a config that Hydra must compose."""
    typed = [part for word in words for part in _split(word)]
    script = next((word for word in typed if word.endswith(".sh") and "=" not in word), None)
    if script is not None:
        raise ConfigError(f"{script} is a shell script: paste the launch line that is in it.")
    start = next((i for i, word in enumerate(typed) if _is_program(word)), None)
    if start is None:
        return _without_flags([], typed, {}, [])
    end = _target(typed, start)
    front = typed[:start]
    launcher = _launcher([word for word in typed[start:end] if not _ASSIGNMENT.match(word)])
    variables = [word for word in (*front, *typed[start:end]) if _ASSIGNMENT.match(word)]
    environ = dict(word.split("=", 1) for word in variables)
    values = [word for word in front if word not in variables]
    return _without_flags(values, typed[end:], environ, [] if _says_nothing(launcher) else [_shown(launcher)])


def _split(word: str) -> list[str]:
    """Return the words of a line that was pasted in quotes, as one; nothing for the rest of a broken continuation."""
    if not word.strip("\\ \t\n"):
        return []
    if not _LINE.search(word) or len(word.split()) < 2 or ("=" in word.split()[0] and not _ASSIGNMENT.match(word)):
        return [word]
    try:
        parts = shlex.split(_expanded(word.replace("\\\n", " ")), comments=False)
    except ValueError as error:
        raise ConfigError(f"the pasted line cannot be read ({error}): {word[:80]!r}") from None
    end = next((i for i, part in enumerate(parts) if _END_OF_COMMAND.fullmatch(part)), len(parts))
    return [part for part in parts[:end] if part not in _ARGUMENTS]


def _expanded(line: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"the shell variable {name} of the pasted line has no value here: write the value.")
        return shlex.quote(os.environ[name])

    return _SHELL_VARIABLE.sub(value, line)


def _is_program(word: str) -> bool:
    name = os.path.basename(word)
    return name in _WRAPPERS or name in _SHELLS or bool(_PYTHON.fullmatch(name)) or _is_script(word)


def _is_script(word: str) -> bool:
    return word.endswith(".py") and "=" not in word and not word.startswith("-")


def _target(words: Sequence[str], start: int) -> int:
    """Return the index behind the module or the script that starts the training."""
    if os.path.basename(words[start]) in _SHELLS:
        raise ConfigError(
            f"{' '.join(words[start : start + 2])} is a shell script: paste the launch line that is in it."
        )
    armed = False
    for index in range(start, len(words)):
        if armed and words[index - 1] == "-m" and not words[index].startswith(_LAUNCHER_MODULES):
            return _behind_script(words, index + 1)
        if _is_script(words[index]):
            return index + 1
        armed = armed or bool(_PYTHON.fullmatch(os.path.basename(words[index])))
    raise ConfigError(
        f"no python module or script stands behind {words[start]!r}. A launch line is pasted as it is: "
        f"memfit plan {words[start]} ... -m MODULE key=value, or the key=value words alone."
    )


def _behind_script(words: Sequence[str], index: int) -> int:
    """A module that launches a script (areal.launcher.local examples/x.py) has it as its first word."""
    return index + 1 if index < len(words) and _is_script(words[index]) else index


def _launcher(words: list[str]) -> list[str]:
    """Return the words in front of a plain ``python -m MODULE`` or ``python SCRIPT``, which say how many processes there are."""
    plain = next((i for i, word in enumerate(words) if os.path.basename(word).startswith("python")), 0)
    silent = all(word in _QUIET for word in words[:plain]) or any(
        w.startswith(_LAUNCHER_MODULES) for w in words[plain:]
    )
    return words if silent else words[:plain]


def _says_nothing(launcher: Sequence[str]) -> bool:
    """Whether python, and nothing that decides how many processes there are, starts the module."""
    words = [word for word in launcher if word not in _QUIET]
    return _is_plain(words[0]) and not any(word.startswith(_LAUNCHER_MODULES) for word in words)


def _is_plain(word: str) -> bool:
    return os.path.basename(word).startswith("python") or _is_script(word)


def _shown(launcher: Sequence[str]) -> str:
    text = " ".join(launcher)
    counts = any("nproc" in word or "nnodes" in word for word in launcher)
    return f"{text} (devices and nodes: --gpus N --nodes N)" if counts else text


def _without_flags(values: list[str], words: Sequence[str], environ: Mapping[str, str], left_out: list[str]) -> Pasted:
    """Take Hydra's own flags out of ``words``."""
    rest = iter(words)
    config_name = None
    for word in rest:
        flag, sign, value = word.partition("=")
        if flag in _NAME or flag in _COMPOSES:
            value = value if sign else next(rest, "")
            if not (flag in _PATH and value.rstrip("/") in _OWN_FOLDER):
                config_name = _shipped(flag, value)
        elif flag in _WITH_VALUE:
            left_out.append(word if sign else f"{word} {next(rest, '')}".rstrip())
        elif word in _ALONE:
            left_out.append(word)
        else:
            values.append(word)
    return Pasted(words=tuple(values), environ=environ, config_name=config_name, left_out=tuple(left_out))


def _shipped(flag: str, value: str) -> str:
    name = value.removesuffix(".yaml")
    if flag in _NAME and name in SHIPPED:
        return name
    raise ConfigError(f"{flag} {value}: memfit knows the configs {', '.join(SHIPPED)}. {_COMPOSE_FIRST}")
