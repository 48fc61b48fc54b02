"""
What is asked before the program runs, and parts of the far side that are killed: what the torture
of random trees (whole/test_torture.py) has found.
"""

import contextlib
import functools
import os
import pathlib
import signal

import pytest

from spool_tests.support import surviving
from spool_tests.support.failures import children, name_of
from spool_tests.support.far import log
from spool_tests.support.oracle import is_living
from spool_tests.support.runs import ask, final, live, running, sh, start, stdout
from spool_tests.support.surviving import connected
from spool_tests.support.waiting import until

remote = surviving.remote
WAITING = "echo up; while [ ! -e go ]; do sleep 0.05; done; echo down; exit 3"
LONG = functools.partial(pytest.param, marks=pytest.mark.long)  # they wait for heartbeats
LEAVING = "(env -i setsid sleep 1000 & echo $!)"


def parent(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def started_at(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def shell_of(spool):
    """S, as the supervisor's text calls it: the first shell above the program."""
    shells = [running(spool)["pid"]]
    while name_of(shells[-1]) not in ("sshd", "python", "python3", "systemd"):
        shells.append(parent(shells[-1]))
    return shells[-2]


def hearing_shell(spool):
    """R, a child of S with the watchdog of the lease below it, which sleeps."""
    for shell in children(shell_of(spool), "sh"):
        below = [name_of(pid) for child in children(shell) for pid in children(child)]
        if below == ["sleep"]:
            return shell


def attached_shell(spool):
    """A, a child of S with three that copy below it."""
    for shell in children(shell_of(spool), "sh"):
        if [name_of(child) for child in children(shell)] == ["tail"] * 3:
            return shell


def copied_by(pids):
    """The file that each of some tails has open, by its name; none before all have one."""
    with contextlib.suppress(FileNotFoundError):
        return {os.path.basename(os.readlink(f"/proc/{pid}/fd/3")): pid for pid in pids}


@pytest.fixture(params=["survive", "kill"])
def slow(request, tmp_path, monkeypatch):
    """
    Fields of a spec whose far side has its payload and does not start the program before `go`.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    tools = tmp_path / "tools"
    tools.mkdir()
    texts = {
        "awk": 'touch $0.waits; while [ ! -e $0.go ]; do sleep 0.02; done; exec /usr/bin/awk "$@"',
        "ssh": 'for last; do :; done; eval "$last"',
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    if request.param == "kill":
        return {"remote": {"host": "there"}}
    return {"on_disconnect": "survive", "lease": 20}


@pytest.mark.parametrize(
    "line, number, how", [("stop 20", "SIGTERM", "SIGTERM"), ("kill", "SIGKILL", "SIGKILL")]
)
def test_what_is_asked_before_the_start_is_done_at_the_start(
    spool, slow, tmp_path, line, number, how
):
    process = start(spool, {"argv": ["sleep", "1000"]}, **slow, stop={"grace_period": 20})
    until((tmp_path / "tools" / "awk.waits").exists)
    ask(spool, f"{line} by=me")
    until(lambda: live(spool)["stop"])
    (tmp_path / "tools" / "awk.go").touch()
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["stop"]["signal"], status["complete"]) == (
        "terminated",
        how,
        number,
        True,
    ), log(spool)
    assert status["stop"]["by"] == "me"


def test_kill_that_was_written_as_the_connection_broke_is_asked_again(spool, remote, tmp_path):
    process = start(spool, sh(WAITING, cwd=str(tmp_path)), remote=remote, on_disconnect="survive")
    until(lambda: stdout(spool) == b"up\n")
    attached = until(lambda: attached_shell(spool))
    client = live(spool)["connection"]["pid"]
    os.kill(attached, signal.SIGSTOP)
    ask(spool, "kill")
    until(lambda: live(spool)["stop"])
    for pid in (*children(attached), attached):
        os.kill(pid, signal.SIGKILL)
    if remote:
        with contextlib.suppress(ProcessLookupError):  # it ended with those
            os.kill(client, signal.SIGKILL)
    assert process.wait(60) == 0
    assert final(spool)["signal"] == "SIGKILL", log(spool)


@pytest.mark.parametrize("part", [LONG("copies out"), LONG("copies said"), "is attached"])
def test_part_that_connects_is_replaced(spool, remote, tmp_path, part):
    """No end of a connection shows it; unanswered heartbeats do. What is lost is had again."""
    process = start(
        spool,
        sh(f"{LEAVING}; {WAITING}", cwd=str(tmp_path)),
        remote=remote,
        on_disconnect="survive",
        lease=12,  # less, and a busy host does not connect again before it is over
    )
    until(lambda: stdout(spool).endswith(b"up\n"))
    left, first = int(stdout(spool).split()[0]), shell_of(spool)
    born = started_at(left)
    attached = until(lambda: attached_shell(spool))
    copying = until(lambda: copied_by(children(attached)))
    os.kill(attached if part == "is attached" else copying[part.split()[1]], signal.SIGKILL)
    until(lambda: live(spool)["connection"]["drops"] and connected(spool))
    assert name_of(first) == "sh"
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["return_code"], status["complete"], status["leftovers"]) == (3, True, 1)
    assert stdout(spool) == f"{left}\nup\ndown\n".encode()
    assert not is_living(left, born)


def test_output_that_a_killed_part_lost_is_not_called_complete(spool, remote, tmp_path):
    process = start(spool, sh(WAITING, cwd=str(tmp_path)), remote=remote, on_disconnect="survive")
    until(lambda: stdout(spool) == b"up\n")
    writers = [
        pid
        for pid in processes_below(shell_of(spool))
        if name_of(pid) == "cat" and os.readlink(f"/proc/{pid}/fd/1").endswith("/out")
    ]
    os.kill(*writers, signal.SIGKILL)
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert final(spool)["complete"] is False
    assert "the file 'out' of the far side's directory was damaged" in log(spool)


def processes_below(pid):
    found = [pid]
    for one in found:
        found += children(one)
    return found[1:]


def test_what_is_left_alone_by_a_hop_that_has_exited_keeps_nobody_waiting(spool):
    """It holds the pipes of the hop."""
    process = start(
        spool,
        sh("sleep 1000 & echo $!; exit 3"),
        remote={"hops": [{"exec": {"argv": ["env"]}}]},
        leftovers="leave",
    )
    left = until(lambda: int(stdout(spool) or 0))
    try:
        assert process.wait(60) == 0
        status = final(spool)
        assert (status["return_code"], status["leftovers"], status["complete"]) == (3, 1, True)
    finally:
        os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("life", ["kill", LONG("survive")])
def test_what_hid_is_ended_though_the_program_ended_with_the_part_that_hears(
    spool, sshd, tmp_path, life
):
    """What finds it needs the first shell, which had nothing more to wait for."""
    process = start(
        spool,
        sh(f"{LEAVING}; {WAITING}", cwd=str(tmp_path)),
        remote=sshd.remote(remote_dir=str(tmp_path / "far")),
        on_disconnect=life,
        lease=8,
        stop={"grace_period": 0},
    )
    until(lambda: stdout(spool).endswith(b"up\n"))
    left = int(stdout(spool).split()[0])
    born = started_at(left)
    os.kill(until(lambda: hearing_shell(spool)), signal.SIGKILL)
    (tmp_path / "go").touch()
    until(lambda: not is_living(left, born))
    assert process.wait(60) == 0
    assert final(spool)["return_code"] == 3, log(spool)
    until(lambda: list(tmp_path.glob("far/*")) == [])
