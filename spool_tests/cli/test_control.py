"""
stop, kill, signal, exec and check.
"""

import json
import os
import re
import signal
import subprocess

import pytest

from chaperone.cli import common
from chaperone.farside import payload
from spool_tests.support.commands import ECHO, READY, SLEEP, shell, streams
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

# -- asking


def test_stop_returns_when_the_run_has_ended(chaperone, held):
    directory = held(SLEEP)
    assert streams(chaperone("stop", "--by", "ops", "sle")) == (0, "", "")
    final = json.loads((directory / "status.json").read_text())
    assert (final["signal"], final["stop"]["reason"], final["stop"]["by"]) == (
        "SIGTERM",
        "request",
        "ops",
    )
    assert streams(chaperone("stop", "sleep")) == (0, "", ""), "what has ended is stopped"


def test_stop_with_no_grace_kills_what_will_not_stop(chaperone, held):
    directory = held(shell("deaf", "trap '' TERM; echo ready; while :; do sleep 1; done"))
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "--grace", "0.1", "deaf")) == (0, "", "")
    assert json.loads((directory / "status.json").read_text())["signal"] == "SIGKILL"


def test_stop_need_not_wait(chaperone, held):
    directory = held(shell("slow", "trap '' TERM; echo ready; exec sleep 1000"))
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "--no-wait", "slow")) == (0, "", "")
    until(lambda: json.loads((directory / "running.json").read_text())["state"] == "stopping")
    assert streams(chaperone("kill", "slow")) == (0, "", "")
    assert json.loads((directory / "status.json").read_text())["signal"] == "SIGKILL"


def test_stop_asks_all_before_it_waits_for_one(chaperone, held):
    held({**SLEEP, "id": "a"})
    held({**SLEEP, "id": "b"})
    assert streams(chaperone("stop", "a", "b", "a")) == (0, "", "")
    assert streams(chaperone("wait", "a", "b")) == (143, "", "")


def test_signal_reaches_the_program(chaperone, held):
    directory = held(
        shell("trap", "trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.01; done")
    )
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("signal", "trap", "usr1")) == (0, "", "")
    assert streams(chaperone("wait", "trap")) == (4, "", "")


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_stop_passes_over_what_it_can_not_ask(chaperone, held, spool, tmp_path, verb):
    chaperone("run", "--id", "bad", "-", spec=ECHO)
    (spool / "bad").chmod(0o777)
    (tmp_path / "backup").hardlink_to(spool / "bad" / "status.json")
    directory = held(SLEEP)
    sentence = (
        "chaperone: unable to send a request to run 'bad': unable to open 'status.json': want a"
        " file of this user without other hard links\n"
    )
    assert streams(chaperone(verb, "bad", "sleep")) == (os.EX_IOERR, "", sentence)
    assert (directory / "status.json").exists()


@pytest.mark.parametrize("name", ["SIGRTMIN+3", "rtmin+3", str(signal.SIGRTMIN + 3)])
def test_signal_takes_every_name_that_a_status_tells(chaperone, spool, name):
    assert (
        chaperone("run", "--detach", "-", spec={**READY, "stop": {"signal": name}}).returncode == 0
    )
    until(lambda: (spool / "ready" / "stdout").read_bytes())
    assert streams(chaperone("signal", "ready", name)) == (0, "", "")
    assert streams(chaperone("wait", "ready")) == (128 + signal.SIGRTMIN + 3, "", "")
    assert json.loads(chaperone("status", "ready").stdout)["signal"] == "SIGRTMIN+3"


def test_stop_sends_a_real_time_signal_that_the_spec_names(chaperone, held):
    directory = held({**READY, "stop": {"signal": "RTMIN+3", "grace_period": 60}})
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "ready")) == (0, "", "")
    found = json.loads((directory / "status.json").read_text())
    assert (found["signal"], found["stop"]["signal"]) == ("SIGRTMIN+3", "SIGRTMIN+3")


def test_signal_that_is_none_or_comes_too_late_is_refused(chaperone):
    chaperone("run", "-", spec=ECHO)
    sentence = "unable to signal run 'echo': want a signal's name such as 'SIGTERM', got 'FROB'"
    assert streams(chaperone("signal", "echo", "FROB")) == (
        os.EX_DATAERR,
        "",
        f"chaperone: {sentence}\n",
    )
    assert streams(chaperone("signal", "echo", "TERM")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to send a request to run 'echo': its chaperone is not running\n",
    )


# -- exec


def test_exec_joins_its_streams_to_ours(chaperone, spool):
    assert streams(chaperone("exec", "-", spec=ECHO)) == (3, "out\n", "err\n")
    assert list(spool.iterdir()) == []


def test_exec_stops_its_program_by_our_signal(spool, tmp_path):
    (tmp_path / "s").write_text(
        json.dumps(
            shell("x", "trap 'echo bye; exit 6' TERM; echo ready; while :; do sleep 0.01; done")
        )
    )
    with subprocess.Popen([*CHAPERONE, "exec", tmp_path / "s"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == b"bye\n"
    assert process.returncode == 6


def test_exec_drops_what_nobody_reads_and_says_so(chaperone):
    reading, writing = os.pipe()
    os.close(reading)
    result = chaperone(
        "exec", "-", spec=shell("x", "echo out; exit 3"), stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert result.returncode == 3
    assert re.fullmatch(
        r"\S+Z stdout: bytes are dropped from offset 0 on: Broken pipe\n", result.stderr
    )


# -- check


def test_check_tells_what_would_be_run_and_no_secret(chaperone, tmp_path):
    spec = {
        "program": {
            "argv": ["/opt/load", "a b"],
            "env": {"TOKEN": "s3cret"},
            "stdin": "s3cret",
            "inherit_env": ["PATH"],
            "umask": "022",
        },
        "callback": {"url": "https://scheduler:8443/etl", "token": "s3cret"},
        "labels": {"team": "etl"},
        "timeouts": {"run": 90},
        "output": {"timeline": True},
    }
    result = chaperone("check", "-", spec=spec, cwd=tmp_path)
    user = common.user_name()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "run:      an id that is made at the start\n"
        f"program:  here, as {user}: /opt/load 'a b'\n"
        f"cwd:      {tmp_path}\n"
        "env:      PATH of ours; set: TOKEN\n"
        "stdin:    a text of 6 bytes\n"
        "process:  umask 022\n"
        "output:   through a pipe, no limit, what the disk refuses is dropped and counted; "
        "a timeline records when it came\n"
        "timeouts: connect 30 s, run 90 s, idle -\n"
        "stop:     SIGTERM, SIGKILL 60 s later; leftovers: stop\n"
        "life:     ends with its chaperone\n"
        "callback: POST to https://scheduler:8443/etl with its token, 65536 bytes at once and 1 s "
        "late at most; again every 10 s, stopped after 86400 s without an answer\n"
        "labels:   team=etl\n"
    )


def test_check_tells_of_a_stop_that_asks_the_program_alone(chaperone):
    spec = {"program": {"argv": ["ls"]}, "stop": {"to": "program", "grace_period": 5}}
    assert (
        "stop:     SIGTERM to the program alone, SIGKILL 5 s later; leftovers: stop\n"
        in chaperone("check", "-", spec=spec).stdout
    )


def test_check_tells_of_the_lease(chaperone):
    spec = {"program": {"argv": ["ls"]}, "renew": 2400}
    life = "life:     ends with its chaperone; stopped 2400 s after the last renewal\n"
    assert life in chaperone("check", "-", spec=spec).stdout


def test_check_tells_every_hop(chaperone):
    remote = {"host": "db3", "user": "etl", "mode": "ssh-then-sudo"}
    lines = chaperone(
        "check", "-", spec={"program": {"argv": ["ls"]}, "remote": remote}
    ).stdout.splitlines()
    assert lines[1].startswith(f"hop 1:    here, as {common.user_name()}: ssh -T ")
    assert lines[2].startswith("hop 2:    on db3, as whom ssh makes us: sudo -n -H -u etl -- ")
    assert lines[3] == "program:  on db3, as etl: ls"


def test_check_prints_the_text_for_the_far_side_and_no_secret(chaperone):
    spec = {
        "program": {"argv": ["/opt/load"], "env": {"TOKEN": "s3cret"}, "stdin": "s3cret"},
        "remote": {"host": "db3"},
    }
    result = chaperone("check", "--far-side", "-", spec=spec)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        "/opt/load" in result.stdout
        and "export TOKEN=" in result.stdout
        and "s3cret" not in result.stdout
    )
    assert payload.SUPERVISOR in result.stdout
    sentence = "unable to show the payload: the program runs here, as a child of its chaperone"
    assert streams(chaperone("check", "--far-side", "-", spec=ECHO)) == (
        os.EX_USAGE,
        "",
        f"chaperone: {sentence}\n",
    )
