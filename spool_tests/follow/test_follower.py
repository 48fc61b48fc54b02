"""A follower hears of every byte and every ending once, in order, whatever happens in between."""

import contextlib
import functools
import gc as collector
import os
import re
import shutil
import warnings

import pytest

from chaperone.api import Run, Spool
from chaperone.errors import SpecError
from chaperone.follow import descriptors, hub
from chaperone.follow import follower as followers
from chaperone.follow.follower import Follower
from chaperone.model.events import Changed, Ended, Lost, Started
from chaperone.spool import gc, look
from spool_tests.support import disk
from spool_tests.support.events import again, brief, next_of, told
from spool_tests.support.processes import open_fds
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

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
        SpecError, match=r"^unable to follow streams \('log',\): want stdout, stderr or both$"
    ):
        Follower(spool, streams=["log"])


@pytest.mark.parametrize("runs", ["one", [None], ["a/b"], [Run("spool", "r")]], ids=repr)
def test_what_is_no_run_id_is_refused_and_not_waited_for(spool, runs):
    expected = re.escape(f"{('one',) if runs == 'one' else tuple(runs)!r}: want a list of run ids")
    with pytest.raises(SpecError, match=f"^unable to follow runs {expected}$"):
        Follower(spool, runs=runs)


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
    small = functools.partial(hub.OpenStreams, most=2)
    monkeypatch.setattr(hub, "OpenStreams", small)
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
        events += [brief(follower.next(60))] if ("lost", "dead", "lost") not in events else []
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
    One write of each run is reported one by one; if 6,000 writes wait, each run has one event, and
    a few reads of the queue take them all.
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
    With a flood to deliver, it is read each millisecond and not each time: GATHER_S is what that
    costs the others.
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
    assert Spool(spool)["r"].wait(60).state == "lost"


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


def deleted_by_hand(spool, run_id):
    shutil.rmtree(spool / run_id)


@pytest.mark.parametrize("poll_s", [None, 0.005])
@pytest.mark.parametrize("deleted", [gc.delete, deleted_by_hand])
def test_follower_that_collects_nothing_forgets_runs_that_are_gone(spool, deleted, poll_s):
    """A page that shows runs lives for months, and another process collects and deletes them."""
    with Follower(spool, poll_s=poll_s) as follower:
        for number in range(20):
            with Writer(spool, f"r{number}") as writer:
                writer.running().write(b"x").end()
            assert next_of(follower, Ended).run_id == f"r{number}"
            deleted(spool, f"r{number}")

        def is_empty():
            assert follower.next(0) is None
            return follower.cursor == {"runs": {}} and not follower._turns

        until(is_empty)
        for kept in (follower._runs, follower._by_watch, follower._taken, follower.uncollected):
            assert not kept
        assert follower.streams._fds == {}
        follower.collect("r0")  # by a scheduler that has only now committed the ending
        assert "r0" not in os.listdir(spool / ".ended")


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
    The final status appears first: a scheduler that collects at once must not leave an entry that
    would deliver the run a second time.
    """
    with Writer(spool) as writer, Follower(spool) as follower:
        writer.running().publish()
        assert told(follower)[-1] == ("ended", "r", "terminated")
        follower.collect("r")
        assert (list(follower.cursor["runs"]), follower.uncollected) == (["r"], ["r"])
        follower.collect("r")  # it still waits for the entry
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
            writer.end()  # the kernel reports that its entry moves before we listen
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
            SpecError,
            match="^unable to collect run 'r': its end was not delivered yet$",
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
