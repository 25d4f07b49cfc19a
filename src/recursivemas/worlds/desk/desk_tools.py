"""The desk's tools: a search in the records of one question, and Python.

What is on file follows from the text of the question, so every question has an index of its own, whoever asks it.
Knows nothing of models.
"""

from recursivemas.sandbox import Limits, Sandbox
from recursivemas.tools import PythonTool, Tool, Toolbox, ToolLimits
from recursivemas.worlds.desk.cases import NUM_SEARCHES, RECORDS, CaseWorld
from recursivemas.worlds.desk.curriculum import NONE

MAX_CALLS = 6


class RecordSearch(Tool):
    """Finds what stands in a record, by its name, if it is the one that a question means."""

    name = "search"
    description = "the name of a record; what stands in it comes back, or 'none'"
    max_calls = NUM_SEARCHES

    def __init__(self, world: CaseWorld, index: dict[str, str] | None = None) -> None:
        """`index` is what is on file: text by name."""
        self._world = world
        self.index = index or {}

    def for_question(self, question: str) -> "RecordSearch":
        """The search in the records of a question; nothing is on file for what is no question of this desk."""
        found = self._world.on_file(question)
        return RecordSearch(self._world, {} if found is None else {RECORDS[found[0]]: str(found[1])})

    def answers_at_once(self, argument: str) -> bool:
        """An index of one record is in memory."""
        return True

    def __call__(self, argument: str) -> str:
        return self.index.get(argument.strip(), NONE)


class SumTool(PythonTool):
    """Python that remembers what a program has said.

    A program of the desk is a sum, which says the same again; and it costs an interpreter to run it. Everything that is
    not remembered runs in the sandbox.
    """

    def __init__(self, sandbox: Sandbox | None = None, *, max_calls: int | None = None) -> None:
        super().__init__(sandbox, max_calls=max_calls)
        self._said: dict[str, str] = {}

    def answers_at_once(self, argument: str) -> bool:
        """What is remembered need not be run."""
        return argument.strip() in self._said

    def __call__(self, argument: str) -> str:
        program = argument.strip()
        if program not in self._said:
            self._said[program] = super().__call__(program)
        return self._said[program]


def toolbox(world: CaseWorld, *, allow_repeats: bool = True) -> Toolbox:
    """The tools of the desk. Raises `SandboxError` if there is no sandbox here."""
    limits = ToolLimits(max_calls=MAX_CALLS, error_text=NONE, allow_repeats=allow_repeats)
    sandbox = Sandbox(Limits(seconds=5.0, cpu_seconds=5))
    return Toolbox([RecordSearch(world), SumTool(sandbox, max_calls=1)], limits)
