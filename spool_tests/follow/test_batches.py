"""
Events as JSON lines: text that is never cut inside a character, and batches that a consumer in any
language takes exactly once.
"""

import base64
import json
import os
import random
import re
import shutil

import pytest

from chaperone.errors import SpecError, SpoolError
from chaperone.follow import batches
from chaperone.follow.batches import Outbox, conversation
from chaperone.model import cursor as cursors
from chaperone.spool import format, look
from spool_tests.support import lines
from spool_tests.support.lines import objects
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

file = lines.file

DUCK = "🦆".encode()


def outputs(lines):
    return [
        (line["stream"], line["offset"], line.get("text", line.get("base64")))
        for line in objects(lines)
        if line["event"] == "output"
    ]


def test_backlog_of_twice_the_runs_costs_twice_as_much(spool, file, monkeypatch):
    """By runs that are looked at for the cursor, which once were all of the backlog, each time."""
    seen = []
    real = cursors.is_waited_for
    monkeypatch.setattr(cursors, "is_waited_for", lambda entry: seen.append(1) or real(entry))
    costs = []
    for number, count in enumerate((100, 200)):
        for run in range(count):
            with Writer(spool, f"r{number}-{run}") as writer:
                writer.end()
        seen.clear()
        with Outbox(spool, file) as outbox:
            monkeypatch.setattr(batches, "BATCH_EVENTS", 8)
            while outbox.batch(0) is not None:
                outbox.acknowledge(outbox.number)
            assert outbox._follower.cursor == {"runs": {}}
        costs.append(len(seen))
        assert os.listdir(spool / ".ended") == []
    assert costs[1] < 2.2 * costs[0], costs


def test_batches_of_a_backlog_become_bigger_until_it_is_over(spool, file, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_EVENTS", 2)
    monkeypatch.setattr(batches, "MOST_EVENTS", 8)
    for run in range(13):  # two events each
        with Writer(spool, f"r{run}") as writer:
            writer.end()
    sizes = []
    with Outbox(spool, file) as outbox:
        while (lines := outbox.batch(0)) is not None:
            sizes.append(len(lines) - 1)
            outbox.acknowledge(outbox.number)
            if sum(sizes) == 26:
                with Writer(spool, "last") as writer:
                    writer.running().end()
    assert sizes == [2, 4, 8, 8, 4, 2]


def test_life_of_a_run_is_told_in_lines(spool, file):
    with Outbox(spool, file) as outbox:
        with Writer(spool) as writer:
            writer.running().write(b"hello\n").end(3)
        lines = objects(outbox.batch(0))
    status = json.loads((spool / "r" / "status.json").read_text())
    assert lines[-2].pop("status").items() >= status.items()
    assert lines == [
        {"event": "started", "run_id": "r", "key": writer.run.key},
        {"event": "output", "run_id": "r", "stream": "stdout", "offset": 0, "text": "hello\n"},
        {"event": "ended", "run_id": "r"},
        {"event": "batch", "batch": 1},
    ]


def test_text_is_never_cut_inside_a_character(spool, file):
    with Outbox(spool, file) as outbox, Writer(spool) as writer:
        for number, part in enumerate([b"a" + DUCK[:1], DUCK[1:3], DUCK[3:] + b"b"], start=1):
            writer.write(part)
            if number == 1:
                assert outputs(outbox.batch(0)) == [("stdout", 0, "a")]
                outbox.acknowledge(1)
            elif number == 2:
                assert outbox.batch(0) is None
        assert outputs(outbox.batch(0)) == [("stdout", 1, "🦆b")]


def test_beginning_of_a_character_that_waits_is_not_lost_with_its_reader(spool, file):
    with Writer(spool) as writer:
        writer.write(b"a" + DUCK[:2])
        with Outbox(spool, file) as outbox:
            outbox.batch(0)
            outbox.acknowledge(1)
            writer.write(b"".join([DUCK[2:], b"b", DUCK[:1]]))
            assert outputs(outbox.batch(0)) == [("stdout", 1, "🦆b")]
            outbox.acknowledge(2)
        writer.write(DUCK[1:])
        with Outbox(spool, file) as outbox:
            assert outputs(outbox.batch(0)) == [("stdout", 1, "🦆b")], (
                "the last batch, word for word"
            )
            outbox.acknowledge(2)
            assert outputs(outbox.batch(0)) == [("stdout", 6, "🦆")]


def test_bytes_that_are_no_text_are_base64(spool, file):
    with Writer(spool) as writer:
        writer.write(b"\xff\xfe" + DUCK).write(DUCK[:3], "stderr").end()
    with Outbox(spool, file) as outbox:
        encoded = [base64.b64encode(data).decode() for data in (b"\xff\xfe" + DUCK, DUCK[:3])]
        assert outputs(outbox.batch(0)) == [("stdout", 0, encoded[0]), ("stderr", 0, encoded[1])]


def test_character_is_not_cut_where_bytes_before_it_are_no_text(spool, file):
    with Outbox(spool, file) as outbox, Writer(spool) as writer:
        writer.write(b"\xff" + DUCK[:2])
        assert outputs(outbox.batch(0)) == [("stdout", 0, base64.b64encode(b"\xff").decode())]
        outbox.acknowledge(1)
        writer.write(DUCK[2:] + b"b")
        assert outputs(outbox.batch(0)) == [("stdout", 1, "🦆b")]


def test_character_is_not_cut_where_the_other_stream_shrinks(spool, file):
    with Outbox(spool, file) as outbox, Writer(spool) as writer:
        writer.write(b"longer").write(DUCK[:2], "stderr")
        outbox.batch(0)
        outbox.acknowledge(1)
        os.truncate(spool / "r" / "stdout", 1)
        assert [line["event"] for line in objects(outbox.batch(0))] == ["shrank", "output", "batch"]
        outbox.acknowledge(2)
        writer.write(DUCK[2:], "stderr")
        assert outputs(outbox.batch(0)) == [("stderr", 0, "🦆")]


@pytest.mark.parametrize("seed", range(20))
def test_wherever_bytes_are_cut_each_character_is_whole_in_one_line(spool, file, seed):
    dice = random.Random(seed)
    data = b"".join(
        dice.choice([DUCK, b"\xff", "ß".encode(), "名".encode(), b"a"]) for _ in range(60)
    )
    pieces = []
    with Outbox(spool, file) as outbox, Writer(spool) as writer:
        begin = 0
        while begin < len(data):
            end = begin + dice.randrange(1, 6)
            writer.write(data[begin:end])
            begin = end
            if lines := outbox.batch(0):
                pieces += outputs(lines)
                outbox.acknowledge(outbox.number)
        writer.end()
        pieces += outputs(outbox.batch(0))
    whole = data.decode("utf-8", "surrogateescape")
    bounds = {
        len(whole[:number].encode("utf-8", "surrogateescape")) for number in range(len(whole) + 1)
    }
    assert {offset for _, offset, _ in pieces} <= bounds, f"seed {seed}"


def test_next_batch_waits_for_the_acknowledgement(spool, file):
    with Outbox(spool, file) as outbox, Writer(spool):
        outbox.batch(0)
        with pytest.raises(
            SpecError, match="^unable to make the next batch: batch 1 was not acknowledged$"
        ):
            outbox.batch(0)
        with pytest.raises(SpecError, match="^unable to acknowledge batch 2: want batch 1$"):
            outbox.acknowledge(2)
        outbox.acknowledge(1)
        with pytest.raises(
            SpecError, match="^unable to acknowledge batch 1: no batch waits to be acknowledged$"
        ):
            outbox.acknowledge(1)
        assert outbox.batch(0) is None


def test_acknowledged_endings_are_collected(spool, file):
    with Writer(spool) as writer:
        writer.end()
    with Outbox(spool, file) as outbox:
        outbox.batch(0)
        assert os.listdir(spool / ".ended") == ["r"]
        outbox.acknowledge(1)
        assert os.listdir(spool / ".ended") == []
    with Outbox(spool, file) as outbox:
        assert objects(outbox.batch(0))[-1] == {"event": "batch", "batch": 1}
        outbox.acknowledge(1)
        assert outbox.batch(0) is None


def test_ending_takes_one_look_and_one_collection(spool, file, monkeypatch):
    """A scheduler that comes back to thousands of endings waits for each look of each of them."""
    for number in range(3):
        with Writer(spool, f"r{number}") as writer:
            writer.write(b"x").end()
    until(lambda: look.edition(os.stat(spool / "r2")))
    read, removed = [], []
    read_json, remove_entry = format.read_json, format.remove_entry

    def reads(fd, name):
        read.append(name)
        return read_json(fd, name)

    def removes(spool_fd, name, run_id):
        removed.append((name, run_id))
        return remove_entry(spool_fd, name, run_id)

    monkeypatch.setattr(format, "read_json", reads)
    monkeypatch.setattr(format, "remove_entry", removes)
    with Outbox(spool, file) as outbox:
        kinds = [line["event"] for line in objects(outbox.batch(0))]
        assert sorted(kinds) == ["batch"] + 3 * ["ended"] + 3 * ["output"] + 3 * ["started"]
        assert sorted(read) == 3 * ["spec.json"] + 3 * ["status.json"]
        outbox.acknowledge(1)
    assert removed == [(".ended", f"r{number}") for number in range(3)]
    assert sorted(read) == 3 * ["spec.json"] + 3 * ["status.json"]
    assert os.listdir(spool / ".ended") == []


def test_outbox_without_a_file_tells_all_and_collects_nothing(spool):
    for _ in range(2):
        with Outbox(spool) as outbox:
            if not (spool / "r").exists():
                with Writer(spool) as writer:
                    writer.end()
            assert [line["event"] for line in objects(outbox.batch(0))] == [
                "started",
                "ended",
                "batch",
            ]
            assert outbox.batch(0) is None


def test_large_output_is_spread_over_batches(spool, file):
    with Writer(spool) as writer:
        writer.write(b"x" * (3 << 20)).end()
    sizes = []
    with Outbox(spool, file) as outbox:
        while lines := outbox.batch(0):
            sizes.append(sum(len(text) for *_, text in outputs(lines)))
            outbox.acknowledge(outbox.number)
    assert sizes == [1 << 20] * 3 + [0]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "it is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "file: want an object, got a list"),
        ('{"version": 1, "cursor": {}, "lines": []}', "batch: required field is missing"),
        (
            '{"version": 2, "batch": 1, "cursor": {}, "lines": []}',
            "version: want 1, got 2",
        ),
        (
            '{"version": 1, "batch": 1, "cursor": {}, "lines": ["x"]}',
            "lines[0]: want an event as a line of JSON, got a string",
        ),
        (
            '{"version": 1, "batch": 1, "cursor": {"runs": []}, "lines": []}',
            "cursor.runs: want an object, got a list",
        ),
    ],
)
def test_damaged_cursor_file_is_refused_with_one_sentence(spool, file, text, sentence):
    with open(file, "w") as opened:
        opened.write(text)
    with pytest.raises(
        SpecError, match="^" + re.escape(f"unable to read cursor file {file!r}: {sentence}") + "$"
    ):
        Outbox(spool, file)


def test_cursor_file_that_can_not_be_written_hands_out_nothing(spool, file):
    os.mkdir(f"{file}.new")
    with Writer(spool), Outbox(spool, file) as outbox:
        with pytest.raises(
            SpoolError,
            match="^" + re.escape(f"unable to write cursor file {file!r}: Is a directory") + "$",
        ):
            outbox.batch(0)


def test_batch_that_could_not_be_kept_is_the_next_one(spool, file):
    """
    A disk that was full for a while: the follower does not repeat what it has delivered already.
    """
    with Writer(spool) as writer, Outbox(spool, file) as outbox:
        writer.running().write(b"one")
        os.mkdir(f"{file}.new")
        for _ in range(2):
            with pytest.raises(SpoolError, match="Is a directory$"):
                outbox.batch(0)
        os.rmdir(f"{file}.new")
        lines = outbox.batch(0)
        assert [line["event"] for line in objects(lines)] == [
            "started",
            "changed",
            "output",
            "batch",
        ]
        outbox.acknowledge(1)
        writer.write(b"two")
        assert outputs(outbox.batch(0)) == [("stdout", 3, "two")]
    with Outbox(spool, file) as outbox:
        assert outputs(outbox.batch(0)) == [("stdout", 3, "two")]


def test_ending_is_handed_out_before_the_removal_of_its_spool_is_told(spool, file):
    with Writer(spool), Outbox(spool, file) as outbox:
        outbox.batch(0)
        outbox.acknowledge(1)
        shutil.rmtree(spool)
        assert objects(outbox.batch(5)) == [
            {"event": "ended", "run_id": "r", "status": None},
            {"event": "batch", "batch": 2},
        ]
        outbox.acknowledge(2)
        with pytest.raises(
            SpoolError, match="^unable to follow spool '.*' any longer: it was removed$"
        ):
            outbox.batch(5)


def test_batch_is_on_the_disk_under_its_name_before_it_is_handed_out(spool, file, monkeypatch):
    """
    Otherwise a power cut could take it away from a consumer that has its number, and another batch
    would come with that number.
    """
    steps = []
    synced, renamed = os.fsync, os.rename

    def fsync(fd):
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        synced(fd)

    def rename(old, new):
        steps.append(("rename", new))
        renamed(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    with Writer(spool), Outbox(spool, file) as outbox:
        monkeypatch.setattr(os, "rename", rename)
        steps.clear()
        outbox.batch(0)
        assert steps == [
            ("fsync", f"{file}.new"),
            ("rename", file),
            ("fsync", os.path.dirname(file)),
        ]


def test_cursor_file_in_no_directory_is_refused(spool):
    with pytest.raises(
        SpoolError,
        match="^unable to lock cursor file '.*/no/cursor.json': No such file or directory$",
    ):
        Outbox(spool, str(spool / "no" / "cursor.json"))


def test_conversation_ends_with_its_consumer_and_refuses_nonsense(spool, file):
    with Writer(spool) as writer, Outbox(spool, file) as outbox:
        told = conversation(outbox, ["1\n"])
        assert next(told).count("\n") == 3
        writer.write(b"x")
        assert next(told).count("\n") == 2
        assert list(told) == []
        writer.write(b"y")
        outbox.acknowledge(2)
        told = conversation(outbox, ["no\n"])
        next(told)
        with pytest.raises(
            SpecError, match="^unable to understand the answer 'no': want the number of a batch$"
        ):
            next(told)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (lambda path, outside: path.symlink_to(outside), "Too many levels of symbolic links"),
        (lambda path, outside: os.mkfifo(path), "Illegal seek"),
        (lambda path, outside: path.mkdir(), "Is a directory"),
    ],
    ids=["symlink", "fifo", "directory"],
)
def test_what_is_planted_as_the_lock_of_a_cursor_file_is_not_used(spool, tmp_path, plant, reason):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    file = str(tmp_path / "cursor.json")
    plant(tmp_path / "cursor.json.lock", outside)
    with pytest.raises(SpoolError) as caught:
        Outbox(spool, file)
    assert str(caught.value) == f"unable to lock cursor file {file!r}: {reason}"
    assert outside.read_text() == "mine" and not os.path.lexists(file)


def test_cursor_file_that_another_outbox_uses_is_refused(spool, file, monkeypatch):
    monkeypatch.setattr(batches, "PATIENCE_S", 0.01)
    with Outbox(spool, file) as outbox, Writer(spool):
        assert outbox.batch(0)
        with pytest.raises(
            SpoolError,
            match="^"
            + re.escape(f"unable to use cursor file {file!r}: it is in use by pid {os.getpid()}")
            + "$",
        ):
            Outbox(spool, file)
        outbox.acknowledge(1)
    with Outbox(spool, file) as outbox:
        assert objects(outbox.batch(0))[-1] == {"event": "batch", "batch": 1}
