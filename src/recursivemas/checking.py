"""Everything that is wrong with a pattern file and with the prompts that go with it, at once, line by line.

What one file shows by itself is found where it is known: the form of any file in config.py, the graph in patterns.py,
the words in prompts.py. Here it is put together with what only the two files show side by side: a slot without an
edge, an edge without a slot, a message that arrives where a template has no place for it.

Knows files; knows nothing of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recursivemas import patterns, prompts
from recursivemas.config import Document, Fault, FindFaults, bundled_or_file, form_faults, read_document
from recursivemas.errors import ConfigError, unknown_name
from recursivemas.patterns import Pattern, Table
from recursivemas.prompts import PromptSet, slots_of, templates_of


@dataclass(frozen=True, order=True)
class Finding:
    """One fault of one file. A file that cannot be read at all has its only one in line 0."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else self.message


def check(pattern: str | Path, prompt_set: str | Path | None = None) -> list[Finding]:
    """All faults of a pattern, and of a prompt set if one is given, alone and together; files or bundled names.

    They come file by file, in the order of lines. Raises `ConfigError` only for a bundled name that is not known.
    """
    table_file = bundled_or_file(pattern, patterns.BUNDLED, "pattern")
    findings, graph = _check_file(table_file, Pattern, patterns.find_faults)
    if prompt_set is not None:
        words_file = bundled_or_file(prompt_set, prompts.BUNDLED, "prompt set")
        found, words = _check_file(words_file, PromptSet, prompts.find_faults)
        if graph is not None and words is not None:
            together = fit_faults(graph.content, words.content)
            found = sorted([*found, *(_found(words, fault) for fault in together)])
        findings += found
    return findings


def _check_file(file: Path, model: type[BaseModel], find_faults: FindFaults) -> tuple[list[Finding], Document | None]:
    try:
        document = read_document(file)
    except ConfigError as error:
        return [Finding(str(file), 0, str(error))], None
    faults = [*form_faults(model, document), *find_faults(document.content)]
    return sorted({_found(document, fault) for fault in faults}), document


def _found(document: Document, fault: Fault) -> Finding:
    return Finding(str(document.path), document.line(fault.place, fault.lines_below), fault.message)


def fit_faults(pattern: Mapping[str, Any], prompt_set: Mapping[str, Any]) -> list[Fault]:
    """Where the plain data of a prompt set does not fit that of a pattern. Places are those in the prompt set."""
    table = Table.read(pattern)
    templates: dict[str, dict[str, str]] = {}
    for role, name, template in templates_of(prompt_set):
        templates.setdefault(role, {})[name] = template
    given = prompt_set.get("roles")
    faults = []
    for role in given if isinstance(given, Mapping) else ():
        if role not in table.places:
            faults.append(Fault(("roles", role), unknown_name("role", role, table.places)))
    for role in table.places:
        faults += _role_faults(role, templates.get(role, {}), table)
    return faults


def _role_faults(role: str, templates: Mapping[str, str], table: Table) -> list[Fault]:
    """What does not fit in the templates of one role."""
    place = ("roles", role)
    if not templates:
        return [Fault(place, f"the role '{role}' has no templates; write `always`, or `first` and `later`")]
    sources = {edge.source for edge in table.sources(role)}
    this_round = {edge.source for edge in table.sources(role) if table.stage_of(edge.source) < table.stage_of(role)}
    faults = []
    for name, template in templates.items():
        for slot, line in slots_of(template).items():
            if name == "solo":
                wrong = f"{role}.solo: alone nobody sends anything; take out the slot {{latents:{slot}}}"
                faults.append(Fault((*place, name), wrong, lines_below=line))
            elif slot not in sources:
                wrong = f"{role}.{name}: {unknown_name('slot', slot, sources)}; the pattern has no edge {slot}->{role}"
                faults.append(Fault((*place, name), wrong, lines_below=line))
    # In the first round only messages of this round have come; in the last, and in those between, all of them.
    kinds = {
        "first": (("first", "always"), this_round),
        "later": (("later", "always"), sources),
        "last": (("last", "later", "always"), sources),
    }
    wanting: set[tuple[str, str]] = set()
    for kind, (names, arriving) in kinds.items():
        fitting = [name for name in names if name in templates]
        if fitting:
            wanting |= {(fitting[0], source) for source in arriving if source not in slots_of(templates[fitting[0]])}
        elif kind != "last":
            wrong = f"no template of the role '{role}' fits {'round 1' if kind == 'first' else 'later rounds'}"
            faults.append(Fault(place, f"{wrong}; write `{kind}` or `always`"))
    for name, source in sorted(wanting):
        wrong = f"{role}.{name}: there is no slot {{latents:{source}}}, so what '{source}' sends would be lost"
        faults.append(Fault((*place, name), f"{wrong}; add the slot, or take the edge {source}->{role} out", False))
    return faults
