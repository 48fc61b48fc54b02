"""The timeline of a run: what its chaperone writes into it, and when."""

import errno
import os
import signal
import time

import pytest

from chaperone.program.loop import Loop
from chaperone.program.streams import Stream
from chaperone.spool.timeline import Timeline
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.runs import final, held, live, log, py, sh, start
from spool_tests.support.surviving import adopt
from spool_tests.support.timelines import lines, timed
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

TIMES = {"timeline": True}


class Clock:
    """The wall clock, as it is set."""

    def __init__(self, monkeypatch):
        self.ms = 1_764_130_000_000
        monkeypatch.setattr(time, "time_ns", lambda: self.ms * 1_000_000 + 999_999)


class Written:
    """A run directory's streams and timeline, written as a chaperone does."""

    def __init__(self, directory):
        self.directory, self.loop, self.told = directory, Loop(), []
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self.fds = [os.open(directory / name, flags) for name in ("stdout", "stderr")]
        self.timeline = Timeline(
            os.open(directory / "timeline", flags), self.loop, self.told.append
        )
        out, err = (Stream(fd, None, self.told.append, lambda: None) for fd in self.fds)
        self.out, self.err = out, err
        self.timeline.hear({"stdout": out, "stderr": err})

    def close(self):
        self.timeline.close()
        for fd in self.fds:
            os.close(fd)

    def lines(self):
        return lines(self.directory)


@pytest.fixture
def written(tmp_path):
    made = Written(tmp_path)
    yield made
    made.close()


def test_line_is_for_all_that_came_of_a_stream_within_a_millisecond(written, monkeypatch):
    clock = Clock(monkeypatch)
    written.out.write(b"a" * 100)
    written.err.write(b"e")
    written.out.write(b"b" * 50)
    assert written.lines() == []
    clock.ms += 1
    written.err.write(b"f" * 3)
    first = [(clock.ms - 1, "stdout", 0, 150), (clock.ms - 1, "stderr", 0, 1)]
    assert written.lines() == first
    written.timeline.end()
    assert written.lines() == [*first, (clock.ms, "stderr", 1, 3)]
    written.timeline.end()
    assert (written.directory / "timeline").read_bytes() == (
        b"1764130000000 1 0 150\n1764130000000 2 0 1\n1764130000001 2 1 3\n"
    )


def test_line_is_written_though_no_more_bytes_come(written):
    written.out.write(b"x")
    written.loop.later(0.05, written.loop.end)
    written.loop.run()
    assert [line[1:] for line in written.lines()] == [("stdout", 0, 1)]


def test_clock_that_is_set_back_changes_no_order(written, monkeypatch):
    clock = Clock(monkeypatch)
    written.out.write(b"1")
    clock.ms -= 3_600_000
    written.out.write(b"2")
    written.timeline.end()
    assert written.lines() == [
        (clock.ms + 3_600_000, "stdout", 0, 1),
        (clock.ms, "stdout", 1, 1),
    ]


class Disk:
    """A disk that takes so many more bytes of the timeline."""

    def __init__(self, monkeypatch, fd):
        self.room = None
        self._write = os.write

        def write(to, data):
            if to != fd or self.room is None:
                return self._write(to, data)
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = self._write(to, data[: self.room])
            self.room -= count
            return count

        replace_call(monkeypatch, "write", write)


@pytest.mark.parametrize("room", range(25))
def test_line_that_the_disk_refuses_is_dropped_and_counted(written, monkeypatch, room):
    clock, full = Clock(monkeypatch), Disk(monkeypatch, written.timeline.fd)
    full.room = room  # the line has 20 bytes
    for data in (b"a", b"bc"):
        written.out.write(data)
        clock.ms += 1
    written.timeline.flush()
    full.room = None
    written.out.write(b"def")
    written.timeline.end()
    text = (written.directory / "timeline").read_text()
    assert (written.directory / "stdout").read_bytes() == b"abcdef"
    last = f"{clock.ms} 1 3 3"
    if room < 20:
        half = f"{clock.ms - 2} 1 0 1\n"[:room]
        assert text == (f"{half}\n" if half else "") + f"{last}\n"
        assert written.told == [
            "timeline: lines are dropped from now on: No space left on device",
            "timeline: lines about 3 bytes were dropped, the disk takes lines again",
        ]
    else:
        assert text.splitlines()[-1] == last
        assert written.told[1:] == [
            "timeline: lines about 2 bytes were dropped, the disk takes lines again"
        ]


def test_loss_that_lasts_is_counted_at_the_end(written, monkeypatch):
    Disk(monkeypatch, written.timeline.fd).room = 0
    written.out.write(b"abc")
    written.timeline.end()
    assert written.told == [
        "timeline: lines are dropped from now on: No space left on device",
        "timeline: lines about 3 bytes were dropped, the run has ended",
    ]


def test_crash_at_any_call_leaves_no_line_about_bytes_that_are_not_there(tmp_path):
    def write(directory):
        made = Written(directory)
        for number in range(3):
            made.out.write(b"o" * (number + 1))
            made.err.write(b"e")
            made.timeline.flush()
        made.close()

    def doomed():
        write(made[-1])

    made = []
    points = disk.crash_points(doomed)
    while True:
        made.append(tmp_path / str(len(made)))
        made[-1].mkdir()
        if next(points, None) is None:
            break
        if (made[-1] / "timeline").exists():
            for stream in ("stdout", "stderr"):
                timed(made[-1], stream)
            write(made[-1])  # as whoever adopts the run
            size = (made[-1] / "stdout").stat().st_size
            assert timed(made[-1], "stdout") >= size - 3
    assert len(made) > 10


@pytest.mark.parametrize("half", ["1764130000000 1 0", "1764130000000 1 0 12", "1"])
def test_half_a_line_of_a_dead_chaperone_is_ended_by_the_next(tmp_path, half):
    (tmp_path / "timeline").write_text(half)
    made = Written(tmp_path)
    made.out.write(b"x")
    made.close()
    first, second, rest = (tmp_path / "timeline").read_text().split("\n")
    assert (first, second.split(" ")[1:], rest) == (half, ["1", "0", "1"], "")


# -- of whole runs

WRITER = """
import os, random, time
r = random.Random({seed})
for _ in range(300):
    os.write(r.choice((1, 1, 2)), r.randbytes(r.choice((1, 100, 100, 5000))))
    time.sleep(r.choice((0, 0, 0, 0.002)))
"""


def streams(directory):
    return [(directory / name).read_bytes() for name in ("stdout", "stderr")]


def is_timed(directory):
    return all(
        timed(directory, name) == (directory / name).stat().st_size for name in ("stdout", "stderr")
    )


@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_the_same_with_their_times_and_without(spool, seed):
    program = py(WRITER.format(seed=seed))
    begun = time.time_ns() // 1_000_000
    assert held(spool, program, "timed", output=TIMES)["complete"]
    over = time.time_ns() // 1_000_000
    assert held(spool, program, "plain")["complete"]
    assert streams(spool / "timed") == streams(spool / "plain")
    assert is_timed(spool / "timed") and not (spool / "plain" / "timeline").exists()
    times = [line[0] for line in lines(spool / "timed")]
    assert times == sorted(times) and begun <= times[0] and times[-1] <= over
    assert len({line[:2] for line in lines(spool / "timed")}) == len(times)


def test_order_of_two_streams_is_kept(spool):
    text = """for n in 1 2 3; do
        echo out; until [ -e $n.out ]; do sleep 0.01; done
        echo err >&2; until [ -e $n.err ]; do sleep 0.01; done; done"""
    process = start(spool, sh(text, cwd=str(spool.parent)), output=TIMES)
    for number in (1, 2, 3):
        for stream, name in (("stdout", "out"), ("stderr", "err")):
            until(lambda stream=stream, size=4 * number: timed(spool / "r", stream) == size)
            (spool.parent / f"{number}.{name}").touch()
    assert process.wait(60) == 0
    assert [line[1] for line in lines(spool / "r")] == ["stdout", "stderr"] * 3


def test_what_a_limit_drops_has_no_line(spool):
    held(spool, sh("echo 123456789"), output={**TIMES, "max_bytes": 4})
    assert [line[1:] for line in lines(spool / "r")] == [("stdout", 0, 4)]


def test_silent_run_has_an_empty_timeline(spool):
    assert held(spool, sh("exit 3"), output=TIMES)["return_code"] == 3
    assert lines(spool / "r") == []


def test_bytes_that_the_guard_saves_have_no_line(spool):
    chaperone = start(
        spool,
        sh(
            "echo one; until [ -e go ]; do sleep 0.01; done; echo two; touch gone; exec sleep 60",
            cwd=str(spool.parent),
        ),
        output=TIMES,
    )
    until(lambda: timed(spool / "r", "stdout") == 4)
    pid = live(spool)["chaperone_pid"]
    os.kill(pid, signal.SIGSTOP)
    (spool.parent / "go").touch()
    until((spool.parent / "gone").exists)
    os.kill(pid, signal.SIGKILL)
    chaperone.wait(60)
    assert streams(spool / "r") == [b"one\ntwo\n", b""]
    assert timed(spool / "r", "stdout") == 4


def test_timeline_that_can_not_be_opened_harms_nothing(spool):
    text = "until [ -e go ]; do sleep 0.01; done; echo out"
    chaperone = start(spool, sh(text, cwd=str(spool.parent)), on_disconnect="survive", output=TIMES)
    until(lambda: live(spool)["state"] == "running")
    os.kill(live(spool)["chaperone_pid"], signal.SIGKILL)
    chaperone.wait(60)
    (spool / "r" / "timeline").unlink()
    (spool / "r" / "timeline").mkdir()
    adopter = adopt(spool)
    (spool.parent / "go").touch()
    assert adopter.wait(60) == 0
    assert streams(spool / "r") == [b"out\n", b""] and final(spool)["complete"]
    said = "timeline: no line is written: unable to open 'timeline': Is a directory"
    assert said in log(spool)


def test_run_that_is_adopted_goes_on_with_its_timeline(spool, tmp_path):
    text = """for n in 1 2 3 4; do echo line $n; echo err >&2
        until [ -e go.$n ]; do sleep 0.01; done; done"""
    process = start(spool, sh(text, cwd=str(tmp_path)), on_disconnect="survive", output=TIMES)
    for number in range(1, 5):
        sizes = {"stdout": 7 * number, "stderr": 4 * number}
        until(lambda sizes=sizes: all(timed(spool / "r", name) == sizes[name] for name in sizes))
        if number < 4:
            process.kill()
            process.wait(60)
        (tmp_path / f"go.{number}").touch()
        if number < 4:
            process = adopt(spool)
    assert process.wait(60) == 0
    assert streams(spool / "r") == [b"line 1\nline 2\nline 3\nline 4\n", b"err\n" * 4]
    assert is_timed(spool / "r") and log(spool) == []
