"""
The launcher: one lean process per spool that forks chaperones from a warm image, and how it is asked.

Knows: its socket, fork.  Must not know: how a run is held, or a file name.
An answer that never comes costs a cold start and nothing else: the run id decides, and the key tells who won.
"""

from __future__ import annotations

import _signal
import _socket
import fcntl
import os
import select
import time

from . import jsontext, launch, prologue, spool
from .errors import ChaperoneError, RunExistsError, SpoolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Request = dict[str, Any]

CHANGED_SIGNALS = (_signal.SIGHUP, _signal.SIGCHLD)
ON_DEMAND_IDLE_S = 60.0  # a launcher that nobody asked for by hand ends when it was not needed for so long
ANSWER_S = 5.0  # a run directory takes 2 ms; a launcher that is stopped or swapped out must not hold a start up for ever
BACKLOG = 4_096  # what net.core.somaxconn allows by default: a burst waits here, it is not refused
TIME_DIGITS = 20  # of nanoseconds: enough for 3,000 years
_PEER = 12  # bytes of struct ucred: pid, uid, gid


def _image() -> str:
    """
    Which code this process runs: a spec is only taken from the same, for there it was checked.

    The newest of its files' times comes first, in TIME_DIGITS. Where a packager has set all times alike, size and place tell two images apart.
    """
    directory = os.path.dirname(os.path.abspath(__file__))
    with os.scandir(directory) as entries:
        found = [entry.stat() for entry in entries if entry.name.endswith((".py", ".sh"))]
    newest = max(file.st_mtime_ns for file in found)
    return f"{newest:0{TIME_DIGITS}d} {sum(file.st_size for file in found)} {directory}"


IMAGE = _image()


# -- the launcher


def serve(spool_path: str, idle_s: float | None, detach: bool) -> int:
    """
    Fork a chaperone for everyone who asks, until killed or idle.

    Args:
        spool_path (str): Absolute; made if it is not there.
        idle_s (float): End when nobody asked for so many seconds; None for never.
        detach (bool): Return when it can be asked, and go on in a process of its own.
    Returns:
        int: The exit code.
    Raises:
        SpoolError: If the spool can't be used, or has a launcher already.
    """
    from . import remote  # noqa: F401  else each chaperone would import it: later, and from a package that may be another by then

    prologue.settle()
    reading, telling = os.pipe()
    if detach:
        pid = os.fork()
        if pid:
            os.close(telling)
            return launch.visible_or_ended([(pid, reading)])[0]
        os.setsid()
    os.close(reading)
    spool_fd = spool.open_spool(spool_path, create=True)
    lock_fd = _lock(spool_fd, spool_path)
    try:
        listening = _listen(spool_fd)
    except OSError as error:
        raise spool.failure(f"launch for spool {spool_path!r}: {spool.LAUNCHER!r}", error) from error
    os.write(telling, b"\n") if detach else None
    os.close(telling)
    prologue.leave_place()
    for number in CHANGED_SIGNALS:  # a terminal may go, and the kernel reaps
        _signal.signal(number, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    ours = (spool_fd, lock_fd, listening.fileno())
    _fork_for_each(listening, ours, spool_path, idle_s)
    os.unlink(spool.LAUNCHER, dir_fd=spool_fd)
    _fork_for_each(listening, ours, spool_path, 0)  # who connected before the name went is served; who did not starts cold
    os.close(lock_fd)
    return os.EX_OK


def _lock(spool_fd: int, spool_path: str) -> int:
    """
    Be the spool's only launcher.

    Not by filelock, which would be in the memory of every chaperone, nor by flock, which a forked chaperone would share:
    fcntl locks are not inherited, and fall with the launcher.
    """
    try:
        fd = spool.open_plain(spool_fd, spool.LAUNCHER_LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SpoolError(f"unable to launch for spool {spool_path!r}: it has a launcher, pid {_pid(fd)}", error.errno) from error
    except SpoolError:
        raise
    except OSError as error:
        raise spool.failure(f"launch for spool {spool_path!r}", error) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _pid(lock_fd: int) -> str:
    return os.pread(lock_fd, 20, 0).decode("ascii", "replace").strip()


def _path(spool_fd: int, name: str = spool.LAUNCHER) -> str:
    """A name that fits into the 108 bytes of a socket's address, however long the spool's is."""
    return f"/proc/self/fd/{spool_fd}/{name}"


def _listen(spool_fd: int) -> _socket.socket:
    """By rename over what a killed one left, so that whoever finds the socket can connect."""
    new = f"{spool.LAUNCHER}.new"
    try:
        os.unlink(new, dir_fd=spool_fd)
    except FileNotFoundError:
        pass
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    os.umask(0o177)
    listening.bind(_path(spool_fd, new))
    os.umask(0o077)
    listening.listen(BACKLOG)
    os.rename(new, spool.LAUNCHER, src_dir_fd=spool_fd, dst_dir_fd=spool_fd)
    return listening


def _fork_for_each(listening: _socket.socket, ours: tuple[int, ...], spool_path: str, idle_s: float | None) -> None:
    """
    The whole loop: who is slow to say what it wants keeps a fork of us waiting, not us.

    Args:
        ours (tuple): fds that no fork may keep; the first is the spool's.
        idle_s (float): Return when nobody came for so many seconds; None for never.
    """
    us = os.getpid()
    poll = select.poll()
    poll.register(listening.fileno(), select.POLLIN)
    while poll.poll(None if idle_s is None else idle_s * 1000):
        try:
            fd, _ = listening._accept()  # type: ignore[attr-defined]
        except OSError:  # it has gone, or the system is out of files: others end, nobody is lost
            time.sleep(0.05)
            continue
        _signal.pthread_sigmask(_signal.SIG_SETMASK, prologue.ALL_SIGNALS)  # as `settle` leaves them in a chaperone
        try:
            if not os.fork():
                _become_chaperone(fd, ours, spool_path, us)
        except OSError:  # no more processes: the asker sees its connection close, and tells what it can
            pass
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.close(fd)


# -- the fork: what it does not touch stays one page for all runs, and 0.1 MB of touched pages are 0.05 ms


def _become_chaperone(fd: int, ours: tuple[int, ...], spool_path: str, launcher_pid: int) -> NoReturn:
    """Take the request, hold its run, exit."""
    code = os.EX_SOFTWARE
    try:
        is_here = _is_at(ours[0], spool_path)
        for number in ours:
            os.close(number)
        for number in CHANGED_SIGNALS:
            _signal.signal(number, _signal.SIG_DFL)
        connection = _socket.socket(fileno=fd)
        connection.settimeout(ANSWER_S)
        try:
            request = _request(connection, launcher_pid)
            if not is_here:
                _end(launcher_pid)
                raise ChaperoneError(f"unable to launch for spool {spool_path!r}: it was moved")
            code = _hold(connection, request, spool_path)
        except (ChaperoneError, OSError, ValueError) as error:
            _say(connection, {"error": type(error).__name__, "message": str(error), "errno": error.errno if isinstance(error, OSError) else None})
    finally:
        os._exit(code)


def _is_at(spool_fd: int, spool_path: str) -> bool:
    """Whether the launcher's spool still has its name: who asks at a socket that was moved wants no run in another spool."""
    try:
        return os.path.samestat(os.fstat(spool_fd), os.stat(spool_path))
    except OSError:
        return False


def _end(launcher_pid: int) -> None:
    """Have the launcher end, for the next one that is asked for to be right; not whoever has us for a child since it died."""
    if os.getppid() == launcher_pid:
        os.kill(launcher_pid, _signal.SIGTERM)


def _request(connection: _socket.socket, launcher_pid: int) -> Request:
    uid = int.from_bytes(connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _PEER)[4:8], "little")
    if uid != os.geteuid():
        raise ChaperoneError(f"unable to launch for uid {uid}: want uid {os.geteuid()}")
    value = jsontext.loads(_line(connection))
    image = value.get("image") if isinstance(value, dict) else None
    if not isinstance(value, dict) or image != IMAGE:
        if isinstance(image, str) and image[:TIME_DIGITS] >= IMAGE[:TIME_DIGITS]:
            _end(launcher_pid)  # it was upgraded
        raise ChaperoneError(f"unable to launch: want a request of image {IMAGE!r}")
    return value


def _hold(connection: _socket.socket, request: Request, spool_path: str) -> int:
    env = {os.fsencode(name): os.fsencode(value) for name, value in request["env"].items()}
    if request["spec"]["remote"] is not None:  # ssh is the asker's as well
        os.environb.clear()
        os.environb.update(env)
    if _hung_up(connection):
        return os.EX_TEMPFAIL  # it starts cold by now, or is gone

    def visible(run_id: str) -> None:
        _say(connection, {"visible": run_id})
        connection.close()

    inherited = {"env": env, "umask": request["umask"]}
    return prologue.held(request["spec"], spool_path, None, inherited, visible, request["key"])


def _hung_up(connection: _socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), 0)
    return bool(poll.poll(0))


def _say(connection: _socket.socket, value: dict[str, object]) -> None:
    try:
        connection.sendall((jsontext.dumps(value) + "\n").encode())
    except OSError:  # it has gone; the run directory tells the same
        pass


def _line(connection: _socket.socket) -> bytes:
    """
    Up to a newline.

    Raises:
        OSError: If the other end went, or took too long.
    """
    pieces: list[bytes] = []
    while not (pieces and pieces[-1].endswith(b"\n")):
        piece = connection.recv(1 << 18)
        if not piece:
            raise ConnectionResetError("the other end has gone")
        pieces.append(piece)
    return b"".join(pieces)


# -- who asks


def started(path: str, run_id: str, text: bytes, given: dict[str, Any], cold: Callable[[], Any], on_demand: bool) -> bool:
    """
    Start a run by the spool's launcher, or cold where that does not work.

    Args:
        path (str): The spool's, absolute.
        text (bytes): The spec, canonical, with this id.
        given (dict): `env` (dict) and `umask` (int): what the program inherits.
        cold: Does it without a launcher; called when nobody can have, or has, done it.
        on_demand (bool): Start a launcher where there is none.
    Returns:
        bool: True if the launcher did it: False if `cold` did.
    Raises:
        RunExistsError, SpoolError: As `launch.start`; and whatever `cold` does.
    """
    key = os.urandom(16).hex()
    request = jsontext.dumps({"image": IMAGE, "key": key, **given}).removesuffix("}").encode() + b', "spec": ' + text + b"}\n"
    answer = _answer(path, request)
    if answer is None and on_demand and start_on_demand(path):
        answer = _answer(path, request)
    answer = answer or {}
    if answer.get("visible") == run_id or launch.key_of(path, run_id) == key:
        return True
    if answer.get("error") == RunExistsError.__name__:
        raise RunExistsError(answer["message"], answer["errno"])
    try:
        cold()
    except RunExistsError:
        if launch.key_of(path, run_id) != key:  # else the launcher's fork was only late, and came first
            raise
        return True
    return False


def _answer(path: str, request: bytes) -> dict[str, Any] | None:
    """What the launcher says; {} when it says nothing, None when there is none."""
    try:
        spool_fd = os.open(path, spool.DIRECTORY & ~os.O_NOFOLLOW)
    except OSError:
        return None
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_S)
        connection.connect(_path(spool_fd))
    except OSError:
        connection.close()
        return None
    finally:
        os.close(spool_fd)
    try:
        connection.sendall(request)
        value = jsontext.loads(_line(connection))
    except (OSError, ValueError):
        return {}
    finally:
        connection.close()
    return value if isinstance(value, dict) else {}


def start_on_demand(path: str) -> bool:
    """Start a launcher that ends when it was idle for a minute; False if none could be started."""
    null = os.open(os.devnull, os.O_RDWR)
    fd = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(null)
    # Its environment is in the memory of every chaperone it forks: not ours, which may hold secrets.
    env = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    try:
        return launch.spawned(["launcher", "--detach", "--idle", f"{ON_DEMAND_IDLE_S:g}", "--spool", path], env, [fd, fd, fd]) in (os.EX_OK, None)
    finally:
        os.close(fd)
