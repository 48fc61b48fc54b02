"""
What a verb of the command line is, and the words that most of them share: a spool, specs, runs.

Knows: the shape of a command line.  Must not know: any one verb, or how its words are read.
On the lean path of `chaperone run`, so it imports nothing heavy, and has no more than that needs.
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
    """The caller's fault: a command line that no verb takes."""


class NoInputError(ChaperoneError):
    """The caller's fault: what a verb is to read, a spec or a timeline, is not there."""


# -- declaring a verb


class Argument:
    """
    An option of a verb, or a word that stands by itself.

    Args:
        names (str): `-n`, `--lines` of an option; `runs` of words that stand by themselves.
        how: `help`, `metavar`, `nargs`, `action`, `default`, `type` as argparse takes them. The
            metavars say what a shell completes: SPEC and FILE a file, DIR a directory, RUN and LIVE
            run ids, STREAM, SIG and SHELL one of a few words.
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
    A verb, declared by `@verb` above the function that does it.

    Attributes:
        name (str): As it is typed.
        call: The function: (given, terminal) to the exit code.
        summary (str): One line for `chaperone --help`.
        arguments (tuple): In the order of `chaperone VERB --help`.
        takes_command (bool): Whether a command may stand after `--`. `given.command` is the spec
            that it stands for, JSON as bytes; None where there is no `--`.
    """

    def __init__(self, call: Call, summary: str, arguments: tuple[Argument, ...]) -> None:
        self.name = call.__name__.rstrip("_")
        self.call = call
        self.summary = summary
        self.arguments = arguments
        self.takes_command = COMMAND[0] in arguments


def verb(summary: str, *arguments: Argument) -> Callable[[Call], Verb]:
    """Make a verb of the function below, which is called as the verb is (`exec_` is `exec`)."""
    return lambda call: Verb(call, summary, arguments)


def verbs_in(family: types.ModuleType) -> dict[str, Verb]:
    """The verbs that a module of `verbs/` declares, by name, in the order of its text."""
    return {found.name: found for found in vars(family).values() if isinstance(found, Verb)}


SPOOL = Argument(
    "--spool", metavar="DIR", help="the spool; default: $CHAPERONE_SPOOL, then ./spool"
)
SPECS = Argument("specs", metavar="SPEC", nargs="*", help="a file with a spec as JSON; - is stdin")
# What a command after `--` is given, in the place of a spec's fields.
COMMAND = (
    Argument("--host", metavar="[USER@]HOST[:PORT]", help="run it there, over ssh"),
    Argument("--env", metavar="NAME=VALUE", action="append", help="a variable; may come again"),
    Argument("--env-file", metavar="FILE", action="append", help="variables, a line each"),
    Argument("--cwd", metavar="DIR", help="its working directory"),
    Argument("--label", metavar="NAME=VALUE", action="append", help="a label; may come again"),
    Argument("--stdin", metavar="FILE", help="a file here for its stdin; default: empty"),
    Argument("--survive", action="store_true", help="it may outlive its chaperone"),
    Argument("--timeout", metavar="AGE", help="stop it then: 90s, 30m, 12h, 7d"),
)
A_RUN = "a run id, or a prefix that fits no other run"
RUNS = "run ids, or prefixes that fit no other run"


# -- what is given


def spool_path(given: Given) -> str:
    """The spool that is meant: `--spool`, else $CHAPERONE_SPOOL, else ./spool."""
    if given.spool == "":
        # Usually an unset variable of the shell; gc would then delete from ./spool.
        raise UsageError("unable to understand '--spool': want a directory, got ''")
    encoding = sys.getfilesystemencoding()
    named = environ.get(b"CHAPERONE_SPOOL", b"").decode(encoding, "surrogateescape")
    return given.spool or named or "spool"


def specs_given(verb: str, given: Given, at_most: int | None = None) -> list[tuple[str, bytes]]:
    """
    The specs that the words of a verb stand for: of its SPEC files, or of a command after `--`.

    Args:
        at_most (int): How many SPEC files the verb takes; None for any number.
    Returns:
        list: (name for messages, JSON).
    Raises:
        UsageError: If it is neither, or both.
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
        import shutil

        command = "/" not in name and shutil.which(name)
        raise NoInputError(
            f"{error}; put -- before a command" if command else str(error)
        ) from error


def read_file(what: str, name: str) -> bytes:
    """The bytes of a file, `what` for messages; as `read_spec`."""
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
