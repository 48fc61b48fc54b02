"""
The house rules that a machine can check: floors, headers, sizes, words.

Knows: the source as text and syntax trees.  Must not know: what it does.
"""

import ast
import collections
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import tokenize

import pytest

from spool_tests.support.guarded import stat_of
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.runs import ask, final, live, stdout
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.once
PACKAGE = pathlib.Path(ROOT, "chaperone")
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE
)


def source_files():
    """Every text file of the project, as git sees it, or all of them in a tree without git."""
    git = ["git", "ls-files", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(
            git, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        listed = [
            str(p.relative_to(ROOT))
            for p in pathlib.Path(ROOT).rglob("*")
            if not re.search(r"/\.venv|__pycache__|_cache/", str(p))
        ]
    return [
        pathlib.Path(ROOT, name)
        for name in listed
        if name and os.path.isfile(os.path.join(ROOT, name))
    ]


def test_no_file_names_a_place_of_the_machine_it_was_written_on():
    # Put together, so that this file may be looked at too.
    words = re.compile(
        rb"/ro"
        + rb"ot/|/ho"
        + rb"me/[a-z]+/|pye"
        + rb"nv|\bfiles\.python"
        + rb"hosted|index-"
        + rb"url|/wo"
        + rb"rk/"
    )
    found = [
        f"{path}: {match.group()!r}"
        for path in source_files()
        for match in words.finditer(path.read_bytes())
    ]
    assert found == []


def test_top_level_stays_as_it_is():
    top = {path.relative_to(ROOT).parts[0] for path in source_files()}
    assert {name for name in top if name[0] != "."} <= {
        "setup.py",
        "chaperone",
        "spool_tests",
        "bin",
        "README.rst",
        "docs",
        "LICENSE",
        "CHANGELOG.rst",
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_module_has_a_header_and_no_more_than_450_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450, "it has two nouns in it"
    header = ast.get_docstring(ast.parse(text)) or ""
    words = " ".join(header.split())
    assert "Knows: " in words and "Must not know: " in words, (
        "a module begins by saying what it is, knows and must not know"
    )
    assert path.name == "format.py" or len(header.splitlines()) <= 6


def test_folder_has_at_most_nine_files():
    """An empty `__init__.py` is none."""
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    held = collections.Counter(path.parent.name for path in files if path.stat().st_size)
    assert {folder: count for folder, count in held.items() if count > 9} == {}


def test_no_test_module_is_long_or_imported_by_another():
    found = []
    for path in pathlib.Path(ROOT, "spool_tests").rglob("*.py"):
        text = path.read_text()
        if path.name.startswith("test_") and len(text.splitlines()) > 600:
            found.append(f"{path.name} has more than 600 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names]
                found += [f"{path.name} imports {name}" for name in names if ".test_" in name]
    assert found == []


def test_command_that_measures_the_house_counts_each_folder(tmp_path):
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "first.py").write_text('"""One."""\n\nif True:\n    x = 1\n')
    (inner / "__init__.py").touch()
    (inner / "second.py").write_text(f"y = '{'y' * 100}'\n")
    (inner / "third.sh").write_text("exit\n" * 2_000)
    done = subprocess.run(
        [f"{ROOT}/bin/house", inner.parent], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        " lines statements files columns\n"
        "     4          3     1      10  package\n"
        "     1          1     2     106  package/inner\n"
        "     5          4     3     106  all of it\n"
    )


# -- the holding path is lean

# Builtin, or as good as: what an interpreter without site has, and C modules that it contains or
# that are small.
LEAN = set("sys time select fcntl errno stat resource _json _signal _ctypes _socket gc".split())
BARE = set(
    (
        "__future__ _abc _io _stat abc codecs _codecs io marshal posix zipimport "
        "_frozen_importlib_external"
    ).split()
)


def test_holding_path_imports_what_is_lean(spool, tmp_path):
    (tmp_path / "spec.json").write_text('{"program": {"argv": ["true"]}}')
    python, *flags, main = CHAPERONE
    result = subprocess.run(
        [python, *flags, "-X", "importtime", main, "run", str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {
        line.rpartition("|")[2].strip()
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    } - {"imported package"}
    others = {name for name in imported if name.partition(".")[0] not in ("chaperone", "encodings")}
    assert "chaperone.hold.chaperone" in imported
    for asked in ("chaperone.spool.timeline", "chaperone.hold.limits"):
        assert asked not in imported  # this spec asks for none
    assert others - LEAN - BARE == set()


def test_nothing_is_imported_while_the_program_runs(spool, tmp_path):
    """
    A chaperone must end its run after its package, and its Python's library, were upgraded or
    removed. What the start of the program need not wait for is imported right behind it.
    """
    need("strace")
    os.mkfifo(tmp_path / "go")
    waiting = f"trap 'echo heard' USR1; echo ready; cat {tmp_path}/go & wait; wait; exit 3"
    (tmp_path / "spec.json").write_text(
        json.dumps({"id": "r", "program": {"command": waiting}, "timeouts": {"run": 60}})
    )
    trace = tmp_path / "trace"
    calls = "trace=open,openat"
    command = ["strace", "-f", "-ttt", "-o", trace, "-e", calls, *CHAPERONE, "run"]
    with subprocess.Popen([*command, tmp_path / "spec.json"], stdout=subprocess.DEVNULL) as traced:
        until((spool / "r").exists)
        until(lambda: b"ready" in stdout(spool))
        ask(spool, "signal USR1")
        until(lambda: b"heard" in stdout(spool))
        status = live(spool)
        for name in ("guard_pid", "chaperone_pid"):  # on a busy machine one is behind the other
            until(lambda name=name: stat_of(status[name])[0] == "S")
        now = time.time()
        (tmp_path / "go").write_text("")
        assert traced.wait(60) == 0
    assert final(spool)["return_code"] == 3
    opened = [
        float(line.split(None, 2)[1])
        for line in trace.read_text().splitlines()
        if re.search(r'\.(pyc?|so)"', line)
    ]
    assert len(opened) > 20 and max(opened) < now


def test_one_module_calls_the_kernels_locks():
    found = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if re.search(r"\bfcntl\.(flock|lockf)\b", path.read_text())
    }
    # `far.py` is sent alone to a host that has nothing of ours.
    assert found == {"spool/locks.py", "agent/deploy/far.py"}


# -- words


def test_prose_has_one_sentence_a_line():
    """
    In README and docs a line of prose ends where its sentence ends; tables and literal blocks are
    left alone.
    """
    found = []
    for path in [
        pathlib.Path(ROOT, "README.rst"),
        pathlib.Path(ROOT, "CHANGELOG.rst"),
        pathlib.Path(ROOT, "docs/systemd-and-cron.rst"),
    ]:
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            if line[:1].isalpha() and re.search(r"[a-z`)]\. [A-Z`]", line):
                found.append(f"{path.name}:{number}: {line}")
    assert found == []


def prose(path):
    """The lines of a page that are prose, numbered; literal blocks and literals are taken out."""
    literal = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None:
            yield number, re.sub(r"``.*?``|`[^`]*`_|\"[^\"]*\"", "", line)
        if re.match(r" *\.\. code-block::|(?!\.\.).*::$", line):
            literal = indent


def spoken(path):
    """
    The lines of comments and docstrings of a module, numbered; quoted names are taken out. A text
    that is a value, such as a script of a test, is not looked at.
    """
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        text = token.string.startswith('"""') and token.line.lstrip().startswith('"""')
        if token.type == tokenize.COMMENT or text:
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                yield number, re.sub(r"`[^`]*`|\"[^\"]*\"", "", line)


def test_prose_is_plain():
    listed = pathlib.Path(ROOT, ".plain-words").read_text().splitlines()
    rules = [line.split(" ; ") for line in listed if line and line[0] != "#"]
    pages = [pathlib.Path(ROOT, "README.rst"), pathlib.Path(ROOT, "CHANGELOG.rst")]
    pages += sorted(pathlib.Path(ROOT, "docs").glob("*.rst"))
    tests = sorted(pathlib.Path(ROOT, "spool_tests").rglob("*.py"))
    found = [
        f"{path.name}:{number}: {match[0].strip()!r}, better: {better.strip()}"
        for path in [*pages, *MODULES, *tests]
        for number, line in (prose if path.suffix == ".rst" else spoken)(path)
        for pattern, better in rules
        for match in re.finditer(pattern.strip(), line, re.I)
    ]
    assert found == []


def test_python_of_this_suite_is_one_that_is_promised():
    assert (3, 10) <= sys.version_info[:2]
