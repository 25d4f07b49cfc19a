"""The stages of training: what each is given, that it learns it, and that nothing else moves."""

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from recursivemas.training.data import Question, RoleSample, check_disjoint, encode_turns
from recursivemas.training.inner import InnerSettings, collect_pairs, cosine_loss, train_inner
from recursivemas.training.loop import RunDirectory
from recursivemas.training.outer import OuterSettings
from recursivemas.training.recipe import Material, Recipe, WorldSettings, parse_stages, starting_system, train

# Without blanks: see test_blanks_that_are_tokens_of_their_own_are_aligned.
TEXTS = ["A-plan-for-the-fox", "The-critic-improves-it", "forty-two", "river,bank,at,dawn", "dog"]


def samples(role: str, number: int = 8) -> list[RoleSample]:
    return [
        RoleSample(role=role, question=f"Question {i}?", target=f"{TEXTS[i % len(TEXTS)]},{i}.", num_rounds=2)
        for i in range(number)
    ]


def questions_of(split: str, number: int) -> list[Question]:
    return [
        Question(
            id=f"{split}-{i}",
            text=f"{split} {i}: {TEXTS[i % 5]}?",
            answer=TEXTS[i % 5],
            posterior={"dog": 0.7, "fox": 0.3},
        )
        for i in range(min(number, 12))
    ]


def score(system: RecursiveSystem, questions: Sequence[Question]) -> float:
    """Something that depends on every weight: the mean of the first message."""
    results = system.run([question.text for question in questions], trace="full")
    return float(np.mean([float(result.trace.messages[0].tensor().mean()) for result in results]))


MATERIAL = Material(turns=samples, questions=questions_of, score=score)


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


def test_pairs_of_an_edge_are_what_its_sender_thinks_and_its_reader_embeds(system: RecursiveSystem) -> None:
    sender, reader = system.agents["planner"].model, system.agents["critic"].model
    turns = encode_turns(samples("planner", 3), sender, system.prompts)
    pairs = alignment_pairs(sender, reader, turns)
    torch.testing.assert_close(pairs.states, collect_pairs(sender, turns, with_end=False).states)
    expected = [embeddings_of_spans(reader, turn.target, sender.spans(turn.target)[1]) for turn in turns]
    torch.testing.assert_close(pairs.targets, torch.cat(expected))
    # Or of the first tokens only.
    few = alignment_pairs(sender, reader, turns, num_tokens=2)
    lengths = [len(turn.target_ids) for turn in turns]
    chosen = [sum(lengths[:row]) + place for row in range(3) for place in range(2)]
    assert torch.equal(few.states, pairs.states[chosen])
    assert torch.equal(few.targets, pairs.targets[chosen])


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
    # A design without a residual starts from nothing, and LayerNorms keep its outputs at one size: it learns slowly.
    assert report["loss_after"] < (0.85 if design == "ln-2-layer" else 0.6)
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
        "outer": OuterSettings(
            num_train_steps=4,
            batch_size=3,
            anchor_batch_size=16,
            warmup_steps=0,
            save_every=2,
            validate_every=2,
            log_every=2,
            num_validation=2,
        ),
        "num_latent_steps": 2,
        **changes,
    }
    return Recipe(**settings)


def small(make_system: Callable[..., RecursiveSystem]) -> RecursiveSystem:
    return make_system(num_latent_steps=2, max_new_tokens=4)


@pytest.fixture
def system(make_system: Callable[..., RecursiveSystem]) -> RecursiveSystem:
    return small(make_system)


def test_training_moves_every_link_and_no_model(system: RecursiveSystem, tmp_path: Path) -> None:
    prints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    before = weights(system)
    reports = train(system, recipe(tmp_path), MATERIAL)
    assert set(reports) == {
        *(f"inner {role}" for role in system.agents),
        *(f"alignment {edge}" for edge in system.links),
        "outer",
    }
    assert set(system.trainable_parameters()) <= changed(before, system)
    assert {role: agent.model.fingerprint() for role, agent in system.agents.items()} == prints
    assert not any(parameter.requires_grad for parameter in system.trainable_parameters().values())


@pytest.mark.parametrize("trained", ["outer", "inner+outer"])
def test_the_outer_stage_reports_what_moved(system: RecursiveSystem, tmp_path: Path, trained: str) -> None:
    settings = recipe(tmp_path)
    settings = settings.model_copy(update={"outer": settings.outer.model_copy(update={"trained": trained})})
    # Without validation, so that the last weights stay.
    material = Material(turns=samples, questions=questions_of)
    train(system, settings, material, stages=["inner", "alignment"])
    before = weights(system)
    report = train(system, settings, material, stages=["outer"])["outer"]
    links = set(system.links) | (set(system.agents) if trained == "inner+outer" else set())
    assert {name.split("/")[0] for name in changed(before, system)} == links
    assert {name for name, distance in report["moved"].items() if distance > 0} == links
    for name, link in system.all_links.items():
        names = [tensor for tensor, _ in link.named_parameters()]
        old = torch.cat([before[f"{name}/{tensor}"].flatten() for tensor in names])
        new = torch.cat([link.state_dict()[tensor].flatten() for tensor in names])
        assert report["moved"][name] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)
    assert report["unmoved_tensors"] == []
    assert {name: report[name] for name in ("questions", "steps", "best_step", "validation", "stopped")} == {
        "questions": 12,
        "steps": 4,
        "best_step": 4,
        "validation": {},
        "stopped": None,
    }


def test_tensors_that_do_not_move_are_named(system: RecursiveSystem, tmp_path: Path) -> None:
    outer = OuterSettings(num_train_steps=2, batch_size=2, anchor=0, num_rounds=1, num_validation=2)
    report = train(system, recipe(tmp_path, outer=outer), MATERIAL, stages=["outer"])["outer"]
    # In a single round nobody reads the solver; and without validation gains nothing else is taken back.
    expected = {name for name in system.trainable_parameters() if name.split("/")[0] in ("solver", "solver->planner")}
    if report["best_step"] == 0:
        expected = set(system.trainable_parameters())
    assert set(report["unmoved_tensors"]) == expected


@pytest.mark.parametrize(("stage", "moved"), [("inner", "agents"), ("alignment", "links"), ("outer", "all_links")])
def test_a_stage_that_is_left_out_keeps_its_links(
    system: RecursiveSystem, tmp_path: Path, stage: str, moved: str
) -> None:
    before = weights(system)
    material = Material(turns=samples, questions=questions_of)
    reports = train(system, recipe(tmp_path), material, stages=[stage])
    assert {name.split("/")[0] for name in changed(before, system)} == set(getattr(system, moved))
    assert {name.split()[0] for name in reports} == {stage}


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a training that nothing has stopped."""
    roles = dict(zip(("planner", "critic", "solver"), tiny_models.values(), strict=True))
    trained = RecursiveSystem.build(agents=roles, num_rounds=2, num_latent_steps=2, max_new_tokens=4)
    train(trained, recipe(tmp_path_factory.mktemp("whole")), MATERIAL)
    return weights(trained)


# Told 9 times of each of the first two stages, then: validation 0, validation 2, step 2, validation 4, step 4.
@pytest.mark.parametrize("stopped_at", [4, 14, 19, 21])
def test_a_stopped_training_goes_on_to_the_same_system(
    make_system: Callable[..., RecursiveSystem], whole: dict[str, Tensor], tmp_path: Path, stopped_at: int
) -> None:
    settings = recipe(tmp_path)
    told = [0]

    def stop(*progress: object) -> None:
        told[0] += 1
        if told[0] == stopped_at:
            raise KeyboardInterrupt

    stopped = small(make_system)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, settings, MATERIAL, run=RunDirectory(tmp_path, {}), progress=stop)
    resumed = small(make_system)
    train(resumed, settings, MATERIAL, run=RunDirectory(tmp_path, {}))
    assert not changed(whole, resumed)
    # And once more, when everything is done.
    again = small(make_system)
    train(again, settings, MATERIAL, run=RunDirectory(tmp_path, {}))
    assert not changed(whole, again)


def test_stages_can_be_trained_in_separate_runs(
    make_system: Callable[..., RecursiveSystem], whole: dict[str, Tensor], tmp_path: Path
) -> None:
    settings = recipe(tmp_path)
    for stages in (["inner"], ["alignment"], ["outer"]):
        apart = small(make_system)
        train(apart, settings, MATERIAL, stages=stages, run=RunDirectory(tmp_path, {}))
    assert not changed(whole, apart)
    # What was trained is brought back, whichever stage is named.
    for stages in (["inner"], ["alignment"]):
        apart = small(make_system)
        reports = train(apart, settings, MATERIAL, stages=stages, run=RunDirectory(tmp_path, {}))
        assert "outer" in reports
        assert not changed(whole, apart)


@pytest.mark.parametrize(
    ("first", "then"),
    [("outer", "inner"), ("outer", "alignment"), ("alignment", "inner"), ("outer", "inner,alignment")],
)
def test_a_stage_is_not_trained_below_one_that_was_built_on_it(
    make_system: Callable[..., RecursiveSystem], tmp_path: Path, first: str, then: str
) -> None:
    train(small(make_system), recipe(tmp_path), MATERIAL, stages=[first], run=RunDirectory(tmp_path, {}))
    before = weights(system := small(make_system))
    with pytest.raises(ConfigError, match=rf"stage {first} .* than the stage {then.split(',')[0]} would make now"):
        train(system, recipe(tmp_path), MATERIAL, stages=then.split(","), run=RunDirectory(tmp_path, {}))
    assert not changed(before, system)


# Questions


def question(id: str, text: str) -> Question:
    return Question(id=id, text=text, answer="yes")


def test_splits_that_share_a_question_are_refused() -> None:
    train_split = [question("t1", "Why?"), question("t2", "How?"), question("t3", "Why?")]
    apart = {"train": train_split, "validation": [question("v1", "Who?")], "test": [question("x1", "When?")]}
    check_disjoint(apart)
    check_disjoint({"train": train_split, "validation": [], "test": []})
    with pytest.raises(InputError, match="2 of 3 validation questions are train questions, too .* v2: 'How\\?'"):
        check_disjoint(
            {**apart, "validation": [question("v1", "Who?"), question("v2", "How?"), question("v3", "Why?")]}
        )
    with pytest.raises(InputError, match="1 of 1 test questions are validation questions, too .* x1: 'Who\\?'"):
        check_disjoint({**apart, "test": [question("x1", "Who?")]})


MISTAKES = {
    "overlap": ({}, {"validation": "train"}, InputError, "2 of 2 validation questions are train questions"),
    "test": ({}, {"test": "train"}, InputError, "test questions are train questions, too"),
    "link": (
        {"lr_ratios": {"plannr": 2.0}},
        {},
        ConfigError,
        "lr_ratios: unknown link 'plannr': did you mean 'planner'",
    ),
    "weights": ({"round_weights": (1.0,)}, {}, ConfigError, "round_weights has 1 weights for 2 rounds"),
    "posterior": ({"distillation": 0.5}, {"posterior": None}, ConfigError, "distillation needs a posterior .* train-0"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_of_the_outer_stage_are_found_before_anything_is_trained(
    system: RecursiveSystem, tmp_path: Path, mistake: str
) -> None:
    settings, splits, error, words = MISTAKES[mistake]

    def questions(split: str, number: int) -> list[Question]:
        found = questions_of(splits.get(split, split), number)
        return [replace(each, posterior={}) for each in found] if "posterior" in splits else found

    test = questions_of(splits["test"], 3) if "test" in splits else ()
    material = Material(turns=samples, questions=questions, score=score, test=test)
    before = weights(system)
    run = RunDirectory(tmp_path, {})
    outer = OuterSettings(num_train_steps=2, batch_size=2, num_validation=2, **settings)
    with pytest.raises(error, match=words):
        train(system, recipe(tmp_path, outer=outer), material, run=run)
    assert not changed(before, system)
    assert not any((tmp_path / "state").iterdir())
    # Whoever does not train the stage is not bothered.
    train(system, recipe(tmp_path, outer=outer), material, stages=["inner"], run=run)


def test_without_latent_steps_there_is_no_outer_loop(system: RecursiveSystem, tmp_path: Path) -> None:
    settings = recipe(tmp_path, num_latent_steps=0)
    with pytest.raises(ConfigError, match="num_latent_steps of 1 or more, got 3 edges and 0 latent steps"):
        train(starting_system(system, settings), settings, MATERIAL, stages=["outer"])


def test_a_changed_model_is_noticed(system: RecursiveSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint, calls = LanguageModel.fingerprint, [0]

    def meddled(self: LanguageModel) -> str:
        calls[0] += 1
        return fingerprint(self) + ("" if calls[0] < 5 else "!")

    monkeypatch.setattr(LanguageModel, "fingerprint", meddled)
    with pytest.raises(AssertionError, match="the frozen model of the critic changed"):
        train(system, recipe(tmp_path), MATERIAL, stages=["inner"])


def test_links_are_drawn_anew_as_the_recipe_says(system: RecursiveSystem, tmp_path: Path) -> None:
    settings = recipe(
        tmp_path,
        num_rounds=5,
        num_latent_steps=7,
        message="outer",
        max_new_tokens=9,
        links={"design": "ln-res-2-layer", "bias": False},
    )
    drawn = starting_system(system, settings)
    assert {link.config.design for link in drawn.all_links.values()} == {"ln-res-2-layer"}
    assert {link.config.bias for link in drawn.all_links.values()} == {False}
    found = drawn.settings
    assert (found.num_rounds, found.num_latent_steps, found.message, found.max_new_tokens) == (5, 7, "outer", 9)
    assert drawn.agents["planner"].model is system.agents["planner"].model
    again, other = starting_system(system, settings), starting_system(system, recipe(tmp_path, seed=1))
    assert not changed(weights(drawn), again)
    assert not torch.equal(
        other.links["planner->critic"].w1.weight,
        starting_system(system, recipe(tmp_path)).links["planner->critic"].w1.weight,
    )


def test_given_links_are_kept(system: RecursiveSystem, tmp_path: Path) -> None:
    settings = recipe(tmp_path, links={"start": "given", "design": "1-layer"}, num_rounds=5)
    before = weights(system)
    found = starting_system(system, settings)
    assert not changed(before, found)
    assert found.all_links["planner"] is system.all_links["planner"]
    assert (found.settings.num_rounds, found.settings.num_latent_steps) == (5, 2)
    drawn = starting_system(system, recipe(tmp_path, num_rounds=5))
    assert drawn.all_links["planner"] is not system.all_links["planner"]


def test_turns_that_speak_are_not_thought_through(system: RecursiveSystem, tmp_path: Path) -> None:
    def with_answers(role: str, number: int) -> list[RoleSample]:
        spoken = [RoleSample(role=role, question="Why?", target="never", round=2, num_rounds=2)]
        return samples(role, number) + (spoken if role == "solver" else [])

    plain, mixed = (
        train(system, recipe(tmp_path), replace(MATERIAL, turns=given), stages=["inner"])
        for given in (samples, with_answers)
    )
    assert mixed["inner solver"]["pairs"] == plain["inner solver"]["pairs"]


def test_a_role_without_turns_to_train_on_is_refused(system: RecursiveSystem, tmp_path: Path) -> None:
    def only_answers(role: str, number: int) -> list[RoleSample]:
        return [RoleSample(role=role, question="Why?", target="x", round=1, num_rounds=1)]

    with pytest.raises(InputError, match="solver"):
        train(system, recipe(tmp_path), replace(MATERIAL, turns=only_answers), stages=["inner"])


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("all", ("inner", "alignment", "outer")),
        ("outer, inner", ("inner", "outer")),
        ("alignment, inner", ("inner", "alignment")),
        ("inner", ("inner",)),
        ("outer", ("outer",)),
    ],
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
