"""
Leases over the wire: a run that an agent started is renewed by who wants it, or is stopped.
"""

import asyncio
import os

import pytest

import chaperone
from chaperone import aio
from chaperone.spool import look
from spool_tests.support.runs import log, sh
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


def renewed_at(agent, run_id):
    return os.stat(agent.spool / run_id / "control").st_atime


@pytest.mark.parametrize("how", ["all", "named", "coroutine", "request"])
def test_lease_is_renewed_over_the_wire(agent, how):
    where = {"token_file": agent.token_files["run"], "ca": agent.ca}
    spool = chaperone.Spool(agent.spool_url, **where)
    for run_id in ("a", "b"):
        spool.start({"id": run_id, "program": sh("exec sleep 60"), "renew": 3600})
    before = look.stamp()[0]
    until(lambda: renewed_at(agent, "a") < before and renewed_at(agent, "b") < before)
    if how == "all":
        spool.renew()
    elif how == "named":
        spool.renew(["gone", "a", "b"])
    elif how == "request":
        with agent.client() as client:
            for run_id in ("a", "b"):
                response = client.post(f"/etl/runs/{run_id}/control", content="renew")
                assert (response.status_code, response.json()["stop"]) == (200, None)
    else:
        asyncio.run(renewed(agent.spool_url, where))
    for run_id in ("a", "b"):
        until(lambda run_id=run_id: before <= renewed_at(agent, run_id) <= look.stamp()[0])
        assert spool[run_id].kill().stop["reason"] == "request"
        assert log(agent.spool, run_id) == []


async def renewed(url, where):
    await aio.Spool(url, **where).renew(["a", "b"])


def test_run_of_a_scheduler_that_says_nothing_more_is_stopped(agent):
    """An open stream is no renewal."""
    spool = chaperone.Spool(agent.spool_url, token_file=agent.token_files["run"], ca=agent.ca)
    run = spool.start({"id": "r", "program": sh("exec sleep 60"), "renew": 0.5})
    with spool.follow(runs=["r"]) as follower:
        *_, ending = follower
    assert isinstance(ending, chaperone.Ended) and ending.status == run.status()
    assert (ending.status.stop["reason"], ending.status.stop["by"]) == ("lease", "renew 0.5")


def test_renewal_that_makes_no_sense_is_refused(agent):
    bodies = {
        '{"runs": "a"}': "runs: want a list, got a string",
        '{"runs": [5]}': "runs[0]: want a non-empty string, got 5",
        '{"all": true}': "all: unknown field; want one of runs",
    }
    with agent.client() as client:
        for body, sentence in bodies.items():
            response = client.post("/etl/lease", content=body)
            assert (response.status_code, response.json()["error"]["message"]) == (422, sentence)
    with agent.client("look") as client:
        assert client.post("/etl/lease", json={"runs": None}).status_code == 403
