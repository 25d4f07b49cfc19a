"""What can be known in the panel world, by whom: the optimum, each specialist alone, and the best readers of text.

    python benchmarks/panel_ceilings.py                              world seed 0, the agents that come with the package
    python benchmarks/panel_ceilings.py --system DIR --out FILE      another system of this world's agents

Every figure is the mean exact posterior of what is chosen on the test questions that docs/results.md is about. Readers
are fitted to faultless reports (recursivemas/worlds/panel/readers.py). "Agents' own beliefs" multiplies what the three
agents believe when they write the name of a short report: what these agents know, perfectly combined. Takes a minute.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from recursivemas.evaluation.metrics import mean
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import RoleSample, encode_turns
from recursivemas.training.inner import collect_pairs
from recursivemas.worlds.causes import Cases, Floats
from recursivemas.worlds.panel import Panel, readers
from recursivemas.worlds.panel.cases import CAUSES, SPECIALISTS, VARIANTS, case_text


def agent_beliefs(model: LanguageModel, prompts: PromptSet, role: str, cases: Cases) -> Floats:
    """What an agent believes when it is about to name a cause in a short report, (case, cause)."""
    turns = [
        RoleSample(role=role, question=case_text(values), target=f"{CAUSES[0]}.", num_rounds=2, variant="short")
        for values in cases.values
    ]
    pairs = collect_pairs(model, encode_turns(turns, model, prompts), with_end=False, batch_size=250)
    states = pairs.states[[index for index, place in enumerate(pairs.place_of) if place == 0]]
    names = torch.tensor([model.encode(name)[0] for name in CAUSES])
    with torch.no_grad():
        return model.logits(states)[:, names].softmax(dim=-1).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="panel")
    parser.add_argument("-n", type=int, default=4000)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    system = RecursiveSystem.from_pretrained(given.system, device="cpu")
    panel = Panel(system.training["world"]["seed"])
    cases = panel.distinct_cases(given.split, given.n, 0)
    fitted = {variant: readers.FittedReader(panel.cases, variant) for variant in VARIANTS}
    found = readers.ceilings(panel.cases, cases, fitted=fitted)
    beliefs = {role: agent_beliefs(system.agents[role].model, system.prompts, role, cases) for role in SPECIALISTS}
    posterior, rows = panel.cases.posterior(cases.values), np.arange(len(cases))
    for role, belief in beliefs.items():
        exact = panel.cases.belief_of(cases.values, role)
        found[f"{role}, agent"] = mean(posterior[rows, belief.argmax(axis=1)]).value
        found[f"{role}, agent's KL"] = mean((exact * (np.log(exact) - np.log(belief))).sum(axis=1)).value
    fused = np.sum([np.log(belief) for belief in beliefs.values()], axis=0)
    found["agents' own beliefs"] = mean(posterior[rows, fused.argmax(axis=1)]).value
    for name, value in found.items():
        print(f"{name:28} {value:.4f}")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
