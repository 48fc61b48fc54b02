"""
Followers that poll, wait, or share a loop with others.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import pathlib
import resource
import select
import shutil
import subprocess
import time

import pytest

from chaperone.errors import SpecError, SpoolError
from chaperone.follow import descriptors
from chaperone.follow import follower as followers
from chaperone.follow import timer as timers
from chaperone.follow.follower import Follower
from chaperone.model.events import Changed, Ended, Lost, Output, Started
from spool_tests.support.events import brief, is_readable, next_of, told
from spool_tests.support.processes import open_fds
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

# -- where the kernel does not report changes


def test_polling_tells_the_same(spool):
    with Follower(spool, poll_s=0.005) as follower:
        with Writer(spool) as writer, Writer(spool, "dead") as dead:
            assert next_of(follower, Started).run_id in ("r", "dead")
            writer.running().write(b"x")
            assert next_of(follower, Output).data == b"x"
            dead.die()
            assert next_of(follower, Lost).run_id == "dead"
            writer.end()
            assert next_of(follower, Ended).status.return_code == 0
        assert (
            follower.polling == f"looking at spool {str(spool)!r} every 0.005 s: poll_s asks for it"
        )
        shutil.rmtree(spool)


@pytest.mark.parametrize("poll_s", [0, -1, float("nan"), float("inf"), 1e300])
def test_time_in_which_nobody_can_poll_is_refused(spool, poll_s):
    with pytest.raises(SpecError) as caught:
        Follower(spool, poll_s=poll_s)
    assert str(caught.value) == (
        f"unable to poll every {poll_s!r} s: want more than 0 and at most 1e+10 s"
    )


def test_silent_filesystem_is_polled_and_said_so(spool, monkeypatch):
    monkeypatch.setattr(descriptors, "silent_filesystem", lambda fd: "nfs")
    monkeypatch.setattr(followers, "POLL_S", 0.005)
    sentence = f"looking at spool {str(spool)!r} every 0.005 s: inotify may be silent on nfs"
    with pytest.warns(RuntimeWarning) as warned, Follower(spool) as follower:
        assert ([str(warning.message) for warning in warned], follower.polling) == (
            [sentence],
            sentence,
        )
        with Writer(spool):
            assert next_of(follower, Started).run_id == "r"


@pytest.mark.parametrize("granted", [0, 1, 2, 3])
def test_more_runs_than_watches_are_polled_and_said_so(spool, monkeypatch, granted):
    def watch(self, directory_fd, mask, names=None, whole=descriptors.Watcher.watch):
        if len(watches) >= granted:
            raise descriptors.OutOfWatchesError(
                "unable to watch one more directory: the limit is reached", errno.ENOSPC
            )
        watches.append(whole(self, directory_fd, mask, names))
        return watches[-1]

    watches = []
    monkeypatch.setattr(descriptors.Watcher, "watch", watch)
    monkeypatch.setattr(followers, "POLL_S", 0.005)
    with (
        pytest.warns(
            RuntimeWarning, match="unable to watch one more directory: the limit is reached$"
        ),
        Follower(spool) as follower,
    ):
        with Writer(spool, "a") as a, Writer(spool, "b") as b:
            assert {next_of(follower, Started).run_id for _ in range(2)} == {"a", "b"}
            told(follower)
            b.write(b"x")
            assert next_of(follower, Output).run_id == "b"
            a.end()
            assert next_of(follower, Ended).run_id == "a"


def test_follower_without_an_inotify_instance_polls_and_says_so(spool, monkeypatch):
    def refused(*arguments, **keywords):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(descriptors.inotify_simple, "INotify", refused)
    monkeypatch.setattr(followers, "POLL_S", 0.02)
    limit = pathlib.Path("/proc/sys/fs/inotify/max_user_instances").read_text().strip()
    sentence = (
        f"looking at spool {str(spool)!r} every 0.02 s: unable to use inotify: the limit of {limit}"
        " inotify instances for this user (sysctl fs.inotify.max_user_instances), or of open files,"
        " is reached"
    )
    with pytest.warns(RuntimeWarning) as warned, Follower(spool) as follower:
        assert ([str(each.message) for each in warned], follower.polling) == ([sentence], sentence)
        with Writer(spool) as writer:
            writer.running().write(b"x").end()
        assert next_of(follower, Ended).run_id == "r"


def test_follower_without_proc_polls_and_says_so(spool, monkeypatch):
    """The path by which a watch names an open directory is not there."""
    monkeypatch.setattr(descriptors, "OUR_FDS", "/nowhere/fd")
    monkeypatch.setattr(followers, "POLL_S", 0.02)
    sentence = (
        f"looking at spool {str(spool)!r} every 0.02 s: unable to use inotify:"
        " there is no /nowhere/fd"
    )
    with pytest.warns(RuntimeWarning) as warned, Follower(spool) as follower:
        assert ([str(each.message) for each in warned], follower.polling) == ([sentence], sentence)
        with Writer(spool) as writer:
            writer.running().write(b"x").end()
        assert next_of(follower, Ended).run_id == "r"


def test_follower_without_a_free_fd_is_refused_in_a_sentence(spool):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        os.close(held.pop())
        with pytest.raises(SpoolError) as caught:
            Follower(spool)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert "\n" not in str(caught.value) and caught.value.errno == errno.EMFILE


@pytest.mark.parametrize("numbers", [descriptors.LOCAL_FILESYSTEMS, {}])
def test_silent_filesystem_is_told_by_what_the_kernel_says_it_is(spool, monkeypatch, numbers):
    """
    No test has an NFS: the filesystem that is here is put among the silent ones, by the name that
    df(1) finds.
    """
    monkeypatch.setattr(descriptors, "LOCAL_FILESYSTEMS", numbers)
    df = ["df", "--output=fstype", spool]
    name = subprocess.run(df, capture_output=True, text=True, check=True).stdout.split()[1]
    monkeypatch.setattr(descriptors, "SILENT_FILESYSTEMS", {name})
    with pytest.warns(RuntimeWarning), Follower(spool) as follower:
        assert (
            follower.polling
            == f"looking at spool {str(spool)!r} every 1 s: inotify may be silent on {name}"
        )


@pytest.mark.parametrize(
    ("name", "is_silent"),
    [
        *((name, True) for name in ("nfs", "nfs4", "beegfs", "panfs", "afs", "cifs", "9p")),
        *((name, True) for name in ("fuse", "fuse.sshfs", "fuseblk", "virtiofs")),
        *((name, False) for name in ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "fusectl", "")),
    ],
)
def test_filesystems_that_several_hosts_share_are_silent(monkeypatch, name, is_silent):
    monkeypatch.setattr(descriptors, "_filesystem", lambda fd: name)
    assert descriptors.silent_filesystem(0) == (name if is_silent else None)


@pytest.mark.parametrize("missing", ["fdinfo", "mountinfo"])
def test_filesystem_without_a_proc_is_taken_for_one_that_is_not_silent(monkeypatch, missing):
    def without(path, *arguments, **keywords):
        if missing in str(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return open(path, *arguments, **keywords)

    monkeypatch.setattr(descriptors, "open", without, raising=False)
    monkeypatch.setattr(descriptors, "LOCAL_FILESYSTEMS", {})
    assert descriptors.silent_filesystem(0) is None


def test_local_filesystem_is_not_silent_and_known_without_proc(spool, monkeypatch):
    """It is by its number that a new follower costs little: mountinfo may be long."""
    stat = ["stat", "-f", "-c", "%t", spool]
    number = int(subprocess.run(stat, capture_output=True, check=True).stdout, 16)
    if number not in descriptors.LOCAL_FILESYSTEMS:
        pytest.skip(f"the spool is on a filesystem with the number {number:x}")
    monkeypatch.setattr(descriptors, "open", None, raising=False)
    fd = os.open(spool, os.O_RDONLY)
    assert descriptors.silent_filesystem(fd) is None
    os.close(fd)


@pytest.mark.parametrize("is_new", [False, True])
def test_timer_is_readable_once_its_time_has_come(monkeypatch, is_new):
    """Python has a timer from 3.13 on; here its calls are as in the manual, over the kernel's."""
    if is_new and not hasattr(os, "timerfd_create"):
        monkeypatch.setattr(
            os,
            "timerfd_create",
            lambda clock, /, *, flags: timers._called("timerfd_create", clock, flags),
            raising=False,
        )

        def settime_ns(fd, /, *, flags, initial):
            assert flags == 1
            monkeypatch.delattr(os, "timerfd_settime_ns")
            timers.Timer.set(timer, initial)
            monkeypatch.setattr(os, "timerfd_settime_ns", settime_ns, raising=False)

        monkeypatch.setattr(os, "timerfd_settime_ns", settime_ns, raising=False)
    elif not is_new:
        monkeypatch.delattr(os, "timerfd_create", raising=False)
        monkeypatch.delattr(os, "timerfd_settime_ns", raising=False)
    timer = timers.Timer()
    assert not os.get_inheritable(timer.fileno()) and not os.get_blocking(timer.fileno())
    timer.set(time.monotonic_ns() + 3_600_000_000_000)
    assert not is_readable(timer)
    timer.set(time.monotonic_ns() + 1_000_000)
    assert select.select([timer], [], [], 30)[0]
    timer.set(0)
    assert not is_readable(timer)
    timer.close()


def test_timer_that_the_kernel_does_not_grant_is_an_error_of_the_spool(spool, monkeypatch):
    def refuse(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(timers.Timer, "__init__", refuse)
    with pytest.raises(SpoolError, match="^unable to make a timer: Too many open files$"):
        Follower(spool)
    assert open_fds(str(spool)) == []


def test_fileno_is_readable_while_anything_waits(spool):
    with Writer(spool) as writer, Follower(spool) as follower:
        assert is_readable(follower)
        told(follower)
        assert not is_readable(follower)
        writer.running().write(b"x")
        assert is_readable(follower)
        follower.next(0)
        assert is_readable(follower), "there is a backlog"
        told(follower)
        assert not is_readable(follower)


def test_next_returns_none_when_the_time_is_over(spool):
    with Follower(spool) as follower:
        assert follower.next(0.01) is None


def test_next_returns_when_the_time_is_over_whatever_is_told_of_what_it_does_not_follow(
    spool, monkeypatch
):
    """Another stream's flood keeps the fd readable without a pause, and there is no event in it."""
    with Writer(spool) as writer, Follower(spool, streams=["stdout"]) as follower:
        told(follower)

        def flooded(self, whole=descriptors.Watcher.read):
            nonlocal looks
            looks += 1
            assert looks < 1_000, "it never returns"
            writer.write(b"x", "stderr")
            return whole(self)

        looks = 0
        monkeypatch.setattr(descriptors.Watcher, "read", flooded)
        monkeypatch.setattr(descriptors.Watcher, "wait", lambda self, timeout_s: True)
        assert (follower.next(0), follower.next(0.001)) == (None, None)
        writer.write(b"y")
        assert brief(follower.next(0)) == ("output", "r", "stdout", 0, b"y")


def test_async_for_tells_the_same_without_threads(spool):
    async def scheduler():
        import threading

        events = []
        with Writer(spool) as writer:
            async for event in Follower(spool):
                events.append(brief(event))
                if isinstance(event, Started):
                    asyncio.get_running_loop().call_later(0.01, writer.end)
                if isinstance(event, Ended):
                    assert threading.active_count() == before
                    return events

    import threading

    before = threading.active_count()
    assert asyncio.run(scheduler()) == [
        ("started", "r"),
        ("changed", "r", "starting"),
        ("ended", "r", "terminated"),
    ]


@pytest.mark.parametrize("where", ["waiting", "in the backlog", "in the body", "by an error"])
def test_task_that_ends_leaves_nothing_open(spool, where):
    async def scheduler():
        follower = Follower(spool)
        taking = asyncio.create_task(take(follower))
        await asyncio.wait_for(begun.wait(), 60)
        taking.cancel()
        with pytest.raises(KeyError if where == "by an error" else asyncio.CancelledError):
            await taking
        await asyncio.sleep(
            0
        )  # what was cancelled in its body is closed by the loop, one turn later
        await asyncio.sleep(0)
        assert sorted(asyncio.get_running_loop()._selector.get_map()) == readers, (
            "the loop listens to nothing of it"
        )
        assert len(open_fds(str(spool))) == len(before) + 1, "the loop's own epoll"
        return follower

    async def take(follower):
        readers.extend(asyncio.get_running_loop()._selector.get_map())
        if where == "waiting":
            asyncio.get_running_loop().call_later(0.01, begun.set)
        async for event in follower:
            if where != "waiting" and isinstance(event, Output):
                begun.set()
                if where == "in the body":
                    await asyncio.sleep(60)
                if where == "by an error":
                    raise KeyError

    readers, begun = [], asyncio.Event()
    with Writer(spool) as writer:
        if where != "waiting":
            os.truncate(
                spool / "r" / "stdout", 1 << 40
            )  # more than it can read before it is cancelled
            writer.write(b"\n")
        before = open_fds(str(spool))
        follower = asyncio.run(scheduler())
        assert open_fds(str(spool)) == before
    assert follower.cursor["runs"]["r"]["key"] == writer.run.key


def test_follower_that_a_with_holds_stays_open_after_async_for(spool):
    async def scheduler():
        with Writer(spool, "a") as a, Writer(spool, "b"):
            with Follower(spool) as follower:
                a.end()
                async for event in follower:
                    if isinstance(event, Started):
                        break
                return [brief(event) async for event in until_ended(follower)]

    async def until_ended(follower):
        async for event in follower:
            yield event
            if isinstance(event, Ended):
                return

    assert asyncio.run(scheduler())[-1] == ("ended", "a", "terminated")


def test_backlog_leaves_the_loops_other_tasks_their_turns(spool):
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scheduler():
        task = asyncio.create_task(other())
        async for event in Follower(spool):
            if isinstance(event, Ended):
                break
        task.cancel()

    with Writer(spool) as writer:
        os.truncate(spool / "r" / "stdout", 64 << 20)
        writer.counts["stdout"] = 64 << 20
        writer.end()
    asyncio.run(scheduler())
    assert turns > 2


def test_closed_follower_still_tells_its_cursor(spool):
    with Writer(spool) as writer:
        with Follower(spool) as follower:
            next_of(follower, Started)
        assert follower.cursor == {"runs": {"r": {"key": writer.run.key, "stdout": 0, "stderr": 0}}}


def test_follower_takes_one_inotify_instance_for_all_runs(spool):
    before = len(open_fds(str(spool)))
    with contextlib.ExitStack() as stack:
        for number in range(20):
            stack.enter_context(Writer(spool, f"r{number}")).write(b"x")
        follower = stack.enter_context(Follower(spool))
        told(follower)
        assert len([fd for fd in open_fds(str(spool)) if fd.endswith("anon_inode:inotify")]) == 1
    assert len(open_fds(str(spool))) == before


def test_clock_that_jumps_changes_nothing(spool, monkeypatch):
    """Years forward and back at each look at it, and in what the statuses say."""
    years = itertools.cycle([0, 40, -30, 3])
    real = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: real + next(years) * 31_557_600 * 10**9)
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9)
    with Writer(spool) as writer, Writer(spool, "dead") as dead, Follower(spool) as follower:
        assert {event[:2] for event in told(follower)} == {
            ("started", "r"),
            ("changed", "r"),
            ("started", "dead"),
            ("changed", "dead"),
        }
        writer.running().write(b"1")
        assert told(follower) == [("changed", "r", "running"), ("output", "r", "stdout", 0, b"1")]
        begun = time.monotonic()
        assert follower.next(0.02) is None
        assert 0.02 <= time.monotonic() - begun < 10
        for stream in ("stdout", "stderr", "lock", "running.json"):
            with contextlib.suppress(FileNotFoundError):
                os.utime(spool / "r" / stream, ns=(0, time.time_ns()))
        writer.write(b"2").end()
        dead.die()
        events = [brief(follower.next(60)) for _ in range(3)]
        assert [event for event in events if event[1] == "r"] == [
            ("output", "r", "stdout", 1, b"2"),
            ("ended", "r", "terminated"),
        ]
        assert ("lost", "dead", "lost") in events


def test_no_wall_clock_is_looked_at():
    import chaperone

    rooms = ("model/cursor", "follow/follower", "follow/followed", "follow/descriptors", "api")
    for name in rooms:
        with open(os.path.join(os.path.dirname(chaperone.__file__), f"{name}.py")) as file:
            assert "time.time" not in file.read(), name


def test_task_goes_on_inside_the_callback_that_heard():
    """A turn of the loop later is a quarter of the time from a write to its subscriber."""
    seen = []

    async def main():
        loop = asyncio.get_running_loop()
        future = descriptors.PromptFuture(loop=loop)

        async def waits():
            seen.append(await future)
            assert asyncio.current_task() is task

        def hears():
            future.go_on(True)
            seen.append("then the callback ends")
            future.go_on(False)  # heard twice

        task = loop.create_task(waits())
        await asyncio.sleep(0)
        loop.call_soon(hears)
        await task
        future = descriptors.PromptFuture(loop=loop)
        task = loop.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        future.go_on(True)  # the loop still ends it
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert seen == [True, "then the callback ends"]


def test_loop_is_left_alone_while_no_task_waits_for_the_follower(spool):
    async def main():
        with Writer(spool) as writer, Follower(spool) as follower:
            while await follower.anext(0.05) is not None:
                pass
            writer.running()
            while follower._watcher._loop is not None:  # the kernel has an event, and no task waits
                await asyncio.sleep(0)
            assert isinstance(await follower.anext(), Changed)

    asyncio.run(main())


@pytest.mark.parametrize("shared", [False, True])
def test_events_that_come_fast_gather_and_none_is_lost(spool, monkeypatch, shared):
    monkeypatch.setattr(descriptors, "FAST_S", 1_000_000)  # as if each came at once after another
    monkeypatch.setattr(descriptors, "GATHER_S", 0.02)

    async def main():
        with Writer(spool) as writer, Follower(spool, shared=shared) as follower:
            got = b""
            while (event := await follower.anext(0.1)) is not None:
                assert not isinstance(event, Output)
            for number in range(5):
                waiting = asyncio.ensure_future(follower.anext())
                await asyncio.sleep(0)  # it waits now
                writer.write(b"%d" % number).write(b"!")
                got += (await waiting).data
                while len(got) < 2 * (number + 1):
                    got += (await follower.anext()).data
            waiting = asyncio.ensure_future(follower.anext())
            await asyncio.sleep(0)
            writer.running()
            assert isinstance(await waiting, Changed)
            return got

    assert asyncio.run(main()) == b"0!1!2!3!4!"
