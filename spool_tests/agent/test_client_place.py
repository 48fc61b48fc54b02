"""What names an agent's spool, a URL or a deployed agent's file; and what proves our right."""

import json
import pickle
import subprocess
import sys

import pytest

import chaperone
from chaperone import aio
from chaperone.agent.client.place import Place, is_place
from chaperone.errors import SpecError
from spool_tests.support.places import ROOT

pytestmark = pytest.mark.once
URL = "https://db3:8470/etl"


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    monkeypatch.delenv("CHAPERONE_TOKEN_FILE", raising=False)
    monkeypatch.delenv("CHAPERONE_CA", raising=False)


def test_url_and_agent_file_name_an_agent_and_a_path_does_not(tmp_path):
    named = (URL, "http://db3/etl", "agent:/run/a.json")
    assert [is_place(text) for text in named] == [True] * 3
    for path in ("spool", "/var/spool", "./agent:x", "https:/x", tmp_path, b"spool"):
        assert not is_place(path)


@pytest.mark.parametrize(
    ("url", "origin", "name"),
    [
        (URL, "https://db3:8470", "etl"),
        ("https://DB3.example/etl/", "https://db3.example", "etl"),
        ("https://[::1]:8470/a.b-c_d", "https://[::1]:8470", "a.b-c_d"),
    ],
)
def test_url_is_of_a_host_and_a_spool(url, origin, name):
    place = Place(url)
    assert (place.origin, place.name, place.server_name) == (origin, name, None)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://db3/etl", "want https://: a token is never sent in the clear"),
        ("https://db3", "want https://HOST:PORT/NAME"),
        ("https://db3/etl/runs", "want https://HOST:PORT/NAME"),
        ("https://db3/..", "want https://HOST:PORT/NAME"),
        ("https://db3/etl?x=1", "want https://HOST:PORT/NAME"),
        ("https:///etl", "want https://HOST:PORT/NAME"),
        ("https://db3:port/etl", "it is not a URL"),
        ("https://[::1/etl", "it is not a URL"),
    ],
)
@pytest.mark.parametrize("spool", [chaperone.Spool, aio.Spool])
def test_url_of_no_spool_is_refused(spool, url, why):
    with pytest.raises(SpecError) as caught:
        spool(url)
    assert str(caught.value) == f"unable to open spool {url!r}: {why}"


def test_secret_in_a_url_is_refused_and_not_shown():
    with pytest.raises(SpecError) as caught:
        chaperone.Spool("https://me:secret@db3/etl")
    assert str(caught.value) == (
        "unable to open a spool by its URL: a URL must not contain a secret"
    )


def test_proofs_are_for_a_url_only(tmp_path):
    for spool in (chaperone.Spool, aio.Spool):
        with pytest.raises(SpecError) as caught:
            spool(tmp_path, token_file="token")
        why = "token_file and ca are for the URL of an agent"
        assert str(caught.value) == f"unable to open spool {str(tmp_path)!r}: {why}"


# -- the token


def private(path, text):
    path.touch(0o600)
    path.write_text(text)
    return path


def test_token_is_of_the_argument_before_the_environment(tmp_path, monkeypatch):
    mine, other = private(tmp_path / "mine", "mine\n"), private(tmp_path / "other", "other")
    monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(other))
    assert (Place(URL, mine).token(), Place(URL).token()) == ("mine", "other")
    mine.write_text("newer\n")
    assert Place(URL, mine).token() == "newer"


@pytest.mark.parametrize("text", ["", "\n", "two\nlines\n", "two words", "t\x00", "ä", "x" * 5_000])
def test_token_file_that_is_none_is_refused_and_not_shown(tmp_path, text):
    path = private(tmp_path / "token", text)
    with pytest.raises(SpecError) as caught:
        Place(URL, path).token()
    why = f"token file {str(path)!r}: want one line with a token"
    assert str(caught.value) == f"unable to open spool {URL!r}: {why}"


def test_missing_token_is_an_error_that_says_where_it_may_be(tmp_path):
    with pytest.raises(SpecError) as caught:
        Place(URL).token()
    why = "want a token: token_file, or $CHAPERONE_TOKEN_FILE"
    assert str(caught.value) == f"unable to open spool {URL!r}: {why}"
    missing = tmp_path / "missing"
    with pytest.raises(SpecError) as caught:
        Place(URL, missing).token()
    why = f"token file {str(missing)!r}: No such file or directory"
    assert str(caught.value) == f"unable to open spool {URL!r}: {why}"


# -- the file of a deployed agent

DEPLOYED = {"url": URL, "token": "theirs", "ca": None, "server_name": "agent-7"}


def test_file_of_a_deployed_agent_stands_in_place_of_a_url(tmp_path, monkeypatch):
    path = private(tmp_path / "a.json", json.dumps({**DEPLOYED, "further": 1}))
    # A token that is meant for another agent is never sent to this one.
    monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(private(tmp_path / "other", "other")))
    place = Place(f"agent:{path}")
    assert (place.origin, place.name) == ("https://db3:8470", "etl")
    assert (place.server_name, place.token()) == ("agent-7", "theirs")
    assert "theirs" not in repr(place) + repr(chaperone.Spool(f"agent:{path}"))
    assert Place(f"agent:{path}", private(tmp_path / "mine", "mine")).token() == "mine"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "url is missing or invalid"),
        ("{", "it is not JSON"),
        (json.dumps({**DEPLOYED, "token": None}), "token is missing or invalid"),
        (json.dumps({**DEPLOYED, "token": "two words"}), "its token: want one line with a token"),
        (json.dumps({**DEPLOYED, "ca": 7}), "ca is missing or invalid"),
        (
            json.dumps({**DEPLOYED, "url": "http://db3/etl"}),
            "want https://: a token is never sent in the clear",
        ),
    ],
)
def test_file_that_is_of_no_agent_is_refused(tmp_path, text, why):
    name = f"agent:{private(tmp_path / 'a.json', text)}"
    with pytest.raises(SpecError) as caught:
        Place(name)
    assert str(caught.value) == f"unable to open spool {name!r}: {why}"


def test_file_that_others_may_read_is_refused(tmp_path):
    path = private(tmp_path / "a.json", json.dumps(DEPLOYED))
    path.chmod(0o640)
    with pytest.raises(SpecError) as caught:
        Place(f"agent:{path}")
    why = "it has a token, and others may read it: want mode 0600, got 0o640"
    assert str(caught.value) == f"unable to open spool 'agent:{path}': {why}"


def test_missing_package_is_named():
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "import chaperone, chaperone.aio\n"
        "for spool in (chaperone.Spool, chaperone.aio.Spool):\n"
        f"    try: spool({URL!r})\n"
        "    except chaperone.AgentError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    why = "want the package httpx (pip install 'chaperone-spool[agent]')"
    assert done.stdout == f"unable to open spool {URL!r}: {why}\n" * 2


def test_spool_on_this_host_needs_no_package_of_agents(tmp_path):
    code = (
        "import sys, chaperone, chaperone.aio\n"
        f"chaperone.Spool({str(tmp_path)!r}).all(); chaperone.aio.Spool({str(tmp_path)!r})\n"
        "print([name for name in ('httpx', 'starlette', 'ssl', 'json') if name in sys.modules])"
    )
    tmp_path.joinpath(".running").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "httpx" not in done.stdout and "starlette" not in done.stdout


def test_spool_can_be_sent_to_another_process(tmp_path):
    path = private(tmp_path / "a.json", json.dumps(DEPLOYED))
    for name in (URL, f"agent:{path}"):
        for spool in (chaperone.Spool(name), aio.Spool(name)):
            text = pickle.dumps(spool)
            assert repr(pickle.loads(text)) == repr(spool) and b"theirs" not in text
