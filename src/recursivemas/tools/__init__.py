"""Tools that agents call while they write: `python` in the sandbox, `search`, and those of your own.

    from recursivemas.tools import FolderSearch, PythonTool, Toolbox
    system.run("...", tools=[PythonTool(), FolderSearch("notes")])

A model calls a tool with tags in its text, `<python>1 + 1</python>`, and reads `<result>2</result>` in answer.
"""

from collections.abc import Sequence
from pathlib import Path

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.sandbox import Sandbox
from recursivemas.tools.folder_index import FolderIndex
from recursivemas.tools.python import PythonTool
from recursivemas.tools.search import FolderSearch, TavilySearch, search_tool
from recursivemas.tools.tool import FunctionTool, Tool
from recursivemas.tools.toolbox import Toolbox, ToolLimits, ToolSession

TOOLS = ("python", "search")
"""Tools that are known by name."""

__all__ = [
    "TOOLS",
    "FolderIndex",
    "FolderSearch",
    "FunctionTool",
    "PythonTool",
    "TavilySearch",
    "Tool",
    "ToolLimits",
    "ToolSession",
    "Toolbox",
    "as_toolbox",
    "make_tool",
    "search_tool",
]


def make_tool(name: str, *, search_folder: str | Path | None = None, sandbox: Sandbox | None = None) -> Tool:
    """A tool by its name. Raises `ConfigError` for an unknown one, and what that tool raises when it is made."""
    if name == "python":
        return PythonTool(sandbox)
    if name == "search":
        return search_tool(search_folder)
    raise ConfigError(unknown_name("tool", name, TOOLS))


def as_toolbox(
    tools: "Sequence[Tool | str] | Tool | str | Toolbox | None", limits: ToolLimits | None = None
) -> Toolbox:
    """Tools, or names of tools, as a toolbox. Raises `ConfigError` if one cannot be used."""
    if isinstance(tools, Toolbox):
        if limits is not None:
            raise ConfigError("the limits of tools were given twice: a Toolbox has its own")
        return tools
    several = [] if tools is None else [tools] if isinstance(tools, (str, Tool)) else list(tools)
    return Toolbox([make_tool(each) if isinstance(each, str) else each for each in several], limits)
