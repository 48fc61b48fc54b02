"""Runs that survive their connection and their chaperone."""

import contextlib
import datetime
import hashlib
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from spool_tests import sshd as server
from spool_tests.conftest import CHAPERONE, ROOT, processes_with, until
from spool_tests.test_remote import far_processes, log, port_of, session_of
from spool_tests.test_supervise import final, live, sh, start, stdout

sshd = server.sshd
network = server.network


@pytest.fixture(params=["here", "ssh"])
def remote(request, tmp_path, monkeypatch):
    """A spec's `remote`, or none; nothing may stay in the directory that the far side keeps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / ".chaperone"
    yield (
        None
        if request.param == "here"
        else request.getfixturevalue("sshd").remote(remote_dir=str(directory))
    )
    until(lambda: list(directory.glob("*")) == [])


def test_program_that_may_survive_ends_as_any_other(spool, remote):
    process = start(
        spool,
        sh("echo out; cat; echo err >&2; exit 7", stdin="in\n"),
        remote=remote,
        on_disconnect="survive",
    )
    assert process.wait(30) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"], status["leftovers"]) == (
        "terminated",
        7,
        True,
        0,
    ), log(spool)
    assert stdout(spool) == b"out\nin\n"
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"


ADOPT = """
import sys
sys.path.append(sys.argv[1])
from chaperone.hold import adopt, inherited
shed = inherited.shed_inherited_state()
sys.exit(adopt.hold_left_run(sys.argv[2], sys.argv[3], shed, inherited.print_run_id))
"""


def adopt(spool, run_id="r"):
    """A chaperone that takes the run over; returns when it holds the lock."""
    chaperone = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ADOPT, ROOT, str(spool), run_id],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert chaperone.stdout.readline() == f"{run_id}\n"
    chaperone.stdout.close()
    return chaperone


def ended(spool, run_id="r"):
    return (spool / run_id / "status.json").exists()


def connected(spool, run_id="r"):
    def look():
        try:
            status = live(spool, run_id)
        except FileNotFoundError:  # it has just ended
            return final(spool, run_id)
        return status["state"] == "running" and status["connection"]["state"] == "up" and status

    return until(look, 20)


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
        until(lambda: live(spool)["connection"]["state"] == "down", 30)
    finally:
        network.heal()


WRITER = """
import os, random, hashlib, time, sys
r = random.Random(int(sys.argv[1])); left = [int(sys.argv[2]), int(sys.argv[3])]; sums = [hashlib.sha256(), hashlib.sha256()]
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
    there, ways, remote = None, [], None  # nobody cuts a pipe here
    if place != "here":
        there = (
            request.getfixturevalue("sshd")
            if place == "ssh"
            else request.getfixturevalue("network").sshd
        )
        ways = ["client", "session", "packets"] if place == "network" else ["client", "session"]
        remote = there.remote(
            remote_dir=str(directory), options={"ServerAliveInterval": 1, "ServerAliveCountMax": 2}
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
    assert list(directory.glob("*")) == []
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
        options={"ServerAliveInterval": 1, "ServerAliveCountMax": 2},
    )
    process = start(
        spool, sh(script, cwd=str(tmp_path)), remote=remote, on_disconnect="survive", lease=100
    )
    up = connected(spool)["connection"]
    assert (up["state"], up["drops"], up["lease_until"]) == ("up", 0, None) and up["pid"]
    network.cut()
    try:
        before = time.time()
        until(lambda: live(spool)["connection"]["state"] == "down", 30)
        down = json.loads(chaperone("status", "r").stdout)["connection"]
        assert (down["drops"], down["pid"], down["argv"]) == (1, None, up["argv"]) and down[
            "since"
        ] > up["since"]
        heard_s = (
            datetime.datetime.fromisoformat(down["lease_until"].replace("Z", "+00:00")).timestamp()
            - 100
        )
        assert before - 30 < heard_s < before + 2, "from the last beat on"  # one comes every 10 s
    finally:
        network.heal()
    again = until(lambda: (found := live(spool)["connection"])["state"] == "up" and found, 60)
    assert (again["drops"], again["lease_until"]) == (1, None) and again["since"] > down["since"]
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
    assert final(spool)["connection"]["drops"] == 1


def booted_anew(tmp_path):
    """
    The words before an argv that let it live in this host's next boot, ten seconds old: another
    boot id, and clocks that begin anew.
    """
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    mounted = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    back = f"-{max(0, int(time.monotonic()) - 10)}"
    namespaces = [
        "--mount",
        "--time",
        "--boottime",
        back,
        "--monotonic",
        back,
        "--fork",
        "--kill-child",
    ]
    return [
        "unshare",
        *namespaces,
        "/bin/sh",
        "-c",
        mounted,
        str(boot_id),
    ], boot_id.read_text().strip()


@pytest.mark.root
@pytest.mark.parametrize("disk", ["whole", "torn"])
def test_run_goes_on_when_the_host_of_its_chaperone_boots_anew(
    spool, network, tmp_path, monkeypatch, disk
):
    """
    As after a power cut: chaperone and client die, nobody tells the far side, whose session goes on
        waiting, and the program writes on.

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
        remote=network.sshd.remote(remote_dir=str(directory)),
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
    assert list(directory.iterdir()) == []
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
    (kept / "reader").write_text(
        f"{os.getpid()} {(kept / 'reader').read_text().split()[1]}\n"
    )  # its number belongs to somebody else now
    booted, boot_id = booted_anew(tmp_path)
    subprocess.run(
        [*booted, *CHAPERONE, "adopt", "r"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=40,
    )
    status = final(spool)
    assert (status["state"], status["started"], status["complete"], status["boot_id"]) == (
        "lost",
        True,
        False,
        boot_id,
    ), log(spool)
    assert stdout(spool) == b"one\ntwo\n"
    assert list((tmp_path / ".chaperone").iterdir()) == []


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
        timeout=30,
        check=True,
    )
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == (
        "terminated",
        3,
        True,
    ), status


@pytest.mark.parametrize("program", [sh("exit 3"), {"argv": ["no-such"]}])
def test_far_side_forgets_a_run_only_when_its_end_is_published(spool, remote, tmp_path, program):
    process = start(spool, program, remote=remote, on_disconnect="survive")
    until(lambda: list((tmp_path / ".chaperone").glob("*")) or ended(spool))
    until(lambda: not list((tmp_path / ".chaperone").glob("*")))
    assert ended(spool)
    assert process.wait(30) == 0


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
    assert adopt(spool).wait(30) == 0
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
        assert process.wait(30) == 0
        (tmp_path / "go").unlink()
        assert (final(spool, run_id)["state"], final(spool, run_id)["return_code"]) == (
            "terminated",
            5,
        ), log(spool, run_id)
        assert not [name for name in os.listdir(f"{home}/.chaperone") if name.startswith(run_id)]
    if not was_there:
        with contextlib.suppress(OSError):  # somebody else's run is in it by now
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
    assert process.wait(20) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["reason"]) == ("SIGKILL", "request")


def test_lease_ends_what_nobody_asks_for(spool, remote, chaperone):
    program = sh("trap '' TERM; echo up; while :; do sleep 0.05; done")
    process = start(
        spool, program, remote=remote, on_disconnect="survive", lease=2, stop={"grace_period": 0.2}
    )
    until(lambda: stdout(spool) == b"up\n")
    process.kill()
    process.wait()
    until(lambda: not far_processes(spool), 10)
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
    assert process.wait(30) == 0
    assert stdout(spool) == b"one\ntwo\nthree\n"


def test_failure_to_start_is_told_where_it_survives_too(spool, remote):
    assert start(spool, {"argv": ["no-such"]}, remote=remote, on_disconnect="survive").wait(30) == 0
    status = final(spool)
    assert (status["state"], status["exception"]["message"], status["started"]) == (
        "error",
        "unable to run 'no-such': not found on the far side",
        False,
    )


BRIEF = ADOPT.replace(
    "inherited =", "from chaperone.farside import contact\ncontact.DEAD_S = 1\ninherited ="
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
        assert adopter.wait(30) == 0
    finally:
        if adopter.poll() is None:
            adopter.kill()
            adopter.wait()
            (tmp_path / "go").touch()
            shutil.rmtree(directory)
    status = final(spool)
    found = (status["state"], status["return_code"], status["complete"])
    if (
        found != LOST and DAMAGES[name, how][over] == LOST
    ):  # it was ended for want of control, and there was time to hear of that
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
