"""
The kinds of hops that reach a host or a user: each is one class.

Knows: the words of a shell, of ssh and of sudo.  Must not know: files, processes, what the command
does.
"""

from __future__ import annotations

from .. import checks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from ..checks import Check

    Table = dict[str, tuple[Check, object]]

_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-./:,+=@%")
# Words that ssh passes to a ProxyCommand's shell; OpenSSH 9.6 refuses the same ones
# (CVE-2023-51385).
_UNSAFE = frozenset("'`\"$;&<>|(){}\\")
# What can't stand within '...' of every shell, as it stands between two of them.
_APART = {ord("'"): "'\"'\"'", ord("\\"): "'\\\\'", ord("!"): "'\\!'"}


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
    return f"'{word.translate(_APART)}'".replace("''", "") or "''"


def shell_command(argv: Sequence[str]) -> str:
    """The shell command that becomes `argv`: `exec`, then each word quoted."""
    return " ".join(["exec", *(quoted(word) for word in argv)])


# -- checks of what hops have in common


def _name(value: Any, path: str) -> str:
    """
    A host or a user: no word that ssh, sudo or a ProxyCommand's shell could take for anything else.
    """
    if not isinstance(value, str) or not value or value.startswith("-"):
        checks.fail(path, "a name that does not begin with '-'", value)
    if any(char <= " " or char == "\x7f" or char.isspace() or char in _UNSAFE for char in value):
        checks.fail(path, "a name without white space, quotes or shell characters", value)
    if "\udc80" <= max(value) <= "\udcff":
        checks.fail(path, "a name in plain text without '@'", value)
    return value


def _host(value: Any, path: str) -> str:
    if "@" in _name(value, path):
        checks.fail(path, "a name in plain text without '@'", value)
    return str(value)


def _port(value: Any, path: str) -> int:
    if type(value) is not int or not 1 <= value <= 65535:
        checks.fail(path, "a port from 1 to 65535", value)
    return int(value)


def _options(value: Any, path: str) -> dict[str, Any]:
    """
    ssh_config(5) options: the value a text, a number, a bool or, for those that may stand several
    times, a list of them.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        checks.fail(path, "an object of ssh options", value)
    for name, given in value.items():
        if not name.isascii() or not name.isalnum():
            checks.fail(path, "names as in ssh_config", name)
        for one in given if isinstance(given, list) else [given]:
            if not isinstance(one, (str, int, float)) or any(char in "\0\r\n" for char in str(one)):
                checks.fail(f"{path}.{name}", "one line of text, a number, true or false", given)
    return dict(value)


# -- the kinds


class Kind:
    """
    What there is to know of a kind of hop; each answer here is the careful one.

    Args:
        fields (dict): Of one hop, checked.

    Attributes:
        table (dict): Its fields, as for `checks.Fields`.
        may_be_killed (bool): Whether SIGKILL of its process ends what it started, too.
        carries_eof (bool): Whether the end of its standard input reaches the far side.
        can_survive (bool): Whether what was started behind it can outlive it.
        own_codes (tuple): Exit codes that mean that it failed, and not what it started.
        refusals (tuple): (stage, words): what it says when no further attempt would help.
        passing (tuple): What it says when a further attempt may help all the same.
        farewell (tuple): What stands before and behind the host in the line that it writes to
            stderr when its connection is lost; None where it writes none.
        slot_fields (tuple): Of which of its fields the attempts to connect that share a limit have
            the same values; () for no limit.
    """

    table: Table
    may_be_killed = False
    carries_eof = True
    can_survive = True
    own_codes: tuple[int, ...] = ()
    refusals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    passing: tuple[str, ...] = ()
    farewell: tuple[bytes, bytes] | None = None
    slot_fields: tuple[str, ...] = ()

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """The argv that runs `argv` behind it; `log` is a file for its own words, or None."""
        raise NotImplementedError

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Where it leads, and as whom, for a reader; from where, and as whom it is run."""
        raise NotImplementedError

    def is_too_new(self, words: str) -> bool:
        """Whether its client ended with these words because it is too old for what it was given."""
        return False

    def older(self) -> Kind:
        """The same hop, without what old clients do not know."""
        return self

    def announcing(self, word: str) -> Kind | None:
        """The same hop, writing `word` to stderr once it is through; None where it can't."""
        return None


class Ssh(Kind):
    """Another host, by the client of OpenSSH."""

    table: Table = {
        "host": (_host, checks.REQUIRED),
        "user": (checks.OrNull(_name), None),
        "port": (checks.OrNull(_port), None),
        "options": (_options, checks.OBJECT),
    }
    may_be_killed = True  # sshd sees the end of the connection
    own_codes = (255,)  # ssh(1): "or with 255 if an error occurred"
    refusals = (
        ("host-key", ("Host key verification failed", "HOST IDENTIFICATION HAS", "host key")),
        ("auth", ("Permission denied", "Too many authentication", "No more authentication")),
        ("name", ("Could not resolve hostname",)),
        ("usage", ("Bad configuration option", "bad configuration options")),
    )
    passing = ("Temporary failure in name resolution",)
    # Written to stderr, whatever -E and LogLevel are.
    farewell = (b"Connection to ", b" closed by remote host.\r\n")
    slot_fields = ("host", "port")  # the server, whose MaxStartups is the limit

    # What the far side's text relies on: these stand before the user's own options, and in ssh the
    # first one wins.
    _FIXED = ("BatchMode=yes", "RequestTTY=no", "EscapeChar=none", "RemoteCommand=none")
    # As these; but OpenSSH before 8.7 does not know them, and ends at the first one. IgnoreUnknown
    # would help there, and undo the one that a user may have in their own configuration.
    _SINCE_8_7 = ("StdinNull=no", "SessionType=default", "ForkAfterAuthentication=no")
    _newer: tuple[str, ...] = _SINCE_8_7
    # What the user may want otherwise: these stand after their options. 15 s x 3 is the usual
    # keepalive, and ends a silent connection before the lease of 60 s does. One shared master would
    # be one shared fate. At LogLevel=ERROR ssh does not say that a server stopped answering.
    _USUAL = (
        "ConnectTimeout=15 ServerAliveInterval=15 ServerAliveCountMax=3 ClearAllForwardings=yes"
        " ForwardAgent=no ForwardX11=no PermitLocalCommand=no ControlMaster=no ControlPath=none"
        " LogLevel=INFO"
    ).split()

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """
        ssh and its options; `argv` passes through the login shell of the host, whichever that is.
        """
        fields = self.fields
        options = [*self._FIXED, *self._newer, *_flat(fields["options"]), *self._USUAL]
        words = ["ssh", "-T"]
        # -E: ssh's own words would otherwise stand between the program's
        words += ["-E", log] if log is not None else []
        words += [word for option in options for word in ("-o", option)]
        words += ["-p", str(fields["port"])] if fields["port"] is not None else []
        words += ["-l", fields["user"]] if fields["user"] is not None else []
        return [*words, "--", fields["host"], shell_command(argv)]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """To the host."""
        return f"on {self.fields['host']}", self.fields["user"] or "whom ssh makes us"

    def is_too_new(self, words: str) -> bool:
        """By the name of one of the options that are left out then."""
        names = (option.partition("=")[0].lower() for option in self._newer)
        return any(f"Bad configuration option: {name}" in words for name in names)

    def older(self) -> Ssh:
        """For OpenSSH before 8.7, in whose configuration no such option can be either."""
        hop = Ssh(self.fields)
        hop._newer = ()
        return hop

    def announcing(self, word: str) -> Ssh:
        """By a LocalCommand: ssh runs it once it is let in."""
        said = {"PermitLocalCommand": "yes", "LocalCommand": f"echo {word} >&2"}
        return Ssh({**self.fields, "options": {**said, **self.fields["options"]}})


class Sudo(Kind):
    """Another user of the same host. Never killed: its child would live on."""

    table: Table = {"user": (_name, checks.REQUIRED)}
    refusals = (("auth", ("sudo:",)),)

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """-n: nobody is there to type a password. The log may not be that user's to open."""
        return ["sudo", "-n", "-H", "-u", self.fields["user"], "--", *argv]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """To the user."""
        return where, self.fields["user"]


class Exec(Kind):
    """
    Wherever a prefix such as `unshare -n` leads. Never killed: whether what it started would end
    with it is not known, so its pipe is closed, and it is sent SIGTERM.
    """

    table: Table = {"argv": (checks.strings, checks.REQUIRED)}

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """The prefix as it is."""
        return [*self.fields["argv"], *argv]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Only the prefix knows where, and as whom."""
        name = quoted(self.fields["argv"][0])
        return f"{where}, behind {name}", f"whom {name} makes us"


def _flat(options: Mapping[str, Any]) -> Iterable[str]:
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            text = {True: "yes", False: "no"}[one] if isinstance(one, bool) else one
            yield f"{name}={text}"
