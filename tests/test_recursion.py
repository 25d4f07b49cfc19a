"""The one loop: roles that stand side by side and share a model are one batch, and nobody can tell from what comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from tests.families.table import load_family
from torch import Tensor

from recursivemas import recursion
from recursivemas.agents import Agent
from recursivemas.answering import Result
from recursivemas.chorus import Chorus
from recursivemas.decoding import SamplingParams
from recursivemas.errors import InputError
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

TOLERANCE = 1e-4
SPECIALISTS = ("math", "code", "science")
# Prompts of unequal length; in long prompts of random models a message is hardly heard, here it is. No two begin alike:
# what begins alike is read once by a model that is shared, and twice by two copies of it.
FEW_WORDS = {
    "name": "few-words",
    "roles": {
        "math": {"first": "Sum: {question}", "later": "Sum it: {question} {latents:summarizer}"},
        "code": {"always": "{question} {latents:summarizer} Write a program for it."},
        "science": {"first": "{question}", "later": "{latents:summarizer} {question}"},
        "summarizer": {"always": "{question} {latents:math}{latents:code} {latents:science}"},
    },
}
Build = Callable[..., RecursiveSystem]


@pytest.fixture(scope="module")
def copies() -> list[LanguageModel]:
    """Three models with the same weights, and one of another family."""
    return [make_model("qwen3", 3) for _ in SPECIALISTS] + [make_model("llama", 4)]


@pytest.fixture
def together(copies: list[LanguageModel]) -> RecursiveSystem:
    """Three specialists on one model."""
    return mixture([copies[0]] * 3, copies[3])


@pytest.fixture
def apart(copies: list[LanguageModel]) -> RecursiveSystem:
    """The same specialists, each on a copy of it: they are played one after the other."""
    return mixture(copies[:3], copies[3])


def mixture(specialists: list[LanguageModel], summarizer: LanguageModel, **options: Any) -> RecursiveSystem:
    agents = {**dict(zip(SPECIALISTS, specialists, strict=True)), "summarizer": summarizer}
    settings: dict[str, Any] = {"num_rounds": 2, "num_latent_steps": 3, "max_new_tokens": 8, "prompts": FEW_WORDS}
    system = RecursiveSystem.build(pattern="mixture", agents=agents, **{**settings, **options})
    return system.with_random_links(5)  # far from the identity, so that one inner link cannot pass for another


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same(found: Result, expected: Result) -> None:
    """Same messages in the same order, same text, same counts of every role in every round."""
    kinds = [[(m.round, m.source, m.target, m.text) for m in each.trace.messages] for each in (found, expected)]
    assert kinds[0] == kinds[1]
    for message, other in zip(found.trace.messages, expected.trace.messages, strict=True):
        latents, others = message.tensor(), other.tensor()
        assert (latents is None) == (others is None)
        if latents is not None and others is not None:
            assert distance(latents, others) <= TOLERANCE, f"{message.source}->{message.target}, round {message.round}"
    assert found.text == expected.text
    for turn, other in zip(found.usage.turns, expected.usage.turns, strict=True):
        counts = [{**vars(each), "seconds": sorted(each.seconds)} for each in (turn, other)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("channel", "num_latent_steps"),
    [
        ("latent", 1),
        ("latent", 4),
        ("text", 4),
        ("both", 2),
        ({"math->summarizer": "text", "code->summarizer": "both", "summarizer->code": "none", "*": "latent"}, 3),
    ],
    ids=str,
)
def test_side_by_side_is_one_after_the_other(
    together: RecursiveSystem, apart: RecursiveSystem, questions: list[str], channel: Any, num_latent_steps: int
) -> None:
    options = {"channel": channel, "num_latent_steps": num_latent_steps, "trace": "full"}
    for asked in (questions, questions[:1]):
        for found, expected in zip(together.run(asked, **options), apart.run(asked, **options), strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3_text", "mistral-window"])
def test_side_by_side_in_caches_of_every_kind(
    family: str, copies: list[LanguageModel], questions: list[str], tmp_path: Path
) -> None:
    """A recurrent state, scaled embeddings, a sliding window: the caches of three roles become one, and stay exact."""
    models = [load_family(family, tmp_path / str(number)) for number in range(3)]
    results = [
        mixture(specialists, copies[3]).run(questions[:4], channel="both", trace="full")
        for specialists in ([models[0]] * 3, models)
    ]
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


def test_sampled_text_does_not_depend_on_who_stands_beside(
    together: RecursiveSystem, apart: RecursiveSystem, questions: list[str]
) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8, seed=3)
    options = {"channel": "text", "sampling": sampling}
    for found, expected in zip(together.run(questions, **options), apart.run(questions, **options), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("num_questions", [1, 2])
def test_gradients_are_those_of_one_after_the_other(
    together: RecursiveSystem, apart: RecursiveSystem, questions: list[str], num_questions: int
) -> None:
    found = []
    for system in (together, apart):
        parameters = system.trainable_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        *_, last = system.unroll(questions[:num_questions])
        loss = last.agent.loss(last.reading, ["forty-two"] * num_questions).sum()
        found.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    for name, gradient in found[1].items():
        assert gradient.norm() > 0, name
        assert distance(found[0][name], gradient) <= TOLERANCE, name


def test_they_think_in_the_same_steps(
    together: RecursiveSystem, apart: RecursiveSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    step = LanguageModel.step

    def counted(self: LanguageModel, cache: Any, inputs_embeds: Tensor, attention_mask: Any = None) -> Tensor:
        if inputs_embeds.shape[1] == 1:
            rows.append(len(inputs_embeds))
        return step(self, cache, inputs_embeds, attention_mask)

    monkeypatch.setattr(LanguageModel, "step", counted)
    sizes = []
    for system in (together, apart):
        rows.clear()
        system.run("Why so?", num_rounds=1, num_latent_steps=6, sampling=SamplingParams(max_new_tokens=1))
        sizes.append([size for size in rows if size > 1] or rows.copy())
    assert sizes[0] == [3] * 5
    assert set(sizes[1]) == {1}
    assert len(sizes[1]) >= 15


@pytest.mark.parametrize("rows", [1, 4])
def test_with_many_questions_they_are_fewer_to_a_batch(
    together: RecursiveSystem,
    apart: RecursiveSystem,
    questions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    sizes: list[int] = []
    begin = Chorus.__init__

    def counted(self: Chorus, agents: Any, readings: Any) -> None:
        sizes.append(len(agents))
        begin(self, agents, readings)

    monkeypatch.setattr(Chorus, "__init__", counted)
    monkeypatch.setattr(recursion, "ROWS_TOGETHER", rows)
    results = [system.run(questions[:2], trace="full") for system in (together, apart)]
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
    # Three specialists in two rounds, and the summarizer in one.
    expected = [1] * 7 if rows == 1 else [2, 1, 1, 2, 1]
    assert sizes[: len(expected)] == expected


def test_interventions_and_replays_work_role_by_role(together: RecursiveSystem, questions: list[str]) -> None:
    calls: list[tuple[int, str]] = []

    def silence_code(message: Any, edge: str, round: int) -> Any:
        calls.append((round, edge))
        if edge == "code->summarizer":
            message = type(message)(torch.zeros_like(message.latents))
        return message

    results = together.run(questions[:2], trace="full", intervene=silence_code)
    for result in results:
        assert not result.trace.message(1, "code", "summarizer").any()
        assert result.trace.message(1, "math", "summarizer").any()
    sent = [f"{source}->summarizer" for source in SPECIALISTS]
    back = [f"summarizer->{target}" for target in SPECIALISTS]
    assert calls == [*((1, edge) for edge in [*sent, *back]), *((2, edge) for edge in sent)]


def test_shared_seconds_are_shared(together: RecursiveSystem) -> None:
    usage = together.run("Why so?").usage
    latent = {turn.role: turn.seconds["latent"] for turn in usage.turns if turn.round == 1}
    assert latent["math"] == latent["code"] == latent["science"] > 0


def test_a_prompt_that_leaves_no_room_to_think_is_told_by_its_role(copies: list[LanguageModel]) -> None:
    small = make_model("qwen3", 3, max_position_embeddings=64)
    prompts = {
        "name": "uneven",
        "roles": {
            **{role: {"always": "{latents:summarizer}{question}"} for role in ("math", "science")},
            "code": {"always": "{latents:summarizer}{question} Do write a program."},
            "summarizer": FEW_WORDS["roles"]["summarizer"],
        },
    }
    system = mixture([small] * 3, copies[3], prompts=prompts)
    with pytest.raises(InputError, match="prompt of the code, with its thoughts, needs"):
        system.run("Why so?", num_latent_steps=50)


# Planted faults: each must be caught by the checks above


def test_an_inner_link_that_is_used_for_all_is_caught(
    together: RecursiveSystem, apart: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chorus, "_inner_links", lambda self, states: self._lead.inner_link(states))
    with pytest.raises(AssertionError, match="->summarizer, round 1"):
        assert_same(*(each.run(questions[0], trace="full") for each in (together, apart)))


def test_rows_that_come_back_in_another_order_are_caught(
    together: RecursiveSystem, apart: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    think = Agent.think
    monkeypatch.setattr(Agent, "think", lambda self, *given, **options: think(self, *given, **options).flip(0))
    with pytest.raises(AssertionError, match="->summarizer, round 1"):
        assert_same(*(each.run(questions[0], trace="full") for each in (together, apart)))
