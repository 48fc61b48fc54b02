"""
How a run ends on disk (W4), and the room for its outcome (W5).
"""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from chaperone.model import jsontext
from chaperone.model import status as statuses
from chaperone.spool import format, run_directory
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.directories import ENDED_FILES
from spool_tests.support.places import ROOT
from spool_tests.support.processes import open_fds
from spool_tests.support.waiting import absent, need

# -- W4: how a run ends


def test_ending_goes_in_its_order(spool, monkeypatch):
    run = disk.create(spool)
    lock_fd = run.lock_fd
    recorded = disk.Calls(monkeypatch)
    disk.end(run)
    order = [
        call[:2]
        for call in recorded.made
        if call[0] in ("rename", "unlink") or call == ("close", lock_fd)
    ]
    assert order == [
        ("rename", ".status"),
        ("unlink", "control"),
        ("unlink", "running.json"),
        ("unlink", ".running.json"),
        ("unlink", ".status"),
        ("unlink", "log"),
        ("rename", "r"),
        ("unlink", "lock"),
        ("close", lock_fd),
    ]
    assert ("flock", lock_fd) not in recorded.named("flock"), (
        "it is let go by its close, and not before"
    )
    assert disk.tree(spool) == sorted(
        [".ended", ".ended/r", ".running", "r", *(f"r/{name}" for name in ENDED_FILES)]
    )
    assert open_fds(str(spool)) == []


def test_log_with_words_in_it_stays(spool):
    run = disk.create(spool)
    os.write(run.log_fd, b"word\n")
    disk.end(run)
    assert sorted(os.listdir(spool / "r")) == sorted([*ENDED_FILES, "log"])


def test_run_ends_where_it_is_and_not_where_it_was(spool, tmp_path):
    """
    By fds: a directory or a spool that was moved still gets its outcome, and what took its place
    gets none.
    """
    run = disk.create(spool)
    os.rename(spool, tmp_path / "moved")
    spool.mkdir(0o700)
    os.rename(tmp_path / "moved" / "r", tmp_path / "moved" / "s")
    disk.end(run)
    assert (
        disk.tree(spool) == []
        and (tmp_path / "moved" / "s" / "status.json").exists()
        and os.listdir(tmp_path / "moved" / ".ended") == ["r"]
    )


def test_chaperone_killed_at_any_step_of_the_end_leaves_an_outcome_to_finish(spool):
    points, states = 0, []

    def whole():
        run = disk.create(spool)
        disk.running(run)
        os.write(run.streams["stdout"], b"out")
        disk.end(run, code=3)

    start = None
    for number in disk.crash_points(whole):
        points = number
        if (spool / "r").exists():
            start = start or number
            before = disk.seen(spool)
            assert not before[0] and before[1]["state"] in ("lost", "terminated")
            states.append(before[1]["state"])
            reaping.reap(str(spool))
            alive, after = disk.seen(spool)
            assert (
                not alive
                and after["state"] == before[1]["state"]
                and after["stdout"]["bytes"] == os.stat(spool / "r" / "stdout").st_size
            )
            if after["state"] == "terminated":
                assert after["return_code"] == 3 and after["stdout"]["bytes"] == 3
        reaping.reap(str(spool))
        ended = (
            [".ended/r", "r", *(f"r/{name}" for name in ENDED_FILES)]
            if (spool / "r").exists()
            else []
        )
        assert disk.tree(spool) == sorted(
            [".ended", ".running", *ended][: None if (spool / ".running").exists() else 0]
        )
        subprocess.run(["rm", "-rf", str(spool / "r"), str(spool / ".ended" / "r")], check=True)
    assert (
        {"lost", "terminated"} == set(states)
        and states.index("terminated") > 10
        and len(states) - states.index("terminated") > 10
    )
    assert states == sorted(states), "once it has an outcome it keeps it"
    assert points > 50


def test_entry_that_cant_be_moved_leaves_the_ending_to_reap(spool, monkeypatch):
    run = disk.create(spool)
    real = os.rename

    def refusing(source, target, **fds):
        if target == "r":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target, **fds)

    with monkeypatch.context() as patch:
        replace_call(patch, "rename", refusing)
        disk.end(run)
    assert (
        disk.seen(spool)[1]["state"] == "terminated"
        and "lock" in os.listdir(spool / "r")
        and os.listdir(spool / ".running") == ["r"]
    )
    assert [found.done for found in reaping.reap(str(spool))] == ["finished"]
    assert sorted(os.listdir(spool / "r")) == ENDED_FILES and os.listdir(spool / ".ended") == ["r"]


# -- W5: room for the outcome


SMALL = """
import errno, os, sys, time
from chaperone import cpython
from chaperone.model import jsontext
from chaperone.model import status as statuses
from chaperone.model import transitions
from chaperone.spool import format, look
from spool_tests.support import disk

spool = sys.argv[1] + "/spool"
os.mkdir(spool, 0o700)
run = disk.create(spool, "r", labels={"team": "\\U0001f600" * 4000})
before = disk.running(run)
def fill():
    with open(sys.argv[1] + "/filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    try:
        while True:
            os.mkdir(f"{sys.argv[1]}/{os.urandom(8).hex()}")
    except OSError as error:
        assert error.errno == errno.ENOSPC
fill()
told = run.replace_running({**before, "pid": 1})
assert told == "unable to replace 'running.json': No space left on device", told
assert disk.seen(spool)[1]["pid"] == 4711
fill()
face = "\\U0001f600"
status = transitions.stopping(before, "SIGTERM", "request", face * 5000, time.time_ns())
connection = {"argv": ["'" * 100000], "pid": 1, "drops": 0, "state": "down", "since": None}
status = {**status, "labels": {"team": face * 4000}, "connection": connection}
final = transitions.lost(status, "\\U0001f600" * 5000, None, time.time_ns())
real = os.ftruncate
def truncated(fd, length):  # whatever room is given up, somebody else takes at once
    real(fd, length)
    fill()
cpython.os.ftruncate = truncated
run.publish(final)
run.end()
alive, found = disk.seen(spool)
told = (alive, found["state"], found["pid"], found["stop"]["reason"])
assert told == (False, "lost", 4711, "request"), found
assert found["exception"]["message"].startswith(face * 600)
assert found["labels"]["team"] == face * 4000
assert found["connection"]["argv"] is None and found["connection"]["pid"] == 1
assert os.listdir(spool + "/.ended") == ["r"]
assert sorted(os.listdir(spool + "/r")) == ["spec.json", "status.json", "stderr", "stdout"]
print("kept")
"""


def mounted(script, options, directory):
    """Run Python on a small tmpfs of its own, which nobody else sees; what it printed."""
    need("unshare", "mount")
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        absent("needs a mount namespace: unshare -Urm is not allowed here")
    script = f"import os\n{textwrap.dedent(script)}"
    words = [
        "sh",
        "-c",
        'mount -t tmpfs -o "$1" tmpfs "$2" && exec "$3" -c "$4" "$2"',
        "sh",
        options,
        str(directory),
        sys.executable,
        script,
    ]
    done = subprocess.run(
        [*namespace, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ROOT},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options", ["size=1m,nr_inodes=200,mode=700", "size=8m,nr_inodes=40,mode=700"]
)
def test_full_disk_does_not_eat_the_outcome(tmp_path, options):
    assert mounted(SMALL, options, tmp_path) == "kept\n"


def test_start_without_room_for_the_outcome_is_refused(tmp_path):
    script = """
    import sys
    from chaperone.errors import SpoolError
    from spool_tests.support import disk
    spool = sys.argv[1] + "/spool"
    os.mkdir(spool, 0o700)
    try:
        disk.create(spool, labels={"l": "x" * 200_000})
    except SpoolError as error:
        print(error)
    print(disk.tree(spool))
    """
    sentence = (
        "unable to create run 'r' in spool '{}/spool': No space left on device\n"
        "['.ended', '.running']\n"
    )
    assert mounted(script, "size=64k,mode=700", tmp_path) == sentence.format(tmp_path)


def test_room_is_secured_before_the_run_appears(spool):
    run = disk.create(spool)
    found = os.stat(spool / "r" / ".status")
    assert found.st_size >= format.RESERVE and found.st_blocks * 512 >= found.st_size
    run.close()


def test_nothing_that_fails_in_bookkeeping_is_raised(spool):
    run = disk.create(spool)
    os.mkdir(spool / "r" / ".running.json")
    assert (
        run.replace_running(disk.starting(disk.spec()))
        == "unable to replace 'running.json': Is a directory"
    )
    os.rmdir(spool / "r" / ".running.json")
    disk.end(run)


def test_log_that_a_disk_refused_for_long_goes_on_with_whole_lines(spool):
    """
    The first of them are kept; what is said once the disk takes bytes again is there in any case.
    """
    run = disk.create(spool)
    log, full = os.dup(run.log_fd), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, run.log_fd, inheritable=False)
    lines = [b"line %d\n" % number for number in range(run_directory.UNWRITTEN_BYTES // 8)]
    assert not any(run.tell(line) for line in lines)
    os.dup2(log, run.log_fd, inheritable=False)
    assert run.tell(b"again\n") and run.tell(b"and again\n")
    *kept, again, last = (spool / "r" / "log").read_bytes().splitlines(keepends=True)
    assert (kept, again, last) == (lines[: len(kept)], b"again\n", b"and again\n")
    assert (
        run_directory.UNWRITTEN_BYTES - len(lines[-1])
        < len(b"".join(kept))
        <= run_directory.UNWRITTEN_BYTES
    )
    run.close()
    os.close(log)
    os.close(full)


def test_directory_that_was_removed_is_told(spool):
    run = disk.create(spool)
    assert run.is_there()
    subprocess.run(["rm", "-r", str(spool / "r")], check=True)
    assert not run.is_there()
    with pytest.raises(FileNotFoundError):
        run.publish(disk.terminated(run))
    run.close()


def test_statuses_are_read_back_as_they_were_written(spool):
    run = disk.create(spool)
    status = disk.running(run)
    assert disk.seen(spool) == (True, status)
    final = disk.terminated(run, 7)
    run.publish(final)
    assert disk.seen(spool) == (False, final)
    run.end()
    assert (
        jsontext.loads((spool / "r" / "status.json").read_bytes()) == final == disk.seen(spool)[1]
    )
    assert statuses.exit_code(final) == 7
