"""
Limits count on the monotonic clock: the wall clock is stepped by a day, or the chaperone is paused,
while each of them runs alone.
"""

import ast
import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from spool_tests.support.clock import DAY, Clock
from spool_tests.support.places import ROOT
from spool_tests.support.runs import final, live, running, sh
from spool_tests.support.surviving import connected
from spool_tests.support.waiting import need, patiently, until

ADOPT = (
    "from chaperone.hold import adopt, inherited; "
    "sys.exit(adopt.hold_left_run(sys.argv[1], sys.argv[2], "
    "inherited.shed_inherited_state(), inherited.print_run_id))"
)
HANGS = {
    "host": "nowhere.invalid",
    "options": {"ProxyCommand": "sh -c 'while read x; do :; done'", "ConnectTimeout": 30},
}
# What of the time module any module may use: the clocks, of which `Clock` replaces the two
# that give the time of day, and what only waits.
READ = {
    "monotonic",
    "time",
    "time_ns",
    "clock_gettime",
    "CLOCK_BOOTTIME",
    "sleep",
    "strftime",
    "gmtime",
    "localtime",
}
LIMITS = ("run", "idle", "lease", "connect")
TIMES_S = (0.8, 5, 20)  # a busy machine needs the longer ones


def limited(limit, time_s):
    """A spec with this limit, without its id."""
    return {
        "run": {"program": sh("exec sleep 1000"), "timeouts": {"run": time_s}},
        "idle": {"program": sh("echo out; exec sleep 1000"), "timeouts": {"idle": time_s}},
        "lease": {"program": sh("exec sleep 1000"), "renew": time_s},
        "connect": {"program": sh("exit 0"), "remote": HANGS, "timeouts": {"connect": time_s}},
    }[limit]


@pytest.fixture
def clock(spool):
    return Clock(spool.parent)


def start(spool, clock, run_id="r", **spec):
    chaperone = subprocess.Popen(
        [*clock.chaperone, "run", "--spool", str(spool), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    chaperone.stdin.write(json.dumps({"id": run_id, **spec}))
    chaperone.stdin.close()
    assert chaperone.stdout.readline() == f"{run_id}\n"
    chaperone.stdout.close()
    return chaperone


def stopped_by(status):
    """Which limit ended it."""
    if status["state"] == "error":
        return (
            "connect"
            if ": no answer within " in status["exception"]["message"]
            else status["exception"]
        )
    return status["stop"] and {"timeout": "run"}.get(
        status["stop"]["reason"], status["stop"]["reason"]
    )


def begun(spool, limit, run_id):
    """Wait until its time runs: the pid of its chaperone; None where it is over already."""
    try:
        status = live(spool, run_id) if limit == "connect" else running(spool, run_id)
    except FileNotFoundError:
        return None
    if limit == "idle":
        until(lambda: (spool / run_id / "stdout").stat().st_size)
    return status["chaperone_pid"]


def ended(spool, run_id):
    return (spool / run_id / "status.json").exists()


@pytest.mark.parametrize("step", [DAY, -DAY])
@pytest.mark.parametrize("limit", LIMITS)
def test_limit_is_neither_hastened_nor_put_off_by_a_step(spool, clock, limit, step):
    if limit == "connect":
        need("ssh")

    def attempt(number, time_s):
        run_id = f"r{number}"
        clock.step(0)
        begin = time.monotonic()
        chaperone = start(spool, clock, run_id, **limited(limit, time_s))
        begun(spool, limit, run_id)
        clock.step(step)
        in_time = not ended(spool, run_id)
        assert chaperone.wait(60) == 0
        assert time.monotonic() - begin >= time_s
        status = final(spool, run_id)
        assert stopped_by(status) == limit, status
        # Though by the times of day it is a day.
        assert status["elapsed"] is None or 0 < status["elapsed"] < 3600
        return in_time

    patiently(attempt, *TIMES_S)


@pytest.mark.parametrize("limit", LIMITS)
def test_limit_that_passes_while_the_chaperone_is_paused_counts_when_it_goes_on(
    spool, clock, limit
):
    if limit == "connect":
        need("ssh")

    def attempt(number, time_s):
        run_id = f"r{number}"
        chaperone = start(spool, clock, run_id, **limited(limit, time_s))
        holder = begun(spool, limit, run_id)  # its guard, if it has one, waits for it
        if holder:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder, signal.SIGSTOP)
                paused = time.monotonic()
                until(lambda: time.monotonic() > paused + time_s + 0.2)
                in_time = not ended(spool, run_id)
                os.kill(holder, signal.SIGCONT)
        assert chaperone.wait(60) == 0
        assert stopped_by(final(spool, run_id)) == limit
        return holder and in_time

    patiently(attempt, *TIMES_S)


def test_step_ends_no_run_that_has_limits(spool, clock):
    chaperone = start(
        spool,
        clock,
        program=sh("while [ ! -e go ]; do echo x; sleep 0.02; done; exit 3", cwd=str(spool)),
        timeouts={"run": 3600, "idle": 600},
        renew=600,
    )
    running(spool)
    for step in (DAY, -DAY, 400 * DAY, 0):
        clock.step(step)
        size = (spool / "r" / "stdout").stat().st_size
        until(lambda size=size: (spool / "r" / "stdout").stat().st_size > size + 4)
    assert live(spool)["state"] == "running"
    (spool / "go").touch()
    assert chaperone.wait(60) == 0
    (spool / "go").unlink()
    assert final(spool)["return_code"] == 3


@pytest.mark.parametrize("step", [DAY, -DAY])
@pytest.mark.parametrize("limit", ["run", "lease"])
def test_adopted_run_keeps_its_time_whatever_the_clock_says(spool, clock, limit, step, monkeypatch):
    """
    Its limit counts from the program's start, or from the last renewal, though no process that saw
    it lives any more.
    """
    monkeypatch.setenv("HOME", str(spool.parent))

    def attempt(number, time_s):
        run_id = f"r{number}"
        limits = {"run": {"timeouts": {"run": time_s}}, "lease": {"renew": time_s}}
        survives = {"program": sh("exec sleep 1000"), "on_disconnect": "survive"}
        clock.step(0)
        begin = time.monotonic()
        chaperone = start(spool, clock, run_id, **survives, **limits[limit])
        connected(spool, run_id)
        chaperone.kill()
        chaperone.wait()
        clock.step(step)
        in_time = not ended(spool, run_id)
        if in_time:
            argv = [*clock.python(ADOPT), str(spool), run_id]
            adopter = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            assert adopter.wait(60) == 0
        assert stopped_by(final(spool, run_id)) == limit, final(spool, run_id)
        # And not at once, as the times of day would have it.
        assert time.monotonic() - begin >= time_s
        return in_time

    patiently(attempt, 3, 12, 30)
    until(lambda: not list((spool.parent / ".chaperone").glob("*")))


def test_nobody_reads_another_clock():
    """What `Clock` stands in for is all there is."""
    package = os.path.join(ROOT, "chaperone")
    for name in os.listdir(package):
        if not name.endswith(".py"):
            continue
        with open(os.path.join(package, name)) as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "time"
            ):
                assert node.attr in READ, f"{name}:{node.lineno}: time.{node.attr}"
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("now", "utcnow", "today")
                and isinstance(node.value, ast.Name)
            ):
                assert node.value.id not in ("datetime", "date"), f"{name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "time", f"{name}:{node.lineno}"
