"""
How the process of a program is made: its stdin, its own session, its fds and limits, and which path
could not be executed.

Knows: posix_spawn, fork, exec, files of this host.  Must not know: what the program does later.
"""

from __future__ import annotations

import errno
import select

from ..cpython import os, signal, stat
from ..errors import StartError
from . import processes
from .fds import NULL, exists

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


def encoded(text: str) -> bytes:
    """A text of a spec as bytes: UTF-8 in every locale; escaped bytes become what they were."""
    return text.encode("utf-8", "surrogateescape")


def spawned(
    program: dict[str, Any],
    argv: list[bytes],
    env: dict[bytes, bytes],
    umask: int,
    fds: tuple[int, int, int],
) -> int:
    """
    Start a program.

    Args:
        program (dict): From a canonical spec.
        argv (list): Its words; `argv[0]` is looked for on the PATH of `env`.
        env (dict): Its whole environment.
        umask (int): Its umask.
        fds (tuple): Its stdin, stdout and stderr; the caller closes them.
    Returns:
        int: Its pid, which is also its process group and session.
    Raises:
        StartError: If it could not be executed; with the path that failed, and errno.
    """
    return (_forked if program["rlimits"] else _spawned)(program, argv, env, umask, fds)


def _spawned(
    program: dict[str, Any],
    argv: list[bytes],
    env: dict[bytes, bytes],
    umask: int,
    fds: tuple[int, int, int],
) -> int:
    """
    Start it by posix_spawn, and return its pid. That is a vfork, which takes 0.2 ms; a fork takes 1
    to 2.

    posix_spawn can't set the cwd and the umask, so this process takes them for that moment; it has
    no other threads that could notice.
    """
    moves = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]

    def spawn(path: bytes) -> int:
        return os.posix_spawn(
            path,
            argv,
            env,
            file_actions=moves,
            setsid=True,
            setsigmask=(),
            setsigdef=range(1, signal.SIGSYS + 1),
        )

    doing = f"change to cwd {program['cwd']!r}"
    ours = os.umask(umask)
    try:
        os.chdir(encoded(program["cwd"]))
        doing = f"run {program['argv'][0]!r}"
        return _first(argv[0], env, spawn)
    except OSError as error:
        raise StartError(
            "spawn", f"unable to {doing}: {error.strerror}", error.errno, type(error).__name__
        ) from error
    finally:
        os.umask(ours)
        os.chdir("/")


def _forked(
    program: dict[str, Any],
    argv: list[bytes],
    env: dict[bytes, bytes],
    umask: int,
    fds: tuple[int, int, int],
) -> int:
    """
    Start it by fork, and return its pid. Limits can only be set in the child, because this process
    could not raise a hard limit again.
    """
    reading, reporting = os.pipe()
    pid = os.fork()
    if not pid:
        _become(program, argv, umask, env, fds, reporting)
    os.close(reporting)
    with open(reading, "rb") as file:
        report = file.read()  # ends at the exec, which closes the other end
    if report:
        os.waitpid(pid, 0)
        number, _, sentence = report.decode("utf-8", "surrogateescape").partition(" ")
        failure = OSError(int(number), "")
        raise StartError("spawn", sentence, failure.errno, type(failure).__name__)
    return pid


def _become(
    program: dict[str, Any],
    argv: list[bytes],
    umask: int,
    env: dict[bytes, bytes],
    fds: tuple[int, int, int],
    reporting: int,
) -> NoReturn:
    """Turn this forked child into the program; or write what failed into the pipe, and exit."""
    doing = "start a session"
    # Made now, while there is memory.
    said = b"%d unable to start the program: out of memory" % errno.ENOMEM
    try:
        import resource

        os.setsid()
        processes.reset_signals()
        doing = "pass stdin, stdout and stderr on"
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.umask(umask)
        for name, limits in program["rlimits"].items():
            doing = f"set rlimit {name!r}"
            soft, hard = (resource.RLIM_INFINITY if limit is None else limit for limit in limits)
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))
        doing = f"change to cwd {program['cwd']!r}"
        os.chdir(encoded(program["cwd"]))
        doing = f"run {program['argv'][0]!r}"
        _first(argv[0], env, lambda path: os.execve(path, argv, env))
    except OSError as error:
        said = encoded(f"{error.errno or 0} unable to {doing}: {error.strerror}")
    except ValueError as error:  # setrlimit: a hard limit above ours
        said = encoded(f"{errno.EPERM} unable to {doing}: {error}")
    except MemoryError:  # because of a limit that was just set
        pass
    except BaseException as error:  # noqa: BLE001  this child must not go on as a chaperone
        said = encoded(f"0 unable to {doing}: {error!r}")
    finally:
        try:
            os.write(reporting, said)
        finally:
            os._exit(127)


def _first(name: bytes, env: dict[bytes, bytes], execute: Callable[[bytes], int]) -> int:
    """
    Execute the first file on the program's PATH that can be executed; an error names its path.
    """
    path = env.get(b"PATH", b"/bin:/usr/bin")  # the default of os.get_exec_path()
    searched = b"/" not in name
    candidates = (
        [directory + b"/" + name for directory in path.split(b":") if directory]
        if searched
        else [name]
    )
    denied: OSError | None = None
    for candidate in candidates:
        if searched and not exists(candidate):
            continue
        try:
            return execute(candidate)
        except (FileNotFoundError, NotADirectoryError) as error:
            interpreter = _interpreter(candidate)
            if interpreter is not None:
                raise OSError(error.errno, f"its interpreter {interpreter} is not there") from error
        except PermissionError as error:
            denied = denied or error
    if denied:
        raise denied
    raise FileNotFoundError(
        errno.ENOENT, "not found on the program's PATH" if searched else os.strerror(errno.ENOENT)
    )


def _interpreter(path: bytes) -> str | None:
    """The interpreter that an existing file needs; None if there is no such file."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return None
    words = head.partition(b"\n")[0][2:].split()
    return (
        repr(words[0].decode("utf-8", "surrogateescape"))
        if head.startswith(b"#!") and words
        else "(the loader its ELF header names)"
    )


# -- standard input: opened, waited for, and measured before it is sent to a far side


def open_stdin(stdin: str | dict[str, str] | None) -> int:
    """
    Open a program's stdin, without waiting for a writer.

    Args:
        stdin (str | dict): As in a canonical spec: a text, a file, or None for /dev/null.
    Returns:
        int: A non-blocking fd, at its first byte; the caller closes it.
    Raises:
        StartError: If it can't be opened, or the text can't be kept in memory.
    """
    doing = "keep stdin in memory"
    try:
        if isinstance(stdin, str):
            return _in_memory(stdin.encode("utf-8", "surrogateescape"))
        path = NULL if stdin is None else stdin["file"]
        doing = f"open stdin {path!r}"
        return os.open(encoded(path), os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StartError(
            "spawn", f"unable to {doing}: {error.strerror}", error.errno, type(error).__name__
        ) from error


def _in_memory(text: bytes) -> int:
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, 0)
    return fd


def is_stdin_awaited(fd: int) -> bool:
    """
    Whether this is a named FIFO that no process has written to, or closed, yet.

    open(2) would wait for a writer, and a chaperone that waits there can't answer a stop. A pipe
    that we inherited is not meant: it has a writer, or had one.
    """
    found = os.fstat(fd)
    if not stat.S_ISFIFO(found.st_mode) or found.st_dev == _pipes_device():
        return False
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not poll.poll(0)


def _pipes_device() -> int:
    """The device of unnamed pipes, which no file of a filesystem has."""
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_dev
    finally:
        for end in ends:
            os.close(end)


class Stdin:
    """The stdin that is sent to a far side; nothing until `open`."""

    def __init__(self) -> None:
        self._fd = -1
        self.size = 0

    def open(self, stdin: str | dict[str, str] | None) -> None:
        """
        Open it.

        Args:
            stdin (str | dict): As in a canonical spec.
        Raises:
            StartError: If it can't be opened, or is not a regular file.
        """
        if stdin is None:
            return
        self._fd = open_stdin(stdin)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) and stdin != {"file": NULL}:
            path = stdin["file"] if isinstance(stdin, dict) else None
            raise StartError(
                "spawn",
                f"unable to send stdin {path!r}: want a regular file, whose size is known before "
                "it is sent",
            )
        self.size = found.st_size

    def source(self) -> tuple[int, int] | None:
        """The fd and how many bytes of it to send; None for nothing."""
        return (self._fd, self.size) if self.size else None
