"""`chaperone serve --receive`: what it answers, and that its death loses and repeats nothing."""

import contextlib
import hashlib
import json
import os
import random
import threading
import time

import httpx
import pytest

import chaperone
from spool_tests.support.agents import served
from spool_tests.support.fed import KEY, far_final
from spool_tests.support.runs import ask, final
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


@pytest.fixture
def agent(spool, tmp_path):
    with served(tmp_path, ["--receive"]) as agent:
        yield agent


def expected(agent, run_id="r", **body):
    """The URL and the token for a run."""
    with agent.client() as client:
        answer = client.put(f"/etl/receive/{run_id}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["url"], answer.json()["token"]


def poster(agent, url, token, key=KEY):
    headers = {"Authorization": f"Bearer {token}", "If-Match": f'"{key}"'}
    return httpx.Client(base_url=url, headers=headers, verify=agent.trust(), timeout=60)


def output(client, offset, data, stream="stdout"):
    return client.post(f"/output/{stream}", content=data, headers={"Upload-Offset": str(offset)})


def test_run_is_expected_posted_and_asked(agent):
    url, token = expected(agent)
    assert url == f"{agent.api}/etl/receive/r"
    with poster(agent, url, token) as client:
        assert output(client, 0, b"abc").headers["Upload-Offset"] == "3"
        ask(agent.spool, "stop 5 by=ops")
        answer = client.get("/requests", params={"after": "0"})
        assert answer.json() == {"requests": [{"seq": 1, "line": "stop 5.0 by=ops"}]}
        status = far_final(3)
        assert client.post("/completed", json={**status, "key": KEY}).status_code == 204
    assert final(agent.spool) == status
    with agent.client("look") as client:  # it is served like any other
        assert client.get("/etl/runs/r").json() == status
    assert token not in agent.log_at_end()


def test_only_run_tokens_expect_and_only_the_runs_own_post(agent):
    url, token = expected(agent)
    with agent.client("look") as client:
        assert client.put("/etl/receive/x").status_code == 403
    with agent.client(None) as client:
        assert client.put("/etl/receive/x").status_code == 401
        for spool in ("etl", "none"):  # not even which spools there are
            answer = client.post(f"/{spool}/receive/r/output/stdout", content=b"x")
            assert (answer.status_code, answer.json()["error"]["message"]) == (
                401,
                "unable to receive: the token is not that of the run",
            )
    with agent.client() as client:
        assert client.post("/etl/receive/r/output/stdout", content=b"x").status_code == 401
        assert client.put("/etl/receive/r", json={"other": 1}).status_code == 422
        assert client.put("/etl/receive/.x").status_code == 422
    with poster(agent, url, token) as client:
        assert client.get(f"{agent.api}/etl/runs").status_code == 401


def test_other_agents_have_no_such_routes(spool, tmp_path):
    with served(tmp_path) as agent, agent.client() as client:
        assert client.put("/etl/receive/r").status_code == 404


class Run(threading.Thread):
    """An agent that posts one run, whatever happens to its receiver."""

    def __init__(self, agent, run_id, size):
        super().__init__()
        self.agent, self.run_id = agent, run_id
        self.key = hashlib.md5(run_id.encode()).hexdigest()
        self.bytes = {
            name: random.Random(run_id + name).randbytes(size) for name in ("stdout", "stderr")
        }
        self.where = expected(agent, run_id, key=self.key)
        sizes = {name: len(data) for name, data in self.bytes.items()}
        self.status = far_final(*sizes.values(), run_id=run_id)
        self.acknowledged = False

    def run(self):
        begun = {"stdout": 0, "stderr": 0}
        while not self.acknowledged:
            with contextlib.suppress(httpx.TransportError):
                with poster(self.agent, *self.where, self.key) as client:
                    self._post(client, begun)
            time.sleep(0.01)

    def _post(self, client, at):
        for name, data in self.bytes.items():
            while at[name] < len(data):
                piece = data[at[name] : at[name] + random.randrange(1, 60_000)]
                answer = output(client, at[name], piece, name)
                assert answer.status_code in (204, 409), answer.text
                at[name] = int(answer.headers["Upload-Offset"])
        answer = client.post("/completed", json={**self.status, "key": self.key})
        assert answer.status_code in (204, 409), answer.text
        at.update(answer.json()["sizes"] if answer.status_code == 409 else {})
        self.acknowledged = answer.status_code == 204


def test_killed_receiver_loses_and_repeats_nothing(agent, kills=3, size=300_000):
    runs = [Run(agent, f"run-{number}", size) for number in range(4)]
    for run in runs:
        run.start()
    dice = random.Random(7)
    with chaperone.Spool(str(agent.spool)).follow() as follower:
        ends = []
        for _ in range(kills):
            wanted = dice.randrange(1, 400_000) + written(agent)
            until(lambda wanted=wanted: written(agent) >= min(wanted, 7 * size), timeout=60)
            agent.kill()
            agent.start()
        for run in runs:
            run.join()
        while len(ends) < len(runs):
            event = follower.next(60)
            assert not isinstance(event, chaperone.Lost), event
            ends += [event.run_id] if isinstance(event, chaperone.Ended) else []
        assert follower.next(0) is None
    assert sorted(ends) == [run.run_id for run in runs]
    for run in runs:
        assert final(agent.spool, run.run_id) == run.status
        for name, data in run.bytes.items():
            assert (agent.spool / run.run_id / name).read_bytes() == data


def written(agent):
    return sum(os.path.getsize(path) for path in agent.spool.glob("run-*/std*"))


def test_taken_over_run_is_alive_as_soon_as_the_agent_listens(agent):
    url, token = expected(agent)
    with poster(agent, url, token) as client:
        output(client, 0, b"abc")
    ask(agent.spool, "stop by=ops")
    running = agent.spool / "r" / "running.json"
    until(lambda: json.loads(running.read_text()).get("pending") == ["stop by=ops"])
    agent.kill()
    run = chaperone.Spool(str(agent.spool))["r"]
    assert run.status().state == "unattended"
    agent.start()
    assert run.status().state == "running"
    with poster(agent, url, token) as client:
        answer = client.get("/requests", params={"after": "5"})
    assert answer.json() == {"requests": [{"seq": 6, "line": "stop by=ops"}]}
