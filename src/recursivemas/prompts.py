"""PromptSet: the words of a system, apart from its graph. Templates become segments of text and slots.

    name: my-team
    system: You work in a team of agents.        # optional
    roles:
      planner:
        first: "{question}\nPlan:"                # in round 1
        later: "{question}\nLast attempt: {latents:solver}\nBetter plan:"
      critic:
        always: "{question}\nPlan: {latents:planner}\nBetter plan:"
      solver:
        always: "{question}\nPlan: {latents:critic}\nThink."
        last: "{question}\nPlan: {latents:critic}\n{instructions}\nAnswer:"    # in the last round
        solo: "{question}\n{instructions}\nAnswer:"                            # alone, without the others
    variants:                                     # optional: words to fill in; the first variant is the default
      short: {style: Be brief.}

`{question}`, `{instructions}` (from the task) and `{tools}` (which there are, see tools/) are filled in;
`{latents:ROLE}` is a slot, where the message of ROLE goes, be it latents or text. Of the templates that fit a turn the
most particular one is taken: solo, last, first, later, always. A template goes through the chat template of the model
that reads it; what comes out is cut at the slots, and every piece of text is tokenised on its own, so that a prompt has
the same tokens whatever fills its slots.

Knows nothing of graphs, models or tensors; the chat template comes as a function.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from recursivemas.config import Config, Fault, bundled_or_file, parse, parse_document, read_document, some_of
from recursivemas.errors import ConfigError, PatternError, unknown_name

BUNDLED = Path(__file__).parent / "bundled" / "prompts"

_FIELD = re.compile(r"\{([a-zA-Z_]\w*)(?::(\w+))?\}")
_OURS = {"question", "instructions", "latents", "tools"}
_NEARLY_A_FIELD = re.compile(r"\{\s*(?:question|instructions|latents|tools)\b[^{}]*\}")
"""What looks like a field; if it is none, because of a blank, say, the words would go to the model as they are."""


class Slot(NamedTuple):
    """The place in a prompt where the message of `role` goes."""

    role: str


Segments = tuple[str | Slot, ...]
"""A prompt as its model reads it: pieces of text and slots, in order."""

RenderChat = Callable[[list[dict[str, str]]], str]
"""A chat template: messages in, one string out that ends where the model's reply begins."""


class RolePrompts(Config):
    """The templates of one role."""

    first: str | None = None
    later: str | None = None
    last: str | None = None
    always: str | None = None
    solo: str | None = None


class PromptSet(Config):
    """Templates of every role, with an optional system prompt and variants (see the top of this file)."""

    name: str
    roles: dict[str, RolePrompts]
    system: str | None = None
    variants: dict[str, dict[str, str]] = Field(default_factory=dict)

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | PromptSet") -> "PromptSet":
        """A prompt set from a bundled name, a YAML file, or plain data. Raises `ConfigError` or `PatternError`."""
        if isinstance(source, PromptSet):
            return source
        if isinstance(source, dict):
            return parse(cls, source, where="prompt set")
        return parse_document(cls, read_document(bundled_or_file(source, BUNDLED, "prompt set")), find_faults)

    @model_validator(mode="after")
    def _check(self) -> "PromptSet":
        fatal = [fault.message for fault in find_faults(self.model_dump(exclude_none=True)) if fault.is_fatal]
        if fatal:
            raise PatternError(f"prompt set '{self.name}': {some_of(fatal)}")
        return self

    def renamed(self, names: Mapping[str, str]) -> "PromptSet":
        """The same words with other names for the roles and their slots. Raises `PatternError` if two become one."""

        def renamed_slot(match: re.Match[str]) -> str:
            field, slot = match.groups()
            return f"{{latents:{names.get(slot, slot)}}}" if field == "latents" else match.group()

        roles = {}
        for role, templates in self.roles.items():
            new = names.get(role, role)
            if new in roles:
                raise PatternError(f"prompt set '{self.name}': two roles would both be called '{new}'")
            words = templates.model_dump(exclude_none=True)
            roles[new] = {name: _FIELD.sub(renamed_slot, template) for name, template in words.items()}
        return PromptSet.load({**self.model_dump(), "roles": roles})

    def variant(self, name: str | None) -> dict[str, str]:
        """The words of a variant; of the first one by default. Raises `ConfigError` for an unknown name."""
        if name is None:
            return next(iter(self.variants.values()), {})
        if name not in self.variants:
            raise ConfigError(unknown_name("prompt variant", name, self.variants))
        return self.variants[name]

    def template(self, role: str, *, round: int = 1, is_last: bool = False, solo: bool = False) -> str:
        """The template of a turn. Raises `PatternError` if the role has none that fits."""
        if role not in self.roles:
            raise PatternError(f"prompt set '{self.name}': " + unknown_name("role", role, self.roles))
        templates = self.roles[role]
        of_round = templates.first if round == 1 else templates.later
        fitting = [templates.solo] if solo else [templates.last if is_last else None, of_round, templates.always]
        for template in fitting:
            if template is not None:
                return template
        wanted, missing = ("solo", "solo") if solo else (f"round {round}", "always")
        raise PatternError(f"prompt set '{self.name}' has no template for the {role} ({wanted}); add `{missing}` to it")

    def slots(self, role: str) -> set[str]:
        """Roles whose messages some template of this role has a slot for (not counting `solo`)."""
        if role not in self.roles:
            raise PatternError(f"prompt set '{self.name}': " + unknown_name("role", role, self.roles))
        templates = self.roles[role].model_dump(exclude_none=True, exclude={"solo"}).values()
        return {slot for template in templates for field, slot in _FIELD.findall(template) if field == "latents"}

    def tells_of_tools(self, role: str) -> bool:
        """Whether some template of a role says which tools there are (`{tools}`)."""
        return any("{tools}" in text for _, _, text in templates_of({"roles": {role: self.roles[role].model_dump()}}))

    def alone(self, role: str) -> "PromptSet":
        """What a role reads without the others: its `solo` template, always."""
        template = self.template(role, solo=True)
        alone = RolePrompts(always=template, solo=template)
        return self.model_copy(update={"name": f"{self.name} (solo)", "roles": {role: alone}})

    def segments(
        self,
        role: str,
        question: str,
        *,
        render_chat: RenderChat,
        round: int = 1,
        is_last: bool = False,
        solo: bool = False,
        variant: str | None = None,
        instructions: str = "",
        tools: str = "",
    ) -> Segments:
        """The prompt of one turn for one question, through the chat template, cut at its slots."""
        words = {"question": question, "instructions": instructions, "tools": tools, **self.variant(variant)}
        template = self.template(role, round=round, is_last=is_last, solo=solo)
        marker = _unused_marker(question + instructions + tools + template)
        slots: list[Slot] = []

        def fill(match: re.Match[str]) -> str:
            field, slot = match.groups()
            if field != "latents":
                return words[field]
            slots.append(Slot(slot))
            return marker

        messages = [{"role": "user", "content": _FIELD.sub(fill, template)}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        pieces = render_chat(messages).split(marker)
        if len(pieces) != len(slots) + 1:
            raise PatternError(f"the chat template of the {role} dropped or repeated a slot of its prompt")
        segments: list[str | Slot] = [pieces[0]]
        for slot, piece in zip(slots, pieces[1:], strict=True):
            segments += [slot, piece]
        return tuple(segment for segment in segments if segment != "")


def _unused_marker(text: str) -> str:
    """A string that stands for a slot while the chat template is applied, and that does not occur in `text`."""
    number = 0
    while (marker := f"\u2039slot {number}\u203a") in text:
        number += 1
    return marker


def slots_of(template: str) -> dict[str, int]:
    """Roles that a template has a slot for, each with the line of the template in which its first slot is."""
    slots: dict[str, int] = {}
    for match in _FIELD.finditer(template):
        if match[1] == "latents" and match[2]:
            slots.setdefault(match[2], template.count("\n", 0, match.start()))
    return slots


def templates_of(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Role, name and text of every template in a prompt set's plain data that has the right form."""
    roles = content.get("roles")
    for role, templates in roles.items() if isinstance(roles, Mapping) else ():
        for name, template in templates.items() if isinstance(templates, Mapping) else ():
            if isinstance(template, str) and name in RolePrompts.model_fields:
                yield str(role), name, template


def find_faults(content: Mapping[str, Any]) -> list[Fault]:
    """All that is wrong with the words in a prompt set's plain data, as far as it has the right form."""
    given = content.get("variants")
    variants = (
        {name: each for name, each in given.items() if isinstance(each, Mapping)} if isinstance(given, Mapping) else {}
    )
    words = {str(word) for variant in variants.values() for word in variant} - _OURS
    faults = []
    for name, variant in variants.items():
        place = ("variants", str(name))
        for word in sorted(words - variant.keys()):
            faults.append(Fault(place, f"the variant '{name}' lacks the word '{word}'; the others have it"))
        for word in sorted(_OURS & variant.keys()):
            faults.append(Fault((*place, word), f"a variant may not redefine '{word}'; give its word another name"))
    for role, name, template in templates_of(content):
        for line, complaint in _wrong_fields(template, words):
            faults.append(Fault(("roles", role, name), f"{role}.{name}: {complaint}", lines_below=line))
    return faults


def _wrong_fields(template: str, words: set[str]) -> Iterator[tuple[int, str]]:
    """What stands in braces and is neither a word, nor a slot, nor plain text; with the line of the template."""
    for match in re.finditer(rf"{_FIELD.pattern}|{_NEARLY_A_FIELD.pattern}", template):
        field, slot = match[1], match[2]
        line = template.count("\n", 0, match.start())
        if field is None:
            yield (
                line,
                f"'{match[0]}' is not a slot; write {{latents:ROLE}}, {{question}} or {{instructions}}, without blanks",
            )
        elif slot and field != "latents":
            yield line, f"'{{{field}:{slot}}}' is not a slot; write {{latents:{slot}}}"
        elif not slot and field not in {"question", "instructions", "tools", *words}:
            known = ["question", "instructions", "tools", "latents:ROLE", *words]
            yield line, unknown_name("placeholder", field, known)
