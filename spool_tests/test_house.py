"""
The house rules that a machine can check: floors, headers, sizes, words.

Knows: the source as text and syntax trees.  Must not know: what it does.
"""
import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from spool_tests.conftest import CHAPERONE, ROOT, need

pytestmark = pytest.mark.once
PACKAGE = pathlib.Path(ROOT, "chaperone")
MODULES = sorted(PACKAGE.glob("*.py"))


def source_files():
    """Every text file of the project, as git sees it, or all of them in a tree without git."""
    git = ["git", "ls-files", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(p.relative_to(ROOT)) for p in pathlib.Path(ROOT).rglob("*") if not re.search(r"/\.venv|__pycache__|_cache/", str(p))]
    return [pathlib.Path(ROOT, name) for name in listed if name and os.path.isfile(os.path.join(ROOT, name))]


def test_no_file_names_a_place_of_the_machine_it_was_written_on():
    # Put together, so that this file may be looked at too.
    words = re.compile(rb"/ro" + rb"ot/|/ho" + rb"me/[a-z]+/|pye" + rb"nv|\bfiles\.python" + rb"hosted|index-" + rb"url|/wo" + rb"rk/")
    found = [f"{path}: {match.group()!r}" for path in source_files() for match in words.finditer(path.read_bytes())]
    assert found == []


def test_top_level_stays_as_it_is():
    top = {path.relative_to(ROOT).parts[0] for path in source_files()}
    assert {name for name in top if name[0] != "."} <= {"setup.py", "chaperone", "spool_tests", "bin", "README.rst", "docs", "LICENSE", "CHANGELOG.rst"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_module_has_a_header_and_no_more_than_400_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "it has two nouns in it"
    header = ast.get_docstring(ast.parse(text)) or ""
    assert "Knows: " in header and "Must not know: " in header, "a module begins by saying what it is, knows and must not know"
    assert path.name == "spool.py" or len(header.splitlines()) <= 5


# -- floors

GROUND, MIDDLE, UPPER, ROOF = range(4)
FLOORS = {
    GROUND: "errors jsontext checks spec status command cursor events",
    MIDDLE: "lease spool rundir slots opened takeover",
    ROOF: "cli verbs upkeep show parser arguments completion upkeep __main__",
}
# What stands on no other floor holds processes, signals and sockets: the upper one.
FLOOR = {path.stem: UPPER for path in MODULES} | {name: floor for floor, names in FLOORS.items() for name in names.split()}


def imports(path, only_at_import_time=False):
    """The modules of this package, and the ones of others, that a module imports: ({name}, {name}); what only a type checker sees is left out."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if only_at_import_time else list(ast.walk(tree))
    typing_only = {id(node) for guard in ast.walk(tree) if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING" for node in ast.walk(guard)}
    own, others = set(), set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "chaperone":
            others.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module} if node.module and node.level else {alias.name for alias in node.names if alias.name in FLOOR}
    return own, others - {"__future__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports_go_down(path):
    climbs = [name for name in imports(path)[0] if FLOOR[name] > FLOOR[path.stem]]
    assert climbs == [], f"{path.name} climbs"


def test_imports_make_no_circle():
    below = {path.stem: imports(path, only_at_import_time=True)[0] for path in MODULES}
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    assert below == {}


def test_the_one_who_writes_and_the_one_who_reads_meet_on_disk_alone():
    def all_below(name, seen):
        for other in imports(PACKAGE / f"{name}.py")[0] - seen:
            seen.add(other)
            all_below(other, seen)
        return seen

    assert "follow" not in all_below("supervise", set())
    assert "supervise" not in all_below("follow", set())


@pytest.mark.parametrize("name", FLOORS[GROUND].split())
def test_ground_floor_holds_values_and_not_even_the_clock(name):
    path = PACKAGE / f"{name}.py"
    allowed = {"_json", "json.decoder", "_signal", "attrs", "datetime", "typing", "collections.abc", "time"}
    assert imports(path)[1] <= allowed
    clocks = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time"}
    assert clocks <= {"gmtime", "strftime"}, "facts come in as arguments"


# -- the holding path is lean

# Builtin, or as good as: what an interpreter without site has, and C modules that it contains or that are small.
LEAN = set("os sys time select fcntl errno stat resource _json _signal _ctypes".split())
BARE = set("__future__ _abc _collections_abc _io _stat abc codecs _codecs genericpath io marshal posix posixpath zipimport _frozen_importlib_external".split())


def test_holding_path_imports_what_is_lean(spool, tmp_path):
    (tmp_path / "spec.json").write_text('{"program": {"argv": ["true"]}}')
    python, *flags, main = CHAPERONE
    result = subprocess.run([python, *flags, "-X", "importtime", main, "run", str(tmp_path / "spec.json")], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")} - {"imported package"}
    others = {name for name in imported if name.partition(".")[0] not in ("chaperone", "encodings")}
    assert "chaperone.supervise" in imported
    assert others - LEAN - BARE == set()


def test_nothing_is_imported_after_the_program_has_started(spool, tmp_path):
    """A chaperone must end its run after its package, and its Python's library, were upgraded or removed."""
    need("strace")
    (tmp_path / "spec.json").write_text('{"program": {"argv": ["sh", "-c", "echo x; exit 3"]}, "timeouts": {"run": 60}}')
    trace = tmp_path / "trace"
    calls = "trace=open,openat,clone,clone3,fork,vfork"
    subprocess.run(["strace", "-o", trace, "-e", calls, *CHAPERONE, "run", tmp_path / "spec.json"], stdout=subprocess.DEVNULL, check=True)
    lines = trace.read_text().splitlines()
    opened = [number for number, line in enumerate(lines) if re.search(r'\.(pyc?|so)"', line)]
    started = [number for number, line in enumerate(lines) if re.match(r"v?fork|clone", line)]
    assert opened and started and max(opened) < min(started)


# -- words


def test_prose_has_one_sentence_a_line():
    """In README and docs a line of prose ends where its sentence ends; tables and literal blocks are left alone."""
    found = []
    for path in [pathlib.Path(ROOT, "README.rst"), pathlib.Path(ROOT, "CHANGELOG.rst"), pathlib.Path(ROOT, "docs/systemd-and-cron.rst")]:
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            if line[:1].isalpha() and re.search(r"[a-z`)]\. [A-Z`]", line):
                found.append(f"{path.name}:{number}: {line}")
    assert found == []


def test_python_of_this_suite_is_one_that_is_promised():
    assert (3, 10) <= sys.version_info[:2]
