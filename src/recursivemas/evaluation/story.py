"""Stories: one question told step by step, over latents, in text, and by the answering agent alone.

    tell          runs the system on the question and keeps what its agents handed each other
    Story         what came of it: results, scores, and both channels side by side
    story_text    a story for the terminal

Knows systems from outside, results and traces; knows nothing of arms, of many questions, of pages, or of worlds.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recursivemas.answering import Result
from recursivemas.evaluation.figures import decimal, say_rounds
from recursivemas.evaluation.scorers import Score, Scorer, exact, posterior
from recursivemas.evaluation.task import Sample
from recursivemas.system import RecursiveSystem
from recursivemas.tools import Toolbox
from recursivemas.trace import TracedMessage

NUM_LATENTS = 4
"""Of a longer message the terminal leaves the rest out."""


@dataclass(frozen=True)
class Story:
    """One question, answered over latents and, to compare, in text and by the answering agent alone."""

    question: str
    target: str
    optimum_note: str
    """What is known about the best possible answer; empty where nothing is."""
    latent: Result
    text: Result | None = None
    solo: Result | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By channel: latent, text, solo."""

    @property
    def results(self) -> dict[str, Result]:
        """The results there are, by channel."""
        found = {"latent": self.latent, "text": self.text, "solo": self.solo}
        return {name: result for name, result in found.items() if result is not None}

    @property
    def wording(self) -> str:
        """The label of the text channel, as in the tables: `text/graded`."""
        variant = self.text.trace.settings.get("variant") if self.text is not None else None
        return "text" if variant is None else f"text/{variant}"

    def passages(self) -> dict[int, list[tuple[TracedMessage, str | None]]]:
        """By round, every latent message with what its sender wrote at this point on the text channel."""
        written = self.text.trace.messages if self.text is not None else []
        texts = {(each.round, each.source, each.target): each.text for each in written}
        rounds: dict[int, list[tuple[TracedMessage, str | None]]] = {}
        for message in self.latent.trace.messages:
            text = texts.get((message.round, message.source, message.target))
            rounds.setdefault(message.round, []).append((message, text))
        return rounds


def tell(
    system: RecursiveSystem,
    sample: Sample,
    *,
    rounds: int,
    variant: str | None = None,
    scorer: Scorer | None = None,
    instructions: str = "",
    num_latent_steps: int | None = None,
    toolbox: Toolbox | None = None,
) -> Story:
    """Run a system on one question, over latents, in text (in the wording `variant`) and solo, and keep the traces.

    Solo is left out where the prompts have no words for it. `scorer`, `instructions` and `toolbox` are those of the
    task; without
    a scorer, answers are scored by the exact posterior where the sample has one, otherwise compared with the target.
    """
    known = isinstance(sample.metadata.get("posterior"), Mapping)
    score = scorer or (posterior if known else exact)

    def answer(player: RecursiveSystem, channel: str, wording: str | None = None) -> Result:
        result: Result = player.run(
            sample.question,
            num_rounds=rounds,
            num_latent_steps=num_latent_steps,
            channel=channel,
            variant=wording,
            instructions=instructions,
            keys=[sample.id],
            trace="summary",
            tools=toolbox,
        )
        return result

    results = {"latent": answer(system, "latent"), "text": answer(system, "text", variant)}
    if system.prompts.roles[system.pattern.answers].solo is not None:
        results["solo"] = answer(system.solo(), "latent")
    scores = {name: score(result.text, sample.target, sample.metadata) for name, result in results.items()}
    return Story(sample.question, sample.target, _optimum_note(sample, rounds), **results, scores=scores)


def _optimum_note(sample: Sample, num_rounds: int) -> str:
    """What the sample's metadata says about the best possible answer."""
    probabilities, optimum = (sample.metadata.get(name) for name in ("posterior", "optimum"))
    notes = []
    if isinstance(probabilities, Mapping):
        likeliest = sorted(probabilities.items(), key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"{answer} {decimal(probability, 2)}" for answer, probability in likeliest)
        notes.append(f"Probabilities given everything in the case: {listed}.")
    if isinstance(optimum, Mapping):
        reached = sorted((int(rounds), value) for rounds, value in optimum.items() if int(rounds) <= num_rounds)
        listed = ", ".join(f"{decimal(value, 2)} after {say_rounds(rounds)}" for rounds, value in reached)
        notes.append(f"The best choice that the findings uncovered so far allow is right with probability {listed}.")
    return " ".join(notes)


def story_text(story: Story) -> RenderableType:
    """A story for the terminal: for each message the token nearest to each latent, with its cosine, and the text."""
    messages = [message for message, _ in itertools.chain.from_iterable(story.passages().values())]
    longest = max((len(each.nearest or []) for each in messages), default=0)
    num_latents = min(longest, NUM_LATENTS)
    view = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("round", "passed on", *(f"latent {number + 1}" for number in range(num_latents))):
        view.add_column(heading, no_wrap=True)
    if story.text is not None:
        view.add_column(Text(f"the same agent on {story.wording}"), style="italic", min_width=24)
    for number, passages in story.passages().items():
        for index, (message, text) in enumerate(passages):
            cells = [Text(str(number) if index == 0 else ""), Text(f"{message.source} → {message.target}")]
            cells += _nearest_cells(message, num_latents)
            cells += [Text(text or "–")] if story.text is not None else []
            view.add_row(*cells, end_section=index + 1 == len(passages))
    shown = f"The first {num_latents} of {longest} latents: " if longest > num_latents else ""
    hint = (
        f"{shown}{'t' if shown else 'T'}he nearest token with its cosine; a hint, not a reading. {story.optimum_note}"
    )
    return Group(Text(story.question), Text(), view, Text(), _answers(story), Text(), Text(hint.strip(), style="dim"))


def _nearest_cells(message: TracedMessage, num_latents: int) -> list[Text]:
    nearest = [tokens[0] for tokens in (message.nearest or [])[:num_latents]]
    cells = [Text(token).append(f" {decimal(cosine, 2)}", style="dim") for token, cosine in nearest]
    return cells + [Text("–")] * (num_latents - len(cells))


def _answers(story: Story) -> Table:
    view = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    view.add_column("channel", no_wrap=True, vertical="bottom")
    view.add_column("answer", vertical="bottom")
    for heading in ("score", "generated tokens", "latent steps"):
        view.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for name, result in story.results.items():
        score = decimal(story.scores[name].value) if name in story.scores else "–"
        counts = str(result.usage.generated_tokens), str(result.usage.latent_steps)
        view.add_row(Text(story.wording if name == "text" else name), Text(result.text), score, *counts)
    view.add_row("target", Text(story.target), style="italic")
    return view
