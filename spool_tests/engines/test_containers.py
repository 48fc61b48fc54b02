"""
What only a container does to a run: it is stopped or removed under it, or was never there.
"""

import pytest

from spool_tests.support.engines import sleepers, way_of, word
from spool_tests.support.runs import final, log, running, sh, start, stdout
from spool_tests.support.waiting import until

pytestmark = [pytest.mark.tier("engines"), pytest.mark.root]
engines = pytest.mark.parametrize("kind", ["docker", "podman"])


def entered(kind, request, monkeypatch, image="busybox"):
    way = way_of(f"{kind} exec {image}", request)
    for name, value in way.engine.env.items():
        monkeypatch.setenv(name, value)
    return way


@engines
@pytest.mark.parametrize("end", ["stop", "remove"])
@pytest.mark.parametrize("life", ["kill", "survive"])
def test_container_that_goes_takes_the_run_with_it(spool, kind, end, life, request, monkeypatch):
    way, name = entered(kind, request, monkeypatch), word()
    spec = {"on_disconnect": life, "lease": 3, "stop": {"grace_period": 0.5}}
    chaperone = start(spool, sh(f"echo up; sleep {name}"), remote=way.remote, **spec)
    running(spool)
    until(lambda: stdout(spool) and sleepers(name))
    words = {"stop": ["stop", "--time", "0"], "remove": ["rm", "--force"]}[end]
    way.engine.ask(*words, way.container)
    assert chaperone.wait(90) == 0
    status = final(spool)
    assert (status["state"], status["complete"]) == ("lost", False), log(spool)
    assert status["return_code"] is None and status["signal"] is None
    assert stdout(spool) == b"up\n"
    until(lambda: not sleepers(name))


@engines
def test_container_that_was_never_there_is_an_error_at_once(spool, kind, request, monkeypatch):
    entered(kind, request, monkeypatch)
    remote = {"hops": [{kind: {"container": "nobox"}}]}
    assert start(spool, sh("echo ran"), remote=remote).wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "name", status["exception"]


@engines
def test_container_that_is_stopped_is_waited_for_and_then_an_error(
    spool, kind, request, monkeypatch
):
    way = entered(kind, request, monkeypatch)
    way.engine.ask("stop", "--time", "0", way.container)
    chaperone = start(spool, sh("echo ran"), remote=way.remote, timeouts={"connect": 2})
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "connect", status["exception"]
    again = start(spool, sh("echo ran"), "again", remote=way.remote, timeouts={"connect": 60})
    way.engine.ask("start", way.container)
    assert again.wait(60) == 0
    assert (final(spool, "again")["return_code"], stdout(spool, "again")) == (0, b"ran\n")


@engines
def test_user_and_directory_of_the_hop(spool, kind, request, monkeypatch):
    way = entered(kind, request, monkeypatch)
    hop = {"container": way.container, "user": "etl", "workdir": "/tmp"}
    assert start(spool, sh("id -u; pwd"), remote={"hops": [{kind: hop}]}).wait(60) == 0
    assert stdout(spool) == b"1000\n/tmp\n", log(spool)
    wrong = start(
        spool, sh("true"), "wrong", remote={"hops": [{kind: {**hop, "user": "nobody-at-all"}}]}
    )
    assert wrong.wait(60) == 0
    status = final(spool, "wrong")
    assert (status["state"], status["started"], status["exception"]["stage"]) == (
        "error",
        False,
        "usage",
    ), status["exception"]


@engines
def test_container_behind_ssh(spool, kind, request, monkeypatch, sshd):
    way = entered(kind, request, monkeypatch)
    env = [f"{name}={value}" for name, value in way.engine.env.items()]
    hops = [{"ssh": sshd.remote()}, {"exec": {"argv": ["env", *env]}}, *way.remote["hops"]]
    assert start(spool, sh("cat; exit 3", stdin="in"), remote={"hops": hops}).wait(60) == 0
    assert (final(spool)["return_code"], stdout(spool)) == (3, b"in"), log(spool)


@pytest.mark.parametrize(
    "hop",
    [
        {"docker": {"container": "etl"}},
        {"docker": {"image": "etl:3"}},
        {"podman": {"container": "etl"}},
        {"podman": {"image": "etl:3"}},
        {"srun": {}},
        {"exec": {"argv": ["nsenter", "-t", "1"]}},
    ],
)
def test_engine_that_is_not_installed(spool, hop, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start(spool, sh("true"), remote={"hops": [hop]}).wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    program = "nsenter" if "exec" in hop else next(iter(hop))
    assert status["exception"] == {
        "stage": "spawn",
        "type": None,
        "errno": None,
        "message": f"unable to run '{program}': No such file or directory",
    }


@engines
def test_user_that_an_image_does_not_have(spool, kind, request, monkeypatch):
    way = entered(kind, request, monkeypatch)
    hop = {"image": way.engine.image("busybox"), "user": "nobody-at-all"}
    assert start(spool, sh("echo ran"), remote={"hops": [{kind: hop}]}).wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "usage", status["exception"]


@engines
def test_container_of_a_run_that_is_removed_takes_the_run_with_it(
    spool, kind, request, monkeypatch
):
    way, name = entered(kind, request, monkeypatch), word()
    remote = {"hops": [{kind: {"image": way.engine.image("busybox")}}]}
    before = set(way.engine.ask("ps", "--quiet").split())
    chaperone = start(spool, sh(f"echo up; sleep {name}"), remote=remote)
    running(spool)
    until(lambda: stdout(spool) and sleepers(name))
    (made,) = set(way.engine.ask("ps", "--quiet").split()) - before
    way.engine.ask("rm", "--force", made)
    assert chaperone.wait(90) == 0
    status = final(spool)
    assert status["return_code"] is None and status["signal"] is None, log(spool)
    assert (status["state"], status["complete"]) == ("lost", False)
    until(lambda: not sleepers(name))
