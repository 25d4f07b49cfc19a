"""The tool `python`: programs that a model writes, run in the sandbox.

Each call is a program of its own, in a fresh interpreter: nothing stays from one call to the next. What it prints comes
back, and the value of its last line.
"""

import re

from recursivemas.sandbox import Limits, Sandbox
from recursivemas.tools.tool import Tool

_FENCE = re.compile(r"\s*```[a-zA-Z0-9]*\n(.*?)\n?\s*```\s*", re.DOTALL)


class PythonTool(Tool):
    """Runs Python programs."""

    name = "python"
    description = (
        "a Python program; what it prints comes back, and the value of its last line. Each program begins anew, and "
        "has a few seconds."
    )

    def __init__(self, sandbox: Sandbox | None = None, *, max_calls: int | None = None) -> None:
        """Raises `SandboxError` if there is no sandbox here (see `Sandbox`, of which you can give one of your own)."""
        self.sandbox = sandbox or Sandbox(Limits())
        self.max_calls = max_calls

    def __call__(self, argument: str) -> str:
        """Run a program, which may stand in a block of Markdown."""
        fenced = _FENCE.fullmatch(argument)
        program = fenced[1] if fenced else argument
        return self.sandbox.run(program.strip("\n") if "\n" in program else program.strip()).to_text()
