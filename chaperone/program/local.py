"""
A program on this host: spawned, watched, stopped with all that it started, its guard beside it.

Knows: pidfds, pipes, what a run's processes are.  Must not know: the spool, statuses.
"""

from __future__ import annotations

import fcntl
import os
import select

from ..errors import StartError
from ..model.cpython import signal
from . import processes, spawn
from .streams import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .interface import Chaperone

LEFTOVER_GRACE_S = (
    5.0  # what the program leaves running gets TERM and this long, or the stop's grace if shorter
)
LOOK_AGAIN_S, LOOKS = (
    0.1,
    50,
    # where the kernel does not tell what the program left: 5 s, as long as the leftovers themselves
    # would get
)
KILL_AGAIN_S = (
    0.02,
    1.0,
    # SIGKILL is sent again from 20 ms to 1 s apart: to forks that raced, and not to spin on a
    # process in D state
)

with open(f"{os.path.dirname(__file__)}/guard.sh", encoding="utf-8") as _file:
    GUARD = _file.read()  # now: when a run ends, the package may be gone


class LocalProgram:
    """
    The program of a run without `remote`.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Told what happens: `started`, `ended`, `finished`.
        inherited (dict): `env` (dict of bytes) and `umask` (int) as the chaperone was started with.
        cookie (str): Random; marks every process of the run in its environment.
    """

    def __init__(
        self, spec: dict[str, Any], chaperone: Chaperone, inherited: dict[str, Any], cookie: str
    ) -> None:
        self._spec, self._chaperone, self._inherited, self._cookie = (
            spec,
            chaperone,
            inherited,
            cookie,
        )
        self.pid = -1
        self._stdin = self._pidfd = self._guard_fd = -1
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
        Spawn the guard, then the program; where its standard input is a FIFO that is still silent,
        as soon as it is not.

        Raises:
            StartError: If the program could not be started; nothing is left running.
        """
        processes.become_subreaper()
        self._stdin = spawn.open_stdin(self._spec["program"]["stdin"])
        if spawn.is_stdin_awaited(self._stdin):
            self._chaperone.log("the program is started when its stdin has a byte, or its end")
            self._chaperone.loop.watch(self._stdin, select.POLLIN, self._stdin_came)
        else:
            self._begin()

    def _stdin_came(self, fd: int, events: int) -> None:
        self._chaperone.loop.unwatch(fd)
        try:
            self._begin()
        except StartError as error:
            self._chaperone.not_started(error)

    def _begin(self) -> None:
        program = self._spec["program"]
        ends = [self._stdin]
        try:
            os.set_blocking(self._stdin, True)
            ends += self._make_outputs(program["merge_stderr"])
            self._start_guard()
            self.pid = self._spawn(program, (ends[0], ends[1], ends[2]))
        except BaseException as error:
            self._dismiss_guard()
            for pump in self._pumps:
                pump.close()
            if isinstance(error, OSError):  # no descriptor, no memory: nothing was spawned
                raise StartError(
                    "spawn",
                    f"unable to start the program: {error.strerror}",
                    error.errno,
                    type(error).__name__,
                ) from error
            raise
        finally:
            for fd in set(ends):
                os.close(fd)
        self._tell_guard(f"{self.pid}\n")
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._chaperone.loop.watch(self._pidfd, select.POLLIN, self._program_ended)
        except (
            OSError
        ):  # no descriptor is left: SIGCHLD tells as well, and of every other child, too
            pass
        self._chaperone.started(self.pid)

    def _make_outputs(self, merge: bool) -> tuple[int, int]:
        """The program's ends of stdout and stderr; our ends are pumped into the streams."""
        if self._spec["output"]["through"] == "file":
            stdout = self._chaperone.open_stream("stdout")
            return stdout, os.dup(stdout) if merge else self._chaperone.open_stream("stderr")
        ends = []
        for stream in ("stdout",) if merge else ("stdout", "stderr"):
            ours, theirs = os.pipe()
            self._pumps.append(Pump(self._chaperone.loop, ours, self._chaperone.streams[stream]))
            ends.append(theirs)
        return ends[0], os.dup(ends[0]) if merge else ends[1]

    def _spawn(self, program: dict[str, Any], fds: tuple[int, int, int]) -> int:
        env = self._environment(program)
        argv = [os.fsencode(word) for word in program["argv"]]
        umask = self._inherited["umask"] if program["umask"] is None else int(program["umask"], 8)
        return spawn.spawned(program, argv, env, umask, fds)

    def _environment(self, program: dict[str, Any]) -> dict[bytes, bytes]:
        inherit = program["inherit_env"]
        inherited: dict[bytes, bytes] = self._inherited["env"]
        if inherit is True:
            env = dict(inherited)
        else:
            names = {os.fsencode(name) for name in inherit or ()}
            env = {name: value for name, value in inherited.items() if name in names}
        env.update(
            (os.fsencode(name), os.fsencode(value)) for name, value in program["env"].items()
        )
        env[b"CHAPERONE_RUN_ID"] = os.fsencode(self._spec["id"])
        env[b"CHAPERONE_COOKIE"] = os.fsencode(self._cookie)
        return env

    # -- the guard

    def _start_guard(self) -> None:
        """
        Before the program: between its fork and its guard there must be no moment without one.
        """
        theirs, self._guard_fd = os.pipe()
        # Opened anew: our own ends do not block, and a cat that meets EAGAIN gives up.
        held = [os.open(f"/proc/self/fd/{pump.fd}", os.O_RDONLY) for pump in self._pumps]
        held += [os.open(os.devnull, os.O_RDONLY) for _ in range(2 - len(held))]
        files = [stream.fd for stream in self._chaperone.streams.values()]
        moves = [
            (os.POSIX_SPAWN_DUP2, theirs, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
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
                setsigdef=range(1, signal.SIGSYS + 1),
            )
        except OSError as error:
            raise StartError(
                "spawn",
                f"unable to start the guard '/bin/sh': {error.strerror}",
                error.errno,
                type(error).__name__,
            ) from error
        finally:
            for fd in (theirs, *high, *held):
                os.close(fd)
        self._tell_guard(f"{self._cookie}\n")

    def _tell_guard(self, line: str) -> None:
        try:
            os.write(self._guard_fd, line.encode())
        except OSError:
            self._chaperone.log(
                "the guard is gone: if this chaperone is killed as well, the program lives on"
            )

    def _dismiss_guard(self) -> None:
        if self._guard_fd >= 0:
            self._tell_guard("done\n")
            os.close(self._guard_fd)
            self._guard_fd = -1

    # -- the program's end and what it leaves

    def _program_ended(self, fd: int, events: int) -> None:
        """
        It is a zombie now. It stays one until its leftovers are gone: that pins its pid and its
        group's number.
        """
        self._chaperone.loop.unwatch(fd)
        self._has_ended = True
        self._chaperone.program_ended()

    def children_changed(self) -> None:
        """SIGCHLD: take orphans that ended, and see whether that was the last one."""
        if (
            self._pidfd < 0 < self.pid
            and not self._has_ended
            and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ):
            self._program_ended(-1, 0)
            return
        try:
            processes.reap_orphans((self.pid, self._guard_pid))
        except OSError:  # no descriptor is left to list them by: the next look takes them
            return
        if self._finishing and self._left() == []:
            self._finished()

    def signal(self, signum: int) -> None:
        """Signal the program alone."""
        processes.signal_each([self.pid] if self._is_begun() else [], signum)

    def _is_begun(self) -> bool:
        return self.pid > 0

    def _never_begin(self) -> None:
        self._chaperone.loop.unwatch(self._stdin)
        os.close(self._stdin)
        self._chaperone.failed("stopped", "stopped before the program was started")

    def stop(self, signum: int) -> None:
        """Signal the program's group, and whatever was re-parented to us from elsewhere."""
        if not self._is_begun():
            self._never_begin()
            return
        processes.signal_group(self.pid, signum)
        try:
            strays = [
                pid
                for pid in processes.children(os.getpid())
                if pid != self._guard_pid and processes.group_of(pid) != self.pid
            ]
        except OSError:  # unknown: the SIGKILL that comes after the grace looks again
            return
        processes.signal_each(strays, signum)

    def kill(self) -> None:
        """SIGKILL to the whole tree, again and again until nothing is left."""
        if not self._is_begun():
            self._never_begin()
            return
        self._chaperone.loop.cancel(self._kill_timer)
        processes.signal_group(self.pid, signal.SIGKILL)
        left = self._left()
        if self._finishing and left == []:
            self._finished()
            return
        refused = processes.signal_each(left or [], signal.SIGKILL)
        if self._finishing and left and refused == len(left):
            self._chaperone.log(
                f"{refused} processes run as another user and can't be killed: {left[:20]!r}"
            )
            self._finished()
            return
        self._kill_pause_s = min(max(2 * self._kill_pause_s, KILL_AGAIN_S[0]), KILL_AGAIN_S[1])
        self._kill_timer = self._chaperone.loop.later(self._kill_pause_s, self.kill)

    def _left(self) -> list[int] | None:
        """
        What lives below us, but for the guard and a program that has ended; None where the kernel
        does not tell, for want of descriptors, say.
        """
        try:
            processes.reap_orphans((self.pid, self._guard_pid))
            return processes.descendants(
                os.getpid(),
                but=(self.pid, self._guard_pid) if self._finishing else (self._guard_pid,),
            )
        except OSError as error:
            self._blind = error.strerror or "error"
            return None

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left running, or leave it alone, then tell `finished`.

        Args:
            grace_s (float): What remains of a stop's grace, or the stop's whole grace where none
                was asked for.
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
        self._chaperone.log(f"the program left {len(left)} processes running: {left[:20]!r}")
        self.stop(signal.SIGTERM)
        if self._kill_timer is None:
            self._kill_timer = self._chaperone.loop.later(min(grace_s, LEFTOVER_GRACE_S), self.kill)

    def _finish_blindly(self, grace_s: float) -> None:
        """
        Nobody knows what it left: look again for a while, for what is short may not stay so; the
        outcome matters more than the rest.
        """
        if self._looks:
            self._looks -= 1
            self._chaperone.loop.later(LOOK_AGAIN_S, lambda: self.finish(grace_s))
            return
        self._chaperone.log(f"unable to know what the program left running: {self._blind}")
        self._leftovers = None
        if self._spec["leftovers"] == "stop":
            processes.signal_group(self.pid, signal.SIGKILL)
        self._finished()

    def _finished(self) -> None:
        """Nobody writes any more that we wait for: what the pipes hold now is the rest."""
        self._finishing = False
        self._chaperone.loop.cancel(self._kill_timer)
        for pump in self._pumps:
            pump.drain()
            pump.close()
        self._dismiss_guard()
        wait_status, rusage = processes.reaped(self.pid)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._chaperone.ended(wait_status, rusage=rusage)
        self._chaperone.finished(leftovers=self._leftovers)
