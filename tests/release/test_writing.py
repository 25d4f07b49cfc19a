"""Systems written in the authors' released layout: the same functions, whole round trips, and refusals with reasons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.release.theirs import INNER_TYPES, KEYS, OUTER_TYPES, Release, computed, draw, load, write_theirs

from recursivemas.decoding import SamplingParams
from recursivemas.errors import CheckpointError, ConfigError, OutputError
from recursivemas.links import DESIGNS, RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.release.tensors import released_tensors
from recursivemas.release.writing import layout_of
from recursivemas.system import RecursiveSystem

LN = "ln-res-2-layer"
QUESTIONS = ["What is 2 + 2?", "Why?"]


def random_link(kind: str, design: str, **options: Any) -> RecursiveLink:
    """A link whose every parameter is drawn at random, and whose scale is not 1."""
    link = RecursiveLink.inner(8, design=design, **options)
    if kind == "outer":
        link = RecursiveLink.outer(8, 6, design=design, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in link.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    link.scale.fill_(0.3)
    return link


def messages(system: RecursiveSystem) -> list[torch.Tensor]:
    sampling = SamplingParams(max_new_tokens=1)
    results = system.run(QUESTIONS, num_rounds=2, num_latent_steps=3, sampling=sampling, trace=True)
    return [message.tensor() for result in results for message in result.trace.messages]


@pytest.fixture
def trained(tiny_models: dict[str, LanguageModel]) -> RecursiveSystem:
    """A sequential system of ours in the form that the authors released, with links that do something."""
    agents = dict(zip(("planner", "critic", "solver"), tiny_models.values(), strict=True))
    return RecursiveSystem.build(agents=agents, design=LN, num_rounds=4).with_random_links(2)


# Links


@pytest.mark.parametrize("kind", ["inner", "outer"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bias", [None, True, False])
def test_a_link_is_the_same_function_in_the_released_form(kind: str, design: str, bias: bool | None) -> None:
    for size in (None, 5):
        if kind == "outer" and size is None and not DESIGNS[design].layer_norm:
            size = 6
        link = random_link(kind, design, bias=bias, intermediate_size=size)
        if kind == "inner" and design in ("res-1-layer", "res-2-layer"):
            with pytest.raises(CheckpointError, match=r"link 'x' .*its scale is 0.3.*identity"):
                released_tensors("x", link)
            link.scale.fill_(1.0)
        if kind == "inner" and design == "ln-2-layer":
            with pytest.raises(CheckpointError, match="no released type for an inner link of the design ln-2-layer"):
                released_tensors("x", link)
            continue
        adapter_type, weights = released_tensors("x", link)
        assert adapter_type in (INNER_TYPES if kind == "inner" else OUTER_TYPES)
        expected = draw(adapter_type, link.config.source_size, link.config.target_size, seed=0)
        assert {name: each.shape for name, each in weights.items()} == {n: each.shape for n, each in expected.items()}
        states = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(computed(adapter_type, weights, states), link(states))


def test_an_mlp_that_is_too_wide_is_refused_with_the_width_there_is() -> None:
    with pytest.raises(CheckpointError, match=r"'a->b' .*MLP is 12 wide.*outer_res_adapter is 6 wide"):
        released_tensors("a->b", RecursiveLink.outer(8, 6))


# Systems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_system_says_what_it_said_before(trained: RecursiveSystem, tmp_path: Path, dtype: str) -> None:
    trained.save_release(tmp_path / "theirs", dtype=dtype)
    prompts = tmp_path / "theirs" / "prompts.yaml"
    read = RecursiveSystem.from_release(tmp_path / "theirs", prompts=prompts, device="cpu")
    assert read.prompts == trained.prompts
    assert read.settings.num_rounds == 4
    for found, expected in zip(messages(read), messages(trained), strict=True):
        difference = (found - expected).norm() / expected.norm()
        assert difference <= 1e-4 if dtype == "float32" else 1e-4 < difference < 0.1
    weights = torch.load(tmp_path / "theirs" / "outer" / "outer_12(math).pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("pattern", KEYS)
def test_a_release_that_was_read_is_written_as_it_was(
    pattern: str, checkpoint: Callable[[str, int], tuple[Path, int]], tmp_path: Path
) -> None:
    roles = dict.fromkeys(role for roles in KEYS[pattern].values() for role in roles.split())
    families = [("qwen3", 48), ("llama", 40), ("qwen2", 56), ("mistral", 64)]
    models = {role: checkpoint(*which) for role, which in zip(roles, families, strict=False)}
    by_task = pattern in ("sequential", "distillation")
    release = write_theirs(tmp_path / "theirs", pattern, models, tasks=("code",) if by_task else ())
    load(release, task="code").save_release(tmp_path / "again", task="code")
    files = [file.relative_to(release.place) for file in release.place.rglob("*") if file.is_file()]
    assert len(files) > 12
    for file in files:
        one, other = release.place / file, tmp_path / "again" / file
        assert other.is_file(), file
        if file.suffix in (".pt", ".safetensors"):
            read = (lambda name: torch.load(name, weights_only=True)) if file.suffix == ".pt" else load_file
            first, second = read(one), read(other)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first), file
        elif "_config" in file.name and "link" in file.name:
            assert_says_at_least(json.loads(other.read_text()), json.loads(one.read_text()))


def assert_says_at_least(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_says_at_least(found[name], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_says_at_least(one, other)
    else:
        assert found == expected


def test_the_trainers_configuration_alone_describes_what_was_written(trained: RecursiveSystem, tmp_path: Path) -> None:
    trained.save_release(tmp_path / "theirs")
    (tmp_path / "theirs" / "outer" / "outerlink_config.json").unlink()
    read = RecursiveSystem.from_release(tmp_path / "theirs", prompts=trained.prompts, device="cpu")
    for name, link in trained.all_links.items():
        assert torch.equal(read.all_links[name].w1.weight, link.w1.weight)


def test_agents_that_share_a_model_are_written_whole(small: Release, tiny_models: Any, tmp_path: Path) -> None:
    agents = dict.fromkeys(("expert", "learner"), tiny_models["qwen3"])
    system = RecursiveSystem.build(pattern="distillation", agents=agents, design=LN)
    system.save_release(tmp_path / "theirs")
    assert all((tmp_path / "theirs" / role / "model.safetensors").is_file() for role in agents)
    read = RecursiveSystem.from_release(tmp_path / "theirs", prompts="distillation", device="cpu")
    assert read.agents["expert"].model is read.agents["learner"].model


# Which layout


@pytest.mark.parametrize("name", KEYS)
def test_every_bundled_pattern_has_its_layout(name: str) -> None:
    pattern = Pattern.load(name)
    found, own = layout_of(pattern)
    assert found == name
    assert [f"{own[key[0]]} {own[key[1]]}" for key in KEYS[name]] == [*KEYS[name].values()]
    renamed = pattern.renamed({role: f"r{number}" for number, role in enumerate(pattern.roles)})
    assert layout_of(renamed)[0] == name


def test_specialists_in_another_order_keep_their_links() -> None:
    pattern = Pattern.load(
        {**Pattern.load("mixture").model_dump(), "stages": [["science", "math", "code"], ["summarizer"]]}
    )
    assert layout_of(pattern)[1] == {"1": "math", "2": "code", "3": "science", "s": "summarizer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": ["planner->critic", "critic->solver"]}, "none of the four graphs"),
        ({"stages": [["planner", "critic"], ["solver"]]}, "none of the four graphs"),
        ({"answers": "critic"}, "none of the four graphs"),
    ],
)
def test_other_graphs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layout_of(Pattern.load({**Pattern.load("sequential").model_dump(), **changes}))


def test_a_pair_must_say_which_it_is() -> None:
    pair = {"name": "pair", "stages": [["one"], ["two"]], "edges": ["one->two", "two->one"], "answers": "two"}
    with pytest.raises(
        CheckpointError, match="graph of distillation and of deliberation; call it by one of these names"
    ):
        layout_of(Pattern.load(pair))


# Refused, and nothing left behind


def test_what_the_layout_cannot_say_is_refused(
    trained: RecursiveSystem, tiny_models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    agents = {role: agent.model for role, agent in trained.agents.items()}
    with pytest.raises(CheckpointError, match="sends 'outer' messages"):
        RecursiveSystem.build(agents=agents, design=LN, message="outer").save_release(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="link 'planner' cannot be written.*scale"):
        RecursiveSystem.build(agents=agents).save_release(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="unknown dtype of released links 'float16'"):
        trained.save_release(tmp_path / "theirs", dtype="float16")
    with pytest.raises(CheckpointError, match="none of the four graphs"):
        trained.solo().save_release(tmp_path / "theirs")
    assert not list(tmp_path.iterdir())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="exists already"):
        trained.save_release(tmp_path / "theirs")


def test_words_are_written_beside_it(trained: RecursiveSystem, tmp_path: Path) -> None:
    trained.save_release(tmp_path / "theirs")
    assert PromptSet.load(tmp_path / "theirs" / "prompts.yaml") == trained.prompts
