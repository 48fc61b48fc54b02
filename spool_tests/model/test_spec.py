"""
The spec: every field with its default and its refusals, each in one sentence that never shows a
secret.
"""

import copy
import json
from typing import Any

import pytest

from chaperone.errors import SpecError
from chaperone.model import jsontext
from chaperone.model import spec as specs
from spool_tests.support.specs import ARGV, CANONICAL, CWD

pytestmark = pytest.mark.once


def made(path: str, value: object) -> dict[str, Any]:
    """A small spec with one field set, however deep: `made("stop.signal", "INT")`."""
    spec: dict[str, Any] = {"program": dict(ARGV)}
    *parents, name = path.split(".")
    if path == "program.command":
        del spec["program"]["argv"]
    inner = spec
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[name] = value
    return spec


def field(spec: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        spec = spec[name]
    return spec


def complaint(spec: object) -> str:
    with pytest.raises(SpecError) as caught:
        specs.checked(spec, CWD)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable()
    return text


def test_every_field_has_its_default() -> None:
    assert specs.checked({"program": ARGV}, CWD) == CANONICAL


def test_canonical_form_is_a_fixed_point_and_the_argument_stays_as_it_was() -> None:
    given_spec = {
        "program": {"command": "ls", "cwd": "sub", "stdin": {"file": "in"}, "env": {"K": "v"}},
        "stop": {"signal": "int"},
    }
    before = copy.deepcopy(given_spec)
    canonical = specs.checked(given_spec, CWD)
    assert given_spec == before
    assert specs.checked(canonical, "/elsewhere") == canonical


@pytest.mark.parametrize(
    ("path", "value", "canonical"),
    [
        ("id", "nightly-2026-11-23", "nightly-2026-11-23"),
        ("id", None, None),
        ("id", "a" * 128, "a" * 128),
        ("id", "9._-", "9._-"),
        ("program.argv", ["/bin/x", "", "-a", "ü\udcff\n"], ["/bin/x", "", "-a", "ü\udcff\n"]),
        ("program.cwd", "/srv", "/srv"),
        ("program.cwd", "sub/dir", "/srv/etl/sub/dir"),
        ("program.cwd", None, "/srv/etl"),
        ("program.env", {"K": "", "a-b": "\n"}, {"K": "", "a-b": "\n"}),
        ("program.inherit_env", False, False),
        ("program.inherit_env", [], []),
        ("program.inherit_env", ["PATH", "HOME"], ["PATH", "HOME"]),
        ("program.stdin", "", ""),
        ("program.stdin", "text\0with NUL", "text\0with NUL"),
        ("program.stdin", {"file": "in.txt"}, {"file": "/srv/etl/in.txt"}),
        ("program.stdin", {"file": "/in.txt"}, {"file": "/in.txt"}),
        ("program.umask", "022", "022"),
        ("program.umask", "7", "007"),
        ("program.umask", "0777", "777"),
        ("program.rlimits", {"nofile": 1024}, {"nofile": [1024, 1024]}),
        ("program.rlimits", {"core": "unlimited"}, {"core": [None, None]}),
        (
            "program.rlimits",
            {"core": [0, "unlimited"], "cpu": [1, 2]},
            {"core": [0, None], "cpu": [1, 2]},
        ),
        ("program.merge_stderr", True, True),
        ("lease", 1.5, 1.5),
        ("renew", 0.5, 0.5),
        ("leftovers", "leave", "leave"),
        ("stop.signal", "SIGINT", "SIGINT"),
        ("stop.signal", "usr1", "SIGUSR1"),
        ("stop.signal", "9", "SIGKILL"),
        ("stop.grace_period", 0, 0),
        ("stop.to", "program", "program"),
        ("timeouts.connect", 0.5, 0.5),
        ("timeouts.run", 86400, 86400),
        ("timeouts.idle", 1, 1),
        ("output.max_bytes", 0, 0),
        ("output.max_bytes", 2**63 - 1, 2**63 - 1),
        ("output.on_full", "stop", "stop"),
        ("output.through", "file", "file"),
        ("output.timeline", True, True),
        ("durable", True, True),
        ("keep_secrets", False, False),
        ("labels", {"team": "etl", "any key": ""}, {"team": "etl", "any key": ""}),
        ("remote.remote_dir", None, None),
    ],
)
def test_field_is_taken(path: str, value: object, canonical: object) -> None:
    spec = made(path, value)
    if path.startswith("remote."):
        spec["remote"]["host"] = "db3"
    found = specs.checked(spec, CWD)
    assert field(found, path) == canonical
    assert specs.checked(found, "/elsewhere") == found
    assert jsontext.loads(jsontext.dumps(found)) == found


def test_command_becomes_argv() -> None:
    program = specs.checked({"program": {"command": "ls | wc"}}, CWD)["program"]
    assert program["argv"] == ["/bin/sh", "-c", "ls | wc"] and "command" not in program


def test_remote_becomes_hops_and_its_program_starts_at_home() -> None:
    spec = specs.checked(
        {"program": ARGV, "remote": {"host": "db3", "user": "etl", "port": 22}}, CWD
    )
    assert spec["remote"] == {
        "hops": [{"ssh": {"host": "db3", "user": "etl", "port": 22, "options": {}}}],
        "supervise": True,
        "share": False,
        "remote_dir": None,
    }
    assert spec["program"]["cwd"] is None and spec["lease"] == 60
    assert specs.checked(spec, "/elsewhere") == spec


def test_surviving_has_a_longer_lease_and_wants_a_supervisor() -> None:
    asked = {"program": ARGV, "on_disconnect": "survive"}
    assert specs.checked(asked, CWD)["lease"] == 2400
    assert (
        complaint({**asked, "remote": {"host": "h", "supervise": False}})
        == "on_disconnect: want 'kill' where remote.supervise is false, got 'survive'"
    )


FIELDS = (
    "callback, config, durable, id, keep_secrets, labels, lease, leftovers, "
    "on_disconnect, output, program, remote, renew, stop, timeouts"
)
ID = "an id that matches [A-Za-z0-9][A-Za-z0-9._-]* and has at most 128 characters"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("id", "", f"id: want {ID}, got ''"),
        ("id", "../x", f"id: want {ID}, got '../x'"),
        ("id", ".hidden", f"id: want {ID}, got '.hidden'"),
        ("id", "-r", f"id: want {ID}, got '-r'"),
        ("id", "a\nb", f"id: want {ID}, got 'a\\nb'"),
        ("id", "ä", f"id: want {ID}, got 'ä'"),
        ("id", "a" * 129, f"id: want {ID}, got '{'a' * 76}..."),
        ("id", 7, f"id: want {ID}, got 7"),
        ("program", "ls", "program: want an object, got a string"),
        ("program.argv", "ls -l", "program.argv: want a non-empty list of strings, got 'ls -l'"),
        ("program.argv", [], "program.argv: want a non-empty list of strings, got an empty one"),
        ("program.argv", ["ls", 5], "program.argv[1]: want a string, got 5"),
        ("program.argv", ["ls", ["a"]], "program.argv[1]: want a string, got a list"),
        ("program.argv", ["", "x"], "program.argv[0]: want a non-empty string, got ''"),
        (
            "program.argv",
            ["x", "a\0b"],
            "program.argv[1]: want a string without NUL bytes, got one at character 1",
        ),
        (
            "program.argv",
            ["x", "a\ud800"],
            (
                "program.argv[1]: want text, or bytes as '\\udc80' to '\\udcff', "
                "got another surrogate at character 1"
            ),
        ),
        ("program.command", "", "program.command: want a non-empty string, got ''"),
        ("program.command", ["ls"], "program.command: want a non-empty string, got a list"),
        ("program.cwd", "", "program.cwd: want a non-empty string, got ''"),
        (
            "program.cwd",
            "a\0",
            "program.cwd: want a string without NUL bytes, got one at character 1",
        ),
        ("program.env", ["K=v"], "program.env: want an object of strings, got a list"),
        ("program.env", {"": "v"}, "program.env: want a non-empty name, got ''"),
        ("program.env", {"K=hunter2": "v"}, "program.env: want a name without '=', got 'K=...'"),
        ("program.env", {"K": 5}, "program.env.K: want a string, got a number"),
        ("program.env", {"K": None}, "program.env.K: want a string, got null"),
        (
            "program.env",
            {"K": "hunter2\0"},
            "program.env.K: want a string without NUL bytes, got one at character 7",
        ),
        (
            "program.env",
            {"K": "\udc00"},
            (
                "program.env.K: want text, or bytes as '\\udc80' to '\\udcff', "
                "got another surrogate at character 0"
            ),
        ),
        ("program.env", {"\x1b[31m": 1}, 'program.env["\\u001b[31m"]: want a string, got a number'),
        (
            "program.inherit_env",
            "PATH",
            "program.inherit_env: want true, false or a list of names, got a string",
        ),
        (
            "program.inherit_env",
            {"K": "hunter2"},
            "program.inherit_env: want true, false or a list of names, got an object",
        ),
        (
            "program.inherit_env",
            ["PATH", "K=hunter2"],
            "program.inherit_env[1]: want a name without '=', got 'K=...'",
        ),
        (
            "program.inherit_env",
            ["PATH", 5],
            "program.inherit_env[1]: want a non-empty name, got 5",
        ),
        ("program.stdin", 5, 'program.stdin: want null, a text or {"file": path}, got a number'),
        (
            "program.stdin",
            ["hunter2"],
            'program.stdin: want null, a text or {"file": path}, got a list',
        ),
        (
            "program.stdin",
            "hunter2\ud800",
            (
                "program.stdin: want text, or bytes as '\\udc80' to '\\udcff', "
                "got another surrogate at character 7"
            ),
        ),
        ("program.stdin", {}, "program.stdin.file: required field is missing"),
        ("program.stdin", {"file": ""}, "program.stdin.file: want a non-empty string, got ''"),
        (
            "program.stdin",
            {"text": "hunter2"},
            "program.stdin.text: unknown field; want one of file",
        ),
        ("program.umask", 18, 'program.umask: want an octal string such as "022", got 18'),
        ("program.umask", "", "program.umask: want an octal string such as \"022\", got ''"),
        (
            "program.umask",
            "1777",
            "program.umask: want an octal string such as \"022\", got '1777'",
        ),
        (
            "program.umask",
            "0o22",
            "program.umask: want an octal string such as \"022\", got '0o22'",
        ),
        ("program.rlimits", 5, "program.rlimits: want an object of limits, got 5"),
        (
            "program.rlimits",
            {"files": 5},
            (
                "program.rlimits.files: unknown limit; want one of as, core, cpu, data, fsize, "
                "memlock, nofile, nproc, rss, stack"
            ),
        ),
        (
            "program.rlimits",
            {"core": -1},
            'program.rlimits.core: want a whole number, "unlimited" or a pair of them, got -1',
        ),
        (
            "program.rlimits",
            {"core": True},
            'program.rlimits.core: want a whole number, "unlimited" or a pair of them, got true',
        ),
        (
            "program.rlimits",
            {"core": 1.5},
            'program.rlimits.core: want a whole number, "unlimited" or a pair of them, got 1.5',
        ),
        (
            "program.rlimits",
            {"core": [1, 2, 3]},
            'program.rlimits.core: want a whole number, "unlimited" or a pair of them, got a list',
        ),
        (
            "program.rlimits",
            {"core": 2**63},
            (
                'program.rlimits.core: want a whole number, "unlimited" or a pair of '
                f"them, got {2**63}"
            ),
        ),
        (
            "program.rlimits",
            {"core": [2, 1]},
            "program.rlimits.core: want a soft limit not above the hard one, got 2 above 1",
        ),
        (
            "program.rlimits",
            {"core": ["unlimited", 1]},
            "program.rlimits.core: want a soft limit not above the hard one, got unlimited above 1",
        ),
        ("program.merge_stderr", 1, "program.merge_stderr: want true or false, got 1"),
        (
            "program.agv",
            ["ls"],
            (
                "program.agv: unknown field; want one of argv, command, cwd, env, inherit_env, "
                "merge_stderr, rlimits, stdin, umask"
            ),
        ),
        ("remote", "db3", "remote: want an object, got a string"),
        ("remote", {}, "remote.host: want a non-empty name that does not begin with '-', got null"),
        (
            "remote",
            {"host": "h", "supervise": "no"},
            "remote.supervise: want true or false, got 'no'",
        ),
        (
            "remote",
            {"host": "h", "remote_dir": ""},
            "remote.remote_dir: want a non-empty string, got ''",
        ),
        (
            "remote",
            {"host": "h", "prot": 22},
            (
                "remote.prot: unknown field; want one of hops, host, mode, options, port, "
                "remote_dir, share, supervise, user"
            ),
        ),
        ("on_disconnect", "die", "on_disconnect: want 'kill' or 'survive', got 'die'"),
        ("on_disconnect", None, "on_disconnect: want 'kill' or 'survive', got null"),
        ("lease", 0, "lease: want a number of at least 1, got 0"),
        ("lease", "60", "lease: want a number of at least 1, got '60'"),
        ("lease", 1e11, "lease: want a number of at least 1 and at most 1e+10, got 100000000000.0"),
        ("lease", True, "lease: want a number of at least 1, got true"),
        ("renew", 0, "renew: want a number above 0, got 0"),
        ("renew", "60", "renew: want a number above 0, got '60'"),
        ("leftovers", "kill", "leftovers: want 'stop' or 'leave', got 'kill'"),
        ("stop", 5, "stop: want an object, got a number"),
        ("stop.signal", 15, "stop.signal: want a signal's name such as 'SIGTERM', got 15"),
        (
            "stop.signal",
            "ſigterm",
            "stop.signal: want a signal's name such as 'SIGTERM', got 'ſigterm'",
        ),
        (
            "stop.signal",
            "SIGFOO",
            "stop.signal: want a signal's name such as 'SIGTERM', got 'SIGFOO'",
        ),
        (
            "stop.signal",
            "9" * 5000,
            f"stop.signal: want a signal's name such as 'SIGTERM', got '{'9' * 76}...",
        ),
        ("stop.to", "group", "stop.to: want 'all' or 'program', got 'group'"),
        ("stop.grace_period", -1, "stop.grace_period: want a number of at least 0, got -1"),
        ("stop.grace", 5, "stop.grace: unknown field; want one of grace_period, signal, to"),
        ("timeouts.connect", 0, "timeouts.connect: want a number above 0, got 0"),
        ("timeouts.connect", None, "timeouts.connect: want a number above 0, got null"),
        ("timeouts.run", float("nan"), "timeouts.run: want a number above 0, got nan"),
        (
            "timeouts.run",
            float("inf"),
            "timeouts.run: want a number above 0 and at most 1e+10, got inf",
        ),
        ("timeouts.idle", -1, "timeouts.idle: want a number above 0, got -1"),
        (
            "timeouts.total",
            1,
            "timeouts.total: unknown field; want one of connect, idle, run",
        ),
        ("output.through", "tty", "output.through: want 'pipe' or 'file', got 'tty'"),
        ("output.max_bytes", 1.0, "output.max_bytes: want a whole number of at least 0, got 1.0"),
        ("output.max_bytes", -1, "output.max_bytes: want a whole number of at least 0, got -1"),
        ("output.on_full", "block", "output.on_full: want 'drop' or 'stop', got 'block'"),
        ("output.timeline", 1, "output.timeline: want true or false, got 1"),
        (
            "output.to",
            "x",
            "output.to: unknown field; want one of max_bytes, on_full, through, timeline",
        ),
        ("durable", "yes", "durable: want true or false, got 'yes'"),
        ("keep_secrets", 0, "keep_secrets: want true or false, got 0"),
        ("callback", "https://u:hunter2@h/", "callback: want an object, got a string"),
        ("config", ["hunter2"], "config: want an object, got a list"),
        ("labels", ["a"], "labels: want an object of strings, got a list"),
        ("labels", {"n": 5}, "labels.n: want a string, got 5"),
        ("labels", {"two words": 5}, 'labels["two words"]: want a string, got 5'),
        (
            "labels",
            {"n": "a\0"},
            "labels.n: want a string without NUL bytes, got one at character 1",
        ),
        (
            "labels",
            {"n": "\ud800"},
            (
                "labels.n: want text, or bytes as '\\udc80' to '\\udcff', "
                "got another surrogate at character 0"
            ),
        ),
        ("version", 1, f"version: unknown field; want one of {FIELDS}"),
        ("a\nb", 1, f'["a\\nb"]: unknown field; want one of {FIELDS}'),
        ("k" * 500, 1, f'["{"k" * 76}...]: unknown field; want one of {FIELDS}'),
    ],
)
def test_field_is_refused_by_a_whole_sentence(path: str, value: object, sentence: str) -> None:
    spec = (
        made(path, value)
        if set(path) <= set("abcdefghijklmnopqrstuvwxyz._") and len(path) < 100
        else {"program": ARGV, path: value}
    )
    assert complaint(spec) == sentence


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ([], "spec: want an object, got a list"),
        (None, "spec: want an object, got null"),
        ("hunter2", "spec: want an object, got a string"),
        ({}, "program: required field is missing"),
        ({"program": {}}, "program: want exactly one of argv and command, got neither"),
        (
            {"program": {"argv": ["a"], "command": "a"}},
            "program: want exactly one of argv and command, got argv and command",
        ),
        ({"program": ARGV, 5: 1}, f"[a number]: unknown field; want one of {FIELDS}"),
        (
            {"program": {**ARGV, "env": {"a-b": "hunter2"}}, "remote": {"host": "h"}},
            "program.env.a-b: want a name that a shell can export on the far side, got 'a-b'",
        ),
        (
            {"program": ARGV, "remote": {"host": "h"}, "output": {"through": "file"}},
            "output.through: want 'pipe' with 'remote' or with on_disconnect 'survive', got 'file'",
        ),
        (
            {"program": ARGV, "output": {"through": "file", "max_bytes": 5}},
            (
                "output.max_bytes: want null where output.through is 'file': the "
                "chaperone counts no bytes, got 5"
            ),
        ),
        (
            {"program": ARGV, "output": {"through": "file", "timeline": True}},
            (
                "output.timeline: want false where output.through is 'file': the "
                "chaperone counts no bytes, got true"
            ),
        ),
        (
            {"program": ARGV, "output": {"through": "file", "on_full": "stop"}},
            (
                "output.on_full: want 'drop' where output.through is 'file': the chaperone "
                "counts no bytes, got 'stop'"
            ),
        ),
        (
            {"program": ARGV, "output": {"through": "file"}, "timeouts": {"idle": 5}},
            "timeouts.idle: want null where output.through is 'file': the chaperone sees no bytes, "
            "got 5",
        ),
    ],
)
def test_spec_is_refused_by_a_whole_sentence(spec: object, sentence: str) -> None:
    assert complaint(spec) == sentence


def test_table_of_refusals_covers_every_field() -> None:
    tested = {
        mark.args[1][number][0]
        for mark in test_field_is_refused_by_a_whole_sentence.pytestmark
        for number in range(len(mark.args[1]))
    }  # type: ignore[attr-defined]
    named = {"program.argv" if path == "program.command" else path for path in tested}
    for name, default in CANONICAL.items():
        if isinstance(default, dict) and default:
            assert {f"{name}.{inner}" for inner in default} <= named, name
        else:
            assert name in named, name


def test_names_alone_are_left_without_the_secrets() -> None:
    spec = specs.checked(
        {
            "program": {**ARGV, "env": {"TOKEN": "hunter2"}, "stdin": "hunter2"},
        },
        CWD,
    )
    before = copy.deepcopy(spec)
    shown = specs.without_secrets(spec)
    assert "hunter2" not in json.dumps(shown) and spec == before
    assert shown["program"]["env"] == {"TOKEN": None} and shown["program"]["stdin"] == {
        "hidden": True
    }
    with_file = specs.checked({"program": {**ARGV, "stdin": {"file": "/in"}}}, CWD)
    assert specs.without_secrets(with_file) == with_file
