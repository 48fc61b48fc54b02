"""
Runs and a launcher of version 0.1, while they live, under this version.

Knows: the commit of 0.1, and git.  Must not know: the code of either version.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest

import chaperone as package
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once
COMMIT = "11d0241ad8d49d631f1e1fa06d957239a7026199"  # the last one whose version is 0.1.0
WAITS = "echo out; until [ -e {go} ]; do sleep 0.01; done; echo more; exit 3"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The command of 0.1: its argv."""
    git = subprocess.run(["git", "archive", COMMIT, "chaperone"], cwd=ROOT, capture_output=True)
    if git.returncode:
        pytest.skip(f"no history of this project is at hand: {git.stderr.decode()}")
    place = tmp_path_factory.mktemp("version-0.1")
    with tarfile.open(fileobj=io.BytesIO(git.stdout)) as archive:
        archive.extractall(place)
    argv = [sys.executable, "-I", "-S", str(place / "chaperone" / "__main__.py")]
    told = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == "chaperone 0.1.0\n"
    return argv


def start(old, spool, run_id, *words, **fields):
    """A run that 0.1 holds in the background, when its program has written."""
    spec = json.dumps({"id": run_id, **fields})
    words = words or ("--detach",)
    subprocess.run(
        [*old, "run", *words, "-"], input=spec, text=True, check=True, stdout=subprocess.DEVNULL
    )
    until(lambda: (spool / run_id / "stdout").read_bytes() == b"out\n")


@contextlib.contextmanager
def launcher_of(argv, spool):
    with subprocess.Popen([*argv, "launcher"], stdin=subprocess.DEVNULL) as launcher:
        until((spool / ".launcher").exists)
        yield launcher
        launcher.kill()


def listed(chaperone):
    told = chaperone("ls", "--all", "--json").stdout
    return {run["run_id"]: run["state"] for run in map(json.loads, told.splitlines())}


def test_live_runs_of_0_1_are_read_followed_stopped_and_reaped(old, spool, chaperone, tmp_path):
    go = tmp_path / "go"
    for run_id in ("followed", "stopped", "killed"):
        start(old, spool, run_id, program={"command": WAITS.format(go=go)})
    assert listed(chaperone) == dict.fromkeys(("followed", "killed", "stopped"), "running")
    status = json.loads(chaperone("status", "followed").stdout)
    assert (status["state"], status["stdout"]["bytes"]) == ("running", 4)

    assert chaperone("stop", "stopped").returncode == 0
    assert chaperone("wait", "stopped").returncode == 128 + signal.SIGTERM
    os.kill(json.loads(chaperone("status", "killed").stdout)["chaperone_pid"], signal.SIGKILL)
    with package.Spool(str(spool)).follow() as follower:
        ends, output = {}, b""
        while len(ends) < 3:
            event = follower.next(20)
            if isinstance(event, (package.Ended, package.Lost)):
                ends[event.run_id] = event.status.state
                go.touch()
            elif isinstance(event, package.Output) and event.run_id == "followed":
                output += event.data
    assert ends == {"followed": "terminated", "stopped": "terminated", "killed": "lost"}
    assert output == b"out\nmore\n"
    assert chaperone("reap").returncode == 0
    assert listed(chaperone) == {
        "followed": "terminated",
        "stopped": "terminated",
        "killed": "lost",
    }
    assert json.loads((spool / "killed" / "status.json").read_text())["state"] == "lost"


def test_run_that_outlived_its_chaperone_of_0_1_is_adopted(old, spool, chaperone, tmp_path):
    go = tmp_path / "go"
    program = {"command": WAITS.format(go=go)}
    start(old, spool, "left", program=program, on_disconnect="survive")
    pid = json.loads((spool / "left" / "running.json").read_text())["chaperone_pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: listed(chaperone) == {"left": "unattended"})
    assert chaperone("adopt", "--detach", "left").returncode == 0
    go.touch()
    assert chaperone("wait", "left").returncode == 3
    assert (spool / "left" / "stdout").read_bytes() == b"out\nmore\n"


def test_launcher_of_0_1_refuses_nobody(old, spool, chaperone, tmp_path):
    """
    It takes no spec of another version, because other code checked it; the run starts cold.
    """
    go = tmp_path / "go"
    program = {"command": WAITS.format(go=go)}
    with launcher_of(old, spool):
        start(old, spool, "theirs", "--warm", program=program)
        assert chaperone("run", "--warm", "-", spec={"id": "ours", "program": program}).stderr == ""
        assert listed(chaperone)["theirs"] == "running"
        assert chaperone("stop", "theirs").returncode == 0
        assert chaperone("wait", "theirs").returncode == 128 + signal.SIGTERM
        go.touch()
        assert chaperone("wait", "ours").returncode == 3


def test_launcher_of_this_version_refuses_no_client_of_0_1(old, spool, chaperone, tmp_path):
    go = tmp_path / "go"
    go.touch()
    with launcher_of([sys.executable, "-I", "-S", f"{ROOT}/chaperone/__main__.py"], spool):
        spec = json.dumps({"id": "theirs", "program": {"command": WAITS.format(go=go)}})
        subprocess.run(
            [*old, "run", "--warm", "-"],
            input=spec,
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        assert chaperone("wait", "theirs").returncode == 3
