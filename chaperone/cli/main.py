"""
The command line: argv to one call, what it tells to the terminal, what went wrong to a sentence and
an exit code.

Knows: argv, stdin, stdout, stderr, exit codes.  Must not know: how anything is done.
On the lean path of `chaperone run`: so `run` in its plain forms is read by hand, and each verb
imports what it needs.
"""

from __future__ import annotations

import os
import sys

from ..errors import ChaperoneError
from ..model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Plain = tuple[list[str], dict[str, Any]]

# Of each verb that holds runs, or forks what does: options with a value, flags, and what other
# words there are.
LEAN = {
    "run": (("--spool", "--id"), ("--detach", "--warm"), "specs"),
    "adopt": (("--spool",), ("--detach",), "runs"),
    "launcher": (("--spool", "--idle"), ("--detach",), None),
}


class NoSpecError(ChaperoneError):
    """The caller's fault: a spec that can't be read as bytes."""


class OutputError(ChaperoneError):
    """Our stdout takes no more, for another reason than that nobody reads it."""


def main(words: list[str] | None = None) -> int:
    """
    Do what the command line says.

    Args:
        words (list): Without the program's name; None for `sys.argv`.
    Returns:
        int: The exit code. When the reader of our stdout has gone or Ctrl-C comes we die of the
            signal instead, as other tools do.
    """
    _fill_standard_fds()
    # No cleaning up is ever due, so no KeyboardInterrupt either; whoever holds a program sets
    # handlers of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = sys.argv[1:] if words is None else words
    verb = words[0] if words else ""
    try:
        return _lean(verb, words[1:]) if verb in LEAN else _perform(verb, words[1:])
    except Exception as error:  # noqa: BLE001  the last one to answer: whatever it is becomes an exit code
        return _fault(verb, error)


def _fill_standard_fds() -> None:
    """
    Put something on closed fds 0-2: else the next file we open is taken for stdin, stdout or
    stderr.

    The wrong way round, so that whoever reads or writes there is told that it is closed, and
    nothing is taken for written.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.set_inheritable(fd, True)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free number: this one


# -- the lean path: verbs that hold runs


def plain(verb: str, words: list[str]) -> Plain | None:
    """
    What the words behind a lean verb mean, in their plain forms.

    Returns:
        tuple: The SPECs or RUNs; of each option its value, True for a flag. None for whatever
            `parser.parsed` must read: help, errors, abbreviations, `--spool=X`, `--`.
    """
    with_value, flags, others = LEAN[verb]
    named: list[str] = []
    options: dict[str, str | bool] = {}
    rest = iter(words)
    for word in rest:
        if word in with_value:
            value = next(rest, "-")
            if value.startswith("-") or (word == "--idle" and not _is_time(value)):
                return None
            options[word[2:]] = value
        elif word in flags:
            options[word[2:]] = True
        elif word.startswith("-") and word != "-":
            return None
        else:
            named.append(word)
    return (named, options) if (named or others != "specs") and (others or not named) else None


def _is_time(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1e10
    except ValueError:
        return False


def _lean(verb: str, words: list[str]) -> int:
    given = plain(verb, words)
    if given is None:
        from . import parser

        try:
            read = vars(parser.parsed(verb, words))
        except parser.HelpAsked:
            write(1, parser.verb_help(verb).encode())
            return os.EX_OK
        _begin_again(verb, read)
        if read.get("idle") is not None and not _is_time(str(read["idle"])):
            raise parser.UsageError(
                f"unable to understand '--idle': want seconds from 0 to 1e10, got {str(read['idle'])!r}"
            )
        raise parser.UsageError(
            f"unable to understand 'chaperone {verb}': want no word that begins with '-', got {' '.join(words)!r}"
        )
    named, options = given
    return {"run": _run, "adopt": _adopt, "launcher": _launcher}[verb](named, options)


def _begin_again(verb: str, read: dict[str, Any]) -> None:
    """
    Begin again with what was meant, in plain words: what was imported to understand them would stay
    in memory as long as the run does.
    """
    with_value, flags, others = LEAN[verb]
    words = [
        word
        for name in with_value
        if read[name[2:]] is not None
        for word in (name, str(read[name[2:]]))
    ]
    words += [name for name in flags if read[name[2:]]]
    words += read[others] if others else []
    if plain(verb, words) is not None:
        from ..launch.process import PACKAGE

        main = os.path.join(PACKAGE, "__main__.py")
        os.execv(sys.executable, [sys.executable, "-I", "-S", main, verb, *words])


def _run(specs: list[str], options: dict[str, Any]) -> int:
    texts = [(name, read_spec(name)) for name in specs]
    from ..launch import run

    run_id, detach, warm = options.get("id"), bool(options.get("detach")), bool(options.get("warm"))
    return run.run(texts, spool_path(options.get("spool")), run_id, detach, os.getcwd(), warm=warm)


def _adopt(runs: list[str], options: dict[str, Any]) -> int:
    from ..hold import adopt
    from ..launch import run
    from ..spool import format

    path = os.path.abspath(spool_path(options.get("spool")))
    spool_fd = format.open_spool(path)
    try:
        run_ids = [found_id(spool_fd, text) for text in runs] if runs else adopt.unattended(path)
    finally:
        os.close(spool_fd)
    return run.adopt(path, list(dict.fromkeys(run_ids)), bool(options.get("detach")))


def _launcher(_: list[str], options: dict[str, Any]) -> int:
    """
    Lean too: what is imported here is in the memory of every chaperone that is forked from it.
    """
    from ..launch import launcher

    idle = options.get("idle")
    return launcher.serve(
        os.path.abspath(spool_path(options.get("spool"))),
        None if idle is None else float(idle),
        bool(options.get("detach")),
    )


def spool_path(given: str | None) -> str:
    """
    The spool: as given, else as $CHAPERONE_SPOOL says, else ./spool; not where an empty word was
    given, for a variable is unset, and gc deletes.
    """
    if given == "":
        from . import parser

        raise parser.UsageError("unable to understand '--spool': want a directory, got ''")
    return given or os.environ.get("CHAPERONE_SPOOL") or "spool"


def read_spec(name: str) -> bytes:
    """
    The bytes of a spec.

    Args:
        name (str): A file; `-` is stdin.
    Raises:
        NoSpecError: If it can't be read.
    """
    pieces = []
    try:
        fd = 0 if name == "-" else os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            while piece := os.read(fd, 1 << 20):
                pieces.append(piece)
        finally:
            if fd:
                os.close(fd)
    except OSError as error:
        raise NoSpecError(f"unable to read spec {name!r}: {error.strerror}") from error
    return b"".join(pieces)


def found_id(spool_fd: int, text: str) -> str:
    """The run that a word means: an exact id beats a prefix, a prefix must fit one run alone."""
    import errno

    from ..errors import NoRunError
    from ..model import spec as specs
    from ..spool import format

    if specs.is_run_id(text):
        try:
            os.close(format.open_run(spool_fd, text))
            return text
        except NoRunError:
            found = [run_id for run_id in format.all_ids(spool_fd) if run_id.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise NoRunError(
                f"unable to find run {text!r}: {len(found)} runs begin so: {some}", errno.ENOTUNIQ
            )
    raise NoRunError(f"unable to find run {text!r}: no run of this spool begins so", errno.ENOENT)


# -- every other verb


def _perform(verb: str, words: list[str]) -> int:
    """Write what a verb yields; return what it returns."""
    if verb == "--version":
        from .. import __version__

        write(1, f"chaperone {__version__}\n".encode())
        return os.EX_OK
    if verb in ("-h", "--help"):
        from . import arguments

        write(1, arguments.help_text().encode())
        return os.EX_OK
    from . import parser
    from .verbs import look as look_verbs

    try:
        given = parser.parsed(verb, words)
    except parser.HelpAsked:
        write(1, parser.verb_help(verb).encode())
        return os.EX_OK
    steps = look_verbs.CALLS[verb](given)
    while True:
        try:
            fd, data = next(steps)
        except StopIteration as end:
            return int(end.value)
        write(fd, data)


def add_site_packages() -> None:
    """
    What a start without site (`-S`) left out, for verbs that can't do without attrs, filelock or
    inotify_simple.
    """
    if sys.flags.no_site:
        import site

        site.main()
    import warnings

    warnings.showwarning = _warned


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """A warning is for people: the sentence, without the place in the code that says it."""
    from . import terminal

    write(2, f"chaperone: {terminal.escaped(str(message))}\n".encode())


# -- what comes out


def write(fd: int, data: bytes) -> None:
    """
    Write all of it to stdout or stderr.

    Raises:
        OutputError: If stdout can't take it; what stderr can't take is lost.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except (
            BlockingIOError
        ):  # somebody made the terminal or pipe that we share with them non-blocking
            _wait_for_room(fd)
        except OSError as error:
            if fd == 2:
                return
            if isinstance(error, BrokenPipeError):
                _die_of(signal.SIGPIPE)
            raise OutputError(f"unable to write to stdout: {error.strerror}") from error


def _wait_for_room(fd: int) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _die_of(number: int) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # not reached


def _fault(verb: str, error: Exception) -> int:
    """Tell what went wrong in a sentence; return the exit code that says whose fault it is."""
    try:
        from . import terminal

        code = _exit_code(verb, error)
    except OSError:  # no descriptor is left to read a module by
        write(
            2,
            b"chaperone: "
            + bytes(byte if 32 <= byte < 127 else 63 for byte in str(error).encode())
            + b"\n",
        )
        return os.EX_OSERR
    if code == os.EX_SOFTWARE:
        import traceback

        for line in "".join(
            traceback.format_exception(type(error), error, error.__traceback__)
        ).splitlines():
            write(2, f"{terminal.escaped(line)}\n".encode())
        sentence = f"unable to go on: {type(error).__name__}: {error} (this is a bug)"
    elif isinstance(error, ChaperoneError):
        sentence = str(error)
    else:
        sentence = f"unable to go on: {error}"
    write(2, f"chaperone: {terminal.escaped(sentence)}\n".encode())
    return code


def _exit_code(verb: str, error: Exception) -> int:
    from .. import errors
    from . import parser

    faults = (
        (parser.UsageError, os.EX_USAGE),
        (errors.SpecError, os.EX_DATAERR),
        ((NoSpecError, errors.NoRunError), os.EX_NOINPUT),
        (errors.RunExistsError, os.EX_CANTCREAT),
        (errors.SpoolError, os.EX_CANTCREAT if verb in ("run", "adopt") else os.EX_IOERR),
        (OutputError, os.EX_IOERR),
        ((errors.StartError, OSError), os.EX_OSERR),
    )
    return next((code for kinds, code in faults if isinstance(error, kinds)), os.EX_SOFTWARE)
