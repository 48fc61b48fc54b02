"""
A task for each run: 1,000 of them, and 150 beside what other programs of the user have taken.
"""

import asyncio
import contextlib
import os
import resource
import threading
import warnings

import inotify_simple
import pytest

import chaperone
from chaperone import aio
from chaperone.follow import descriptors
from spool_tests.support import disk
from spool_tests.support.events import tailed, turns
from spool_tests.support.processes import instances
from spool_tests.support.waiting import absent
from spool_tests.support.writer import Crowd

pytestmark = pytest.mark.once


@contextlib.contextmanager
def fds_for(count):
    """As many fds as a test needs, where the limit of this process is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        absent(f"a process may open no more than {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousand_tasks_wait_for_thousand_runs_with_one_inotify_instance(spool):
    async def main():
        spool_of_tasks = aio.Spool(spool)
        waits = [asyncio.create_task(spool_of_tasks[run_id].wait()) for run_id in crowd.ids]
        await turns()
        assert instances() == [1_002], "a watch for each run, the spool, and .ended"
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) < fds + 10
        for code, run_id in enumerate(crowd.ids):
            crowd.end(run_id, code % 256)
        return [status.return_code for status in await asyncio.gather(*waits)]

    with fds_for(2_000), Crowd(spool, 1_000) as crowd:
        threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
        assert asyncio.run(main()) == [code % 256 for code in range(1_000)]
        assert instances() == []


@pytest.mark.root
def test_150_tasks_of_a_scheduler_find_room_beside_127_instances_of_others(spool):
    """Apsis has a task for each run; a user of our own, because others here use our instances."""
    # This also imports what that user may not be able to read.
    limit = int(descriptors._limit("fs.inotify.max_user_instances"))
    uid = 2_000_000_000 + os.getpid()
    place = os.open(spool, os.O_RDONLY)
    os.chown(spool, uid, uid)

    def become():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        warnings.simplefilter("error")

    def take():
        become()
        taken.extend(inotify_simple.INotify() for _ in range(limit - 1))

    async def main(path, crowd):
        spool_of_tasks = aio.Spool(path)
        runs = [spool_of_tasks[run_id] for run_id in crowd.ids]
        tasks = [asyncio.create_task(run.wait()) for run in runs[:75]]
        tasks += [asyncio.create_task(tailed(run)) for run in runs[75:]]
        await turns()
        assert len(instances()) == 1
        with pytest.warns(RuntimeWarning, match="the limit of .* inotify instances"):
            with chaperone.Spool(path).follow() as another:
                assert another.polling, "that was the last instance of this user"
        for run_id in crowd.ids:
            crowd.write(run_id, run_id.encode())
            crowd.end(run_id, 3)
        found = await asyncio.gather(*tasks)
        assert [status.return_code for status in found[:75]] == [3] * 75
        assert found[75:] == [run_id.encode() for run_id in crowd.ids[75:]]

    def schedule():
        become()
        # The way there belongs to the user of the test; a directory that is open needs none.
        path = f"/proc/self/fd/{place}"
        with Crowd(path, 150) as crowd:
            asyncio.run(main(path, crowd))

    taken = []
    with fds_for(limit + 1_000):
        holder = disk.held(take)
        try:
            assert disk.waited(disk.forked(schedule)) == 0
        finally:
            disk.killed(holder)
            os.close(place)
