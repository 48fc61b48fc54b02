"""
TLS between agents, their clients and receivers: both ends always verify, and nothing turns it off.

Knows: certificates, keys, authorities.  Must not know: a socket, HTTP, what is sent.
"""

from __future__ import annotations

import contextlib
import os
import ssl

from ..errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import StreamWriter

# The connection was closed, or nothing came any more.
_UNFINISHED = (
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)


def abort(writer: StreamWriter) -> None:
    """Cut a connection at once, without the farewell of TLS."""
    # Before 3.11.5 the transport of TLS can't be aborted when it was closed.
    with contextlib.suppress(AttributeError):
        writer.transport.abort()


def client_context(ca_file: str | None = None, pem: str | None = None) -> ssl.SSLContext:
    """
    What a client verifies by; the name of the server is checked too.

    Args:
        ca_file (str): A file of the authorities to trust, as PEM; None for those of this host.
        pem (str): The certificates to trust instead, as text; one may be the server's own.
    Raises:
        SpecError: If the file or the text has no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file, cadata=pem)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        what = "a pinned certificate" if ca_file is None else f"the authorities in {ca_file!r}"
        reason = "it is not a certificate as PEM"
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
            reason = error.strerror or str(error)
        raise SpecError(f"unable to trust {what}: {reason}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def refusal(error: BaseException) -> str | None:
    """
    Why the certificate of a server was refused, or TLS was not possible.

    Args:
        error: What a library raised; its causes are looked at too.
    Returns:
        str: A reason for a sentence; None if TLS is not the reason.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLError):
        found = found.__cause__ or found.__context__
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {found.verify_message.rstrip('.')}"
    if found is None or isinstance(found, _UNFINISHED):
        return None
    reason = (found.reason or str(found)).replace("_", " ").lower()
    return f"TLS is not possible: {reason}"


# -- what a server shows


def server_context(cert_file: str, key_file: str) -> ssl.SSLContext:
    """
    What an agent shows its clients.

    Args:
        cert_file (str): PEM: the certificate, then those between it and its authority.
        key_file (str): PEM: its private key, without a password.
    Raises:
        SpecError: If they can't be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A compressed secret can be guessed by its length (CRIME); a renegotiation only costs CPU.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    shown = f"certificate {cert_file!r} with key {key_file!r}"
    try:
        # Never ask for a password on a terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except ssl.SSLError as error:
        why = (error.reason or "it is not PEM").lower().replace("_", " ")
        raise SpecError(f"unable to use {shown}: {why}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"unable to read {shown}: {why}") from error
    return context


class Certificate:
    """
    A server's certificate and key, read again when their files change.

    Connections that are open keep the certificate they began with.

    Attributes:
        context (ssl.SSLContext): For the next connection.
    Raises:
        SpecError: If they can't be read at the start.
    """

    def __init__(self, cert_file: str, key_file: str) -> None:
        self._files = (cert_file, key_file)
        self._seen = self._look()
        self.context = server_context(cert_file, key_file)

    def refresh(self) -> str | None:
        """
        Read the files again if they have changed.

        Returns:
            str: Why the new ones can't be used, once for each change: the old ones stay. Otherwise
                None.
        """
        seen = self._look()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            self.context = server_context(*self._files)
        except SpecError as error:
            return f"{error}; the old one stays in use"
        return None

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [file_state(name) for name in self._files]


def file_state(path: str) -> tuple[int, int, int] | None:
    """What differs when a file was written again or replaced; None where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
