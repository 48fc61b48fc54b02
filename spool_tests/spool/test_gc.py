"""
gc: which runs go, that no other run is touched, and that it may be killed or raced at any step.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import attrs
import filelock
import pytest

from chaperone.api import Spool
from chaperone.errors import BusyError, NoRunError, RunExistsError
from chaperone.spool import format, gc, locks, look
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.places import ROOT
from spool_tests.support.processes import open_fds

pytestmark = pytest.mark.once

DAY_S = 86_400
NOTHING = gc.Summary(
    removed=[], freed=0, kept=0, kept_bytes=0, spared=0, live=0, swept=0, failed=[]
)


def ended(spool, run_id, days=0.0, code=0, size=0):
    """A run that ended some days ago."""
    run = disk.create(spool, run_id)
    os.write(run.streams["stdout"], bytes(size))
    disk.end(run, code)
    then = time.time() - days * DAY_S
    os.utime(spool / run_id / "status.json", (then, then))


def ids(spool):
    return sorted(name for name in os.listdir(spool) if not name.startswith("."))


def delete(spool, uncollected=True, **wanted):
    return gc.gc(str(spool), uncollected=uncollected, **wanted)


def test_nothing_is_asked_and_nothing_goes(spool):
    ended(spool, "old", days=1000)
    assert delete(spool) == attrs.evolve(NOTHING, kept=1) and ids(spool) == ["old"]


def test_old_runs_go_oldest_first_with_their_entries(spool):
    for run_id, days in (("new", 0), ("old", 8), ("older", 9), ("edge", 6.9)):
        ended(spool, run_id, days)
    summary = delete(spool, older_s=7 * DAY_S)
    assert (summary.removed, summary.kept, summary.live, summary.failed) == (
        ["older", "old"],
        2,
        0,
        [],
    ) and summary.freed > 0
    assert ids(spool) == sorted(os.listdir(spool / ".ended")) == ["edge", "new"]


def test_failed_runs_are_kept_longer(spool):
    ended(spool, "good", 8), ended(spool, "bad", 8, code=1), ended(spool, "worse", 31, code=1)
    run = disk.create(spool, "lost")
    run.close()
    reaping.reap(str(spool))
    summary = delete(spool, older_s=7 * DAY_S, keep_failed_s=30 * DAY_S)
    assert summary.removed == ["worse", "good"] and ids(spool) == ["bad", "lost"]
    # A run that failed is protected from the room that is wanted, too.
    assert delete(spool, max_bytes=0, keep_failed_s=30 * DAY_S).removed == [] and ids(spool) == [
        "bad",
        "lost",
    ]
    assert delete(spool, max_bytes=0).removed == ["bad", "lost"]


def test_oldest_go_until_the_rest_fits(spool):
    for number in range(4):
        ended(spool, f"r{number}", days=9 - number, size=100_000)
    sizes = delete(spool, max_bytes=2**60).kept_bytes
    assert 400_000 < sizes < 600_000
    summary = delete(spool, max_bytes=sizes // 2)
    assert (
        summary.removed == ["r0", "r1"]
        and summary.kept_bytes <= sizes // 2
        and summary.freed == sizes - summary.kept_bytes
    )
    assert delete(spool, older_s=6.5 * DAY_S, max_bytes=sizes // 4).removed == ["r2"] and ids(
        spool
    ) == ["r3"]


def test_it_is_asked_for_from_python_too(spool):
    ended(spool, "old", 8), ended(spool, "bad", 8, code=1), ended(spool, "new")
    told = []
    Spool(spool).collect("old"), Spool(spool).collect("bad")
    would = Spool(spool).gc(older_s=DAY_S, keep_failed_s=9 * DAY_S, dry_run=True)
    assert Spool(spool).gc(
        DAY_S, 9 * DAY_S, progress=lambda *each: told.append(each)
    ) == attrs.evolve(would, freed=mock.ANY)
    assert (would.removed, ids(spool), told[-1]) == (["old"], ["bad", "new"], (1, 1))


def test_dry_run_says_the_same_and_deletes_nothing(spool):
    ended(spool, "old", 8), ended(spool, "new")
    before = disk.tree(spool)
    would = delete(spool, older_s=DAY_S, max_bytes=2**60, dry_run=True)
    assert disk.tree(spool) == before
    assert delete(spool, older_s=DAY_S, max_bytes=2**60) == would


def test_what_no_scheduler_has_collected_is_spared_and_counted(spool):
    for number in range(4):
        ended(spool, f"r{number}", days=9 - number, size=100_000)
    Spool(spool).collect("r1"), Spool(spool).collect("r3")
    summary = delete(spool, uncollected=False, older_s=6.5 * DAY_S)
    assert (summary.removed, summary.spared, summary.kept) == (["r1"], 2, 3)
    # Those stay that the next scheduler has yet to take: it gets their endings.
    with Spool(spool).follow() as follower:
        told = [event.run_id for event in iter(lambda: follower.next(0), None)]
    assert sorted({*told}) == sorted(os.listdir(spool / ".ended")) == ["r0", "r2"]
    summary = delete(spool, uncollected=False, max_bytes=0)
    assert (summary.removed, summary.spared, ids(spool)) == (["r3"], 2, ["r0", "r2"])
    assert delete(spool, uncollected=False, older_s=100 * DAY_S).spared == 0
    assert delete(spool, max_bytes=0).removed == ["r0", "r2"]


def test_what_has_not_ended_is_never_touched(spool):
    live, ending = disk.not_ended(spool)
    before = disk.tree(spool)
    summary = delete(spool, older_s=-1, max_bytes=0)
    assert (summary.removed, summary.live, summary.failed) == ([], 4, []) and disk.tree(
        spool
    ) == before
    live.close(), ending.close()


@pytest.mark.parametrize("everything", [False, True])
def test_probe_of_a_reader_hinders_no_deletion(spool, monkeypatch, everything):
    run = disk.create(spool)
    run.publish(disk.terminated(run))
    run.close()
    real = locks.try_take
    tries = []

    def probed(fd):
        with open(spool / "r" / "lock") as lock:
            if not tries:
                fcntl.flock(lock, fcntl.LOCK_SH)
            tries.append(real(fd))
        return tries[-1]

    monkeypatch.setattr(locks, "try_take", probed)
    if everything:
        assert delete(spool, older_s=-1).removed == ["r"]
    else:
        assert gc.delete(str(spool), "r") > 0
    assert tries == [False, True] and ids(spool) == []


def test_ending_half_done_may_go_and_leaves_no_entry(spool):
    run = disk.create(spool)
    run.publish(disk.terminated(run))
    run.close()
    assert delete(spool, older_s=-1).removed == ["r"] and disk.tree(spool) == [".ended", ".running"]


def test_ending_that_somebody_finishes_is_left_alone(spool, monkeypatch):
    run = disk.create(spool)
    run.publish(disk.terminated(run))
    run.close()
    real = gc._chosen

    def taken(*arguments):
        if not held:
            with open(spool / "r" / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                held.append(os.dup(lock.fileno()))
        return real(*arguments)

    held = []
    monkeypatch.setattr(gc, "_chosen", taken)
    summary = delete(spool, older_s=-1)
    assert (summary.removed, summary.failed) == (
        [],
        ["unable to delete run 'r': another process holds its lock"],
    ) and ids(spool) == ["r"]
    os.close(held[0])


def test_run_that_was_replaced_meanwhile_is_not_deleted(spool, monkeypatch):
    ended(spool, "r")
    real, new = gc._chosen, []

    def replaced(*arguments):
        if not new:
            os.rename(spool / "r", spool / "elsewhere")
            os.unlink(spool / ".ended" / "r")
            new.append(disk.create(spool))
        return real(*arguments)

    monkeypatch.setattr(gc, "_chosen", replaced)
    summary = delete(spool, older_s=-1)
    assert (summary.removed, summary.failed) == (
        [],
        ["unable to delete run 'r': another process holds its lock"],
    )
    assert disk.seen(spool)[0] and os.listdir(spool / ".running") == ["r"]
    new[0].close()


def test_run_that_took_its_place_while_it_was_opened_is_not_deleted(spool, monkeypatch):
    ended(spool, "r"), ended(spool, "other")
    real = gc._held_lock

    def replaced(run_fd, run_id):
        if run_id == "r":
            os.rename(spool / "r", spool / ".elsewhere")
            os.rename(spool / "other", spool / "r")
        return real(run_fd, run_id)

    monkeypatch.setattr(gc, "_held_lock", replaced)
    summary = delete(spool, older_s=-1)
    assert (
        "unable to delete run 'r': another run has its id now" in summary.failed
        and (spool / "r" / "status.json").exists()
    )


# -- one sweep at a time


@pytest.fixture
def swept(spool):
    """A spool with an old run, while a sweep is at work in it."""
    ended(spool, "old", days=8)
    with filelock.FileLock(spool / ".sweep.lock"):
        yield spool


@pytest.mark.parametrize(
    "sweep",
    [reaping.reap, lambda path: gc.gc(path, older_s=-1), lambda path: gc.delete(path, "old")],
)
def test_second_sweep_is_refused_at_once(swept, sweep, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(BusyError) as caught:
        sweep(str(swept))
    assert str(caught.value) == (
        f"unable to reap or gc spool {str(swept)!r}: another chaperone reap or gc is running"
    )
    assert ids(swept) == ["old"] and len(open_fds(str(swept))) == 1, "only the other sweep's"


@pytest.mark.parametrize("words", [["reap"], ["gc", "--older", "7d"], ["rm", "old"]])
def test_second_sweep_exits_75_with_one_sentence(swept, chaperone, words):
    result = chaperone(*words)
    assert (result.returncode, result.stdout, result.stderr) == (
        os.EX_TEMPFAIL,
        "",
        f"chaperone: unable to reap or gc spool {str(swept)!r}:"
        " another chaperone reap or gc is running\n",
    )


def test_looking_and_reaping_one_run_need_no_sweep(swept, chaperone):
    assert delete(swept, older_s=7 * DAY_S, dry_run=True).removed == ["old"]
    assert chaperone("reap", "old").stdout == "old: ended: nothing is left to do\n"


def test_sweep_is_over_when_its_process_was_killed(spool):
    ended(spool, "old", days=8)
    kept = []

    def sweep():
        kept.append(filelock.FileLock(spool / ".sweep.lock"))
        kept[0].acquire()

    pid = disk.held(sweep)
    with pytest.raises(BusyError):
        delete(spool, older_s=-1)
    assert disk.killed(pid) == -signal.SIGKILL
    assert delete(spool, older_s=-1).removed == ["old"]


def test_id_is_free_again_and_told_apart(spool):
    ended(spool, "r")
    with disk.opened(spool) as spool_fd:
        old_fd = format.open_run(spool_fd, "r")
        old = look.read_spec(old_fd)["key"]
        with pytest.raises(RunExistsError):
            disk.create(spool)
        delete(spool, older_s=-1)
        run = disk.create(spool)
        new_fd = format.open_run(spool_fd, "r")
        assert look.read_spec(new_fd)["key"] == run.key != old and not format.is_path_of(
            spool_fd, "r", old_fd
        )
        with pytest.raises(NoRunError, match="it is being deleted"):
            look.look(old_fd, "r")
        os.close(old_fd), os.close(new_fd)
    run.close()


def test_reader_with_an_fd_never_takes_a_deleted_run_for_a_lost_one(spool, monkeypatch):
    ended(spool, "r")
    with disk.opened(spool) as spool_fd:
        run_fd = format.open_run(spool_fd, "r")
        seen, gone = [], []
        for name in ("rename", "rmdir", "unlink"):
            real = getattr(os, name)

            def looked(*arguments, name=name, real=real, **fds):
                gone.extend(arguments[:1] if name == "unlink" else [])
                try:
                    seen.append(look.look(run_fd, "r")[1]["state"])
                except NoRunError:
                    seen.append("deleted")
                return real(*arguments, **fds)

            replace_call(monkeypatch, name, looked)
        delete(spool, older_s=-1)
        assert format.found(spool_fd, "r") is None
        os.close(run_fd)
    assert (
        set(seen) == {"terminated", "deleted"}
        and seen == sorted(seen, reverse=True)
        and gone[-1] == "status.json"
    )


def deleted_after_a_probe(spool, monkeypatch):
    """From now on gc deletes what has ended right after the next probe of a lock."""
    real = look.pulse

    def deleted_then(run_fd):
        alive = real(run_fd)
        monkeypatch.setattr(look, "pulse", real)
        assert delete(spool, older_s=-1).removed == ["r"]
        return alive

    monkeypatch.setattr(look, "pulse", deleted_then)


def test_run_that_is_deleted_between_two_looks_is_not_lost(spool, monkeypatch):
    """Its ending was half done, so its lock was there when the reader looked at it first."""
    run = disk.create(spool)
    run.publish(disk.terminated(run))
    run.close()
    deleted_after_a_probe(spool, monkeypatch)
    with pytest.raises(NoRunError, match="^unable to read run 'r': it is being deleted$"):
        disk.seen(spool)


def test_run_that_is_deleted_while_it_is_reaped_is_not_there(spool, monkeypatch):
    ended(spool, "r")
    deleted_after_a_probe(spool, monkeypatch)
    with pytest.raises(NoRunError, match="^unable to reap run 'r': it is being deleted$"):
        reaping.reap(str(spool), ["r"])


def test_killed_at_any_step_it_is_finished_by_the_next(spool):
    points = 0

    def prepare():
        ended(spool, "a", 9, size=10), ended(spool, "b", 8), ended(spool, "new")
        half = disk.create(spool, "half")
        half.publish(disk.terminated(half))
        half.close()
        os.utime(spool / "half" / "status.json", (1, 1))

    prepare()
    for number in disk.crash_points(lambda: delete(spool, older_s=DAY_S)):
        points = number
        for run_id in ids(spool):
            assert disk.seen(spool, run_id)[1]["state"] == "terminated"
        delete(spool, older_s=DAY_S)
        reaping.reap(str(spool))
        assert ids(spool) == ["new"]
        assert sorted(os.listdir(spool)) == [".ended", ".running", ".sweep.lock", "new"]
        assert os.listdir(spool / ".ended") == ["new"] and os.listdir(spool / ".running") == []
        (spool / ".sweep.lock").unlink()
        for name in os.listdir(spool):
            shutil.rmtree(spool / name)
        prepare()
    assert points > 30


def test_whatever_somebody_put_there_goes_and_nothing_outside_does(spool, tmp_path):
    ended(spool, "r")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (spool / "r" / "notes" / "deep").mkdir(parents=True)
    (spool / "r" / "notes" / "deep" / "file").write_text("x")
    (spool / "r" / "link").symlink_to(outside)
    (spool / "r" / "notes" / "link").symlink_to(outside / "file")
    os.link(outside / "file", spool / "r" / "hard")
    os.mkfifo(spool / "r" / "fifo")
    assert delete(spool, older_s=-1).removed == ["r"] and ids(spool) == []
    assert (outside / "file").read_text() == "mine" and open_fds(str(tmp_path)) == []


def test_directories_in_directories_go_however_deep(spool):
    ended(spool, "r")
    # Deeper than the interpreter's stack, and than a process may have open files or names be long.
    home = os.open(".", os.O_RDONLY)
    os.chdir(spool / "r")
    try:
        for _ in range(1_200):
            os.mkdir("d")
            os.chdir("d")
        pathlib.Path("file").write_text("x")
    finally:
        os.fchdir(home)
        os.close(home)
    summary = delete(spool, older_s=-1)
    assert (summary.removed, summary.failed, ids(spool)) == (["r"], [], [])
    assert [name for name in os.listdir(spool) if name.endswith(".gone")] == []


def test_what_is_no_run_is_told_and_left_alone(spool, tmp_path):
    ended(spool, "good")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "status.json").touch()
    (spool / "planted").symlink_to(tmp_path / "elsewhere")
    (spool / "file").touch()
    summary = delete(spool, older_s=-1)
    assert summary.removed == ["good"]
    assert summary.failed == [
        "unable to open run 'file': Not a directory",
        "unable to open run 'planted': Not a directory",
    ]
    assert (tmp_path / "elsewhere" / "status.json").exists()


@pytest.mark.parametrize(
    "plant",
    [
        os.mkfifo,
        lambda path: path.symlink_to("r"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.touch(),
    ],
)
def test_deletion_that_nobody_can_finish_is_told_and_keeps_no_other_run(spool, plant):
    ended(spool, "r")
    plant(spool / ".planted.0123.gone")
    summary = delete(spool, older_s=-1)
    assert (summary.removed, summary.swept, summary.failed) == (
        ["r"],
        0,
        ["unable to delete '.planted.0123.gone': Not a directory"],
    )
    assert os.path.lexists(spool / ".planted.0123.gone")


def test_starts_reaps_and_looks_go_on_beside_it(spool):
    """
    New runs end all the time, under ids that gc makes free again, while gcs and reaps are at work.
    """
    rounds = 60

    def start(worker):
        for number in range(rounds):
            run_id = f"{worker}-{number % 5}"
            try:
                run = disk.create(spool, run_id)
            except RunExistsError:
                continue
            assert disk.seen(spool, run_id)[0]
            disk.end(run)

    def clean():
        while True:
            with contextlib.suppress(BusyError):
                assert delete(spool, older_s=-1).failed == []
            with contextlib.suppress(BusyError):
                found = {each.done for each in reaping.reap(str(spool))}
                assert found <= {"alive", "ended", "swept"}

    disk.end(disk.create(spool, "first"))
    cleaners = [disk.forked(clean) for _ in range(2)]
    starters = [disk.forked(lambda worker=worker: start(worker)) for worker in range(2)]
    try:
        assert [disk.waited(pid) for pid in starters] == [0, 0]
    finally:
        assert [disk.killed(pid) for pid in cleaners] == [-signal.SIGKILL] * 2
    delete(spool, older_s=-1), reaping.reap(str(spool))
    assert disk.tree(spool) == [".ended", ".running"]


def test_progress_is_told(spool):
    for number in range(3):
        ended(spool, f"r{number}")
    told = []
    delete(spool, older_s=-1, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


def test_progress_is_shown_on_a_terminal_and_wiped(spool):
    for number in range(3):
        ended(spool, f"r{number}")
    ours, theirs = os.openpty()
    code = (
        "from chaperone.cli import main; from chaperone.cli import terminal; "
        "terminal.PROGRESS_S = 0; raise SystemExit(main.main())"
    )
    argv = [
        sys.executable,
        "-c",
        code,
        "gc",
        "--spool",
        str(spool),
        "--older",
        "0s",
        "--uncollected",
    ]
    result = subprocess.run(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=300, check=False
    )
    os.close(theirs)
    shown = b""
    with (
        open(ours, "rb", buffering=0) as terminal,
        contextlib.suppress(OSError),
    ):  # EIO: that was all
        while True:
            shown += terminal.read(65_536)
    assert (result.returncode, result.stdout.partition(" (")[0]) == (0, "removed 3 runs")
    assert (
        shown
        == b"".join(b"\r%d of 3 runs\x1b[K" % done for done in (1, 2, 3, 1, 2, 3)) + b"\r\x1b[K"
    )


@pytest.mark.parametrize("count", [2_000, pytest.param(9_000, marks=pytest.mark.long)])
def test_thousands_of_runs_go_beside_a_thousand_live_ones(spool, count):
    ended(spool, "template", days=9)
    live = disk.create(spool, "live")
    names = sorted(os.listdir(spool / "template"))
    for number in range(count):
        directory = spool / f"r{number}"
        directory.mkdir(0o700)
        for name in names:
            os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY, 0o600))
        (spool / ".ended" / f"r{number}").symlink_to(f"../r{number}")
        os.utime(directory / "status.json", (1, 1))
    locks = []
    for number in range(999):
        directory = spool / f"live{number}"
        directory.mkdir(0o700)
        locks.append(os.open(directory / "lock", os.O_CREAT | os.O_WRONLY, 0o600))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
        (directory / "running.json").touch()
    summary = delete(spool, older_s=7 * DAY_S)
    assert (len(summary.removed), summary.live, summary.failed) == (count + 1, 1_000, [])
    for fd in locks:
        os.close(fd)
    live.close()
