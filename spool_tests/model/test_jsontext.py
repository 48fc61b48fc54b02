"""
JSON text to values and back: what the lean reader takes, what it refuses, and that it says so in
one sentence.
"""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaperone.model import jsontext

pytestmark = pytest.mark.once

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | finite
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(values)
def test_what_is_written_is_read_back(value: object) -> None:
    text = jsontext.dumps(value)
    assert "\n" not in text and text.isascii()
    assert jsontext.loads(text) == value == json.loads(text)


@given(values)
def test_what_json_writes_is_read(value: object) -> None:
    assert jsontext.loads(json.dumps(value, indent=2).encode()) == value


@given(st.binary() | st.text(st.sampled_from('[]{}",:0123456789.eE+-truefalsn\\ud8 \n\t\x00')))
def test_anything_is_read_or_refused_in_one_sentence(text: bytes | str) -> None:
    try:
        jsontext.loads(text)
    except ValueError as error:
        assert type(error) is ValueError
        assert str(error).startswith("want ") and "\n" not in str(error) and len(str(error)) < 200


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "want a JSON value at character 0"),
        ("  \n", "want a JSON value at character 3"),
        ("[", "want a JSON value at character 1"),
        ("\ufeff1", "want a JSON value at character 0"),
        ("1 2", "want one JSON value, got more at character 1"),
        ('{"a": 1} x', "want one JSON value, got more at character 8"),
        ('{"a" 1}', "want JSON, got expecting ':' delimiter at character 5"),
        ('"\x01"', "want JSON, got invalid control character at character 1"),
        ('["a\x1f"]', "want JSON, got invalid control character at character 3"),
        ('"\x01\x02', "want JSON, got invalid control character at character 1"),
        ('"abc\n', "want JSON, got invalid control character at character 4"),
        ('"\\\\\\x"', "want JSON, got invalid \\escape at character 3"),
        ('"abc', "want JSON, got unterminated string at character 0"),
        ('"a\\x"', "want JSON, got invalid \\escape at character 2"),
        ('"\\ud8"', "want JSON, got invalid \\uXXXX escape at character 2"),
        ('{"a": }', "want a JSON value at character 6"),
        ('{"a": 1, "b": 2, "a": 3}', "want each key once, got 'a' twice"),
        ("NaN", "want JSON, got the number NaN"),
        ("[-Infinity]", "want JSON, got the number -Infinity"),
        ("1e999", "want JSON, got the number 1e999"),
        ("9" * 5_000, "want JSON, got a number of 5000 digits"),
        ("[" * 200_000, "want JSON, got too many levels of nesting"),
        (b'"\xff"', "want UTF-8, got byte 0xff at offset 1"),
    ],
)
def test_bad_text_is_told_by_a_sentence(text: bytes | str, complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        jsontext.loads(text)
    assert str(caught.value) == complaint


def test_many_keys_with_one_twice_are_refused_at_once() -> None:
    names = ", ".join(f'"{number}": 0' for number in range(50_000))
    with pytest.raises(ValueError, match="got '0' twice"):
        jsontext.loads(f'{{{names}, "0": 1}}')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}, object()])
def test_what_is_no_json_is_not_written(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        jsontext.dumps(value)


def test_bad_text_is_told_without_the_json_package() -> None:
    """
    The C scanner looks its exception up in `json.decoder` and fails with a SystemError if that was
    never imported: so it is in a chaperone, and never in a test that runs beside pytest.
    """
    script = """
import sys
from chaperone.model import jsontext
assert jsontext.loads("[1]") == [1] and jsontext.dumps([1]) == "[1]"
assert "json" not in sys.modules
try:
    jsontext.loads('{"a" 1}')
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (
        "want JSON, got expecting ':' delimiter at character 5\n",
        "",
    )
