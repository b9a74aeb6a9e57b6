"""``--config FILE``: nested and dotted keys, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.memfit.base.errors import ConfigError
from hydra_plugins.memfit.cli.config_file import MAX_BYTES, read_config_file


def write(folder: Path, name: str, text: str | bytes) -> str:
    """Return the path of a new file."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "a.b: 1\na:\n  c: 2\n", {"a": {"b": 1, "c": 2}}),
        ("a.json", '{"a.b": 1, "a": {"c.d": [1, 2]}}', {"a": {"b": 1, "c": {"d": [1, 2]}}}),
        ("a.json", '{"+a.b": 1, "++c": null}', {"a": {"b": 1}, "c": None}),
        ("a.yaml", "a: 1e-6\nb: yes\nc: 2024-01-01\nd: ${a}\n", {"a": 1e-6, "b": True, "c": "2024-01-01", "d": "${a}"}),
        ("a.yml", '{"a": {"b": true}}', {"a": {"b": True}}),
        ("a.conf", "a:\n  b: text\n", {"a": {"b": "text"}}),
        ("a.json", b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ("a.yaml", "a.b: 1\na: {b: 1}\n", {"a": {"b": 1}}),
        ("a.json", "{}", {}),
    ],
)
def test_keys_are_unfolded(tmp_path: Path, name: str, text: str | bytes, expected: dict[str, Any]) -> None:
    """Dotted and nested keys mix; values keep the types that Hydra would give them."""
    assert read_config_file(write(tmp_path, name, text)).values == expected


def test_parts_of_a_file_are_told_apart(tmp_path: Path) -> None:
    """Keys behind `+`, the section memfit and the group in the defaults list are not the framework's."""
    text = "defaults: [x, {hardware: h20}]\nmemfit: {margin: 0.1}\nhydra: {run: 1}\na: {+b: 1, c: 2}\n+d: {e: 1}\n"
    file = read_config_file(write(tmp_path, "a.yaml", text))
    assert file.values == {"a": {"b": 1, "c": 2}, "d": {"e": 1}}
    assert (file.added, file.settings, file.hardware) == ({"a.b", "d.e"}, {"margin": 0.1}, "h20")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a.b: 1\na: {b: 2}\n", "'a.b' is given twice, with 1 and 2"),
        ("a.yaml", "a: 1\na.b: 2\n", "'a.b' needs a section where 1 is given"),
        ("a.yaml", "a: 1\na: 2\n", "duplicate key"),
        ("a.yaml", "a..b: 1\n", "'a..b' has an empty part"),
        ("a.yaml", "", "is empty"),
        ("a.yaml", "word", "holds text without keys: it is no config of a launch"),
        ("passwd", "root:x:0:0:root:/root:/bin/bash\nbin:x:2:2:bin:/bin:/bin/sh\n", "holds text without keys"),
        ("a.yaml", "7", "holds text without keys"),
        ("a.toml", "[a]\nb = 'c: d'\n", "is not valid yaml"),
        ("a.yaml", "- a: 1\n", "holds a list"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", '{"a": ', "is not valid json"),
        ("a.yaml", "a: [1\n", "is not valid yaml"),
        ("a.yaml", "a: !!python/object:os.system {}\n", "is not valid yaml"),
        ("a.yaml", b"\xff\xfe\x00a", "is not text in UTF-8"),
        ("a.yaml", "a" * (MAX_BYTES + 1), "is larger than"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    """Each wrong file is a `ConfigError` that names the file and says what is wrong in it."""
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError) as error:
        read_config_file(path)
    assert message in str(error.value)
    assert path in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and a directory are errors with the reason of the system."""
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=reason):
            read_config_file(str(path))
