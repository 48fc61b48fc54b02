"""
`chaperone agent < program.json`: what it prints, what it posts, what it refuses, how it ends.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from spool_tests.support.places import ROOT
from spool_tests.support.posting import agent, log, posted
from spool_tests.support.receiver_double import TOKEN, ReceiverDouble
from spool_tests.support.runs import final
from spool_tests.support.specs import SEED

pytestmark = pytest.mark.once


@pytest.fixture
def receiver(tmp_path):
    with ReceiverDouble(tmp_path) as double:
        yield double


def test_program_is_run_and_posted(spool, receiver):
    spec = receiver.spec(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
    code, out, err = posted(spec)
    assert (code, err, out.count("\n")) == (0, "", 1)
    status = final(spool, "PROG-ID")
    shown = json.loads(out)
    assert list(shown) == (
        "proc_id state program agent_pid pid exception status return_code signal rusage "
        "start_time end_time".split()
    )
    assert (shown["proc_id"], shown["state"], shown["pid"]) == ("PROG-ID", "running", status["pid"])
    assert shown["start_time"] == status["start_time"]
    assert {name for name, value in shown.items() if value is None} == {
        *"exception status return_code signal rusage end_time".split()
    }
    assert (bytes(receiver.streams["stdout"]), bytes(receiver.streams["stderr"])) == (
        b"out\n",
        b"err\n",
    )
    key = json.loads((spool / "PROG-ID" / "spec.json").read_text())["key"]
    assert receiver.final == {**status, "key": key} and status["return_code"] == 3
    assert os.listdir(spool / ".ended") == os.listdir(spool / ".running") == []


def test_seeds_file_is_posted_where_its_program_is_not_there(spool, receiver):
    spec = {
        **SEED,
        "callback": {**SEED["callback"], "url": receiver.url, "ca": str(receiver.ca_file)},
    }
    code, out, err = posted(spec)
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["proc_id"], shown["state"], shown["pid"]) == ("PROG-ID", "error", None)
    assert shown["exception"] == receiver.final["exception"] == final(spool, "PROG-ID")["exception"]
    assert shown["exception"]["type"] == "FileNotFoundError"
    assert log(spool) == [
        "callback: posted only while `chaperone agent` or `chaperone serve` runs here",
        "callback.method: GET is treated as POST: a GET carries no output",
    ]


def test_every_post_has_its_length_and_the_token_and_is_not_chunked(spool, receiver):
    spec = receiver.spec(["/bin/sh", "-c", "seq 5000"], config={"output_buffer": 1_000})
    proxy = "http://127.0.0.1:9"  # is not asked
    environ = {**os.environ, "HTTPS_PROXY": proxy, "https_proxy": proxy, "ALL_PROXY": proxy}
    assert posted(spec, env=environ)[0] == 0
    heads = [{name.lower(): value for name, value in head.items()} for head in receiver.heads]
    assert all(head["authorization"] == f"Bearer {TOKEN}" for head in heads)
    posts = [head for head in heads if head.get("content-length")]
    assert len(posts) == sum(route != "requests" for route, *_ in receiver.begun)
    assert not any("transfer-encoding" in head or "content-encoding" in head for head in heads)
    sizes = [length for route, _, length, _ in receiver.posts if route == "output/stdout"]
    assert max(sizes) == 1_000 and sum(sizes) == len(receiver.streams["stdout"])


def test_program_of_a_run_that_is_known_is_not_started_again(spool, receiver, tmp_path):
    count = tmp_path / "count"
    spec = receiver.spec(["/bin/sh", "-c", f"echo x >>{count}; echo out"])
    assert posted(spec)[0] == 0
    code, out, err = posted(spec)
    assert (code, err, count.read_text()) == (0, "", "x\n")
    assert (json.loads(out)["state"], json.loads(out)["return_code"]) == ("terminated", 0)
    other = {**spec, "program": {"argv": ["true"]}}
    sentence = (
        "unable to start run 'PROG-ID': it exists, with another program or another callback.url"
    )
    assert posted(other) == (os.EX_CANTCREAT, "", f"chaperone: {sentence}\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"callback": None}, "callback: required field is missing"),
        (
            {"callback": {"url": "http://h/", "token": "hunter2"}},
            "callback.url: want a URL that begins with 'https://', got one that begins with "
            "'http://'",
        ),
        (
            {"config": {"buffer": 1}},
            "config.buffer: unknown field; want one of output_buffer, output_latency, "
            "retry_frequency, timeout",
        ),
    ],
)
def test_file_that_is_wrong_is_refused_before_anything_runs(spool, receiver, change, sentence):
    code, out, err = posted({**receiver.spec(["true"]), **change})
    assert (code, out) == (os.EX_DATAERR, "")
    assert err == f"chaperone: unable to read spec 'program.json': {sentence}\n"
    assert not (spool / "PROG-ID").exists()


def test_authorities_that_cannot_be_read_are_refused_before_anything_runs(spool, receiver):
    spec = receiver.spec(["true"], callback={"ca": "/nowhere"})
    assert posted(spec) == (
        os.EX_DATAERR,
        "",
        "chaperone: unable to trust the authorities in '/nowhere': No such file or directory\n",
    )
    assert not (spool / "PROG-ID").exists()


def test_sigterm_goes_to_the_program(spool, receiver):
    text = "trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.02; done"
    with agent(receiver.spec(["/bin/sh", "-c", text])) as process:
        receiver.wait(lambda: receiver.streams["stdout"] == b"ready\n")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert receiver.streams["stdout"] == b"ready\nheard\n"
    stop = receiver.final["stop"]
    assert (receiver.final["return_code"], stop["signal"], stop["by"]) == (5, "SIGTERM", "agent")


def test_stdout_ends_when_the_program_runs(spool, receiver):
    with agent(receiver.spec(["sleep", "1000"])) as process:
        shown = json.loads(process.stdout.read())
        assert (shown["state"], shown["agent_pid"]) == ("running", process.pid)
        process.terminate()
        assert process.wait(60) == 0


def test_package_that_is_missing_is_named(spool, tmp_path):
    hidden = "import sys; sys.modules['httpx'] = None; from chaperone.cli import main; "
    code = f"{hidden}sys.exit(main.main(['agent']))"
    result = subprocess.run(
        [sys.executable, "-c", code], input="{}", capture_output=True, text=True, cwd=ROOT
    )
    why = "want the package httpx (pip install 'chaperone-spool[agent]')"
    assert (result.returncode, result.stdout, result.stderr) == (
        os.EX_UNAVAILABLE,
        "",
        f"chaperone: unable to perform 'agent': {why}\n",
    )


def test_second_agent_of_a_run_waits_for_the_first(spool, receiver):
    spec = receiver.spec(["/bin/sh", "-c", "echo ready; exec sleep 1000"])
    with agent(spec) as first, agent(spec) as second:
        shown = [json.loads(process.stdout.read()) for process in (first, second)]
        assert shown[0]["pid"] == shown[1]["pid"]
        assert [each["agent_pid"] for each in shown] == [first.pid, second.pid]
        second.terminate()
        assert (first.wait(60), second.wait(60)) == (0, 0)
    assert receiver.streams["stdout"] == b"ready\n"
    assert [route for route, *_ in receiver.posts].count("completed") == 1
