"""
The consumers of docs/examples, each event once however often they are killed.

Knows: the files of the examples.  Must not know: how they commit.
"""

import base64
import collections
import json
import os
import pathlib
import select
import signal
import subprocess

import pytest

from spool_tests.support.places import ROOT
from spool_tests.support.waiting import need, until
from spool_tests.support.writer import Writer

EXAMPLES = pathlib.Path(ROOT, "docs/examples")
RUNS = 6
# Characters of several bytes, three that some line readers take for the end of a line, and bytes
# that are no text.
DATA = ["größer \u2028 \u2029 \r".encode() * 100, b"\xff\n" * 100]


@pytest.fixture
def started(on_path, spool):
    """Start a consumer in a session of its own."""

    def start(*command):
        return subprocess.Popen(
            [*command, "cursor.json", "batches"], cwd=on_path, start_new_session=True
        )

    return start


@pytest.mark.parametrize(
    "command",
    [("node", EXAMPLES / "consumer.js"), ("sh", EXAMPLES / "consumer.sh")],
    ids=lambda command: command[0],
)
def test_consumer_that_is_killed_takes_each_event_once(started, spool, tmp_path, command):
    need(command[0], *(["jq"] if command[0] == "sh" else []))
    batches = tmp_path / "batches"
    with Writer(spool, "last") as last:
        for number in range(RUNS):
            with Writer(spool, f"r{number}") as writer:
                writer.write(DATA[number % 2]).end(number)
            consumer = started(*command)
            wait(consumer, 0.15 + number * 0.05)
            # All of it, or one of its processes alone.
            for pid in ([-consumer.pid], [consumer.pid], of(consumer))[number % 3]:
                end(pid)
            end(-consumer.pid)
            consumer.wait()
        last.end(9)
        consumer = started(*command)
        until(lambda: "last" in endings(batches), timeout=60)
        end(-consumer.pid)
        consumer.wait()
    assert endings(batches) == {f"r{number}": 1 for number in range(RUNS)} | {"last": 1}
    taken = events(batches)
    for number in range(RUNS):
        run = [event for event in taken if event["run_id"] == f"r{number}"]
        assert [event["event"] for event in run if event["event"] != "output"] == [
            "started",
            "ended",
        ]
        assert (
            b"".join(data(event) for event in run if event["event"] == "output") == DATA[number % 2]
        )


def wait(process, seconds):
    pidfd = os.pidfd_open(process.pid)
    try:
        select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)


def of(process):
    """The children of a process."""
    return map(
        int, pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )


def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def data(event):
    return event["text"].encode() if "text" in event else base64.b64decode(event["base64"])


def events(batches):
    """All that was committed, in the order of the batches."""
    names = [name for name in os.listdir(batches) if name.isdigit()] if batches.exists() else []
    return [
        json.loads(line)
        for name in sorted(names, key=int)
        for line in (batches / name).read_text().split("\n")[:-1]
    ]


def endings(batches):
    return collections.Counter(
        event["run_id"] for event in events(batches) if event["event"] == "ended"
    )
