"""
What is promised per failure of a far side: a test for each row of the table in the docs that has
none elsewhere, and the tie between both.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import tempfile
import time

import pytest

from spool_tests import sshd as server
from spool_tests.conftest import ROOT, need, until
from spool_tests.test_remote import far_processes, held, log, session_of, sudo
from spool_tests.test_supervise import final, py, running, sh, start, stdout

sshd = server.sshd
HERE = pathlib.Path(__file__).parent

# Each row of the table in docs/far-side.rst, by how it begins, and the tests that show it.
ROWS = {
    "no connection, no such name": [
        "test_remote.py::test_failure_to_connect_is_an_error_with_ssh_s_words",
        "test_failures.py::test_attempt_that_fails_is_made_again_until_it_is_ready",
    ],
    "no login, wrong host key, sudo refuses": [
        "test_remote.py::test_failure_to_connect_is_an_error_with_ssh_s_words"
    ],
    "login shell exits, hangs or reads standard input": [
        "test_remote.py::test_noise_of_startup_files_goes_to_the_log"
    ],
    "payload cut in the middle": [
        "test_failures.py::test_payload_that_was_cut_runs_nothing",
        "test_failures.py::test_nothing_is_tried_again_after_the_ready_word",
        "test_farside.py::test_nothing_runs_of_a_payload_that_was_cut",
    ],
    "no such cwd or program, not executable, exec fails,": [
        "test_tracking.py::test_exec_that_fails_is_said_and_not_started",
        "test_remote.py::test_failure_to_start_is_an_error_and_proven",
        "test_farside.py::test_what_can_not_be_started_is_said_and_not_started",
    ],
    "the program exits, 255 included": [
        "test_remote.py::test_every_exit_code_and_signal_is_told_exactly"
    ],
    "the program is killed by a signal": [
        "test_remote.py::test_every_exit_code_and_signal_is_told_exactly",
        "test_little.py::test_status_and_log_say_what_can_not_be_known",
    ],
    "chaperone or ssh client killed": [
        "test_remote.py::test_nothing_is_left_when_something_of_the_connection_is_killed"
    ],
    "sshd's session killed": [
        "test_remote.py::test_nothing_is_left_when_something_of_the_connection_is_killed"
    ],
    "an ssh behind a sudo ends": [
        "test_failures.py::test_last_words_of_an_ssh_behind_a_sudo_stand_in_stderr"
    ],
    "silent cut, longer than the lease": [
        "test_remote.py::test_silent_cut_ends_the_program_by_its_lease"
    ],
    "silent cut, shorter than lease and keepalive": [
        "test_remote.py::test_short_cut_is_as_if_nothing_had_been"
    ],
    "connection lost after the program's end": [
        "test_failures.py::test_connection_that_is_lost_after_the_end_keeps_the_outcome"
    ],
    "the spool stalls, shorter than the lease": [
        "test_failures.py::test_spool_that_stalls_for_less_than_the_lease_loses_nothing"
    ],
    "the spool stalls, longer than the lease": [
        "test_failures.py::test_spool_that_stalls_for_longer_than_the_lease_ends_the_program"
    ],
    "the shell that waits for the program killed": [
        "test_failures.py::test_program_goes_on_without_the_shell_that_waits_for_it"
    ],
    "the shell that reads control lines killed": [
        "test_failures.py::test_program_is_ended_without_the_shell_that_hears_control_lines"
    ],
    "the shell that sshd started killed": [
        "test_failures.py::test_death_of_the_shell_that_sshd_started_is_the_end_of_the_connection"
    ],
    "any cut, ``survive``": ["test_survive.py::test_no_byte_is_lost_or_doubled_by_cuts_and_deaths"],
    "no chaperone for longer than the lease, ``survive``": [
        "test_survive.py::test_lease_ends_what_nobody_asks_for"
    ],
    "the far host reboots": ["test_failures.py::test_far_host_that_boots_anew_has_lost_the_run"],
    "the near host reboots, ``survive``": [
        "test_survive.py::test_run_goes_on_when_the_host_of_its_chaperone_boots_anew"
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
# What sshd runs instead of the command: the first so many bytes of its input, by a file of the test's; then maybe the session dies.
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
    An sshd that passes on as much of a command's input as its `says` tells: "1000", "1000 die" or
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
        status["exception"]["message"] == "unable to know whether the program was started: code 97"
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
    until(lambda: "code 97" in log(spool), 20)
    forced.says("all")
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
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
        status = held(
            spool,
            None,
            sh("exit 0", stdin="in\n"),
            "supervised",
            remote=there.remote(),
            timeouts={"connect": 2},
        )
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
# A sudo that never gets through and passes no signal on; it tells of each.
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
    assert (
        held(spool, None, sh("true"), "ssh", remote={"host": "there"}, timeouts={"connect": 0.5})[
            "started"
        ]
        is False
    )
    assert told.read_text() == "TERM\n"
    process = start(
        spool, sh("true"), remote={"mode": "sudo", "user": "somebody"}, timeouts={"connect": 0.5}
    )
    until(lambda: told.read_text().count("TERM") >= 1 + 2, 20)
    (tmp_path / "told.go").touch()
    assert process.wait(20) == 0
    assert told.read_text().endswith("TERM\nended\n")
    assert (final(spool)["state"], final(spool)["started"]) == ("error", False)


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
    assert process.wait(20) == 0
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
        stop={"grace_period": 4},
    )
    until(lambda: stdout(spool))
    (tmp_path / "go").touch()
    until(
        lambda: stdout(spool) == b"up\nTERM came\n"
    )  # the end was told: what the program left has its grace now
    os.kill(running(spool)["connection"]["pid"], signal.SIGKILL)
    assert process.wait(30) == 0
    status = final(spool)
    left = 1 if life == "survive" else None  # the connection went before they were counted
    assert (status["state"], status["return_code"], status["complete"], status["leftovers"]) == (
        "terminated",
        3,
        complete,
        left,
    ), log(spool)
    until(lambda: not far_processes(spool))


def stalled(process, seconds):
    """A chaperone that does nothing, as one whose spool does not answer."""
    process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + seconds)
    finally:
        process.send_signal(signal.SIGCONT)


def test_spool_that_stalls_for_less_than_the_lease_loses_nothing(spool, sshd):
    text = "import os,random,hashlib\nr=random.Random(7);h=hashlib.sha256()\nfor _ in range(300):\n d=r.randbytes(r.randrange(1,70000));h.update(d)\n"
    text += " while d: d=d[os.write(1,d):]\nos.write(2,h.hexdigest().encode())"
    process = start(
        spool,
        py(text),
        remote=sshd.remote(options={"ServerAliveInterval": 1, "ServerAliveCountMax": 2}),
        lease=60,
    )
    until(lambda: stdout(spool))
    stalled(process, 4)  # longer than the client waits for its keepalives
    assert process.wait(30) == 0
    status = final(spool)
    assert (
        status["state"],
        status["return_code"],
        status["signal"],
        status["stop"],
        status["complete"],
    ) == ("terminated", 0, None, None, True), log(spool)
    assert (
        hashlib.sha256(stdout(spool)).hexdigest().encode() == (spool / "r" / "stderr").read_bytes()
    )


def test_spool_that_stalls_for_longer_than_the_lease_ends_the_program(spool, sshd):
    process = start(
        spool,
        sh("echo up; exec sleep 1000"),
        remote=sshd.remote(),
        lease=1,
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: not far_processes(spool))
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["stop"]["reason"]) == (
        "terminated",
        "SIGTERM",
        "lease",
    )
    assert "heard nothing for 1 s, its lease: it ends the program" in log(spool)


def parent(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def name_of(pid):
    return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()


def children(pid, name=None):
    found = map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if name in (None, name_of(child))]


def waiting_shell(program_pid):
    """
    W, as the text calls it: it waits for a subshell, that waits for awk, that waits for the
    program.
    """
    return parent(parent(parent(program_pid)))


def hearing_shell(program_pid):
    """R: beside W, with the lease's watchdog below it and nothing else."""
    below = waiting_shell(program_pid)
    while name_of(above := parent(below)) == "sh":
        for shell in children(above, "sh"):
            if shell != below and [name_of(child) for child in children(shell)] == ["sh"]:
                return shell
        below = above
    return None


LONG = pytest.mark.long  # they wait for heartbeats and for the patience after them
WAITING = "echo up; while [ ! -e go ]; do sleep 0.05; done; echo down"


@pytest.mark.parametrize("life", [pytest.param("kill", marks=LONG), "survive"])
def test_program_goes_on_without_the_shell_that_waits_for_it(life, spool, sshd, tmp_path):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    process = start(
        spool, sh(WAITING, cwd=str(tmp_path)), remote=remote, on_disconnect=life, lease=4
    )
    until(lambda: stdout(spool))
    os.kill(waiting_shell(running(spool)["pid"]), signal.SIGKILL)
    (tmp_path / "go").touch()
    until(lambda: stdout(spool) == b"up\ndown\n")
    assert process.wait(30) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["signal"], status["complete"]) == (
        "lost",
        None,
        None,
        False,
    ), log(spool)
    assert (
        status["exception"]["message"]
        == "the part of the far side that would have told how the program ended is gone"
    )
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", pytest.param("survive", marks=LONG)])
def test_program_is_ended_without_the_shell_that_hears_control_lines(life, spool, sshd, tmp_path):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    process = start(
        spool,
        sh(WAITING, cwd=str(tmp_path)),
        remote=remote,
        on_disconnect=life,
        lease=8,
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    os.kill(until(lambda: hearing_shell(running(spool)["pid"])), signal.SIGKILL)
    until(lambda: not far_processes(spool))
    assert process.wait(30) == 0
    status = final(spool)
    assert (status["state"], status["signal"]) == ("terminated", "SIGTERM"), log(spool)
    assert life == "survive" or not status["complete"]
    assert status["stop"]["reason"] == "disconnect"
    assert (
        "the far side can't hear us any more, as a part of it is gone: it ends the program"
        in log(spool)
    )
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_death_of_the_shell_that_sshd_started_is_the_end_of_the_connection(
    life, spool, sshd, tmp_path
):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    process = start(
        spool,
        sh(f"trap '' TERM; {WAITING}", cwd=str(tmp_path)),
        remote=remote,
        on_disconnect=life,
        stop={"grace_period": 0.4},
    )
    until(lambda: stdout(spool))
    (session,) = [
        pid for pid in session_of(sshd, running(spool)["connection"]["pid"]) if children(pid, "sh")
    ]
    os.kill(*children(session, "sh"), signal.SIGKILL)
    if life == "survive":
        until(
            lambda: (found := running(spool)["connection"])["drops"] and found["state"] == "up", 20
        )
        (tmp_path / "go").touch()
    assert process.wait(30) == 0
    status = final(spool)
    found = (
        status["state"],
        status["return_code"],
        status["signal"],
        status["complete"],
        (status["stop"] or {}).get("reason"),
    )
    assert found == (
        ("terminated", 0, None, True, None)
        if life == "survive"
        else ("terminated", None, "SIGKILL", False, "disconnect")
    ), log(spool)
    assert not far_processes(spool)
    until(lambda: list(tmp_path.glob("far/*")) == [])


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_far_host_that_boots_anew_has_lost_the_run(life, spool, sshd, tmp_path):
    """
    As far as one machine can show it: all of the far side is killed at once, and the boot it noted
    is not the one that there is.
    """
    process = start(
        spool,
        sh("echo up; exec sleep 1000"),
        remote=sshd.remote(remote_dir=str(tmp_path / "far")),
        on_disconnect=life,
        lease=4,
    )
    until(lambda: stdout(spool))
    session = parent(running(spool)["pid"])
    while name_of(session) != "sshd":
        session = parent(session)
    everything = [session]
    for pid in everything:
        everything += children(pid)
    process.send_signal(signal.SIGSTOP)  # as long as it takes to boot
    for pid in everything:
        with contextlib.suppress(ProcessLookupError):  # a sleep that was over
            os.kill(pid, signal.SIGKILL)
    if life == "survive":
        (directory,) = (tmp_path / "far").glob("*")
        (directory / "reader").write_text(
            f"{os.getpid()} another-boot\n"
        )  # its number belongs to somebody else now
    process.send_signal(signal.SIGCONT)
    assert process.wait(40) == 0
    status = final(spool)
    assert (status["state"], status["started"], status["return_code"], status["complete"]) == (
        "lost",
        True,
        None,
        False,
    ), log(spool)
    assert not far_processes(spool)
    until(lambda: list(tmp_path.glob("far/*")) == [])


# -- connecting: what a stand-in tells of attempts


REFUSING = """#!/bin/sh
# An ssh that refuses so many attempts, and is slow to connect; attempts begin with a `+` in a file and are through with a `-`.
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
    Put the stand-in in ssh's place: refusing(fails, slow); returns a function that tells the
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
        return lambda: attempts.read_text().split()

    return set_up


def test_attempt_that_fails_is_made_again_until_it_is_ready(spool, refusing):
    attempts = refusing(3)
    assert held(spool, None, sh("exit 4"), remote={"host": "there"})["return_code"] == 4
    assert attempts().count("+") == 4
    assert log(spool).count("unable to connect: Connection refused; the next attempt is in ") == 3


def test_attempts_end_when_the_time_for_connecting_is_over(spool, refusing):
    attempts = refusing(1_000)
    status = held(spool, None, sh("exit 4"), remote={"host": "there"}, timeouts={"connect": 1})
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        "connect",
        False,
    )
    assert status["exception"]["message"] == "unable to connect: Connection refused"
    assert attempts().count("+") >= 2


def test_attempt_that_is_cut_off_leaves_the_reason_of_the_one_before(spool, refusing):
    attempts = refusing(1_000, slow="then-ever")
    status = held(spool, None, sh("exit 4"), remote={"host": "there"}, timeouts={"connect": 2})
    assert (status["exception"]["stage"], status["exception"]["message"]) == (
        "connect",
        "unable to connect: Connection refused",
    )
    assert (status["started"], attempts()) == (False, ["+", "-", "+"])


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
    runs = [
        start(
            spool, sh("exit 4"), f"r{number}", remote={"host": "there"}, timeouts={"connect": 1.5}
        )
        for number in range(6)
    ]
    assert [run.wait(30) for run in runs] == [0] * 6
    pauses = {
        tuple(re.findall(r"next attempt is in ([\d.]+) s", log(spool, f"r{number}")))
        for number in range(6)
    }
    assert len(pauses) > 1, "each waited as long as the others"
    assert {float(pause) for run in pauses for pause in run[:1]} <= {0.1, 0.2, 0.3}


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
        == "unable to connect: all 8 slots for this host stayed taken for 1 s"
    )
    assert (
        held(spool, None, sh("exit 4"), "elsewhere", remote={"host": "other"})["return_code"] == 4
    )
    holders[3].kill()
    holders[3].wait()
    assert (
        held(
            spool, None, sh("exit 4"), "ninth", remote={"host": "there"}, timeouts={"connect": 20}
        )["return_code"]
        == 4
    )
    os.kill(
        pids[3][0], signal.SIGKILL
    )  # it would have given up by itself at the end of its time for connecting
    for holder in holders:
        holder.terminate()
    assert [holder.wait(30) for holder in holders] == [0, 0, 0, -9, 0, 0, 0, 0]
