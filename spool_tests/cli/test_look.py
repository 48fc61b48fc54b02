"""
ls, status, tail and wait.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys

import pytest

from spool_tests.support.commands import ECHO, READY, SLEEP, masked, on_terminal, shell, streams
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.once

# -- looking


def test_ls_is_a_table_of_live_and_uncollected_runs(chaperone, held):
    chaperone("run", "-", spec=ECHO)
    directory = held(SLEEP)
    until(lambda: json.loads((directory / "running.json").read_text())["state"] == "running")
    result = chaperone("ls")
    assert (result.returncode, result.stderr) == (0, "")
    assert masked(result.stdout) == (
        "ID     STATE       AGE   ELAPSED  OUTCOME  BYTES  PROGRAM OR REASON\n"
        "echo   terminated  TTTT  TTTT     3        8      "
        "echo out; echo err >&2; exit 3\n"
        "sleep  running     TTTT  TTTT     -        0      /bin/sleep 1000\n"
    )


def test_ls_shows_collected_runs_only_if_asked(chaperone, spool):
    chaperone("run", "-", spec=ECHO)
    (spool / ".ended" / "echo").unlink()
    assert streams(chaperone("ls", "--json")) == (0, "", "")
    (line,) = chaperone("ls", "--all", "--json").stdout.splitlines()
    assert json.loads(line) == json.loads((spool / "echo" / "status.json").read_text())


def test_ls_of_an_empty_spool_is_a_heading(chaperone, spool):
    assert streams(chaperone("ls")) == (
        0,
        "ID  STATE  AGE  ELAPSED  OUTCOME  BYTES  PROGRAM OR REASON\n",
        "",
    )


def test_spool_that_was_backed_up_by_hard_links_can_be_used(chaperone, held, spool, tmp_path):
    chaperone("run", "-", spec=ECHO)
    held(SLEEP)
    chaperone("run", "--id", "old", "-", spec=ECHO)
    assert chaperone("gc", "--older", "1d").returncode == 0
    subprocess.run(["cp", "-al", spool, tmp_path / "backup"], check=True)
    for path in (spool, tmp_path / "backup"):
        states = [line.split()[1] for line in chaperone("ls", "--spool", path).stdout.splitlines()]
        assert states == ["STATE", "terminated", "running", "terminated"]
        assert streams(chaperone("tail", "--spool", path, "echo", "stdout")) == (0, "out\n", "")
    assert streams(chaperone("stop", "sleep")) == (0, "", "")
    assert streams(chaperone("wait", "sleep")) == (143, "", "")
    assert chaperone("gc", "--older", "0s", "--uncollected").returncode == 0
    assert [name for name in os.listdir(spool) if not name.startswith(".")] == []
    assert (tmp_path / "backup" / "echo" / "stdout").read_text() == "out\n"


@pytest.mark.parametrize("words", [[], ["--all"], ["--json"]])
def test_ls_tells_what_it_can_where_a_run_can_not_be_read(chaperone, spool, tmp_path, words):
    for run_id in ("bad", "good"):
        chaperone("run", "--id", run_id, "-", spec=ECHO)
    (spool / "bad").chmod(0o777)
    (tmp_path / "backup").hardlink_to(spool / "bad" / "status.json")
    result = chaperone("ls", *words)
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        (
            "chaperone: unable to read run 'bad': unable to open 'status.json': "
            "want a file of this user without other hard links\n"
        ),
    )
    assert (
        len(result.stdout.splitlines()) == (1 if words == ["--json"] else 2)
        and "good" in result.stdout
    )


def test_ls_tells_outcomes(chaperone, held, spool):
    chaperone("run", "-", spec=shell("a-signal", "kill -SEGV $$"))
    chaperone("run", "-", spec={"id": "b-error", "program": {"argv": ["/nowhere"]}})
    chaperone("run", "-", spec=shell("c-timeout", "sleep 100", timeouts={"run": 0.1}))
    dead = held({**SLEEP, "id": "d-lost"})
    os.kill(json.loads((dead / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    until(lambda: '"lost"' in chaperone("status", "d-lost").stdout)
    rows = [line.split("  ") for line in chaperone("ls").stdout.splitlines()[1:]]
    found = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in rows}
    assert [(cells[1], cells[4]) for cells in found.values()] == [
        ("terminated", found["a-signal"][4]),
        ("error", "spawn"),
        ("terminated", "SIGTERM (timeout)"),
        ("lost", "chaperone"),
    ]
    assert found["a-signal"][4] in ("SIGSEGV", "SIGSEGV (core)")


def test_ls_on_a_terminal_is_cut_and_coloured(chaperone):
    chaperone("run", "-", spec=shell("long", "echo " + "x" * 100))
    code, written = on_terminal("ls", columns=70)
    heading, line = written.decode().splitlines()
    plain = re.sub(r"\x1b\[\d*m", "", line)
    assert code == 0 and len(plain) == 70 and plain.endswith("xx…")
    assert line.startswith("long  \x1b[32mterminated\x1b[0m  ")
    assert heading == re.sub(r"\x1b\[\d*m", "", heading)
    assert b"\x1b" not in on_terminal("ls", environ={"NO_COLOR": "1"})[1]
    assert b"\x1b" not in on_terminal("ls", environ={"TERM": "dumb"})[1]


def test_nothing_of_a_program_moves_a_terminal(chaperone):
    evil = "\x1b]0;owned\x07\x9b31m\x7f\u202e\r\n"
    spec = {
        "id": "evil",
        "labels": {evil: evil},
        "program": {"argv": ["/nowhere" + evil, evil, "\udcff"], "env": {"E": evil}},
    }
    chaperone("run", "-", spec=spec)
    for words in (
        ("ls",),
        ("ls", "--all"),
        ("ls", "--json"),
        ("status", "evil"),
        ("wait", "evil"),
        ("status", "evil" + evil),
        ("tail", "evil" + evil),
    ):
        written = re.sub(
            r"\x1b\[\d+m([a-z]+)\x1b\[0m", r"\1", on_terminal(*words, columns=1_000)[1].decode()
        )
        assert [char for char in written if not char.isprintable() and char != "\n"] == [], words
    chaperone("run", "-", spec={"id": "evil-2", "program": {"argv": ["true", evil]}})
    shown = chaperone("ls").stdout
    assert "unable to run '/nowhere\\x1b]0;owned\\x07\\x9b31m\\x7f\\u202e\\r\\n': " in shown
    assert "true '\\x1b]0;owned\\x07\\x9b31m\\x7f\\u202e\\x0d\\x0a'\n" in shown


def test_status_is_json_on_one_line_and_indented_on_a_terminal(chaperone, spool):
    chaperone("run", "-", spec={**ECHO, "labels": {"team": "größe\x7f"}})
    result = chaperone("status", "echo")
    final = json.loads((spool / "echo" / "status.json").read_text())
    assert (result.returncode, result.stdout.count("\n"), result.stderr) == (0, 1, "")
    assert json.loads(result.stdout) == final
    code, written = on_terminal("status", "echo")
    assert code == 0 and json.loads(written) == final
    assert '  "labels": {\n    "team": "größe\\u007f"\n  },\n' in written.decode()


def test_status_of_a_live_run_tells_the_bytes_of_now(chaperone, held, spool):
    directory = held(READY)
    until(lambda: (directory / "stdout").read_bytes())
    found = json.loads(chaperone("status", "ready").stdout)
    assert (found["state"], found["stdout"]) == ("running", {"bytes": 6, "dropped": 0})


# -- tail


def test_tail_prints_each_stream_to_its_own(chaperone):
    chaperone("run", "-", spec=ECHO)
    assert streams(chaperone("tail", "echo")) == (0, "out\n", "err\n")
    assert streams(chaperone("tail", "echo", "stdout")) == (0, "out\n", "")
    assert streams(chaperone("tail", "echo", "stderr")) == (0, "err\n", "")
    assert streams(chaperone("tail", "echo", "log")) == (0, "", "")


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("lines", [0, 1, 2, 10, 4_999, 5_000, 6_000, "all"])
def test_tail_prints_the_last_lines(chaperone, lines, end):
    text = "\n".join(f"{number} {'x' * (number % 50)}" for number in range(5_000)) + end
    chaperone("run", "-", spec={"id": "cat", "program": {"argv": ["cat"], "stdin": text}})
    want = (
        text
        if lines == "all"
        else "".join(text.splitlines(keepends=True)[-lines:] if lines else [])
    )
    assert streams(chaperone("tail", "-n", lines, "cat", "stdout")) == (0, want, "")


def test_tail_gives_bytes_as_they_are(chaperone):
    chaperone("run", "-", spec=shell("raw", r"printf '\033[31m\377\000'"))
    assert (
        subprocess.run([*CHAPERONE, "tail", "raw"], capture_output=True).stdout == b"\x1b[31m\xff\0"
    )


def test_tail_says_once_what_was_dropped(chaperone):
    chaperone("run", "-", spec=shell("full", "echo one; echo two", output={"max_bytes": 4}))
    sentence = (
        "chaperone: 4 bytes of stdout were dropped: the limit was reached or the disk "
        "was full; the run's log says when\n"
    )
    assert streams(chaperone("tail", "full")) == (0, "one\n", sentence)
    assert streams(chaperone("tail", "-f", "full")) == (0, "one\n", sentence)
    assert streams(chaperone("tail", "full", "stderr")) == (0, "", "")


def test_tail_says_once_that_a_stream_shrank(chaperone, spool):
    chaperone("run", "-", spec=shell("cut", "echo one; echo two"))
    os.truncate(spool / "cut" / "stdout", 4)
    sentence = (
        "chaperone: stdout is 4 bytes shorter than it was: it was truncated after it was written\n"
    )
    assert streams(chaperone("tail", "cut")) == (0, "one\n", sentence)


def test_tail_says_once_that_the_end_may_be_missing(chaperone, held):
    directory = held(READY)
    until(lambda: (directory / "stdout").read_bytes())
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    until(lambda: '"lost"' in chaperone("status", "ready").stdout)
    sentence = (
        "chaperone: the end of stdout may be missing: the chaperone died before the "
        "program's end was recorded\n"
    )
    assert streams(chaperone("tail", "ready", "stdout")) == (0, "ready\n", sentence)
    assert streams(chaperone("tail", "-f", "ready", "stdout")) == (0, "ready\n", sentence)


def test_tail_follows_to_the_end(chaperone, held, spool, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    held(shell("follow", f"printf 'be'; cat {tmp_path}/fifo; echo err >&2"))
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-f", "follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as follower:
        assert follower.stdout.read(2) == b"be"
        with open(tmp_path / "fifo", "wb", buffering=0) as fifo:
            for data in (b"gin\n", b"m\xffiddle", b"\nend\n"):
                fifo.write(data)
                assert follower.stdout.read(len(data)) == data
        assert follower.communicate() == (b"", b"err\n")
    assert follower.returncode == 0


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_tail_of_several_runs_names_each(chaperone, words):
    for run_id in ("a", "b"):
        chaperone("run", "-", spec=shell(run_id, f"echo {run_id}; echo {run_id}{run_id} >&2"))
    chaperone("run", "-", spec=shell("c", "exit 0"))
    assert streams(chaperone("tail", *words, "a", "b", "c", "a")) == (
        0,
        "==> a <==\na\n\n==> b <==\nb\n",
        "==> a <==\naa\n\n==> b <==\nbb\n",
    )
    assert streams(chaperone("tail", *words, "a", "b", "stderr")) == (
        0,
        "==> a <==\naa\n\n==> b <==\nbb\n",
        "",
    )


def test_tail_follows_several_runs_to_the_last_end(chaperone, held, tmp_path):
    for run_id in ("a", "b"):
        os.mkfifo(tmp_path / run_id)
        held(shell(run_id, f"echo begin; cat {tmp_path / run_id}"))
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-f", "a", "b"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as follower:
        begun = sorted(follower.stdout.readline() for _ in range(5))
        assert begun == sorted([b"==> a <==\n", b"==> b <==\n", b"\n", b"begin\n", b"begin\n"])
        for run_id in ("b", "a"):
            (tmp_path / run_id).write_text(f"end of {run_id}\n")
            seen = b""
            while not seen.endswith(f"end of {run_id}\n".encode()):
                seen += follower.stdout.readline()
        assert seen == b"\n==> a <==\nend of a\n"
        assert follower.communicate() == (b"", b"")
    assert follower.returncode == 0


def test_tail_of_several_runs_names_the_one_with_a_gap(chaperone):
    chaperone("run", "-", spec=shell("full", "echo one; echo two", output={"max_bytes": 4}))
    chaperone("run", "-", spec=shell("whole", "echo one"))
    sentence = (
        "chaperone: run 'full': 4 bytes of stdout were dropped: the limit was reached or the disk"
        " was full; the run's log says when\n"
    )
    assert chaperone("tail", "full", "whole").stderr == sentence


def test_tail_of_many_bytes_is_what_was_written(chaperone, spool):
    chaperone("run", "-", spec=shell("many", "seq 1000000"))
    for words in (), ("-f",):
        assert (
            chaperone("tail", *words, "-n", "all", "many").stdout
            == (spool / "many" / "stdout").read_text()
        )


# -- waiting


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ],
)
def test_wait_and_exec_exit_as_the_program(chaperone, text, code):
    chaperone("run", "-", spec=shell("w", text))
    assert streams(chaperone("wait", "w")) == (code, "", "")
    assert streams(chaperone("exec", "-", spec=shell("w", text))) == (code, "", "")


def test_wait_and_exec_exit_125_where_it_could_not_be_run(chaperone):
    spec = {"id": "none", "program": {"argv": ["/nowhere/x"]}}
    chaperone("run", "-", spec=spec)
    message = json.loads(chaperone("status", "none").stdout)["exception"]["message"]
    assert streams(chaperone("wait", "none")) == (
        125,
        "",
        f"chaperone: run 'none' is in error: {message}\n",
    )
    assert streams(chaperone("exec", "-", spec=spec)) == (125, "", f"chaperone: {message}\n")


def test_wait_for_several_exits_as_the_worst(chaperone):
    for code in (0, 7, 2):
        chaperone("run", "-", spec=shell(f"w{code}", f"exit {code}"))
    assert streams(chaperone("wait", "w0", "w7", "w2")) == (7, "", "")


@pytest.mark.parametrize("words", [["wait"], ["stop", "--grace", "60"]])
def test_several_runs_are_waited_for_by_one_inotify_instance(held, tmp_path, words):
    need("strace")
    trace, go = tmp_path / "trace", tmp_path / "go"
    waits = f"trap '' TERM; until [ -e {go} ]; do sleep 0.01; done"
    for run_id in "abc":
        held({"id": run_id, "program": {"command": waits}})
    argv = ["strace", "-f", "-e", "trace=inotify_init1", "-o", trace, *CHAPERONE, *words, *"abc"]
    with subprocess.Popen(argv):
        until(lambda: trace.exists() and "inotify_init1(" in trace.read_text(), 60)
        go.touch()
    assert trace.read_text().count("inotify_init1(") == 1


def test_wait_gives_up_when_the_time_is_over(chaperone, held):
    chaperone("run", "-", spec=ECHO)
    held(SLEEP)
    assert streams(chaperone("wait", "--timeout", "0.1s", "echo", "sleep")) == (124, "", "")
    assert streams(chaperone("wait", "--timeout", "60s", "echo")) == (3, "", "")
    assert chaperone("wait", "--timeout", "5", "echo").returncode == os.EX_USAGE


def test_wait_tells_a_lost_run(chaperone, held):
    directory = held(SLEEP)
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    assert streams(chaperone("wait", "sleep")) == (
        125,
        "",
        (
            "chaperone: run 'sleep' is lost: the chaperone died before the program's end "
            "was recorded\n"
        ),
    )


@pytest.mark.parametrize("words", [("wait", "quiet"), ("tail", "-f", "quiet")], ids=" ".join)
def test_a_wait_is_one_sleep_that_the_kernel_ends(held, tmp_path, words):
    need("strace")
    trace = tmp_path / "trace"
    directory = held({**SLEEP, "id": "quiet"})
    process = subprocess.Popen(
        ["strace", "-f", "-o", trace, *CHAPERONE, *words], stdin=subprocess.DEVNULL
    )
    try:
        until(
            lambda: (
                trace.exists() and re.search(r"^\d+ +epoll_wait\([^\n]*\Z", trace.read_text(), re.M)
            ),
            timeout=60,
        )
        pidfd = os.pidfd_open(process.pid)
        for _ in range(
            5
            # its last preparations may wake it once; what wakes it each second never lets a second
            # pass
        ):
            before = trace.read_text()
            assert select.select([pidfd], [], [], 1.2)[0] == []
            if quiet := trace.read_text() == before:
                break
        os.close(pidfd)
    finally:
        with open(directory / "control", "w") as control:
            control.write("kill\n")
        process.wait(60)
    assert quiet, "nothing was called while nothing happened"
    assert process.returncode == (137 if words[0] == "wait" else 0)


def test_a_spool_that_must_be_polled_is_told_in_a_sentence(chaperone, spool):
    chaperone("run", "-", spec=ECHO)
    script = """import sys
from chaperone.cli import main
from chaperone.follow import descriptors
descriptors.silent_filesystem = lambda fd: "nfs"
sys.exit(main.main(sys.argv[1:]))"""
    result = subprocess.run(
        [sys.executable, "-c", script, "tail", "-f", "echo"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0
    assert result.stdout == "out\n"
    assert re.fullmatch(
        r"err\nchaperone: [^\n]*inotify may be silent on nfs[^\n]*\n", result.stderr
    )
