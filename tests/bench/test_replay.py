"""Table 2 of the paper as it is printed, and as it is replayed."""

from pathlib import Path

import pytest
import yaml

from recursivemas.bench.playing import expected_positions, play
from recursivemas.bench.replay import AGENTS, loads, random_system, replay
from recursivemas.bench.subjects import configuration, numbered_questions, scaled
from recursivemas.bench.table2 import SPEEDUP, SYSTEMS, TOKEN_REDUCTION, printed

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"


def test_the_printed_cells_give_the_printed_headlines() -> None:
    cells = printed()
    assert len(cells) == 36
    assert cells["sequential_light", "MATH500", 3] == (2952, 3059, 1360, 519)
    assert cells["sequential_scaled", "Code", 1] == (8867, 3154, 7908, 2198)
    for rounds, reduction in TOKEN_REDUCTION.items():
        some = [cell for (_, _, number), cell in cells.items() if number == rounds]
        tokens = sum(cell.latent_tokens for cell in some) / sum(cell.text_tokens for cell in some)
        assert round(1 - tokens, 3) == reduction
        seconds = sum(cell.text_seconds for cell in some) / sum(cell.latent_seconds for cell in some)
        assert abs(seconds - SPEEDUP[rounds]) < 0.15  # no one formula gives what is printed


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_agents_are_those_of_the_recipes(name: str) -> None:
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert tuple(recipe["agents"].values()) == AGENTS[name]


@pytest.mark.parametrize("scale", [1, 7, 64])
def test_lengths_are_the_papers_over_the_scale(scale: int) -> None:
    for (_, _, rounds), paper in printed().items():
        both = loads(paper, rounds, scale)
        text, latent = both["text"], both["latent"]
        total = (3 * rounds - 1) * text.message_tokens + text.answer_tokens
        assert total == max(round(paper.text_tokens / scale), 3 * rounds)
        assert 0 <= text.answer_tokens - text.message_tokens < 3 * rounds
        assert latent.answer_tokens == round(paper.latent_tokens / scale)
        assert latent.num_latent_steps == max(round(80 / scale), 1)


@pytest.mark.parametrize("name", [model for models in AGENTS.values() for model in models])
def test_scaled_models_keep_their_shares(name: str) -> None:
    config, small = configuration(name), scaled(configuration(name), 16)
    assert scaled(config, 1) == config
    assert small["hidden_size"] == config["hidden_size"] // 16
    assert small["num_hidden_layers"] == 2
    heads, key_heads = (config[each] / small[each] for each in ("num_attention_heads", "num_key_value_heads"))
    assert heads == key_heads


@pytest.mark.parametrize("name", SYSTEMS)
def test_positions_of_a_replay_are_those_of_the_formula(name: str) -> None:
    system = random_system(name, 32, device="cpu")
    questions = numbered_questions(2, 5)
    for load in loads(printed()[name, "MATH500", 2], 2, 64).values():
        for question, usage in zip(questions, play(system, questions, load), strict=True):
            assert usage.positions == expected_positions(system, question, load)


def test_a_replay_counts_the_papers_tokens() -> None:
    told: list[str] = []
    summary, cells = replay(
        ["sequential_light"],
        ["MATH500", "Code"],
        scale=64,
        batch_size=2,
        repeats=1,
        rounds=(1, 3),
        device="cpu",
        progress=told.append,
    )
    assert [(row["benchmark"], row["r"]) for row in cells.rows] == [
        ("MATH500", 1),
        ("MATH500", 3),
        ("Code", 1),
        ("Code", 3),
    ]
    assert all(row["speed-up"].median > 0 for row in cells.rows)
    # 3059 tokens against 519, over 64: 48 against 8; with 8 turns of one latent step, 16.
    assert cells.rows[1]["tokens saved"] == "83.3%"
    assert cells.rows[1]["saved, steps counted"] == "66.7%"
    assert cells.rows[1]["paper: saved"] == "83.0%"
    assert [row["r"] for row in summary.rows] == [1, 3]
    assert summary.rows[1]["headline"] == 2.4
    assert "sequential_light MATH500, r = 3: text" in told
