"""
Requests: each comes out of `control` as it was put in, whatever the pieces; what makes no sense is
named in a sentence.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaperone.errors import SpecError
from chaperone.model import spec as specs
from chaperone.model.request import (
    BY_LENGTH,
    LIMIT,
    LONGEST_GRACE_S,
    MOST_REFUSALS,
    Reader,
    Request,
    parsed,
)

pytestmark = pytest.mark.once

printable = st.characters().filter(lambda char: char.isprintable() and not char.isspace())
words = st.none() | st.text(printable, min_size=1, max_size=BY_LENGTH)
graces = st.none() | st.floats(0, LONGEST_GRACE_S)
signals = st.sampled_from([*specs.SIGNALS, "SIGRTMIN+3"])
requests = st.one_of(
    st.builds(Request, st.just("stop"), graces, by=words),
    st.builds(Request, st.sampled_from(["kill", "renew"]), by=words),
    st.builds(Request, st.just("signal"), signal=signals, by=words),
)


@given(requests)
def test_request_comes_back_from_its_line(request):
    line = request.line("r")
    assert line.count(b"\n") == 1 and len(line) <= LIMIT
    assert vars(parsed(line.decode().removesuffix("\n"))) == vars(request)


@given(st.lists(requests, max_size=5), st.lists(st.integers(1, 50)))
def test_requests_come_whole_out_of_any_pieces(asked, cuts):
    reader, heard = Reader(), []
    data = b"".join(request.line("r") for request in asked)
    for cut in cuts:
        heard += reader.feed(data[:cut])
        data = data[cut:]
    heard += reader.feed(data)
    assert [vars(request) for request in heard] == [vars(request) for request in asked]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("stop", Request("stop")),
        (" stop  5 ", Request("stop", 5.0)),
        ("by=ops stop 0", Request("stop", 0.0, by="ops")),
        ("stop by=a by=b", Request("stop", by="a")),
        ("kill by=", Request("kill", by="")),
        ("renew by=mirror", Request("renew", by="mirror")),
        ("signal usr1", Request("signal", signal="SIGUSR1")),
        ("signal 9", Request("signal", signal="SIGKILL")),
    ],
)
def test_line_that_was_written_by_hand_is_taken(line, expected):
    assert vars(parsed(line)) == vars(expected)


@pytest.mark.parametrize(
    "line",
    [
        *("", "by=ops", "hello", "STOP", "stop soon", "stop -1", "stop nan", "stop inf"),
        *("stop 2e10", "stop 1 2", "kill 9", "renew 9", "renew by"),
        *("signal", "signal NONE", "signal 0", "signal 9 9"),
    ],
)
def test_line_that_makes_no_sense_is_named(line):
    want = "want stop [SECONDS], signal NAME, kill or renew"
    assert parsed(line) is None
    assert [*Reader().feed(f"{line}\n".encode())] == [
        f"unable to take the request {line!r}: {want}"
    ]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            Request("stop", "3"),
            "unable to stop run 'r': want a grace of at least 0 seconds, got '3'",
        ),
        (
            Request("stop", by=3),
            "unable to send a request to run 'r': want one word of at most 128 characters for `by`,"
            " got 3",
        ),
        (
            Request("signal", signal=15),
            "unable to signal run 'r': want a signal's name such as 'SIGTERM', got 15",
        ),
    ],
)
def test_request_of_a_wrong_type_is_a_sentence(asked, sentence):
    with pytest.raises(SpecError) as caught:
        asked.line("r")
    assert str(caught.value) == sentence


def test_flood_of_nonsense_fills_no_log(monkeypatch):
    reader = Reader()
    heard = [*reader.feed(b"x\n" * 1_000), *reader.feed(b"x\n" * 1_000)]
    assert len(heard) == 100 == MOST_REFUSALS
    sentence = "unable to take the request 'x': want stop [SECONDS], signal NAME, kill or renew"
    assert heard[98:] == [sentence, f"{sentence}; no further one is logged"]
    assert [request.verb for request in reader.feed(b"x\nkill\n")] == ["kill"]


def test_line_that_is_too_long_is_named_once_and_passed_over():
    reader = Reader()
    heard = [*reader.feed(b"x" * (LIMIT + 1)), *reader.feed(b"y" * 2 * LIMIT), *reader.feed(b"z\n")]
    assert heard == ["unable to take a request: it has more than 4096 bytes, and is ignored"]
    assert [request.verb for request in reader.feed(b"kill\n")] == ["kill"]


@pytest.mark.parametrize(
    "request_, sentence",
    [
        (
            Request("stop", float("nan")),
            "unable to stop run 'r': want a grace of at least 0 seconds, got nan",
        ),
        (
            Request("stop", 1e300),
            "unable to stop run 'r': want a grace of at most 1e+10 seconds, got 1e+300",
        ),
        (
            Request("signal"),
            "unable to signal run 'r': want a signal's name such as 'SIGTERM', got None",
        ),
        (
            Request("kill", by=""),
            "unable to send a request to run 'r': want one word of at most 128 characters for `by`,"
            " got ''",
        ),
    ],
)
def test_request_that_no_chaperone_takes_is_not_sent(request_, sentence):
    with pytest.raises(SpecError) as caught:
        request_.line("r")
    assert str(caught.value) == sentence
