"""
A spec's `remote`, and the arguments of `build_command`, as a list of hops.

Knows: the fields of `remote`.  Must not know: what a kind of hop does.
"""

from __future__ import annotations

from ...errors import SpecError
from .. import checks
from .kinds import shell_command
from .route import KINDS, Route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..checks import Check
    from .route import Hop

    Table = dict[str, tuple[Check, object]]

MODES = ("ssh-as", "sudo-then-ssh", "ssh-then-sudo", "sudo")
HOP_FIELDS = ("host", "user", "port", "mode", "options", "hops")


def hops(remote: Mapping[str, Any], path: str = "") -> list[Hop]:
    """
    The list of hops that a spec's `remote` means.

    Args:
        remote (dict): `host`, `user`, `port`, `mode`, `options`; or only `hops`, a list of hops.
        path (str): The path of `remote` in the spec, for error messages.
    Returns:
        list: Each hop an object with one key, its kind, whose value has all fields of that kind;
            nearest first.
    Raises:
        SpecError: `PATH: want WANT, got GOT`.
    """
    fields = checks.Fields(_REMOTE)(dict(remote), path)
    if fields["hops"] is not None:
        *five, _ = HOP_FIELDS
        beside = [name for name in five if fields[name] is not None]
        if beside:
            clash = f"want either hops or {', '.join(five)}, got hops and {beside[0]}"
            raise SpecError(f"{checks.at(path, beside[0])}: {clash}")
        return list(fields["hops"])
    mode = fields["mode"] or MODES[0]
    none: dict[str, Any] = {"host": None, "port": None, "options": {}}
    wrong = [name for name in none if fields[name] not in (None, none[name])]
    if mode == "sudo" and wrong:
        want = "none, because mode 'sudo' stays on this host"
        checks.fail(checks.at(path, wrong[0]), want, fields[wrong[0]])
    given = {name: fields[name] for name in ("host", "port", "options")}
    user = {"user": fields["user"]}
    listed: dict[str, list[Hop]] = {
        "ssh-as": [{"ssh": {**given, **user}}],
        "sudo-then-ssh": [{"sudo": user}, {"ssh": given}],
        "ssh-then-sudo": [{"ssh": given}, {"sudo": user}],
        "sudo": [{"sudo": user}],
    }
    return [
        {kind: KINDS[kind].checked(fields, path)}
        for hop in listed[mode]
        for kind, fields in hop.items()
    ]


def _hop(value: Any, path: str) -> Hop:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        names = " and ".join(map(repr, value)) if isinstance(value, dict) else ""
        want = f"an object with one key, {' or '.join(map(repr, KINDS))}"
        raise SpecError(f"{path}: want {want}, got {checks.cut(names) or checks.got(value)}")
    ((kind, fields),) = value.items()
    return {kind: KINDS[kind].checked(fields, checks.at(path, kind))}


def _list(value: Any, path: str) -> list[Hop]:
    if not isinstance(value, list) or not value:
        checks.fail(path, "a non-empty list of hops", value)
    return [_hop(hop, f"{path}[{number}]") for number, hop in enumerate(value)]


# The first five are checked as what they become: fields of a hop.
_REMOTE: Table = {
    **{name: (lambda value, path: value, None) for name in HOP_FIELDS},
    "mode": (checks.OrNull(checks.OneOf(*MODES)), None),
    "hops": (checks.OrNull(_list), None),
}


# -- for callers that only want an argv


def build_program(argv: Sequence[str], options: Mapping[str, Any] | None = None) -> str:
    """
    The shell command that runs a program.

    Args:
        argv (list): The program and its arguments.
        options (dict): As for `build_command`, so that both take the same; not used here.
    Returns:
        str: `exec` and the quoted words.
    Raises:
        ValueError: If `argv` is not a list of strings, is empty, or contains a NUL byte.
    """
    if (
        isinstance(argv, str)
        or not argv
        or not all(isinstance(word, str) and "\0" not in word for word in argv)
    ):
        raise SpecError(f"argv: want a non-empty list of strings without NUL bytes, got {argv!r}")
    return shell_command(argv)


def build_command(
    command: str,
    host: str | None = None,
    user: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """
    The argv that runs a shell command as a user on a host.

    Args:
        command (str): A shell text, as from `build_program`; /bin/sh runs it after the last hop.
        host (str): None is this host.
        user (str): None is the user that ssh chooses, or the user of this process.
        options (dict): `host` and `user` (if not given as arguments), `port`, `mode` (as
            `remote.mode` in docs/spec.rst), and ssh options by their ssh_config names.
    Returns:
        list: Of strings; `['/bin/sh', '-c', command]` if no hop is needed.
    Raises:
        ValueError: With one sentence.
    """
    given = dict(options or {})
    remote = {name: given.pop(name, None) for name in ("host", "user", "port", "mode")}
    remote["host"] = host or remote["host"]
    remote["user"] = user or remote["user"]
    remote["options"] = given or None
    if "\0" in command:
        raise SpecError("command: want a text without NUL bytes, got one")
    if remote["host"] is None and remote["mode"] is None:
        remote["mode"] = "sudo"
    nowhere = remote["mode"] == "sudo" and remote["user"] is None and not given
    # A caller can't ask an old client again.
    return Route.of([] if nowhere else hops(remote)).older().argv(["/bin/sh", "-c", command])
