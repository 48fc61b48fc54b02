"""A follower hears of every byte and every ending once, in order, whatever happens in between."""

import asyncio
import contextlib
import errno
import fcntl
import gc as collector
import itertools
import json
import os
import pathlib
import random
import resource
import select
import shutil
import subprocess
import sys
import time
import warnings

import pytest

from chaperone.api import Spool
from chaperone.errors import NoRunError, SpecError, SpoolError, UnreadableRunError
from chaperone.follow import descriptors, followed
from chaperone.follow import follower as followers
from chaperone.follow import timer as timers
from chaperone.follow.follower import Follower
from chaperone.model.events import Changed, Ended, Lost, Output, Shrank, Started
from chaperone.spool import format, gc, look
from spool_tests import disk
from spool_tests.conftest import open_fds, until
from spool_tests.writer import Writer


def brief(event):
    """An event as a short tuple: what it is, of which run, and what matters of it."""
    kind = type(event).__name__.lower()
    if isinstance(event, Output):
        return (kind, event.run_id, event.stream, event.offset, event.data)
    if isinstance(event, Started):
        return (kind, event.run_id)
    if isinstance(event, Shrank):
        return (kind, event.run_id, event.stream, event.offset, event.size)
    return (kind, event.run_id, event.status and event.status.state)


def told(follower):
    """What it has to tell by now."""
    events = []
    while (event := follower.next(0)) is not None:
        events.append(brief(event))
    return events


def next_of(follower, kind, timeout=10):
    """The next event of a kind; what comes before it is dropped."""
    while True:
        event = follower.next(timeout)
        assert event is not None, f"no {kind.__name__} within {timeout} s"
        if isinstance(event, kind):
            return event


def again(follower):
    """What a scheduler keeps and gives back: the cursor by way of JSON."""
    return json.loads(json.dumps(follower.cursor))


# -- the life of a run


def test_run_is_told_from_its_start_to_its_end_in_order(spool):
    with Follower(spool) as follower:
        with Writer(spool) as writer:
            assert told(follower) == [("started", "r"), ("changed", "r", "starting")]
            writer.running().write(b"one\n").write(b"oops\n", "stderr")
            assert told(follower) == [
                ("changed", "r", "running"),
                ("output", "r", "stdout", 0, b"one\n"),
                ("output", "r", "stderr", 0, b"oops\n"),
            ]
            writer.write(b"two\n").end(3)
        output, last = follower.next(0), follower.next(0)
        assert brief(output) == ("output", "r", "stdout", 4, b"two\n")
        assert (type(last), last.status.return_code, last.status.stdout.bytes) == (Ended, 3, 8)
        assert told(follower) == []
        assert follower.cursor == {
            "runs": {"r": {"key": writer.run.key, "stdout": 8, "stderr": 5, "ended": True}}
        }


def test_run_that_began_and_ended_unseen_is_told_whole(spool):
    with Writer(spool) as writer:
        writer.write(b"all of it").end()
    with Follower(spool) as follower:
        assert told(follower) == [
            ("started", "r"),
            ("output", "r", "stdout", 0, b"all of it"),
            ("ended", "r", "terminated"),
        ]


def test_status_is_told_once_for_each_change(spool):
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        writer.running().running(leftovers=0)
        assert told(follower) == [("changed", "r", "running")]
        writer.running(labels={"connection": "down"})
        assert next_of(follower, Changed).status.labels == {"connection": "down"}


def once_looked_at(monkeypatch, function):
    """
    Call a function right after the first look into a run, before anything is made of what was seen.
    """
    real = look.look

    def looked(*arguments):
        found = real(*arguments)
        monkeypatch.setattr(look, "look", real)
        function()
        return found

    monkeypatch.setattr(look, "look", looked)


def test_run_is_watched_before_it_is_looked_at(spool, monkeypatch):
    with Writer(spool) as writer, Follower(spool) as follower:
        once_looked_at(monkeypatch, writer.running)
        assert told(follower) == [
            ("started", "r"),
            ("changed", "r", "starting"),
            ("changed", "r", "running"),
        ]


def test_run_that_is_moved_away_while_it_is_looked_at_is_not_lost(spool, monkeypatch):
    with Writer(spool) as writer:
        writer.running().die()
    once_looked_at(monkeypatch, lambda: os.rename(spool / "r", spool / ".r.0.gone"))
    with Follower(spool) as follower:
        assert "lost" not in [event[0] for event in told(follower)]


def test_first_status_is_told_again_after_reconnecting(spool):
    with Writer(spool) as writer:
        with Follower(spool) as follower:
            writer.running().write(b"1")
            assert len(told(follower)) == 3
            cursor = again(follower)
        with Follower(spool, cursor) as follower:
            assert told(follower) == [("changed", "r", "running")]


@pytest.mark.parametrize("streams, expected", [(("stderr",), [b"2"]), ((), [])])
def test_follower_reads_the_streams_it_was_asked_for(spool, streams, expected):
    with Writer(spool) as writer:
        writer.write(b"1").write(b"2", "stderr").end()
    with Follower(spool, streams=streams) as follower:
        events = told(follower)
    assert [event[4] for event in events if event[0] == "output"] == expected
    assert events[-1] == ("ended", "r", "terminated")


def test_stream_that_was_not_asked_for_is_not_told_when_it_grows(spool):
    with Writer(spool) as writer, Follower(spool, streams=["stdout"]) as follower:
        told(follower)
        writer.write(b"no", "stderr").write(b"yes")
        assert told(follower) == [("output", "r", "stdout", 0, b"yes")]
        assert follower.entry("r")["stderr"] == 0


def test_stream_that_no_run_has_is_refused(spool):
    with pytest.raises(
        SpecError, match=r"^unable to follow streams \('log',\): want some of stdout and stderr$"
    ):
        Follower(spool, streams=["log"])


def test_bytes_beyond_the_final_status_are_not_told(spool):
    with Writer(spool) as writer:
        writer.running().write(b"mine").publish()
        os.write(writer.run.streams["stdout"], b" a leftover's")
        with Follower(spool) as follower:
            assert told(follower)[1:] == [
                ("output", "r", "stdout", 0, b"mine"),
                ("ended", "r", "terminated"),
            ]


def test_stream_that_was_cut_short_is_told_once_and_read_anew(spool):
    with Writer(spool) as writer, Follower(spool) as follower:
        writer.running().write(b"longer than what follows")
        told(follower)
        os.truncate(spool / "r" / "stdout", 0)
        writer.write(b"oops")
        assert told(follower) == [
            ("shrank", "r", "stdout", 24, 4),
            ("output", "r", "stdout", 0, b"oops"),
        ]
        writer.write(b"!")
        assert told(follower) == [("output", "r", "stdout", 4, b"!")]


# -- large, many, far behind


def test_output_comes_in_pieces_of_at_most_a_mebibyte(spool):
    data = os.urandom(1 << 16) * 53
    with Writer(spool) as writer:
        writer.write(data).end()
    with Follower(spool) as follower:
        pieces = [event[4] for event in told(follower) if event[0] == "output"]
    assert [len(piece) for piece in pieces] == [1 << 20] * 3 + [5 << 16]
    assert b"".join(pieces) == data


def test_flooding_run_holds_up_no_quiet_one(spool):
    with contextlib.ExitStack() as stack:
        flood = stack.enter_context(Writer(spool, "flood"))
        quiet = [stack.enter_context(Writer(spool, f"quiet-{number}")) for number in range(10)]
        follower = stack.enter_context(Follower(spool))
        told(follower)
        os.truncate(spool / "flood" / "stdout", 64 << 20)
        flood.write(b"\n")
        assert brief(follower.next(0))[:4] == ("output", "flood", "stdout", 0)
        for writer in quiet:
            writer.write(b"hello")
        first = [follower.next(0).run_id for _ in range(24)]
        assert {f"quiet-{number}" for number in range(10)} <= set(first)
        assert follower.next(0).run_id == "flood"


def test_streams_of_one_run_take_turns(spool):
    with Writer(spool) as writer, Follower(spool, streams=("stdout", "stderr")) as follower:
        told(follower)
        os.truncate(spool / "r" / "stdout", 8 << 20)
        writer.write(b"\n").write(b"oops", "stderr")
        assert "stderr" in [follower.next(0).stream for _ in range(2)]


def test_more_streams_than_fds_are_read_all_the_same(spool, monkeypatch):
    monkeypatch.setattr(followers, "OpenStreams", lambda: descriptors.OpenStreams(most=2))
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Writer(spool, f"r{number}")) for number in range(6)]
        follower = stack.enter_context(Follower(spool))
        told(follower)
        for round_ in range(3):
            for writer in writers:
                writer.write(b"x")
            assert [event[3] for event in told(follower)] == [round_] * 6
            assert (
                len([fd for fd in open_fds(str(spool)) if fd.endswith("/stdout")]) <= 6 + 2
            )  # the writers' own


def test_event_queue_that_overflowed_loses_nothing(spool):
    with open("/proc/sys/fs/inotify/max_queued_events") as file:
        depth = int(file.read())
    with Writer(spool, "old") as old, Writer(spool, "dead") as dead, Follower(spool) as follower:
        told(follower)
        for _ in range(depth // 2 + 100):
            old.write(b"o").write(
                b"e", "stderr"
            )  # alternating, so that the kernel can't merge them
        with Writer(spool, "new") as new:
            new.write(b"hello").end()
        old.end()
        dead.die()
        events = told(follower)
        events += [brief(follower.next(5))] if ("lost", "dead", "lost") not in events else []
    assert {
        ("output", "new", "stdout", 0, b"hello"),
        ("ended", "new", "terminated"),
        ("ended", "old", "terminated"),
        ("lost", "dead", "lost"),
    } <= set(events)
    for stream in ("stdout", "stderr"):
        assert (
            len(b"".join(event[4] for event in events if event[:3] == ("output", "old", stream)))
            == depth // 2 + 100
        )


def test_the_deeper_the_queue_the_more_events_are_taken_at_once(spool, monkeypatch):
    """
    A write a run is told one by one; of 6,000 that wait, each run has one event, and a few reads of
    the queue take them all.
    """
    reads = []
    monkeypatch.setattr(
        descriptors.Watcher,
        "read",
        lambda self, whole=descriptors.Watcher.read: (reads.append(told := whole(self)), told)[1],
    )
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(spool, f"r{number}").running()) for number in range(10)
        ]
        follower = stack.enter_context(Follower(spool))
        told(follower)
        for writer in writers:
            writer.write(b"x")
            assert [event[4] for event in told(follower)] == [b"x"]
        reads.clear()
        for _ in range(600):
            for writer in writers:  # never the same twice in a row: the kernel would merge the two
                writer.write(b"y")
        assert sorted(event[1:] for event in told(follower)) == sorted(
            (f"r{number}", "stdout", 1, b"y" * 600) for number in range(10)
        )
        sizes = [len(read) for read in reads if read]
        assert (sum(sizes), len(sizes) <= 4) == (6_000, True), sizes


def test_queue_is_left_to_fill_while_there_is_work_on_hand(spool, monkeypatch):
    """
    With a flood to tell, it is read each millisecond and not each time: GATHER_S is what that costs
    the others.
    """
    monkeypatch.setattr(followers, "GATHER_S", 60)
    with (
        Writer(spool, "flood") as flood,
        Writer(spool, "quiet") as quiet,
        Follower(spool) as follower,
    ):
        told(follower)
        os.truncate(spool / "flood" / "stdout", 3 << 20)
        flood.write(b"\n")
        assert follower.next(0).run_id == "flood"
        quiet.write(b"x")
        assert [follower.next(0).run_id for _ in range(4)] == ["flood"] * 3 + ["quiet"]


# -- exactly once


def history(spool):
    """A spool with runs in every state of their life; the writers that are to stay open."""
    with Writer(spool, "ended") as writer:
        writer.write(b"e" * 100).write(b"f", "stderr").end()
    with Writer(spool, "dead") as writer:
        writer.running().write(b"d")
    with Writer(spool, "empty") as writer:
        writer.end()
    live = Writer(spool, "live")
    live.running().write(b"l" * 10)
    return live


def test_scheduler_that_is_killed_after_any_event_hears_each_once(spool):
    """The event after which it dies, uncommitted, comes again; the committed ones never do."""
    with history(spool) as live:
        heard, cursor = [], None
        while True:
            with Follower(spool, cursor) as follower:
                event = follower.next(0)
                if event is None:
                    break
                assert brief(event) == brief(follower_again(spool, cursor)), (
                    "what was not committed comes again"
                )
                heard.append(event)
                cursor = again(follower)
            if heard[-1] == heard[0]:
                live.write(b"more")
            if isinstance(event, Changed):
                live.end()
    brief_heard = [brief(event) for event in heard]
    assert sorted(
        event for event in brief_heard if event[0] in ("started", "ended", "lost")
    ) == sorted(
        [("started", run) for run in ("ended", "dead", "empty", "live")]
        + [("ended", run, "terminated") for run in ("ended", "empty", "live")]
        + [("lost", "dead", "lost")]
    )
    for run, stream, data in [
        ("ended", "stdout", b"e" * 100),
        ("ended", "stderr", b"f"),
        ("dead", "stdout", b"d"),
        ("live", "stdout", b"l" * 10 + b"more"),
    ]:
        assert (
            b"".join(event[4] for event in brief_heard if event[:3] == ("output", run, stream))
            == data
        )


def follower_again(spool, cursor):
    with Follower(spool, cursor) as follower:
        return follower.next(0)


def test_entry_of_a_starter_that_died_brings_no_collected_run_back(spool):
    """A second starter of the id made it after the run was collected, and was killed there."""
    with Writer(spool) as writer:
        writer.running().write(b"once").end()
    with Follower(spool) as follower:
        assert told(follower)[-1] == ("ended", "r", "terminated")
        follower.collect("r")
        os.symlink("../r", spool / ".running" / "r")
        cursor = again(follower)
    with Follower(spool, cursor) as follower:
        assert (told(follower), follower.cursor) == ([], {"runs": {}})


@pytest.mark.parametrize("poll_s", [None, 1000])
def test_lease_that_ends_ends_the_wait(spool, poll_s):
    run = disk.create(spool, on_disconnect="survive", lease=1)
    disk.running(run)
    run.close()
    with Follower(spool, runs=["r"], poll_s=poll_s) as follower:
        assert next_of(follower, Changed).status.state == "unattended"
        lost = next_of(follower, Lost)
        assert (lost.status.state, follower.next(0), follower.is_over()) == ("lost", None, True)
    assert Spool(spool)["r"].wait(5).state == "lost"


@pytest.mark.parametrize("poll_s", [None, 0.02])
def test_runs_that_another_collects_are_forgotten(spool, poll_s):
    with Follower(spool, poll_s=poll_s) as follower:
        with Writer(spool, "first") as writer:
            writer.end()
        assert next_of(follower, Ended).run_id == "first"
        with Writer(spool, "second") as writer:
            writer.end()
            Spool(spool).collect("first")
            # Collected before its ending was delivered.
            assert next_of(follower, Started).run_id == "second"
            Spool(spool).collect("second")
        assert next_of(follower, Ended).run_id == "second"

        def is_empty():
            assert follower.next(0) is None
            return follower.cursor == {"runs": {}}

        until(is_empty)
        assert (follower.uncollected, follower._runs) == ([], {})
        follower.collect("first")  # by a scheduler that has only now committed the ending


def test_follower_that_is_not_closed_warns_and_leaves_nothing_open(spool):
    before = open_fds(str(spool))
    with Writer(spool):
        follower = Follower(spool)
        told(follower)
        sentence = f"^a follower of spool {str(spool)!r} was not closed$"
        with pytest.warns(ResourceWarning, match=sentence):
            del follower
            collector.collect()
    assert open_fds(str(spool)) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Follower(spool).close()
        collector.collect()


def test_collected_run_is_never_told_again(spool):
    with Writer(spool) as writer:
        writer.end()
    with Follower(spool) as follower:
        told(follower)
        assert follower.uncollected == ["r"]
        follower.collect("r")
        assert (follower.cursor, follower.uncollected, os.listdir(spool / ".ended")) == (
            {"runs": {}},
            [],
            [],
        )
        cursor = again(follower)
    with Follower(spool, cursor) as follower:
        assert told(follower) == []


def test_ending_that_was_committed_but_not_collected_can_be_collected_later(spool):
    with Writer(spool) as writer:
        writer.end()
    with Follower(spool) as follower:
        told(follower)
        cursor = again(follower)
    with Follower(spool, cursor) as follower:
        assert (told(follower), follower.uncollected) == ([], ["r"])
        follower.collect("r")
    assert os.listdir(spool / ".ended") == []


def test_run_that_was_collected_before_its_cursor_was_committed_is_forgotten(spool):
    with Writer(spool) as writer:
        writer.end()
    with Follower(spool) as follower:
        told(follower)
        cursor = again(follower)
        follower.collect("r")
    with Follower(spool, cursor) as follower:
        assert (told(follower), follower.cursor) == ([], {"runs": {}})


def test_run_may_be_collected_before_its_entry_has_moved(spool):
    """
    The final status appears first: whoever collects at once must not leave an entry that tells the
    run a second time.
    """
    with Writer(spool) as writer, Follower(spool) as follower:
        writer.running().publish()
        assert told(follower)[-1] == ("ended", "r", "terminated")
        follower.collect("r")
        assert (list(follower.cursor["runs"]), follower.uncollected) == (["r"], [])
        writer.end()
        assert (told(follower), follower.cursor, os.listdir(spool / ".ended")) == (
            [],
            {"runs": {}},
            [],
        )


def test_named_run_that_was_collected_is_not_told_again_by_an_event_that_was_late(spool):
    with (
        Writer(spool, "other") as other,
        Writer(spool) as writer,
        Follower(spool, runs=["r", "other"]) as follower,
    ):
        other.running()
        writer.running().publish()
        assert told(follower)[-1] == ("ended", "r", "terminated")
        writer.end()
        follower.collect("r")
        assert told(follower) == []


def test_run_that_was_collected_is_not_told_again_by_an_event_that_was_late(spool):
    with Writer(spool) as writer:
        with Follower(spool) as follower:
            writer.running().publish()
            told(follower)
            cursor = again(follower)
        with Follower(spool, cursor) as follower:
            writer.end()  # the kernel tells that its entry moves, and nobody listens yet
            follower.collect("r")
            assert (follower.cursor, os.listdir(spool / ".ended")) == ({"runs": {}}, [])
            assert (told(follower), follower.cursor) == ([], {"runs": {}})


def test_lost_run_is_collected_once_it_was_reaped(spool):
    with Writer(spool) as writer:
        writer.running()
    with Follower(spool) as follower:
        next_of(follower, Lost)
        follower.collect("r")
        cursor = again(follower)
        assert list(cursor["runs"]) == ["r"]
    with Follower(spool, cursor) as follower:
        assert (told(follower), follower.uncollected) == ([], ["r"])
        follower.collect("r")
        os.rename(spool / ".running" / "r", spool / ".ended" / "r")
        assert (told(follower), follower.cursor, os.listdir(spool / ".ended")) == (
            [],
            {"runs": {}},
            [],
        )


def test_run_whose_ending_was_not_told_can_not_be_collected(spool):
    with Writer(spool), Follower(spool) as follower:
        with pytest.raises(
            SpecError, match="^unable to collect run 'r': its ending was not handed out$"
        ):
            follower.collect("r")


def test_entry_of_one_run_is_its_part_of_the_cursor(spool):
    with Writer(spool) as writer, Follower(spool) as follower:
        assert (follower.entry("r"), follower.cursor) == (None, {"runs": {}})
        next_of(follower, Started)
        assert (
            follower.entry("r")
            == {"key": writer.run.key, "stdout": 0, "stderr": 0}
            == follower.cursor["runs"]["r"]
        )
        assert follower.entry("unknown") is None


# -- which runs


def test_run_that_is_waited_for_stays_in_the_cursor_until_it_starts(spool):
    with Follower(spool, {"runs": {"r": {}}}) as follower:
        assert (told(follower), follower.cursor) == ([], {"runs": {"r": {}}})
        with Writer(spool):
            assert told(follower)[0] == ("started", "r")


def test_follower_of_named_runs_ends_with_the_last_of_them(spool):
    with Writer(spool, "a") as a, Writer(spool, "b") as b, Writer(spool, "c") as c:
        with Follower(spool, {"runs": {"c": {"key": c.run.key}}}, runs=["a", "b"]) as follower:
            told(follower)
            for writer in (a, c, b):
                writer.end()
            assert [brief(event) for event in follower] == [
                ("ended", "a", "terminated"),
                ("ended", "b", "terminated"),
            ]
            assert follower.cursor["runs"]["c"] == {"key": c.run.key}, (
                "what it does not follow stays as it was"
            )


@pytest.mark.parametrize("cursor, kinds", [({}, []), ({"runs": {"r": {}}}, [Started, Ended])])
def test_named_run_that_was_collected_is_over_unless_the_cursor_waits_for_it(spool, cursor, kinds):
    with Writer(spool) as writer:
        writer.end()
    os.unlink(spool / ".ended" / "r")
    with Follower(spool, cursor, runs=["r"]) as follower:
        assert [type(event) for event in follower] == kinds


def test_new_runs_are_learned_without_listing(spool, monkeypatch):
    with Follower(spool) as follower:
        monkeypatch.setattr(format, "live_ids", None)
        monkeypatch.setattr(format, "ended_ids", None)
        for number in range(3):
            with Writer(spool, f"r{number}") as writer:
                writer.end()
        assert [event[:2] for event in told(follower)] == [
            (kind, f"r{number}") for kind in ("started", "ended") for number in range(3)
        ]


def test_dangling_entry_of_a_dead_starter_tells_nothing(spool):
    (spool / ".running").mkdir()
    os.symlink("../r", spool / ".running" / "r")
    with Follower(spool) as follower:
        assert (told(follower), follower.cursor) == ([], {"runs": {}})
        os.unlink(spool / ".running" / "r")
        with Writer(spool):
            assert told(follower)[0] == ("started", "r")


# -- lost, or not


def test_killed_chaperone_is_lost_with_its_last_bytes(spool):
    text = "import sys; from spool_tests.writer import Writer; w = Writer(*sys.argv[1:]).running().write(b'last'); print(flush=True); sys.stdin.read()"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    chaperone = subprocess.Popen(
        [sys.executable, "-c", text, spool, "r"],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with chaperone, Follower(spool) as follower:
        chaperone.stdout.readline()
        told(follower)
        chaperone.kill()
        event = follower.next(10)
        assert (brief(event), event.status.return_code, event.status.complete) == (
            ("lost", "r", "lost"),
            None,
            False,
        )
        assert (told(follower), follower.entry("r")["stdout"]) == ([], 4)


def test_lock_that_still_looks_held_is_probed_until_it_falls(spool, monkeypatch):
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        keeper = os.dup(
            writer.run.lock_fd
        )  # as if the kernel were slow between the event and the fall of the lock
        os.close(os.open(spool / "r" / "lock", os.O_WRONLY))
        assert told(follower) == []
        assert select.select([follower], [], [], 1)[0], "a deadline makes it readable"
        assert told(follower) == []
        writer.die()
        os.close(keeper)
        assert brief(follower.next(5)) == ("lost", "r", "lost")


def test_lock_that_was_opened_and_closed_by_another_is_no_death(spool, monkeypatch):
    monkeypatch.setattr(followed, "LAST_PROBE_S", 0.004)
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        os.close(os.open(spool / "r" / "lock", os.O_WRONLY))
        assert follower.next(0.1) is None
        assert follower._watcher._alarms == [], "it stops probing"
        writer.end()
        assert told(follower)[-1] == ("ended", "r", "terminated")


def test_lost_waits_for_what_the_guard_still_writes(spool):
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        guard = os.open(spool / "r" / "stdout", os.O_WRONLY | os.O_APPEND)
        fcntl.flock(guard, fcntl.LOCK_SH)
        writer.die()
        assert follower.next(0.05) is None
        os.write(guard, b"from the pipe")
        assert brief(follower.next(1)) == ("output", "r", "stdout", 0, b"from the pipe")
        os.write(guard, b"!")
        os.close(guard)
        assert [brief(follower.next(5)) for _ in range(2)] == [
            ("output", "r", "stdout", 13, b"!"),
            ("lost", "r", "lost"),
        ]


def test_guard_that_never_ends_does_not_hold_up_lost_for_ever(spool, monkeypatch):
    monkeypatch.setattr(followed, "DRAIN_S", 0.02)
    with (
        Writer(spool) as writer,
        Follower(spool) as follower,
        open(spool / "r" / "stdout", "ab") as guard,
    ):
        fcntl.flock(guard, fcntl.LOCK_SH)
        writer.die()
        assert next_of(follower, Lost).run_id == "r"


def test_run_that_may_survive_is_unattended_and_not_lost(spool):
    with Writer(spool, on_disconnect="survive") as writer, Follower(spool) as follower:
        writer.running()
        told(follower)
        writer.die()
        assert [brief(follower.next(5))] == [("changed", "r", "unattended")]
        assert told(follower) == []


def test_chaperone_that_died_between_status_and_entry_has_ended_its_run(spool):
    with Writer(spool) as writer:
        writer.running().write(b"x").publish()
    with Follower(spool) as follower:
        assert told(follower)[1:] == [
            ("output", "r", "stdout", 0, b"x"),
            ("ended", "r", "terminated"),
        ]


# -- what others do to the spool


def deleted_by_gc(spool, writer):
    os.rename(spool / "r", spool / ".r.x.gone")
    shutil.rmtree(spool / ".r.x.gone")


def deleted_by_hand(spool, writer):
    shutil.rmtree(spool / "r")


@pytest.mark.parametrize("deleted", [deleted_by_gc, deleted_by_hand])
def test_run_that_is_deleted_while_followed_has_ended_without_a_status(spool, deleted):
    with Writer(spool) as writer, Follower(spool) as follower:
        writer.running().write(b"read")
        told(follower)
        deleted(spool, writer)
        assert told(follower) == [("ended", "r", None)]
        follower.collect("r")
        assert follower.uncollected == []


def test_gc_while_a_run_is_read_tells_its_end_once_and_disturbs_no_other(spool):
    with Writer(spool, "other") as other, Follower(spool) as follower:
        with Writer(spool) as writer:
            writer.write(b"x" * (3 << 20)).end()
        while brief(follower.next(0))[:3] != ("output", "r", "stdout"):
            pass
        assert gc.gc(str(spool), older_s=-1, uncollected=True).removed == ["r"]
        other.write(b"y").end()
        events = told(follower)
        assert [event for event in events if event[1] == "r" and event[0] != "output"] in (
            [("ended", "r", None)],
            [("ended", "r", "terminated")],
        )
        assert [event[:2] for event in events if event[1] == "other"][-2:] == [
            ("output", "other"),
            ("ended", "other"),
        ]
        for run_id in ("r", "other"):
            follower.collect(run_id)
        assert follower.cursor == {"runs": {}}


@pytest.mark.parametrize(
    "seed, runs",
    [(1, 50), *(pytest.param(seed, 300, marks=pytest.mark.long) for seed in range(2, 6))],
)
def test_gc_that_never_rests_takes_no_run_s_end_from_its_follower(spool, seed, runs):
    """
    Runs begin, write and end; gc deletes each as soon as it may; the follower dawdles. What was
    told to start ends, once.
    """
    dice = random.Random(seed)
    live, events = {}, []
    with Follower(spool) as follower:
        for number in range(runs):
            live[f"r{number}"] = Writer(spool, f"r{number}").running()
            for writer in dice.sample(list(live.values()), k=min(3, len(live))):
                writer.write(
                    dice.randbytes(dice.choice([1, 100, 3_000])), dice.choice(["stdout", "stderr"])
                )
            while len(live) > 5:
                live.pop(dice.choice(list(live))).end()
            if dice.random() < 0.3:
                gc.gc(str(spool), older_s=-1, uncollected=True)
            for _ in range(dice.choice([0, 1, 2, 20])):
                if (event := follower.next(0)) is not None:
                    events.append(brief(event))
        for writer in live.values():
            writer.end()
        events += told(follower)
        for run_id in follower.uncollected:
            follower.collect(run_id)
        assert (told(follower), follower.cursor) == ([], {"runs": {}})
    started = [event[1] for event in events if event[0] == "started"]
    ended = {event[1]: event[2] for event in events if event[0] == "ended"}
    assert (
        len(started) == len(set(started)) == len([event for event in events if event[0] == "ended"])
    ), f"seed {seed}"
    assert set(started) == set(ended), f"seed {seed}"
    assert set(ended.values()) == {"terminated", None}, f"seed {seed}: the dice gave both cases"
    positions = {}
    for _, run_id, stream, offset, data in (event for event in events if event[0] == "output"):
        assert offset == positions.get((run_id, stream), 0), f"seed {seed}: {run_id} {stream}"
        positions[run_id, stream] = offset + len(data)


def test_run_that_was_deleted_while_nobody_looked_has_ended_without_a_status(spool):
    with Writer(spool) as writer:
        with Follower(spool) as follower:
            told(follower)
            cursor = again(follower)
        writer.end()
    shutil.rmtree(spool / "r")
    os.unlink(spool / ".ended" / "r")
    with Follower(spool, cursor) as follower:
        assert told(follower) == [("ended", "r", None)]


def test_run_of_a_reused_id_is_another_run(spool):
    with Writer(spool, key="first") as writer:
        writer.write(b"first")
        with Follower(spool) as follower:
            told(follower)
            cursor = again(follower)
        writer.end()
    shutil.rmtree(spool / "r")
    os.unlink(spool / ".ended" / "r")
    with Writer(spool, key="second") as writer:
        writer.write(b"2").end()
    with Follower(spool, cursor) as follower:
        assert told(follower) == [
            ("ended", "r", None),
            ("started", "r"),
            ("output", "r", "stdout", 0, b"2"),
            ("ended", "r", "terminated"),
        ]
        assert follower.entry("r")["key"] == "second"


def test_id_that_is_reused_before_its_follower_looks_is_another_run(spool):
    with Follower(spool) as follower:
        with Writer(spool, key="first") as writer:
            writer.running().write(b"first")
            told(follower)
            deleted_by_gc(spool, writer)
            with Writer(spool, key="second") as second:
                second.running().write(b"the second").end()
                events = told(follower)
    assert events == [
        ("ended", "r", None),
        ("started", "r"),
        ("output", "r", "stdout", 0, b"the second"),
        ("ended", "r", "terminated"),
    ]


def test_run_that_is_deleted_before_all_its_bytes_were_read_has_ended_without_a_status(
    spool, monkeypatch
):
    """Its status was seen; but an ending with a status says that every byte was handed out."""
    monkeypatch.setattr(followers, "OpenStreams", lambda: descriptors.OpenStreams(most=1))
    with Writer(spool, "other") as other, Follower(spool) as follower:
        with Writer(spool) as writer:
            writer.write(b"x" * (3 << 20)).end()
        other.write(b"y")
        events = [
            next_of(follower, Output) for _ in range(2)
        ]  # the other's stream takes the place of its own
        assert {event.run_id for event in events} == {"r", "other"}
        follower.streams.drop("r")
        deleted_by_gc(spool, writer)
        assert told(follower) == [("ended", "r", None)]


def test_id_that_is_reused_while_followed_is_another_run(spool):
    with Follower(spool) as follower:
        for key in ("first", "second"):
            with Writer(spool, key=key) as writer:
                writer.write(key.encode()).end()
            assert told(follower)[0] == ("started", "r")
            assert follower.entry("r") == {
                "key": key,
                "stdout": len(key),
                "stderr": 0,
                "ended": True,
            }
            shutil.rmtree(spool / "r")
            os.unlink(spool / ".ended" / "r")


def test_collecting_a_deleted_run_leaves_the_next_one_of_its_id(spool):
    with Follower(spool) as follower:
        with Writer(spool, key="first") as writer:
            writer.end()
        told(follower)
        shutil.rmtree(spool / "r")
        os.unlink(spool / ".ended" / "r")
        with Writer(spool, key="second") as writer:
            writer.end()
        follower.collect("r")
        assert os.listdir(spool / ".ended") == ["r"]
        assert told(follower) == [("started", "r"), ("ended", "r", "terminated")]


def test_removed_spool_is_an_error_after_the_last_ending(spool):
    with Writer(spool), Follower(spool) as follower:
        told(follower)
        shutil.rmtree(spool)
        assert brief(follower.next(5)) == ("ended", "r", None)
        with pytest.raises(
            SpoolError, match="^unable to follow spool '.*/spool' any longer: it was removed$"
        ):
            follower.next(5)


def test_removed_spool_is_an_error_where_it_is_polled_too(spool):
    with Writer(spool), Follower(spool, poll_s=0.005) as follower:
        told(follower)
        shutil.rmtree(spool)
        assert brief(follower.next(5)) == ("ended", "r", None)
        with pytest.raises(
            SpoolError, match="^unable to follow spool '.*/spool' any longer: it was removed$"
        ):
            follower.next(5)


def test_run_that_can_not_be_read_is_told_once_and_disturbs_no_other(spool):
    with Writer(spool, "bad"), Writer(spool, "good") as good, Follower(spool) as follower:
        os.link(spool / "bad" / "lock", spool / "planted")
        events = []
        sentence = "^unable to follow run 'bad': unable to open 'lock': want a file of ours without other links$"
        with pytest.raises(UnreadableRunError, match=sentence):
            while event := follower.next(0):
                events.append(brief(event))
        events += told(follower)
        good.end()
        assert events + told(follower) == [
            ("started", "bad"),
            ("started", "good"),
            ("changed", "good", "starting"),
            ("ended", "good", "terminated"),
        ]


def test_want_of_fds_loses_nothing(spool, monkeypatch):
    with Writer(spool) as writer, Follower(spool) as follower:
        writer.write(b"x")

        def refused(spool_fd, run_id):
            raise NoRunError("unable to find run 'r': Too many open files", errno.EMFILE)

        with monkeypatch.context() as patch:
            patch.setattr(format, "open_run", refused)
            with pytest.raises(SpoolError, match="Too many open files"):
                follower.next(0)
        assert [event[0] for event in told(follower)] == ["started", "changed", "output"]


@pytest.mark.parametrize("poll_s", [None, 0.005])
def test_want_of_fds_for_a_look_at_everything_loses_nothing(spool, monkeypatch, poll_s):
    """Neither the look that failed, after an overflow say, nor those that would come after it."""

    def refused(spool_fd):
        raise SpoolError(
            "unable to open '.running' of the spool: Too many open files", errno.EMFILE
        )

    with Follower(spool, poll_s=poll_s) as follower:
        assert told(follower) == []
        if poll_s is None:
            overflow = iter([[descriptors.inotify_simple.Event(-1, descriptors.OVERFLOW, 0, "")]])
            monkeypatch.setattr(follower._watcher, "read", lambda: next(overflow, []))
        with Writer(spool) as writer:
            with monkeypatch.context() as patch:
                patch.setattr(format, "live_ids", refused)
                with pytest.raises(SpoolError, match="Too many open files"):
                    follower.next(5)
                assert is_readable(follower)
            assert next_of(follower, Started).run_id == "r"
            if poll_s is not None:
                writer.end()
                assert next_of(follower, Ended).run_id == "r"


# -- where the kernel does not tell


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
            follower.polling == f"looking at spool {str(spool)!r} every 0.005 s: it was asked for"
        )
        shutil.rmtree(spool)


@pytest.mark.parametrize("poll_s", [0, -1, float("nan"), float("inf"), 1e300])
def test_time_in_which_nobody_can_poll_is_refused(spool, poll_s):
    with pytest.raises(SpecError) as caught:
        Follower(spool, poll_s=poll_s)
    assert str(caught.value) == (
        f"unable to poll every {poll_s!r} s: want seconds above 0, at most 1e+10"
    )


def test_silent_filesystem_is_polled_and_said_so(spool, monkeypatch):
    monkeypatch.setattr(followers, "silent_filesystem", lambda fd: "nfs")
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
    def watch(self, directory_fd, mask, whole=descriptors.Watcher.watch):
        if len(watches) >= granted:
            raise descriptors.OutOfWatchesError(
                "unable to watch another directory: the limit is reached", errno.ENOSPC
            )
        watches.append(whole(self, directory_fd, mask))
        return watches[-1]

    watches = []
    monkeypatch.setattr(descriptors.Watcher, "watch", watch)
    monkeypatch.setattr(followers, "POLL_S", 0.005)
    with (
        pytest.warns(
            RuntimeWarning, match="unable to watch another directory: the limit is reached$"
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


def test_silent_filesystem_is_told_by_what_the_kernel_says_it_is(spool, monkeypatch):
    """
    No test has an NFS: the filesystem that is here is put among the silent ones, by the name that
    df(1) finds.
    """
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
    assert descriptors.silent_filesystem(0) is None


def test_local_filesystem_is_not_silent(spool):
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


# -- loops


def is_readable(follower):
    return bool(select.select([follower], [], [], 0)[0])


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
        await asyncio.wait_for(begun.wait(), 10)
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
        events = [brief(follower.next(10)) for _ in range(3)]
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
