"""The lives of a program on a far side: their tables against the code and docs/far-side.rst."""

import inspect
import itertools
import pathlib
import re

import pytest

from chaperone.errors import TransitionError
from chaperone.farside import contact, lives, records, remote
from spool_tests.support.pages import table, words
from spool_tests.support.places import ROOT

pytestmark = pytest.mark.once

PAGE = pathlib.Path(ROOT, "docs", "far-side.rst").read_text()
LIVES = {"kill": lives.Life(lives.KILL), "survive": lives.Life(lives.SURVIVE)}
both = pytest.mark.parametrize("name", LIVES)


def named(life, column):
    return {one for row in life.rows for one in row[column]} - {"any"}


def cells(life):
    """(state, event, actions, next state), a row for each cell."""
    for states, events, actions, after in life.rows:
        states = named(life, 0) - {"over"} if states == ["any"] else states
        events = named(life, 1) if events == ["any"] else events
        for state, event in itertools.product(states, events):
            yield state, event, actions, state if after == "=" else after


@both
def test_every_state_takes_every_event_once(name):
    life = LIVES[name]
    given = [(state, event) for state, event, _, _ in cells(life)]
    assert len(given) == len(set(given))
    assert set(given) == set(itertools.product(named(life, 0), named(life, 1)))


@both
def test_step_is_what_the_row_says(name):
    life = LIVES[name]
    for state, event, actions, after in cells(life):
        if actions == ["fail"]:
            with pytest.raises(TransitionError) as caught:
                life.step(state, event)
            assert str(caught.value) == (
                f"unable to take {event!r} in state {state!r} of a far side"
            )
        else:
            assert life.step(state, event) == (actions, after)


@both
def test_every_state_is_reached_and_leads_to_the_end(name):
    life = LIVES[name]
    steps = {(state, after) for state, _, _, after in cells(life)}
    reached = {"unsent", "adopted", "resuming"} & named(life, 0)
    ending = {"over"}
    for _ in named(life, 0):
        reached |= {after for state, after in steps if state in reached}
        ending |= {state for state, after in steps if after in ending}
    assert reached == ending == named(life, 0)


def test_actions_are_methods_and_methods_are_actions():
    told = set().union(*(named(life, 2) for life in LIVES.values())) - {"fail"}
    methods = [
        name.replace("_", " ")
        for of in (contact.FarSide, remote.Account)
        for name, method in vars(of).items()
        if inspect.isfunction(method)
        and list(inspect.signature(method).parameters)[1:] == ["event"]
        if not name.startswith("_")
    ]
    assert sorted(methods) == sorted(told)


def test_events_are_those_that_the_code_brings_about():
    source = "".join(inspect.getsource(module) for module in (contact, remote))
    made = set(re.findall(r'Event\(\s*"([a-z ]+)"', source)) - {"odd"}
    made |= {"payload cut", "closed"}  # chosen by the exit code
    heard = {
        records.event_of(said.split())
        for said in (
            *records.NAMES,
            "start 7",
            "left 0",
            "short out",
            "unkillable 1",
            "end R0",
            "end",
            "fail",
            "fail never",
            "fail stdin",
            "eof",
            "eof 1 2",
        )
    } - {None}
    assert made | heard == set().union(*(named(life, 1) for life in LIVES.values()))


@both
def test_table_of_the_page_is_that_of_the_code(name):
    start = PAGE.index(f"\n``{name}``:\n")
    rows = table(PAGE[start:], "in")
    assert [
        (
            states.split(", "),
            events.split(", "),
            [] if actions == "\\" else actions.split(", "),
            after,
        )
        for states, events, actions, after in rows
    ] == LIVES[name].rows


def test_page_has_every_state_and_every_event():
    states = {
        words(row[0])[0]: {"kill", "survive"} if row[1] == "both" else {row[1]}
        for row in table(PAGE, "state")
    }
    assert states == {
        state: {name for name, life in LIVES.items() if state in named(life, 0)}
        for state in set().union(*(named(life, 0) for life in LIVES.values()))
    }
    events = [word for row in table(PAGE, "event") for word in words(row[0])]
    assert sorted(events) == sorted(set().union(*(named(life, 1) for life in LIVES.values())))


@pytest.mark.parametrize(
    "said, event",
    [
        ("start 7", "start"),
        ("start", None),
        ("start x", None),
        ("left 12", "left"),
        ("left -1", None),
        ("eof", "drained"),
        ("eof 1 -1", "sizes"),
        ("eof 1", None),
        ("short out", "short"),
        ("short other", None),
        ("end R7 0m0.0s 0m0.0s 0m0.0s 0m0.0s", "end"),
        ("end A", "no end"),
        ("fail", "failed"),
        ("fail cwd", "failed"),
        ("fail directory", "failed early"),
        ("fail never", "never"),
        ("lost eof", "unheard"),
        ("other", None),
    ],
)
def test_record_is_an_event(said, event):
    assert records.event_of(said.split()) == event
