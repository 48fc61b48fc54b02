"""
Secrets of a run are in no process's argv, near or far, while it starts, works, is cut off, is
adopted and ends.
"""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from spool_tests.support import shells
from spool_tests.support.far import assert_no_supervisor, far_processes, remotes, sudo
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, sh, start, stdout
from spool_tests.support.sshd import Sshd
from spool_tests.support.surviving import adopt, connected
from spool_tests.support.waiting import need, until

# Gets the secret from its input, because its own argv is looked at too; ends with its input, and
# says how often it looked and what it saw.
POLL = """
import os, sys
secret, looks, seen = sys.stdin.buffer.readline().strip(), 0, set()
os.set_blocking(0, False)
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                argv = file.read()
        except OSError:
            continue
        words = (secret, b"chaperone-ready-1", b"tail\\0-c\\0+")
        seen.update(word for word in words if word in argv)
    looks += 1
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
print(looks, *(word.split(b"\\0")[0].decode() for word in seen))
"""


@contextlib.contextmanager
def polled(secret, found):
    """
    Meanwhile every /proc/*/cmdline is read again and again; afterwards `found` holds the words that
    were seen in any.
    """
    poll = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", POLL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    poll.stdin.write(secret + "\n")
    poll.stdin.flush()
    try:
        yield
    finally:
        looks, *words = poll.communicate()[0].split()
    assert int(looks) > 0
    found += words


def through_its_life(spool, secret, life, remote):
    """
    A run with secrets from its start to its end; if it survives, its client and its chaperone die
    on the way.
    """
    script = 'echo up; while [ ! -e go ]; do sleep 0.05; done; [ "$(cat)" = "$S" ] && echo same'
    process = start(
        spool,
        sh(script, env={"S": secret}, stdin=secret, cwd=str(spool)),
        remote=remote,
        on_disconnect=life,
    )
    until(lambda: stdout(spool) == b"up\n", 60)
    if life == "survive":
        status = connected(spool)
        os.kill(status["connection"]["pid"], signal.SIGKILL)
        drops = until(
            lambda: (
                (now := connected(spool)["connection"]["drops"]) > status["connection"]["drops"]
                and now
            ),
            60,
        )
        process.kill()
        process.wait()
        process = adopt(spool)
        until(lambda: connected(spool)["connection"]["drops"] > drops, 60)
    (spool / "go").touch()
    assert process.wait(60) == 0
    (spool / "go").unlink()
    assert (final(spool)["state"], final(spool)["return_code"], stdout(spool)) == (
        "terminated",
        0,
        b"up\nsame\n",
    )
    assert not far_processes(spool)


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize(
    "mode",
    [
        "here",
        "ssh-as",
        pytest.param("ssh-then-sudo", marks=sudo),
        pytest.param("sudo-then-ssh", marks=sudo),
    ],
)
def test_secrets_are_in_no_argv_while_a_run_lives(spool, sshd, mode, life, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    secret, found = "s3cr3t" + os.urandom(8).hex(), []
    remote = (
        None if mode == "here" else {**remotes(sshd, mode), "remote_dir": str(tmp_path / "far")}
    )
    with polled(secret, found):
        through_its_life(spool, secret, life, remote)
    assert secret not in found
    assert set(found) >= {("here", "kill"): set(), (mode, "kill"): {"chaperone-ready-1"}}.get(
        (mode, life), {"chaperone-ready-1", "tail"}
    ), "too few looks"
    for path in (spool / "r").iterdir():
        assert path.name == "spec.json" or secret not in path.read_text(), path


@pytest.mark.root
@pytest.mark.parametrize("shell", shells.SH)
def test_secrets_are_in_no_argv_that_any_sh_makes(spool, shell, tmp_path):
    """However short-lived: a trace of every exec below an sshd, its /bin/sh any that there is."""
    need("sshd", "ssh", "ssh-keygen", "pgrep", "strace")
    trace, secret = tmp_path / "trace", "s3cr3t" + os.urandom(8).hex()
    (tmp_path / "sshd").mkdir()
    # The tracer is no ancestor of what it traces (-D), and sees the calls that it asks for alone.
    tracer = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-e", "trace=execve", "-s", "1000000"]
    tracer += ["-e", "signal=none", "-o", str(trace)]
    there = Sshd(str(tmp_path / "sshd"), shell=shell, prefix=tracer)
    try:
        remote = there.remote(remote_dir=str(tmp_path / "far"))
        through_its_life(spool, secret, "survive", remote)
        assert_no_supervisor(there)
    finally:
        there.close()
    until(lambda: not processes_with(os.fsencode(trace)))  # the tracer has written all of it
    execs = trace.read_text()
    assert "chaperone-ready-1" in execs and '"tail", "-c"' in execs
    assert secret not in execs
