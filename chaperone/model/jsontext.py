"""
Reads and writes JSON text, with the C parser of the interpreter.

Knows: JSON.  Must not know: what the values mean.
Why not `json`: importing it doubles the start of a chaperone (it imports `re`); `_json`, its C
core, costs nothing.
"""

from __future__ import annotations

from .. import cpython

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes of a file. chaperone writes no larger one, and reading it could use up all memory.
LIMIT = 64 * 1024 * 1024
WITHIN_LIMIT = f"at most {LIMIT >> 20} MiB of JSON"
_BLANK = " \t\n\r"


def _constant(name: str) -> object:
    raise ValueError(f"want JSON, got the number {name}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise ValueError(f"want each key once, got {twice[:80]!r} twice")
    return found


def _float(text: str) -> float:
    number = float(text)
    # 1e999 would become an infinity, which is not JSON and could not be written again.
    if number - number != 0:
        raise ValueError(f"want JSON, got the number {text[:80]}")
    return number


def _int(text: str) -> int:
    if len(text) > 4_000:  # the interpreter's own limit is 4,300 digits, and can be changed
        raise ValueError(f"want JSON, got a number of {len(text)} digits")
    return int(text)


class _Context:
    """The attributes that the C scanner reads; the names are those of `json.JSONDecoder`."""

    strict = True
    object_hook = None
    array_hook = None
    object_pairs_hook = staticmethod(_unique)
    parse_float = staticmethod(_float)
    parse_int = staticmethod(_int)
    parse_constant = staticmethod(_constant)


def _unknown(value: object) -> object:
    raise TypeError(f"unable to write {type(value).__name__} as JSON")


# Complaints that the two scanners word differently, and whether a position is one too high.
_TOO_FAR: dict[str, Callable[[str, int], bool]] = {
    "Invalid control character": lambda text, position: text[position - 1] < " ",
    "Invalid \\escape": lambda text, position: text[position] != "\\",
}

_scan = cpython.json_scanner(_Context)
_encode = cpython.json_encoder(_unknown)


def _scanned(text: str, start: int) -> tuple[object, int]:
    try:
        return _scan(text, start)
    # To complain, the C scanner needs json.decoder, and fails if that was not imported.
    except SystemError:
        import json.decoder  # noqa: F401

        return _scan(text, start)


def _sentence(error: ValueError, text: str) -> ValueError:
    """
    A scanner's complaint in our words, which are the same for both scanners.

    The Python scanner raises where the C scanner stops, names the character where the C scanner
    does not, and gives a position that is one higher.
    """
    what, position = getattr(error, "msg", None), getattr(error, "pos", None)
    if what is None or position is None:  # raised by one of our hooks
        return error
    if what == "Expecting value":
        return ValueError(f"want a JSON value at character {position}")
    for known, is_too_far in _TOO_FAR.items():
        if what.startswith(known):
            what = known
            position -= is_too_far(text, position)
    what = what.removesuffix(" at").removesuffix(" starting")
    return ValueError(f"want JSON, got {what[0].lower()}{what[1:]} at character {position}")


def loads(text: bytes | str) -> object:
    """
    Read one JSON value.

    Args:
        text (bytes | str): UTF-8, white space around it allowed.
    Returns:
        object: dict, list, str, int, float, bool or None.
    Raises:
        ValueError: With one sentence. Also if an object has a key twice, for NaN, and if the value
            is nested too deep to be read.
    Source: RFC 8259.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"want UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None
    start = len(decoded) - len(decoded.lstrip(_BLANK))
    try:
        value, end = _scanned(decoded, start)
    except StopIteration as stop:
        raise ValueError(f"want a JSON value at character {stop.value}") from None
    except RecursionError:
        raise ValueError("want JSON, got too many levels of nesting") from None
    except ValueError as error:
        raise _sentence(error, decoded) from None
    if decoded[end:].strip(_BLANK):
        raise ValueError(f"want one JSON value, got more at character {end}")
    return value


def dumps(value: object) -> str:
    """
    Write one JSON value on one line, in ASCII.

    Args:
        value (object): As `loads` returns; lone surrogates (bytes that are not UTF-8) are escaped.
    Returns:
        str: Without a newline.
    Raises:
        TypeError, ValueError: If it is not a JSON value.
    """
    return "".join(_encode(value, 0))
