"""
Holds one run: it records what happens to the program as a status, and turns requests into signals.

Knows: states, deadlines, requests.  Must not know: how a program is spawned or reached, or a file
name.
"""

from __future__ import annotations

import select
import time

from ..cpython import os, signal
from ..errors import StartError
from ..model import spec as specs
from ..model import status as statuses
from ..model import transitions
from ..model.request import Reader
from ..program import processes
from ..program.guard import ANSWERED, IGNORED
from ..program.loop import Loop
from ..program.streams import Stream
from .inherited import print_to_stderr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..model.request import Request
    from ..program.interface import Program, RunStore
    from .limits import Limits

    Begun = Callable[[str | None], None]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORWARDED = tuple(number for number in ANSWERED if number not in STOP_SIGNALS)
# A signal to a whole cgroup reaches us twice: directly, and through our guard. Even on a busy
# machine the second comes less than a second after the first.
TWICE_S = 1.0
# A disk that refuses the final status may take it later: after a remount, or with a higher quota.
# These are the pauses between 13 tries, 17 minutes in all.
PUBLISH_AGAIN_S = (1, 2, 5, 10, 30, 60, 120, 120, 120, 180, 180, 180)


class Chaperone:
    """
    The process that stays with one program for its whole life.

    Args:
        run (RunStore): Already locked, and visible to readers; closed at the end.
        spec (dict): Canonical, with its secrets.
        status (dict): The last known one, as in running.json.
        make_program: Called with this chaperone; returns the program that it will hold.
        begun: Called once: with None when the program was started, or with a sentence that says why
            it could not be.

    Attributes:
        loop (Loop): Watches fds and deadlines, also those of the program.
        streams (dict): `stdout` and `stderr`; each takes the program's bytes.
        signal_fd (int): The numbers of the signals that came, a byte each.
    """

    def __init__(
        self,
        run: RunStore,
        spec: dict[str, Any],
        status: dict[str, Any],
        make_program: Callable[[Chaperone], Program],
        begun: Begun = lambda failure: None,
    ) -> None:
        self.run, self.spec, self.status = run, spec, status
        self.loop = Loop()
        limit = spec["output"]["max_bytes"]
        self.streams = {
            name: Stream(fd, limit, self._teller(name), self._full, self.loop)
            for name, fd in run.streams.items()
        }
        self.program = make_program(self)
        self._begun = begun
        self._wakeup: tuple[int, int] = os.pipe()
        self.signal_fd = self._wakeup[0]
        self._requests = Reader()
        # signal: (when it last came, how many came directly minus how many the guard passed on)
        self._single: dict[int, tuple[float, int]] = {}
        self._started_at: float | None = None
        self._limits = _limits(self)
        self._stop_timer: int | None = None
        self._stop_by = float("inf")
        self._exit = os.EX_SOFTWARE

    def __enter__(self) -> Chaperone:
        for fd in self._wakeup:
            os.set_blocking(fd, False)
        for number in (*STOP_SIGNALS, *FORWARDED, signal.SIGCHLD):
            signal.signal(number, _left_to_wakeup_fd)
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # signals since our start arrive now
        self.loop.watch(self._wakeup[0], select.POLLIN, self._signalled)
        if self.run.control_fd >= 0:
            self.loop.watch(self.run.control_fd, select.POLLIN, self._requested)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            # A bug: the guard will end the program, readers find the run lost, the log says why.
            while trace.tb_next:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            self.log(f"the chaperone failed at {where}: {error!r}")
        signal.set_wakeup_fd(-1)
        for fd in self._wakeup:
            os.close(fd)
        self.run.close()

    def hold(self) -> int:
        """Start the program and stay until the outcome is recorded."""
        if self._limits is not None:
            self._limits.begin()
        try:
            self.program.start()
        except StartError as error:
            self.not_started(error)
        self.loop.run()
        return self._exit

    # -- what the program reports

    @property
    def log_path(self) -> str:
        """The path of the log, for ssh, which opens it by name."""
        return self.run.log_path

    @property
    def spool_fd(self) -> int:
        """The fd of the spool, for locks that chaperones share; -1 for a run without a spool."""
        return self.run.spool_fd

    def open_stream(self, stream: str) -> int:
        """One more fd of a stream, for the program itself."""
        return self.run.open_stream(stream)

    def log(self, text: str) -> None:
        """Write a line into the log; also to stderr if the log is full, removed or moved."""
        line = f"{statuses.timestamp(time.time_ns())} {text}\n".encode("utf-8", "backslashreplace")
        if not self.run.tell(line) or not self.run.is_in_place():
            print_to_stderr(line)

    def started(self, pid: int | None, **facts: object) -> None:
        """The program was started; `facts` are more fields of the status."""
        self.status = transitions.running(self.status, pid, time.time_ns(), **facts)
        self._replace()
        self._started_at = self.loop.now()
        self.run.mark_start(self._started_at)
        if self._limits is not None:
            self._limits.program_started(self._started_at)
        self._begun(None)
        self._ask_again()

    def resumed(self, pid: int, **facts: object) -> None:
        """The program of an adopted run was found again; its timeouts count from its start."""
        if self.status["start_time"] is None:
            self.started(pid, **facts)
            return
        self.noted(pid=pid, **facts)
        now, started_at = self.loop.now(), self.run.started_at
        if started_at is None or started_at > now:
            # It is not known on this boot's clock. Use the wall clock, which may have been set.
            now_ns = time.time_ns()
            start_ns = statuses.moment_ns(self.status["start_time"])
            started_at = now - max(0, now_ns - (now_ns if start_ns is None else start_ns)) / 1e9
        self._started_at = started_at
        if self._limits is not None:
            self._limits.program_started(started_at)
        self._ask_again()

    def _ask_again(self) -> None:
        """Repeat a stop that arrived before the program ran, or at a chaperone that died."""
        if (stop := self.status["stop"]) is not None:
            is_kill = stop["signal"] == "SIGKILL" or self.loop.now() >= self._stop_by
            self._kill(stop["reason"]) if is_kill else self.stop(stop["reason"])

    def noted(self, **facts: object) -> None:
        """Facts changed, and the state did not."""
        self.status = transitions.with_facts(self.status, **facts)
        self._replace()

    def heard_from_far_side(self) -> None:
        """The far side answered: its lease begins again."""
        self.run.touch()

    def is_running(self) -> bool:
        """Whether the program was started and no stop was requested."""
        return bool(self.status["state"] == "running")

    def stopped_by_far_side(self, reason: str) -> None:
        """The far side ends the program (`disconnect`, `lease`). An earlier stop stays recorded."""
        if self.status["stop"] is None:
            now = statuses.timestamp(time.time_ns())
            self.noted(stop={"signal": "SIGTERM", "reason": reason, "by": None, "time": now})

    def program_ended(self) -> None:
        """The program has ended. All leftovers share one grace, or the rest of a stop's grace."""
        if self._limits is not None:
            self._limits.program_ended()
        self._record_end()
        grace_s = self.spec["stop"]["grace_period"]
        if self.status["stop"]:
            grace_s = max(0.0, self._stop_by - self.loop.now())
        self.program.finish(grace_s)

    def ended(self, wait_status: int | None, **facts: object) -> None:
        """
        The program was reaped.

        Args:
            wait_status (int): As from wait4(2); None if `facts` say how it ended.
            facts: `return_code`, `signal`, `core_dump`, `rusage`, `ambiguous`.
        """
        outcome = {} if wait_status is None else processes.outcome(wait_status)
        if {**outcome, **facts}.get("signal", "SIGKILL") != "SIGKILL":
            facts["oom"] = False
        self.status = transitions.with_facts(self.status, **{**outcome, **facts})
        self._record_end()

    def finished(
        self, leftovers: int | None = 0, complete: bool = True, stay: bool = False
    ) -> None:
        """The last bytes were received: publish. With `stay` it stays until `leave`."""
        ended = transitions.with_facts(self.status, leftovers=leftovers)
        self._publish(transitions.terminated(ended, complete), stay)

    def not_started(self, error: StartError) -> None:
        """The program was not started, and that is proven."""
        self.failed(error.stage, error.message, errno=error.errno, type=error.type)

    def failed(
        self,
        stage: str,
        message: str,
        errno: int | None = None,
        type: str | None = None,
        started: bool | None = False,
        stay: bool = False,
    ) -> None:
        """
        The program could not be run; `started` is None if it may have been. `stay` as for
        `finished`.
        """
        facts: dict[str, Any] = {"errno": errno, "type": type, "started": started}
        self._publish(
            transitions.failed(self.status, stage, message, time.time_ns(), **facts), stay
        )
        self._begun(message)

    def lost(self, message: str, gone_by: str | None = None, *, stage: str = "connection") -> None:
        """The connection is lost for good, or the program can't be ended: no outcome is known."""
        self._publish(transitions.lost(self.status, message, gone_by, time.time_ns(), stage=stage))

    # -- requests and signals

    def stop(self, reason: str, grace_s: float | None = None, by: str | None = None) -> None:
        """
        Stop the program: a signal, a grace, SIGKILL. A second stop signals again, and can only
        shorten the grace.

        Args:
            reason (str): One of `status.STOP_REASONS`.
            grace_s (float): Seconds; None for the spec's.
            by (str): The word that the requester gave, or None.
        """
        name = self.spec["stop"]["signal"]
        self._stopping(name, reason, by)
        if grace_s is None:
            grace_s = self.spec["stop"]["grace_period"]
        self._stop_by = min(self._stop_by, self.loop.now() + grace_s)
        self.loop.cancel(self._stop_timer)
        self._stop_timer = self.loop.at(self._stop_by, self.program.kill)
        # `to: program`: signal the program alone, if it still runs. A spec of 0.1 has no `to`.
        alone = self.spec["stop"].get("to") == "program" and self.status["state"] == "stopping"
        ask = self.program.signal if alone and not self.status["end_time"] else self.program.stop
        ask(_number(name))

    def stops_later_than(self, seconds: float) -> bool:
        """Whether it would live longer than that: no stop was requested, or a slower one."""
        return self._stop_by > self.loop.now() + seconds

    def _kill(self, reason: str, by: str | None = None) -> None:
        self._stopping("SIGKILL", reason, by)
        self._stop_by = self.loop.now()
        self.loop.cancel(self._stop_timer)
        self.program.kill()

    def _stopping(self, name: str, reason: str, by: str | None) -> None:
        """Record a stop; not after the program has ended, when only its leftovers are stopped."""
        if self.status["end_time"] is None:
            self.status = transitions.stopping(self.status, name, reason, by, time.time_ns())
            self._replace()

    def _signalled(self, fd: int, events: int) -> None:
        for number in set(os.read(fd, 512)):
            if self.loop.has_ended():  # because of the signal before
                return
            if number == signal.SIGCHLD:
                self.program.children_changed()
            else:
                self.signalled(number)

    def signalled(self, number: int, passed_on: bool = False) -> None:
        """A signal arrived, here or at the guard; one that arrived at both counts once."""
        if self.loop.has_ended() or self._is_second(number, passed_on):
            return
        if number in STOP_SIGNALS:
            self.stop("request", by=specs.signal_name_of(number))
        elif number in FORWARDED:
            self.program.signal(number)

    def _is_second(self, number: int, passed_on: bool) -> bool:
        """Whether this signal is the second of a pair: it has just arrived the other way."""
        since, single = self._single.get(number, (0.0, 0))
        now = self.loop.now()
        if now - since > TWICE_S:
            single = 0
        self._single[number] = (now, single + (-1 if passed_on else 1))
        return single > 0 if passed_on else single < 0

    def guard_died(self) -> None:
        """The guard, whose pid the scheduler knows, was killed: end the program now."""
        self.log("the guard was killed: the program is killed as well")
        self._kill("guard")

    def _requested(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, 65_536)
        except BlockingIOError:
            return
        for request in self._requests.feed(data):
            if self.loop.has_ended():
                return
            if isinstance(request, str):
                self.log(request)
            else:
                self._obey(request)
        if self._limits is not None and not self.loop.has_ended():
            self._limits.keep_renewal()

    def _obey(self, request: Request) -> None:
        if request.verb == "stop":
            self.stop("request", request.grace_s, request.by)
        elif request.verb == "kill":
            self._kill("request", request.by)
        elif request.verb == "signal":
            self.program.signal(_number(request.signal))
        elif self._limits is not None:
            self._limits.renew()

    # -- what the streams report

    def _teller(self, name: str) -> Any:
        return lambda text: self.log(f"{name}: {text}")

    def _full(self) -> None:
        """A byte was dropped. `Stream.write` has not returned, so the loop calls `stop` later."""
        if self.spec["output"]["on_full"] == "stop":
            self.loop.later(0, lambda: self.stop("output"))

    # -- what is recorded

    def _record_end(self) -> None:
        if self.status["end_time"] is None:
            elapsed = None if self._started_at is None else self.loop.now() - self._started_at
            self.status = transitions.with_facts(
                self.status, end_time=statuses.timestamp(time.time_ns()), elapsed=elapsed
            )

    def _replace(self) -> None:
        trouble = self.run.replace_running(self._with_sizes(self.status))
        if trouble:
            self.log(trouble)

    def _with_sizes(self, status: dict[str, Any]) -> dict[str, Any]:
        """The status with the sizes on disk: with `through: file` only the disk knows them."""
        sizes: dict[str, Any] = {}
        for name, stream in self.streams.items():
            size = self.run.size_of(name)
            if size < stream.bytes:
                self.log(f"{name} shrank from {stream.bytes} to {size} bytes: it was truncated")
            dropped = None if self.spec["output"]["through"] == "file" else stream.dropped
            sizes[name] = {"bytes": size, "dropped": dropped}
        return {**status, **sizes}

    def _publish(self, final: dict[str, Any], stay: bool = False) -> None:
        """Publish, then end (rule W4). If it fails, retry: no other process knows the outcome."""
        if self.is_published():  # a broken far side may report two ends: the first one stays
            if not stay:
                self.leave()
            return
        final = self._with_sizes(final)
        if not self.run.is_in_place():
            gone = "it was removed, moved or unmounted"
            self.log(f"the run is not at {self.run.path!r} any more: {gone}")
        for pause_s in (*PUBLISH_AGAIN_S, None):
            try:
                self.run.publish(final, self.spec["durable"])
                self._exit = os.EX_OK
                break
            except OSError as error:
                what = f"the status of run {final['run_id']!r}"
                self.log(f"unable to publish {what}: {error.strerror}")
                if pause_s is None or not self.run.is_there():
                    self._exit = os.EX_IOERR
                    break
                time.sleep(pause_s)
        if self._exit != os.EX_OK:
            self.loop.end()
        elif not stay:
            self.leave()

    def is_published(self) -> bool:
        """Whether the final status is published."""
        return self._exit == os.EX_OK

    def leave(self) -> None:
        """Delete what only a live run has, and stop holding the run."""
        self.run.end(self.spec["durable"])
        self.loop.end()


def _limits(chaperone: Chaperone) -> Limits | None:
    """None for a run that has no limit of time, as most have none."""
    spec, timeouts = chaperone.spec, chaperone.spec["timeouts"]
    if (timeouts["run"], timeouts["idle"], spec.get("renew")) == (None, None, None):
        return None
    from .limits import Limits

    return Limits(chaperone)


def _left_to_wakeup_fd(number: int, frame: object) -> None:
    """Does nothing: the wakeup fd gets the signal, but only if there is a handler."""


def _number(name: str | None) -> int:
    number = specs.signal_number_of(name or "")
    assert number is not None, "a spec's signal, and a request's, was checked"
    return number
