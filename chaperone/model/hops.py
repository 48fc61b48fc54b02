"""
Hops: how a command reaches the user and the host it is meant for, as argv and nothing else.

Knows: the words of a shell, of ssh and of sudo.  Must not know: files, processes, what the command
does.
A further kind of hop (srun, docker exec) is one more function from argv to argv, with its fields,
in `HOPS`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Hop = dict[str, dict[str, Any]]

MODES = ("ssh-as", "sudo-then-ssh", "ssh-then-sudo", "sudo")
HOP_FIELDS = ("host", "user", "port", "mode", "options", "hops")

_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-./:,+=@%")
# Words that ssh passes to a ProxyCommand's shell; OpenSSH 9.6 refuses the same ones
# (CVE-2023-51385).
_UNSAFE = frozenset("'`\"$;&<>|(){}\\")

# What the far side's text relies on: these stand before the user's own options, and in ssh the
# first one wins.
_FIXED = (
    ("BatchMode", "yes"),
    ("RequestTTY", "no"),
    ("EscapeChar", "none"),
    ("RemoteCommand", "none"),
)
# What the user may well want otherwise: these stand after their options. 15 s x 3 is the usual
# keepalive, and ends a silent connection before the lease of 60 s does; one shared master would be
# one shared fate.
_USUAL = (
    ("ConnectTimeout", "15"),
    ("ServerAliveInterval", "15"),
    ("ServerAliveCountMax", "3"),
    ("ClearAllForwardings", "yes"),
    ("ForwardAgent", "no"),
    ("ForwardX11", "no"),
    ("PermitLocalCommand", "no"),
    ("ControlMaster", "no"),
    ("ControlPath", "none"),
    ("LogLevel", "INFO"),  # ERROR would not tell that a server stopped answering
)


def quoted(word: str) -> str:
    """
    One word, as sh, fish and csh alike read it back.

    Args:
        word (str): Anything without NUL.
    Returns:
        str: Quoted where it must be. Within '...' fish undoes a backslash and csh a `!`, so these
            stand outside, escaped; a `'` becomes `"'"`, so that quoting what was quoted brings no
            new backslash. csh alone can't take a newline.
    """
    if word and not frozenset(word) - _BARE:
        return word
    pieces, plain = [], ""
    for char in word:
        if char in "'\\!":
            pieces.append(f"'{plain}'" if plain else "")
            pieces.append('"\'"' if char == "'" else "\\" + char)
            plain = ""
        else:
            plain += char
    if plain or not pieces:
        pieces.append(f"'{plain}'")
    return "".join(pieces)


def shell_command(argv: Sequence[str]) -> str:
    """The shell command that becomes `argv`: `exec`, then each word quoted."""
    return " ".join(["exec", *(quoted(word) for word in argv)])


# -- hops: argv to argv


def ssh_argv(hop: Mapping[str, Any], argv: Sequence[str], log: str | None = None) -> list[str]:
    """
    The argv that runs `argv` on another host.

    Args:
        hop (dict): `host`, `user`, `port`, `options`, all but the first None or {} where not given.
        argv (list): What to run there; it passes through the login shell, whichever that is.
        log (str): The file for ssh's own words, which else would stand between the program's; None
            where this hop can't write it.
    """
    options = [*_FIXED, *_flat(hop["options"]), *_USUAL]
    words = ["ssh", "-T"]
    words += ["-E", log] if log is not None else []
    words += [word for name, value in options for word in ("-o", f"{name}={value}")]
    words += ["-p", str(hop["port"])] if hop["port"] is not None else []
    words += ["-l", hop["user"]] if hop["user"] is not None else []
    return [*words, "--", hop["host"], shell_command(argv)]


def sudo_argv(hop: Mapping[str, Any], argv: Sequence[str], log: str | None = None) -> list[str]:
    """
    The argv that runs `argv` as another user of the same host; -n, since nobody is there to type a
    password.
    """
    return ["sudo", "-n", "-H", "-u", hop["user"], "--", *argv]


HOPS: dict[str, Callable[..., list[str]]] = {"ssh": ssh_argv, "sudo": sudo_argv}


def hops_argv(hops: Sequence[Hop], argv: Sequence[str], log: str | None = None) -> list[str]:
    """
    The argv that runs `argv` at the end of all hops.

    Args:
        hops (list): As from `hops`, nearest first; none is this host, as we are.
        log (str): For the first hop alone: the others run where, or as whom, it can't be opened.
    """
    words = list(argv)
    for number in reversed(range(len(hops))):
        ((kind, hop),) = hops[number].items()
        words = HOPS[kind](hop, words, log if number == 0 else None)
    return words


def _flat(options: Mapping[str, Any]) -> list[tuple[str, object]]:
    pairs = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            pairs.append((name, {True: "yes", False: "no"}[one] if isinstance(one, bool) else one))
    return pairs


# -- the spec's `remote` to hops


def hops(remote: Mapping[str, Any]) -> list[Hop]:
    """
    The list of hops that a spec's `remote` means.

    Args:
        remote (dict): `host`, `user`, `port`, `mode`, `options`; or `hops`, the general list,
            alone.
    Returns:
        list: Each hop an object with one key, `ssh` (host, user, port, options) or `sudo` (user);
            nearest first.
    Raises:
        ValueError: Its text goes on from the path of `remote`: `host: want ..., got ...`.
    """
    unknown = [name for name in remote if name not in HOP_FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]}: want one of {', '.join(HOP_FIELDS)}, got an unknown field")
    if remote.get("hops") is not None:
        return _general(remote)
    mode = remote.get("mode")
    if mode is None:
        mode = "ssh-as"
    if mode not in MODES:
        raise ValueError(f"mode: want {' or '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "sudo":
        for name in ("host", "port", "options"):
            if remote.get(name):
                raise ValueError(
                    f"{name}: want none with mode 'sudo', which stays on this host, got {remote[name]!r}"
                )
    fields = {name: remote.get(name) for name in ("host", "user", "port", "options")}
    sudo = {"user": fields["user"]}
    kinds: dict[str, list[Hop]] = {
        "ssh-as": [{"ssh": fields}],
        "sudo-then-ssh": [{"sudo": sudo}, {"ssh": {**fields, "user": None}}],
        "ssh-then-sudo": [{"ssh": {**fields, "user": None}}, {"sudo": sudo}],
        "sudo": [{"sudo": sudo}],
    }
    return [_checked(hop, "") for hop in kinds[mode]]


def _general(remote: Mapping[str, Any]) -> list[Hop]:
    beside = [name for name in remote if name != "hops" and remote[name] is not None]
    if beside:
        raise ValueError(f"{beside[0]}: want either hops or {', '.join(HOP_FIELDS[:-1])}, got both")
    listed = remote["hops"]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"hops: want a non-empty list of hops, got {listed!r}")
    for number, hop in enumerate(listed):
        if not isinstance(hop, dict) or len(hop) != 1 or next(iter(hop)) not in HOPS:
            raise ValueError(
                f"hops[{number}]: want an object with one key, {' or '.join(map(repr, HOPS))}, got {hop!r}"
            )
    return [_checked(hop, f"hops[{number}].") for number, hop in enumerate(listed)]


def _checked(hop: Hop, path: str) -> Hop:
    ((kind, given),) = hop.items()
    path += f"{kind}." if path else ""
    if not isinstance(given, dict):
        raise ValueError(f"{path.rstrip('.')}: want an object, got {given!r}")
    names = {"ssh": ("host", "user", "port", "options"), "sudo": ("user",)}[kind]
    for name in given:
        if name not in names:
            raise ValueError(f"{path}{name}: want one of {', '.join(names)}, got an unknown field")
    user = given.get("user")
    if kind == "sudo":
        return {"sudo": {"user": _name(user, path + "user")}}
    return {
        "ssh": {
            "host": _name(given.get("host"), path + "host"),
            "user": None if user is None else _name(user, path + "user"),
            "port": _port(given.get("port"), path + "port"),
            "options": _options(given.get("options"), path + "options"),
        }
    }


def _name(value: object, path: str) -> str:
    """
    A host or a user: no word that ssh, sudo or a ProxyCommand's shell could take for anything else.
    """
    if not isinstance(value, str) or not value or value.startswith("-"):
        raise ValueError(f"{path}: want a name that does not begin with '-', got {value!r}")
    wrong = [
        char for char in value if char <= " " or char == "\x7f" or char.isspace() or char in _UNSAFE
    ]
    if wrong:
        raise ValueError(
            f"{path}: want a name without white space, quotes or shell characters, got {value!r}"
        )
    if "\udc80" <= max(value) <= "\udcff" or (path.endswith("host") and "@" in value):
        raise ValueError(f"{path}: want a name in plain text without '@', got {value!r}")
    return value


def _port(value: object, path: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= 65535:
        raise ValueError(f"{path}: want a port from 1 to 65535, got {value!r}")
    return value


def _options(value: object, path: str) -> dict[str, Any]:
    """
    ssh_config(5) options: the value a text, a number, a bool or, for those that may stand several
    times, a list of them.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want an object of ssh options, got {value!r}")
    for name, given in value.items():
        if not name.isascii() or not name.isalnum():
            raise ValueError(f"{path}: want names as in ssh_config, got {name!r}")
        for one in given if isinstance(given, list) else [given]:
            if not isinstance(one, (str, int, float)) or any(char in "\0\r\n" for char in str(one)):
                raise ValueError(
                    f"{path}.{name}: want one line of text, a number, true or false, got {given!r}"
                )
    return dict(value)


# -- for callers that only want an argv


def build_program(argv: Sequence[str], options: Mapping[str, Any] | None = None) -> str:
    """
    The shell command that runs a program.

    Args:
        argv (list): The program and its arguments.
        options (dict): As for `build_command`, so that one serves both; they change nothing here.
    Returns:
        str: `exec` and the quoted words.
    Raises:
        ValueError: If `argv` is no list of strings, is empty, or holds a NUL byte.
    """
    if (
        isinstance(argv, str)
        or not argv
        or not all(isinstance(word, str) and "\0" not in word for word in argv)
    ):
        raise ValueError(f"argv: want a non-empty list of strings without NUL bytes, got {argv!r}")
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
        command (str): A shell text, as from `build_program`; run by /bin/sh at the end of all hops.
        host (str): None is this host.
        user (str): None is whoever ssh makes it, or we are.
        options (dict): `host` (if not given as an argument), `port`, `mode` (one of `MODES`), and
            options of ssh by their ssh_config names.
    Returns:
        list: Of strings; `['/bin/sh', '-c', command]` if there is nowhere to go.
    Raises:
        ValueError: One sentence.
    """
    given = dict(options or {})
    remote: dict[str, Any] = {
        "host": host or given.pop("host", None),
        "user": user or given.pop("user", None),
    }
    given = {name: value for name, value in given.items() if name not in ("host", "user")}
    remote["port"], remote["mode"] = given.pop("port", None), given.pop("mode", None)
    remote["options"] = given or None
    if "\0" in command:
        raise ValueError("command: want a text without NUL bytes, got one")
    if remote["host"] is None and remote["mode"] is None:
        remote["mode"] = "sudo"
    nowhere = remote["mode"] == "sudo" and remote["user"] is None and not given
    return hops_argv([] if nowhere else hops(remote), ["/bin/sh", "-c", command])
