"""
What each route of an agent takes and answers, and which right it needs.

Knows: the routes, run directories.  Must not know: how a route is answered.
"""

import json
import os
import pathlib
import pwd
import subprocess
import uuid

import jsonschema
import pytest

from chaperone.agent.server import serving
from chaperone.agent.server.application import Agent
from chaperone.agent.server.receiving import Receptions
from chaperone.agent.server.routes import openapi
from spool_tests.support import agents, runs
from spool_tests.support.agents import events, served
from spool_tests.support.pages import blocks
from spool_tests.support.places import ROOT
from spool_tests.support.runs import sh
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.once


def error(response):
    return response.status_code, *response.json()["error"].values()


def made(agent):
    """The run directories of its spool."""
    return [name for name in os.listdir(agent.spool) if not name.startswith(".")]


def end(agent, client, run_id="r", text="true", **spec):
    """A run that has ended: its key."""
    key = uuid.uuid4().hex
    assert agent.put(client, run_id, sh(text), key, **spec).status_code == 201
    until((agent.spool / ".ended" / run_id).is_symlink)
    return key


# -- start


def test_start_takes_what_the_body_says(agent, client):
    body = {
        "spec": {"program": sh('echo "$COLOUR $PWD"')},
        "key": "0" * 32,
        "warm": False,
        "env": {"COLOUR": "red"},
        "cwd": str(agent.place),
    }
    assert client.put("/etl/runs/given", json=body).status_code == 201
    client.get("/etl/runs/given", params={"wait": 20})
    assert client.get("/etl/runs/given/stdout").text == f"red {agent.place}\n"


def test_program_inherits_what_is_not_the_agents_alone(spool, tmp_path):
    mine = {"CHAPERONE_TOKEN_FILE": "/secret", "CREDENTIALS_DIRECTORY": "/x", "COLOUR": "blue"}
    with served(tmp_path, environ=mine) as agent, agent.client() as client:
        end(agent, client, text="env; pwd")
        out = client.get("/etl/runs/r/stdout").text.splitlines()
    home = pwd.getpwuid(os.geteuid()).pw_dir  # not $HOME, which is the agent's
    assert "COLOUR=blue" in out
    assert out[-1] == (os.path.realpath(home) if os.path.isdir(home) else "/")
    names = {line.partition("=")[0] for line in out}
    assert "CREDENTIALS_DIRECTORY" not in names
    assert {name for name in names if name.startswith("CHAPERONE_")} <= {
        "CHAPERONE_RUN_ID",
        "CHAPERONE_COOKIE",
    }


REFUSED = {
    "no key": ({"key": None}, "key: want 32 hexadecimal digits, got null"),
    "short key": ({"key": "12"}, "key: want 32 hexadecimal digits, got '12'"),
    "more": ({"more": 1}, "more: unknown field; want one of cwd, env, key, spec, warm"),
    "no object": ({"spec": 1}, "spec: want an object, got a number"),
    "another id": (
        {"spec": {"id": "x", "program": {"argv": ["true"]}}},
        "unable to start run 'r': its spec has id 'x'",
    ),
    "relative": ({"cwd": "here"}, "unable to start run 'r': want an absolute cwd, got 'here'"),
    "no program": (
        {"spec": {}},
        "unable to start a run: program: required field is missing",
    ),
}


def test_start_that_makes_no_sense_is_refused(agent, client):
    for changes, message in REFUSED.values():
        body = {"spec": {"program": {"argv": ["true"]}}, "key": "0" * 32, **changes}
        response = client.put("/etl/runs/r", json=body)
        assert error(response) == (422, "SpecError", message, None)
    response = client.put("/etl/runs/r", content=b'{"key": 1, "key": 2}')
    message = "unable to read the request: want each key once, got 'key' twice"
    assert error(response) == (422, "SpecError", message, None)
    response = agent.put(client, "r", sh("true"), spool="none")
    message = "unable to open spool 'none': this agent has no spool of that name"
    assert error(response) == (404, "SpoolError", message, 2)
    assert made(agent) == []


# -- look


def test_directories_that_are_served(agent, client):
    for name in (".hidden", "empty", "other", "etl2"):
        (agent.directory / name).mkdir(0o700)
    (agent.directory / "other" / "file").touch()
    (agent.directory / "file").touch()
    end(agent, client)
    assert client.get(agent.api).json()["spools"] == ["empty", "etl", "etl2"]


def test_runs_are_listed_in_pages(agent, client):
    for number in range(5):
        end(agent, client, f"r{number}", labels={"n": str(number % 2)})
    assert agent.put(client, "live", sh("exec sleep 1000")).status_code == 201
    runs.running(agent.spool, "live")

    def listed(**params):
        found = client.get("/etl/runs", params=params).json()
        return [status["run_id"] for status in found["runs"]], found["next"]

    assert listed() == (["live", "r0", "r1", "r2", "r3", "r4"], None)
    assert listed(limit=2) == (["live", "r0"], "r0")
    assert listed(limit=2, after="r0") == (["r1", "r2"], "r2")
    assert listed(state="live") == (["live"], None)
    assert listed(state="running") == (["live"], None)
    assert listed(state="terminated", limit=1) == (["r0"], "r0")
    assert listed(label="n=1") == (["r1", "r3"], None)
    assert listed(label="n", limit=5) == (["r0", "r1", "r2", "r3", "r4"], None)
    assert listed(host="here") == listed() and listed(host="db3") == ([], None)
    client.post("/etl/collect", json={"runs": {"r0": None}})
    assert "r0" not in listed()[0] and "r0" in listed(state="all")[0]
    (status,) = client.get("/etl/runs", params={"state": "running"}).json()["runs"]
    assert status == client.get("/etl/runs/live").json()
    message = "unable to read the request: unknown parameter 'token'"
    assert error(client.get("/etl/runs?token=x"))[2].startswith(message)
    assert [
        client.get("/etl/runs", params={"collected": prefixes}).json()["collected"]
        for prefixes in ("", "r0", "r1,live,r", "r1,live")
    ] == [1, 1, 1, 0]
    assert "collected" not in client.get("/etl/runs").json()
    for text in ("0.5", "0", "1001"):
        assert client.get("/etl/runs", params={"limit": text}).status_code == 422
    assert client.get("/etl/runs", params={"state": "odd"}).status_code == 422


def test_bytes_are_read_by_ranges(agent, client):
    key = end(agent, client, text="printf 0123456789")
    path = "/etl/runs/r/stdout"

    def read(text, **headers):
        response = client.get(path, headers={"Range": text, **headers})
        return response.status_code, response.headers.get("content-range"), response.content

    response = client.get(path)
    assert (response.status_code, response.content) == (200, b"0123456789")
    assert response.headers["etag"] == f'"{key}"'
    assert response.headers["content-type"] == "application/octet-stream"
    assert read("bytes=3-5") == (206, "bytes 3-5/10", b"345")
    assert read("bytes=8-") == (206, "bytes 8-9/10", b"89")
    assert read("bytes=8-99") == (206, "bytes 8-9/10", b"89")
    code, where, _ = read("bytes=10-")
    assert (code, where) == (416, "bytes */10")
    for text in ("bytes=5-3", "bytes=0-1,3-4", "bytes=-3", "lines=1-", "bytes=a-", "bytes=\xb2-"):
        assert read(text.encode("latin-1"))[0] == 200, text
    assert read("bytes=3-5", **{"If-Match": f'"{key}"'})[0] == 206
    response = client.get(path, headers={"If-Match": '"' + "0" * 32 + '"'})
    message = "unable to send a request to run 'r': it is another run, with another key"
    assert error(response) == (412, "AgentError", message, None)
    head = client.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")
    assert client.get("/etl/runs/r/stderr").content == b""
    assert client.get("/etl/runs/r/log").status_code == 200
    message = "unable to read the timeline of run 'r': it has none"
    assert error(client.get("/etl/runs/r/timeline")) == (404, "AgentError", message, None)
    (agent.spool / "r" / "timeline").write_text("1764130000000 1 0 10\n")
    response = client.get("/etl/runs/r/timeline", headers={"Range": "bytes=14-"})
    assert (response.status_code, response.content) == (206, b"1 0 10\n")
    message = "unable to read stream 'status.json': want stdout, stderr, log or timeline"
    assert error(client.get("/etl/runs/r/status.json")) == (404, "AgentError", message, None)


def test_bytes_are_followed_to_the_end_of_the_run(agent, client, tmp_path):
    os.mkfifo(tmp_path / "go")
    assert agent.put(client, "r", sh(f"printf abc; cat {tmp_path}/go")).status_code == 201
    until(lambda: client.get("/etl/runs/r/stdout").content == b"abc")
    with client.stream(
        "GET", "/etl/runs/r/stdout", params={"follow": ""}, headers={"Range": "bytes=1-"}
    ) as response:
        assert response.status_code == 206
        pieces = response.iter_raw()
        assert next(pieces) == b"bc"
        (tmp_path / "go").write_text("def")
        assert b"".join(pieces) == b"def"
    message = "unable to follow stream 'log': want stdout or stderr"
    assert error(client.get("/etl/runs/r/log?follow"))[:3] == (422, "SpecError", message)


def test_events_go_on_from_a_cursor(agent, client):
    cursor = client.get("/etl/cursor").json()
    key = end(agent, client, text="echo one")
    with client.stream("POST", "/etl/events", json={"cursor": cursor, "streams": []}) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        found = events(response)
        assert next(found) == {"event": "started", "run_id": "r", "key": key}
        assert next(event for event in found if event["event"] == "ended")["run_id"] == "r"
    for body in ({"cursor": {"runs": 1}}, {"streams": ["log"]}, {"runs": "r"}, {"more": 1}):
        assert client.post("/etl/events", json=body).status_code == 422, body


def test_spec_comes_without_secrets(agent, client):
    program = {**sh("true"), "env": {"PASSWORD": "swordfish"}, "stdin": "swordfish"}
    key = uuid.uuid4().hex
    agent.put(client, "r", program, key)
    until((agent.spool / ".ended" / "r").is_symlink)
    found = client.get("/etl/runs/r/spec").json()["spec"]
    assert (found["key"], found["version"]) == (key, 1)
    assert found["program"]["env"] == {"PASSWORD": None}
    assert "swordfish" not in json.dumps(found)
    assert "swordfish" in (agent.spool / "r/spec.json").read_text()


# -- collect, delete


def test_ending_is_collected_by_its_key(agent, client):
    key = end(agent, client)

    def collect(**runs):
        return client.post("/etl/collect", json={"runs": runs}).json()

    assert collect(r="0" * 32, gone=None) == {"collected": ["r", "gone"], "waiting": []}
    assert (agent.spool / ".ended" / "r").is_symlink()  # that was another run's ending
    assert agent.put(client, "live", sh("exec sleep 1000")).status_code == 201
    for _ in range(2):
        assert collect(r=key, live=None) == {"collected": ["r"], "waiting": ["live"]}
        assert os.listdir(agent.spool / ".ended") == []
    assert os.listdir(agent.spool / ".running") == ["live"]


def test_run_is_deleted_when_it_has_ended(agent, client):
    key = end(agent, client)
    response = client.delete("/etl/runs/r", headers={"If-Match": '"' + "0" * 32 + '"'})
    assert response.status_code == 412
    assert client.delete("/etl/runs/r", headers={"If-Match": f'"{key}"'}).status_code == 204
    response = client.delete("/etl/runs/r")
    message = "unable to find run 'r': No such file or directory"
    assert error(response) == (404, "NoRunError", message, 2)
    assert agent.put(client, "live", sh("exec sleep 1000")).status_code == 201
    runs.running(agent.spool, "live")
    message = "unable to delete run 'live': it is running; stop it first"
    assert error(client.delete("/etl/runs/live")) == (409, "SpoolError", message, 16)
    assert not (agent.spool / "r").exists()


@pytest.mark.parametrize("name", ["", "../r/stdout", ".", "..", "a/b"])
def test_name_that_is_no_run_is_not_collected(agent, client, name):
    end(agent, client)
    response = client.post("/etl/collect", json={"runs": {name: None}})
    assert error(response)[:2] == (422, "SpecError")
    assert (agent.spool / "r" / "stdout").exists()


def test_request_that_is_none_is_refused(agent, client):
    end(agent, client)
    for line in ("", "halt", "stop\nkill", "signal NONE", "stop -1", "kill " * 2_000):
        response = client.post("/etl/runs/r/control", content=line)
        assert response.status_code == 422, line
    response = client.post("/etl/runs/r/control", content="signal USR1")
    message = "unable to send a request to run 'r': its chaperone is not running"
    assert error(response)[:3] == (404, "NoRunError", message)


# -- rights, and the document


def all_routes():
    found = [*serving.ROUTES, *Receptions(Agent("/", None, print)).routes()]
    return [*found, openapi.route(found)]


def test_look_may_only_look(agent):
    allowed = {"GET", "HEAD"}
    with agent.client("look") as client:
        for route in serving.ROUTES:
            path = route.path.format(spool="etl", run_id="r", stream="stdout")
            code = client.request(route.method, agent.api + path).status_code
            may = route.method in allowed or path == "/etl/events"
            assert (code == 403) == (not may) and code != 401, (route.method, path)
    assert made(agent) == []


def test_document_describes_each_route_and_no_other():
    routes = all_routes()
    found = openapi.document(routes)
    described = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in found["paths"].items()
        for method in methods
    }
    assert described == {(route.method, route.path) for route in routes}
    assert described == set(openapi.OPERATIONS)
    text = json.dumps(found)
    for reference in set(text.split('"$ref": "')[1:]):
        place = found
        for name in reference.partition('"')[0].split("/")[1:]:
            place = place[name]
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_document_is_served_and_errors_are_as_it_says(agent, client):
    found = client.get("/openapi.json").json()
    assert (
        found["paths"].keys()
        == openapi.document([*serving.ROUTES, openapi.route([])])["paths"].keys()
    )
    schema = found["components"]["schemas"]["Error"]
    for response in (client.get("/nowhere"), client.get("/etl/runs/r"), client.put("/etl/runs/r")):
        jsonschema.validate(response.json(), schema)
    assert client.post(agent.api).status_code == 405


def test_page_has_each_route_with_curl(agent):
    """Its lines are typed; each succeeds, and each route is asked."""
    need("curl")
    (text,) = blocks(pathlib.Path(ROOT, "docs/agents.rst"), "sh")
    token = f"printf '%s\\n' {agents.TOKENS['run']} >ops.token\n"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", token + text],
        cwd=agent.place,
        env={**os.environ, "AGENT": agent.url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    log = agent.log_at_end()
    for route in serving.ROUTES:
        path = route.path.format(spool="etl", run_id="r1", stream="stdout")
        assert f" {route.method} /api/v1{path} 20" in log, route
    assert '"event": "ended"' in done.stdout and made(agent) == []
