"""How agents of a world are made: one that makes mistakes where none are allowed is drawn again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from recursivemas.agents import Agent, Message
from recursivemas.decoding import SamplingParams
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.worlds import building
from recursivemas.worlds.pretraining import exact_share
from recursivemas.worlds.relay import Relay


@pytest.fixture(scope="module")
def shipped() -> LanguageModel:
    return RecursiveSystem.from_pretrained("relay").agents["critic"].model


def small_relay(seed: int) -> Relay:
    relay = Relay(seed)
    recipe = relay.agent_recipes["critic"]
    relay.agent_recipes["critic"] = replace(recipe, num_train_steps=2, batch_size=2, warmup_steps=1, drill_share=0.0)
    return relay


def test_the_examination_counts_turns_without_a_mistake(shipped: LanguageModel) -> None:
    relay = Relay(0)
    assert exact_share(relay, "critic", shipped, num_samples=20) == 1.0
    # In another world the same words mean something else: only turns in which no fact is told come out right.
    assert 0.0 < exact_share(Relay(1), "critic", shipped, num_samples=20) < 0.9


def test_the_examination_is_what_decoding_writes(shipped: LanguageModel) -> None:
    relay = Relay(1)  # where the agent is right at times
    turns = relay.role_samples("train", 30, 0, role="critic", variant="short")
    agent = Agent("critic", shipped, RecursiveSystem.from_pretrained("relay").agents["critic"].inner_link)
    prompts = PromptSet.load("relay")
    right = 0
    for turn in turns:
        segments = prompts.segments(
            "critic", turn.question, render_chat=shipped.render_chat, round=turn.round, is_last=False, variant="short"
        )
        reading = agent.read([segments], {"planner": Message(texts=(turn.messages["planner"],))})
        right += agent.speak(reading, SamplingParams(max_new_tokens=24), ["x"])[0].text == turn.target
    relay.variants = ("short",)
    assert 0 < right < 30
    assert exact_share(relay, "critic", shipped, num_samples=30) == right / 30


def test_an_agent_that_makes_mistakes_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_world", lambda name, seed: small_relay(seed))
    marks = iter([0.25, 0.75, 0.5])
    seen: list[torch.Tensor] = []

    def examine(world: Relay, role: str, model: LanguageModel) -> float:
        seen.append(nn.utils.parameters_to_vector(model.network.parameters()).clone())
        return next(marks)

    monkeypatch.setattr(building, "exact_share", examine)
    summary = building.make_agent("relay", 0, "critic", tmp_path)
    assert summary["exact"] == [0.25, 0.75, 0.5]
    assert not any(torch.equal(a, b) for a, b in [seen[:2], seen[1:], seen[::2]])
    kept = LanguageModel.from_pretrained(tmp_path / "agent", device="cpu").network
    weights = nn.utils.parameters_to_vector(kept.parameters())
    assert [torch.allclose(weights, each, atol=1e-3) for each in seen] == [False, True, False]
    assert json.loads((tmp_path / "draw-3" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_an_agent_that_makes_none_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_world", lambda name, seed: small_relay(seed))
    monkeypatch.setattr(building, "exact_share", lambda world, role, model: 0.995)
    assert building.make_agent("relay", 0, "critic", tmp_path)["exact"] == [0.995]
    assert not (tmp_path / "draw-2").exists()
