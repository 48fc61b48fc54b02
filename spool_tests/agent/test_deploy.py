"""
Agents on a host that has Python and nothing else: how they begin, who finds them, how they end.
"""

import json
import os
import signal
import threading

import pytest

import chaperone as package
from chaperone.agent.deploy.bundle import bundle
from chaperone.agent.deploy.certificate import certificate
from chaperone.agent.deploy.deploy import Place, deploy
from chaperone.errors import AgentError, SpecError
from chaperone.model.hops.remote import hops
from spool_tests.support import pythons
from spool_tests.support.commands import streams
from spool_tests.support.deployed import Agent, Far
from spool_tests.support.waiting import absent, need, until

PATIENCE_S = 60  # for an agent to end: a look each tenth of its idle time, on a busy machine
WHERE = "here, behind env, as whom env makes us"


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
    path = deploy(Place(hops=[ssh, home], single=True))
    assert os.stat(path).st_mode & 0o777 == 0o600
    agent = Agent(path)
    assert agent.file["url"] == f"https://127.0.0.1:{agent.port}/spool"
    assert sorted(agent.file) == ["ca", "server_name", "token", "url"]
    spool = package.Spool(f"agent:{path}")
    run = spool.start({"id": "r", "program": {"argv": ["/bin/sh", "-c", "echo $HOME"]}})
    assert run.wait().return_code == 0
    assert run.read("stdout") == f"{far.home}\n".encode()
    (place,) = far.places()
    assert os.stat(place).st_mode & 0o777 == 0o700
    files, processes = far.left()
    assert any("deploy.hosted" in command for command in processes.values())
    secrets = agent.file["token"].encode(), b"PRIVATE KEY"
    for file in [each for each in files if os.path.isfile(each)]:
        assert os.stat(file).st_mode & 0o077 == 0, file
        assert not _has(file, *secrets), file
    for pid in processes:
        assert not _has(f"/proc/{pid}/cmdline", *secrets)
        assert not _has(f"/proc/{pid}/environ", *secrets)
    agent.fetch("r")
    until(far.is_clean, PATIENCE_S)


def _has(path, *words):
    """Whether a file has one of these words; ours that name them are not meant."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:  # it has gone
        return False
    return not path.endswith((".py", ".pyc")) and any(word in data for word in words)


def test_single_agent_ends_when_its_run_is_fetched_and_the_shared_one_stays(far):
    shared, one = far.deploy(), far.deploy(single=True)
    assert len({shared.path, one.path}) == len(far.places()) == 2
    again = far.deploy()
    assert (again.path, again.file) == (shared.path, shared.file)  # its token is still good
    for agent in (shared, one):
        agent.start("r", "/bin/true")
        if agent is shared:
            _starts_with_a_lease(agent)
        agent.fetch("r")
    until(lambda: len(far.places()) == 1, PATIENCE_S)
    assert shared.status("r")["state"] == "terminated"
    # What reaches an agent with the file of another one says so, and sends nothing.
    with open(one.path, "w") as file:
        json.dump({**one.file, "url": shared.file["url"]}, file)
    with pytest.raises(AgentError) as caught:
        package.Spool(f"agent:{one.path}").live()
    assert str(caught.value).partition(": ")[2] == (
        "its certificate is refused: self-signed certificate"
    )
    with open(one.path, "w") as file:
        json.dump({**shared.file, "server_name": certificate().name}, file)
    with pytest.raises(AgentError) as caught:
        package.Spool(f"agent:{one.path}").live()
    assert ": its certificate is refused: Hostname mismatch" in str(caught.value)


def _starts_with_a_lease(agent):
    agent.start("own", "/bin/true", renew=5000)
    called = {"url": "https://127.0.0.1:9/r", "token": "t"}
    agent.start("called", "/bin/true", callback=called, config={"timeout": 1})
    assert [agent.spec(name)["renew"] for name in ("r", "own", "called")] == [2400, 5000, 1.5]


def test_run_that_is_not_renewed_ends_and_then_its_agent(far):
    agent = far.deploy(lease_s=2.0)
    ended = far.path / "ended"
    text = f"trap 'echo stopped >{ended}; exit 3' TERM; sleep 1000 & wait"
    agent.start("r", "/bin/sh", "-c", text)  # the only request: the next one may come too late
    until(ended.exists, PATIENCE_S)
    until(far.is_clean, PATIENCE_S)  # although nothing was fetched


def test_fetched_run_is_deleted_a_lease_later(far):
    agent = far.deploy(lease_s=0.5)
    agent.start("live", "/bin/sleep", "1000", renew=5000)
    agent.start("r", "/bin/true")
    agent.fetch("r")
    (place,) = far.places()
    until(lambda: not (place / "spool/r").exists(), PATIENCE_S)
    assert agent.status("live")["state"] == "running"
    assert agent.ask("POST", "/spool/runs/live/control", "kill")[0] == 200
    until(far.is_clean, PATIENCE_S)


# -- who finds it


def test_deployers_at_once_get_one_agent(far, monkeypatch, tmp_path):
    found, failed = [], []

    def go():
        try:
            found.append(far.deploy())
        except AgentError as error:
            failed.append(error)

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({(agent.port, agent.file["server_name"]) for agent in found}) == 1
    assert len(far.places()) == 1
    found[0].pid(far)
    # Another user of this host gets a token of its own, and all stay good.
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    other = far.deploy()
    assert (other.port, other.file["ca"]) == (found[0].port, found[0].file["ca"])
    assert other.file["token"] not in [agent.file["token"] for agent in found]
    assert [agent.ask("GET", "")[0] for agent in (*found, other)] == [200] * 4


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


def test_next_deploy_removes_what_a_killed_agent_for_one_run_left(far):
    killed = []
    for argv in ((), ("/bin/true",), ("/bin/sleep", "1000")):
        agent = far.deploy(single=True)
        if argv:
            agent.start("r", *argv)
        if argv == ("/bin/true",):
            until(lambda agent=agent: agent.status("r", wait=10)["state"] == "terminated")
        os.kill(agent.pid(far), signal.SIGKILL)
        until(lambda: not [1 for one in far.left()[1].values() if "deploy.hosted" in one])
        (place,) = set(far.places()) - set(killed)
        killed.append(place)
        os.utime(place / ".log", (0, 0))
        os.utime(place / ".tokens", (0, 0))
    shared = far.deploy()
    until(lambda: len(far.places()) == 2)
    (place,) = set(far.places()) & set(killed)
    assert place == killed[2]  # its run lives
    (pid,) = [pid for pid, command in far.left()[1].items() if command == "/bin/sleep 1000 "]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not list((place / "spool/.running").iterdir()))
    far.deploy()
    until(lambda: far.places() == [place for place in far.places() if place not in killed])
    assert shared.ask("GET", "")[0] == 200


@pytest.mark.tier("agents")
@pytest.mark.parametrize("minor", range(10, 16))
def test_agent_of_each_python(minor, tmp_path, monkeypatch):
    need("openssl")
    lacks = [name for name, before in bundle().lacks.items() if minor < before]
    if lacks:
        absent(f"needs the packages {', '.join(lacks)} here")
    there = Far(tmp_path, pythons.interpreter(minor))
    monkeypatch.setenv("HOME", str(tmp_path / "near"))
    try:
        path = there.deploy(single=True).path
        spool = package.Spool(f"agent:{path}")
        run = spool.start({"id": "r", "program": {"argv": ["/bin/echo", "hello"]}})
        assert (run.wait().return_code, run.read()) == (0, b"hello\n")
        spool.collect("r")
        until(there.is_clean, PATIENCE_S)
    finally:
        there.end()


# -- what is refused


def test_agent_that_can_not_listen_is_one_sentence_and_leaves_nothing(far):
    with pytest.raises(AgentError) as caught:
        far.deploy(listen=("203.0.113.7", 1234))
    assert str(caught.value) == (
        f"unable to deploy an agent {WHERE}: the agent did not start: unable to listen on"
        " '203.0.113.7:1234': Cannot assign requested address"
    )
    assert far.is_clean()


def test_full_disk_is_one_sentence_and_leaves_nothing(far):
    limited = {"exec": {"argv": ["/bin/sh", "-c", 'ulimit -f 100; exec "$@"', "sh"]}}
    with pytest.raises(AgentError) as caught:
        far.deploy(limited)
    place = far.home / f".chaperone/agent-{os.uname().nodename}"
    assert str(caught.value).partition(": ")[2] == f"unable to write to '{place}': File too large"
    assert far.is_clean()


def test_agent_that_can_not_be_reached_is_one_sentence_and_ends(far, monkeypatch):
    def refuse(*_):
        raise TimeoutError("timed out")

    monkeypatch.setattr("chaperone.agent.deploy.deploy._knock", refuse)
    with pytest.raises(AgentError) as caught:
        far.deploy(idle_s=0.2)
    begin, _, end = str(caught.value).partition(" at port ")
    assert begin == f"unable to reach the agent {WHERE}"
    assert end.partition(": ")[2] == (
        "127.0.0.1: timed out"
        " (use --listen to choose an address and a port that this host can reach)"
    )
    until(far.is_clean, PATIENCE_S)


def test_text_that_is_cut_on_the_way_starts_nothing(far, sshd):
    (ssh,) = hops(sshd.remote())
    home = {"exec": {"argv": ["env", f"HOME={far.home}"]}}
    for size in (200_000, 1_000_000):
        cut = {"exec": {"argv": ["/bin/sh", "-c", f'head -c {size} | "$@"', "sh"]}}
        with pytest.raises(AgentError) as caught:
            deploy(Place(hops=[cut, ssh, home]))
        assert str(caught.value).partition(": ")[2] == (
            "the connection ended with code 97 and no answer: the text was cut"
        )
    assert far.is_clean()


def test_login_that_is_refused_is_one_sentence(far, sshd):
    (ssh,) = hops(sshd.remote(user="no-such-user"))
    with pytest.raises(AgentError) as caught:
        deploy(Place(hops=[ssh]))
    assert str(caught.value) == (
        "unable to deploy an agent on 127.0.0.1, as no-such-user:"
        " no-such-user@127.0.0.1: Permission denied (publickey)."
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
        f"unable to deploy an agent {WHERE}: '{place}': want a directory of this user alone"
    )


# -- the command


def test_command_prints_the_file_that_the_verbs_take(chaperone, far, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"remote": {"hops": [far.hop]}}))
    made = chaperone("deploy", "--spec", spec, "--single", "--listen", "127.0.0.1:0")
    assert (made.returncode, made.stderr) == (0, "")
    (path,) = (tmp_path / "near/.chaperone/agents").iterdir()
    assert made.stdout == f"agent:{path}\n"
    place = ["--spool", made.stdout.strip()]
    ran = chaperone("run", "--detach", "--id", "r", *place, "--", "/bin/echo", "hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "r\n", "")
    assert streams(chaperone("wait", *place, "r")) == (0, "", "")
    assert streams(chaperone("tail", *place, "r")) == (0, "hello\n", "")
    assert chaperone("rm", *place, "r").returncode == 0
    until(far.is_clean, PATIENCE_S)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "want either HOST or --spec"),
        (["db3", "--spec", "-"], "want either HOST or --spec"),
        (["db3", "--listen", "8470"], "'--listen': want HOST:PORT, got '8470'"),
    ],
)
def test_words_that_can_not_be_understood(chaperone, words, said):
    ran = chaperone("deploy", *words)
    where = "" if said.startswith("'") else "'chaperone deploy': "
    assert ran.stderr == f"chaperone: unable to understand {where}{said}\n"
    assert ran.returncode == os.EX_USAGE


def test_spec_without_hops_is_refused(chaperone):
    ran = chaperone("deploy", "--spec", "-", spec={"program": {"argv": ["true"]}})
    assert ran.stderr == (
        "chaperone: unable to deploy by spec '-': remote: required field is missing\n"
    )
    assert ran.returncode == os.EX_DATAERR
