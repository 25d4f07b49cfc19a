"""How much of a question a context has room for, where one that is too long is to be cut and not refused.

A question is cut on its left, at a word if there is one, and only as far as every prompt of a run needs it: so all
roles read the same, and no slot, instruction, thought or reply is cut with it. What is kept depends on the question and
on the run alone, never on the batch.

Knows models and prompts; knows nothing of patterns, rounds or channels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recursivemas.models import LanguageModel
from recursivemas.prompts import Segments, Slot


@dataclass(frozen=True)
class PromptSpace:
    """One prompt of a run, with the room that is needed beside its words."""

    role: str
    model: LanguageModel
    words: Callable[[str], Segments]
    """From a question to the prompt."""
    slots: Mapping[str, int]
    """Positions that the message of each role takes."""
    after: int
    """Positions of the thoughts or the text that follow."""

    def needs(self, question: str) -> int:
        """Positions that this prompt takes with this question, and with all that follows it."""
        segments = self.words(question)
        texts = self.model.encode_batch([segment for segment in segments if isinstance(segment, str)])
        slots = [self.slots.get(segment.role, 0) for segment in segments if isinstance(segment, Slot)]
        return sum(map(len, texts)) + sum(slots) + self.after

    def fits(self, question: str) -> bool:
        """Whether that is within the model's context."""
        return self.model.max_positions is None or self.needs(question) <= self.model.max_positions


def fit_question(question: str, prompts: Sequence[PromptSpace]) -> str:
    """The longest end of a question with which all prompts fit, to within the oddities of a tokenizer.

    Raises `InputError` if not even its last letter fits.
    """

    def fits(kept: str) -> bool:
        return all(prompt.fits(kept) for prompt in prompts)

    if fits(question):
        return question
    too_little, enough = 0, len(question) - 1
    if not fits(question[enough:]):
        for prompt in prompts:
            what = f"the prompt of the {prompt.role}, with its messages and what follows, but hardly any question,"
            prompt.model.check_length(prompt.needs(question[enough:]), what)
    while enough - too_little > 1:
        cut = (too_little + enough) // 2
        too_little, enough = (too_little, cut) if fits(question[cut:]) else (cut, enough)
    kept = question[enough:]
    next_word = re.search(r"\s(?=\S)", question[enough - 1 :])
    whole_words = question[enough - 1 + next_word.end() :] if next_word else kept
    # Hardly ever does a text take more room for having a word less, but it may.
    return whole_words if fits(whole_words) else kept
