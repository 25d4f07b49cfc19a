"""What training will read, before it does: how long the texts are, and a sample of each role as its model reads it.

Lengths are counted and samples rendered with the agents' own tokenizers and chat templates; no weights are needed.
Knows recipes, turns and questions; knows nothing of where these come from, or of how they are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from recursivemas.models import LanguageModel
from recursivemas.prompts import Slot
from recursivemas.training.data import Question, RoleSample, prompt_lengths, turn_pieces
from recursivemas.training.estimate import Team
from recursivemas.training.recipe import Material, Recipe, speaks

NUM_SAMPLES = 1024
"""Turns of each role, and questions, that are looked at."""
_LEAST_BIN = 16


class Piece(NamedTuple):
    """A part of a rendered sample."""

    kind: str
    """prompt; message (text in a slot); latents (in a slot); target, or end (of the reply), which are supervised."""
    text: str
    num_tokens: int
    sender: str | None = None
    """Whose message it is."""

    @property
    def is_supervised(self) -> bool:
        """Whether a loss is taken from it."""
        return self.kind in ("target", "end")


@dataclass(frozen=True)
class RenderedSample:
    """A sample as a model reads it."""

    stage: str
    role: str
    round: int
    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        """Positions, latents included."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_supervised(self) -> int:
        """Positions that a loss is taken from; all of them stand at the end."""
        return sum(piece.num_tokens for piece in self.pieces if piece.is_supervised)


@dataclass(frozen=True)
class TextLengths:
    """How long some texts are, in tokens of the model that reads them."""

    stage: str
    role: str
    text: str
    """What they are: a prompt with its messages, what should be written after it, or both."""
    lengths: tuple[int, ...]
    room: int | None = None
    """Positions there are for them, if there is an end to that."""

    @property
    def too_long(self) -> int:
        """How many do not fit."""
        return sum(self.room is not None and length > self.room for length in self.lengths)

    def quantile(self, share: float) -> int:
        """The length that so large a share of them does not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def histogram(self) -> dict[int, int]:
        """By an upper bound, a power of two: how many are so long, and longer than half of that.

        >>> TextLengths("inner", "planner", "prompt", (3, 16, 17, 60, 61)).histogram
        {16: 2, 32: 1, 64: 2}
        """
        bounds = [_LEAST_BIN]
        while bounds[-1] < max(self.lengths):
            bounds.append(2 * bounds[-1])
        found = dict.fromkeys(bounds, 0)
        for length in self.lengths:
            found[next(bound for bound in bounds if length <= bound)] += 1
        return found

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "stage": self.stage,
            "role": self.role,
            "text": self.text,
            "number": len(self.lengths),
            "mean": sum(self.lengths) / len(self.lengths),
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": max(self.lengths),
            "room": self.room,
            "too_long": self.too_long,
            "histogram": {str(bound): number for bound, number in self.histogram.items()},
        }


@dataclass(frozen=True)
class Preview:
    """Lengths, samples and numbers of a recipe's text."""

    questions: dict[str, int]
    """By split."""
    lengths: tuple[TextLengths, ...]
    samples: tuple[RenderedSample, ...]
    left_out: dict[str, str]
    """Of roles and splits in words what became of their samples, where any were left out."""

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        samples = [
            {
                **{name: value for name, value in asdict(each).items() if name != "pieces"},
                "tokens": each.num_tokens,
                "supervised": each.num_supervised,
                "pieces": [{**piece._asdict(), "supervised": piece.is_supervised} for piece in each.pieces],
            }
            for each in self.samples
        ]
        lengths = [each.to_plain() for each in self.lengths]
        return {"questions": self.questions, "lengths": lengths, "samples": samples, "left_out": self.left_out}


def preview(recipe: Recipe, team: Team, material: Material, stages: Sequence[str]) -> Preview:
    """Look at the text of a recipe. Raises `ModelError` if a tokenizer cannot be had, `InputError` for bad data."""
    loaded = {name: LanguageModel.without_weights(name) for name in dict.fromkeys(team.models.values())}
    models = {role: loaded[team.models[role]] for role in team.pattern.roles}
    look = _Look(recipe, team, material, models)
    lengths: list[TextLengths] = []
    samples: list[RenderedSample] = []
    reads_turns = "inner" in stages or "alignment" in stages or ("outer" in stages and recipe.outer.anchor > 0)
    for role in team.pattern.roles if reads_turns else ():
        turns = [each for each in material.turns(role, NUM_SAMPLES) if not speaks(each, team.pattern)]
        lengths += look.turn_lengths(role, turns)
        # One that hears somebody shows more.
        samples += [look.turn(next((each for each in turns if each.messages), turns[0]))] if turns else []
    found: dict[str, int] = {}
    if "outer" in stages:
        questions = material.questions("train", recipe.outer.num_samples)
        found = {"train": len(questions)}
        found["validation"] = len(material.questions("validation", recipe.outer.num_validation))
        lengths += look.question_lengths(questions[:NUM_SAMPLES])
        for role in (team.pattern.answers,) if reads_turns else team.pattern.roles:
            samples.append(look.question(role, questions[0]))
    left_out = {name: str(each) for name, each in material.counts.items() if each.empty or each.too_long}
    return Preview(found, tuple(lengths), tuple(samples), left_out)


@dataclass(frozen=True)
class _Look:
    recipe: Recipe
    team: Team
    material: Material
    models: Mapping[str, LanguageModel]

    def _room(self, role: str) -> int | None:
        context, limits = self.models[role].max_positions, self.material.limits
        return context if limits is None else limits.room(context)

    def turn_lengths(self, role: str, turns: Sequence[RoleSample]) -> list[TextLengths]:
        """Of the turns of a role: what it reads, what it should write, and both."""
        if not turns:
            return []
        model = self.models[role]
        pieces = [[text for _, text in turn_pieces(turn, self.team.prompts, model.render_chat)] for turn in turns]
        read = [sum(map(len, model.encode_batch(texts))) for texts in pieces]
        written = [len(ids) + 1 for ids in model.encode_batch([turn.target for turn in turns])]
        return self._lengths("inner", role, read, written)

    def question_lengths(self, questions: Sequence[Question]) -> list[TextLengths]:
        """Of the outer loop: the prompts of each role with latents in their slots, and the answers."""
        team, found = self.team, []
        for role in team.pattern.roles:
            is_speaker = role == team.pattern.answers
            # The last of the rounds has every slot filled.
            lengths = prompt_lengths(
                questions,
                self.models[role],
                team.prompts,
                role,
                round=team.num_rounds,
                is_last=True,
                num_latent_steps=team.num_latent_steps,
                variant=self.recipe.variant,
            )
            read = list(lengths)
            if is_speaker:
                answers = self.models[role].encode_batch([question.answer for question in questions])
                found += self._lengths("outer", role, read, [len(ids) + 1 for ids in answers])
            else:
                found.append(TextLengths("outer", role, "prompt", tuple(read), self._room(role)))
        return found

    def _lengths(self, stage: str, role: str, read: Sequence[int], written: Sequence[int]) -> list[TextLengths]:
        both = tuple(before + after for before, after in zip(read, written, strict=True))
        return [
            TextLengths(stage, role, "prompt", tuple(read)),
            TextLengths(stage, role, "target", tuple(written)),
            TextLengths(stage, role, "both", both, self._room(role)),
        ]

    def turn(self, turn: RoleSample) -> RenderedSample:
        """A turn of the stages before the outer loop: text in its slots, and what should be written after it."""
        model = self.models[turn.role]
        pieces = []
        for sender, text in turn_pieces(turn, self.team.prompts, model.render_chat):
            pieces.append(Piece("prompt" if sender is None else "message", text, len(model.encode(text)), sender))
        return RenderedSample("inner", turn.role, turn.round, (*pieces, *self._written(model, turn.target)))

    def question(self, role: str, question: Question) -> RenderedSample:
        """A turn of the last round of the outer loop: latents in its slots; the answering role is supervised."""
        model, steps, round = self.models[role], self.team.num_latent_steps, self.team.num_rounds
        segments = self.team.prompts.segments(
            role,
            question.text,
            render_chat=model.render_chat,
            round=round,
            is_last=True,
            variant=self.recipe.variant,
        )
        pieces = []
        for segment in segments:
            if isinstance(segment, Slot):
                pieces.append(Piece("latents", "", steps, segment.role))
            else:
                pieces.append(Piece("prompt", segment, len(model.encode(segment))))
        written = self._written(model, question.answer) if role == self.team.pattern.answers else ()
        return RenderedSample("outer", role, round, (*pieces, *written))

    def _written(self, model: LanguageModel, text: str) -> tuple[Piece, ...]:
        end = str(model.tokenizer.convert_ids_to_tokens(model.reply_end_id))
        return Piece("target", text, len(model.encode(text))), Piece("end", end, 1)
