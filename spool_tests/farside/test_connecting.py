"""
Attempts to connect: what a stand-in for ssh says of them.
"""

import os
import re
import signal

import pytest

from spool_tests.support.failures import children
from spool_tests.support.far import held, log
from spool_tests.support.runs import final, sh, start
from spool_tests.support.waiting import patiently, until

# -- connecting: what a stand-in records of attempts


REFUSING = """#!/bin/sh
# An ssh that refuses so many attempts, and is slow to connect; an attempt writes `+` into a file
# when it begins, and `-` when it is through.
for last; do :; done
echo + >>"$ATTEMPTS"
case $FAILS in
after-ready) echo chaperone-ready-1 >&2; read -r line; echo "Connection refused" >&2; exit 255 ;;
esac
[ "$SLOW" != ever ] || exec sleep 1000
[ "$SLOW" != then-ever ] || [ "$(grep -c + <"$ATTEMPTS")" = 1 ] || exec sleep 1000
[ "$SLOW" != then-ever ] || SLOW=0
sleep "$SLOW"
echo - >>"$ATTEMPTS"
[ "$(grep -c + <"$ATTEMPTS")" -gt "$FAILS" ] || { echo "Connection refused" >&2; exit 255; }
exec /bin/sh -c "$last"
"""


@pytest.fixture
def refusing(tmp_path, monkeypatch):
    """
    Put the stand-in in ssh's place: refusing(fails, slow); returns a function that lists the
    attempts, `+` and `-`.
    """
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "ssh").write_text(REFUSING)
    (directory / "ssh").chmod(0o755)
    attempts = tmp_path / "attempts"
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("ATTEMPTS", str(attempts))

    def set_up(fails, slow="0"):
        monkeypatch.setenv("FAILS", str(fails))
        monkeypatch.setenv("SLOW", slow)
        return lambda: attempts.read_text().split() if attempts.exists() else []

    return set_up


def test_attempt_that_fails_is_made_again_until_it_is_ready(spool, refusing):
    attempts = refusing(3)
    assert held(spool, None, sh("exit 4"), remote={"host": "there"})["return_code"] == 4
    assert attempts().count("+") == 4
    assert log(spool).count("unable to connect: Connection refused; the next attempt is in ") == 3


def test_attempts_end_when_the_time_for_connecting_is_over(spool, refusing):
    attempts = refusing(1_000)

    def attempt(number, time_s):
        before = attempts().count("+") if number else 0
        there = {"remote": {"host": "there"}, "timeouts": {"connect": time_s}}
        status = held(spool, None, sh("exit 4"), f"r{number}", **there)
        assert (status["state"], status["started"]) == ("error", False)
        found = (status["exception"]["stage"], status["exception"]["message"])
        refused = ("connect", "unable to connect: Connection refused")
        return found == refused and attempts().count("+") >= before + 2

    patiently(attempt, 1, 8, 30)


def test_attempt_that_is_cut_off_leaves_the_reason_of_the_one_before(spool, refusing, tmp_path):

    def attempt(number, time_s):
        attempts = refusing(1_000, slow="then-ever")
        (tmp_path / "attempts").unlink(missing_ok=True)
        there = {"remote": {"host": "there"}, "timeouts": {"connect": time_s}}
        status = held(spool, None, sh("exit 4"), f"r{number}", **there)
        assert status["started"] is False
        found = (status["exception"]["stage"], status["exception"]["message"])
        refused = ("connect", "unable to connect: Connection refused")
        return found == refused and attempts() == ["+", "-", "+"]

    patiently(attempt, 2, 8, 30)


def test_nothing_is_tried_again_after_the_ready_word(spool, refusing):
    attempts = refusing("after-ready")
    status = held(spool, None, sh("exit 4"), remote={"host": "there"})
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        "far-side",
        None,
    )
    assert attempts() == ["+"]


def test_attempts_of_runs_that_began_together_do_not_stay_together(spool, refusing):
    refusing(1_000)

    def attempt(number, time_s):
        there = {"remote": {"host": "there"}, "timeouts": {"connect": time_s}}
        names = [f"r{number}-{one}" for one in range(6)]
        runs = [start(spool, sh("exit 4"), name, **there) for name in names]
        assert [run.wait(60) for run in runs] == [0] * 6
        pauses = {
            tuple(re.findall(r"next attempt is in ([\d.]+) s", log(spool, name))) for name in names
        }
        assert {float(pause) for run in pauses for pause in run[:1]} <= {0.1, 0.2, 0.3}
        return len(pauses) > 1  # otherwise each waited as long as the others

    patiently(attempt, 1.5, 6, 20)


def test_eight_at_most_are_connecting_and_the_others_wait(spool, refusing):
    attempts = refusing(0, slow="0.5")
    runs = [
        start(spool, sh("exit 4"), f"r{number}", remote={"host": "there"}) for number in range(14)
    ]
    assert [run.wait(60) for run in runs] == [0] * 14
    assert {final(spool, f"r{number}")["return_code"] for number in range(14)} == {4}
    connecting, most = 0, 0
    for word in attempts():
        connecting += 1 if word == "+" else -1
        most = max(most, connecting)
    assert connecting == 0 and 1 < most <= 8


def test_slots_are_free_again_when_their_holder_dies(spool, refusing):
    """
    Eight chaperones that connect for ever hold all slots; one's SIGKILL lets the ninth through,
    with nothing cleared up by anybody.
    """
    refusing(0, slow="ever")
    holders = [
        start(spool, sh("exit 4"), f"r{number}", remote={"host": "there"}) for number in range(8)
    ]
    pids = [
        until(lambda number=number: children(holders[number].pid, "sleep")) for number in range(8)
    ]
    refusing(0)
    status = held(
        spool, None, sh("exit 4"), "waits", remote={"host": "there"}, timeouts={"connect": 1}
    )
    assert (status["exception"]["stage"], status["started"]) == ("connect", False)
    assert (
        status["exception"]["message"]
        == "unable to connect: all 8 connection slots for this host were in use for 1 s"
    )
    assert (
        held(spool, None, sh("exit 4"), "elsewhere", remote={"host": "other"})["return_code"] == 4
    )
    holders[3].kill()
    holders[3].wait()
    assert (
        held(
            spool, None, sh("exit 4"), "ninth", remote={"host": "there"}, timeouts={"connect": 300}
        )["return_code"]
        == 4
    )
    os.kill(
        pids[3][0], signal.SIGKILL
    )  # it would have given up by itself at the end of its time for connecting
    for holder in holders:
        holder.terminate()
    assert [holder.wait(60) for holder in holders] == [0, 0, 0, -9, 0, 0, 0, 0]


def test_message_of_several_lines_is_one_message(spool, tmp_path, monkeypatch):
    """As a newer docker refuses; its later lines in our log are no words of a client's own."""
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'echo "docker: Error response: unable to find user etl: no matching entries" >&2\n'
        "printf \"\\nRun 'docker run --help' for more information\\n\" >&2\n"
        "exit 125\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    remote = {"hops": [{"docker": {"image": "etl:3", "user": "etl"}}]}
    status = held(spool, None, sh("echo ran"), remote=remote)
    assert (status["state"], status["started"]) == ("error", False)
    assert (status["exception"]["stage"], status["exception"]["message"]) == (
        "usage",
        "unable to connect: docker: Error response: unable to find user etl: no matching entries"
        " Run 'docker run --help' for more information",
    )
