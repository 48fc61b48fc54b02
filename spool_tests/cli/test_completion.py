"""
Completion scripts in their shells, and the page about the verbs.
"""

import os
import pathlib
import pty
import re
import select
import signal
import subprocess

import pytest

from chaperone.cli import arguments, completion
from chaperone.cli.verb import COMMAND
from chaperone.cli.verbs import upkeep
from spool_tests.support.commands import ECHO, SLEEP, streams
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.waiting import need

pytestmark = pytest.mark.once

# -- completion


def completed_in_bash(*words):
    script = (
        '. <("${@:1:5}" completion bash); COMP_WORDS=("${@:6}"); '
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_chaperone; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
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
    By a Tab key, on a terminal, because zsh completes only there. A listing comes on lines of its
    own, a single match in the line.
    """
    line = " ".join(["chaperone", *words])
    script = subprocess.run(
        [*CHAPERONE, "completion", "zsh"], capture_output=True, text=True, check=True
    ).stdout
    tidy = (
        "autoload -U compinit; compinit -D -u; unsetopt auto_menu prompt_sp; "
        "zstyle ':completion:*' verbose no; LISTMAX=1000; COLUMNS=200"
    )
    bound = """_show() { print -r -- "<$BUFFER>"; }; zle -N _show; bindkey '^K' _show; """
    bound += "bindkey '^I' list-choices"
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


@pytest.mark.parametrize("name", COMPLETED)
def test_shells_complete_verbs_options_and_ids(chaperone, held, name):
    need(name)
    chaperone("run", "--id", "ended", "-", spec=ECHO)
    held({**SLEEP, "id": "live"})
    completed = COMPLETED[name]
    assert completed("st") == ["status", "stop"]
    assert sorted(completed("status", "")) == ["ended", "live"]
    outputs = ["ended", "live", "log", "stderr", "stdout"]
    assert sorted(completed("tail", "live", "")) == outputs
    assert sorted(completed("stop", "")) == ["live"]
    assert sorted(completed("wait", "live", "")) == ["ended", "live"]
    offered = [word for word in completed("ls", "--") if word.startswith("--")]
    options = {option.names[-1] for option in arguments.VERBS["ls"].arguments if option.is_option}
    assert sorted(offered) == sorted({"--help", *options})


def test_completion_for_zsh_may_be_sourced(tmp_path):
    need("zsh")
    (tmp_path / "script").write_text(completion.made("zsh"))
    told = "autoload -U compinit; compinit -D -u; source $1; print -r -- $_comps[chaperone]"
    zsh = ["zsh", "-f", "-c", told, "zsh", tmp_path / "script"]
    result = subprocess.run(zsh, capture_output=True, text=True, check=False)
    assert streams(result) == (0, "_shtab_chaperone\n", "")


@pytest.mark.parametrize("name", COMPLETED)
def test_completion_that_is_shipped_is_what_shtab_makes_of_the_verbs(name):
    """`python -m chaperone.cli.completion` makes it again."""
    assert pathlib.Path(upkeep.script_path(name)).read_text() == completion.made(name)


# -- the page


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
        commands = {option.names[0] for option in COMMAND if arguments.VERBS[verb].takes_command}
        untold = {name for name in options if name.startswith("--")} - told - commands
        assert untold <= {"--spool", "--follow", "--lines"}, verb
    listed = re.findall(r"^``(--[a-z-]+)(.*)``$", text, re.M)
    assert listed == [
        (option.names[0], "" if option.is_flag else f" {option.how['metavar']}")
        for option in COMMAND
    ]


def test_page_tells_of_every_exit_code():
    with open(os.path.join(ROOT, "docs", "command-line.rst")) as file:
        table = re.findall(r"^(\d+) +([A-Z]+) ", file.read(), re.M)
    assert {int(code): name for code, name in table} == {
        getattr(os, f"EX_{name}"): name for _, name in table
    }
    package = pathlib.Path(ROOT, "chaperone")
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    assert {name for _, name in table} == set(re.findall(r"os\.EX_([A-Z]+)", source))
