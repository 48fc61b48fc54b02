"""
The supervisor's text, run by one shell of many.
"""

import os
import re
import select
import signal
import subprocess
import time

import pytest

from chaperone.farside import payload
from chaperone.farside import records as records_of
from chaperone.model import spec as specs
from spool_tests.support import shells
from spool_tests.support.processes import processes_with
from spool_tests.support.waiting import until

NONCE = "\x1e0123456789abcdef"


def resized(whole):
    """A payload that was altered, with its size as it is now; one that was cut as it is."""
    found = re.search(rb"bs=(\d+) .*?(@\w+) ].*\n", whole)
    end = whole.find(b"\n%s\n" % found[2]) if found else -1
    if end < 0:
        return whole
    size = b"%d" % (end + 1 - found.end())
    return whole.replace(b"bs=" + found[1], b"bs=" + size)


def lease_after(path):
    """An `alter`: the lease is not watched before a file (str) exists, however slow a test is."""

    def alter(whole):
        begins = b'while [ "$idle" -lt "$lease" ] &&'
        assert begins in whole
        return whole.replace(begins, b"until [ -e '%s' ]; do nap; done\n" % path.encode() + begins)

    return alter


class Far:
    """One life of the text in one shell, with the near side's end of its pipes."""

    def __init__(self, shell, program, alter=None, env=None, argv=None, **spec):
        self.spec = specs.checked(
            {"id": "r", "program": program, "remote": {"host": "there"}, **spec}, "/"
        )
        self.begun, self.cookie = time.monotonic(), os.urandom(8).hex()
        self.records, self.output = [], {"stdout": bytearray(), "stderr": bytearray()}
        self._parsers = {name: records_of.Records(NONCE) for name in self.output}
        argv = argv or [shells.as_sh(shell), *payload.CONSTANT[1:]]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        assert self.process.stderr.readline() == payload.READY
        self._fds = {self.process.stdout.fileno(): "stdout", self.process.stderr.fileno(): "stderr"}
        stdin = (self.spec["program"]["stdin"] or "").encode()
        whole = self.payload(len(stdin))
        self.send((resized(alter(whole)) if alter else whole) + stdin)

    def payload(self, stdin_size):
        marks = {"CHAPERONE_RUN_ID": "r", "CHAPERONE_COOKIE": self.cookie}
        text = payload.program_text(self.spec["program"], marks, True)
        more = {"program": text, "stdin_size": stdin_size, "stdin_name": os.urandom(8).hex()}
        return payload.payload(
            payload.settings(self.spec, NONCE, self.cookie, "kill", **more),
            "@" + os.urandom(8).hex(),
            "kill",
        )

    def send(self, data):
        data = data if isinstance(data, bytes) else data.encode() + b"\n"
        while data:
            self.read(0)
            _, ready, _ = select.select([], [self.process.stdin], [], 0.1)
            if ready:
                data = data[os.write(self.process.stdin.fileno(), data[:4096]) :]

    def read(self, timeout):
        for fd in select.select(list(self._fds), [], [], timeout)[0]:
            stream = self._fds[fd]
            data = os.read(fd, 65_536)
            if not data:
                del self._fds[fd]
            clean, records = (
                self._parsers[stream].feed(data) if data else (self._parsers[stream].end(), [])
            )
            self.output[stream] += clean
            self.records += records

    def wait(self, word, timeout=60):
        """The rest of the first record that begins with `word`."""
        deadline = time.monotonic() + timeout
        while not (found := [record[1:] for record in self.records if record[0] == word]):
            assert self._fds and time.monotonic() < deadline, (
                f"no {word} in {self.records}, {self.output}"
            )
            self.read(0.1)
        return found[0]

    def outcome(self):
        return records_of.outcome(self.wait("end"))

    def close(self):
        """The end of the connection: what a cut is to the far side."""
        self.process.stdin.close()

    def ended(self, timeout=60):
        """Wait for the end of it all: the exit code."""
        deadline = time.monotonic() + timeout
        while self._fds:
            assert time.monotonic() < deadline, f"the pipes are still open: {self.records}"
            self.read(0.1)
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def alive(self):
        """Its processes, but for the far side's own search for them."""
        return {
            pid: command
            for pid, command in processes_with(self.cookie.encode()).items()
            if not command.startswith("grep ")
        }


def longest_silence(run):
    """
    Send heartbeats for 3.5 s, or until 2 s passed without one or the lease was over: the longest
    time (s) that the far side may have heard none.
    """
    sent = looked = run.begun
    while not any(record[0] == "start" for record in run.records):
        assert run._fds, f"it did not start: {run.records}"
        sent, looked = looked, time.monotonic()  # the first is from before it came
        run.read(0.05)
    begun, number, longest_s = time.monotonic(), 0, 0.0
    while time.monotonic() < begun + 3.5 and longest_s < 2:
        number += 1
        sending = time.monotonic()
        try:
            run.send(f"h {number}")
        except BrokenPipeError:
            return time.monotonic() - sent
        # From before the last one was sent: that it was heard may be seen late.
        until(lambda: run.read(0.05) or is_answered(run, number))  # noqa: B023
        longest_s = max(longest_s, time.monotonic() - sent)
        sent = sending
        until(lambda: run.read(0.05) or time.monotonic() > begun + number * 0.25)  # noqa: B023
    return max(longest_s, time.monotonic() - sent)


def is_answered(run, number):
    return ["beat", str(number)] in run.records or "lost" in (one[0] for one in run.records)


@pytest.fixture
def far():
    made = []

    def start(*arguments, **keywords):
        made.append(Far(*arguments, **keywords))
        return made[-1]

    yield start
    for one in made:
        if not one.process.stdin.closed:
            one.process.stdin.close()
        if one.process.poll() is None:
            until(lambda one=one: one.process.poll() is not None)
        for pid in one.alive():
            os.kill(pid, signal.SIGKILL)
        one.process.stdout.close()
        one.process.stderr.close()


@pytest.fixture(scope="module", autouse=True)
def removed():
    yield
    shells.remove()


# Rights do not depend on the shell: the plain user's run needs two of them.
every_sh = pytest.mark.parametrize(
    "shell",
    [
        pytest.param(shell, marks=() if shell in ("dash", "busybox") else pytest.mark.once)
        for shell in shells.SH
    ],
)


PROGRAMS = {
    "quiet": "echo up; exec sleep 1000",
    "stubborn": "trap '' TERM HUP PIPE; echo up; while :; do sleep 0.1; done",
    "setsid child": "setsid sh -c 'trap \"\" TERM; sleep 1000' & echo up; exec sleep 1000",
    "double fork": "(setsid sh -c 'sleep 1000 & exit' &); echo up; exec sleep 1000",
    "writing": "while :; do echo up; sleep 0.02; done",
}


def only_what_sh_needs(directory):
    """Make it the PATH of a host without awk, setsid and a sleep of fractions."""
    for name in (
        "cat",
        "sleep",
        "env",
        "sed",
        "grep",
        "ps",
        "kill",
        "dd",
        "rm",
        "sh",
        "wc",
        "sort",
        "mkdir",
        "mkfifo",
        "tail",
    ):
        path = subprocess.run(
            ["/bin/sh", "-c", f"command -v {name}"],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
        ).stdout.strip()
        if path.startswith("/") and name != "sleep":
            os.symlink(path, os.path.join(directory, name))
    with open(
        os.open(os.path.join(directory, "sleep"), os.O_CREAT | os.O_WRONLY, 0o755), "w"
    ) as sleep:
        sleep.write('#!/bin/sh\ncase $1 in *.*) exit 1;; esac\nexec /bin/sleep "$1"\n')
