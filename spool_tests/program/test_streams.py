"""Streams and pumps: what is kept, what is counted, and how a pipe is read."""

import os
import select

import pytest

from chaperone.program.loop import Loop
from chaperone.program.streams import FIRST_BYTES, PIPE_BYTES, Pump, Stream
from spool_tests.support.calls import replace_call


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "stream", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def stream(fd, max_bytes=None):
    told, full = [], []
    made = Stream(fd, max_bytes, told.append, lambda: full.append(True))
    made.told, made.full = told, full
    return made


def content(fd):
    return os.pread(fd, 10_000_000, 0)


@pytest.mark.parametrize("limit", range(7))
def test_limit_is_exact_at_every_byte(file, limit):
    out = stream(file, limit)
    for piece in (b"ab", b"", b"cde", b"f"):
        out.write(piece)
    assert content(file) == b"abcdef"[:limit]
    assert (out.bytes, out.dropped) == (limit, 6 - limit)
    assert len(out.full) == len(out.told) == (limit < 6)


def test_a_stream_goes_on_where_an_earlier_chaperone_stopped(file):
    os.write(file, b"before")
    out = stream(file, 8)
    out.write(b"after")
    assert content(file) == b"beforeaf" and (out.bytes, out.dropped) == (8, 3)


def test_a_disk_that_refuses_makes_a_hole_that_is_told(file, monkeypatch):
    out, write, answers = (
        stream(file),
        os.write,
        iter(
            [3, OSError(28, "No space left on device"), OSError(28, "No space left on device"), 2]
        ),
    )

    def limited(fd, data):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return write(fd, data[:answer])

    replace_call(monkeypatch, "write", limited)
    for piece in (b"abcde", b"fgh", b"ij"):
        out.write(piece)
    assert content(file) == b"abcij" and (out.bytes, out.dropped, out.full) == (5, 5, [True])
    assert out.told == [
        "bytes are dropped from offset 3 on: No space left on device",
        "5 bytes were dropped at offset 3; the disk takes bytes again",
    ]


def test_a_pump_moves_every_byte_and_closes_at_the_end(file):
    loop, (reading, writing) = Loop(), os.pipe()
    pump = Pump(loop, reading, stream(file))
    data = os.urandom(3 * PIPE_BYTES + 17)
    if not (pid := os.fork()):
        os.closerange(3, writing)
        view = memoryview(data)
        while view:
            view = view[os.write(writing, view) :]
        os._exit(0)
    os.close(writing)
    loop.at(loop.now() + 0.001, end_with(loop, pump))
    loop.run()
    os.waitpid(pid, 0)
    assert content(file) == data and pump.fd == -1


def end_with(loop, pump):
    """A deadline that ends the loop when the pump has, and else comes again."""

    def look():
        loop.end() if pump.fd < 0 else loop.at(loop.now() + 0.001, look)

    return look


def test_an_idle_pump_holds_no_buffer_and_one_that_read_little_a_small_one(file):
    reading, writing = os.pipe()
    pump = Pump(Loop(), reading, stream(file))
    assert pump._buffer == b""
    os.write(writing, b"x")
    pump.drain()
    assert content(file) == b"x" and len(pump._buffer) == FIRST_BYTES
    os.write(writing, b"x" * (FIRST_BYTES + 1))
    pump.drain()
    assert len(pump._buffer) == PIPE_BYTES  # the pipe was not full, and stays as it is
    pump.close()
    os.close(writing)


def test_a_drain_takes_what_is_there_and_does_not_wait_for_a_writer(file):
    reading, writing = os.pipe()
    pump = Pump(Loop(), reading, stream(file))
    os.write(writing, b"y" * PIPE_BYTES)
    pump.drain()
    assert content(file) == b"y" * PIPE_BYTES
    pump.drain()
    pump.close()
    os.close(writing)


def test_bytes_that_wait_are_heard_before_a_deadline_is_called_missed(monkeypatch):
    """
    As after SIGSTOP and SIGCONT: a poll that was interrupted past its time says "nothing" without
    having looked.
    """
    loop, (reading, writing), heard = Loop(), os.pipe(), []
    os.write(writing, b"x")
    asked = []

    class Interrupted:
        def __init__(self):
            self.poll_ = select.poll()
            self.register, self.unregister = self.poll_.register, self.poll_.unregister

        def poll(self, timeout):
            asked.append(timeout)
            return [] if len(asked) == 1 else self.poll_.poll(timeout)

    loop._poll = Interrupted()
    loop.watch(reading, select.POLLIN, lambda fd, events: (heard.append("bytes"), loop.unwatch(fd)))
    loop.at(loop.now(), lambda: (heard.append("deadline"), loop.end()))
    loop.run()
    os.close(reading), os.close(writing)
    assert heard == ["bytes", "deadline"]


def test_bytes_that_came_while_a_callback_was_stopped_are_heard_before_a_deadline(monkeypatch):
    """As by SIGSTOP right after a write: the clock is past the deadline, and bytes wait."""
    loop, clock, heard = Loop(), [0.0], []
    monkeypatch.setattr(Loop, "now", staticmethod(lambda: clock[0]))
    reading, writing = os.pipe()

    def readable(fd, events):
        heard.append(os.read(fd, 10))
        if heard == [b"first"]:
            clock[0] += 10
            os.write(writing, b"second")

    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb"):
        loop.watch(reading, select.POLLIN, readable)
        loop.at(5.0, lambda: (heard.append("deadline"), loop.end()))
        os.write(writing, b"first")
        loop.run()
    assert heard == [b"first", b"second", "deadline"]


def test_deadlines_come_in_order_and_may_be_cancelled():
    loop, came = Loop(), []
    now = loop.now()
    loop.at(now + 0.003, lambda: (came.append("last"), loop.end()))
    cancelled = loop.at(now + 0.001, lambda: came.append("never"))
    loop.at(now + 0.002, lambda: came.append("second"))
    loop.at(now + 0.0005, lambda: (came.append("first"), loop.cancel(cancelled)))
    loop.run()
    assert came == ["first", "second", "last"]
