"""Run by torchrun (see test_processes.py): several commands of the command line, one after the other, in all processes.

Its argument is JSON: for each command its words, the step of the outer loop at which it is stopped as by Ctrl-C (or
null), and the exit code that is expected of it.
"""

import json
import runpy
import sys

import pytest
import torch

from recursivemas.training.outer import OuterLoop
from recursivemas.training.processes import Processes


def main(commands: list[tuple[list[str], int | None, int]]) -> None:
    for words, stop, code in commands:
        with pytest.MonkeyPatch.context() as patch:
            # Who has left once cannot come back: torchrun's store remembers the old addresses.
            patch.setattr(Processes, "leave", lambda self: None)
            if stop is not None:
                losses = OuterLoop.losses

                def stopping(self: OuterLoop, step: int, stop: int = stop, losses: object = losses) -> object:
                    if step == stop:
                        raise KeyboardInterrupt
                    return losses(self, step)  # type: ignore[operator]

                patch.setattr(OuterLoop, "losses", stopping)
            patch.setattr(sys, "argv", ["recursivemas", *words])
            found: object = 0
            try:
                runpy.run_module("recursivemas", run_name="__main__")
            except SystemExit as ended:
                found = ended.code or 0
            assert found == code, f"{words} ended with {found}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
    Processes.joined("cpu").leave()
