"""What a scheduler calls: starting, finding, reading, waiting for and stopping runs."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from chaperone.api import Run, Spool
from chaperone.errors import NoRunError, RunExistsError, SpecError, SpoolError
from chaperone.model.events import Changed, Counts, Ended, Output, Started, status_view
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import absent, need, until
from spool_tests.support.writer import Writer


def sh(text, **program):
    return {"id": "r", "program": {"command": text, **program}}


# -- real runs


def test_run_is_started_waited_for_and_read(spool):
    run = Spool(spool).start(sh("echo out; echo err >&2; exit 3"))
    status = run.wait(60)
    assert (run.run_id, status.state, status.return_code, status.exit_code, status.is_final()) == (
        "r",
        "terminated",
        3,
        3,
        True,
    )
    assert (run.read("stdout"), run.read("stderr"), run.read("log")) == (b"out\n", b"err\n", b"")
    assert (run.size(), run.read("stdout", 2, 1), run.read("stdout", 99)) == (4, b"t", b"")
    assert run.status() == status


def test_used_id_is_refused(spool):
    scheduler = Spool(spool)
    scheduler.start(sh("exit 0")).wait(60)
    with pytest.raises(RunExistsError, match="^unable to create run 'r': it exists$"):
        scheduler.start(sh("exit 1"))
    assert scheduler["r"].status().return_code == 0


def test_bad_spec_is_refused_before_anything_is_made(spool):
    with pytest.raises(
        SpecError, match="program.argv: want a non-empty list of strings, got 'ls'$"
    ):
        Spool(spool).start({"program": {"argv": "ls"}})
    assert os.listdir(spool) == []


def test_wait_gives_up_when_the_time_is_over(spool):
    run = Spool(spool).start(sh("exec sleep 60"))
    assert run.wait(0.01) is None
    status = run.stop(grace_s=5, by="me")
    assert (status.state, status.signal, status.exit_code) == ("terminated", "SIGTERM", 143)
    assert (status.stop["reason"], status.stop["by"]) == ("request", "me")


def test_stop_without_waiting_returns_at_once(spool):
    run = Spool(spool).start(
        sh(
            "trap 'until [ -e go ]; do sleep 0.05; done; exit 4' TERM; echo ready; "
            "while :; do sleep 0.05; done",
            cwd=str(spool.parent),
        )
    )
    until(lambda: run.read("stdout"))
    assert not run.stop(wait=False).is_final()
    (spool.parent / "go").touch()
    assert run.wait(60).return_code == 4


def test_grace_that_is_over_is_followed_by_sigkill(spool):
    run = Spool(spool).start(sh("trap '' TERM; echo ready; while :; do sleep 0.05; done"))
    until(lambda: run.read("stdout"))
    assert run.stop(grace_s=0.05).signal == "SIGKILL"


def test_kill_and_signal_reach_the_program(spool):
    run = Spool(spool).start(sh("trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done"))
    until(lambda: run.read("stdout") == b"ready\n")
    run.signal("USR1")
    until(lambda: run.read("stdout") == b"ready\nusr1\n")
    assert run.kill().signal == "SIGKILL"


@pytest.mark.parametrize("number", [10, signal.SIGUSR1])
def test_signal_may_be_a_number(spool, number):
    run = Spool(spool).start(
        sh("trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.01; done")
    )
    until(lambda: run.size() == 6)
    run.signal(number)
    assert (run.wait(60).return_code, run.read()) == (7, b"ready\ngot it\n")


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        ({"offset": -1}, "offset: want a whole number of at least 0, got -1"),
        (
            {"offset": 2**63},
            (
                "offset: want a whole number of at least 0 and at most 9.22337e+18, got "
                "9223372036854775808"
            ),
        ),
        ({"size": -1}, "size: want a whole number of at least 0, got -1"),
    ],
)
def test_offset_that_no_stream_can_have_is_refused(spool, read, sentence):
    with Writer(spool) as writer:
        writer.end()
    with pytest.raises(SpecError) as caught:
        Spool(spool)["r"].read(**read)
    assert str(caught.value) == f"unable to read run 'r': {sentence}"


@pytest.mark.parametrize("seconds", [30 * 86_400, 1e10, float("inf")])
def test_wait_may_be_longer_than_the_kernel_counts(spool, seconds):
    """epoll_wait(2) takes 24.8 days at most."""
    with Writer(spool) as writer, Spool(spool).follow(streams=()) as follower:
        while not isinstance(follower.next(0), Changed):
            pass
        ender = threading.Timer(0.2, writer.end)
        ender.start()
        while isinstance(event := follower.next(seconds), Changed):
            pass
        assert isinstance(event, Ended)
        ender.join()
        assert Spool(spool)["r"].wait(seconds).state == "terminated"


def test_request_to_an_ended_run_changes_nothing(spool):
    run = Spool(spool).start(sh("exit 0"))
    run.wait(60)
    assert (run.stop().return_code, run.kill().return_code) == (0, 0)
    until(
        lambda: not (spool / "r" / "control").exists()
    )  # it goes a moment after the outcome has appeared
    with pytest.raises(
        NoRunError, match="^unable to send a request to run 'r': its chaperone is not running$"
    ):
        run.signal("USR1")


@pytest.mark.parametrize(
    "request_of, sentence",
    [
        (
            lambda run: run.signal("NOPE"),
            "unable to signal run 'r': want a signal's name such as 'SIGTERM', got 'NOPE'",
        ),
        (
            lambda run: run.stop(grace_s=-1),
            "unable to stop run 'r': want a grace of at least 0 seconds, got -1",
        ),
        (
            lambda run: run.stop(by="two words"),
            (
                "unable to send a request to run 'r': want one word of at most 128 characters for "
                "`by`, got 'two words'"
            ),
        ),
        (
            lambda run: run.stop(by="x\nkill"),
            (
                "unable to send a request to run 'r': want one word of at most 128 characters for "
                "`by`, got 'x\\nkill'"
            ),
        ),
        (lambda run: next(run.tail("log")), "unable to follow stream 'log': want stdout or stderr"),
    ],
)
def test_request_that_can_not_be_meant_is_refused(spool, request_of, sentence):
    with Writer(spool), pytest.raises(SpecError) as raised:
        request_of(Spool(spool)["r"])
    assert str(raised.value) == sentence


def test_follower_tells_real_runs_from_start_to_end(spool):
    scheduler = Spool(spool)
    with scheduler.follow() as follower:
        run_ids = {
            scheduler.start({"program": {"command": f"echo {number}; exit {number}"}}).run_id
            for number in range(3)
        }
        events = []
        while len([event for event in events if isinstance(event, Ended)]) < 3:
            events.append(follower.next(30))
        assert {event.run_id for event in events if isinstance(event, Started)} == run_ids
        assert sorted(event.data for event in events if isinstance(event, Output)) == [
            b"0\n",
            b"1\n",
            b"2\n",
        ]
        assert sorted(event.status.return_code for event in events if isinstance(event, Ended)) == [
            0,
            1,
            2,
        ]
        for run_id in run_ids:
            follower.collect(run_id)
        until(
            lambda: follower.next(0) is None and follower.cursor == {"runs": {}}
        )  # an entry may still be on its way
    assert os.listdir(spool / ".running") == os.listdir(spool / ".ended") == []


def test_killed_chaperone_is_lost_with_what_the_pipe_still_held(spool):
    run = Spool(spool).start(sh("echo ready; exec sleep 60"))
    until(lambda: run.read("stdout"))
    chaperone_pid = run.status().chaperone_pid
    assert chaperone_pid > 1
    with run_follower(spool) as follower:
        os.kill(chaperone_pid, signal.SIGKILL)
        status = until_lost(follower)
    assert (status.state, status.return_code, status.signal, status.complete) == (
        "lost",
        None,
        None,
        False,
    )
    assert run.wait(60).state == "lost"


def run_follower(spool):
    return Spool(spool).follow(runs=["r"])


def until_lost(follower):
    *_, last = follower
    return last.status


# -- what is there


def test_runs_are_found_by_where_they_stand(spool):
    scheduler = Spool(spool)
    with (
        Writer(spool, "live"),
        Writer(spool, "over") as over,
        Writer(spool, "collected") as collected,
    ):
        over.end()
        collected.end()
        scheduler.collect("collected")
        found = [
            [run.run_id for run in runs]
            for runs in (scheduler.live(), scheduler.ended(), scheduler.all())
        ]
    assert found == [["live"], ["over"], ["collected", "live", "over"]]


def test_run_is_deleted_once_it_has_ended(spool):
    with Writer(spool, "r") as writer:
        run = Spool(spool)["r"]
        with pytest.raises(
            SpoolError, match="^unable to delete run 'r': it is starting; stop it first$"
        ):
            run.delete()
        writer.end()
    run.delete()
    assert Spool(spool).all() == []
    with pytest.raises(NoRunError):
        run.delete()


@pytest.mark.parametrize("run_id", ["r", "../spool", ".running", ""])
def test_run_that_is_not_there_is_an_error(spool, run_id):
    with pytest.raises(NoRunError, match="^unable to find run "):
        Spool(spool)[run_id]


def test_cursor_of_a_run_begins_at_its_offsets_and_is_of_no_later_run(spool):
    with Writer(spool) as writer:
        writer.write(b"abc").write(b"de", "stderr")
        run = Spool(spool)["r"]
        cursor = run.cursor(stdout=1)
        assert cursor == {"runs": {"r": {"key": writer.run.key, "stdout": 1, "stderr": 0}}}
        with Spool(spool).follow(cursor) as follower:
            found = [
                (event.stream, event.data)
                for event in iter(lambda: follower.next(0), None)
                if isinstance(event, Output)
            ]
        assert sorted(found) == [("stderr", b"de"), ("stdout", b"bc")]
        for offset, got in ((-1, "-1"), (1.5, "1.5"), ("1", "'1'")):
            with pytest.raises(SpecError) as raised:
                run.cursor(stderr=offset)
            want = "want a whole number of at least 0"
            assert str(raised.value) == f"cursor.runs.r.stderr: {want}, got {got}"
    shutil.rmtree(spool / "r")
    with pytest.raises(NoRunError, match="^unable to find run 'r': No such file or directory$"):
        run.cursor()
    with Writer(spool), Spool(spool).follow(cursor) as follower:
        assert isinstance(follower.next(60), Ended)  # of the one that was deleted
        assert isinstance(follower.next(60), Started)


def test_deleted_run_is_an_error(spool):
    with Writer(spool):
        run = Spool(spool)["r"]
    shutil.rmtree(spool / "r")
    for look in (run.status, run.read, run.wait, run.stop):
        with pytest.raises(NoRunError, match="^unable to find run 'r': No such file or directory$"):
            look()


def test_run_that_is_deleted_while_waited_for_is_an_error(spool):
    with Writer(spool):
        waiting = subprocess.Popen(
            [sys.executable, "-c", WAITS, spool],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout.readline() == "waits\n"
        os.rename(spool / "r", spool / ".r.x.gone")
        assert (
            waiting.communicate(timeout=60)[0].splitlines()[-1]
            == "unable to wait for run 'r': it was deleted"
        )


WAITS = """
import sys
from chaperone.follow import follower as followers
from chaperone import api
run = api.Spool(sys.argv[1])["r"]
take = followers.Follower.next
followers.Follower.next = lambda *arguments: (print("waits", flush=True), take(*arguments))[1]
try:
    status = run.wait()
    print(status.state)
except api.NoRunError as error:
    print(error)
"""


def test_waiting_looks_at_no_clock_and_sets_no_timer(spool):
    need("strace")
    with Writer(spool) as writer:
        writer.running()
        trace = spool.parent / "trace"
        calls = "epoll_wait,epoll_pwait,timerfd_settime,poll,select,nanosleep,clock_nanosleep"
        command = [
            "strace",
            "-o",
            trace,
            "-e",
            f"trace={calls}",
            sys.executable,
            "-c",
            WAITS,
            spool,
        ]
        waiting = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if not waiting.stdout.readline():
            absent("strace may not trace here")
        for _ in range(20):
            writer.write(b"a line that nobody waits for\n")
            until(lambda: "epoll_wait(" in trace.read_text() or "epoll_pwait(" in trace.read_text())
        writer.end()
        assert waiting.communicate(timeout=60)[0].splitlines()[-1] == "terminated"
    calls = [line for line in trace.read_text().splitlines() if "epoll" in line]
    assert 1 <= len(calls) <= 4 and all(", -1" in call for call in calls), calls
    assert not [
        line for line in trace.read_text().splitlines() if "timer" in line or "sleep" in line
    ]


def test_tail_gives_the_bytes_as_they_come_to_the_end(spool):
    with Writer(spool) as writer:
        writer.running().write(b"0123456789")
        tail = Spool(spool)["r"].tail("stdout", 4)
        assert next(tail) == b"456789"
        writer.write(b"more").write(b"oops", "stderr")
        assert next(tail) == b"more"
        writer.write(b"last").end()
        assert list(tail) == [b"last"]


def test_tail_that_is_given_up_leaves_nothing_open(spool):
    with Writer(spool) as writer:
        writer.write(b"x")
        tail = Spool(spool)["r"].tail()
        next(tail)
        tail.close()


def test_cursor_of_now_tells_only_what_is_new(spool):
    scheduler = Spool(spool)
    with Writer(spool, "live") as live, Writer(spool, "over") as over:
        live.running().write(b"old")
        over.end()
        cursor = scheduler.cursor()
        assert cursor["runs"] == {
            "live": {"key": live.run.key, "stdout": 3, "stderr": 0},
            "over": {"key": over.run.key, "stdout": 0, "stderr": 0, "ended": True},
        }
        live.write(b"new")
        with scheduler.follow(cursor) as follower:
            events = [follower.next(0) for _ in range(3)]
            assert [type(event).__name__ for event in events] == ["Changed", "Output", "NoneType"]
            assert (events[1].offset, events[1].data) == (3, b"new")


def test_spool_is_made_by_the_first_who_follows_it(tmp_path):
    with Spool(tmp_path / "spool").follow() as follower:
        assert follower.next(0) is None
    assert os.stat(tmp_path / "spool").st_mode & 0o777 == 0o700


def test_paths_do_not_depend_on_where_we_are(spool, monkeypatch):
    monkeypatch.chdir(spool.parent)
    scheduler = Spool("spool")
    monkeypatch.chdir("/")
    with Writer(spool):
        assert (scheduler["r"].path, repr(scheduler["r"])) == (
            f"{spool}/r",
            f"Run({str(spool)!r}, 'r')",
        )
        assert scheduler["r"].spec()["id"] == "r"


# -- the view of a status


def test_view_has_times_and_counts_as_values(spool):
    with Writer(spool) as writer:
        writer.running().write(b"1234").end()
    status = Spool(spool)["r"].status()
    assert (status.stdout, status.stderr) == (
        Counts(bytes=4, dropped=0),
        Counts(bytes=0, dropped=0),
    )
    assert status.start_time.tzinfo is datetime.timezone.utc and status.raw["return_code"] == 0
    assert isinstance(Run(str(spool), "r").status(), type(status))


def test_view_of_a_newer_writers_status_is_tolerant():
    raw = {
        "run_id": "r",
        "state": "running",
        "pid": "many",
        "core_dump": 1,
        "start_time": "yesterday",
        "stdout": [],
        "elapsed": True,
        "shiny": "new",
    }
    status = status_view(raw)
    assert (status.state, status.pid, status.core_dump, status.start_time, status.elapsed) == (
        "running",
        None,
        False,
        None,
        None,
    )
    assert (status.stdout, status.labels, status.raw["shiny"]) == (
        Counts(bytes=None, dropped=None),
        {},
        "new",
    )
