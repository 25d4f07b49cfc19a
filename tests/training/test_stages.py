"""The stages of training: what each is given, that it learns it, and that nothing else moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recursivemas.agents import Agent
from recursivemas.errors import ConfigError, InputError
from recursivemas.links import DESIGNS, RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import (
    AlignmentSettings,
    alignment_loss,
    alignment_pairs,
    embeddings_of_spans,
    overlapping,
    solve_residual,
    train_alignment,
)
from recursivemas.training.data import RoleSample, encode_turns
from recursivemas.training.inner import InnerSettings, collect_pairs, cosine_loss, train_inner
from recursivemas.training.loop import RunDirectory
from recursivemas.training.recipe import Recipe, WorldSettings, fresh_links, parse_stages, train

# Without blanks: see test_blanks_that_are_tokens_of_their_own_are_aligned.
TEXTS = ["A-plan-for-the-fox", "The-critic-improves-it", "forty-two", "river,bank,at,dawn", "dog"]


def samples(role: str, number: int = 8) -> list[RoleSample]:
    return [
        RoleSample(role=role, question=f"Question {i}?", target=f"{TEXTS[i % len(TEXTS)]},{i}.", num_rounds=2)
        for i in range(number)
    ]


def weights(system: RecursiveSystem) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor.clone()
        for name, link in system.all_links.items()
        for key, tensor in link.state_dict().items()
    }


def changed(before: dict[str, Tensor], system: RecursiveSystem) -> set[str]:
    return {name for name, tensor in weights(system).items() if not torch.equal(tensor, before[name])}


# Data


def test_turns_have_the_tokens_of_a_run(system: RecursiveSystem) -> None:
    model = system.agents["critic"].model
    sample = RoleSample(role="critic", question="Why?", target="A plan.", messages={"planner": "Think twice."})
    [turn] = encode_turns([sample], model, system.prompts)
    pieces = system.prompts.segments("critic", "Why?", render_chat=model.render_chat)
    texts = [piece if isinstance(piece, str) else "Think twice." for piece in pieces]
    assert turn.prompt_ids == [token for text in texts for token in model.encode(text)]
    assert turn.target_ids == model.encode("A plan.")


def test_the_last_round_and_solo_have_their_own_prompts(system: RecursiveSystem) -> None:
    model = system.agents["solver"].model
    turns = [
        RoleSample(role="solver", question="Why?", target="x", round=1, num_rounds=2),
        RoleSample(role="solver", question="Why?", target="x", round=2, num_rounds=2),
        RoleSample(role="solver", question="Why?", target="x", solo=True),
    ]
    prompts = [model.decode(turn.prompt_ids) for turn in encode_turns(turns, model, system.prompts)]
    assert ["Work through" in text for text in prompts] == [True, False, False]
    assert ["Answer the question" in text for text in prompts] == [False, True, True]
    assert ["improved plan" in text for text in prompts] == [True, True, False]


def test_turns_that_cannot_be_trained_on_are_refused(system: RecursiveSystem) -> None:
    model = system.agents["planner"].model
    with pytest.raises(InputError, match="empty target"):
        encode_turns([RoleSample(role="planner", question="Why?", target="")], model, system.prompts)
    with pytest.raises(InputError, match="a turn of the planner needs"):
        encode_turns([RoleSample(role="planner", question="Why?" * 900, target="x")], model, system.prompts)


# Inner


def test_pairs_are_the_states_that_predict_each_token(system: RecursiveSystem) -> None:
    agent = system.agents["planner"]
    turns = encode_turns(samples("planner", 5), agent.model, system.prompts)
    pairs = collect_pairs(agent.model, turns, with_end=True, batch_size=2)
    place = 0
    for number, turn in enumerate(turns):
        with torch.no_grad():
            states = agent.model.states(torch.tensor([[*turn.prompt_ids, *turn.target_ids]]))[0]
        labels = [*turn.target_ids, agent.model.reply_end_id]
        expected = states[len(turn.prompt_ids) - 1 :]
        found = pairs.states[place : place + len(labels)]
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert pairs.token_ids[place : place + len(labels)] == labels
        assert pairs.turn_of[place : place + len(labels)] == [number] * len(labels)
        assert pairs.place_of[place : place + len(labels)] == list(range(len(labels)))
        place += len(labels)
    assert place == len(pairs.states)


def test_cosine_loss_is_equation_5() -> None:
    predicted, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert cosine_loss(predicted, target).item() == pytest.approx(0.5)


@pytest.mark.parametrize("design", ["res-2-layer", "ln-res-2-layer", "1-layer"])
def test_inner_training_lowers_its_loss_and_moves_only_its_own_link(make_system: object, design: str) -> None:
    system = make_system(design=design)
    prints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    before = weights(system)
    agent = system.agents["critic"]
    turns = encode_turns(samples("critic"), agent.model, system.prompts)
    report = train_inner(agent, turns, InnerSettings(num_train_steps=60, lr=1e-2, batch_size=64))
    assert report["loss_after"] < 0.7 * report["loss_before"]
    moved = changed(before, system)
    assert {f"critic/{name}" for name, _ in agent.inner_link.named_parameters()} <= moved
    assert all(name.startswith("critic/") for name in moved)
    assert {role: agent.model.fingerprint() for role, agent in system.agents.items()} == prints


def test_a_trained_inner_link_is_as_loud_as_the_embeddings_it_imitates(system: RecursiveSystem) -> None:
    agent = system.agents["planner"]
    turns = encode_turns(samples("planner"), agent.model, system.prompts)
    train_inner(agent, turns, InnerSettings(num_train_steps=20, lr=1e-2, batch_size=64))
    pairs = collect_pairs(agent.model, turns, with_end=True)
    found = agent.inner_link(pairs.states).norm(dim=-1).mean().item()
    assert found == pytest.approx(agent.model.embedding_norm(pairs.token_ids), rel=1e-4)


# Alignment


@pytest.mark.parametrize(
    ("span", "others", "expected"),
    [
        ((0, 9), [(0, 4), (4, 9), (10, 12)], [0, 1]),
        ((2, 3), [(0, 4), (4, 9)], [0]),
        ((3, 5), [(0, 4), (4, 9)], [0, 1]),
        ((4, 4), [(0, 4), (4, 9)], []),
        ((9, 10), [(0, 4), (4, 9)], []),
    ],
)
def test_spans_overlap_if_they_share_a_character(
    span: tuple[int, int], others: list[tuple[int, int]], expected: list[int]
) -> None:
    assert overlapping(span, others) == expected


def test_a_token_is_aligned_with_all_the_readers_tokens_of_its_characters(
    tiny_models: dict[str, LanguageModel],
) -> None:
    # The sender knows longer pieces of words than the reader.
    sender, reader = tiny_models["qwen2"], tiny_models["qwen3"]
    text = "The quick brown planner improves twenty-five answers"
    _, spans = sender.spans(text)
    reader_ids, reader_spans = reader.spans(text)
    assert spans != reader_spans
    found = embeddings_of_spans(reader, text, spans)
    table = reader.network.get_input_embeddings().weight
    several = 0
    for row, (start, end) in enumerate(spans):
        ids = [token for token, (s, e) in zip(reader_ids, reader_spans, strict=True) if s < end and e > start]
        several += len(ids) > 1
        torch.testing.assert_close(found[row], table[ids].mean(dim=0))
    assert several > 0


@pytest.mark.parametrize("text", ["A plan for the fox 0.", "forty-two,\n\nand no more", " 7 "])
def test_blanks_that_are_tokens_of_their_own_are_aligned(tiny_models: dict[str, LanguageModel], text: str) -> None:
    sender, reader = tiny_models["qwen3"], tiny_models["llama"]
    token_ids, spans = sender.spans(text)
    assert any(not sender.decode([token]).strip() for token in token_ids)
    found = embeddings_of_spans(reader, text, spans)
    assert found.shape == (len(token_ids), reader.hidden_size)
    assert found.isfinite().all()


def test_pairs_of_an_edge_are_what_its_link_gets_and_should_return(system: RecursiveSystem) -> None:
    sender, reader = system.agents["planner"], system.agents["critic"].model
    turns = encode_turns(samples("planner", 3), sender.model, system.prompts)
    for through in (True, False):
        features, targets = alignment_pairs(sender, reader, turns, through_inner_link=through)
        states = collect_pairs(sender.model, turns, with_end=False).states
        torch.testing.assert_close(features, sender.inner_link(states) if through else states)
        expected = torch.cat(
            [embeddings_of_spans(reader, turn.target, sender.model.spans(turn.target)[1]) for turn in turns]
        )
        torch.testing.assert_close(targets, expected)


def regression(number: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(number, 6, generator=generator)
    truth = torch.randn(6, 4, generator=generator)
    return features, features @ truth + 0.1 * torch.randn(number, 4, generator=generator) + 0.5


@pytest.mark.parametrize(("design", "bias"), [("res-2-layer", False), ("res-2-layer", True), ("1-layer", False)])
def test_the_residual_is_solved_as_numpy_solves_it(design: str, bias: bool) -> None:
    features, targets = regression()
    link = RecursiveLink.outer(6, 4, design=design, bias=bias)
    solve_residual(link, features, targets, ridge=0.01)
    inputs = features.double().numpy()
    if bias:
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    gram = inputs.T @ inputs
    penalty = 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    solution = np.linalg.inv(gram + penalty) @ inputs.T @ targets.double().numpy()
    linear = link.residual_weight
    np.testing.assert_allclose(linear.weight.numpy(force=True), solution[:6].T, rtol=1e-4, atol=1e-5)
    if bias:
        np.testing.assert_allclose(linear.bias.numpy(force=True), solution[6], rtol=1e-4, atol=1e-5)
    assert link.scale == 1


@pytest.mark.parametrize("design", DESIGNS)
def test_alignment_lowers_its_loss_whatever_the_design(design: str) -> None:
    features, targets = regression(200)
    link = RecursiveLink.outer(6, 4, design=design)
    settings = AlignmentSettings(num_train_steps=100, lr=1e-2, batch_size=64, ridge=1e-6)
    report = train_alignment("a->b", link, features, targets, settings)
    # 1.0 is what a link gets that returns nothing. What is linear is all but found by solving already.
    assert report["loss_after"] < 0.6
    if design in ("1-layer", "res-1-layer", "res-2-layer"):
        assert report["loss_solved"] < 0.03
    assert report["loss_after"] <= 1.05 * report["loss_solved"]
    assert report["loss_after"] == pytest.approx(alignment_loss(link, features, targets).item())
    expected = (link(features) - targets).square().sum() / targets.square().sum()
    assert report["loss_after"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0.5 < report["cosine_after"] <= 1


# Recipes


def recipe(tmp_path: Path, **changes: object) -> Recipe:
    settings = {
        "system": "x",
        "world": WorldSettings(name="toy"),
        "output": str(tmp_path),
        "inner": InnerSettings(num_train_steps=6, num_samples=6, batch_size=32, save_every=3, log_every=2),
        "alignment": AlignmentSettings(num_train_steps=6, num_samples=4, batch_size=32, save_every=3, log_every=2),
        **changes,
    }
    return Recipe(**settings)


def test_training_moves_every_link_and_no_model(system: RecursiveSystem, tmp_path: Path) -> None:
    prints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    before = weights(system)
    reports = train(system, recipe(tmp_path), samples)
    assert set(reports) == {
        *(f"inner {role}" for role in system.agents),
        *(f"alignment {edge}" for edge in system.links),
    }
    assert set(system.trainable_parameters()) <= changed(before, system)
    assert {role: agent.model.fingerprint() for role, agent in system.agents.items()} == prints


def test_a_stage_that_is_left_out_keeps_its_links(system: RecursiveSystem, tmp_path: Path) -> None:
    before = weights(system)
    train(system, recipe(tmp_path), samples, stages=["inner"])
    assert {name.split("/")[0] for name in changed(before, system)} == {"planner", "critic", "solver"}
    before = weights(system)
    train(system, recipe(tmp_path), samples, stages=["alignment"])
    assert {name.split("/")[0] for name in changed(before, system)} == set(system.links)


@pytest.mark.parametrize("stopped_at", [1, 4, 8, 14])
def test_a_stopped_training_goes_on_to_the_same_system(make_system: object, tmp_path: Path, stopped_at: int) -> None:
    settings = recipe(tmp_path)
    whole = make_system()
    train(whole, settings, samples)

    told = [0]

    def stop(*progress: object) -> None:
        told[0] += 1
        if told[0] == stopped_at:
            raise KeyboardInterrupt

    stopped = make_system()
    with pytest.raises(KeyboardInterrupt):
        train(stopped, settings, samples, run=RunDirectory(tmp_path, {}), progress=stop)
    resumed = make_system()
    train(resumed, settings, samples, run=RunDirectory(tmp_path, {}))
    expected = weights(whole)
    assert not changed(expected, resumed)
    # And once more, when everything is done.
    again = make_system()
    train(again, settings, samples, run=RunDirectory(tmp_path, {}))
    assert not changed(expected, again)


def test_stages_can_be_trained_in_separate_runs(make_system: object, tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    whole = make_system()
    train(whole, settings, samples)
    for stages in (["inner"], ["alignment"]):
        apart = make_system()
        train(apart, settings, samples, stages=stages, run=RunDirectory(tmp_path, {}))
    assert not changed(weights(whole), apart)


def test_a_changed_model_is_noticed(system: RecursiveSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint, calls = LanguageModel.fingerprint, [0]

    def meddled(self: LanguageModel) -> str:
        calls[0] += 1
        return fingerprint(self) + ("" if calls[0] < 5 else "!")

    monkeypatch.setattr(LanguageModel, "fingerprint", meddled)
    with pytest.raises(AssertionError, match="the frozen model of the critic changed"):
        train(system, recipe(tmp_path), samples, stages=["inner"])


def test_links_are_drawn_anew_as_the_recipe_says(system: RecursiveSystem, tmp_path: Path) -> None:
    settings = recipe(
        tmp_path,
        num_rounds=5,
        num_latent_steps=7,
        message="outer",
        max_new_tokens=9,
        links={"design": "ln-res-2-layer", "bias": False},
    )
    drawn = fresh_links(system, settings)
    assert {link.config.design for link in drawn.all_links.values()} == {"ln-res-2-layer"}
    assert {link.config.bias for link in drawn.all_links.values()} == {False}
    found = drawn.settings
    assert (found.num_rounds, found.num_latent_steps, found.message, found.max_new_tokens) == (5, 7, "outer", 9)
    assert drawn.agents["planner"].model is system.agents["planner"].model
    again, other = fresh_links(system, settings), fresh_links(system, recipe(tmp_path, seed=1))
    assert not changed(weights(drawn), again)
    assert not torch.equal(
        other.links["planner->critic"].w1.weight,
        fresh_links(system, recipe(tmp_path)).links["planner->critic"].w1.weight,
    )


def test_turns_that_speak_are_not_thought_through(system: RecursiveSystem, tmp_path: Path) -> None:
    def with_answers(role: str, number: int) -> list[RoleSample]:
        spoken = [RoleSample(role=role, question="Why?", target="never", round=2, num_rounds=2)]
        return samples(role, number) + (spoken if role == "solver" else [])

    plain, mixed = (train(system, recipe(tmp_path), given, stages=["inner"]) for given in (samples, with_answers))
    assert mixed["inner solver"]["pairs"] == plain["inner solver"]["pairs"]


def test_a_role_without_turns_to_train_on_is_refused(system: RecursiveSystem, tmp_path: Path) -> None:
    def only_answers(role: str, number: int) -> list[RoleSample]:
        return [RoleSample(role=role, question="Why?", target="x", round=1, num_rounds=1)]

    with pytest.raises(InputError, match="solver"):
        train(system, recipe(tmp_path), only_answers, stages=["inner"])


@pytest.mark.parametrize(
    ("text", "stages"),
    [("all", ("inner", "alignment")), ("alignment, inner", ("inner", "alignment")), ("inner", ("inner",))],
)
def test_stages_are_trained_in_their_order(text: str, stages: tuple[str, ...]) -> None:
    assert parse_stages(text) == stages


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown stage 'iner': did you mean 'inner'"):
        parse_stages("iner")
    with pytest.raises(ConfigError, match="no stage was named"):
        parse_stages(" , ")


def test_an_agent_knows_nothing_of_the_stage(system: RecursiveSystem) -> None:
    # Inner training is done by each agent on its own: the same link for the same agent, whatever the system.
    agent = system.agents["planner"]
    turns = encode_turns(samples("planner"), agent.model, system.prompts)
    settings = InnerSettings(num_train_steps=5, batch_size=32)
    train_inner(agent, turns, settings, seed=1)
    alone = Agent("planner", agent.model, RecursiveLink.inner(agent.model.hidden_size))
    alone.inner_link.load_state_dict(
        RecursiveSystem.build(agents={r: a.model for r, a in system.agents.items()})
        .agents["planner"]
        .inner_link.state_dict()
    )
    train_inner(alone, turns, settings, seed=1)
    assert torch.equal(alone.inner_link.w1.weight, agent.inner_link.w1.weight)
