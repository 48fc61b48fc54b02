"""
What can go wrong. The type of an error says who must act: the caller, the owner of the disk, or us.

Knows: nothing.  Must not know: how an error is shown or which exit code it becomes.
"""

from __future__ import annotations


class ChaperoneError(Exception):
    """Any error that chaperone raises on purpose; its message is one sentence."""


class SpecError(ChaperoneError, ValueError):
    """The caller made a mistake: an invalid spec, run id or argument."""


class SpoolError(ChaperoneError, OSError):
    """
    A spool or a run directory can't be used: the disk is at fault.

    Args:
        sentence (str): The whole message.
        errno (int): Of the system call that failed; None if none failed.
    """

    def __init__(self, sentence: str, errno: int | None = None) -> None:
        super().__init__(sentence)
        self.errno = errno


class RunExistsError(SpoolError):
    """The run id exists, and no second run gets it (rule W1 of docs/spool-format.rst)."""


class NoRunError(SpoolError):
    """There is no such run, its chaperone is not running, or an id prefix matches several runs."""


class BusyError(SpoolError):
    """Another `reap` or `gc` is working on the spool: nothing was done; try again later."""


class AgentError(SpoolError):
    """An agent could not be reached, did not answer, or refused us: its host and we disagree."""


class UnreadableRunError(SpoolError):
    """One run directory can't be read; others may be readable."""


class TransitionError(ChaperoneError, RuntimeError):
    """A bug in chaperone: a status that can't follow the one before it."""


class StartError(ChaperoneError):
    """
    The program was not started, and that is proven.

    Args:
        stage (str): What failed, as in the status: spawn, connect, auth, far-side ...
        message (str): One sentence.
        errno (int): Of the system call that failed; None if none failed.
        type (str): The name of the error's class (`FileNotFoundError`); None if there is none.
    """

    def __init__(
        self, stage: str, message: str, errno: int | None = None, type: str | None = None
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.message = message
        self.errno = errno
        self.type = type
