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
# Characters that a ProxyCommand's shell would read; OpenSSH 9.6 refuses the same ones
# (CVE-2023-51385).
_UNSAFE = frozenset("'`\"$;&<>|(){}\\")
# Characters that '...' can't contain in every shell, as they come between two '...'.
_APART = {ord("'"): "'\"'\"'", ord("\\"): "'\\\\'", ord("!"): "'\\!'"}


def quoted(word: str) -> str:
    """
    One word, quoted so that sh, fish and csh all read the same word.

    Args:
        word (str): Any text without NUL.
    Returns:
        str: Quoted only if it needs it. In '...' fish replaces a backslash and csh a `!`, so both
            come outside of it, escaped. A `'` becomes `"'"`, so that quoting a second time adds no
            backslash. Only csh can't take a newline.
    """
    if word and not frozenset(word) - _BARE:
        return word
    return f"'{word.translate(_APART)}'".replace("''", "") or "''"


def shell_command(argv: Sequence[str]) -> str:
    """The shell command that runs `argv` in the shell's place: `exec` and the quoted words."""
    return " ".join(["exec", *(quoted(word) for word in argv)])


# -- checks of fields that several kinds have


def name(value: Any, path: str) -> str:
    """
    A host or a user; not a word that ssh, sudo or a ProxyCommand's shell could misread.
    """
    if not isinstance(value, str) or not value or value.startswith("-"):
        checks.fail(path, "a non-empty name that does not begin with '-'", value)
    if any(char <= " " or char == "\x7f" or char.isspace() or char in _UNSAFE for char in value):
        checks.fail(path, "a name without white space, quotes or shell characters", value)
    if any("\ud800" <= char <= "\udfff" for char in value):
        checks.fail(path, "a name that is valid UTF-8", value)
    return value


def _host(value: Any, path: str) -> str:
    if "@" in name(value, path):
        checks.fail(path, "a host's name without '@'", value)
    return str(value)


def _port(value: Any, path: str) -> int:
    if type(value) is not int or not 1 <= value <= 65535:
        checks.fail(path, "a port from 1 to 65535", value)
    return int(value)


def _options(value: Any, path: str) -> dict[str, Any]:
    """
    Options of ssh_config(5). A value is a text, a number or a bool; an option that ssh_config may
    repeat can have a list of them.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        checks.fail(path, "an object of ssh options", value)
    for name, given in value.items():
        if not name.isascii() or not name.isalnum():
            checks.fail(path, "option names of letters and digits, as in ssh_config", name)
        for one in given if isinstance(given, list) else [given]:
            if not isinstance(one, (str, int, float)) or any(char in "\0\r\n" for char in str(one)):
                checks.fail(f"{path}.{name}", "one line of text, a number, true or false", given)
            checks.bytes_or_text(str(one), f"{path}.{name}")
    return dict(value)


# -- the kinds


class Kind:
    """
    A kind of hop. The values here are the safest ones; a kind replaces those that it can.

    Args:
        fields (dict): The fields of one hop, checked.

    Attributes:
        table (dict): Its fields, as for `checks.Fields`.
        may_be_killed (bool): Whether SIGKILL of its process also ends what it started.
        dies_with_client (str): Why a program behind it can't outlive it; "" where it can.
        own_codes (tuple): Exit codes that mean that it failed, not what it started.
        early_codes (tuple): Further exit codes that mean so before it is through.
        refusals (tuple): (stage, texts): its messages after which another attempt can't help.
        passing (tuple): Its messages after which another attempt may help anyway.
        queueing, queued (tuple): Its messages when an engine makes it wait, and when that ends.
        farewell (tuple): The text before and after the host in the line that it writes to stderr
            when its connection is lost; None if it writes none.
        full (str): Its message where a shared connection takes no more sessions.
        slot_fields (tuple): Hops with the same values in these fields share a limit of connection
            attempts; () for no limit.
    """

    table: Table
    may_be_killed = False
    dies_with_client = ""
    own_codes: tuple[int, ...] = ()
    early_codes: tuple[int, ...] = ()
    refusals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    passing: tuple[str, ...] = ()
    queueing: tuple[str, ...] = ()
    queued: tuple[str, ...] = ()
    farewell: tuple[bytes, bytes] | None = None
    full = ""
    slot_fields: tuple[str, ...] = ()

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    @classmethod
    def checked(cls, value: Any, path: str) -> dict[str, Any]:
        """
        All fields of one hop of a spec, each checked or with its default.

        Raises:
            SpecError: `PATH: want WANT, got GOT`.
        """
        fields: dict[str, Any] = checks.Fields(cls.table)(value, path)
        return fields

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """The argv that runs `argv` behind this hop; `log` is a file for its messages, or None."""
        raise NotImplementedError

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Where this hop leads and to which user, as text; the arguments say where it starts."""
        raise NotImplementedError

    def is_too_new(self, words: str) -> bool:
        """Whether these words of its client mean that it is too old for its options."""
        return False

    def older(self) -> Kind:
        """The same hop, without the options that old clients do not know."""
        return self

    def share_key(self) -> str:
        """Runs with the same key may share a connection; "" where none can be shared."""
        return ""

    def master(self, path: str, log: str) -> list[str]:
        """The argv that starts a connection for many runs, with this socket and this log."""
        raise NotImplementedError

    def shared(self, path: str) -> Kind:
        """The same hop through a connection that is there; it fails where that is not."""
        raise NotImplementedError

    def announcing(self, word: str) -> Kind | None:
        """The same hop, which writes `word` to stderr once it is connected; None if it can't."""
        return None


class Ssh(Kind):
    """A hop to another host, with the client of OpenSSH."""

    table: Table = {
        "host": (_host, checks.REQUIRED),
        "user": (checks.OrNull(name), None),
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
    full = "Session open refused by peer"
    slot_fields = ("host", "port")  # the server, whose MaxStartups is the limit

    # The text that is sent needs these. They come before the user's options, because ssh takes the
    # first value of an option.
    _FIXED = ("BatchMode=yes", "RequestTTY=no", "EscapeChar=none", "RemoteCommand=none")
    # It needs these too, but OpenSSH before 8.7 does not know them, and fails at the first one.
    # IgnoreUnknown would help, but would replace an IgnoreUnknown of the user's configuration.
    _SINCE_8_7 = ("StdinNull=no", "SessionType=default", "ForkAfterAuthentication=no")
    _newer: tuple[str, ...] = _SINCE_8_7
    _through: tuple[str, ...] = ()  # how it shares a connection
    # The user may want other values, so these come after the user's options. A keepalive of 3 x
    # 15 s is usual, and ends a silent connection before the lease of 60 s does. With a shared
    # master, all connections would fail together. At LogLevel=ERROR ssh does not report that a
    # server stopped answering.
    _USUAL = (
        "ConnectTimeout=15 ServerAliveInterval=15 ServerAliveCountMax=3 ClearAllForwardings=yes"
        " ForwardAgent=no ForwardX11=no PermitLocalCommand=no ControlMaster=no ControlPath=none"
        " LogLevel=INFO"
    ).split()

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """
        ssh and its options; the login shell of the host, whichever it is, runs `argv`.
        """
        return [*self._words(log), "--", self.fields["host"], shell_command(argv)]

    def _words(self, log: str | None) -> list[str]:
        fields = self.fields
        options = [
            *self._FIXED,
            *self._newer,
            *self._through,
            *_flat(fields["options"]),
            *self._USUAL,
        ]
        words = ["ssh", "-T"]
        # -E: ssh's messages would otherwise mix with the program's stderr
        words += ["-E", log] if log is not None else []
        words += [word for option in options for word in ("-o", option)]
        words += ["-p", str(fields["port"])] if fields["port"] is not None else []
        words += ["-l", fields["user"]] if fields["user"] is not None else []
        return words

    def share_key(self) -> str:
        """Host, user, port and options; agent forwarding is one of these."""
        if {"controlmaster", "controlpath"} & {name.lower() for name in self.fields["options"]}:
            return ""
        return "\0".join([*self._words(None), self.fields["host"]])

    def master(self, path: str, log: str) -> list[str]:
        """ssh in the background, without a session of its own; it ends a minute after the last."""
        own = ("ControlMaster=yes", f"ControlPath={_literal(path)}")
        hop = Ssh(self.fields)
        hop._newer, hop._through = (), own
        return [*hop._words(log), "-o", "ControlPersist=60", "-N", "-f", "--", self.fields["host"]]

    def shared(self, path: str) -> Ssh:
        """Without the connection of its own that ssh would make where the master refuses it."""
        hop = Ssh(self.fields)
        hop._newer = self._newer
        hop._through = (f"ControlPath={_literal(path)}", "ProxyCommand=false")
        return hop

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """To the host."""
        return f"on {self.fields['host']}", self.fields["user"] or "whom ssh makes us"

    def is_too_new(self, words: str) -> bool:
        """They name one of the options that `older` leaves out."""
        names = (option.partition("=")[0].lower() for option in self._newer)
        return any(f"Bad configuration option: {name}" in words for name in names)

    def older(self) -> Ssh:
        """For OpenSSH before 8.7, whose configuration files can't have these options either."""
        hop = Ssh(self.fields)
        hop._newer = ()
        return hop

    def announcing(self, word: str) -> Ssh:
        """With a LocalCommand: ssh runs it once it is logged in."""
        said = {"PermitLocalCommand": "yes", "LocalCommand": f"echo {word} >&2"}
        return Ssh({**self.fields, "options": {**said, **self.fields["options"]}})


class Sudo(Kind):
    """A hop to another user of the same host. It is never killed: its child would live on."""

    table: Table = {"user": (name, checks.REQUIRED)}
    refusals = (("auth", ("sudo:",)),)

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """-n, because no user can type a password. Perhaps that user can't open the log."""
        return ["sudo", "-n", "-H", "-u", self.fields["user"], "--", *argv]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """To the user."""
        return where, self.fields["user"]


class Exec(Kind):
    """
    A hop made by a prefix such as `unshare -n`. It is never killed, because it is not known whether
    the program would end with it: its pipe is closed, and it gets SIGTERM.
    """

    table: Table = {"argv": (checks.argv, checks.REQUIRED)}

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """The prefix as it is."""
        return [*self.fields["argv"], *argv]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Only the prefix knows the place and the user."""
        name = quoted(self.fields["argv"][0])
        return f"{where}, behind {name}", f"whom {name} makes us"


def _literal(path: str) -> str:
    """A path as ControlPath takes it."""
    return path.replace("%", "%%")


def _flat(options: Mapping[str, Any]) -> Iterable[str]:
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            text = {True: "yes", False: "no"}[one] if isinstance(one, bool) else one
            yield f"{name}={text}"
