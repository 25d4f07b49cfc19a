"""Planted faults are told by name, with figures and advice; healthy trainings are told nothing."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.conftest import FEW_WORDS

from recursivemas.cli import train as train_command
from recursivemas.errors import NumericsError
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training import watch
from recursivemas.training.data import Question
from recursivemas.training.gradients import Backflow
from recursivemas.training.loop import RunDirectory
from recursivemas.training.outer import OuterLoop, OuterSettings, train_outer
from recursivemas.training.processes import Processes
from recursivemas.training.recipe import Material, Recipe
from recursivemas.training.recipe import train as train_by_recipe
from recursivemas.training.watch import Finding, Outputs, Watch, find_leak

MakeSystem = Callable[..., RecursiveSystem]

WORDS = ("river", "fox", "dog", "plan", "critic", "bank", "dawn", "planner", "solver", "question", "jumps", "lazy")
QUESTIONS = [
    Question(
        id=f"q-{number}",
        text=f"What is the {word} of the {WORDS[number - 5]}?",
        answer=WORDS[(5 * number) % len(WORDS)],
        targets={"planner": f"look at the {word}", "critic": f"no, the {WORDS[number - 1]}"},
    )
    for number, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The faults that benchmarks/planted_training.py plants."""
    file = Path(__file__).parents[2] / "benchmarks" / "planted_training.py"
    spec = importlib.util.spec_from_file_location("planted_training", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def system(make_system: MakeSystem) -> RecursiveSystem:
    return make_system(prompts=FEW_WORDS, num_latent_steps=2, link_options={"bias": True})


def settings(**changes: Any) -> OuterSettings:
    common = {"num_train_steps": 6, "batch_size": 4, "anchor": 0.0, "warmup_steps": 0, "log_every": 6}
    return OuterSettings(**{**common, "clip_messages": 1.0, "num_validation": 2, **changes})


def train(system: RecursiveSystem, path: Path, **changes: Any) -> list[Finding]:
    """What is told in a short training; the same must be in its log."""
    told: list[Finding] = []
    train_outer(system, QUESTIONS, settings(**changes), run=RunDirectory(path, {}), warn=told.append)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record["warning"] for record in records if "warning" in record] == [str(each) for each in told]
    assert [record["step"] for record in records if "warning" in record] == [each.step for each in told]
    assert len({(each.cause, each.place) for each in told}) == len(told)
    return told


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"round_weights": "last", "clip_messages": None, "micro_batch_size": 3},
        {"trained": "outer", "recompute": True},
        {"latent_source": "teacher"},
        {"latent_source": "targets", "trained": "outer"},
        {"curriculum": ({"num_rounds": 1, "num_train_steps": 3},)},
    ],
)
@pytest.mark.parametrize("seed", [1])
def test_a_healthy_training_is_told_nothing(
    make_system: MakeSystem, tmp_path: Path, changes: dict[str, Any], seed: int
) -> None:
    assert train(make_system(prompts=FEW_WORDS, num_latent_steps=2, seed=seed), tmp_path, **changes) == []


@pytest.mark.parametrize(
    ("fault", "place", "cause", "where", "words"),
    [
        (
            "DetachedRound",
            "round 1",
            "DETACHED",
            "solver->planner",
            "the gradient ends before solver->planner in round 1",
        ),
        ("DetachedEdge", "planner->critic", "DETACHED", "planner->critic", "ends before planner->critic in round 2"),
        (
            "Frozen",
            "planner->critic",
            "UNMOVED",
            "planner->critic",
            "planner->critic has not moved in 5 updates: its we",
        ),
        (
            "Frozen",
            "critic",
            "UNMOVED",
            "critic",
            r"its weights take no gradient \(frozen\)\. Usual: every tensor moves",
        ),
        (
            "Rounded",
            "solver->planner",
            "ROUNDED",
            "solver->planner",
            "100% of the weights of solver->planner that have",
        ),
        ("Loud", "critic->solver", "LOUD", "critic->solver", "what comes out of critic->solver is .* times as loud as"),
        ("Loud", "planner", "LOUD", "planner", "what comes out of planner is .* times as loud"),
        (
            "Collapsed",
            "planner->critic",
            "COLLAPSED",
            "planner->critic",
            "outputs of planner->critic differ between que",
        ),
    ],
)
def test_a_planted_fault_is_told(
    system: RecursiveSystem,
    benchmark: ModuleType,
    tmp_path: Path,
    fault: str,
    place: str,
    cause: str,
    where: str,
    words: str,
) -> None:
    plant = getattr(benchmark, fault)(system, place)
    with benchmark.planted(system, plant):
        told = train(system, tmp_path)
    found = [each for each in told if each.cause == getattr(watch, cause)]
    assert found, told
    assert where in found[0].place
    assert [each for each in found if re.search(words, str(each))], found
    assert f"What to do: {watch.ADVICE[found[0].cause]}" in str(found[0])
    # What follows from it may be told as well; nothing that has nothing to do with it.
    follows = {"COLLAPSED": {watch.DETACHED}, "LOUD": {watch.COLLAPSED}, "DETACHED": {watch.UNMOVED}}
    assert {each.cause for each in told} <= {found[0].cause} | follows.get(cause, set())


def test_a_loss_that_depends_on_no_link_stops_the_training(
    system: RecursiveSystem, benchmark: ModuleType, tmp_path: Path
) -> None:
    words = (
        r"outer, step 1: the loss depends on no link\. no gradient: the gradient ends before critic->solver in round 2"
    )
    plant = benchmark.DetachedEdge(system, "critic->solver")
    with benchmark.planted(system, plant), pytest.raises(NumericsError, match=words):
        train(system, tmp_path)


def test_a_learning_rate_of_0_is_told(system: RecursiveSystem, tmp_path: Path) -> None:
    [told] = train(system, tmp_path, lr_ratios={"critic->solver": 0.0})
    assert (told.cause, told.place) == (watch.UNMOVED, "critic->solver")
    assert "critic->solver has not moved in 5 updates: its share of the learning rate is 0." in str(told)


def test_an_optimizer_that_passes_a_tensor_over_is_told(system: RecursiveSystem) -> None:
    """And numbers that half precision can write, though nothing has moved, are pointed out."""
    links = {"planner->critic": system.links["planner->critic"]}
    looking = Watch(system, links)
    for parameter in links["planner->critic"].parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        links["planner->critic"].w1.weight += 1e-3
    for _ in range(watch.MIN_UPDATES + 1):
        assert looking.look(0, []) == []
        looking.follow([])
    [told] = looking.look(5, [])
    assert told.place == "planner->critic/w1.bias, w2.weight, w2.bias, w3.weight, w3.bias"
    assert told.seen.endswith("though it has a gradient: the optimizer passes it over, or its learning rate is 0")
    rounded = Watch(system, links)
    with torch.no_grad():
        for parameter in links["planner->critic"].parameters():
            parameter.copy_(parameter.bfloat16())
    rounded = Watch(system, links)
    for _ in range(watch.MIN_UPDATES + 1):
        rounded.follow([])
    [told] = rounded.look(5, [])
    assert "half precision can write all its numbers, where small updates get lost" in told.seen
    for parameter in links["planner->critic"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    again = Watch(system, links)
    for _ in range(watch.MIN_UPDATES + 1):
        again.follow([])
    assert again.look(5, [])[0].seen.endswith("updates: its gradient is 0")


def test_one_outlier_among_the_samples_is_told(system: RecursiveSystem, benchmark: ModuleType, tmp_path: Path) -> None:
    """It comes once, in a step whose figures are not logged."""
    with benchmark.planted(system, benchmark.Outlier(system, "")):
        told = train(system, tmp_path, num_train_steps=9, batch_size=8, log_every=9)
    [found] = [each for each in told if each.cause == watch.OUTLIER]
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(len(QUESTIONS), (8,), generator=generator).tolist()
    assert found.place in {f"q-{row}" for row in batch}
    assert f"the gradient of {found.place} is " in str(found)
    assert found.step == 9


def test_gaps_below_the_largest_gradients(system: RecursiveSystem) -> None:
    looking = Watch(system, {})

    def ratio(*batches: dict[str, float]) -> tuple[float, list[str]]:
        for batch in batches:
            backflow = Backflow({})
            backflow.last = torch.tensor(list(batch.values()))
            looking.follow([(list(batch), backflow)])
        return looking._outlier_ratio()

    assert ratio() == (1.0, [])
    assert ratio({"a": 1.0}) == (1.0, [])
    assert ratio({"b": 2.0, "c": 8.0}) == (4.0, ["c"])
    # Drawn again, it is no other sample.
    assert ratio({"c": 10.0}, {"c": 9.0}, {"a": 0.5}) == (5.0, ["c"])
    # Two that stand out together do not hide each other.
    assert ratio({"d": 12.0, "e": 1.0}) == (5.0, ["d", "c"])


# What comes out of links


def test_figures_of_outputs_by_hand(tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models["qwen3"]
    outputs = Outputs("critic", model, model)
    assert outputs.figures() == {}
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 3, model.hidden_size, generator=generator)
    outputs.add(inputs[:8], 2 * inputs[:8])
    loudness = 2 * inputs[:8].norm(dim=-1).mean().item() / model.mean_embedding_norm
    assert outputs.figures() == {"loudness": pytest.approx(loudness)}  # of too few to compare them
    outputs.add(inputs[8:], 2 * inputs[8:])
    found = outputs.figures()
    assert found["spread"] == pytest.approx(1.0, rel=0.1)
    assert found["directions"] == pytest.approx(1.0, rel=0.2)
    outputs.forget()
    assert outputs.figures() == {}
    # Of a step of a thought only its size counts.
    outputs.add(inputs[:, 0], inputs[:, 0])
    assert set(outputs.figures()) == {"loudness"}


@pytest.mark.parametrize("kind", ["constant", "a place in the message alone", "a line"])
def test_outputs_that_have_collapsed(tiny_models: dict[str, LanguageModel], kind: str) -> None:
    model = tiny_models["llama"]
    outputs = Outputs("critic", model, model)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 3, model.hidden_size, generator=generator)
    direction = torch.randn(model.hidden_size, generator=generator)
    made = {
        "constant": direction.expand_as(inputs),
        "a place in the message alone": inputs[:1].expand_as(inputs),
        "a line": inputs[..., :1] * direction,
    }
    outputs.add(inputs, made[kind])
    found = outputs.figures()
    figure = "directions" if kind == "a line" else "spread"
    assert found[figure] < watch.LIMITS[figure].value
    assert found["loudness"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_half_precision_can_write(dtype: torch.dtype) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    assert watch._half_share(numbers) < 0.01
    assert watch._half_share(numbers.to(dtype).float()) == 1.0
    assert watch._half_share(torch.zeros(5)) == 0.0


def test_links_in_half_precision_are_told(system: RecursiveSystem) -> None:
    link = system.links["critic->solver"]
    looking = Watch(system, {"critic->solver": link})
    link.bfloat16()
    with torch.no_grad():
        for parameter in link.parameters():
            parameter += 1
    for _ in range(watch.MIN_UPDATES + 1):
        looking.follow([])
    [told] = looking.look(3, [])
    assert (told.cause, told.seen) == (watch.ROUNDED, "weights of critic->solver are in bfloat16")


# The gold answer


ROUNDS = (1, 2)


def leak_of(system: RecursiveSystem, questions: list[Question] | None = None, **changes: Any) -> Finding | None:
    loop = OuterLoop(system, questions or QUESTIONS, settings(**changes))
    found = loop.find_leak((questions or QUESTIONS)[:4])
    return found[0] if found else None


@pytest.mark.parametrize("source", ["rollout", "teacher", "targets"])
@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_that_is_read_depends_on_the_answer(system: RecursiveSystem, source: str, recompute: bool) -> None:
    assert leak_of(system, latent_source=source, recompute=recompute) is None


def test_the_answer_leak_is_found(system: RecursiveSystem, tmp_path: Path) -> None:
    """From the feedback of the first round on, and in no reading before it."""
    found = leak_of(system, latent_source="targets", leak_answer=True)
    assert found is not None
    assert found.cause == watch.LEAK
    assert found.place == "planner in round 2, critic in round 2, solver in round 2"
    assert leak_of(system, latent_source="targets", leak_answer=True, num_rounds=1) is None
    told = train(system, tmp_path, latent_source="targets", leak_answer=True, trained="outer", num_train_steps=1)
    assert [(each.cause, each.step) for each in told] == [(watch.LEAK, 1)]
    assert "set outer.leak_answer: false" in str(told[0])


@pytest.mark.parametrize("source", ["rollout", "teacher", "targets"])
def test_other_ways_of_telling_the_answer_are_found(system: RecursiveSystem, source: str) -> None:
    """By a target that is the answer, or by whatever else hands it to an agent in training."""
    given = [replace(each, targets={**each.targets, "critic": each.answer}) for each in QUESTIONS]
    found = leak_of(system, given, latent_source=source)
    assert (found is not None) == (source == "targets")
    if found is not None:
        assert found.place.startswith("solver in round 1, planner in round 2")

    class Telling(OuterLoop):
        def unroll(self, batch: Any, rounds: Any, judge: Any = None) -> Iterator[Any]:
            told = [replace(each, text=f"{each.text} ({each.answer})") for each in batch]
            return super().unroll(told, rounds, judge)

    [found] = Telling(system, QUESTIONS, settings(latent_source=source)).find_leak(QUESTIONS[:4])
    assert found.place.startswith("planner in round 1, critic in round 1, solver in round 1")


def test_what_is_never_the_same_twice_is_no_leak(system: RecursiveSystem) -> None:
    """On some devices two runs differ in the last bits; a leak differs by more."""
    noise = torch.Generator().manual_seed(1)

    def play(leak: bool) -> Callable[[Any], Iterator[Any]]:
        def turns(batch: Any) -> Iterator[Any]:
            for played in OuterLoop(system, QUESTIONS, settings(latent_source="targets", leak_answer=leak)).unroll(
                batch, ROUNDS
            ):
                state = played.reading.state
                shaken = state * (1 + 1e-5 * torch.randn(state.shape, generator=noise))
                yield replace(played, reading=replace(played.reading, state=shaken))

        return turns

    assert find_leak(play(False), QUESTIONS[:4]) is None
    assert find_leak(play(True), QUESTIONS[:4]) is not None


def test_one_answer_to_all_questions_cannot_be_told_apart(system: RecursiveSystem) -> None:
    same = [replace(each, answer="fox") for each in QUESTIONS[:3]]
    leaking = {"latent_source": "targets", "leak_answer": True}
    assert OuterLoop(system, same, settings(**leaking)).find_leak(same) == []
    # Another answer is taken from the other questions of the training.
    assert len(OuterLoop(system, QUESTIONS, settings(**leaking)).find_leak(same)) == 1


# Several processes


class Together(Processes):
    """The first of two processes; the other one has found the same, and something else."""

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [value, [*value, Finding(watch.OUTLIER, "q-77", "seen", "usual", 1)]]
        return [value]


def test_what_another_process_finds_is_told(system: RecursiveSystem) -> None:
    told: list[Finding] = []
    looking = Watch(system, system.all_links)
    chosen = settings(lr_ratios={})
    loop = OuterLoop(system, QUESTIONS, chosen, processes=Together(0, 1), watch=looking, warn=told.append)
    for parameter in system.trainable_parameters().values():
        parameter.requires_grad_(True)
    for part in loop.losses(0):
        part.backward()
    loop.observe(0)
    assert [each.place for each in told] == ["q-77"]


def test_gradients_are_expected_where_something_was_sent(system: RecursiveSystem) -> None:
    backflow = Backflow({"planner": system.agents["planner"].inner_link, **system.links})
    loop = OuterLoop(system, QUESTIONS, settings())
    for parameter in system.trainable_parameters().values():
        parameter.requires_grad_(True)
    losses = loop.losses_by_round(QUESTIONS[:3], {1: 0.5, 2: 0.5}, backflow)
    assert set(backflow.expected) == {
        *((edge, round) for edge in ("planner->critic", "critic->solver") for round in (1, 2)),
        *(("planner", round) for round in (1, 2)),
        ("solver->planner", 1),
    }
    assert backflow.reached() == set()
    assert backflow.last is None
    torch.stack(list(losses.values())).sum().backward()
    assert backflow.reached() == set(backflow.expected)
    assert torch.equal(backflow.last, backflow.before["critic->solver", 2])


# Where it is told


def test_warnings_reach_the_report_and_the_terminal(
    system: RecursiveSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = settings(latent_source="targets", leak_answer=True, trained="outer", num_train_steps=1)
    recipe = Recipe(system="ward", world={"name": "ward"}, output=str(tmp_path), outer=outer)
    material = Material(
        turns=lambda role, number: [],
        questions=lambda split, number: QUESTIONS[:8] if split == "train" else QUESTIONS[8:],
    )
    run = RunDirectory(tmp_path, {})
    report = train_by_recipe(system, recipe, material, stages=["outer"], run=run, warn=train_command._warn)["outer"]
    [said] = report["warnings"]
    assert said.startswith("answer leak: with another gold answer something else is read by: planner in round 2")
    assert " ".join(capsys.readouterr().err.split()) == f"warning: step 1: {said}"
    # A run that is done says again what it was warned of, and warns of nothing.
    again = train_by_recipe(
        system, recipe, material, stages=["outer"], run=RunDirectory(tmp_path, {}), warn=pytest.fail
    )
    assert again["outer"]["warnings"] == [said]
