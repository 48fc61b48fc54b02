"""tail --timestamps: the time before each line, and the order of both streams."""

import os
import re
import subprocess

import pytest

from spool_tests.support.commands import shell, streams
from spool_tests.support.places import CHAPERONE
from spool_tests.support.timelines import lines, steps
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

TIMES = {"timeline": True}
TIME = re.compile(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z ", re.M)


def of(directory):
    """The times of a timeline's lines, as printed."""
    moments = [subprocess.run(
        ["date", "-u", "-d", f"@{ms / 1000:.3f}", "+%Y-%m-%dT%H:%M:%S.%3NZ"],
        capture_output=True, text=True, check=True,
    ).stdout.strip() for ms, *_ in lines(directory)]  # fmt: skip
    return moments


def together(*words):
    """What a command writes to a stdout and a stderr that are one."""
    return subprocess.run(
        [*CHAPERONE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_each_line_has_its_time_and_both_streams_their_order(chaperone, spool, words):
    chaperone("run", "-", spec=shell("r", steps(spool / "r"), output=TIMES))
    texts = [f"{stream} {n}" for n in (1, 2, 3) for stream in ("out", "err")]
    stamped = [f"{when} {text}\n" for when, text in zip(of(spool / "r"), texts, strict=True)]
    assert streams(chaperone("tail", *words, "--timestamps", "r")) == (
        0,
        "".join(stamped[0::2]),
        "".join(stamped[1::2]),
    )
    assert together("tail", *words, "--timestamps", "r") == "".join(stamped)
    assert streams(chaperone("tail", *words, "--timestamps", "r", "stderr")) == (
        0,
        "".join(stamped[1::2]),
        "",
    )
    assert together("tail", *words, "--timestamps", "-n", "1", "r") == "".join(stamped[4:])
    assert together("tail", *words, "--timestamps", "-n", "0", "r") == ""


def test_lines_that_are_written_while_it_follows_have_theirs(chaperone, held, spool, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    held(shell("r", f"echo first; cat {tmp_path}/fifo", output=TIMES))
    command = [*CHAPERONE, "tail", "-f", "--timestamps", "r"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert TIME.sub("", follower.stdout.readline()) == "first\n"
        with open(tmp_path / "fifo", "wb", buffering=0) as fifo:
            fifo.write(b"second\nth")
            assert TIME.sub("", follower.stdout.readline()) == "second\n"
            until(lambda: sum(line[3] for line in lines(spool / "r")) == 15)
            fifo.write(b"ird\nfourth")
            assert TIME.sub("", follower.stdout.readline()) == "third\n"
        text = follower.stdout.read()
    assert TIME.match(text) and TIME.sub("", text) == "fourth"
    printed = chaperone("tail", "--timestamps", "r").stdout
    assert printed.endswith(text) and len(TIME.findall(printed)) == 4


def test_line_has_the_time_of_its_first_byte(chaperone, spool):
    wait = f'until [ -s "{spool}/r/timeline" ]; do sleep 0.01; done; sleep 0.01'
    chaperone("run", "-", spec=shell("r", f"printf a; {wait}; printf 'b\\nc'", output=TIMES))
    first, second = of(spool / "r")
    want = (0, f"{first} ab\n{second} c", "")
    assert streams(chaperone("tail", "--timestamps", "r")) == want


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_bytes_without_a_line_have_a_dash(chaperone, spool, words):
    chaperone("run", "-", spec=shell("r", "echo one; echo two", output=TIMES))
    (line, *_) = (spool / "r" / "timeline").read_text().splitlines()
    (spool / "r" / "timeline").write_text(" ".join([*line.split()[:3], "4"]) + "\n")
    (when,) = of(spool / "r")
    want = (0, f"{when} one\n- two\n", "")
    assert streams(chaperone("tail", *words, "--timestamps", "r")) == want


def test_live_run_is_printed_without_waiting_for_more(chaperone, held, spool):
    directory = held(shell("r", "echo out; exec sleep 600", output=TIMES))
    until(lambda: lines(directory))
    code, out, err = streams(chaperone("tail", "--timestamps", "r"))
    assert (code, TIME.sub("", out), err) == (0, "out\n", "")


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_several_runs_are_named(chaperone, spool, words):
    for run_id in ("a", "b"):
        chaperone("run", "-", spec=shell(run_id, f"echo {run_id}", output=TIMES))
    (a,), (b,) = of(spool / "a"), of(spool / "b")
    assert streams(chaperone("tail", *words, "--timestamps", "a", "b")) == (
        0,
        f"==> a <==\n{a} a\n\n==> b <==\n{b} b\n",
        "",
    )


def test_run_without_a_timeline_is_refused_before_anything_is_printed(chaperone):
    chaperone("run", "-", spec=shell("with", "echo with", output=TIMES))
    chaperone("run", "-", spec=shell("without", "echo without"))
    sentence = (
        "chaperone: unable to print the times of run 'without': it has no timeline; "
        "its spec would need output.timeline\n"
    )
    for words in (["without"], ["with", "without"], ["-f", "without"], ["without", "stdout"]):
        want = (os.EX_NOINPUT, "", sentence)
        assert streams(chaperone("tail", "--timestamps", *words)) == want


def test_exec_keeps_no_timeline(chaperone, spool):
    spec = shell("r", "echo out", output=TIMES)
    assert streams(chaperone("exec", "-", spec=spec)) == (0, "out\n", "")
    assert list(spool.glob("*/timeline")) == []


def test_log_has_times_of_its_own(chaperone):
    chaperone("run", "-", spec=shell("r", "echo out", output=TIMES))
    assert streams(chaperone("tail", "--timestamps", "r", "log")) == (
        os.EX_USAGE,
        "",
        "chaperone: unable to print the times of 'log': each of its lines begins with its time\n",
    )


def test_bytes_stay_as_they_are(chaperone, spool):
    data = bytes(range(256)) * 300
    text = "i=0; while [ $i -lt 300 ]; do cat data; i=$((i+1)); done"
    (spool.parent / "data").write_bytes(bytes(range(256)))
    spec = shell("r", text, output=TIMES)
    spec["program"]["cwd"] = str(spool.parent)
    chaperone("run", "-", spec=spec)
    command = [*CHAPERONE, "tail", "--timestamps", "-n", "all", "r"]
    printed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    times = re.compile(rb"(^|(?<=\n))[-0-9T:]{19}\.[0-9]{3}Z ")
    assert times.sub(b"", printed) == data == (spool / "r" / "stdout").read_bytes()
