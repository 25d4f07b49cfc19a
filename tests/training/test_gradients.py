"""What flows back: the gradient of every link from every round against differences, per sample, and clipped."""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from tests.conftest import FEW_WORDS
from torch import Tensor, nn

from recursivemas.errors import NumericsError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.gradients import Backflow, figures, say_samples, statistics

QUESTIONS = ["What is 2 + 2?", "A fox runs for two hours, and rests. How far did it run?", "Why?"]
ANSWERS = ["the river", "forty-two", "no"]
ROUNDS = 3


def in_double(model: LanguageModel) -> LanguageModel:
    """A copy that computes in float64 throughout (the norms of transformers go through float32 in any case)."""
    network = copy.deepcopy(model.network).double()
    for name, module in list(network.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            exact.weight = module.weight
            network.set_submodule(name, exact)
    return LanguageModel(network, model.tokenizer)


@pytest.fixture(scope="module")
def double_models(tiny_models: dict[str, LanguageModel]) -> dict[str, LanguageModel]:
    return {family: in_double(model) for family, model in tiny_models.items()}


def lively(system: RecursiveSystem, seed: int = 0) -> RecursiveSystem:
    """Links in which every tensor matters (the learned branch starts so small that W1 would do nothing), as loud as
    they were, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    for link in system.all_links.values():
        for tensor in link.parameters():
            spread = 0.3 / tensor.shape[-1] ** 0.5 if tensor.ndim == 2 else 0.03
            tensor.data += spread * torch.randn(tensor.shape, generator=generator)
    system.calibrate("A plan for the fox, and two answers.")
    for link in system.all_links.values():
        link.requires_grad_(True)
    return system


@pytest.fixture
def make_double(double_models: dict[str, LanguageModel]) -> Callable[..., RecursiveSystem]:
    def make(**options: object) -> RecursiveSystem:
        settings = {
            "prompts": FEW_WORDS,
            "num_rounds": ROUNDS,
            "num_latent_steps": 2,
            "link_options": {"bias": True},
            **options,
        }
        roles = dict(zip(("planner", "critic", "solver"), double_models.values(), strict=True))
        system = RecursiveSystem.build(agents=roles, **settings)
        for link in system.all_links.values():
            link.double()
        return lively(system)

    return make


def play(
    system: RecursiveSystem,
    backflow: Backflow | None = None,
    rows: Sequence[int] = (0, 1, 2),
    num_rounds: int = ROUNDS,
    answer_rounds: Sequence[int] = (1,),
    around: Callable[[int], None] = lambda round: None,
) -> Tensor:
    """The loss of some questions, summed over them and over two rounds; `around` is told the round of every turn."""
    turns = system.unroll([QUESTIONS[row] for row in rows], num_rounds=num_rounds, answer_rounds=answer_rounds)
    total = torch.zeros((), dtype=torch.float64)
    schedule = system.pattern.schedule(num_rounds, answer_rounds=answer_rounds)
    for turn in schedule:
        around(turn.round)
        played = next(turns)
        assert played.turn == turn
        if backflow is not None:
            backflow.watch(played)
        if turn.speaks:
            losses = played.agent.loss(played.reading, [ANSWERS[row] for row in rows])
            total = total + (2.0 if turn.round == num_rounds else 0.5) * losses.double().sum()
    around(0)
    assert next(turns, None) is None
    return total


def flow(system: RecursiveSystem, backflow: Backflow, rows: Sequence[int] = (0, 1, 2), **options: object) -> None:
    """A whole pass, forward and backward."""
    for link in system.all_links.values():
        link.zero_grad()
    with backflow.recording():
        loss = play(system, backflow, rows, **options)
    loss.backward()


def places(system: RecursiveSystem) -> list[tuple[str, int]]:
    """Every link with every round in which it is used: the answering role of the last round does not think."""
    every = [(name, round) for name in system.all_links for round in range(1, ROUNDS + 1)]
    return [place for place in every if place not in (("solver", ROUNDS), ("solver->planner", ROUNDS))]


def difference(
    system: RecursiveSystem,
    link: RecursiveLink,
    round: int,
    direction: dict[str, Tensor],
    *,
    step: float = 1e-4,
    **options: object,
) -> float:
    """Derivative of the loss when the weights of a link move along a direction, during the turns of one round only."""
    moved = 0.0

    @torch.no_grad()
    def move_to(place: float) -> None:
        nonlocal moved
        for name, tensor in link.named_parameters():
            tensor += (place - moved) * direction[name]
        moved = place

    def at(place: float) -> float:
        with torch.no_grad():
            return play(system, around=lambda now: move_to(place if now == round else 0.0), **options).item()

    found = (at(step) - at(-step)) / (2 * step)
    move_to(0.0)
    return found


def directions(link: RecursiveLink, seed: int) -> dict[str, Tensor]:
    """Each tensor moves by as much as it is long, so that none hides another."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in link.named_parameters()}
    return {name: drawn[name] * (p.norm() / drawn[name].norm()) for name, p in link.named_parameters()}


def product(gradient: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    return sum((gradient[name] * direction[name]).sum().item() for name in direction)


# Against differences


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"message": "outer"}, marks=pytest.mark.slow)], ids=["inner+outer", "outer"]
)
def test_the_gradient_of_every_link_from_every_round_is_the_difference(make_double: Callable, options: dict) -> None:
    """With a loss after the last round only: what comes from round 1 has gone through all the others."""
    system = make_double(**options)
    backflow = Backflow(system.all_links)
    flow(system, backflow, answer_rounds=())
    for seed, (name, round) in enumerate(places(system)):
        link = system.all_links[name]
        direction = directions(link, seed)
        expected = difference(system, link, round, direction, answer_rounds=())
        assert abs(expected) > 1e-8, f"{name}, round {round}: too small to be compared"
        # One in a hundred is what is asked for.
        assert product(backflow.gradient(name, round), direction) == pytest.approx(expected, rel=0.01), (name, round)


@pytest.mark.slow
def test_the_gradient_of_every_tensor_from_every_round_is_the_difference(make_double: Callable) -> None:
    """With a loss after the first round, too."""
    system = make_double()
    backflow = Backflow(system.all_links)
    flow(system, backflow)
    for seed, (name, round) in enumerate(places(system)):
        link = system.all_links[name]
        gradient = backflow.gradient(name, round)
        for tensor, part in directions(link, seed).items():
            alone = {other: part if other == tensor else torch.zeros_like(p) for other, p in link.named_parameters()}
            expected = difference(system, link, round, alone)
            assert abs(expected) > 5e-8, f"{name}/{tensor}, round {round}: too small to be compared"
            assert product(gradient, alone) == pytest.approx(expected, rel=0.002), (name, tensor, round)


def test_a_gradient_attributed_to_another_round_would_be_noticed(make_double: Callable) -> None:
    """The test of the test: rounds differ by far more than the differences allow."""
    system = make_double()
    backflow = Backflow(system.all_links)
    flow(system, backflow)
    for name in ("planner", "critic->solver", "solver->planner"):
        direction = directions(system.all_links[name], seed=3)
        values = [product(backflow.gradient(name, round), direction) for round in (1, 2)]
        assert values[0] != pytest.approx(values[1], rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"message": "outer"}, {"link_options": {}, "design": "ln-res-2-layer"}],
    ids=["inner+outer", "outer", "layer norms"],
)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_rounds_add_up_to_the_whole_gradient(make_double: Callable, options: dict, clip: float | None) -> None:
    system = make_double(**options)
    backflow = Backflow(system.all_links, clip=clip)
    flow(system, backflow)
    used = {place[0] for place in places(system)}
    for name, link in system.all_links.items():
        for tensor, parameter in link.named_parameters():
            total = sum(backflow.gradient(name, round)[tensor] for round in range(1, ROUNDS + 1))
            assert parameter.grad.norm() > 0
            torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12)
    assert used == set(system.all_links)


def test_a_place_that_was_not_used_has_no_gradient(make_double: Callable) -> None:
    system = make_double()
    backflow = Backflow(system.all_links)
    flow(system, backflow)
    assert sorted(backflow.of_links()) == sorted(places(system))
    for link, round in (("solver", ROUNDS), ("planner", 9)):
        found = backflow.gradient(link, round)
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
            name: tuple(tensor.shape) for name, tensor in system.all_links[link].named_parameters()
        }
        assert all(bool((tensor == 0).all()) and tensor.dtype == torch.float64 for tensor in found.values())
    assert sorted(backflow.of_links()) == sorted(places(system))


def test_links_that_are_not_trained_are_left_out(make_double: Callable) -> None:
    system = make_double()
    for agent in system.agents.values():
        agent.inner_link.requires_grad_(False)
    backflow = Backflow(system.links)
    flow(system, backflow)
    assert sorted(backflow.of_links()) == sorted(place for place in places(system) if "->" in place[0])
    whole = Backflow(system.all_links)
    for link in system.all_links.values():
        link.requires_grad_(True)
    flow(system, whole)
    for name, round in backflow.of_links():
        for tensor, found in backflow.gradient(name, round).items():
            torch.testing.assert_close(found, whole.gradient(name, round)[tensor], rtol=1e-9, atol=1e-12)


# Sample by sample


@pytest.mark.parametrize("clip", [None, 0.3])
def test_norms_of_samples_are_those_of_each_sample_alone(make_double: Callable, clip: float | None) -> None:
    system = make_double()
    together = Backflow(system.all_links, clip=clip)
    flow(system, together)
    norms = together.of_links()
    seen = set()
    for row in range(len(QUESTIONS)):
        alone = Backflow(system.all_links, clip=clip)
        flow(system, alone, rows=[row])
        for link, round in places(system):
            gradient = alone.gradient(link, round)
            norm = sum(tensor.square().sum() for tensor in gradient.values()).sqrt()
            assert norms[link, round].shape == (len(QUESTIONS),)
            torch.testing.assert_close(norms[link, round][row], norm, rtol=1e-7, atol=0)
            seen.add(round_to(norm))
        for place, norm in alone.before.items():
            torch.testing.assert_close(together.before[place][row], norm[0], rtol=1e-7, atol=0)
    assert len(seen) == len(QUESTIONS) * len(places(system))


def round_to(value: Tensor) -> str:
    return f"{value.item():.6e}"


def test_messages_are_watched_where_they_cross(make_double: Callable) -> None:
    system = make_double()
    backflow = Backflow(system.all_links)
    latents: dict[tuple[str, int], Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64)
    for played in system.unroll(QUESTIONS, num_rounds=ROUNDS):
        backflow.watch(played)
        latents.update({(edge, played.turn.round): message.latents for edge, message in played.messages.items()})
        if played.turn.speaks:
            loss = played.agent.loss(played.reading, ANSWERS).sum()
    for tensor in latents.values():
        tensor.retain_grad()
    loss.backward()
    assert set(backflow.before) == set(latents)
    assert len(latents) == 3 * ROUNDS - 1
    for place, tensor in latents.items():
        expected = torch.stack([row.norm() for row in tensor.grad])
        assert expected.min() > 0
        torch.testing.assert_close(backflow.before[place], expected, rtol=1e-9, atol=0)


# Clipping at messages


class Crossing:
    """Gradients at every message as they are after a Backflow has seen them."""

    def __init__(self, system: RecursiveSystem, clip: float | None, loud: float = 1.0) -> None:
        self.backflow = Backflow(system.all_links, clip=clip)
        self.after: dict[tuple[str, int], Tensor] = {}
        # A loud message has a small gradient: so gradients grow on their way back.
        system.links["critic->solver"].scale.mul_(loud)
        loss = torch.zeros((), dtype=torch.float64)
        with self.backflow.recording():
            for played in system.unroll(QUESTIONS, num_rounds=ROUNDS):
                self.backflow.watch(played)
                for edge, message in played.messages.items():
                    message.latents.register_hook(self.keep(edge, played.turn.round))
                if played.turn.speaks:
                    loss = played.agent.loss(played.reading, ANSWERS).sum()
        loss.backward()

    def keep(self, edge: str, round: int) -> Callable[[Tensor], None]:
        def seen(gradient: Tensor) -> None:
            self.after[edge, round] = gradient.clone()

        return seen

    def norms(self, place: tuple[str, int]) -> Tensor:
        return self.after[place].flatten(1).norm(dim=1)


LAST = ("critic->solver", ROUNDS)


@pytest.mark.parametrize(("clip", "loud"), [(1.0, 30.0), (3.0, 30.0), (0.05, 1.0)])
def test_no_sample_has_more_at_a_message_than_its_share(make_double: Callable, clip: float, loud: float) -> None:
    free, clipped = Crossing(make_double(), None, loud), Crossing(make_double(), clip, loud)
    bound = clip * free.norms(LAST)
    touched, kept = 0, 0
    for place in free.after:
        before, after = clipped.backflow.before[place], clipped.backflow.after[place]
        norms = clipped.norms(place)
        assert bool((norms <= bound * (1 + 1e-9)).all()), place
        torch.testing.assert_close(after, norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(after, torch.minimum(before, bound), rtol=1e-9, atol=0)
        above = before > bound * (1 + 1e-9)
        touched += int(above.sum())
        kept += int((~above).sum())
        assert bool((after[~above] == before[~above]).all()), place
    if clip >= 1:
        assert torch.equal(clipped.after[LAST], free.after[LAST])
    else:
        torch.testing.assert_close(clipped.after[LAST], clip * free.after[LAST])
    assert touched > 0
    assert kept > 0


def test_a_sample_that_is_not_clipped_anywhere_is_not_touched(make_double: Callable) -> None:
    free = Crossing(make_double(), None, 30.0)
    ratios = torch.stack([free.norms(place) / free.norms(LAST) for place in free.after]).amax(dim=0)
    low, high = ratios.min().item(), ratios.max().item()
    assert high > 1.02 * low
    clip = max(1.0, (low * high) ** 0.5)
    assert low < clip < high
    clipped = Crossing(make_double(), clip, 30.0)
    for place, gradient in free.after.items():
        for row, ratio in enumerate(ratios.tolist()):
            if ratio < clip:
                assert torch.equal(clipped.after[place][row], gradient[row])
    row = int(ratios.argmax())
    assert any(not torch.equal(clipped.after[place][row], free.after[place][row]) for place in free.after)


def test_clipping_scales_what_goes_on_and_keeps_its_direction(make_double: Callable) -> None:
    """By hand: what reaches the first message is scaled row by row, and its sender's link gets just that."""
    system = make_double()
    system.links["critic->solver"].scale.mul_(30.0)
    first, last = [played for played in system.unroll(QUESTIONS, num_rounds=1) if not played.turn.speaks]
    sent, heard = first.messages["planner->critic"].latents, last.messages["critic->solver"].latents
    *_, speaking = system.unroll(
        QUESTIONS,
        num_rounds=1,
        intervene=lambda message, edge, round: {"planner->critic": first, "critic->solver": last}[edge].messages[edge],
    )
    loss = speaking.agent.loss(speaking.reading, ANSWERS).sum()
    parameters = list(system.links["planner->critic"].parameters())
    at_last, at_first = torch.autograd.grad(loss, [heard, sent], retain_graph=True)
    clip = 1.0
    share = (clip * at_last.flatten(1).norm(dim=1) / at_first.flatten(1).norm(dim=1)).clamp(max=1.0)
    assert share.max() < 1
    expected = torch.autograd.grad(sent, parameters, grad_outputs=at_first * share[:, None, None])
    backflow = Backflow(system.all_links, clip=clip)
    flow(system, backflow, num_rounds=1, answer_rounds=())
    # `flow` weighs the last round twice.
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-9, atol=1e-14)


def test_watching_changes_nothing_without_a_clip(make_system: Callable) -> None:
    system = lively(make_system(num_rounds=2, num_latent_steps=2))
    parameters = system.trainable_parameters()
    loss = play(system, num_rounds=2)
    plain = torch.autograd.grad(loss, list(parameters.values()))
    backflow = Backflow(system.all_links)
    flow(system, backflow, num_rounds=2)
    for (name, parameter), gradient in zip(parameters.items(), plain, strict=True):
        assert torch.equal(parameter.grad, gradient), name
    assert backflow.after == {}
    found = figures([backflow])
    assert not any(name.startswith("gradient/message_clipped") for name in found)


def test_nothing_of_a_pass_stays_in_memory(make_system: Callable) -> None:
    system = lively(make_system(num_rounds=1, num_latent_steps=2))
    seen: list[weakref.ref] = []
    for link in system.all_links.values():
        link.register_forward_hook(lambda link, inputs, output: seen.append(weakref.ref(output)))
    backflow = Backflow(system.all_links)
    flow(system, backflow, num_rounds=1, answer_rounds=())
    backflow.check(QUESTIONS)
    figures([backflow])
    assert seen
    del backflow
    gc.collect()
    assert [each() for each in seen if each() is not None] == []


# Figures


def test_statistics_by_hand() -> None:
    assert statistics(torch.tensor([3.0, 1.0, 5.0])) == {
        "median": 3.0,
        "maximum": 5.0,
        "share": pytest.approx(81 / (3 * 35)),
    }
    assert statistics(torch.tensor([1.0, 2.0, 3.0, 4.0])) == {
        "median": 2.5,
        "maximum": 4.0,
        "share": pytest.approx(100 / (4 * 30)),
    }
    assert statistics(torch.tensor([2.0, 2.0])) == {"median": 2.0, "maximum": 2.0, "share": 1.0}
    assert statistics(torch.tensor([7.0])) == {"median": 7.0, "maximum": 7.0, "share": 1.0}
    assert statistics(torch.zeros(4)) == {"median": 0.0, "maximum": 0.0, "share": 0.0}
    assert statistics(torch.tensor([0.0, 0.0, 1e-3, 0.0], dtype=torch.float64))["share"] == pytest.approx(0.25)


def test_figures_name_every_place_and_statistic(make_double: Callable) -> None:
    system = make_double()
    backflow = Backflow(system.all_links, clip=0.3)
    flow(system, backflow)
    every = figures([backflow])
    messages = [place for place in places(system) if "->" in place[0]]
    names = [
        *(("message", *place) for place in messages),
        *(("message_clipped", *place) for place in messages),
        *(("link", *place) for place in places(system)),
    ]
    assert set(every) == {
        f"gradient/{group}/{name}/round {round}/{statistic}"
        for group, name, round in names
        for statistic in ("median", "maximum", "share")
    }
    assert all(isinstance(value, float) for value in every.values())
    of_links = backflow.of_links()
    for group, values in (("message", backflow.before), ("message_clipped", backflow.after), ("link", of_links)):
        for (name, round), norms in values.items():
            found = {key: every[f"gradient/{group}/{name}/round {round}/{key}"] for key in ("median", "maximum")}
            assert found == {
                "median": pytest.approx(sorted(norms.tolist())[1], rel=1e-6),
                "maximum": pytest.approx(max(norms.tolist()), rel=1e-6),
            }


# What is not finite


def spoil(link: RecursiveLink, call: int, row: int) -> None:
    """The gradient that arrives at one call of a link is nan for one sample."""
    calls = [0]

    def hook(link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> None:
        calls[0] += 1
        if calls[0] == call:

            def planted(gradient: Tensor) -> Tensor:
                gradient = gradient.clone()
                gradient[row].view(-1)[0] = torch.nan
                return gradient

            output.register_hook(planted)

    link.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("name", "call", "row", "words"),
    [
        ("critic->solver", 3, 0, "message critic->solver in round 3 is not finite for 1 of 3 samples: q-0"),
        ("critic->solver", 1, 1, "message critic->solver in round 1 is not finite for 1 of 3 samples: q-1"),
        ("solver->planner", 2, 2, "message solver->planner in round 2 is not finite for 1 of 3 samples: q-2"),
        ("planner->critic", 1, 2, "message planner->critic in round 1 is not finite for 1 of 3 samples: q-2"),
        # Of the two calls of a turn (m = 2) the first is in the roll-out, the second makes the message.
        ("planner", 1, 1, "link planner in round 1 is not finite for 1 of 3 samples: q-1"),
        ("planner", 2, 0, "link planner in round 1 is not finite for 1 of 3 samples: q-0"),
        # What is spoilt on its way back spoils all that come before it: the first is named.
        ("critic", 3, 1, "link critic in round 2 is not finite for 1 of 3 samples: q-1"),
        ("solver", 4, 2, "link solver in round 2 is not finite for 1 of 3 samples: q-2"),
    ],
)
def test_a_gradient_that_is_not_finite_is_named_where_it_arises(
    make_double: Callable, name: str, call: int, row: int, words: str
) -> None:
    system = make_double()
    spoil(system.all_links[name], call, row)
    backflow = Backflow(system.all_links)
    flow(system, backflow)
    with pytest.raises(NumericsError, match="not finite") as caught:
        backflow.check(["q-0", "q-1", "q-2"])
    assert str(caught.value) == f"the gradient that reaches the {words}."


def test_gradients_that_are_finite_pass(make_double: Callable) -> None:
    backflow = Backflow((system := make_double()).all_links)
    flow(system, backflow)
    backflow.check(["q-0", "q-1", "q-2"])


def test_samples_are_named_up_to_three() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert say_samples([False, True, False, False, False], names) == "1 of 5 samples: b"
    assert say_samples([True, True, False, True, False], names) == "3 of 5 samples: a, b, d"
    assert say_samples([True] * 5, names) == "5 of 5 samples: a, b, c, ..."
