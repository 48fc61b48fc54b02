"""
Starts the command `chaperone` and waits for its answer.

Knows: processes, exit codes, where this package lies.  Must not know: how a run is started, or
held.
"""

from __future__ import annotations

import os
import sys

from ..cpython import signal
from ..errors import ChaperoneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Between a spec and the key of its run, on the stdin of a cold start; no JSON contains it. In argv
# every user of the host would see the key.
KEY_MARK = b"\0"
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_command(
    words: list[str], env: Mapping[str, str] | Mapping[bytes, bytes], fds: list[int]
) -> int | None:
    """
    Run the command `chaperone` to its end.

    It uses posix_spawn, because a fork copies page tables: that takes 41 ms for each GB of the
    scheduler's heap, and blocks its loop.

    Args:
        words (list): The command line after `chaperone`.
        fds (list): Its stdin, stdout and stderr; none of them is 0, 1 or 2.
    Returns:
        int: Its exit code, 128+n for a signal; None if the embedding program reaps children itself
            (for example because it ignores SIGCHLD).
    """
    python = _interpreter()
    main = os.path.join(PACKAGE, "__main__.py")
    moves = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
    try:
        pid = os.posix_spawn(python, [python, "-I", "-S", main, *words], env, file_actions=moves)
    except OSError as error:
        raise ChaperoneError(
            f"unable to start a chaperone with the interpreter {python!r}: {error.strerror}"
        ) from error
    try:
        return exit_code(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None
    # A signal handler of the embedding program raised. Reap the child anyway: it exits within
    # milliseconds.
    except BaseException:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        raise


def _interpreter() -> str:
    """
    The interpreter of this process. A program that embeds Python may have its own path in
    sys.executable, and must not be started in its place.
    """
    path = sys.executable
    if not path or not os.path.basename(path).startswith("python"):
        raise ChaperoneError(
            "unable to start a chaperone: want a Python interpreter in sys.executable, "
            f"got {path!r} (if Python is embedded, set it)"
        )
    return path


def visible_or_ended(children: list[tuple[int, int]]) -> list[int]:
    """For each child 0 if its run is visible, otherwise its exit code."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return [
        os.EX_OK if os.read(reading, 1) else exit_code(os.waitpid(pid, 0)[1])
        for pid, reading in children
    ]


def exit_code(wait_status: int) -> int:
    """The exit code of a wait status, as a shell has it: 128+n for signal n."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code
