"""
chaperone: a small process stays with one program for its whole life, and leaves its output and
outcome in a directory.

Knows: the public names.  Must not know: what stands behind them, until one is asked for: the
holding path passes through here.
"""

from __future__ import annotations

__version__ = "0.2.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api import Run as Run
    from .api import Spool as Spool
    from .errors import ChaperoneError as ChaperoneError
    from .errors import NoRunError as NoRunError
    from .errors import RunExistsError as RunExistsError
    from .errors import SpecError as SpecError
    from .errors import SpoolError as SpoolError
    from .follow.follower import Follower as Follower
    from .model.events import Changed as Changed
    from .model.events import Ended as Ended
    from .model.events import Lost as Lost
    from .model.events import Output as Output
    from .model.events import Shrank as Shrank
    from .model.events import Started as Started
    from .model.hops import build_command as build_command
    from .model.hops import build_program as build_program
    from .model.status import Counts as Counts
    from .model.status import Status as Status

# The one list of the public names: each module, and what it gives.
_ROOMS = {
    "api": ("Run", "Spool"),
    "errors": ("ChaperoneError", "NoRunError", "RunExistsError", "SpecError", "SpoolError"),
    "follow.follower": ("Follower",),
    "model.events": ("Changed", "Counts", "Ended", "Lost", "Output", "Shrank", "Started", "Status"),
    "model.hops": ("build_command", "build_program"),
}

__all__ = sorted(name for names in _ROOMS.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            import importlib

            value: object = getattr(importlib.import_module(f"{__name__}.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
