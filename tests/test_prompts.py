"""PromptSet: templates, slots and words, through chat templates of any kind."""

from pathlib import Path
from typing import Any

import pytest

from recursivemas.errors import ConfigError, PatternError
from recursivemas.prompts import BUNDLED, PromptSet, Slot

SET = {
    "name": "team",
    "roles": {
        "planner": {"first": "{question} Plan.", "later": "{question} Seen: {latents:solver} Plan again."},
        "critic": {"always": "{latents:planner}{latents:solver} of {question}"},
        "solver": {
            "always": "{question} {latents:critic} Think.",
            "last": "{latents:critic} {instructions}",
            "solo": "{question}!",
        },
    },
}


def plain(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}</>" for message in messages) + "<assistant>"


def load(**changes: Any) -> PromptSet:
    return PromptSet.load({**SET, **changes})


@pytest.mark.parametrize(
    ("role", "turn", "start"),
    [
        ("planner", {"round": 1}, "{question} Plan."),
        ("planner", {"round": 2}, "{question} Seen:"),
        ("planner", {"round": 1, "is_last": True}, "{question} Plan."),
        ("critic", {"round": 3}, "{latents:planner}"),
        ("solver", {"round": 1}, "{question} {latents:critic} Think."),
        ("solver", {"round": 1, "is_last": True}, "{latents:critic} {instr"),
        ("solver", {"solo": True}, "{question}!"),
    ],
)
def test_the_most_particular_template_is_taken(role: str, turn: dict[str, Any], start: str) -> None:
    assert load().template(role, **turn).startswith(start)


def test_first_and_later_go_before_always() -> None:
    roles = {"a": {"first": "1 {question}", "later": "2 {question}", "always": "0 {question}"}}
    prompts = PromptSet.load({"name": "x", "roles": roles})
    assert [prompts.template("a", round=round)[0] for round in (1, 2, 3)] == ["1", "2", "2"]


def test_a_role_without_a_fitting_template_is_refused() -> None:
    with pytest.raises(PatternError, match=r"no template for the critic \(solo\)"):
        load().template("critic", solo=True)
    with pytest.raises(PatternError, match="unknown role 'critik': did you mean 'critic'"):
        load().template("critik")
    only_later = PromptSet.load({"name": "x", "roles": {"a": {"later": "{question}"}}})
    with pytest.raises(PatternError, match=r"no template for the a \(round 1\)"):
        only_later.template("a")


def test_a_prompt_is_cut_at_its_slots() -> None:
    segments = load().segments("planner", "Why?", render_chat=plain, round=2)
    assert segments == ("<user>Why? Seen: ", Slot("solver"), " Plan again.</><assistant>")
    assert load().segments("planner", "Why?", render_chat=plain) == ("<user>Why? Plan.</><assistant>",)


def test_slots_may_stand_side_by_side() -> None:
    segments = load().segments("critic", "Why?", render_chat=lambda messages: messages[0]["content"])
    assert segments == (Slot("planner"), Slot("solver"), " of Why?")


def test_a_question_is_never_read_as_a_template() -> None:
    question = "{question} {latents:planner} {instructions} {{x}} \u2039slot 0\u203a \\1 {"
    segments = load().segments("solver", question, render_chat=plain)
    assert segments == (f"<user>{question} ", Slot("critic"), " Think.</><assistant>")


def test_a_system_prompt_comes_first() -> None:
    segments = load(system="Be brief.").segments("planner", "Why?", render_chat=plain)
    assert segments == ("<system>Be brief.</><user>Why? Plan.</><assistant>",)


def test_instructions_are_filled_in() -> None:
    segments = load().segments("solver", "Why?", render_chat=plain, is_last=True, instructions="A letter.")
    assert segments == ("<user>", Slot("critic"), " A letter.</><assistant>")


def test_the_first_variant_is_the_default() -> None:
    variants = {"short": {"style": "Brief."}, "long": {"style": "At length."}}
    prompts = PromptSet.load({"name": "x", "roles": {"a": {"always": "{question} {style}"}}, "variants": variants})
    texts = [prompts.segments("a", "Why?", render_chat=plain, variant=name)[0] for name in (None, "short", "long")]
    assert texts == ["<user>Why? Brief.</><assistant>"] * 2 + ["<user>Why? At length.</><assistant>"]
    with pytest.raises(ConfigError, match="unknown prompt variant 'shrt': did you mean 'short'"):
        prompts.variant("shrt")


def test_a_chat_template_that_loses_or_repeats_a_slot_is_refused() -> None:
    for render in (lambda messages: "nothing", lambda messages: messages[0]["content"] * 2):
        with pytest.raises(PatternError, match="dropped or repeated a slot"):
            load().segments("solver", "Why?", render_chat=render)


def test_slots_of_a_role_are_those_of_all_its_templates_but_solo() -> None:
    assert load().slots("planner") == {"solver"}
    assert load().slots("critic") == {"planner", "solver"}


def test_alone_a_role_always_reads_its_solo_template() -> None:
    alone = load().alone("solver")
    assert list(alone.roles) == ["solver"]
    assert alone.segments("solver", "Why?", render_chat=plain, is_last=True) == ("<user>Why?!</><assistant>",)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"roles": {"a": {"always": "{questoin}"}}}, PatternError, r"a\.always: unknown placeholder 'questoin': did"),
        ({"roles": {"a": {"always": "{latent:b}"}}}, PatternError, r"write \{latents:b\}"),
        ({"roles": {"a": {"alway": "{question}"}}}, ConfigError, r"did you mean 'roles\.a\.always'"),
        ({"roles": {"a": {"always": 5}}}, ConfigError, "roles.a.always"),
        # What looks like a slot and is none would go to the model as it stands.
        ({"roles": {"a": {"always": "{latents: b}"}}}, PatternError, r"'\{latents: b\}' is not a slot"),
        ({"roles": {"a": {"always": "{ question }"}}}, PatternError, r"'\{ question \}' is not a slot"),
        ({"roles": {"a": {"always": "{latents}"}}}, PatternError, "unknown placeholder 'latents'"),
        ({"variants": {"x": {"w": "1"}, "y": {}}}, PatternError, "variant 'y' lacks the word 'w'"),
        ({"variants": {"x": {"question": "1"}}}, PatternError, "may not redefine 'question'"),
        ({"colour": "red"}, ConfigError, "unknown setting 'colour'"),
        ({"name": None}, ConfigError, "name"),
    ],
)
def test_a_prompt_set_that_does_not_hold_together_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(**change)


def test_braces_that_look_like_nothing_of_ours_are_plain_text() -> None:
    prompts = PromptSet.load({"name": "x", "roles": {"a": {"always": r"\boxed{} {} { x } {'k': 1} {question}"}}})
    assert prompts.segments("a", "Why?", render_chat=plain) == (r"<user>\boxed{} {} { x } {'k': 1} Why?</><assistant>",)


def test_renaming_roles_renames_their_slots() -> None:
    renamed = load().renamed({"planner": "doctor", "solver": "nurse"})
    assert list(renamed.roles) == ["doctor", "critic", "nurse"]
    assert renamed.slots("critic") == {"doctor", "nurse"}
    assert renamed.template("doctor", round=2) == "{question} Seen: {latents:nurse} Plan again."
    assert renamed.template("nurse", solo=True) == "{question}!"
    # Two may change places, and names that are not there are left alone.
    swapped = load().renamed({"planner": "solver", "solver": "planner", "nobody": "x"})
    assert swapped.template("solver", round=2) == "{question} Seen: {latents:planner} Plan again."
    with pytest.raises(PatternError, match="two roles would both be called 'critic'"):
        load().renamed({"planner": "critic"})


def test_a_file_is_refused_with_the_lines_of_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nroles:\n  a:\n    first: |-\n      one\n      {questoin}\n    later: '{latent:b}'\n")
    with pytest.raises(PatternError, match=rf"^{file}:6: a\.first: unknown placeholder.*; {file}:7: a\.later: "):
        PromptSet.load(file)


def test_bundled_sets_are_loaded_by_name() -> None:
    names = [file.stem for file in BUNDLED.glob("*.yaml")]
    assert {"sequential", "mixture", "distillation", "deliberation", "self-recursion"} <= set(names)
    assert [PromptSet.load(name).name for name in names] == names
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        PromptSet.load("sequentail")


def test_a_file_of_ones_own_is_loaded_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nroles:\n  a: {always: '{question}'}\n")
    assert PromptSet.load(file).name == PromptSet.load(str(file)).name == "mine"
    with pytest.raises(ConfigError, match="no file"):
        PromptSet.load(tmp_path / "yours.yaml")
