"""The machinery of configuration, and no configuration: load YAML, override, refuse what is not known.

Each package owns the pydantic models of its own settings; all of them derive from `Config`, which refuses unknown
keys and names the nearest known one. A `Document` knows in which line of its file everything stands, so that what is
wrong with it, each a `Fault`, can be told with a line.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recursivemas.errors import ConfigError, PatternError, unknown_name

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(BaseModel):
    """Base of all settings: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Place = tuple[str | int, ...]
"""Keys and indices that lead to a value: ("stages", 0, 1)."""


class Fault(NamedTuple):
    """Something that is wrong with a setting, a pattern or a prompt: where, and what, and what to do."""

    place: Place
    message: str
    is_fatal: bool = True
    """Whether nothing can be made of it; otherwise it would run, but not as it looks."""
    lines_below: int | None = None
    """In a text of several lines: how far below its first the fault is. By default all of the text is meant."""


@dataclass(frozen=True)
class Document:
    """The mapping in a YAML file, and where in the file everything stands."""

    path: Path
    content: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)
    """The line of every value; where it stands under a key, the line of the key."""
    blocks: dict[Place, int] = field(default_factory=dict)
    """The first line of every text that stands below its key (after a `|`), line by line as it is."""
    repeated: list[Fault] = field(default_factory=list)
    """Keys that are given twice, of which YAML would silently take the last."""

    def line(self, place: Place, lines_below: int | None = None) -> int:
        """The line of a value (or so far below the first line of its text), or else of the nearest that holds it."""
        if place in self.blocks and lines_below is not None:
            return self.blocks[place] + lines_below
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def tell(self, fault: Fault) -> str:
        """The fault with its file and line."""
        return f"{self.path}:{self.line(fault.place, fault.lines_below)}: {fault.message}"


def read_document(path: Path) -> Document:
    """The mapping in a YAML file, with lines. Raises `ConfigError`, with the line of a syntax error."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        found = list(_walk(node, (), set())) if node is not None else []
        content = loader.construct_document(node) if node is not None else None
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    document = Document(path, content)
    for place, line, value in found:
        if place in document.lines:
            first = document.lines[place]
            again = f"'{place[-1]}' is given twice, first in line {first}; keep one of the two"
            document.repeated.append(Fault(place, again))
        document.lines[place] = line
        if isinstance(value, yaml.ScalarNode) and value.style == "|":
            document.blocks[place] = value.start_mark.line + 2
    return document


def _walk(node: yaml.Node, place: Place, seen: set[int]) -> Iterator[tuple[Place, int, yaml.Node]]:
    """Every value below a node: where it is, its line, and its node; what an alias repeats is left out."""
    if id(node) in seen:
        return
    seen.add(id(node))
    values: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        values = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        values = [(index, value, value) for index, value in enumerate(node.value)]
    for name, start, value in values:
        yield (*place, name), start.start_mark.line + 1, value
        yield from _walk(value, (*place, name), seen)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError`, with the line of a syntax error or of a key given twice."""
    document = read_document(path)
    for fault in document.repeated:
        raise ConfigError(document.tell(fault))
    return document.content


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
        raise ConfigError(f"{where}: " + some_of(complaints)) from None


def some_of(complaints: list[str]) -> str:
    """The first three of several complaints, in one line that tells how many more there are."""
    more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
    return "; ".join(complaints[:3]) + more


FindFaults = Callable[[Mapping[str, Any]], list[Fault]]
"""What is wrong with plain data beyond its form, however much of its form is wrong."""


def parse_document(model: type[AnyConfig], document: Document, find_faults: FindFaults) -> AnyConfig:
    """What a file holds; every complaint has its line. Raises `ConfigError` for its form, or `PatternError`."""
    form = [document.tell(fault) for fault in form_faults(model, document)]
    if form:
        raise ConfigError(some_of(form))
    fatal = [document.tell(fault) for fault in find_faults(document.content) if fault.is_fatal]
    if fatal:
        raise PatternError(some_of(fatal))
    return model.model_validate(document.content)


def form_faults(model: type[BaseModel], document: Document) -> list[Fault]:
    """Where a file does not have the form of a model: keys that are unknown, missing or given twice, wrong types."""
    try:
        model.model_validate(document.content)
    except ValidationError as error:
        misfits = [Fault(tuple(each["loc"]), _complaint(model, each)) for each in error.errors()]
        return [*document.repeated, *misfits]
    except PatternError:
        pass  # of the right form, and so for `find_faults` to judge
    return document.repeated


def bundled_or_file(source: str | Path, folder: Path, kind: str) -> Path:
    """The YAML file that is meant by a path (it ends in .yaml or .yml) or by a name, which is looked for in `folder`.

    Raises `ConfigError` with the nearest name.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return Path(source)
    path = folder / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(unknown_name(kind, str(source), [each.stem for each in folder.glob("*.yaml")]))
    return path


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
