"""The receiver: what agents post becomes ordinary run directories, whatever dies or is repeated."""

import asyncio
import errno
import json
import os
import pathlib
import re

import httpx
import pytest

import chaperone
from chaperone import agent
from chaperone.errors import RunExistsError, SpecError
from spool_tests.support import disk
from spool_tests.support.fed import KEY, far_final
from spool_tests.support.runs import ask, final, live, stdout

pytestmark = pytest.mark.once

URL = "https://near:8050/api/v1/agent"


class Poster:
    """
    What an agent posts about one run.

    Args:
        app: The receiver.
        where (tuple): From its `expect`.
    """

    def __init__(self, app, where, key=KEY):
        self.app, (self.url, self.token), self.key = app, where, key

    async def _ask(self, method, path, **more):
        headers = {"Authorization": f"Bearer {self.token}", **more.pop("headers", {})}
        if self.key is not None:
            headers["If-Match"] = f'"{self.key}"'
        path = self.url.removeprefix(URL) + path
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="https://near") as client:
            return await client.request(method, path, headers=headers, **more)

    def ask(self, method, path, **more):
        return asyncio.run(self._ask(method, path, **more))

    def output(self, offset, data, stream="stdout", **headers):
        headers = {"Upload-Offset": str(offset), **headers}
        answer = self.ask("POST", f"/output/{stream}", content=data, headers=headers)
        size = answer.headers.get("Upload-Offset")
        return answer.status_code, None if size is None else int(size)

    def completed(self, status, **more):
        return self.ask("POST", "/completed", json={**status, "key": self.key, **more})

    def requests(self, after=0):
        answer = self.ask("GET", f"/requests?after={after}")
        assert answer.status_code == 200, answer.text
        return [(each["seq"], each["line"]) for each in answer.json()["requests"]]


@pytest.fixture
def app(spool):
    app = agent.receiver(str(spool), URL)
    yield app
    app.close()


def again(app, spool):
    """Another receiver in the place of one that has died."""
    app.close()
    app.__init__(type(app._callbacks.reception)(str(spool), URL))


@pytest.fixture
def poster(app):
    return Poster(app, app.expect("r"))


# -- what is posted


def test_posted_run_is_an_ordinary_run(spool, poster):
    assert not (spool / "r").exists()
    assert poster.output(0, b"one\n") == (204, 4)
    assert live(spool)["state"] == "running"
    spec = json.loads((spool / "r" / "spec.json").read_text())
    assert (spec["key"], spec["origin"]["url"]) == (KEY, f"{URL}/r")
    assert poster.output(4, b"two\n") == (204, 8)
    assert poster.output(0, b"err", "stderr") == (204, 3)
    status = far_final(8, 3)
    assert poster.completed(status).status_code == 204
    assert final(spool) == status
    assert stdout(spool) == b"one\ntwo\n"
    with chaperone.Spool(str(spool)).follow() as follower:
        events = [follower.next(60) for _ in range(4)]
    assert [type(event).__name__ for event in events] == ["Started", "Output", "Output", "Ended"]


def test_overlap_is_skipped_and_a_gap_is_refused_with_the_size(spool, poster):
    poster.output(0, b"abc")
    assert poster.output(1, b"bcde") == (204, 5)
    assert poster.output(0, b"ab") == (204, 5)
    assert poster.output(7, b"h") == (409, 5)
    assert poster.output(5, b"") == (204, 5)
    assert stdout(spool) == b"abcde"


def test_end_before_its_bytes_is_refused_with_the_sizes(spool, poster):
    poster.output(0, b"abc")
    answer = poster.completed(far_final(5))
    assert (answer.status_code, answer.json()["sizes"]) == (409, {"stdout": 3, "stderr": 0})
    assert not (spool / "r" / "status.json").exists()
    poster.output(3, b"de")
    assert poster.completed(far_final(5)).status_code == 204


def test_end_may_be_repeated_and_not_be_changed(spool, poster):
    status = far_final(3)
    poster.output(0, b"abc")
    assert [poster.completed(status).status_code for _ in range(2)] == [204, 204]
    assert poster.completed({**status, "return_code": 7}).status_code == 410
    assert poster.output(0, b"abc") == (204, 3)
    assert poster.output(3, b"d") == (410, None)
    assert final(spool) == status


def test_second_agent_with_the_same_address_is_refused(spool, app, poster):
    """Two agents with one program.json must not mix their bytes."""
    poster.output(0, b"mine")
    other = Poster(app, (poster.url, poster.token), "f" * 32)
    assert other.output(0, b"other and longer") == (410, None)
    assert other.completed(far_final(4)).status_code == 410
    assert other.ask("GET", "/requests").status_code == 410
    assert stdout(spool) == b"mine"


def test_agent_that_names_no_key_is_taken_as_one(spool, app):
    poster = Poster(app, app.expect("r"), key=None)
    poster.output(0, b"abc")
    assert re.fullmatch("[0-9a-f]{32}", json.loads((spool / "r/spec.json").read_text())["key"])
    again(app, spool)
    assert poster.output(3, b"d") == (204, 4)
    answer = poster.ask("POST", "/completed", json=far_final(4))
    assert answer.status_code == 204


def test_expected_key_is_the_only_one(app):
    poster = Poster(app, app.expect("r", KEY), "f" * 32)
    assert poster.output(0, b"abc") == (410, None)
    poster.key = KEY
    assert poster.output(0, b"abc") == (204, 3)


def test_replayed_session_changes_nothing(spool, app, poster):
    calls = [lambda at=at: poster.output(at, b"abcdefgh"[at : at + 3]) for at in range(0, 8, 2)]
    status = far_final(8)
    calls.append(lambda: poster.completed(status).status_code)
    for call in calls:
        call()
    before = disk.tree(spool), stdout(spool), final(spool)
    for call in calls:
        assert call() in ((204, 8), 204)
    again(app, spool)
    for call in calls:
        assert call() in ((204, 8), 204)
    assert (disk.tree(spool), stdout(spool), final(spool)) == before


# -- who may post


def test_token_is_of_one_run_and_only_its_hash_is_kept(spool, app):
    one, other = Poster(app, app.expect("one")), Poster(app, app.expect("other"))
    for token in (other.token, "", "x", one.token + "x"):
        wrong = Poster(app, (one.url, token))
        assert wrong.output(0, b"abc") == (401, None)
        assert wrong.completed(far_final()).status_code == 401
        assert wrong.ask("GET", "/requests").status_code == 401
    unknown = Poster(app, (f"{URL}/unknown", one.token))
    assert unknown.output(0, b"abc") == (401, None)
    assert not (spool / "one").exists()
    one.output(0, b"abc")
    assert Poster(app, (one.url, other.token)).output(0, b"abc") == (401, None)
    files = [path for path in spool.rglob("*") if path.is_file()]
    assert not any(one.token.encode() in path.read_bytes() for path in files)


def test_token_of_an_earlier_expectation_is_not_valid(app):
    first = Poster(app, app.expect("r"))
    second = Poster(app, app.expect("r"))
    assert first.output(0, b"abc") == (401, None)
    assert second.output(0, b"abc") == (204, 3)
    with pytest.raises(RunExistsError) as error:
        app.expect("r")
    assert str(error.value) == "unable to make a callback for run 'r': it exists"


@pytest.mark.parametrize("run_id", ["../x", ".hidden", "", "a/b", "x" * 129])
def test_id_that_is_none_is_refused(spool, app, run_id):
    with pytest.raises(SpecError):
        app.expect(run_id)
    assert Poster(app, (f"{URL}/{run_id}", "x")).output(0, b"abc")[0] in (401, 404)
    assert sorted(os.listdir(spool)) == [".ended", ".receive", ".running"]


def test_bad_requests_are_refused_in_a_sentence(spool, app, poster):
    refused = {
        (413, None): lambda: poster.output(0, b"x" * (1024 * 1024 + 1)),
        (415, None): lambda: poster.output(0, b"x", **{"Content-Encoding": "gzip"}),
        (404, None): lambda: poster.output(0, b"x", "log"),
        (400, None): lambda: poster.output("-1", b"x"),
    }
    for wanted, call in refused.items():
        assert call() == wanted
    for key in ("../x", "", "a b"):
        assert Poster(app, (poster.url, poster.token), key).output(0, b"x") == (422, None)
    assert not (spool / "r").exists()
    for body, code in (("[]", 422), ("{", 422), ('{"state": "running"}', 410), ("{}", 410)):
        assert poster.ask("POST", "/completed", content=body).status_code == code
    assert poster.ask("POST", "/nothing").status_code == 404
    assert poster.ask("GET", "/completed").status_code == 405


def test_full_disk_is_waited_for(spool, app, poster, monkeypatch):
    poster.output(0, b"abc")
    write = os.write

    def full(fd, data):
        if os.fstat(fd).st_ino == (spool / "r" / "stdout").stat().st_ino:
            if len(data) <= 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[:1]
        return write(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert poster.output(3, b"def") == (507, None)
    assert poster.output(3, b"def") == (204, 6)
    assert stdout(spool) == b"abcdef"


# -- a receiver that died


def test_receiver_that_is_started_again_knows_everything(spool, app):
    expected, begun = Poster(app, app.expect("expected")), Poster(app, app.expect("begun"))
    begun.output(0, b"abc")
    app.close()
    assert chaperone.Spool(str(spool))["begun"].status().state == "unattended"
    app.__init__(type(app._callbacks.reception)(str(spool), URL))
    assert chaperone.Spool(str(spool))["begun"].status().state == "running"
    assert begun.output(3, b"d") == (204, 4)
    assert begun.completed(far_final(4, run_id="begun")).status_code == 204
    assert expected.output(0, b"x") == (204, 1)


def test_run_directory_that_is_damaged_harms_no_other(spool, app, poster):
    other = Poster(app, app.expect("other"))
    for each in (poster, other):
        each.output(0, b"abc")
    app.close()
    spec = json.loads((spool / "r/spec.json").read_text())
    del spec["key"]
    (spool / "r/spec.json").write_text(json.dumps(spec))
    app.__init__(type(app._callbacks.reception)(str(spool), URL))
    assert other.output(3, b"d") == (204, 4)
    assert poster.output(3, b"d") == (409, None)


def test_two_receivers_of_one_run_do_not_mix(spool, app, poster):
    poster.output(0, b"abc")
    second = agent.receiver(str(spool), URL)
    try:
        assert Poster(second, (poster.url, poster.token)).output(3, b"d") == (500, None)
    finally:
        second.close()
    assert poster.output(3, b"d") == (204, 4)


def test_expected_runs_that_never_came_are_forgotten(spool, app):
    poster = Poster(app, app.expect("r"))
    old = pathlib.Path(spool, ".receive", "r")
    os.utime(old, (0, 0))
    again(app, spool)
    assert not old.exists()
    assert poster.output(0, b"x") == (401, None)


def test_agent_that_is_silent_for_its_lease_is_lost(spool, app, poster, monkeypatch):
    monkeypatch.setattr("chaperone.agent.reception.LEASE_S", 0.2)
    monkeypatch.setattr("chaperone.agent.server.receiving.SILENT_S", 0.05)

    async def look():
        await poster._ask("POST", "/output/stdout", content=b"abc", headers={"Upload-Offset": "0"})
        asked = asyncio.ensure_future(poster._ask("GET", "/requests"))
        return (await asked).json()

    assert asyncio.run(look()) == {"requests": []}
    status = final(spool)
    assert (status["state"], status["stdout"]["bytes"]) == ("lost", 3)
    assert status["exception"]["message"] == "its agent was silent for 0.2 s"
    assert poster.output(3, b"d") == (410, None)
    assert poster.completed(far_final(3)).status_code == 410


# -- what is asked of the agent


def test_requests_reach_an_agent_that_asks(spool, poster):
    poster.output(0, b"abc")
    ask(spool, "signal USR1 by=me")
    ask(spool, "stop 5 by=ops")
    wanted = [(1, "signal SIGUSR1 by=me"), (2, "stop 5.0 by=ops")]
    assert poster.requests() == wanted
    assert poster.requests() == wanted  # until the agent has noted them
    assert poster.requests(1) == wanted[1:]
    ask(spool, "kill")
    assert poster.requests(2) == [(3, "kill")]


def test_question_waits_for_a_request(spool, app, poster):
    poster.output(0, b"")

    async def both():
        asked = asyncio.ensure_future(poster._ask("GET", "/requests"))
        while not app._callbacks._news:
            await asyncio.sleep(0)
        ask(spool, "stop")
        return (await asked).json()

    assert asyncio.run(both()) == {"requests": [{"seq": 1, "line": "stop"}]}


def test_end_ends_a_question_for_requests(app, poster):
    async def both():
        asked = asyncio.ensure_future(poster._ask("GET", "/requests"))
        while not app._callbacks._news:
            await asyncio.sleep(0)
        await poster._ask("POST", "/completed", json=far_final())
        return (await asked).json()

    assert asyncio.run(both()) == {"requests": []}
    assert poster.ask("GET", "/requests").status_code == 404


def test_stop_outlives_a_receiver_and_a_signal_does_not(spool, app, poster):
    """A stop may be repeated; a signal that may have been given out must not be."""
    poster.output(0, b"abc")
    ask(spool, "signal USR1")
    ask(spool, "stop 5 by=ops")
    assert len(poster.requests(40)) == 2
    again(app, spool)
    assert poster.requests(41) == [(42, "stop 5.0 by=ops")]
    again(app, spool)
    assert poster.requests(42) == [(43, "stop 5.0 by=ops")]
