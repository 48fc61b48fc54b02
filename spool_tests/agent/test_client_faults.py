"""
What a client makes of a network that cuts, loses and repeats, and of an agent that is killed.

Knows: a real agent behind a proxy.  Must not know: the code of the client.
"""

import asyncio
import hashlib
import random
import time

import pytest

import chaperone
from chaperone import aio
from chaperone.agent.client import calls, connection, following, question
from chaperone.errors import AgentError
from chaperone.model.events import Changed, Ended, Lost, Output, Started
from spool_tests.support.agents import served
from spool_tests.support.events import next_of
from spool_tests.support.proxy import CuttingProxy, LosingProxy, SilentProxy
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once


@pytest.fixture
def agent(tmp_path):
    with served(tmp_path) as agent:
        yield agent


@pytest.fixture
def hurried(monkeypatch):
    """Come again at once, as tests do."""
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(following, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(question, "PATIENCE_S", 60.0)
    monkeypatch.setattr(following, "PATIENCE_S", 60.0)


def spool_at(agent, url, kind=chaperone.Spool):
    return kind(url, token_file=agent.token_files["run"], ca=agent.ca)


def first(fate, *methods):
    """This fate for the first of each request with one of the methods."""
    return lambda name, before: fate if name.split()[0] in methods and not before else "pass"


# -- questions


@pytest.mark.parametrize("fate", ["lost", "never", "twice"])
def test_start_is_one_start_whatever_becomes_of_its_answer(agent, hurried, tmp_path, fate):
    with LosingProxy(agent, first(fate, "PUT", "POST", "GET")) as proxy:
        spool = spool_at(agent, proxy.url())
        text = f"echo started >>{tmp_path}/started; exec sleep 600"
        run = spool.start({"id": "r", "program": {"command": text}})
        with pytest.raises(chaperone.RunExistsError):
            spool.start({"id": "r", "program": {"command": text}})
        until((tmp_path / "started").exists)
        status = run.stop(by="me")
        assert (status.signal, status.stop["by"]) == ("SIGTERM", "me")
        until((agent.spool / ".ended" / "r").is_symlink)
        spool.collect("r")
        assert spool.ended() == []
    assert (tmp_path / "started").read_text() == "started\n"


def test_start_that_is_given_up_says_what_may_have_become_of_it(agent, monkeypatch):
    monkeypatch.setattr(calls, "START_S", 0.1)
    monkeypatch.setattr(question, "PATIENCE_S", 0.1)
    spec = {"id": "r", "program": {"argv": ["true"]}}
    with LosingProxy(agent, lambda name, before: "lost") as proxy:
        with pytest.raises(AgentError) as caught:
            spool_at(agent, proxy.url()).start(spec)
    why = "it closed the connection before its answer was complete"
    assert str(caught.value) == f"unable to start run 'r': it may have been started: {why}"
    assert spool_at(agent, agent.spool_url)["r"].wait().return_code == 0
    agent.kill()
    with pytest.raises(AgentError) as caught:
        spool_at(agent, agent.spool_url).start(spec)
    assert str(caught.value).startswith(f"unable to reach the agent of {agent.spool_url!r}: ")


def test_start_that_was_sent_once_may_be_one_however_the_last_try_failed():
    call = calls.start("etl", {"id": "r", "program": {"argv": ["true"]}}, True, None, None)
    assert isinstance(next(call), question.Question)
    assert isinstance(call.throw(question.Unanswered("", "cut", was_sent=True)), question.Pause)
    assert isinstance(call.send(None), question.Question)
    refused = question.Unanswered("", "refused", was_sent=False, is_settled=True)
    with pytest.raises(AgentError) as caught:
        call.throw(refused)
    assert str(caught.value) == "unable to start run 'r': it may have been started: refused"


@pytest.mark.parametrize("kind", [chaperone.Spool, aio.Spool])
def test_signal_is_never_sent_twice(agent, kind):
    traps = "trap 'echo usr1' USR1; echo up; while :; do sleep 0.02; done"
    near = spool_at(agent, agent.spool_url)
    run = near.start({"id": "r", "program": {"command": traps}})
    assert next(run.tail()) == b"up\n"

    async def signal(spool):
        done = (spool["r"] if kind is chaperone.Spool else spool["r"]).signal("USR1")
        return done if done is None else await done

    why = "it closed the connection before its answer was complete"
    sentence = f"unable to signal run 'r': it may have been delivered: {why}"
    for fate, expected in (("lost", b"up\nusr1\n"), ("never", b"up\nusr1\n")):
        with LosingProxy(agent, first(fate, "POST")) as proxy:
            with pytest.raises(AgentError) as caught:
                asyncio.run(signal(spool_at(agent, proxy.url(), kind)))
            assert str(caught.value) == sentence
            assert [name for name in proxy.requests if name[:4] == "POST"] == [
                "POST /api/v1/etl/runs/r/control"
            ]
        until(lambda expected=expected: run.read() == expected)


def test_deletion_whose_answer_is_lost_is_done(agent):
    with Writer(agent.spool) as writer:
        writer.end()
    with LosingProxy(agent, first("lost", "DELETE")) as proxy:
        spool_at(agent, proxy.url())["r"].delete()
    assert not (agent.spool / "r").exists()


def test_questions_wait_for_an_agent_that_is_started_again(agent, hurried):
    spool = spool_at(agent, agent.spool_url)
    agent.kill()
    found = []

    async def main():
        task = asyncio.create_task(spool_at(agent, agent.spool_url, aio.Spool).live())
        await asyncio.to_thread(agent.start)
        found.append(await task)

    asyncio.run(main())
    assert (found, spool.live()) == ([[]], [])


def test_agent_that_does_not_answer_is_given_up(agent, monkeypatch):
    monkeypatch.setattr(question, "PATIENCE_S", 0.0)
    with LosingProxy(agent, lambda name, before: "never") as proxy:
        with pytest.raises(AgentError) as caught:
            spool_at(agent, proxy.url()).live()
        why = "it closed the connection before its answer was complete"
        assert str(caught.value) == f"unable to reach the agent of {proxy.url()!r}: {why}"
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("kind", [chaperone.Spool, aio.Spool])
def test_silent_network_is_no_question_of_trust(agent, monkeypatch, kind):
    monkeypatch.setattr(question, "PATIENCE_S", 0.0)
    monkeypatch.setattr(connection, "CONNECT_S", 0.2)

    async def ask(spool):
        found = spool.live()
        return found if kind is chaperone.Spool else await found

    with SilentProxy(agent) as proxy:
        proxy.set_silent(True)
        with pytest.raises(AgentError) as caught:
            asyncio.run(ask(spool_at(agent, proxy.url(), kind)))
        why = "it did not answer in time"
        assert str(caught.value) == f"unable to reach the agent of {proxy.url()!r}: {why}"


# -- followers


def test_follower_says_why_it_is_late(agent, hurried):
    with spool_at(agent, agent.spool_url).follow() as follower:
        with Writer(agent.spool) as writer:
            next_of(follower, Changed)
            assert follower.polling is None
            agent.kill()
            until(lambda: follower.next(0) is None and follower.polling is not None)
            assert follower.polling.startswith(f"following {agent.spool_url!r} again within ")
            writer.running().write(b"meanwhile")
            agent.start()
            assert next_of(follower, Output, 30).data == b"meanwhile"
            assert follower.polling is None


@pytest.mark.parametrize("kind", [chaperone.Spool, aio.Spool])
def test_follower_hides_no_bug(agent, kind, monkeypatch):
    def reading(self):
        yield question.Pause(0)
        raise ZeroDivisionError

    async def taken():
        follower = spool_at(agent, agent.spool_url, kind).follow()
        try:
            event = follower.next()
            return event if event is None else await event
        finally:
            closing = follower.close()
            if closing is not None:
                await closing

    monkeypatch.setattr(following.Following, "reading", reading)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(taken())


def test_what_waits_to_be_collected_is_collected_later(agent, hurried, monkeypatch):
    monkeypatch.setattr(following, "AGAIN_S", 0.0)
    spool = spool_at(agent, agent.spool_url)
    with spool.follow() as follower, Writer(agent.spool, "other") as other:
        with Writer(agent.spool, "r", key="5" * 32) as writer:
            writer.running().publish()  # its entry is still in .running/
            while getattr(next_of(follower, Ended), "run_id", None) != "r":
                pass
            follower.collect("r")
            assert (follower.uncollected, "r" in follower.cursor["runs"]) == (["r"], True)
            writer.end()
        other.running().write(b"x")
        until(lambda: follower.next(0) is None and "r" not in follower.cursor["runs"])
        assert follower.uncollected == []
    assert [run.run_id for run in spool.ended()] == []


class Copy:
    """What a scheduler has of runs: their bytes as digests, and their ends."""

    def __init__(self):
        self.sizes, self.digests, self.ends, self.started = {}, {}, {}, []

    def take(self, event):
        if isinstance(event, Started):
            self.started.append(event.run_id)
        elif isinstance(event, Output):
            name = (event.run_id, event.stream)
            assert event.offset == self.sizes.get(name, 0), name
            self.sizes[name] = event.offset + len(event.data)
            self.digests.setdefault(name, hashlib.sha256()).update(event.data)
        elif isinstance(event, (Ended, Lost)):
            self.ends.setdefault(event.run_id, []).append(event.status.return_code)

    def hexes(self):
        return {name: digest.hexdigest() for name, digest in self.digests.items()}


class Writers:
    """Fifty runs that write, and then end one by one."""

    def __init__(self, spool, seed, count=50):
        self._dice = random.Random(f"writers {seed}")
        self._live = [
            Writer(spool, f"run-{number}", key=f"{number:032x}").running()
            for number in range(count)
        ]
        self.digests, self.ends = {}, {}

    def write(self):
        """Some bytes; now and then one ends. False when all have ended."""
        for _ in range(5):
            writer = self._dice.choice(self._live)
            stream = self._dice.choice(["stdout", "stdout", "stderr"])
            data = self._dice.randbytes(self._dice.choice([1, 80, 3_000, 70_000]))
            writer.write(data, stream)
            name = (writer.run.run_id, stream)
            self.digests.setdefault(name, hashlib.sha256()).update(data)
        return True

    def end(self):
        for number, writer in enumerate(self._live):
            self.ends[writer.run.run_id] = [number]
            writer.end(number)
        self._live = []

    def hexes(self):
        return {name: digest.hexdigest() for name, digest in self.digests.items()}

    def die(self):
        for writer in self._live:
            writer.die()


def torn(agent, seed, rounds, kills):
    """
    Follow fifty runs through a proxy that cuts at any byte, while the agent is killed and started
    again; and through followers that come again themselves.
    """
    dice = random.Random(f"{seed}")
    copy = Copy()
    writers = Writers(agent.spool, seed)
    kill_at = set(dice.sample(range(1, rounds), kills))
    try:
        with CuttingProxy(agent, seed) as proxy:
            spool = spool_at(agent, proxy.url())
            follower = spool.follow()
            for number in range(rounds):
                writers.write()
                if number in kill_at:
                    agent.kill()
                    agent.start()
                if dice.random() < 0.1:  # the scheduler too is started again
                    cursor = follower.cursor
                    follower.close()
                    follower = spool.follow(cursor)
                until_s = time.monotonic() + dice.choice([0, 0.01, 0.03])
                while event := follower.next(max(0, until_s - time.monotonic())):
                    copy.take(event)
            writers.end()
            while len(copy.ends) < len(writers.ends):
                event = follower.next(60)
                assert event is not None, follower.polling
                copy.take(event)
                if isinstance(event, Ended):
                    follower.collect(event.run_id)
            until(lambda: follower.next(0) is None and follower.cursor == {"runs": {}})
            follower.close()
            assert proxy.connections > rounds / 10
    finally:
        writers.die()
    assert copy.hexes() == writers.hexes()
    assert copy.ends == writers.ends
    assert sorted(copy.started) == sorted(writers.ends)
    assert [run.run_id for run in spool_at(agent, agent.spool_url).ended()] == []


def test_each_byte_and_ending_arrives_once_through_cuts_and_kills(agent, hurried):
    torn(agent, 1, rounds=40, kills=1)


@pytest.mark.tier("agents")
@pytest.mark.parametrize("seed", range(2, 5))
def test_each_byte_and_ending_arrives_once_for_long(agent, hurried, seed):
    torn(agent, seed, rounds=600, kills=20)


def test_coroutines_take_each_byte_once_through_cuts(agent, hurried):
    copy = Copy()
    writers = Writers(agent.spool, 7, count=10)

    async def main(url):
        async with spool_at(agent, url, aio.Spool).follow(runs=[*names]) as follower:
            for _ in range(20):
                writers.write()
                while event := await follower.next(0.01):
                    copy.take(event)
            writers.end()
            async for event in follower:
                copy.take(event)

    names = [f"run-{number}" for number in range(10)]
    try:
        with CuttingProxy(agent, 7) as proxy:
            asyncio.run(main(proxy.url()))
    finally:
        writers.die()
    assert (copy.hexes(), copy.ends) == (writers.hexes(), writers.ends)
