"""What all verbs share: options, where output goes, and how errors end a command.

Results go to stdout, progress to stderr. An error that a user can cause is one line on stderr and exit code 1; Ctrl-C
is exit code 130; no traceback is printed unless RECURSIVEMAS_TRACEBACK is set.
"""

import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recursivemas.errors import ConfigError, RecursiveMASError

out = Console(soft_wrap=True)
"""For results."""
err = Console(stderr=True, soft_wrap=True)
"""For progress and complaints."""

SECONDS_PER_LINE = 30.0
"""How often progress is told where there is no terminal for a bar."""

SystemArgument = Annotated[
    str, typer.Argument(metavar="SYSTEM", help="A bundled system (ward), a directory, or a Hugging Face repository.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, else the checkpoint's.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile thinking and writing: faster on a GPU, after a minute or more.")
]
Residency = Annotated[
    str, typer.Option(help="all: every agent stays on the device; one: they take turns, and wait on the CPU.")
]
Quantization = Annotated[
    str | None, typer.Option(help="8bit or 4bit: the agents' weights in fewer bits (needs recursivemas[quant]).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
LatentSteps = Annotated[int | None, typer.Option("--latent-steps", help="m: latent thoughts of each turn.")]
BatchSize = Annotated[int, typer.Option(help="Questions answered together.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest text of one turn, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are sampled.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens that together have this probability.")]

Command = TypeVar("Command", bound=Callable[..., None])


class KeptInterrupt(KeyboardInterrupt):
    """Ctrl-C in what keeps its work, though the verb as such does not."""


def reported(command: Command) -> Command:
    """Turn errors of a command into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            quiet_libraries()
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt as interrupt:
            # What `run` (but for a file), `inspect` and `pattern` tell is on the terminal or nowhere, `import` and
            # `export` write all or nothing; every other verb finds what it has done.
            is_kept = command.__name__ not in ("run", "links", "import_", "export", "check", "show")
            is_kept = is_kept or isinstance(interrupt, KeptInterrupt)
            kept = "; what is done is kept, and the same command goes on from there" if is_kept else ""
            if not _is_told_by_another():
                complain(f"interrupted{kept}")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except RecursiveMASError as error:
            if not _is_told_by_another():
                complain(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            complain(f"{error.strerror or error}{place}")
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # no traceback reaches a user who did not ask for it
            if os.environ.get("RECURSIVEMAS_TRACEBACK"):
                raise
            complain(
                f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (a fault of recursivemas; "
                "set RECURSIVEMAS_TRACEBACK=1 to see where)"
            )
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def complain(message: str) -> None:
    """One line on stderr, as it is."""
    print(f"recursivemas: {' '.join(message.split())}", file=sys.stderr)


def _is_told_by_another() -> bool:
    """Whether this is one of several processes (torchrun), of which the first says what fails in all of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries do not belong on a user's terminal; they ask the environment."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = _as_one_line


def _as_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours like all that we say on a terminal; others as Python writes them."""
    if category.__module__.startswith("recursivemas."):
        return f"recursivemas: {message}\n"
    return _as_python_writes(message, category, filename, lineno, line)


_as_python_writes = warnings.formatwarning


def print_json(value: Any) -> None:
    """Plain data on stdout, as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def progress_bar(*, is_shown: bool = True) -> Progress:
    """A progress bar on stderr; it is silent where stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
        disable=not (is_shown and err.is_terminal),
        transient=True,
    )


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many are done, how many a second, and how long it will take: in a bar, or in a line at times.

    Gives a function that is told how many are done, of how many; the first time, how many were done before.
    """
    with progress_bar() as bar:
        task = bar.add_task(what, total=None, note="")
        first: tuple[int, float] | None = None
        last_line = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal first, last_line
            now = time.monotonic()
            if first is None:
                first = done, now
            rate = (done - first[0]) / max(now - first[1], 1e-9)
            bar.update(task, completed=done, total=total, note=f"{rate:.3g} a second")
            if not err.is_terminal and rate and now - last_line >= SECONDS_PER_LINE:
                left = timedelta(seconds=round((total - done) / rate))
                err.print(f"{what}: {done} of {total}, {rate:.3g} a second, {left} left", highlight=False)
                last_line = now

        yield show


def numbers(text: str, what: str) -> list[int]:
    """Whole numbers separated by commas: `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"cannot read {what} '{text}': write whole numbers separated by commas, like 1,2,3") from None


def provenance(directory: Path | None = None) -> dict[str, str]:
    """The command that is running and, in a git checkout, the commit it ran at."""
    command = " ".join(["recursivemas", *sys.argv[1:]])
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            cwd=directory or Path(__file__).parent,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"command": command}
    return {"command": command, "commit": found.stdout.strip()} if found.returncode == 0 else {"command": command}
