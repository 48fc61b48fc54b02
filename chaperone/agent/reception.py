"""
A reception: what a receiver knows of the runs that agents post about.

The hash of a run's token is in `.receive/` until its agent calls for the first time, then in the
origin of the run: so a receiver that is started again knows all that the one before it knew.
Knows: the sink, tokens of runs, numbers of requests.  Must not know: HTTP, a socket.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from typing import Any

from ..errors import ChaperoneError, NoRunError, RunExistsError
from ..model import jsontext
from ..model import spec as specs
from ..model.request import Request
from ..program.fds import owned
from ..spool import format
from . import sink as sinks
from .fed_run import ConflictError, FedRun
from .sink import RECEIVER, Sink

# How long a run may be silent while no receiver is there: the `timeout` of a callback.
LEASE_S = 86_400.0
EXPECTED_S = 30 * 86_400.0  # a run may wait in a queue before its agent is started


class Reception:
    """
    The runs of a spool that agents post about.

    Args:
        spool_path (str): Made if it is missing.
        url (str): Where this receiver is reached; the id of a run is appended.
    """

    def __init__(self, spool_path: str, url: str) -> None:
        self.url = url.rstrip("/")
        self.sink = Sink(spool_path)
        self._asked: dict[str, Asked] = {}
        format.make_directory(format.RECEIVE, self.sink.spool_fd)
        self._forget_expected()
        for run_id in self.sink.left(RECEIVER):
            try:
                spec = self.sink.spec_of(run_id)
                self._begin(self.sink.run(run_id, spec.get("key"), spec, spec["origin"]))
            except ChaperoneError:  # another process receives it, or it is damaged; a post says so
                pass

    def _forget_expected(self) -> None:
        """Forget the runs whose agents never called."""
        with self._expected_directory() as fd:
            for name in os.listdir(fd):
                found = format.found(fd, name)
                if found is not None and time.time() - found.st_mtime > EXPECTED_S:
                    format.unlink(name, fd)

    def close(self) -> None:
        """Leave the runs as they are, for the next receiver."""
        self.sink.close()

    # -- who may post

    def expect(
        self, run_id: str, key: str | None = None, url: str | None = None
    ) -> tuple[str, str]:
        """
        Expect a run. Once more for the same id, before its agent has called: the earlier token is
        not valid any more.

        Args:
            key (str): Of the agent's run; None for that which its first call names.
            url (str): Where agents reach this receiver, without the id; None for its usual URL.
        Returns:
            tuple: The `url` and the `token` of its callback. The token is kept nowhere.
        Raises:
            SpecError: If the id or the key is invalid.
            RunExistsError: If there is a run with that id.
            SpoolError: If the disk refuses it.
        """
        sinks.check_names(run_id, key)
        if format.found(self.sink.spool_fd, run_id):
            raise RunExistsError(f"unable to make a callback for run {run_id!r}: it exists")
        token = secrets.token_urlsafe(32)
        whole = f"{self.url if url is None else url}/{run_id}"
        record = {"token": _digest(token), "key": key, "url": whole}
        with self._expected_directory() as fd:
            format.replace(fd, run_id, (jsontext.dumps(record) + "\n").encode())
        return whole, token

    def _expected_directory(self) -> owned:
        return owned(format.open_entries(self.sink.spool_fd, format.RECEIVE))

    def _expected(self, run_id: str) -> dict[str, Any] | None:
        with self._expected_directory() as fd:
            record = format.read_json(fd, run_id)
        return record if isinstance(record, dict) else None

    def admits(self, run_id: str, token: str) -> bool:
        """Whether a token is that of a run; it takes the same time for a run that is not there."""
        known = ""
        if specs.is_run_id(run_id):
            known = self._digest_of(run_id)
        return hmac.compare_digest(_digest(token), known or _digest("")) and bool(known)

    def _digest_of(self, run_id: str) -> str:
        """The hash of the token of a run; "" if there is none."""
        try:
            run = self.sink.runs.get(run_id)
            spec = self.sink.spec_of(run_id) if run is None else run.spec
            found = spec["origin"]["token"] if sinks.is_received(spec) else None
        except NoRunError:
            record = self._expected(run_id)
            found = record.get("token") if record is not None else None
        return found if isinstance(found, str) else ""

    # -- what is posted; the token was looked at

    def run(self, run_id: str, key: str | None) -> FedRun:
        """
        The run that an agent posts about, made at its first call.

        Args:
            key (str): Of the agent's run; None if the agent did not say.
        Raises:
            SpecError: If the key is none.
            ConflictError: If it is another agent's run.
            SpoolError: If the disk refuses it.
        """
        sinks.check_names(run_id, key)
        known = self.sink.runs.get(run_id)
        spec = {} if known is None else known.spec
        if known is None:
            try:
                spec = self.sink.spec_of(run_id)
            except NoRunError:
                spec = {}
        wanted = spec.get("key") or (self._expected(run_id) or {}).get("key")
        if key is not None and wanted not in (None, key):
            why = "another run, with another key, was posted to its URL"
            raise ConflictError(f"unable to go on with run {run_id!r}: {why}")
        if known is not None and known.is_there():
            known.touch()
            return known
        return self._found(run_id, str(wanted or key or secrets.token_hex(16)), spec)

    def _found(self, run_id: str, key: str, spec: dict[str, Any]) -> FedRun:
        origin = spec.get("origin")
        if origin is None:
            record = self._expected(run_id) or {}
            url = str(record.get("url", self.url))
            origin = {**sinks.origin(RECEIVER, url), "token": str(record.get("token", ""))}
        run = self.sink.run(run_id, key, spec, origin, lease_s=LEASE_S)
        with self._expected_directory() as fd:  # the run has the hash now
            format.unlink(run_id, fd)
        return self._begin(run)

    def _begin(self, run: FedRun) -> FedRun:
        if not run.is_ended():
            self._asked[run.run_id] = Asked(run)
        return run

    def end_silent(self) -> list[str]:
        """
        Record that the runs are lost whose agents were not heard of for a whole lease: an agent
        gives up when it was not acknowledged for as long.

        Returns:
            list: The ids of these runs.
        """
        found = []
        for run in [run for run in self.sink.runs.values() if run.is_silent()]:
            try:
                run.lost(f"its agent was silent for {run.spec['lease']:g} s")
            except OSError:  # a full disk; the next look tries again
                continue
            self.forget(run)
            found.append(run.run_id)
        return found

    # -- what is asked of the agent

    def take_requests(self) -> list[str]:
        """Take what was asked in `control` files; the ids of the runs that have requests."""
        found = []
        for run, request in self.sink.requests():
            self._asked[run.run_id].add(request)
            found.append(run.run_id)
        return found

    def requests(self, run: FedRun, after: int) -> list[dict[str, object]]:
        """
        The requests that the agent has not noted yet.

        Args:
            after (int): The number of the last one that it has noted.
        Returns:
            list: Of `{"seq": number, "line": as for control}`.
        """
        asked = self._asked.get(run.run_id)
        return [] if asked is None else asked.after(after)

    def forget(self, run: FedRun) -> None:
        """The run has ended: nothing is asked any more."""
        self._asked.pop(run.run_id, None)


class Asked:
    """
    The requests for one run, numbered when they are first given out: so the numbers go on from the
    last one that the agent has noted, and need no file here.
    """

    def __init__(self, run: FedRun) -> None:
        self._run = run
        self._waiting: list[Request] = list(run.pending)
        self._given: list[tuple[int, Request]] = []
        self._last = 0

    def add(self, request: Request) -> None:
        """One more request."""
        if request.verb != "renew":  # its agent renews by itself
            self._waiting.append(request)

    def after(self, number: int) -> list[dict[str, object]]:
        """As `Reception.requests`."""
        for seq, request in self._given:
            if seq <= number:
                self._run.passed_on(request)
        self._given = [(seq, request) for seq, request in self._given if seq > number]
        self._last = max(self._last, number)
        for request in self._waiting:
            self._last += 1
            self._given.append((self._last, request))
        self._waiting = []
        run_id = self._run.run_id
        return [
            {"seq": seq, "line": request.line(run_id).decode().rstrip("\n")}
            for seq, request in self._given
        ]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
