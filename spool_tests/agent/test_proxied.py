"""A mirror, and an agent that posts, behind what cuts, loses and repeats: each byte comes once."""

import contextlib
import json
import os
import random
import subprocess

import pytest

import chaperone
from spool_tests.support.agents import served
from spool_tests.support.mirrors import mirrored, same
from spool_tests.support.places import CHAPERONE
from spool_tests.support.proxy import CuttingProxy, LosingProxy
from spool_tests.support.runs import ask, final, py
from spool_tests.support.waiting import until

LONG = pytest.mark.tier("agents")
# `cuts` at any byte; `loses`, repeats and swallows whole requests.
KINDS = [
    ("cuts", 6),
    pytest.param("loses", 6, marks=LONG),
    pytest.param("cuts", 300, marks=LONG),
    pytest.param("loses", 100, marks=LONG),
]
# Says that it was started, and writes random bytes to both streams until the file `stop` is there.
WRITER = (
    "import os, random, time\n"
    "open({starts!r}, 'a').write('started\\n')\n"
    "while not os.path.exists({stop!r}):\n"
    "    os.write(1, random.randbytes(9_000)); os.write(2, random.randbytes(900))\n"
    "    time.sleep(0.05)"
)


@pytest.fixture
def agent(spool, tmp_path):
    with served(tmp_path, ["--receive"]) as agent:
        yield agent


def fates(seed):
    """What becomes of each request; one that waits for its answer always passes."""
    dice = random.Random(seed)

    def fate(name, before):
        if name.endswith("/events") or "/requests" in name:
            return "pass"
        return dice.choice(["pass", "lost", "never", "twice"])

    return fate


def proxy(agent, kind, seed):
    if kind == "cuts":
        return CuttingProxy(agent, seed)
    return LosingProxy(agent, fates(seed))


def program(tmp_path, run_id="r"):
    starts, stop = tmp_path / f"{run_id}.starts", tmp_path / "stop"
    return py(WRITER.format(starts=str(starts), stop=str(stop)))


def starts(tmp_path, run_id="r"):
    return (tmp_path / f"{run_id}.starts").read_text()


def ended(spool, run_id="r"):
    until(lambda: (spool / run_id / "status.json").exists(), 120, f"{run_id} has ended in {spool}")
    return final(spool, run_id)


@pytest.mark.parametrize("kind, most", KINDS)
def test_mirror_takes_each_byte_once(agent, spool, tmp_path, kind, most):
    enough = most * 50_000  # a connection may never be cut
    with proxy(agent, kind, f"{kind} {most}") as between:
        where = {"token_file": agent.token_files["run"], "ca": agent.ca}
        far = chaperone.Spool(between.url(), **where)
        for run_id in ("a", "b"):
            far.start({"id": run_id, "program": program(tmp_path, run_id)})
        with mirrored(agent, spool, url=between.url()) as mirror:
            until(lambda: all((spool / run_id).exists() for run_id in "ab"), 60)
            met = between.connections
            until(lambda: between.connections >= met + most or written(spool) > enough, 300)
            ask(spool, "stop 0 by=ops", "a")
            assert ended(spool, "a")["stop"]["by"] == "ops"
            (tmp_path / "stop").touch()
            ended(spool, "b")
            until(lambda: not os.listdir(agent.spool / ".ended"), 60)
            assert mirror.is_alive()
    for run_id in ("a", "b"):
        assert same(agent.spool, spool, run_id) == []
        assert starts(tmp_path, run_id) == "started\n"


@pytest.mark.parametrize("kind, most", KINDS)
def test_receiver_takes_each_byte_once(agent, spool, tmp_path, kind, most):
    enough = most * 50_000  # a connection may never be cut
    with proxy(agent, kind, f"{kind} {most}") as between, agent.client() as client:
        host = between.url().split("/")[2]
        where = client.put("/etl/receive/r", headers={"Host": host}).json()
        assert where["url"] == f"https://{host}/api/v1/etl/receive/r"
        spec = {
            "id": "r",
            "program": program(tmp_path),
            "callback": {**where, "ca": str(agent.ca)},
            "config": {"retry_frequency": 0.1, "output_latency": 0.05},
        }
        with posting(spec, spool) as process:
            until(lambda: between.connections >= most or written(agent.spool) > enough, 300)
            (tmp_path / "stop").touch()
            ended(agent.spool)
            assert process.wait(60) == 0
    assert same(spool, agent.spool, "r") == []
    assert starts(tmp_path) == "started\n"


def written(spool):
    return sum(os.path.getsize(path) for path in spool.glob("*/std*"))


@contextlib.contextmanager
def posting(spec, spool):
    process = subprocess.Popen(
        [*CHAPERONE, "agent", "--spool", str(spool)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        process.stdin.write(json.dumps(spec))
        process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()
