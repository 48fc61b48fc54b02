"""
What can go wrong, by whose fault: the type says who must act.

Knows: nothing.  Must not know: how an error is shown or which exit code it becomes.
"""

from __future__ import annotations


class ChaperoneError(Exception):
    """Any error that chaperone raises on purpose; its message is one sentence."""


class SpecError(ChaperoneError, ValueError):
    """The caller's fault: an invalid spec, run id or argument."""


class SpoolError(ChaperoneError, OSError):
    """
    The disk's fault: a spool or a run directory that can't be used.

    Args:
        sentence (str): The whole message.
        errno (int): Of the system call that failed; None if none failed.
    """

    def __init__(self, sentence: str, errno: int | None = None) -> None:
        super().__init__(sentence)
        self.errno = errno


class RunExistsError(SpoolError):
    """The run id exists, and an id never runs twice (rule W1 of docs/spool-format.rst)."""


class NoRunError(SpoolError):
    """There is no such run, its chaperone is not running, or an id prefix matches several runs."""


class BusyError(SpoolError):
    """Another `reap` or `gc` is working on the spool: nothing was done; try again later."""


class UnreadableRunError(SpoolError):
    """One run directory can't be read; others may be readable."""


class TransitionError(ChaperoneError, RuntimeError):
    """A bug in chaperone: a state that can't follow the one before it."""


class StartError(ChaperoneError):
    """
    The program could not be started, and that is proven.

    Args:
        stage (str): As in the status: spawn, connect, auth, far-side ...
        message (str): One sentence.
        errno (int): As from the system call that failed, or None.
        type (str): The name of the error's kind (`FileNotFoundError`), or None.
    """

    def __init__(
        self, stage: str, message: str, errno: int | None = None, type: str | None = None
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.message = message
        self.errno = errno
        self.type = type
