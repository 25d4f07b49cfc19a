"""A story made by hand, and what the terminal would show of it."""

import io

from rich.console import Console, RenderableType

from recursivemas.answering import Result
from recursivemas.evaluation.story import Story
from recursivemas.trace import Trace, TracedMessage, TurnUsage, Usage


def make_story(question: str = "Who is it?", token: str = "fox", text: str | None = "a fox, perhaps") -> Story:
    """A story of one hand-off, with the given words in it."""

    def result(messages: list[TracedMessage]) -> Result:
        usage = Usage([TurnUsage(1, "solver", generated_tokens=3, latent_steps=2)])
        return Result(token, usage, Trace("summary", question, {"variant": "short"}, messages))

    nearest = [[(token, 0.75), ("dog", 0.5)], [("river", 1.0), ("dawn", -0.25)]]
    latents = result([TracedMessage(1, "planner", "solver", norms=[0.5, 1.25], nearest=nearest)])
    written = result([TracedMessage(1, "planner", "solver", text=text)]) if text is not None else None
    return Story(question, token, "", latents, written)


def render(view: RenderableType, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]
