"""
The spool of an agent and its runs, for callers that block.

Knows: which call does what, in the words of `api`.  Must not know: what an agent is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, overload

from ...follow.followed import CHUNK
from ...interface import final_status, signal_request
from ...model.events import Ended, Output, Status
from ...model.request import Request
from ...spool.format import STREAMS
from ...types import SpecDict
from . import calls
from .connection import Connection
from .follower import Follower
from .place import Place


class Spool:
    """
    `chaperone.Spool` of an agent: the same calls, arguments, values and errors.

    Args:
        url (str): `https://HOST:PORT/NAME`, or `agent:FILE` with the file of a deployed agent.
        token_file (str): A file with the token on its only line; None for that of `agent:FILE`, or
            the one that $CHAPERONE_TOKEN_FILE names.
        ca (str): A file of the authorities to trust; None for the certificate in `agent:FILE`, the
            file that $CHAPERONE_CA names, or the authorities of this host.
    Raises:
        SpecError: If that is no place of an agent.
    """

    def __init__(
        self,
        url: str,
        *,
        token_file: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self._connection = Connection(Place(url, token_file, ca))
        self._name = self._connection.place.name
        self._perform = self._connection.perform

    def __repr__(self) -> str:
        return f"Spool({self._connection.place.text!r})"

    def start(
        self,
        spec: SpecDict | dict[str, Any],
        warm: bool = True,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> Run:
        """
        As `chaperone.Spool.start`, at the agent. The question is repeated until it is answered; it
        starts one run only.

        Args:
            warm (bool): Use the launcher of the agent's spool.
            env (dict): None for the environment of the agent, without its secrets.
            cwd (str): None for the home directory of the agent's user.
        """
        return self._run(self._perform(calls.start(self._name, spec, warm, env, cwd)))

    def follow(
        self,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = STREAMS,
    ) -> Follower:
        """As `chaperone.Spool.follow`; see `Follower`."""
        return Follower(self._connection, cursor, runs, streams)

    def cursor(self) -> dict[str, Any]:
        """As `chaperone.Spool.cursor`."""
        return self._perform(calls.cursor(self._name))

    def __getitem__(self, run_id: str) -> Run:
        """As of `chaperone.Spool`."""
        self._perform(calls.raw_status(self._name, run_id))
        return self._run(run_id)

    def live(self) -> list[Run]:
        """As `chaperone.Spool.live`."""
        return self._runs("live")

    def ended(self) -> list[Run]:
        """As `chaperone.Spool.ended`."""
        return self._runs("ended")

    def all(self) -> list[Run]:
        """As `chaperone.Spool.all`."""
        return self._runs("all")

    def collect(self, run_id: str) -> None:
        """As `chaperone.Spool.collect`."""
        self._perform(calls.collect(self._name, {run_id: None}))

    def renew(self, runs: Iterable[str] | None = None) -> None:
        """As `chaperone.Spool.renew`."""
        self._perform(calls.renew(self._name, runs))

    def _run(self, run_id: str) -> Run:
        return Run(self._connection, run_id)

    def _runs(self, state: str) -> list[Run]:
        return [self._run(run_id) for run_id in self._perform(calls.run_ids(self._name, state))]


class Run:
    """`chaperone.Run` of an agent's spool: the same calls, arguments, values and errors."""

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection = connection
        self._name = connection.place.name
        self._perform = connection.perform
        self.run_id = run_id

    def __repr__(self) -> str:
        return f"Run({self._connection.place.text!r}, {self.run_id!r})"

    def status(self) -> Status:
        """As `chaperone.Run.status`."""
        return self._perform(calls.status(self._name, self.run_id))

    def spec(self) -> dict[str, Any]:
        """As `chaperone.Run.spec`, without secrets."""
        return self._perform(calls.spec(self._name, self.run_id))

    def size(self, stream: str = "stdout") -> int:
        """As `chaperone.Run.size`."""
        return self._perform(calls.size(self._name, self.run_id, stream))

    def read(self, stream: str = "stdout", offset: int = 0, size: int = CHUNK) -> bytes:
        """As `chaperone.Run.read`."""
        return self._perform(calls.read(self._name, self.run_id, stream, offset, size))

    def cursor(self, stdout: int = 0, stderr: int = 0) -> dict[str, Any]:
        """As `chaperone.Run.cursor`."""
        return self._perform(calls.cursor_of(self._name, self.run_id, stdout, stderr))

    @overload
    def wait(self, timeout: None = None) -> Status: ...
    @overload
    def wait(self, timeout: float | None) -> Status | None: ...
    def wait(self, timeout: float | None = None) -> Status | None:
        """As `chaperone.Run.wait`."""
        return self._perform(calls.wait(self._name, self.run_id, timeout))

    def tail(self, stream: str = "stdout", offset: int = 0) -> Iterator[bytes]:
        """As `chaperone.Run.tail`."""
        cursor = self._perform(calls.tail_cursor(self._name, self.run_id, stream, offset))
        with self._followed(cursor, [self.run_id], [stream]) as follower:
            for event in follower:
                if isinstance(event, Output):
                    yield event.data
                elif isinstance(event, Ended):
                    final_status(event, "follow")

    def stop(
        self, grace_s: float | None = None, wait: bool = True, by: str | None = None
    ) -> Status:
        """As `chaperone.Run.stop`; without `by`, the token's name is the requester."""
        return self._end(Request("stop", grace_s, by=by), wait)

    def kill(self, wait: bool = True, by: str | None = None) -> Status:
        """As `chaperone.Run.kill`."""
        return self._end(Request("kill", by=by), wait)

    def signal(self, name: str | int, by: str | None = None) -> None:
        """
        As `chaperone.Run.signal`.

        Raises:
            AgentError: If the agent did not answer; the sentence says whether the signal may have
                been delivered. It is never sent twice.
        """
        self._perform(calls.signal(self._name, self.run_id, signal_request(name, by)))

    def delete(self) -> None:
        """As `chaperone.Run.delete`."""
        self._perform(calls.delete(self._name, self.run_id))

    def _followed(self, cursor: object, run_ids: Iterable[str], streams: Iterable[str]) -> Follower:
        return Follower(self._connection, cursor, run_ids, streams)

    def _end(self, request: Request, wait: bool) -> Status:
        return self._perform(calls.end(self._name, self.run_id, request, wait))
