"""Following a run that has a timeline: the pieces, their order, their times, and what has none."""

import json
import os
import random
import signal
from datetime import datetime, timezone

import pytest

from chaperone.api import Spool
from chaperone.follow.batches import Outbox
from chaperone.follow.follower import Follower
from chaperone.model import spec as specs
from chaperone.model.events import Ended, Lost, Output, Shrank
from chaperone.spool import timeline
from spool_tests.support import timelines
from spool_tests.support.events import next_of
from spool_tests.support.runs import held, live, py, sh, start
from spool_tests.support.timelines import lines
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

TIMES = specs.checked({"program": {"argv": ["x"]}, "output": {"timeline": True}}, "/")["output"]
MS = 1_764_130_000_000
PROGRAM = """
import os, random, time
r = random.Random(5)
for _ in range(200):
    os.write(r.choice((1, 1, 2)), r.randbytes(r.choice((1, 100, 100, 5000))))
    time.sleep(r.choice((0, 0, 0, 0.002)))
"""


class Written(Writer):
    """A run with a timeline, whose lines a test writes."""

    def __init__(self, spool):
        super().__init__(spool, output=TIMES)
        self.timeline = spool / "r" / "timeline"

    def line(self, ms, stream, offset, length):
        number = {"stdout": 1, "stderr": 2}[stream]
        with open(self.timeline, "a") as file:
            file.write(f"{MS + ms} {number} {offset} {length}\n")
        return self


def moment(ms):
    return datetime.fromtimestamp(ms // 1000, timezone.utc).replace(microsecond=ms % 1000 * 1000)


def pieces(follower):
    """What is delivered now, without waiting: (stream, offset, data, milliseconds of `MS`)."""
    found = []
    while (event := follower.next(0)) is not None:
        if isinstance(event, Output):
            found.append(piece(event))
    return found


def piece(event):
    ms = None if event.time is None else round(event.time.timestamp() * 1000) - MS
    return event.stream, event.offset, event.data, ms


def delivered(spool, cursor=None, **how):
    """All of a run that has ended: the output, each piece with its time."""
    with Follower(spool, cursor, runs=["r"], **how) as follower:
        return [event for event in follower if isinstance(event, Output)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A spool with a run that has ended, of a real chaperone."""
    spool = tmp_path_factory.mktemp("recorded") / "spool"
    spool.mkdir(0o700)
    held(spool, py(PROGRAM), output={"timeline": True})
    return spool


def test_piece_is_what_a_line_says(recorded):
    events = delivered(recorded)
    assert [(e.time, e.stream, e.offset, len(e.data)) for e in events] == [
        (moment(ms), *rest) for ms, *rest in lines(recorded / "r")
    ]
    for stream in ("stdout", "stderr"):
        data = b"".join(event.data for event in events if event.stream == stream)
        assert data == (recorded / "r" / stream).read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_has_its_time_from_any_cursor_on(recorded, seed):
    r = random.Random(seed)
    key = Spool(recorded)["r"].spec()["key"]
    at = {
        stream: r.randrange((recorded / "r" / stream).stat().st_size + 1)
        for stream in ("stdout", "stderr")
    }
    wanted = r.choice((["stdout", "stderr"], ["stdout"], ["stderr"]))
    events = delivered(recorded, {"runs": {"r": {"key": key, **at}}}, streams=wanted)
    all_lines = [
        (stream, offset, offset + length, ms)
        for ms, stream, offset, length in lines(recorded / "r")
    ]
    assert [
        (e.stream, e.offset, e.offset + len(e.data), round(e.time.timestamp() * 1000))
        for e in events
    ] == timelines.pieces(all_lines, {stream: at[stream] for stream in wanted})
    for stream in wanted:
        data = b"".join(event.data for event in events if event.stream == stream)
        assert data == (recorded / "r" / stream).read_bytes()[at[stream] :]


@pytest.mark.parametrize("poll_s", [None, 0.01])
def test_live_run_is_delivered_in_the_order_in_which_it_came(spool, poll_s):
    with Follower(spool, {"runs": {"r": {}}}, runs=["r"], poll_s=poll_s) as follower:
        process = start(spool, sh(timelines.steps(spool / "r")), output={"timeline": True})
        found = [event for event in follower if isinstance(event, Output)]
    process.wait(60)
    assert [(e.stream, e.offset, e.data) for e in found] == [
        event
        for n in range(3)
        for event in (
            ("stdout", 6 * n, b"out %d\n" % (n + 1)),
            ("stderr", 6 * n, b"err %d\n" % (n + 1)),
        )
    ]
    assert [event.time for event in found] == [moment(line[0]) for line in lines(spool / "r")]


def test_bytes_wait_for_their_line(spool, monkeypatch):
    monkeypatch.setattr(timeline, "LINE_S", 3_600)
    with Written(spool) as writer, Follower(spool) as follower:
        writer.running().write(b"out")
        assert pieces(follower) == []
        writer.write(b"err", "stderr").line(0, "stderr", 0, 3)
        assert pieces(follower) == [("stderr", 0, b"err", 0)]
        writer.line(7, "stdout", 0, 3)
        assert pieces(follower) == [("stdout", 0, b"out", 7)]


def test_bytes_whose_line_does_not_come_are_delivered_without_a_time(spool, monkeypatch):
    monkeypatch.setattr(timeline, "LINE_S", 0.01)
    with Written(spool) as writer, Follower(spool) as follower:
        writer.running().write(b"lost")
        assert piece(next_of(follower, Output)) == ("stdout", 0, b"lost", None)
        writer.write(b"found").line(3, "stdout", 4, 5)
        assert pieces(follower) == [("stdout", 4, b"found", 3)]
        writer.write(b"hole").write(b"after").line(5, "stdout", 13, 5)
        assert pieces(follower) == [("stdout", 9, b"hole", None), ("stdout", 13, b"after", 5)]


def test_bytes_without_a_line_do_not_hold_up_the_end(spool, monkeypatch):
    monkeypatch.setattr(timeline, "LINE_S", 3_600)
    with Written(spool) as writer:
        writer.running().write(b"out").write(b"err", "stderr").line(1, "stderr", 0, 2)
        writer.end()
    assert [piece(event) for event in delivered(spool)] == [
        ("stderr", 0, b"er", 1),
        ("stdout", 0, b"out", None),
        ("stderr", 2, b"r", None),
    ]


def test_what_the_guard_saved_comes_without_a_time(spool):
    text = "echo one; until [ -e go ]; do sleep 0.01; done; echo two; touch gone; exec sleep 60"
    process = start(spool, sh(text, cwd=str(spool.parent)), output={"timeline": True})
    with Follower(spool) as follower:
        assert next_of(follower, Output).time is not None
        pid = until(lambda: live(spool)["state"] == "running" and live(spool)["chaperone_pid"])
        os.kill(pid, signal.SIGSTOP)
        (spool.parent / "go").touch()
        until((spool.parent / "gone").exists)
        os.kill(pid, signal.SIGKILL)
        event = next_of(follower, Output)
        assert (event.offset, event.data, event.time) == (4, b"two\n", None)
        next_of(follower, Lost)
    process.wait(60)


@pytest.mark.parametrize("garbage", [b"", b"\0" * 5_000, b"1764130000000 1 9 5\n", b"x" * 99_999])
def test_damaged_timeline_loses_no_byte(spool, garbage):
    with Written(spool) as writer:
        writer.running().write(b"out").write(b"err", "stderr")
        writer.timeline.write_bytes(garbage)
        writer.end()
    found = {event.stream: event.data for event in delivered(spool)}
    assert found == {"stdout": b"out", "stderr": b"err"}


PLANTED = {
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "symlink": lambda path: path.symlink_to("stdout"),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_timeline_is_not_read_and_loses_no_byte(spool, plant):
    with Written(spool) as writer:
        writer.running().write(b"out")
        writer.timeline.unlink()
        PLANTED[plant](writer.timeline)
        writer.end()
    assert [piece(event) for event in delivered(spool)] == [("stdout", 0, b"out", None)]


def test_timeline_that_is_removed_takes_the_times_alone(spool):
    with Written(spool) as writer:
        writer.running().write(b"one").line(1, "stdout", 0, 3)
        with Follower(spool) as follower:
            assert pieces(follower) == [("stdout", 0, b"one", 1)]
            follower.streams.drop("r")
            writer.timeline.unlink()
            writer.write(b"two").end()
            assert piece(next_of(follower, Output)) == ("stdout", 3, b"two", None)
            next_of(follower, Ended)


def test_stream_that_somebody_truncates_is_read_again(spool, monkeypatch):
    monkeypatch.setattr(timeline, "LINE_S", 0.01)
    with Written(spool) as writer, Follower(spool) as follower:
        writer.running().write(b"before").line(1, "stdout", 0, 6)
        assert pieces(follower) == [("stdout", 0, b"before", 1)]
        os.truncate(spool / "r" / "stdout", 0)
        writer.write(b"new")
        event = next_of(follower, Shrank)
        assert (event.stream, event.offset, event.size) == ("stdout", 6, 3)
        assert piece(next_of(follower, Output)) == ("stdout", 0, b"new", None)


def test_line_of_json_has_the_time_where_there_is_one(spool):
    with Written(spool) as writer:
        writer.running().write("añb".encode()).line(7, "stdout", 0, 2).line(9, "stdout", 2, 1)
        writer.write(b"!").end()
    with Outbox(spool) as outbox:
        found = [json.loads(line) for line in outbox.batch(0)]
    assert [event for event in found if event["event"] == "output"] == [
        {**OUT, "offset": 0, "time": "2025-11-26T04:06:40.007Z", "text": "a"},
        {**OUT, "offset": 1, "time": "2025-11-26T04:06:40.009Z", "text": "ñ"},
        {**OUT, "offset": 3, "text": "b!"},
    ]


OUT = {"event": "output", "run_id": "r", "stream": "stdout"}
