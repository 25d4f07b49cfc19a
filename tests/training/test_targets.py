"""Latents from given text: the released trainer's loss and gradient, of every pattern, and what it does not leak here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.released import closed, released_loss
from torch import Tensor

from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question
from recursivemas.training.gradients import Backflow
from recursivemas.training.outer import OuterLoop, OuterSettings, train_outer

M = 5
WORDS = {
    "planner": ["first count the legs of the fox", "a plan", "look at the river, then at the dog"],
    "critic": ["no: count twice", "a better plan that is longer than the first", "wait"],
}
QUESTIONS = [
    Question(
        id=f"q-{row}",
        text=text,
        answer=answer,
        targets={role: texts[row] for role, texts in WORDS.items()},
    )
    for row, (text, answer) in enumerate(
        [
            ("What is 2 + 2?", "four, because two and two is four"),
            ("How far did the fox run?", "no"),
            ("Why?", "forty-two and more"),
        ]
    )
]
TEXTS = {
    "mixture": {"code": "def plan", "science": "the river is wet at dawn", "math": "forty-two is two times twenty-one"},
    "distillation": {"expert": "the quick answer is forty-two"},
    "deliberation": {"reflector": "the solver was wrong about the lazy dog"},
}


def prompts_of(pattern: Pattern) -> dict[str, Any]:
    """Few words, so that a message is heard; the answering role has one prompt for all rounds."""
    roles = {}
    for role in pattern.roles:
        slots = [f"{{latents:{edge.source}}}" for edge in pattern.sources(role)]
        if role == pattern.answers:
            roles[role] = {"always": f"{' and '.join(slots)} {{question}} So:"}
        else:
            roles[role] = {"first": "{question}", "later": f"{{question}} {' '.join(slots)} Again:"}
    return {"name": "one-prompt", "roles": roles}


@pytest.fixture
def build(tiny_models: dict[str, LanguageModel]) -> Callable[..., RecursiveSystem]:
    def build(name: str, **options: Any) -> RecursiveSystem:
        pattern = Pattern.load(name)
        models = list(tiny_models.values())
        agents = {role: models[place % 3] for place, role in enumerate(pattern.roles)}
        settings = {"num_rounds": 3, "num_latent_steps": M, "max_new_tokens": 8, "seed": 3, **options}
        return RecursiveSystem.build(agents=agents, pattern=pattern, prompts=prompts_of(pattern), **settings)

    return build


def settings(**changes: Any) -> OuterSettings:
    """The released trainer's."""
    given = {"latent_source": "targets", "leak_answer": True, "trained": "outer", "round_weights": "last"}
    common = {"anchor": 0.0, "batch_size": 1, "num_train_steps": 2, "warmup_steps": 0, "num_validation": 2}
    return OuterSettings(**{**given, **common, **changes})


def outer_parameters(system: RecursiveSystem) -> dict[str, Tensor]:
    found = {
        f"{name}/{each}": parameter
        for name, link in system.links.items()
        for each, parameter in link.named_parameters()
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def ours(system: RecursiveSystem, questions: list[Question], chosen: OuterSettings) -> Tensor:
    """The loss of just these questions."""
    loop = OuterLoop(system, questions, chosen)
    weights = chosen.weights_of(loop.num_rounds)
    losses = loop.losses_by_round(questions, weights, Backflow(system.links, clip=chosen.clip_messages))
    return torch.stack([weights[round] * each.mean() for round, each in losses.items()]).sum()


def assert_same(found: Tensor, expected: Tensor, parameters: dict[str, Tensor]) -> None:
    """Loss and gradients."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    mine = torch.autograd.grad(found, list(parameters.values()), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for name, one, other in zip(parameters, mine, theirs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm(), name
    assert sum(each.norm() > 0 for each in theirs) > 0


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
@pytest.mark.parametrize("all_rounds", [False, True])
@pytest.mark.parametrize("row", [0, 1])
def test_the_loss_of_a_sample_is_that_of_the_released_trainer(
    build: Callable[..., RecursiveSystem], num_rounds: int, all_rounds: bool, row: int
) -> None:
    """Texts longer and shorter than the message, and a template that closes a reply with more than one token."""
    system, question = build("sequential"), QUESTIONS[row]
    parameters = outer_parameters(system)
    assert len(closed(system.agents["planner"].model, "a plan")) > 1 + len(
        system.agents["planner"].model.encode("a plan")
    )
    lengths = [len(closed(system.agents[role].model, text)) for role, text in question.targets.items()]
    assert (max(lengths) > M) == (row == 0) or row == 1
    chosen = settings(num_rounds=num_rounds, round_weights="every" if all_rounds else "last")
    expected = released_loss(
        system,
        question.text,
        {**question.targets, "solver": question.answer},
        answer=question.answer,
        num_rounds=num_rounds,
        max_latent_tokens=M,
        all_rounds=all_rounds,
    )
    assert_same(ours(system, [question], chosen), expected, parameters)


@pytest.mark.parametrize("name", ["mixture", "distillation", "deliberation"])
@pytest.mark.parametrize("design", ["res-2-layer", "ln-res-2-layer"])
def test_and_so_it_is_in_other_patterns(build: Callable[..., RecursiveSystem], name: str, design: str) -> None:
    system = build(name, design=design)
    question = Question(id="q", text="Why?", answer="forty-two and four", targets=TEXTS[name])
    parameters = outer_parameters(system)
    texts = {**question.targets, system.pattern.answers: question.answer}
    expected = released_loss(system, question.text, texts, answer=question.answer, num_rounds=3, max_latent_tokens=M)
    assert_same(ours(system, [question], settings()), expected, parameters)


@pytest.mark.parametrize("leak", [True, False])
def test_a_batch_is_the_mean_of_its_samples(build: Callable[..., RecursiveSystem], leak: bool) -> None:
    """Messages of unequal length; turns computed again in the backward pass or not."""
    system = build("sequential")
    parameters = outer_parameters(system)
    for recompute in (False, True):
        chosen = settings(leak_answer=leak, recompute=recompute, clip_messages=None)
        alone = torch.stack([ours(system, [question], chosen) for question in QUESTIONS]).mean()
        assert_same(ours(system, QUESTIONS, chosen), alone, parameters)


def test_without_the_leak_the_answering_role_hands_on_its_own_words(build: Callable[..., RecursiveSystem]) -> None:
    """The same procedure with what it would write, to its end or for as many words as a message has, for the answer."""
    system, question = build("sequential", num_rounds=2), QUESTIONS[0]
    parameters = outer_parameters(system)
    turns = list(system.unroll([question.text], latent_source="targets", targets=of_roles(question), answer_rounds=[1]))
    first = next(played for played in turns if played.turn.speaks and played.turn.round == 1)
    own = first.agent.speak(first.reading, SamplingParams(max_new_tokens=M), [""])[0]
    assert len(own.token_ids) == M
    assert not own.finished
    texts = {**question.targets, "solver": own.token_ids}
    expected = released_loss(system, question.text, texts, answer=question.answer, num_rounds=2, max_latent_tokens=M)
    assert_same(ours(system, [question], settings(leak_answer=False)), expected, parameters)
    leaked = ours(system, [question], settings())
    assert leaked.item() != pytest.approx(expected.item(), rel=1e-6)


def of_roles(question: Question) -> dict[str, list[str]]:
    return {role: [text] for role, text in question.targets.items()}


def test_own_words_that_end_are_closed_as_the_template_does(
    build: Callable[..., RecursiveSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = build("sequential").agents["planner"]
    reading = agent.read([("Why?",), ("How far did the fox run?",)], {})
    ids = agent.model.encode("a")
    end = agent.model.reply_end_id
    states, lengths = agent.think_along(reading, M, ["a", "a plan and a critic improves it"])
    assert lengths == (len(ids) + len(agent.model.reply_closing_ids), M)
    monkeypatch.setattr(type(agent), "speak", lambda self, *given: [Said((*ids, end)), Said(tuple(ids * M))])
    own, own_lengths = agent.think_along(reading, M)
    assert own_lengths == lengths
    assert torch.equal(own[0, : lengths[0]], states[0, : lengths[0]])


class Said:
    """A reply of which nothing but tokens is needed."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids


def test_latents_past_the_end_of_a_text_are_not_read(build: Callable[..., RecursiveSystem]) -> None:
    """Nor is what follows a text in the batch known to it."""
    system = build("sequential")
    together = list(unrolled(system, QUESTIONS))
    for row, question in enumerate(QUESTIONS):
        for played, alone in zip(together, unrolled(system, [question]), strict=True):
            assert played.turn == alone.turn
            torch.testing.assert_close(played.reading.state[row], alone.reading.state[0], rtol=1e-4, atol=1e-5)
            for edge, message in played.messages.items():
                [length] = alone.messages[edge].lengths
                assert message.lengths[row] == length <= M
                torch.testing.assert_close(
                    message.latents[row, :length], alone.messages[edge].latents[0], rtol=1e-4, atol=1e-5
                )
    assert len({length for played in together for each in played.messages.values() for length in each.lengths}) > 1


@torch.no_grad()
def unrolled(system: RecursiveSystem, questions: list[Question]) -> list[Any]:
    targets = {role: [question.targets[role] for question in questions] for role in WORDS}
    return list(system.unroll([question.text for question in questions], latent_source="targets", targets=targets))


def test_it_trains(build: Callable[..., RecursiveSystem]) -> None:
    system = build("sequential", num_rounds=2)
    chosen = settings(num_train_steps=6, lr=1e-2, batch_size=3, log_every=3, leak_answer=False)
    before = ours(system, QUESTIONS, chosen).item()
    fitted = train_outer(system, QUESTIONS, chosen)
    assert ours(system, QUESTIONS, chosen).item() < 0.9 * before
    assert min(fitted.movement.values()) > 0


def test_what_is_missing_or_makes_no_sense_is_refused(build: Callable[..., RecursiveSystem]) -> None:
    system = build("sequential")
    with pytest.raises(ConfigError, match="leak_answer gives .* latent_source: rollout never does"):
        settings(latent_source="rollout")
    lacking = Question(id="q-7", text="Who?", answer="no", targets={"planner": "a plan"})
    with pytest.raises(InputError, match="question q-7 has no target for the critic, .* a column 'critic'"):
        train_outer(system, [*QUESTIONS, lacking], settings())
    texts = [question.text for question in QUESTIONS]
    with pytest.raises(ConfigError, match="targets: unknown role 'planer': did you mean 'planner'"):
        system.unroll(texts, latent_source="targets", targets={"planer": texts})
    with pytest.raises(ConfigError, match="with latent_source='targets' only, and it is 'rollout'"):
        system.unroll(texts, targets={"planner": texts})
    for given in (texts[:2], "abc", ["a", "", "b"]):
        with pytest.raises(InputError, match="targets of the planner: give a text that is not empty for each question"):
            system.unroll(texts, latent_source="targets", targets={"planner": given})
    long = ["word " * 2000] * 3
    with pytest.raises(InputError, match="with its text, .* positions"):
        list(system.unroll(texts, latent_source="targets", num_latent_steps=1100, targets={"planner": long}))
