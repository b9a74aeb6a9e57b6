"""Writes the data of `hydra_plugins.memfit.frameworks.verl.defaults` from verl's own wheels.

    PYTHONPATH=tests python -m support.verl_defaults --wheel-dir DIR

``DIR`` holds ``verl-<version>-*.whl`` (``pip download --no-deps verl==<version>``). Nothing of verl is imported: its
yaml files are composed by Hydra, and the defaults that only its dataclasses know are read from their source text.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.memfit.frameworks.verl import supervised_keys
from hydra_plugins.memfit.frameworks.verl.defaults import DATA, TRAINERS, VERSIONS
from hydra_plugins.memfit.frameworks.verl.generation import YAML_VERSIONS
from hydra_plugins.memfit.frameworks.verl.recipes import RECIPES

SECTIONS = (
    "model_engine", "data", "actor_rollout_ref", "critic", "reward_model", "reward", "algorithm", "distillation",
    "trainer", "ray_init", "ray_kwargs",
)  # fmt: skip
"""Top-level sections that memory, or verl's own checks, can depend on."""
TYPED_SECTIONS = ("actor_rollout_ref", "critic")
"""Sections for which the fields that only a dataclass names are recorded."""
DROPPED = frozenset({"_target_", "profiler", "checkpoint", "qat", "prometheus", "trace", "custom_async_server"})
"""Names of subtrees that are left out wherever they stand: they hold no bytes of a GPU."""
LONGEST_TEXT = 200
_SOURCES = ("base_config.py", "trainer/config/*.py", "workers/config/*.py")


def compose_config(package: Path, config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose ``config_name`` of the verl package (a directory) as its trainer would, interpolations unresolved."""
    with initialize_config_dir(str(package.resolve() / "trainer" / "config"), version_base=None):
        return compose(config_name, overrides=overrides or [])


def extract(package: Path, version: str) -> dict[str, Any]:
    """Return what is committed for one version; ``package`` is the directory ``verl`` of a wheel."""
    record: dict[str, Any] = {
        "version": version,
        "source": f"verl {version}, trainer/config/ppo_trainer.yaml and ppo_megatron_trainer.yaml, composed by Hydra; "
        "dataclass_only from workers/config/*.py and trainer/config/*.py",
    }
    classes = _dataclasses(package)
    for trainer, config_name in TRAINERS.items():
        whole = OmegaConf.to_container(compose_config(package, config_name))
        assert isinstance(whole, dict)
        sections = {name: whole[name] for name in SECTIONS if name in whole}
        record[trainer] = {
            "defaults": _prune(sections),
            "dataclass_only": dict(_dataclass_only({name: sections[name] for name in TYPED_SECTIONS}, classes)),
        }
    return record


def extract_generation(packages: Mapping[str, Path]) -> dict[str, Any]:
    """Return generation.yaml of each release that has one; ``packages`` are directories ``verl`` by version."""
    versions = {}
    for version in YAML_VERSIONS:
        whole = OmegaConf.to_container(compose_config(packages[version], "generation"))
        assert isinstance(whole, dict)
        versions[version] = _prune(whole)
    return {"source": "verl, trainer/config/generation.yaml of each version", "versions": versions}


def extract_recipes(packages: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the yaml of each recipe sets itself, for each release that has it; ``packages`` as above."""
    found: dict[str, dict[str, Any]] = {recipe: {} for recipe in RECIPES}
    for recipe, version in itertools.product(RECIPES, packages):
        configs = packages[version] / "experimental" / f"{recipe}_policy" / "config"
        own = [_own_keys(configs / f"{recipe}_{trainer}.yaml") for trainer in TRAINERS.values()]
        if own[0]:
            assert own[0] == own[1], f"verl {version}: {recipe} differs between FSDP and Megatron"
            found[recipe][version] = own[0]
    return {"source": "verl, experimental/*_policy/config/*_ppo_trainer.yaml of each version", "recipes": found}


def _own_keys(path: Path) -> dict[str, Any]:
    """Return what a yaml sets itself, without its defaults list and Hydra's own section; empty: there is no such file."""
    if not path.is_file():
        return {}
    whole = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(whole, dict)
    return _prune({key: value for key, value in whole.items() if key not in ("defaults", "hydra")})


def extract_supervised(packages: Mapping[str, Path]) -> dict[str, Any]:
    """Return the configs of supervised fine-tuning; ``packages`` are directories ``verl`` by version."""
    entries: dict[str, Any] = {}
    for entry, config_name in supervised_keys.ENTRIES.items():
        entries[entry] = {}
        for version in supervised_keys.VERSIONS_OF[entry]:
            whole = OmegaConf.to_container(compose_config(packages[version], config_name))
            assert isinstance(whole, dict)
            entries[entry][version] = _prune({k: v for k, v in whole.items() if k != "global_profiler"})
    return {
        "source": "verl, trainer/config/sft_trainer.yaml and sft_trainer_engine.yaml of each version",
        "entries": entries,
    }


def _prune(node: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop what `DROPPED` names, and texts too long to be a setting."""
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if key in DROPPED or (isinstance(value, str) and len(value) > LONGEST_TEXT):
            continue
        kept[str(key)] = _prune(value) if isinstance(value, dict) else value
    return kept


def _dataclasses(package: Path) -> dict[str, ast.ClassDef]:
    """Return the config classes of verl by name, as syntax trees."""
    files = [path for pattern in _SOURCES for path in sorted(package.glob(pattern))]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _dataclass_only(
    node: Mapping[Any, Any], classes: Mapping[str, ast.ClassDef], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, default) of each dataclass field that the yaml of its section does not name."""
    name = str(node.get("_target_", "")).rpartition(".")[2]
    for field, default in _fields(name, classes).items():
        if field not in node and field not in DROPPED:
            yield from _flatten(prefix + field, default, classes)
    for key, value in node.items():
        if isinstance(value, dict) and key not in DROPPED:
            yield from _dataclass_only(value, classes, f"{prefix}{key}.")


def _flatten(key: str, default: ast.expr, classes: Mapping[str, ast.ClassDef]) -> Iterator[tuple[str, Any]]:
    """Yield the default itself, or those of the dataclass that it builds."""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        for field, inner in _fields(_factory(default), classes).items():
            if field not in DROPPED:
                yield from _flatten(f"{key}.{field}", inner, classes)
        return
    if value is None or isinstance(value, (bool, int, float, str)):
        yield key, value


def _factory(default: ast.expr) -> str:
    """Return the name of the class in ``field(default_factory=Class)``, or an empty text."""
    for keyword in default.keywords if isinstance(default, ast.Call) else ():
        if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Name):
            return keyword.value.id
    return ""


def _fields(name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, ast.expr]:
    """Return the fields with a default of a class and its bases, in the order of the source."""
    if name not in classes:
        return {}
    found: dict[str, ast.expr] = {}
    for base in classes[name].bases:
        found |= _fields(ast.unparse(base).rpartition(".")[2], classes)
    for line in classes[name].body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.value is None:
            continue
        if not line.target.id.startswith("_") and "ClassVar" not in ast.unparse(line.annotation):
            found[line.target.id] = _plain_default(line.value)
    return found


def _plain_default(value: ast.expr) -> ast.expr:
    """Return ``x`` of ``field(default=x)``, anything else as it is."""
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if keyword.arg == "default":
            return keyword.value
    return value


def unpack(wheel: Path, target: Path) -> Path:
    """Unpack the config part of a wheel and return the package directory."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = ("verl/base_config.py", "verl/trainer/config/", "verl/workers/config/")
        names = [name for name in archive.namelist() if name.startswith(wanted)]
        recipes = [name for name in archive.namelist() if re.match(r"verl/experimental/\w+/config/\w+\.yaml$", name)]
        archive.extractall(target, names + recipes)
    return target / "verl"


def wheel_of(version: str, directory: Path) -> Path | None:
    """Return the wheel of one version in ``directory``, or ``None``."""
    return next(iter(sorted(directory.glob(f"verl-{version}-*.whl"))), None)


def as_text(record: Mapping[str, Any]) -> str:
    """Return the committed form of a record."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write one file a version; a version whose wheel is missing is an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel-dir", type=Path, required=True)
    directory = parser.parse_args().wheel_dir
    with tempfile.TemporaryDirectory() as target:
        packages = {}
        for version in VERSIONS:
            wheel = wheel_of(version, directory)
            if wheel is None:
                parser.error(f"{directory} lacks verl-{version}-*.whl; try: pip download --no-deps verl=={version}")
            packages[version] = unpack(wheel, Path(target) / version)
            _write(DATA / f"{version}.json", extract(packages[version], version))
        _write(DATA / "generation.json", extract_generation(packages))
        _write(DATA / "supervised.json", extract_supervised(packages))
        _write(DATA / "recipes.json", extract_recipes(packages))


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(as_text(record), encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
