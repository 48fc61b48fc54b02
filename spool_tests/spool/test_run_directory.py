"""
A run directory as its chaperone writes it: rules W1-W5 of docs/spool-format.rst, each broken by
nothing that may happen.
"""

import errno
import fcntl
import json
import os
import re
import stat
import subprocess

import pytest

from chaperone.errors import RunExistsError, SpecError, SpoolError
from chaperone.model import jsontext
from chaperone.spool import format, look
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.directories import ENDED_FILES
from spool_tests.support.processes import open_fds

BUILT = re.compile(r"\.r\.[0-9a-f]{16}\.new")
LIVE_FILES = [".status", "control", "lock", "log", "running.json", "spec.json", "stderr", "stdout"]


def free(path, how=fcntl.LOCK_EX):
    """Whether a lock on a path could be had."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


# -- W1: how a run appears


def test_run_directory_appears_complete_locked_and_entered(spool, monkeypatch):
    real, seen = os.rename, []

    def rename(source, target, **fds):
        if target == "r":
            built = spool / source
            assert not (spool / "r").exists() and os.readlink(spool / ".running" / "r") == "../r"
            assert sorted(os.listdir(built)) == LIVE_FILES and not free(
                built / "lock", fcntl.LOCK_SH
            )
            assert json.loads((built / "running.json").read_text())["state"] == "starting"
            assert (
                json.loads((built / "spec.json").read_text())["key"]
                and (built / "stdout").stat().st_size == 0
            )
            assert not free(spool / ".running"), (
                "a starter holds the lock on .running/ until its run is there"
            )
            seen.append(source)
        return real(source, target, **fds)

    replace_call(monkeypatch, "rename", rename)
    run = disk.create(spool)
    assert len(seen) == 1 and BUILT.fullmatch(seen[0]) and free(spool / ".running")
    run.close()


def test_starter_is_at_work_from_before_it_makes_anything(spool, monkeypatch):
    disk.create(spool, "first").close()
    real, seen = os.mkdir, []

    def mkdir(name, *mode, **fds):
        if str(name).endswith(".new"):
            seen.append(free(spool / ".running"))
        return real(name, *mode, **fds)

    replace_call(monkeypatch, "mkdir", mkdir)
    disk.create(spool).close()
    assert seen == [False]


def test_two_starters_may_work_at_once(spool):
    disk.create(spool, "first").close()
    with Directory(spool / ".running") as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        disk.create(spool).close()


class Directory:
    """An open directory."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)

    def __enter__(self):
        return self.fd

    def __exit__(self, *_):
        os.close(self.fd)


def test_second_start_is_refused_and_leaves_nothing(spool):
    with_run = disk.create(spool)
    before, fds = disk.tree(spool), open_fds(str(spool))
    with pytest.raises(RunExistsError) as caught:
        disk.create(spool)
    assert (str(caught.value), caught.value.errno) == (
        "unable to create run 'r': it exists",
        errno.EEXIST,
    )
    assert (disk.tree(spool), open_fds(str(spool))) == (before, fds)
    disk.end(with_run)
    with pytest.raises(RunExistsError):
        disk.create(spool)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.mkdir(), lambda path: path.touch(), lambda path: path.symlink_to("nowhere")],
)
def test_start_is_refused_where_anything_has_that_name(spool, make):
    """An empty directory above all: a rename onto one succeeds."""
    make(spool / "r")
    with pytest.raises(RunExistsError):
        disk.create(spool)
    assert disk.tree(spool) == [".ended", ".running", "r"]


def test_simultaneous_starts_of_one_id_make_one_run(spool):
    rounds, starters = 30, 4

    def start(number, go):
        os.read(go, 1)
        try:
            run = disk.create(spool, f"r{number}")
        except RunExistsError:
            return
        os.write(run.streams["stdout"], b"won\n")
        disk.end(run)

    for number in range(rounds):
        go, told = os.pipe()
        pids = [
            disk.forked(lambda go=go, number=number: start(number, go)) for _ in range(starters)
        ]
        os.write(told, b"." * starters)
        assert [disk.waited(pid) for pid in pids] == [0] * starters
        os.close(go), os.close(told)
        assert (spool / f"r{number}" / "stdout").read_text() == "won\n"
    reaping.reap(str(spool))
    assert os.listdir(spool / ".running") == [] and sorted(os.listdir(spool / ".ended")) == sorted(
        f"r{number}" for number in range(rounds)
    )
    assert sorted(os.listdir(spool)) == sorted(
        [".running", ".ended", ".sweep.lock", *(f"r{number}" for number in range(rounds))]
    )


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("moment", ["mkdir", "symlink", "rename"])
def test_loser_of_a_race_never_takes_the_winners_entry(spool, monkeypatch, moment, ends):
    """
    Another start of the same id comes through, and perhaps to its end, just before a step of ours.
    """
    winner = []
    real = getattr(os, moment)

    def overtaken(*arguments, **fds):
        ours = moment == "symlink" or str(arguments[0]).endswith(".new")
        if ours and not winner:
            winner.append(None)
            winner[0] = disk.create(spool)
            if ends:
                disk.end(winner[0])
        return real(*arguments, **fds)

    replace_call(monkeypatch, moment, overtaken)
    with pytest.raises(RunExistsError):
        disk.create(spool)
    where = ".ended" if ends else ".running"
    assert os.listdir(spool / where) == ["r"] and sorted(os.listdir(spool)) == [
        ".ended",
        ".running",
        "r",
    ]
    assert os.listdir(spool / (".running" if ends else ".ended")) == []
    if not ends:
        assert disk.seen(spool) == (True, disk.seen(spool)[1])
        disk.end(winner[0])
        assert os.listdir(spool / ".ended") == ["r"]


def test_entry_that_two_starters_share_stays_while_one_is_at_work(spool):
    disk.create(spool, "other").close()
    os.symlink("../r", spool / ".running" / "r")
    with (
        disk.opened(spool) as spool_fd,
        Directory(spool / ".running") as at_work,
        Directory(spool / ".running") as running_fd,
    ):
        fcntl.flock(at_work, fcntl.LOCK_SH)
        assert not format.sweep_entry(spool_fd, running_fd, "r")
        fcntl.flock(at_work, fcntl.LOCK_UN)
        assert format.sweep_entry(spool_fd, running_fd, "r")
    assert os.listdir(spool / ".running") == ["other"]


def test_entry_of_a_run_that_has_not_ended_to_its_last_step_is_not_swept(spool):
    run = disk.create(spool)
    with disk.opened(spool) as spool_fd, Directory(spool / ".running") as running_fd:
        assert not format.sweep_entry(spool_fd, running_fd, "r")
        run.publish(disk.terminated(run))
        assert not format.sweep_entry(spool_fd, running_fd, "r"), (
            "the chaperone is about to move it"
        )
        run.close()
        assert not format.sweep_entry(spool_fd, running_fd, "r"), "reap is going to move it"
    assert os.listdir(spool / ".running") == ["r"]


def test_starter_killed_at_any_step_harms_nobody_after_it(spool):
    points = visible = 0
    for number in disk.crash_points(lambda: disk.create(spool, "r")):
        points = number
        if (spool / "r").exists():
            visible += 1
            assert disk.seen(spool)[1]["state"] in ("lost", "starting")
            with pytest.raises(RunExistsError):
                disk.create(spool)
        else:
            disk.end(disk.create(spool))
        reaping.reap(str(spool))
        assert disk.tree(spool) == sorted(
            [".ended", ".ended/r", ".running", "r", *(f"r/{name}" for name in ENDED_FILES)]
        )
        subprocess.run(["rm", "-r", str(spool / "r"), str(spool / ".ended" / "r")], check=True)
    assert points > 25 and 0 < visible < points


def test_spec_that_could_not_be_read_back_is_refused(spool, monkeypatch):
    made = disk.create(spool, "as-large-as-may-be")
    made.close()
    size = (spool / "as-large-as-may-be" / "spec.json").stat().st_size
    monkeypatch.setattr(jsontext, "LIMIT", size)
    before = disk.tree(spool)
    sentence = (
        "unable to create run 'r': want at most 64 MiB of JSON in 'spec.json', got "
        f"{size + 30} bytes"
    )
    labels = {"team": "etl" + "x" * (30 + len("as-large-as-may-be") - 1)}
    with pytest.raises(SpecError) as caught:
        disk.create(spool, labels=labels)
    assert (str(caught.value), disk.tree(spool)) == (sentence, before)


def test_failed_start_leaves_nothing(spool, monkeypatch):
    for number in range(1, 20):
        calls = 0
        real = os.open

        def failing(*arguments, number=number, real=real, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*arguments, **keywords)

        before = open_fds(str(spool))
        with monkeypatch.context() as patch:
            replace_call(patch, "open", failing)
            try:
                disk.end(disk.create(spool, f"r{number}"))
            except SpoolError as error:
                assert str(error).endswith("Too many open files") and error.errno in (
                    errno.EMFILE,
                    errno.ENOSPC,
                )
                assert (
                    not (spool / f"r{number}").exists()
                    and [name for name in os.listdir(spool) if name.endswith(".new")] == []
                )
                assert f"r{number}" not in (
                    os.listdir(spool / ".running") if (spool / ".running").exists() else []
                )
            else:
                assert calls > 11
                break
        assert open_fds(str(spool)) == before
    else:
        pytest.fail("a start has fewer opens than that")


def test_start_that_is_no_oserror_leaves_nothing(spool):
    with pytest.raises(TypeError):
        disk.create(spool, callback={"url": b"bytes"})
    assert disk.tree(spool) == [".ended", ".running"] and open_fds(str(spool)) == []


def test_modes_are_ours_alone_whatever_the_umask(tmp_path):
    def make():
        os.umask(0)
        run = disk.create(tmp_path / "new")
        disk.running(run)
        run.close()

    assert disk.waited(disk.forked(make)) == 0
    for name in ["", *disk.tree(tmp_path / "new")]:
        found = os.lstat(tmp_path / "new" / name)
        if not stat.S_ISLNK(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == (
                0o700 if stat.S_ISDIR(found.st_mode) else 0o600
            ), name


# -- W2: streams only grow


def test_streams_and_log_are_appended_to(spool):
    run = disk.create(spool)
    fds = [*run.streams.values(), run.log_fd, run.open_stream("stdout")]
    assert all(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND for fd in fds)
    os.write(run.streams["stdout"], b"one"), os.write(fds[-1], b"two")
    os.lseek(run.streams["stdout"], 0, os.SEEK_SET), os.write(run.streams["stdout"], b"three")
    assert (spool / "r" / "stdout").read_text() == "onetwothree"
    os.close(fds[-1])
    run.close()


def test_programs_own_fd_of_a_stream_blocks(spool):
    run = disk.create(spool)
    fd = run.open_stream("stdout")
    assert os.get_blocking(fd) and not os.get_inheritable(fd)
    os.close(fd)
    run.close()


# -- W3: JSON files are replaced whole; what is synced


@pytest.mark.once
def test_reader_never_sees_half_a_status(spool, request):
    run = disk.create(spool)
    run_fd = os.dup(run.fd)
    read, write = os.pipe()

    def keep_looking():
        os.close(write)
        last = seen = 0
        os.set_blocking(read, False)
        while True:
            try:
                if os.read(read, 1) == b"":
                    break
            except BlockingIOError:
                pass
            status = json.loads((spool / "r" / "running.json").read_bytes())
            assert status["pid"] % 500 == len(status["stop"]["by"]) and status["pid"] >= last
            seen += status["pid"] > last
            last = status["pid"]
            alive, found = look.look(run_fd, "r")
            assert alive and found["pid"] >= last
        assert seen > 50, seen

    status = disk.running(run, pid=0, stop={"by": ""})
    reader = disk.forked(keep_looking)
    os.close(read)
    for number in range(1, 10_001 if request.config.option.long else 4_001):
        assert (
            run.replace_running({**status, "pid": number, "stop": {"by": "x" * (number % 500)}})
            is None
        )
    os.close(write)
    assert disk.waited(reader) == 0
    os.close(run_fd)
    run.close()


def test_planted_file_is_not_written_into(spool, tmp_path):
    run = disk.create(spool)
    other = tmp_path / "other"
    other.write_text("mine")
    os.link(other, spool / "r" / ".running.json")
    disk.running(run)
    os.symlink(other, spool / "r" / ".running.json")
    disk.running(run)
    assert other.read_text() == "mine" and disk.seen(spool)[1]["state"] == "running"
    run.close()


@pytest.fixture
def calls(monkeypatch):
    """What is synced and made visible, by name; the random part of one is RANDOM."""
    made = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def call(first, *rest, name=name, real=real, **keywords):
            told = (
                os.path.basename(os.readlink(f"/proc/self/fd/{first}"))
                if name == "fsync"
                else f"{first} {rest[0]}"
            )
            made.append(f"{name} {BUILT.sub('.r.RANDOM.new', told)}")
            return real(first, *rest, **keywords)

        replace_call(monkeypatch, name, call)
    return made


def test_outcome_is_synced_before_it_appears(spool, calls):
    run = disk.create(spool)
    disk.running(run)
    assert calls == [
        "rename .running.json running.json",
        "rename .r.RANDOM.new r",
        "rename .running.json running.json",
    ]
    calls.clear()
    os.write(run.streams["stdout"], b"out"), os.write(run.streams["stderr"], b"err")
    disk.end(run)
    assert calls == [
        "fsync stdout",
        "fsync stderr",
        "fsync .status",
        "rename .status status.json",
        "rename r r",
    ]


def test_durable_run_has_its_start_and_its_directories_synced(spool, calls):
    run = disk.create(spool, durable=True)
    built = ".r.RANDOM.new"
    assert calls == [
        "fsync spec.json",
        "rename .running.json running.json",
        f"fsync {built}",
        f"rename {built} r",
        "fsync .running",
        "fsync spool",
    ]
    calls.clear()
    os.write(run.streams["stderr"], b"err")  # an empty stream has no end to lose
    disk.end(run, durable=True)
    assert calls == [
        "fsync stderr",
        "fsync .status",
        "rename .status status.json",
        "fsync r",
        "rename r r",
        "fsync .ended",
    ]
