"""
A scheduler is SIGKILLed again and again while runs write; what it has committed in the end is what
the runs wrote, once.
"""

import base64
import collections
import json
import os
import random
import select
import signal
import sys
import traceback

import pytest

from chaperone.follow.follower import Follower
from chaperone.model.events import Changed, Ended, Lost, Output
from spool_tests.support.writer import WORDS, Writer

pytestmark = pytest.mark.once

RUNS = 70
AT_ONCE = 50  # so many write at the time, to the last kill


def in_a_child(work, *arguments):
    """
    Fork; return the child's pid. All that is imported is there at once: the child's life is what is
    tested, not its start.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work(*arguments)
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


# -- the runs


def write(spool, seed, go_on):
    """Hold seventy runs, fifty at a time; the last fifty end when `go_on` (fd) is closed."""
    dice = random.Random(f"writer {seed}")
    waiting = [f"run-{number}" for number in range(RUNS)]
    held = []
    while waiting or held:
        stopped = bool(select.select([go_on], [], [], dice.random() * 0.002)[0])
        while waiting and len(held) < AT_ONCE:
            held.append(Writer(spool, waiting.pop()).running())
        for _ in range(4):
            writer = dice.choice(held)
            data = "".join(dice.choices(WORDS, k=dice.choice([1, 1, 2, 5, 40]))).encode()
            cut = dice.randrange(len(data) + 1)  # a write may end inside a character
            for part in (data[:cut], data[cut:], dice.randbytes(3)):
                writer.write(part, dice.choice(["stdout", "stdout", "stderr"]))
        # Runs begin and end all the time; the last fifty stay, so that there is always something to
        # miss.
        if held and (stopped or dice.random() < 0.01 and len(waiting) > 0):
            writer = held.pop(dice.randrange(len(held)))
            if dice.random() < 0.2:
                writer.die()
            else:
                writer.end(dice.randrange(256))


# -- the scheduler


def plain(event):
    if isinstance(event, Output):
        return [
            "output",
            event.run_id,
            event.stream,
            event.offset,
            base64.b64encode(event.data).decode(),
        ]
    return [type(event).__name__.lower(), event.run_id]


def committed(store):
    """
    The commits so far, oldest first; a last one that was cut off by SIGKILL never happened, and is
    cut off for good.
    """
    try:
        with open(store, "rb+") as file:
            lines = file.read().split(b"\n")
            file.truncate(file.tell() - len(lines[-1]))
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def last_committed(store):
    """
    The last commit alone, from the end of the store: a scheduler doesn't read its history either.
    """
    try:
        with open(store, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            size = 1 << 16
            while True:
                file.seek(max(0, end - size))
                lines = file.read().split(b"\n")
                if len(lines) > 2 or size >= end:
                    file.truncate(end - len(lines[-1]))
                    return json.loads(lines[-2]) if len(lines) > 1 else None
                size *= 4
    except FileNotFoundError:
        return None


def schedule(spool, store, seed, dies_after):
    """
    Follow, commit events and cursor together, then collect; until all runs have ended.

    Args:
        dies_after (int): The number of the step, from here on, at which it kills itself; None for
            never.
    """
    dice = random.Random(f"scheduler {seed}")
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        if steps == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    last = last_committed(store) or {"cursor": None, "ended": 0}
    ended = last["ended"]
    with Follower(spool, last["cursor"]) as follower, open(store, "ab", buffering=0) as file:
        step()
        for run_id in follower.uncollected:
            follower.collect(run_id)
            step()
        while ended < RUNS:
            events = [follower.next()]
            step()
            while len(events) < dice.choice([1, 5, 30]) and (event := follower.next(0)) is not None:
                events.append(event)
                step()
            endings = [event.run_id for event in events if isinstance(event, (Ended, Lost))]
            ended += len(endings)
            kept = {
                "cursor": follower.cursor,
                "ended": ended,
                "events": [plain(event) for event in events if not isinstance(event, Changed)],
            }
            file.write(json.dumps(kept).encode() + b"\n")
            step()
            for run_id in endings:
                follower.collect(run_id)
                step()


def kill_again_and_again(spool, store, seed, kills):
    """Two kinds of death in turn: at a step of its work, and at a moment of the clock."""
    dice = random.Random(f"killer {seed}")
    for number in range(kills):
        at_step = dice.random() < 0.5
        pid = in_a_child(
            schedule,
            str(spool),
            store,
            f"{seed} {number}",
            dice.randrange(1, 60) if at_step else None,
        )
        pidfd = os.pidfd_open(pid)
        try:
            if not select.select([pidfd], [], [], 0.2 if at_step else dice.random() ** 2 * 0.04)[0]:
                os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (
                f"seed {seed}, scheduler {number}"
            )
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(
    "seed, kills",
    [
        (1, 40),
        (2, 40),
        *(pytest.param(seed, 1_000, marks=pytest.mark.long) for seed in range(10, 20)),
    ],
)
def test_killed_schedulers_have_committed_each_byte_and_each_ending_once(
    spool, tmp_path, seed, kills
):
    with Follower(spool):
        pass  # the first inotify instance of a process looks for libc, by way of a child
    store = str(tmp_path / "store")
    go_on, stop = os.pipe()
    os.set_inheritable(stop, False)
    writer = in_a_child(lambda: (os.close(stop), write(spool, seed, go_on)))
    try:
        kill_again_and_again(spool, store, seed, kills)
    finally:
        os.close(stop)
        os.close(go_on)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    last = in_a_child(schedule, str(spool), store, f"{seed} last", None)
    assert os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]) == 0

    streams = collections.defaultdict(bytes)
    others = collections.Counter()
    for commit in committed(store):
        for kind, run_id, *rest in commit["events"]:
            if kind == "output":
                stream, offset, data = rest
                assert offset == len(streams[run_id, stream]), f"seed {seed}: {run_id} {stream}"
                streams[run_id, stream] += base64.b64decode(data)
            else:
                others[kind, run_id] += 1
    runs = [f"run-{number}" for number in range(RUNS)]
    for run_id in runs:
        for stream in ("stdout", "stderr"):
            assert streams[run_id, stream] == (spool / run_id / stream).read_bytes(), (
                f"seed {seed}: {run_id} {stream}"
            )
        ending = "ended" if (spool / run_id / "status.json").exists() else "lost"
        told = {kind: others[kind, run_id] for kind in ("started", "ended", "lost")}
        assert told == {"started": 1, "ended": 0, "lost": 0, ending: 1}, f"seed {seed}: {run_id}"
    assert os.listdir(spool / ".ended") == []
