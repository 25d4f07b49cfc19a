"""Systems of every bundled pattern, of one agent and of a dozen: run, unrolled, saved, loaded, renamed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from torch import Tensor

from recursivemas.answering import Result
from recursivemas.errors import ConfigError, PatternError
from recursivemas.models import LanguageModel
from recursivemas.patterns import BUNDLED, Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem

TOLERANCE = 1e-4
PATTERNS = sorted(file.stem for file in BUNDLED.glob("*.yaml"))


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same(found: Result, expected: Result) -> None:
    assert found.text == expected.text
    for message, other in zip(found.trace.messages, expected.trace.messages, strict=True):
        assert (message.round, message.source, message.target) == (other.round, other.source, other.target)
        assert message.text == other.text
        latents, others = message.tensor(), other.tensor()
        assert (latents is None) == (others is None)
        if latents is not None and others is not None:
            assert distance(latents, others) <= TOLERANCE, f"{message.source}->{message.target}, round {message.round}"


def build(pattern: Any, models: list[LanguageModel], **options: Any) -> RecursiveSystem:
    """A system whose roles take the models in turn, so that some share one."""
    table = Pattern.load(pattern)
    agents = {role: models[number % len(models)] for number, role in enumerate(table.roles)}
    settings = {"num_rounds": 2, "num_latent_steps": 2, "max_new_tokens": 6, **options}
    return RecursiveSystem.build(pattern=pattern, agents=agents, **settings).with_random_links(1)


@pytest.fixture(scope="module")
def models() -> list[LanguageModel]:
    return [make_model("qwen3", 0), make_model("llama", 1)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("channel", ["latent", "both"])
def test_alone_is_in_a_batch(pattern: str, channel: str, models: list[LanguageModel], questions: list[str]) -> None:
    system = build(pattern, models, channel=channel)
    together = system.run(questions[:3], trace="full")
    for question, found in zip(questions, together, strict=False):
        assert_same(found, system.run(question, trace="full"))
    edges = {f"{message.source}->{message.target}" for message in together[0].trace.messages}
    assert edges == set(system.links)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_link_has_its_gradient(pattern: str, models: list[LanguageModel], questions: list[str]) -> None:
    system = build(pattern, models)
    parameters = system.trainable_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    *_, last = system.unroll(questions[:2])
    loss = last.agent.loss(last.reading, ["the river", "forty-two"]).sum()
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        assert gradient.norm() > 0, name


@pytest.mark.parametrize("pattern", ["mixture", "self-recursion"])
def test_a_saved_system_answers_as_before(
    pattern: str, models: list[LanguageModel], questions: list[str], tmp_path: Path
) -> None:
    system = build(pattern, models, channel={f"{Pattern.load(pattern).edges[0]}": "both", "*": "latent"})
    system.save_pretrained(tmp_path / "system")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "system", device="cpu")
    assert loaded.settings == system.settings
    for found, expected in zip(*(each.run(questions[:2], trace="full") for each in (loaded, system)), strict=True):
        assert_same(found, expected)
    # Roles that shared a model share it again: its weights are on disk once.
    assert len({id(agent.model) for agent in loaded.agents.values()}) == len(models[: len(loaded.agents)])
    assert len(list((tmp_path / "system" / "agents").iterdir())) == len(models[: len(loaded.agents)])


def test_one_agent_reads_what_it_thought(models: list[LanguageModel], questions: list[str], tmp_path: Path) -> None:
    system = build("self-recursion", models, num_rounds=3)
    assert set(system.links) == {"thinker->thinker"}
    result = system.run(questions[0], trace="full")
    assert [(m.round, m.source, m.target) for m in result.trace.messages] == [(r, "thinker", "thinker") for r in (1, 2)]
    first = system.run(questions[0], trace="full", intervene="zero").trace.message(2, "thinker", "thinker")
    assert distance(first, result.trace.message(2, "thinker", "thinker")) > TOLERANCE
    # In one round it is alone; and so it is where nothing travels, but with the words of a last round.
    assert system.run(questions[0], num_rounds=1).trace.messages == []
    assert system.run(questions[0], channel="none").text == system.run(questions[0], num_rounds=1).text
    assert system.solo().run(questions[0]).usage.latent_steps == 0
    system.save_pretrained(tmp_path / "system")
    assert {folder.name for folder in (tmp_path / "system" / "links").iterdir()} == {
        "inner-thinker",
        "thinker-to-thinker",
    }


def a_dozen() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three times three specialists, each three read by all of the next, and a judge, a writer and an editor."""
    stages = [[f"{kind}{n}" for n in ("a", "b", "c")] for kind in ("scout", "maker", "tester")]
    edges = [f"{source}->{target}" for left, right in pairwise(stages) for source in left for target in right]
    edges += [f"{tester}->judge" for tester in stages[2]] + ["judge->writer", "writer->editor", "judge->editor"]
    edges += [f"editor->{scout}" for scout in stages[0]]
    pattern = {
        "name": "dozen",
        "stages": [*stages, ["judge"], ["writer"], ["editor"]],
        "edges": edges,
        "answers": "editor",
    }
    table = Pattern.load(pattern)
    slots = {role: "".join(f"{{latents:{edge.source}}}" for edge in table.sources(role)) for role in table.roles}
    roles = {role: {"always": f"{role}: {{question}} {slots[role]}"} for role in table.roles}
    return pattern, {"name": "dozen", "roles": roles}


def test_a_dozen_roles(models: list[LanguageModel], questions: list[str], tmp_path: Path) -> None:
    pattern, prompts = a_dozen()
    system = build(pattern, models, prompts=prompts)
    assert len(system.agents) == 12
    assert len(system.links) == 27
    together = system.run(questions[:2], trace="full")
    for question, found in zip(questions, together, strict=False):
        assert_same(found, system.run(question, trace="full"))
    assert len(together[0].trace.messages) == 27 + 24  # in the last round nobody reads the editor
    system.save_pretrained(tmp_path / "system")
    assert_same(RecursiveSystem.from_pretrained(tmp_path / "system").run(questions[0], trace="full"), together[0])


def test_both_on_one_edge_with_texts_of_unequal_length(models: list[LanguageModel], questions: list[str]) -> None:
    system = build("sequential", models, max_new_tokens=12)
    channel = {"planner->critic": "both", "critic->solver": "text", "*": "latent"}
    together = system.run(questions, channel=channel, trace="full")
    texts = [result.trace.find(1, "planner", "critic").text for result in together]
    lengths = {len(models[0].encode(text)) for text in texts}
    assert len(lengths) > 1, "the texts happen to be equally long, so nothing is tested"
    for question, found in zip(questions, together, strict=True):
        assert_same(found, system.run(question, channel=channel, trace="full"))
    kinds = [(m.source, m.text is not None, m.tensor() is not None) for m in together[0].trace.messages[:3]]
    assert kinds == [("planner", True, True), ("critic", True, False), ("solver", False, True)]


def test_channels_of_a_system_are_checked_when_it_is_made(models: list[LanguageModel]) -> None:
    with pytest.raises(ConfigError, match="unknown channel 'txt': did you mean 'text'"):
        build("distillation", models, channel={"*": "txt"})
    with pytest.raises(ConfigError, match="unknown edge 'expert->lerner': did you mean 'expert->learner'"):
        build("distillation", models, channel={"expert->lerner": "text", "*": "latent"})
    system = build("distillation", models, channel={"expert->learner": "text", "*": "latent"})
    assert system.run("Why?").trace.settings["channel"] == {"expert->learner": "text", "learner->expert": "latent"}
    assert system.solo().run("Why?").trace.settings["channel"] == {}


# Roles with other names


def test_a_system_may_rename_the_roles_of_a_bundled_pattern(
    models: list[LanguageModel], questions: list[str], tmp_path: Path
) -> None:
    plain = build("distillation", models, seed=3)
    names = {"expert": "teacher", "learner": "pupil"}
    agents = {names[role]: agent.model for role, agent in plain.agents.items()}
    settings: dict[str, Any] = {"num_rounds": 2, "num_latent_steps": 2, "max_new_tokens": 6, "seed": 3}
    renamed = RecursiveSystem.build(pattern="distillation", roles=names, agents=agents, **settings)
    assert set(renamed.links) == {"teacher->pupil", "pupil->teacher"}
    assert renamed.prompts.slots("pupil") == {"teacher"}
    original = RecursiveSystem.build(
        pattern="distillation", agents={role: agent.model for role, agent in plain.agents.items()}, **settings
    )
    found, expected = (each.run(questions[0], trace="full") for each in (renamed, original))
    assert found.text == expected.text
    assert torch.equal(found.trace.message(1, "teacher", "pupil"), expected.trace.message(1, "expert", "learner"))
    renamed.save_pretrained(tmp_path / "system")
    assert RecursiveSystem.from_pretrained(tmp_path / "system").run(questions[0]).text == found.text


def test_prompts_in_the_new_names_are_taken_as_they_are(models: list[LanguageModel]) -> None:
    prompts = PromptSet.load("distillation").renamed({"expert": "teacher"})
    options: dict[str, Any] = {"agents": {"teacher": models[0], "learner": models[1]}, "roles": {"expert": "teacher"}}
    assert RecursiveSystem.build(pattern="distillation", prompts=prompts, **options).prompts == prompts
    assert RecursiveSystem.build(pattern="distillation", prompts="distillation", **options).prompts == prompts


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"exprt": "teacher"}, "unknown role 'exprt': did you mean 'expert'"),
        ({"expert": "learner"}, "twice"),
        ({"expert": "the teacher"}, "cannot be a role"),
    ],
)
def test_names_that_cannot_be_given_are_refused(
    models: list[LanguageModel], roles: dict[str, str], message: str
) -> None:
    with pytest.raises(PatternError, match=message):
        RecursiveSystem.build(pattern="distillation", roles=roles, agents={"expert": models[0], "learner": models[1]})
