"""The machinery of configuration: files, overrides, and complaints that name the key."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from recursivemas.config import Config, override, parse, read_yaml
from recursivemas.errors import ConfigError


class Inner(Config):
    lr: float = Field(default=1e-3, gt=0)
    steps: int = 10


class Outer(Config):
    name: str
    inner: Inner = Inner()
    parts: dict[str, Inner] = {}


def test_settings_are_parsed_and_frozen() -> None:
    settings = parse(Outer, {"name": "x", "inner": {"lr": "2e-4"}}, where="here")
    assert settings.inner == Inner(lr=2e-4)
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "y"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "recipe.yaml: the setting 'name' is missing"),
        ({"name": "x", "iner": {}}, "unknown setting 'iner': did you mean 'inner'"),
        ({"name": "x", "inner": {"lrr": 1}}, r"unknown setting 'inner\.lrr': did you mean 'inner\.lr'"),
        ({"name": "x", "parts": {"a": {"stps": 1}}}, r"did you mean 'parts\.a\.steps'"),
        ({"name": "x", "inner": {"lr": 0}}, r"'inner\.lr' is 0: .*greater than 0"),
        ({"name": "x", "inner": {"lr": "fast"}}, r"'inner\.lr' is 'fast': .*number"),
        ({"name": "x", "inner": {"steps": 2.5}}, r"'inner\.steps' is 2\.5"),
        ({"name": ["x" * 200]}, r"'name' is \['x{75}\.\.\.:"),
    ],
)
def test_a_complaint_names_the_place_the_key_and_what_was_expected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Outer, settings, where="recipe.yaml")


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'name' is missing; 'inner\.lr' is -1"):
        parse(Outer, {"inner": {"lr": -1}}, where="here")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("inner.lr=0.5", {"inner": {"lr": 0.5, "steps": 3}, "name": "x"}),
        ("inner.steps = 4", {"inner": {"lr": 1, "steps": 4}, "name": "x"}),
        ("name=a=b", {"inner": {"lr": 1, "steps": 3}, "name": "a=b"}),
        ("new.deep.key=[1, two]", {"inner": {"lr": 1, "steps": 3}, "name": "x", "new": {"deep": {"key": [1, "two"]}}}),
        ("name=null", {"inner": {"lr": 1, "steps": 3}, "name": None}),
    ],
)
def test_an_override_changes_a_copy(assignment: str, expected: dict[str, Any]) -> None:
    settings = {"inner": {"lr": 1, "steps": 3}, "name": "x"}
    assert override(settings, [assignment]) == expected
    assert settings == {"inner": {"lr": 1, "steps": 3}, "name": "x"}


def test_later_overrides_win() -> None:
    assert override({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.lr", "write it as key=value"),
        ("=5", "write it as key=value"),
        ("name.deep=5", "'name' is a value, not a section"),
        ("name=[1", "as YAML"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"name": "x"}, [assignment])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("a: 1\nb: {c: 1, c: 2}\n", "settings.yaml:2: 'c' is given twice, first in line 2"),
        ("- 1\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "latin.yaml")
