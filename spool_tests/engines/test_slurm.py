"""
What only Slurm does to a run: the queue, scancel, a time limit, a slurmd that stops, a login node.
"""

import os
import signal
import subprocess

import pytest

from spool_tests.support.engines import sleepers, word
from spool_tests.support.runs import ask, final, live, log, running, sh, start, stdout
from spool_tests.support.waiting import until

pytestmark = [pytest.mark.tier("engines"), pytest.mark.root]
ALL_CPUS = 8


@pytest.fixture
def engine(slurm, monkeypatch):
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    until(lambda: not slurm.jobs())
    return slurm


def srun(**fields):
    return {"hops": [{"srun": fields}]}


def queued(spool, run_id):
    return until(
        lambda: (
            (status := live(spool, run_id))["connection"]
            and status["connection"]["state"] == "queued"
            and status
        ),
        30,
    )


def test_full_queue_is_waited_for_as_long_as_it_takes(spool, engine):
    name = word()
    first = start(spool, sh(f"echo up; sleep {name}"), "first", remote=srun(cpus=ALL_CPUS))
    running(spool, "first")
    second = start(
        spool, sh("echo ran"), "second", remote=srun(cpus=ALL_CPUS), timeouts={"connect": 1}
    )
    status = queued(spool, "second")
    assert status["state"] == "starting"
    assert "queued and waiting for resources" in status["connection"]["message"]
    until(lambda: engine.ask("squeue", "-h", "-t", "PD", "-o", "%A"))
    third = start(spool, sh("echo ran"), "third", remote=srun(cpus=ALL_CPUS))
    queued(spool, "third")
    ask(spool, "stop", "third")
    assert third.wait(60) == 0
    status = final(spool, "third")
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "stopped"
    ask(spool, "stop", "first")
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert stdout(spool, "second") == b"ran\n"
    assert final(spool, "second")["return_code"] == 0
    until(lambda: not engine.jobs())


def test_job_that_is_cancelled_in_the_queue_is_not_asked_for_again(spool, engine):
    first = start(spool, sh(f"sleep {word()}"), "first", remote=srun(cpus=ALL_CPUS))
    running(spool, "first")
    second = start(spool, sh("echo ran"), "second", remote=srun(cpus=ALL_CPUS))
    queued(spool, "second")
    (waiting,) = until(lambda: engine.ask("squeue", "-h", "-t", "PD", "-o", "%A").split())
    engine.ask("scancel", waiting)
    assert second.wait(60) == 0
    status = final(spool, "second")
    assert (status["state"], status["started"]) == ("error", False), log(spool, "second")
    assert status["exception"]["stage"] == "connect"
    ask(spool, "kill", "first")
    assert first.wait(60) == 0


@pytest.mark.parametrize("end", ["scancel", "time limit"])
def test_job_that_slurm_ends_is_lost_and_nothing_is_left(spool, engine, end):
    """Slurm kills the supervisor with the program, so how that ended is not known."""
    name = word()
    fields = {"time": "0:01"} if end == "time limit" else {}
    chaperone = start(
        spool,
        sh(f"trap '' TERM; echo up; sleep {name}"),
        remote=srun(**fields),
        stop={"grace_period": 1},
    )
    running(spool)
    until(lambda: sleepers(name))
    if end == "scancel":
        engine.ask("scancel", *engine.jobs())
    assert chaperone.wait(150) == 0
    status = final(spool)
    assert (status["state"], status["complete"]) == ("lost", False)
    assert status["return_code"] is None and status["signal"] is None
    until(lambda: not sleepers(name))


def test_partition_that_is_not_there_is_an_error_at_once(spool, engine):
    chaperone = start(spool, sh("echo ran"), remote=srun(partition="nix"))
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "usage"
    assert "Invalid partition name specified" in status["exception"]["message"]


def test_controller_that_is_away_is_tried_again(spool, engine):
    os.kill(engine.pid("slurmctld"), signal.SIGSTOP)
    try:
        chaperone = start(spool, sh("echo ran"), remote=srun(), timeouts={"connect": 120})
        with pytest.raises(subprocess.TimeoutExpired):
            chaperone.wait(2)
    finally:
        os.kill(engine.pid("slurmctld"), signal.SIGCONT)
    assert chaperone.wait(120) == 0
    assert (final(spool)["return_code"], stdout(spool)) == (0, b"ran\n")


def test_slurmd_that_stops_takes_no_run_with_it(spool, engine):
    """The step has a process of its own, slurmstepd."""
    chaperone = start(spool, sh("echo up; sleep 4; echo more; exit 3"), remote=srun())
    running(spool)
    until(lambda: stdout(spool))
    engine.end("slurmd")
    try:
        assert chaperone.wait(60) == 0
    finally:
        engine.begin_slurmd()
        until(lambda: "idle" in engine.ask("sinfo", "-h", "-o", "%T"), 60)
    status = final(spool)
    assert (status["state"], status["return_code"], stdout(spool)) == (
        "terminated",
        3,
        b"up\nmore\n",
    )


def test_slurm_behind_ssh_and_a_user_behind_slurm(spool, engine, sshd):
    conf = engine.env["SLURM_CONF"]
    hops = [
        {"ssh": sshd.remote()},
        {"exec": {"argv": ["env", f"SLURM_CONF={conf}"]}},
        {"srun": {"cpus": 2}},
    ]
    chaperone = start(
        spool, sh('echo "$SLURM_CPUS_PER_TASK $SLURM_JOB_ID"; exit 3'), remote={"hops": hops}
    )
    assert chaperone.wait(60) == 0
    assert final(spool)["return_code"] == 3, log(spool)
    assert stdout(spool).split()[0] == b"2"
