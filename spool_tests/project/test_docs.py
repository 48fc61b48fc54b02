"""
What the docs say is what happens: their transcripts are typed, their Python is run.

Knows: reStructuredText as far as code blocks go.  Must not know: what the commands do.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import docutils.core
import pytest

import chaperone as api
from chaperone.cli import arguments
from chaperone.cli.verb import SPOOL
from chaperone.hold import chaperone
from chaperone.program import guard
from chaperone.spool import run_directory
from spool_tests.support.pages import blocks, typed
from spool_tests.support.places import ROOT
from spool_tests.support.tmux import Pane
from spool_tests.support.waiting import need

pytestmark = pytest.mark.once
PAGES = [pathlib.Path(ROOT, "README.rst"), *sorted(pathlib.Path(ROOT, "docs").glob("*.rst"))]
HELLO = '{"id": "hello", "program": {"command": "echo Hello; echo trouble >&2; exit 3"}}\n'


def comparable(text):
    """
    Without what differs from day to day: how long something took, and so how wide a column is.
    """
    text = re.sub(r"\b(\d+m)?\d+(\.\d+)?(ms|s)\b", "#s", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "#time", text)
    return re.sub(r" +", " ", text)


@pytest.fixture
def place(spool, on_path, tmp_path, monkeypatch):
    """A directory with the example's spec, `chaperone` on PATH, the spool at its default place."""
    need("jq")
    monkeypatch.delenv("CHAPERONE_SPOOL")
    (tmp_path / "hello.json").write_text(HELLO)
    return tmp_path


# no user types so fast as to see that
AT_HUMAN_SPEED = "while grep -qs '\"starting\"' spool/*/running.json; do sleep 0.01; done"


@pytest.mark.parametrize(
    "path", [path for path in PAGES if blocks(path, "console")], ids=lambda path: path.name
)
def test_transcripts_of_a_page_happen_as_printed(path, place):
    steps = [step for block in blocks(path, "console") for step in typed(block)]
    script = "".join(f"{AT_HUMAN_SPEED}\nprintf '\\001'\n{command}\n" for command, _ in steps)
    result = subprocess.run(
        ["bash"],
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place,
        timeout=300,  # the longest page has fifty commands, and a busy machine takes its time
    )
    got = result.stdout.split("\001")[1:]
    assert [(command, comparable(text)) for (command, _), text in zip(steps, got, strict=True)] == [
        (command, comparable(text)) for command, text in steps
    ]


def cut(line, whole):
    """Whether a row of a table is the whole one, or its beginning."""
    return line == whole or (line.endswith("…") and whole.startswith(line[:-1].rstrip()))


def test_rows_of_a_page_fit_80_columns(place):
    """Tables are cut, not wrapped; a JSON object is the same, and a sentence may be wrapped."""
    need("tmux")
    page = pathlib.Path(ROOT, "docs/command-line.rst")
    script, shown = "", []
    for block in blocks(page, "console"):
        for command, printed in typed(block):
            verb = re.match(r"chaperone (ls|read|run|rm|tail) ", f"{command} ")
            if verb is None:
                script += f"{{\n{command}\n}} >/dev/null 2>&1\n{AT_HUMAN_SPEED}\n"
            else:
                shown.append((verb[1], command, printed, f"{script}{AT_HUMAN_SPEED}\n{command}"))
                script = ""
    with Pane(place, 80, [step for *_, step in shown]) as pane:
        for number, (verb, command, printed, _) in enumerate(shown):
            rows, lines = pane.shown(number)
            whole = [comparable(line) for line in printed.splitlines()] or [""]
            if verb == "ls":
                got = [comparable(row) for row in rows]
                assert len(got) == len(whole) and all(map(cut, got, whole)), (command, rows)
            elif verb == "read":
                assert json.loads("".join(lines)) == json.loads(printed), command
            else:
                assert [comparable(line) for line in lines] == whole, command


def test_help_fits_80_columns(place):
    need("tmux")
    helps = "\n".join(f"chaperone {verb} --help" for verb in ["", *arguments.VERBS])
    with Pane(place, 80, [helps]) as pane:
        rows, lines = pane.shown(0)
    assert sum("usage: " in row for row in rows) == 1 + len(arguments.VERBS)
    assert rows == lines


@pytest.mark.parametrize("page", ["README.rst", "docs/tutorial.rst"])
def test_first_background_run_of_a_page_is_a_command_without_json(page):
    started = re.search(r"\$ .*chaperone run --detach .*", pathlib.Path(ROOT, page).read_text())
    assert re.search(r" -- \w+", started[0])


def test_each_word_of_the_verbs_that_look_and_run_is_in_a_transcript():
    """And so pinned by the tests above."""
    transcripts = [
        command
        for path in PAGES
        for block in blocks(path, "console")
        for text, _ in typed(block)
        for command in re.findall(r"chaperone (?:ls|read|run|exec|check|rm|tail) [^|;]*", text)
    ]
    kinds = {"run": ("run", "exec", "check")}  # they take the same command
    for name in ("ls", "read", "run", "rm", "tail"):
        options = [
            each for each in arguments.VERBS[name].arguments if each.is_option and each != SPOOL
        ]
        used = [text for text in transcripts if text.split()[1] in kinds.get(name, (name,))]
        words = {word for text in used for word in text.split()}
        assert [each.names for each in options if not {*each.names} & words] == [], name


@pytest.mark.parametrize("page", ["README.rst", "docs/following.rst"])
def test_python_of_a_page_runs(place, page):
    """A block is whole if it imports what it uses."""
    found = [text for text in blocks(pathlib.Path(ROOT, page), "python") if "assert" in text]
    assert len(found) == 1
    subprocess.run([sys.executable, "-c", found[0]], cwd=place, check=True, timeout=300)


def test_each_figure_of_the_reliability_page_has_a_command_that_makes_it():
    """A section begins with it, and it names tests that are there."""
    text = pathlib.Path(ROOT, "docs/reliability.rst").read_text()
    sections = re.split(r"^[A-Z].*\n-+\n", text, flags=re.M)[1:]
    commands = [re.match(r"\n``bin/test --as root (--long .*?)``", section) for section in sections]
    assert len(commands) >= 6 and all(commands)
    asked = [re.findall(r"spool_tests/\S+", command[1]) for command in commands]
    # One start for all of them: it takes some seconds.
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    collect += ["--long", "--tier=all", *sorted({path for paths in asked for path in paths})]
    result = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == os.EX_OK, result.stdout + result.stderr
    found = re.findall(r"^(spool_tests/\S+?): \d+$", result.stdout, re.M)
    for command, paths in zip(commands, asked, strict=True):
        assert paths and all(
            any(name == path or name.startswith(f"{path}/") for name in found) for path in paths
        ), command[1]
    (chosen,) = re.findall(r"-k (\w+)``", text)
    assert chosen in pathlib.Path(ROOT, "spool_tests/farside/test_survive.py").read_text()


def test_retention_of_the_page_about_timers_happens(place, monkeypatch):
    """Each of its gc and reap lines, and its Python, on a spool with a run that is old enough."""
    page = pathlib.Path(ROOT, "docs/systemd-and-cron.rst")
    lines = re.findall(
        r"chaperone ((?:reap|gc) --spool .*?)(?: >/dev/null)?$", page.read_text(), re.M
    )
    assert [line.split()[0] for line in lines] == ["reap", "gc"] * 2
    (python,) = blocks(page, "python")
    for do in (
        *(
            ["sh", "-c", f"chaperone {line.replace('/var/lib/etl/spool', 'spool')}"]
            for line in lines
        ),
        [sys.executable, "-c", python],
    ):
        subprocess.run(
            ["chaperone", "run", "hello.json"], cwd=place, check=True, stdout=subprocess.PIPE
        )
        os.utime(place / "spool/hello/status.json", (1, 1))
        told = subprocess.run(
            do, cwd=place, check=True, capture_output=True, text=True, timeout=300
        )
        assert told.stderr == "" and (place / "spool/hello").exists() == (" reap " in do[-1]), do
        if "reap" in do[-1]:
            shutil.rmtree(place / "spool")


def test_signals_of_a_chaperone_are_those_of_the_page():
    text = " ".join(pathlib.Path(ROOT, "docs/command-line.rst").read_text().split())
    answered = text.partition("It passes ")[2].partition(" on to the program")[0]
    ignored = text.partition("It ignores ")[2].partition(";")[0]
    names = [
        {int(getattr(signal, name)) for name in re.findall("SIG[A-Z0-9]+", part)}
        for part in (answered, ignored)
    ]
    assert names == [{*chaperone.FORWARDED}, {*guard.IGNORED}]


def test_patience_with_a_disk_is_as_the_page_on_the_format_says():
    times, minutes = 1 + len(chaperone.PUBLISH_AGAIN_S), round(sum(chaperone.PUBLISH_AGAIN_S) / 60)
    kept = run_directory.UNWRITTEN_BYTES // 1024
    text = pathlib.Path(ROOT, "docs/spool-format.rst").read_text()
    assert (
        f"tries {times} times over {minutes} minutes.\n" in text
        and f"the first {kept} KiB and" in text
    )


def test_readme_says_what_setup_says(place):
    text = pathlib.Path(ROOT, "README.rst").read_text()
    setup = pathlib.Path(ROOT, "setup.py").read_text()
    assert (
        "Python 3.10 to 3.15" in text
        and "range(10, 16)" in setup
        and 'python_requires=">=3.10"' in setup
    )
    assert (
        'name="chaperone-spool"' in setup
        and "``chaperone-spool``; it needs attrs, filelock and inotify-simple" in text
    )
    assert re.findall(
        r'"([a-z-]+)>=', setup.partition("install_requires")[2].partition("]")[0]
    ) == [
        "attrs",
        "filelock",
        "inotify-simple",
    ]
    version = re.search(r'version="(.*?)"', setup)[1]
    assert (
        subprocess.run(["chaperone", "--version"], capture_output=True, text=True).stdout
        == f"chaperone {version}\n"
    )
    assert f"\n{version} (" in pathlib.Path(ROOT, "CHANGELOG.rst").read_text()


def test_every_page_that_a_page_names_is_there():
    for path in [*PAGES, pathlib.Path(ROOT, "CHANGELOG.rst")]:
        named = set(re.findall(r"(?<![/\w])(?:docs|bin|spool_tests)/[\w./-]*\w", path.read_text()))
        assert [name for name in named if not pathlib.Path(ROOT, name).exists()] == [], path.name


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.stem not in ("index", "python")],
    ids=lambda path: path.name,
)
def test_page_is_sound(path):
    """
    Without a warning of docutils; `bin/docs` makes the site, the two pages of Sphinx included.
    """
    settings = {"halt_level": 2, "report_level": 2, "syntax_highlight": "none"}
    docutils.core.publish_doctree(path.read_text(), str(path), settings_overrides=settings)


def test_every_test_that_a_page_names_is_there():
    named = {name for path in PAGES for name in re.findall(r"``(test_\w+)``", path.read_text())}
    modules = pathlib.Path(ROOT, "spool_tests").rglob("test_*.py")
    tests = {name for path in modules for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named and named <= tests, named - tests


def test_every_page_stands_in_the_index_once():
    index = pathlib.Path(ROOT, "docs/index.rst").read_text()
    listed = re.findall(r"^   ([\w-]+)$", index, re.M)
    assert sorted(listed) == sorted(
        path.stem for path in PAGES if path.stem not in ("README", "index")
    )


def test_page_of_the_python_api_has_every_public_name():
    text = pathlib.Path(ROOT, "docs/python.rst").read_text()
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)(?:\(\w+\))?$", text, re.M)) == api.__all__


def test_no_page_links_to_a_file_beside_it():
    """Such a link is dead on PyPI and in a man page; a path can be found everywhere."""
    for path in [*PAGES, pathlib.Path(ROOT, "CHANGELOG.rst")]:
        assert re.findall(r"`[^`]*<(?!https?:)[^`]*>`_", path.read_text()) == [], path.name


def test_architecture_names_what_is_there():
    """Every file and name it mentions, and every folder of the package."""
    text = pathlib.Path(ROOT, "docs/architecture.rst").read_text()
    package = pathlib.Path(ROOT, "chaperone")
    named = set(re.findall(r"chaperone/[\w/.-]*[\w/]", text))
    assert [name for name in sorted(named) if not pathlib.Path(ROOT, name).exists()] == []
    (tree,) = blocks(pathlib.Path(ROOT, "docs/architecture.rst"), "text")
    assert set(re.findall(r"^ +(\w+)/ ", tree, re.M)) == {
        path.name for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__"
    }
    floors = re.search(r"alike::\n\n((?:    .+\n)+)", text)[1].split("\n")
    contract = pathlib.Path(ROOT, ".importlinter").read_text()
    layers = re.findall(
        r"^    (chaperone\.(?!__).*)$", contract.partition("[importlinter:contract:disk]")[0], re.M
    )
    assert [
        f"chaperone.{floor.strip().replace(' | ', ' | chaperone.')}" for floor in floors if floor
    ] == layers
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    functions = re.findall(r"\(``([a-z_]+)``\)", text)
    assert [name for name in functions if f"def {name}(" not in source] == []


def test_scheduler_of_sixty_lines_has_sixty_lines():
    lines = pathlib.Path(ROOT, "docs/examples/scheduler.py").read_text().splitlines()
    assert 55 <= len(lines) <= 65


def test_demo_ends_well(tmp_path):
    """
    The demo is the promise: with sshd where there is one, in a directory of its own, and nothing is
    left of it.
    """
    need("ssh", "sshd")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "VENV": sys.prefix}
    result = subprocess.run(
        [f"{ROOT}/bin/demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("\nEach byte arrived once.\n")
    assert "SIGUSR2" in result.stdout, "one of them over ssh"
    assert os.listdir(tmp_path) == []


def test_completion_is_at_home_in_its_shell(place):
    for shell in ("bash", "zsh", "fish"):
        if shutil.which(shell):
            script = subprocess.run(
                ["chaperone", "completion", shell], capture_output=True, text=True, check=True
            ).stdout
            subprocess.run([shell, "-n"], input=script, text=True, check=True)
