"""
How a verb of the command line is declared, and the arguments that several verbs share.

Knows: the form of a command line.  Must not know: a particular verb, or how its words are parsed.
`chaperone run` imports it, so it imports nothing heavy and contains only what `run` needs.
"""

from __future__ import annotations

import sys

from ..cpython import environ, os
from ..errors import ChaperoneError, SpecError
from ..model.jsontext import LIMIT, WITHIN_LIMIT

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types
    from collections.abc import Callable
    from typing import Any

    from .terminal import Terminal

    Given = Any  # the values of a verb's arguments, each by its `dest`
    Call = Callable[[Given, Terminal], int]


class UsageError(ChaperoneError, ValueError):
    """The caller made a mistake: an invalid command line."""


class NoInputError(ChaperoneError):
    """The caller's fault: what a verb is to read, a spec or a timeline, is not there."""


# -- declaring a verb


class Argument:
    """
    An option of a verb, or a positional argument.

    Args:
        names (str): `-n`, `--lines` for an option; `runs` for a positional argument.
        how: `help`, `metavar`, `nargs`, `action`, `default`, `type` as argparse takes them. The
            metavar also says what a shell completes: SPEC and FILE mean a file, DIR a directory,
            RUN and LIVE run ids, STREAM, SIG and SHELL one of a few words.
    Attributes:
        dest (str): The attribute of `given` that has the value.
    """

    def __init__(self, *names: str, **how: Any) -> None:
        self.names = names
        self.how = how
        self.dest = names[-1].lstrip("-").replace("-", "_")
        self.is_option = names[0].startswith("-")
        self.is_flag = how.get("action") == "store_true"
        self.is_repeated = how.get("action") == "append"


class Verb:
    """
    A verb, declared by `@verb` above its function.

    Attributes:
        name (str): As it is typed.
        call: The function: (given, terminal) to the exit code.
        summary (str): One line for `chaperone --help`.
        arguments (tuple): In the order of `chaperone VERB --help`.
        takes_command (bool): Whether a command may follow after `--`. `given.command` is its spec,
            JSON as bytes; None if there is no `--`.
    """

    def __init__(self, call: Call, summary: str, arguments: tuple[Argument, ...]) -> None:
        self.name = call.__name__.rstrip("_")
        self.call = call
        self.summary = summary
        self.arguments = arguments
        self.takes_command = COMMAND[0] in arguments


def verb(summary: str, *arguments: Argument) -> Callable[[Call], Verb]:
    """Make a verb of the function below; the verb has the function's name (`exec_` is `exec`)."""
    return lambda call: Verb(call, summary, arguments)


def verbs_in(family: types.ModuleType) -> dict[str, Verb]:
    """The verbs that a module of `verbs/` declares, by name, in the order of their declaration."""
    return {found.name: found for found in vars(family).values() if isinstance(found, Verb)}


SPOOL = Argument(
    "--spool", metavar="DIR", help="the spool; default: $CHAPERONE_SPOOL, then ./spool"
)
SPECS = Argument("specs", metavar="SPEC", nargs="*", help="a file with a spec as JSON; - is stdin")
# The options of a command after `--`; each sets a field of its spec.
COMMAND = (
    Argument("--host", metavar="[USER@]HOST[:PORT]", help="run the command on that host, over ssh"),
    Argument("--env", metavar="NAME=VALUE", action="append", help="set a variable; repeatable"),
    Argument("--env-file", metavar="FILE", action="append", help="set variables, one a line"),
    Argument("--cwd", metavar="DIR", help="the working directory of the command"),
    Argument("--label", metavar="NAME=VALUE", action="append", help="set a label; repeatable"),
    Argument("--stdin", metavar="FILE", help="its stdin, a file on this host; default: empty"),
    Argument("--survive", action="store_true", help="let the command outlive its chaperone"),
    Argument("--timeout", metavar="AGE", help="stop it after this time: 90s, 30m, 12h, 7d"),
)
A_RUN = "a run id, or a prefix of one run id only"
RUNS = "run ids, or prefixes of one run id each"


# -- the values of arguments


def spool_path(given: Given) -> str:
    """
    The path of the spool, for a verb that works on a directory of this host.

    Raises:
        UsageError: If the spool is an agent's.
    """
    named = spool_named(given)
    if is_agents(named):
        why = "this verb works on a directory of this host"
        raise UsageError(f"unable to open spool {named!r}: {why}")
    return named


def is_agents(named: str) -> bool:
    """Whether the spool is an agent's."""
    if ":" not in named:  # a start of a run has no time to import what comes next
        return False
    from ..agent.client.place import is_place

    return is_place(named)


def spool_named(given: Given) -> str:
    """The spool: `--spool`, or $CHAPERONE_SPOOL, or ./spool."""
    if given.spool == "":
        # It usually comes from an unset shell variable; gc would then delete from ./spool.
        raise UsageError("unable to understand '--spool': want a directory, got ''")
    encoding = sys.getfilesystemencoding()
    named = environ.get(b"CHAPERONE_SPOOL", b"").decode(encoding, "surrogateescape")
    return given.spool or named or "spool"


def specs_given(verb: str, given: Given, at_most: int | None = None) -> list[tuple[str, bytes]]:
    """
    The specs that a verb got: those of its SPEC files, or that of the command after `--`.

    Args:
        at_most (int): How many SPEC files the verb takes; None for any number.
    Returns:
        list: (name for messages, JSON).
    Raises:
        UsageError: If there are neither files nor a command, or both.
        NoInputError: If a file can't be read.
    """
    files = given.specs
    takes = f"it takes {'SPEC files' if at_most is None else 'one SPEC file'}, or -- and a command"
    used = [option.names[0] for option in COMMAND if getattr(given, option.dest)]
    wrong = None
    if given.command is not None:
        wrong = f"{takes}, not both" if files else None
    elif not files or len(files) > (at_most or len(files)):
        wrong = takes
    elif used:
        wrong = f"{used[0]} is for a command after --; a spec has a field for it"
    if wrong:
        raise UsageError(f"unable to understand 'chaperone {verb}': {wrong}")
    if given.command is not None:
        return [("command line", given.command)]
    return [(name, read_spec(name)) for name in files]


def read_spec(name: str) -> bytes:
    """
    The bytes of a spec.

    Args:
        name (str): A file; `-` is stdin.
    Raises:
        NoInputError: If it can't be read.
        SpecError: If it is larger than any spec may be.
    """
    try:
        return read_file("spec", name)
    except NoInputError as error:
        raise NoInputError(f"{error}{dashes_missing([name])}") from error


def dashes_missing(others: list[str]) -> str:
    """
    `; put -- before a command` where the first word that is no option is a program, not a SPEC;
    otherwise an empty text.
    """
    import shutil

    return "; put -- before a command" if others and shutil.which(others[0]) else ""


def read_file(what: str, name: str) -> bytes:
    """The bytes of a file, as `read_spec`; `what` names the kind of file in messages."""
    pieces = []
    size = 0
    try:
        fd = 0 if name == "-" else os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            while piece := os.read(fd, 1 << 20):
                pieces.append(piece)
                size += len(piece)
                # A device such as /dev/zero has no end, and would take all memory.
                if size > LIMIT:
                    raise SpecError(
                        f"unable to read {what} {name!r}: want {WITHIN_LIMIT}, got more"
                    )
        finally:
            if fd:
                os.close(fd)
    except OSError as error:
        raise NoInputError(f"unable to read {what} {name!r}: {error.strerror}") from error
    return b"".join(pieces)
