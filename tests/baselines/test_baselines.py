"""Baselines: what is trained and what is not, adapters against their merged form, resume, what comes out, bad input."""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.baselines.conftest import ROLES
from tests.conftest import make_model
from torch import Tensor
from torch.nn import functional

from recursivemas.baselines import check_method, generalist, train_baseline
from recursivemas.baselines.finetuning import finetune, mean_loss, num_written, summed_loss
from recursivemas.baselines.lora import Adapters
from recursivemas.baselines.methods import Trained, _as_answers, _held_out
from recursivemas.checkpoint import find_system
from recursivemas.errors import ConfigError, InputError
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.cost import CostMeter
from recursivemas.training.data import EncodedTurn, Question, RoleSample
from recursivemas.training.loop import RunDirectory
from recursivemas.training.methods import FineTuning, LoraSettings
from recursivemas.training.recipe import Recipe
from recursivemas.worlds import load_world, ward

SPEED = {
    "num_train_steps": 6,
    "batch_size": 8,
    "micro_batch_size": None,
    "lr": 1e-2,
    "warmup_steps": 1,
    "validate_every": 3,
    "log_every": 1,
    "save_every": 2,
}
FAST = {name: dict(SPEED) for name in ("lora", "full", "text", "generalist")}


def recipe_in(place: Path, **settings: object) -> Recipe:
    return Recipe.model_validate(
        {
            "system": str(place / "system"),
            "data": str(place / "rows.jsonl"),
            "output": "runs/unused",
            "method": FAST,
            **settings,
        }
    )


@pytest.fixture
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents of the ward whose pretraining takes few turns at a time."""
    recipes = {role: replace(each, batch_size=2) for role, each in ward.AGENT_RECIPES.items()}
    monkeypatch.setattr(ward, "AGENT_RECIPES", recipes)


def in_world(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "system": "ward",
            "world": {"name": "ward"},
            "output": str(tmp_path),
            "inner": {"num_samples": 20},
            "outer": {"num_samples": 30, "num_validation": 4},
            "method": {
                **FAST,
                "generalist": {**SPEED, "pretraining": {"num_train_steps": 4, "log_every": 1, "save_every": 2}},
            },
        }
    )


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def logits_of(model: LanguageModel) -> Tensor:
    return model.logits(model.states(torch.tensor([[5, 7, 11, 13, 17, 19]])))


def fingerprints(made: Trained) -> dict[str, str]:
    return {role: agent.model.fingerprint() for role, agent in made.system.agents.items()}


# Adapters


def disturbed(model: LanguageModel) -> Adapters:
    adapters = Adapters(model, LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapters


def test_merged_adapters_give_the_logits_of_those_beside_the_weights() -> None:
    before = logits_of(make_model("qwen3"))
    adapters = disturbed(make_model("qwen3"))
    beside = logits_of(adapters.model)
    merged = adapters.merge()
    assert not torch.allclose(before, beside, atol=0.1)
    torch.testing.assert_close(logits_of(merged), beside, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.network.named_parameters())
    assert merged.num_parameters == make_model("qwen3").num_parameters


def test_new_adapters_change_nothing_and_leave_the_weights_alone() -> None:
    model = make_model("llama")
    before = dict(model.network.state_dict())
    untouched = {name: weight.clone() for name, weight in before.items()}
    expected = logits_of(model)
    adapters = Adapters(model, LoraSettings(rank=2))
    torch.testing.assert_close(logits_of(model), expected)
    # Two matrices of rank 2 for each of seven linear layers in two blocks.
    assert len(adapters.parameters) == 2 * 7 * 2
    turns = [EncodedTurn([5, 6, 7], [8, 9], "")]
    finetune("few steps", model, adapters.parameters, turns, FineTuning(num_train_steps=3, lr=1e-2, warmup_steps=0))
    assert not torch.allclose(logits_of(model), expected, atol=1e-2)
    assert all(torch.equal(before[name], untouched[name]) for name in before)


def test_adapters_go_where_they_are_told() -> None:
    adapters = Adapters(make_model("qwen2"), LoraSettings(target_modules=("q_proj", "v_proj")))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters.parameters} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="no linear layer 'query'.*q_proj"):
        Adapters(make_model("qwen2"), LoraSettings(target_modules=("query",)))


# The loss


def test_the_loss_is_that_of_every_token_of_a_reply() -> None:
    model = make_model("qwen2")
    turns = [
        EncodedTurn([5, 6, 7], [8, 9], ""),
        EncodedTurn([5], [10, 11, 12, 13], ""),
        EncodedTurn([9, 9, 9, 9], [14], "", is_cut=True),
    ]
    expected = torch.zeros(())
    for turn in turns:
        reply = turn.target_ids if turn.is_cut else [*turn.target_ids, model.reply_end_id]
        logits = model.logits(model.states(torch.tensor([[*turn.prompt_ids, *reply]])))[0]
        places = range(len(turn.prompt_ids) - 1, len(turn.prompt_ids) + len(reply) - 1)
        expected += functional.cross_entropy(logits[list(places)], torch.tensor(reply), reduction="sum")
    torch.testing.assert_close(summed_loss(model, turns), expected)
    assert num_written(turns) == 3 + 5 + 1
    assert mean_loss(model, turns) == pytest.approx(expected.item() / 9, rel=1e-5)


# What is trained


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_agent_is_trained_and_nothing_else(place: Path, method: str) -> None:
    before = files_of(place)
    base = RecursiveSystem.from_pretrained(place / "system").agents["solver"].model
    made = train_baseline(method, recipe_in(place))
    assert list(made.system.agents) == ["solver"]
    assert made.system.links == {}
    tuned = made.system.agents["solver"].model
    assert tuned.fingerprint() != base.fingerprint()
    changed = {
        name
        for name, weight in tuned.network.state_dict().items()
        if not torch.equal(weight, base.network.state_dict()[name])
    }
    linear = {name for name in changed if "_proj.weight" in name}
    assert len(linear) == 14
    # Adapters leave embeddings and norms as they are; full fine-tuning does not.
    assert (changed == linear) == (method == "lora")
    assert files_of(place) == before
    assert made.trained_parameters["solver"] == (tuned.num_parameters if method == "full" else 8 * (2 * SUM_OF_WIDTHS))


# Inputs and outputs of the seven linear layers of a block: q, o; k, v; gate, up, down.
SUM_OF_WIDTHS = 2 * (56 + 56) + 2 * (56 + 28) + 3 * (56 + 96)


def test_what_is_learnt_is_answered(place: Path, tmp_path: Path) -> None:
    settings = {**SPEED, "num_train_steps": 60, "batch_size": 16, "validate_every": 60}
    data = {"outer": str(place / "rows.jsonl"), "score": "exact"}
    made = train_baseline("full", recipe_in(place, data=data, method={"full": settings}))
    assert made.report["validation"]["0"] == 0
    made.system.save_pretrained(tmp_path / "solo")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "solo")
    texts = {result.text for result in loaded.run(["Who runs 3 miles?", "Who runs 200 miles?"])}
    assert texts <= {"The fox.", "The dog.", "The critic."}
    assert loaded.solo().run("Who runs 3 miles?").text == loaded.run("Who runs 3 miles?").text


@pytest.mark.parametrize("adapters", [False, True])
def test_every_agent_of_a_text_system_is_trained_by_itself(place: Path, adapters: bool) -> None:
    before = files_of(place)
    base = RecursiveSystem.from_pretrained(place / "system")
    made = train_baseline("text", recipe_in(place, method={**FAST, "text": {**SPEED, "adapters": adapters}}))
    assert made.system.settings.channel == "text"
    for role, agent in made.system.agents.items():
        assert agent.model.fingerprint() != base.agents[role].model.fingerprint()
        full = base.agents[role].model.num_parameters
        assert made.trained_parameters[role] == full or (adapters and made.trained_parameters[role] < full / 2)
    assert files_of(place) == before


def test_roles_that_share_a_model_part_when_they_are_trained(place: Path, tmp_path: Path) -> None:
    shared = make_model("llama")
    shared.save_pretrained(tmp_path / "model")
    agents = dict.fromkeys(ROLES, str(tmp_path / "model"))
    once = {"text": {**SPEED, "num_train_steps": 1}}
    short = {"max_new_tokens": 6, "num_rounds": 2}
    made = train_baseline("text", recipe_in(place, system=None, agents=agents, method=once, **short))
    assert len(set(fingerprints(made).values())) == 3
    assert made.total_parameters == 3 * shared.num_parameters


def test_the_answering_role_learns_to_answer_and_not_only_to_take_notes(place: Path) -> None:
    made = train_baseline("text", recipe_in(place, method={"text": {**SPEED, "num_train_steps": 1}}))
    # Of a row of the file the planner has two turns, one a round; so has the solver, who in the last one answers.
    assert made.report["solver"]["turns"] == made.report["planner"]["turns"]
    heard = {"critic": "It is the fox."}
    notes = [RoleSample(role="solver", question=each, target="A note.", num_rounds=2, messages=heard) for each in "ab"]
    [answer] = _as_answers(notes, [Question(id="1", text="a", answer="The fox.")])
    assert (answer.target, answer.round, answer.num_rounds, answer.messages) == ("The fox.", 1, 1, heard)


def test_agents_are_judged_by_questions_that_they_do_not_learn_from() -> None:
    samples = [
        RoleSample(role="critic", question=f"Question {number}?", target="x", variant=variant)
        for variant in ("short", "graded")
        for number in range(40)
    ]
    learnt, held_out = _held_out(samples, 4)
    assert not {each.question for each in learnt} & {each.question for each in held_out}
    assert len(learnt) == 2 * 36
    assert {each.variant for each in held_out} == {"short", "graded"}
    assert len(held_out) == 4
    assert _held_out(samples[:5], 4) == (samples[:5], [])


def test_text_is_trained_in_every_wording_and_keeps_the_best(tmp_path: Path) -> None:
    made = train_baseline("text", in_world(tmp_path))
    scores = made.report["validation"]
    assert set(scores) == {"short", "graded"}
    assert made.system.settings.variant == max(scores, key=scores.get)
    one = train_baseline("text", in_world(tmp_path).model_copy(update={"variant": "short"}))
    assert set(one.report["validation"]) == {"short"}


# The generalist


@pytest.mark.usefixtures("few_turns")
def test_the_generalist_has_about_the_size_of_the_whole_system(tmp_path: Path) -> None:
    before = files_of(find_system("ward"))
    made = train_baseline("generalist", in_world(tmp_path))
    base = RecursiveSystem.from_pretrained("ward")
    whole = sum(agent.model.num_parameters for agent in base.agents.values())
    whole += sum(each.numel() for each in base.trainable_parameters().values())
    assert made.total_parameters == pytest.approx(whole, rel=0.06)
    assert files_of(find_system("ward")) == before
    assert made.report["turns"] == 3 * 20 + 30


def test_the_generalist_reads_what_all_agents_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = load_world("ward")
    asked: list[tuple[str, int]] = []
    pretraining_batch = world.pretraining_batch

    def listen(role: str, rng: object, size: int) -> list:
        asked.append((role, size))
        return pretraining_batch(role, rng, 2)

    monkeypatch.setattr(world, "pretraining_batch", listen)
    model = generalist.new_model(world, "solver", 0)
    settings = generalist.default_pretraining(world)
    generalist.pretrain(model, world, settings.model_copy(update={"num_train_steps": 2}))
    assert asked == 2 * [(role, 64) for role in world.roles]
    turns = sum(each.num_train_steps * each.batch_size for each in world.agent_recipes.values())
    assert settings.num_train_steps * 3 * 64 == pytest.approx(turns, rel=0.01)


# Resume


@pytest.mark.parametrize(("method", "stop"), [("lora", 6), ("full", 4), ("text", 14)])
def test_a_stopped_run_ends_as_if_it_had_not_been(place: Path, tmp_path: Path, method: str, stop: int) -> None:
    recipe = recipe_in(place)
    whole = train_baseline(method, recipe, run=RunDirectory(tmp_path / "whole", {}))
    _assert_resumes(lambda **options: train_baseline(method, recipe, **options), tmp_path, whole, stop)


@pytest.mark.usefixtures("few_turns")
def test_a_stopped_generalist_too(tmp_path: Path) -> None:
    recipe = in_world(tmp_path)
    whole = train_baseline("generalist", recipe, run=RunDirectory(tmp_path / "whole", {}))
    _assert_resumes(lambda **options: train_baseline("generalist", recipe, **options), tmp_path, whole, stop=3)


def _assert_resumes(train: Callable[..., Trained], tmp_path: Path, whole: Trained, stop: int) -> None:
    calls = itertools.count(1)

    def interrupt(*_: object) -> None:
        if next(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run=RunDirectory(tmp_path / "stopped", {}), progress=interrupt)
    assert list((tmp_path / "stopped" / "state").glob("*/manifest.json"))  # something was kept to go on from
    resumed = train(run=RunDirectory(tmp_path / "stopped", {}))
    assert fingerprints(resumed) == fingerprints(whole)
    assert resumed.report == whole.report


# Cost


def test_positions_and_arithmetic_are_those_of_what_was_done() -> None:
    model = make_model("llama")
    meter = CostMeter("full")
    meter.count(model)
    meter.count(model)
    table = model.network.get_input_embeddings().weight.numel()
    body = model.num_parameters - table
    head = model.network.get_output_embeddings().weight.numel()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with meter.running():
        with torch.no_grad():
            model.states(ids)
        assert meter.cost.flops == 2 * 8 * _body(model, body, head)
        model.network.requires_grad_(True)
        model.logits(model.states(ids)[:, -1])
        model.network.requires_grad_(False)
    size = _body(model, body, head)
    assert meter.cost.flops == 2 * 8 * size + 6 * 8 * size + 6 * 2 * head
    assert (meter.cost.positions_without_gradient, meter.cost.positions_with_gradient) == (8, 8)
    model.states(ids)
    assert meter.cost.positions_without_gradient == 8  # nothing is counted afterwards


def _body(model: LanguageModel, body: int, head: int) -> int:
    tied = model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    return body if tied else body - head


def test_a_resumed_run_has_cost_what_all_its_parts_have(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    first = CostMeter("lora", file)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt  # as Ctrl-C does, also where the shell that started the tests ignores it

    progress = first.watch(interrupt)
    with pytest.raises(KeyboardInterrupt), first.running():
        progress("lora", 1, 2, {})
    assert json.loads(file.read_text())["finished"] is False
    first.cost.flops, first.cost.seconds = 1e9, 1800.0
    first.settle({"solver": 10}, 100)
    second = CostMeter("lora", file, resumes=True, price_per_hour=3.0)
    with second.running():
        pass
    cost = json.loads(file.read_text())
    assert cost["finished"] is True
    assert cost["flops"] == 1e9
    assert cost["price"] == pytest.approx(1.5, rel=1e-3)
    assert CostMeter("lora", file).cost.seconds == 0


def test_an_impossible_price_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        CostMeter("links", price_per_hour=-1.0)


# Bad input


def test_without_peft_the_error_names_the_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for recipe in (recipe_in(place), recipe_in(place, method={"text": {"adapters": True}})):
        with pytest.raises(ConfigError, match=r"pip install 'recursivemas\[baselines\]'"):
            check_method("lora" if recipe.method.text.adapters is False else "text", recipe)
    check_method("full", recipe_in(place))


@pytest.mark.parametrize("method", ["text", "generalist"])
def test_a_method_that_needs_turns_says_which_are_missing(place: Path, tmp_path: Path, method: str) -> None:
    rows = [{"question": f"What is {number}?", "answer": str(number)} for number in range(60)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"generalist": {**SPEED, "model": str(place / "system" / "agents" / "solver")}}
    bare = recipe_in(place, data=str(tmp_path / "bare.jsonl"), method=FAST | model)
    with pytest.raises(InputError, match="trained on what every role should write.*planner"):
        train_baseline(method, bare)
    assert train_baseline("full", bare).report["steps"] == 6


def test_a_generalist_outside_a_world_has_to_be_named(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.generalist\.model"):
        check_method("generalist", recipe_in(place))


def test_an_unknown_method_is_refused_with_the_nearest(place: Path) -> None:
    with pytest.raises(ConfigError, match="'lore'.*did you mean 'lora'"):
        check_method("lore", recipe_in(place))
