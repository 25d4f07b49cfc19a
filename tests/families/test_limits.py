"""Where a run must stop, or may not go on as it is: contexts that are too short, and numbers that are none."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from tests.families.reference import assert_same
from torch import Tensor

from recursivemas.agents import Agent, Message, PrefixStore, Reading
from recursivemas.answering import Result
from recursivemas.context import PromptSpace, fit_question
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, NumericsError
from recursivemas.models import LanguageModel
from recursivemas.planning import make_plan
from recursivemas.prompts import Segments, Slot
from recursivemas.system import RecursiveSystem

CONTEXT = 96
WORDS = {
    "name": "words",
    "roles": {
        "planner": {"first": "{question}", "later": "{question} {latents:solver}"},
        "critic": {"always": "{latents:planner} Check: {question}"},
        "solver": {"always": "{question} {latents:critic} Now:"},
    },
}
SHORT = "Why is it the river that the fox runs along?"
LONG = "The fox sits. " * 40 + SHORT


@pytest.fixture(scope="module")
def narrow_models() -> dict[str, LanguageModel]:
    """Three models, of which the critic has the shortest context."""
    sizes = {"planner": ("qwen3", 512), "critic": ("llama", CONTEXT), "solver": ("qwen2", 128)}
    return {
        role: make_model(family, seed, max_position_embeddings=size)
        for seed, (role, (family, size)) in enumerate(sizes.items())
    }


@pytest.fixture
def narrow(narrow_models: dict[str, LanguageModel]) -> RecursiveSystem:
    return RecursiveSystem.build(
        agents=narrow_models, prompts=WORDS, num_rounds=2, num_latent_steps=3, max_new_tokens=8
    )


# Questions longer than the context


def test_a_question_that_is_too_long_is_refused(narrow: RecursiveSystem) -> None:
    with pytest.raises(InputError, match=f"the prompt of the critic needs .* at most {CONTEXT}; shorten the question"):
        narrow.run(LONG)


def test_it_is_cut_on_its_left_where_that_was_asked_for(narrow: RecursiveSystem) -> None:
    result = narrow.run(LONG, on_long_question="truncate", trace="full")
    spaces = narrow._recursion.prompt_spaces(make_plan(narrow, {}))
    kept = fit_question(LONG, spaces)
    assert LONG.endswith(f" {kept}")
    assert kept.endswith(SHORT)
    encode = narrow.agents["solver"].model.encode
    assert result.cut_tokens == len(encode(LONG)) - len(encode(kept)) > 0
    assert result.trace.settings["cut_tokens"] == result.cut_tokens
    assert result.trace.question == LONG
    # What is left is read as if it had been asked; with a few words more, something would not fit.
    assert_same(result, narrow.run(kept, trace="full"))
    more = " ".join(LONG.split(" ")[-len(kept.split(" ")) - 4 :])
    assert not all(space.fits(more) for space in spaces)


@pytest.mark.parametrize("channel", ["latent", "text", "both"])
def test_a_cut_question_is_the_same_alone_and_in_a_batch(narrow: RecursiveSystem, channel: str) -> None:
    questions = [SHORT, LONG, "Name it. " * 30]
    options: dict[str, Any] = {"channel": channel, "on_long_question": "truncate", "trace": "full"}
    together = narrow.run(questions, **options)
    for question, result in zip(questions, together, strict=True):
        alone = narrow.run(question, **options)
        assert_same(result, alone)
        assert result.cut_tokens == alone.cut_tokens
    assert together[0].cut_tokens == 0
    assert "cut_tokens" not in together[0].trace.settings


def test_every_role_reads_the_same_and_no_slot_is_lost(
    narrow: RecursiveSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Segments]] = []
    read = Agent.read

    def watched(self: Agent, prompts: Sequence[Segments], inbox: Any, prefixes: PrefixStore | None = None) -> Reading:
        seen.extend((self.role, prompt) for prompt in prompts)
        return read(self, prompts, inbox, prefixes)

    monkeypatch.setattr(Agent, "read", watched)
    narrow.run(LONG, on_long_question="truncate")
    texts = ["".join(piece for piece in prompt if isinstance(piece, str)) for _, prompt in seen]
    kept = fit_question(LONG, narrow._recursion.prompt_spaces(make_plan(narrow, {})))
    assert all(text.count("fox") == kept.count("fox") and kept in text for text in texts)
    slots = [(role, [piece.role for piece in prompt if isinstance(piece, Slot)]) for role, prompt in seen]
    once = [("critic", ["planner"]), ("solver", ["critic"])]
    assert slots == [("planner", []), *once, ("planner", ["solver"]), *once]


def test_the_setting_of_a_system_holds_for_run_and_stream(narrow_models: dict[str, LanguageModel]) -> None:
    system = RecursiveSystem.build(
        agents=narrow_models,
        prompts=WORDS,
        num_rounds=1,
        num_latent_steps=2,
        max_new_tokens=4,
        on_long_question="truncate",
    )
    result = system.run(LONG)
    *_, streamed = system.stream(LONG)
    assert isinstance(streamed, Result)
    assert (streamed.text, streamed.cut_tokens) == (result.text, result.cut_tokens)
    with pytest.raises(InputError, match="at most 96"):
        system.run(LONG, on_long_question="refuse")


def test_an_unknown_way_with_long_questions_names_the_nearest(narrow: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="did you mean 'truncate'"):
        narrow.run(SHORT, on_long_question="trunkate")


def test_what_does_not_fit_without_its_question_is_refused(narrow: RecursiveSystem) -> None:
    with pytest.raises(InputError, match="the prompt of the critic, with its messages and what follows.* at most 96"):
        narrow.run(SHORT, on_long_question="truncate", num_latent_steps=60)


def test_words_are_not_cut_in_two_where_there_are_any(narrow_models: dict[str, LanguageModel]) -> None:
    def space(room: int) -> PromptSpace:
        model = narrow_models["critic"]
        return PromptSpace(
            "critic", model, lambda question: (question, Slot("planner")), {"planner": 5}, CONTEXT - 5 - room
        )

    sizes = narrow_models["critic"].encode
    text = "several rather longish words altogether"
    kept = fit_question(text, [space(len(sizes("longish words altogether")) + 2)])
    assert kept == "longish words altogether"
    unbroken = "x" * 50
    assert fit_question(unbroken, [space(7)]) == "x" * max(n for n in range(50) if len(sizes("x" * n)) <= 7)


# Numbers that are none


def spoil(edge: str, round: int, step: int) -> Callable[[Message, str, int], Message]:
    def intervene(message: Message, on: str, at: int) -> Message:
        if (on, at) == (edge, round) and message.latents is not None:
            message.latents[-1, step] = float("nan")
        return message

    return intervene


def test_latents_that_are_not_finite_stop_the_run_by_role_round_and_step(system: RecursiveSystem) -> None:
    expected = (
        "critic->solver of round 2 is not finite for 1 of 3 questions; the first is 'And then.*', at latent step 3"
    )
    with pytest.raises(NumericsError, match=expected):
        system.run(["Why?", "Who?", "And then?"], num_rounds=2, intervene=spoil("critic->solver", 2, 2))


def test_states_that_are_not_finite_stop_the_run_by_role_and_round(
    system: RecursiveSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when half precision overflows in the agent that answers: no message is wrong, and the text would be garbage.
    solver, step = system.agents["solver"].model, LanguageModel.step

    def overflow(self: LanguageModel, *args: Any) -> Tensor:
        states = step(self, *args)
        return states * torch.inf if self is solver else states

    monkeypatch.setattr(LanguageModel, "step", overflow)
    with pytest.raises(NumericsError, match="what the solver has read in round 1 is not finite for 2 of 2 questions"):
        system.run(["Why?", "Who?"], num_rounds=1, sampling=SamplingParams(max_new_tokens=2))
