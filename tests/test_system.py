"""RecursiveSystem: what a run costs, streaming, contexts that are full, systems made out of systems, bad input."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import make_model

from recursivemas.agents import Agent
from recursivemas.answering import Result, TextDelta
from recursivemas.decoding import SamplingParams
from recursivemas.errors import CheckpointError, ConfigError, InputError, NumericsError, PatternError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.recursion import PlayedTurn
from recursivemas.system import RecursiveSystem

MakeSystem = Callable[..., RecursiveSystem]

CHATTER = {
    "name": "pair",
    "stages": [["asker"], ["answerer"]],
    "edges": ["asker->answerer", "answerer->asker"],
    "answers": "answerer",
}
CHATTER_WORDS = {
    "name": "pair",
    "roles": {
        "asker": {"first": "{question}", "later": "{latents:answerer} {question}"},
        "answerer": {"always": "{latents:asker} {question}", "solo": "{question}"},
    },
}


# What comes back


def test_one_question_gives_one_result_and_a_list_gives_a_list(system: RecursiveSystem, questions: list[str]) -> None:
    alone = system.run(questions[0])
    assert isinstance(alone, Result)
    several = system.run(questions[:1])
    assert [result.text for result in several] == [alone.text]
    assert [result.trace.question for result in system.run(questions)] == questions


def test_progress_is_told_after_every_batch(system: RecursiveSystem, questions: list[str]) -> None:
    told: list[tuple[int, int]] = []
    system.run(questions, batch_size=2, num_rounds=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_settings_of_the_system_are_the_defaults_of_a_run(make_system: MakeSystem, questions: list[str]) -> None:
    system = make_system(num_rounds=3, num_latent_steps=2, channel="both", max_new_tokens=3)
    assert (
        system.run(questions[0]).text
        == system.run(
            questions[0], num_rounds=3, num_latent_steps=2, channel="both", sampling=SamplingParams(max_new_tokens=3)
        ).text
    )
    assert system.run(questions[0]).trace.settings["channel"] == dict.fromkeys(system.links, "both")


def test_instructions_go_where_the_prompts_say(system: RecursiveSystem, questions: list[str]) -> None:
    plain = system.run(questions[0], channel="none")
    told = system.run(questions[0], channel="none", instructions="Answer with a letter.")
    extra = len(system.agents["solver"].model.encode("Answer with a letter."))
    assert plain.usage.prompt_tokens < told.usage.prompt_tokens <= plain.usage.prompt_tokens + extra
    assert plain.text != told.text


def test_a_variant_changes_the_words(make_system: MakeSystem, questions: list[str]) -> None:
    words = {role: {"always": "{question} {style}" + slot} for role, slot in [("planner", "{latents:solver}")]}
    words["critic"] = {"always": "{question} {latents:planner}"}
    words["solver"] = {"always": "{question} {latents:critic}"}
    system = make_system(
        prompts={"name": "styled", "roles": words, "variants": {"short": {"style": "Be brief."}, "long": {"style": ""}}}
    )
    norms = {
        variant: system.run(questions[0], variant=variant).trace.messages[0].norms
        for variant in (None, "short", "long")
    }
    assert norms[None] == norms["short"] != norms["long"]


# Usage


def test_usage_counts_thoughts_and_text_by_agent_and_round(system: RecursiveSystem, questions: list[str]) -> None:
    usage = system.run(questions[0], num_rounds=2, num_latent_steps=4).usage
    turns = {(turn.round, turn.role): turn for turn in usage.turns}
    # The solver of the last round speaks; all others think.
    assert {key: turn.latent_steps for key, turn in turns.items()} == {
        (1, "planner"): 4,
        (1, "critic"): 4,
        (1, "solver"): 4,
        (2, "planner"): 4,
        (2, "critic"): 4,
        (2, "solver"): 0,
    }
    assert [turns[key].generated_tokens for key in turns] == [0, 0, 0, 0, 0, 12]
    assert usage.latent_steps == 20
    assert usage.generated_tokens == 12
    # The critic's prompt is the same in both rounds: in the second only what follows its slot is read again.
    assert turns[1, "critic"].prompt_tokens == turns[2, "critic"].prompt_tokens
    assert turns[2, "critic"].positions < turns[1, "critic"].positions


def test_positions_are_those_that_went_through_a_model(
    make_system: MakeSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"positions": 0}
    step = LanguageModel.step

    def counting(self: LanguageModel, cache: Any, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        seen["positions"] += embeds[..., 0].numel() if mask is None else int(mask.sum())
        return step(self, cache, embeds, mask)

    monkeypatch.setattr(LanguageModel, "step", counting)
    for channel in ("latent", "text", "both", "none"):
        seen["positions"] = 0
        assert make_system().run(questions[0], channel=channel).usage.positions == seen["positions"]


def test_usage_does_not_depend_on_the_batch(system: RecursiveSystem, questions: list[str]) -> None:
    together = system.run(questions[:3], channel="both")
    for question, result in zip(questions[:3], together, strict=True):
        alone = system.run(question, channel="both")
        for count in ("prompt_tokens", "latent_steps", "generated_tokens", "retry_tokens", "positions"):
            assert result.usage.total(count) == alone.usage.total(count), count


def test_seconds_of_a_question_are_those_of_its_batch_divided(system: RecursiveSystem, questions: list[str]) -> None:
    usages = [result.usage for result in system.run(questions, batch_size=5)]
    assert [usage.batch_size for usage in usages] == [5] * 5
    assert len({usage.seconds for usage in usages}) == 1
    by_phase = usages[0].seconds_by_phase()
    assert min(by_phase.values()) > 0
    assert sum(by_phase.values()) == pytest.approx(usages[0].seconds)


def test_with_empty_slots_only_the_answering_agent_is_run(system: RecursiveSystem, questions: list[str]) -> None:
    usage = system.run(questions[0], channel="none", num_rounds=3).usage
    assert [(turn.round, turn.role) for turn in usage.turns] == [(3, "solver")]


def test_agents_whose_messages_nobody_reads_are_not_run(system: RecursiveSystem, questions: list[str]) -> None:
    channel = {"planner->critic": "latent", "critic->solver": "none", "solver->planner": "latent"}
    usage = system.run(questions[0], channel=channel, num_rounds=2).usage
    assert [(turn.round, turn.role) for turn in usage.turns] == [(2, "solver")]


# Streaming


@pytest.mark.parametrize("channel", ["latent", "text"])
@pytest.mark.parametrize("stop", [(), ("an",), ("o b",), ("nana", "f")])
def test_streaming_tells_the_turns_and_the_text_of_a_run(
    system: RecursiveSystem, questions: list[str], channel: str, stop: tuple[str, ...]
) -> None:
    sampling = SamplingParams(max_new_tokens=12, stop=stop)
    expected = system.run(questions[0], channel=channel, sampling=sampling)
    events = list(system.stream(questions[0], channel=channel, sampling=sampling))
    turns = [event.turn for event in events if isinstance(event, PlayedTurn)]
    assert [(turn.round, turn.role) for turn in turns] == [
        (1, "planner"),
        (1, "critic"),
        (1, "solver"),
        (2, "planner"),
        (2, "critic"),
    ]
    result = events[-1]
    assert isinstance(result, Result)
    assert (result.text, result.finished) == (expected.text, expected.finished)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == expected.text
    for count in ("prompt_tokens", "latent_steps", "generated_tokens", "positions"):
        assert result.usage.total(count) == expected.usage.total(count)


def test_sampled_streams_add_up_to_the_result(system: RecursiveSystem, questions: list[str]) -> None:
    # At a high temperature byte tokens make half letters at every other place, the end included.
    for seed in range(6):
        sampling = SamplingParams(temperature=3.0, max_new_tokens=7, seed=seed)
        *events, result = system.stream(questions[0], num_rounds=1, num_latent_steps=1, sampling=sampling)
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == result.text


def test_streaming_leaves_the_gradient_mode_to_the_caller(system: RecursiveSystem, questions: list[str]) -> None:
    for _ in system.stream(questions[0], num_rounds=1, num_latent_steps=1):
        assert torch.is_grad_enabled()


# Contexts that are full


@pytest.fixture(scope="module")
def narrow() -> dict[str, LanguageModel]:
    """Two models that read at most 96 positions."""
    return {
        role: make_model("llama", seed, max_position_embeddings=96) for seed, role in enumerate(CHATTER_WORDS["roles"])
    }


def question_of(model: LanguageModel, length: int) -> str:
    words = "a plan " * length
    while len(model.encode(words)) > length:
        words = words[:-1]
    return words


def test_a_reply_is_cut_where_the_context_ends_and_says_so(narrow: dict[str, LanguageModel]) -> None:
    system = RecursiveSystem.build(agents=narrow, pattern=CHATTER, prompts=CHATTER_WORDS, num_rounds=1)
    question = question_of(narrow["asker"], 66)
    result = system.run(question, channel="none", sampling=SamplingParams(max_new_tokens=500))
    assert 0 < result.usage.generated_tokens < 40
    assert result.usage.prompt_tokens + result.usage.generated_tokens == 96
    assert not result.finished


def test_a_long_question_does_not_shorten_its_neighbours_replies(narrow: dict[str, LanguageModel]) -> None:
    system = RecursiveSystem.build(agents=narrow, pattern=CHATTER, prompts=CHATTER_WORDS, num_rounds=1)
    long, sampling = question_of(narrow["asker"], 66), SamplingParams(max_new_tokens=60)
    alone = system.run("Why?", sampling=sampling, channel="none")
    beside = system.run(["Why?", long], sampling=sampling, channel="none")[0]
    assert beside.usage.generated_tokens == alone.usage.generated_tokens > 40
    assert beside.text == alone.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel": "latent"}, "the prompt needs"),
        ({"channel": "latent", "num_latent_steps": 90}, "with its thoughts,"),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused(
    narrow: dict[str, LanguageModel], options: dict[str, Any], message: str
) -> None:
    system = RecursiveSystem.build(agents=narrow, pattern=CHATTER, prompts=CHATTER_WORDS, num_rounds=1)
    length = 200 if "num_latent_steps" not in options else 20
    with pytest.raises(InputError, match=f"{message}.*reads at most 96"):
        system.run(question_of(narrow["asker"], length), **options)


# Systems out of systems


def test_solo_is_the_answering_agent_with_its_own_prompt(system: RecursiveSystem, questions: list[str]) -> None:
    solo = system.solo()
    assert list(solo.agents) == ["solver"]
    assert not solo.links
    result = solo.run(questions[0])
    model = system.agents["solver"].model
    rendered = model.render_chat([{"role": "user", "content": f"Question: {questions[0]}\nAnswer the question. "}])
    assert result.usage.prompt_tokens == len(model.encode(rendered))
    assert result.usage.latent_steps == 0
    assert result.text != system.run(questions[0], channel="none").text


def test_a_solo_system_stays_one_when_its_links_are_redrawn(system: RecursiveSystem, questions: list[str]) -> None:
    assert system.solo().with_random_links().run(questions[0]).text == system.solo().run(questions[0]).text


def test_random_links_change_the_messages_and_nothing_else(system: RecursiveSystem, questions: list[str]) -> None:
    before = {name: link.state_dict() for name, link in system.all_links.items()}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in before.items()}
    text = system.run(questions[1]).text
    redrawn = system.with_random_links(seed=1)
    assert redrawn.agents["planner"].model is system.agents["planner"].model
    found, own = (each.run(questions[1], trace="full") for each in (redrawn, system))
    assert own.text == text
    for message, other in zip(found.trace.messages, own.trace.messages, strict=True):
        assert not torch.allclose(message.tensor(), other.tensor())
    for name, link in system.all_links.items():
        for key, tensor in link.state_dict().items():
            assert torch.equal(tensor, before[name][key])


def test_random_links_follow_their_seed(system: RecursiveSystem) -> None:
    weights = [system.with_random_links(seed).links["critic->solver"].w1.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_links_of_a_new_system_follow_their_seed(make_system: MakeSystem) -> None:
    weights = [make_system(seed=seed).links["critic->solver"].w1.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("message", ["inner+outer", "outer"])
@pytest.mark.parametrize("design", ["res-2-layer", "ln-res-2-layer", "2-layer"])
def test_new_links_are_as_loud_as_their_readers_are_used_to(
    make_system: MakeSystem, questions: list[str], message: str, design: str
) -> None:
    result = make_system(message=message, design=design).run(questions[1])
    norms = [norm for each in result.trace.messages for norm in each.norms]
    assert all(0.5 < norm < 2 for norm in norms)


def test_agents_given_by_the_same_name_share_one_copy(tiny_models: dict[str, LanguageModel], tmp_path: Any) -> None:
    tiny_models["qwen3"].save_pretrained(tmp_path / "model")
    place = str(tmp_path / "model")
    system = RecursiveSystem.build(agents={"planner": place, "critic": tiny_models["llama"], "solver": place})
    assert system.agents["planner"].model is system.agents["solver"].model
    assert system.agents["planner"].inner_link is not system.agents["solver"].inner_link


def test_link_parameters_train_in_float32_and_base_weights_never(make_system: MakeSystem) -> None:
    roles = ("planner", "critic", "solver")
    models = {role: make_model("qwen3") for role in roles}
    for model in models.values():
        model.network.to(torch.bfloat16)
    system = make_system(agents=models)
    assert {parameter.dtype for parameter in system.trainable_parameters().values()} == {torch.float32}
    result = system.run("What is 2 + 2?", trace="full")
    assert result.trace.messages[0].tensor().dtype == torch.bfloat16
    assert len(system.trainable_parameters()) == 3 * 2 + 3 * 3


# What does not fit together


def test_a_link_of_another_width_is_refused_with_both_sizes(system: RecursiveSystem) -> None:
    links = {**system.links, "planner->critic": RecursiveLink.outer(48, 56)}
    with pytest.raises(CheckpointError, match=r"'planner->critic' is made for 56-wide states, but the critic.*64"):
        RecursiveSystem(system.agents, links, system.pattern, system.prompts)


def test_an_inner_link_of_another_width_is_refused(system: RecursiveSystem) -> None:
    agents = {**system.agents, "solver": Agent("solver", system.agents["solver"].model, RecursiveLink.inner(48))}
    with pytest.raises(CheckpointError, match="inner link of 'solver' is made for 48-wide states"):
        RecursiveSystem(agents, system.links, system.pattern, system.prompts)


def test_a_missing_or_unknown_part_is_refused_by_name(system: RecursiveSystem) -> None:
    def put_together(agents: dict[str, Agent], links: dict[str, RecursiveLink]) -> RecursiveSystem:
        return RecursiveSystem(agents, links, system.pattern, system.prompts)

    def without(parts: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: value for key, value in parts.items() if key != name}

    with pytest.raises(CheckpointError, match="no link for the edge 'critic->solver'"):
        put_together(system.agents, without(system.links, "critic->solver"))
    with pytest.raises(PatternError, match="needs an agent for the role 'critic'"):
        put_together(without(system.agents, "critic"), system.links)
    with pytest.raises(PatternError, match="unknown role 'solvr': did you mean 'solver'"):
        put_together({**system.agents, "solvr": system.agents["solver"]}, system.links)
    with pytest.raises(PatternError, match="unknown edge 'critic->solve': did you mean 'critic->solver'"):
        put_together(system.agents, {**system.links, "critic->solve": system.links["critic->solver"]})


def test_a_slot_for_nobody_and_a_source_without_slot_are_refused(make_system: MakeSystem) -> None:
    words = {
        "planner": {"always": "{question} {latents:solver}"},
        "critic": {"always": "{question} {latents:planner}"},
        "solver": {"always": "{question} {latents:critic}"},
    }
    make_system(prompts={"name": "right", "roles": words})
    typo = {**words, "critic": {"always": "{question} {latents:planer}"}}
    with pytest.raises(PatternError, match="unknown slot 'planer': did you mean 'planner'"):
        make_system(prompts={"name": "typo", "roles": typo})
    with pytest.raises(PatternError, match=r"no template of the critic has the slot \{latents:planner\}"):
        make_system(prompts={"name": "deaf", "roles": {**words, "critic": {"always": "{question}"}}})
    with pytest.raises(PatternError, match="unknown role 'critic'"):
        make_system(prompts={"name": "short", "roles": {key: words[key] for key in ("planner", "solver")}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds"),
        ({"num_round": 3}, "did you mean 'num_rounds'"),
        ({"channel": "latnet"}, "channel"),
        ({"design": "res-2-layr"}, "did you mean 'res-2-layer'"),
        ({"pattern": "sequentail"}, "did you mean 'sequential'"),
        ({"prompts": "wrad"}, "did you mean 'ward'"),
    ],
)
def test_a_system_is_not_built_with_wrong_settings(
    make_system: MakeSystem, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_system(**settings)


# Bad input to a run. Types are not checked here, as they are not for a user.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("", "the question is empty"),
        (" \n\t", "the question is empty"),
        ([], "no question was given"),
        (["Why?", "  "], "question 2 is empty"),
        (["Why?", "How?", 5], "question 3 is a int, expected text"),
        ([["Why?"]], "is a list, expected text"),
        (5, "got int"),
        (None, "got NoneType"),
        (b"Why?", "got bytes"),
        ({"question": "Why?"}, "got dict"),
        ("Why? \ud800", "not valid text"),
        ("Why? " * 2000, "reads at most 1024"),
        (["Why?", "Why? " * 2000], "reads at most 1024"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(system: RecursiveSystem, questions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        system.run(questions)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["num_rounds", "num_latent_steps"])
@pytest.mark.parametrize("value", [-1, 10**9, 2.5, True, "2", float("nan")])
def test_dials_out_of_range_are_refused(system: RecursiveSystem, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number from . to"):
        system.run("Why?", **{name: value})


def test_no_round_at_all_is_refused(system: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="num_rounds must be a whole number from 1"):
        system.run("Why?", num_rounds=0)


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_of_numpy_serve_as_dials(system: RecursiveSystem, tmp_path: Any) -> None:
    options = {"num_rounds": np.int64(1), "num_latent_steps": np.int32(2)}
    result = system.run("Why?", trace="full", trace_dir=tmp_path / "trace", **options)
    assert result.text == system.run("Why?", num_rounds=1, num_latent_steps=2).text


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channel": "latnet"}, ConfigError, "unknown channel 'latnet': did you mean 'latent'"),
        ({"channel": ""}, ConfigError, "unknown channel"),
        ({"channel": {}}, ConfigError, "no channel was given for the edge 'planner->critic'"),
        ({"channel": {"planner->critic": "text"}}, ConfigError, "no channel was given for the edge 'critic->solver'"),
        ({"channel": {"planner->critik": "text"}}, ConfigError, "unknown edge 'planner->critik': did you mean"),
        ({"variant": "graded"}, ConfigError, "unknown prompt variant 'graded'"),
        ({"trace": "ful"}, ConfigError, "unknown trace level 'ful': did you mean 'full'"),
        ({"trace": None}, ConfigError, "unknown trace level"),
        ({"intervene": "shufled"}, ConfigError, "unknown intervention 'shufled': did you mean 'shuffled'"),
        ({"intervene": True}, ConfigError, "unknown intervention"),
        ({"keys": ["a", "b"]}, InputError, "2 keys were given for 1 questions"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"batch_size": 2.5}, ConfigError, "batch_size"),
        ({"intervene": "shuffled"}, InputError, "at least two questions"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_nearest_name(
    system: RecursiveSystem, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        system.run(["Why?"], **options)


def test_a_channel_is_checked_where_no_edge_uses_it(system: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="did you mean 'latent'"):
        system.solo().run("Why?", channel="latnet")


@pytest.mark.parametrize(
    ("part", "edge"),
    [("inner", "planner->critic"), ("outer", "critic->solver"), ("feedback", "solver->planner")],
)
def test_latents_that_are_not_finite_stop_the_run_by_name(system: RecursiveSystem, part: str, edge: str) -> None:
    source = edge.split("->")[0]
    link = system.agents[source].inner_link if part == "inner" else system.links[edge]
    link.w1.weight[0, 0] = float("nan")
    with pytest.raises(
        NumericsError, match=f"{edge} of round 1 is not finite for 1 of 1 .*'Name the river', at latent step"
    ):
        system.run(["Name the river"], num_rounds=2)


def test_rounds_to_answer_in_must_be_played(system: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="answer_rounds"):
        system.unroll(["Why?"], num_rounds=2, answer_rounds=[3])


def test_unroll_takes_one_question_as_text(system: RecursiveSystem) -> None:
    *_, last = system.unroll("Why?", num_rounds=1, num_latent_steps=1)
    assert last.reading.cache.batch_size == 1


def test_several_answers_are_sampled_from_the_same_latents(system: RecursiveSystem) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=6, seed=3)
    questions = ["What is two times twenty-one?", "The fox jumps over the river", "A plan."]
    several = system.run(questions, sampling=sampling, num_samples=5)
    one = system.run(questions, sampling=sampling)
    for many, single in zip(several, one, strict=True):
        assert many.text == single.text == many.samples[0]
        assert single.samples == ()
        assert len(set(many.samples)) > 1
        # Latents are thought once, and only the answers are written so many times.
        assert many.usage.total("latent_steps") == single.usage.total("latent_steps")
        assert many.usage.total("prompt_tokens") == single.usage.total("prompt_tokens")
        assert many.usage.total("generated_tokens") > 2 * single.usage.total("generated_tokens")
    alone = system.run(questions[1], sampling=sampling, num_samples=3)
    assert alone.samples == several[1].samples[:3]


def test_several_answers_need_a_temperature(system: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        system.run("What?", num_samples=2)
    with pytest.raises(ConfigError, match="num_samples"):
        system.run("What?", num_samples=0)
