"""
`callback` and `config` of a spec: what is taken, what is refused, what is shown.
"""

import pytest

from chaperone.errors import SpecError
from chaperone.model import jsontext
from chaperone.model import spec as specs
from spool_tests.support.specs import ARGV, CANONICAL, CWD, POSTING, SEED


def checked(path, value):
    """A small spec with one field of `callback` or `config`, or all of it, that is set."""
    name, _, inner = path.partition(".")
    return specs.checked({"program": ARGV, name: {inner: value} if inner else value}, CWD)


@pytest.mark.parametrize(
    ("path", "value", "canonical"),
    [
        (
            "callback",
            {"url": "https://h/", "token": "t"},
            {"url": "https://h/", "method": "POST", "token": "t", "token_file": None, "ca": None},
        ),
        (
            "callback",
            {"url": "https://[::1]:8443/a/b@c", "method": "GET", "token_file": "t", "ca": "/ca"},
            {
                "url": "https://[::1]:8443/a/b@c",
                "method": "GET",
                "token": None,
                "token_file": "/srv/etl/t",
                "ca": "/ca",
            },
        ),
        ("config", {}, POSTING),
        (
            "config",
            {"timeout": 5, "output_latency": 0},
            {**POSTING, "timeout": 5, "output_latency": 0},
        ),
    ],
)
def test_callback_is_taken(path, value, canonical):
    found = checked(path, value)
    assert found[path] == canonical
    assert specs.checked(found, "/elsewhere") == found
    assert jsontext.loads(jsontext.dumps(found)) == found


def test_seeds_program_json_is_a_spec():
    spec = specs.checked(SEED, CWD)
    assert spec["program"] == {**CANONICAL["program"], **SEED["program"]}
    assert spec["callback"] == {**SEED["callback"], "token_file": None, "ca": None}
    assert spec["config"] == SEED["config"] == POSTING


def test_config_has_its_defaults_where_there_is_a_callback():
    spec = specs.checked(
        {"program": ARGV, "callback": {"url": "https://h", "token_file": "/t"}}, CWD
    )
    assert spec["config"] == POSTING


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("callback", {"token": "hunter2"}, "callback.url: required field is missing"),
        (
            "callback",
            {"url": "https://h", "password": "hunter2"},
            "callback.password: unknown field; want one of ca, method, token, token_file, url",
        ),
        (
            "callback",
            {"url": "https://h"},
            "callback: want exactly one of token and token_file, got neither",
        ),
        (
            "callback",
            {"url": "https://h", "token": "hunter2", "token_file": "/t"},
            "callback: want exactly one of token and token_file, got both",
        ),
        ("callback.url", 5, "callback.url: want an https URL, got a number"),
        (
            "callback.url",
            "http://u:hunter2@h/",
            "callback.url: want a URL that begins with 'https://', got one that begins with "
            "'http://'",
        ),
        (
            "callback.url",
            "ftp://h/",
            "callback.url: want a URL that begins with 'https://', got a string",
        ),
        *(
            (
                "callback.url",
                url,
                "callback.url: want a URL of visible ASCII characters, without a user, a query and "
                "a fragment, got a string",
            )
            for url in ("https://u:hunter2@h/", "https://h/?hunter2", "https://h#a", "https://h\n")
        ),
        *(
            (
                "callback.url",
                url,
                "callback.url: want https://HOST[:PORT][/PATH], got a string",
            )
            for url in (
                "https://",
                "https:///a",
                "https://h:0",
                "https://h:65536/",
                "https://h:x",
                "https://h*/",
                "https://[]/",
                "https://[::1]a/",
                "https://::1/",
                "https://h]",
            )
        ),
        (
            "callback",
            {"url": "https://h", "token": "hunter2\r\nX: y"},
            "callback.token: want visible ASCII characters, got a string",
        ),
        (
            "callback",
            {"url": "https://h", "token": ""},
            "callback.token: want visible ASCII characters, got a string",
        ),
        (
            "callback",
            {"url": "https://h", "method": "PUT", "token": "t"},
            "callback.method: want 'POST' or 'GET', got 'PUT'",
        ),
        (
            "config",
            {"buffer": 1},
            "config.buffer: unknown field; want one of output_buffer, output_latency, "
            "retry_frequency, timeout",
        ),
        ("config.retry_frequency", 0, "config.retry_frequency: want a number above 0, got 0"),
        ("config.timeout", 0, "config.timeout: want a number above 0, got 0"),
        (
            "config.output_buffer",
            2**20 + 1,
            "config.output_buffer: want a whole number of at least 1 and at most 1.04858e+06, "
            "got 1048577",
        ),
        ("config.output_latency", -1, "config.output_latency: want a number of at least 0, got -1"),
    ],
)
def test_callback_is_refused_by_a_whole_sentence(path, value, sentence):
    with pytest.raises(SpecError) as caught:
        checked(path, value)
    assert str(caught.value) == sentence


def test_token_is_not_shown():
    spec = checked("callback", {"url": "https://h/", "token": "hunter2"})
    shown = specs.without_secrets(spec)
    assert shown["callback"] == {**spec["callback"], "token": None}
    assert (shown["config"], spec["callback"]["token"]) == (POSTING, "hunter2")


def test_nothing_of_another_name_is_shown_of_a_callback_of_0_1():
    spec = specs.checked({"program": ARGV}, CWD)
    of_0_1 = {**spec, "callback": {"key": "hunter2"}, "config": {"deep": {"er": "hunter2"}}}
    shown = specs.without_secrets(of_0_1)
    assert (shown["callback"], shown["config"]) == ({"key": None}, {"deep": None})
