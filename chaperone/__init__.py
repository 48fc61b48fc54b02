"""
chaperone: a small process stays with one program for its whole life, and leaves its output and outcome in a directory.

Knows: the public names.  Must not know: what stands behind them, until one is asked for: the holding path passes through here.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .command import build_command, build_program
    from .errors import ChaperoneError, NoRunError, RunExistsError, SpecError, SpoolError
    from .events import Changed, Counts, Ended, Lost, Output, Shrank, Started, Status
    from .follow import Follower
    from .scheduler import Run, Spool

_ROOMS = {
    "command": ("build_command", "build_program"),
    "errors": ("ChaperoneError", "NoRunError", "RunExistsError", "SpecError", "SpoolError"),
    "events": ("Changed", "Counts", "Ended", "Lost", "Output", "Shrank", "Started", "Status"),
    "follow": ("Follower",),
    "scheduler": ("Run", "Spool"),
}

__all__ = [  # noqa: F822  in their rooms
    "ChaperoneError", "Changed", "Counts", "Ended", "Follower", "Lost", "NoRunError", "Output", "Run", "RunExistsError", "Shrank",
    "SpecError", "Spool", "SpoolError", "Started", "Status", "build_command", "build_program",
]  # fmt: skip


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
