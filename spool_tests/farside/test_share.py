"""
Connections that runs share: one master for many runs, and what happens when it dies, is full, is
paused or can't be had.
"""

import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import pytest

from chaperone.model import spec as specs
from spool_tests.support.far import far_processes, log
from spool_tests.support.processes import ssh_masters
from spool_tests.support.runs import ask, final, live, running, sh, stdout
from spool_tests.support.runs import start as started
from spool_tests.support.sshd import Sshd
from spool_tests.support.waiting import need, until


@pytest.fixture
def masters(spool):
    """
    The masters of this test, as a function: {number: pid}; each is ended before the spool is looked
    at.
    """
    token = f"TEST_TOKEN={os.environ['TEST_TOKEN']}".encode()

    def found():
        return {
            int(command.partition("ControlPath=")[2].split()[0].rpartition(".")[2]): pid
            for pid, command in ssh_masters(token).items()
        }

    yield found
    for pid in found().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)
    until(lambda: not found())


def start(*arguments, **spec):
    """With time to connect, however busy the machine is."""
    return started(*arguments, **{"timeouts": {"connect": 300}, **spec})


def shared(sshd, **options):
    remote = sshd.remote()
    ssh = {**remote, "options": {**remote["options"], **options}}
    return {"hops": [{"ssh": ssh}], "share": True}


def up(spool, *run_ids):
    """Wait until all of them run, however busy the machine is."""
    for run_id in run_ids:
        until(lambda run_id=run_id: live(spool, run_id)["state"] == "running", 240)


def uses_master(spool, run_id):
    (words,) = [
        word
        for word in live(spool, run_id)["connection"]["argv"]
        if word.startswith("ControlPath=/")
    ]
    return words.rpartition("/")[2]


def test_second_run_uses_the_connection_of_the_first(spool, sshd, masters):
    first = start(spool, sh("echo one; exit 3"), "first", remote=shared(sshd))
    assert first.wait(300) == 0
    assert (final(spool, "first")["return_code"], stdout(spool, "first")) == (3, b"one\n")
    (master,) = masters().values()
    second = start(spool, sh("cat; exit 4", stdin="in"), "second", remote=shared(sshd))
    assert second.wait(300) == 0
    assert (final(spool, "second")["return_code"], stdout(spool, "second")) == (4, b"in")
    assert list(masters().values()) == [master]
    assert final(spool, "second")["complete"] and log(spool, "second") == ""


def test_master_belongs_to_no_run(spool, sshd, masters):
    """It has the pipes of a run's client as long as that lives, and nothing else of the run."""
    chaperone = start(
        spool, sh("echo up; exec sleep 1000"), remote=shared(sshd), stop={"grace_period": 1}
    )
    status = running(spool)
    (pid,) = masters().values()
    assert os.getsid(pid) not in (os.getsid(status["chaperone_pid"]), os.getsid(0))
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    chaperone.wait()
    until(lambda: not far_processes(spool))
    assert list(masters().values()) == [pid]
    until(lambda: not [name for name in open_files(pid) if name.startswith("pipe:")])
    (log_of_it,) = spool.glob(".connect/m-*.log")
    assert [name for name in open_files(pid) if str(spool) in name] == [str(log_of_it)]


def open_files(pid):
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


@pytest.fixture
def narrow(tmp_path):
    """An sshd that takes two sessions of one connection."""
    need("sshd", "ssh")
    directory = tempfile.mkdtemp(prefix="chaperone-sshd-")
    server = Sshd(directory, more="MaxSessions 2")
    yield server
    server.close()
    shutil.rmtree(directory)


def test_full_master_gets_a_second_one_and_the_limit_is_remembered(spool, narrow, masters):
    sshd = narrow
    runs = [
        start(spool, sh("echo up; exec sleep 1000"), f"r{number}", remote=shared(sshd))
        for number in range(5)
    ]
    up(spool, *(f"r{number}" for number in range(5)))
    paths = [uses_master(spool, f"r{number}") for number in range(5)]
    # More than three, if a session did not begin in time.
    assert max(map(paths.count, paths)) == 2 and len(set(paths)) >= 3
    (found,) = spool.glob(".connect/m-*.sessions")
    assert found.read_text() == "2\n"
    for number, chaperone in enumerate(runs):
        ask(spool, "kill", f"r{number}")
        assert chaperone.wait(300) == 0


def test_death_of_a_master_is_a_cut_for_all_its_runs(spool, sshd, masters, tmp_path):
    gate = f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done;"
    text = f"{gate} i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.1; done; "
    text += f"until [ -e {tmp_path}/cut ]; do sleep 0.1; done; exit 6"
    survivor = start(spool, sh(text), "survivor", remote=shared(sshd), on_disconnect="survive")
    victim = start(
        spool,
        sh("trap '' TERM; echo up; sleep 1000"),
        "victim",
        remote=shared(sshd),
        stop={"grace_period": 0.5},
    )
    alone = start(spool, sh(f"{gate} exit 7"), "alone", remote=sshd.remote())
    up(spool, "survivor", "victim", "alone")
    (tmp_path / "go").touch()
    assert uses_master(spool, "survivor") == uses_master(spool, "victim")
    (pid,) = masters().values()
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "cut").touch()
    assert victim.wait(300) == 0
    status = final(spool, "victim")
    assert (status["state"], status["exception"]["stage"]) == ("lost", "connection")
    until(lambda: not far_processes(spool, "victim"))
    assert (survivor.wait(300), alone.wait(300)) == (0, 0)
    status = final(spool, "survivor")
    assert (status["return_code"], status["complete"]) == (6, True)
    assert status["connection"]["drops"] == 1
    assert stdout(spool, "survivor") == b"".join(b"%d\n" % number for number in range(40))
    assert (final(spool, "alone")["return_code"], final(spool, "alone")["connection"]["drops"]) == (
        7,
        0,
    )


def test_socket_that_a_killed_master_left_is_replaced(spool, sshd, masters):
    assert start(spool, sh("true"), "first", remote=shared(sshd)).wait(300) == 0
    ((number, pid),) = masters().items()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not masters())
    assert list(spool.glob(f".connect/m-*.{number}"))
    assert start(spool, sh("exit 3"), "second", remote=shared(sshd)).wait(300) == 0
    assert final(spool, "second")["return_code"] == 3
    assert list(masters()) == [number] and masters()[number] != pid


def test_doctor_lists_the_masters(spool, sshd, masters, chaperone):
    assert start(spool, sh("true"), remote=shared(sshd)).wait(300) == 0
    (name,) = [path.name for path in spool.glob(".connect/m-*.0")]
    assert f"shared connections: up in .connect: {name}\n" in chaperone("doctor").stdout
    os.kill(*masters().values(), signal.SIGKILL)
    until(lambda: not masters())
    line = "shared connections: up in .connect: none; 1 of an ended one\n"
    assert line in chaperone("doctor").stdout


def test_master_that_idles_ends(spool, sshd, masters):
    assert start(spool, sh("true"), remote=shared(sshd, ControlPersist=1)).wait(300) == 0
    until(lambda: not masters())


def test_path_of_any_length_will_do(tmp_path, spool, sshd, masters):
    short = tempfile.mkdtemp(dir="/tmp")
    deep = spool / ("d" * 100)
    deep.mkdir(0o700)
    try:
        for where, begins in ((pathlib.Path(short), short), (deep, "/proc/")):
            for name in ("first", "second"):
                assert start(where, sh("exit 3"), name, remote=shared(sshd)).wait(300) == 0
                assert final(where, name)["return_code"] == 3
            words = " ".join(final(where, "second")["connection"]["argv"])
            assert f"ControlPath={begins}" in words and len(masters()) == 1
            os.kill(*masters().values(), signal.SIGTERM)
            until(lambda: not masters())
    finally:
        shutil.rmtree(short)


@pytest.mark.parametrize("why", ["no login", "inside a run"])
def test_run_that_can_not_share_connects_by_itself(spool, sshd, masters, why, monkeypatch):
    if why == "inside a run":
        monkeypatch.setenv("CHAPERONE_RUN_ID", "outer")
        chaperone = start(spool, sh("exit 3"), remote=shared(sshd))
        assert chaperone.wait(300) == 0
        assert final(spool)["return_code"] == 3
    else:
        chaperone = start(spool, sh("exit 3"), remote=shared(sshd, IdentityFile="/dev/null"))
        assert chaperone.wait(300) == 0
        status = final(spool)
        assert (status["state"], status["exception"]["stage"]) == ("error", "auth")
    assert not masters()
    assert "unable to share a connection" in log(spool)


@pytest.mark.long
def test_paused_master_holds_nobody_for_long(spool, sshd, masters):
    assert start(spool, sh("true"), "first", remote=shared(sshd)).wait(300) == 0
    (pid,) = masters().values()
    os.kill(pid, signal.SIGSTOP)
    second = start(spool, sh("exit 3"), "second", remote=shared(sshd), timeouts={"connect": 120})
    assert second.wait(120) == 0
    assert final(spool, "second")["return_code"] == 3


def test_survivors_share_and_others_are_asked(spool, sshd):
    remote = {"host": "db3"}
    for spec, share in (
        ({"remote": remote}, False),
        ({"remote": remote, "on_disconnect": "survive"}, True),
        ({"remote": {**remote, "share": False}, "on_disconnect": "survive"}, False),
        ({"remote": {"mode": "sudo", "user": "etl"}, "on_disconnect": "survive"}, False),
        (
            {
                "remote": {**remote, "options": {"ControlPath": "/x"}},
                "on_disconnect": "survive",
            },
            False,
        ),
    ):
        canonical = specs.checked({"program": {"argv": ["true"]}, **spec}, "/")
        assert canonical["remote"]["share"] is share
    for remote, words in (
        (
            {"mode": "sudo", "user": "etl", "share": True},
            "remote.share: want false where the first hop is not ssh or has a ControlPath of its"
            " own",
        ),
        (
            {"host": "db3", "share": True, "supervise": False},
            "remote.share: want false where remote.supervise is false",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            specs.checked({"program": {"argv": ["true"]}, "remote": remote}, "/")
        assert str(caught.value) == f"{words}, got true"


@pytest.mark.long
def test_masters_killed_at_random_under_fifty_runs(spool, sshd, masters, tmp_path, told):
    """Half of them survive: complete by checksum; the others that were cut are lost and gone."""
    gate = f"while [ ! -e {tmp_path}/go ]; do sleep 0.2; done;"
    stay = f"while [ ! -e {tmp_path}/enough ]; do sleep 0.2; done"
    script = f"{gate} i=0; while [ $i -lt 100 ]; do echo $i; i=$((i+1)); sleep 0.2; done; {stay}"
    whole = hashlib.sha256(b"".join(b"%d\n" % number for number in range(100))).digest()
    runs = {}

    def begin(count):
        """That many runs more, half of them survive; what is cut before was perhaps not started."""
        for number in range(len(runs), len(runs) + count):
            runs[f"r{number}"] = start(
                spool,
                sh(script),
                f"r{number}",
                remote=shared(sshd),
                on_disconnect="survive" if number % 2 else "kill",
                lease=600,
                stop={"grace_period": 1},
            )
        up(spool, *list(runs)[-count:])

    begin(50)
    (tmp_path / "go").touch()
    killed, by_chance = 0, random.Random(7)
    while killed < 40:
        # A run that found no master in three tries has a connection of its own by now.
        if not masters():
            begin(10)
        for pid in list(masters().values()):
            if by_chance.random() < 0.3 and killed < 40:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        time.sleep(by_chance.random())
    (tmp_path / "enough").touch()
    told(f"masters killed: {killed}, under {len(runs)} runs")
    for run in runs.values():
        assert run.wait(600) == 0
    for number in range(len(runs)):
        status, life = final(spool, f"r{number}"), "survive" if number % 2 else "kill"
        if life == "survive":
            assert (status["state"], status["return_code"], status["complete"]) == (
                "terminated",
                0,
                True,
            ), log(spool, f"r{number}")
        if status["state"] == "terminated":
            assert hashlib.sha256(stdout(spool, f"r{number}")).digest() == whole
        else:
            assert (status["state"], life) == ("lost", "kill")
        until(lambda number=number: not far_processes(spool, f"r{number}"))


@pytest.mark.long
def test_death_of_the_chaperone_that_started_the_master_is_its_own_run_s_alone(
    spool, sshd, masters, tmp_path
):
    gate = f"while [ ! -e {tmp_path}/go ]; do sleep 0.2; done;"
    first = start(spool, sh("echo up; exec sleep 600"), "first", remote=shared(sshd))
    up(spool, "first")
    (master,) = masters().values()
    others = {
        f"r{number}": start(
            spool,
            sh(f"{gate} seq 1000"),
            f"r{number}",
            remote=shared(sshd),
            on_disconnect=life,
        )
        for number, life in enumerate(["survive", "kill"] * 10)
    }
    up(spool, *others)
    assert uses_master(spool, "first") in [uses_master(spool, name) for name in others]
    os.kill(live(spool, "first")["chaperone_pid"], signal.SIGKILL)
    first.wait()
    until(lambda: not far_processes(spool, "first"), 60)
    assert master in masters().values()
    (tmp_path / "go").touch()
    for run_id, run in others.items():
        assert run.wait(300) == 0
        status = final(spool, run_id)
        assert (status["return_code"], status["complete"]) == (0, True), log(spool, run_id)
        assert status["connection"]["drops"] == 0
        assert stdout(spool, run_id) == b"".join(b"%d\n" % number for number in range(1, 1001))
