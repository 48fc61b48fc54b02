"""
A command after `--`: the spec that it becomes, with its options, for run, exec and check.

Knows: the words of the command line.  Must not know: how a spec is held.
"""

import contextlib
import json
import os
import subprocess

import pytest

from spool_tests.support.commands import streams
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


def spec_of(chaperone, *words):
    code, out, err = streams(chaperone("check", "--json", *words))
    assert (code, err) == (0, "")
    return json.loads(out)


def test_command_is_run_as_it_is_typed(chaperone, spool):
    command = ["/bin/sh", "-c", 'printf "%s\\n" "$@"', "sh", "a b", "$HOME", "--id", "--", ""]
    assert streams(chaperone("run", "--id", "typed", "--", *command)) == (0, "typed\n", "")
    assert (spool / "typed" / "stdout").read_text() == "a b\n$HOME\n--id\n--\n\n"
    assert json.loads((spool / "typed" / "spec.json").read_text())["program"]["argv"] == command


def test_command_is_executed_with_its_streams_as_ours(chaperone, spool):
    words = ["exec", "--env", "A=1=2", "--", "/bin/sh", "-c", "echo $A; echo err >&2; exit 3"]
    assert streams(chaperone(*words)) == (3, "1=2\n", "err\n")
    assert list(spool.iterdir()) == []


def test_command_may_be_started_and_left(chaperone, spool):
    assert streams(chaperone("run", "--detach", "--id", "left", "--", "true")) == (0, "left\n", "")
    until((spool / "left" / "status.json").exists)


def test_each_option_is_a_field_of_the_spec(chaperone, tmp_path):
    words = ["--host", "etl@db3:2222", "--env", "A=1", "--env", "B=", "--cwd", "/x", "--survive"]
    words += ["--label", "team=etl", "--stdin", "in.txt", "--timeout", "1.5h", "--", "ls", "-l"]
    assert spec_of(chaperone, *words) == {
        "program": {
            "argv": ["ls", "-l"],
            "cwd": "/x",
            "env": {"A": "1", "B": ""},
            "stdin": {"file": "in.txt"},
        },
        "remote": {"host": "db3", "user": "etl", "port": 2222},
        "on_disconnect": "survive",
        "timeouts": {"run": 5400},
        "labels": {"team": "etl"},
    }
    assert spec_of(chaperone, "--", "ls") == {"program": {"argv": ["ls"]}}


def test_spec_of_a_file_is_printed_as_it_is(chaperone):
    spec = {"program": {"command": "ls"}, "labels": {"team": "etl"}}
    assert json.loads(chaperone("check", "--json", "-", spec=spec).stdout) == spec


def test_argument_that_is_no_text_arrives_as_it_is(chaperone):
    assert spec_of(chaperone, "--", "echo", os.fsdecode(b"\xff"))["program"]["argv"][1] == "\udcff"


@pytest.mark.parametrize(
    ("host", "remote"),
    [
        ("db3", {"host": "db3"}),
        ("db3:22", {"host": "db3", "port": 22}),
        ("a@b@db3", {"host": "db3", "user": "a@b"}),
        ("::1", {"host": "::1"}),
        ("[::1]", {"host": "::1"}),
        ("etl@[::1]:2222", {"host": "::1", "user": "etl", "port": 2222}),
    ],
)  # fmt: skip
def test_host_is_written_as_for_scp(chaperone, host, remote):
    assert spec_of(chaperone, "--host", host, "--", "ls")["remote"] == remote


FILE = """\
# a comment
  ; another
PLAIN=a b
 SPACED =  x y\t
DOUBLE="a 'b' # c "
SINGLE='$HOME "\\n"'
HALF="a
EMPTY=
TWO=a=b
QUOTED="a" "b"
"""


def test_file_of_variables_is_read_as_systemd_does_and_nothing_is_expanded(chaperone, tmp_path):
    (tmp_path / "env").write_text(FILE)
    (tmp_path / "more").write_text("TWO=2\nTHREE=3")
    words = ["--env-file", "env", "--env-file", "more", "--env", "THREE=4", "--", "env"]
    result = chaperone("check", "--json", *words, cwd=tmp_path)
    assert json.loads(result.stdout)["program"]["env"] == {
        "PLAIN": "a b",
        "SPACED": "x y",
        "DOUBLE": "a 'b' # c ",
        "SINGLE": '$HOME "\\n"',
        "HALF": '"a',
        "EMPTY": "",
        "TWO": "2",
        "QUOTED": 'a" "b',
        "THREE": "4",
    }


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (
            ["run", "echo"],
            os.EX_NOINPUT,
            "unable to read spec 'echo': No such file or directory; put -- before a command",
        ),
        (
            ["run", "--survive", "ls", "-l"],
            os.EX_USAGE,
            "unable to understand 'chaperone run': it has no option '-l'; put -- before a command",
        ),
        (
            ["check", "--cwd", "/", "ls", "-5"],
            os.EX_USAGE,
            "unable to understand 'chaperone check': it has no option '-5';"
            " put -- before a command",
        ),
        (
            ["run", "--"],
            os.EX_USAGE,
            "unable to understand 'chaperone run': there is no command after --",
        ),
        (
            ["run", "-", "--", "true"],
            os.EX_USAGE,
            (
                "unable to understand 'chaperone run': it takes SPEC files, or -- and a "
                "command, not both"
            ),
        ),
        (
            ["check"],
            os.EX_USAGE,
            "unable to understand 'chaperone check': it takes one SPEC file, or -- and a command",
        ),
        (
            ["exec", "--survive", "-"],
            os.EX_USAGE,
            "unable to understand 'chaperone exec': --survive is for a command after --;"
            " a spec has a field for it",
        ),
        (
            ["run", "--env", "hunter2", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--env': want NAME=VALUE",
        ),
        (
            ["run", "--label", "=x", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--label': want NAME=VALUE",
        ),
        (
            ["run", "--timeout", "90", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--timeout': want an age such as 90s, 30m, 12h or 7d, got '90'",
        ),
        (
            ["run", "--host", "db3:ssh", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--host': want [USER@]HOST[:PORT], got 'db3:ssh'",
        ),
        (
            ["run", "--host", "@db3", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--host': want [USER@]HOST[:PORT], got '@db3'",
        ),
        (
            ["run", "--host", "[::1]2", "--", "true"],
            os.EX_USAGE,
            "unable to understand '--host': want [USER@]HOST[:PORT], got '[::1]2'",
        ),
        (
            ["run", "--env-file", "/nowhere/e", "--", "true"],
            os.EX_NOINPUT,
            "unable to read variables '/nowhere/e': No such file or directory",
        ),
        (
            ["run", "--env", "A B=1", "--host", "db3", "--", "true"],
            os.EX_DATAERR,
            "unable to read spec 'command line': program.env.A B: want a name that a shell can"
            " export on the far side, got 'A B'",
        ),
    ],
)
def test_what_is_no_command_is_refused_in_a_sentence(chaperone, spool, words, code, sentence):
    assert streams(chaperone(*words, spec={})) == (code, "", f"chaperone: {sentence}\n")
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("line", ["export A=1", "A", "=1"])
def test_line_that_is_no_variable_is_named_and_not_shown(chaperone, tmp_path, line):
    (tmp_path / "env").write_text(f"OK=1\n{line}\n")
    sentence = "chaperone: unable to read variables 'env': line 2: want NAME=VALUE\n"
    result = chaperone("run", "--env-file", "env", "--", "true", cwd=tmp_path)
    assert streams(result) == (os.EX_DATAERR, "", sentence)


# -- how a run went, for its caller

UNABLE = "chaperone: unable to run '/nowhere/x': No such file or directory\n"


def test_run_says_why_a_program_could_not_be_started(chaperone, spool):
    assert streams(chaperone("run", "--id", "x", "--", "/nowhere/x")) == (0, "x\n", UNABLE)
    assert json.loads((spool / "x" / "status.json").read_text())["state"] == "error"
    words = ["run", "--exit-code", "--id", "y", "--", "/nowhere/x"]
    assert streams(chaperone(*words)) == (125, "y\n", UNABLE)
    assert streams(chaperone("run", "--detach", "--id", "z", "--", "/nowhere/x"))[:2] == (0, "z\n")


@pytest.mark.parametrize(("text", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_run_may_exit_as_its_program_did(chaperone, text, code):
    words = ["run", "--exit-code", "--id", "x", "--", "/bin/sh", "-c", text]
    assert streams(chaperone(*words)) == (code, "x\n", "")


def test_several_runs_exit_as_the_first_that_did_not_with_0(chaperone, tmp_path):
    for name, code in (("a", 0), ("b", 4), ("c", 2)):
        spec = {"id": name, "program": {"command": f"exit {code}"}}
        (tmp_path / name).write_text(json.dumps(spec))
    files = [tmp_path / name for name in "abc"]
    assert chaperone("run", "--exit-code", *files).returncode == 4


@pytest.mark.parametrize("option", ["--detach", "--warm"])
def test_exit_code_of_a_run_that_is_left_is_refused(chaperone, spool, option):
    reason = "--exit-code waits for the end of the run, which --detach and --warm don't"
    assert streams(chaperone("run", "--exit-code", option, "--", "true")) == (
        os.EX_USAGE,
        "",
        f"chaperone: unable to understand 'chaperone run': {reason}\n",
    )
    assert list(spool.iterdir()) == []


def test_run_that_has_started_keeps_no_pipe_of_its_caller(spool):
    """Who reads its stderr to the end need not wait for the end of the run."""
    words = [*CHAPERONE, "run", "--id", "x", "--", "/bin/sleep", "1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, **pipes) as process:
        assert (process.stdout.read(), process.stderr.read()) == (b"x\n", b"")
        assert process.poll() is None
        process.terminate()
    assert process.returncode == 0


def test_run_whose_caller_hears_nothing_is_recorded(chaperone, spool):
    """Its stderr is a pipe that is full, or that has no reader any more."""
    for run_id, is_full in (("full", True), ("broken", False)):
        reading, writing = os.pipe()
        if is_full:
            os.set_blocking(writing, False)
            with contextlib.suppress(BlockingIOError):
                while os.write(writing, bytes(4_096)):
                    pass
            os.set_blocking(writing, True)
        else:
            os.close(reading)
        words = ("run", "--id", run_id, "--", "/nowhere/x")
        result = chaperone(*words, stdout=subprocess.PIPE, stderr=writing)
        assert (result.returncode, result.stdout) == (0, f"{run_id}\n")
        os.close(writing)
        if is_full:
            os.close(reading)
        assert json.loads((spool / run_id / "status.json").read_text())["state"] == "error"
