"""
Holding one run: what happens to its program becomes its status, what is asked of it becomes
signals.

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

    Begun = Callable[[str | None], None]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORWARDED = tuple(number for number in ANSWERED if number not in STOP_SIGNALS)
# One signal to a whole cgroup reaches us twice, by our guard as well: within a second, on a busy
# machine too.
TWICE_S = 1.0
# A disk that refuses the final status may take it again: it was remounted, or a quota was raised.
# 12 tries, 17 minutes.
PUBLISH_AGAIN_S = (1, 2, 5, 10, 30, 60, 120, 120, 120, 180, 180, 180)


class Chaperone:
    """
    What stays with one program for its whole life.

    Args:
        run (RunStore): Visible and locked; closed at the end.
        spec (dict): Canonical, with its secrets.
        status (dict): The last one that is known, as in running.json.
        make_program: Called with this chaperone; returns the program that it is to hold.
        begun: Called once: with None when the program was started, with a sentence when it could
            not be.

    Attributes:
        loop (Loop): For the program to watch its fds with.
        streams (dict): `stdout` and `stderr`, for the program's bytes.
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
        self._single: dict[int, tuple[float, int]] = {}  # of signals: came to us, less passed on
        self._started_at: float | None = None
        self._run_timer: int | None = None
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
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what came since our start is answered now
        self.loop.watch(self._wakeup[0], select.POLLIN, self._signalled)
        if self.run.control_fd >= 0:
            self.loop.watch(self.run.control_fd, select.POLLIN, self._requested)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            # Our bug: the guard ends the program, readers find the run lost, the log says why.
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
        for name in ("callback", "config"):
            if self.spec[name] is not None:
                self.log(f"the spec has a {name!r}: nothing is posted yet")
        try:
            self.program.start()
        except StartError as error:
            self.not_started(error)
        from ..model.request import Reader  # now: the program did not have to wait for it

        self._requests = Reader()
        self.loop.run()
        return self._exit

    # -- what the program tells

    @property
    def log_path(self) -> str:
        """The log, for a program of ours that must open it by name."""
        return self.run.log_path

    @property
    def spool_fd(self) -> int:
        """The spool's, for locks that chaperones share; -1 for a run without a spool."""
        return self.run.spool_fd

    def open_stream(self, stream: str) -> int:
        """A further fd of a stream, for the program itself."""
        return self.run.open_stream(stream)

    def log(self, text: str) -> None:
        """Write a line into the log; to stderr, too, where it can't be written or found there."""
        line = f"{statuses.timestamp(time.time_ns())} {text}\n".encode("utf-8", "backslashreplace")
        if not self.run.tell(line) or not self.run.is_in_place():
            print_to_stderr(line)

    def started(self, pid: int | None, **facts: object) -> None:
        """The program was started; `facts` are further fields of the status."""
        self.status = transitions.running(self.status, pid, time.time_ns(), **facts)
        self._replace()
        self._started_at = self.loop.now()
        self.run.mark_start(self._started_at)
        self._watch_limits()
        self._begun(None)
        self._ask_again()

    def _watch_limits(self) -> None:
        timeouts = self.spec["timeouts"]
        assert self._started_at is not None
        if timeouts["run"] is not None:
            self._run_timer = self.loop.at(self._started_at + timeouts["run"], self._timed_out)
        if timeouts["idle"] is not None:
            self.loop.at(self._started_at + timeouts["idle"], self._look_idle)

    def resumed(self, pid: int, **facts: object) -> None:
        """The program of an adopted run was found again: its time goes on from its start."""
        if self.status["start_time"] is None:
            self.started(pid, **facts)
            return
        self.noted(pid=pid, **facts)
        now, started_at = self.loop.now(), self.run.started_at
        if started_at is None or started_at > now:
            # Not known, in this boot: the wall clock has to do, though it may have been stepped.
            now_ns = time.time_ns()
            start_ns = statuses.moment_ns(self.status["start_time"])
            started_at = now - max(0, now_ns - (now_ns if start_ns is None else start_ns)) / 1e9
        self._started_at = started_at
        self._watch_limits()
        self._ask_again()

    def _ask_again(self) -> None:
        """A stop came before there was a program, or to a chaperone that died: it is asked now."""
        if (stop := self.status["stop"]) is not None:
            is_kill = stop["signal"] == "SIGKILL" or self.loop.now() >= self._stop_by
            self._kill(stop["reason"]) if is_kill else self.stop(stop["reason"])

    def noted(self, **facts: object) -> None:
        """Facts changed that are no change of state."""
        self.status = transitions.with_facts(self.status, **facts)
        self._replace()

    def heard_from_far_side(self) -> None:
        """The far side said something: it has a whole lease again."""
        self.run.touch()

    def is_running(self) -> bool:
        """Whether the program was started, and nobody has asked for its end."""
        return bool(self.status["state"] == "running")

    def stopped_by_far_side(self, reason: str) -> None:
        """The far side ends the program, by `disconnect` or `lease`; an earlier stop stays."""
        if self.status["stop"] is None:
            now = statuses.timestamp(time.time_ns())
            self.noted(stop={"signal": "SIGTERM", "reason": reason, "by": None, "time": now})

    def program_ended(self) -> None:
        """The program has ended, its leftovers have not: one grace for all of them."""
        self.loop.cancel(self._run_timer)
        self._record_end()
        grace_s = self.spec["stop"]["grace_period"]
        if self.status["stop"]:
            grace_s = max(0.0, self._stop_by - self.loop.now())
        self.program.finish(grace_s)

    def ended(self, wait_status: int | None, **facts: object) -> None:
        """
        The program was reaped.

        Args:
            wait_status (int): As from wait4(2); None where `facts` say how it ended.
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
        """The last bytes are in: publish. With `stay` the chaperone stays until `leave`."""
        ended = transitions.with_facts(self.status, leftovers=leftovers)
        self._publish(transitions.terminated(ended, complete), stay)

    def not_started(self, error: StartError) -> None:
        """The program could not be started, and is not."""
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
        The program could not be run; `started` is False only where that is proven, else None.
        `stay` as for `finished`.
        """
        facts: dict[str, Any] = {"errno": errno, "type": type, "started": started}
        self._publish(
            transitions.failed(self.status, stage, message, time.time_ns(), **facts), stay
        )
        self._begun(message)

    def lost(self, message: str, gone_by: str | None = None, *, stage: str = "connection") -> None:
        """The connection went for good, or the program can't be ended: its outcome is unknown."""
        self._publish(transitions.lost(self.status, message, gone_by, time.time_ns(), stage=stage))

    # -- what is asked

    def stop(self, reason: str, grace_s: float | None = None, by: str | None = None) -> None:
        """
        Signal, grace, SIGKILL. A second stop signals again and can only shorten the grace.

        Args:
            reason (str): One of `status.STOP_REASONS`.
            grace_s (float): Seconds; None for the spec's.
            by (str): Who asked, in their own word.
        """
        name = self.spec["stop"]["signal"]
        self._stopping(name, reason, by)
        if grace_s is None:
            grace_s = self.spec["stop"]["grace_period"]
        self._stop_by = min(self._stop_by, self.loop.now() + grace_s)
        self.loop.cancel(self._stop_timer)
        self._stop_timer = self.loop.at(self._stop_by, self.program.kill)
        # Before the start and after the end there is no program alone. 0.1 had no `to`.
        alone = self.spec["stop"].get("to") == "program" and self.status["state"] == "stopping"
        ask = self.program.signal if alone and not self.status["end_time"] else self.program.stop
        ask(_number(name))

    def _kill(self, reason: str, by: str | None = None) -> None:
        self._stopping("SIGKILL", reason, by)
        self._stop_by = self.loop.now()
        self.loop.cancel(self._stop_timer)
        self.program.kill()

    def _stopping(self, name: str, reason: str, by: str | None) -> None:
        """A program that has ended was not stopped: what comes then is for its leftovers alone."""
        if self.status["end_time"] is None:
            self.status = transitions.stopping(self.status, name, reason, by, time.time_ns())
            self._replace()

    def _signalled(self, fd: int, events: int) -> None:
        for number in set(os.read(fd, 512)):
            if self.loop.has_ended():  # by the signal before it
                return
            if number == signal.SIGCHLD:
                self.program.children_changed()
            else:
                self.signalled(number)

    def signalled(self, number: int, passed_on: bool = False) -> None:
        """A signal came, to this process or to its guard; one that came to both counts once."""
        if self.loop.has_ended() or self._is_second(number, passed_on):
            return
        if number in STOP_SIGNALS:
            self.stop("request", by=specs.signal_name_of(number))
        elif number in FORWARDED:
            self.program.signal(number)

    def _is_second(self, number: int, passed_on: bool) -> bool:
        """Whether the same signal came the other way a moment ago, and has no second yet."""
        since, single = self._single.get(number, (0.0, 0))
        now = self.loop.now()
        if now - since > TWICE_S:
            single = 0
        self._single[number] = (now, single + (-1 if passed_on else 1))
        return single > 0 if passed_on else single < 0

    def guard_died(self) -> None:
        """The guard was killed, the pid that a scheduler knows: the program is to end now."""
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

    def _obey(self, request: Request) -> None:
        if request.verb == "stop":
            self.stop("request", request.grace_s, request.by)
        elif request.verb == "kill":
            self._kill("request", request.by)
        else:
            self.program.signal(_number(request.signal))

    # -- deadlines and limits

    def _timed_out(self) -> None:
        self.stop("timeout", by=f"timeouts.run {self.spec['timeouts']['run']:g}")

    def _look_idle(self) -> None:
        """Look only when the time may be up, not at every byte: a busy program costs no timers."""
        limit_s = self.spec["timeouts"]["idle"]
        heard_at = (stream.heard_at for stream in self.streams.values())
        due = max(self._started_at or 0.0, *heard_at) + limit_s
        if self.status["end_time"] is not None:
            return
        if due <= self.loop.now():
            self.stop("idle", by=f"timeouts.idle {limit_s:g}")
        else:
            self.loop.at(due, self._look_idle)

    def _teller(self, name: str) -> Any:
        return lambda text: self.log(f"{name}: {text}")

    def _full(self) -> None:
        """A byte was dropped. By a deadline, because we are called from the middle of a write."""
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
        """The streams as they are on disk: with `through: file` nobody but the disk counts them."""
        sizes: dict[str, Any] = {}
        for name, stream in self.streams.items():
            size = self.run.size_of(name)
            if size < stream.bytes:
                self.log(f"{name} shrank from {stream.bytes} to {size} bytes: it was truncated")
            dropped = None if self.spec["output"]["through"] == "file" else stream.dropped
            sizes[name] = {"bytes": size, "dropped": dropped}
        return {**status, **sizes}

    def _publish(self, final: dict[str, Any], stay: bool = False) -> None:
        """Publish and end (rule W4). Until a disk takes it, the outcome exists nowhere but here."""
        if self.is_published():  # a final status stays: a broken far side may say two ends
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
        """Whether the final status is."""
        return self._exit == os.EX_OK

    def leave(self) -> None:
        """Published: clear what only a live run has, and hold the run no longer."""
        self.run.end(self.spec["durable"])
        self.loop.end()


def _left_to_wakeup_fd(number: int, frame: object) -> None:
    """The wakeup fd has the signal; without a handler there would be none in it."""


def _number(name: str | None) -> int:
    number = specs.signal_number_of(name or "")
    assert number is not None, "a spec's signal, and a request's, was checked"
    return number
