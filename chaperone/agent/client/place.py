"""
Where the spool of an agent is, and what proves our right to it: a URL, a token, an authority.

Knows: URLs, the environment, the file that `deploy` writes.  Must not know: HTTP, what is asked.
No token is ever part of a message, a repr or a URL.
"""

from __future__ import annotations

import os

from ...errors import AgentError, SpecError
from ...model.spec import is_run_id
from .. import missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any, NoReturn

FILE = "agent:"  # before the path of a file that replaces a URL
TOKEN_LIMIT = 4_096  # bytes: a longer line is some other file
_TOKEN = frozenset(map(chr, range(33, 127)))  # of a header's value, without spaces


class Place:
    """
    The spool of an agent.

    Args:
        text (str): `https://HOST:PORT/NAME`, or `agent:FILE`.
        token_file (str): A file with the token on its only line; None for that of `agent:FILE`, or
            that which $CHAPERONE_TOKEN_FILE names.
        ca (str): A file of the authorities to trust, as PEM; None for the certificate in
            `agent:FILE`, or the file that $CHAPERONE_CA names, or the authorities of this host.
    Attributes:
        text (str): As it was given, for messages.
        origin (str): `https://HOST:PORT`.
        name (str): Of the spool.
        server_name (str): Which the certificate must be for; None for the host of the URL.
    Raises:
        SpecError: If that is no place of an agent.
    """

    def __init__(
        self,
        text: str,
        token_file: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self.text = text
        self.server_name: str | None = None
        self._token: str | None = None
        self._pem: str | None = None
        self._token_file = None if token_file is None else os.path.abspath(token_file)
        self._ca = None if ca is None else os.path.abspath(ca)
        if text.startswith(FILE):
            self._read(os.path.abspath(text.removeprefix(FILE)))
        else:
            self.origin, self.name = self._parsed(text)
            self._token_file = self._token_file or os.environ.get("CHAPERONE_TOKEN_FILE") or None
            self._ca = self._ca or os.environ.get("CHAPERONE_CA") or None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without a token, in whichever process it is made again."""
        return Place, (self.text, self._token_file, self._ca)

    def __repr__(self) -> str:
        return repr(self.text)

    def token(self) -> str:
        """
        The token, read again each time: the file may have a new one.

        Raises:
            SpecError: If there is none; what is in the file is not shown.
        """
        if self._token_file is None:
            if self._token is None:
                self._fail("want a token: token_file, or $CHAPERONE_TOKEN_FILE")
            return self._token
        try:
            with open(self._token_file, "rb") as file:
                data = file.read(TOKEN_LIMIT + 1)
        except OSError as error:
            self._fail(f"token file {self._token_file!r}: {error.strerror}", error)
        return self._checked(data, f"token file {self._token_file!r}")

    def context(self) -> ssl.SSLContext:
        """
        What the agent's certificate is verified by.

        Raises:
            SpecError: If there are no authorities in the file.
        """
        from .. import tls

        try:
            return tls.client_context(self._ca, None if self._ca else self._pem)
        except SpecError as error:
            self._fail(str(error), error)

    def _parsed(self, url: str) -> tuple[str, str]:
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            self._fail("it is not a URL")
        if "@" in parts.netloc:
            # Not shown: it is a secret.
            raise SpecError("unable to open a spool by its URL: a URL must not contain a secret")
        if parts.scheme != "https":
            self._fail("want https://: a token is never sent in the clear")
        name = parts.path.strip("/")
        if not parts.hostname or not is_run_id(name) or parts.query or parts.fragment:
            self._fail("want https://HOST:PORT/NAME")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return f"https://{host}" + ("" if port is None else f":{port}"), name

    def _read(self, path: str) -> None:
        """Take the URL, the token and the certificate from the file of a deployed agent."""
        import json

        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                found: Any = json.loads(file.read())
        except OSError as error:
            self._fail(str(error.strerror), error)
        except ValueError as error:
            self._fail("it is not JSON", error)
        if mode & 0o077:
            self._fail(f"it has a token, and others may read it: want mode 0600, got {mode:#o}")
        for field in ("url", "token", "ca", "server_name"):
            value = found.get(field) if isinstance(found, dict) else None
            if not isinstance(value, str) and (value is not None or field in ("url", "token")):
                self._fail(f"{field} is missing or invalid")
        self.origin, self.name = self._parsed(found["url"])
        self.server_name = found["server_name"]
        self._token = self._checked(found["token"].encode(), "its token")
        self._pem = found["ca"]

    def _checked(self, data: bytes, what: str) -> str:
        text = data.removesuffix(b"\n").decode("latin-1")
        if len(data) > TOKEN_LIMIT or not text or not set(text) <= _TOKEN:
            self._fail(f"{what}: want one line with a token")
        return text

    def _fail(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise SpecError(f"unable to open spool {self.text!r}: {reason}") from cause


def client_room(text: str, name: str) -> Any:
    """
    A module of the client, which needs a package that a spool on this host does not need.

    Args:
        text (str): The place, for the message.
        name (str): `spool`, or `aio`.
    Raises:
        AgentError: If the package is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        why = missing(error)
        if why is None:
            raise
        raise AgentError(f"unable to open spool {text!r}: {why}") from error


def is_place(path: object) -> bool:
    """Whether that which names a spool means an agent's; `http://` does, to be refused."""
    return isinstance(path, str) and path.startswith(("https://", "http://", FILE))
