"""The machinery of configuration, and no configuration: load YAML, override, refuse what is not known.

Each package owns the pydantic models of its own settings; all of them derive from `Config`, which refuses unknown
keys and names the nearest known one.
"""

from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recursivemas.errors import ConfigError, unknown_name

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(BaseModel):
    """Base of all settings: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` with the line number of a syntax error."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def override(settings: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `key.subkey=value` assignments (values are read as YAML) to a copy of nested settings.

    >>> override({"outer": {"lr": 1e-3}}, ["outer.lr=0.0003"])
    {'outer': {'lr': 0.0003}}
    """
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(settings))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read the setting '{assignment}': write it as key=value or section.key=value")
        *sections, name = (part.strip() for part in key.split("."))
        target = changed
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"cannot set '{key}': '{section}' is a value, not a section")
        try:
            target[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"cannot read the value of the setting '{assignment}' as YAML") from None
    return changed


def parse(model: type[AnyConfig], settings: dict[str, Any], *, where: str) -> AnyConfig:
    """Validate settings; every complaint in one line that names the place, the key and what was expected."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        complaints = [_complaint(model, each) for each in error.errors()]
        more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise ConfigError(f"{where}: " + "; ".join(complaints[:3]) + more) from None


def _complaint(model: type[BaseModel], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return unknown_name(
            "setting", key, [".".join([*location[:-1], name]) for name in _fields(model, location[:-1])]
        )
    if error["type"] == "missing":
        return f"the setting '{key}' is missing"
    given = repr(error.get("input"))
    message = error["msg"].removeprefix("Value error, ")
    return f"'{key}' is {given if len(given) < 80 else given[:77] + '...'}: {message}"


def _fields(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the settings in the section at `location`; sections may be kept by name in a mapping."""
    parts = iter(location)
    for name in parts:
        field = model.model_fields.get(name)
        annotation = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        nested = [each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)]
        if not nested:
            return []
        model = nested[0]
        if get_origin(annotation) is dict:
            next(parts, None)
    return list(model.model_fields)
