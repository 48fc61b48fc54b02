"""
What can go wrong, by whose fault: the type says who must act.

Knows: nothing.  Must not know: how an error is shown or which exit code it becomes.
"""

from __future__ import annotations


class ChaperoneError(Exception):
    """Any error that chaperone raises on purpose; its text is one sentence."""


class SpecError(ChaperoneError, ValueError):
    """The caller's fault: a spec, an id or an argument that can't be meant so."""


class SpoolError(ChaperoneError, OSError):
    """
    The disk's fault: a spool or a run directory that can't be used.

    Args:
        sentence (str): The whole message.
        errno (int): As from the system, or None where no system call failed.
    """

    def __init__(self, sentence: str, errno: int | None = None) -> None:
        super().__init__(sentence)
        self.errno = errno


class RunExistsError(SpoolError):
    """The run id is taken: the program is not run a second time (rule W1 in `chaperone.spool`)."""


class NoRunError(SpoolError):
    """There is no such run, or its id prefix fits several."""


class BusyError(SpoolError):
    """Another `reap` or `gc` sweeps the spool: nothing was done, and a later try may do it."""


class UnreadableRunError(SpoolError):
    """One run directory can't be read; that says nothing of the others."""


class TransitionError(ChaperoneError, RuntimeError):
    """Our own fault: a state that can't follow the one before it."""


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
