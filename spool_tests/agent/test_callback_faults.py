"""
A receiver as bad as can be, and an agent that is killed: each byte is posted once, each program is
started once, each signal is sent at most once.
"""

import os
import random
import signal

import pytest

from spool_tests.support.posting import agent, begin, files_with, kill, log, posted
from spool_tests.support.processes import processes_with
from spool_tests.support.receiver_double import TOKEN, ReceiverDouble, faults
from spool_tests.support.runs import final
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once
NEW = "callback: posted only while `chaperone agent` or `chaperone serve` runs here"
QUICK = {"retry_frequency": 0.005, "output_buffer": 8_192, "output_latency": 0}
LINES = "for i in 1 2 3 4 5 6 7 8; do seq 2000; seq 300 >&2; sleep 0.02; done"


@pytest.fixture
def receiver(tmp_path):
    with ReceiverDouble(tmp_path) as double:
        yield double


def assert_all_arrived(spool, receiver):
    for name, data in receiver.streams.items():
        kept = (spool / "PROG-ID" / name).read_bytes()
        assert len(data) == len(kept) and bytes(data) == kept, name
    status = final(spool, "PROG-ID")
    assert {**status, "key": receiver.final["key"]} == receiver.final


@pytest.mark.parametrize("seed", range(2))
def test_receiver_that_fails_gets_each_byte_once(spool, tmp_path, seed):
    with ReceiverDouble(tmp_path, fault=faults(seed)) as receiver:
        assert posted(receiver.spec(["/bin/sh", "-c", LINES], config=QUICK))[0] == 0
        assert_all_arrived(spool, receiver)


@pytest.mark.parametrize("seed", range(1))
def test_agent_that_is_killed_goes_on_where_the_receiver_is(spool, tmp_path, seed):
    source = random.Random(seed)
    count = tmp_path / "count"
    text = f"echo x >>{count}; {LINES}"
    with ReceiverDouble(tmp_path, fault=faults(seed, 0.2)) as receiver:
        spec = receiver.spec(["/bin/sh", "-c", text], config={**QUICK, "output_buffer": 2_048})
        for _ in range(4):
            process = begin(spec)
            answered = len(receiver.posts) + source.randrange(12)
            until(lambda: len(receiver.posts) >= answered or process.poll() is not None)  # noqa: B023
            kill(process)
        assert posted(spec)[0] == 0
        assert_all_arrived(spool, receiver)
    assert count.read_text() == "x\n"


def test_receiver_that_is_down_for_a_while_gets_everything(spool, receiver):
    receiver.close()
    with agent(receiver.spec(["/bin/sh", "-c", "seq 30000; echo done >&2"])) as process:
        until(lambda: (spool / "PROG-ID" / "status.json").exists())
        until(lambda: len(log(spool)) > 2)
        receiver.listen()
        assert process.wait(60) == 0
    assert_all_arrived(spool, receiver)
    refused = "unable to connect: Connection refused; trying again every 0.05 s"
    first, *others = log(spool)
    assert (first, sorted(others)) == (
        NEW,
        [f"unable to {what} {receiver.url}: {refused}" for what in ("ask", "post to")],
    )


def test_run_whose_receiver_is_silent_for_too_long_is_stopped(spool, receiver):
    receiver.fault = lambda route: 503
    spec = receiver.spec(["sleep", "1000"], config={"timeout": 0.5}, renew=1_000)
    code, out, err = posted(spec)
    assert (code, err) == (
        os.EX_TEMPFAIL,
        "chaperone: unable to post all of run 'PROG-ID': nothing was acknowledged for 0.5 s\n",
    )
    status = final(spool, "PROG-ID")
    assert (status["signal"], status["stop"]["by"]) == ("SIGTERM", "callback")
    said = "the receiver acknowledged nothing for 0.5 s: the run is stopped"
    assert said in log(spool)
    # Started again it posts the rest.
    receiver.fault = lambda route: None
    patient = {**spec, "config": {"timeout": 60}}
    assert posted(patient)[0] == 0 and receiver.final["signal"] == "SIGTERM"


def test_silent_program_goes_on_while_its_receiver_is_there(spool, receiver):
    """A sign of life is an empty post, after a quarter of the time."""
    with agent(receiver.spec(["sleep", "1000"], config={"timeout": 8})) as process:
        receiver.wait(lambda: ("output/stdout", "0", 0, 204) in receiver.posts)
        process.terminate()
        assert process.wait(60) == 0
    assert receiver.final["stop"]["by"] == "agent"


def test_run_ends_by_itself_where_its_agent_was_killed(spool, receiver):
    spec = receiver.spec(["sleep", "1000"], config={"timeout": 2})
    process = begin(spec)
    process.stdout.readline()
    kill(process)
    until(lambda: (spool / "PROG-ID" / "status.json").exists())
    assert final(spool, "PROG-ID")["stop"]["reason"] == "lease"
    patient = {**spec, "config": {"timeout": 60}}
    assert posted(patient)[0] == 0 and receiver.final["stop"]["reason"] == "lease"


def test_receiver_that_has_another_run_ends_the_posting(spool, receiver):
    receiver.final = {"another": "end"}
    code, _, err = posted(receiver.spec(["true"]))
    assert (code, err) == (
        os.EX_PROTOCOL,
        "chaperone: unable to post all of run 'PROG-ID': the receiver refuses it\n",
    )
    assert log(spool) == [
        NEW,
        f"the receiver {receiver.url} refuses the run: it has another one, or another end",
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            {"code": 204},
            "it answered with HTTP status 204: want the size of stdout in its answer, got none",
        ),
        (
            {"code": 204, "offset": 1},
            "it has 1 bytes of stdout after it took 4",
        ),
        (
            {"code": 204, "offset": 10**9},
            "it has 1000000000 bytes of stdout, but the run has only 4: "
            "it may have another run's bytes, or the run's file was truncated",
        ),
        ({"code": 200, "offset": 4}, "it answered with HTTP status 200"),
        ({"code": 307, "offset": 4}, "it answered with HTTP status 307"),
        ({"code": 200, "body": b"x" * 70_000}, "its answer has more than 65536 bytes"),
    ],
)
def test_answer_that_is_none_is_tried_again(spool, receiver, answer, reason):
    wrong = [answer]
    receiver.fault = lambda route: wrong.pop() if wrong and route == "output/stdout" else None
    assert posted(receiver.spec(["/bin/sh", "-c", "echo out"]))[0] == 0
    assert receiver.streams["stdout"] == b"out\n"
    assert log(spool) == [
        NEW,
        f"unable to post to {receiver.url}: {reason}; trying again every 0.05 s",
    ]


# -- TLS and tokens


def test_receiver_with_another_authority_hears_nothing(spool, receiver, tmp_path):
    (tmp_path / "other").mkdir()
    with ReceiverDouble(tmp_path / "other") as other:
        why = "its certificate is refused: unable to get local issuer certificate"
        sentence = f"unable to post to {other.url}: {why}; trying again every 0.05 s"
        with agent(receiver.spec(["true"], callback={"url": other.url})) as process:
            process.stdout.readline()
            until(lambda: sentence in log(spool))
        assert other.heads == []


def test_token_of_a_file_is_read_again_and_is_nowhere_else(spool, receiver, tmp_path):
    file = tmp_path / "token"
    file.write_text("old-token\n")
    text = "echo ready; exec sleep 1000"
    spec = receiver.spec(["/bin/sh", "-c", text], callback={"token": None, "token_file": str(file)})
    with agent(spec) as process:
        receiver.wait(lambda: ("output/stdout", "0", 6, 401) in receiver.posts)
        file.write_text(f"{TOKEN}\n")
        receiver.wait(lambda: receiver.streams["stdout"] == b"ready\n")
        shown = process.stdout.read()
        process.terminate()
        assert process.wait(60) == 0
        shown += process.stderr.read()
    assert f"unable to post to {receiver.url}: it answered with HTTP status 401; " in "".join(
        log(spool)
    )
    assert TOKEN not in shown and files_with(TOKEN, spool) == []


def test_token_is_only_in_the_spec(spool, receiver):
    with agent(receiver.spec(["sleep", "1000"])) as process:
        process.stdout.readline()
        for pid in (process.pid, *processes_with(b"CHAPERONE_RUN_ID=PROG-ID")):
            for name in ("cmdline", "environ"):
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    assert TOKEN.encode() not in file.read()
        process.terminate()
        assert process.wait(60) == 0
    assert files_with(TOKEN, spool) == ["spec.json"]


def test_token_that_is_not_kept_is_on_no_disk(spool, receiver):
    assert posted(receiver.spec(["echo"], keep_secrets=False))[0] == 0
    assert files_with(TOKEN, spool) == []
    assert posted(receiver.spec(["echo"], keep_secrets=False))[0] == 0


# -- what the receiver asks


def test_receiver_stops_the_program(spool, receiver):
    receiver.requests = []
    with agent(receiver.spec(["sleep", "1000"])) as process:
        process.stdout.readline()
        receiver.ask("stop 5 by=ops")
        assert process.wait(60) == 0
    assert (receiver.final["signal"], receiver.final["stop"]["by"]) == ("SIGTERM", "ops")


def test_request_that_is_none_is_skipped(spool, receiver):
    receiver.requests = ["rm -rf /", "signal NONE", "kill"]
    assert posted(receiver.spec(["sleep", "1000"]))[0] == 0
    assert (receiver.final["signal"], receiver.final["stop"]["by"]) == ("SIGKILL", "callback")
    assert log(spool) == [
        NEW,
        "unable to take the receiver's request 'rm -rf /': it is invalid",
        "unable to take the receiver's request 'signal NONE': it is invalid",
    ]


@pytest.mark.parametrize("seed", range(1))
def test_signal_comes_at_most_once_whatever_dies(spool, tmp_path, seed):
    source = random.Random(seed)
    names = [f"signal {source.choice(['USR1', 'USR2'])} by=ops" for _ in range(20)]
    text = "trap 'echo 1' USR1; trap 'echo 2' USR2; echo ready; while :; do sleep 0.01; done"
    with ReceiverDouble(tmp_path, fault=faults(seed, 0.3)) as receiver:
        spec = receiver.spec(["/bin/sh", "-c", text], config=QUICK)
        process = begin(spec)
        receiver.wait(lambda: receiver.streams["stdout"].startswith(b"ready\n"))
        receiver.requests = []
        for line in names:
            receiver.ask(line)
            if source.random() < 0.3:
                kill(process)
                process = begin(spec)
        note = spool / "PROG-ID" / "callback"
        until(lambda: note.exists() and f"request {len(names)}\n" in note.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.communicate()
    noted = [line for line in note.read_text().splitlines() if line.startswith("request")]
    assert noted == [f"request {number}" for number in range(1, len(names) + 1)]
    assert len(receiver.streams["stdout"].split()) - 1 <= len(names)


def test_receiver_that_acknowledges_what_cannot_be_is_given_up(spool, receiver):
    receiver.fault = lambda route: {"code": 204, "offset": 10**9} if "output" in route else None
    spec = receiver.spec(["/bin/sh", "-c", "echo out"], config={"timeout": 1.5})
    assert posted(spec)[0] == os.EX_TEMPFAIL


def test_run_that_is_deleted_ends_its_agent(spool, receiver, chaperone):
    receiver.fault = lambda route: 503
    with agent(receiver.spec(["/bin/sh", "-c", "echo out"])) as process:
        until((spool / "PROG-ID" / "status.json").exists)
        until(lambda: "unable to post to" in "".join(log(spool)))
        assert chaperone("rm", "PROG-ID").returncode == 0
        assert process.wait(60) == os.EX_NOINPUT
        said = process.stderr.read()
    assert said == "chaperone: unable to post all of run 'PROG-ID': it was deleted\n"
