"""
A spool that stalls, and processes of the far side that die alone.
"""

import contextlib
import hashlib
import os
import pathlib
import signal
import time

import pytest

from spool_tests.support.failures import children, name_of
from spool_tests.support.far import far_processes, log, session_of
from spool_tests.support.runs import final, py, running, sh, start, stdout
from spool_tests.support.waiting import until


def stalled(process, seconds):
    """A chaperone that does nothing, as one whose spool does not answer."""
    process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + seconds)
    finally:
        process.send_signal(signal.SIGCONT)


def test_spool_that_stalls_for_less_than_the_lease_loses_nothing(spool, sshd):
    text = (
        "import os,random,hashlib\nr=random.Random(7);h=hashlib.sha256()\n"
        "for _ in range(300):\n d=r.randbytes(r.randrange(1,70000));h.update(d)\n"
    )
    text += " while d: d=d[os.write(1,d):]\nos.write(2,h.hexdigest().encode())"
    process = start(
        spool,
        py(text),
        remote=sshd.remote(options={"ServerAliveInterval": 2, "ServerAliveCountMax": 2}),
        lease=60,
    )
    until(lambda: stdout(spool))
    stalled(process, 7)  # longer than the client waits for its keepalives
    assert process.wait(60) == 0
    status = final(spool)
    assert (
        status["state"],
        status["return_code"],
        status["signal"],
        status["stop"],
        status["complete"],
    ) == ("terminated", 0, None, None, True), log(spool)
    assert (
        hashlib.sha256(stdout(spool)).hexdigest().encode() == (spool / "r" / "stderr").read_bytes()
    )


def test_spool_that_stalls_for_longer_than_the_lease_ends_the_program(spool, sshd):
    process = start(
        spool,
        sh("echo up; exec sleep 1000"),
        remote=sshd.remote(),
        lease=4,  # less may be over before the program is there
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: not far_processes(spool))
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["stop"]["reason"]) == (
        "terminated",
        "SIGTERM",
        "lease",
    )
    assert "heard nothing for 4 s, its lease: it ends the program" in log(spool)


def parent(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def waiting_shell(program_pid):
    """
    W, as the text calls it: it waits for a subshell, that waits for awk, that waits for the
    program.
    """
    return parent(parent(parent(program_pid)))


def hearing_shell(program_pid):
    """R: beside W, with the lease's watchdog below it and nothing else."""
    below = waiting_shell(program_pid)
    while name_of(above := parent(below)) == "sh":
        for shell in children(above, "sh"):
            if shell != below and [name_of(child) for child in children(shell)] == ["sh"]:
                return shell
        below = above
    return None


LONG = pytest.mark.long  # they wait for heartbeats and for the patience after them
WAITING = "echo up; while [ ! -e go ]; do sleep 0.05; done; echo down"


@pytest.mark.parametrize("life", [pytest.param("kill", marks=LONG), "survive"])
def test_program_goes_on_without_the_shell_that_waits_for_it(life, spool, sshd, tmp_path):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"), share=False)
    process = start(
        spool, sh(WAITING, cwd=str(tmp_path)), remote=remote, on_disconnect=life, lease=8
    )
    until(lambda: stdout(spool))
    os.kill(waiting_shell(running(spool)["pid"]), signal.SIGKILL)
    (tmp_path / "go").touch()
    until(lambda: stdout(spool) == b"up\ndown\n")
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["signal"], status["complete"]) == (
        "lost",
        None,
        None,
        False,
    ), log(spool)
    assert (
        status["exception"]["message"]
        == "the part of the far side, which would report how the program ended, is gone"
    )
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", pytest.param("survive", marks=LONG)])
def test_program_is_ended_without_the_shell_that_hears_control_lines(life, spool, sshd, tmp_path):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"), share=False)
    process = start(
        spool,
        sh(WAITING, cwd=str(tmp_path)),
        remote=remote,
        on_disconnect=life,
        lease=8,
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    os.kill(until(lambda: hearing_shell(running(spool)["pid"])), signal.SIGKILL)
    until(lambda: not far_processes(spool))
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"]) == ("terminated", "SIGTERM"), log(spool)
    assert life == "survive" or not status["complete"]
    assert status["stop"]["reason"] == "disconnect"
    assert (
        "the far side can't hear us any more, as a part of it is gone: it ends the program"
        in log(spool)
    )
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_death_of_the_shell_that_sshd_started_is_the_end_of_the_connection(
    life, spool, sshd, tmp_path
):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"), share=False)
    process = start(
        spool,
        sh(f"trap '' TERM; {WAITING}", cwd=str(tmp_path)),
        remote=remote,
        on_disconnect=life,
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    (session,) = [
        pid for pid in session_of(sshd, running(spool)["connection"]["pid"]) if children(pid, "sh")
    ]
    os.kill(*children(session, "sh"), signal.SIGKILL)
    if life == "survive":
        until(
            lambda: (found := running(spool)["connection"])["drops"] and found["state"] == "up", 20
        )
        (tmp_path / "go").touch()
    assert process.wait(60) == 0
    status = final(spool)
    found = (
        status["state"],
        status["return_code"],
        status["signal"],
        status["complete"],
        (status["stop"] or {}).get("reason"),
    )
    assert found == (
        ("terminated", 0, None, True, None)
        if life == "survive"
        else ("terminated", None, "SIGKILL", False, "disconnect")
    ), log(spool)
    until(lambda: not far_processes(spool))
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_far_host_that_boots_anew_has_lost_the_run(life, spool, sshd, tmp_path):
    """
    As far as one machine can show it: all of the far side is killed at once, and the boot it noted
    is not the one that there is.
    """
    process = start(
        spool,
        sh("echo up; exec sleep 1000"),
        remote=sshd.remote(remote_dir=str(tmp_path / "far"), share=False),
        on_disconnect=life,
        lease=8,
    )
    until(lambda: stdout(spool))
    session = parent(running(spool)["pid"])
    while name_of(session) != "sshd":
        session = parent(session)
    everything = [session]
    for pid in everything:
        everything += children(pid)
    process.send_signal(signal.SIGSTOP)  # as long as it takes to boot
    for pid in everything:
        with contextlib.suppress(ProcessLookupError):  # a sleep that was over
            os.kill(pid, signal.SIGKILL)
    if life == "survive":
        (directory,) = (tmp_path / "far").glob("*")
        # Its number belongs to another process now.
        (directory / "reader").write_text(f"{os.getpid()} another-boot\n")
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"], status["return_code"], status["complete"]) == (
        "lost",
        True,
        None,
        False,
    ), log(spool)
    until(lambda: not far_processes(spool))
    until(lambda: list(tmp_path.glob("far/*")) == [])
