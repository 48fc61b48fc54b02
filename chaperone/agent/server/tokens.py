"""
Tokens: what each requester may ask an agent for.

Knows: the tokens file.  Must not know: HTTP.
A line is `NAME RIGHT SHA256`: the file has no token, so a copy of it opens nothing. A token has 256
random bits, so one round of SHA-256 is enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator

import attrs

from ...errors import SpecError, SpoolError
from ...model.spec import ID_FORM, is_run_id
from ...program.fds import owned
from ...spool import format, locks
from ..tls import file_state

RIGHTS = ("look", "run")  # `run` includes `look`
_DIGITS = frozenset("0123456789abcdef")


@attrs.frozen(kw_only=True)
class Token:
    """
    What is known of a token.

    Attributes:
        name (str): The requester's, in the status of what it stops and in the access log.
        right (str): look or run.
        digest (str): The SHA-256 of the token, in hexadecimal.
    """

    name: str
    right: str
    digest: str = attrs.field(repr=False)

    def may(self, right: str) -> bool:
        """Whether it has a right."""
        return self.right in ("run", right)


class Tokens:
    """
    The tokens of a file, read again when it changes.

    Raises:
        SpecError: If the file can't be used at the start.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = file_state(path)
        self._tokens = read(path)

    def refresh(self) -> str | None:
        """
        Read the file again if it has changed.

        Returns:
            str: Why it can't be used, once for each change: then no token is valid, because one of
                them may have been revoked. Otherwise None.
        """
        seen = file_state(self._path)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            self._tokens = read(self._path)
        except SpecError as error:
            self._tokens = []
            return f"{error}; no token is valid until it can"
        return None

    def find(self, text: str) -> Token | None:
        """The token with this text; the time it takes does not say how near a guess came."""
        digest = _digest(text)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def read(path: str) -> list[Token]:
    """
    The tokens of a file.

    Raises:
        SpecError: If it can't be read, others may read or write it, or a line is invalid.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise SpecError(f"unable to read tokens {path!r}: {why}") from error
    if mode & 0o077:
        raise SpecError(f"unable to use tokens {path!r}: want mode 0600, got {mode:04o}")
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not _is_token(words):  # not shown: it may be a token that was put there by mistake
            want = "NAME RIGHT SHA256"
            raise SpecError(f"unable to use tokens {path!r}: want {want} in line {number}")
        found.append(Token(name=words[0], right=words[1], digest=words[2]))
    return found


def _is_token(words: list[str]) -> bool:
    return (
        len(words) == 3
        and is_run_id(words[0])
        and words[1] in RIGHTS
        and len(words[2]) == 64
        and not set(words[2]) - _DIGITS
    )


def add(path: str, name: str, right: str) -> str:
    """
    Make a token, and keep its hash; an earlier one of this name is revoked.

    Args:
        path (str): Made, 0600, if it is missing.
    Returns:
        str: The token; it is kept nowhere.
    Raises:
        SpecError: If the name or the file is invalid.
        SpoolError: If the file can't be written.
    """
    if not is_run_id(name):
        raise SpecError(f"unable to make a token for {name!r}: want a name {ID_FORM}")
    text = secrets.token_urlsafe(32)
    made = Token(name=name, right=right, digest=_digest(text))
    with _alone(path):
        others = [token for token in _read_or_none(path) if token.name != name]
        _write(path, [*others, made])
    return text


def revoke(path: str, name: str) -> None:
    """
    Take a token out of the file.

    Raises:
        SpecError: If there is none of that name, or the file can't be used.
        SpoolError: If the file can't be written.
    """
    with _alone(path):
        tokens = read(path)
        left = [token for token in tokens if token.name != name]
        if len(left) == len(tokens):
            raise SpecError(f"unable to revoke token {name!r}: {path!r} has no token of that name")
        _write(path, left)


def _read_or_none(path: str) -> list[Token]:
    return read(path) if os.path.exists(path) else []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """
    Two commands at once must not lose each other's line. The lock is on the directory: one on the
    file would go with the old file.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        with owned(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            locks.take(fd)
            yield
    except OSError as error:
        if isinstance(error, SpoolError):
            raise
        raise format.failure(f"write tokens {path!r}", error) from error


def _write(path: str, tokens: list[Token]) -> None:
    lines = [f"{token.name} {token.right} {token.digest}\n" for token in tokens]
    new = f"{path}.{secrets.token_hex(4)}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(fd)
    os.rename(new, path)
