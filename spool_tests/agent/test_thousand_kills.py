"""Agent, client, mirror, receiver and posting agents are killed all the time while runs write."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

import chaperone
from spool_tests.support import taker
from spool_tests.support.agents import served
from spool_tests.support.mirrors import digest, mirrored, same
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.runs import final, py
from spool_tests.support.waiting import until

pytestmark = pytest.mark.tier("agents")

WRITER = (
    "import os, random, time\n"
    "while not os.path.exists({stop!r}):\n"
    "    os.write(1, random.randbytes(random.randrange(2_000)))\n"
    "    os.write(2, random.randbytes(random.randrange(500)))\n"
    "    time.sleep(0.5)\n"
    "raise SystemExit({code})"
)


class Command:
    """A process with a text on its stdin, which can be killed and started again."""

    def __init__(self, argv, text, environ, log):
        self.argv, self.text, self.environ, self.log = argv, text, environ, log
        self.process = None

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **self.environ},
            )
        self.process.stdin.write(self.text.encode())
        self.process.stdin.close()

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("kills", [30, 1000])
def test_nothing_is_lost_or_repeated(tmp_path, spool, told, kills):
    """
    42 runs at an agent are started and followed by a client, and mirrored; 8 are posted. The near
    spool, the client and the far spools must agree on every byte and every status.
    """
    dice = random.Random(kills)
    stop = tmp_path / "stop"
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    taken = tmp_path / "taken"
    taken.mkdir()
    with served(tmp_path / "far") as agent, served(tmp_path / "near", ["--receive"]) as receiver:
        near = receiver.spool
        specs = [
            {"id": f"mirrored-{n}", "program": py(WRITER.format(stop=str(stop), code=n % 5))}
            for n in range(42)
        ]
        trust = {
            "CHAPERONE_TOKEN_FILE": str(agent.token_files["run"]),
            "CHAPERONE_CA": str(agent.ca),
            "PYTHONPATH": ROOT,
        }
        words = [sys.executable, taker.__file__, agent.spool_url, str(taken)]
        client = Command(words, json.dumps(specs), trust, tmp_path / "client.log")
        postings = [
            posting(receiver, spool, f"posted-{n}", WRITER.format(stop=str(stop), code=n), tmp_path)
            for n in range(8)
        ]
        ids = [*(spec["id"] for spec in specs), *(f"posted-{n}" for n in range(8))]
        with (
            mirrored(agent, near) as mirror,
            chaperone.Spool(str(near)).follow(streams=()) as follower,
        ):
            for each in (client, *postings):
                each.start()
            until(lambda: all((near / run_id / "stdout").exists() for run_id in ids), 120)
            counts = {}
            try:
                for _ in range(kills):
                    kind, victim = dice.choice(
                        [
                            ("agent", agent),
                            ("receiver", receiver),
                            ("mirror", mirror),
                            ("client", client),
                            ("posting agent", dice.choice(postings)),
                        ]
                    )
                    at = time.monotonic() + dice.uniform(0.05, 1.0)
                    until(lambda at=at: time.monotonic() > at)
                    assert is_alive(victim), kind
                    victim.kill()
                    victim.start()
                    counts[kind] = counts.get(kind, 0) + 1
                stop.touch()
                ends = take_ends(follower, len(ids))
                for each in (client, *postings):
                    each.process.wait(120)
                until(lambda: not os.listdir(agent.spool / ".ended"), 60)
            finally:
                stop.touch()
                for each in (client, *postings):
                    if each.is_alive():
                        each.kill()
        assert os.listdir(spool / ".ended") == []
        assert sorted(ends) == sorted(ids)
        for run_id in ids:
            far = spool if run_id.startswith("posted") else agent.spool
            assert same(far, near, run_id) == [], run_id
            assert final(near, run_id)["return_code"] == int(run_id.rpartition("-")[2]) % (
                8 if run_id.startswith("posted") else 5
            )
        state = json.loads((taken / "state.json").read_text())
        for spec in specs:
            run_id = spec["id"]
            assert state["ends"][run_id] == [final(agent.spool, run_id)]
            for stream in ("stdout", "stderr"):
                assert digest(taken / f"{run_id}.{stream}") == digest(agent.spool / run_id / stream)
        written = sum(path.stat().st_size for path in near.glob("*/std*"))
        told(f"killed {counts}; {written} bytes of {len(ids)} runs are equal")


def is_alive(victim):
    return victim.process.poll() is None


def posting(receiver, spool, run_id, text, place):
    with receiver.client() as client:
        where = client.put(f"/etl/receive/{run_id}").json()
    spec = {
        "id": run_id,
        "program": py(text),
        "callback": {**where, "ca": str(receiver.ca)},
        "config": {"retry_frequency": 0.5, "output_latency": 0.1},
    }
    words = [*CHAPERONE, "agent", "--spool", str(spool)]
    return Command(words, json.dumps(spec), {}, place / f"{run_id}.log")


def take_ends(follower, count):
    ends = []
    while len(ends) < count:
        event = follower.next(120)
        assert event is not None, f"{len(ends)} of {count} have ended"
        assert not isinstance(event, chaperone.Lost), event
        ends += [event.run_id] if isinstance(event, chaperone.Ended) else []
    assert follower.next(0) is None
    return ends
