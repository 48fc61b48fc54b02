"""
What many tasks share: one inotify instance, no thread, and nothing when they are gone.
"""

import asyncio
import contextlib
import errno
import gc
import json
import os
import random
import shutil
import threading

import pytest

from chaperone import aio
from chaperone.errors import NoRunError, SpoolError
from chaperone.follow import descriptors, hub
from chaperone.follow import follower as followers
from chaperone.follow.follower import Follower
from chaperone.model.events import Ended, Output
from spool_tests.support.events import brief, tailed, turns
from spool_tests.support.processes import instances, open_fds
from spool_tests.support.waiting import until
from spool_tests.support.writer import Crowd, Writer

pytestmark = pytest.mark.once


async def followed(spool, **keywords):
    async with spool.follow(**keywords) as follower:
        return [brief(event) async for event in follower], follower.cursor


# -- the same as what each would hear alone


def test_tasks_that_share_hear_what_each_would_hear_alone(spool):
    """Followers, tails and waits of random writers, and blocking followers beside them."""

    async def main():
        shared = aio.Spool(spool)
        names = [f"w{number}" for number in range(4)]
        with (
            contextlib.ExitStack() as stack,
            Follower(spool, {"runs": {name: {} for name in names}}, runs=names) as alone,
        ):
            cursor = alone.cursor
            tasks = [
                asyncio.create_task(followed(shared, cursor=cursor, runs=names)) for _ in range(3)
            ]
            await turns()
            writers = [stack.enter_context(Writer(spool, name)) for name in names]
            waits = [asyncio.create_task(shared[name].wait()) for name in names]
            tails = [asyncio.create_task(tailed(shared[name], 3)) for name in names]
            for step in range(30):
                for number, writer in enumerate(writers):
                    if step == 2 * number:
                        writer.running()
                    writer.write(f"{step} {number}\n".encode() * (step + 1))
                    if step % 7 == number:
                        writer.write(b"\0\xff", "stderr")
                await turns(step % 3)
            for number, writer in enumerate(writers):
                writer.end(number)
                await turns(number)
            found = await asyncio.gather(*tasks)
            statuses = await asyncio.gather(*waits)
            texts = await asyncio.gather(*tails)
            events = [brief(event) for event in alone]
            for name, status, text in zip(names, statuses, texts, strict=True):
                expected = summary(events, name)
                assert [summary(heard, name) for heard, _ in found] == [expected] * 3
                assert status == shared._spool[name].status()
                assert text == expected["stdout"][3:]
            assert [cursor for _, cursor in found] == [alone.cursor] * 3
        assert instances() == []

    asyncio.run(main())


def summary(events, run_id):
    """
    What must be equal of two followers: how a run begins, each stream, how it ends. How bytes are
    cut into events, and which of quick changes are reported, depends on when one looks.
    """
    mine = [event for event in events if event[1] == run_id]
    found = {"first": mine[0], "last": mine[-1], "stdout": b"", "stderr": b""}
    for kind, _, *rest in mine[1:-1]:
        if kind == "output":
            stream, offset, data = rest
            assert offset == len(found[stream])
            found[stream] += data
        else:
            assert (kind, rest[0] in ("starting", "running")) == ("changed", True)
    return found


@pytest.mark.parametrize("most", [1, 4])
def test_follower_that_takes_its_time_loses_nothing_and_keeps_little(spool, monkeypatch, most):
    """Another task's wait has the kernel's queue emptied all the time."""
    monkeypatch.setattr(hub, "MOST_HEARD", most)

    async def main():
        shared = aio.Spool(spool)
        with Crowd(spool, 8) as crowd:
            waits = [asyncio.create_task(shared[run_id].wait()) for run_id in crowd.ids]
            async with shared.follow(runs=crowd.ids) as follower:
                texts = dict.fromkeys(crowd.ids, b"")
                ended = set()
                step = 0
                while (event := await follower.next()) is not None:
                    if isinstance(event, Output):
                        assert event.offset == len(texts[event.run_id])
                        texts[event.run_id] += event.data
                    elif isinstance(event, Ended):
                        ended.add(event.run_id)
                    for run_id in crowd.locks:  # while it holds the event
                        crowd.write(run_id, b"%d " % step)
                    step += 1
                    if step > 40 and crowd.locks:
                        crowd.end([*crowd.locks][0])
                    await turns(2)
                    assert len(follower._follower._watcher._heard) <= most + 1
            assert ended == set(crowd.ids)
            assert [status.state for status in await asyncio.gather(*waits)] == ["terminated"] * 8
            for run_id, text in texts.items():
                assert text == (spool / run_id / "stdout").read_bytes()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(2))
def test_schedulers_that_are_cancelled_at_any_moment_take_each_byte_and_ending_once(spool, seed):
    """Each goes on from its own cursor, with a new follower, beside waits that come and go."""
    dice = random.Random(seed)

    class Scheduler:
        def __init__(self):
            self.cursor, self.bytes, self.ended = None, {}, []

        async def run(self):
            async with aio.Spool(spool).follow(self.cursor, crowd.ids) as follower:
                async for event in follower:
                    # No await from here on: the events and their cursor are committed together.
                    if isinstance(event, Output):
                        heard = self.bytes.setdefault((event.run_id, event.stream), bytearray())
                        assert event.offset == len(heard)
                        heard += event.data
                    elif isinstance(event, Ended):
                        self.ended.append(event.run_id)
                    self.cursor = json.loads(json.dumps(follower.cursor))
                    if dice.random() < 0.3:
                        await turns(dice.randrange(4))

    async def main():
        schedulers = [Scheduler() for _ in range(4)]
        tasks = {each: asyncio.create_task(each.run()) for each in schedulers}
        waits = []
        for _ in range(250):
            live = [*crowd.locks]
            act = dice.random()
            if act < 0.7 and live:
                crowd.write(dice.choice(live), dice.randbytes(dice.randrange(1, 400)))
            elif act < 0.78 and live:
                crowd.end(dice.choice(live))
            elif act < 0.9:
                each = dice.choice(schedulers)
                tasks[each].cancel()
                await asyncio.gather(tasks[each], return_exceptions=True)
                tasks[each] = asyncio.create_task(each.run())
            else:
                waits.append(asyncio.create_task(aio.Spool(spool)[dice.choice(crowd.ids)].wait()))
                dice.choice(waits).cancel()
            await turns(dice.randrange(3))
        for run_id in [*crowd.locks]:
            crowd.end(run_id)
        await asyncio.gather(*tasks.values())
        await asyncio.gather(*waits, return_exceptions=True)
        for each in schedulers:
            assert sorted(each.ended) == crowd.ids
            for run_id in crowd.ids:
                heard = each.bytes.get((run_id, "stdout"), b"")
                assert heard == (spool / run_id / "stdout").read_bytes()
        assert hub._hubs == {} and instances() == []

    with Crowd(spool, 10) as crowd:
        asyncio.run(main())


def test_tasks_with_a_backlog_take_turns(spool, monkeypatch):
    """In a turn of the loop that is used up each of them delivers one event, whoever came first."""
    monkeypatch.setattr(hub, "TURN_S", 0.0)

    async def tail(run_id):
        async for data in aio.Spool(spool)[run_id].tail():
            taken[run_id] += len(data)
            assert max(taken.values()) - min(taken.values()) <= 2 << 20
            assert len(data) <= 1 << 20

    async def main():
        await asyncio.gather(*(tail(run_id) for run_id in crowd.ids))

    with Crowd(spool, 5) as crowd:
        taken = dict.fromkeys(crowd.ids, 0)
        for run_id in crowd.ids:
            os.truncate(spool / run_id / "stdout", 8 << 20)
            crowd.end(run_id)
        asyncio.run(main())
    assert set(taken.values()) == {8 << 20}


def test_nothing_is_read_ahead_of_the_task_that_asks(spool):
    async def main():
        async with aio.Spool(spool).follow() as follower:
            offsets = []
            while len(offsets) < 3:
                event = await follower.next()
                if isinstance(event, Output):
                    offsets.append(event.offset)
                    await turns()
                    end = event.offset + len(event.data)
                    assert follower.cursor["runs"]["r"]["stdout"] == end
            assert offsets == [0, 1 << 20, 2 << 20]

    with Writer(spool):
        os.truncate(spool / "r" / "stdout", 1 << 40)
        asyncio.run(main())


# -- what is left of a task


async def waits(run):
    await run.wait()


async def tails(run):
    async for _ in run.tail():
        pass


async def follows(run):
    async for _ in aio.Spool(run.spool_path).follow(runs=[run.run_id]):
        pass


async def follows_next(run):
    async with aio.Spool(run.spool_path).follow() as follower:
        while True:
            await follower.next(60)


async def stops(run):
    await run.stop()


@pytest.mark.parametrize("act", [waits, tails, follows, follows_next, stops])
@pytest.mark.parametrize("after", [0, 1, 2, 6])
def test_task_that_is_cancelled_leaves_no_watch_fd_or_future(spool, act, after):
    async def main():
        loop = asyncio.get_running_loop()
        before = sorted(loop._selector.get_map()), open_fds(str(spool))
        task = asyncio.create_task(act(aio.Spool(spool)["r"]))
        await turns(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (sorted(loop._selector.get_map()), open_fds(str(spool))) == before
        assert hub._hubs == {} and all(timer.cancelled() for timer in loop._scheduled)

    with Writer(spool) as writer:
        writer.write(b"x")
        asyncio.run(main())


def test_cancelled_tasks_take_their_watches_out_of_what_others_share(spool):
    async def main():
        shared = aio.Spool(spool)
        with Crowd(spool, 20) as crowd:
            stays = asyncio.create_task(shared[crowd.ids[0]].wait())
            tasks = [
                asyncio.create_task(act(shared[run_id]))
                for act in (waits, tails, follows)
                for run_id in crowd.ids
            ]
            await turns()
            assert instances() == [22]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert instances() == [3]
            (only,) = hub._hubs.values()
            assert len(only._shares) == 1 and len(only._watched) == 3
            assert {name for _, name in only._listeners} == {None, crowd.ids[0]}
            assert only.opened.streams._fds == {}
            crowd.end(crowd.ids[0], 5)
            assert (await stays).return_code == 5
        assert instances() == []

    asyncio.run(main())


def test_body_that_leaves_the_loop_of_a_tail_leaves_nothing(spool):
    async def main():
        async for data in aio.Spool(spool)["r"].tail():
            assert data == b"x"
            break
        await turns()  # the loop closes a generator that is left
        assert hub._hubs == {}

    with Writer(spool) as writer:
        writer.write(b"x")
        asyncio.run(main())


def test_follower_that_is_dropped_is_closed_and_warned_of(spool):
    async def main():
        with pytest.warns(ResourceWarning, match="a follower of spool .* was not closed"):
            follower = aio.Spool(spool).follow()
            assert await follower.next(0) is None
            del follower
            gc.collect()
        await turns()
        assert hub._hubs == {}

    asyncio.run(main())


def test_follower_that_is_closed_ends_the_wait_of_its_task(spool):
    async def main():
        follower = aio.Spool(spool).follow(runs=["later"])
        task = asyncio.create_task(follower.next())
        await turns()
        with pytest.raises(RuntimeError, match="^unable to follow: another task waits for "):
            await follower.next()
        await follower.close()
        await follower.close()
        with pytest.raises(ValueError, match="^unable to follow: the follower is closed$"):
            await task
        with pytest.raises(ValueError, match="^unable to follow: the follower is closed$"):
            await follower.next(0)
        assert follower.cursor == {"runs": {"later": {}}} and hub._hubs == {}

    asyncio.run(main())


# -- loops


def test_loops_of_several_threads_disturb_each_other_not(spool):
    """Each loop has an instance of its own."""

    async def main():
        results.append(await aio.Spool(spool)["r"].wait())

    results = []
    with Writer(spool) as writer:
        threads = [threading.Thread(target=asyncio.run, args=[main()]) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(instances()) == 3 and all(watches == 3 for watches in instances()))
        writer.end(7)
        for thread in threads:
            thread.join(60)
    assert [status.return_code for status in results] == [7, 7, 7]
    assert hub._hubs == {}


def test_loop_that_was_closed_with_its_tasks_is_forgotten(spool):
    with Writer(spool) as writer:
        loop = asyncio.new_event_loop()
        task = loop.create_task(aio.Spool(spool)["r"].wait())
        loop.run_until_complete(turns())
        loop.close()
        assert instances() == [3]
        writer.end()
        assert asyncio.run(aio.Spool(spool)["r"].wait()).return_code == 0
        run = aio.Spool(spool)
        asyncio.run(followed(run, runs=["r"]))
        assert hub._hubs == {} and instances() == []
        task._log_destroy_pending = False
        coroutine = task.get_coro()
        del task
        coroutine.close()  # as the garbage collector does, later


# -- the spool, the kernel


def test_removed_spool_ends_all_that_share_it_and_a_new_one_is_another(spool):
    async def main():
        shared = aio.Spool(spool)
        with Writer(spool, "a"), Writer(spool, "b") as b:
            tasks = [
                asyncio.create_task(shared["a"].wait()),
                asyncio.create_task(tailed(shared["b"])),
                asyncio.create_task(followed(shared)),
            ]
            await turns()
            b.end()
            shutil.rmtree(spool)
            a, b, follow = await asyncio.gather(*tasks, return_exceptions=True)
        assert (type(a), str(a)) == (NoRunError, "unable to wait for run 'a': it was deleted")
        assert b == b"" or str(b) == "unable to follow run 'b': it was deleted"
        sentence = f"unable to follow spool {str(spool)!r} any longer: it was removed"
        assert (type(follow), str(follow)) == (SpoolError, sentence)
        assert hub._hubs == {}
        spool.mkdir(0o700)
        with Writer(spool, "a") as writer:
            task = asyncio.create_task(shared["a"].wait())
            await turns()
            writer.end(4)
            assert (await task).return_code == 4

    asyncio.run(main())


def test_tasks_poll_where_the_kernel_grants_no_instance(spool, monkeypatch):
    def refused(*arguments, **keywords):
        raise OSError(errno.EMFILE, "Too many open files")

    async def main():
        shared = aio.Spool(spool)
        waits = [asyncio.create_task(shared[run_id].wait()) for run_id in crowd.ids]
        async with shared.follow() as follower:
            assert follower.polling.startswith(f"looking at spool {str(spool)!r} every 0.02 s: ")
            await turns()
            for run_id in crowd.ids:
                crowd.end(run_id)
            return [status.state for status in await asyncio.gather(*waits)]

    monkeypatch.setattr(descriptors.inotify_simple, "INotify", refused)
    monkeypatch.setattr(followers, "POLL_S", 0.02)
    with Crowd(spool, 10) as crowd, pytest.warns(RuntimeWarning, match="unable to use inotify: "):
        assert asyncio.run(main()) == ["terminated"] * 10
    assert hub._hubs == {}


def test_wait_asks_again_for_the_instance_that_was_not_granted(spool, monkeypatch):
    def refused(*arguments, **keywords):
        raise OSError(errno.EMFILE, "Too many open files")

    async def main():
        shared = aio.Spool(spool)
        with monkeypatch.context() as limited:
            limited.setattr(descriptors.inotify_simple, "INotify", refused)
            with pytest.warns(RuntimeWarning, match="unable to use inotify: "):
                polls = [asyncio.create_task(shared["r0000"].wait()) for _ in range(2)]
                await turns()
            assert (len(hub._hubs), instances()) == (1, [])
        waits = [asyncio.create_task(shared["r0001"].wait()) for _ in range(2)]
        await turns()
        assert (len(hub._hubs), instances()) == (1, [3])
        for run_id in crowd.ids:
            crowd.end(run_id)
        found = await asyncio.gather(*polls, *waits)
        assert [status.run_id for status in found] == ["r0000"] * 2 + ["r0001"] * 2

    monkeypatch.setattr(followers, "POLL_S", 0.02)
    before = open_fds(str(spool))
    with Crowd(spool, 2) as crowd:
        asyncio.run(main())
    assert (hub._hubs, open_fds(str(spool))) == ({}, before)


def test_follower_that_is_to_poll_takes_no_watch_beside_those_that_do_not(spool):
    async def main():
        shared = aio.Spool(spool)
        with Writer(spool) as writer:
            wait = asyncio.create_task(shared["r"].wait())
            await turns()
            async with shared.follow(poll_s=0.005) as follower:
                assert follower.polling.endswith("every 0.005 s: poll_s asks for it")
                events = [brief(await follower.next()), brief(await follower.next())]
                assert instances() == [3]
                writer.end(2)
                events += [brief(await follower.next())]
            assert [event[0] for event in events] == ["started", "changed", "ended"]
            assert (await wait).return_code == 2

    asyncio.run(main())


@pytest.mark.parametrize("where", ["follow", "wait"])
def test_want_of_watches_makes_a_task_poll(spool, monkeypatch, where):
    def refused(self, directory_fd, mask, names=None):
        raise descriptors.OutOfWatchesError("unable to watch another directory", errno.ENOSPC)

    async def main():
        run = aio.Spool(spool)["r"]
        task = asyncio.create_task(run.wait() if where == "wait" else followed(aio.Spool(spool)))
        await turns()
        writer.end()
        if where == "wait":
            assert (await task).state == "terminated"
        else:
            shutil.rmtree(spool)
            with pytest.raises(SpoolError, match="it was removed$"):
                await task

    monkeypatch.setattr(descriptors.Watcher, "watch", refused)
    monkeypatch.setattr(followers, "POLL_S", 0.005)
    with Writer(spool) as writer, pytest.warns(RuntimeWarning, match="another directory$"):
        asyncio.run(main())
