"""Run by torchrun in one process or several (see test_outer.py): trains a few steps, and writes what came out."""

import json
import sys
from pathlib import Path

import torch
from tests.conftest import FEW_WORDS, make_model
from tests.training.test_outer import QUESTIONS, settings

from recursivemas.errors import NumericsError
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question
from recursivemas.training.loop import RunDirectory
from recursivemas.training.outer import train_outer
from recursivemas.training.processes import Processes


def main(place: Path) -> None:
    processes = Processes.joined()
    system = RecursiveSystem.build(
        agents={"planner": make_model("qwen3"), "critic": make_model("llama"), "solver": make_model("qwen2")},
        prompts=FEW_WORDS,
        num_rounds=2,
        num_latent_steps=2,
    )

    def score(trained: RecursiveSystem) -> float:
        own = processes.share(QUESTIONS)
        return processes.total(sum(len(trained.run(each.text).text) for each in own) / len(QUESTIONS))

    run = RunDirectory(place / "run", {}, is_first=processes.is_first)
    fitted = train_outer(system, QUESTIONS, settings(), validate=score, seed=3, run=run, processes=processes)
    weights = [parameter.norm().item() for parameter in system.trainable_parameters().values()]
    failure = ""
    if processes.count > 1:
        spoilt = [*QUESTIONS]
        try:
            # One question of the batch is an impossible one: only one process meets it.
            spoilt[1] = Question(id="q-1", text="\x00", answer="no", rounds=1, posterior={"no": float("nan")})
            chosen = settings(distillation=1.0, max_loss_ratio=None, num_train_steps=3)
            train_outer(system, spoilt, chosen, seed=3, processes=processes)
        except NumericsError as error:
            failure = str(error).split("step")[0] + str(error).split(":", 1)[1].split("The weights")[0]
    told = processes.gather(failure)
    if processes.is_first:
        found = {
            "count": processes.count,
            "losses": fitted.losses,
            "scores": list(fitted.scores.values()),
            "weights": weights,
            "failure": told[0],
            "failure of the other": told[-1],
        }
        (place / "found.json").write_text(json.dumps(found))
    if processes.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
