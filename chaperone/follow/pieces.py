"""
A piece of a stream in JSON: text that ends with a whole character, otherwise base64; its time.

Knows: UTF-8, base64.  Must not know: where the bytes come from, who reads the JSON.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime

TAIL = 3  # bytes at most of a UTF-8 character that is not complete


def incomplete(data: bytes) -> int:
    """
    How many bytes at the end are the beginning of a character; 0 if the data ends with a complete
    character, or is not text.
    """
    for left in range(1, min(TAIL, len(data)) + 1):
        try:
            data[-left:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return left
    return 0


def fields(data: bytes) -> dict[str, str]:
    """`{"text": ...}` if the data is UTF-8, otherwise `{"base64": ...}`."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(data).decode("ascii")}


def timestamp(moment: datetime) -> str:
    """A moment in UTC as RFC 3339 has it, with milliseconds: `2026-11-26T04:09:21.123Z`."""
    return f"{moment.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
