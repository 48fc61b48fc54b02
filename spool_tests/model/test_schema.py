"""
The JSON Schema of a spec takes what the validator takes, but for the rules that it names.
"""

import copy
import json
import re

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chaperone.errors import SpecError
from chaperone.model import schema, spec
from chaperone.model.hops import remote
from spool_tests.support.specs import ARGV, CANONICAL, CWD

pytestmark = pytest.mark.once
SCHEMA = schema.of_spec()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# Each with specs that break it alone, and the sentence of the validator.
KNOWN = {
    schema.BEYOND[0]: (
        [
            {"output": {"max_bytes": 1.0}},
            {"remote": {"host": "h", "port": 22.0}},
            {"program": {**ARGV, "rlimits": {"nofile": [1.0, 2]}}},
        ],
        r"want a (whole number|port from 1 to 65535)",
    ),
    schema.BEYOND[1]: (
        [
            {"program": {"argv": ["a\ud800"]}},
            {"labels": {"\udfff": "x"}},
            {"remote": {"host": "h", "options": {"X": "\udbff"}}},
            {"remote": {"host": "\udc80"}},
        ],
        r"got another surrogate|valid UTF-8, got '.*\\ud[89a-f]",
    ),
    schema.BEYOND[2]: (
        [{"program": {**ARGV, "rlimits": {"cpu": [None, 1]}}}],
        r"want a soft limit not above the hard one",
    ),
    schema.BEYOND[3]: (
        [{"remote": {"hops": [{"docker": {"image": "a\u200b"}}]}}],
        r"want an image that does not begin with '-'",
    ),
    schema.BEYOND[4]: (
        [
            {"callback": {"url": "https://h:0/", "token": "t"}},
            {"callback": {"url": "https://[::1]:65536", "token_file": "t"}},
        ],
        r"callback.url: want https://HOST\[:PORT\]\[/PATH\]",
    ),
    schema.BEYOND[5]: (
        [
            {"remote": {"mode": "sudo", "user": "u", "share": True}},
            {"remote": {"host": "h", "options": {"controlpath": "/x"}, "share": True}},
        ],
        r"remote.share: want false where the first hop is not ssh",
    ),
}


def refusal(value):
    """The validator's sentence; None if it takes the value."""
    try:
        spec.checked(copy.deepcopy(value), CWD)
        return None
    except SpecError as error:
        return str(error)


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(rule in SCHEMA["$comment"] for rule in schema.BEYOND)
    # Of the text of a spec, not of its value.
    assert {*KNOWN, schema.BEYOND[-1]} == {*schema.BEYOND}


@pytest.mark.parametrize("rule", KNOWN, ids=lambda rule: rule.split(",")[0])
def test_rule_that_is_beyond_the_schema_is_the_validators(rule):
    examples, sentence = KNOWN[rule]
    for fields in examples:
        value = {"program": ARGV, **fields}
        assert VALIDATOR.is_valid(value), fields
        assert re.search(sentence, refusal(value)), fields


# -- both ways

TEXTS = (
    "|a|a\n|-a|a b|a\0|a\ud800|\udc80|ä|a=b|=|1a|_1|a@b|a;b|a\u2003b|x.y-z|SIGTERM|term|Sigint|TREM"
    "|ſigterm|sigrtmin+1|RTMIN+29|SIGRTMIN+30|SIGRTMIN+01|SIG32|9|09|009|0009|64|32|99|022|0777"
    "|1777|00000|8|unlimited|kill|survive|stop|leave|all|program|pipe|file|drop|sudo|ssh-as"
    "|sudo-then-ssh|ssh-then-sudo"
).split("|")
NUMBERS = (0, 1, -1, 22, 65_535, 65_536, 2**63 - 1, 2**63, 10**10, 10**10 + 1, 0.0, 0.5, 1.0, 1e10)
PLAIN = st.sampled_from([None, True, False, *TEXTS, *NUMBERS, "x" * 128, "x" * 129])
LISTS = st.lists(PLAIN, max_size=3)
OBJECTS = st.dictionaries(
    st.sampled_from(["a", "1a", "a=b", "ä", "", "\0", "file", "cpu", "nofile", "X", "X-Y"]),
    PLAIN | LISTS,
    max_size=2,
)
HOPS = [
    {"ssh": {"host": "h"}},
    {"ssh": {"host": "h", "port": 0}},
    {"ssh": {"user": "u"}},
    {"sudo": {"user": "u"}},
    {"sudo": {}},
    {"sudo": {"user": "u"}, "ssh": {"host": "h"}},
    {"exec": {"argv": ["x", ""]}},
    {"exec": {"argv": [""]}},
    {"rsh": {"host": "h"}},
    {"srun": {"cpus": 1, "gpus": "a100:2", "options": {"exclusive": True, "mail-type": []}}},
    {"srun": {"gpus": 0}},
    {"srun": {"options": {"ntasks": 2}}},
    {"srun": {"options": {"a_b": 2}}},
    {"docker": {"container": "c", "workdir": "/"}},
    {"docker": {"container": "c", "image": "i"}},
    {"podman": {"image": "r:5/i@sha256:0", "container": None}},
    {"podman": {}},
    {"podman": {"image": "i j"}},
    {"podman": {"container": "c", "workdir": "a"}},
]
ANYTHING = PLAIN | LISTS | OBJECTS | st.lists(st.sampled_from(HOPS), max_size=2)

RIGHT = {
    "id": [None, "r"],
    "program": [ARGV, {"command": "x"}, {**ARGV, "env": {"1a": "x"}}, {**ARGV, "stdin": "x"}],
    "remote": [None, *({"mode": mode, "host": "h", "user": "u"} for mode in remote.MODES),
               {"hops": [{"ssh": {"host": "h"}}]}, {"hops": [{"docker": {"image": "i"}}]},
               {"hops": [{"srun": {}}]}, {"hops": [{"podman": {"container": "c"}}]},
               {"mode": "sudo", "user": "u"},
               {"host": "h", "supervise": False}, {"host": "h", "share": True}],
    "on_disconnect": ["kill", "survive"],
    "lease": [None, 1],
    "stop": [{}, {"to": "program"}, {"signal": "INT", "grace_period": 0}],
    "timeouts": [{}, {"idle": 1, "run": None}],
    "output": [{}, {"through": "file"}, {"max_bytes": 0, "on_full": "stop"}, {"timeline": True}],
    "callback": [None, {"url": "https://h", "token": "t"}, {"url": "https://[::1]:8/a/b@c"},
                 {"url": "https://h-1.x:8443/", "token": "t", "token_file": "f"},
                 {"url": "https://u@h/", "token": "t"}, {"url": "http://h/", "token": "t"},
                 {"url": "https://h/\n", "token": "t"}, {"url": "https://h\n", "token": "t"},
                 {"url": "https:///a", "token": "t"}, {"url": "https://h:/", "token": "t"},
                 {"url": "https://h?a", "token": "t"}, {"url": "https://h", "token": "a b"},
                 {"url": "https://h", "token_file": "f", "ca": "c", "method": "GET"}],
    "config": [None, {}, {"output_buffer": 1, "timeout": 0.5}],
    "labels": [{}, {"a": "b"}],
}  # fmt: skip
PROGRAM_AND_MORE = st.fixed_dictionaries(
    {"program": st.sampled_from(RIGHT["program"])},
    optional={name: st.sampled_from(values) for name, values in RIGHT.items() if name != "program"},
)
PATHS = [
    (*before, name)
    for before, table in {
        (): CANONICAL,
        ("program",): {**CANONICAL["program"], "command": None},
        ("remote",): (*remote.HOP_FIELDS, *spec.REMOTE),
        **{(part,): CANONICAL[part] for part in ("stop", "timeouts", "output")},
        ("callback",): spec.CALLBACK,
        ("config",): spec.CONFIG,
    }.items()
    for name in (*table, "frob")
]


@st.composite
def specs(draw):
    """A spec that is right, often with one or two changes."""
    value = copy.deepcopy(draw(PROGRAM_AND_MORE))
    for *before, name in draw(st.lists(st.sampled_from(PATHS), max_size=2)):
        place = value
        for part in before:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                place = value  # a field of the wrong place is one more mistake
        if draw(st.booleans()) or name not in place:
            place[name] = draw(ANYTHING)
        else:
            del place[name]
    return value


def whole(value):
    """The same value, no whole number written with a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    return value


def agree(value):
    taken, sentence = VALIDATOR.is_valid(value), refusal(value)
    if sentence is None:
        assert taken, [error.message for error in VALIDATOR.iter_errors(value)]
    elif taken:
        # The sentence names the first fault; without fractions it may be another known one.
        rules = [pattern for _, pattern in list(KNOWN.values())[1:]]
        while not any(re.search(pattern, sentence or "") for pattern in rules):
            assert whole(value) != value or json.dumps(whole(value)) != json.dumps(value), sentence
            value = whole(value)
            sentence = refusal(value)
            if sentence is None:
                break


@settings(max_examples=150)
@given(value=specs())
@example(value={"program": ARGV, "remote": {"mode": "sudo", "user": "u", "options": {}}})
def test_schema_and_validator_agree(value):
    agree(value)


@pytest.mark.long
@settings(max_examples=5_000)
@given(value=specs())
def test_schema_and_validator_agree_on_many(value):
    agree(value)


@pytest.mark.parametrize("hop", HOPS, ids=str)
def test_schema_and_validator_agree_on_a_hop(hop):
    for life in ("kill", "survive"):
        agree({"program": ARGV, "remote": {"hops": [hop]}, "on_disconnect": life})


def test_schema_takes_every_canonical_form():
    for fields in ({}, {"remote": {"host": "h"}}, {"output": {"timeline": True}}):
        assert VALIDATOR.is_valid(spec.checked({"program": ARGV, **fields}, CWD))
