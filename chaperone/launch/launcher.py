"""
The launcher: one lean process per spool that forks chaperones from a warm image.

Knows: its socket, fork.  Must not know: how a run is held, or a file name.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import time

from ..cpython import accept, prctl, signal, socket
from ..errors import ChaperoneError, SpoolError
from ..hold import begin, guarding
from ..hold.inherited import ALL_SIGNALS, detach_from_caller, shed_inherited_state
from ..model import jsontext
from ..model import spec as specs
from ..program.fds import owned, receive_fds, send_fds
from ..program.guard import HEAD_START_S, MESSAGE_BYTES
from ..program.loop import LONGEST_S
from ..program.spawn import encoded
from ..spool import format, locks
from .client import ANSWER_S, receive_line, socket_path
from .image import IMAGE, TIME_DIGITS
from .process import visible_or_ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from ..program.guard import Guard

    Request = dict[str, Any]

CHANGED_SIGNALS = (signal.SIGHUP, signal.SIGCHLD)
BACKLOG = 4_096  # what net.core.somaxconn allows by default: a burst waits here, it is not refused
PR_GET_DUMPABLE = 3  # linux/prctl.h; asked for nothing but to have prctl found
# What a chaperone rehearses while it waits, and when: the run before it has started by then, and
# needs no core for that any more.
REHEARSAL_S = 0.004
SOON_S = 0.01  # between two requests of one burst
EXAMPLE = jsontext.dumps(
    {**specs.checked({"program": {"argv": ["true"]}}, "/"), "id": "x"}
).encode()
_PEER = 12  # bytes of struct ucred: pid, uid, gid


def serve(spool_path: str, idle_s: float | None, detach: bool) -> int:
    """
    Fork a chaperone for each request, until killed or idle.

    Args:
        spool_path (str): Absolute; made if it is missing.
        idle_s (float): End after so many seconds without a request; None for never.
        detach (bool): Return when the launcher takes requests, and go on in a process of its own.
    Returns:
        int: The exit code.
    Raises:
        SpoolError: If the spool can't be used, or has a launcher already.
    """
    # Now: otherwise each chaperone would import it, later, and perhaps from a newer package.
    import resource  # noqa: F401

    from ..farside import remote, unsupervised  # noqa: F401
    from ..hold import limits, watch  # noqa: F401
    from ..spool import timeline  # noqa: F401

    shed_inherited_state()
    reading, telling = os.pipe()
    if detach:
        pid = os.fork()
        if pid:
            os.close(telling)
            return visible_or_ended([(pid, reading)])[0]
        os.setsid()
    os.close(reading)
    spool_fd = format.open_spool(spool_path, create=True)
    lock_fd = _lock(spool_fd, spool_path)
    try:
        listening = _listen(spool_fd)
    except OSError as error:
        raise format.failure(
            f"start a launcher for spool {spool_path!r}: {format.LAUNCHER!r}", error
        ) from error
    os.write(telling, b"\n") if detach else None
    os.close(telling)
    detach_from_caller()
    for number in CHANGED_SIGNALS:  # a terminal may go, and the kernel reaps
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ours = (spool_fd, lock_fd, listening.fileno())
    us = _pidfd()
    # What is here by now is in the memory of all forks; a module that each loads, a garbage
    # collection that looks through all of it, would be in each fork's own.
    prctl(PR_GET_DUMPABLE, 0)
    gc.freeze()
    _fork_for_each(listening, ours, us, spool_path, idle_s)
    os.unlink(format.LAUNCHER, dir_fd=spool_fd)
    _fork_for_each(
        listening, ours, us, spool_path, 0
    )  # whoever connected before the name was removed is served; whoever did not starts cold
    os.close(lock_fd)
    return os.EX_OK


def _lock(spool_fd: int, spool_path: str) -> int:
    """
    Be the spool's only launcher.

    Not by flock, which a forked chaperone would share with the launcher; nor by filelock, which
    would be in the memory of every chaperone.
    """
    try:
        fd = format.open_plain(spool_fd, format.LAUNCHER_LOCK, os.O_RDWR | os.O_CREAT)
        is_ours = locks.try_take_for_process(fd)
    except SpoolError:
        raise
    except OSError as error:
        raise format.failure(f"start a launcher for spool {spool_path!r}", error) from error
    if not is_ours:
        raise SpoolError(
            f"unable to start a launcher for spool {spool_path!r}: "
            f"one is already running, pid {_pid(fd)}",
            errno.EAGAIN,
        )
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _pid(lock_fd: int) -> str:
    return os.pread(lock_fd, 20, 0).decode("ascii", "replace").strip()


def _pidfd() -> int:
    """A pidfd of this process, so that a forked chaperone can end it safely; -1 without pidfds."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError:
        return -1


def _listen(spool_fd: int) -> socket.socket:
    """Make the socket, and rename it over an old one: a client that finds it can connect."""
    new = f"{format.LAUNCHER}.new"
    try:
        os.unlink(new, dir_fd=spool_fd)
    except FileNotFoundError:
        pass
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    os.umask(0o177)
    listening.bind(socket_path(spool_fd, new))
    os.umask(0o077)
    listening.listen(BACKLOG)
    os.rename(new, format.LAUNCHER, src_dir_fd=spool_fd, dst_dir_fd=spool_fd)
    return listening


def _fork_for_each(
    listening: socket.socket, ours: tuple[int, ...], us: int, spool_path: str, idle_s: float | None
) -> None:
    """
    The whole loop. The chaperone of the next request is forked before that comes, so that a start
    need not wait for two forks. A slow caller keeps it waiting, not the launcher.

    Args:
        ours (tuple): fds that no fork may keep; the first is the spool's.
        us (int): Our own pidfd; -1 for none.
        idle_s (float): Return after so many seconds without a request; None for never.
    """
    spare = _forked(ours, us, spool_path)
    handed_at = 0.0
    while _comes(listening, idle_s):
        try:
            fd = accept(listening)
        except OSError:  # the caller has gone, or the system is out of files, which will pass
            time.sleep(0.05)
            continue
        # The spare one may have been killed, or there was no process left for it. Without any, the
        # caller sees its connection close, and starts cold.
        with owned(fd):
            if not _handed_over(spare, fd):
                _handed_over(_forked(ours, us, spool_path), fd)
        before, handed_at = handed_at, time.monotonic()
        if handed_at - before > SOON_S:  # otherwise the next one should not have to wait for forks
            _comes(listening, HEAD_START_S)
        spare = _forked(ours, us, spool_path)


def _forked(ours: tuple[int, ...], us: int, spool_path: str) -> socket.socket | None:
    """A connection to a chaperone that waits for its request; None if none could be forked."""
    # As `shed_inherited_state` leaves them in a chaperone.
    signal.pthread_sigmask(signal.SIG_SETMASK, ALL_SIGNALS)
    ends: tuple[socket.socket, ...] = ()
    try:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, 0)
        if not os.fork():
            ends[0].close()
            _become_chaperone(ends[1], ours, spool_path, us)
        ends[1].close()
        return ends[0]
    except OSError:
        for end in ends:
            end.close()
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _handed_over(spare: socket.socket | None, fd: int) -> bool:
    """Give a caller's connection to a chaperone that waits; False if there is none."""
    if spare is None:
        return False
    try:
        send_fds(spare, b"request", [fd])
        return True
    except OSError:
        return False
    finally:
        spare.close()


def _comes(listening: socket.socket, idle_s: float | None) -> bool:
    """Wait for a request; False if none came for so many seconds (None: no limit)."""
    poll = select.poll()
    poll.register(listening.fileno(), select.POLLIN)
    left_s = float("inf") if idle_s is None else idle_s
    while left_s > LONGEST_S:
        if poll.poll(LONGEST_S * 1000):
            return True
        left_s -= LONGEST_S
    return bool(poll.poll(left_s * 1000))


# -- the fork: all runs share the pages that it does not write to; to write to 0.1 MB takes 0.05 ms


def _become_chaperone(
    waiting: socket.socket, ours: tuple[int, ...], spool_path: str, launcher_fd: int
) -> NoReturn:
    """Become a guard; in its child wait for a request, hold the run, and exit."""
    code = os.EX_SOFTWARE
    try:
        for number in CHANGED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # At once: what is done before it is in the memory of the guard as well.
        guard = guarding.fork(kept=(*ours, waiting.fileno(), launcher_fd), is_new=True)
        spool_fd, *others = ours
        for number in others:  # who connects when the launcher has ended must be refused
            os.close(number)
        if not _comes(waiting, REHEARSAL_S):  # in a burst a request is there already
            begin.rehearse(EXAMPLE)
        _, fds = receive_fds(waiting, MESSAGE_BYTES)
        waiting.close()
        # A signal that came by now is not the run's.
        while pending := signal.sigpending():
            signal.sigtimedwait(pending, 0)
        if not fds or guard.heard() is None:  # the launcher has ended; or the guard was killed
            guard.release()
            os._exit(os.EX_OK)
        connection = socket.socket(fileno=fds[0])
        connection.settimeout(ANSWER_S)
        try:
            is_here = _is_at(spool_fd, spool_path)
            os.close(spool_fd)
            request = _request(connection, launcher_fd)
            if not is_here:
                _end(launcher_fd)
                raise ChaperoneError(f"unable to start a run in spool {spool_path!r}: it was moved")
            if launcher_fd >= 0:
                os.close(launcher_fd)
            code = _hold(connection, request, spool_path, guard)
        except (ChaperoneError, OSError, ValueError) as error:
            _say(
                connection,
                {
                    "error": type(error).__name__,
                    "message": str(error),
                    "errno": error.errno if isinstance(error, OSError) else None,
                },
            )
    finally:
        os._exit(code)


def _is_at(spool_fd: int, spool_path: str) -> bool:
    """
    Whether the launcher's spool is still at its path: a request through a socket that was moved
    must not start a run in another spool.
    """
    try:
        return os.path.samestat(os.fstat(spool_fd), os.stat(spool_path))
    except OSError:
        return False


def _end(launcher_fd: int) -> None:
    """End the launcher, so that the next request starts one with the current code and spool."""
    try:
        signal.pidfd_send_signal(launcher_fd, signal.SIGTERM)
    except OSError:  # it has ended; or there are no pidfds, and those who ask it start cold
        pass


def _request(connection: socket.socket, launcher_fd: int) -> Request:
    uid = int.from_bytes(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER)[4:8], "little"
    )
    if uid != os.geteuid():
        raise ChaperoneError(f"unable to launch a run for uid {uid}: want uid {os.geteuid()}")
    value = jsontext.loads(receive_line(connection))
    image = value.get("image") if isinstance(value, dict) else None
    if not isinstance(value, dict) or image != IMAGE:
        if isinstance(image, str) and image[:TIME_DIGITS] >= IMAGE[:TIME_DIGITS]:
            _end(launcher_fd)  # it was upgraded
        raise ChaperoneError(
            f"unable to launch a run: want a spec checked by the same version, {IMAGE!r}"
        )
    return value


def _hold(connection: socket.socket, request: Request, spool_path: str, guard: Guard) -> int:
    env = {encoded(name): encoded(value) for name, value in request["env"].items()}
    if request["spec"]["remote"] is not None:  # ssh is the asker's as well
        os.environb.clear()
        os.environb.update(env)
    if _hung_up(connection):
        return os.EX_TEMPFAIL  # it starts cold by now, or is gone

    def visible(run_id: str) -> None:
        _say(connection, {"visible": run_id})
        connection.close()

    inherited = {"env": env, "umask": request["umask"]}
    return begin.hold_new_run(
        request["spec"], spool_path, None, inherited, visible, request["key"], guard
    )


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), 0)
    return bool(poll.poll(0))


def _say(connection: socket.socket, value: dict[str, object]) -> None:
    try:
        connection.sendall((jsontext.dumps(value) + "\n").encode())
    except OSError:  # the caller has gone; the run directory has the same answer
        pass
