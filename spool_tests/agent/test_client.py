"""
A spool over the wire: the calls, values and errors of one on this host.

Knows: run directories, a real agent.  Must not know: what the agent is asked.
"""

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import socket
import threading
import time
import uuid

import pytest

import chaperone
from chaperone import aio, api
from chaperone.agent.client import connection
from chaperone.errors import (
    AgentError,
    BusyError,
    NoRunError,
    RunExistsError,
    SpecError,
    SpoolError,
)
from chaperone.model.events import Changed, Ended, Lost, Output, Started
from chaperone.program.fds import owned
from chaperone.spool import format
from chaperone.spool.sweep import sweep
from spool_tests.support.agents import end_all, served
from spool_tests.support.alike import CALLS, outcome
from spool_tests.support.events import next_of
from spool_tests.support.waiting import until
from spool_tests.support.writer import Crowd, Writer

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    with served(tmp_path_factory.mktemp("agent")) as agent:
        yield agent


class Two:
    """
    A spool in both ways: on this host, and over the wire.

    Attributes:
        path (Path): Its directory.
        near, far, tasks: The blocking one of this host, that of the agent, and the agent's
            coroutines.
    """

    def __init__(self, agent, path):
        self.path = path
        proofs = {"token_file": agent.token_files["run"], "ca": agent.ca}
        url = f"{agent.url}/{path.name}"
        self.near = api.Spool(path)
        self.far = chaperone.Spool(url, **proofs)
        self.tasks = aio.Spool(url, **proofs)


@pytest.fixture
def two(agent):
    path = agent.directory / f"s{uuid.uuid4().hex}"
    path.mkdir(0o700)
    yield Two(agent, path)
    end_all(path)


def sh(text, **program):
    return {"id": "r", "program": {"command": text, **program}}


def forms(calls):
    return {name: call for name, call in calls.items() if not name.startswith("_")}


# -- the calls of a run


def alike(two, run_id="r"):
    """Make each call in the three ways, and compare."""
    tasks = two.tasks[run_id]
    far = pickle.loads(pickle.dumps(two.far))._run(run_id)
    for name, call in CALLS.items():
        near = outcome(call, api.Run(str(two.path), run_id))
        assert outcome(call, far) == near, name
        assert outcome(call, tasks) == near, name


def test_ended_run_answers_alike(two):
    with Writer(two.path) as writer:
        writer.write(b"abcdef").write(b"xyz", "stderr").end(3)
    alike(two)


def test_deleted_run_answers_alike(two):
    with Writer(two.path):
        pass
    shutil.rmtree(two.path / "r")
    alike(two)


def test_id_that_no_run_can_have_answers_alike(two):
    two.near.follow().close()
    alike(two, "../r")


def test_lost_run_is_lost_for_each(two):
    with Writer(two.path) as writer:
        writer.running().write(b"abcdef")
    far = two.far["r"]
    for status in (far.wait(), far.wait(0), far.status(), asyncio.run(two.tasks["r"].wait())):
        assert (status.state, status.exception["message"]) == (
            "lost",
            two.near["r"].wait().exception["message"],
        )
    assert (far.read(), list(far.tail())) == (b"abcdef", [b"abcdef"])


def sockets():
    """The fds of this process that are sockets."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                found.add(fd)
    return found


def test_loop_that_ends_closes_what_was_kept_open(agent, two):
    before = sockets()

    async def main():
        spool = Two(agent, two.path).tasks
        await asyncio.gather(*(spool.live() for _ in range(5)))
        assert sockets() - before

    asyncio.run(main())
    assert sockets() <= before


def test_question_that_is_cancelled_in_the_handshake_closes_its_socket(agent, two):
    async def main(url):
        spool = aio.Spool(url, token_file=agent.token_files["run"], ca=agent.ca)
        before = sockets()
        asking = asyncio.create_task(spool.live())
        met, _ = await asyncio.to_thread(server.accept)
        with met:
            assert await asyncio.to_thread(met.recv, 1, socket.MSG_PEEK)
            asking.cancel()
            await asyncio.wait([asking])
        while sockets() - before:
            await asyncio.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}/etl"
        asyncio.run(asyncio.wait_for(main(url), 60))


def test_connections_are_closed_when_they_are_not_used(two, monkeypatch):
    monkeypatch.setattr(connection, "KEPT_S", 0.05)

    async def main():
        before = sockets()
        await two.tasks.live()
        while sockets() - before:
            await asyncio.sleep(0.01)
        assert await two.tasks.live() == []

    asyncio.run(asyncio.wait_for(main(), 60))


def test_calls_and_arguments_are_those_of_this_host():
    import inspect

    from chaperone.agent.client import aio as tasks
    from chaperone.agent.client import follower, spool
    from chaperone.follow.follower import Follower

    def calls(kind):
        return {
            name: list(inspect.signature(call).parameters)
            for name, call in inspect.getmembers(kind)
            if callable(call) and not name.startswith("_")
        }

    for far, near in (
        (spool.Spool, api.Spool),
        (spool.Run, api.Run),
        (follower.Follower, Follower),
        (tasks.Spool, aio.Spool),
        (tasks.Run, aio.Run),
        (tasks.Follower, aio.Follower),
    ):
        expected = calls(near)
        for name in ("gc", "anext", "watch", "unwatch", "forget", "look_again"):
            expected.pop(name, None)  # of a directory, or of other modules
        if "follow" in expected:
            expected["follow"].remove("poll_s")
        assert calls(far) == expected


def test_agent_is_like_any_spool(two):
    assert isinstance(two.far, chaperone.SpoolLike)
    assert repr(two.far) == f"Spool({two.far._connection.place.text!r})"
    assert repr(two.tasks) == f"aio.{two.far!r}"


# -- the calls of a spool


def test_listings_and_cursor_are_alike(two):
    with Writer(two.path, "live"), Writer(two.path, "over") as over, Writer(two.path, "old") as old:
        over.end()
        old.end()
        two.far.collect("old")
        two.far.collect("live")  # it has not ended: nothing is done

        async def listed():
            return [
                [run.run_id for run in await getattr(two.tasks, name)()]
                for name in ("live", "ended", "all")
            ]

        expected = [["live"], ["over"], ["live", "old", "over"]]
        for spool in (two.near, two.far):
            found = [getattr(spool, name)() for name in ("live", "ended", "all")]
            assert [[run.run_id for run in runs] for runs in found] == expected
        assert asyncio.run(listed()) == expected
        assert two.far.cursor() == asyncio.run(two.tasks.cursor()) == two.near.cursor()


def test_listing_takes_as_many_pages_as_it_needs(two, monkeypatch):
    from chaperone.agent.client import calls

    monkeypatch.setattr(calls, "PAGE", 3)
    with Crowd(two.path, 8) as crowd:
        assert [run.run_id for run in two.far.live()] == sorted(crowd.ids)


@pytest.mark.parametrize("run_id", ["r", "../spool", ".running", ""])
def test_run_that_is_not_there_is_an_error(two, run_id):
    two.near.follow().close()
    assert outcome(lambda: two.far[run_id]) == outcome(lambda: two.near[run_id])


def test_spool_that_is_not_there_is_an_error(two):
    shutil.rmtree(two.path)
    with pytest.raises(SpoolError) as caught:
        two.far.live()
    assert str(caught.value) == (
        f"unable to open spool {two.path.name!r}: this agent has no spool of that name"
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"program": {"argv": "ls"}},
        {"id": "../r", "program": {"argv": ["ls"]}},
        {"id": 7, "program": {"argv": ["ls"]}},
        [],
        None,
    ],
)
def test_bad_spec_is_refused_alike(two, spec):
    near = outcome(lambda: two.near.start(spec))
    assert near[0] is SpecError
    assert outcome(lambda: two.far.start(spec)) == near
    assert outcome(lambda: two.tasks.start(spec)) == near


def test_spec_that_is_not_json_is_refused(two):
    with pytest.raises(SpecError, match="^unable to start a run: "):
        two.far.start({"program": {"argv": [b"ls"]}})
    assert os.listdir(two.path) == []


@pytest.mark.parametrize("keywords", [{"cursor": []}, {"streams": ["log"]}])
def test_following_is_refused_alike(two, keywords):
    near = outcome(lambda: two.near.follow(**keywords))
    assert outcome(lambda: two.far.follow(**keywords)) == near
    assert outcome(lambda: two.tasks.follow(**keywords)) == near


# -- real runs


def test_run_is_started_waited_for_and_read(two):
    run = two.far.start(sh("echo out; echo err >&2; exit 3"))
    status = run.wait(60)
    assert (run.run_id, status.state, status.exit_code) == ("r", "terminated", 3)
    assert (run.read(), run.read("stderr"), run.read("log")) == (b"out\n", b"err\n", b"")
    assert (run.size(), run.read("stdout", 2, 1), run.read("stdout", 99)) == (4, b"t", b"")
    assert run.status() == status == two.near["r"].status()
    with pytest.raises(RunExistsError, match="^unable to create run 'r': it exists$"):
        two.far.start(sh("exit 4"))
    run.delete()
    with pytest.raises(NoRunError):
        run.status()


def test_environment_and_directory_are_the_callers_if_it_gives_them(two):
    run = two.far.start(sh('echo "$WORD $PWD"'), warm=False, env={"WORD": "hi"}, cwd="/tmp")
    run.wait()
    assert run.read() == b"hi /tmp\n"
    with pytest.raises(SpecError):
        two.far.start({"program": {"argv": ["ls"]}}, env={"": "x"})


def test_stream_longer_than_an_answer_is_read_whole(two):
    data = os.urandom(3 << 20)
    with Writer(two.path) as writer:
        writer.write(data)
        run = two.far["r"]
        assert run.read(size=1 << 30) == data
        assert run.read(offset=5, size=2 << 20) == data[5:][: 2 << 20]
        assert run.read(size=2**63 - 1, offset=len(data) - 1) == data[-1:]


def test_run_is_signalled_stopped_and_killed(two, tmp_path):
    end = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; exit 7"
    traps = f"trap 'echo usr1' USR1; trap 'trap : TERM; echo term; {end}' TERM; "
    run = two.far.start(sh(traps + "echo up; while :; do sleep 0.05; done"))
    lines = run.tail()
    assert next(lines) == b"up\n"
    run.signal("USR1")
    assert next(lines) == b"usr1\n"
    run.signal(signal.SIGUSR1)
    assert next(lines) == b"usr1\n"
    assert run.wait(0.01) is run.wait(0) is None
    assert not run.stop(grace_s=300, wait=False, by="me").is_final()
    assert next(lines) == b"term\n"
    (tmp_path / "go").touch()
    status = run.stop()
    assert (status.return_code, status.stop["by"]) == (7, "me")
    assert list(lines) == []
    assert (run.stop(), run.kill()) == (status, status)


def test_requester_is_the_token_without_another_name(two):
    run = two.far.start(sh("exec sleep 600"))
    assert (run.kill().signal, run.status().stop["by"]) == ("SIGKILL", "runner")


def test_lease_is_renewed_by_whoever_asks_and_by_no_stream(two):
    def is_renewed(number, lease):
        run = two.far.start({**sh("exec sleep 600"), "id": f"r{number}", "renew": lease})
        began = time.monotonic()
        while time.monotonic() < began + 1.5 * lease:
            two.far.renew()
            two.far.renew([run.run_id, "gone"])
            asyncio.run(two.tasks.renew([run.run_id]))
        return not run.status().is_final()

    with two.far.follow() as follower:
        next_run = enumerate((1.0, 5.0, 30.0))  # a longer one where the machine is too slow
        last = next(number for number, lease in next_run if is_renewed(number, lease))
        while (ended := next_of(follower, Ended)).run_id != f"r{last}":
            pass
        assert ended.status.stop["reason"] == "lease"


def test_follower_collects_what_has_ended(two):
    with two.far.follow() as follower:
        two.far.start(sh("echo out; exit 3"))
        kinds = []
        while Ended not in kinds:
            kinds.append(type(follower.next(60)))
        assert [kind for kind in kinds if kind is not Changed] == [Started, Output, Ended]
        assert follower.uncollected == ["r"] and follower.is_uncollected("r")
        until((two.path / ".ended" / "r").is_symlink)
        assert follower.entry("r") == follower.cursor["runs"]["r"]
        with pytest.raises(SpecError) as caught, Writer(two.path, "live"):
            next_of(follower, Started)
            follower.collect("live")
        assert str(caught.value) == ("unable to collect run 'live': its end was not delivered yet")
        follower.collect("r")
        follower.collect("r")  # a second time there is nothing to do
        assert (follower.entry("r"), follower.uncollected) == (None, [])
    assert two.near.ended() == []


def test_follower_of_named_runs_ends_with_them(two):
    with Writer(two.path, "a") as a, Writer(two.path, "b") as b:
        a.write(b"one").end()
        with two.far.follow(runs=["a", "b", "later"]) as follower:
            assert next_of(follower, Ended).run_id == "a"
            assert follower.next(0) is None or not follower.is_over()
            b.end()
            assert next_of(follower, Ended).run_id == "b"
            cursor = follower.cursor
            assert set(cursor["runs"]) == {"a", "b", "later"}
        with two.far.follow(cursor, runs=["a", "b"]) as follower:
            assert [*follower] == [] and follower.is_over()
            assert follower.uncollected == ["a", "b"]


def test_follower_waits_no_longer_than_it_may(two):
    with two.far.follow() as follower:
        assert follower.next(0) is None and follower.next(0.05) is None
        with Writer(two.path) as writer:
            assert isinstance(follower.next(float("inf")), Started)
            writer.end()
        follower.close()
        assert follower.next() is None


def test_run_that_is_deleted_while_it_is_waited_for_is_an_error(two):
    with Writer(two.path) as writer, two.far.follow() as follower:
        writer.running().write(b"x")
        next_of(follower, Output)
        tail = two.far["r"].tail()
        assert next(tail) == b"x"
        reading = threading.Thread(target=lambda: errors.append(outcome(lambda: tail)))
        errors = []
        reading.start()
        shutil.move(two.path / "r", two.path / ".r.x.gone")
        assert next_of(follower, Ended).status is None
        reading.join()
    assert errors == [(NoRunError, "unable to follow run 'r': it was deleted", None)]


def test_loss_is_reported(two):
    with Writer(two.path) as writer, two.far.follow(runs=["r"]) as follower:
        writer.running().write(b"x")
        assert next_of(follower, Output).data == b"x"
        writer.die()
        assert next_of(follower, Lost).status.state == "lost"


def test_sweep_of_another_process_is_an_error(two):
    with Writer(two.path) as writer:
        writer.end()
    with owned(format.open_spool(str(two.path))) as spool_fd, sweep(spool_fd, str(two.path)):
        with pytest.raises(BusyError, match="another chaperone reap or gc is running$"):
            two.far["r"].delete()


def test_live_run_is_not_deleted(two):
    with Writer(two.path):
        near = outcome(two.near["r"].delete)
        assert outcome(two.far["r"].delete) == near


# -- coroutines


def test_coroutines_follow_collect_and_leave_nothing(two):
    async def job(number):
        run = await two.tasks.start({"program": {"command": f"echo {number}; exit {number}"}})
        output = b"".join([data async for data in run.tail()])
        return output, (await run.wait()).return_code

    async def main():
        async with two.tasks.follow() as follower:
            jobs = asyncio.gather(*(job(number) for number in range(4)))
            ended = 0
            async for event in follower:
                if isinstance(event, Ended):
                    ended += 1
                    entry = two.path / ".ended" / event.run_id
                    await asyncio.to_thread(until, entry.is_symlink)
                    await follower.collect(event.run_id)
                    if ended == 4:
                        break
            assert await jobs == [(b"%d\n" % number, number) for number in range(4)]
            assert follower.cursor == {"runs": {}}

    asyncio.run(main())
    asyncio.run(main())  # another loop
    assert two.near.ended() == []


def test_coroutine_that_is_cancelled_or_times_out_leaves_the_follower_whole(two):
    async def main():
        async with two.tasks.follow(runs=["r"]) as follower:
            assert await follower.next(0) is None
            # Then nothing comes any more before the task is cancelled.
            assert isinstance(await follower.next(60), Started)
            assert isinstance(await follower.next(60), Changed)
            waiting = asyncio.create_task(follower.next())
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(two.tasks["r"].wait(), 0.01)
            writer.write(b"abc").end()
            return [event async for event in follower if isinstance(event, Output)]

    with Writer(two.path) as writer:
        (event,) = asyncio.run(main())
    assert event.data == b"abc"


# -- rights


def test_token_that_only_looks_starts_nothing(two, agent):
    url = f"{agent.url}/{two.path.name}"
    look = chaperone.Spool(url, token_file=agent.token_files["look"], ca=agent.ca)
    with Writer(two.path) as writer:
        assert look["r"].status().state == "starting"
        for ask in (
            lambda: look.start({"program": {"argv": ["true"]}}),
            look["r"].stop,
            lambda: look["r"].signal("USR1"),
            look["r"].delete,
            lambda: look.collect("r"),
            lambda: look.renew(["r"]),
        ):
            with pytest.raises(AgentError) as caught:
                ask()
            assert str(caught.value) == (
                "unable to answer a request: token 'looker' has only the right 'look'"
            )
        writer.end()


def test_token_that_is_not_valid_is_refused(two, agent, tmp_path):
    tmp_path.joinpath("token").write_text("stale\n")
    url = f"{agent.url}/{two.path.name}"
    spool = chaperone.Spool(url, token_file=tmp_path / "token", ca=agent.ca)
    sentence = "unable to answer a request: its token is not valid"
    with pytest.raises(AgentError) as caught:
        spool.live()
    assert str(caught.value) == sentence
    with spool.follow() as follower:
        for _ in range(2):
            with pytest.raises(AgentError) as caught:
                follower.next()
            assert str(caught.value) == sentence
        tmp_path.joinpath("token").write_text(agent.token_files["run"].read_text())
        with Writer(two.path):
            assert isinstance(follower.next(60), Started)
