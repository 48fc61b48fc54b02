"""Runs that survive their connection and their chaperone."""

import contextlib
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from chaperone.model import status as statuses
from spool_tests.support import surviving
from spool_tests.support.far import far_processes, log, port_of, session_of
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, live, sh, start, stdout
from spool_tests.support.surviving import adopt, booted_anew, connected
from spool_tests.support.waiting import until

remote = surviving.remote


def test_program_that_may_survive_ends_as_any_other(spool, remote):
    process = start(
        spool,
        sh("echo out; cat; echo err >&2; exit 7", stdin="in\n"),
        remote=remote,
        on_disconnect="survive",
    )
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"], status["leftovers"]) == (
        "terminated",
        7,
        True,
        0,
    ), log(spool)
    assert stdout(spool) == b"out\nin\n"
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"


def cut(there, client_pid, way):
    """Kill one end of a connection."""
    with contextlib.suppress(ProcessLookupError, StopIteration, IndexError):  # it was gone already
        if way == "client":
            os.kill(client_pid, signal.SIGKILL)
        elif there.address == "127.0.0.1":
            for pid in session_of(there, client_pid):
                os.kill(pid, signal.SIGKILL)
        else:  # in its namespace there is no session but ours
            there.kill_sessions()


def pull(network, spool):
    """No packet comes through until the chaperone's client has noticed."""
    network.cut()
    try:
        until(lambda: live(spool)["connection"]["state"] == "down")
    finally:
        network.heal()


WRITER = """
import os, random, hashlib, time, sys
r = random.Random(int(sys.argv[1])); left = [int(sys.argv[2]), int(sys.argv[3])]
sums = [hashlib.sha256(), hashlib.sha256()]
total = sum(left); slow = float(sys.argv[4]) / total
while max(left) > 0 or not os.path.exists(sys.argv[6]):
    which = int(r.random() * total >= total - int(sys.argv[3]))
    data = r.randbytes(r.randrange(1, 70000))
    left[which] -= len(data); sums[which].update(data)
    time.sleep(len(data) * slow)
    while data: data = data[os.write(which + 1, data):]
sizes = [int(size) - rest for size, rest in zip(sys.argv[2:4], left)]
open(sys.argv[5], 'w').write(' '.join([*(s.hexdigest() for s in sums), *map(str, sizes)]))
sys.exit(44)
"""


@pytest.mark.parametrize("place", ["here", "ssh", pytest.param("network", marks=pytest.mark.root)])
def test_no_byte_is_lost_or_doubled_by_cuts_and_deaths(
    place, spool, request, tmp_path, monkeypatch
):
    """
    Cuts of every kind, and deaths of the chaperone, each at a random moment of a program that
    writes until all of them were made.

    A cut is the client's death, that of sshd's session, or (network) packets dropped in silence
    until the client gives up.
    """
    long = request.config.option.long
    sizes, cuts, deaths, duration = (
        ((100_000_000, 2_000_000), 40, 5, 60) if long else ((5_000_000, 500_000), 6, 2, 4)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    directory, sums, enough = tmp_path / ".chaperone", tmp_path / "sums", tmp_path / "enough"
    there, ways, remote = None, [], None  # a pipe here is never cut
    if place != "here":
        there = (
            request.getfixturevalue("sshd")
            if place == "ssh"
            else request.getfixturevalue("network").sshd
        )
        ways = ["client", "session", "packets"] if place == "network" else ["client", "session"]
        remote = there.remote(
            remote_dir=str(directory),
            options={"ServerAliveInterval": 1, "ServerAliveCountMax": 2},
            share=False,
        )
    chance = random.Random(3)
    events = ["death"] * deaths + [
        ways[number % len(ways)] for number in range(cuts if ways else 0)
    ]
    chance.shuffle(events)
    argv = [
        "/usr/bin/python3",
        "-I",
        "-S",
        "-c",
        WRITER,
        "7",
        *map(str, (*sizes, duration, sums, enough)),
    ]
    chaperone = start(spool, {"argv": argv}, remote=remote, on_disconnect="survive", lease=300)
    for event in events:
        status = connected(spool)
        goal = (spool / "r" / "stdout").stat().st_size + chance.randrange(200_000)
        until(lambda goal=goal: (spool / "r" / "stdout").stat().st_size > goal, 60)
        if event == "death":
            chaperone.kill()
            chaperone.wait()
            chaperone = adopt(spool)
        elif event == "packets":
            pull(request.getfixturevalue("network"), spool)
        else:
            cut(there, status["connection"]["pid"], event)
        drops = status["connection"]["drops"]
        until(lambda drops=drops: connected(spool)["connection"]["drops"] > drops, 60)
    enough.touch()
    assert chaperone.wait(60 + duration) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == (
        "terminated",
        44,
        True,
    ), log(spool)
    *written, stdout_size, stderr_size = sums.read_text().split()
    assert [
        hashlib.sha256((spool / "r" / name).read_bytes()).hexdigest()
        for name in ("stdout", "stderr")
    ] == written
    assert (status["stdout"]["bytes"], status["stderr"]["bytes"]) == (
        int(stdout_size),
        int(stderr_size),
    )
    assert int(stdout_size) >= sizes[0] and int(stderr_size) >= sizes[1]
    assert status["connection"]["drops"] >= len(events)
    until(lambda: list(directory.glob("*")) == [])
    assert not far_processes(spool)
    counts = ", ".join(f"{events.count(event)} x {event}" for event in sorted(set(events)))
    print(f"{stdout_size} and {stderr_size} bytes, {counts}, {status['connection']['drops']} drops")


@pytest.mark.root
def test_status_shows_whether_the_connection_is_up_or_down_since_when_and_until_when(
    spool, network, tmp_path, chaperone
):
    script = "echo up; while [ ! -e go ]; do sleep 0.05; done"
    remote = network.sshd.remote(
        remote_dir=str(tmp_path / "far"),
        options={"ServerAliveInterval": 3, "ServerAliveCountMax": 2},
    )
    process = start(
        spool, sh(script, cwd=str(tmp_path)), remote=remote, on_disconnect="survive", lease=100
    )
    up = connected(spool)["connection"]
    assert (up["state"], up["drops"], up["lease_until"]) == ("up", 0, None) and up["pid"]
    network.cut()
    try:
        before = time.time()
        until(lambda: live(spool)["connection"]["state"] == "down")
        down = json.loads(chaperone("status", "r").stdout)["connection"]
        assert (down["drops"], down["pid"], down["argv"]) == (1, None, up["argv"]) and down[
            "since"
        ] > up["since"]
        heard_s = (
            datetime.datetime.fromisoformat(down["lease_until"].replace("Z", "+00:00")).timestamp()
            - 100
        )
        noticed_s = statuses.moment_ns(down["since"]) / 1e9
        assert before - 30 < heard_s < noticed_s, "from the last beat on"  # one comes every 10 s
    finally:
        network.heal()
    again = until(lambda: (found := live(spool)["connection"])["state"] == "up" and found, 60)
    assert (again["drops"], again["lease_until"]) == (1, None) and again["since"] > down["since"]
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert final(spool)["connection"]["drops"] == 1


@pytest.mark.root
@pytest.mark.parametrize("disk", ["whole", "torn"])
def test_run_goes_on_when_the_host_of_its_chaperone_boots_anew(
    spool, network, tmp_path, monkeypatch, disk
):
    """
    As after a power cut: chaperone and client die, the far side does not notice, so its session
    goes on waiting, and the program goes on writing.

    A torn disk has lost what was not yet on it: the ends of the streams, and the last status.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    directory, sums, enough = tmp_path / "far", tmp_path / "sums", tmp_path / "enough"
    argv = [
        "/usr/bin/python3",
        "-I",
        "-S",
        "-c",
        WRITER,
        "7",
        "5000000",
        "500000",
        "3",
        str(sums),
        str(enough),
    ]
    chaperone = start(
        spool,
        {"argv": argv},
        remote=network.sshd.remote(remote_dir=str(directory), share=False),
        on_disconnect="survive",
        lease=300,
    )
    before = connected(spool)
    until(
        lambda: (
            (spool / "r" / "stdout").stat().st_size > 500_000
            and (spool / "r" / "stderr").stat().st_size > 20_000
        )
    )
    client = before["connection"]["pid"]
    network.cut(port_of(network.sshd, client))
    try:
        chaperone.kill()
        os.kill(client, signal.SIGKILL)
        chaperone.wait()
        here = (spool / "r" / "stdout").stat().st_size
        if disk == "torn":
            os.truncate(spool / "r" / "stdout", here - 300_000)
            os.truncate(spool / "r" / "stderr", 10_000)
            os.truncate(spool / "r" / "running.json", 0)
        (far,) = directory.iterdir()
        until(lambda: (far / "out").stat().st_size > here + 500_000)
        booted, boot_id = booted_anew(tmp_path)
        told = [
            subprocess.run(
                [*booted, *CHAPERONE, verb], capture_output=True, text=True, check=True
            ).stdout
            for verb in ("ls", "reap")
        ]
        assert "unattended" in told[0] and "adopt it" in told[1], told
        attached = (far / "attached").read_text()
        adopter = subprocess.Popen(
            [*booted, *CHAPERONE, "adopt"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until(lambda: boot_id in (spool / "r" / "running.json").read_text())
        status = connected(spool)
        assert (status["boot_id"], status["pid"], status["started"]) == (
            boot_id,
            before["pid"],
            True,
        )
        until(lambda: (far / "attached").read_text() != attached)
        enough.touch()
        assert adopter.wait(60) == 0
    finally:
        network.heal()
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == (
        "terminated",
        44,
        True,
    ), log(spool)
    *written, stdout_size, stderr_size = sums.read_text().split()
    assert [
        hashlib.sha256((spool / "r" / name).read_bytes()).hexdigest()
        for name in ("stdout", "stderr")
    ] == written
    assert (status["stdout"]["bytes"], status["stderr"]["bytes"]) == (
        int(stdout_size),
        int(stderr_size),
    )
    until(lambda: list(directory.iterdir()) == [])
    assert not far_processes(spool)


@pytest.mark.root
def test_run_here_is_lost_when_its_host_boots_anew(spool, tmp_path, monkeypatch):
    """What it had written and nobody had copied is copied still."""
    monkeypatch.setenv("HOME", str(tmp_path))
    script = "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two; exec sleep 1000"
    chaperone = start(spool, sh(script, cwd=str(tmp_path)), on_disconnect="survive", lease=300)
    until(lambda: stdout(spool) == b"one\n")
    connected(spool)
    chaperone.kill()
    chaperone.wait()
    (tmp_path / "go").touch()
    (kept,) = (tmp_path / ".chaperone").iterdir()
    until(lambda: (kept / "out").read_bytes() == b"one\ntwo\n")
    for number in (
        signal.SIGSTOP,
        signal.SIGKILL,
    ):  # all at once: none has time to see another one die
        for pid in processes_with(os.environ["TEST_TOKEN"].encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    until(lambda: not processes_with(os.environ["TEST_TOKEN"].encode()))
    # Its number belongs to another process now.
    (kept / "reader").write_text(f"{os.getpid()} {(kept / 'reader').read_text().split()[1]}\n")
    booted, boot_id = booted_anew(tmp_path)
    subprocess.run(
        [*booted, *CHAPERONE, "adopt", "r"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )
    status = final(spool)
    assert (status["state"], status["started"], status["complete"], status["boot_id"]) == (
        "lost",
        True,
        False,
        boot_id,
    ), log(spool)
    assert stdout(spool) == b"one\ntwo\n"
    until(lambda: list((tmp_path / ".chaperone").iterdir()) == [])


IMPATIENT = """
import os, sys
sys.path.append(sys.argv.pop(1))
from chaperone.farside import contact
contact.DEAD_S = 0.1
import chaperone.__main__
"""


def test_far_side_that_is_slow_to_begin_is_not_taken_for_dead(spool, tmp_path, monkeypatch):
    """
    Its supervisor says that it is there only when the program is, and until then seems to be gone.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    slow = tmp_path / "bin" / "awk"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("awk")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    spec = {"id": "r", "program": sh("sleep 0.5; exit 3"), "on_disconnect": "survive"}
    chaperone = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        IMPATIENT,
        ROOT,
        "run",
        "--spool",
        str(spool),
        "-",
    ]
    subprocess.run(
        chaperone,
        input=json.dumps(spec),
        text=True,
        stdout=subprocess.DEVNULL,
        timeout=300,
        check=True,
    )
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == (
        "terminated",
        3,
        True,
    ), status
