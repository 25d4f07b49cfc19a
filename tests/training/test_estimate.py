"""What a recipe will take: sizes as published, links as counted in the release, memory as counted in tensors."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import FEW_WORDS, make_model
from torch import Tensor

from recursivemas.config import override, parse, read_yaml
from recursivemas.errors import ConfigError, ModelError, PatternError
from recursivemas.loading import ModelSizes
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.estimate import SHIPPED, Estimate, estimate
from recursivemas.training.recipe import Recipe, base_system, starting_system

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
ROLES = ("planner", "critic", "solver")


def read(file: Path, *changes: str) -> Recipe:
    return parse(Recipe, override(read_yaml(file), list(changes)), where=str(file))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, LanguageModel]) -> dict[str, str]:
    """The tiny models on disk, by role."""
    place = tmp_path_factory.mktemp("models")
    for role, model in zip(ROLES, tiny_models.values(), strict=True):
        model.save_pretrained(place / role)
    return {role: str(place / role) for role in ROLES}


def recipe_of(agents: dict[str, str], **settings: object) -> Recipe:
    plain = {"agents": agents, "output": "runs/x", "data": "a.jsonl", **settings}
    return parse(Recipe, plain, where="a recipe")


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their checkpoints count them: the Hugging Face hub for all but the last four, which are text parts.
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("Qwen/Qwen2.5-Coder-3B-Instruct", 3_085_938_688),
        ("BioMistral/BioMistral-7B", 7_241_732_096),
        ("google/gemma-3-4b-it", 3_880_263_168),
        ("Qwen/Qwen3.5-2B", 1_881_825_088),
        ("Qwen/Qwen3.5-4B", 4_205_751_296),  # the paper's table 5: 4.21B
        ("Qwen/Qwen3.5-9B", 8_953_803_264),
    ],
)
def test_models_of_the_paper_have_their_published_sizes(name: str, parameters: int) -> None:
    sizes = ModelSizes.of(name, SHIPPED)
    assert sizes.num_parameters == parameters
    assert sizes.num_recurrent_layers == (sizes.num_layers * 3 // 4 if "Qwen3.5" in name else 0)


def test_every_shipped_configuration_is_tested() -> None:
    [mark] = test_models_of_the_paper_have_their_published_sizes.pytestmark  # type: ignore[attr-defined]
    assert {file.stem for file in SHIPPED.glob("*.json")} == {name.replace("/", "__") for name, _ in mark.args[1]}


def test_sizes_of_a_directory_are_those_of_its_model(
    directories: dict[str, str], tiny_models: dict[str, LanguageModel]
) -> None:
    for directory, model in zip(directories.values(), tiny_models.values(), strict=True):
        sizes = ModelSizes.of(directory, SHIPPED)
        assert sizes.num_parameters == model.num_parameters
        assert (sizes.hidden_size, sizes.vocab_size) == (model.hidden_size, model.vocab_size)
        assert sizes.max_positions == model.max_positions


def test_a_model_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'nobody/nothing'"):
        ModelSizes.of("nobody/nothing", SHIPPED)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="unheard-of"):
        ModelSizes.of(tmp_path, SHIPPED)


# Recipes of the paper


@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [
        # Sums of the parameters of the released links; every link of theirs is among ours.
        ("sequential_light", 21_529_600, 52_998_144),
        ("sequential_scaled", 45_137_920, 112_001_024),
        ("mixture", 55_108_608, 166_309_888),
        ("distillation", 46_701_568, 109_629_440),
        ("deliberation", 26_245_120, 65_576_960),
    ],
)
def test_recipes_of_the_paper_have_the_links_of_the_release(name: str, inner: int, outer: int) -> None:
    found = estimate(read(PAPER / f"{name}.yaml"), stages=("inner", "outer"))
    assert found.link_parameters == {"inner": inner, "outer": outer}
    assert all(each.is_trained == (each.kind == "outer") for each in found.links)
    assert found.memory.alignment == 0
    assert found.memory.agents == 2 * found.agent_parameters == found.download
    assert found.memory.peak > found.memory.agents
    assert not found.too_long
    assert (found.num_rounds, found.num_latent_steps, found.dtype) == (3, 80, "bfloat16")


def test_there_is_a_test_for_every_recipe_of_the_paper() -> None:
    [mark] = test_recipes_of_the_paper_have_the_links_of_the_release.pytestmark  # type: ignore[attr-defined]
    assert {file.stem for file in PAPER.glob("*.yaml")} == {name for name, *_ in mark.args[1]}


def test_the_number_of_the_papers_table_5_is_one_inner_link() -> None:
    found = estimate(read(PAPER / "sequential_scaled.yaml"))
    by_name = {each.link: each.parameters for each in found.links}
    assert by_name["solver"] == 13_122_560
    assert by_name["solver"] / found.roles[2].sizes.num_parameters == pytest.approx(0.0031, abs=5e-5)


def test_a_model_of_two_roles_is_counted_once() -> None:
    found = estimate(read(PAPER / "deliberation.yaml"))
    assert [each.shares for each in found.roles] == [None, "reflector"]
    assert found.agent_parameters == 4_205_751_296


# Memory


def settings(**changes: object) -> dict[str, object]:
    return {"batch_size": 2, "round_weights": "every", "anchor": 0.0, **changes}


def test_memory_grows_as_it_must(directories: dict[str, str]) -> None:
    def outer(**changes: object) -> int:
        length = changes.pop("lengths", {"question": 40, "reply": 20})
        steps = changes.pop("num_latent_steps", 8)
        return estimate(
            recipe_of(directories, num_latent_steps=steps, num_rounds=3, lengths=length, outer=settings(**changes)),
            stages=("outer",),
        ).memory.outer

    assert outer(batch_size=4) == 2 * outer()
    assert outer(batch_size=4, micro_batch_size=2) == outer()
    assert outer(recompute=True) < 0.4 * outer()
    assert outer(round_weights="last") < outer()
    assert outer(trained="outer") < outer()
    assert outer(num_latent_steps=16) > 1.5 * outer()
    assert outer(lengths={"question": 400, "reply": 20}) > outer()
    assert outer(anchor=1.0) > outer()


@pytest.mark.parametrize("trained", ["outer", "inner+outer"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_5_text"])
def test_activations_are_those_that_autograd_keeps(family: str, trained: str, tmp_path: Path) -> None:
    """Saved tensors of a step, each storage once, without parameters: within a third of the estimate."""
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 200}
    model = make_model(family, **sizes, **(linear if family == "qwen3_5_text" else {}))
    model.save_pretrained(tmp_path / "model")
    # In the tiny vocabularies words are many tokens: hardly any stand beside the question, whose tokens are counted.
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(FEW_WORDS))
    question, answer = "How far did the fox run in the end?", "about as far as the river bank"
    recipe = recipe_of(
        dict.fromkeys(ROLES, str(tmp_path / "model")),
        prompts=str(tmp_path / "prompts.yaml"),
        num_rounds=2,
        num_latent_steps=12,
        lengths={"question": len(model.encode(question)), "reply": len(model.encode(answer)) + 1},
        outer=settings(trained=trained),
    )
    system = starting_system(base_system(recipe, device="cpu"), recipe)
    names = system.trainable_parameters()
    for name, parameter in names.items():
        parameter.requires_grad_(trained == "inner+outer" or "->" in name)
    weights = [
        *names.values(),
        *(each for agent in system.agents.values() for each in agent.model.network.parameters()),
    ]
    known = {each.untyped_storage().data_ptr() for each in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [
            played.agent.loss(played.reading, [answer])
            for played in system.unroll([question], num_rounds=2, answer_rounds=(1, 2))
            if played.turn.speaks
        ]
    assert len(losses) == 2
    counted = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in known)
    found = estimate(recipe, stages=("outer",))
    assert counted == pytest.approx(found.memory.outer / recipe.outer.batch_size, rel=1 / 3), (
        counted / found.memory.outer * 2
    )


def test_prompts_longer_than_a_model_reads_are_named(directories: dict[str, str]) -> None:
    found = estimate(recipe_of(directories, lengths={"question": 1000, "reply": 20}))
    assert found.too_long == ROLES
    assert not estimate(recipe_of(directories, lengths={"question": 100, "reply": 20})).too_long


# Any recipe


def test_a_system_on_disk_is_estimated_by_its_own_parts() -> None:
    found = estimate(read(PAPER.parent / "ward.yaml"))
    ward = RecursiveSystem.from_pretrained("ward", device="cpu")
    assert found.agent_parameters == sum(agent.model.num_parameters for agent in ward.agents.values())
    counts = {name: sum(each.numel() for each in link.parameters()) for name, link in ward.all_links.items()}
    assert {each.link: each.parameters for each in found.links} == counts
    assert found.download == 0
    given = estimate(read(PAPER.parent / "ward.yaml", "links={start: given, design: 1-layer}"))
    assert given.links == found.links


def test_an_agent_that_reads_itself_has_two_links(directories: dict[str, str]) -> None:
    found = estimate(recipe_of({"thinker": directories["planner"]}, pattern="self-recursion"))
    assert {each.link: each.kind for each in found.links} == {"thinker": "inner", "thinker->thinker": "outer"}


def test_everything_is_plain_data(directories: dict[str, str]) -> None:
    plain = json.loads(json.dumps(estimate(recipe_of(directories)).to_plain(), allow_nan=False))
    assert set(Estimate.__dataclass_fields__) < set(plain)
    assert plain["memory"]["peak"] == plain["memory"]["agents"] + plain["memory"]["links"] + max(
        plain["memory"][stage] + (plain["memory"]["optimizer"] if stage == "outer" else 0)
        for stage in ("inner", "alignment", "outer")
    )


def test_data_sets_of_unknown_roles_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown role 'mth': did you mean 'math'"):
        estimate(read(PAPER / "mixture.yaml", "data.inner.mth=RecursiveMAS/Mixture-Math"))


@pytest.mark.parametrize(
    ("plain", "error", "words"),
    [
        ({"output": "x", "world": {"name": "ward"}}, ConfigError, "system"),
        (
            {"output": "x", "world": {"name": "ward"}, "system": "ward", "agents": {"solver": "x"}},
            ConfigError,
            "agents",
        ),
        ({"output": "x", "system": "ward"}, ConfigError, "where its text comes from"),
        (
            {"output": "x", "agents": {"a": "x"}, "world": {"name": "ward"}, "links": {"start": "given"}},
            ConfigError,
            "no links",
        ),
        ({"output": "x", "agents": {"planer": "x"}, "world": {"name": "ward"}}, PatternError, "'planner'"),
        ({"output": "x", "agents": {"planner": "x"}, "world": {"name": "ward"}}, PatternError, "role 'critic'"),
        (
            {"output": "x", "agents": {"a": "x"}, "pattern": "seqential", "world": {"name": "ward"}},
            ConfigError,
            "'sequential'",
        ),
    ],
)
def test_recipes_that_do_not_hold_together_are_refused(plain: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        estimate(parse(Recipe, plain, where="a recipe"))
