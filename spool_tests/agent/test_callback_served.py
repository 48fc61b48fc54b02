"""
Runs with a callback in a served spool, and our own agent towards our own receiver.
"""

import contextlib
import json
import os
import random

import pytest

from spool_tests.support.agents import served
from spool_tests.support.posting import agent, begin, kill, log
from spool_tests.support.receiver_double import TOKEN, ReceiverDouble
from spool_tests.support.runs import final
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


def far_and_near(spool, near, run_id="r"):
    """Both ends have the same bytes and the same end."""
    for name in ("stdout", "stderr"):
        assert (near / run_id / name).read_bytes() == (spool / run_id / name).read_bytes(), name
    assert final(near, run_id) == final(spool, run_id)


def expected(scheduler, argv, **fields):
    """A program.json for a run that a scheduler expects."""
    with scheduler.client() as client:
        where = client.put("/etl/receive/r", json={}).json()
    return {
        "program": {"argv": argv},
        "callback": {**where, "ca": str(scheduler.ca)},
        "config": {"retry_frequency": 0.05, "output_latency": 0.02, "output_buffer": 8_192},
        **fields,
    }


@contextlib.contextmanager
def receiver_and_agent(place):
    """A receiver, an agent that serves, a client of the agent."""
    (place / "far").mkdir()
    with ReceiverDouble(place) as receiver, served(place / "far") as far, far.client() as client:
        yield receiver, far, client


def test_run_in_a_served_spool_is_posted(tmp_path):
    with receiver_and_agent(tmp_path) as (receiver, far, client):
        spec = receiver.spec(["/bin/sh", "-c", "seq 5000; echo err >&2; exit 3"])
        assert far.put(client, "PROG-ID", **spec).status_code == 201
        receiver.wait(lambda: receiver.final is not None)
        until(lambda: list((far.spool / ".ended").iterdir()) == [])
        assert bytes(receiver.streams["stdout"]) == (far.spool / "PROG-ID/stdout").read_bytes()
        assert receiver.streams["stderr"] == b"err\n" and receiver.final["return_code"] == 3


def test_run_in_a_served_spool_ends_by_itself_without_its_agent(tmp_path):
    with receiver_and_agent(tmp_path) as (receiver, far, client):
        spec = receiver.spec(["sleep", "1000"], config={"timeout": 2})
        assert far.put(client, "PROG-ID", **spec).status_code == 201
        far.kill()
        until((far.spool / "PROG-ID" / "status.json").exists)
        assert final(far.spool, "PROG-ID")["stop"]["by"] == "renew 3"


def test_run_that_the_agent_was_not_there_for_is_posted_later(tmp_path):
    with receiver_and_agent(tmp_path) as (receiver, far, client):
        receiver.close()
        spec = receiver.spec(["/bin/sh", "-c", "seq 5000"])
        assert far.put(client, "PROG-ID", **spec).status_code == 201
        until((far.spool / "PROG-ID" / "status.json").exists)
        far.kill()
        receiver.listen()
        far.start()
        receiver.wait(lambda: receiver.final is not None)
        assert bytes(receiver.streams["stdout"]) == (far.spool / "PROG-ID/stdout").read_bytes()


def test_token_that_was_not_kept_is_missed_in_the_log(tmp_path):
    with receiver_and_agent(tmp_path) as (receiver, far, client):
        spec = receiver.spec(["true"], keep_secrets=False)
        assert far.put(client, "PROG-ID", **spec).status_code == 201
        why = "the token is in no file, and was not kept: use callback.token_file"
        sentence = f"unable to post to {receiver.url}: {why}; trying again every 0.05 s"
        until(lambda: sentence in log(far.spool))
        assert receiver.heads == []


def test_callback_of_0_1_is_named_in_the_log(tmp_path):
    with receiver_and_agent(tmp_path) as (receiver, far, client):
        receiver.close()
        assert far.put(client, "PROG-ID", **receiver.spec(["true"])).status_code == 201
        until((far.spool / "PROG-ID" / "status.json").exists)
        far.kill()
        path = far.spool / "PROG-ID" / "spec.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "callback": {"to": TOKEN}}))
        far.start()
        want = "callback.to: unknown field; want one of ca, method, token, token_file, url"
        until(lambda: f"unable to post the run any longer: {want}" in log(far.spool))


def test_our_receiver_gets_what_our_agent_posts(spool, tmp_path):
    with served(tmp_path, ["--receive"]) as near:
        spec = expected(near, ["/bin/sh", "-c", "seq 50000; seq 3000 >&2; exit 3"])
        with agent(spec) as process:
            assert json.loads(process.stdout.read())["proc_id"] == "r"
            assert process.wait(60) == 0, log(spool, "r")
        far_and_near(spool, near.spool)


def test_stop_at_our_receiver_stops_the_program(spool, tmp_path, chaperone):
    with served(tmp_path, ["--receive"]) as near:
        with agent(expected(near, ["/bin/sh", "-c", "echo ready; exec sleep 1000"])) as process:
            until(lambda: (near.spool / "r" / "stdout").exists())
            until(lambda: (near.spool / "r" / "stdout").read_bytes() == b"ready\n")
            result = chaperone("stop", "--spool", near.spool, "--by", "ops", "r")
            assert (result.returncode, result.stderr) == (0, "")
            assert process.wait(60) == 0
        far_and_near(spool, near.spool)
        assert final(near.spool, "r")["stop"]["by"] == "ops"


def test_lost_run_is_posted_as_lost(spool, tmp_path):
    with served(tmp_path, ["--receive"]) as near:
        with agent(expected(near, ["/bin/sh", "-c", "echo ready; exec sleep 1000"])) as process:
            until(lambda: (near.spool / "r" / "stdout").exists())
            until(lambda: (near.spool / "r" / "stdout").read_bytes() == b"ready\n")
            os.kill(json.loads((spool / "r" / "running.json").read_text())["chaperone_pid"], 9)
            assert process.wait(60) == 0, log(spool, "r")
        lost = final(near.spool, "r")
        assert (lost["state"], (near.spool / "r" / "stdout").read_bytes()) == ("lost", b"ready\n")


@pytest.mark.parametrize("seed", range(1))
def test_agent_and_receiver_that_are_killed_lose_nothing(spool, tmp_path, seed):
    kills(spool, tmp_path, seed, 4)


@pytest.mark.tier("agents")
@pytest.mark.parametrize("seed", range(10, 14))
def test_agent_and_receiver_that_are_killed_often_lose_nothing(spool, tmp_path, seed):
    kills(spool, tmp_path, seed, 40)


def kills(spool, tmp_path, seed, times):
    """SIGKILL the agent or the receiver at random; both ends have the same at the end."""
    source = random.Random(seed)
    rounds = 8 * times
    text = f"i=0; while [ $((i += 1)) -le {rounds} ]; do seq 900; seq 90 >&2; sleep 0.02; done"
    with served(tmp_path, ["--receive"]) as near:
        spec = expected(near, ["/bin/sh", "-c", text])
        process = begin(spec)
        for _ in range(times):
            size = near.spool / "r" / "stdout"
            aim = (size.stat().st_size if size.exists() else 0) + source.randrange(30_000)
            until(
                lambda: (size.exists() and size.stat().st_size >= aim) or process.poll() is not None  # noqa: B023
            )
            if source.random() < 0.5:
                near.kill()
                near.start()
            else:
                kill(process)
                process = begin(spec)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err + str(log(spool, "r"))
        far_and_near(spool, near.spool)
        assert final(spool, "r")["stdout"]["bytes"] == rounds * 3_492
