"""
Which runs ls chooses, and how they fit a terminal.
"""

import datetime
import json
import os
import re
import time

import pytest

from chaperone.cli import common, tables
from chaperone.cli.verb import UsageError
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from spool_tests.support import disk
from spool_tests.support.commands import SLEEP, on_terminal, shell, streams
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


def listed(chaperone, *words):
    result = chaperone("ls", "--json", *words)
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line)["run_id"] for line in result.stdout.splitlines()]


@pytest.fixture
def runs(chaperone, held, spool):
    """good, bad, signalled, typo and collected have ended; live lives."""
    chaperone("run", "-", spec=shell("good", "exit 0", labels={"team": "etl", "night": ""}))
    chaperone("run", "-", spec=shell("bad", "exit 3", labels={"team": "bi"}))
    chaperone("run", "-", spec=shell("signalled", "kill -TERM $$"))
    chaperone("run", "-", spec={"id": "typo", "program": {"argv": ["/nowhere/x"]}})
    chaperone("run", "-", spec=shell("collected", "exit 1"))
    (spool / ".ended" / "collected").unlink()
    directory = held({**SLEEP, "id": "live"})
    until(lambda: json.loads((directory / "running.json").read_text())["state"] == "running")


def test_ls_lists_those_that_fit_all_that_is_asked(chaperone, runs):
    expected = [
        ((), "good bad signalled typo live"),
        (("--all",), "good bad signalled typo collected live"),
        (("b", "li"), "bad live"),
        (("x",), ""),
        (("--failed",), "bad signalled typo"),
        (("--failed", "--all"), "bad signalled typo collected"),
        (("--state", "running"), "live"),
        (("--state", "error"), "typo"),
        (("--label", "team"), "good bad"),
        (("--label", "team=etl"), "good"),
        (("--label", "night="), "good"),
        (("--label", "team="), ""),
        (("--since", "1h"), "good bad signalled typo live"),
        (("--until", "1h"), ""),
        (("--until", "0s"), "good bad signalled typo live"),
        (("--since", "2999-01-01"), ""),
        (("--until", "2999-01-01T00:00:00Z", "--failed", "si"), "signalled"),
        (("--host", "here"), "good bad signalled typo live"),
        (("--host", "db3"), ""),
    ]
    found = [(words, " ".join(listed(chaperone, *words))) for words, _ in expected]
    assert found == expected


def test_ls_shows_reasons_and_says_how_many_are_hidden(chaperone, runs):
    lines = chaperone("ls").stdout.splitlines()
    assert lines[4].endswith("unable to run '/nowhere/x': No such file or directory")
    assert lines[-1] == "1 collected: --all"
    assert "collected: --all" not in chaperone("ls", "--all").stdout
    assert "collected: --all" not in chaperone("ls", "good").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--state", "frob"),
            f"unable to understand '--state': want one of {', '.join(statuses.STATES)}, got 'frob'",
        ),
        (
            ("--since", "7"),
            "unable to understand '--since': want an age such as 1h, yesterday, a date,"
            " or a time such as 2026-11-25T08:00:00Z, got '7'",
        ),
        (("--label", ""), "unable to understand '--label': want NAME[=VALUE], got ''"),
        (("--label", "=etl"), "unable to understand '--label': want NAME[=VALUE], got '=etl'"),
    ],
)
def test_ls_refuses_what_it_does_not_understand(chaperone, words, sentence):
    assert streams(chaperone("ls", *words)) == (os.EX_USAGE, "", f"chaperone: {sentence}\n")


NOW_NS = 1_800_000_000 * 10**9


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW_NS - 90 * 10**9),
        ("1.5h", NOW_NS - 5_400 * 10**9),
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01t01:00:01.5+01:00", 1_500_000_000),
    ],
)
def test_when_is_an_age_ago_or_a_time(text, moment):
    assert common.when_ns("--since", text, NOW_NS) == moment


def test_when_is_the_first_moment_of_a_day_in_local_time():
    day = datetime.date.fromtimestamp(time.time()) - datetime.timedelta(days=1)
    first = int(time.mktime((day.year, day.month, day.day, 0, 0, 0, 0, 0, -1))) * 10**9
    assert common.when_ns("--since", "yesterday", time.time_ns()) == first
    assert common.when_ns("--since", day.isoformat(), time.time_ns()) == first
    assert common.when_ns("--since", None, 0) is None


@pytest.mark.parametrize("text", ["", "7", "soon", "2026-13-01", "2026-11-25T08:00:00", "-1h"])
def test_when_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        common.when_ns("--since", text, 0)


def test_ls_tells_the_host_as_soon_as_one_is_another(chaperone, spool):
    chaperone("run", "-", spec=shell("here", "exit 0"))
    assert "HOST" not in chaperone("ls").stdout
    remote = {"host": "db3", "user": "etl", "mode": "ssh-then-sudo"}
    canonical = specs.checked({"program": {"argv": ["true"]}, "remote": remote}, "/")["remote"]
    disk.create(spool, "there", remote=canonical).close()
    heading, here, there = chaperone("ls").stdout.splitlines()
    assert re.match(r"ID +STATE +HOST +AGE ", heading)
    assert [line.split()[2] for line in (here, there)] == ["here", "db3"]
    assert listed(chaperone, "--host", "db3") == ["there"]


IDS = (
    "20261126T030856.417915-81fbf8f0",
    "20261126T030856.778048-d53df8da",
    "20261126T030857.202920-5804d711",
    "20261126T030857-load-of-the-night",
    "nightly-20261126T030857.202920",
)


def test_generated_ids_are_cut_as_far_as_they_stay_prefixes_of_one():
    found = [(statuses.last_known({"run_id": run_id}, run_id), "here") for run_id in IDS]
    rows = tables.table(found, 0.0, 80, False).splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == [
        "20261126T030856.4",
        "20261126T030856.7",
        "20261126T030857.",
        "20261126T030857-load-of-the-night",
        "nightly-20261126T030857.202920",
    ]
    rows = tables.table(found, 0.0, 100, False).splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == list(IDS)


def test_id_that_is_cut_fits_no_run_that_the_list_leaves_out(chaperone, spool):
    failed, other = IDS[:2]
    for run_id, code in ((failed, 3), (other, 0)):
        chaperone("run", "-", spec=shell(run_id, f"exit {code}"))

    def shown(*words):
        _, written = on_terminal("ls", *words, columns=80, environ={"NO_COLOR": "1"})
        return [line.split()[0] for line in written.decode().splitlines()[1:]]

    assert shown("--failed") == shown(failed[:17]) == [failed[:17]]
    (spool / ".ended" / failed).unlink()
    # A prefix means an uncollected run first: a shorter one would be that of the other.
    assert shown("--failed", "--all") == [failed[:17]]


def test_reason_is_readable_at_80_columns_beside_a_long_host_and_outcome():
    ends = (
        {"state": "error", "exception": {"stage": "connect", "message": "unable to connect: x"}},
        {"state": "terminated", "signal": "SIGTERM", "stop": {"reason": "timeout"}},
    )
    found = [
        ({**statuses.last_known({"run_id": run_id}, run_id), **end}, host)
        for run_id, end, host in zip(IDS[1:], ends, ("db3.example.com", "here"), strict=False)
    ]
    assert tables.table(found, 0.0, 80, False) == (
        "ID               STATE       HOST             OUTCOME            PROGRAM OR REA…\n"
        "20261126T030856  error       db3.example.com  connect            unable to conn…\n"
        "20261126T030857  terminated  here             SIGTERM (timeout)  -\n"
    )
    assert tables.table(found[1:], 0.0, 80, False).splitlines()[0] == (
        "ID               STATE       AGE  ELAPSED  OUTCOME            BYTES  PROGRAM OR…"
    )


def test_ls_fits_80_columns_and_leaves_room_for_the_program(chaperone):
    for _ in range(2):
        assert chaperone("run", "--", "sleep", "0").returncode == 0
    code, written = on_terminal("ls", columns=80, environ={"NO_COLOR": "1"})
    lines = written.decode().splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    assert [line.split("  ")[-1] for line in lines] == ["PROGRAM OR REASON", "sleep 0", "sleep 0"]
