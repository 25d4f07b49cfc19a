"""Channels: which messages there are, and how often a sender works for them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from recursivemas.agents import Agent
from recursivemas.channels import CHANNELS, Sender, choose_channels, emit
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel

EDGES = ["planner->critic", "planner->solver"]


@pytest.mark.parametrize(
    ("name", "with_steps", "without"),
    [("latent", True, False), ("text", True, True), ("both", True, True), ("none", False, False)],
)
def test_an_edge_is_open_if_anything_travels(name: str, with_steps: bool, without: bool) -> None:
    assert CHANNELS[name].is_open(1) == with_steps
    assert CHANNELS[name].is_open(0) == without


def test_one_name_is_for_all_edges_and_a_mapping_for_each() -> None:
    assert choose_channels("text", EDGES) == dict.fromkeys(EDGES, CHANNELS["text"])
    chosen = choose_channels({"planner->critic": "text", "planner->solver": "none"}, EDGES)
    assert [channel.name for channel in chosen.values()] == ["text", "none"]


def test_a_star_names_the_channel_of_all_other_edges() -> None:
    chosen = choose_channels({"planner->critic": "text", "*": "latent"}, EDGES)
    assert {edge: channel.name for edge, channel in chosen.items()} == {EDGES[0]: "text", EDGES[1]: "latent"}
    assert choose_channels({"*": "both"}, EDGES) == choose_channels("both", EDGES)
    with pytest.raises(ConfigError, match="'planner->solver'; name one for every edge, or with '\\*' for all others"):
        choose_channels({"planner->critic": "text"}, EDGES)
    with pytest.raises(ConfigError, match="unknown edge 'planer->critic': did you mean 'planner->critic'"):
        choose_channels({"planer->critic": "text", "*": "latent"}, EDGES)
    with pytest.raises(ConfigError, match="unknown channel 'txt': did you mean 'text'"):
        choose_channels({"planner->critic": "text", "*": "txt"}, EDGES)


def test_an_unknown_name_in_a_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        choose_channels({"planner->critic": "txt", "planner->solver": "none"}, EDGES)


@pytest.mark.parametrize("through_inner_link", [True, False])
def test_a_sender_thinks_and_writes_once_for_all_its_readers(
    tiny_models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch, through_inner_link: bool
) -> None:
    model = tiny_models["qwen3"]
    agent = Agent("planner", model, RecursiveLink.inner(model.hidden_size).redraw(0))
    links = {edge: RecursiveLink.outer(model.hidden_size, 8).redraw(seed) for seed, edge in enumerate(EDGES)}
    reading = agent.read([("A plan",)], {})
    calls: list[str] = []
    for name in ("think", "speak"):
        method = getattr(Agent, name)

        def counted(*args: object, name: str = name, method: object = method, **options: object) -> object:
            calls.append(name)
            return method(*args, **options)

        monkeypatch.setattr(Agent, name, counted)
    phases: list[tuple[list[str], str]] = []

    def phase(roles: Sequence[str], name: str) -> AbstractContextManager[None]:
        phases.append((list(roles), name))
        return nullcontext()

    channels = {EDGES[0]: CHANNELS["both"], EDGES[1]: CHANNELS["latent"]}
    [(messages, replies)] = emit(
        [Sender("planner", agent, reading, channels, ["key"])],
        links,
        num_latent_steps=3,
        sampling=SamplingParams(max_new_tokens=4),
        through_inner_link=through_inner_link,
        phase=phase,
    )
    assert phases == [(["planner"], name) for name in ("latent", "decode", "link", "link")]
    assert calls == ["think", "speak"]
    thoughts = agent.think(reading, 3)
    for edge, message in messages.items():
        # The release sends R_out(R_in(H)); the paper prints R_out(H).
        expected = links[edge](agent.inner_link(thoughts) if through_inner_link else thoughts)
        assert torch.equal(message.latents, expected)
    assert messages[EDGES[0]].texts == (replies[0].text,)
    assert messages[EDGES[1]].texts is None
