"""
What was asked: every field of a spec, its check and its default.

Knows: JSON values.  Must not know: files, processes, the clock, the current directory.
"""

from __future__ import annotations

import _signal

from . import command, jsontext
from .errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Check = Callable[[Any, str], Any]

ID_LENGTH = 128
_ID_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_ID_REST = _ID_FIRST | frozenset("._-")
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
RLIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "rss", "stack")
SURVIVE = False  # until a run can outlive its chaperone
LEASE_S = {"kill": 60, "survive": 2400}  # 2,400 s: HTCondor's JobLeaseDuration, twenty years in use

SIGNALS = {
    name: int(getattr(_signal, name))
    for name in dir(_signal)
    if name.startswith("SIG") and not name.startswith("SIG_") and name not in ("SIGCLD", "SIGIOT", "SIGPOLL")
}


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: object) -> str:
    """What a value is, without what is in it: that may be a secret."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _got(value: object) -> str:
    """A string or a number as it is; of a list or an object its kind alone, for somewhere in it may be a secret."""
    if isinstance(value, str):
        return _cut(repr(value[:80]))
    return _cut(repr(value)) if type(value) is float or (type(value) is int and abs(value) < 10**80) else _kind(value)


def _fail(path: str, want: str, value: object) -> NoReturn:
    raise SpecError(f"{path}: want {want}, got {_got(value)}")


def _fail_unseen(path: str, want: str, value: object) -> NoReturn:
    raise SpecError(f"{path}: want {want}, got {_kind(value)}")


def _at(path: str, name: object) -> str:
    """The path of a field: `program.env`, and `labels["a b"]` where the name is no plain word."""
    if isinstance(name, str) and name and not set(name) - _ID_REST and len(name) <= 80:
        return f"{path}.{name}" if path else name
    return f"{path}[{_cut(jsontext.dumps(name[:80]))}]" if isinstance(name, str) else f"{path}[{_kind(name)}]"


# -- checks: (value, path) to the canonical value, or SpecError


def _bool(value: Any, path: str) -> bool:
    return value if isinstance(value, bool) else _fail(path, "true or false", value)


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        _fail(path, "a non-empty string", value)
    return _passable(value, path)


def _passable(value: str, path: str) -> str:
    """What execve can pass on: no NUL, and no surrogate but those that stand for bytes."""
    if "\0" in value:
        raise SpecError(f"{path}: want a string without NUL bytes, got one at character {value.index(chr(0))}")
    return _bytes_or_text(value, path)


def _bytes_or_text(value: str, path: str) -> str:
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise SpecError(f"{path}: want text or escaped bytes, got a lone surrogate at character {error.start}") from None
    return value


def _strings(value: Any, path: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise SpecError(f"{path}: want a non-empty list of strings, got {'an empty one' if value == [] else _got(value)}")
    for number, item in enumerate(value):
        _passable(item, f"{path}[{number}]") if isinstance(item, str) else _fail(f"{path}[{number}]", "a string", item)
    return list(value)


def _argv(value: Any, path: str) -> list[str]:
    argv = _strings(value, path)
    _text(argv[0], f"{path}[0]")
    return argv


def _env_name(name: object, path: str) -> str:
    if not isinstance(name, str) or not name:
        _fail(path, "a name", name)
    before, equals, _ = name.partition("=")
    if equals:  # what stands behind it may be a secret
        raise SpecError(f"{path}: want a name without '=', got {_cut(repr(before + '=...'))}")
    return _passable(name, path)


def _env(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        _fail_unseen(path, "an object of strings", value)
    for name, text in value.items():
        _env_name(name, path)
        if not isinstance(text, str):  # the value may be a secret: tell its kind alone
            _fail_unseen(_at(path, name), "a string", text)
        _passable(text, _at(path, name))
    return dict(value)


def _inherit_env(value: Any, path: str) -> bool | list[str]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        _fail_unseen(path, "true, false or a list of names", value)
    return [_env_name(name, f"{path}[{number}]") for number, name in enumerate(value)]


def _stdin(value: Any, path: str) -> str | dict[str, str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _bytes_or_text(value, path)
    if not isinstance(value, dict):  # never shown: what goes into a program may be a secret
        _fail_unseen(path, 'null, a text or {"file": path}', value)
    return _fields({"file": (_text, REQUIRED)})(value, path)  # type: ignore[no-any-return]


def _umask(value: Any, path: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 4 or value.strip("01234567") or int(value, 8) > 0o777:
        _fail(path, 'an octal string such as "022"', value)
    return f"{int(value, 8):03o}"


def _rlimits(value: Any, path: str) -> dict[str, list[int | None]]:
    """Each limit as [soft, hard]; None is unlimited."""
    if not isinstance(value, dict):
        _fail(path, "an object of limits", value)
    found = {}
    for name, limit in value.items():
        if name not in RLIMITS:
            raise SpecError(f"{_at(path, name)}: want one of {', '.join(RLIMITS)}, got an unknown limit")
        pair = limit if isinstance(limit, list) and len(limit) == 2 else [limit, limit]
        ends = [None if end in ("unlimited", None) else end for end in pair]
        if any(end is not None and (type(end) is not int or end < 0 or end >= 2**63) for end in ends):
            _fail(f"{path}.{name}", 'a whole number, "unlimited" or a pair of them', limit)
        if ends[1] is not None and (ends[0] is None or ends[0] > ends[1]):
            shown = ["unlimited" if end is None else end for end in ends]
            raise SpecError(f"{path}.{name}: want a soft limit not above the hard one, got {shown[0]} above {shown[1]}")
        found[name] = ends
    return found


def _one_of(*choices: str) -> Check:
    def check(value: Any, path: str) -> str:
        if value not in choices:
            _fail(path, " or ".join(repr(choice) for choice in choices), value)
        return str(value)

    return check


def _number(least: float, above: bool = False, whole: bool = False, most: float = 1e10) -> Check:
    """1e10 s are 317 years: what is above is a mistake and would overflow poll(2) arithmetic elsewhere."""

    def check(value: Any, path: str) -> Any:
        right = type(value) is int or (type(value) is float and not whole)
        if not right or not least <= value <= most or (above and value == least):
            want = f"a {'whole ' if whole else ''}number {'above' if above else 'of at least'} {least:g}"
            _fail(path, f"{want} and at most {most:g}" if right and value > most else want, value)
        return value

    return check


def _or_null(check: Check) -> Check:
    return lambda value, path: None if value is None else check(value, path)


def _signal_name(value: Any, path: str) -> str:
    name = signal_name(value) if isinstance(value, str) else None
    return name or _fail(path, "a signal's name such as 'SIGTERM'", value)


def _labels(value: Any, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _fail(path, "an object of strings", value)
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            _fail(_at(path, name), "a string", text)
        for part in (name, text):
            _passable(part, _at(path, name))
    return dict(value)


def _object(value: Any, path: str) -> dict[str, object]:
    """The agent's own: any JSON object; never shown, for a callback has a token."""
    if not isinstance(value, dict):
        _fail_unseen(path, "an object", value)
    if not _is_json(value, 100):  # the parser takes some 900 levels, on a shallow stack; 100 are told apart from a loop everywhere
        raise SpecError(f"{path}: want JSON values, at most 100 deep, got something else")
    return dict(value)


def _is_json(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(name, str) and _is_json(inner, depth - 1) for name, inner in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_is_json(inner, depth - 1) for inner in value)
    if isinstance(value, float):
        return value - value == 0
    return value is None or isinstance(value, (str, bool)) or (isinstance(value, int) and abs(value) < 10**4000)


def _id(value: Any, path: str) -> str:
    if not is_run_id(value):
        _fail(path, "[A-Za-z0-9][A-Za-z0-9._-]* of at most 128 characters", value)
    return str(value)


def _remote(value: Any, path: str) -> dict[str, object]:
    remote = _fields(_REMOTE)(value, path)
    try:
        hops = command.hops({name: remote[name] for name in value if name in command.HOP_FIELDS})
    except ValueError as error:
        raise SpecError(f"{path}.{error}") from None
    return {"hops": hops, "supervise": remote["supervise"], "remote_dir": remote["remote_dir"]}


REQUIRED = object()


def _fields(table: dict[str, tuple[Check, object]]) -> Check:
    """An object with these fields and no other; a default is canonical as it stands, or made by checking {}."""

    def check(value: Any, path: str) -> dict[str, object]:
        if not isinstance(value, dict):
            _fail_unseen(path or "spec", "an object", value)
        for name in value:
            if name not in table:
                raise SpecError(f"{_at(path, name)}: want one of {', '.join(sorted(table))}, got an unknown field")
        found = {}
        for name, (checked, default) in table.items():
            if name in value:
                found[name] = checked(value[name], _at(path, name))
            elif default is REQUIRED:
                raise SpecError(f"{_at(path, name)}: want it, got nothing")
            else:
                found[name] = checked({}, _at(path, name)) if default is OBJECT else default
        return found

    return check


OBJECT = object()

_REMOTE: dict[str, tuple[Check, object]] = {
    **{name: (lambda value, path: value, None) for name in command.HOP_FIELDS},  # checked by command.hops
    "supervise": (_bool, True),
    "remote_dir": (_or_null(_text), None),
}
_PROGRAM: dict[str, tuple[Check, object]] = {
    "argv": (_argv, None),
    "command": (_text, None),
    "cwd": (_or_null(_text), None),
    "env": (_env, OBJECT),
    "inherit_env": (_inherit_env, True),
    "stdin": (_stdin, None),
    "umask": (_or_null(_umask), None),
    "rlimits": (_rlimits, OBJECT),
    "merge_stderr": (_bool, False),
}
_SPEC: dict[str, tuple[Check, object]] = {
    "id": (_or_null(_id), None),
    "program": (_fields(_PROGRAM), REQUIRED),
    "remote": (_or_null(_remote), None),
    "on_disconnect": (_one_of("kill", "survive"), "kill"),
    "lease": (_or_null(_number(1)), None),
    "leftovers": (_one_of("stop", "leave"), "stop"),
    "stop": (_fields({"signal": (_signal_name, "SIGTERM"), "grace_period": (_number(0), 60)}), OBJECT),
    "timeouts": (
        _fields(
            {
                "connect": (_number(0, above=True), 30),
                "run": (_or_null(_number(0, above=True)), None),
                "idle": (_or_null(_number(0, above=True)), None),
            }
        ),
        OBJECT,
    ),
    "output": (
        _fields(
            {
                "through": (_one_of("pipe", "file"), "pipe"),
                "max_bytes": (_or_null(_number(0, whole=True, most=2**63 - 1)), None),
                "on_full": (_one_of("drop", "stop"), "drop"),
            }
        ),
        OBJECT,
    ),
    "durable": (_bool, False),
    "keep_secrets": (_bool, True),
    "callback": (_or_null(_object), None),
    "config": (_or_null(_object), None),
    "labels": (_labels, OBJECT),
}


def is_run_id(value: object) -> bool:
    """Whether it may name a run: [A-Za-z0-9][A-Za-z0-9._-]{0,127}."""
    return isinstance(value, str) and 0 < len(value) <= ID_LENGTH and value[0] in _ID_FIRST and not set(value) - _ID_REST


def signal_name(text: str) -> str | None:
    """
    The full name of a signal.

    Args:
        text (str): `SIGTERM`, `TERM`, `term`, or its number in decimal.
    Returns:
        str: `SIGTERM`; None if there is no such signal.
    """
    if text.isascii() and text.isdigit() and len(text) <= 3:
        return next((name for name, number in SIGNALS.items() if number == int(text)), None)
    name = text.upper()
    full = name if name.startswith("SIG") else "SIG" + name
    return full if full in SIGNALS else None


def signal_name_of(number: int) -> str:
    """The name of a signal that killed a program; real-time ones as `SIGRTMIN+n`, one without a name as `SIG32`."""
    for name, known in SIGNALS.items():
        if known == number:
            return name
    return f"SIGRTMIN+{number - SIGNALS['SIGRTMIN']}" if number > SIGNALS["SIGRTMIN"] else f"SIG{number}"


def signal_number_of(name: str) -> int | None:
    """The number of a signal as `signal_name_of` names it; None if there is no such signal."""
    return next((number for number in range(1, SIGNALS["SIGRTMAX"] + 1) if signal_name_of(number) == name), None)


def checked(value: object, cwd: str) -> dict[str, Any]:
    """
    The canonical form of a spec: every field there, every default filled in.

    Args:
        value (object): As read from JSON.
        cwd (str): Absolute; where the chaperone was started. Relative near-side paths start there.
    Returns:
        dict: As described in docs/spec.rst; `program.argv` is always there, `command` never.
    Raises:
        SpecError: `PATH: want WANT, got GOT`, for the first field that is wrong.
    """
    spec: dict[str, Any] = _fields(_SPEC)(value, "")
    program = spec["program"]
    if (program["argv"] is None) == (program["command"] is None):
        raise SpecError(f"program: want exactly one of argv and command, got {'neither' if program['argv'] is None else 'both'}")
    if program["argv"] is None:
        program["argv"] = ["/bin/sh", "-c", program["command"]]
    del program["command"]
    if spec["lease"] is None:
        spec["lease"] = LEASE_S[spec["on_disconnect"]]
    if isinstance(program["stdin"], dict):
        program["stdin"]["file"] = _joined(cwd, program["stdin"]["file"])
    if spec["remote"] is None:
        program["cwd"] = _joined(cwd, program["cwd"] or cwd)
    _refuse_contradictions(spec)
    return spec


def _joined(cwd: str, path: str) -> str:
    return path if path.startswith("/") else f"{cwd.rstrip('/')}/{path}"


def _refuse_contradictions(spec: dict[str, Any]) -> None:
    if spec["on_disconnect"] == "survive" and not SURVIVE:
        raise SpecError("on_disconnect: want 'kill', got 'survive', which this version of chaperone can't do yet")
    through_shell = spec["remote"] is not None or spec["on_disconnect"] == "survive"
    if through_shell:
        for name in spec["program"]["env"]:
            if set(name) - _NAME or name[0].isdigit():
                _fail(f"program.env.{name}", "a name that a shell can export on the far side", name)
        if spec["output"]["through"] == "file":
            _fail("output.through", "'pipe' for a program that is not a child of the chaperone", "file")
    if spec["on_disconnect"] == "survive" and spec["remote"] is not None and not spec["remote"]["supervise"]:
        _fail("on_disconnect", "'kill' where remote.supervise is false", "survive")
    if spec["output"]["through"] == "file":
        for name, wrong in (("max_bytes", spec["output"]["max_bytes"] is not None), ("on_full", spec["output"]["on_full"] == "stop")):
            if wrong:
                _fail(f"output.{name}", "none where output.through is 'file': nobody counts the bytes", spec["output"][name])
        if spec["timeouts"]["idle"] is not None:
            _fail("timeouts.idle", "none where output.through is 'file': nobody sees the bytes", spec["timeouts"]["idle"])


def without_secrets(spec: dict[str, Any]) -> dict[str, Any]:
    """
    The spec as it may be shown: names of the environment, of the callback and of the config, never values; no stdin text.

    Args:
        spec (dict): Canonical; left as it is.
    Returns:
        dict: `program.env`, `callback` and `config` have None for each value, a text stdin is `{"hidden": true}`.
    """
    program = dict(spec["program"], env=dict.fromkeys(spec["program"]["env"]))
    if isinstance(program["stdin"], str):
        program["stdin"] = {"hidden": True}
    agents = {name: dict.fromkeys(spec[name]) for name in ("callback", "config") if spec[name] is not None}
    return {**spec, "program": program, **agents}
