"""
The TypedDicts for type checkers, against the tables that check a spec and describe a status; and
what a strict type checker says of callers.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import types
import typing

import pytest

import chaperone
from chaperone import types as typed
from chaperone.model import checks
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model.hops.route import KINDS
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import absent

pytestmark = pytest.mark.once

NULL = type(None)
TOUR = pathlib.Path(ROOT, "docs/examples/tour.py")


def fields(kind):
    return typing.get_type_hints(kind)


def members(hint):
    """The types that a type is one of."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return set(typing.get_args(hint)) if is_union else {hint}


def compare(path, hint, check):
    """A field's type against its check, as far as a check says what it takes."""
    found = members(hint)
    if isinstance(check, checks.OrNull):
        assert NULL in found, path
        compare(path, typing.Union[tuple(found - {NULL})], check.check)  # noqa: UP007  a 3.10 form
    elif isinstance(check, checks.Fields):
        (kind,) = found
        compare_fields(path, kind, check.table)
    elif isinstance(check, checks.OneOf):
        assert typing.get_args(hint) == check.choices, path
    elif isinstance(check, checks.Number):
        assert found == ({int} if check.whole else {float}), path
    elif check in TAKES:
        assert found == {TAKES[check]}, path


TAKES = {
    checks.boolean: bool,
    checks.string: str,
    checks.text: str,
    checks.strings: list[str],
    checks.object_of_strings: dict[str, str],
}


def compare_fields(path, kind, table):
    assert set(fields(kind)) == set(table), f"{path}: {kind.__name__} has not the same fields"
    required = {name for name, (_, default) in table.items() if default is checks.REQUIRED}
    assert set(kind.__required_keys__) == required, path
    for name, hint in fields(kind).items():
        compare(f"{path}.{name}", hint, table[name][0])


def test_dict_of_a_spec_has_the_fields_of_its_table():
    compare_fields("spec", typed.SpecDict, specs.TABLE)


def test_dict_of_a_remote_has_the_fields_that_a_spec_takes():
    with pytest.raises(chaperone.SpecError) as raised:
        specs.checked({"program": {"argv": ["true"]}, "remote": {"": 1}}, "/")
    known = str(raised.value).partition("want one of ")[2].split(", ")
    assert sorted(fields(typed.SpecRemote)) == sorted(known)


def test_dict_of_a_hop_has_a_key_for_each_kind():
    hops = fields(typed.SpecHop)
    assert hops.keys() == KINDS.keys() and typed.SpecHop.__required_keys__ == frozenset()
    for name, kind in KINDS.items():
        compare_fields(f"hops.{name}", hops[name], kind.table)


def test_dict_of_a_stdin_is_what_the_check_takes():
    spec = {"program": {"argv": ["true"], "stdin": typed.SpecStdin(file="/x")}}
    assert specs.checked(spec, "/")["program"]["stdin"] == {"file": "/x"}
    assert fields(typed.SpecStdin) == {"file": str}


def test_dict_of_a_status_has_the_fields_of_its_table():
    hints = fields(typed.StatusDict)
    assert hints.keys() == statuses.FIELDS.keys()
    seen = statuses.Status.__annotations__
    for name, field in statuses.FIELDS.items():
        found = members(hints[name])
        assert (NULL in found) == ("None" in seen[name]), name
        compare_kinds(name, found - {NULL}, field.kinds)


def compare_kinds(path, found, kinds):
    if isinstance(kinds, tuple):
        plain = {typing.get_origin(each) or each for each in found}
        # A type checker takes an int where a float is wanted.
        assert plain == (set(kinds) - {int} if float in kinds else set(kinds)), path
        return
    (kind,) = found
    if not kinds:  # any fields
        return
    assert kind.__required_keys__ == kinds.keys(), path
    for name in kinds:
        compare_kinds(f"{path}.{name}", members(fields(kind)[name]) - {NULL}, kinds[name])


def test_dict_of_what_was_used_has_what_the_kernel_counts():
    from chaperone.program import processes

    source = pathlib.Path(processes.__file__).read_text()
    counted = re.findall(r'"(\w+)": usage\.ru_\1', source)
    assert set(fields(typed.StatusRusage)) == set(counted) and len(counted) == 9


def test_status_that_a_reader_gets_has_every_field(spool):
    raw = chaperone.Spool(spool).start({"program": {"argv": ["true"]}}).wait().raw
    assert set(raw) >= set(fields(typed.StatusDict))
    assert set(raw["rusage"]) == set(fields(typed.StatusRusage))


# -- the tour


def test_tour_has_every_public_name_in_sixty_lines():
    text = TOUR.read_text()
    assert [name for name in chaperone.__all__ if not re.search(rf"\b{name}\b", text)] == []
    assert [name for name in ("Spool", "Run", "Follower") if f"aio.{name}" not in text] == []
    assert len(text.splitlines()) <= 60


def test_tour_goes_where_it_says(spool):
    for first in (True, False):
        done = subprocess.run(
            [sys.executable, "-W", "error", TOUR, spool],
            env={"PYTHONPATH": ROOT, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        # The second time its run is collected, but its cursor asks for it.
        assert done.stdout.splitlines()[-3:] == [
            "stdout from byte 0: 'out\\n'",
            "nothing is new: None",
            "4 b'out\\n' ['SIGTERM', 'SIGTERM']",
        ], (first, done.stdout, done.stderr)
        assert done.stdout.startswith("-- db3 exec /bin/sh -c 'exec df -h'\n")
        assert (done.returncode, done.stderr) == (0, "")


# Each with what mypy says of it.
MISTAKES = {
    "run.status().pid = 5": 'Property "pid" defined in "Status" is read-only  [misc]',
    "run.wait(5).state": 'Item "None" of "Status | None" has no attribute "state"  [union-attr]',
    'spec: chaperone.SpecDict = {"program": {"argv": ["ls"]}, "labels": {}, "durabel": True}': (
        'Extra key "durabel" for TypedDict "SpecDict"  [typeddict-unknown-key]'
    ),
    'run.status().raw["return_cod"]': (
        'TypedDict "StatusDict" has no key "return_cod"  [typeddict-item]'
    ),
    'run.status().program["arg"]': 'TypedDict "StatusProgram" has no key "arg"  [typeddict-item]',
}


def test_strict_type_checker_takes_the_tour_and_finds_mistakes(tmp_path):
    try:
        import mypy  # noqa: F401
    except ImportError:
        absent("no mypy: bin/venv installs it")
    shutil.copy(TOUR, tmp_path / "tour.py")
    lines = "import chaperone\nrun = chaperone.Spool('s')['r']\n"
    lines += "".join(f"{line}\n" for line in MISTAKES)
    (tmp_path / "mistakes.py").write_text(lines)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "tour.py"]
        + ["mistakes.py"],
        cwd=tmp_path,
        env={"MYPYPATH": ROOT, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", checked.stdout, re.M)
    said = enumerate(MISTAKES.values(), 3)
    expected = [("mistakes", str(number), sentence) for number, sentence in said]
    assert found == expected, checked.stdout + checked.stderr
