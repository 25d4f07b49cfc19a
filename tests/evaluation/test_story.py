"""Stories: what was run and handed on is what is told, and nothing a user wrote is taken for markup."""

import pytest
from tests.evaluation.conftest import make_story, render

from recursivemas.evaluation.scorers import exact, posterior
from recursivemas.evaluation.story import story_text, tell
from recursivemas.evaluation.task import Sample
from recursivemas.system import RecursiveSystem


@pytest.fixture
def sample(questions: list[str]) -> Sample:
    return Sample(id="a", question=questions[1], target="14", metadata={})


def test_tell_runs_latent_text_and_solo_with_what_was_passed_on(system: RecursiveSystem, sample: Sample) -> None:
    story = tell(system, sample, rounds=2)
    assert list(story.results) == list(story.scores) == ["latent", "text", "solo"]
    assert story.latent.text == system.run(sample.question, num_rounds=2, channel="latent").text
    assert story.text is not None
    passages = story.passages()
    assert {round: [message.source for message, _ in each] for round, each in passages.items()} == {
        1: ["planner", "critic", "solver"],
        2: ["planner", "critic"],
    }
    for round, each in passages.items():
        for message, text in each:
            assert message.nearest is not None
            assert len(message.nearest) == len(message.norms or []) == 4
            assert text == story.text.trace.find(round, message.source, message.target).text


def test_tell_scores_by_the_posterior_where_there_is_one(system: RecursiveSystem, sample: Sample) -> None:
    known = {"posterior": {"fox": 0.75, "dog": 0.25}, "optimum": {1: 0.25, 2: 0.75, 3: 0.8}}
    story = tell(system, Sample(id="a", question=sample.question, target="fox", metadata=known), rounds=2)
    assert story.scores["latent"] == posterior(story.latent.text, "fox", known)
    assert "fox .75, dog .25" in story.optimum_note
    assert ".25 after one round, .75 after two rounds." in story.optimum_note
    plain = tell(system, sample, rounds=1, scorer=exact)
    assert plain.scores["solo"] == exact(plain.results["solo"].text, sample.target, {})
    assert plain.optimum_note == ""


def test_tell_leaves_solo_out_where_the_prompts_have_no_words_for_it(system: RecursiveSystem, sample: Sample) -> None:
    roles = {**system.prompts.roles, "solver": system.prompts.roles["solver"].model_copy(update={"solo": None})}
    system.prompts = system.prompts.model_copy(update={"roles": roles})
    assert tell(system, sample, rounds=1).solo is None


def test_story_text_shows_tokens_and_takes_nothing_for_markup() -> None:
    shown = render(story_text(make_story("[bold]Who[/bold]?", "[red]", "[/]")))
    for expected in ("[bold]Who[/bold]?", "planner → solver", "[red] .75", "river 1.00", "[/]", "text/short"):
        assert expected in shown
    assert "latent" in render(story_text(make_story(text=None)), width=60)
