"""What links are trained on: turns of roles, as text. A turn is what a role read and what it should have written.

What is too long for a context is refused, left out and counted, or cut at the end of what should be written: then
nothing is learnt of how a text ends, because it did not. A prompt is never cut, and so no slot of it is: with a message
that is too long for it a turn is left out, and with a question that is too long, refused.

Knows prompts and tokens; knows nothing of where the turns come from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from recursivemas.errors import InputError
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern, Turn
from recursivemas.prompts import PromptSet, RenderChat, Slot
from recursivemas.tools.tags import results_in
from recursivemas.training.datasets import Counts, Limits

Span = tuple[int, int]
_TOGETHER = 512
"""Questions whose prompts are tokenised at once."""


@dataclass(frozen=True, kw_only=True)
class RoleSample:
    """One turn of one role, as text."""

    role: str
    question: str
    target: str
    """What the role should write."""
    round: int = 1
    num_rounds: int = 1
    """In the last round the `last` template is read, if there is one."""
    messages: Mapping[str, str] = field(default_factory=dict)
    """What stands in the slots, by sender; a sender that is missing has an empty slot."""
    variant: str | None = None
    solo: bool = False
    unjudged: tuple[Span, ...] = ()
    """Parts of the target (characters) that are read in pretraining, and not learnt, beside the results of tools."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with what the answering role should write in the end."""

    id: str
    text: str
    answer: str
    rounds: int = 1
    """Rounds that the answer takes: before, it cannot be known, and nothing can be learnt from it."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """What the other roles should write, by role, if it is known: see `outer.latent_source: targets`."""
    posterior: Mapping[str, float] = field(default_factory=dict)
    """Where it is known: the probability of everything that may be written, given all that can be known."""
    is_cut: bool = False
    """Whether the end of the answer is missing."""


@dataclass(frozen=True)
class EncodedTurn:
    """A `RoleSample` as tokens of the model that plays the role."""

    prompt_ids: list[int]
    target_ids: list[int]
    """Without the token that ends a reply."""
    target: str
    is_cut: bool = False
    """Whether the end of the target is missing."""
    unjudged: frozenset[int] = frozenset()
    """Which tokens of the target are read, and not learnt: what tools have said, and what the sample names."""


def check_disjoint(splits: Mapping[str, Sequence[Question]]) -> None:
    """Raise `InputError` if a question is in two splits: what was trained on, or chosen by, cannot judge any more."""
    owner: dict[str, str] = {}
    for name, questions in splits.items():
        shared = [question for question in questions if owner.get(question.text, name) != name]
        if shared:
            other = owner[shared[0].text]
            raise InputError(
                f"{len(shared)} of {len(questions)} {name} questions are {other} questions, too (the first is "
                f"{shared[0].id}: '{' '.join(shared[0].text.split())[:60]}'); take them out of one of the two"
            )
        owner.update({question.text: name for question in questions})


def turn_pieces(sample: RoleSample, prompts: PromptSet, render_chat: RenderChat) -> list[tuple[str | None, str]]:
    """The prompt of a turn in pieces of text, each tokenised on its own: those of a slot with the role it is from."""
    segments = prompts.segments(
        sample.role,
        sample.question,
        render_chat=render_chat,
        round=sample.round,
        is_last=sample.round == sample.num_rounds,
        solo=sample.solo,
        variant=sample.variant,
    )
    return [
        (None, each) if isinstance(each, str) else (each.role, sample.messages.get(each.role, "")) for each in segments
    ]


def encode_turns(
    samples: Sequence[RoleSample],
    model: LanguageModel,
    prompts: PromptSet,
    *,
    limits: Limits | None = None,
    counts: Counts | None = None,
) -> list[EncodedTurn]:
    """Tokenise turns piece by piece, just as prompts with messages in their slots are read in a run.

    `limits` says what is done with those that are too long (by default they are refused), and `counts` is told of it.
    Raises `InputError`.
    """
    pieces = [turn_pieces(sample, prompts, model.render_chat) for sample in samples]
    flat = [text for row in pieces for _, text in row]
    known = dict(zip(flat, model.encode_batch(flat), strict=True))
    targets = model.encode_batch([sample.target for sample in samples])
    fitting = _Fitting(limits, counts or Counts())
    turns = []
    for sample, row, target_ids in zip(samples, pieces, targets, strict=True):
        if not target_ids:
            raise InputError(f"a turn of the {sample.role} has an empty target; leave such turns out")
        prompt_ids = [token for _, text in row for token in known[text]]
        in_slots = sum(len(known[text]) for sender, text in row if sender is not None)
        if limits is None:
            model.check_length(len(prompt_ids) + len(target_ids) + 1, f"a turn of the {sample.role}")
        need = _Need(f"a turn of the {sample.role}", sample.question, len(prompt_ids), model, in_slots)
        kept = fitting.keep([need], [], len(target_ids))
        if kept == len(target_ids):
            unjudged = unjudged_tokens(model, sample.target, sample.unjudged)
            turns.append(EncodedTurn(prompt_ids, target_ids, sample.target, unjudged=unjudged))
        elif kept is not None:
            text, ids = cut_text(model, sample.target, kept)
            unjudged = unjudged_tokens(model, text, sample.unjudged)
            turns.append(EncodedTurn(prompt_ids, ids, text, is_cut=True, unjudged=unjudged))
    fitting.end()
    return turns


def unjudged_tokens(model: LanguageModel, target: str, spans: Sequence[Span] = ()) -> frozenset[int]:
    """Which tokens of a target are not learnt: those of some parts of it, and what tools say in it.

    That is read when it has come, and written by nobody: a loss on it would teach to guess it.
    """
    parts = (*results_in(target), *spans)
    if not parts:
        return frozenset()
    places = enumerate(model.spans(target)[1])
    return frozenset(place for place, (start, end) in places if any(start < b and end > a for a, b in parts))


def fit_questions(
    questions: Sequence[Question],
    models: Mapping[str, LanguageModel],
    pattern: Pattern,
    prompts: PromptSet,
    *,
    num_rounds: int,
    num_latent_steps: int,
    limits: Limits,
    counts: Counts,
    answer_rounds: Sequence[int] = (),
    variant: str | None = None,
) -> list[Question]:
    """Questions with which every prompt of the recursion fits its context, with what is thought or answered after it.

    Those that are too long are refused, left out, or their answers cut, as `limits` says; `counts` is told of it.
    Raises `InputError`.
    """
    forms: dict[tuple[str, str, bool], Turn] = {}
    for turn in pattern.schedule(num_rounds, answer_rounds=answer_rounds):
        is_last = turn.speaks or turn.round == num_rounds
        forms.setdefault((turn.role, prompts.template(turn.role, round=turn.round, is_last=is_last), turn.speaks), turn)
    speaker = models[pattern.answers]
    fitting = _Fitting(limits, counts)
    fitted = []
    for start in range(0, len(questions), _TOGETHER):
        part = questions[start : start + _TOGETHER]
        answers = speaker.encode_batch([question.answer for question in part])
        needs: list[tuple[list[_Need], list[_Need]]] = [([], []) for _ in part]
        for turn in forms.values():
            is_last = turn.speaks or turn.round == num_rounds
            lengths = prompt_lengths(
                part,
                models[turn.role],
                prompts,
                turn.role,
                round=turn.round,
                is_last=is_last,
                num_latent_steps=num_latent_steps,
                variant=variant,
            )
            for question, length, (speaking, thinking) in zip(part, lengths, needs, strict=True):
                steps = 0 if turn.speaks else num_latent_steps
                what = f"the prompt of the {turn.role}, with its messages{' and thoughts' if steps else ''},"
                need = _Need(f"{question.id}: {what}", question.text, length + steps, models[turn.role])
                (speaking if turn.speaks else thinking).append(need)
        for question, ids, (speaking, thinking) in zip(part, answers, needs, strict=True):
            kept = fitting.keep(speaking, thinking, len(ids))
            if kept == len(ids):
                fitted.append(question)
            elif kept is not None:
                fitted.append(replace(question, answer=cut_text(speaker, question.answer, kept)[0], is_cut=True))
    fitting.end()
    return fitted


def cut_text(model: LanguageModel, text: str, num_tokens: int) -> tuple[str, list[int]]:
    """The beginning of a text that has at most so many tokens of a model, and these."""
    spans = model.spans(text)[1]
    for last in range(min(num_tokens, len(spans)) - 1, -1, -1):
        kept = text[: spans[last][1]]
        ids = model.encode(kept)
        # A word that is cut may take more tokens than it took whole.
        if 0 < len(ids) <= num_tokens:
            return kept, ids
    raise InputError(f"no part of '{text[:40]}' fits into {num_tokens} tokens")


def prompt_lengths(
    questions: Sequence[Question],
    model: LanguageModel,
    prompts: PromptSet,
    role: str,
    *,
    round: int,
    is_last: bool,
    num_latent_steps: int,
    variant: str | None = None,
) -> Iterator[int]:
    """Positions of the prompt of a role in a round for each question, with latents in every slot."""
    prompted = [
        prompts.segments(role, each.text, render_chat=model.render_chat, round=round, is_last=is_last, variant=variant)
        for each in questions
    ]
    texts = list(dict.fromkeys(piece for segments in prompted for piece in segments if isinstance(piece, str)))
    lengths = {text: len(ids) for text, ids in zip(texts, model.encode_batch(texts), strict=True)}
    for segments in prompted:
        yield sum(num_latent_steps if isinstance(piece, Slot) else lengths[piece] for piece in segments)


@dataclass(frozen=True)
class _Need:
    """Positions that something takes before what is written after it, and the model that has to read it."""

    what: str
    question: str
    positions: int
    model: LanguageModel
    in_slots: int = 0
    """Those of them that messages take, as text."""


@dataclass
class _Fitting:
    """Decides for one sample after another how much of what should be written there is room for."""

    limits: Limits | None
    counts: Counts
    too_long: list[str] = field(default_factory=list)
    """Of samples that are refused, why."""
    cannot_be_cut: bool = False

    def keep(self, speaking: Sequence[_Need], thinking: Sequence[_Need], written: int) -> int | None:
        """Tokens to keep of what is written after each of `speaking`; None if the sample is left out, or refused.

        A token is reserved for the end of the reply, and a cut text has no end.
        """
        if self.limits is None:
            self.counts.used += 1
            return written
        kept = written
        for need in (*speaking, *thinking):
            room = self.limits.room(need.model.max_positions)
            after = written + 1 if need in speaking else 0
            if room is None or need.positions + after <= room:
                continue
            left = room - need.positions
            fits_without = self.limits.on_long == "truncate" and left <= 0 < left + need.in_slots
            if self.limits.on_long == "skip" or fits_without:
                self.counts.too_long += 1
                return None
            if self.limits.on_long == "truncate" and after and left > 0:
                kept = min(kept, left)
                continue
            self.cannot_be_cut |= self.limits.on_long == "truncate"
            begins = " ".join(need.question.split())[:40]
            self.too_long.append(f"{need.what} needs {need.positions + after} positions of {room} ('{begins}...')")
            return None
        self.counts.used += 1
        self.counts.truncated += kept < written
        self.counts.cut_tokens += written - kept
        return kept

    def end(self) -> None:
        """Raise `InputError` if a sample was refused."""
        if not self.too_long:
            return
        number = len(self.too_long)
        more = f"; so do {number - 1} more" if number > 1 else ""
        advice = (
            "cutting that would take its slots, too: leave such rows out (data.on_long: skip), or shorten the question"
            if self.cannot_be_cut
            else "cut what should be written (data.on_long: truncate), leave such rows out (skip), or shorten them"
        )
        raise InputError(f"{self.too_long[0]}{more}; {advice}")
