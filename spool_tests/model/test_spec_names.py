"""
Run ids and names of signals, and specs of random input.
"""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaperone.errors import SpecError
from chaperone.model import jsontext
from chaperone.model import spec as specs
from spool_tests.support.specs import ARGV, CANONICAL, CWD

pytestmark = pytest.mark.once

# -- names and signals


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "A" * 128, "x.."])
def test_run_id_is_taken(name: str) -> None:
    assert specs.is_run_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "_a",
        "a/b",
        "a b",
        "a\n",
        "a\0",
        "é",
        "A" * 129,
        None,
        5,
        b"a",
        ["a"],
    ],
)
def test_run_id_is_refused(name: object) -> None:
    assert not specs.is_run_id(name)


def test_signal_names_go_both_ways() -> None:
    for number in range(1, specs.SIGNALS["SIGRTMAX"] + 1):
        assert specs.signal_number_of(specs.signal_name_of(number)) == number
    assert (
        specs.signal_name_of(9) == "SIGKILL"
        and specs.signal_name_of(35) == "SIGRTMIN+1"
        and specs.signal_name_of(32) == "SIG32"
    )
    assert specs.signal_number_of("SIGNONE") is None
    assert [
        specs.signal_name(text)
        for text in ("TERM", "sigterm", "15", "0", "9" * 5000, "", "SIG", "15 ")
    ] == ["SIGTERM"] * 3 + [None] * 5
    for number in range(specs.SIGNALS["SIGRTMIN"], specs.SIGNALS["SIGRTMAX"] + 1):
        assert (
            specs.signal_name(str(number))
            == specs.signal_name(specs.signal_name_of(number))
            == specs.signal_name_of(number)
        )
    wrong = ["SIGRTMIN+31", "RTMIN+", "RTMIN+-1", "RTMIN+" + "9" * 5000, "32", "65"]
    assert [specs.signal_name(text) for text in ("rtmin+3", *wrong)] == ["SIGRTMIN+3"] + [None] * 6


# -- random input

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from(["stop", "kill", "h"])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    [
        *CANONICAL,
        *CANONICAL["program"],
        "command",
        "host",
        "hops",
        "ssh",
        "sudo",
        "user",
        "mode",
        "options",
        "port",
        "signal",
        "file",
    ]
)  # type: ignore[misc]
likely = st.recursive(
    anything | st.lists(st.text(min_size=1), min_size=1, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=6),
    max_leaves=20,
)
nearly = st.fixed_dictionaries(
    {
        "program": st.fixed_dictionaries(
            {"argv": st.lists(st.text(min_size=1), min_size=1)},
            optional={name: likely for name in CANONICAL["program"] if name != "argv"},
        )
    },  # type: ignore[attr-defined]
    optional={name: likely for name in CANONICAL if name != "program"},
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])  # on a loaded machine
@given(likely | nearly)
def test_anything_is_refused_in_one_sentence_or_has_a_fixed_point(value: object) -> None:
    try:
        canonical = specs.checked(value, CWD)
    except SpecError as error:
        text = str(error)
        kinds = r": (want .*, got |want JSON |unknown (field|limit); want |required field )"
        assert re.search(kinds, text)
        assert "\n" not in text and len(text) < 1000
        return
    assert specs.checked(canonical, "/elsewhere") == canonical
    assert jsontext.loads(jsontext.dumps(canonical)) == canonical
    specs.without_secrets(canonical)


@given(
    st.dictionaries(
        names,
        st.just("hunter2")
        | st.just(["hunter2"])
        | st.just({"hunter2": 5})
        | st.just({"K": "hunter2", "L": 5}),
    )
)
def test_secrets_are_never_told(program: dict[str, object]) -> None:
    for hidden in ("env", "stdin", "inherit_env"):
        value = program.get(hidden)
        if value == {"hunter2": 5}:  # here it is a name
            continue
        try:
            specs.checked({"program": {**ARGV, hidden: value}}, CWD)
        except SpecError as error:
            assert "hunter2" not in str(error)
