"""
Agents: a spool with a socket, and what feeds a spool from one.

Knows: the public name.  Must not know: what is not asked for; HTTP is imported when it is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .server.receiving import Receiver


def receiver(spool_path: str, url: str) -> Receiver:
    """
    An ASGI application that takes what agents post, and writes ordinary run directories.

    Mount it in an application of yours under the path of `url`, in one process. It takes the runs
    over that an earlier receiver of the spool fed. `close` it at the end.

    Args:
        spool_path (str): Made if it is missing.
        url (str): Where agents reach it, with https; the id of a run is appended.
    Returns:
        Receiver: `expect(run_id)` returns the url and the token of a run's callback.
    Raises:
        SpoolError: If the spool can't be used.
    """
    from .reception import Reception
    from .server.receiving import Receiver

    return Receiver(Reception(spool_path, url))


def missing(error: ModuleNotFoundError) -> str | None:
    """The package of the extra that an import wants, as a reason; None if it is one of ours."""
    if error.name is None or error.name.startswith("chaperone"):
        return None
    return f"want the package {error.name} (pip install 'chaperone-spool[agent]')"
