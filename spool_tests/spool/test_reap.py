"""reap and taking over: rule R6, what is published for the dead, and what is left alone."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from chaperone.errors import NoRunError, SpoolError
from chaperone.model import status as statuses
from chaperone.model import transitions
from chaperone.model.request import Request
from chaperone.spool import locks, look, takeover
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.places import ROOT
from spool_tests.support.processes import open_fds
from spool_tests.support.waiting import until


def reap(spool, *run_ids):
    return [(found.run_id, found.done) for found in reaping.reap(str(spool), list(run_ids) or None)]


def dead(spool, run_id="r", **facts):
    """A run whose chaperone died while its program ran; its guard has left nothing."""
    run = disk.create(spool, run_id)
    disk.leave_word(run)
    status = disk.running(run, boot_id=look.boot_id(), **facts)
    os.write(run.streams["stdout"], b"out")
    run.close()
    return status


# -- lost


def test_dead_chaperones_run_gets_a_final_status_with_all_that_is_known(spool):
    stop = {
        "signal": "SIGTERM",
        "reason": "timeout",
        "by": "timeouts.run 5",
        "time": "2026-11-24T19:54:26.123456Z",
    }
    before = dead(spool, stop=stop, stderr={"bytes": 0, "dropped": 7})
    begun = statuses.timestamp(time.time_ns())
    assert reap(spool) == [("r", "lost")]
    status = json.loads((spool / "r" / "status.json").read_text())
    assert begun <= status["gone_by"] == status["end_time"] <= statuses.timestamp(time.time_ns())
    unknown = {
        "complete": False,
        "status": None,
        "return_code": None,
        "rusage": None,
        "elapsed": None,
        "leftovers": None,
    }
    sizes = {"stdout": {"bytes": 3, "dropped": 0}, "stderr": {"bytes": 0, "dropped": 7}}
    exception = {
        "stage": "chaperone",
        "type": None,
        "errno": None,
        "message": "the chaperone died before the program's end was recorded",
    }
    times = {"gone_by": status["gone_by"], "end_time": status["end_time"]}
    assert status == {
        **before,
        **unknown,
        **sizes,
        **times,
        "state": "lost",
        "exception": exception,
    }
    assert disk.tree(spool) == [
        ".ended",
        ".ended/r",
        ".running",
        "r",
        "r/spec.json",
        "r/status.json",
        "r/stderr",
        "r/stdout",
    ]
    assert disk.seen(spool) == (False, status) and open_fds(str(spool)) == []
    assert reap(spool) == [] and reap(spool, "r") == [("r", "ended")]


def test_only_the_named_ones_are_reaped(spool):
    dead(spool, "a"), dead(spool, "b")
    assert reap(spool, "b") == [("b", "lost")] and os.listdir(spool / ".running") == ["a"]
    with pytest.raises(NoRunError):
        reaping.reap(str(spool), ["c"])


def test_live_run_is_left_alone_at_once(spool, monkeypatch):
    run = disk.create(spool)
    before, slept = disk.tree(spool), []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert reap(spool) == [("r", "alive")] and disk.tree(spool) == before
    assert slept == [], "a lock that is held is no probe that passes"
    run.close()


def test_what_a_guard_could_not_kill_is_told_and_not_signalled(spool):
    run = disk.create(spool)
    disk.running(run, boot_id=look.boot_id())
    program = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    disk.leave_word(run, program.pid)
    run.close()
    assert reap(spool) == [("r", "lost")]
    status = disk.seen(spool)[1]
    assert (
        status["exception"]["message"]
        == f"the chaperone died before the program's end was recorded; still running: {program.pid}"
    )
    assert status["gone_by"] is None and program.poll() is None
    program.stdin.close()
    assert program.wait() == 0


@pytest.mark.parametrize("word", [b"", b"left", b"left 12", b"left x\n", b"gone\n", b"\0" * 50])
def test_without_a_whole_word_of_its_guard_nothing_is_said_to_be_gone(spool, word):
    run = disk.create(spool)
    disk.running(run, boot_id=look.boot_id())
    os.write(run.lock_fd, word)
    run.close()
    assert reap(spool) == [("r", "lost")]
    status = disk.seen(spool)[1]
    assert (status["gone_by"], status["exception"]["message"]) == (None, transitions.DIED)


@pytest.mark.parametrize(
    ("facts", "known"),
    [
        ({"boot_id": "another boot"}, True),
        ({"chaperone_host": "elsewhere"}, False),
        ({"boot_id": None}, True),
    ],
)
def test_time_of_death_is_told_only_where_it_is_certain(spool, facts, known):
    run = disk.create(spool)
    disk.running(run, **facts)
    run.close()
    reap(spool)
    assert (disk.seen(spool)[1]["gone_by"] is not None) == known


def test_far_side_is_gone_after_its_lease_and_grace(spool):
    remote = {"hops": [], "supervise": True, "remote_dir": None}
    disk.create(spool, "a", remote=remote).close()
    disk.create(spool, "b", remote={**remote, "supervise": False}).close()
    now_ns = time.time_ns()
    reap(spool)
    assert (
        statuses.timestamp(now_ns + 129 * 10**9)
        < disk.seen(spool, "a")[1]["gone_by"]
        < statuses.timestamp(now_ns + 140 * 10**9)
    )  # 60 + 60 + 10
    assert disk.seen(spool, "b")[1]["gone_by"] is None


# -- the guard


def test_sizes_are_final_before_they_are_told(spool):
    """
    A guard drains what the pipes still held; it shares the dead chaperone's locks on the streams.
    """
    run = disk.create(spool)
    disk.running(run)
    read, write = os.pipe()

    def drain():
        os.close(run.lock_fd)
        os.write(write, b".")
        time.sleep(0.2)  # reap is waiting by then, or comes later: both are right
        os.write(run.streams["stdout"], b"the last words")

    guard = disk.forked(drain)
    run.close()
    assert os.read(read, 1) == b"."
    os.close(read), os.close(write)
    assert reap(spool) == [("r", "lost")] and disk.waited(guard) == 0
    assert disk.seen(spool)[1]["stdout"]["bytes"] == 14 == (spool / "r" / "stdout").stat().st_size


def test_guard_without_an_end_is_waited_for_and_then_told(spool, monkeypatch):
    run = disk.create(spool)
    guard = os.dup(run.streams["stderr"])
    run.close()
    waited = takeover.wait_for_guard
    monkeypatch.setattr(takeover, "wait_for_guard", lambda run: waited(run, 0.05))
    assert (
        reap(spool) == [("r", "waiting")]
        and not (spool / "r" / "status.json").exists()
        and os.listdir(spool / ".running") == ["r"]
    )
    os.close(guard)
    assert reap(spool) == [("r", "lost")]


# -- endings half done


def test_ending_half_done_is_finished(spool):
    run = disk.create(spool)
    os.write(run.log_fd, b"word\n")
    final = disk.terminated(run, 3)
    run.publish(final)
    run.close()
    assert reap(spool) == [("r", "finished")]
    assert disk.tree(spool) == [
        ".ended",
        ".ended/r",
        ".running",
        "r",
        "r/log",
        "r/spec.json",
        "r/status.json",
        "r/stderr",
        "r/stdout",
    ]
    assert disk.seen(spool)[1] == final


@pytest.mark.parametrize(("boot", "entered"), [(look.boot_id(), False), ("another boot", True)])
def test_entry_in_neither_place_comes_back_only_if_a_power_cut_took_it(spool, boot, entered):
    """Else it was collected, and its end must not be delivered a second time."""
    run = disk.create(spool)
    run.publish({**disk.terminated(run), "boot_id": boot})
    run.close()
    (spool / ".running" / "r").unlink()
    assert reap(spool) == [("r", "finished")]
    assert os.listdir(spool / ".ended") == ["r"] * entered and "lock" not in os.listdir(spool / "r")


def test_lost_run_whose_entry_is_gone_gets_one(spool):
    dead(spool)
    (spool / ".running" / "r").unlink()
    assert reap(spool) == [("r", "lost")] and os.listdir(spool / ".ended") == ["r"]


def test_spool_without_its_entries_is_mended(spool):
    dead(spool)
    subprocess.run(["rm", "-r", str(spool / ".running"), str(spool / ".ended")], check=True)
    assert reap(spool) == [("r", "lost")] and os.listdir(spool / ".ended") == ["r"]


@pytest.mark.parametrize("text", ["", "garbage", '{"state": "terminated"'])
def test_outcome_that_cant_be_read_is_replaced_by_lost(spool, text):
    dead(spool)
    (spool / "r" / "status.json").write_text(text)
    assert reap(spool) == [("r", "lost")] and disk.seen(spool)[1]["state"] == "lost"


@pytest.mark.parametrize(
    "name", ["running.json", "spec.json", ".status", "stdout", "stderr", "log", "control"]
)
@pytest.mark.parametrize("harm", ["missing", "empty"])
def test_any_file_may_be_missing_or_empty(spool, name, harm):
    dead(spool)
    (spool / "r" / name).unlink()
    if harm == "empty" and name != "control":
        (spool / "r" / name).touch(0o600)
    assert reap(spool) == [("r", "lost")]
    assert (
        disk.seen(spool)[1]["state"] == "lost"
        and os.listdir(spool / ".ended") == ["r"]
        and "lock" not in os.listdir(spool / "r")
    )


@pytest.mark.parametrize("name", ["lock", "stdout", ".status", "control"])
def test_planted_file_is_told_and_not_touched(spool, tmp_path, name):
    dead(spool, "good"), dead(spool, "planted")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (spool / "planted" / name).unlink()
    (spool / "planted" / name).symlink_to(outside)
    assert (
        reap(spool) == [("good", "lost"), ("planted", "failed")] and outside.read_text() == "mine"
    )
    assert (
        reaping.reap(str(spool), ["planted"])[0].says
        == f"unable to open {name!r}: Too many levels of symbolic links"
    )
    assert open_fds(str(spool)) == []


def test_run_without_its_lock_is_told_and_left_alone(spool):
    dead(spool)
    (spool / "r" / "lock").unlink()
    before = disk.tree(spool)
    assert reaping.reap(str(spool)) == [
        reaping.Reaped(
            run_id="r",
            done="failed",
            says="its lock is gone, so nothing shows whether its chaperone is running",
        )
    ]
    assert disk.tree(spool) == before, "no lock is made"


# -- what may be adopted


def test_run_that_may_be_adopted_is_left_alone_and_told(spool):
    run = disk.create(spool, on_disconnect="survive", lease=1000)
    disk.running(run, boot_id=look.boot_id())
    run.close()
    before = disk.tree(spool)
    (found,) = reaping.reap(str(spool))
    assert (found.done, disk.tree(spool)) == ("unattended", before)
    assert found.says in [
        f"it may run for {left} s more without its chaperone: adopt it" for left in (1000, 999, 998)
    ]


def test_lease_that_is_over_is_a_loss(spool):
    run = disk.create(spool, on_disconnect="survive", lease=100)
    disk.running(run, boot_id=look.boot_id())
    since_boot, now = look.stamp()
    os.utime(run.lock_fd, (since_boot - 150, now - 150))
    run.close()
    assert reap(spool) == [("r", "lost")]
    status = disk.seen(spool)[1]
    assert (
        status["exception"]["message"]
        == "the chaperone died before the program's end was recorded, and its lease is over"
    )
    # 100 s of lease, 60 of grace and 10 of slack, from 150 s ago.
    assert (
        statuses.timestamp(int((now + 19) * 1e9))
        < status["gone_by"]
        < statuses.timestamp(int((now + 25) * 1e9))
    )


def test_run_that_somebody_adopted_meanwhile_is_left_alone(spool, monkeypatch):
    run = disk.create(spool, on_disconnect="survive", lease=100)
    disk.running(run, boot_id=look.boot_id())
    os.utime(run.lock_fd, (0, 0))
    run.close()
    real = takeover.take_over

    def adopted(*arguments):
        other = real(*arguments)
        other.touch()
        other.close()
        return real(*arguments)

    monkeypatch.setattr(takeover, "take_over", adopted)
    assert reap(spool) == [("r", "unattended")] and not (spool / "r" / "status.json").exists()


# -- what starters left


def test_leftovers_of_dead_starters_go_and_nothing_else(spool):
    disk.create(spool, "first").close()
    pid = disk.held(lambda: disk.create(spool, "live"))
    (spool / ".x.1.new").mkdir()
    (spool / ".x.1.new" / "stdout").touch()
    (spool / ".running" / "dangling").symlink_to("../dangling")
    (spool / ".y.1.gone").mkdir()
    assert reap(spool) == [
        ("first", "lost"),
        ("live", "alive"),
        (".x.1.new", "swept"),
        ("dangling", "swept"),
    ]
    assert sorted(os.listdir(spool)) == [
        ".ended",
        ".running",
        ".sweep.lock",
        ".y.1.gone",
        "first",
        "live",
    ] and os.listdir(spool / ".running") == ["live"]
    assert disk.killed(pid) == -signal.SIGKILL


PLANTS = [
    os.mkfifo,
    lambda path: path.symlink_to("elsewhere"),
    lambda path: path.touch(),
    lambda path: (path / "deep").mkdir(parents=True),
]


@pytest.mark.parametrize("plant", PLANTS)
def test_what_no_starter_left_is_not_said_to_be_removed(spool, plant):
    (spool / ".launcher.new").touch()  # a launcher's, not a start's
    plant(spool / ".x.1.new")
    assert [(found.run_id, found.done, found.says) for found in reaping.reap(str(spool))] == [
        (".x.1.new", "failed", "it contains something that is not a file, so it was not removed")
    ]
    assert os.path.lexists(spool / ".x.1.new")


def test_nothing_is_swept_while_a_starter_is_at_work(spool):
    disk.create(spool, "first").close()
    (spool / ".x.1.new").mkdir()
    (spool / ".running" / "dangling").symlink_to("../dangling")
    fd = os.open(spool / ".running", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert reap(spool) == [("first", "lost")] and (spool / ".x.1.new").exists()
    os.close(fd)
    assert reap(spool) == [(".x.1.new", "swept"), ("dangling", "swept")]


# -- R6: taking the lock


def taken(spool, *patience_s):
    with disk.opened(spool) as spool_fd:
        run = takeover.take_over(spool_fd, str(spool), "r", *patience_s)
    if run is not None:
        run.close()
    return run is not None


def test_lock_is_never_made(spool):
    dead(spool)
    (spool / "r" / "lock").unlink()
    assert not taken(spool) and not (spool / "r" / "lock").exists()


def test_probe_in_the_way_is_waited_for(spool):
    dead(spool)
    with open(spool / "r" / "lock") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        assert not taken(spool, 0.05)
        pid = disk.forked(
            lambda: time.sleep(0.3)
        )  # it has the same open file, and with it the lock, until then
    assert taken(spool, 60) and disk.waited(pid) == 0


def test_holder_is_not_waited_for(spool, monkeypatch):
    pid = disk.held(lambda: disk.running(disk.create(spool)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
        assert not taken(spool, 60)
    assert disk.killed(pid) == -signal.SIGKILL and taken(spool)


@pytest.mark.parametrize("change", ["unlinked", "replaced", "moved"])
def test_lock_that_is_no_longer_the_runs_is_not_taken(spool, monkeypatch, change):
    dead(spool)
    real = locks.take_within

    def changed(*arguments):
        locked = real(*arguments)
        if change == "moved":
            os.rename(spool / "r", spool / "s")
        else:
            (spool / "r" / "lock").unlink()
        if change == "replaced":
            (spool / "r" / "lock").touch(0o600)
        return locked

    monkeypatch.setattr(locks, "take_within", changed)
    assert not taken(spool) and open_fds(str(spool)) == []


def test_two_who_take_over_are_one(spool):
    for number in range(20):
        run_id = f"r{number}"
        dead(spool, run_id)
        pids = [
            disk.forked(
                lambda run_id=run_id: os._exit(
                    10 + ("lost" in [done for _, done in reap(spool, run_id)])
                )
            )
            for _ in range(3)
        ]
        assert sorted(disk.waited(pid) for pid in pids) == [10, 10, 11]
    assert len(os.listdir(spool / ".ended")) == 20


def test_close_of_a_lock_that_was_taken_is_an_event(spool):
    """
    A follower of the run hears of it by IN_CLOSE_WRITE, which only an fd that may write brings.
    """
    dead(spool)
    with disk.opened(spool) as spool_fd:
        run = takeover.take_over(spool_fd, str(spool), "r")
    assert fcntl.fcntl(run.lock_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    assert not os.get_inheritable(run.lock_fd)
    run.close()


def test_run_that_was_taken_over_is_whole_again(spool):
    dead(spool)
    (spool / "r" / "control").unlink(), (spool / "r" / ".status").unlink()
    with disk.opened(spool) as spool_fd:
        run = takeover.take_over(spool_fd, str(spool), "r")
        assert (
            not run.is_ended()
            and run.key == look.read_spec(run.fd)["key"]
            and run.path == str(spool / "r")
        )
        os.write(run.streams["stdout"], b"more")
        look.request(run.fd, "r", Request("stop"))
        assert os.read(run.control_fd, 10) == b"stop\n"
    assert disk.seen(spool)[0] and (spool / "r" / "stdout").read_text() == "outmore"
    disk.end(run)


def test_reap_killed_at_any_step_is_finished_by_the_next(spool):
    points = 0
    dead(spool, "old")
    for number in disk.crash_points(lambda: reap(spool)):
        points = number
        state = disk.seen(spool, "old")[1]["state"]
        assert state == "lost"
        reap(spool)
        assert os.listdir(spool / ".ended") == ["old"] and os.listdir(spool / ".running") == []
        assert sorted(os.listdir(spool / "old")) == ["spec.json", "status.json", "stderr", "stdout"]
        subprocess.run(["rm", "-r", str(spool / "old"), str(spool / ".ended" / "old")], check=True)
        dead(spool, "old")
    assert points > 20


def test_full_disk_is_told_and_the_run_is_reaped_when_there_is_room(spool, monkeypatch):
    dead(spool)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, os.strerror(28))

        replace_call(patch, "pwrite", full)
        (found,) = reaping.reap(str(spool))
    assert (found.done, found.says) == (
        "failed",
        "unable to publish the status of run 'r': No space left on device",
    )
    assert reap(spool) == [("r", "lost")]


def test_spool_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SpoolError):
        reaping.reap(str(tmp_path / "no"))


def test_killed_chaperone_with_a_real_program_is_reaped_with_its_last_bytes(spool):
    """
    The whole of it: the guard kills the program's tree and drains its pipe, reap waits for it.
    """
    spec = spool.parent / "spec.json"
    spec.write_text(
        json.dumps(
            {"id": "r", "program": {"command": "echo first; (setsid sleep 100 &); exec sleep 100"}}
        )
    )
    chaperone = subprocess.Popen(
        [sys.executable, "-m", "chaperone", "run", str(spec)],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    until(
        lambda: (
            (spool / "r" / "stdout").exists() and (spool / "r" / "stdout").read_text() == "first\n"
        )
    )
    pid = disk.seen(spool)[1]["chaperone_pid"]
    assert pid > 1 and disk.seen(spool)[0]
    os.kill(pid, signal.SIGKILL)
    chaperone.wait()
    until(lambda: not disk.seen(spool)[0])
    assert reap(spool) == [("r", "lost")]
    status = disk.seen(spool)[1]
    assert (status["stdout"], status["exception"]["message"]) == (
        {"bytes": 6, "dropped": 0},
        transitions.DIED,
    ) and status["gone_by"]
