"""
The routes of runs: start, list, look, ask.

Knows: the calls of `api`.  Must not know: HTTP beyond a request and its answer.
What may take longer than a small file takes runs in a thread.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from .... import __version__, api, interface
from ....errors import NoRunError, SpecError, SpoolError
from ....follow.follower import Follower
from ....launch import start as starting
from ....model import checks, request
from ....model import spec as specs
from ....model import status as statuses
from ....model.events import Ended, Lost
from ....program.fds import owned
from ....spool import format, look
from ...callback.progress import renewal_s
from ..application import BIG_BODY, Asked, Route
from ..exchange import RefusedError, answer

MOST = 1_000  # runs of one page
USUAL = 100
LONGEST_WAIT_S = 60.0
_KEY_DIGITS = frozenset("0123456789abcdef")
# What a service has in its environment for itself alone.
_OURS = ("CHAPERONE_", "LISTEN_", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY")


async def about(asked: Asked) -> Response:
    """Versions, names and the clock of this host."""
    token = asked.exchange.token
    return answer(
        {
            "api": 1,
            "chaperone": __version__,
            "format": format.VERSION,
            "host": os.uname().nodename,
            "boot_id": look.boot_id(),
            "time": statuses.timestamp(time.time_ns()),
            "spools": asked.agent.spools(),
            "name": asked.by,
            "right": None if token is None else token.right,
        }
    )


# -- start


def key(value: Any, path: str) -> str:
    if not isinstance(value, str) or len(value) != 32 or set(value) - _KEY_DIGITS:
        checks.fail(path, "32 hexadecimal digits", value)
    return str(value)


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        checks.fail_unseen(path, "an object", value)
    return dict(value)


_START = checks.Fields(
    {
        "spec": (_object, checks.REQUIRED),
        "key": (key, checks.REQUIRED),
        "warm": (checks.boolean, True),
        "env": (checks.OrNull(checks.object_of_strings), None),
        "cwd": (checks.OrNull(checks.text), None),
    },
    "request",
)


async def start(asked: Asked) -> Response:
    """Start a run; a repeated request with the same key starts nothing."""
    given = _START(asked.json(), "")
    run_id, key, spec = asked.run_id, given["key"], given["spec"]
    if not specs.is_run_id(run_id):
        raise SpecError(f"unable to start run {run_id!r}: want an id {specs.ID_FORM}")
    if spec.get("id") not in (None, run_id):
        raise SpecError(f"unable to start run {run_id!r}: its spec has id {spec['id']!r}")
    cwd = _home() if given["cwd"] is None else given["cwd"]
    if not cwd.startswith("/"):
        raise SpecError(f"unable to start run {run_id!r}: want an absolute cwd, got {cwd!r}")
    env = _environment() if given["env"] is None else given["env"]
    path = asked.spool().path
    started = {"run_id": run_id, "key": key}
    if look.key_at(path, run_id) == key:
        return answer(started)
    # A run with a callback is renewed by its receiver, and by no other client.
    with_callback = {"renew": renewal_s(spec.get("config"))}
    lacking = with_callback if spec.get("callback") else asked.agent.given
    spec = {**lacking, **spec, "id": run_id}
    await asyncio.to_thread(starting.start, path, spec, given["warm"], env, cwd, key)
    return answer(started, 201)


def _environment() -> dict[str, str]:
    """The agent's own environment, without what is there for the agent alone."""
    return {name: text for name, text in os.environ.items() if not name.startswith(_OURS)}


def _home() -> str:
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:  # a uid without a name, in a container
        home = ""
    return home if home.startswith("/") and os.path.isdir(home) else "/"


# -- look


async def listed(asked: Asked) -> Response:
    """Statuses, ordered by id."""
    given = asked.query("state", "label", "host", "after", "limit", "collected")
    limit = _number(given, "limit", USUAL, MOST)
    path = asked.spool().path
    page = await asyncio.to_thread(_page, path, given, int(limit), asked.agent.log)
    if "collected" in given:
        prefixes = tuple(given["collected"].split(","))
        page["collected"] = await asyncio.to_thread(_collected, path, prefixes)
    return answer(page)


def _collected(path: str, prefixes: tuple[str, ...]) -> int:
    with owned(format.open_spool(path)) as spool_fd:
        found = format.all_ids(spool_fd, prefixes)  # first: a run that starts now is none of them
        uncollected = {*format.live_ids(spool_fd), *format.ended_ids(spool_fd)}
        return len(set(found) - uncollected)


def _page(
    path: str, given: dict[str, str], limit: int, log: Callable[[str], None]
) -> dict[str, Any]:
    state = given.get("state")
    places = {"live": [format.live_ids], "ended": [format.ended_ids], "all": [format.all_ids]}
    if state not in (None, *places, *statuses.STATES):
        want = ", ".join([*places, *statuses.STATES])
        raise SpecError(f"unable to list runs: want state {want}, got {state!r}")
    found: list[dict[str, Any]] = []
    with owned(format.open_spool(path)) as spool_fd:
        listings = places.get(state or "", [format.live_ids, format.ended_ids])
        ids = sorted({run_id for listing in listings for run_id in listing(spool_fd)})
        for run_id in ids:
            if run_id <= given.get("after", ""):
                continue
            if len(found) == limit:
                return {"runs": found, "next": found[-1]["run_id"]}
            try:
                status = look.present(spool_fd, run_id)
            except NoRunError:  # about to appear, or gone since
                continue
            except SpoolError as error:  # the other runs may be readable
                log(f"unable to read run {run_id!r}: {error}")
                continue
            if state not in (None, *places, status["state"]) or not _fits(status, given):
                continue
            if given.get("host") in (None, _host(spool_fd, run_id, status)):
                found.append(status)
    return {"runs": found, "next": None}


def _host(spool_fd: int, run_id: str, found: dict[str, Any]) -> str:
    with owned(format.open_run(spool_fd, run_id)) as run_fd:
        return look.host(found, lambda: look.read_spec(run_fd))


def _fits(status: dict[str, Any], given: dict[str, str]) -> bool:
    name, equals, value = given.get("label", "").partition("=")
    labels = status["labels"]
    return not name or (name in labels and (not equals or labels[name] == value))


def _number(given: dict[str, str], name: str, usual: float, most: float) -> float:
    text = given.get(name, str(usual))
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    least = 1 if name == "limit" else 0
    if not least <= number <= most or (name == "limit" and not text.isdigit()):
        want = f"want {name} from {least} to {most:g}"
        raise SpecError(f"unable to read the request: {want}, got {text!r}")
    return number


async def status(asked: Asked) -> Response:
    """The status of a run, at once or when it has ended."""
    given = asked.query("wait")
    run = asked.run()
    if "wait" in given:
        await _wait(run, _number(given, "wait", 0, LONGEST_WAIT_S))
    return answer(_present(run))


def _present(run: api.Run) -> dict[str, Any]:
    with owned(format.open_spool(run.spool_path)) as spool_fd:
        return look.present(spool_fd, run.run_id)


async def _wait(run: api.Run, timeout_s: float) -> None:
    """Wait until a run has ended, but not longer than the time."""
    deadline = time.monotonic() + timeout_s
    if interface.has_ended(run.status()):
        return
    with Follower(run.spool_path, run.cursor(), [run.run_id], (), shared=True) as follower:
        while (left := deadline - time.monotonic()) > 0:
            event = await follower.anext(left)
            if event is None or isinstance(event, (Ended, Lost)):
                return


async def spec(asked: Asked) -> Response:
    """The spec of a run, without its secrets."""
    found = asked.run().spec()
    return answer({"spec": specs.without_secrets(found) if found else {}})


async def cursor(asked: Asked) -> Response:
    """The cursor of this moment."""
    return answer(await asyncio.to_thread(asked.spool().cursor))


# -- ask


async def control(asked: Asked) -> Response:
    """Pass a request on to the chaperone of a run."""
    run = asked.run()
    line = asked.body.decode("utf-8", "backslashreplace").removesuffix("\n")
    found = request.parsed(line) if "\n" not in line and len(line) < request.LIMIT else None
    if found is None:
        want = f"want {request.WANT}"
        raise SpecError(
            f"unable to send a request to run {run.run_id!r}: {want}, got {line[:200]!r}"
        )
    found.by = found.by or asked.by
    if found.verb in ("stop", "kill"):
        api.request_end(run, found, wait=False)
    else:
        with owned(format.open_spool(run.spool_path)) as spool_fd:
            with owned(format.open_run(spool_fd, run.run_id)) as run_fd:
                look.request(run_fd, run.run_id, found)
    return answer(_present(run))


_LEASE = checks.Fields({"runs": (checks.OrNull(checks.ListOf(checks.text)), None)}, "request")


async def renew(asked: Asked) -> Response:
    """Renew the leases of runs, by default of all live ones."""
    await asyncio.to_thread(asked.spool().renew, _LEASE(asked.json(), "")["runs"])
    return Response(status_code=204)


def check_key(asked: Asked, run: api.Run) -> str:
    """
    The key of a run, which the client may have named in If-Match.

    Raises:
        RefusedError: If it named another: that run has gone.
    """
    with owned(format.open_spool(run.spool_path)) as spool_fd:
        key = look.key_of(spool_fd, run.run_id) or ""
    wanted = asked.request.headers.get("if-match")
    if wanted is not None and wanted not in ("*", f'"{key}"'):
        sentence = (
            f"unable to send a request to run {run.run_id!r}: it is another run, with another key"
        )
        raise RefusedError(412, sentence)
    return key


ROUTES = [
    Route(
        method="GET",
        path="",
        right="look",
        answer=about,
        does="Versions, spools, and whose token it is",
    ),
    Route(
        method="PUT",
        path="/{spool}/runs/{run_id}",
        right="run",
        answer=start,
        does="Start a run; a repeat with its key is harmless",
        most=BIG_BODY,
    ),
    Route(
        method="GET",
        path="/{spool}/runs",
        right="look",
        answer=listed,
        does="Statuses, ordered by run id",
    ),
    Route(
        method="GET",
        path="/{spool}/runs/{run_id}",
        right="look",
        answer=status,
        does="The status of a run; with `wait` at its end",
    ),
    Route(
        method="GET",
        path="/{spool}/runs/{run_id}/spec",
        right="look",
        answer=spec,
        does="The spec of a run, without secrets",
    ),
    Route(
        method="GET",
        path="/{spool}/cursor",
        right="look",
        answer=cursor,
        does="The cursor of this moment",
    ),
    Route(
        method="POST",
        path="/{spool}/runs/{run_id}/control",
        right="run",
        answer=control,
        does="Stop or renew a run, or send a signal to its program",
    ),
    Route(
        method="POST",
        path="/{spool}/lease",
        right="run",
        answer=renew,
        does="Renew the leases of runs",
    ),
]
