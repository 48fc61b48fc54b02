"""
What a scheduler calls: a spool of runs, and one run of it.

Knows: requests, looks and waits, one after the other.  Must not know: how a chaperone does its
work.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

from . import interface
from .errors import NoRunError, SpecError, SpoolError
from .follow.followed import CHUNK
from .follow.follower import Follower
from .launch import start
from .model import cursor as cursors
from .model import spec as specs
from .model import status as statuses
from .model.events import Ended, Lost, Output, Status, status_view
from .model.request import Request
from .program.fds import owned
from .spool import format, gc, look
from .types import SpecDict


class Spool:
    """
    All runs of one scheduler, in a directory on this host.

    `chaperone.Spool` also takes the URL of an agent's spool, `https://HOST:PORT/NAME`, or
    `agent:FILE`; docs/agents.rst says what that has in common with this class.

    Args:
        path (str): A directory on a local filesystem; made with mode 0700 at the first start or
            follow.
        token_file, ca (str): For a URL only: a file with the token, and one with the authorities
            that are trusted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token_file: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        if token_file is not None or ca is not None:
            why = "token_file and ca are for the URL of an agent"
            raise SpecError(f"unable to open spool {os.fspath(path)!r}: {why}")
        self.path = os.path.abspath(os.fspath(path))

    def __repr__(self) -> str:
        return f"Spool({self.path!r})"

    def start(
        self,
        spec: SpecDict | dict[str, Any],
        warm: bool = False,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> Run:
        """
        Start a run. With an `id` in the spec a retry is safe: the id of a run that is there is
        refused.

        Args:
            spec (dict): As in docs/spec.rst; not changed. `chaperone.SpecDict` has its fields.
            warm (bool): Use the spool's launcher, and start it if there is none; it is six times as
                fast as a cold start.
            env (dict): The environment that the program inherits; None for that of this process.
            cwd (str): The directory for relative paths of the spec; None for that of this process.
        Returns:
            Run: Its run directory exists; the program starts soon.
        Raises:
            SpecError: If the spec is invalid.
            RunExistsError: If there is a run with that id.
            SpoolError: If the run directory can't be created.
        """
        return Run(self.path, start.start(self.path, spec, warm=warm, env=env, cwd=cwd))

    def follow(
        self,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
        poll_s: float | None = None,
    ) -> Follower:
        """Follow the runs, from a cursor on; see `chaperone.Follower`."""
        return Follower(self.path, cursor, runs, streams, poll_s)

    def cursor(self) -> dict[str, Any]:
        """
        The cursor of this moment: a follower that begins with it delivers only what happens later.

        Returns:
            dict: All live runs and all ended runs that were not collected, at their present sizes.
        """
        entries = {}
        with self._opened() as spool_fd:
            for run_id in {*format.live_ids(spool_fd), *format.ended_ids(spool_fd)}:
                with contextlib.suppress(NoRunError), _opened_run(spool_fd, run_id) as run_fd:
                    # The state first: the follower then delivers what is written in between, with
                    # the ending that it belongs to.
                    status = look.look(run_fd, run_id)[1]
                    sizes = {name: look.stream_size(run_fd, name) for name in format.STREAMS}
                    entries[run_id] = cursors.entry(
                        look.key_in(run_fd),
                        sizes["stdout"],
                        sizes["stderr"],
                        status["state"] in statuses.FINAL,
                    )
        return cursors.of(entries)

    def __getitem__(self, run_id: str) -> Run:
        """
        The run with that id.

        Raises:
            NoRunError: If there is no such run.
        """
        with self._opened() as spool_fd, _opened_run(spool_fd, run_id):
            return Run(self.path, run_id)

    def live(self) -> list[Run]:
        """The runs with an entry in .running/: live ones, and those whose chaperone died."""
        with self._opened() as spool_fd:
            return [Run(self.path, run_id) for run_id in format.live_ids(spool_fd)]

    def ended(self) -> list[Run]:
        """The runs with an entry in .ended/: they have ended and are not collected."""
        with self._opened() as spool_fd:
            return [Run(self.path, run_id) for run_id in format.ended_ids(spool_fd)]

    def all(self) -> list[Run]:
        """Every run that has a run directory; the cost grows with the history."""
        with self._opened() as spool_fd:
            return [Run(self.path, run_id) for run_id in format.all_ids(spool_fd)]

    def collect(self, run_id: str) -> None:
        """
        Remove an ended run from .ended/. A scheduler with a follower calls `Follower.collect`.
        """
        with self._opened() as spool_fd:
            look.collect(spool_fd, run_id)

    def renew(self, runs: Iterable[str] | None = None) -> None:
        """
        Renew the leases of runs that have `renew` in their spec: their time counts from now again.

        Args:
            runs: Run ids; None for all live runs. Runs that have ended, or are not there, are
                skipped.
        Raises:
            SpoolError: If a run could not be asked; all others are renewed before that.
        """
        failure = None
        with self._opened() as spool_fd:
            for run_id in format.live_ids(spool_fd) if runs is None else runs:
                try:
                    with _opened_run(spool_fd, run_id) as run_fd:
                        look.renew(run_fd, run_id, Request("renew"))
                except NoRunError:
                    pass
                except SpoolError as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def gc(
        self,
        older_s: float | None = None,
        keep_failed_s: float | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
        progress: Callable[[int, int], None] | None = None,
        uncollected: bool = False,
    ) -> gc.Summary:
        """
        Delete ended runs, as `chaperone gc` does.

        Args:
            older_s (float): Delete the runs that ended longer ago, in seconds.
            keep_failed_s (float): Keep runs that did not exit with 0 for at least so many seconds.
            max_bytes (int): Then delete the oldest until the rest takes no more, in bytes on disk.
            dry_run (bool): Delete nothing; return what would be deleted.
            progress: Called with how many runs are done and how many there are.
            uncollected (bool): Delete the runs, too, that no scheduler has collected.
        Returns:
            Summary: What was deleted and what is left.
        """
        return gc.gc(self.path, older_s, keep_failed_s, max_bytes, dry_run, progress, uncollected)

    def _opened(self) -> owned:
        return owned(format.open_spool(self.path))


class Run:
    """
    One run of a spool. It keeps no file open between two calls.

    Args:
        spool_path (str): Absolute.
        run_id (str): Of an existing run.
    """

    def __init__(self, spool_path: str, run_id: str) -> None:
        self.spool_path = spool_path
        self.run_id = run_id

    def __repr__(self) -> str:
        return f"Run({self.spool_path!r}, {self.run_id!r})"

    @property
    def path(self) -> str:
        """The path of the run directory."""
        return os.path.join(self.spool_path, self.run_id)

    def status(self) -> Status:
        """
        The present status; `lost` and `unattended` are concluded from the lock of the run.

        Raises:
            NoRunError: If the run was deleted.
        """
        with self._opened() as run_fd:
            return status_view(look.look(run_fd, self.run_id)[1])

    def spec(self) -> dict[str, Any]:
        """The spec in canonical form, with `version` and `key`; {} if it can't be read."""
        with self._opened() as run_fd:
            return look.read_spec(run_fd)

    def size(self, stream: str = "stdout") -> int:
        """The present size of stdout, stderr or log, in bytes."""
        with self._opened() as run_fd:
            return look.stream_size(run_fd, stream)

    def read(self, stream: str = "stdout", offset: int = 0, size: int = CHUNK) -> bytes:
        """
        Read bytes of a stream, without waiting.

        Args:
            stream (str): stdout, stderr or log.
            offset (int): Of the first byte; it stays valid as long as the run directory exists.
            size (int): How many bytes at most.
        Returns:
            bytes: Fewer, or none, if there are no more yet.
        Raises:
            NoRunError: If the run was deleted.
            SpecError: If the offset or the size can't be one.
        """
        interface.check_piece(self.run_id, offset, size)
        with self._opened() as run_fd:
            return look.read_stream(run_fd, stream, offset, size)

    def cursor(self, stdout: int = 0, stderr: int = 0) -> dict[str, Any]:
        """
        The cursor that means: this run, from these offsets on; a later run with its id is another.

        Args:
            stdout, stderr (int): Of the first byte to be delivered.
        Raises:
            NoRunError: If the run was deleted.
            SpecError: If it can't be an offset.
        """
        with self._opened() as run_fd:
            entry = cursors.entry(look.key_in(run_fd), stdout, stderr)
        return cursors.of(cursors.checked(cursors.of({self.run_id: entry})))

    @overload
    def wait(self, timeout: None = None) -> Status: ...
    @overload
    def wait(self, timeout: float | None) -> Status | None: ...
    def wait(self, timeout: float | None = None) -> Status | None:
        """
        Wait until the run has ended; the kernel wakes the caller, there is no polling.

        Args:
            timeout (float): Seconds; None waits as long as it takes.
        Returns:
            Status: The final one, which may be `lost`; None when the time is over.
        Raises:
            NoRunError: If the run is deleted before its end.
        """
        return next((status for _, status in wait_each([self], timeout)), None)

    def tail(self, stream: str = "stdout", offset: int = 0) -> Iterator[bytes]:
        """
        Yield the bytes of a stream from an offset on, as they arrive, until the run ends.

        Args:
            stream (str): stdout or stderr.
            offset (int): Of the first byte.
        Raises:
            NoRunError: If the run is deleted before its end.
        """
        interface.check_followed(stream)
        cursor = self.cursor(**{stream: offset})
        with self._followed(cursor, [self.run_id], [stream]) as follower:
            for event in follower:
                if isinstance(event, Output):
                    yield event.data
                elif isinstance(event, Ended):
                    interface.final_status(event, "follow")

    def _followed(self, cursor: object, run_ids: Iterable[str], streams: Iterable[str]) -> Follower:
        return Follower(self.spool_path, cursor, run_ids, streams)

    # -- requests

    def stop(
        self, grace_s: float | None = None, wait: bool = True, by: str | None = None
    ) -> Status:
        """
        Stop the run: send its stop signal to all its processes, and SIGKILL after a grace.

        Args:
            grace_s (float): Seconds; None for the grace of the spec.
            wait (bool): Return when the run has ended; otherwise return at once.
            by (str): The requester, as one word; the status keeps it.
        Returns:
            Status: The status at that moment. Stopping an ended run changes nothing.
        Raises:
            NoRunError: If the run may still be running and no chaperone can stop it: it is
                unattended, or it was deleted.
        """
        return self._end(Request("stop", grace_s, by=by), wait)

    def kill(self, wait: bool = True, by: str | None = None) -> Status:
        """Send SIGKILL to all processes of the run; otherwise as `stop`."""
        return self._end(Request("kill", by=by), wait)

    def signal(self, name: str | int, by: str | None = None) -> None:
        """
        Send a signal to the program only.

        Args:
            name (str | int): `SIGUSR1`, `USR1` or `"10"`; 10 or `signal.SIGUSR1`.
            by (str): The requester, as one word.
        Raises:
            SpecError: If there is no such signal.
            NoRunError: If the chaperone is not running.
        """
        with self._opened() as run_fd:
            look.request(run_fd, self.run_id, interface.signal_request(name, by))

    def delete(self) -> None:
        """Delete the run, collected or not; raises as `chaperone.spool.gc.delete`, or BusyError."""
        gc.delete(self.spool_path, self.run_id)

    def _end(self, request: Request, wait: bool) -> Status:
        return request_end(self, request, wait) or (self.wait() if wait else self.status())

    def _opened(self) -> owned:
        with owned(format.open_spool(self.spool_path)) as spool_fd:
            return _opened_run(spool_fd, self.run_id)


def request_end(run: Run, request: Request, wait: bool) -> Status | None:
    """
    Request a stop or a kill, without waiting.

    Args:
        wait (bool): Whether the caller waits afterwards, also if the chaperone has just gone.
    Returns:
        Status: Of a run that had ended before; otherwise None.
    """
    try:
        with run._opened() as run_fd:
            look.request(run_fd, run.run_id, request)
    except NoRunError:
        status = run.status()
        if status.is_final():
            return status
        if status.state == "unattended":
            feeder = look.feeder(run.spec())
            why = "its chaperone died, and its program may be running; adopt it first"
            if feeder is not None:
                why = f"an agent has it; start {feeder} again"
            raise NoRunError(f"unable to send a request to run {run.run_id!r}: {why}") from None
        if not wait:
            raise
    return None


class Waited(interface.RunLike, Protocol):
    """A run of any spool that `wait_each` waits for."""

    def _followed(
        self, cursor: object, run_ids: Iterable[str], streams: Iterable[str]
    ) -> interface.FollowerLike: ...


def wait_each(
    runs: Sequence[Waited], timeout: float | None = None
) -> Iterator[tuple[Waited, Status]]:
    """
    Wait for several runs by one follower; the kernel wakes the caller.

    Args:
        runs (list): Of one spool.
        timeout (float): Seconds for all of them; None waits as long as it takes.
    Yields:
        tuple: (run, final status), in the order of the endings; fewer when the time is over.
    Raises:
        NoRunError: If a run is deleted before its end.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    waited = {}
    for run in runs:
        status = run.status()
        if interface.has_ended(status):
            yield run, status
        else:
            waited[run.run_id] = run
    if not waited:
        return
    cursor: dict[str, Any] = {"runs": {}}
    for run in waited.values():
        cursor["runs"].update(run.cursor()["runs"])
    with runs[0]._followed(cursor, waited, ()) as follower:
        while waited:
            event = follower.next(
                None if deadline is None else max(0.0, deadline - time.monotonic())
            )
            if event is None:
                return
            if isinstance(event, (Ended, Lost)):
                yield waited.pop(event.run_id), interface.final_status(event, "wait for")


def _opened_run(spool_fd: int, run_id: str) -> owned:
    if not specs.is_run_id(run_id):
        raise NoRunError(f"unable to find run {run_id!r}: that is not a valid run id")
    return owned(format.open_run(spool_fd, run_id))
