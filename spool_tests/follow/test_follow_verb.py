"""
`chaperone follow`: batches, their answers, and a consumer that is killed.
"""

import base64
import collections
import contextlib
import fcntl
import json
import os
import random
import select
import subprocess
import sys
import termios
import time

import pytest

from chaperone.errors import SpecError
from chaperone.follow.batches import Outbox
from spool_tests.support import lines
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.waiting import absent, need, until
from spool_tests.support.writer import WORDS, Writer

pytestmark = pytest.mark.once

file = lines.file


# -- the verb


def following(file, **keywords):
    command = [*CHAPERONE, "follow", "--cursor", file]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(b"\xff\n", r"\xff"), (b"1" * 5_000 + b"\n", "1" * 80), ("\u0661\n".encode(), r"\xd9\xa1")],
)
def test_answer_that_is_no_number_is_one_sentence(spool, file, answer, shown):
    with Writer(spool) as writer:
        writer.end()
    result = subprocess.run(
        [*CHAPERONE, "follow", "--cursor", file],
        input=answer,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    sentence = f"unable to understand the answer {shown!r}: want the number of a batch"
    assert (result.returncode, result.stderr.decode()) == (
        os.EX_DATAERR,
        f"chaperone: {sentence}\n",
    )


@pytest.mark.parametrize("event", ["started", "ended", "lost"])
def test_line_of_a_cursor_file_without_its_run_is_refused(spool, file, event):
    kept = {"version": 1, "batch": 1, "cursor": {}, "lines": [json.dumps({"event": event})]}
    with open(file, "w") as text:
        json.dump(kept, text)
    with pytest.raises(SpecError) as caught:
        Outbox(spool, file)
    assert str(caught.value) == (
        f"unable to read cursor file {file!r}: lines[0]: want an event as a line of "
        "JSON, got a string"
    )


def test_second_follow_with_the_same_cursor_file_is_refused_with_one_sentence(spool, file):
    with Writer(spool), following(file) as first:
        assert json.loads(first.stdout.readline())["event"] == "started"
        with following(file) as second:
            assert second.communicate(timeout=60) == (
                "",
                f"chaperone: unable to use cursor file {file!r}: it is in use by pid {first.pid}\n",
            )
        assert second.returncode == os.EX_IOERR
        first.stdin.close()
        assert json.loads(first.stdout.readlines()[-1]) == {"event": "batch", "batch": 1}
    assert first.returncode == 0


def test_run_that_can_not_be_read_is_told_on_stderr_and_holds_up_no_other(spool, file):
    """It stays there, perhaps for days: to end at it would be to end at each start."""
    with Writer(spool, "bad"), Writer(spool, "good") as good:
        (spool / "bad").chmod(0o777)
        os.link(spool / "bad" / "lock", spool / "planted")
        good.write(b"hello").end()
        with following(file) as follow:
            told = []
            while "batch" not in told:
                told.append(json.loads(follow.stdout.readline())["event"])
            follow.stdin.write("1\n")
            follow.stdin.close()
            assert follow.stderr.read() == (
                "chaperone: unable to follow run 'bad': unable to open 'lock': want "
                "a file of this user without other hard links\n"
            )
    assert (follow.returncode, told) == (0, ["started", "started", "output", "ended", "batch"])


def test_cursor_file_is_free_once_its_follow_was_killed(spool, file):
    with Writer(spool):
        for _ in range(2):
            with following(file) as follow:
                assert json.loads(follow.stdout.readline())["event"] == "started"
                follow.kill()


@pytest.mark.parametrize("end", ["stdin", "stdout"])
def test_follow_ends_when_its_consumer_goes_while_there_is_nothing_to_tell(spool, file, end):
    """Else it would stay for ever, and keep the cursor file from the consumer that comes next."""
    with Writer(spool), following(file) as follow:
        while json.loads(follow.stdout.readline())["event"] != "batch":
            pass
        follow.stdin.write("1\n")
        follow.stdin.flush()
        until(lambda: not unread(follow.stdin) and sleeps(follow.pid))
        getattr(follow, end).close()
        try:
            assert (follow.wait(60), follow.stderr.read()) == (0, "")
        finally:
            follow.kill()


def unread(pipe):
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def sleeps(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_follow_that_takes_answers_from_a_file_waits_for_events_all_the_same(spool, file, tmp_path):
    (tmp_path / "answers").write_text("1\n2\n")
    with open(tmp_path / "answers") as answers, Writer(spool) as writer:
        with subprocess.Popen(
            [*CHAPERONE, "follow", "--cursor", file], stdin=answers, stdout=subprocess.PIPE
        ) as follow:
            read = [json.loads(follow.stdout.readline())["event"] for _ in range(3)]
            writer.running()
            read += [json.loads(follow.stdout.readline())["event"] for _ in range(2)]
            writer.write(b"x")
            read += [json.loads(line)["event"] for line in follow.stdout]
    assert (follow.returncode, read) == (
        0,
        ["started", "changed", "batch", "changed", "batch", "output", "batch"],
    )


# A consumer of its own: commits a batch with its number in one write, then answers; a number that
# it has committed it only answers.
TAKES = """
import json, os, sys
try:
    with open(sys.argv[1], "rb+") as store:
        kept = store.read()
        store.truncate(kept.rfind(b"\\n") + 1)  # a last commit that was cut off never happened
        taken = [json.loads(line)["batch"] for line in kept.split(b"\\n")[:-1]]
except FileNotFoundError:
    taken = []
last = taken[-1] if taken else 0
lines = []
store = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
for text in sys.stdin.buffer:
    line = json.loads(text)
    lines.append(line)
    if line["event"] == "batch":
        if line["batch"] != last:
            assert line["batch"] == last + 1, (line["batch"], last)
            taken = {"batch": line["batch"], "lines": lines[:-1]}
            os.write(store, json.dumps(taken).encode() + b"\\n")
            last = line["batch"]
        lines = []
        os.write(1, b"%d\\n" % last)
"""


@pytest.mark.parametrize(
    "seed, kills",
    [(1, 8), *(pytest.param(seed, 40, marks=pytest.mark.long) for seed in range(10, 14))],
)
def test_follow_and_its_consumer_that_are_killed_in_turn_take_each_event_once(
    spool, file, seed, kills
):
    """
    One of them dies, or both; the other ends by itself, and they are started again while the runs
    go on.
    """
    dice = random.Random(seed)
    store = f"{file}.store"
    writers, over = [], 0
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [writer.die() for writer in writers])

        def write():
            if len(writers) < 6:
                writers.append(Writer(spool, f"r{over + len(writers)}", labels={}).running())
            for writer in writers:
                data = "".join(dice.choices(WORDS, k=dice.choice([1, 5, 40]))).encode()
                cut = dice.randrange(len(data) + 1)
                for part in (
                    data[:cut],
                    data[cut:],
                    dice.randbytes(2) if dice.random() < 0.1 else b"!",
                ):
                    writer.write(part, dice.choice(["stdout", "stdout", "stderr"]))

        for kill in range(kills + 1):
            with following(file, close_fds=True) as follow:
                consumer = subprocess.Popen(
                    [sys.executable, "-c", TAKES, store], stdin=follow.stdout, stdout=follow.stdin
                )
                follow.stdout.close()
                follow.stdin.close()
                try:
                    if kill < kills:
                        seen = size_of(store)
                        late = dice.random() < 0.8
                        patience = time.monotonic() + dice.random() * 0.6
                        while (
                            time.monotonic() < patience
                            or late
                            and size_of(store) == seen
                            and follow.poll() is None
                            and consumer.poll() is None
                        ):
                            write()
                            select.select([], [], [], dice.random() * 0.01)
                        if writers and dice.random() < 0.5:
                            writers.pop(dice.randrange(len(writers))).end()
                            over += 1
                        for victim in dice.choice([[follow], [consumer], [follow, consumer]]):
                            victim.kill()
                    else:
                        while writers:
                            writers.pop().end()
                            over += 1
                        until(
                            lambda wanted=over: endings_in(store) == wanted,
                            timeout=60,
                            what=f"seed {seed}: {over} endings",
                        )
                        consumer.kill()
                    follow.wait(60)
                    consumer.wait(60)
                    assert follow.stderr.read() == "", f"seed {seed}, kill {kill}"
                finally:
                    follow.kill()
                    consumer.kill()
                    consumer.wait()
    told = collections.defaultdict(bytes)
    others = collections.Counter()
    for batch in committed(store):
        for line in batch["lines"]:
            if line["event"] == "output":
                name = (line["run_id"], line["stream"])
                assert line["offset"] == len(told[name]), f"seed {seed}: {name}"
                told[name] += (
                    line["text"].encode() if "text" in line else base64.b64decode(line["base64"])
                )
            elif line["event"] != "changed":
                others[line["event"], line["run_id"]] += 1
    runs = [f"r{number}" for number in range(over)]
    assert others == {(event, run_id): 1 for event in ("started", "ended") for run_id in runs}, (
        f"seed {seed}"
    )
    for run_id in runs:
        for stream in ("stdout", "stderr"):
            assert told[run_id, stream] == (spool / run_id / stream).read_bytes(), (
                f"seed {seed}: {run_id} {stream}"
            )
    assert os.listdir(spool / ".ended") == []


def size_of(store):
    return os.path.getsize(store) if os.path.exists(store) else 0


def committed(store):
    """The batches that a consumer has committed; a last one that was cut off never happened."""
    with open(store, "rb") as opened:
        return [json.loads(line) for line in opened.read().split(b"\n")[:-1]]


def endings_in(store):
    return sum(
        line["event"] in ("ended", "lost") for batch in committed(store) for line in batch["lines"]
    )


def granted(watches):
    """
    What to put before a command so that the kernel grants it so few watches: in a user namespace of
    its own, for the limit is the namespace's.
    """
    need("unshare")
    prefix = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        f'echo {watches} >/proc/sys/user/max_inotify_watches && exec "$@"',
        "sh",
    ]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        absent("may not make a user namespace and set its limits")
    return prefix


@pytest.mark.parametrize("watches", [0, 1, 2, 3])
@pytest.mark.parametrize("words", [("follow",), ("tail", "-f", "r")], ids=" ".join)
def test_more_runs_than_watches_are_polled_and_said_so_on_stderr(spool, words, watches):
    """A follower takes one for the spool, one for .ended/ and one for each live run."""
    enough = words[0] == "tail" and watches == 3
    with Writer(spool) as writer, Writer(spool, "other"):
        writer.running()
        command = [*granted(watches), *CHAPERONE, *words]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as reader:
            told = "" if enough else reader.stderr.readline()
            writer.write(b"found all the same\n").end()
            line = ""
            while "found all the same" not in line:
                line = reader.stdout.readline()
                assert line, reader.stderr.read()
            reader.kill() if words[0] == "follow" else reader.wait(60)
            told += reader.stderr.read()
    why = (
        f"unable to watch one more directory: the limit of {watches} watches for this user "
        "is reached (sysctl user.max_inotify_watches)"
    )
    sentence = f"chaperone: looking at spool {str(spool)!r} every 1 s: {why}\n"
    assert told == ("" if enough else sentence)


def test_silent_filesystem_is_polled_and_said_so_on_stderr(spool):
    script = (
        "import sys; from chaperone.cli import main; "
        "from chaperone.follow import descriptors; descriptors.silent_filesystem = lambda fd: "
        "'nfs'; sys.exit(main.main(['follow']))"
    )
    with Writer(spool) as writer:
        with subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as reader:
            assert reader.stderr.readline() == (
                f"chaperone: looking at spool {str(spool)!r} every 1 s: inotify may "
                "be silent on nfs\n"
            )
            assert [json.loads(reader.stdout.readline())["event"] for _ in range(3)] == [
                "started",
                "changed",
                "batch",
            ]
            writer.write(b"found all the same").end()
            kinds = []
            while "ended" not in kinds:
                kinds.append(json.loads(reader.stdout.readline())["event"])
            # It may have looked between the two.
            assert [kind for kind in kinds if kind != "batch"] == ["output", "ended"]
            reader.kill()
