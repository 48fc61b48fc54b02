"""
TLS between agents, their clients and receivers: both ends always verify, and nothing turns it off.

Knows: certificates and authorities.  Must not know: a socket, HTTP, which end connects.
"""

from __future__ import annotations

import ssl

from ..errors import SpecError


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
    if found is None or isinstance(found, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return None
    reason = (found.reason or str(found)).replace("_", " ").lower()
    return f"TLS is not possible: {reason}"
