"""
Agents on a host that has Python and nothing else: how they begin, who finds them, how they end.
"""

import os
import signal
import ssl
import threading

import pytest

from chaperone.agent.deploy.deploy import Place, deploy
from chaperone.errors import AgentError, SpecError
from chaperone.model.hops.remote import hops
from spool_tests.support.deployed import Agent, Far
from spool_tests.support.waiting import need, until

PATIENCE_S = 60  # for an agent to end: a look each tenth of its idle time, on a busy machine


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Another home directory, and one of our own for the files of agents."""
    need("openssl")
    there = Far(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "near"))
    yield there
    there.end()


# -- one agent


def test_deployed_agent_over_ssh_runs_a_program_and_leaves_nothing(far, sshd):
    (ssh,) = hops(sshd.remote())
    home = {"exec": {"argv": ["env", f"HOME={far.home}"]}}
    path = deploy(Place(hops=[ssh, home], idle_s=1.0))
    assert os.stat(path).st_mode & 0o777 == 0o600
    agent = Agent(path)
    assert agent.file["url"] == f"https://127.0.0.1:{agent.port}/spool"
    assert sorted(agent.file) == ["ca", "server_name", "token", "url"]
    agent.start("r", "/bin/sh", "-c", "pwd; echo $HOME")
    agent.fetch("r")
    assert agent.status("r")["return_code"] == 0
    (place,) = far.places()
    assert os.stat(place).st_mode & 0o777 == 0o700
    secret = agent.file["token"].encode()
    for file in [each for each in far.home.rglob("*") if each.is_file()]:
        data = file.read_bytes()
        assert secret not in data and b"PRIVATE KEY" not in data, file
        assert os.stat(file).st_mode & 0o077 == 0, file
    for pid in far.left()[1]:
        for name in ("cmdline", "environ"):
            with open(f"/proc/{pid}/{name}", "rb") as file:
                data = file.read()
            assert secret not in data and b"PRIVATE KEY" not in data
    until(far.is_clean, PATIENCE_S)


def test_agent_that_is_never_asked_ends(far):
    agent = far.deploy(idle_s=0.2)
    until(far.is_clean, PATIENCE_S)
    with pytest.raises(ConnectionRefusedError):
        agent.ask("GET", "")


def test_single_agent_ends_when_its_run_is_fetched(far):
    shared, one, other = far.deploy(), far.deploy(single=True), far.deploy(single=True)
    assert len({agent.path for agent in (shared, one, other)}) == 3
    assert len(far.places()) == 3
    one.start("r", "/bin/true")
    one.fetch("r")
    until(lambda: len(far.places()) == 2, PATIENCE_S)
    with pytest.raises(OSError):
        one.ask("GET", "")
    assert other.ask("GET", "")[0] == 200


def test_agent_with_an_unfetched_run_ends_by_its_lease(far):
    agent = far.deploy(idle_s=60, lease_s=0.5)
    agent.start("r", "/bin/true")
    until(far.is_clean, PATIENCE_S)


def test_runs_that_are_not_renewed_end_with_their_agent(far):
    agent = far.deploy(idle_s=60, lease_s=2.0)
    agent.start("r", "/bin/sleep", "1000")
    agent.start("own", "/bin/true", renew=5000)
    called = {"url": "https://127.0.0.1:9/r", "token": "t"}
    agent.start("called", "/bin/true", callback=called, config={"timeout": 1})
    assert [agent.spec(name)["renew"] for name in ("r", "own", "called")] == [2.0, 5000, None]
    until(lambda: agent.status("r", wait=1)["state"] == "terminated")
    assert agent.status("r")["stop"]["reason"] == "lease"
    until(far.is_clean, PATIENCE_S)


# -- who finds it


def test_two_deployers_at_once_get_one_agent(far, monkeypatch):
    found, failed = [], []

    def go(home):
        try:
            found.append(far.deploy())
        except AgentError as error:
            failed.append(error)

    threads = [threading.Thread(target=go, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({agent.port for agent in found}) == 1
    assert len({agent.file["server_name"] for agent in found}) == 1
    assert len(far.places()) == 1
    assert [agent.ask("GET", "")[0] for agent in found] == [200, 200, 200]
    found[0].pid(far)


def test_second_deploy_finds_the_agent_and_keeps_the_token(far):
    first, second = far.deploy(), far.deploy()
    assert first.path == second.path
    assert first.file == second.file


def test_killed_agent_loses_no_run(far):
    agent = far.deploy()
    agent.start("r", "/bin/true")
    agent.start("long", "/bin/sleep", "1000")
    os.kill(agent.pid(far), signal.SIGKILL)
    until(lambda: not [1 for one in far.left()[1].values() if "deploy.hosted" in one])
    again = far.deploy(idle_s=0.2)
    assert again.path == agent.path
    assert again.file["server_name"] != agent.file["server_name"]
    assert again.status("long")["state"] == "running"
    assert again.ask("POST", "/spool/runs/long/control", "kill")[0] == 200
    again.fetch("r", "long")
    until(far.is_clean, PATIENCE_S)


# -- what is refused


def test_another_agents_certificate_is_refused(far):
    one, other = far.deploy(single=True), far.deploy(single=True)
    with pytest.raises(ssl.SSLCertVerificationError):
        one.ask("GET", "", ca=other.file["ca"])
    with pytest.raises(ssl.SSLCertVerificationError):
        one.ask("GET", "", name=other.file["server_name"])


def test_agent_that_can_not_listen_is_one_sentence_and_leaves_nothing(far):
    with pytest.raises(AgentError) as caught:
        far.deploy(listen=("203.0.113.7", 1234))
    assert str(caught.value) == (
        "unable to deploy an agent here, behind env, as whom env makes us: the agent did not"
        " start: unable to listen on '203.0.113.7:1234': Cannot assign requested address"
    )
    assert far.is_clean()


def test_agent_that_can_not_be_reached_is_one_sentence(far, monkeypatch):
    def refuse(*_):
        raise TimeoutError("timed out")

    monkeypatch.setattr("chaperone.agent.deploy.deploy._knock", refuse)
    with pytest.raises(AgentError) as caught:
        far.deploy(idle_s=0.2)
    assert str(caught.value).partition(" at port ")[0] == (
        "unable to reach the agent here, behind env, as whom env makes us"
    )
    assert str(caught.value).partition(": ")[2] == (
        "127.0.0.1: timed out (--listen names an address and a port that can be reached)"
    )


def test_hop_that_no_agent_can_outlive_is_refused():
    with pytest.raises(SpecError) as caught:
        deploy(Place(hops=[{"docker": {"image": "x", "container": None}}]))
    assert str(caught.value) == (
        "unable to deploy an agent: it can't outlive docker run, because the container ends when"
        " docker run ends"
    )


def test_directory_of_another_user_is_refused(far):
    place = far.home / f".chaperone/agent-{os.uname().nodename}"
    place.mkdir(parents=True)
    place.chmod(0o777)
    with pytest.raises(AgentError) as caught:
        far.deploy()
    assert str(caught.value) == (
        "unable to deploy an agent here, behind env, as whom env makes us:"
        f" '{place}': want a directory of this user alone"
    )
