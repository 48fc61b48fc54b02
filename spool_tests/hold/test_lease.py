"""
Leases: a run that asks for renewals is stopped by its own chaperone if none comes.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
import types

import pytest

import chaperone
from chaperone import aio
from chaperone.hold import limits
from chaperone.model import status as statuses
from chaperone.program.loop import Loop
from chaperone.spool import look
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import ask, final, held, live, log, running, sh, start, stdout
from spool_tests.support.surviving import adopt, booted_anew, connected
from spool_tests.support.waiting import patiently, until

ENV = {"hops": [{"exec": {"argv": ["env"]}}]}  # a far side without a network
STUBBORN = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.02; done"
FOREVER = 3600


def far(path, **more):
    return {**ENV, "remote_dir": str(path / "far"), **more}


def seconds(text):
    return statuses.moment_ns(text) / 1e9


def stop_of(status):
    stop = status["stop"]
    return stop["reason"], stop["by"], stop["signal"]


KINDS = {
    "local": lambda path: {},
    "kill": lambda path: {"remote": far(path)},
    "survive": lambda path: {"on_disconnect": "survive"},
    "far-survive": lambda path: {"remote": far(path), "on_disconnect": "survive"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_run_that_is_not_renewed_is_stopped(spool, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    status = held(spool, sh("exec sleep 60"), renew=0.4, **KINDS[kind](tmp_path))
    assert stop_of(status) == ("lease", "renew 0.4", "SIGTERM")
    assert (status["state"], status["signal"]) == ("terminated", "SIGTERM")


def test_unsupervised_run_is_stopped_by_the_end_of_its_connection(spool):
    bare = {**ENV, "supervise": False}
    status = held(spool, {"argv": ["sleep", "60"]}, renew=0.4, remote=bare)
    assert stop_of(status) == ("lease", "renew 0.4", "SIGTERM")
    assert (status["state"], status["exception"]["message"].rpartition(": ")[2]) == (
        "lost",
        "it was stopped by closing the connection",
    )


def test_lease_counts_while_the_run_waits_for_its_far_side(spool, tmp_path):
    waits = {"hops": [{"exec": {"argv": ["sh", "-c", "exec sleep 60"]}}]}
    status = held(spool, sh("true"), renew=0.3, remote=waits)
    assert stop_of(status) == ("lease", "renew 0.3", "SIGTERM")
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "stopped"


def test_lease_counts_while_the_program_waits_for_its_input(spool, tmp_path):
    os.mkfifo(tmp_path / "in")
    stdin = {"file": str(tmp_path / "in")}
    status = held(spool, sh("exec cat", stdin=stdin), renew=0.3)
    assert stop_of(status) == ("lease", "renew 0.3", "SIGTERM")
    assert (status["state"], status["started"]) == ("error", False)


def test_run_that_is_renewed_goes_on(spool):
    def attempt(number, renew):
        run_id = f"r{number}"
        chaperone = start(spool, sh("exec sleep 60"), run_id, renew=renew)
        asked = time.time()
        with contextlib.suppress(OSError):  # it has ended already
            ask(spool, "renew by=me", run_id)
        assert chaperone.wait(60) == 0
        status = final(spool, run_id)
        assert stop_of(status)[:2] == ("lease", f"renew {renew:g}")
        stopped = seconds(status["stop"]["time"])
        assert log(spool, run_id) == []
        return stopped > asked + renew and stopped > seconds(status["create_time"]) + renew

    patiently(attempt, 0.4, 2, 10)


def test_stop_that_ends_it_sooner_is_left_alone(spool):
    def attempt(number, renew):
        run_id = f"r{number}"
        chaperone = start(spool, sh(STUBBORN), run_id, renew=renew)
        with contextlib.suppress(OSError):
            until(lambda: stdout(spool, run_id) == b"ready\n")
            ask(spool, f"renew\nstop {2 * renew}", run_id)
        assert chaperone.wait(60) == 0
        status = final(spool, run_id)
        assert status["signal"] == "SIGKILL"
        return stop_of(status)[0] == "request" and stdout(spool, run_id) == b"ready\nasked\n"

    patiently(attempt, 0.4, 2, 10)


def test_lease_shortens_a_longer_grace(spool):
    def attempt(number, renew):
        run_id = f"r{number}"
        chaperone = start(spool, sh(STUBBORN), run_id, renew=renew, stop={"grace_period": 0.1})
        with contextlib.suppress(OSError):
            until(lambda: stdout(spool, run_id) == b"ready\n")
            ask(spool, "renew\nstop 1e9 by=ops", run_id)
        assert chaperone.wait(60) == 0
        status = final(spool, run_id)
        assert status["signal"] == "SIGKILL"
        return stop_of(status)[:2] == ("request", "ops")

    patiently(attempt, 0.4, 2, 10)


def test_renewal_comes_too_late_when_the_lease_has_ended(spool):
    chaperone = start(spool, sh(STUBBORN), renew=0.2, stop={"grace_period": 0.5})
    with contextlib.suppress(FileNotFoundError):  # it has ended
        until(lambda: live(spool)["state"] == "stopping")
        with contextlib.suppress(OSError):
            ask(spool, "renew")
    assert chaperone.wait(60) == 0
    assert stop_of(final(spool)) == ("lease", "renew 0.2", "SIGTERM")
    assert final(spool)["signal"] == "SIGKILL"
    assert not [line for line in log(spool) if "request" in line]


def test_renewal_of_a_run_without_a_lease_changes_nothing(spool):
    chaperone = start(spool, sh("exec sleep 60"))
    running(spool)
    ask(spool, "renew by=me\nstop by=ops")
    assert chaperone.wait(60) == 0
    assert (stop_of(final(spool))[:2], log(spool)) == (("request", "ops"), [])


def test_exec_has_no_requests_and_so_no_lease(chaperone, spool, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{"program": {"command": "sleep 0.3; exit 7"}, "renew": 0.05}')
    assert chaperone("exec", str(path)).returncode == 7


# -- a chaperone that dies


def killed(spool, **spec):
    """A run that survives, without its chaperone."""
    process = start(spool, sh("exec sleep 60"), on_disconnect="survive", **spec)
    connected(spool)
    process.kill()
    process.wait()
    until(lambda: chaperone.Spool(spool)["r"].status().state == "unattended")
    return chaperone.Spool(spool)


def put_back(spool, seconds):
    """Let the last renewal be so long ago."""
    since_boot, now = look.stamp()
    control = spool / "r" / "control"
    os.utime(control, (max(0, since_boot - seconds), now - seconds))


def test_adopted_run_counts_from_its_last_renewal(spool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    killed(spool, renew=FOREVER)
    since_boot, now = look.stamp()
    times = os.stat(spool / "r" / "control")
    assert since_boot - 600 < times.st_atime <= since_boot and now - 600 < times.st_mtime <= now
    os.utime(
        spool / "r" / "control", (since_boot - 1.0, now + 2 * FOREVER)
    )  # a wall clock set back
    adopter = adopt(spool)
    connected(spool)
    times = os.stat(spool / "r" / "control")
    assert abs(times.st_atime - (since_boot - 1.0)) < 0.01  # as it was
    ask(spool, "stop")
    assert adopter.wait(60) == 0
    assert stop_of(final(spool))[0] == "request"


def test_adopted_run_whose_lease_has_ended_is_stopped(spool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    killed(spool, renew=5)
    put_back(spool, 6)
    assert adopt(spool).wait(60) == 0
    assert stop_of(final(spool)) == ("lease", "renew 5", "SIGTERM")
    assert final(spool)["signal"] == "SIGTERM"


def test_run_is_renewed_while_it_has_no_chaperone(spool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = killed(spool, renew=FOREVER)
    put_back(spool, FOREVER + 1)
    found.renew()
    adopter = adopt(spool)
    connected(spool)
    ask(spool, "stop")
    assert adopter.wait(60) == 0
    assert stop_of(final(spool))[0] == "request"


@pytest.mark.root
@pytest.mark.parametrize("ago", [1, FOREVER + 1])
def test_lease_goes_on_over_a_boot_by_the_wall_clock(spool, tmp_path, monkeypatch, ago):
    monkeypatch.setenv("HOME", str(tmp_path))
    killed(spool, renew=FOREVER)
    put_back(spool, ago)
    booted, boot_id = booted_anew(tmp_path)
    adopter = subprocess.Popen(
        [*booted, *CHAPERONE, "adopt"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    if ago == 1:
        until(lambda: boot_id in (spool / "r" / "running.json").read_text())
        connected(spool)
        ask(spool, "stop")
    assert adopter.wait(60) == 0
    reason = "request" if ago == 1 else "lease"
    assert (stop_of(final(spool))[0], final(spool)["boot_id"]) == (reason, boot_id)


def test_requests_other_than_a_renewal_do_not_renew(spool):
    """Each of them changes the times of `control`, where an adopter finds the last renewal."""
    chaperone = start(spool, sh("trap 'echo got' USR1; echo ready; while :; do sleep 0.01; done"),
                      renew=FOREVER)  # fmt: skip
    until(lambda: stdout(spool) == b"ready\n")
    since_boot, now = look.stamp()
    ask(spool, "signal USR1")
    until(lambda: stdout(spool) == b"ready\ngot\n")
    until(
        lambda: (
            (times := os.stat(spool / "r" / "control")).st_atime < since_boot
            and times.st_mtime < now
        )
    )
    ask(spool, "kill")
    assert chaperone.wait(60) == 0


# -- a host that is suspended


def test_lease_counts_the_time_in_which_the_host_was_suspended(monkeypatch, tmp_path):
    """Then the clock of the deadlines stands still; the chaperone looks again after a while."""
    monkeypatch.setattr(limits, "LOOK_S", 0.02)
    suspended = [0.0]
    real = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda clock: real(clock) + suspended[0])
    stops, loop = [], Loop()

    def stop(reason, by):
        stops.append((reason, by))
        loop.end()

    with open(tmp_path / "control", "w") as control:
        spec = {"timeouts": {"run": None, "idle": None}, "renew": FOREVER}
        holder = types.SimpleNamespace(
            spec={**spec, "stop": {"grace_period": 60}},
            status={"boot_id": look.boot_id(), "end_time": None},
            run=types.SimpleNamespace(control_fd=control.fileno()),
            loop=loop,
            stop=stop,
            stops_later_than=lambda seconds: True,
        )
        limits.Limits(holder).begin()
        loop.later(0.05, lambda: suspended.__setitem__(0, FOREVER + 1.0))
        loop.run()
    assert stops == [("lease", "renew 3600")]


# -- what a scheduler calls


def renewed_at(spool, run_id):
    return os.stat(spool / run_id / "control").st_atime


@pytest.mark.parametrize("how", ["all", "named", "coroutine"])
def test_spool_renews_the_runs_that_have_a_lease(spool, how):
    found = chaperone.Spool(spool)
    processes = [start(spool, sh("exec sleep 60"), name, renew=FOREVER) for name in ("a", "b")]
    processes.append(start(spool, sh("exec sleep 60"), "none"))
    held(spool, sh("exit 0"), "over", renew=FOREVER)
    for run_id in ("a", "b", "none"):
        running(spool, run_id)
    before = look.stamp()[0]
    until(lambda: renewed_at(spool, "a") < before and renewed_at(spool, "b") < before)
    if how == "all":
        found.renew()
    elif how == "named":
        found.renew(["gone", "../a", "over", "none", "b", "a"])
    else:
        import asyncio

        asyncio.run(aio.Spool(spool).renew(iter(["a", "b"])))
    until(lambda: before <= renewed_at(spool, "a") and before <= renewed_at(spool, "b"))
    assert renewed_at(spool, "a") <= look.stamp()[0]
    for run_id in ("a", "b", "none"):
        found[run_id].kill(wait=False)
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for run_id in ("a", "b", "none"):
        assert (stop_of(final(spool, run_id))[0], log(spool, run_id)) == ("request", [])


def test_run_that_takes_no_request_does_not_hinder_the_others(spool):
    found = chaperone.Spool(spool)
    processes = [start(spool, sh("exec sleep 60"), name, renew=FOREVER) for name in ("a", "b")]
    running(spool, "b")
    pid = running(spool, "a")["chaperone_pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        fill(spool / "a" / "control")
        before = look.stamp()[0]
        with pytest.raises(chaperone.SpoolError) as caught:
            found.renew()
        assert (
            str(caught.value)
            == "unable to send a request to run 'a': Resource temporarily unavailable"
        )
        until(lambda: before <= renewed_at(spool, "b") <= look.stamp()[0])
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: before <= renewed_at(spool, "a") <= look.stamp()[0])
    for run_id in ("a", "b"):
        assert found[run_id].kill().stop["reason"] == "request"
    assert [process.wait(60) for process in processes] == [0, 0]


def fill(control):
    fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK)
    with open(fd, "wb", buffering=0) as file:
        room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        assert file.write(b"renew\n".ljust(room, b"\n")) == room
