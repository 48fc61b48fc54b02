"""`chaperone agent` and `chaperone serve --receive` together: two real processes, two spools."""

import json
import os
import subprocess

import pytest

import chaperone
from spool_tests.support.agents import served
from spool_tests.support.mirrors import same
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import ask, final, py, sh
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


@pytest.fixture
def receiver(spool, tmp_path):
    with served(tmp_path, ["--receive"]) as agent:
        yield agent


class Posting:
    """A `chaperone agent` with a spool of its own, which posts one run to a receiver."""

    def __init__(self, receiver, spool, program, run_id="r", **config):
        with receiver.client() as client:
            where = client.put(f"/etl/receive/{run_id}").json()
        callback = {**where, "ca": str(receiver.ca)}
        quick = {"retry_frequency": 0.1, "output_latency": 0.01, **config}
        self.spec = {"id": run_id, "program": program, "callback": callback, "config": quick}
        self.spool = spool
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [*CHAPERONE, "agent", "--spool", str(self.spool)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.process.stdin.write(json.dumps(self.spec))
        self.process.stdin.close()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def posting(receiver, spool):
    made = []

    def start(program, *rest, **config):
        made.append(Posting(receiver, spool, program, *rest, **config))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.kill()


def ended(spool, run_id="r"):
    until(lambda: (spool / run_id / "status.json").exists(), 60)
    return final(spool, run_id)


def test_posted_run_is_the_same_on_both_sides(receiver, spool, posting):
    agent = posting(sh("echo out; echo err >&2; exit 3"))
    assert agent.process.wait(60) == 0
    assert same(spool, receiver.spool, "r") == []
    both = (spool, receiver.spool)
    specs = [json.loads((place / "r/spec.json").read_text()) for place in both]
    assert specs[0]["key"] == specs[1]["key"]


def test_stop_of_the_copy_reaches_the_agent(receiver, spool, posting):
    agent = posting(sh("trap 'echo usr1; exit 7' USR1; echo ready; while :; do sleep 0.05; done"))
    stdout = receiver.spool / "r" / "stdout"
    until(lambda: stdout.exists() and stdout.read_bytes() == b"ready\n")
    ask(receiver.spool, "signal USR1 by=me")
    assert ended(receiver.spool)["return_code"] == 7
    assert agent.process.wait(60) == 0
    other = posting(sh("sleep 600"), "other")
    until(lambda: (receiver.spool / "other").exists())
    ask(receiver.spool, "stop 0 by=ops", "other")
    assert ended(receiver.spool, "other")["stop"]["by"] == "ops"
    assert other.process.wait(60) == 0


WRITER = (
    "import os, random, time\n"
    "while not os.path.exists({stop!r}):\n"
    "    os.write(1, random.randbytes(7_000)); os.write(2, random.randbytes(7_000))\n"
    "    time.sleep(0.1)"
)


@pytest.mark.parametrize(
    "kills", [2, pytest.param(60, marks=pytest.mark.tier("agents"))], ids=["short", "long"]
)
def test_agent_and_receiver_are_killed_and_each_byte_comes_once(
    receiver, spool, tmp_path, posting, kills
):
    ids = ["a", "b"]
    stop = tmp_path / "stop"
    agents = [posting(py(WRITER.format(stop=str(stop))), run_id) for run_id in ids]
    until(lambda: all((receiver.spool / run_id).exists() for run_id in ids), 60)
    with chaperone.Spool(str(receiver.spool)).follow() as follower:
        for number in range(kills):
            sizes = written(receiver.spool)
            until(lambda sizes=sizes: written(receiver.spool) > sizes + 10_000, 60)
            agent = agents[number % 2]
            receiver.kill()
            if agent.process.poll() is None:
                agent.kill()
                agent.start()
            receiver.start()
        stop.touch()
        ends = []
        while len(ends) < len(ids):
            event = follower.next(60)
            assert event is not None and not isinstance(event, chaperone.Lost), event
            ends += [event.run_id] if isinstance(event, chaperone.Ended) else []
    assert sorted(ends) == ids
    assert {run_id: same(spool, receiver.spool, run_id) for run_id in ids} == dict.fromkeys(ids, [])
    assert [agent.process.wait(60) for agent in agents] == [0, 0]


def written(spool):
    return sum(os.path.getsize(path) for path in spool.glob("[ab]/std*"))
