"""
`read`: a part of a stream as JSON, for a caller that comes and goes.
"""

import base64
import json
import os
import random
import signal
import subprocess
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaperone.cli.verbs import pieces as verbs
from spool_tests.support.commands import ECHO, SLEEP, on_terminal, shell, streams
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import py
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

ENDED = {"run_id": "r", "stream": "stdout", "state": "terminated", "outcome": "0", "ended": True}


def bytes_of(piece):
    """What a piece has, and that its offsets say so."""
    data = piece["text"].encode() if "text" in piece else base64.b64decode(piece["base64"])
    assert piece["next"] == piece["offset"] + len(data)
    return data


@pytest.fixture
def read(chaperone):
    def piece(*words):
        result = chaperone("read", *words)
        assert (result.returncode, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return piece


def test_read_is_a_part_and_where_the_next_begins(chaperone, read):
    chaperone("run", "-", spec=shell("r", "printf 'h\\303\\244llo'; echo err >&2"))
    assert read("r") == {**ENDED, "offset": 0, "next": 6, "text": "hällo"}
    assert read("r", "--bytes", 1) == {**ENDED, "offset": 0, "next": 1, "text": "h", "ended": False}
    # A part that is smaller than a character has it all, and one that ends in it leaves it.
    assert read("r", "--offset", 1, "--bytes", 1)["text"] == "ä"
    assert read("r", "--bytes", 2)["text"] == "h"
    assert read("r", "--offset", 2, "--bytes", 2) == {
        **ENDED, "offset": 2, "next": 4, "ended": False, "base64": "pGw="
    }  # fmt: skip
    assert read("r", "stderr")["text"] == "err\n"
    assert read("r", "log") == {**ENDED, "stream": "log", "offset": 0, "next": 0, "text": ""}
    assert read("r", "--offset", 99) == {**ENDED, "offset": 99, "next": 99, "text": ""}


def test_read_shows_the_outcome_as_ls_does(chaperone, read):
    chaperone("run", "-", spec=ECHO)
    assert read("ec")["outcome"] == "3"
    chaperone("run", "-", spec={"id": "typo", "program": {"argv": ["/nowhere/x"]}})
    found = read("typo", "--wait", "5m")
    assert (found["state"], found["outcome"], found["ended"]) == ("error", "spawn", True)


def waiting_for(*words):
    """A `read --wait` that has begun to wait: it has an inotify instance."""
    process = subprocess.Popen(
        [*CHAPERONE, "read", *words, "--wait", "1h"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def fds():
        for fd in os.scandir(f"/proc/{process.pid}/fd"):
            try:
                yield os.readlink(fd.path)
            except FileNotFoundError:
                continue

    until(lambda: "anon_inode:inotify" in list(fds()))
    return process


def test_read_waits_for_something_new(chaperone, read, held, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    directory = held(shell("r", f"exec cat {tmp_path}/fifo"))
    with open(tmp_path / "fifo", "wb", buffering=0) as fifo:
        until(lambda: read("r")["state"] == "running")
        live = {**ENDED, "state": "running", "outcome": None, "ended": False, "offset": 0}
        assert read("r", "--wait", "0.1s") == {**live, "next": 0, "text": ""}
        with waiting_for("r") as waiting:
            fifo.write(b"\xc3")  # the beginning of a character is nothing yet
            until(lambda: (directory / "stdout").read_bytes())
            assert read("r", "--wait", "0.1s") == {**live, "next": 0, "text": ""}
            assert waiting.poll() is None
            fifo.write(b"\xa4")
            assert json.loads(waiting.stdout.read()) == {**live, "next": 2, "text": "ä"}
        fifo.write(b"\xc3")
    # If the end comes instead of the rest, it was none, and comes by itself.
    assert read("r", "--offset", 2, "--wait", "1h") == {
        **ENDED, "offset": 2, "next": 3, "base64": "ww=="
    }  # fmt: skip


def test_read_waits_for_the_end_of_a_silent_run(chaperone, read, held):
    held(SLEEP)
    with waiting_for("sleep", "stderr") as waiting:
        chaperone("stop", "--by", "ops", "sleep")
        found = json.loads(waiting.stdout.read())
    assert (found["outcome"], found["text"], found["ended"]) == ("SIGTERM (request)", "", True)


def test_read_says_what_a_capped_stream_lacks_as_tail_does(chaperone):
    chaperone("run", "-", spec=shell("r", "echo 1234567", output={"max_bytes": 4}))
    sentence = (
        "chaperone: 4 bytes of stdout were dropped:"
        " the limit was reached or the disk was full; the run's log says when\n"
    )
    result = chaperone("read", "r", "--bytes", 3)
    assert (json.loads(result.stdout)["text"], result.stderr) == ("123", "")
    result = chaperone("read", "r", "--offset", 3)
    assert (json.loads(result.stdout)["ended"], result.stderr) == (True, sentence)
    assert chaperone("tail", "r", "stdout").stderr == sentence


def test_read_goes_no_further_than_the_end_that_was_recorded(chaperone, read, spool):
    """What was left running may still write."""
    chaperone("run", "-", spec=shell("r", "echo one"))
    with open(spool / "r" / "stdout", "a") as late:
        late.write("two\n")
    assert read("r") == {**ENDED, "offset": 0, "next": 4, "text": "one\n"}


def test_read_of_a_run_whose_chaperone_was_killed_ends_it(chaperone, held):
    directory = held(shell("r", "echo ready; exec sleep 1000"))
    until(lambda: (directory / "stdout").read_bytes() == b"ready\n")
    status = json.loads((directory / "running.json").read_text())
    with waiting_for("r", "--offset", "6") as waiting:
        os.kill(status["chaperone_pid"], signal.SIGKILL)
        found = json.loads(waiting.stdout.read())
        told = waiting.stderr.read()
    end = {"state": "lost", "outcome": "chaperone", "ended": True, "text": "", "next": 6}
    assert found == {**ENDED, "offset": 6, **end}
    assert told.startswith("chaperone: the end of stdout may be missing: ")
    now = json.loads(chaperone("read", "r").stdout)
    assert now == {**ENDED, **end, "offset": 0, "text": "ready\n"}


def test_read_of_an_unattended_run_is_not_the_end(chaperone, read, held):
    directory = held({**SLEEP, "on_disconnect": "survive", "lease": 1000})
    until(lambda: read("sleep")["state"] == "running")
    pid = json.loads((directory / "running.json").read_text())["chaperone_pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: read("sleep")["state"] == "unattended")
    found = read("sleep", "--wait", "0.1s")
    assert (found["state"], found["outcome"], found["ended"]) == ("unattended", None, False)
    assert chaperone("adopt", "--detach", "sleep").returncode == 0
    assert streams(chaperone("stop", "sleep")) == (0, "", "")


def test_run_that_is_deleted_while_it_is_read_is_one_sentence(chaperone, held, spool):
    held(SLEEP)
    with waiting_for("sleep") as waiting:
        os.rename(spool / "sleep", spool / "gone")
        (spool / ".running" / "sleep").unlink()
        try:
            assert (
                waiting.stderr.read() == "chaperone: unable to read run 'sleep': it was deleted\n"
            )
        finally:
            os.rename(spool / "gone", spool / "sleep")
    assert waiting.returncode == os.EX_NOINPUT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "log", "--wait", "1s"], "'log' with --wait: want stdout or stderr"),
        (["x", "stdin"], "'stdin': want stdout, stderr or log"),
        (["x", "--bytes", "0"], "'--bytes': want a whole number of at least 1, got '0'"),
        (["x", "--offset=-1"], "'--offset': want a whole number of at least 0, got '-1'"),
        (["x", "--offset", "1e3"], "'--offset': want a whole number of at least 0, got '1e3'"),
        (["x", "--wait", "9"], "'--wait': want an age such as 90s, 30m, 12h or 7d, got '9'"),
    ],
)
def test_words_that_read_does_not_take(chaperone, words, sentence):
    answer = f"chaperone: unable to understand {sentence}\n"
    assert streams(chaperone("read", *words)) == (os.EX_USAGE, "", answer)


def test_read_is_indented_on_a_terminal_and_moves_no_cursor(chaperone):
    chaperone("run", "-", spec=shell("r", "printf '\\033[2J\\177'"))
    code, written = on_terminal("read", "r")
    assert code == 0 and b"\x1b" not in written and b"\x7f" not in written
    assert json.loads(written) == {**ENDED, "offset": 0, "next": 5, "text": "\x1b[2J\x7f"}


# -- a client that goes on at `next` has every byte once


def test_client_in_a_loop_gets_every_byte_of_a_live_run(chaperone, read, held):
    """Its program writes text in pieces that end anywhere, and then bytes that are none."""
    seed = random.randrange(2**32)
    text = "".join(random.Random(seed).choices("aä€😀\n", k=3_000)).encode() + b"\xf0\x9f"
    script = f"import os, random, time; r = random.Random({seed}); data = {text!r}\n"
    script += "while data: n = os.write(1, data[:r.randrange(1, 400)]); data = data[n:]"
    held({"id": "r", "program": py(script)})
    got, offset = b"", 0
    while True:
        piece = read("r", "--offset", offset, "--bytes", 997, "--wait", "1h")
        assert "text" in piece or piece["ended"], "text is cut at characters alone"
        got += bytes_of(piece)
        offset = piece["next"]
        if piece["ended"]:
            break
    assert got == text, seed


class Printed:
    """A terminal for one verb."""

    def __init__(self):
        self.texts = []

    def text(self, text):
        self.texts.append(text)

    def note(self, sentence):
        pass

    def is_terminal(self):
        return False


UTF8 = st.text(st.sampled_from("a\0é\u07ff\u0800€\uffff\U00010000😀"), max_size=6)
PARTS = st.lists(UTF8.map(str.encode) | st.binary(max_size=5), max_size=6).map(b"".join)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=PARTS, cut=st.integers(0, 40), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9)
)
def test_client_in_a_loop_gets_every_byte_whatever_they_are(chaperone, spool, data, cut, sizes):
    """First while the run lives and has written a part, then from there to its end."""
    directory = spool / "r"
    if not directory.exists():
        chaperone("run", "-", spec=shell("r", "exit 0"))
        ended = json.loads((directory / "status.json").read_text())
        (directory / "ended.json").write_text(json.dumps(ended))
    ended = json.loads((directory / "ended.json").read_text())
    (directory / "stdout").write_bytes(data)
    got, offset, number = b"", 0, 0
    for end in (min(cut, len(data)), len(data)):
        # As far as a reader goes is what the status says.
        ended["stdout"]["bytes"] = end
        (directory / "status.json").write_text(json.dumps(ended))
        while True:
            size = sizes[number % len(sizes)]
            words = {"offset": str(offset), "bytes": str(size), "spool": str(spool)}
            given_words = types.SimpleNamespace(run="r", stream="stdout", wait=None, **words)
            terminal = Printed()
            assert verbs.read.call(given_words, terminal) == os.EX_OK
            piece = json.loads("".join(terminal.texts))
            part = bytes_of(piece)
            assert part or piece["ended"], "no progress"
            assert len(part) <= max(size, 4)
            got, offset, number = got + part, piece["next"], number + 1
            if piece["ended"]:
                break
        assert got == data[:end]
