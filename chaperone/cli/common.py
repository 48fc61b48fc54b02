"""
What the verbs share: how a verb is declared, the spool, run ids, the bytes of a spec.

Knows: the shape of a command line.  Must not know: any one verb, or how its words are read.
On the lean path of `chaperone run`, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import sys

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


class NoSpecError(ChaperoneError):
    """The caller's fault: a spec that can't be read as bytes."""


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


class Verb:
    """
    A verb, declared by `@verb` above the function that does it.

    Attributes:
        name (str): As it is typed.
        call: The function: (given, terminal) to the exit code.
        summary (str): One line for `chaperone --help`.
        arguments (tuple): In the order of `chaperone VERB --help`.
    """

    def __init__(self, call: Call, summary: str, arguments: tuple[Argument, ...]) -> None:
        self.name = call.__name__.rstrip("_")
        self.call = call
        self.summary = summary
        self.arguments = arguments


def verb(summary: str, *arguments: Argument) -> Callable[[Call], Verb]:
    """Make a verb of the function below, which is called as the verb is (`exec_` is `exec`)."""
    return lambda call: Verb(call, summary, arguments)


def verbs_in(family: types.ModuleType) -> dict[str, Verb]:
    """The verbs that a module of `verbs/` declares, by name, in the order of its text."""
    return {found.name: found for found in vars(family).values() if isinstance(found, Verb)}


SPOOL = Argument(
    "--spool", metavar="DIR", help="the spool; default: $CHAPERONE_SPOOL, then ./spool"
)
SPEC = Argument("spec", metavar="SPEC", help="a file with a spec as JSON; - is stdin")
A_RUN = "a run id, or a prefix that fits no other run"
RUNS = "run ids, or prefixes that fit no other run"


# -- the spool and its runs


def spool_path(given: Given) -> str:
    """The spool that is meant: `--spool`, else $CHAPERONE_SPOOL, else ./spool."""
    if given.spool == "":
        # Usually an unset variable of the shell; gc would then delete from ./spool.
        raise UsageError("unable to understand '--spool': want a directory, got ''")
    return given.spool or os.environ.get("CHAPERONE_SPOOL") or "spool"


def found_id(spool_fd: int, text: str) -> str:
    """
    The run that a word means: an exact id beats a prefix, a prefix must fit one run alone.

    Raises:
        NoRunError: If there is none, or the prefix is ambiguous.
    """
    import errno

    from ..errors import NoRunError
    from ..model import spec as specs
    from ..spool import format

    found: list[str] = []
    if specs.is_run_id(text):
        try:
            os.close(format.open_run(spool_fd, text))
            return text
        except NoRunError:
            found = [run_id for run_id in format.all_ids(spool_fd) if run_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoRunError(
            f"unable to find run {text!r}: no run of this spool begins so", errno.ENOENT
        )
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise NoRunError(
        f"unable to find run {text!r}: {len(found)} runs begin so: {some}", errno.ENOTUNIQ
    )


def found_ids(given: Given, texts: list[str]) -> list[str]:
    """The runs of the spool that words mean, each once."""
    from ..program.fds import owned
    from ..spool import format

    with owned(format.open_spool(spool_path(given))) as spool_fd:
        return list(dict.fromkeys(found_id(spool_fd, text) for text in texts))


def user_name() -> str:
    """Ours."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's uid without a name
        return str(os.geteuid())


# -- specs


def read_spec(name: str) -> bytes:
    """
    The bytes of a spec.

    Args:
        name (str): A file; `-` is stdin.
    Raises:
        NoSpecError: If it can't be read.
        SpecError: If it is larger than any spec may be.
    """
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
                    raise SpecError(f"unable to read spec {name!r}: want {WITHIN_LIMIT}, got more")
        finally:
            if fd:
                os.close(fd)
    except OSError as error:
        raise NoSpecError(f"unable to read spec {name!r}: {error.strerror}") from error
    return b"".join(pieces)


# -- what a lean start left out


def add_site_packages(terminal: Terminal) -> None:
    """
    Find attrs, filelock and inotify_simple after a start without site (`-S`), and print warnings
    as one sentence without a place in the code.
    """
    if sys.flags.no_site:
        import site

        site.main()
    import warnings

    def show(message: Warning | str, *_: object, **__: object) -> None:
        terminal.note(str(message))

    warnings.showwarning = show
