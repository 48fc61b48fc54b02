"""
The command line as people and scripts use it: what it prints, what it says, and with which code it
exits.

Knows: argv, streams, exit codes, terminals.  Must not know: how anything is done.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaperone.cli import arguments, main
from chaperone.cli.verb import UsageError, verbs_in
from chaperone.cli.verbs import hold
from spool_tests.support.commands import ECHO, shell, streams
from spool_tests.support.places import CHAPERONE

pytestmark = pytest.mark.once

# -- words


def test_run_prints_the_id_and_exits_0_whatever_the_outcome(chaperone):
    assert streams(chaperone("run", "-", spec=ECHO)) == (0, "echo\n", "")


@pytest.mark.parametrize(
    ("words", "spec", "code", "sentence"),
    [
        (
            [],
            None,
            os.EX_USAGE,
            "unable to understand the command line: the verb is missing;"
            f" want one of {', '.join(arguments.VERBS)}",
        ),
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
            "unable to understand 'chaperone run': it takes SPEC files, or -- and a command",
        ),
        (
            ["ls", "--frob"],
            None,
            os.EX_USAGE,
            "unable to understand 'chaperone ls': it has no option '--frob'",
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
            os.EX_NOINPUT,
            "unable to find run 'x': no run id in this spool begins with that",
        ),
        (
            ["tail", "-f", "x", "log"],
            None,
            os.EX_USAGE,
            "unable to follow stream 'log': want stdout or stderr",
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
            "unable to read spec '-': program: required field is missing",
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
            "unable to find run 'x': no run id in this spool begins with that",
        ),
        (
            ["stop", "../x"],
            None,
            os.EX_NOINPUT,
            "unable to find run '../x': no run id in this spool begins with that",
        ),
        (
            ["wait", ""],
            None,
            os.EX_NOINPUT,
            "unable to find run '': no run id in this spool begins with that",
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


@settings(max_examples=700)
@given(verb=st.sampled_from(sorted(main.LEAN)), words=st.lists(st.sampled_from(WORDS), max_size=6))
def test_what_is_read_by_hand_is_what_argparse_reads(verb, words):
    verb = arguments.VERBS[verb]
    try:
        by_hand = main.parsed(verb, words)
    except UsageError:
        return
    if by_hand is None:
        with pytest.raises(arguments.HelpAsked):
            arguments.parsed(verb, words)
        return
    assert vars(by_hand) == vars(arguments.parsed(verb, words))


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
        (["--id=-x"], {"id": "-x"}),
    ],
)
def test_words_of_run_are_read_by_hand(words, given):
    nothing = {
        argument.dest: False if argument.is_flag else None
        for argument in arguments.VERBS["run"].arguments
    }
    nothing.update(specs=[], command=None)
    assert vars(main.parsed(arguments.VERBS["run"], words)) == {**nothing, **given}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["run", "-", "--det"],
            "'chaperone run': it has no option '--det'; did you mean '--detach'?",
        ),
        (
            ["run", "-", "--wram"],
            "'chaperone run': it has no option '--wram'; did you mean '--warm'?",
        ),
        (["run", "-", "--warm=1"], "'chaperone run': argument --warm: takes no value, got '1'"),
        (["run", "-", "--id", "--warm"], "'chaperone run': argument --id: expected one argument"),
        (["exec", "-", "x"], "'chaperone exec': it takes one SPEC file, or -- and a command"),
        (["launcher", "x"], "'chaperone launcher': unrecognized arguments: x"),
        (
            ["ls", "--sicne", "1h"],
            "'chaperone ls': it has no option '--sicne'; did you mean '--since'?",
        ),
        (
            ["wait", "--tmeout=5s"],
            "'chaperone wait': it has no option '--tmeout'; did you mean '--timeout'?",
        ),
        (["ls", "-a"], "'chaperone ls': it has no option '-a'; did you mean '--all'?"),
        (["tail", "-5", "x"], "'chaperone tail': it has no option '-5'; did you mean '-n 5'?"),
        (["tail", "x", "-n", "-5"], "'--lines': want a number or all, got '-5'"),
        (["rm", "-rf", "x"], "'chaperone rm': it has no option '-rf'"),
        (
            ["stop", "x", "--grace", "1", "--no-wiat"],
            "'chaperone stop': it has no option '--no-wiat'; did you mean '--no-wait'?",
        ),
        (
            ["ls", "--s"],
            "'chaperone ls': ambiguous option: --s could match --state, --since, --spool",
        ),
        (["sttus"], "'sttus': did you mean 'status'?"),
        (["sl"], "'sl': did you mean 'ls'?"),
        (["exec", "--id", "x"], "'chaperone exec': it has no option '--id'"),
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


def test_help_lists_every_verb_and_no_other(chaperone):
    result = chaperone("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"^  (\w+) ", result.stdout, re.M) == list(arguments.VERBS)
    assert list(verbs_in(hold)) == list(main.LEAN)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


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
        "chaperone: unable to find run 'load-': it is ambiguous; it matches: load-1, load-2\n",
    )
    assert streams(chaperone("wait", "lo")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to find run 'lo': it is ambiguous; it matches: load, load-1, load-2\n",
    )


@pytest.mark.parametrize("words", [["run", "-"], ["exec", "-"], ["check", "-"], ["adopt"]])
def test_deleted_working_directory_is_one_sentence(chaperone, tmp_path, words):
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    result = subprocess.run(
        ["sh", "-c", script, "sh", *CHAPERONE, *words],
        input=json.dumps(ECHO),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "CHAPERONE_SPOOL"},
    )
    sentence = "unable to go on: the working directory was deleted"
    assert streams(result) == (os.EX_OSERR, "", f"chaperone: {sentence}\n")
