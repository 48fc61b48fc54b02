"""
The server of an agent: each route, as curl would ask it.

Knows: HTTP, run directories.  Must not know: the code of the server.
"""

import json
import uuid

from spool_tests.support.agents import events
from spool_tests.support.runs import sh
from spool_tests.support.waiting import until


def ended(agent, run_id="r"):
    path = agent.spool / run_id / "status.json"
    until(path.exists)
    return json.loads(path.read_text())


def test_run_is_started_followed_and_looked_at(agent, client):
    key = uuid.uuid4().hex
    response = agent.put(client, "r", sh("echo out; echo err >&2; exit 3"), key)
    assert (response.status_code, response.json()) == (201, {"run_id": "r", "key": key})
    status = client.get("/etl/runs/r", params={"wait": "30"}).json()
    assert (status["state"], status["return_code"]) == ("terminated", 3)
    assert status == ended(agent)
    assert client.get("/etl/runs/r/stdout").content == b"out\n"
    assert client.get("/etl/runs/r/stderr").content == b"err\n"
    body = {"runs": ["r"]}
    with client.stream("POST", "/etl/events", json=body) as response:
        found = list(events(response))
    assert [event["event"] for event in found][0] == "started"
    assert found[-1] == {"event": "ended", "run_id": "r", "status": status}
    assert {e["text"] for e in found if e["event"] == "output"} == {"out\n", "err\n"}


def test_start_is_repeated_by_its_key(agent, client):
    key = uuid.uuid4().hex
    for code in (201, 200, 200):
        response = agent.put(client, "r", sh("echo once"), key)
        assert (response.status_code, response.json()) == (code, {"run_id": "r", "key": key})
    response = agent.put(client, "r", sh("echo other"))
    assert response.status_code == 409
    assert response.json()["error"] == {
        "kind": "RunExistsError",
        "message": "unable to create run 'r': it exists",
        "errno": 17,
    }
    ended(agent)
    assert client.get("/etl/runs/r/stdout").content == b"once\n"


def test_stop_is_passed_on(agent, client):
    assert agent.put(client, "r", sh("echo ready; exec sleep 1000")).status_code == 201
    until(lambda: client.get("/etl/runs/r/stdout").content == b"ready\n")
    assert client.post("/etl/runs/r/control", content="signal WINCH").status_code == 200
    response = client.post("/etl/runs/r/control", content="stop 5 by=ops\n")
    assert response.status_code == 200
    status = client.get("/etl/runs/r", params={"wait": "30"}).json()
    assert (status["signal"], status["stop"]["by"]) == ("SIGTERM", "ops")
    again = client.post("/etl/runs/r/control", content="kill")
    assert (again.status_code, again.json()) == (200, status)


def test_token_and_right_are_asked_for_first(agent):
    with agent.client(right=None) as client:
        assert client.get(agent.url).text.startswith("<!doctype html>")
        for path in ("/nowhere", "/etl/runs/r"):
            response = client.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"] == {
                "kind": "AgentError",
                "message": "unable to answer a request: it has no token",
                "errno": None,
            }
    with agent.client("look") as client:
        assert client.get(agent.api).json()["right"] == "look"
        assert client.get(agent.api).json()["spools"] == ["etl"]
        response = agent.put(client, "r", sh("true"))
        assert response.status_code == 403
        why = "unable to answer a request: token 'looker' has only the right 'look'"
        assert response.json()["error"]["message"] == why
