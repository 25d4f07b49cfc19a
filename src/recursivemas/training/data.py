"""What links are trained on: turns of roles, as text. A turn is what a role read and what it should have written.

Knows prompts and tokens; knows nothing of where the turns come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recursivemas.errors import InputError
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet


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


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with what the answering role should write in the end."""

    id: str
    text: str
    answer: str
    rounds: int = 1
    """Rounds that the answer takes: before, it cannot be known, and nothing can be learnt from it."""
    posterior: Mapping[str, float] = field(default_factory=dict)
    """Where it is known: the probability of everything that may be written, given all that can be known."""


@dataclass(frozen=True)
class EncodedTurn:
    """A `RoleSample` as tokens of the model that plays the role."""

    prompt_ids: list[int]
    target_ids: list[int]
    """Without the token that ends a reply."""
    target: str


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


def encode_turns(samples: Sequence[RoleSample], model: LanguageModel, prompts: PromptSet) -> list[EncodedTurn]:
    """Tokenise turns piece by piece, just as prompts with messages in their slots are read in a run."""
    pieces: list[list[str]] = []
    for sample in samples:
        segments = prompts.segments(
            sample.role,
            sample.question,
            render_chat=model.render_chat,
            round=sample.round,
            is_last=sample.round == sample.num_rounds,
            solo=sample.solo,
            variant=sample.variant,
        )
        pieces.append([each if isinstance(each, str) else sample.messages.get(each.role, "") for each in segments])
    flat = [piece for row in pieces for piece in row]
    known = dict(zip(flat, model.encode_batch(flat), strict=True))
    targets = model.encode_batch([sample.target for sample in samples])
    turns = []
    for sample, row, target_ids in zip(samples, pieces, targets, strict=True):
        if not target_ids:
            raise InputError(f"a turn of the {sample.role} has an empty target; leave such turns out")
        prompt_ids = [token for piece in row for token in known[piece]]
        model.check_length(len(prompt_ids) + len(target_ids) + 1, f"a turn of the {sample.role}")
        turns.append(EncodedTurn(prompt_ids, target_ids, sample.target))
    return turns
