"""
How a process prepares to be a chaperone: it sheds what it inherited, and detaches from its caller.

Knows: inherited fds, signals, stdout.  Must not know: how a run is held.
"""

from __future__ import annotations

import select
import sys

from ..cpython import environ, os, signal, stat
from ..program.fds import NULL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Visible = Callable[[str], None]

ALL_SIGNALS = sorted(signal.valid_signals())
# A write that fails returns an errno; it must not kill a chaperone.
KEPT_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
# How long to wait for a full pipe on stdout to take the run id; then the program starts anyway.
PATIENCE_MS = 1_000


def shed_inherited_state() -> dict[str, Any]:
    """
    Reset everything inherited that could harm a run: fds, signals, umask. Signals stay blocked
    until `hold` can answer them.

    Returns:
        dict: What the program inherits: `env` (dict of bytes) and `umask` (int).
    Source: design of dumb-init and s6; signal(7), "an ignored SIGCHLD makes wait4(2) say ECHILD".
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ALL_SIGNALS)
    # Open closed fds first: otherwise the lock becomes fd 0, and the program inherits our pulse.
    while (fd := os.open(NULL, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number in ALL_SIGNALS:
        wanted = signal.SIG_IGN if number in KEPT_IGNORED else signal.SIG_DFL
        # None: libc uses it. To look first saves 120 system calls.
        if signal.getsignal(number) not in (wanted, None):
            signal.signal(number, wanted)
    _close_inherited_fds()
    # Write no .pyc for later imports: with our umask no other user could read them.
    sys.dont_write_bytecode = True
    return {"env": dict(environ), "umask": os.umask(0o077)}


def _close_inherited_fds() -> None:
    try:
        names = os.listdir("/proc/self/fd")
    except FileNotFoundError:  # the limit may be 1e9: one close_range(2), and no list
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        return
    for fd in map(int, names):
        if fd > 2:
            try:
                os.close(fd)
            except OSError:  # it was the fd of the listing
                pass


def leads_a_group() -> bool:
    """
    Whether this is a job of an interactive shell: it can't make a session, and the shell waits for
    just this pid.
    """
    return os.getpgrp() == os.getpid() != os.getsid(0)


def needs_guard(spec: dict[str, Any]) -> bool:
    """
    Whether a run has a guard: its program runs on this host and does not survive.

    Args:
        spec (dict): Canonical.
    """
    return spec["remote"] is None and spec["on_disconnect"] == "kill"


def detach_from_caller(null: int | None = None) -> None:
    """
    Close the caller's pipes and leave its directory: then nothing that happens to them affects the
    run, and no mount stays busy.

    A stderr that is a file or a terminal stays open: no reader waits for its end, and if the spool
    is gone, only stderr can report it.

    Args:
        null (int): An fd of /dev/null, closed here; None to open one.
    """
    null = os.open(NULL, os.O_RDWR) if null is None else null
    for fd in range(3):
        if not os.isatty(fd) and not (fd == 2 and _is_named_file(fd)):
            os.dup2(null, fd)
    os.close(null)
    os.chdir("/")


def _is_named_file(fd: int) -> bool:
    found = os.fstat(fd)
    return (
        stat.S_ISREG(found.st_mode) and found.st_nlink > 0
    )  # a starter's file in memory has no name, and should go with the starter


def print_to_stderr(line: bytes) -> None:
    """
    The last resort of a chaperone whose spool is gone: no other code outside `cli` prints.
    """
    try:
        os.write(2, line)
    except OSError:
        pass


def print_run_id(run_id: str) -> None:
    """Print a run id. If stdout does not take it, only the run id is lost: the run goes on."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    try:
        if poll.poll(PATIENCE_MS):
            os.write(1, f"{run_id}\n".encode())
    except OSError:
        pass
