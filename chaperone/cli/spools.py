"""
The spool that a verb works on: a directory of this host, or one of an agent.

Knows: what a word means there, and what verbs read of a run.  Must not know: a particular verb.
Both kinds have the same methods. A verb that only looks needs no site-packages for a directory.
"""

from __future__ import annotations

import os

from ..errors import AgentError, NoRunError, SpecError, SpoolError
from ..model import jsontext
from ..model import spec as specs
from ..model import status as statuses
from ..program.fds import owned
from ..spool import format, look
from .common import add_site_packages, id_meant, ids_meant
from .verb import is_agents, spool_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ..api import Waited
    from ..interface import FollowerLike
    from ..spool.timeline import Lines
    from .terminal import Terminal
    from .verb import Given


def opened(given: Given, terminal: Terminal) -> AnySpool:
    """The spool that a verb was given, opened; to be used in a `with` statement."""
    named = spool_named(given)
    if not is_agents(named):
        return DirectorySpool(os.path.abspath(named), terminal)
    add_site_packages(terminal)
    return AgentSpool(named)


# -- on this host


class DirectorySpool:
    """
    A spool in a directory of this host.

    Args:
        path (str): Absolute.
    """

    def __init__(self, path: str, terminal: Terminal) -> None:
        self.path, self._terminal = path, terminal
        self._fd = format.open_spool(path)

    def __enter__(self) -> DirectorySpool:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def ids(self, prefixes: Sequence[str], everything: bool, counts: bool) -> tuple[set[str], int]:
        """
        The runs that a prefix may mean, and how many are hidden because they were collected.

        Args:
            everything (bool): Collected runs too.
            counts (bool): Whether the number is of use; otherwise it is 0.
        """
        uncollected = {*format.live_ids(self._fd), *format.ended_ids(self._fd)}
        if everything:
            return uncollected | set(format.all_ids(self._fd)), 0
        hidden = format.count_others(self._fd, tuple(prefixes), uncollected) if counts else 0
        return uncollected, hidden

    def meant(self, words: Iterable[str]) -> list[str]:
        """The ids of the runs that words mean, each once."""
        return ids_meant(self._fd, words)

    def status(self, run_id: str) -> dict[str, Any]:
        """The status of a run, with the present sizes of its streams."""
        return look.present(self._fd, run_id)

    def spec(self, run_id: str) -> dict[str, Any]:
        """The spec of a run; {} if it can't be read."""
        with owned(format.open_run(self._fd, run_id)) as run_fd:
            return look.read_spec(run_fd)

    def run(self, run_id: str) -> DirectoryRun:
        """A run that is read; to be used in a `with` statement."""
        return DirectoryRun(format.open_run(self._fd, run_id), run_id)

    def runs(self, run_ids: Iterable[str]) -> list[Waited]:
        """Runs that are asked or waited for."""
        add_site_packages(self._terminal)
        from ..api import Run

        return [Run(self.path, run_id) for run_id in run_ids]

    def follow(
        self,
        cursor: object,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
    ) -> FollowerLike:
        """As of `chaperone.Spool`."""
        add_site_packages(self._terminal)
        from ..follow.follower import Follower

        return Follower(self.path, cursor, runs, streams)


class DirectoryRun:
    """A run of a directory, as verbs read it: always the same run directory."""

    def __init__(self, run_fd: int, run_id: str) -> None:
        self.fd, self.run_id = run_fd, run_id

    def __enter__(self) -> DirectoryRun:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def look(self) -> dict[str, Any]:
        """Its status."""
        return look.look(self.fd, self.run_id)[1]

    def key(self) -> str:
        """Its key."""
        return look.key_in(self.fd)

    def size(self, stream: str) -> int:
        """The present size of a stream, in bytes."""
        return look.stream_size(self.fd, stream)

    def read(self, stream: str, size: int, offset: int) -> bytes:
        """Bytes of a stream that are there."""
        return look.read_stream(self.fd, stream, offset, size)

    def has_timeline(self) -> bool:
        """Whether it is known when its output came."""
        return format.found(self.fd, format.TIMELINE) is not None

    def timeline(self) -> Lines:
        """When its output came."""
        return DirectoryTimeline(self.fd)


class DirectoryTimeline:
    """The timeline of a run of a directory; it keeps no file open."""

    def __init__(self, run_fd: int) -> None:
        self._run_fd = run_fd

    def size(self) -> int:
        """How many bytes it has now."""
        with owned(format.open_plain(self._run_fd, format.TIMELINE)) as fd:
            return os.fstat(fd).st_size

    def read(self, size: int, offset: int) -> bytes:
        """Bytes that are there."""
        with owned(format.open_plain(self._run_fd, format.TIMELINE)) as fd:
            return os.pread(fd, size, offset)


# -- of an agent


class AgentSpool:
    """
    A spool of an agent.

    Args:
        named (str): A URL, or `agent:FILE`.
    """

    def __init__(self, named: str) -> None:
        from ..agent.client.place import client_room

        self._room = room = client_room(named, "spool")
        self._connection = room.Connection(room.Place(named))
        self._name = self._connection.place.name
        self._seen: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> AgentSpool:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _statuses(self, *which: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]]
        found = self._connection.perform(self._room.calls.statuses(self._name, *which))
        return found

    def ids(self, prefixes: Sequence[str], everything: bool, counts: bool) -> tuple[set[str], int]:
        """As of `DirectorySpool`."""
        found = self._statuses("all" if everything else None)
        self._seen = {status["run_id"]: status for status in found}
        if everything or not counts:
            return {*self._seen}, 0
        count = self._room.calls.collected_count(self._name, prefixes)
        return {*self._seen}, int(self._connection.perform(count))

    def meant(self, words: Iterable[str]) -> list[str]:
        """As of `DirectorySpool`."""
        return list(dict.fromkeys(self._meant(word) for word in words))

    def _meant(self, word: str) -> str:
        found: list[str] = []
        if specs.is_run_id(word):
            try:
                self.status(word)
                return word
            except NoRunError:
                found = self._beginning_with(word, None) or self._beginning_with(word, "all")
        return id_meant(found, word)

    def _beginning_with(self, word: str, state: str | None) -> list[str]:
        # By id: those that begin with a word come at once after it.
        some = (status["run_id"] for status in self._statuses(state, word, 4))
        return [run_id for run_id in some if run_id.startswith(word)]

    def status(self, run_id: str) -> dict[str, Any]:
        """As of `DirectorySpool`; of a run that `ids` has found, as it was then."""
        if run_id not in self._seen:
            self._seen[run_id] = dict(self._of(run_id).status().raw)
        return self._seen[run_id]

    def _of(self, run_id: str) -> Any:
        return self._room.Run(self._connection, run_id)

    def spec(self, run_id: str) -> dict[str, Any]:
        """As of `DirectorySpool`."""
        found: dict[str, Any] = self._of(run_id).spec()
        return found

    def start(self, spec: object) -> Waited:
        """Start a run."""
        call = self._room.calls.start(self._name, spec, True, None, None)
        made: Waited = self._of(self._connection.perform(call))
        return made

    def run(self, run_id: str) -> AgentRun:
        """As of `DirectorySpool`."""
        return AgentRun(self._connection, self._room, run_id)

    def runs(self, run_ids: Iterable[str]) -> list[Waited]:
        """As of `DirectorySpool`."""
        return [self._of(run_id) for run_id in run_ids]

    def follow(
        self,
        cursor: object,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
    ) -> FollowerLike:
        """As of `DirectorySpool`."""
        made: FollowerLike = self._room.Follower(self._connection, cursor, runs, streams)
        return made


class AgentRun:
    """A run of an agent, as verbs read it."""

    def __init__(self, connection: Any, room: Any, run_id: str) -> None:
        self._connection, self._calls = connection, room.calls
        self._run, self.run_id = room.Run(connection, run_id), run_id

    def __enter__(self) -> AgentRun:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def look(self) -> dict[str, Any]:
        """As of `DirectoryRun`."""
        return dict(self._run.status().raw)

    def key(self) -> str:
        """As of `DirectoryRun`."""
        return str(self._run.spec().get("key", ""))

    def size(self, stream: str) -> int:
        """As of `DirectoryRun`."""
        return int(self._run.size(stream))

    def read(self, stream: str, size: int, offset: int) -> bytes:
        """As of `DirectoryRun`."""
        return bytes(self._run.read(stream, offset, size))

    def has_timeline(self) -> bool:
        """As of `DirectoryRun`."""
        call = self._calls.timeline_size(self._connection.place.name, self.run_id)
        return self._connection.perform(call) is not None

    def timeline(self) -> Lines:
        """As of `DirectoryRun`."""
        return AgentTimeline(self._connection, self._calls, self.run_id)


class AgentTimeline:
    """The timeline of a run of an agent."""

    def __init__(self, connection: Any, calls: Any, run_id: str) -> None:
        self._perform, self._calls = connection.perform, calls
        self._of = connection.place.name, run_id

    def size(self) -> int:
        """As of `DirectoryTimeline`."""
        return int(self._perform(self._calls.timeline_size(*self._of)) or 0)

    def read(self, size: int, offset: int) -> bytes:
        """As of `DirectoryTimeline`."""
        return bytes(self._perform(self._calls.read_timeline(*self._of, offset, size)))


# -- of both

if TYPE_CHECKING:
    AnySpool = DirectorySpool | AgentSpool
    AnyRun = DirectoryRun | AgentRun


def end_of(run: AnyRun, found: dict[str, Any], stream: str) -> int:
    """
    How far a reader goes: to the length that a final status records, because what was left running
    may still write.

    Args:
        found (dict): The status.
    """
    try:
        size = run.size(stream)
    except AgentError:
        raise
    except SpoolError:  # not a file of ours
        size = 0
    recorded = found.get(stream, {}).get("bytes")
    final = found["state"] in statuses.FINAL and found["end_time"] is not None
    return min(size, recorded) if final and isinstance(recorded, int) else size


def run(given: Given, terminal: Terminal, texts: list[tuple[str, bytes]]) -> int:
    """
    `chaperone run` at an agent: start runs, print their ids, and wait for their ends.

    This process holds nothing: a run goes on when it is killed.

    Args:
        texts (list): Specs: (name for messages, JSON).
    Returns:
        int: The exit code.
    """
    if given.id is not None and len(texts) > 1:
        why = "each run needs an id of its own"
        raise SpecError(f"unable to start {len(texts)} runs with id {given.id!r}: {why}")
    asked = [_spec(name, text, given.id) for name, text in texts]
    code = os.EX_OK
    add_site_packages(terminal)
    from ..api import wait_each

    spool = AgentSpool(spool_named(given))
    started = []
    for spec in asked:
        started.append(spool.start(spec))
        terminal.line(started[-1].run_id)
    for _, final in wait_each([] if given.detach or given.warm else started):
        if final.state != "terminated":
            terminal.note(str(final.exception and final.exception["message"]))
        if given.exit_code:
            code = max(code, final.exit_code)
    return code


def _spec(name: str, text: bytes, run_id: str | None) -> object:
    try:
        spec = jsontext.loads(text)
    except ValueError as error:
        raise SpecError(f"unable to read spec {name!r}: {error}") from error
    return {**spec, "id": run_id} if run_id is not None and isinstance(spec, dict) else spec
