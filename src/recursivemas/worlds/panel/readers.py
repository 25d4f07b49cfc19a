"""How much of what there is to know fits into a report: the best readers of each text protocol.

A text system can be no better than the best reader of faultless reports. Two such readers are found here:

* **fitted**: a logistic regression with a weight for every cause, for every (specialist, rank, grade, cause) that a
  report can name. It is fitted to the exact posterior of many training cases, so it knows what each specialist's
  reports are worth, name by name; given the cause reports are independent, so adding up what they say is the right
  form. This is what a summarizer can learn who reads reports as reports: the ceiling of text.
* **exact**: P(cause | reports) by Bayes' rule, over all finding sets that a specialist would have reported in the
  same words. For short reports it is the ceiling. Five graded names hardly ever stand for two finding sets, so an
  exact reader of long ones would have to know the specialists' tables by heart, as a code book; it is no reader of
  reports any more.

Knows cases and reports; knows nothing of agents.
"""

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recursivemas.worlds.causes import Cases, Floats, Ints
from recursivemas.worlds.panel.cases import (
    CAUSES,
    COLUMNS,
    FINDINGS,
    GRADES,
    NUM_NAMED,
    SPECIALISTS,
    CaseWorld,
    Variant,
)

NUM_TRAIN_STEPS = 1500
BATCH_SIZE = 2048


class FittedReader:
    """The logistic regression: for every thing a report can say, what that says about every cause."""

    def __init__(self, world: CaseWorld, variant: Variant, *, num_cases: int = 100_000, seed: int = 0) -> None:
        """Fit the reader on gold reports of the training split (some seconds)."""
        self.world = world
        self.variant = variant
        cases = world.draw(np.random.default_rng([world.seed, seed, 7]), num_cases, split="train")
        said = torch.from_numpy(self._said(cases.values))
        target = torch.from_numpy(world.posterior(cases.values)).float()
        shape = len(SPECIALISTS) * NUM_NAMED[variant] * len(GRADES) * len(CAUSES), len(CAUSES)
        self._weight = torch.zeros(shape, requires_grad=True)
        self._fit(said, target, torch.Generator().manual_seed(seed))

    def _fit(self, said: Tensor, target: Tensor, generator: torch.Generator) -> None:
        optimizer = torch.optim.Adam([self._weight], lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_TRAIN_STEPS)
        for _ in range(NUM_TRAIN_STEPS):
            rows = torch.randint(len(said), (BATCH_SIZE,), generator=generator)
            loss = functional.cross_entropy(self._weight[said[rows]].sum(dim=1), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._weight.requires_grad_(False)

    def _said(self, values: Ints) -> Ints:
        """What the reports on each case say, as rows of the weights, (case, specialist x rank)."""
        num_named = NUM_NAMED[self.variant]
        found = []
        for number, role in enumerate(SPECIALISTS):
            reports = self.world.reports(values, role)
            grades = reports.grades[:, :num_named] * (self.variant != "short")  # short reports tell none
            place = (number * num_named + np.arange(num_named)) * len(GRADES) + grades
            found.append(place * len(CAUSES) + reports.top[:, :num_named])
        return np.concatenate(found, axis=1)

    def choices(self, values: Ints) -> Ints:
        """The cause it concludes from the reports on each case."""
        return self._weight[torch.from_numpy(self._said(values))].sum(dim=1).argmax(dim=1).numpy()


def exact_choices(world: CaseWorld, values: Ints, variant: Variant) -> Ints:
    """The likeliest cause given faultless reports, by Bayes' rule over all findings that would be reported alike."""
    total = np.zeros((len(values), len(CAUSES)))
    for role in SPECIALISTS:
        total += _log_likelihood_of_reports(world, values, role, variant)
    return total.argmax(axis=1)


def _log_likelihood_of_reports(world: CaseWorld, values: Ints, role: str, variant: Variant) -> Floats:
    """What a specialist reports on a case: log P(report | cause), (case, cause)."""
    num_words = len(FINDINGS[0].words)
    sets = np.array(list(itertools.product(range(num_words), repeat=len(COLUMNS[role]))))
    every = np.zeros((len(sets), len(FINDINGS)), dtype=np.int64)
    every[:, COLUMNS[role]] = sets
    reports = world.reports(every, role)
    texts = np.array([reports.text(row, variant) for row in range(len(sets))])
    _, group = np.unique(texts, return_inverse=True)
    weight = np.zeros((group.max() + 1, len(CAUSES)))
    np.add.at(weight, group, np.exp(world.evidence(every, COLUMNS[role])))
    place = values[:, COLUMNS[role]] @ num_words ** np.arange(len(COLUMNS[role]))[::-1]
    likelihood: Floats = np.log(weight[group[place]])
    return likelihood


def ceilings(world: CaseWorld, cases: Cases, *, fitted: dict[Variant, FittedReader]) -> dict[str, float]:
    """The mean exact posterior of what is chosen: by perfect readers of everything, of one subject, of reports."""
    posterior = world.posterior(cases.values)

    def score(choices: Ints) -> float:
        return float(posterior[np.arange(len(cases)), choices].mean())

    found = {"optimum": float(posterior.max(axis=1).mean())}
    found |= {f"{role} alone": score(world.belief_of(cases.values, role).argmax(axis=1)) for role in SPECIALISTS}
    found["exact reader of short"] = score(exact_choices(world, cases.values, "short"))
    found |= {f"fitted reader of {variant}": score(reader.choices(cases.values)) for variant, reader in fitted.items()}
    return found
