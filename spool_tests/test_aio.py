"""
`chaperone.aio`: the same calls, values and errors as coroutines. What many tasks share is in
follow/test_hub.py.
"""

import asyncio
import gc
import inspect
import shutil
import signal
import threading

import pytest

from chaperone import aio, api
from chaperone.errors import BusyError, NoRunError, RunExistsError
from chaperone.follow import follower as followers
from chaperone.model.events import Changed, Ended, Output, Started
from chaperone.program.fds import owned
from chaperone.spool import format
from chaperone.spool.sweep import sweep
from spool_tests.support.alike import CALLS, outcome
from spool_tests.support.events import brief
from spool_tests.support.writer import Crowd, Writer


def sh(text, **program):
    return {"id": "r", "program": {"command": text, **program}}


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(aio.Spool, api.Spool), (aio.Run, api.Run), (aio.Follower, followers.Follower)],
)
def test_calls_and_arguments_are_those_of_the_blocking_ones(mine, theirs):
    def calls(kind):
        return {
            name: [(each.name, each.default) for each in parameters(call)]
            for name, call in inspect.getmembers(kind)
            if callable(call) and not name.startswith("_")
        }

    def parameters(call):
        return inspect.signature(call).parameters.values()

    found, expected = calls(mine), calls(theirs)
    # What a loop has no use for, and what other modules of the package ask.
    for name in ("fileno", "anext"):
        expected.pop(name, None)
    for name in ("watch", "unwatch", "forget", "look_again"):  # of a FollowedRun
        expected.pop(name, None)
    assert found == expected
    assert sorted(n for n, v in inspect.getmembers(mine) if isinstance(v, property)) == sorted(
        {
            "Spool": {"path"},
            "Run": {"path", "run_id", "spool_path"},
            "Follower": {"cursor", "polling", "uncollected"},
        }[mine.__name__]
    )


def alike(spool, run_id="r"):
    """Make each call in both ways, and compare."""
    for name, call in CALLS.items():
        blocking = outcome(call, api.Run(str(spool), run_id))
        assert outcome(call, aio.Run(str(spool), run_id)) == blocking, name


def test_ended_run_answers_alike(spool):
    with Writer(spool) as writer:
        writer.write(b"abcdef").write(b"xyz", "stderr").end(3)
    alike(spool)


def test_lost_run_answers_alike(spool):
    with Writer(spool) as writer:
        writer.running().write(b"abcdef")
    assert outcome(api.Run(str(spool), "r").wait).state == "lost"
    alike(spool)


def test_deleted_run_answers_alike(spool):
    with Writer(spool):
        pass
    shutil.rmtree(spool / "r")
    alike(spool)


def test_id_that_no_run_can_have_answers_alike(spool):
    alike(spool, "../r")


def test_spool_that_is_not_there_answers_alike(spool):
    alike(spool / "no")
    for path in (spool / "no", spool / "no" / "no"):
        for call in (
            lambda spool: spool["r"],
            lambda spool: spool.live(),
            lambda spool: spool.all(),
            lambda spool: spool.cursor(),
            lambda spool: spool.gc(older_s=0),
            lambda spool: spool.collect("r"),
        ):
            assert outcome(call, aio.Spool(path)) == outcome(call, api.Spool(path))


@pytest.mark.parametrize(
    "keywords",
    [
        {"cursor": []},
        {"cursor": {"runs": {"r": {"stdout": -1}}}},
        {"streams": ["log"]},
        {"poll_s": 0},
    ],
)
def test_following_is_refused_alike(spool, keywords):
    assert outcome(lambda: aio.Spool(spool).follow(**keywords)) == outcome(
        lambda: api.Spool(spool).follow(**keywords)
    )


def test_listings_and_cursor_are_alike(spool):
    async def main():
        blocking, tasks = api.Spool(spool), aio.Spool(spool)
        for name in ("live", "ended", "all"):
            expected = [run.run_id for run in getattr(blocking, name)()]
            assert [run.run_id for run in await getattr(tasks, name)()] == expected
        assert await tasks.cursor() == blocking.cursor()
        assert (tasks.path, repr(tasks)) == (blocking.path, f"aio.{blocking!r}")
        run = tasks["over"]
        assert (run.path, run.run_id, run.spool_path) == (
            str(spool / "over"),
            "over",
            str(spool),
        )
        assert repr(run) == f"aio.Run({str(spool)!r}, 'over')"
        await tasks.collect("over")
        assert [run.run_id for run in await tasks.ended()] == []

    with Writer(spool, "live"), Writer(spool, "over") as over:
        over.end()
        asyncio.run(main())


# -- real runs


def test_runs_are_started_tailed_waited_for_and_deleted(spool):
    async def job(scheduler, number):
        run = await scheduler.start({"program": {"command": f"echo {number}; exit {number}"}})
        output = b"".join([data async for data in run.tail()])
        status = await run.wait()
        assert (await run.read(), await run.size()) == (output, len(output))
        assert await run.status() == status
        await run.delete()
        return output, status.return_code

    async def main():
        return await asyncio.gather(*(job(aio.Spool(spool), number) for number in range(6)))

    assert asyncio.run(main()) == [(b"%d\n" % number, number) for number in range(6)]
    assert api.Spool(spool).all() == []


def test_run_is_signalled_and_stopped_while_its_tail_goes_on(spool):
    async def main():
        traps = "trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; "
        run = await aio.Spool(spool).start(sh(traps + "echo up; while :; do sleep 1; done"))
        lines = run.tail()
        assert await anext(lines) == b"up\n"
        await run.signal(signal.SIGUSR1)
        # The shell takes it when its sleep ends, or when that is stopped.
        stopping = asyncio.create_task(run.stop(grace_s=30, by="me"))
        rest = b"".join([data async for data in lines])
        status = await stopping
        assert rest in (b"usr1\nterm\n", b"term\n")
        assert (status.return_code, status.stop["by"]) == (7, "me")
        assert (await run.stop(), await run.kill()) == (status, status)

    asyncio.run(main())


def test_stop_that_is_not_waited_for_and_kill(spool):
    async def main():
        run = await aio.Spool(spool).start(sh("trap '' TERM; echo up; while :; do sleep 1; done"))
        assert await anext(run.tail()) == b"up\n"
        status = await run.stop(wait=False)
        assert not status.is_final()
        assert (await run.wait(0.01)) is None
        assert (await run.kill()).signal == "SIGKILL"

    asyncio.run(main())


def test_follower_takes_real_runs_from_start_to_end_and_collects(spool):
    async def main():
        scheduler = aio.Spool(spool)
        async with scheduler.follow() as follower:
            run = await scheduler.start(sh("echo out; exit 3"))
            kinds = []
            async for event in follower:
                kinds.append(type(event))
                if isinstance(event, Ended):
                    break
            assert follower.uncollected == ["r"] and not follower.is_over()
            assert follower.entry("r") == follower.cursor["runs"]["r"]
            await follower.collect("r")
            while follower.cursor != {"runs": {}}:  # its entry may be still on its way
                assert await follower.next(0.1) is None
        assert [kind for kind in kinds if kind is not Changed] == [Started, Output, Ended]
        assert (await run.wait()).return_code == 3

    asyncio.run(main())
    assert api.Spool(spool).ended() == []


def test_used_id_is_refused_and_a_start_that_was_cancelled_can_be_tried_again(spool):
    async def main():
        scheduler = aio.Spool(spool)
        starting = asyncio.create_task(scheduler.start(sh("exit 4")))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        try:
            run = await scheduler.start(sh("exit 4"))
        except RunExistsError:
            run = scheduler["r"]
        assert (await run.wait()).return_code == 4
        with pytest.raises(RunExistsError, match="^unable to create run 'r': it exists$"):
            await scheduler.start(sh("exit 5"))

    asyncio.run(main())


def test_deletions_of_a_loop_wait_for_each_other(spool):
    """One sweep at a time passes over a spool; another process' is an error."""

    async def main():
        scheduler = aio.Spool(spool)
        runs = [scheduler[run_id] for run_id in crowd.ids]
        summary, *_ = await asyncio.gather(
            scheduler.gc(older_s=3600), *(run.delete() for run in runs)
        )
        assert (summary.removed, await scheduler.all()) == ([], [])
        with pytest.raises(NoRunError):
            await runs[0].delete()

    with Crowd(spool, 20) as crowd:
        for run_id in crowd.ids:
            crowd.end(run_id)
        asyncio.run(main())
    gc.collect()
    assert len(aio._sweeps) == 0


def test_waiting_tailing_and_following_use_no_thread(spool):
    async def follow(scheduler):
        async with scheduler.follow(runs=["r"]) as follower:
            return [brief(event)[0] async for event in follower]

    async def main():
        scheduler = aio.Spool(spool)
        tasks = [
            asyncio.create_task(each)
            for each in (scheduler["r"].wait(), follow(scheduler), scheduler["r"].stop())
        ]
        await asyncio.sleep(0)
        writer.write(b"x")
        writer.end()
        status, events, stopped = await asyncio.gather(*tasks)
        assert status == stopped and events[-1] == "ended"
        assert threading.active_count() == before

    with Writer(spool) as writer:
        before = threading.active_count()
        asyncio.run(main())


def test_wait_returns_when_the_time_is_over(spool):
    async def main():
        run = aio.Spool(spool)["r"]
        assert await run.wait(0) is None
        assert await run.wait(0.01) is None
        async with aio.Spool(spool).follow(runs=["r"]) as follower:
            while await follower.next(0) is not None:
                pass
            assert await follower.next(0.01) is None
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run.wait(), 0.01)

    with Writer(spool):
        asyncio.run(main())


def test_run_that_is_deleted_while_tasks_wait_is_an_error_of_each(spool):
    async def tail(run):
        return [data async for data in run.tail()]

    async def main():
        run = aio.Spool(spool)["r"]
        tasks = [asyncio.create_task(each) for each in (run.wait(), tail(run), run.stop())]
        for _ in range(5):
            await asyncio.sleep(0)
        shutil.move(spool / "r", spool / ".r.x.gone")
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(type(each), str(each)) for each in found] == [
            (NoRunError, "unable to wait for run 'r': it was deleted"),
            (NoRunError, "unable to follow run 'r': it was deleted"),
            (NoRunError, "unable to wait for run 'r': it was deleted"),
        ]

    with Writer(spool) as writer:
        writer.running()
        asyncio.run(main())


def test_sweep_of_another_process_is_an_error(spool):
    async def main():
        with pytest.raises(BusyError, match="another chaperone reap or gc is running$"):
            await aio.Spool(spool)["r"].delete()

    with Writer(spool) as writer:
        writer.end()
    with owned(format.open_spool(str(spool))) as spool_fd, sweep(spool_fd, str(spool)):
        asyncio.run(main())
