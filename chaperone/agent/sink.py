"""
A sink: writes what an agent sends into ordinary run directories, at the offsets that it sends.

A run directory that a sink feeds has the key, the streams and the final status of the agent's run.
How much of each stream is here is all that a sink has to remember, and the files say it.

Knows: run directories, offsets.  Must not know: HTTP, a socket, who sends.
"""

from __future__ import annotations

import errno
import os
import select
from typing import Any

from ..errors import NoRunError, RunExistsError, SpecError, SpoolError
from ..model import spec as specs
from ..model.request import Request
from ..program.fds import owned
from ..spool import format, look, takeover
from ..spool.run_directory import create
from .fed_run import FedRun, live_status

MIRROR, RECEIVER = "mirror", "receiver"  # what feeds a run: `by` of its origin


def origin(by: str, url: str) -> dict[str, str]:
    """Where a run comes from, for its spec.json; `spool.look.feeder` reads it."""
    return {"by": by, "url": url}


def is_received(spec: dict[str, Any]) -> bool:
    """Whether a receiver feeds the run with this spec."""
    return look.is_fed(spec, RECEIVER)


def check_names(run_id: object, key: object = None) -> None:
    """
    Refuse what an agent may send in place of a run id or a key: both are in names of files.

    Raises:
        SpecError: If one of them is invalid; a key of None is none.
    """
    if not specs.is_run_id(run_id):
        raise SpecError(f"unable to write the copy of run {run_id!r}: want an id {specs.ID_FORM}")
    if key is not None and not (isinstance(key, str) and key.isalnum() and specs.is_run_id(key)):
        raise SpecError(
            f"unable to write the copy of run {run_id!r}: want a key of letters and digits"
        )


class Sink:
    """
    All runs of a spool that this process feeds.

    Args:
        path (str): The spool; made if it is missing.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.spool_fd = format.open_spool(self.path, create=True)
        self.runs: dict[str, FedRun] = {}
        self._epoll = select.epoll()
        self._by_fd: dict[int, FedRun] = {}

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything; the runs stay as they are, for the next sink."""
        for run in self.runs.values():
            run.close()
        self.runs = {}
        self._epoll.close()
        os.close(self.spool_fd)

    def fileno(self) -> int:
        """An fd that is readable while a request waits in a `control`."""
        return self._epoll.fileno()

    def left(self, by: str, url: str | None = None) -> list[str]:
        """
        The ids of the live runs that an earlier sink fed.

        Args:
            by (str): MIRROR or RECEIVER.
            url (str): Of their origin; None for any.
        """
        found = []
        for run_id in format.live_ids(self.spool_fd):
            try:
                with owned(format.open_run(self.spool_fd, run_id)) as run_fd:
                    spec = look.read_spec(run_fd)
            except SpoolError:
                continue
            if look.is_fed(spec, by) and url in (None, spec["origin"]["url"]):
                found.append(run_id)
        return found

    def spec_of(self, run_id: str) -> dict[str, Any]:
        """
        The spec of a run that is here, as in its spec.json; {} if it can't be read.

        Raises:
            NoRunError: If there is no such run.
        """
        with owned(format.open_run(self.spool_fd, run_id)) as run_fd:
            return look.read_spec(run_fd)

    def run(
        self,
        run_id: str,
        key: Any,
        spec: dict[str, Any],
        origin: dict[str, str],
        status: dict[str, Any] | None = None,
        lease_s: float = specs.LEASE_S["survive"],
    ) -> FedRun:
        """
        The run with this id and key. Its run directory is made, or taken over from a sink that
        died.

        Args:
            spec (dict): As the agent gave it; a field that is missing has its default.
            origin (dict): From `origin`.
            status (dict): The last one that is known; None if none is.
            lease_s (float): For how many seconds without a sink a reader takes the run for
                `unattended`, and not for `lost`; counted from the last `touch`.
        Raises:
            SpecError: If the id or the key is none.
            RunExistsError: If the id belongs to another run.
            SpoolError: If the run directory can't be made, or another process writes it.
        """
        check_names(run_id, "" if key is None else key)
        known = self.runs.get(run_id)
        if known is not None and known.key == key and known.is_there():
            return known
        if known is not None and known.is_there():
            raise RunExistsError(
                f"unable to write the copy of run {run_id!r}: another run has its id", errno.EEXIST
            )
        self.drop_removed()
        try:
            run = self._found(run_id, key, origin["by"])
        except NoRunError:
            run = self._made(run_id, key, spec, origin, status, lease_s)
        if not run.is_ended():
            self.runs[run_id] = run
            self._epoll.register(run.control_fd, select.EPOLLIN)
            self._by_fd[run.control_fd] = run
        return run

    def _made(
        self,
        run_id: str,
        key: str,
        spec: dict[str, Any],
        origin: dict[str, str],
        status: dict[str, Any] | None,
        lease_s: float,
    ) -> FedRun:
        near = _near_spec(run_id, spec, origin, lease_s)
        first = live_status(status, near, None)
        directory = create(self.path, near, near, first, key)
        return FedRun(directory, first, self._let_go)

    def _found(self, run_id: str, key: str, by: str) -> FedRun:
        with owned(format.open_run(self.spool_fd, run_id)) as run_fd:
            spec = look.read_spec(run_fd)
            if not spec and look.pulse(run_fd) is None:
                why = "it is being deleted"
                raise SpoolError(f"unable to write the copy of run {run_id!r}: {why}", errno.EAGAIN)
            if spec.get("key") != key or not look.is_fed(spec, by):
                raise RunExistsError(
                    f"unable to write the copy of run {run_id!r}: another run has its id",
                    errno.EEXIST,
                )
            if look.pulse(run_fd) is None and look.read_final(run_fd, run_id) is not None:
                return FedRun.of_ended(run_fd, run_id, key)
        directory = takeover.take_over(self.spool_fd, self.path, run_id)
        if directory is None:
            why = "another process writes it"
            raise SpoolError(f"unable to write the copy of run {run_id!r}: {why}", errno.EAGAIN)
        if directory.is_ended():  # the sink before us was killed inside the ending
            ended = FedRun.of_ended(directory.fd, run_id, key)
            directory.end(spec.get("durable") is True)
            return ended
        return FedRun(directory, look.read_live(directory.fd, run_id), self._let_go)

    def drop_removed(self) -> None:
        """Let go of the runs whose run directory somebody has removed."""
        for run in [run for run in self.runs.values() if not run.is_there()]:
            self._let_go(run)
            run.close()

    def requests(self) -> list[tuple[FedRun, Request]]:
        """The requests that came since the last call, in the order in which each run got them."""
        found = []
        for fd, _ in self._epoll.poll(0):
            run = self._by_fd.get(fd)
            if run is not None:
                found += [(run, request) for request in run.requests()]
        return found

    def _let_go(self, run: FedRun) -> None:
        self.runs.pop(run.run_id, None)
        self._by_fd.pop(run.control_fd, None)


def _near_spec(
    run_id: str, spec: dict[str, Any], origin: dict[str, str], lease_s: float
) -> dict[str, Any]:
    """
    The spec as it is kept here: any reader, also an older one, concludes from it that the program
    survives whatever feeds its run directory (rule R3). The times of its bytes are not sent.
    """
    given = {name: field for name, field in spec.items() if name not in ("version", "key")}
    program, output, labels = (given.get(name) for name in ("program", "output", "labels"))
    program = program if isinstance(program, dict) else {}
    env = program.get("env")
    return {
        **given,
        "id": run_id,
        "program": {
            **program,
            "argv": program.get("argv"),
            "cwd": program.get("cwd"),
            "env": env if isinstance(env, dict) else {},
        },
        "output": {**(output if isinstance(output, dict) else {}), "timeline": False},
        "durable": given.get("durable") is True,
        "labels": labels if isinstance(labels, dict) else {},
        "on_disconnect": "survive",
        "lease": lease_s,
        "origin": origin,
    }
