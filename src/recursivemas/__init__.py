"""Frozen language models that hand each other hidden states instead of text.

The public names; nothing is computed, and PyTorch is not imported, until one of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recursivemas.answering import Result
    from recursivemas.decoding import SamplingParams
    from recursivemas.errors import RecursiveMASError
    from recursivemas.links import RecursiveLink
    from recursivemas.models import LanguageModel
    from recursivemas.patterns import Pattern
    from recursivemas.prompts import PromptSet
    from recursivemas.system import RecursiveSystem
    from recursivemas.trace import Trace, Usage

_HOMES = {
    "LanguageModel": "models",
    "Pattern": "patterns",
    "PromptSet": "prompts",
    "RecursiveLink": "links",
    "RecursiveMASError": "errors",
    "RecursiveSystem": "system",
    "Result": "answering",
    "SamplingParams": "decoding",
    "Trace": "trace",
    "Usage": "trace",
}

__all__ = [
    "LanguageModel",
    "Pattern",
    "PromptSet",
    "RecursiveLink",
    "RecursiveMASError",
    "RecursiveSystem",
    "Result",
    "SamplingParams",
    "Trace",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recursivemas' has no attribute '{name}'")
    return getattr(import_module(f"recursivemas.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
