"""
Makes a spec of a command line such as `run --host db3 --env A=1 -- CMD ARG...`.

Knows: the fields of a spec that have an option.  Must not know: what they do.
"""

from __future__ import annotations

from ..errors import SpecError
from ..model import jsontext
from .common import age_s
from .verb import UsageError, read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .verb import Given


def spec_text(verb: str, given: Given, argv: list[str]) -> bytes:
    """
    The spec as JSON; it contains only the fields that were given.

    Args:
        given: The options of `common.COMMAND`.
        argv (list): The words after `--`.
    Raises:
        UsageError: If there are none, or an option can't be understood.
        NoInputError, SpecError: If a file of variables can't be read, or a line of it is wrong.
    """
    if not argv:
        raise UsageError(f"unable to understand 'chaperone {verb}': there is no command after --")
    env: dict[str, str] = {}
    for name in given.env_file or ():
        env.update(_variables(name))
    env.update(_pairs("--env", given.env))
    program = {
        "argv": argv,
        "cwd": given.cwd,
        "env": env or None,
        "stdin": {"file": given.stdin} if given.stdin is not None else None,
    }
    run_s = age_s("--timeout", given.timeout)
    spec = {
        "program": _given_ones(program),
        "remote": None if given.host is None else place(given.host, "--host"),
        "on_disconnect": "survive" if given.survive else None,
        "timeouts": None
        if run_s is None
        else {"run": int(run_s) if run_s == int(run_s) else run_s},
        "labels": _pairs("--label", given.label) or None,
    }
    return jsontext.dumps(_given_ones(spec)).encode()


def _given_ones(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:  # not shown: it may be a secret in the wrong place
            raise UsageError(f"unable to understand {option!r}: want NAME=VALUE")
        pairs[name] = value
    return pairs


def place(text: str, what: str) -> dict[str, object]:
    """
    `[USER@]HOST[:PORT]` as fields of `remote`; an IPv6 address needs brackets if a port follows.

    Args:
        what (str): The argument that it is, as an error names it.
    """
    user, at, where = text.rpartition("@")
    host, colon, port = where, "", ""
    if where.startswith("["):
        host, bracket, rest = where[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        wrong = not bracket or colon not in ("", ":")
    else:
        if where.count(":") == 1:
            host, colon, port = where.partition(":")
        wrong = False
    number = int(port) if port.isascii() and port.isdigit() else 0
    if wrong or not host or (at and not user) or (colon and not 0 < number < 65_536):
        raise UsageError(f"unable to understand {what!r}: want [USER@]HOST[:PORT], got {text!r}")
    return _given_ones({"host": host, "user": user or None, "port": number or None})


def _variables(name: str) -> dict[str, str]:
    """
    The variables of a file, as systemd's EnvironmentFile has them: `NAME=VALUE` lines, comments
    behind `#`, matched quotes taken off a value, and nothing expanded.
    """
    lines = read_file("variables", name).decode("utf-8", "surrogateescape").split("\n")
    found = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        variable, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not variable or " " in variable:  # not shown: it may contain a secret
            raise SpecError(f"unable to read variables {name!r}: line {number}: want NAME=VALUE")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[variable] = value
    return found
