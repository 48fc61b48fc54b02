"""
chaperone: a small process stays with one program for its whole life, and leaves its output and
outcome in a directory.

Knows: the public names.  Must not know: the modules that have them; it imports one when a name is
used, because every chaperone imports this file.
"""

from __future__ import annotations

__version__ = "0.2.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .api import Run as Run
    from .api import Spool as Spool
    from .errors import AgentError as AgentError
    from .errors import BusyError as BusyError
    from .errors import ChaperoneError as ChaperoneError
    from .errors import NoRunError as NoRunError
    from .errors import RunExistsError as RunExistsError
    from .errors import SpecError as SpecError
    from .errors import SpoolError as SpoolError
    from .follow.follower import Follower as Follower
    from .interface import FollowerLike as FollowerLike
    from .interface import RunLike as RunLike
    from .interface import SpoolLike as SpoolLike
    from .model.events import Changed as Changed
    from .model.events import Ended as Ended
    from .model.events import Lost as Lost
    from .model.events import Output as Output
    from .model.events import Shrank as Shrank
    from .model.events import Started as Started
    from .model.hops.remote import build_command as build_command
    from .model.hops.remote import build_program as build_program
    from .model.status import Counts as Counts
    from .model.status import Status as Status
    from .types import SpecDict as SpecDict
    from .types import StatusDict as StatusDict

# The one list of the public names: each module, and what it gives.
_ROOMS = {
    "api": ("Run", "Spool"),
    "errors": (
        "AgentError",
        "BusyError",
        "ChaperoneError",
        "NoRunError",
        "RunExistsError",
        "SpecError",
        "SpoolError",
    ),
    "follow.follower": ("Follower",),
    "interface": ("FollowerLike", "RunLike", "SpoolLike"),
    "model.events": ("Changed", "Counts", "Ended", "Lost", "Output", "Shrank", "Started", "Status"),
    "model.hops.remote": ("build_command", "build_program"),
    "types": ("SpecDict", "StatusDict"),
}

__all__ = sorted(name for names in _ROOMS.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            import importlib

            value = getattr(importlib.import_module(f"{__name__}.{room}"), name)
            globals()[name] = _by_path_or_url(value) if name == "Spool" else value
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _by_path_or_url(spool_by_path: Any) -> type:
    """
    `chaperone.Spool`: the spool of a path, or of an agent where a URL is given.
    It is chosen here, above all floors, so that api.py never looks up.
    """
    from .agent.client.place import client_room, is_place

    class Spool(spool_by_path):  # type: ignore[misc]
        __doc__ = spool_by_path.__doc__
        __qualname__ = "Spool"

        def __new__(cls, path: Any = "", *rest: Any, **proofs: Any) -> Any:
            if is_place(path):
                return client_room(path, "spool").Spool(path, *rest, **proofs)
            return super().__new__(cls)

    return Spool


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
