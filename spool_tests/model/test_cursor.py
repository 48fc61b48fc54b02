"""How far a scheduler has come: what a cursor may hold, and each step of it."""

import json

import pytest

from chaperone.errors import SpecError
from chaperone.model import cursor

pytestmark = pytest.mark.once

WHOLE = {
    "runs": {
        "r1": {"key": "k", "stdout": 5, "stderr": 0},
        "r2": {"key": "q", "stdout": 0, "stderr": 7, "ended": True},
        "r3": {},
    }
}


@pytest.mark.parametrize("empty", [None, {}, {"runs": {}}])
def test_empty_cursor_has_no_entries(empty):
    assert cursor.checked(empty) == {}


def test_cursor_comes_back_from_json_as_it_was():
    assert cursor.of(cursor.checked(json.loads(json.dumps(WHOLE)))) == WHOLE


def test_ended_false_is_the_same_as_absent():
    assert cursor.checked({"runs": {"r": {"key": "k", "ended": False}}}) == {"r": {"key": "k"}}


@pytest.mark.parametrize(
    "value, sentence",
    [
        ([], "cursor: want an object, got a list"),
        ("x" * 100, "cursor: want an object, got a string"),
        ({"run": {}}, "cursor.run: unknown field; want one of runs"),
        ({"runs": []}, "cursor.runs: want an object, got a list"),
        ({"runs": {"../etc": {}}}, "cursor.runs: want run ids as its keys, got '../etc'"),
        ({"runs": {"r": None}}, "cursor.runs.r: want an object, got null"),
        (
            {"runs": {"r": {"offset": 1}}},
            "cursor.runs.r.offset: unknown field; want one of ended, key, stderr, stdout",
        ),
        ({"runs": {"r": {"key": 1}}}, "cursor.runs.r.key: want a string, got 1"),
        (
            {"runs": {"r": {"stdout": -1}}},
            "cursor.runs.r.stdout: want a whole number of at least 0, got -1",
        ),
        (
            {"runs": {"r": {"stdout": 1.0}}},
            "cursor.runs.r.stdout: want a whole number of at least 0, got 1.0",
        ),
        (
            {"runs": {"r": {"stderr": True}}},
            "cursor.runs.r.stderr: want a whole number of at least 0, got true",
        ),
        (
            {"runs": {"r": {"stderr": 2**63}}},
            "cursor.runs.r.stderr: want a whole number of at least 0 and at most 9.22337e+18,"
            " got 9223372036854775808",
        ),
        (
            {"runs": {"r": {"key": "k", "ended": 1}}},
            "cursor.runs.r.ended: want true or false, got 1",
        ),
        (
            {"runs": {"r": {"ended": True}}},
            "cursor.runs.r: want a key beside ended, got an object",
        ),
    ],
)
def test_damaged_cursor_is_refused_with_one_sentence(value, sentence):
    with pytest.raises(SpecError) as raised:
        cursor.checked(value)
    assert str(raised.value) == sentence


def test_step_leaves_the_entry_before_it_as_it_was():
    waited = {}
    started = cursor.started(waited, "k")
    moved = cursor.advanced(started, "stderr", 9)
    ended = cursor.ended(moved)
    assert (waited, started) == ({}, {"key": "k", "stdout": 0, "stderr": 0})
    assert (moved, ended) == (
        {"key": "k", "stdout": 0, "stderr": 9},
        {"key": "k", "stdout": 0, "stderr": 9, "ended": True},
    )
    assert [cursor.is_waited_for(entry) for entry in (waited, started)] == [True, False]
    assert [cursor.has_ended(entry) for entry in (moved, ended)] == [False, True]


def test_offsets_put_in_by_hand_stay_at_the_start():
    assert cursor.started({"stdout": 3}, "k") == {"key": "k", "stdout": 3, "stderr": 0}


def test_cursor_is_the_askers_own():
    entries = {"r": cursor.entry("k")}
    cursor.of(entries)["runs"]["r"]["stdout"] = 5
    assert entries == {"r": {"key": "k", "stdout": 0, "stderr": 0}}
