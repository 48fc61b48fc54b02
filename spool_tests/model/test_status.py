"""
Statuses: which state may follow which, what is said of an outcome, and what is made of one that was
read.
"""

import copy
import datetime
import json
import os
import pickle
import signal
import subprocess
import sys

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chaperone
from chaperone.errors import TransitionError
from chaperone.model import events, jsontext, transitions
from chaperone.model import status as statuses
from chaperone.program import processes
from chaperone.spool import format
from spool_tests.support import disk

pytestmark = pytest.mark.once

NOW_NS = 1_795_550_066_123_456_789
START = transitions.starting(disk.spec("r", labels={"team": "etl"}), 42, "here", "boot", NOW_NS)
RUNNING = transitions.running(START, 4711, NOW_NS)
EXITED = transitions.with_facts(RUNNING, **processes.outcome(3 << 8))

MOVES = {
    "starting": lambda status: {**status, "state": "starting"},
    "running": lambda status: transitions.running(status, 1, NOW_NS),
    "stopping": lambda status: transitions.stopping(status, "SIGTERM", "request", None, NOW_NS),
    "terminated": lambda status: transitions.terminated(
        {**status, "return_code": 0, "signal": None}, True
    ),
    "unattended": lambda status: transitions.unattended(status),
    "error": lambda status: transitions.failed(status, "spawn", "no", NOW_NS),
    "lost": lambda status: transitions.lost(status, "gone"),
}


def test_times_are_told_in_utc_with_microseconds() -> None:
    assert statuses.timestamp(NOW_NS) == "2026-11-24T19:54:26.123456Z"
    assert statuses.timestamp(0) == "1970-01-01T00:00:00.000000Z"


moments = st.datetimes(
    min_value=datetime.datetime(1, 1, 2), max_value=datetime.datetime(9999, 12, 30)
)
offsets = st.integers(-23 * 60 - 59, 23 * 60 + 59).map(
    lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes))
)


@given(moments, offsets)
def test_time_is_parsed_as_the_moment_that_it_names(
    moment: datetime.datetime, offset: datetime.timezone
) -> None:
    aware = moment.replace(tzinfo=offset)
    since_epoch = aware - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    moment_ns = since_epoch // datetime.timedelta(microseconds=1) * 1000
    assert statuses.moment_ns(aware.isoformat()) == moment_ns
    assert events.status_view({"start_time": aware.isoformat()}).start_time == aware


@given(st.integers(0, 2**62))
def test_timestamp_is_parsed_as_what_it_was_made_of(now_ns: int) -> None:
    assert statuses.moment_ns(statuses.timestamp(now_ns)) == now_ns // 1000 * 1000


@pytest.mark.parametrize(
    "text",
    [
        *(None, 5, "", "Z", "yesterday", "2026-11-24", "2026-11-24T19:54:26"),
        *("2026-11-24 19:54:26Z", "2026-11-24T19:54:26.Z", "2026-11-24T19:54:26.5xZ"),
        *("2026-02-30T00:00:00Z", "2026-13-01T00:00:00Z", "2026-00-01T00:00:00Z"),
        *("2026-11-24T24:00:00Z", "2026-11-24T19:60:00Z", "2026-11-24T19:54:60Z"),
        *("2026-11-24T19:54:26+24:00", "2026-11-24T19:54:26+00:60", "2026-11-24T19:54:26+0000"),
        *("\u0662026-11-24T19:54:26Z", "2026-11-24T19:54:26.\u0665Z", "-026-11-24T19:54:26Z"),
        "2025-02-29T00:00:00Z",
    ],
)
def test_what_is_no_time_is_none(text: object) -> None:
    assert statuses.moment_ns(text) is None
    assert events.status_view({"start_time": text}).start_time is None


def test_first_status_knows_what_was_asked_and_no_secret() -> None:
    assert START["program"] == {"argv": ["true"], "cwd": "/", "env": ["TOKEN"]} and START[
        "labels"
    ] == {"team": "etl"}
    assert (START["state"], START["started"], START["complete"], START["create_time"]) == (
        "starting",
        None,
        False,
        statuses.timestamp(NOW_NS),
    )
    assert "hunter2" not in jsontext.dumps(START)


@pytest.mark.parametrize("before", statuses.STATES)
@pytest.mark.parametrize("after", [state for state in statuses.STATES if state != "starting"])
def test_state_follows_only_as_the_table_says(before: str, after: str) -> None:
    status = {**RUNNING, "state": before}
    copy = json.loads(jsontext.dumps(status))
    if after in transitions.TRANSITIONS[before]:
        assert MOVES[after](status)["state"] == after
    elif (before, after) == ("starting", "stopping"):
        assert (
            MOVES[after](status)["state"] == "starting"
        )  # remembered until there is something to stop
    else:
        with pytest.raises(TransitionError):
            MOVES[after](status)
    assert status == copy, "the argument stays as it is"


def test_nothing_follows_a_final_state() -> None:
    assert all(transitions.TRANSITIONS[state] == () for state in statuses.FINAL) and set(
        transitions.TRANSITIONS
    ) == set(statuses.STATES)
    final = transitions.terminated(EXITED, True)
    with pytest.raises(TransitionError) as caught:
        transitions.with_facts(final, pid=1)
    assert str(caught.value) == "unable to record more of run 'r': it has ended"


@pytest.mark.parametrize(
    "record",
    [
        transitions.with_facts,
        lambda status, **facts: transitions.running(status, 1, NOW_NS, **facts),
    ],
)
@pytest.mark.parametrize("status", [START, RUNNING])
def test_field_that_no_status_has_is_refused(record: object, status: dict[str, object]) -> None:
    with pytest.raises(TransitionError) as caught:
        record(status, colour="red")  # type: ignore[operator]
    assert str(caught.value) == "unable to record ['colour']: a status has no such fields"


def test_start_is_recorded_once() -> None:
    assert (RUNNING["pid"], RUNNING["started"], RUNNING["start_time"]) == (
        4711,
        True,
        statuses.timestamp(NOW_NS),
    )
    again = transitions.running(transitions.unattended(RUNNING), 4711, NOW_NS + 10**9)
    assert again["start_time"] == RUNNING["start_time"]


def test_first_reason_of_a_stop_stays() -> None:
    first = transitions.stopping(RUNNING, "SIGTERM", "timeout", "timeouts.run 5", NOW_NS)
    second = transitions.stopping(first, "SIGKILL", "request", "ops", NOW_NS + 10**9)
    assert second["stop"] == {
        "signal": "SIGKILL",
        "reason": "timeout",
        "by": "timeouts.run 5",
        "time": statuses.timestamp(NOW_NS),
    }
    with pytest.raises(TransitionError) as caught:
        transitions.stopping(RUNNING, "SIGTERM", "mood", None, NOW_NS)
    assert str(caught.value) == "unable to stop run 'r': 'mood' is not a known stop reason"


def test_every_real_exit_and_signal_is_told_apart() -> None:
    told = set()
    for code in (0, 1, 126, 127, 128, 130, 137, 255):
        raw = subprocess.Popen([sys.executable, "-ISc", f"import os; os._exit({code})"])
        status = processes.outcome(os.waitpid(raw.pid, 0)[1])
        raw.returncode = 0
        assert (status["return_code"], status["signal"], status["core_dump"]) == (code, None, False)
        told.add(str(status))
    for number in (
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGSEGV,
        signal.SIGRTMIN,
        signal.SIGRTMIN + 3,
    ):
        script = (
            "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
            f"os.kill(os.getpid(), {int(number)})"
        )
        raw = subprocess.Popen([sys.executable, "-ISc", script])
        status = processes.outcome(os.waitpid(raw.pid, 0)[1])
        raw.returncode = 0
        assert (
            status["return_code"] is None
            and statuses.exit_code({**RUNNING, **status, "state": "terminated"}) == 128 + number
        )
        told.add(str(status))
    assert len(told) == 13


def test_core_dump_is_told() -> None:
    assert processes.outcome(11 | 0x80) == {
        "status": 139,
        "return_code": None,
        "signal": "SIGSEGV",
        "core_dump": True,
    }


@pytest.mark.parametrize("facts", [{}, {"return_code": 1, "signal": "SIGTERM"}])
def test_end_wants_exactly_one_of_code_and_signal(facts: dict[str, object]) -> None:
    with pytest.raises(TransitionError) as caught:
        transitions.terminated(transitions.with_facts(RUNNING, **facts), True)
    assert str(caught.value) == "unable to end run 'r': want exactly one of return_code and signal"


def test_lost_run_keeps_what_is_known_and_unknows_the_rest() -> None:
    known = transitions.stopping(
        transitions.with_facts(EXITED, rusage={"utime": 1}, elapsed=5.0),
        "SIGTERM",
        "request",
        "ops",
        NOW_NS,
    )
    lost = transitions.lost(known, "gone", "2026-11-24T00:00:00.000000Z", NOW_NS)
    assert (lost["pid"], lost["start_time"], lost["stop"], lost["started"]) == (
        4711,
        known["start_time"],
        known["stop"],
        True,
    )
    assert (
        all(lost[name] is None for name in ("status", "return_code", "signal", "rusage", "elapsed"))
        and lost["complete"] is False
    )
    assert (
        lost["exception"] == {"stage": "chaperone", "type": None, "errno": None, "message": "gone"}
        and lost["gone_by"]
    )
    assert transitions.lost(START, "gone")["started"] is None


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"state": "terminated", "return_code": 0}, 0),
        ({"state": "terminated", "return_code": 255}, 255),
        ({"state": "terminated", "signal": "SIGKILL", "status": 9}, 137),
        ({"state": "terminated", "signal": "SIGINT", "status": None}, 130),
        (
            {"state": "terminated", "signal": "SIGRTMIN+2", "status": None},
            128 + signal.SIGRTMIN + 2,
        ),
        ({"state": "terminated", "signal": "SIGWHAT"}, 125),
        ({"state": "terminated"}, 125),
        ({"state": "error"}, 125),
        ({"state": "lost"}, 125),
    ],
)
def test_exit_code_follows_the_shell(facts: dict[str, object], code: int) -> None:
    assert statuses.exit_code({**RUNNING, **facts}) == code


# -- room (W5)


@pytest.mark.parametrize("char", ["x", "\n", "\u00e9", "\U0001f600", "\udcff"])
def test_longest_status_fits_its_room(char: str) -> None:
    """What others choose is cut; what the spec chose has twice its own size."""
    spec = disk.spec(
        "r" * 128,
        program={**disk.spec()["program"], "argv": [char * 500] * 9},
        labels={char * 90: char * 900},
    )
    status = transitions.running(
        transitions.starting(spec, 2**31, "h" * 64, "b" * 36, NOW_NS), 2**31, NOW_NS
    )
    status = transitions.stopping(status, "SIGTERM", "request", char * 4000, NOW_NS)
    status = transitions.with_facts(
        status,
        connection={
            "argv": [char * 20_000],
            "pid": 2**31,
            "drops": 2**31,
            "state": "down",
            "since": statuses.timestamp(NOW_NS),
        },
    )
    final = transitions.lost(status, char * 100_000, statuses.timestamp(NOW_NS), NOW_NS)
    room = format.RESERVE + 2 * len(jsontext.dumps(spec))
    text = transitions.fitted(final, room)
    assert len(text.encode()) <= room and text.endswith("}\n")
    assert jsontext.loads(text)["connection"] == {
        **status["connection"],
        "argv": None if char * 20_000 not in text else [char * 20_000],
    }  # type: ignore[index]


def test_status_that_fits_is_written_whole() -> None:
    status = transitions.with_facts(
        RUNNING, connection={"argv": ["ssh"], "pid": 1, "drops": 0, "state": "up", "since": None}
    )
    assert transitions.fitted(status, 100_000) == jsontext.dumps(status) + "\n"


# -- what was read (R5)

FINAL = transitions.terminated(
    transitions.with_facts(EXITED, end_time=statuses.timestamp(NOW_NS), elapsed=1), True
)


UNCOUNTED = {
    **FINAL,
    "leftovers": None,
    "stdout": {"bytes": 5, "dropped": None},
    "stderr": {"bytes": 0, "dropped": None},
}


@pytest.mark.parametrize(
    "status", [START, RUNNING, FINAL, UNCOUNTED, transitions.lost(RUNNING, "gone", None, NOW_NS)]
)
def test_status_is_read_as_it_was_written(status: dict[str, object]) -> None:
    assert statuses.last_known(jsontext.loads(jsontext.dumps(status)), "r") == status


def test_unknown_fields_are_kept() -> None:
    newer = {
        **FINAL,
        "version": 2,
        "mood": "good",
        "stdout": {"bytes": 1, "dropped": 0, "lines": 3},
    }
    assert statuses.last_known(newer, "r") == statuses.final_known(newer, "r") == newer


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"state": "evicted"}, "terminated"),
        ({"state": "evicted", "return_code": None}, "lost"),
        ({"state": "terminated"}, "terminated"),
        ({"state": "running"}, None),
        ({"state": "unattended"}, None),
        ({"state": 5}, None),
    ],
)
def test_final_state_of_a_newer_writer_is_told_by_what_is_known(
    facts: dict[str, object], state: str | None
) -> None:
    found = statuses.final_known({**FINAL, **facts}, "r")
    assert (None if found is None else found["state"]) == state


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
names = st.sampled_from([*RUNNING, "bytes", "dropped", "stage", "message", "argv"])
broken = st.one_of(
    values,
    st.dictionaries(names, values | st.dictionaries(names, values)),
    st.dictionaries(names, values).map(lambda found: {**FINAL, **found}),
)


@given(broken)
def test_whatever_is_read_has_the_shape_of_a_status(value: object) -> None:
    for status in (statuses.last_known(value, "r"), statuses.final_known(value, "r")):
        if status is None:
            continue
        assert (
            status["run_id"] == "r"
            and status["state"] in statuses.STATES
            and set(RUNNING) <= set(status)
        )
        statuses.exit_code(status)
        for name, line in statuses.FIELDS.items():
            field, kinds = status[name], line.kinds
            if isinstance(kinds, dict):
                assert field is None or isinstance(field, dict)
                assert (
                    all(
                        field[inner] is None or type(field[inner]) in kind
                        for inner, kind in kinds.items()
                    )
                    if field
                    else True
                )
            else:
                assert field is None or type(field) in kinds
        assert all(
            status[name] is not None
            for name in ("program", "labels", "stdout", "stderr", "complete")
        )
        if status["state"] not in statuses.FINAL:
            transitions.lost(status, "gone")


# -- the reader's view


def test_view_has_each_field_of_the_table_and_the_whole() -> None:
    assert [field.name for field in attrs.fields(events.Status)] == [*statuses.FIELDS, "raw"]
    assert [*statuses.Status.__annotations__] == [*statuses.FIELDS, "raw"]
    assert chaperone.Status is statuses.Status and chaperone.Counts is statuses.Counts


def test_view_is_a_value() -> None:
    view = events.status_view(FINAL)
    assert view == events.status_view({**FINAL, "mood": "good"})
    assert (view.stdout, view.exit_code, view.is_final()) == (
        chaperone.Counts(bytes=0, dropped=0),
        3,
        True,
    )
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        view.pid = 1  # type: ignore[misc]


def test_view_whose_fields_nobody_has_asked_for_is_the_same_value() -> None:
    view = events.status_view(FINAL)
    assert vars(view) == {"raw": FINAL}
    kept = (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view)))
    assert not hasattr(view, "mood") and vars(view) == {"raw": FINAL}
    assert f"return_code={FINAL['return_code']}" in repr(view)
    assert all(each == view and each.raw == FINAL for each in kept)
    assert pickle.loads(pickle.dumps(view)) == attrs.evolve(view) == view
    assert attrs.evolve(view, pid=1) != view


@given(broken)
def test_view_of_whatever_is_read_shows_what_the_check_found(value: object) -> None:
    status = statuses.last_known(value, "r")
    view = events.status_view(status)
    for name, line in statuses.FIELDS.items():
        if line.view == "counts":
            found = {"bytes": getattr(view, name).bytes, "dropped": getattr(view, name).dropped}
            assert found == {part: status[name][part] for part in found}
        elif not line.view:
            assert getattr(view, name) == status[name] or status[name] != status[name]
