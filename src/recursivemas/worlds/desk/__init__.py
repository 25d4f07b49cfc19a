"""The desk: a world of deliberation with tools, with its exact optimum (see `cases.py`).

>>> desk = Desk(seed=0)
>>> sample = desk.samples("test", 1000, seed=1)[0]  # the question, the right answer, the exact posterior
>>> turns = desk.role_samples("train", 512, 0, role="reflector", variant="short")
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.evaluation.task import Sample
from recursivemas.tools import Toolbox
from recursivemas.training.data import RoleSample
from recursivemas.worlds.desk import curriculum
from recursivemas.worlds.desk.agents import AGENT_RECIPES
from recursivemas.worlds.desk.cases import (
    NUM_ROUNDS,
    NUM_SEARCHES,
    NUMBERS,
    RECORDS,
    ROLES,
    VARIANTS,
    Cases,
    CaseWorld,
    Variant,
    case_text,
    program_text,
    result_of,
    vocabulary,
)
from recursivemas.worlds.desk.desk_tools import toolbox
from recursivemas.worlds.splits import first_distinct, with_spare
from recursivemas.worlds.tokenizers import build_tokenizer
from recursivemas.worlds.world import World

__all__ = ["CaseWorld", "Desk"]

TAGS = tuple(f"<{slash}{name}>" for name in ("search", "python", "result") for slash in ("", "/"))


class Desk(World):
    """One desk world: its cases, its tools, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, another meaning.
    """

    name = "desk"
    roles: tuple[str, ...] = ROLES
    pattern = "deliberation"
    prompts = "desk"
    scorer = "stated"
    variants = VARIANTS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, AGENT_RECIPES)
        # A short note is four tokens: a record, the operation, the type of file, a full stop.
        self.settings = {"num_rounds": NUM_ROUNDS, "num_latent_steps": 4, "max_new_tokens": 48}
        self.cases = CaseWorld(seed)
        self.measures = {
            "searches": lambda text, known: float(len(searches(text))),
            "wrong searches": lambda text, known: float(sum(each != known["record"] for each in searches(text))),
            "repeated searches": lambda text, known: float(len(searches(text)) - len({*searches(text)})),
            **{f"found within {most}": _found_within(most) for most in range(1, NUM_SEARCHES + 1)},
            "programs": lambda text, known: float(len(programs(text))),
            "wrong programs": lambda text, known: float(sum(each != known["program"] for each in programs(text))),
        }

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Distinct questions of a split.

        The target is the right answer. In `metadata`: `record` is the one that is meant, `program` the right sum,
        `posterior` the exact belief over records given all evidence, `within` by rounds the probability that the best
        1, 2, 3 searches find the record, and `optimum` by rounds that of being right with all three.
        """
        cases = self._distinct(split, num_samples, seed)
        posterior = self.cases.belief(cases.values)
        within = {r: self.cases.within(cases.values, r) for r in range(1, NUM_ROUNDS + 1)}
        operation, _ = self.cases.keys(cases.values)
        samples = []
        for row in range(num_samples):
            sums = cases.content[row], operation[row], cases.number[row]
            samples.append(
                Sample(
                    id=f"{self.name}-{self.seed}-{split}-{seed}-{row}",
                    question=case_text(cases.values[row], cases.number[row]),
                    target=str(result_of(*sums)),
                    metadata={
                        "record": RECORDS[cases.record[row]],
                        "program": program_text(*sums),
                        "posterior": dict(zip(RECORDS, posterior[row].tolist(), strict=True)),
                        "within": {round_: found[row].tolist() for round_, found in within.items()},
                        "optimum": {round_: _with_a_guess(found[row, -1]) for round_, found in within.items()},
                    },
                )
            )
        return samples

    def optimum(self, samples: list[Sample], num_rounds: int, num_searches: int = NUM_SEARCHES) -> float:
        """Mean probability of a right answer at best, with what so many rounds bring together and so many searches.

        When no search finds the record, all numbers are as likely, and one of them is guessed.
        """
        rounds = min(num_rounds, NUM_ROUNDS)
        return float(np.mean([_with_a_guess(s.metadata["within"][rounds][num_searches - 1]) for s in samples]))

    def answer_text(self, target: str) -> str:
        """How an answer ends; the whole of it, with its calls, is `answer_of`."""
        return curriculum.answer_text(target)

    def answer_of(self, sample: Sample, target: str | None = None) -> str:
        """What the tool-caller should write: the search that hits, the sum, and the answer (or another one)."""
        program = sample.metadata["program"]
        calls = curriculum.search_text(RECORDS.index(sample.metadata["record"]), re.split(r"[-+*]", program)[0])
        sums = f"<python>{program}</python><result>{sample.target}</result>"
        return f"{calls}{sums} {self.answer_text(sample.target if target is None else target)}"

    def toolbox(self, *, allow_repeats: bool = True) -> Toolbox:
        """The search in the records of each question, and Python."""
        return toolbox(self.cases, allow_repeats=allow_repeats)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text."""
        return curriculum.pretraining_turns(self.cases, rng, size, role=role)

    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
    ) -> list[RoleSample]:
        return curriculum.loop_turns(self.cases, rng, num_samples, split=split, role=role, variant=variant)

    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
    ) -> list[list[RoleSample]]:
        return curriculum.conversations(self.cases, rng, num_samples, split=split, variant=variant)

    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        words = [*vocabulary(), *curriculum.protocol_words().split()]
        tags = TAGS if role == "toolcaller" else ()
        return build_tokenizer(self.agent_recipes[role], words, digits=True, tags=tags)

    def _distinct(self, split: str, num_samples: int, seed: int) -> Cases:
        cases = self.cases.draw(self.rng("cases", split, "", seed), with_spare(num_samples), split=split)
        asked = np.column_stack([cases.values, cases.number])
        return self.cases.as_filed(cases[first_distinct(asked, num_samples)])


def searches(text: str) -> list[str]:
    """The records that are searched for in an answer, in their order."""
    return [each.strip() for each in re.findall(r"<search>(.*?)</search>", text, re.DOTALL)]


def programs(text: str) -> list[str]:
    """The programs that are run in an answer."""
    return [each.strip() for each in re.findall(r"<python>(.*?)</python>", text, re.DOTALL)]


def _found_within(most: int) -> Any:
    """Measures whether one of the first so many searches is for the record that is meant."""

    def found(text: str, known: Mapping[str, Any]) -> float:
        return float(known["record"] in searches(text)[:most])

    return found


def _with_a_guess(found: float) -> float:
    """The probability of a right answer, given that of finding the record."""
    return float(found + (1 - found) / (NUMBERS[1] - NUMBERS[0]))
