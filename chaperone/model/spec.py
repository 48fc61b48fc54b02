"""
A spec, which says what to run and how: each field, its check and its default.

Knows: JSON values.  Must not know: files, processes, the clock, the current directory.
"""

from __future__ import annotations

from ..cpython import signal
from ..errors import SpecError
from . import checks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .checks import Check

ID_LENGTH = 128
ID_FORM = f"that matches [A-Za-z0-9][A-Za-z0-9._-]* and has at most {ID_LENGTH} characters"
_ID_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_ID_REST = _ID_FIRST | frozenset("._-")
_ID_TEXT = "".join(_ID_REST)
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_VISIBLE = frozenset(map(chr, range(33, 127)))  # ASCII; what a header and a URL can carry
RLIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "rss", "stack")
LEASE_S = {"kill": 60, "survive": 2400}  # 2,400 s: HTCondor's JobLeaseDuration, twenty years in use

SIGNALS = {
    name: int(getattr(signal, name))
    for name in dir(signal)
    if name.startswith("SIG")
    and not name.startswith("SIG_")
    and name not in ("SIGCLD", "SIGIOT", "SIGPOLL")
}


def _env_name(name: object, path: str) -> str:
    if not isinstance(name, str) or not name:
        checks.fail(path, "a non-empty name", name)
    before, equals, _ = name.partition("=")
    if equals:  # what comes after it may be a secret
        raise SpecError(f"{path}: want a name without '=', got {checks.cut(repr(before + '=...'))}")
    return checks.passable(name, path)


def _env(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        checks.fail_unseen(path, "an object of strings", value)
    for name, text in value.items():
        _env_name(name, path)
        if not isinstance(text, str):  # the value may be a secret: show only its kind
            checks.fail_unseen(checks.at(path, name), "a string", text)
        checks.passable(text, checks.at(path, name))
    return dict(value)


def _inherit_env(value: Any, path: str) -> bool | list[str]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        checks.fail_unseen(path, "true, false or a list of names", value)
    return [_env_name(name, f"{path}[{number}]") for number, name in enumerate(value)]


def _stdin(value: Any, path: str) -> str | dict[str, str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return checks.bytes_or_text(value, path)
    if not isinstance(value, dict):  # not shown, because stdin may be a secret
        checks.fail_unseen(path, 'null, a text or {"file": path}', value)
    found: dict[str, str] = checks.Fields({"file": (checks.text, checks.REQUIRED)})(value, path)
    return found


def _umask(value: Any, path: str) -> str:
    if (
        not isinstance(value, str)
        or not 1 <= len(value) <= 4
        or value.strip("01234567")
        or int(value, 8) > 0o777
    ):
        checks.fail(path, 'an octal string such as "022"', value)
    return f"{int(value, 8):03o}"


def _rlimits(value: Any, path: str) -> dict[str, list[int | None]]:
    """Each limit as [soft, hard]; None is unlimited."""
    if not isinstance(value, dict):
        checks.fail(path, "an object of limits", value)
    found = {}
    for name, limit in value.items():
        if name not in RLIMITS:
            raise SpecError(
                f"{checks.at(path, name)}: unknown limit; want one of {', '.join(RLIMITS)}"
            )
        pair = limit if isinstance(limit, list) and len(limit) == 2 else [limit, limit]
        ends = [None if end in ("unlimited", None) else end for end in pair]
        if any(
            end is not None and (type(end) is not int or end < 0 or end >= 2**63) for end in ends
        ):
            checks.fail(f"{path}.{name}", 'a whole number, "unlimited" or a pair of them', limit)
        if ends[1] is not None and (ends[0] is None or ends[0] > ends[1]):
            shown = ["unlimited" if end is None else end for end in ends]
            got = f"{shown[0]} above {shown[1]}"
            raise SpecError(f"{path}.{name}: want a soft limit not above the hard one, got {got}")
        found[name] = ends
    return found


def _signal_name(value: Any, path: str) -> str:
    name = signal_name(value) if isinstance(value, str) else None
    return name or checks.fail(path, "a signal's name such as 'SIGTERM'", value)


def _id(value: Any, path: str) -> str:
    if not is_run_id(value):
        checks.fail(path, f"an id {ID_FORM}", value)
    return str(value)


def _url(value: Any, path: str) -> str:
    """An https URL. It is not shown: one that is wrong may contain a password."""
    if not isinstance(value, str):
        checks.fail_unseen(path, "an https URL", value)
    if not value.startswith("https://"):
        insecure = value.startswith("http://")
        got = "one that begins with 'http://'" if insecure else "a string"
        raise SpecError(f"{path}: want a URL that begins with 'https://', got {got}")
    if set(value) - _VISIBLE | set(value) & set("?#\\") or "@" in value.split("/")[2]:
        want = "a URL of visible ASCII characters, without a user, a query and a fragment"
        checks.fail_unseen(path, want, value)
    place = value.split("/")[2]
    host, bracket, rest = place.rpartition("]")
    if not bracket:
        host, colon, port = place.partition(":")
        is_host = bool(host) and not set(host) - _ID_REST
    else:
        nothing, colon, port = rest.partition(":")
        is_address = len(host) > 1 and not set(host[1:]) - set("0123456789abcdefABCDEF:.")
        is_host = host[0] == "[" and is_address and not nothing
    is_port = not colon or (port.isdigit() and len(port) < 6 and 0 < int(port) < 65_536)
    if not is_host or not is_port:
        checks.fail_unseen(path, "https://HOST[:PORT][/PATH]", value)
    return value


def _token(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value or set(value) - _VISIBLE:
        checks.fail_unseen(path, "visible ASCII characters", value)
    return value


def _remote(value: Any, path: str) -> dict[str, object]:
    from .hops import remote as hops  # 0.6 ms, and only a run behind hops needs it

    unchecked: tuple[Check, object] = (lambda value, path: value, None)  # hops.hops checks it
    fields = {**dict.fromkeys(hops.HOP_FIELDS, unchecked), **REMOTE}
    remote = checks.Fields(fields)(value, path)
    given = {name: remote.pop(name) for name in hops.HOP_FIELDS}
    return {"hops": hops.hops(given, path), **remote}


# What `remote` has besides its hops.
REMOTE: dict[str, tuple[Check, object]] = {
    "supervise": (checks.boolean, True),
    "share": (checks.OrNull(checks.boolean), None),
    "remote_dir": (checks.OrNull(checks.text), None),
}
_PROGRAM: dict[str, tuple[Check, object]] = {
    "argv": (checks.argv, None),
    "command": (checks.text, None),
    "cwd": (checks.OrNull(checks.text), None),
    "env": (_env, checks.OBJECT),
    "inherit_env": (_inherit_env, True),
    "stdin": (_stdin, None),
    "umask": (checks.OrNull(_umask), None),
    "rlimits": (_rlimits, checks.OBJECT),
    "merge_stderr": (checks.boolean, False),
}
# Where a run is posted to, and how; `chaperone/agent/callback/` does it.
CALLBACK: dict[str, tuple[Check, object]] = {
    "url": (_url, checks.REQUIRED),
    "method": (checks.OneOf("POST", "GET"), "POST"),
    "token": (checks.OrNull(_token), None),
    "token_file": (checks.OrNull(checks.text), None),
    "ca": (checks.OrNull(checks.text), None),
}
CONFIG: dict[str, tuple[Check, object]] = {
    "retry_frequency": (checks.Number(0, above=True), 10),
    "timeout": (checks.Number(0, above=True), 86_400),
    # The receiver takes no larger body.
    "output_buffer": (checks.Number(1, whole=True, most=2**20), 65_536),
    "output_latency": (checks.Number(0), 1),
}
TABLE: dict[str, tuple[Check, object]] = {
    "id": (checks.OrNull(_id), None),
    "program": (checks.Fields(_PROGRAM), checks.REQUIRED),
    "remote": (checks.OrNull(_remote), None),
    "on_disconnect": (checks.OneOf("kill", "survive"), "kill"),
    "lease": (checks.OrNull(checks.Number(1)), None),
    "renew": (checks.OrNull(checks.Number(0, above=True)), None),
    "leftovers": (checks.OneOf("stop", "leave"), "stop"),
    "stop": (
        checks.Fields(
            {
                "signal": (_signal_name, "SIGTERM"),
                "grace_period": (checks.Number(0), 60),
                "to": (checks.OneOf("all", "program"), "all"),
            }
        ),
        checks.OBJECT,
    ),
    "timeouts": (
        checks.Fields(
            {
                "connect": (checks.Number(0, above=True), 30),
                "run": (checks.OrNull(checks.Number(0, above=True)), None),
                "idle": (checks.OrNull(checks.Number(0, above=True)), None),
            }
        ),
        checks.OBJECT,
    ),
    "output": (
        checks.Fields(
            {
                "through": (checks.OneOf("pipe", "file"), "pipe"),
                "max_bytes": (checks.OrNull(checks.Number(0, whole=True, most=2**63 - 1)), None),
                "on_full": (checks.OneOf("drop", "stop"), "drop"),
                "timeline": (checks.boolean, False),
            }
        ),
        checks.OBJECT,
    ),
    "durable": (checks.boolean, False),
    "keep_secrets": (checks.boolean, True),
    "callback": (checks.OrNull(checks.Fields(CALLBACK)), None),
    "config": (checks.OrNull(checks.Fields(CONFIG)), None),
    "labels": (checks.object_of_strings, checks.OBJECT),
}


def is_run_id(value: object) -> bool:
    """Whether a value is a valid run id: [A-Za-z0-9][A-Za-z0-9._-]{0,127}."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= ID_LENGTH
        and value[0] in _ID_FIRST
        and not value.strip(_ID_TEXT)  # in C: a spool may have 100,000 of them
    )


def signal_name(text: str) -> str | None:
    """
    The full name of a signal.

    Args:
        text (str): `SIGTERM`, `TERM`, `term`, `SIGRTMIN+3`, or its number in decimal.
    Returns:
        str: `SIGTERM`; None if there is no such signal.
    """
    if not text.isascii():  # `ſ` is an S in upper case
        return None
    if text.isdigit() and len(text) <= 3:
        number = int(text)
        return (
            signal_name_of(number)
            if number in SIGNALS.values() or SIGNALS["SIGRTMIN"] < number < SIGNALS["SIGRTMAX"]
            else None
        )
    name = text.upper()
    full = name if name.startswith("SIG") else "SIG" + name
    return (
        full
        if full in SIGNALS or (full.startswith("SIGRTMIN+") and signal_number_of(full))
        else None
    )


def signal_name_of(number: int) -> str:
    """
    The name of a signal by its number: `SIGTERM`, `SIGRTMIN+3`; `SIG32` if it has no name.
    """
    for name, known in SIGNALS.items():
        if known == number:
            return name
    return (
        f"SIGRTMIN+{number - SIGNALS['SIGRTMIN']}"
        if number > SIGNALS["SIGRTMIN"]
        else f"SIG{number}"
    )


def signal_number_of(name: str) -> int | None:
    """
    The number of a signal by a name from `signal_name` or `signal_name_of`; None if there is none.
    """
    return SIGNALS.get(name) or next(
        (number for number in range(1, SIGNALS["SIGRTMAX"] + 1) if signal_name_of(number) == name),
        None,
    )


def checked(value: object, cwd: str) -> dict[str, Any]:
    """
    Check a spec, and return its canonical form: all fields are there, with their defaults.

    Args:
        value (object): As read from JSON.
        cwd (str): Absolute. Relative paths of this host are completed with it.
    Returns:
        dict: As in docs/spec.rst. `program.argv` is always there, `program.command` never.
    Raises:
        SpecError: `PATH: want WANT, got GOT`, for the first field that is wrong.
    """
    spec: dict[str, Any] = checks.Fields(TABLE)(value, "")
    program = spec["program"]
    if (program["argv"] is None) == (program["command"] is None):
        got = "neither" if program["argv"] is None else "argv and command"
        raise SpecError(f"program: want exactly one of argv and command, got {got}")
    if program["argv"] is None:
        program["argv"] = ["/bin/sh", "-c", program["command"]]
    del program["command"]
    if spec["lease"] is None:
        spec["lease"] = LEASE_S[spec["on_disconnect"]]
    if isinstance(program["stdin"], dict):
        program["stdin"]["file"] = _joined(cwd, program["stdin"]["file"])
    if spec["remote"] is None:
        program["cwd"] = _joined(cwd, program["cwd"] or cwd)
    if spec["callback"] is not None:
        _complete_callback(spec, spec["callback"], cwd)
    _refuse_contradictions(spec)
    return spec


def _joined(cwd: str, path: str) -> str:
    return path if path.startswith("/") else f"{cwd.rstrip('/')}/{path}"


def _complete_callback(spec: dict[str, Any], callback: dict[str, Any], cwd: str) -> None:
    if (callback["token"] is None) == (callback["token_file"] is None):
        got = "neither" if callback["token"] is None else "both"
        raise SpecError(f"callback: want exactly one of token and token_file, got {got}")
    for name in ("token_file", "ca"):
        if callback[name] is not None:
            callback[name] = _joined(cwd, callback[name])
    if spec["config"] is None:
        spec["config"] = checks.Fields(CONFIG)({}, "config")


def _refuse_contradictions(spec: dict[str, Any]) -> None:
    through_shell = spec["remote"] is not None or spec["on_disconnect"] == "survive"
    if through_shell:
        for name in spec["program"]["env"]:
            if set(name) - _NAME or name[0].isdigit():
                checks.fail(
                    f"program.env.{name}", "a name that a shell can export on the far side", name
                )
        if spec["output"]["through"] == "file":
            checks.fail(
                "output.through",
                "'pipe' with 'remote' or with on_disconnect 'survive'",
                "file",
            )
    if (
        spec["on_disconnect"] == "survive"
        and spec["remote"] is not None
        and not spec["remote"]["supervise"]
    ):
        checks.fail("on_disconnect", "'kill' where remote.supervise is false", "survive")
    if spec["stop"]["to"] == "program" and spec["remote"] and not spec["remote"]["supervise"]:
        checks.fail("stop.to", "'all' where remote.supervise is false", "program")
    if spec["remote"] is not None:
        _check_way(spec, spec["remote"])
    if spec["output"]["through"] == "file":
        for name, want, wrong in (
            ("max_bytes", "null", spec["output"]["max_bytes"] is not None),
            ("on_full", "'drop'", spec["output"]["on_full"] == "stop"),
            ("timeline", "false", spec["output"]["timeline"]),
        ):
            if wrong:
                checks.fail(
                    f"output.{name}",
                    f"{want} where output.through is 'file': the chaperone counts no bytes",
                    spec["output"][name],
                )
        if spec["timeouts"]["idle"] is not None:
            checks.fail(
                "timeouts.idle",
                "null where output.through is 'file': the chaperone sees no bytes",
                spec["timeouts"]["idle"],
            )


def _check_way(spec: dict[str, Any], remote: dict[str, Any]) -> None:
    from .hops.route import Route

    route, survives = Route.of(remote["hops"]), spec["on_disconnect"] == "survive"
    if survives and route.dies_with_client:
        checks.fail("on_disconnect", f"'kill' behind {route.dies_with_client}", "survive")
    if remote["share"] is None:
        remote["share"] = survives and bool(route.share_key)
    if remote["share"] and not route.share_key:
        want = "false where the first hop is not ssh or has a ControlPath of its own"
        checks.fail("remote.share", want, True)
    if remote["share"] and not remote["supervise"]:
        checks.fail("remote.share", "false where remote.supervise is false", True)


def without_secrets(spec: dict[str, Any]) -> dict[str, Any]:
    """
    A copy of the spec that may be shown: without the values of `program.env`, the token of
    `callback`, and the text of stdin.

    Args:
        spec (dict): Canonical, maybe of an older version; not changed.
    Returns:
        dict: Each of those values is None; a text for stdin is `{"hidden": true}`.
    """
    program = dict(spec["program"], env=dict.fromkeys(spec["program"]["env"]))
    if isinstance(program["stdin"], str):
        program["stdin"] = {"hidden": True}
    agents = {}
    # In 0.1 both could be any object, with secrets of any name.
    for name, shown in (("callback", CALLBACK.keys() - {"token"}), ("config", CONFIG.keys())):
        if spec[name] is not None:
            given = spec[name].items()
            agents[name] = {key: value if key in shown else None for key, value in given}
    return {**spec, "program": program, **agents}
