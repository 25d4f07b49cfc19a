"""Tool: something that an agent can call while it writes. Text in, text out.

To make one of your own, derive from `Tool` and write `__call__`, or give `FunctionTool` a function. An exception that
it raises is told to the model as an error, and the reply goes on.

Knows nothing of models, tags or tokens.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from recursivemas.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
RESULT = "result"
"""The tag that results stand in; no tool can be called so."""


class Tool(ABC):
    """A tool, by the name that its tags have."""

    name: str
    description: str
    """For the model, after "write <name>...</name>": what to write between the tags, and what comes back."""
    max_calls: int | None = None
    """Calls of this tool in one reply; by default only the limit of all tools together holds (`ToolLimits`)."""

    @abstractmethod
    def __call__(self, argument: str) -> str:
        """What the tool says of the text between its tags. May be called from several threads at once."""

    def answers_at_once(self, argument: str) -> bool:
        """Whether it answers this from memory: then it is called where it stands, and not in a thread of its own.

        Nothing could end it there, so it must neither wait for anything nor compute for long.
        """
        return False

    def for_question(self, question: str) -> "Tool":
        """The tool as it is while this question is answered: itself, unless there is more than one world to ask."""
        return self


class FunctionTool(Tool):
    """A function as a tool.

    >>> shout = FunctionTool("shout", "text; it comes back in capitals", str.upper)
    >>> shout("hello")
    'HELLO'
    """

    def __init__(
        self, name: str, description: str, function: Callable[[str], str], *, max_calls: int | None = None
    ) -> None:
        self.name = name
        self.description = description
        self.max_calls = max_calls
        self._function = function

    def __call__(self, argument: str) -> str:
        return self._function(argument)


def check_tool(tool: Tool) -> None:
    """Raises `ConfigError` if a tool cannot be called by tags, or its budget is none."""
    name, most = getattr(tool, "name", None), getattr(tool, "max_calls", None)
    if not isinstance(tool, Tool):
        raise ConfigError(f"a tool is a recursivemas.tools.Tool, or the name of one; got {tool!r}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == RESULT:
        raise ConfigError(
            f"the name of a tool is that of its tags: small letters, digits and _, and not '{RESULT}'; got {name!r}"
        )
    if not isinstance(getattr(tool, "description", None), str):
        raise ConfigError(f"the tool '{name}' has no description; say what to write between its tags")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 0):
        raise ConfigError(f"max_calls of the tool '{name}' must be a whole number, 0 or more; got {most!r}")
