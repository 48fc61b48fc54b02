"""
Runs over ssh, and their processes on the far side.
"""

import contextlib
import json
import subprocess

import pytest

from spool_tests.support import sshd as server
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, start
from spool_tests.support.waiting import need, until

sudo = pytest.mark.root  # a plain user may not


def held(spool, sshd, program, run_id="r", remote=None, timeout=300, **spec):
    """Run to the end: the final status."""
    chaperone = start(spool, program, run_id, remote=remote or sshd.remote(), **spec)
    assert chaperone.wait(timeout) == 0
    return final(spool, run_id)


def log(spool, run_id="r"):
    path = spool / run_id / "log"
    return path.read_text() if path.exists() else ""


def far_processes(spool, run_id="r"):
    """
    What belongs to a run on the far side, and not to the same run of another test that runs now:
    {pid: command}.
    """
    key = json.loads((spool / run_id / "spec.json").read_text())["key"]
    found = processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode())
    return {
        pid: command for pid, command in found.items() if not command.startswith("grep ")
    }  # the far side's own search


def remotes(sshd, mode):
    need(*(["sudo"] if "sudo" in mode else []))
    return {
        "ssh-as": sshd.remote(),
        "ssh-then-sudo": sshd.remote(mode="ssh-then-sudo"),
        "sudo-then-ssh": sshd.remote(mode="sudo-then-ssh"),
        "sudo": {"mode": "sudo", "user": server.me()},
        "two ssh": {"hops": [{"ssh": {**sshd.remote()}}, {"ssh": {**sshd.remote()}}]},
    }[mode]


def assert_no_supervisor(sshd):
    with contextlib.suppress(AssertionError):
        until(lambda: not sshd.others())
    assert not sshd.others()


def port_of(sshd, client_pid):
    """The near end of a client's connection."""
    ports = subprocess.run(
        ["ss", "-Htnp", "dport", "=", f":{sshd.port}"], capture_output=True, text=True
    ).stdout
    return next(
        line.split()[3].rpartition(":")[2]
        for line in ports.splitlines()
        if f"pid={client_pid}," in line
    )


def session_of(sshd, client_pid):
    """The processes of sshd that serve one client, by its port."""
    found = subprocess.run(
        ["ss", "-Htnp", "sport", "=", f":{sshd.port}"], capture_output=True, text=True
    ).stdout
    local = port_of(sshd, client_pid)
    line = next(line for line in found.splitlines() if line.split()[4].endswith(f":{local}"))
    return [int(piece.partition(",")[0]) for piece in line.split("pid=")[1:]]
