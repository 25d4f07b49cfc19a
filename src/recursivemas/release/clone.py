"""The authors' words, out of a user's own clone of their code: its prompt builders are called, and their texts cut.

The builders are called with a question that nobody asks, in a process of its own; where that question and the slots
stand in what they return, `{question}` and `{latents:ROLE}` are put. What they word differently for several kinds of
question (a number, a choice of letters; a function, a program) becomes variants of the prompt set.

This runs code of others with the rights of the user: whoever calls `prompts_of_clone` has asked first.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recursivemas.errors import CheckpointError, InputError
from recursivemas.prompts import PromptSet
from recursivemas.release import ask_clone
from recursivemas.release.layout import LAYOUTS

MODULES = ("prompts.py", "inference/prompts.py", "train/mas_prompt.py")
"""Where the builders may be in a clone."""
TIMEOUT = 120
"""Seconds that importing and calling them may take; it imports little."""

_QUESTION = "Which of these is the unasked question 5f2c81?"
_CHOICES = "\nA. one\nB. two\nC. three\nD. four"
_FIELD = re.compile(r"(\{[a-zA-Z_]\w*(?::\w+)?\})")
"""What a prompt set would take for a field of its own."""


class Builder(NamedTuple):
    """The function behind one template, and whose message stands in each of its slots."""

    letter: str
    template: str
    function: str
    slots: dict[str, str]
    """Letters, by the name of the constant that marks the slot."""
    role: str | None = None
    """What the function calls the role, if it serves several."""


class Kind(NamedTuple):
    """One kind of question: how the builders are told of it."""

    name: str
    question: str
    arguments: dict[str, Any]


def _expert(letter: str, role: str) -> list[Builder]:
    build = "build_hie_expert_prompt"
    return [
        Builder(letter, "first", build, {}, role),
        Builder(letter, "later", f"{build}_with_feedback_slot", {"HIE_FEEDBACK_SLOT": "s"}, role),
    ]


_BUILDERS = {
    "sequential": [
        Builder("1", "first", "build_{task}_planner_prompt", {}),
        Builder("1", "later", "build_{task}_planner_prompt_with_feedback_slot", {"FEEDBACK_SLOT": "3"}),
        Builder("2", "always", "build_{task}_refiner_prompt_with_slot", {"PLANNER_SLOT": "1"}),
        Builder("3", "always", "build_{task}_solver_prompt_with_slots", {"REFINED_SLOT": "2"}),
    ],
    "mixture": [
        *_expert("1", "hie_math_expert"),
        *_expert("2", "hie_code_expert"),
        *_expert("3", "hie_science_expert"),
        Builder(
            "s",
            "always",
            "build_hie_summarizer_prompt_with_slots",
            {"HIE_MATH_EXPERT_SLOT": "1", "HIE_CODE_EXPERT_SLOT": "2", "HIE_SCIENCE_EXPERT_SLOT": "3"},
        ),
    ],
    "distillation": [
        Builder("e", "first", "build_distill_expert_prompt", {}),
        Builder("e", "later", "build_distill_expert_prompt_with_feedback_slot", {"DISTILL_FEEDBACK_SLOT": "l"}),
        Builder("l", "always", "build_distill_learner_prompt_with_slot", {"DISTILL_EXPERT_SLOT": "e"}),
    ],
    "deliberation": [
        Builder("r", "first", "build_deliberation_reflector_prompt", {}),
        Builder(
            "r", "later", "build_deliberation_reflector_prompt_with_feedback_slot", {"DELIBERATION_FEEDBACK_SLOT": "t"}
        ),
        Builder("t", "always", "build_deliberation_toolcaller_prompt_with_slot", {"DELIBERATION_REFLECTOR_SLOT": "r"}),
    ],
}


def _kinds(task: str) -> list[Kind]:
    """The kinds of question of a task; the first is the variant that is taken unless another is asked for."""
    if task == "code":
        return [
            Kind("function", _QUESTION, {"task_type": "function", "mas_task": task}),
            Kind("program", _QUESTION, {"task_type": "complete", "mas_task": task}),
        ]
    return [
        Kind("open", _QUESTION, {"task_type": "complete", "mas_task": task}),
        Kind("choice", _QUESTION + _CHOICES, {"task_type": "complete", "mas_task": "choice"}),
    ]


def find_module(clone: Path) -> Path:
    """The file of prompt builders in a clone. Raises `InputError`."""
    for name in MODULES:
        if (clone / name).is_file():
            return (clone / name).resolve()
    raise InputError(f"{clone} does not look like a clone of the authors' code: it holds none of {', '.join(MODULES)}")


def prompts_of_clone(module: Path, layout: str, own: Mapping[str, str], task: str) -> PromptSet:
    """The prompt set that the builders in `module` give for a layout, with the roles named as in `own`, by letter.

    Executes that file and what it imports. Raises `InputError` if it fails, `CheckpointError` if its texts cannot be
    made into templates.
    """
    builders = _BUILDERS[layout]
    kinds = _kinds(task)
    calls = [_call(builder, kind, task) for builder in builders for kind in kinds]
    about_system = {"mas_design": LAYOUTS[layout].shape}
    constants = sorted({name for builder in builders for name in builder.slots} | {"SYSTEM_PROMPT"})
    said = _ask(module, constants, [*calls, {"function": "get_system_prompt", "arguments": about_system}])
    texts = [each.get("text") for each in said["returned"]]
    system = texts.pop() or said["constants"]["SYSTEM_PROMPT"]

    roles: dict[str, dict[str, str]] = {own[letter]: {} for letter in LAYOUTS[layout].roles}
    words: dict[str, dict[str, str]] = {kind.name: {} for kind in kinds}
    for number, builder in enumerate(builders):
        function = builder.function.format(task=task)
        rendered = texts[number * len(kinds) : (number + 1) * len(kinds)]
        pieces = [
            _cut(function, text, kind.question, builder, own, said["constants"])
            for text, kind in zip(rendered, kinds, strict=True)
        ]
        name = f"{own[builder.letter]}_{builder.template}"
        roles[own[builder.letter]][builder.template] = _template(name, pieces, words, function)
    variants = {name: given for name, given in words.items() if given}
    return PromptSet.load({"name": f"{layout}-release-{task}", "system": system, "roles": roles, "variants": variants})


def _call(builder: Builder, kind: Kind, task: str) -> dict[str, Any]:
    role = {} if builder.role is None else {"hie_role": builder.role}
    arguments = {"question": kind.question, **kind.arguments, **role}
    return {"function": builder.function.format(task=task), "arguments": arguments}


def _ask(module: Path, constants: Sequence[str], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Run ask_clone.py in a process of its own and read what it wrote down."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        asked = {"module": str(module), "answer": str(answer), "constants": list(constants), "calls": list(calls)}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", str(ask_clone.__file__)],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
                cwd=module.parent,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                check=False,
            )
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise InputError(f"the prompt builders in {module} failed: {last[:200]}")
            content = json.loads(answer.read_text(encoding="utf-8"))
        except subprocess.TimeoutExpired:
            raise InputError(f"the prompt builders in {module} did not return within {TIMEOUT} seconds") from None
        except (OSError, ValueError) as error:
            raise InputError(f"the prompt builders in {module} ended without an answer ({error})") from None
    return dict(content)


def _cut(
    function: str,
    text: str | None,
    question: str,
    builder: Builder,
    own: Mapping[str, str],
    constants: Mapping[str, Any],
) -> list[str]:
    """A text as pieces that take turns: words, a field of ours, words, ..., words (which may be empty)."""
    if text is None:
        raise CheckpointError(f"the clone has no function {function}; is it the authors' code, and of this pattern?")
    fields = {question: "{question}"}
    for constant, letter in builder.slots.items():
        mark = constants.get(constant)
        if not isinstance(mark, str) or not mark:
            raise CheckpointError(f"the clone has no {constant}, which marks a slot in the text of {function}")
        fields[mark] = f"{{latents:{own[letter]}}}"
    for mark, field in fields.items():
        if text.count(mark) != 1:
            raise CheckpointError(
                f"the text that {function} returns has the place of {field} {text.count(mark)} times, expected once"
            )
    pieces = re.split("(" + "|".join(map(re.escape, fields)) + ")", text)
    return [fields[piece] if number % 2 else piece for number, piece in enumerate(pieces)]


def _template(name: str, texts: Sequence[list[str]], words: dict[str, dict[str, str]], function: str) -> str:
    """One template for all kinds of question; where words differ it has a field, and `words` gets them by kind."""
    if len({tuple(pieces[1::2]) for pieces in texts}) != 1:
        raise CheckpointError(f"the texts of {function} have their slots in another order for another kind of question")
    template = ""
    for number, pieces in enumerate(zip(*texts, strict=True)):
        if number % 2:
            template += pieces[0]
        elif len(set(pieces)) == 1:
            template += _literal(f"{name}_{number}", pieces[0], words)
        else:
            template += f"{{{name}_{number}}}"
            for variant, piece in zip(words.values(), pieces, strict=True):
                variant[f"{name}_{number}"] = piece
    return template


def _literal(name: str, text: str, words: dict[str, dict[str, str]]) -> str:
    """Words of a template; what would be taken for a field in them, like the braces of a boxed letter, becomes one."""
    parts = _FIELD.split(text)
    for number in range(1, len(parts), 2):
        word = f"{name}_{number}"
        for variant in words.values():
            variant[word] = parts[number]
        parts[number] = f"{{{word}}}"
    return "".join(parts)
