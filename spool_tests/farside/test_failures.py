"""
What is promised per failure of a far side: a test for each row of the table in the docs that has
none elsewhere, and the tie between both.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import tempfile

import pytest

from spool_tests.support import sshd as server
from spool_tests.support.failures import children
from spool_tests.support.far import far_processes, held, log, session_of, sudo
from spool_tests.support.places import ROOT
from spool_tests.support.runs import final, running, sh, start, stdout
from spool_tests.support.waiting import need, patiently, until

HERE = pathlib.Path(ROOT, "spool_tests")

# Each row of the table in docs/far-side.rst, by how it begins, and the tests that show it.
ROWS = {
    "no connection, no such name": [
        "farside/test_remote.py::test_failure_to_connect_is_an_error_with_ssh_s_words",
        "farside/test_connecting.py::test_attempt_that_fails_is_made_again_until_it_is_ready",
    ],
    "no login, wrong host key, sudo refuses": [
        "farside/test_remote.py::test_failure_to_connect_is_an_error_with_ssh_s_words"
    ],
    "login shell exits, hangs or reads standard input": [
        "farside/test_remote.py::test_noise_of_startup_files_goes_to_the_log"
    ],
    "payload cut in the middle": [
        "farside/test_failures.py::test_payload_that_was_cut_runs_nothing",
        "farside/test_connecting.py::test_nothing_is_tried_again_after_the_ready_word",
        "farside/test_supervisor.py::test_nothing_runs_of_a_payload_that_was_cut",
    ],
    "no such cwd or program, not executable, exec fails,": [
        "farside/test_tracking.py::test_exec_that_fails_is_said_and_not_started",
        "farside/test_remote.py::test_failure_to_start_is_an_error_and_proven",
        "farside/test_supervisor.py::test_what_can_not_be_started_is_said_and_not_started",
    ],
    "the program exits, 255 included": [
        "farside/test_remote.py::test_every_exit_code_and_signal_is_told_exactly"
    ],
    "the program is killed by a signal": [
        "farside/test_remote.py::test_every_exit_code_and_signal_is_told_exactly",
        "farside/test_little.py::test_status_and_log_say_what_can_not_be_known",
    ],
    "chaperone killed, ``kill``": [
        "farside/test_cut.py::test_nothing_is_left_when_something_of_the_connection_is_killed"
    ],
    "ssh client killed, ``kill``": [
        "farside/test_cut.py::test_nothing_is_left_when_something_of_the_connection_is_killed"
    ],
    "sshd's session killed, ``kill``": [
        "farside/test_cut.py::test_nothing_is_left_when_something_of_the_connection_is_killed"
    ],
    "an ssh behind a sudo ends, ``kill``": [
        "farside/test_failures.py::test_last_words_of_an_ssh_behind_a_sudo_stand_in_stderr"
    ],
    "silent cut, longer than the lease, ``kill``": [
        "farside/test_cut.py::test_silent_cut_ends_the_program_by_its_lease"
    ],
    "silent cut, shorter than lease and keepalive": [
        "farside/test_cut.py::test_short_cut_is_as_if_nothing_had_been"
    ],
    "connection lost after the program's end, ``kill``": [
        "farside/test_failures.py::test_connection_that_is_lost_after_the_end_keeps_the_outcome"
    ],
    "the spool stalls, shorter than the lease": [
        "farside/test_lost_parts.py::test_spool_that_stalls_for_less_than_the_lease_loses_nothing"
    ],
    "the spool stalls, longer than the lease, ``kill``": [
        (
            "farside/test_lost_parts.py::test_spool_that_stalls_for_longer_than_the_lease"
            "_ends_the_program"
        )
    ],
    "the shell that waits for the program is killed": [
        "farside/test_lost_parts.py::test_program_goes_on_without_the_shell_that_waits_for_it"
    ],
    "the shell that reads control lines is killed": [
        (
            "farside/test_lost_parts.py::test_program_is_ended_without_the_shell_that_hea"
            "rs_control_lines"
        )
    ],
    "the shell that sshd started is killed": [
        (
            "farside/test_lost_parts.py::test_death_of_the_shell_that_sshd_started_is_the"
            "_end_of_the_connection"
        )
    ],
    "any cut, ``survive``": [
        "farside/test_survive.py::test_no_byte_is_lost_or_doubled_by_cuts_and_deaths"
    ],
    "no chaperone for longer than the lease, ``survive``": [
        "farside/test_unattended.py::test_lease_ends_what_nobody_asks_for"
    ],
    "the far host reboots": [
        "farside/test_lost_parts.py::test_far_host_that_boots_anew_has_lost_the_run"
    ],
    "the near host reboots, ``survive``": [
        "farside/test_survive.py::test_run_goes_on_when_the_host_of_its_chaperone_boots_anew"
    ],
}

STAND_IN = """#!/bin/sh
# An ssh without a network, that keeps what it is sent.
for last; do :; done
/bin/sh -c 'echo $$ >"$SENT.pid"; exec tee "$SENT"' | {
    /bin/sh -c "$last"
    code=$?
    kill "$(cat "$SENT.pid")"
    exit $code
}
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
def test_what_check_shows_is_what_is_sent_but_for_random_words_and_secrets(
    life, stdin, spool, stand_in, chaperone
):
    program = sh(
        'printf %s "$K"; cat',
        env={"K": "s3cr3t of env"},
        stdin=stdin,
        cwd="/",
        umask="027",
        rlimits={"nofile": 100},
    )
    spec = {
        "id": "r",
        "program": program,
        "remote": {"host": "there"},
        "on_disconnect": life,
        "stop": {"grace_period": 2},
        "lease": 90,
    }
    shown = chaperone("check", "--far-side", "-", spec=spec).stdout
    assert "s3cr3t" not in shown
    assert (
        start(
            spool,
            program,
            **{name: value for name, value in spec.items() if name not in ("id", "program")},
        ).wait(30)
        == 0
    )
    assert (
        final(spool)["return_code"] == 0
        and stdout(spool) == b"s3cr3t of env" + (stdin or "").encode()
    )
    sent = stand_in.read_text()
    end = re.search(r"^@[0-9a-f]{16}$", sent, re.MULTILINE)
    text = sent[: end.end()] + "\n"
    found = {
        name: re.search(rf"^{name}='(.*)'$", text, re.MULTILINE)[1]
        for name in ("nonce", "cookie", "stdin_name")
    }
    key = json.loads((spool / "r" / "spec.json").read_text())["key"]
    for random, word in (
        (end[0], "@END"),
        (found["nonce"], "NONCE"),
        (found["cookie"], "COOKIE"),
        (found["stdin_name"], "NAME"),
        (key[-8:], "COOKIE"),
    ):
        assert random in text or (random, life) == (key[-8:], "kill"), random
        text = text.replace(random, word)
    size = str(end.start() - sent.index("\n", sent.index("bs=")) - 1)
    text = text.replace(f"bs={size}", "bs=BYTES")
    assert text.replace("s3cr3t of env", "(a value that is not shown)") == shown


# -- the table


def rows_of_the_table():
    """
    The first column: a row begins where there is something in the third one that does not go on
    from the line above.
    """
    text = pathlib.Path(ROOT, "docs/far-side.rst").read_text()
    table = text[text.index("\nWhat is promised per failure\n") :].split("\n====")
    width = table[1].index(" ") + 4
    assert table[2].startswith("=") and table[3].startswith("=")
    return [line[:width].strip() for line in table[2].splitlines()[1:] if line[:width].strip()]


def test_each_row_of_the_table_is_shown_by_a_test():
    rows = [row for row in rows_of_the_table() if row not in ("no interpreter, a limit refused",)]
    assert rows == list(ROWS)
    for name in [name for names in ROWS.values() for name in names]:
        file, test = name.split("::")
        assert f"\ndef {test}(" in (HERE / file).read_text(), name


# -- its rows


FORCED = """#!/bin/sh
# What sshd runs instead of the command: it passes on so many bytes of its input as a file of the
# test says; then maybe the session dies.
read -r bytes then <"${0%/*}/forced.says"
if [ "$bytes" = all ]; then exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"; fi
head -c "$bytes" | /bin/sh -c "$SSH_ORIGINAL_COMMAND"
code=$?
[ "$then" != die ] || kill -KILL $PPID
exit $code
"""


@pytest.fixture(scope="module")
def forced():
    """
    An sshd that passes on as much of a command's input as its `says` has: "1000", "1000 die" or
    "all".
    """
    need("sshd", "ssh", "ssh-keygen", "pgrep")
    directory = tempfile.mkdtemp(prefix="chaperone-forced-")
    script = pathlib.Path(directory, "forced")
    script.write_text(FORCED)
    script.chmod(0o755)
    there = server.Sshd(directory, more=f"ForceCommand {script}")
    there.says = pathlib.Path(directory, "forced.says").write_text
    try:
        yield there
    finally:
        there.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_payload_that_was_cut_runs_nothing(life, spool, forced, tmp_path):
    forced.says("1000")
    remote = forced.remote(remote_dir=str(tmp_path / "far"))
    status = held(
        spool, None, {"argv": ["touch", str(tmp_path / "ran")]}, remote=remote, on_disconnect=life
    )
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        "far-side",
        False,
    )
    assert (
        status["exception"]["message"]
        == "unable to find out whether the program was started: the connection ended: code 97"
    )
    if life == "kill":
        forced.says("1000 die")
        status = held(
            spool, None, {"argv": ["touch", str(tmp_path / "ran")]}, "unseen", remote=remote
        )
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "error",
            "far-side",
            None,
        )
    assert not (tmp_path / "ran").exists()


def test_payload_that_was_cut_while_attaching_says_nothing_of_the_start(spool, forced, tmp_path):
    forced.says("all")
    script = "echo up; while [ ! -e go ]; do sleep 0.05; done; exit 5"
    process = start(
        spool,
        sh(script, cwd=str(tmp_path)),
        remote=forced.remote(remote_dir=str(tmp_path / "far")),
        on_disconnect="survive",
    )
    until(lambda: stdout(spool))
    forced.says("1000")
    os.kill(running(spool)["connection"]["pid"], signal.SIGKILL)
    until(lambda: "code 97" in log(spool))
    forced.says("all")
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert (final(spool)["state"], final(spool)["return_code"], final(spool)["complete"]) == (
        "terminated",
        5,
        True,
    )


def test_forced_command_can_be_run_bare_alone(spool, tmp_path):
    """A host that runs what it likes and no sh of ours."""
    need("sshd", "ssh", "ssh-keygen", "pgrep")
    directory = tempfile.mkdtemp(prefix="chaperone-forced-")
    there = server.Sshd(directory, more="ForceCommand echo of its own; cat; exit 6")
    try:
        bounded = {"remote": there.remote(), "timeouts": {"connect": 10}}
        status = held(spool, None, sh("exit 0", stdin="in\n"), "supervised", **bounded)
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "error",
            "far-side",
            False,
        )
        status = held(
            spool, None, sh("exit 0", stdin="in\n"), "bare", remote=there.remote(supervise=False)
        )
        assert (status["state"], status["return_code"], status["complete"]) == (
            "terminated",
            6,
            True,
        )
        assert (status["pid"], status["rusage"], status["leftovers"]) == (None, None, None)
        assert stdout(spool, "bare") == b"of its own\nin\n"
    finally:
        there.close()
        shutil.rmtree(directory, ignore_errors=True)


STUBBORN_SUDO = """#!/bin/sh
# A sudo that never gets through and passes no signal on; it writes each down.
trap 'echo TERM >>"$TOLD"' TERM
while [ ! -e "$TOLD.go" ]; do sleep 0.05; done
echo ended >>"$TOLD"
exit 1
"""


def test_sudo_is_never_killed_however_long_it_takes(spool, tmp_path, monkeypatch):
    """Its child would live on; an ssh that takes as long is."""
    directory, told = tmp_path / "bin", tmp_path / "told"
    directory.mkdir()
    for name in ("sudo", "ssh"):
        (directory / name).write_text(STUBBORN_SUDO)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(told))
    told.touch()

    def kills_ssh(number, time_s):
        there = {"remote": {"host": "there"}, "timeouts": {"connect": time_s}}
        assert held(spool, None, sh("true"), f"ssh-{number}", **there)["started"] is False
        return told.read_text() == "TERM\n"  # it had its trap by then

    def waits_for_sudo(number, time_s):
        run_id, before = f"sudo-{number}", told.read_text().count("TERM")
        remote = {"mode": "sudo", "user": "somebody"}
        process = start(spool, sh("true"), run_id, remote=remote, timeouts={"connect": time_s})
        until(lambda: told.read_text().count("TERM") >= before + 2 or process.poll() is not None)
        (tmp_path / "told.go").touch()
        assert process.wait(60) == 0
        (tmp_path / "told.go").unlink()
        assert (final(spool, run_id)["state"], final(spool, run_id)["started"]) == ("error", False)
        return told.read_text().endswith("TERM\nended\n")

    patiently(kills_ssh, 0.5, 3, 15)
    patiently(waits_for_sudo, 0.5, 3, 15)


@sudo
def test_last_words_of_an_ssh_behind_a_sudo_stand_in_stderr(spool, sshd):
    need("sudo", "ss")
    process = start(
        spool,
        sh("echo up; exec sleep 1000"),
        remote=sshd.remote(mode="sudo-then-ssh"),
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    (client,) = children(running(spool)["connection"]["pid"], "ssh")
    for pid in session_of(sshd, client):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"], status["complete"]) == ("lost", True, False)
    assert (
        spool / "r" / "stderr"
    ).read_bytes() == b"Connection to 127.0.0.1 closed by remote host.\r\n"
    until(lambda: not far_processes(spool))


@pytest.mark.parametrize(
    "life, complete", [("kill", False), pytest.param("survive", True, marks=pytest.mark.long)]
)
def test_connection_that_is_lost_after_the_end_keeps_the_outcome(
    life, complete, spool, sshd, tmp_path
):
    leftover = "trap 'echo TERM came' TERM; echo up; while :; do sleep 0.05; done"
    script = f'setsid sh -c "{leftover}" & while [ ! -e go ]; do sleep 0.05; done; exit 3'
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    process = start(
        spool,
        sh(script, cwd=str(tmp_path)),
        remote=remote,
        on_disconnect=life,
        stop={"grace_period": 10},
    )
    until(lambda: stdout(spool))
    (tmp_path / "go").touch()
    # The end was reported: what the program left has its grace now.
    until(lambda: stdout(spool) == b"up\nTERM came\n")
    os.kill(running(spool)["connection"]["pid"], signal.SIGKILL)
    assert process.wait(60) == 0
    status = final(spool)
    left = 1 if life == "survive" else None  # the connection went before they were counted
    assert (status["state"], status["return_code"], status["complete"], status["leftovers"]) == (
        "terminated",
        3,
        complete,
        left,
    ), log(spool)
    until(lambda: not far_processes(spool))
