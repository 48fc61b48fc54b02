"""
Which runs are followed, which are lost, and what others do to the spool.
"""

import errno
import fcntl
import functools
import os
import random
import select
import shutil
import subprocess
import sys

import pytest

from chaperone.errors import NoRunError, SpoolError, UnreadableRunError
from chaperone.follow import descriptors, followed, hub
from chaperone.follow.follower import Follower
from chaperone.model.events import Ended, Lost, Output, Started
from chaperone.spool import format, gc, look
from spool_tests.support.events import again, brief, is_readable, next_of, told
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

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
    text = (
        "import sys; from spool_tests.support.writer import Writer; "
        "w = Writer(*sys.argv[1:]).running().write(b'last'); print(flush=True); "
        "sys.stdin.read()"
    )
    root = ROOT
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
        event = follower.next(60)
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
        assert brief(follower.next(60)) == ("lost", "r", "lost")


def test_lock_that_was_opened_and_closed_by_another_is_no_death(spool, monkeypatch):
    monkeypatch.setattr(followed, "LAST_PROBE_S", 0.004)
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        os.close(os.open(spool / "r" / "lock", os.O_WRONLY))
        assert follower.next(0.01) is None
        # It stops probing.
        until(lambda: follower.next(0.01) is None and follower._watcher._alarms == [])
        writer.end()
        assert told(follower)[-1] == ("ended", "r", "terminated")


def test_lost_waits_for_what_the_guard_still_writes(spool, monkeypatch):
    monkeypatch.setattr(followed, "DRAIN_S", 3600)
    with Writer(spool) as writer, Follower(spool) as follower:
        told(follower)
        guard = os.open(spool / "r" / "stdout", os.O_WRONLY | os.O_APPEND)
        fcntl.flock(guard, fcntl.LOCK_SH)
        writer.die()
        assert follower.next(0.05) is None
        os.write(guard, b"from the pipe")
        assert brief(follower.next(60)) == ("output", "r", "stdout", 0, b"from the pipe")
        os.write(guard, b"!")
        os.close(guard)
        assert [brief(follower.next(60)) for _ in range(2)] == [
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
        assert [brief(follower.next(60))] == [("changed", "r", "unattended")]
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
    Runs begin, write and end; gc deletes each as soon as it may; the follower dawdles. Each
    run that was reported to start ends, once.
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
    small = functools.partial(hub.OpenStreams, most=1)
    monkeypatch.setattr(hub, "OpenStreams", small)
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


def collect_a_replaced_run(spool, follower):
    """Collect an ended run that was deleted, after another one of its id has ended."""
    told(follower)
    shutil.rmtree(spool / "r")
    os.unlink(spool / ".ended" / "r")
    with Writer(spool, key="second") as writer:
        writer.end()
    follower.collect("r")
    assert os.listdir(spool / ".ended") == ["r"]


def test_collecting_a_deleted_run_leaves_the_next_one_of_its_id(spool):
    with Follower(spool) as follower:
        with Writer(spool, key="first") as writer:
            writer.end()
        collect_a_replaced_run(spool, follower)
        assert told(follower) == [("started", "r"), ("ended", "r", "terminated")]


def test_collecting_a_run_that_ended_long_ago_leaves_the_next_one_of_its_id(spool):
    with Writer(spool, key="first") as writer:
        writer.end()
    until(lambda: look.edition(os.stat(spool / "r")))
    with Follower(spool) as follower:
        collect_a_replaced_run(spool, follower)


def test_removed_spool_is_an_error_after_the_last_ending(spool):
    with Writer(spool), Follower(spool) as follower:
        told(follower)
        shutil.rmtree(spool)
        assert brief(follower.next(60)) == ("ended", "r", None)
        with pytest.raises(
            SpoolError, match="^unable to follow spool '.*/spool' any longer: it was removed$"
        ):
            follower.next(60)


def test_removed_spool_is_an_error_where_it_is_polled_too(spool):
    with Writer(spool), Follower(spool, poll_s=0.005) as follower:
        told(follower)
        shutil.rmtree(spool)
        assert brief(follower.next(60)) == ("ended", "r", None)
        with pytest.raises(
            SpoolError, match="^unable to follow spool '.*/spool' any longer: it was removed$"
        ):
            follower.next(60)


def test_run_that_can_not_be_read_is_told_once_and_disturbs_no_other(spool):
    with Writer(spool, "bad"), Writer(spool, "good") as good, Follower(spool) as follower:
        (spool / "bad").chmod(0o777)
        os.link(spool / "bad" / "lock", spool / "planted")
        events = []
        sentence = (
            "^unable to follow run 'bad': unable to open 'lock': want a file of this user "
            "without other hard links$"
        )
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
                    follower.next(60)
                assert is_readable(follower)
            assert next_of(follower, Started).run_id == "r"
            if poll_s is not None:
                writer.end()
                assert next_of(follower, Ended).run_id == "r"
