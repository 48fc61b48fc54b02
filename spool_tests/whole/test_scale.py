"""
A thousand runs, a follower that stands still, a backlog of half a gigabyte: nothing is lost, no
process is held up, no memory grows.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys

import pytest

from chaperone.follow import follower as followers
from chaperone.follow.follower import Follower
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.waiting import absent, until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

# A scheduler of its own: counts what it hears until all that it was given to expect has ended, and
# how often the kernel's queue overflowed.
FOLLOWS = """
import collections, hashlib, json, sys
from chaperone.follow import follower as followers
from chaperone.model.events import Ended, Lost, Output, Started

overflows = 0
def look_everywhere(self, whole=followers.Follower._look_everywhere):
    global overflows
    overflows += 1
    whole(self)
followers.Follower._look_everywhere = look_everywhere

hashes = collections.defaultdict(hashlib.sha256)
offsets, heard = collections.Counter(), collections.Counter()
with followers.Follower(sys.argv[1]) as follower:
    print("follows", flush=True)
    while sum(n for name, n in heard.items() if not name.startswith("started")) < int(sys.argv[2]):
        event = follower.next()
        if isinstance(event, Output):
            name = f"{event.run_id}/{event.stream}"
            assert event.offset == offsets[name], (event.offset, offsets[name], name)
            offsets[name] += len(event.data)
            hashes[name].update(event.data)
        elif isinstance(event, (Started, Ended, Lost)):
            heard[f"{type(event).__name__.lower()} {event.run_id}"] += 1
            if not isinstance(event, Started):
                follower.collect(event.run_id)
    rest = follower.next(0.2)
hashes = {name: hash.hexdigest() for name, hash in hashes.items()}
print(json.dumps({"overflows": overflows, "heard": heard, "hashes": hashes, "rest": repr(rest)}))
"""


def queue_depth():
    with open("/proc/sys/fs/inotify/max_queued_events") as file:
        return int(file.read())


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def watches_of(pid):
    """How many watches a process holds."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/fdinfo/{fd}") as file:
            count += file.read().count("inotify wd:")
    return count


@pytest.mark.parametrize("runs, waves", [(20, 2), pytest.param(1_000, 5, marks=pytest.mark.long)])
def test_follower_that_is_stopped_until_the_queue_overflows_hears_all_of_it_once(
    spool, runs, waves
):
    """
    Meanwhile runs write, begin, end, die, and begin and end; the kernel drops what does not fit,
    the files still have it.
    """
    dice = random.Random(f"{runs} {waves}")
    depth = queue_depth()
    dead, ended, brief = set(), set(), []
    live = {f"run-{number}": Writer(spool, f"run-{number}").running() for number in range(runs)}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [writer.die() for writer in live.values()])
        total = runs + waves * 5  # three of each five begin in the wave, and end in it
        command = [sys.executable, "-c", FOLLOWS, str(spool), str(total)]
        follower = stack.enter_context(
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        stack.callback(follower.kill)
        assert follower.stdout.readline() == "follows\n"
        for wave in range(waves):
            until(lambda: watches_of(follower.pid) == 2 + len(live), what="it watches each run")
            os.kill(follower.pid, signal.SIGSTOP)
            until(lambda: state_of(follower.pid) == "T")
            watched = list(live)
            for number in range(3):
                writer = live[f"wave-{wave}-{number}"] = Writer(
                    spool, f"wave-{wave}-{number}"
                ).running()
                brief.append(writer.spec["id"])
            for number in range(
                depth + 1_000
            ):  # never the same stream twice in a row: the kernel would merge the two
                data = (
                    f"{number} größer\n".encode() if dice.random() < 0.99 else dice.randbytes(4_000)
                )
                live[watched[number % len(watched)]].write(
                    data, "stdout" if number % 3 else "stderr"
                )
            # The kernel reports nothing of these: only a listing finds them.
            for number in range(3, 5):
                live[f"wave-{wave}-{number}"] = Writer(spool, f"wave-{wave}-{number}").running()
            for run_id in live.keys() - set(watched):
                live[run_id].write(b"unwatched").write(b"as yet", "stderr")
            for run_id in [*brief[-3:], *dice.sample(sorted(live.keys() - set(brief)), k=4)]:
                writer = live.pop(run_id)
                if dice.random() < 0.3:
                    dead.add(run_id)
                    writer.die()
                else:
                    ended.add(run_id)
                    writer.end(wave)
            os.kill(follower.pid, signal.SIGCONT)
            for writer in live.values():
                writer.write(b"after that\n")
        for run_id, writer in live.items():
            ended.add(run_id)
            writer.end()
        told, said = follower.communicate(timeout=120)
    assert (follower.returncode, said) == (0, "")
    told = json.loads(told)
    assert told["overflows"] >= waves, "the test is to overflow the queue each time"
    assert told["rest"] == "None"
    everyone = ended | dead
    assert len(everyone) == total
    assert told["heard"] == {f"started {name}": 1 for name in everyone} | {
        f"ended {name}": 1 for name in ended
    } | {f"lost {name}": 1 for name in dead}
    streams = [(run_id, stream) for run_id in everyone for stream in ("stdout", "stderr")]
    wrote = {
        f"{run_id}/{stream}": (spool / run_id / stream).read_bytes() for run_id, stream in streams
    }
    assert told["hashes"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in wrote.items() if data
    }


@pytest.mark.parametrize("quiet", [99, pytest.param(999, marks=pytest.mark.long)])
def test_flooding_run_takes_its_turn_among_quiet_ones(spool, quiet, many_fds, monkeypatch):
    monkeypatch.setattr(
        followers, "GATHER_S", 0
    )  # a fast machine reads several turns of a flood in that time
    with contextlib.ExitStack() as stack:
        floods = [
            stack.enter_context(Writer(spool, f"flood-{number}").running()) for number in range(2)
        ]
        writers = [
            stack.enter_context(Writer(spool, f"quiet-{number}").running())
            for number in range(quiet)
        ]
        follower = stack.enter_context(Follower(spool))
        while follower.next(0) is not None:
            pass
        for flood in floods:
            # A TiB behind, as a sparse file: it always has a MiB to deliver.
            os.truncate(spool / flood.spec["id"] / "stdout", 1 << 40)
            flood.write(b"\n")
        for round_ in range(3):
            turns = collections.Counter(follower.next(0).run_id for _ in range(20))
            assert turns == {"flood-0": 10, "flood-1": 10}, "they take turns"
            for writer in writers:
                writer.write(b"%d\n" % round_)
            turns.clear()
            while len(turns.keys() - {"flood-0", "flood-1"}) < quiet:
                event = follower.next(0)
                turns[event.run_id] += 1
                assert event.run_id.startswith("flood") or event.data == b"%d\n" % round_
            # A read of the kernel's queue is 64 KiB, some 1,600 events: a flood has a turn before
            # it, and one between two of them.
            assert max(turns["flood-0"], turns["flood-1"]) <= 3, turns
            assert set(turns.values()) <= {1, 2, 3} and all(
                turns[writer.spec["id"]] == 1 for writer in writers
            )


@pytest.fixture
def many_fds():
    """As many fds as this process may have: each of our runs takes five."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8_192:
        absent(f"needs 8192 fds, may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


READS = """
import resource, sys
from chaperone.follow import follower as followers
from chaperone.follow.follower import Follower

with Follower(sys.argv[1]) as follower:
    follower.next()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    while read < int(sys.argv[2]):
        event = follower.next()
        assert len(getattr(event, "data", b"")) <= 1 << 20
        read += len(getattr(event, "data", b""))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_follower_half_a_gigabyte_behind_takes_no_more_memory(spool):
    behind = 500_000_000
    with Writer(spool) as writer:
        writer.running()
        os.truncate(spool / "r" / "stdout", behind)
        read = subprocess.run(
            [sys.executable, "-c", READS, str(spool), str(behind)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (read.returncode, read.stderr) == (0, "")
    print(f"{behind:,} bytes behind: {int(read.stdout)} KiB more at the most")
    # Two chunks of a MiB, the one that is delivered and the one that is read, and room.
    assert int(read.stdout) <= 4 * 1_024


@pytest.mark.parametrize("behind", [20_000_000, pytest.param(500_000_000, marks=pytest.mark.long)])
def test_lines_of_a_large_backlog_are_written_in_flat_memory(spool, tmp_path, behind):
    """What `chaperone follow --cursor` holds is one batch, however much waits behind it."""
    text = "größer und größer\n" * 1_000
    with Writer(spool) as writer:
        writer.running()
        while writer.counts["stdout"] < behind:
            writer.write(text.encode() * 100)
        command = [*CHAPERONE, "follow", "--cursor", tmp_path / "cursor.json"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as follow:
            told, peaks = hashlib.sha256(), []
            size = 0
            for line in map(json.loads, follow.stdout):
                if line["event"] == "output":
                    told.update(line["text"].encode())
                    size += len(line["text"].encode())
                elif line["event"] == "batch":
                    peaks.append(peak_of(follow.pid))
                    if size == writer.counts["stdout"]:
                        break
                    follow.stdin.write(b"%d\n" % line["batch"])
                    follow.stdin.flush()
            follow.stdin.close()
        assert follow.returncode == 0
        assert told.digest() == hashlib.sha256((spool / "r" / "stdout").read_bytes()).digest()
    print(
        f"{size:,} bytes in {len(peaks)} batches: {peaks[4]} KiB at the fifth, "
        f"{peaks[-1]} KiB at the most"
    )
    assert (
        peaks[-1] - peaks[4] <= 8 * 1_024
        # a batch is a MiB as bytes, as text, as JSON and in the cursor file; the allocator settles
        # within ten
    )


def peak_of(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
