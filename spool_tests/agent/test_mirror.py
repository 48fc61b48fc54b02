"""The mirror: an agent's runs as ordinary run directories of this host, whatever dies."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess

import pytest

import chaperone
from chaperone import agent as agents
from chaperone.agent import mirror as mirrors
from chaperone.agent.client import connection as connections
from spool_tests.support.agents import served
from spool_tests.support.fed import KEY, far_final
from spool_tests.support.mirrors import Mirrored, mirrored, mirrored_here, same
from spool_tests.support.proxy import SilentProxy
from spool_tests.support.runs import ask, final, live, log, py, sh
from spool_tests.support.runs import start as start_here
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

# Writes random bytes to both streams, until the file `stop` is there.
WRITER = (
    "import os, random, time\n"
    "while not os.path.exists({stop!r}):\n"
    "    os.write(1, random.randbytes(9_000)); os.write(2, random.randbytes(9_000))\n"
    "    time.sleep(0.05)"
)


# In seconds: a longer lease if the machine is too slow for a shorter one.
LEASES = 2, 8, 40


@pytest.fixture
def mirror(agent, spool):
    with mirrored(agent, spool) as mirror:
        yield mirror


def put(agent, client, run_id, program, **spec):
    answer = agent.put(client, run_id, program, **spec)
    assert answer.status_code == 201, answer.text


def ended(spool, run_id="r"):
    path = spool / run_id / "status.json"
    until(path.exists, 30, f"{run_id} has ended in {spool}")
    until(lambda: not (spool / run_id / "lock").exists())
    return final(spool, run_id)


def state(spool, run_id="r"):
    try:
        return chaperone.Spool(str(spool))[run_id].status().state
    except chaperone.NoRunError:
        return None


def collected(agent):
    """Whether nothing is left in .ended/ at the agent."""
    return not os.listdir(agent.spool / ".ended")


# -- what is there


def test_mirrored_run_is_like_any_other(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo out; echo err >&2; exit 3"), labels={"team": "etl"})
    status = ended(spool)
    assert (status["return_code"], status["labels"]) == (3, {"team": "etl"})
    assert same(agent.spool, spool, "r") == []
    assert (spool / ".ended" / "r").is_symlink()
    until(lambda: collected(agent))
    near, far = (json.loads((place / "r/spec.json").read_text()) for place in (spool, agent.spool))
    assert near == {
        **far,
        "on_disconnect": "survive",
        "lease": 2400,
        "origin": {"by": "mirror", "url": agent.spool_url},
    }


def test_output_and_statuses_come_as_they_are_made(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: (spool / "r/stdout").exists() and (spool / "r/stdout").read_bytes() == b"one\n")
    until(lambda: live(spool)["state"] == "running")
    assert live(spool)["pid"] == live(agent.spool)["pid"]


def test_runs_from_before_the_mirror_are_copied_and_collected_ones_are_not(agent, client, spool):
    for run_id in ("old", "ended"):
        put(agent, client, run_id, sh("echo bytes"))
        ended(agent.spool, run_id)
    client.post("/etl/collect", json={"runs": {"old": None}})
    put(agent, client, "live", sh("echo bytes; sleep 600"))
    with mirrored(agent, spool):
        ended(spool, "ended")
        until(lambda: state(spool, "live") == "running")
        assert not (spool / "old").exists()
        until(lambda: collected(agent))


def test_one_listing_and_one_follower_see_all_runs_alike(tmp_path, spool):
    """A local run, a mirrored one and a posted one, in one spool."""
    with served(tmp_path) as agent, agent.client() as client, mirrored(agent, spool):
        receiver = agents.receiver(str(spool), "https://near/")
        try:
            url, _ = receiver.expect("posted", KEY)
            posted = receiver._callbacks.reception.run("posted", KEY)
            start_here(spool, sh("echo bytes"), "here").wait()
            put(agent, client, "there", sh("echo bytes"))
            posted.append("stdout", 0, b"bytes\n")
            posted.ended(far_final(6, run_id="posted"))
            kinds = {}
            with chaperone.Spool(str(spool)).follow() as follower:
                while sum(events[-1] == "Ended" for events in kinds.values()) < 3:
                    event = follower.next(60)
                    assert event is not None, kinds
                    seen = kinds.setdefault(event.run_id, [])
                    if not isinstance(event, chaperone.Changed):
                        seen.append(type(event).__name__)
            names = ["spec.json", "status.json", "stderr", "stdout"]
            for run_id in kinds:
                # What holds a run here deletes its last files after the ending is there.
                until(lambda run_id=run_id: sorted(os.listdir(spool / run_id)) == names)
        finally:
            receiver.close()
    assert kinds == dict.fromkeys(("here", "there", "posted"), ["Started", "Output", "Ended"])
    assert sorted(os.listdir(spool / ".ended")) == sorted(kinds)


# -- an agent that is not heard


def connection(spool, run_id="r"):
    """What the status of a live run says; {} if its agent is heard."""
    return live(spool, run_id)["connection"] or {}


def test_silent_network_is_shown_until_the_true_end_comes(
    agent, client, spool, tmp_path, monkeypatch, chaperone
):
    monkeypatch.setattr(connections, "SILENT_S", 1.0)  # the run is heard more often
    monkeypatch.setattr(mirrors, "HEAR_S", 0.1)
    monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
    monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))
    put(agent, client, "r", py(WRITER.format(stop=str(tmp_path / "stop"))), renew=3600)
    with SilentProxy(agent) as proxy, mirrored_here(proxy.url(), spool):
        until(lambda: (spool / "r/stdout").exists() and (spool / "r/stdout").stat().st_size)
        proxy.set_silent(True)
        until(lambda: connection(spool).get("state") == "down", 60)
        begun = connection(spool)
        (tmp_path / "stop").touch()
        status = ended(agent.spool)
        assert state(spool) == "running"
        (row,) = (line for line in chaperone("ls").stdout.splitlines() if line.startswith("r "))
        since = begun["since"][:19]
        assert row.endswith(f"  not heard of since {since}Z: it did not answer in time")
        assert begun == {
            "argv": None,
            "pid": None,
            "drops": begun["drops"],
            "state": "down",
            "since": begun["since"],
            "message": "it did not answer in time",
            "lease_until": begun["lease_until"],
        }
        assert begun["lease_until"] > begun["since"] and begun["drops"] >= 1
        proxy.set_silent(False)
        assert ended(spool) == status and status["connection"] is None
        assert same(agent.spool, spool, "r") == []


def test_agent_that_is_away_is_shown_also_by_the_next_mirror(agent, client, spool, mirror):
    put(agent, client, "r", sh("exec sleep 600"))
    until(lambda: state(spool) == "running")
    agent.kill()
    until(lambda: connection(spool).get("state") == "down")
    since = connection(spool)["since"]
    mirror.kill()
    mirror.start()
    until(lambda: state(spool) == "running")
    until(lambda: connection(spool).get("message") == "Connection refused")
    assert (connection(spool)["since"], state(spool)) == (since, "running")
    agent.start()
    until(lambda: connection(spool) == {}, 60)
    assert (state(spool), live(spool)["connection"]) == ("running", None)


# -- what is asked for here


def test_requests_are_forwarded(agent, client, spool, mirror, chaperone):
    trap = "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done"
    put(agent, client, "r", sh(trap), stop={"grace_period": 5})
    until(lambda: (spool / "r/stdout").exists() and (spool / "r/stdout").read_bytes())
    assert chaperone("signal", "r", "USR1").returncode == 0
    until(lambda: (spool / "r/stdout").read_bytes() == b"ready\nusr1\n")
    done = chaperone("stop", "r", "--by", "ops")
    assert done.returncode == 0, done.stderr
    stop = final(spool)["stop"]
    assert (stop["reason"], stop["by"]) == ("request", "ops")
    assert same(agent.spool, spool, "r") == []


def test_stop_is_forwarded_when_the_agent_is_back_and_a_signal_is_not(agent, client, spool, mirror):
    put(agent, client, "r", sh("trap 'echo usr1' USR1; while :; do sleep 0.05; done"))
    until(lambda: state(spool) == "running")
    agent.kill()
    ask(spool, "signal USR1")
    ask(spool, "stop 0 by=ops")
    until(lambda: live(spool).get("pending") == ["stop 0.0 by=ops"])
    mirror.kill()
    assert state(spool) == "unattended"
    mirror.start()
    until(lambda: state(spool) == "running")
    agent.start()
    status = ended(spool)
    assert status["stop"]["by"] == "ops"
    assert (spool / "r" / "stdout").read_bytes() == b""


def test_request_that_the_agent_refuses_is_in_the_log(agent, client, spool):
    put(agent, client, "r", sh("sleep 600"))
    with mirrored(agent, spool, "look"):
        until(lambda: state(spool) == "running")
        ask(spool, "signal USR1")
        until(lambda: log(spool))
    assert log(spool) == ["unable to answer a request: token 'looker' has only the right 'look'"]


# -- leases


def test_leases_are_renewed_by_the_mirror_alone(agent, client, spool, mirror):
    """Longer than the lease the run goes on, and the near status says so; then nothing renews."""
    put(agent, client, "free", sh("exec sleep 600"))
    until(lambda: state(spool, "free") == "running")  # the mirror is there

    def is_renewed(run_id, renew):
        put(agent, client, run_id, sh("exec sleep 600"), renew=renew, stop={"grace_period": 1})
        with contextlib.suppress(FileNotFoundError):  # it was stopped
            control = agent.spool / run_id / "control"
            begun = os.stat(control).st_atime
            until(lambda: os.stat(control).st_atime > begun + 2 * renew, 120)
            until(lambda: os.stat(spool / run_id / "lock").st_atime > begun)
            assert json.loads((spool / run_id / "spec.json").read_text())["lease"] == renew
            mirror.kill()
            if state(spool, run_id) == "unattended":
                return True
            mirror.start()
        return False

    run_id = next(f"r{renew}" for renew in LEASES if is_renewed(f"r{renew}", renew))
    status = ended(agent.spool, run_id)
    assert status["stop"]["reason"] == "lease"
    until(lambda: state(spool, run_id) == "lost")
    mirror.start()  # the loss was concluded, not recorded: there is more to know
    assert ended(spool, run_id) == status
    assert state(spool, "free") == "running"


def test_renewed_run_of_a_mirror_that_never_comes_back_is_certainly_gone(
    agent, client, spool, mirror, chaperone
):
    put(agent, client, "free", sh("exec sleep 600"))
    until(lambda: state(spool, "free") == "running")  # the mirror is there

    def is_copied(run_id, renew):
        put(agent, client, run_id, sh("exec sleep 600"), renew=renew, stop={"grace_period": 1})
        until(lambda: state(spool, run_id) not in (None, "starting"))
        mirror.kill()
        agent.kill()
        if state(spool, run_id) in ("unattended", "lost"):
            return True
        agent.start()
        mirror.start()
        return False

    run_id = next(f"r{renew}" for renew in LEASES if is_copied(f"r{renew}", renew))
    until(lambda: state(spool, run_id) == "lost")
    until(lambda: (agent.spool / run_id / "status.json").exists())
    assert chaperone("reap").returncode == 0
    assert final(spool, run_id)["gone_by"] is not None
    agent.start()
    mirror.start()
    until(mirror.lines)
    assert mirror.lines() == [
        f"unable to end run '{run_id}': it has ended in another way; it stays at the agent"
    ]
    until(lambda: os.listdir(agent.spool / ".ended") == [run_id])


# -- deaths


def test_end_of_a_mirror_leaves_its_runs_for_the_next_one(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: state(spool) == "running" and (spool / "r/stdout").read_bytes())
    assert mirror.stop() == 0
    assert mirror.lines() == []
    assert state(spool) == "unattended"
    agent.kill()
    mirror.start()
    until(lambda: state(spool) == "running")  # before the agent is there
    agent.start()
    client.post(f"{agent.api}/etl/runs/r/control", content="kill")
    assert ended(spool)["signal"] == "SIGKILL"
    assert same(agent.spool, spool, "r") == []


def test_agent_that_is_away_is_waited_for_and_said_once(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: state(spool) == "running")
    agent.kill()
    until(lambda: len(mirror.lines()) == 1)
    agent.start()
    client.post(f"{agent.api}/etl/runs/r/control", content="kill")
    ended(spool)
    until(lambda: len(mirror.lines()) == 2)
    away, back = mirror.lines()
    assert away.startswith(f"following '{agent.spool_url}' again within ")
    assert back == f"following {agent.spool_url} again"


@pytest.mark.parametrize(
    "victim, kills",
    [
        pytest.param("mirror", 30, marks=pytest.mark.tier("agents")),
        pytest.param("agent", 30, marks=pytest.mark.tier("agents")),
        pytest.param("both", 30, marks=pytest.mark.tier("agents")),
        ("both", 2),
    ],
)
def test_death_while_programs_write_loses_and_repeats_nothing(
    agent, client, tmp_path, spool, mirror, victim, kills
):
    stop = tmp_path / "stop"
    ids = [f"run-{number}" for number in range(4)]
    for run_id in ids:
        put(agent, client, run_id, py(WRITER.format(stop=str(stop))))
    dice = random.Random(victim)
    with chaperone.Spool(str(spool)).follow() as follower:
        for _ in range(kills):
            wanted = written(spool) + dice.randrange(1, 500_000)
            until(lambda wanted=wanted: written(spool) >= wanted, 60)
            if victim in ("mirror", "both"):
                mirror.kill()
            if victim in ("agent", "both"):
                agent.kill()
                agent.start()
            if not mirror.is_alive():
                mirror.start()
        stop.touch()
        ends = []
        while len(ends) < len(ids):
            event = follower.next(60)
            assert event is not None, mirror.lines()
            assert not isinstance(event, (chaperone.Lost, chaperone.Shrank)), event
            ends += [event.run_id] if isinstance(event, chaperone.Ended) else []
        assert follower.next(0) is None
    assert sorted(ends) == ids
    assert {run_id: same(agent.spool, spool, run_id) for run_id in ids} == dict.fromkeys(ids, [])
    until(lambda: collected(agent))


def written(spool):
    return sum(os.path.getsize(path) for path in spool.glob("run-*/std*"))


def test_second_mirror_of_a_spool_is_refused(agent, spool, mirror):
    until(lambda: (spool / ".mirror").exists() and os.listdir(spool / ".mirror"))
    second = Mirrored(agent, spool)
    second.start()
    assert second.process.wait(60) == 74
    assert second.log.read_text() == (
        f"chaperone: unable to mirror {agent.spool_url} into spool '{spool}': "
        "another mirror is already running\n"
    )
    assert mirror.is_alive()


# -- what can't be copied


@pytest.mark.root
def test_full_disk_is_waited_for(agent, client, tmp_path, spool):
    """The bytes wait at the agent; when there is room, all of them are here."""
    spool.rmdir()
    spool.mkdir(0o700)
    size = "size=8m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", spool], check=True)
    try:
        (spool / "filler").write_bytes(bytes(6_000_000))
        with mirrored(agent, spool) as mirror:
            put(agent, client, "r", py("import os\nfor n in range(60): os.write(1, bytes(50_000))"))
            put(agent, client, "other", sh("echo bytes"))
            ended(agent.spool)
            until(mirror.lines)
            assert mirror.lines() == [
                "waiting for room in the spool: [Errno 28] No space left on device"
            ]
            assert not (spool / "r" / "status.json").exists()
            (spool / "filler").unlink()
            ended(spool)
            ended(spool, "other")
            assert same(agent.spool, spool, "r") == []
            mirror.kill()
    finally:
        subprocess.run(["umount", spool], check=True)


def test_run_whose_id_is_taken_stays_and_harms_no_other(agent, client, spool, mirror):
    start_here(spool, sh("echo mine"), "taken").wait()
    put(agent, client, "taken", sh("echo other"))
    put(agent, client, "free", sh("echo bytes"))
    ended(spool, "free")
    until(mirror.lines)
    why = "unable to write the copy of run 'taken': another run has its id; the agent keeps its own"
    assert mirror.lines() == [why]
    until(lambda: os.listdir(agent.spool / ".ended") == ["taken"])
    assert (spool / "taken" / "stdout").read_bytes() == b"mine\n"


def test_run_directory_that_is_damaged_here_harms_no_other(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: state(spool) == "running")
    mirror.kill()
    spec = json.loads((spool / "r/spec.json").read_text())
    del spec["key"]
    (spool / "r/spec.json").write_text(json.dumps(spec))
    mirror.start()
    put(agent, client, "other", sh("echo bytes"))
    ended(spool, "other")
    why = "unable to write the copy of run 'r': want a key of letters and digits"
    why = f"run 'r' is tried again in 1 s: {why}"
    assert until(mirror.lines)[0] == why


def test_run_directory_that_is_removed_here_is_copied_again(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    put(agent, client, "other", sh("echo bytes"))
    until(lambda: state(spool) == "running" and (spool / "r/stdout").read_bytes())
    shutil.rmtree(spool / "r")
    client.post("/etl/runs/r/control", content="kill")
    until(lambda: (spool / "r" / "status.json").exists(), 60)
    assert same(agent.spool, spool, "r") == []
    ended(spool, "other")


def test_run_that_was_deleted_there_is_lost_here(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: state(spool) == "running" and (spool / "r/stdout").read_bytes())
    mirror.kill()
    client.post("/etl/runs/r/control", content="kill")
    ended(agent.spool)
    assert client.delete("/etl/runs/r").status_code == 204
    mirror.start()
    status = ended(spool)
    assert (status["state"], status["stdout"]["bytes"], status["complete"]) == ("lost", 4, False)
    assert status["exception"]["message"] == (
        "the agent has no such run any more, and its end was not mirrored"
    )


def test_run_that_is_lost_there_is_lost_here_with_all_that_is_known(agent, client, spool, mirror):
    put(agent, client, "r", sh("echo one; sleep 600"))
    until(lambda: state(spool) == "running" and (spool / "r/stdout").read_bytes())
    status = live(agent.spool)
    os.kill(status["guard_pid"], signal.SIGSTOP)
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    os.kill(status["guard_pid"], signal.SIGCONT)
    until(lambda: state(agent.spool) == "lost")
    agent.kill()  # it records losses when it starts
    agent.start()
    assert ended(spool)["state"] == "lost"
    assert same(agent.spool, spool, "r") == []
    until(lambda: collected(agent))


def test_stream_that_its_program_truncates_is_copied_again(agent, client, spool, mirror):
    program = sh("echo before; sleep 600")
    put(agent, client, "r", program, output={"through": "file"})
    until(lambda: state(spool) == "running" and (spool / "r/stdout").read_bytes())
    os.truncate(agent.spool / "r" / "stdout", 0)
    with open(agent.spool / "r" / "stdout", "a") as stream:
        stream.write("new\n")
    until(lambda: (spool / "r/stdout").read_bytes() == b"new\n")
    client.post("/etl/runs/r/control", content="kill")
    ended(spool)
    assert same(agent.spool, spool, "r") == []
    assert log(spool) == ["stdout was truncated where it runs: it is copied again from its start"]


def test_wrong_token_is_said_once_and_a_right_one_is_taken(agent, client, spool, mirror):
    until(lambda: (spool / ".mirror").exists())
    mirror.kill()
    token = agent.token_files["run"]
    right = token.read_text()
    token.write_text("wrong\n")
    mirror.start()
    until(mirror.lines)
    put(agent, client, "r", sh("echo one"))
    token.write_text(right)
    ended(spool)
    assert mirror.lines() == ["unable to answer a request: its token is not valid"]
