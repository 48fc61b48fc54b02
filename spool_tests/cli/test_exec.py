"""`chaperone exec` beside a reader of its output that is slow, or takes nothing any more."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import termios

import pytest

from spool_tests.support.commands import shell
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

FLOOD = "while :; do echo 0123456789012345678901234567890123456789; done"
HERE = {"hops": [{"exec": {"argv": ["env"]}}]}  # a far side without a network


def pipe():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4_096)
    return reading, writing


def terminal():
    """One that was stopped by Ctrl-S."""
    reading, writing = pty.openpty()
    termios.tcflow(writing, termios.TCOOFF)
    return reading, writing


def connection():
    return tuple(end.detach() for end in socket.socketpair())


@contextlib.contextmanager
def executing(spec, output, **streams):
    """`chaperone exec` of a spec, its stdout a writing end; the reading end is not read."""
    reading, writing = output
    process = subprocess.Popen(
        [*CHAPERONE, "exec", "-"], stdin=subprocess.PIPE, **{"stdout": writing, **streams}
    )
    process.stdin.write(json.dumps(spec).encode())
    process.stdin.close()
    os.close(writing)
    try:
        yield process
    finally:
        os.close(reading)
        process.kill() if process.poll() is None else None
        process.wait()
        process.stderr.close() if process.stderr else None


@pytest.mark.parametrize(
    ("output", "number"),
    [(pipe, signal.SIGTERM), (terminal, signal.SIGINT), (connection, signal.SIGTERM)],
)
def test_signal_is_heard_while_the_output_takes_nothing(spool, tmp_path, output, number):
    text = f"echo $$ >{tmp_path}/pid; {FLOOD}"
    with executing(shell("x", text), output(), stderr=subprocess.PIPE) as process:
        pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        looks = []
        until(lambda: is_stuck(pid, looks), what="the program waits for room")
        process.send_signal(number)
        assert process.wait(60) == 128 + signal.SIGTERM
        sentence = r"\S+Z stdout: bytes are dropped from offset \d+ on: its reader takes nothing\n"
        assert re.fullmatch(sentence, process.stderr.read().decode())


def is_stuck(pid, looks):
    """Whether a program is in the same system call at five looks one after the other."""
    with open(f"/proc/{pid}/syscall") as file:
        looks.append(file.read())
    return len(looks) > 5 and len(set(looks[-5:])) == 1 and looks[-1] != "running\n"


def test_timeout_is_kept_while_the_output_takes_nothing(spool):
    spec = shell("x", FLOOD, timeouts={"run": 0.3})
    with executing(spec, pipe()) as process:
        assert process.wait(60) == 128 + signal.SIGTERM


def test_log_and_output_may_be_one_pipe_that_takes_nothing(spool):
    spec = shell("x", f"{FLOOD} >&2", timeouts={"run": 0.3})
    with executing(spec, pipe(), stderr=subprocess.STDOUT) as process:
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("output", [pipe, connection])
@pytest.mark.parametrize("where", [{}, {"remote": HERE}, {"remote": {**HERE, "supervise": False}}])
def test_slow_reader_gets_every_byte_of_a_program_that_has_ended(spool, tmp_path, where, output):
    text = f"seq 50000; echo last >&2; : >{tmp_path}/ended"
    reading, writing = output()
    spec = shell("x", text, **where)
    with executing(spec, (reading, writing), stderr=subprocess.PIPE) as process:
        until((tmp_path / "ended").exists)
        data = b""
        while piece := os.read(reading, 10_000):
            data += piece
        seq = subprocess.run(["seq", "50000"], capture_output=True, check=True).stdout
        assert hashlib.sha256(data).digest() == hashlib.sha256(seq).digest()
        assert (process.wait(60), process.stderr.read()) == (0, b"last\n")


def test_program_that_has_ended_is_not_waited_for_after_a_signal(spool, tmp_path):
    text = f"seq 10000; exec sh -c ': >{tmp_path}/ended; exit 6'"
    with executing(shell("x", text), pipe(), stderr=subprocess.DEVNULL) as process:
        until((tmp_path / "ended").exists)
        until(lambda: not children(process.pid), what="the program was reaped")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 6


def children(guard):
    """What is below the chaperone, which is the guard's only child."""
    with open(f"/proc/{guard}/task/{guard}/children") as file:
        chaperone = file.read().split()[0]
    with open(f"/proc/{chaperone}/task/{chaperone}/children") as file:
        return file.read().split()


@pytest.mark.parametrize("supervise", [True, False])
def test_remote_program_is_stopped_while_the_output_takes_nothing(spool, supervise):
    remote = {**HERE, "supervise": supervise}
    spec = shell("x", FLOOD, remote=remote, timeouts={"run": 0.3}, stop={"grace_period": 0.1})
    with executing(spec, pipe(), stderr=subprocess.PIPE) as process:
        assert process.wait(60) == (128 + signal.SIGTERM if supervise else 125)


def test_reason_of_a_failed_start_does_not_wait_for_a_stuck_stderr(spool):
    reading, writing = pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4_096)
    os.set_blocking(writing, True)
    spec = {"id": "x", "program": {"argv": ["/no/such"]}}
    with executing(spec, (reading, writing), stderr=subprocess.STDOUT) as process:
        assert process.wait(60) == 125
