"""
docs/spool-format.rst and docs/spec.rst: their samples and tables against the code and the frozen
files.
"""

import ast
import inspect
import itertools
import json
import os
import pathlib
import re
import subprocess
import textwrap

import pytest

from chaperone.model import jsontext, request, transitions
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model.hops import remote as remotes
from chaperone.spool import format
from spool_tests.support import disk
from spool_tests.support.pages import table, words
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import need, until

FORMAT = pathlib.Path(ROOT, "docs", "spool-format.rst").read_text()
SPEC = pathlib.Path(ROOT, "docs", "spec.rst").read_text()
DATA = pathlib.Path(ROOT, "spool_tests", "data", "version-1")


def blocks(page, language):
    """The code blocks of a language, dedented."""
    return [
        textwrap.dedent(block)
        for block in re.findall(rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", page, re.M)
    ]


# -- spool-format.rst


def test_samples_are_the_frozen_files():
    samples = [jsontext.loads(block) for block in blocks(FORMAT, "json")]
    frozen = [
        "ended-by-itself/spec.json",
        "dead/running.json",
        "ended-by-itself/status.json",
        "connection-lost/status.json",
    ]
    assert samples == [json.loads((DATA / name).read_text()) for name in frozen]


def test_tree_is_what_a_run_makes(spool):
    (tree,) = blocks(FORMAT, "text")
    listed = [
        (len(line) - len(line.lstrip()), line.split()[0]) for line in tree.split("\n") if line
    ]
    in_run = {
        name
        for depth, name in listed[[name for _, name in listed].index("RUNID/") + 1 :]
        if depth == 4
    }
    run = disk.create(spool, output={**disk.spec()["output"], "timeline": True})
    made = {*os.listdir(spool / "r"), ".running.json", format.CALLBACK}  # an agent makes it
    disk.end(run)
    assert in_run == made | {"status.json"}
    constants = {
        format.RUNNING,
        format.ENDED,
        format.CONNECT,
        format.LAUNCHER,
        format.LAUNCHER_LOCK,
        format.SWEEP_LOCK,
        format.RECEIVE,
        format.MIRROR,
        f".RUNID.RANDOM{format.NEW}",
        f".RUNID.RANDOM{format.GONE}",
    }
    assert {name.rstrip("/") for depth, name in listed if depth == 2} == constants | {"RUNID"}


def test_every_file_has_its_paragraph():
    section = FORMAT.partition("The files of a run\n")[2].partition("The rules\n")[0]
    told = {name for line in re.findall(r"^``.+``$", section, re.M) for name in words(line)}
    names = {
        format.SPEC,
        format.LOCK,
        format.CONTROL,
        format.LOG,
        format.TIMELINE,
        format.CALLBACK,
        format.LIVE_STATUS,
        format.FINAL_STATUS,
        format.RESERVED,
        format.BUILDING,
        *format.STREAMS,
    }
    assert told == names


def test_every_rule_is_there():
    assert re.findall(r"^([WR]\d)$", FORMAT, re.M) == [
        "W1",
        "W2",
        "W3",
        "W4",
        "W5",
        "R1",
        "R2",
        "R3",
        "R4",
        "R5",
        "R6",
    ]


def test_states_and_transitions_are_those_of_the_code():
    states = table(FORMAT, "state")
    assert [words(row[0])[0] for row in states] == list(statuses.STATES)
    assert {words(row[0])[0] for row in states if row[-1] == "yes"} == set(statuses.FINAL)
    assert {
        words(row[0])[0]: tuple(words(row[1])) for row in table(FORMAT, "from")
    } == transitions.TRANSITIONS


def test_fields_are_those_of_a_status():
    """The table of the page, word for word, is what stands below each field in model/status.py."""
    fields = table(FORMAT, "field")
    described = {}
    body = ast.parse(inspect.getsource(statuses.Status)).body[0].body
    for line, below in itertools.pairwise(body):
        if isinstance(line, ast.AnnAssign) and line.target.id in statuses.FIELDS:
            described[line.target.id] = " ".join(below.value.value.split())
    assert {words(row[0])[0]: row[1] for row in fields} == described
    assert [words(row[0])[0] for row in fields] == list(disk.starting(disk.spec()))
    reasons = next(row[1] for row in fields if row[0] == "``stop``")
    assert tuple(re.search(r"\(([a-z, ]+)\)", reasons)[1].split(", ")) == transitions.STOP_REASONS


def test_numbers_are_those_of_the_code():
    assert "16 KiB, and twice the size of the spec" in FORMAT and format.RESERVE == 16 * 1024
    assert "4,096 bytes at most" in FORMAT and request.LIMIT == 4096
    assert (
        f"at most {specs.ID_LENGTH} characters" in FORMAT
        and f"describes version {format.VERSION}." in FORMAT
    )


def test_json_file_is_one_line_of_ascii(spool):
    run = disk.create(spool, labels={"ü": "\n\udcff"})
    text = (spool / "r" / "running.json").read_bytes()
    assert text.isascii() and text.count(b"\n") == 1 and text.endswith(b"}\n")
    run.close()


@pytest.mark.parametrize(("how", "told"), [("lives", "terminated"), ("dies", "lost")])
def test_script_waits_for_the_end(spool, how, told):
    need("jq", "flock")
    (script,) = blocks(FORMAT, "sh")
    run = disk.create(spool)
    assert probed(spool) == 1
    with subprocess.Popen(
        ["sh", "-c", f"{script}\nwait_for {spool}/r"], stdout=subprocess.PIPE, text=True
    ) as waiting:
        disk.end(run) if how == "lives" else run.close()
        assert waiting.stdout.read() == told + "\n"
    assert (probed(spool) == 0) == (how == "dies")


def test_script_waits_for_no_run_that_was_deleted(spool):
    need("jq", "flock")
    (script,) = blocks(FORMAT, "sh")
    waited = subprocess.run(
        ["sh", "-c", f"{script}\nwait_for {spool}/r"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (waited.stdout, waited.stderr) == ("gone\n", "")


def probed(spool):
    """The exit code of the probe that scripts may rely on."""
    (probe,) = re.findall(r"^- ``(flock .*?)``", FORMAT, re.M)
    return subprocess.run(
        ["sh", "-c", probe.replace("SPOOL/RUN", f"{spool}/r")],
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


def test_script_that_probes_a_run_in_the_moment_of_its_end_makes_no_lock(spool):
    """
    As flock(1) does with a file that is not there: an unlocked `lock` says that the chaperone died.
    """
    need("jq", "flock")
    (script,) = blocks(FORMAT, "sh")
    run = disk.create(spool)
    go = spool.parent / "go"
    late = (
        f"flock() {{ : >{go}; while [ -e {spool}/r/lock ]; do sleep 0.01; done; "
        f'command flock "$@"; }}'
    )
    with subprocess.Popen(
        ["sh", "-c", f"{late}\n{script}\nwait_for {spool}/r"], stdout=subprocess.PIPE, text=True
    ) as waiting:
        try:
            until(go.exists)
        finally:
            disk.end(run)
        assert waiting.stdout.read() == "terminated\n"
    assert probed(spool) != 0
    assert sorted(os.listdir(spool / "r")) == ["spec.json", "status.json", "stderr", "stdout"]


# -- spec.rst


def test_spec_fields_and_defaults_are_those_of_the_code():
    canonical = specs.checked({"program": {"argv": ["x"]}}, "/")
    rows = {words(row[0])[0]: row[1:] for row in table(SPEC, "field")}
    fields = []
    for name, default in canonical.items():
        fields += (
            [f"{name}.{inner}" for inner in default]
            if isinstance(default, dict) and default
            else [name]
        )
    assert set(rows) == {*fields, "program.command"}
    for field, (_, told) in rows.items():
        outer, _, inner = field.partition(".")
        if re.fullmatch(r"``[^`]+``", told):
            default = canonical[outer][inner] if inner else canonical[outer]
            assert json.loads(told.strip("`")) == default, field
    assert {field for field, (_, told) in rows.items() if not told.startswith("``")} == {
        *("id", "program.argv", "program.command", "program.cwd", "program.umask", "lease")
    }
    assert (
        rows["lease"][1]
        == f'{specs.LEASE_S["kill"]}; with ``"survive"`` {specs.LEASE_S["survive"]}'
    )


def test_choices_are_those_of_the_code():
    rows = {words(row[0])[0]: words(row[1]) for row in [*table(SPEC, "field"), *remote_rows()]}
    for field, choices in rows.items():
        outer, _, inner = field.partition(".")
        for choice in choices:
            try:
                value = json.loads(choice)
            except ValueError:
                continue
            spec = {
                "program": {"argv": ["x"]},
                **({"remote": {"host": "h", "user": "u"}} if outer == "remote" else {}),
            }
            if field == "remote.mode" and value == "sudo":
                del spec["remote"]["host"]
            spec = (
                {**spec, outer: {**spec.get(outer, {}), inner: value}}
                if inner
                else {**spec, outer: value}
            )
            specs.checked(spec, "/")
    assert [json.loads(choice) for choice in rows["remote.mode"]] == list(remotes.MODES)
    assert SPEC.replace(" and ", ", ").count(", ".join(specs.RLIMITS)) == 1


def remote_rows():
    return table(SPEC.partition("Remote runs\n----")[2], "field")


def test_remote_fields_are_those_of_the_code():
    assert {words(row[0])[0] for row in remote_rows()} == {
        f"remote.{name}" for name in (*remotes.HOP_FIELDS, "supervise", "share", "remote_dir")
    }


def test_samples_of_specs_are_what_they_say():
    least, given, canonical = (jsontext.loads(block) for block in blocks(SPEC, "json"))
    specs.checked(least, "/srv/etl")
    assert specs.checked(given, "/srv/etl") == canonical == specs.checked(canonical, "/elsewhere")
