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


@dataclass(frozen=True)
class EncodedTurn:
    """A `RoleSample` as tokens of the model that plays the role."""

    prompt_ids: list[int]
    target_ids: list[int]
    """Without the token that ends a reply."""
    target: str


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
