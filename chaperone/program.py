"""
A program on this host: spawned, watched, stopped with all that it started, its guard beside it.

Knows: fork, exec, pidfds, pipes.  Must not know: the spool, statuses.
"""

from __future__ import annotations

import _signal
import errno
import fcntl
import os
import resource
import select

from . import tree
from .errors import StartError
from .streams import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .supervise import Holder

LEFTOVER_GRACE_S = 5.0  # what the program leaves running gets TERM and this long, or the stop's grace if shorter
LOOK_AGAIN_S, LOOKS = 0.1, 50  # where the kernel does not tell what the program left: 5 s, as long as the leftovers themselves would get
KILL_AGAIN_S = (0.02, 1.0)  # SIGKILL is sent again from 20 ms to 1 s apart: to forks that raced, and not to spin on a process in D state

with open(f"{os.path.dirname(__file__)}/guard.sh", encoding="ascii") as _file:
    GUARD = _file.read()  # now: when a run ends, the package may be gone


class LocalProgram:
    """
    The program of a run without `remote`.

    Args:
        spec (dict): Canonical.
        holder (Holder): Told what happens: `started`, `ended`, `finished`.
        inherited (dict): `env` (dict of bytes) and `umask` (int) as the chaperone was started with.
        cookie (str): Random; marks every process of the run in its environment.
    """

    def __init__(self, spec: dict[str, Any], holder: Holder, inherited: dict[str, Any], cookie: str) -> None:
        self._spec, self._holder, self._inherited, self._cookie = spec, holder, inherited, cookie
        self.pid = -1
        self._pidfd = self._guard_fd = -1
        self._guard_pid = -1
        self._pumps: list[Pump] = []
        self._leftovers: int | None = 0
        self._finishing = self._has_ended = False
        self._looks, self._blind = LOOKS, ""
        self._kill_pause_s = 0.0
        self._kill_timer: int | None = None

    # -- starting

    def start(self) -> None:
        """
        Spawn the guard, then the program.

        Raises:
            StartError: If the program could not be started; nothing is left running.
        """
        tree.become_subreaper()
        program = self._spec["program"]
        ends: list[int] = []
        try:
            ends.append(_open_stdin(program["stdin"]))
            ends += self._make_outputs(program["merge_stderr"])
            self._start_guard()
            self.pid = self._spawn(program, (ends[0], ends[1], ends[2]))
        except BaseException as error:
            self._dismiss_guard()
            for pump in self._pumps:
                pump.close()
            if isinstance(error, OSError):  # no descriptor, no memory: nothing was spawned
                raise StartError("spawn", f"unable to start the program: {error.strerror}", error.errno, type(error).__name__) from error
            raise
        finally:
            for fd in set(ends):
                os.close(fd)
        self._tell_guard(f"{self.pid}\n")
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._holder.loop.watch(self._pidfd, select.POLLIN, self._program_ended)
        except OSError:  # no descriptor is left: SIGCHLD tells as well, and of every other child, too
            pass
        self._holder.started(self.pid)

    def _make_outputs(self, merge: bool) -> tuple[int, int]:
        """The program's ends of stdout and stderr; our ends are pumped into the streams."""
        if self._spec["output"]["through"] == "file":
            stdout = self._holder.open_stream("stdout")
            return stdout, os.dup(stdout) if merge else self._holder.open_stream("stderr")
        ends = []
        for stream in ("stdout",) if merge else ("stdout", "stderr"):
            ours, theirs = os.pipe()
            self._pumps.append(Pump(self._holder.loop, ours, self._holder.streams[stream]))
            ends.append(theirs)
        return ends[0], os.dup(ends[0]) if merge else ends[1]

    def _spawn(self, program: dict[str, Any], fds: tuple[int, int, int]) -> int:
        env = self._environment(program)
        argv = [os.fsencode(word) for word in program["argv"]]
        umask = self._inherited["umask"] if program["umask"] is None else int(program["umask"], 8)
        if program["rlimits"]:
            return _forked(program, argv, env, umask, fds)
        return _spawned(program, argv, env, umask, fds)

    def _environment(self, program: dict[str, Any]) -> dict[bytes, bytes]:
        inherit = program["inherit_env"]
        inherited: dict[bytes, bytes] = self._inherited["env"]
        if inherit is True:
            env = dict(inherited)
        else:
            names = {os.fsencode(name) for name in inherit or ()}
            env = {name: value for name, value in inherited.items() if name in names}
        env.update((os.fsencode(name), os.fsencode(value)) for name, value in program["env"].items())
        env[b"CHAPERONE_RUN_ID"] = os.fsencode(self._spec["id"])
        env[b"CHAPERONE_COOKIE"] = os.fsencode(self._cookie)
        return env

    # -- the guard

    def _start_guard(self) -> None:
        """Before the program: between its fork and its guard there must be no moment without one."""
        theirs, self._guard_fd = os.pipe()
        # Opened anew: our own ends do not block, and a cat that meets EAGAIN gives up.
        held = [os.open(f"/proc/self/fd/{pump.fd}", os.O_RDONLY) for pump in self._pumps]
        held += [os.open(os.devnull, os.O_RDONLY) for _ in range(2 - len(held))]
        files = [stream.fd for stream in self._holder.streams.values()]
        moves = [(os.POSIX_SPAWN_DUP2, theirs, 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
        # From high numbers down to 3..6, so that no move overwrites what a later one needs.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (*held, *files)]
        moves += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high, 3)]
        try:
            self._guard_pid = os.posix_spawn(
                "/bin/sh",
                ["chaperone-guard", "-c", GUARD],
                {"PATH": os.defpath},
                file_actions=moves,
                setsid=True,
                setsigmask=(),
                setsigdef=range(1, _signal.SIGSYS + 1),
            )
        except OSError as error:
            raise StartError("spawn", f"unable to start the guard '/bin/sh': {error.strerror}", error.errno, type(error).__name__) from error
        finally:
            for fd in (theirs, *high, *held):
                os.close(fd)
        self._tell_guard(f"{self._cookie}\n")

    def _tell_guard(self, line: str) -> None:
        try:
            os.write(self._guard_fd, line.encode())
        except OSError:
            self._holder.log("the guard is gone: if this chaperone is killed as well, the program lives on")

    def _dismiss_guard(self) -> None:
        if self._guard_fd >= 0:
            self._tell_guard("done\n")
            os.close(self._guard_fd)
            self._guard_fd = -1

    # -- the program's end and what it leaves

    def _program_ended(self, fd: int, events: int) -> None:
        """It is a zombie now. It stays one until its leftovers are gone: that pins its pid and its group's number."""
        self._holder.loop.unwatch(fd)
        self._has_ended = True
        self._holder.program_ended()

    def children_changed(self) -> None:
        """SIGCHLD: take orphans that ended, and see whether that was the last one."""
        if self._pidfd < 0 < self.pid and not self._has_ended and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._program_ended(-1, 0)
            return
        try:
            tree.reap_orphans((self.pid, self._guard_pid))
        except OSError:  # no descriptor is left to list them by: the next look takes them
            return
        if self._finishing and self._left() == []:
            self._finished()

    def signal(self, signum: int) -> None:
        """Signal the program alone."""
        tree.signal_each([self.pid], signum)

    def stop(self, signum: int) -> None:
        """Signal the program's group, and whatever was re-parented to us from elsewhere."""
        tree.signal_group(self.pid, signum)
        try:
            strays = [pid for pid in tree.children(os.getpid()) if pid != self._guard_pid and tree.group_of(pid) != self.pid]
        except OSError:  # unknown: the SIGKILL that comes after the grace looks again
            return
        tree.signal_each(strays, signum)

    def kill(self) -> None:
        """SIGKILL to the whole tree, again and again until nothing is left."""
        self._holder.loop.cancel(self._kill_timer)
        tree.signal_group(self.pid, _signal.SIGKILL)
        left = self._left()
        if self._finishing and left == []:
            self._finished()
            return
        refused = tree.signal_each(left or [], _signal.SIGKILL)
        if self._finishing and left and refused == len(left):
            self._holder.log(f"{refused} processes run as another user and can't be killed: {left[:20]!r}")
            self._finished()
            return
        self._kill_pause_s = min(max(2 * self._kill_pause_s, KILL_AGAIN_S[0]), KILL_AGAIN_S[1])
        self._kill_timer = self._holder.loop.at(self._holder.loop.now() + self._kill_pause_s, self.kill)

    def _left(self) -> list[int] | None:
        """What lives below us, but for the guard and a program that has ended; None where the kernel does not tell, for want of descriptors, say."""
        try:
            tree.reap_orphans((self.pid, self._guard_pid))
            return tree.descendants(os.getpid(), but=(self.pid, self._guard_pid) if self._finishing else (self._guard_pid,))
        except OSError as error:
            self._blind = error.strerror or "error"
            return None

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left running, or leave it alone, then tell `finished`.

        Args:
            grace_s (float): What remains of a stop's grace, or the stop's whole grace where none was asked for.
        """
        self._finishing = True
        left = self._left()
        if left is None:
            self._finish_blindly(grace_s)
            return
        self._leftovers = len(left)
        if not left or self._spec["leftovers"] == "leave":
            self._finished()
            return
        self._holder.log(f"the program left {len(left)} processes running: {left[:20]!r}")
        self.stop(_signal.SIGTERM)
        if self._kill_timer is None:
            self._kill_timer = self._holder.loop.at(self._holder.loop.now() + min(grace_s, LEFTOVER_GRACE_S), self.kill)

    def _finish_blindly(self, grace_s: float) -> None:
        """Nobody knows what it left: look again for a while, for what is short may not stay so; the outcome matters more than the rest."""
        if self._looks:
            self._looks -= 1
            self._holder.loop.at(self._holder.loop.now() + LOOK_AGAIN_S, lambda: self.finish(grace_s))
            return
        self._holder.log(f"unable to know what the program left running: {self._blind}")
        self._leftovers = None
        if self._spec["leftovers"] == "stop":
            tree.signal_group(self.pid, _signal.SIGKILL)
        self._finished()

    def _finished(self) -> None:
        """Nobody writes any more that we wait for: what the pipes hold now is the rest."""
        self._finishing = False
        self._holder.loop.cancel(self._kill_timer)
        for pump in self._pumps:
            pump.drain()
            pump.close()
        self._dismiss_guard()
        wait_status, rusage = tree.reaped(self.pid)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._holder.ended(wait_status, rusage=rusage)
        self._holder.finished(leftovers=self._leftovers)


def _open_stdin(stdin: str | dict[str, str] | None) -> int:
    """An fd to read from: /dev/null, a file, or a text in memory."""
    if isinstance(stdin, str):
        fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
        view = memoryview(stdin.encode("utf-8", "surrogateescape"))
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        return fd
    path = os.devnull if stdin is None else stdin["file"]
    try:
        return os.open(path, os.O_RDONLY | os.O_NOCTTY)
    except OSError as error:
        raise StartError("spawn", f"unable to open stdin {path!r}: {error.strerror}", error.errno, type(error).__name__) from error


# -- in the child, between fork and exec


def _spawned(program: dict[str, Any], argv: list[bytes], env: dict[bytes, bytes], umask: int, fds: tuple[int, int, int]) -> int:
    """
    The program's pid, by posix_spawn: a vfork, which takes 0.2 ms where our own fork takes 1 to 2.

    It knows no cwd and no umask, so they are ours for that moment: there are no threads that could notice.
    """
    moves = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]

    def spawn(path: bytes) -> int:
        return os.posix_spawn(path, argv, env, file_actions=moves, setsid=True, setsigmask=(), setsigdef=range(1, _signal.SIGSYS + 1))

    doing = f"change to cwd {program['cwd']!r}"
    ours = os.umask(umask)
    try:
        os.chdir(program["cwd"])
        doing = f"run {program['argv'][0]!r}"
        return _first(argv[0], env, spawn)
    except OSError as error:
        raise StartError("spawn", f"unable to {doing}: {error.strerror}", error.errno, type(error).__name__) from error
    finally:
        os.umask(ours)
        os.chdir("/")


def _forked(program: dict[str, Any], argv: list[bytes], env: dict[bytes, bytes], umask: int, fds: tuple[int, int, int]) -> int:
    """The program's pid, by fork: the only way to set limits, for a hard limit once lowered can't be raised again."""
    report, reporting = os.pipe()
    pid = os.fork()
    if not pid:
        _become(program, argv, umask, env, fds, reporting)
    os.close(reporting)
    with open(report, "rb") as file:
        told = file.read()  # ends at the exec, which closes the other end
    if told:
        os.waitpid(pid, 0)
        number, _, sentence = told.decode("utf-8", "surrogateescape").partition(" ")
        failure = OSError(int(number), "")
        raise StartError("spawn", sentence, failure.errno, type(failure).__name__)
    return pid


def _become(program: dict[str, Any], argv: list[bytes], umask: int, env: dict[bytes, bytes], fds: tuple[int, int, int], reporting: int) -> NoReturn:
    """Turn this forked child into the program, or tell over the pipe what failed and end."""
    doing = "start a session"
    try:
        os.setsid()
        tree.reset_signals()
        doing = "pass stdin, stdout and stderr on"
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.umask(umask)
        for name, limits in program["rlimits"].items():
            doing = f"set rlimit {name!r}"
            soft, hard = (resource.RLIM_INFINITY if limit is None else limit for limit in limits)
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))
        doing = f"change to cwd {program['cwd']!r}"
        os.chdir(program["cwd"])
        doing = f"run {program['argv'][0]!r}"
        _first(argv[0], env, lambda path: os.execve(path, argv, env))
    except OSError as error:
        sentence = f"unable to {doing}: {error.strerror}"
        number = error.errno or 0
    except ValueError as error:  # setrlimit: a hard limit above ours
        sentence, number = f"unable to {doing}: {error}", errno.EPERM
    os.write(reporting, f"{number} {sentence}".encode("utf-8", "surrogateescape"))
    os._exit(127)


def _first(name: bytes, env: dict[bytes, bytes], execute: Callable[[bytes], int]) -> int:
    """Execute the first file on the program's own PATH that can be; the error names the path it is about."""
    path = env.get(b"PATH", os.fsencode(os.defpath))
    searched = b"/" not in name
    candidates = [directory + b"/" + name for directory in path.split(b":") if directory] if searched else [name]
    denied: OSError | None = None
    for candidate in candidates:
        if searched and not os.path.lexists(candidate):
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
    raise FileNotFoundError(errno.ENOENT, "not found on the program's PATH" if searched else os.strerror(errno.ENOENT))


def _interpreter(path: bytes) -> str | None:
    """What the first line of an existing script asks for, None where there is no such file."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return None
    words = head.partition(b"\n")[0][2:].split()
    return repr(os.fsdecode(words[0])) if head.startswith(b"#!") and words else "(the loader its ELF header names)"
