"""
What only CPython has: the C cores of modules whose own import a start can't afford, and the public
module instead where a core is missing or has changed.

Knows: `_json`, `_signal`, `_ctypes`, `_socket`, `_stat`, `posix`, and what replaces each.  Must not
know: what they are used for.
"""

from __future__ import annotations

__all__ = [
    "accept",
    "digest",
    "environ",
    "json_encoder",
    "json_scanner",
    "os",
    "prctl",
    "signal",
    "socket",
    "stat",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _signal as signal
    import _socket as socket
    import os as os
    import stat as stat
    from collections.abc import Callable
    from typing import Any

    environ: dict[bytes, bytes]
    Scan = Callable[[str, int], tuple[object, int]]
    Encode = Callable[[object, int], "tuple[str, ...]"]
else:
    try:  # `os` adds paths and mappings to its C core: 0.15 of a bare interpreter's start
        import posix as os

        environ = os.environ  # as the kernel gave it
    except ImportError:
        import os

        environ = dict(os.environb)
    try:  # `signal` makes enums of all its numbers: 0.3 of a bare interpreter's start
        import _signal as signal
    except ImportError:
        import signal
    try:  # `stat` runs Python of its own: 0.1 ms of a start
        import _stat as stat
    except ImportError:
        import stat


def __getattr__(name: str) -> object:
    """`socket`, for the few that need it: the module costs 5 ms, and its C core 0.3."""
    if name != "socket":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import _socket as found
    except ImportError:
        import socket as found  # type: ignore[no-redef]
    globals()["socket"] = found
    return found


def json_scanner(context: Any) -> Scan:
    """
    The function that reads one JSON value from a text.

    Args:
        context: A class with the hooks of `json.JSONDecoder` as its attributes.
    Returns:
        callable: (text, start) to (value, end); raises StopIteration where no value begins.
    Source: Modules/_json.c. Importing `json` doubles the start of a chaperone: it imports `re`.
    """
    try:
        import _json

        scan = _json.make_scanner(context)
        scan('[{"a": [1, 1.5, null]}]', 0)
        return scan
    except (ImportError, AttributeError, TypeError):
        # 3.15 asks for a hook (`array_hook`) that no earlier version had.
        # Before 3.14 the scanner in Python takes what int() takes for the digits of \\uXXXX.
        from json import JSONDecoder

        decoder = JSONDecoder(
            object_pairs_hook=context.object_pairs_hook,
            parse_float=context.parse_float,
            parse_int=context.parse_int,
            parse_constant=context.parse_constant,
        )
        return decoder.scan_once  # type: ignore[attr-defined, no-any-return]


def json_encoder(default: Callable[[object], object]) -> Encode:
    """
    The function that writes one JSON value in ASCII, on one line.

    Args:
        default: Called with what is no JSON value; raises TypeError.
    Returns:
        callable: (value, 0) to pieces of text; raises ValueError for NaN and infinities.
    Source: Modules/_json.c, as `json.JSONEncoder` calls it.
    """
    try:
        import _json

        # markers, default, encoder, indent, separators, sort_keys, skipkeys, allow_nan
        encode: Any = _json.make_encoder(
            None, default, _json.encode_basestring_ascii, None, ": ", ", ", False, False, False
        )
        encode([{"a": [1, 1.5, None]}], 0)
        return encode  # type: ignore[no-any-return]
    except (ImportError, AttributeError, TypeError):
        from json import JSONEncoder

        encoder = JSONEncoder(check_circular=False, allow_nan=False, default=default)
        return lambda value, level: (encoder.encode(value),)


def digest(data: bytes) -> str:
    """
    Twelve hexadecimal digits for some bytes; others for other bytes.

    Source: `hashlib` loads OpenSSL, which takes as long as 15 of our modules.
    """
    try:
        from _blake2 import blake2s
    except ImportError:
        from hashlib import blake2s
    return str(blake2s(data, digest_size=6).hexdigest())


def accept(listening: socket.socket) -> int:
    """The fd of the next connection to a listening socket; the caller closes it."""
    take = getattr(listening, "_accept", None)
    if take is None:
        other: Any = listening
        return int(other.accept()[0].detach())
    return int(take()[0])


_addresses: dict[str, int] = {}  # of functions of libc


def prctl(option: int, value: int) -> int:
    """
    prctl(2) with one argument: 0, or -1 where the kernel refuses.

    By the C core of ctypes: importing the whole costs a third of an interpreter's start.
    """
    try:
        import _ctypes

        if "prctl" not in _addresses:
            library = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]
            _addresses["prctl"] = _ctypes.dlsym(library, "prctl")
        return int(_ctypes.call_function(_addresses["prctl"], (option, value, 0, 0, 0)))
    except (ImportError, AttributeError, TypeError):
        import ctypes

        return int(ctypes.CDLL(None).prctl(option, value, 0, 0, 0))
