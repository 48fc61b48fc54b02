"""
A program on this host: how it is spawned, watched and stopped, with everything that it started.

Knows: pidfds, pipes, which processes belong to a run.  Must not know: the spool, statuses.
"""

from __future__ import annotations

import select

from ..cpython import os, signal
from ..errors import StartError
from . import cgroup, processes, spawn
from .streams import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .guard import Guard
    from .interface import Chaperone

# What the program leaves running gets SIGTERM, and SIGKILL after this time, or after the stop's
# grace if that is shorter.
LEFTOVER_GRACE_S = 5.0
# If what the program left can't be listed now: look again for 5 s, as long as leftovers would get.
LOOK_AGAIN_S, LOOKS = 0.1, 50
# SIGKILL is sent again, first after 20 ms and at last every second: a process may have forked just
# before it died, and a process in D state must not make us spin.
KILL_AGAIN_S = 0.02, 1.0


class LocalProgram:
    """
    The program of a run without `remote`.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Called when something happens: `started`, `ended`, `finished`.
        inherited (dict): The `env` (dict of bytes) and `umask` (int) that the chaperone was started
            with.
        guard (Guard): The process above this one, which has the run's streams; None if there is
            none.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        inherited: dict[str, Any],
        guard: Guard | None,
    ) -> None:
        self._spec, self._chaperone, self._inherited = spec, chaperone, inherited
        self._guard = guard
        self.pid = -1
        self._stdin = self._pidfd = -1
        self._pumps: list[Pump] = []
        self._leftovers: int | None = 0
        self._finishing = self._has_ended = False
        self._looks, self._blind = LOOKS, ""
        self._sees_orphans = False
        self._killed_by_us = False
        self._oom: bool | None = None
        self._oom_counter: str | None = None
        self._oom_kills: int | None = None
        self._own_maxrss_kib = 0.0
        self._kill_pause_s = 0.0
        self._kill_timer: int | None = None
        self._killing_since: float | None = None
        self._held_since: float | None = None

    # -- starting

    def start(self) -> None:
        """
        Spawn the program. If its stdin is a FIFO without a writer, wait for the first byte or the
        end of it.

        Raises:
            StartError: If the program could not be started; nothing is left running.
        """
        self._sees_orphans = processes.become_subreaper()
        if self._guard is not None:
            self._chaperone.loop.watch(self._guard.fd, select.POLLIN, self._guard_spoke)
        self._stdin = spawn.open_stdin(self._spec["program"]["stdin"])
        if spawn.is_stdin_awaited(self._stdin):
            self._chaperone.log("the program starts as soon as its stdin has a byte or is closed")
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
            if self._guard is not None:
                self._guard.take_pipes([pump.fd for pump in self._pumps])
            self._oom_counter = cgroup.counter()
            self._oom_kills = cgroup.oom_kills(self._oom_counter)
            self.pid = self._spawn(program, (ends[0], ends[1], ends[2]))
        except BaseException as error:
            for pump in self._pumps:
                pump.close()
            if isinstance(error, OSError):  # out of fds or memory: nothing was spawned
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
        if self._guard is not None:
            self._guard.take_group(self.pid)
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._chaperone.loop.watch(self._pidfd, select.POLLIN, self._program_ended)
        except OSError:  # out of fds: SIGCHLD reports its end too
            pass
        self._own_maxrss_kib = _own_maxrss_kib()
        self._sees_orphans = self._sees_orphans and processes.lists_children()
        self._chaperone.started(self.pid, tracking="kernel" if self._sees_orphans else "group")

    def _make_outputs(self, merge: bool) -> tuple[int, int]:
        """The program's ends of stdout and stderr; pumps read our ends into the streams."""
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
        argv = [spawn.encoded(word) for word in program["argv"]]
        umask = self._inherited["umask"] if program["umask"] is None else int(program["umask"], 8)
        return spawn.spawned(program, argv, env, umask, fds)

    def _environment(self, program: dict[str, Any]) -> dict[bytes, bytes]:
        inherit = program["inherit_env"]
        inherited: dict[bytes, bytes] = self._inherited["env"]
        if inherit is True:
            env = dict(inherited)
        else:
            names = {spawn.encoded(name) for name in inherit or ()}
            env = {name: value for name, value in inherited.items() if name in names}
        env.update(
            (spawn.encoded(name), spawn.encoded(value)) for name, value in program["env"].items()
        )
        env[b"CHAPERONE_RUN_ID"] = spawn.encoded(self._spec["id"])
        return env

    # -- the guard

    def _guard_spoke(self, fd: int, events: int) -> None:
        assert self._guard is not None
        passed_on = self._guard.heard()
        if passed_on is None:
            self._chaperone.loop.unwatch(fd)
            self._chaperone.guard_died()
        for number in passed_on or ():
            self._chaperone.signalled(number, passed_on=True)

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            self._chaperone.loop.unwatch(self._guard.fd)
            self._guard.dismiss()

    # -- the program's end and what it leaves

    def _program_ended(self, fd: int, events: int) -> None:
        """
        It is a zombie now, and stays one until its leftovers are gone: so its pid and the number of
        its group can't be reused.
        """
        self._chaperone.loop.unwatch(fd)
        self._has_ended = True
        kills = cgroup.oom_kills(self._oom_counter)
        if kills is not None and kills == self._oom_kills:
            self._oom = False
        elif None not in (kills, self._oom_kills) and not self._killed_by_us:
            self._oom = True
        self._chaperone.program_ended()

    def children_changed(self) -> None:
        """SIGCHLD arrived: reap orphans that ended, and see whether that was the last one."""
        if self._pidfd < 0 < self.pid and not self._has_ended and processes.has_ended(self.pid):
            self._program_ended(-1, 0)
            return
        try:
            processes.reap_orphans((self.pid,))
        except OSError:  # out of fds, so they can't be listed: the next look reaps them
            return
        if self._finishing and self._left() == []:
            self._finished()

    def signal(self, signum: int) -> None:
        """Signal only the program."""
        self._killed_by_us |= signum == signal.SIGKILL
        processes.signal_each([self.pid] if self._is_begun() else [], signum)

    def _is_begun(self) -> bool:
        return self.pid > 0

    def _never_begin(self) -> None:
        self._chaperone.loop.unwatch(self._stdin)
        os.close(self._stdin)
        self._chaperone.failed("stopped", "stopped before the program was started")

    def stop(self, signum: int) -> None:
        """Signal the program's group, and the orphans of other groups that became our children."""
        if not self._is_begun():
            self._never_begin()
            return
        self._killed_by_us |= signum == signal.SIGKILL
        processes.signal_group(self.pid, signum)
        try:
            strays = [
                pid
                for pid in (processes.children(os.getpid()) if self._sees_orphans else ())
                if processes.group_of(pid) != self.pid
            ]
        except OSError:  # they can't be listed: the SIGKILL after the grace looks again
            return
        processes.signal_each(strays, signum)

    def kill(self) -> None:
        """Send SIGKILL to the whole tree, again and again until nothing is left."""
        if not self._is_begun():
            self._never_begin()
            return
        self._killed_by_us = True
        if self._killing_since is None:
            self._killing_since = self._chaperone.loop.now()
        self._chaperone.loop.cancel(self._kill_timer)
        processes.signal_group(self.pid, signal.SIGKILL)
        left = self._left()
        if self._finishing and left == []:
            self._finished()
            return
        refused = processes.signal_each(left or [], signal.SIGKILL)
        held = (
            [pid for pid in left or [] if pid not in refused and processes.is_held(pid)]
            if self._is_overdue()
            else []
        )
        spared = refused + held
        # Where the program itself is none of them it has ended, and that is heard next.
        if left and len(spared) == len(left) and (self._finishing or self.pid in spared):
            sentence = _unkillable(left, bool(held))
            self._chaperone.log(sentence)
            self._finished() if self._finishing else self._give_up(sentence)
            return
        self._kill_pause_s = min(max(2 * self._kill_pause_s, KILL_AGAIN_S[0]), KILL_AGAIN_S[1])
        self._kill_timer = self._chaperone.loop.later(self._kill_pause_s, self.kill)

    def _left(self) -> list[int] | None:
        """
        The living processes below us, without a program that has ended. None if they can't be
        listed: the kernel has no such list, or no fd is free now.
        """
        if not self._sees_orphans:
            self._blind = "this kernel does not list child processes"
            return None
        try:
            processes.reap_orphans((self.pid,))
            # A /proc may hide that another user's process is a zombie.
            ended = self._finishing or processes.has_ended(self.pid)
            found = processes.descendants(os.getpid(), but=(self.pid,) if ended else ())
            return [pid for pid in found if processes.is_living(pid)]
        except OSError as error:
            self._blind = error.strerror or "error"
            return None

    def _is_overdue(self) -> bool:
        """Whether SIGKILL was sent so long ago that only a tracer can explain what still lives."""
        since = self._killing_since
        return since is not None and self._chaperone.loop.now() - since > processes.HELD_S

    def _await_tracer(self) -> None:
        """The program is a zombie that its tracer keeps from us: so is its outcome."""
        loop = self._chaperone.loop
        if self._held_since is None:
            self._held_since = loop.now()
        if self._is_overdue() and loop.now() - self._held_since > processes.HELD_S:
            sentence = f"process {self.pid} has ended, but its tracer has not released it"
            self._chaperone.log(sentence)
            self._give_up(sentence)
            return
        # As a rule SIGCHLD comes within microseconds, when the tracer has heard of its end.
        loop.cancel(self._kill_timer)
        self._kill_timer = loop.later(processes.HELD_S, self._finished)

    def _give_up(self, why: str) -> None:
        """The program itself can't be killed: do not wait for its end."""
        self._chaperone.loop.unwatch(self._pidfd)
        self._release()
        self._chaperone.lost(f"unable to stop the program: {why}", stage="stop")

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left running, or leave it alone, then call `finished`.

        Args:
            grace_s (float): What is left of the grace of a stop; without a stop, the whole grace of
                the spec.
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
        What it left can't be listed. Look again for a while, because a lack of fds may pass; then
        report the outcome, which matters more than the leftovers.
        """
        if self._looks and self._sees_orphans:
            self._looks -= 1
            self._chaperone.loop.later(LOOK_AGAIN_S, lambda: self.finish(grace_s))
            return
        self._chaperone.log(f"unable to find what the program left running: {self._blind}")
        self._leftovers = None
        if self._spec["leftovers"] == "stop":
            processes.signal_group(self.pid, signal.SIGKILL)
        self._finished()

    def _finished(self) -> None:
        """No process writes any more that we wait for: what the pipes hold now is the rest."""
        if not processes.has_ended(self.pid):
            self._await_tracer()
            return
        self._finishing = False
        self._release()
        wait_status, rusage = processes.reaped(self.pid)
        if rusage["maxrss"] is not None and rusage["maxrss"] <= self._own_maxrss_kib * 1024:
            # The kernel counts the memory of the chaperone, which spawned it, as the program's.
            rusage["maxrss"] = None
        self._chaperone.ended(
            wait_status,
            rusage=rusage,
            oom=self._oom
            if os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGKILL
            else False,
        )
        self._chaperone.finished(leftovers=self._leftovers)

    def _release(self) -> None:
        """Drain and close the pipes, dismiss the guard, and close the pidfd."""
        self._chaperone.loop.cancel(self._kill_timer)
        for pump in self._pumps:
            pump.drain()
            pump.close()
        self._dismiss_guard()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _unkillable(pids: list[int], may_be_held: bool) -> str:
    """Why these processes live on after SIGKILL; of many the first twenty are named."""
    if len(pids) == 1:
        held = " or is held by a tracer" if may_be_held else ""
        return f"process {pids[0]} runs as another user{held} and can't be killed"
    held = " or are held by a tracer" if may_be_held else ""
    named = ", ".join(map(str, pids[:20]))
    return f"{len(pids)} processes run as another user{held} and can't be killed: {named}"


def _own_maxrss_kib() -> float:
    """
    The most memory that this process had, in KiB; infinite if no descriptor is left to import
    `resource`. That is imported here, behind the start: the program need not wait until it is.
    """
    try:
        import resource
    except (ImportError, OSError):
        return float("inf")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
