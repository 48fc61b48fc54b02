"""A chaperone killed before each system call that changes something: what is on disk is true, and nothing runs on."""

import fcntl
import json
import os
import subprocess

import pytest

from chaperone import recover
from chaperone import spool as spools
from chaperone import status as statuses
from spool_tests import crash
from spool_tests.conftest import CHAPERONE, need, processes_with, until

SHARDS = 6  # so that the points spread over workers
PROGRAM = "echo x >> {mark}; echo out; echo err >&2; (setsid sleep 60 &) ; exit 3"


def command(spool, *words):
    return [*CHAPERONE, *words, "--spool", str(spool)]


def spec_file(directory, mark):
    path = directory / "spec.json"
    path.write_text(json.dumps({"id": "r", "program": {"command": PROGRAM.format(mark=mark)}, "stop": {"grace_period": 1}}))
    return str(path)


def looked(spool):
    """The state that a reader concludes; None where there is no run."""
    spool_fd = spools.open_spool(str(spool))
    try:
        if "r" not in spools.all_ids(spool_fd):
            return None
        run_fd = spools.open_run(spool_fd, "r")
        try:
            return spools.look(run_fd, "r")
        finally:
            os.close(run_fd)
    finally:
        os.close(spool_fd)


def started(mark):
    return len(mark.read_text()) // 2 if mark.exists() else 0


def nothing_lives(spool):
    """No process of the run, and no lock, is left."""
    spec = spool / "r" / "spec.json"
    if spec.exists():
        cookie = f"CHAPERONE_COOKIE={json.loads(spec.read_text())['key']}".encode()
        until(lambda: not processes_with(cookie), what="processes of a killed chaperone's run are gone")
    for path in spool.glob("*/lock"):
        with open(path) as lock:
            until(lambda lock=lock: flock(lock), what="the lock is free")


def flock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_after_kill(directory):
    """Everything that must hold, whatever the moment was."""
    spool, mark = directory / "spool", directory / "mark"
    if not spool.exists():
        return
    spec = spec_file(directory, mark)
    nothing_lives(spool)
    before, ran = looked(spool), started(mark)
    assert ran <= 1
    if before is not None:
        alive, status = before
        assert not alive and status["state"] in ("lost", "terminated")
        assert not (status["started"] is False and ran) and not (status["state"] == "terminated" and not ran)
        if status["state"] == "terminated":
            assert (status["return_code"], status["stdout"]["bytes"]) == (3, 4)
    else:
        assert not ran

    again = subprocess.run(command(spool, "run", spec), capture_output=True, text=True, timeout=30, check=False)
    if before is None:
        assert (again.returncode, again.stderr, started(mark)) == (0, "", 1)
    else:
        assert (again.returncode, again.stderr) == (os.EX_CANTCREAT, "chaperone: unable to create run 'r': it exists\n")
        assert started(mark) == ran

    recover.reap(str(spool))
    alive, status = looked(spool)
    assert not alive and json.loads((spool / "r" / "status.json").read_text())["state"] == status["state"] in statuses.FINAL
    if before is not None:
        assert status["state"] == before[1]["state"]
    left = {path.name for path in spool.iterdir()}
    assert left == {".running", ".ended", "r"}
    assert {path.name for path in (spool / "r").iterdir()} - {"log"} == {"spec.json", "status.json", "stdout", "stderr"}
    assert not list((spool / ".running").iterdir()) and [path.name for path in (spool / ".ended").iterdir()] == ["r"]
    for stream in ("stdout", "stderr"):
        assert (spool / "r" / stream).stat().st_size == status[stream]["bytes"]


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    need("strace")
    directory = tmp_path_factory.mktemp("points")
    return crash.points(command(directory / "spool", "run", spec_file(directory, directory / "mark")), directory)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_kill_before_each_call_leaves_a_true_spool(spool, tmp_path, points, shard):
    names = {name for name, _ in points}
    assert {"mkdirat", "symlinkat", "renameat", "pwrite64", "fsync", "unlinkat"} <= names and len(points) > 80
    assert names & {"clone", "clone3", "vfork", "fork"}
    killed = 0
    for number, point in list(enumerate(points))[shard::SHARDS]:
        directory = tmp_path / f"{number}-{point[0]}"
        directory.mkdir()
        killed += crash.killed_at(point, command(directory / "spool", "run", spec_file(directory, directory / "mark")), directory)
        try:
            check_after_kill(directory)
        except BaseException as error:
            error.add_note(f"killed before {point[0]} number {point[1]}") if hasattr(error, "add_note") else print(f"killed before {point}")
            raise
    print(f"{killed} crash points of {len(points)}")
    assert killed > len(points) / SHARDS * 0.8
