"""Links by themselves: planted faults are found on any system, healthy links give no alarm, numbers are what they say."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.audit.faults import (
    Plant,
    constant,
    drawn_normally,
    frozen,
    much_too_loud,
    much_too_quiet,
    not_a_number,
    on_a_line,
    printed,
    redrawn,
    uneven,
    with_fault,
)
from tests.conftest import CORPUS, make_model
from torch import nn

from recursivemas.audit import health_views, records, style, verdicts
from recursivemas.audit.health import (
    examine_links,
    gain_figures,
    learned_share,
    marchenko_pastur,
    singular_values,
    starting_links,
    uneven_dimensions,
    weight_figures,
)
from recursivemas.audit.records import LinkDiagnosis
from recursivemas.links import DESIGNS, RecursiveLink
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import RoleSample
from recursivemas.training.recipe import Material, Recipe, WorldSettings, train

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "sequential"
EDGES = ("planner->critic", "critic->solver", "solver->planner")
WORDS = " ".join(CORPUS).split()


def turns(role: str, number: int) -> list[RoleSample]:
    chosen = random.Random(role)
    return [
        RoleSample(
            role=role,
            question=" ".join(chosen.choices(WORDS, k=4)),
            target=" ".join(chosen.choices(WORDS, k=8)),
            num_rounds=2,
        )
        for _ in range(number)
    ]


def trained(design: str, seed: int, sizes: Sequence[int]) -> RecursiveSystem:
    """A system of random models whose links were trained for a little, by the stages before the outer loop."""
    families = dict(zip(("planner", "critic", "solver"), ("qwen3", "llama", "qwen2"), strict=True))
    models = {
        role: make_model(family, 3 * seed + place, hidden_size=sizes[place], head_dim=sizes[place] // 4)
        for place, (role, family) in enumerate(families.items())
    }
    system = RecursiveSystem.build(agents=models, design=design, num_rounds=2, num_latent_steps=4, seed=seed)
    stage = {"num_train_steps": 40, "num_samples": 24, "batch_size": 256}
    recipe = Recipe(system="", world=WorldSettings(name=""), output="", seed=seed, inner=stage, alignment=stage)  # type: ignore[arg-type]
    train(system, recipe, Material(turns=turns, questions=lambda *_: []), stages=("inner", "alignment"))
    return system


@pytest.fixture(scope="module")
def systems() -> dict[str, RecursiveSystem]:
    """Healthy ones: the bundled systems as if nobody knew their worlds, and trained ones of several designs and widths."""
    healthy = {name: RecursiveSystem.from_pretrained(name, device="cpu") for name in ("ward", "relay")}
    for system in healthy.values():
        system.training = {}
    healthy["eq. 3 and 4"] = trained("res-2-layer", 0, (48, 64, 56))
    healthy["released"] = trained("ln-res-2-layer", 1, (32, 96, 40))
    healthy["no residual"] = trained("2-layer", 2, (64, 40, 56))
    return healthy


def causes(system: RecursiveSystem, **options: int) -> dict[str, list[str]]:
    return {each.figures.link: [found.cause for found in each.verdicts] for each in examine_links(system, **options)}


# Verdicts


@pytest.mark.parametrize("seed", [0, 1])
def test_healthy_links_give_no_alarm(systems: dict[str, RecursiveSystem], seed: int) -> None:
    for system in systems.values():
        assert causes(system, seed=seed) == {link: [verdicts.UNTRIED] for link in system.all_links}


OF_WHAT_COMES_OUT = (verdicts.COLLAPSED, verdicts.UNEVENLY_LOUD)


@pytest.mark.parametrize("link", ["critic", "critic->solver"])
@pytest.mark.parametrize("name", ["ward", "eq. 3 and 4", "released", "no residual"])
@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (redrawn, verdicts.UNTRAINED),
        (drawn_normally, verdicts.UNTRAINED),
        (frozen, verdicts.FROZEN),
        (much_too_loud, verdicts.LOUD),
        (much_too_quiet, verdicts.QUIET),
        (constant, verdicts.COLLAPSED),
        (on_a_line, verdicts.COLLAPSED),
        (uneven(0.1, 20), verdicts.UNEVENLY_LOUD),
        (uneven(0.1, 0.02), verdicts.UNEVENLY_LOUD),
        (uneven(0.3, 50), verdicts.UNEVENLY_LOUD),
        (not_a_number, verdicts.NOT_FINITE),
    ],
)
def test_a_planted_fault_is_found(
    systems: dict[str, RecursiveSystem], name: str, link: str, plant: Plant, cause: str
) -> None:
    system = systems[name]
    faulty = system.all_links[link]
    adds_identity = faulty.config.kind == "inner" and faulty.design.residual
    if (cause == verdicts.FROZEN and not faulty.design.layer_norm) or (
        adds_identity and (plant is on_a_line or (not faulty.design.layer_norm and cause in OF_WHAT_COMES_OUT))
    ):
        return  # no such fault in this design: no gains; what goes in is added to what comes out
    with torch.no_grad():
        found = causes(with_fault(system, link, plant))
    assert cause in found[link]
    edges_of_it = {edge for edge in system.links if edge.split("->")[0] == link}
    assert all(found[other] == [verdicts.UNTRIED] for other in set(found) - {link} - edges_of_it)


@pytest.mark.parametrize("design", list(DESIGNS))
def test_new_links_are_known_as_such(make_system: object, design: str) -> None:
    for seed in (0, 1):
        found = causes(make_system(design=design, seed=seed))
        assert all(verdicts.UNTRAINED in each for each in found.values()), found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_on_disk_changes_no_verdict(
    systems: dict[str, RecursiveSystem], make_system: object, tmp_path: Path, dtype: str
) -> None:
    for name, system in (("new", make_system(design="ln-res-2-layer")), ("trained", systems["released"])):
        system.save_pretrained(tmp_path / name, dtype=dtype)
        assert causes(RecursiveSystem.from_pretrained(tmp_path / name, device="cpu")) == causes(system)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden systems are not beside the repository")
def test_random_links_of_the_released_layout_are_known_as_such() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    system = RecursiveSystem.from_release(
        GOLDEN,
        "math",
        prompts=expected["prompts"],
        system_prompt=expected["system_prompt"],
        dtype="float32",
        device="cpu",
    )
    found = examine_links(system)
    assert {each.figures.link for each in found} == {"planner", "critic", "solver", *EDGES}
    for each in found:
        assert verdicts.UNTRAINED in [verdict.cause for verdict in each.verdicts]
        assert {gains.share for gains in each.figures.gains.values()} == {1.0}


def test_a_link_of_which_one_matrix_has_moved_was_trained(system: RecursiveSystem) -> None:
    aligned = with_fault(
        system, "planner->critic", lambda link: [link.w3.weight.copy_(_low_rank(link.w3.weight)), link][1]
    )
    [found] = [each for each in examine_links(aligned) if each.figures.link == "planner->critic"]
    assert [verdict.cause for verdict in found.verdicts] == [verdicts.UNTRIED]
    assert [verdicts.looks_drawn(weight) for weight in found.figures.weights.values()] == [True, True, False]


def _low_rank(weight: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left * (values * torch.linspace(1, 0, len(values)) ** 2) @ right


# Weights


def test_spectra_of_random_numbers_follow_the_law() -> None:
    """Whatever their law, shape and size: the figures on which verdicts rest stay where they are said to."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((8, 8), (48, 48), (192, 64), (64, 192), (300, 280)):
        law = marchenko_pastur(rows, columns)
        assert len(law) == min(rows, columns)
        assert law.square().sum().item() == pytest.approx(rows * columns, rel=0.02)
        for draw in range(20):
            uniform = 0.3 * (2 * torch.rand(rows, columns, generator=generator) - 1)
            normal = torch.randn(rows, columns, generator=generator) * 10.0 ** (draw % 5 - 3)
            for weight in (uniform, normal, uniform.bfloat16().float()):
                figures = weight_figures(weight)
                assert 0.3 < figures.structure < 3
                assert verdicts.looks_drawn(figures)


def test_a_new_linear_map_is_at_no_distance() -> None:
    torch.manual_seed(0)
    figures = weight_figures(nn.Linear(200, 300).weight.detach())
    assert figures.shape == (300, 200)
    assert figures.scale == pytest.approx(1, abs=0.02)
    assert figures.distance < 0.02
    assert figures.spectrum[0] == pytest.approx(figures.drawn_spectrum[0], rel=0.03)
    assert len(figures.spectrum) == len(figures.drawn_spectrum) == 64
    assert (figures.spectrum[0], figures.spectrum[-1]) == (max(figures.spectrum), min(figures.spectrum))


def test_the_released_links_numbers_are_those_of_new_ones() -> None:
    """What a default initialisation of 2560 -> 3072 comes to; a released link was measured at 1.209, .534, .0556."""
    values = marchenko_pastur(3072, 2560) * (3 * 2560) ** -0.5
    assert [values[0].item(), values.median().item(), values[-1].item()] == pytest.approx(
        [1.203, 0.534, 0.0561], rel=0.01
    )


def test_distance_is_at_most_the_movement() -> None:
    """No change moves a spectrum further than the matrix: what is told of a link must have happened to it."""
    torch.manual_seed(0)
    start = nn.Linear(120, 90).weight.detach()
    for size, least in ((0.1, 0.0), (0.5, 0.2), (2.0, 1.0)):  # so little in a narrow matrix does not show
        change = torch.randn(90, 3) @ torch.randn(3, 120)
        moved = start + change * (size * start.norm() / change.norm())
        assert least < weight_figures(moved).distance < size + 0.03
    assert not verdicts.looks_drawn(weight_figures(moved))


def test_a_short_training_shows_in_the_numbers_where_the_spectrum_hides_it() -> None:
    torch.manual_seed(0)
    weight = nn.Linear(64, 64).weight.detach()
    moved = weight_figures(weight + 0.15 * weight.std() * torch.randn(64, 64))
    assert moved.structure < verdicts.STRUCTURED
    assert not verdicts.looks_drawn(moved)


def test_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((30, 50), (50, 30), (600, 520)):
        matrix = torch.randn(shape)
        found = singular_values(matrix)
        expected = torch.linalg.svdvals(matrix.double())
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * expected[0].item())


def test_zeros_and_what_is_no_number() -> None:
    zeros = weight_figures(torch.zeros(5, 4))
    assert verdicts.looks_drawn(zeros)
    assert zeros.scale == 0
    assert math.isnan(weight_figures(torch.full((5, 4), math.nan)).scale)


def test_gains() -> None:
    assert gain_figures(torch.full((8,), 0.5)) == records.GainFigures(0.5, 1.0)
    assert gain_figures(torch.tensor([1.0, 1.0, 1.0, 0.9])) == records.GainFigures(1.0, 0.75)


def test_uneven_dimensions() -> None:
    torch.manual_seed(0)
    usual = torch.rand(40).double() + 0.5
    outputs = torch.randn(400, 40) * usual.float()
    assert uneven_dimensions(outputs, usual) == {}
    assert uneven_dimensions(outputs * 50, usual) == {}  # loud in all: another fault
    outputs[:, 7] *= 30
    outputs[:, 9] /= 30
    found = uneven_dimensions(outputs, usual)
    assert found == {7: pytest.approx(30, rel=0.2), 9: pytest.approx(1 / 30, rel=0.2)}
    # A dimension that the reader hardly uses is none in which a link must be quiet.
    usual[3] = 1e-4
    assert set(uneven_dimensions(outputs, usual)) == {7, 9}
    # Most of the dimensions are right, though the median is not of them.
    half = torch.randn(400, 40)
    half[:, 21:] *= 20
    assert set(uneven_dimensions(half, torch.ones(40).double())) == set(range(21, 40))


# The start, where it is known


RECIPE = {
    "world": {"name": "ward", "seed": 0},
    "seed": 5,
    "links": {"start": "new", "design": "res-2-layer", "bias": True},
}


def of_link(diagnoses: list[LinkDiagnosis], name: str) -> LinkDiagnosis:
    [found] = [each for each in diagnoses if each.figures.link == name]
    return found


def test_a_start_that_is_known_is_compared_with(make_system: object) -> None:
    system = make_system(seed=5, link_options={"bias": True})
    system.training = {"recipe": RECIPE}
    assert {each.figures.moved for each in examine_links(system)} == {0}
    moved = with_fault(system, "planner->critic", lambda link: [link.w1.weight.mul_(1.5), link][1])
    figures = of_link(examine_links(moved), "planner->critic").figures
    by_tensor = figures.moved_by_tensor
    assert by_tensor is not None
    assert by_tensor.pop("w1.weight") == pytest.approx(0.5, rel=1e-5)
    assert set(by_tensor.values()) == {0.0}
    assert figures.moved is not None
    assert 0.01 < figures.moved < 0.5


@pytest.mark.parametrize(
    "training", [{}, {"recipe": {**RECIPE, "links": {"start": "given"}}}, {"recipe": {"of": "another version"}}]
)
def test_a_start_that_is_not_known_is_said_to_be_unknown(system: RecursiveSystem, training: dict) -> None:
    system.training = training
    assert starting_links(system) is None
    figures = examine_links(system)[0].figures
    assert (figures.moved, figures.moved_by_tensor) == (None, None)


def test_the_start_of_new_agents_is_known_too(system: RecursiveSystem) -> None:
    agents = {role: role for role in system.agents}
    system.training = {"recipe": {"agents": agents, "questions": {"train": "a", "validation": "b"}, "seed": 3}}
    starts = starting_links(system)
    assert starts is not None
    again = RecursiveSystem.build(agents={role: each.model for role, each in system.agents.items()}, seed=3)
    assert all(torch.equal(starts[name].w1.weight, link.w1.weight) for name, link in again.all_links.items())


def test_the_bundled_systems_links_moved_from_the_start_that_its_record_tells() -> None:
    ward = RecursiveSystem.from_pretrained("ward", device="cpu")
    starts = starting_links(ward)
    assert starts is not None
    for name, link in ward.all_links.items():
        now, start = link.w1.weight.flatten(), starts[name].w1.weight.flatten()
        # Weights drawn from another seed would have nothing to do with these.
        assert torch.cosine_similarity(now, start, dim=0) > 0.2


@pytest.mark.parametrize("design", list(DESIGNS))
@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_the_share_that_is_not_residual(design: str, kind: str) -> None:
    torch.manual_seed(0)
    link = RecursiveLink.inner(6, design=design) if kind == "inner" else RecursiveLink.outer(6, 6, design=design)
    states = torch.randn(3, 5, 6)
    link.requires_grad_(False)
    share = learned_share(link, states)
    assert share.shape == (3, 5)
    if not link.design.residual:
        assert (share == 1).all()
        return
    assert (share < 0.1).all()  # the learned branch starts small
    torch.nn.init.normal_((link.w2 or link.w1).weight)
    if link.target_norm is None:
        whole = link(states) / link.scale
        residual = states if link.w3 is None else link.w3(states)
        assert learned_share(link, states).numpy() == pytest.approx(
            ((whole - residual).norm(dim=-1) / whole.norm(dim=-1)).numpy(), rel=1e-4
        )


# What is measured, and how it is shown


def test_outputs_are_those_of_the_links(system: RecursiveSystem) -> None:
    """The outer link is given what the inner link makes of states, or states alone if the system says so."""
    paper = RecursiveSystem(
        system.agents,
        system.links,
        system.pattern,
        system.prompts,
        system.settings.model_copy(update={"message": "outer"}),
    )
    loud = with_fault(paper, "planner", much_too_loud)
    assert causes(loud)["planner"][0] == verdicts.LOUD
    before, after = (of_link(examine_links(each), "planner->critic").figures.output for each in (paper, loud))
    assert before == after
    before, after = (
        of_link(examine_links(each), "planner->critic").figures.output
        for each in (system, with_fault(system, "planner", much_too_loud))
    )
    assert after.loudness == pytest.approx(50 * before.loudness, rel=0.01)  # but for the gelu


def test_every_link_is_told_of_once(systems: dict[str, RecursiveSystem]) -> None:
    counts: list[tuple[int, int]] = []
    found = examine_links(systems["released"], progress=lambda done, total: counts.append((done, total)))
    assert [each.figures.link for each in found] == ["planner", "critic", "solver", *EDGES]
    assert counts == [(done, 6) for done in range(1, 7)]
    assert found[3].figures.output_size == systems["released"].agents["critic"].model.hidden_size
    plain = json.loads(json.dumps([records.to_plain(each) for each in found], allow_nan=False))
    for each in plain:
        assert set(each) == {"figures", "verdicts"}
        assert set(each["figures"]) == set(records.LinkFigures.__dataclass_fields__)
        assert set(each["figures"]["output"]) == set(records.OutputFigures.__dataclass_fields__)


def test_views_tell_every_link(systems: dict[str, RecursiveSystem]) -> None:
    with torch.no_grad():
        faulty = with_fault(systems["released"], "critic->solver", much_too_loud)
        broken = with_fault(systems["released"], "critic->solver", not_a_number)
    for system in (systems["ward"], faulty, broken, systems["no residual"]):
        found = examine_links(system)
        tables = list(health_views.tables(found))
        assert [table.row_count for table in tables] == [6, 6]
        shown = printed(*tables)
        assert "inner planner" in shown
        assert "unknown" in shown
    for system in (systems["ward"], broken):
        figure = health_views.draw(examine_links(system))
        assert figure.count("new link") == 1
        assert "mathdefault" not in figure
        assert all(edge.replace(">", "&gt;") in figure for edge in EDGES)
    [first, others] = health_views.say_verdicts(examine_links(faulty))
    assert first.startswith("critic->solver: too loud – ")
    assert others.startswith("the other 5 links: no fault seen")
    assert list(style.say_advice(examine_links(faulty))) == [f"{verdicts.LOUD}: {verdicts.ADVICE[verdicts.LOUD]}"]
    assert list(style.say_advice(examine_links(systems["ward"]))) == []
