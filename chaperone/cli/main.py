"""
The command line: it calls the verb that argv names, and makes a sentence and an exit code of an
error.

Knows: argv, exit codes.  Must not know: what a verb does, or how it prints.
The words of verbs that hold programs are parsed here, without argparse, which takes as long as the
start of an interpreter and would stay in memory as long as the run.
"""

from __future__ import annotations

import gc
import sys

from .. import errors
from ..cpython import os, signal
from ..program.fds import NULL
from .verb import NoInputError, UsageError, verbs_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from .terminal import Terminal
    from .verb import Argument, Given, Verb

LEAN = ("run", "exec", "adopt", "launcher")  # verbs/hold.py: they must start quickly


def main(words: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        words (list): Without the program's name; None for `sys.argv`.
    Returns:
        int: The exit code. If the reader of our stdout is gone, or at Ctrl-C, the process dies of
            the signal instead, as other tools do.
    """
    _fill_standard_fds()
    # Nothing needs cleaning up, so KeyboardInterrupt is not needed; a verb that holds a program
    # sets its own handlers.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = sys.argv[1:] if words is None else words
    name = words[0] if words else ""
    try:
        return _perform(name, words[1:])
    except Exception as error:  # noqa: BLE001  each error becomes an exit code here
        return _fault(name, error)


def _fill_standard_fds() -> None:
    """
    Open something on closed fds 0-2; otherwise the next file that we open would be used as stdin,
    stdout or stderr.

    stdin is opened for writing and the others for reading, so that using them fails, and nothing
    seems to be written.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.set_inheritable(fd, True)
        except OSError:
            os.set_inheritable(os.open(NULL, flags), True)  # the lowest free number: this one


def _perform(name: str, words: list[str]) -> int:
    terminal: Terminal = _LaterTerminal()  # type: ignore[assignment]
    if name in LEAN:
        from .verbs import hold

        verb = verbs_in(hold)[name]
        given = parsed(verb, words)
        if given is not None:
            return verb.call(given, terminal)
    gc.enable()
    from . import arguments

    if name == "--version":
        from .. import __version__

        terminal.line(f"chaperone {__version__}")
    elif name in ("-h", "--help"):
        terminal.text(arguments.help_text())
    else:
        verb = arguments.verb_named(name)
        try:
            given = arguments.parsed(verb, words)
        except arguments.HelpAsked:
            terminal.text(arguments.verb_help(verb))
        else:
            return verb.call(given, terminal)
    return os.EX_OK


class _LaterTerminal:
    """A `Terminal` that is made when it is first used: `run` prints nothing by it."""

    def __getattr__(self, name: str) -> object:
        from .terminal import Terminal

        made = Terminal()
        vars(self).update({each: getattr(made, each) for each in dir(made) if each[0] != "_"})
        return getattr(made, name)


# -- the words of a lean verb


class _Given:
    """The values of a verb's arguments, as attributes."""

    command: bytes | None


def parsed(verb: Verb, words: list[str]) -> Given | None:
    """
    Parse the words after a verb that holds programs. Options can't be shortened, and may come
    before or after the other words; after `--` no word is an option.

    Returns:
        object: An attribute for each argument, by its `dest`; None if --help was given.
    Raises:
        UsageError: One sentence.
    """
    given = _Given()
    command = None
    options = {
        name: option for option in verb.arguments if option.is_option for name in option.names
    }
    for argument in verb.arguments:
        setattr(given, argument.dest, False if argument.is_flag else argument.how.get("default"))
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--" and verb.takes_command:
            command = list(rest)
        elif word == "--":
            others += rest
        elif word == "-" or not word.startswith("-"):
            others.append(word)
        elif word in ("-h", "--help"):
            return None
        elif name not in options:
            raise _misunderstood(verb, f"it has no option {name!r}", name, options, others)
        elif options[name].is_flag and equals:
            raise _misunderstood(verb, f"argument {name}: takes no value, got {value!r}")
        else:
            _set(given, verb, options[name], value if equals else None, rest)
    _set_others(given, verb, others)
    if verb.takes_command:
        given.command = None
    if command is not None:
        from .command import spec_text

        given.command = spec_text(verb.name, given, command)
    return given


def _set(given: Given, verb: Verb, argument: Argument, value: Any, rest: Iterator[str]) -> None:
    if argument.is_flag:
        setattr(given, argument.dest, True)
        return
    if value is None:
        value = next(rest, None)
        if value is None or (value.startswith("-") and value != "-"):
            raise _misunderstood(verb, f"argument {argument.names[-1]}: expected one argument")
    if argument.is_repeated:
        value = [*(getattr(given, argument.dest) or ()), value]
    setattr(given, argument.dest, value)


def _set_others(given: Given, verb: Verb, others: list[str]) -> None:
    """Set the positional arguments; these verbs take any number of them, or none."""
    taker = next((argument for argument in verb.arguments if not argument.is_option), None)
    if taker is not None:
        setattr(given, taker.dest, others)
    elif others:
        raise _misunderstood(verb, f"unrecognized arguments: {' '.join(others)}")


def _misunderstood(
    verb: Verb, reason: str, word: str = "", names: Iterable[str] = (), others: Iterable[str] = ()
) -> UsageError:
    from . import arguments

    near = arguments.near_option(verb, word, names, others)
    return UsageError(f"unable to understand 'chaperone {verb.name}': {reason}{near}")


# -- what went wrong


def _fault(name: str, error: Exception) -> int:
    """Print a sentence about an error; return its exit code, which says who must act."""
    try:
        from .terminal import Terminal, escaped

        terminal = Terminal()
        code = _exit_code(name, error)
    except OSError:  # out of fds: no module can be read
        text = bytes(byte if 32 <= byte < 127 else 63 for byte in str(error).encode())
        os.write(2, b"chaperone: " + text + b"\n")
        return os.EX_OSERR
    if code == os.EX_SOFTWARE:
        import traceback

        lines = traceback.format_exception(type(error), error, error.__traceback__)
        for line in "".join(lines).splitlines():
            terminal.data(f"{escaped(line)}\n".encode(), 2)
        terminal.note(f"unable to go on: {type(error).__name__}: {error} (this is a bug)")
    elif isinstance(error, errors.ChaperoneError):
        terminal.note(str(error))
    else:
        terminal.note(f"unable to go on: {_reason(error)}")
    return code


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is None:
        # getcwd(2) names no file.
        is_gone = isinstance(error, FileNotFoundError) and os.stat(".").st_nlink == 0
        return "the working directory was deleted" if is_gone else error.strerror
    return f"{error.filename!r}: {error.strerror}"


def _exit_code(name: str, error: Exception) -> int:
    from .terminal import OutputError

    faults = (
        (UsageError, os.EX_USAGE),
        (errors.SpecError, os.EX_DATAERR),
        ((NoInputError, errors.NoRunError), os.EX_NOINPUT),
        (errors.RunExistsError, os.EX_CANTCREAT),
        (errors.BusyError, os.EX_TEMPFAIL),
        (errors.AgentError, os.EX_UNAVAILABLE),
        (errors.SpoolError, os.EX_CANTCREAT if name in ("run", "adopt") else os.EX_IOERR),
        (OutputError, os.EX_IOERR),
        ((errors.StartError, OSError), os.EX_OSERR),
    )
    return next((code for kinds, code in faults if isinstance(error, kinds)), os.EX_SOFTWARE)
