"""
`chaperone deploy` into real containers that have python3 and nothing of ours, to another user, and
into a container behind ssh.
"""

import contextlib
import os

import pytest

import chaperone as package
from chaperone.agent.deploy.deploy import Place, deploy
from chaperone.errors import AgentError
from chaperone.model.hops.remote import hops
from spool_tests.support.deployed import Agent
from spool_tests.support.processes import processes_with
from spool_tests.support.waiting import need, until

pytestmark = [pytest.mark.tier("engines"), pytest.mark.root]
PATIENCE_S = 120
LEFT = """find ~/.chaperone -mindepth 1
for each in /proc/[0-9]*; do tr '\\0' ' ' <$each/cmdline; echo; done"""


@pytest.fixture(autouse=True)
def near(tmp_path, monkeypatch):
    need("openssl")
    (tmp_path / "near").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "near"))


def runs_and_leaves_nothing(path, text, expected, left):
    """A run by a new agent that is for one run, fetched, and what is left in the end."""
    spool, agent = package.Spool(f"agent:{path}"), Agent(path)
    assert left()
    run = spool.start({"id": "r", "program": {"argv": ["/bin/sh", "-c", text]}})
    assert run.wait().return_code == 3
    assert run.read("stdout") == expected
    agent.fetch("r")
    until(lambda: not left(), PATIENCE_S)


def inside(engine, box):
    """The files and the processes of an agent in a container."""
    found = engine.ask("exec", box, "sh", "-c", LEFT, check=False).splitlines()
    return [line for line in found if "chaperone" in line and line[0] in "/p"]


def set_up(engine, monkeypatch, network="host"):
    for name, value in engine.env.items():
        monkeypatch.setenv(name, value)
    return engine.container("python", network)


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_agent_in_a_container(kind, request, monkeypatch):
    engine = request.getfixturevalue(kind)
    box = set_up(engine, monkeypatch)
    path = deploy(Place(hops=hops({"hops": [{kind: {"container": box}}]}), single=True))
    runs_and_leaves_nothing(path, "id -u; exit 3", b"0\n", lambda: inside(engine, box))


def test_agent_in_a_container_behind_ssh(docker, monkeypatch, sshd):
    box = set_up(docker, monkeypatch)
    env = [f"{name}={value}" for name, value in docker.env.items()]
    listed = [
        {"ssh": sshd.remote()},
        {"exec": {"argv": ["env", *env]}},
        {"docker": {"container": box}},
    ]
    path = deploy(Place(hops=hops({"hops": listed}), single=True))
    runs_and_leaves_nothing(path, "id -u; exit 3", b"0\n", lambda: inside(docker, box))


def test_agent_that_can_not_be_reached_in_a_container_leaves_nothing(docker, monkeypatch):
    """Of a container without a network only its own loopback is there."""
    box = set_up(docker, monkeypatch, network="none")
    place = Place(hops=hops({"hops": [{"docker": {"container": box}}]}), single=True, idle_s=2)
    with pytest.raises(AgentError) as caught:
        deploy(place)
    words = str(caught.value)
    assert words.startswith(f"unable to reach the agent in container {box}, "), words
    assert words.endswith("(--listen names an address and a port that can be reached)"), words
    until(lambda: not inside(docker, box), PATIENCE_S)


def test_agent_of_another_user(sshd):
    user = sshd.user("dash")
    home = f"{sshd.directory}/home-dash"

    def left():
        found = []
        with contextlib.suppress(FileNotFoundError):
            found = os.listdir(f"{home}/.chaperone")
        return found or processes_with(f"{home}/.chaperone".encode())

    path = deploy(Place(hops=hops({"mode": "sudo", "user": user}), single=True))
    runs_and_leaves_nothing(path, "id -un; exit 3", f"{user}\n".encode(), left)
