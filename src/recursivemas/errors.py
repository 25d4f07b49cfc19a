"""Every error a user can cause, as one small tree.

    RecursiveMASError
    ├── ConfigError       a setting that is unknown or out of range
    ├── InputError        a question, data file or argument that cannot be used
    ├── PatternError      a pattern or prompt set that does not hold together
    ├── ModelError        a language model that cannot serve as an agent
    ├── CheckpointError   a saved part that is missing, corrupt, or does not fit
    ├── OutputError       a place that cannot be written to
    ├── NumericsError     a latent or a loss that is not finite
    ├── SandboxError      code of a model that cannot be confined here
    └── ServerError       a server that is down, or does not answer as it has to

Each message says what was given, what was expected and what to do. The module knows nothing of the rest of the
package; whoever finds the fault raises it.
"""

import difflib
from collections.abc import Iterable


class RecursiveMASError(Exception):
    """Base of all errors that the package raises on purpose. The command line prints its text, without a traceback."""


class ConfigError(RecursiveMASError):
    """A setting is unknown or out of range."""


class InputError(RecursiveMASError):
    """A question, data file or argument cannot be used."""


class PatternError(RecursiveMASError):
    """A pattern or prompt set does not hold together."""


class ModelError(RecursiveMASError):
    """A language model cannot serve as an agent."""


class CheckpointError(RecursiveMASError):
    """A saved part is missing, corrupt, or does not fit the rest."""


class OutputError(RecursiveMASError):
    """A place cannot be written to."""


class NumericsError(RecursiveMASError):
    """A latent or a loss is not finite."""


class SandboxError(RecursiveMASError):
    """Code of a model cannot be confined here, or the sandbox itself has failed."""


class ServerError(RecursiveMASError):
    """A server is down, or does not answer as it has to."""


def unknown_name(kind: str, given: object, known: Iterable[str]) -> str:
    """The text of an "unknown name" error: what was given, the nearest known name, and all of them.

    >>> unknown_name("channel", "latnet", ["latent", "text"])
    "unknown channel 'latnet': did you mean 'latent'? (known: latent, text)"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f": did you mean '{nearest[0]}'?" if nearest else "."
    return f"unknown {kind} '{given}'{hint} (known: {', '.join(names) or 'none'})"
