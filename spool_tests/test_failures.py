"""What is promised per failure of a far side: a test for each row of the table in the docs that has none elsewhere, and the tie between both."""

import json
import os
import re

import pytest

from spool_tests.test_supervise import final, sh, start, stdout

STAND_IN = """#!/bin/sh
# An ssh without a network, that keeps what it is sent.
for last; do :; done
exec tee "$SENT" | /bin/sh -c "$last"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An `ssh` that runs its command here; returns the path where it keeps what came in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "ssh").write_text(STAND_IN)
    (directory / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("SENT", str(tmp_path / "sent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "sent"


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize("stdin", [None, "s3cr3t of stdin"])
def test_what_check_shows_is_what_is_sent_but_for_random_words_and_secrets(life, stdin, spool, stand_in, chaperone):
    program = sh('printf %s "$K"; cat', env={"K": "s3cr3t of env"}, stdin=stdin, cwd="/", umask="027", rlimits={"nofile": 100})
    spec = {"id": "r", "program": program, "remote": {"host": "there"}, "on_disconnect": life, "stop": {"grace_period": 2}, "lease": 90}
    shown = chaperone("check", "--far-side", "-", spec=spec).stdout
    assert "s3cr3t" not in shown
    assert start(spool, program, **{name: value for name, value in spec.items() if name not in ("id", "program")}).wait(30) == 0
    assert final(spool)["return_code"] == 0 and stdout(spool) == b"s3cr3t of env" + (stdin or "").encode()
    sent = stand_in.read_text()
    end = re.search(r"^@[0-9a-f]{16}$", sent, re.MULTILINE)
    text = sent[: end.end()] + "\n"
    found = {name: re.search(rf"^{name}='(.*)'$", text, re.MULTILINE)[1] for name in ("nonce", "cookie", "stdin_name")}
    key = json.loads((spool / "r" / "spec.json").read_text())["key"]
    for random, word in ((end[0], "@END"), (found["nonce"], "NONCE"), (found["cookie"], "COOKIE"), (found["stdin_name"], "NAME"), (key[-8:], "COOKIE")):
        assert random in text or (random, life) == (key[-8:], "kill"), random
        text = text.replace(random, word)
    assert text.replace("s3cr3t of env", "(a value that is not shown)") == shown
