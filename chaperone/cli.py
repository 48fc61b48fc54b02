"""
The command line: argv to one call, what it tells to the terminal, what went wrong to a sentence and an exit code.

Knows: argv, stdin, stdout, stderr, exit codes.  Must not know: how anything is done.
On the lean path of `chaperone run`: so `run` in its plain forms is read by hand, and each verb imports what it needs.
"""

from __future__ import annotations

import _signal
import os
import sys

from .errors import ChaperoneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Plain = tuple[list[str], dict[str, Any]]

LEAN = {"run": (("--spool", "--id"), ("--detach", "--warm")), "launcher": (("--spool", "--idle"), ("--detach",))}  # options with a value, flags


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
        int: The exit code. When the reader of our stdout has gone or Ctrl-C comes we die of the signal instead, as other tools do.
    """
    _fill_standard_fds()
    # No cleaning up is ever due, so no KeyboardInterrupt either; whoever holds a program sets handlers of its own.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    words = sys.argv[1:] if words is None else words
    verb = words[0] if words else ""
    try:
        return _lean(verb, words[1:]) if verb in LEAN else _perform(verb, words[1:])
    except Exception as error:  # noqa: BLE001  the last one to answer: whatever it is becomes an exit code
        return _fault(verb, error)


def _fill_standard_fds() -> None:
    """
    Put something on closed fds 0-2: else the next file we open is taken for stdin, stdout or stderr.

    The wrong way round, so that whoever reads or writes there is told that it is closed, and nothing is taken for written.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.set_inheritable(fd, True)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free number: this one


# -- run and launcher: the lean path


def plain(verb: str, words: list[str]) -> Plain | None:
    """
    What the words behind a lean verb mean, in their plain forms.

    Returns:
        tuple: The SPECs; of each option its value, True for a flag. None for whatever `parser.parsed` must read: help, errors,
            abbreviations, `--spool=X`, `--`.
    """
    with_value, flags = LEAN[verb]
    specs: list[str] = []
    options: dict[str, str | bool] = {}
    rest = iter(words)
    for word in rest:
        if word in with_value:
            value = next(rest, "-")
            if value.startswith("-") or (word == "--idle" and not _is_number(value)):
                return None
            options[word[2:]] = value
        elif word in flags:
            options[word[2:]] = True
        elif word.startswith("-") and word != "-":
            return None
        else:
            specs.append(word)
    return (specs, options) if bool(specs) == (verb == "run") else None


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _lean(verb: str, words: list[str]) -> int:
    given = plain(verb, words)
    if given is None:
        from . import parser

        try:
            found = vars(parser.parsed(verb, words))
        except parser.HelpAsked:
            write(1, parser.verb_help(verb).encode())
            return os.EX_OK
        given = found.get("specs", []), found
    specs, options = given
    return _run(specs, options) if verb == "run" else _launcher(options)


def _run(specs: list[str], options: dict[str, Any]) -> int:
    texts = [(name, read_spec(name)) for name in specs]
    from . import launch

    run_id, detach, warm = options.get("id"), bool(options.get("detach")), bool(options.get("warm"))
    return launch.run(texts, spool_path(options.get("spool")), run_id, detach, os.getcwd(), warm=warm)


def _launcher(options: dict[str, Any]) -> int:
    """Lean too: what is imported here is in the memory of every chaperone that is forked from it."""
    if "argparse" in sys.modules:  # begin again, in plain words
        from . import parser

        words = ["--spool", os.path.abspath(spool_path(options["spool"])), *(["--detach"] if options["detach"] else [])]
        if options["idle"] is not None:
            if not 0 <= options["idle"] < float("inf"):
                raise parser.UsageError(f"unable to understand '--idle': want seconds of at least 0, got {options['idle']:g}")
            words += ["--idle", str(options["idle"])]
        os.execv(sys.executable, [sys.executable, "-I", "-S", f"{os.path.dirname(os.path.abspath(__file__))}/__main__.py", "launcher", *words])
    from . import launcher

    idle = options.get("idle")
    return launcher.serve(os.path.abspath(spool_path(options.get("spool"))), None if idle is None else float(idle), bool(options.get("detach")))


def spool_path(given: str | None) -> str:
    """The spool: as given, else as $CHAPERONE_SPOOL says, else ./spool."""
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


# -- every other verb


def _perform(verb: str, words: list[str]) -> int:
    """Write what a verb yields; return what it returns."""
    if verb == "--version":
        from . import __version__

        write(1, f"chaperone {__version__}\n".encode())
        return os.EX_OK
    if verb in ("-h", "--help"):
        from . import arguments

        write(1, arguments.help_text().encode())
        return os.EX_OK
    from . import parser, verbs

    try:
        given = parser.parsed(verb, words)
    except parser.HelpAsked:
        write(1, parser.verb_help(verb).encode())
        return os.EX_OK
    steps = verbs.CALLS[verb](given)
    while True:
        try:
            fd, data = next(steps)
        except StopIteration as end:
            return int(end.value)
        write(fd, data)


def add_site_packages() -> None:
    """What a start without site (`-S`) left out, for verbs that can't do without attrs, filelock or inotify_simple."""
    if sys.flags.no_site:
        import site

        site.main()
    import warnings

    warnings.showwarning = _warned


def _warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None) -> None:
    """A warning is for people: the sentence, without the place in the code that says it."""
    from . import show

    write(2, f"chaperone: {show.escaped(str(message))}\n".encode())


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
        except BlockingIOError:  # somebody made the terminal or pipe that we share with them non-blocking
            _wait_for_room(fd)
        except OSError as error:
            if fd == 2:
                return
            if isinstance(error, BrokenPipeError):
                _die_of(_signal.SIGPIPE)
            raise OutputError(f"unable to write to stdout: {error.strerror}") from error


def _wait_for_room(fd: int) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _die_of(number: int) -> NoReturn:
    _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # not reached


def _fault(verb: str, error: Exception) -> int:
    """Tell what went wrong in a sentence; return the exit code that says whose fault it is."""
    from . import show

    code = _exit_code(verb, error)
    if code == os.EX_SOFTWARE:
        import traceback

        for line in "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines():
            write(2, f"{show.escaped(line)}\n".encode())
        sentence = f"unable to go on: {type(error).__name__}: {error} (this is a bug)"
    elif isinstance(error, ChaperoneError):
        sentence = str(error)
    else:
        sentence = f"unable to go on: {error}"
    write(2, f"chaperone: {show.escaped(sentence)}\n".encode())
    return code


def _exit_code(verb: str, error: Exception) -> int:
    from . import errors, parser

    faults = (
        (parser.UsageError, os.EX_USAGE),
        (errors.SpecError, os.EX_DATAERR),
        ((NoSpecError, errors.NoRunError), os.EX_NOINPUT),
        (errors.RunExistsError, os.EX_CANTCREAT),
        (errors.SpoolError, os.EX_CANTCREAT if verb == "run" else os.EX_IOERR),
        (OutputError, os.EX_IOERR),
        ((errors.StartError, OSError), os.EX_OSERR),
    )
    return next((code for kinds, code in faults if isinstance(error, kinds)), os.EX_SOFTWARE)
