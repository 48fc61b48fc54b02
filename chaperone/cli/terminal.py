"""
How verbs print: on stdout and stderr, and so that no text controls the terminal.

Knows: write(2), terminals, how they read text.  Must not know: files, processes, the date.
"""

from __future__ import annotations

import os
import time

from ..cpython import signal
from ..errors import ChaperoneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PROGRESS_S = 0.1  # often enough to look alive, seldom enough to cost nothing


class OutputError(ChaperoneError):
    """Our stdout can't be written to, and not because its reader is gone."""


class Terminal:
    """
    Prints for the verbs; no other part of the command line prints. What stderr refuses is lost.

    Raises, in each call that writes to stdout:
        OutputError: If stdout can't be written to. If its reader is gone, the process dies of
            SIGPIPE, as other tools do.
    """

    def __init__(self) -> None:
        self._progress_at = time.monotonic()  # quick work shows no progress
        self._progress_shown = False

    def data(self, data: bytes, fd: int = 1) -> None:
        """Print bytes as they are, on stdout or, with fd 2, on stderr."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # another process made the shared terminal or pipe non-blocking
                _wait_for_room(fd)
            except OSError as error:
                if fd == 2:
                    return
                if isinstance(error, BrokenPipeError):
                    _die_of(signal.SIGPIPE)
                raise OutputError(f"unable to write to stdout: {error.strerror}") from error

    def text(self, text: str) -> None:
        """Print text that is safe for a terminal already."""
        self.data(text.encode("utf-8", "backslashreplace"))

    def line(self, text: str) -> None:
        """Print a line; characters that could move a cursor are escaped."""
        self.text(f"{escaped(text)}\n")

    def note(self, sentence: str) -> None:
        """Print a sentence on stderr."""
        self.data(f"chaperone: {escaped(sentence)}\n".encode(), 2)

    def progress(self, done: int, of: int) -> None:
        """Show progress on stderr, if that is a terminal, in one line that is overwritten."""
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_S and os.isatty(2):
            self._progress_at, self._progress_shown = now, True
            self.data(f"\r{done} of {of} runs\x1b[K".encode(), 2)

    def wipe_progress(self) -> None:
        """Clear the progress line, if it was shown."""
        if self._progress_shown:
            self.data(b"\r\x1b[K", 2)

    # -- what stdout is

    def is_terminal(self) -> bool:
        return os.isatty(1)

    def width(self) -> int | None:
        """How many columns stdout has; None if it is not a terminal or does not say."""
        try:
            return os.get_terminal_size(1).columns or None
        except OSError:
            return None

    def may_colour(self) -> bool:
        """Whether stdout is a terminal with colour, and NO_COLOR is not set (no-color.org)."""
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        return os.isatty(1) and not dumb and not os.environ.get("NO_COLOR")


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


# -- text that is safe to show


def escaped(text: str) -> str:
    """
    Text that a terminal can show as it is: without control characters, single bytes, or marks that
    change the direction of writing.

    Returns:
        str: Characters that are not printable are `\\x1b` or `\\u202e`; a surrogate that means a
            byte is that byte, `\\xff`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def indented(value: object) -> str:
    """A value as indented JSON, without characters that could move a cursor."""
    import json

    def shown(char: str) -> str:
        if char.isprintable() or char == "\n":
            return char
        return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]

    return "".join(map(shown, json.dumps(value, indent=2, ensure_ascii=False)))


# -- amounts


def amount(count: object) -> str:
    """Bytes as `812`, `9.8K`, `153M`, in powers of 1,024; `-` if it is not a number."""
    if not isinstance(count, int):
        return "-"
    size: float = count
    for unit in ("", "K", "M", "G", "T", "P"):
        if size < 999.5 or unit == "P":
            break
        size /= 1024
    return f"{size:.1f}{unit}" if unit and size < 9.95 else f"{size:.0f}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds as `0.4s`, `59s`, `2m03s`, `1h05m`, `3d04h`; `-` for None and infinity."""
    if seconds is None or not seconds < float("inf"):
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    units = (("d", "h", 86_400, 3_600), ("h", "m", 3_600, 60), ("m", "s", 60, 1))
    for unit, low, size, low_size in units:
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // low_size:02d}{low}"
    return f"{whole}s"
