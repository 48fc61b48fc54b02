"""
The command line as people and scripts use it: what it prints, what it says, and with which code it
exits.

Knows: argv, streams, exit codes, terminals.  Must not know: how anything is done.
"""

import fcntl
import json
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaperone.cli import arguments, common, completion, main, tables, terminal
from chaperone.cli.verbs import hold, look, upkeep
from chaperone.farside import payload
from chaperone.model import status
from spool_tests.conftest import CHAPERONE, ROOT, need, until

ECHO = {"id": "echo", "program": {"argv": ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]}}
SLEEP = {"id": "sleep", "program": {"argv": ["/bin/sleep", "1000"]}}
READY = {"id": "ready", "program": {"argv": ["/bin/sh", "-c", "echo ready; exec sleep 1000"]}}


def shell(run_id, text, **fields):
    return {"id": run_id, "program": {"argv": ["/bin/sh", "-c", text]}, **fields}


def streams(result):
    return result.returncode, result.stdout, result.stderr


def on_terminal(*arguments, columns=80, environ=()):
    """
    What a command writes to a terminal of so many columns: (exit code, bytes), line ends as
    written.
    """
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm", **dict(environ)}
    env.pop("NO_COLOR", None) if "NO_COLOR" not in dict(environ) else None
    process = subprocess.Popen(
        [*CHAPERONE, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    written = b""
    with open(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                written += terminal.read(65_536)
            except OSError:  # EIO: nobody has the other side open any more
                return process.wait(), written


def masked(text):
    """A table with its times, which differ from run to run, as `T` of the same width."""
    return re.sub(r"\b\d+\.\d+s\b", lambda found: "T" * len(found.group()), text)


# -- words


def test_run_prints_the_id_and_exits_0_whatever_the_outcome(chaperone):
    assert streams(chaperone("run", "-", spec=ECHO)) == (0, "echo\n", "")


@pytest.mark.parametrize(
    ("words", "spec", "code", "sentence"),
    [
        ([], None, os.EX_USAGE, f"unable to begin: want one of {', '.join(arguments.VERBS)}"),
        (
            ["frob"],
            None,
            os.EX_USAGE,
            f"unable to understand 'frob': want one of {', '.join(arguments.VERBS)}",
        ),
        (
            ["run"],
            None,
            os.EX_USAGE,
            "unable to understand 'chaperone run': the following arguments are required: SPEC",
        ),
        (
            ["ls", "--frob"],
            None,
            os.EX_USAGE,
            "unable to understand 'chaperone ls': unrecognized arguments: --frob",
        ),
        (
            ["run", "-", "--id"],
            ECHO,
            os.EX_USAGE,
            "unable to understand 'chaperone run': argument --id: expected one argument",
        ),
        (
            ["tail", "-n", "few", "x"],
            None,
            os.EX_USAGE,
            "unable to understand '--lines': want a number or all, got 'few'",
        ),
        (
            ["tail", "x", "stdin"],
            None,
            os.EX_USAGE,
            "unable to understand 'stdin': want stdout, stderr or log",
        ),
        (
            ["tail", "-f", "x", "log"],
            None,
            os.EX_USAGE,
            "unable to understand 'log': want stdout or stderr",
        ),
        (
            ["gc", "--older", "7d", "--spool", ""],
            None,
            os.EX_USAGE,
            "unable to understand '--spool': want a directory, got ''",
        ),
        (
            ["run", "--spool=", "-"],
            ECHO,
            os.EX_USAGE,
            "unable to understand '--spool': want a directory, got ''",
        ),
        (
            ["launcher", "--idle=-1"],
            None,
            os.EX_USAGE,
            "unable to understand '--idle': want seconds from 0 to 1e10, got '-1'",
        ),
        (
            ["run", "-1"],
            None,
            os.EX_USAGE,
            "unable to understand 'chaperone run': it has no option '-1'",
        ),
        (
            ["run", "-"],
            {"program": {"argv": "ls"}},
            os.EX_DATAERR,
            "unable to read spec '-': program.argv: want a non-empty list of strings, got 'ls'",
        ),
        (
            ["check", "-"],
            {},
            os.EX_DATAERR,
            "unable to read spec '-': program: want it, got nothing",
        ),
        (
            ["exec", "/nowhere/s"],
            None,
            os.EX_NOINPUT,
            "unable to read spec '/nowhere/s': No such file or directory",
        ),
        (["run", "/"], None, os.EX_NOINPUT, "unable to read spec '/': Is a directory"),
        (
            ["status", "x"],
            None,
            os.EX_NOINPUT,
            "unable to find run 'x': no run of this spool begins so",
        ),
        (
            ["stop", "../x"],
            None,
            os.EX_NOINPUT,
            "unable to find run '../x': no run of this spool begins so",
        ),
        (
            ["wait", ""],
            None,
            os.EX_NOINPUT,
            "unable to find run '': no run of this spool begins so",
        ),
        (
            ["ls", "--spool", "/nowhere/s"],
            None,
            os.EX_IOERR,
            "unable to open spool '/nowhere/s': No such file or directory",
        ),
        (
            ["run", "--spool", "/nowhere/s", "-"],
            ECHO,
            os.EX_CANTCREAT,
            "unable to open spool '/nowhere/s': No such file or directory",
        ),
    ],
)
def test_what_can_not_be_done_is_said_in_a_sentence(chaperone, words, spec, code, sentence):
    assert streams(chaperone(*words, spec=spec)) == (code, "", f"chaperone: {sentence}\n")


@pytest.mark.parametrize("verb", ["check", "run", "exec"])
def test_spec_without_an_end_takes_no_memory_without_one(chaperone, spool, verb):
    """By `ulimit -v`, in KiB: with less the interpreter itself would not start."""
    argv = ["sh", "-c", 'ulimit -v 500000; exec "$@"', "sh", *CHAPERONE, verb, "/dev/zero"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    sentence = "unable to read spec '/dev/zero': want at most 64 MiB of JSON, got more"
    assert streams(result) == (os.EX_DATAERR, "", f"chaperone: {sentence}\n")
    assert os.listdir(spool) == []


def test_second_run_of_an_id_is_refused(chaperone, spool):
    chaperone("run", "-", spec=ECHO)
    assert streams(chaperone("run", "-", spec=ECHO)) == (
        os.EX_CANTCREAT,
        "",
        "chaperone: unable to create run 'echo': it exists\n",
    )
    assert (spool / "echo" / "stdout").read_bytes() == b"out\n"


def test_id_of_the_command_line_beats_the_specs(chaperone):
    assert streams(chaperone("run", "--id", "other", "-", spec=ECHO)) == (0, "other\n", "")


def test_several_specs_are_several_runs(chaperone, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps(shell(name, f"echo {name}")))
    result = chaperone("run", tmp_path / "a", tmp_path / "b")
    assert (result.returncode, sorted(result.stdout.split()), result.stderr) == (0, ["a", "b"], "")


def test_several_specs_exit_as_the_first_that_failed(chaperone, tmp_path):
    (tmp_path / "bad").write_text("{}")
    (tmp_path / "good").write_text(json.dumps(ECHO))
    result = chaperone("run", tmp_path / "bad", tmp_path / "good", tmp_path / "good")
    assert (result.returncode, result.stdout) == (os.EX_DATAERR, "echo\n")


def test_a_file_that_begins_with_a_dash_stands_behind_two_dashes(chaperone, tmp_path):
    (tmp_path / "-x").write_text(json.dumps(ECHO))
    assert streams(chaperone("run", "--", "-x", cwd=tmp_path)) == (0, "echo\n", "")


def test_spool_is_the_option_else_the_environments_else_in_the_current_directory(
    chaperone, tmp_path, monkeypatch
):
    for words, path in (
        (["--spool", tmp_path / "option"], tmp_path / "option"),
        ([], tmp_path / "spool"),
    ):
        assert chaperone("run", *words, "-", spec=ECHO).returncode == 0
        assert (path / "echo" / "status.json").exists()
    monkeypatch.delenv("CHAPERONE_SPOOL")
    (tmp_path / "here").mkdir()
    assert chaperone("run", "-", spec=ECHO, cwd=tmp_path / "here").returncode == 0
    assert (tmp_path / "here" / "spool" / "echo" / "status.json").exists()


WORDS = [
    "--spool",
    "--id",
    "--detach",
    "--warm",
    "--idle",
    "-",
    "a",
    "b.json",
    "",
    "-x",
    "--spool=s",
    "--id=",
    "--det",
    "--detach=yes",
    "7",
    "0.5",
    "-1",
    "-h",
    "--help",
    "-x y",
]


@pytest.mark.once
@settings(max_examples=2_000, deadline=None)
@given(verb=st.sampled_from(sorted(main.LEAN)), words=st.lists(st.sampled_from(WORDS), max_size=6))
def test_what_is_read_by_hand_is_what_argparse_reads(verb, words):
    verb = arguments.VERBS[verb]
    try:
        by_hand = main.parsed(verb, words)
    except common.UsageError:
        return
    if by_hand is None:
        with pytest.raises(arguments.HelpAsked):
            arguments.parsed(verb, words)
        return
    assert vars(by_hand) == vars(arguments.parsed(verb, words))


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["a", "-", "--detach"], {"specs": ["a", "-"], "detach": True}),
        (
            ["--spool", "s", "a", "--id", "x", "--warm"],
            {"specs": ["a"], "spool": "s", "id": "x", "warm": True},
        ),
        (["a", "--spool=s"], {"specs": ["a"], "spool": "s"}),
        (["a", "--id", "-"], {"specs": ["a"], "id": "-"}),
        (["--", "--id"], {"specs": ["--id"]}),
    ],
)
def test_words_of_run_are_read_by_hand(words, given):
    nothing = {"specs": [], "spool": None, "id": None, "detach": False, "warm": False}
    assert vars(main.parsed(arguments.VERBS["run"], words)) == {**nothing, **given}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run", "-", "--det"], "'chaperone run': it has no option '--det'; did you mean '--detach'?"),
        (["run", "-", "--wram"], "'chaperone run': it has no option '--wram'; did you mean '--warm'?"),
        (["run", "-", "--warm=1"], "'chaperone run': argument --warm: takes no value, got '1'"),
        (["run", "-", "--id", "--warm"], "'chaperone run': argument --id: expected one argument"),
        (["exec", "-", "x"], "'chaperone exec': unrecognized arguments: x"),
        (["launcher", "x"], "'chaperone launcher': unrecognized arguments: x"),
        (["sttus"], "'sttus': did you mean 'status'?"),
        (["ps"], "'ps': did you mean 'ls'?"),
        (["logs"], "'logs': did you mean 'tail'?"),
        (["help"], "'help': did you mean '--help'?"),
        (["ru"], "'ru': did you mean 'run'?"),
    ],
)  # fmt: skip
def test_near_misses_are_answered_with_what_was_meant(chaperone, words, reason):
    answer = f"chaperone: unable to understand {reason}\n"
    assert streams(chaperone(*words)) == (os.EX_USAGE, "", answer)


# -- help


@pytest.mark.once
def test_help_lists_every_verb_and_no_other(chaperone):
    result = chaperone("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"^  (\w+) ", result.stdout, re.M) == list(arguments.VERBS)
    assert list(common.verbs_in(hold)) == list(main.LEAN)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.once
@pytest.mark.parametrize("verb", arguments.VERBS)
def test_help_of_a_verb_names_all_its_words(chaperone, verb):
    result = chaperone(verb, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: chaperone {verb} [-h]")
    for argument in arguments.VERBS[verb].arguments:
        for word in (
            *(argument.names if argument.is_option else ()),
            *argument.how["help"].split(),
            *([argument.how["metavar"]] if "metavar" in argument.how else []),
        ):
            assert word in result.stdout


@pytest.mark.once
def test_version_is_told_and_quick(chaperone):
    from chaperone import __version__

    assert streams(chaperone("--version")) == (0, f"chaperone {__version__}\n", "")


HEAVY = (
    "argparse",
    "json",
    "re",
    "signal",
    "subprocess",
    "attr",
    "attrs",
    "filelock",
    "inotify_simple",
    "asyncio",
    "enum",
    "typing",
    "collections",
)


@pytest.mark.once
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "/dev/null"]], ids=" ".join)
def test_lean_words_import_nothing_heavy(words):
    # What follows `run.run` is held to the same by its own test.
    script = """import sys
sys.path.append(sys.argv[1])
from chaperone.cli import main
from chaperone.launch import run
run.run = lambda *given, **options: 0
main.main(sys.argv[2:])
print(*sys.modules, file=sys.stderr)"""
    root = os.path.dirname(os.path.dirname(CHAPERONE[-1]))
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, root, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(result.stderr.split()) & set(HEAVY) == set()


# -- which run


def test_exact_id_beats_prefix_and_prefix_must_fit_one(chaperone):
    for run_id in ("load", "load-1", "load-2", "report"):
        chaperone("run", "--id", run_id, "-", spec=ECHO)
    assert json.loads(chaperone("status", "load").stdout)["run_id"] == "load"
    assert json.loads(chaperone("status", "rep").stdout)["run_id"] == "report"
    assert streams(chaperone("status", "load-")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to find run 'load-': 2 runs begin so: load-1, load-2\n",
    )
    assert streams(chaperone("wait", "lo")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to find run 'lo': 3 runs begin so: load, load-1, load-2\n",
    )


# -- looking


def test_ls_is_a_table_of_live_and_uncollected_runs(chaperone, held):
    chaperone("run", "-", spec=ECHO)
    directory = held(SLEEP)
    until(lambda: json.loads((directory / "running.json").read_text())["state"] == "running")
    result = chaperone("ls")
    assert (result.returncode, result.stderr) == (0, "")
    assert masked(result.stdout) == (
        "ID     STATE       AGE   ELAPSED  OUTCOME  BYTES  PROGRAM\n"
        "echo   terminated  TTTT  TTTT     3        8      /bin/sh -c 'echo out; echo err >&2; exit 3'\n"
        "sleep  running     TTTT  TTTT     -        0      /bin/sleep 1000\n"
    )


def test_ls_shows_collected_runs_only_if_asked(chaperone, spool):
    chaperone("run", "-", spec=ECHO)
    (spool / ".ended" / "echo").unlink()
    assert streams(chaperone("ls", "--json")) == (0, "", "")
    (line,) = chaperone("ls", "--all", "--json").stdout.splitlines()
    assert json.loads(line) == json.loads((spool / "echo" / "status.json").read_text())


def test_ls_of_an_empty_spool_is_a_heading(chaperone, spool):
    assert streams(chaperone("ls")) == (0, "ID  STATE  AGE  ELAPSED  OUTCOME  BYTES  PROGRAM\n", "")


@pytest.mark.parametrize("words", [[], ["--all"], ["--json"]])
def test_ls_tells_what_it_can_where_a_run_can_not_be_read(chaperone, spool, tmp_path, words):
    for run_id in ("bad", "good"):
        chaperone("run", "--id", run_id, "-", spec=ECHO)
    (tmp_path / "backup").hardlink_to(spool / "bad" / "status.json")
    result = chaperone("ls", *words)
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        "chaperone: unable to look into run 'bad': unable to open 'status.json': want a file of ours without other links\n",
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
    assert "'/nowhere\\x1b]0;owned\\x07\\x9b31m\\x7f\\u202e\\x0d\\x0a'" in chaperone("ls").stdout


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
    sentence = "chaperone: 4 bytes of stdout were dropped: the limit was reached or the disk was full; its log tells when\n"
    assert streams(chaperone("tail", "full")) == (0, "one\n", sentence)
    assert streams(chaperone("tail", "-f", "full")) == (0, "one\n", sentence)
    assert streams(chaperone("tail", "full", "stderr")) == (0, "", "")


def test_tail_says_once_that_a_stream_shrank(chaperone, spool):
    chaperone("run", "-", spec=shell("cut", "echo one; echo two"))
    os.truncate(spool / "cut" / "stdout", 4)
    sentence = "chaperone: stdout has 4 bytes less than it once had: it was cut short after it was written\n"
    assert streams(chaperone("tail", "cut")) == (0, "one\n", sentence)


def test_tail_says_once_that_the_end_may_be_missing(chaperone, held):
    directory = held(READY)
    until(lambda: (directory / "stdout").read_bytes())
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    until(lambda: '"lost"' in chaperone("status", "ready").stdout)
    sentence = "chaperone: the end of stdout may be missing: the chaperone died before the program's end was recorded\n"
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


@pytest.mark.parametrize("words", [["wait"], ["stop", "--grace", "5"]])
def test_several_runs_are_waited_for_by_one_inotify_instance(held, tmp_path, words):
    need("strace")
    for run_id in "abc":
        held({"id": run_id, "program": {"argv": ["sleep", "0.5"]}})
    trace = tmp_path / "trace"
    argv = ["strace", "-f", "-e", "trace=inotify_init1", "-o", trace, *CHAPERONE, *words, *"abc"]
    subprocess.run(argv, timeout=60, check=False)
    assert trace.read_text().count("inotify_init1(") == 1


def test_wait_tells_a_lost_run(chaperone, held):
    directory = held(SLEEP)
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    assert streams(chaperone("wait", "sleep")) == (
        125,
        "",
        "chaperone: run 'sleep' is lost: the chaperone died before the program's end was recorded\n",
    )


@pytest.mark.once
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
from chaperone.follow import follower as followers
followers.silent_filesystem = lambda fd: "nfs"
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


# -- asking


def test_stop_returns_when_the_run_has_ended(chaperone, held):
    directory = held(SLEEP)
    assert streams(chaperone("stop", "--by", "ops", "sle")) == (0, "", "")
    final = json.loads((directory / "status.json").read_text())
    assert (final["signal"], final["stop"]["reason"], final["stop"]["by"]) == (
        "SIGTERM",
        "request",
        "ops",
    )
    assert streams(chaperone("stop", "sleep")) == (0, "", ""), "what has ended is stopped"


def test_stop_with_no_grace_kills_what_will_not_stop(chaperone, held):
    directory = held(shell("deaf", "trap '' TERM; echo ready; while :; do sleep 1; done"))
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "--grace", "0.1", "deaf")) == (0, "", "")
    assert json.loads((directory / "status.json").read_text())["signal"] == "SIGKILL"


def test_stop_need_not_wait(chaperone, held):
    directory = held(shell("slow", "trap '' TERM; echo ready; exec sleep 1000"))
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "--no-wait", "slow")) == (0, "", "")
    until(lambda: json.loads((directory / "running.json").read_text())["state"] == "stopping")
    assert streams(chaperone("kill", "slow")) == (0, "", "")
    assert json.loads((directory / "status.json").read_text())["signal"] == "SIGKILL"


def test_stop_asks_all_before_it_waits_for_one(chaperone, held):
    held({**SLEEP, "id": "a"})
    held({**SLEEP, "id": "b"})
    assert streams(chaperone("stop", "a", "b", "a")) == (0, "", "")
    assert streams(chaperone("wait", "a", "b")) == (143, "", "")


def test_signal_reaches_the_program(chaperone, held):
    directory = held(
        shell("trap", "trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.01; done")
    )
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("signal", "trap", "usr1")) == (0, "", "")
    assert streams(chaperone("wait", "trap")) == (4, "", "")


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_stop_passes_over_what_it_can_not_ask(chaperone, held, spool, tmp_path, verb):
    chaperone("run", "--id", "bad", "-", spec=ECHO)
    (tmp_path / "backup").hardlink_to(spool / "bad" / "status.json")
    directory = held(SLEEP)
    sentence = "chaperone: unable to ask run 'bad': unable to open 'status.json': want a file of ours without other links\n"
    assert streams(chaperone(verb, "bad", "sleep")) == (os.EX_IOERR, "", sentence)
    assert (directory / "status.json").exists()


@pytest.mark.parametrize("name", ["SIGRTMIN+3", "rtmin+3", str(signal.SIGRTMIN + 3)])
def test_signal_takes_every_name_that_a_status_tells(chaperone, spool, name):
    assert (
        chaperone("run", "--detach", "-", spec={**READY, "stop": {"signal": name}}).returncode == 0
    )
    until(lambda: (spool / "ready" / "stdout").read_bytes())
    assert streams(chaperone("signal", "ready", name)) == (0, "", "")
    assert streams(chaperone("wait", "ready")) == (128 + signal.SIGRTMIN + 3, "", "")
    assert json.loads(chaperone("status", "ready").stdout)["signal"] == "SIGRTMIN+3"


def test_stop_sends_a_real_time_signal_that_the_spec_names(chaperone, held):
    directory = held({**READY, "stop": {"signal": "RTMIN+3", "grace_period": 60}})
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("stop", "ready")) == (0, "", "")
    found = json.loads((directory / "status.json").read_text())
    assert (found["signal"], found["stop"]["signal"]) == ("SIGRTMIN+3", "SIGRTMIN+3")


def test_signal_that_is_none_or_comes_too_late_is_refused(chaperone):
    chaperone("run", "-", spec=ECHO)
    sentence = "unable to signal run 'echo': want a signal's name such as 'SIGTERM', got 'FROB'"
    assert streams(chaperone("signal", "echo", "FROB")) == (
        os.EX_DATAERR,
        "",
        f"chaperone: {sentence}\n",
    )
    assert streams(chaperone("signal", "echo", "TERM")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to ask run 'echo': no chaperone is there\n",
    )


# -- exec


def test_exec_joins_its_streams_to_ours(chaperone, spool):
    assert streams(chaperone("exec", "-", spec=ECHO)) == (3, "out\n", "err\n")
    assert list(spool.iterdir()) == []


def test_exec_stops_its_program_by_our_signal(spool, tmp_path):
    (tmp_path / "s").write_text(
        json.dumps(
            shell("x", "trap 'echo bye; exit 6' TERM; echo ready; while :; do sleep 0.01; done")
        )
    )
    with subprocess.Popen([*CHAPERONE, "exec", tmp_path / "s"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == b"bye\n"
    assert process.returncode == 6


def test_exec_drops_what_nobody_reads_and_says_so(chaperone):
    reading, writing = os.pipe()
    os.close(reading)
    result = chaperone(
        "exec", "-", spec=shell("x", "echo out; exit 3"), stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert result.returncode == 3
    assert re.fullmatch(
        r"\S+Z stdout: bytes are dropped from offset 0 on: Broken pipe\n", result.stderr
    )


# -- check


def test_check_tells_what_would_be_run_and_no_secret(chaperone, tmp_path):
    spec = {
        "program": {
            "argv": ["/opt/load", "a b"],
            "env": {"TOKEN": "s3cret"},
            "stdin": "s3cret",
            "inherit_env": ["PATH"],
            "umask": "022",
        },
        "callback": {"token": "s3cret"},
        "labels": {"team": "etl"},
        "timeouts": {"run": 90},
    }
    result = chaperone("check", "-", spec=spec, cwd=tmp_path)
    user = common.user_name()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "run:      an id that is made at the start\n"
        f"program:  here, as {user}: /opt/load 'a b'\n"
        f"cwd:      {tmp_path}\n"
        "env:      PATH of ours; set: TOKEN\n"
        "stdin:    a text of 6 bytes\n"
        "process:  umask 022\n"
        "output:   through a pipe, no limit, what the disk refuses is dropped and counted\n"
        "timeouts: connect 30 s, run 90 s, idle -\n"
        "stop:     SIGTERM, SIGKILL 60 s later; leftovers: stop\n"
        "life:     ends with its chaperone\n"
        "callback: checked; nothing is posted yet\n"
        "labels:   team=etl\n"
    )


def test_check_tells_every_hop(chaperone):
    remote = {"host": "db3", "user": "etl", "mode": "ssh-then-sudo"}
    lines = chaperone(
        "check", "-", spec={"program": {"argv": ["ls"]}, "remote": remote}
    ).stdout.splitlines()
    assert lines[1].startswith(f"hop 1:    here, as {common.user_name()}: ssh -T ")
    assert lines[2].startswith("hop 2:    on db3, as whom ssh makes us: sudo -n -H -u etl -- ")
    assert lines[3] == "program:  on db3, as etl: ls"


def test_check_prints_the_text_for_the_far_side_and_no_secret(chaperone):
    spec = {
        "program": {"argv": ["/opt/load"], "env": {"TOKEN": "s3cret"}, "stdin": "s3cret"},
        "remote": {"host": "db3"},
    }
    result = chaperone("check", "--far-side", "-", spec=spec)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        "/opt/load" in result.stdout
        and "export TOKEN=" in result.stdout
        and "s3cret" not in result.stdout
    )
    assert payload.SUPERVISOR in result.stdout
    sentence = (
        "unable to show the far side's text: the program runs here, as a child of its chaperone"
    )
    assert streams(chaperone("check", "--far-side", "-", spec=ECHO)) == (
        os.EX_USAGE,
        "",
        f"chaperone: {sentence}\n",
    )


# -- looking after a spool


def test_reap_publishes_what_was_lost(chaperone, held):
    held({**SLEEP, "id": "live"})
    directory = held(SLEEP)
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    assert streams(chaperone("wait", "sleep"))[0] == 125
    assert streams(chaperone("reap")) == (
        0,
        "sleep: lost: the chaperone died before the program's end was recorded\n",
        "",
    )
    assert json.loads((directory / "status.json").read_text())["state"] == "lost"
    assert streams(chaperone("reap")) == (0, "", "")
    assert streams(chaperone("reap", "sle", "live")) == (
        0,
        "sleep: ended: it has ended\nlive: alive: its chaperone lives\n",
        "",
    )


def test_adopt_holds_what_outlived_its_chaperone(chaperone, held, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    directory = held(
        shell(
            "survivor",
            f"echo begin; read x <{tmp_path}/fifo; echo $x; exit 5",
            on_disconnect="survive",
        )
    )
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("adopt", "surv")) == (
        os.EX_CANTCREAT,
        "",
        "chaperone: unable to adopt run 'survivor': want it unattended, got running\n",
    )
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    until(lambda: '"unattended"' in chaperone("status", "survivor").stdout)
    for verb in ("stop", "kill"):
        refused = "chaperone: unable to ask run 'survivor': its chaperone is gone and it may live on; adopt it first\n"
        assert streams(chaperone(verb, "surv")) == (os.EX_NOINPUT, "", refused)
    assert streams(chaperone("adopt", "--detach")) == (0, "survivor\n", "")
    (tmp_path / "fifo").write_text("end\n")
    assert streams(chaperone("wait", "survivor")) == (5, "", "")
    assert (directory / "stdout").read_bytes() == b"begin\nend\n"
    assert streams(chaperone("adopt")) == (0, "", "")


def test_gc_deletes_what_has_ended(chaperone, held, spool):
    chaperone("run", "-", spec=ECHO)
    held(SLEEP)
    assert streams(chaperone("gc", "--older", "1d")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        "",
    )
    assert streams(chaperone("gc", "--older", "0s", "--keep-failed", "1w")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        "",
    )
    spared = "1 run spared: no scheduler has collected them; --uncollected deletes them too"
    assert streams(chaperone("gc", "--older", "0s")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        f"chaperone: {spared}\n",
    )
    assert streams(chaperone("gc", "--older", "0s", "--uncollected", "--dry-run")) == (
        0,
        "echo\nwould remove 1 runs; left: 0 ended, 1 live\n",
        "",
    )
    assert (spool / "echo").exists()
    result = chaperone("gc", "--max-bytes", "0B", "--uncollected")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"removed 1 runs \([\d.]+K bytes\); left: 0 ended, 1 live\n", result.stdout)
    assert not (spool / "echo").exists() and (spool / "sleep").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [],
            "unable to understand 'chaperone gc': want --older or --max-bytes, or nothing would be deleted",
        ),
        (
            ["--older", "soon"],
            "unable to understand '--older': want an age such as 7d, 12h or 90s, got 'soon'",
        ),
        (
            ["--older", "7dd"],
            "unable to understand '--older': want an age such as 7d, 12h or 90s, got '7dd'",
        ),
        (
            ["--older=-1d"],
            "unable to understand '--older': want an age such as 7d, 12h or 90s, got '-1d'",
        ),
        (
            ["--older", "30"],
            "unable to understand '--older': want an age such as 7d, 12h or 90s, got '30'",
        ),
        (
            ["--max-bytes", "10"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got '10'",
        ),
        (
            ["--max-bytes", "10X"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got '10X'",
        ),
        (
            ["--max-bytes", "nan"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got 'nan'",
        ),
    ],
)
def test_gc_refuses_what_it_does_not_understand(chaperone, words, sentence):
    assert streams(chaperone("gc", *words)) == (os.EX_USAGE, "", f"chaperone: {sentence}\n")


def test_doctor_tells_of_a_spool_that_can_not_be_used(chaperone, spool):
    result = chaperone("doctor")
    assert (result.returncode, result.stderr) in ((0, ""), (os.EX_CONFIG, ""))
    assert "ok  spool: it is ours, and nobody else can write to it\n" in result.stdout
    spool.chmod(0o777)
    result = chaperone("doctor")
    assert (result.returncode, result.stderr) == (os.EX_CONFIG, "")
    assert result.stdout.startswith("BAD spool: ")


def test_follow_gives_a_batch_again_until_it_is_answered(chaperone, spool, tmp_path):
    chaperone("run", "-", spec=ECHO)
    command = [*CHAPERONE, "follow", "--cursor", tmp_path / "cursor"]

    def batch(answer):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            lines = []
            while not lines or lines[-1]["event"] != "batch":
                lines.append(json.loads(process.stdout.readline()))
            process.communicate(answer(lines[-1]["batch"]))
        assert process.returncode == 0
        return lines

    first = batch(lambda number: b"")
    assert [line.get("text") for line in first if line["event"] == "output"] == ["out\n", "err\n"]
    assert batch(lambda number: b"") == first
    chaperone("run", "--id", "next", "-", spec=ECHO)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for _ in first:
            process.stdout.readline()
        process.stdin.write(f"{first[-1]['batch']}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["run_id"] == "next"
        process.stdin.close()
        process.stdout.read()
    assert not (spool / ".ended" / "echo").is_symlink()


def test_launcher_starts_runs_that_ask_for_it(chaperone, spool, tmp_path):
    assert streams(chaperone("launcher", "--detach", "--idle=1")) == (0, "", "")
    assert streams(chaperone("run", "--warm", "-", spec=ECHO)) == (0, "echo\n", "")
    assert streams(chaperone("wait", "echo")) == (3, "", "")
    until(lambda: not (spool / ".launcher").exists())


# -- a terminal that goes, a disk that is full


def test_nobody_reads_any_more_is_no_traceback(chaperone, spool):
    chaperone("run", "-", spec=shell("many", "seq 1000000"))
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-n", "all", "many"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("options", [[], ["--detach"]])
def test_run_id_that_stdout_does_not_take_is_lost_and_nothing_else(chaperone, options):
    with open("/dev/full", "wb") as full:
        result = chaperone("run", *options, "-", spec=ECHO, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, "")
    assert chaperone("wait", "echo").returncode == 3


def test_full_stdout_is_told(chaperone):
    with open("/dev/full", "wb") as full:
        result = chaperone("ls", stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        "chaperone: unable to write to stdout: No space left on device\n",
    )


def test_closed_stdout_is_told(spool):
    result = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *CHAPERONE, "ls"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        "chaperone: unable to write to stdout: Bad file descriptor\n",
    )


def test_interrupt_is_no_traceback(held):
    held(READY)
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-f", "ready"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_non_blocking_stdout_gets_it_all(chaperone, spool):
    chaperone("run", "-", spec=shell("many", "seq 100000"))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with (
        subprocess.Popen([*CHAPERONE, "tail", "-n", "all", "many"], stdout=writing) as process,
        open(reading, "rb") as pipe,
    ):
        os.close(writing)
        assert pipe.read() == (spool / "many" / "stdout").read_bytes()
    assert process.returncode == 0


# -- values as text


@pytest.mark.once
@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.0K"),
        (1_023, "1.0K"),
        (10_239, "10K"),
        (1 << 20, "1.0M"),
        (153 << 20, "153M"),
        (1 << 60, "1024P"),
        (None, "-"),
        ("x", "-"),
    ],
)
def test_amounts_are_short(count, text):
    assert terminal.amount(count) == text


@pytest.mark.once
@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0s"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (123, "2m03s"),
        (3_900, "1h05m"),
        (273_600, "3d04h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert terminal.duration(seconds) == text


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted(status.last_known(None, "x")))


@pytest.mark.once
@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(FIELDS, JSON),
    st.sampled_from(status.STATES),
    st.none() | st.integers(0, 200),
    st.booleans(),
)
def test_any_status_is_shown(fields, state, width, colour):
    found = status.last_known({**fields, "state": state}, "x")
    text = tables.table([found], 0.0, width, colour)
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert all(char.isprintable() or char == "\n" for char in plain) and text.count("\n") == 2
    assert width is None or all(
        tables.columns_of(line) <= max(1, width) for line in plain.splitlines()
    )
    assert json.loads(terminal.status_json(found)) == found
    assert all(
        isinstance(sentence, str)
        for stream in ("stdout", "stderr")
        for sentence in look.gaps(found, stream, 0)
    )


# -- completion


def completed_in_bash(*words):
    script = '. <("${@:1:5}" completion bash); COMP_WORDS=("${@:6}"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_chaperone; printf "%s\\n" "${COMPREPLY[@]}"'
    start = ["env", *CHAPERONE]
    result = subprocess.run(
        ["bash", "-c", script, "bash", *start, "chaperone", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stderr == ""
    return result.stdout.split()


def completed_in_fish(*words):
    line = " ".join(["chaperone", *words])
    script = subprocess.run(
        [*CHAPERONE, "completion", "fish"], capture_output=True, text=True, check=True
    ).stdout
    result = subprocess.run(
        ["fish", "-N", "-c", f"{script}\ncomplete -C '{line}'"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stderr == ""
    return [row.split("\t")[0] for row in result.stdout.splitlines()]


def completed_in_zsh(*words):
    """
    By a Tab key, on a terminal: zsh completes nowhere else. A listing stands on lines of its own, a
    single match in the line.
    """
    line = " ".join(["chaperone", *words])
    script = subprocess.run(
        [*CHAPERONE, "completion", "zsh"], capture_output=True, text=True, check=True
    ).stdout
    tidy = "autoload -U compinit; compinit -D -u; unsetopt auto_menu prompt_sp; zstyle ':completion:*' verbose no; LISTMAX=1000; COLUMNS=200"
    bound = """_show() { print -r -- "<$BUFFER>"; }; zle -N _show; bindkey '^K' _show; bindkey '^I' list-choices"""
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(
            "zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "PS1": "@", "script": script}
        )
    with open(terminal, "r+b", buffering=0) as keys:
        seen = bytearray()

        def until_seen(mark):
            while mark not in seen:
                assert select.select([keys], [], [], 30)[0], seen
                seen.extend(keys.read(65_536))
            before = seen.partition(mark)[0].decode(errors="replace").replace("\r", "")
            del seen[: seen.index(mark) + len(mark)]
            return before

        try:
            until_seen(b"@")  # it is ready for keys: what is typed sooner may be lost
            keys.write(f"{tidy}; eval $script; {bound}; print rea''dy\r".encode())
            until_seen(b"ready")
            until_seen(b"@")
            # Tab lists what fits, ^K marks where the list has ended.
            keys.write(f"{line}\t\x0b".encode())
            listed = until_seen(b"<")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", listed)
    return plain.replace(line, "").replace("@", "").split()  # the prompt comes again after a list


COMPLETED = {"bash": completed_in_bash, "fish": completed_in_fish, "zsh": completed_in_zsh}


@pytest.mark.once
@pytest.mark.parametrize("name", COMPLETED)
def test_shells_complete_verbs_options_and_ids(chaperone, held, name):
    need(name)
    chaperone("run", "--id", "ended", "-", spec=ECHO)
    held({**SLEEP, "id": "live"})
    completed = COMPLETED[name]
    assert completed("st") == ["status", "stop"]
    assert sorted(completed("status", "")) == ["ended", "live"]
    assert sorted(completed("tail", "live", "")) == ["log", "stderr", "stdout"]
    assert sorted(completed("stop", "")) == ["live"]
    assert sorted(completed("wait", "live", "")) == ["ended", "live"]
    assert sorted(word for word in completed("ls", "--") if word.startswith("--")) == [
        "--all",
        "--help",
        "--json",
        "--spool",
    ]


@pytest.mark.once
def test_completion_for_zsh_may_be_sourced(tmp_path):
    need("zsh")
    (tmp_path / "script").write_text(completion.made("zsh"))
    told = "autoload -U compinit; compinit -D -u; source $1; print -r -- $_comps[chaperone]"
    zsh = ["zsh", "-f", "-c", told, "zsh", tmp_path / "script"]
    result = subprocess.run(zsh, capture_output=True, text=True, check=False)
    assert streams(result) == (0, "_shtab_chaperone\n", "")


@pytest.mark.once
@pytest.mark.parametrize("name", COMPLETED)
def test_completion_that_is_shipped_is_what_shtab_makes_of_the_verbs(name):
    """`python -m chaperone.cli.completion` makes it again."""
    assert pathlib.Path(upkeep.script_path(name)).read_text() == completion.made(name)


# -- the page


@pytest.mark.once
def test_page_tells_of_every_verb_and_every_option():
    with open(os.path.join(ROOT, "docs", "command-line.rst")) as file:
        text = file.read()
    usages = dict(re.findall(r"^``chaperone (\w+)(.*)``$", text, re.M))
    assert sorted(usages) == sorted(arguments.VERBS)
    for verb, words in usages.items():
        options = {
            name
            for argument in arguments.VERBS[verb].arguments
            if argument.is_option
            for name in argument.names
        }
        told = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", words))
        assert told <= options, verb
        assert {name for name in options if name.startswith("--")} - told <= {
            "--spool",
            "--follow",
            "--lines",
        }, verb


@pytest.mark.once
def test_page_tells_of_every_exit_code():
    with open(os.path.join(ROOT, "docs", "command-line.rst")) as file:
        table = re.findall(r"^(\d+) +([A-Z]+) ", file.read(), re.M)
    assert {int(code): name for code, name in table} == {
        getattr(os, f"EX_{name}"): name for _, name in table
    }
    package = pathlib.Path(ROOT, "chaperone")
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    assert {name for _, name in table} == set(re.findall(r"os\.EX_([A-Z]+)", source))
