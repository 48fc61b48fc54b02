"""
The supervisor's records: each is taken out byte-exactly, however the stream is cut.
"""

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from chaperone.farside import records as records_of
from chaperone.model.hops import kinds
from spool_tests.support import supervisors
from spool_tests.support.supervisors import NONCE

removed = supervisors.removed


# -- the parser


PIECES = strategies.one_of(
    strategies.binary(max_size=40),
    strategies.sampled_from([b"\x1e", b"\x1e0123", NONCE[:-1].encode(), b"\n"]),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    strategies.lists(PIECES, max_size=20),
    strategies.lists(strategies.integers(0, 20), max_size=8),
    strategies.lists(strategies.integers(1, 50), max_size=30),
)
def test_records_are_taken_out_byte_exactly_however_it_is_cut(pieces, places, cuts):
    if NONCE.encode() in b"".join(pieces):
        return
    stream, expected = [NONCE.encode() + b" hello\n"], [["hello"]]
    for number, piece in enumerate(pieces):
        stream.append(piece)
        if number in places:
            stream.append(f"{NONCE} beat {number}\n".encode())
            expected.append(["beat", str(number)])
    data, parser, clean, records = b"noise" + b"".join(stream), records_of.Records(NONCE), b"", []
    for cut in [*cuts, len(data)]:
        found, told = parser.feed(data[:cut])
        data, clean, records = data[cut:], clean + found, records + told
    found, told = parser.feed(data)
    assert (clean + found + parser.end(), records + told) == (b"".join(pieces), expected)
    assert bytes(parser.noise) == b"noise"


@pytest.mark.parametrize(
    "data, kept",
    [
        (b"text", 0),
        (b"text C", 1),
        (b"text Connection to ", 14),
        (b"Connection to db3", 17),
        (b"x\nConnection to db3 closed by remote host.\r\n", 42),
        (b"Connection to db3 closed by remote host.\r\nmore", 0),
        (b"Connection to db3 opened", 0),
        (b"Connection to a\nb", 0),
        (b"Connection to Connection to db3 clo", 21),
    ],
)
def test_what_may_be_the_clients_farewell_is_held_back(data, kept):
    assert records_of.farewell(data, kinds.Ssh.farewell) == kept


@pytest.mark.parametrize(
    "words, expected",
    [
        ("B R7 0m0.1s 0m0.2s 1m0.5s 0m0.25s", (1792, 7, False, 60.5)),
        ("B R265 0m0s 0m0s 0m1s 0m0s", (9, None, False, 1.0)),
        ("B R523 0m0s 0m0s 0m1s 0m0s", (139, None, False, 1.0)),
        ("R130 ambiguous 0m0s 0m0s 0m1s 0m0s", (None, 130, True, 1.0)),
        ("R3 ambiguous 0m0s 0m0s 0m1s 0m0s", (768, 3, False, 1.0)),
    ],
)
def test_outcome_says_only_what_is_known(words, expected):
    found = records_of.outcome(words.split())
    assert (
        found["wait_status"],
        found["return_code"],
        found["ambiguous"],
        found["rusage"]["utime"],
    ) == expected
    assert records_of.outcome(["B", "0m0s"]) == {}
