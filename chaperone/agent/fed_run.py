"""
A run that a sink feeds: bytes at their offsets, the agent's statuses, and the requests of this
host.

Knows: the run directory of one run.  Must not know: HTTP, a socket, other runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from ..errors import ChaperoneError, SpecError
from ..model import status as statuses
from ..model import transitions
from ..model.request import LIMIT, Reader, Request, parsed
from ..spool import format, look
from ..spool.run_directory import RunDirectory

# What may be asked for twice; a signal must not be, so a sink that dies forgets it.
REPEATABLE = ("stop", "kill")
PENDING = "pending"  # of running.json: the lines of such requests


class GapError(ChaperoneError):
    """
    Bytes are missing before these, or before this end.

    Attributes:
        sizes (dict): How many bytes of each stream are here; the sender goes on there.
    """

    def __init__(self, run_id: str, sizes: dict[str, int]) -> None:
        super().__init__(f"unable to go on with run {run_id!r}: bytes before these are missing")
        self.sizes = sizes


class ConflictError(ChaperoneError):
    """The run has ended here in another way, or has more bytes than its end says."""


class FedRun:
    """
    A run that a sink feeds; `Sink.run` makes it.

    Attributes:
        run_id, key (str): The agent's.
        sizes (dict): `stdout` and `stderr` to how many bytes are here.
        status (dict): The last one that the agent sent, or the final one.
        pending (list): The stops and kills that were taken from `control` and not passed on.
    """

    def __init__(
        self,
        directory: RunDirectory,
        status: dict[str, Any],
        ended: Callable[[FedRun], None],
    ) -> None:
        self._directory: RunDirectory | None = directory
        self._ended = ended
        self.run_id, self.key, self.status = directory.run_id, directory.key, status
        self.sizes = {stream: directory.size_of(stream) for stream in format.STREAMS}
        self.spec = look.read_spec(directory.fd)
        self.control_fd = directory.control_fd
        self._reader = Reader()
        self._concluded: object = None
        # `connection` while its agent is not heard; of the sink before us, too.
        self._silence = _silence(self.status["connection"])
        if self._silence is not None:
            self.status["connection"] = None
        self._drops = 0 if self._silence is None else self._silence["drops"]
        lines = self.status.pop(PENDING, None)
        asked = map(parsed, lines if isinstance(lines, list) else ())
        self.pending = [request for request in asked if request is not None]

    @classmethod
    def of_ended(cls, run_fd: int, run_id: str, key: str) -> FedRun:
        """A run that has ended here already; `run_fd` stays the caller's."""
        run = cls.__new__(cls)
        run._directory, run.control_fd = None, -1
        run.run_id, run.key, run.spec = run_id, key, look.read_spec(run_fd)
        run.status, run.pending = look.read_final(run_fd, run_id) or {}, []
        run.sizes = {stream: look.stream_size(run_fd, stream) for stream in format.STREAMS}
        return run

    def is_ended(self) -> bool:
        """Whether the final status is on this disk."""
        return self._directory is None

    def is_there(self) -> bool:
        """Whether the run directory still exists; a run that has ended is not looked for."""
        return self._directory is None or self._directory.is_there()

    def close(self) -> None:
        """Close the run directory, and leave it as it is."""
        if self._directory is not None:
            self._directory.close()

    def log(self, text: str) -> None:
        """Append a line to the log of the run."""
        if self._directory is not None:
            line = f"{statuses.timestamp(time.time_ns())} {text}\n"
            self._directory.tell(line.encode("utf-8", "backslashreplace"))

    def touch(self) -> None:
        """The agent was heard of: the lease of the run begins again."""
        if self._directory is not None:
            self._directory.touch()

    def silent(self, since_ns: int | None, reason: str) -> None:
        """
        The agent is not heard: the status here says so, and since when. Its state stays the last
        one that is known, for the agent knows the end of the run and will send it.

        Args:
            since_ns (int): When the agent was last heard, since the epoch; None if not by this
                process.
            reason (str): Why, as a sentence.
        """
        if self._directory is None:
            return
        renewed_ns = os.fstat(self._directory.lock_fd).st_mtime_ns
        before, renew_s = self._silence, self.spec.get("renew")
        if before is None:
            self._drops += 1
            since = statuses.timestamp(renewed_ns if since_ns is None else since_ns)
        else:
            since = before["since"]
        self._silence = {
            "argv": None,
            "pid": None,
            "drops": self._drops,
            "state": "down",
            "since": since,
            "message": reason,
            "lease_until": renew_s and statuses.timestamp(renewed_ns + int(renew_s * 1e9)),
        }
        if self._silence != before:
            self._replace()

    def heard(self) -> None:
        """The agent is heard again."""
        if self._directory is not None and self._silence is not None:
            self._silence = None
            self._replace()

    def is_silent(self) -> bool:
        """Whether the agent was not heard of for the lease of the run."""
        return self._directory is not None and (
            look.leased_s(self._directory.fd, self.spec, self.status["boot_id"]) <= 0
        )

    # -- what the agent says

    def append(self, stream: str, offset: int, data: bytes) -> int:
        """
        Append bytes at their offset. What is here already is skipped.

        Args:
            stream (str): stdout or stderr.
            offset (int): Of the first byte.
        Returns:
            int: How many bytes of the stream are here.
        Raises:
            SpecError: If there is no such stream.
            GapError: If bytes before them are missing.
            ConflictError: If the run has ended, and has no such bytes.
            OSError: If the disk refuses them; the same call may be repeated.
        """
        if stream not in self.sizes:
            raise SpecError(f"unable to append to stream {stream!r}: want stdout or stderr")
        size = self.sizes[stream]
        if offset > size:
            raise GapError(self.run_id, dict(self.sizes))
        view = memoryview(data)[size - offset :]
        if view and self._directory is None:
            raise ConflictError(f"unable to append to run {self.run_id!r}: it has ended")
        while view:
            assert self._directory is not None
            written = os.write(self._directory.streams[stream], view)
            self.sizes[stream] += written
            view = view[written:]
        return self.sizes[stream]

    def cut(self, stream: str) -> None:
        """
        Empty a stream: the program truncated its own, and its bytes come again from the first.

        Raises:
            OSError: If the disk refuses it.
        """
        if self._directory is not None:
            os.ftruncate(self._directory.streams[stream], 0)
            self.log(f"{stream} was truncated where it runs: it is copied again from its start")
            self.sizes[stream] = 0

    def sync(self) -> None:
        """Bring the bytes to the disk before `ended`, which needs less time then."""
        if self._directory is not None:
            for fd in self._directory.streams.values():
                os.fsync(fd)

    def changed(self, status: dict[str, Any]) -> None:
        """
        Replace the status so far; if the disk refuses it, the old one stays (rule W5). What a
        reader of the agent's spool has only concluded is in the log.
        """
        if self._directory is None:
            return
        concluded = status.get("state") if status.get("state") not in statuses.LIVE else None
        if concluded not in (None, self._concluded):
            self.log(f"its agent finds the run {concluded}")
        self._concluded = concluded
        status = live_status(status, self.spec, self.status)
        if status != self.status:
            self.status = status
            self._replace()

    def ended(self, status: dict[str, Any], synced: bool = True) -> None:
        """
        Publish the final status. It may be repeated.

        Args:
            status (dict): Final; it is kept as it is.
            synced (bool): Whether the end of the run must outlive a power failure of this host.
        Raises:
            GapError: If bytes are missing.
            ConflictError: If the run has ended in another way, or has more bytes.
            OSError: If the disk refuses it; the same call may be repeated.
        """
        final = statuses.final_known(status, self.run_id)
        if final is None or status.get("run_id") not in (None, self.run_id):
            why = "want a final status of this run"
            raise ConflictError(f"unable to end run {self.run_id!r}: {why}")
        if self._directory is None:
            if final != self.status:
                why = "it has ended in another way"
                raise ConflictError(f"unable to end run {self.run_id!r}: {why}")
            return
        self._check_sizes(final)
        self._publish(final, synced)

    def _check_sizes(self, final: dict[str, Any]) -> None:
        said = {stream: final[stream]["bytes"] for stream in format.STREAMS}
        known = {stream: size for stream, size in said.items() if size is not None}
        if any(self.sizes[stream] < size for stream, size in known.items()):
            raise GapError(self.run_id, dict(self.sizes))
        if any(self.sizes[stream] > size for stream, size in known.items()):
            why = "it has more bytes than its final status says"
            raise ConflictError(f"unable to end run {self.run_id!r}: {why}")

    def lost(self, message: str) -> None:
        """
        Publish that the outcome can't be known, because the agent has no such run any more.

        Args:
            message (str): Why, as a sentence.
        Raises:
            OSError: If the disk refuses it.
        """
        if self._directory is None:
            return
        sizes = {name: {**self.status[name], "bytes": size} for name, size in self.sizes.items()}
        now_ns = time.time_ns()
        final = transitions.lost(self.status, message, None, now_ns, stage="connection")
        self._publish({**final, **sizes}, synced=True)

    def _publish(self, final: dict[str, Any], synced: bool) -> None:
        assert self._directory is not None
        # Never shortened: where the run was, its spec left room for as much.
        self._directory.room = 1 << 62
        self._directory.publish(final, synced)
        self.status = final
        self._ended(self)
        directory, self._directory = self._directory, None
        directory.end(synced)

    # -- what is asked for here

    def requests(self) -> list[Request]:
        """
        The requests that came to `control` since the last call; the log names invalid ones. A stop
        or a kill is kept in the status until it is `passed_on`.
        """
        if self._directory is None:
            return []
        try:
            data = os.read(self.control_fd, 16 * LIMIT)
        except BlockingIOError:
            return []
        found = []
        for request in self._reader.feed(data):
            if isinstance(request, str):
                self.log(request)
                continue
            if request.verb in REPEATABLE:
                self.pending.append(request)
            found.append(request)
        if any(request.verb in REPEATABLE for request in found):
            self._replace()
        return found

    def passed_on(self, request: Request) -> None:
        """The agent has heard a request; a sink that takes the run over need not repeat it."""
        if request in self.pending:
            self.pending.remove(request)
            self._replace()

    def _replace(self) -> None:
        if self._directory is None:
            return
        lines = [request.line(self.run_id).decode().rstrip("\n") for request in self.pending]
        kept = {**self.status, PENDING: lines} if lines else self.status
        if self._silence is not None:
            kept = {**kept, "connection": self._silence}
        if (failure := self._directory.replace_running(kept)) is not None:
            self.log(failure)


def _silence(connection: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a status says of an agent that is not heard; no other connection has these words."""
    is_ours = connection is not None and connection["state"] == "down" and "message" in connection
    return connection if is_ours else None


def live_status(
    status: dict[str, Any] | None, spec: dict[str, Any], before: dict[str, Any] | None
) -> dict[str, Any]:
    """A status that running.json may have: not final, with every field."""
    if status is None:
        program = spec["program"]
        status = {
            "state": "starting",
            "program": {
                "argv": program["argv"],
                "cwd": program["cwd"],
                "env": sorted(program["env"] or ()),
            },
            "labels": spec["labels"],
            "create_time": statuses.timestamp(time.time_ns()),
        }
    known = statuses.last_known(status, spec["id"])
    if known["state"] not in statuses.LIVE:
        # A reader of the agent's spool has concluded `unattended` or `lost`; no file says it.
        known["state"] = "running" if before is None else before["state"]
    return known
