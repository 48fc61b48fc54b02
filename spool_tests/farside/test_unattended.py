"""
A run whose chaperone died goes on, is adopted, stopped, or ended by its lease.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import uuid

import pytest

from spool_tests.support import surviving
from spool_tests.support.far import far_processes, log
from spool_tests.support.places import ROOT
from spool_tests.support.runs import final, sh, start, stdout
from spool_tests.support.surviving import ADOPT, adopt, connected, ended
from spool_tests.support.waiting import until

remote = surviving.remote


@pytest.mark.parametrize("program", [sh("exit 3"), {"argv": ["no-such"]}])
def test_far_side_forgets_a_run_only_when_its_end_is_published(spool, remote, tmp_path, program):
    process = start(spool, program, remote=remote, on_disconnect="survive")
    until(lambda: list((tmp_path / ".chaperone").glob("*")) or ended(spool))
    until(lambda: not list((tmp_path / ".chaperone").glob("*")))
    assert ended(spool)
    assert process.wait(60) == 0


def test_run_whose_chaperone_died_is_unattended_and_goes_on(spool, remote, chaperone):
    process = start(
        spool,
        sh("echo one; while [ ! -e go ]; do sleep 0.05; done; echo two; exit 5", cwd=str(spool)),
        remote=remote,
        on_disconnect="survive",
    )
    until(lambda: stdout(spool) == b"one\n")
    pid = connected(spool)["pid"]
    process.kill()
    process.wait()
    until(lambda: json.loads(chaperone("status", "r").stdout)["state"] == "unattended")
    os.kill(pid, 0)
    (spool / "go").touch()
    until(lambda: not far_processes(spool))
    (spool / "go").unlink()
    assert adopt(spool).wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == (
        "terminated",
        5,
        True,
    ), log(spool)
    assert stdout(spool) == b"one\ntwo\n"


def test_run_of_a_service_without_home_is_adopted_from_a_terminal_and_back(
    spool, tmp_path, monkeypatch
):
    """
    As a unit of systemd: HOME is not set, and yet both mean the home that the user database names.
    """
    home = pwd.getpwuid(os.geteuid()).pw_dir
    was_there = os.path.exists(f"{home}/.chaperone")
    for who in ("starter", "adopter"):
        monkeypatch.delenv("HOME", raising=False) if who == "starter" else monkeypatch.setenv(
            "HOME", home
        )
        run_id, script = (
            f"{who}-{uuid.uuid4().hex[:8]}",
            "echo up; while [ ! -e go ]; do sleep 0.05; done; exit 5",
        )
        process = start(
            spool, sh(script, cwd=str(tmp_path)), run_id, on_disconnect="survive", lease=60
        )
        until(lambda run_id=run_id: stdout(spool, run_id))
        connected(spool, run_id)
        process.kill()
        process.wait()
        monkeypatch.setenv("HOME", home) if who == "starter" else monkeypatch.delenv("HOME")
        process = adopt(spool, run_id)
        (tmp_path / "go").touch()
        assert process.wait(60) == 0
        (tmp_path / "go").unlink()
        assert (final(spool, run_id)["state"], final(spool, run_id)["return_code"]) == (
            "terminated",
            5,
        ), log(spool, run_id)
        assert not [name for name in os.listdir(f"{home}/.chaperone") if name.startswith(run_id)]
    if not was_there:
        with contextlib.suppress(OSError):  # another test's run is in it by now
            os.rmdir(f"{home}/.chaperone")


def test_stop_reaches_an_adopted_program(spool, remote, chaperone):
    process = start(
        spool,
        sh("trap '' TERM; echo up; while :; do sleep 0.05; done"),
        remote=remote,
        on_disconnect="survive",
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool) == b"up\n")
    process.kill()
    process.wait()
    process = adopt(spool)
    connected(spool)
    assert chaperone("stop", "r").returncode == 0
    assert process.wait(60) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["reason"]) == ("SIGKILL", "request")


def test_lease_ends_what_nobody_asks_for(spool, remote, chaperone):
    program = sh("trap '' TERM; echo up; while :; do sleep 0.05; done")
    process = start(
        spool, program, remote=remote, on_disconnect="survive", lease=5, stop={"grace_period": 0.2}
    )
    until(lambda: stdout(spool) == b"up\n")
    process.kill()
    process.wait()
    until(lambda: not far_processes(spool))
    until(lambda: json.loads(chaperone("status", "r").stdout)["state"] == "lost")
    assert chaperone("reap").returncode == 0
    status = final(spool)
    assert (status["state"], status["return_code"]) == ("lost", None)
    assert status["exception"]["message"].endswith(", and its lease is over") and status["gone_by"]


def test_leftovers_are_ended_or_left_where_it_survives(spool, remote):
    for number, leftovers in enumerate(("stop", "leave")):
        spec = {"remote": remote, "on_disconnect": "survive", "leftovers": leftovers}
        assert (
            start(
                spool, sh("sleep 1000 & setsid sleep 1000 & echo out; exit 3"), f"r{number}", **spec
            ).wait(30)
            == 0
        )
        left = far_processes(spool, f"r{number}")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        status = final(spool, f"r{number}")
        assert (status["return_code"], status["leftovers"], status["complete"], len(left)) == (
            3,
            2,
            True,
            2 * number,
        ), log(spool, f"r{number}")
        assert stdout(spool, f"r{number}") == b"out\n"


def test_program_that_opens_its_output_anew_loses_nothing(spool, remote):
    process = start(
        spool,
        sh("echo one; echo two > /dev/stdout; echo three"),
        remote=remote,
        on_disconnect="survive",
    )
    assert process.wait(60) == 0
    assert stdout(spool) == b"one\ntwo\nthree\n"


def test_failure_to_start_is_told_where_it_survives_too(spool, remote):
    assert start(spool, {"argv": ["no-such"]}, remote=remote, on_disconnect="survive").wait(60) == 0
    status = final(spool)
    assert (status["state"], status["exception"]["message"], status["started"]) == (
        "error",
        "unable to run 'no-such': not found on the far side",
        False,
    )


BRIEF = ADOPT.replace(
    "inherited =", "from chaperone.farside import contact\ncontact.DEAD_S = 2\ninherited ="
)  # it need not wait long for what is gone
LOST, WHOLE, SHORT = ("lost", None, False), ("terminated", 3, True), ("terminated", 3, False)
DAMAGES = {  # to a program that still runs, and to one that has ended meanwhile
    ("out", "gone"): (SHORT, SHORT),
    ("out", "empty"): (SHORT, SHORT),
    ("out", "other"): (SHORT, SHORT),
    ("err", "gone"): (SHORT, SHORT),
    ("err", "empty"): (SHORT, SHORT),
    ("said", "gone"): (LOST, LOST),
    ("said", "empty"): (WHOLE, LOST),
    ("said", "copy"): (LOST, WHOLE),
    ("control", "gone"): (LOST, WHOLE),
    ("control", "empty"): (LOST, WHOLE),
    ("control", "copy"): (LOST, WHOLE),
    ("control", "other"): (LOST, WHOLE),
}


def damage(path, how):
    """To a file that the far side holds open; `copy` and `other` are not that file any more."""
    data = None if path.is_fifo() else path.read_bytes()
    if how != "empty" or data is None:
        path.unlink()
    if how == "other":
        path.mkdir()
    elif how == "copy" and data is None:
        os.mkfifo(path)
    elif how != "gone":
        path.write_bytes(data or b"" if how == "copy" else b"")


PLACED = [("here", *case) for case in DAMAGES] + [
    pytest.param("ssh", *case, marks=[] if case[1] == "gone" else pytest.mark.long)
    for case in DAMAGES
]


@pytest.mark.once
@pytest.mark.parametrize("over", [False, True], ids=["running", "over"])
@pytest.mark.parametrize("remote, name, how", PLACED, indirect=["remote"])
def test_adopter_comes_to_an_end_whatever_is_damaged_over_there(
    spool, remote, tmp_path, name, how, over
):
    program = sh(f"echo out; echo err >&2; until [ -e {tmp_path}/go ]; do sleep 0.01; done; exit 3")
    process = start(
        spool, program, remote=remote, on_disconnect="survive", lease=8, stop={"grace_period": 0.2}
    )
    until(lambda: stdout(spool) and (spool / "r" / "stderr").read_bytes())
    connected(spool)
    process.kill()
    process.wait()
    (directory,) = (tmp_path / ".chaperone").iterdir()
    if over:
        (tmp_path / "go").touch()
        until(lambda: b" eof " in (directory / "said").read_bytes())
    damage(directory / name, how)
    adopter = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", BRIEF, ROOT, str(spool), "r"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert adopter.stdout.readline() == "r\n"
    adopter.stdout.close()
    try:
        if DAMAGES[name, how][0] != LOST:
            connected(spool)
            (tmp_path / "go").touch()
        assert adopter.wait(60) == 0
    finally:
        if adopter.poll() is None:
            adopter.kill()
            adopter.wait()
            (tmp_path / "go").touch()
            shutil.rmtree(directory)
    status = final(spool)
    found = (status["state"], status["return_code"], status["complete"])
    # It was ended because it could not be controlled, and there was time to hear of that.
    if found != LOST and DAMAGES[name, how][over] == LOST:
        assert (name, status["state"], status["complete"]) == (
            "control",
            "terminated",
            False,
        ) and status["signal"]
    else:
        assert found == DAMAGES[name, how][over], log(spool)
    assert found == WHOLE or repr(name) in log(spool)
    assert found != LOST or repr(name) in status["exception"]["message"]
    until(lambda: not far_processes(spool))
