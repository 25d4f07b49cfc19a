"""Worlds: small laboratories that generate their own questions, texts and truths, with a known optimum (`world.py`)."""

from collections.abc import Callable

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.worlds.world import World

__all__ = ["World", "load_world", "world_names"]


def world_names() -> tuple[str, ...]:
    """Names of all worlds."""
    return ("ward", "relay", "panel", "consult", "consult-blind", "desk")


def load_world(name: str, seed: int = 0) -> World:
    """The world of this name and seed. Raises `ConfigError` with the nearest name."""
    from recursivemas.worlds.consult import Consult, ConsultBlind
    from recursivemas.worlds.desk import Desk
    from recursivemas.worlds.panel import Panel
    from recursivemas.worlds.relay import Relay
    from recursivemas.worlds.ward import Ward

    worlds: dict[str, Callable[[int], World]] = {"ward": Ward, "relay": Relay, "panel": Panel}
    worlds |= {"consult": Consult, "consult-blind": ConsultBlind, "desk": Desk}
    if name not in world_names():
        raise ConfigError(unknown_name("world", name, world_names()))
    return worlds[name](seed)
