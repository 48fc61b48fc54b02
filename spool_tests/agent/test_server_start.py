"""
A start by a client's key: one program, however often it is asked for and whatever dies meanwhile.

Knows: the routes, SIGKILL.  Must not know: the code of the server.
"""

import concurrent.futures
import random
import signal
import threading
import uuid

import httpx
import pytest

from chaperone.errors import RunExistsError
from chaperone.launch import start as starting
from spool_tests.support.agents import end_all
from spool_tests.support.runs import final, sh
from spool_tests.support.waiting import until

KEY = "0123456789abcdef" * 2


def once(place, name):
    """A program that leaves a line in a file each time it runs."""
    return sh(f"echo ran >>{place}/{name}.ran")


@pytest.mark.parametrize("warm", [False, True])
def test_start_with_a_key_is_repeated(spool, warm):
    spec = {"id": "r", "program": once(spool.parent, "r")}
    try:
        for _ in range(3):
            assert starting.start(str(spool), spec, warm=warm, key=KEY) == "r"
        with pytest.raises(RunExistsError, match="^unable to create run 'r': it exists$"):
            starting.start(str(spool), spec, warm=warm, key=KEY[::-1])
        until((spool / "r/status.json").exists)
    finally:
        end_all(spool)
    assert (spool.parent / "r.ran").read_text() == "ran\n"
    assert KEY in (spool / "r/spec.json").read_text()


@pytest.mark.parametrize("warm", [False, True])
def test_start_with_a_key_is_asked_for_by_many_at_once(spool, warm):
    spec = {"id": "r", "program": once(spool.parent, "r")}
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(starting.start, str(spool), spec, warm=warm, key=KEY) for _ in range(4)
            ]
            assert [each.result() for each in asked] == ["r"] * 4
        until((spool / "r/status.json").exists)
    finally:
        end_all(spool)
    assert (spool.parent / "r.ran").read_text() == "ran\n"
    assert list(spool.glob(".*.new")) == []


def test_spec_with_something_behind_it_is_refused(chaperone, spool):
    """What a start appends to the spec on stdin is a key, and nothing but a key."""
    for behind in ("\0", "\0abc", "\0" + "g" * 32, "\0" + KEY + "\n"):
        text = '{"id": "r", "program": {"argv": ["true"]}}' + behind
        result = chaperone("run", "--detach", "-", input=text, stdin=None)
        assert result.returncode == 65
        assert result.stderr == "chaperone: unable to read spec '-': want JSON, got a NUL byte\n"


def started_for_sure(agent, run_id, key, warm):
    """Ask until answered, as a client does."""
    program = once(agent.place, run_id)
    while True:
        try:
            with agent.client(timeout=60) as client:
                return agent.put(client, run_id, program, key, warm).status_code
        except (httpx.TransportError, ConnectionError):
            until(lambda: agent.process.poll() is None)


@pytest.mark.parametrize(
    "warm, kills",
    [
        (False, 2),
        (True, 2),
        pytest.param(False, 40, marks=pytest.mark.tier("agents")),
        pytest.param(True, 40, marks=pytest.mark.tier("agents")),
    ],
)
def test_server_that_is_killed_while_it_starts_a_run_starts_it_once(agent, warm, kills):
    rng = random.Random(kills + warm)
    codes = []
    for number in range(kills):
        run_id, key = f"r{number}", uuid.uuid4().hex
        asking = threading.Thread(
            target=lambda: codes.append(started_for_sure(agent, run_id, key, warm))  # noqa: B023
        )
        asking.start()
        asking.join(rng.uniform(0.005, 0.15))
        agent.kill()
        assert agent.process.returncode == -signal.SIGKILL
        agent.start()
        asking.join(120)
        assert not asking.is_alive()
        until((agent.spool / run_id / "status.json").exists)
        assert (agent.place / f"{run_id}.ran").read_text() == "ran\n"
        assert final(agent.spool, run_id)["return_code"] == 0
    assert len(codes) == kills and set(codes) <= {200, 201}
