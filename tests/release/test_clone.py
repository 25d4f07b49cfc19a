"""Words out of a clone of the authors' code: the same as its builders return, as templates of ours."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tests.release.clones import write_clone

from recursivemas.errors import CheckpointError, InputError
from recursivemas.prompts import PromptSet
from recursivemas.release import clone as clone_module
from recursivemas.release.clone import find_module, prompts_of_clone
from recursivemas.release.layout import LAYOUTS

OPEN = "How far is it to {here}?"
CHOICE = "Which is it?\nA. This\nB. That\nC. Both\nD. None"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, imported here: what its builders return is what is expected."""
    place = write_clone(tmp_path / "clone")
    monkeypatch.syspath_prepend(str(place))
    spec = importlib.util.spec_from_file_location("stand_in", place / "prompts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("inference_utils")]:
        del sys.modules[name]


def words_of(place: Path, layout: str, task: str = "math") -> PromptSet:
    return prompts_of_clone(find_module(place), layout, LAYOUTS[layout].roles, task)


def spoken(prompts: PromptSet, role: str, round: int, question: str, variant: str | None) -> str:
    """A prompt with the names of roles in its slots."""
    segments = prompts.segments(
        role, question, render_chat=lambda messages: messages[-1]["content"], round=round, variant=variant
    )
    return "".join(each if isinstance(each, str) else f"[{each.role}]" for each in segments)


def test_every_text_is_the_one_that_the_builders_return(theirs: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "clone"
    question = {"open": OPEN, "choice": CHOICE}
    sequential = words_of(place, "sequential")
    mixture = words_of(place, "mixture")
    for kind in question:
        asked = question[kind]
        task = "choice" if kind == "choice" else "math"
        expected = {
            ("planner", 1): theirs.build_math_planner_prompt(asked),
            ("planner", 2): theirs.build_math_planner_prompt_with_feedback_slot(asked).replace("<<F>>", "[solver]"),
            ("critic", 1): theirs.build_math_refiner_prompt_with_slot(asked).replace("<<P>>", "[planner]"),
            ("solver", 3): theirs.build_math_solver_prompt_with_slots(asked).replace("<<R>>", "[critic]"),
        }
        for (role, round), text in expected.items():
            assert spoken(sequential, role, round, asked, kind) == text
        expert = theirs.build_hie_expert_prompt_with_feedback_slot(asked, "hie_code_expert", mas_task=task)
        assert spoken(mixture, "code", 2, asked, kind) == expert.replace("<<HF>>", "[summarizer]")
        summary = theirs.build_hie_summarizer_prompt_with_slots(asked, mas_task=task)
        for mark, role in (("<<M>>", "[math]"), ("<<C>>", "[code]"), ("<<S>>", "[science]")):
            summary = summary.replace(mark, role)
        assert spoken(mixture, "summarizer", 1, asked, kind) == summary
    assert list(sequential.variants) == ["open", "choice"]
    assert sequential.system == "You help."


def test_code_is_asked_for_as_a_function_or_a_program(theirs: ModuleType, tmp_path: Path) -> None:
    prompts = words_of(tmp_path / "clone", "sequential", "code")
    assert list(prompts.variants) == ["function", "program"]
    for variant, task_type in ((None, "function"), ("program", "complete")):
        expected = theirs.build_code_solver_prompt_with_slots(OPEN, task_type).replace("<<R>>", "[critic]")
        assert spoken(prompts, "solver", 1, OPEN, variant) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", ["math", "code"])
def test_every_pattern_has_its_builders(tmp_path: Path, layout: str, task: str) -> None:
    prompts = words_of(write_clone(tmp_path / "clone", below="inference"), layout, task)
    assert set(prompts.roles) == set(LAYOUTS[layout].roles.values())
    for key in LAYOUTS[layout].keys:
        source, target = LAYOUTS[layout].edge(key)
        assert source in prompts.slots(target)
    assert prompts.system == ("You have a python tool." if layout == "deliberation" else "You help.")


def test_roles_are_named_as_in_the_system(tmp_path: Path) -> None:
    own = {"1": "drafter", "2": "critic", "3": "writer"}
    prompts = prompts_of_clone(find_module(write_clone(tmp_path / "clone")), "sequential", own, "math")
    assert spoken(prompts, "drafter", 2, "Why?", None).count("[writer]") == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"def build_math_refiner_prompt_with_slot": "def renamed"}, CheckpointError, "no function build_math_refiner"),
        (
            {"PLANNER_SLOT, REFINED_SLOT": "X, REFINED_SLOT", "{PLANNER_SLOT}": "{X}"},
            CheckpointError,
            "no PLANNER_SLOT",
        ),
        (
            {"Refine {PLANNER_SLOT}": "Refine {PLANNER_SLOT} {PLANNER_SLOT}"},
            CheckpointError,
            "latents:planner} 2 times",
        ),
        ({"Feedback: {FEEDBACK_SLOT}": "Feedback:"}, CheckpointError, "latents:solver} 0 times"),
        ({"for\\n{question}": "for\\n{question.upper()}"}, CheckpointError, "question} 0 times"),
        ({'SYSTEM_PROMPT = "You help."': "raise RuntimeError('no GPU')"}, InputError, "failed: RuntimeError: no GPU"),
        ({'SYSTEM_PROMPT = "You help."': "import sys; sys.exit(3)"}, InputError, "failed"),
        ({'SYSTEM_PROMPT = "You help."': "import os; os._exit(0)"}, InputError, "ended without an answer"),
        ({'SYSTEM_PROMPT = "You help."': "while True: pass"}, InputError, "did not return within 1 seconds"),
        (
            {"solve\\n{question}": "{'x' if asks_for_a_letter(question) else REFINED_SLOT}\\n{question}"},
            CheckpointError,
            "times, expected once",
        ),
    ],
)
def test_a_clone_that_is_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    if "within" in message:
        monkeypatch.setattr(clone_module, "TIMEOUT", 1)
    with pytest.raises(error, match=message):
        words_of(write_clone(tmp_path / "clone", changes=changes), "sequential")


def test_slots_in_another_order_for_another_kind_of_question_are_refused(tmp_path: Path) -> None:
    swap = (
        "{'' if asks_for_a_letter(question) else REFINED_SLOT} solve\\n{question}"
        "{REFINED_SLOT if asks_for_a_letter(question) else ''}"
    )
    place = write_clone(tmp_path / "clone", changes={"{REFINED_SLOT} solve\\n{question}": swap})
    with pytest.raises(CheckpointError, match="slots in another order"):
        words_of(place, "sequential")


def test_a_directory_without_builders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds none of prompts\.py"):
        find_module(tmp_path)
