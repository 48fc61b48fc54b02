"""
What is posted next, and until when: without a socket and without a clock.
"""

import random

import pytest

from chaperone.agent.callback.progress import Patience, Progress
from chaperone.errors import AgentError

pytestmark = pytest.mark.once


def progress(most=10, latency_s=1.0):
    return Progress("stdout", most, latency_s)


def test_bytes_wait_for_more_but_not_for_long():
    stream = progress()
    assert stream.due_in(0.0, False) is None
    stream.grew(4, 100.0)
    assert stream.due_in(100.0, False) == 1.0
    stream.grew(6, 100.75)
    assert stream.due_in(100.75, False) == 0.25
    assert (stream.due_in(102.0, False), stream.piece()) == (0.0, (0, 6))


def test_full_piece_and_the_end_wait_for_nothing():
    stream = progress()
    stream.grew(9, 0.0)
    assert (stream.due_in(0.0, False), stream.due_in(0.0, True)) == (1.0, 0.0)
    stream.grew(25, 0.0)
    assert (stream.due_in(0.0, False), stream.piece()) == (0.0, (0, 10))
    stream.acknowledged(10, 0.0)
    assert stream.piece() == (10, 10)


def test_bytes_that_come_while_a_piece_is_posted_have_their_own_time():
    stream = progress()
    stream.grew(4, 0.0)
    stream.piece()
    stream.grew(5, 3.0)
    stream.acknowledged(4, 3.5)
    assert stream.due_in(3.5, False) == 0.5


def test_what_failed_is_due_at_once():
    stream = progress()
    stream.grew(4, 0.0)
    assert stream.piece() == (0, 4)
    assert (stream.due_in(0.0, False), stream.piece()) == (0.0, (0, 4))


def test_receiver_that_has_more_is_believed():
    stream = progress()
    stream.grew(40, 0.0)
    assert stream.piece() == (0, 10)
    stream.acknowledged(35, 0.0)
    assert stream.piece() == (35, 5)


def test_receiver_that_has_less_gets_it_again_and_the_second_time_after_a_pause():
    stream = progress()
    stream.grew(40, 0.0)
    stream.piece()
    stream.acknowledged(10, 0.0)
    stream.piece()
    assert stream.missed(3) is False
    assert (stream.due_in(0.0, False), stream.piece()) == (0.0, (3, 10))
    assert stream.missed(0) is True
    stream.piece()
    stream.acknowledged(10, 0.0)
    assert stream.missed(0) is False


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (9, "it has 9 bytes of stdout after it took 10"),
        (
            41,
            "it has 41 bytes of stdout, but the run has only 40: "
            "it may have another run's bytes, or the run's file was truncated",
        ),
    ],
)
def test_size_that_cannot_be_is_refused(size, sentence):
    stream = progress()
    stream.grew(40, 0.0)
    stream.piece()
    with pytest.raises(AgentError) as caught:
        stream.acknowledged(size, 0.0)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("seed", range(20))
def test_any_receiver_gets_each_byte_in_its_place(seed):
    """Answers that are lost, files that lose their end, agents that begin again."""
    source = random.Random(seed)
    run, near, stream = b"", b"", progress(most=7)
    while True:
        is_over = len(run) > 300
        if not is_over and source.random() < 0.7:
            run += source.randbytes(source.randrange(9))
            stream.grew(len(run), 0.0)
        if stream.due_in(5.0, is_over) is None:
            if is_over:
                break
            continue
        offset, size = stream.piece()
        fate = source.random()
        if fate < 0.1:
            stream = progress(most=7)
            stream.grew(len(run), 0.0)
        elif fate < 0.2:
            near = near[: source.randrange(len(near) + 1)]
        if offset > len(near):
            stream.missed(len(near))
        else:
            near += run[offset : offset + size][len(near) - offset :]
            if source.random() < 0.8 and fate >= 0.1:
                stream.acknowledged(len(near), 0.0)
    assert near == run[: len(near)] and len(near) == len(run)


def test_patience_ends_after_the_last_acknowledgement():
    patience = Patience(10, 100, None, 0.0)
    assert (patience.left_s(40.0), patience.quiet_s(0.0)) == (60.0, 25.0)
    patience.acknowledged(40.0)
    assert (patience.left_s(40.0), patience.left_s(140.0)) == (100.0, 0.0)
    assert [patience.pause_s(at) for at in (0.0, 0.5, 1.0)] == [7.5, 10.0, 12.5]
    assert not patience.renews(0.0)


def test_run_is_renewed_now_and_then():
    patience = Patience(10, 100, 8, 0.0)
    assert patience.quiet_s(0.0) == 2.0
    assert [patience.renews(now) for now in (0.0, 0.5, 1.0, 1.5)] == [True, False, True, False]
