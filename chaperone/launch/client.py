"""
Asks the spool's launcher to start a run.

Knows: its socket, one request, one answer.  Must not know: how a run is held.
An answer that never comes costs a cold start and nothing else: the run id decides which start wins,
and the key shows it.
"""

from __future__ import annotations

import os

from ..cpython import socket
from ..errors import RunExistsError
from ..model import jsontext
from ..program.fds import above_stderr, owned
from ..spool import format, look
from .image import IMAGE
from .process import run_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

ON_DEMAND_IDLE_S = (
    60.0  # a launcher that was started on demand ends when it was not used for so long
)
# A run directory takes 2 ms; a launcher that is stopped or swapped out must not delay a start for
# long.
ANSWER_S = 5.0
PIECE_BYTES = 65_536  # of one recv(2): a larger buffer is mapped and unmapped each time


def decoded(env: Mapping[bytes, bytes]) -> dict[str, str]:
    """An environment as JSON can carry it: UTF-8 whatever the locale, other bytes escaped."""
    return {
        name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, value in env.items()
    }


def start_warm(
    path: str,
    run_id: str,
    text: bytes,
    given: dict[str, Any],
    cold: Callable[[], Any],
    on_demand: bool,
    key: str | None = None,
) -> bool:
    """
    Start a run through the spool's launcher, or cold if that does not work.

    Args:
        path (str): The spool's, absolute.
        text (bytes): The spec, canonical, with this id.
        given (dict): `env` (dict) and `umask` (int): what the program inherits.
        cold: Starts the run without a launcher; called when no launcher has done it or still can.
        on_demand (bool): Start a launcher if there is none.
        key (str): Of the run; `cold` uses the same. None for a new key.
    Returns:
        bool: True if the launcher started the run, False if `cold` did.
    Raises:
        RunExistsError, SpoolError: As `start.start`; and whatever `cold` raises.
    """
    key = key or os.urandom(16).hex()
    request = (
        jsontext.dumps({"image": IMAGE, "key": key, **given}).removesuffix("}").encode()
        + b', "spec": '
        + text
        + b"}\n"
    )
    answer = _answer(path, request)
    if answer is None and on_demand and start_on_demand(path):
        answer = _answer(path, request)
    answer = answer or {}
    if answer.get("visible") == run_id or look.key_at(path, run_id) == key:
        return True
    if answer.get("error") == RunExistsError.__name__:
        raise RunExistsError(answer["message"], answer["errno"])
    try:
        cold()
    except RunExistsError:
        if (
            look.key_at(path, run_id) != key
        ):  # otherwise the launcher's fork was late, and still came first
            raise
        return True
    return False


def _answer(path: str, request: bytes) -> dict[str, Any] | None:
    """What the launcher says; {} when it says nothing, None when there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_S)
        with owned(os.open(path, format.DIRECTORY & ~os.O_NOFOLLOW)) as spool_fd:
            connection.connect(socket_path(spool_fd))
    except OSError:
        connection.close()
        return None
    try:
        connection.sendall(request)
        value = jsontext.loads(receive_line(connection))
    except (OSError, ValueError):
        return {}
    finally:
        connection.close()
    return value if isinstance(value, dict) else {}


def start_on_demand(path: str) -> bool:
    """Start a launcher that ends when it was idle for a minute; False if none could be started."""
    # Its environment is in the memory of every chaperone it forks: not ours, which may hold
    # secrets.
    env = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    words = ["launcher", "--detach", "--idle", f"{ON_DEMAND_IDLE_S:g}", "--spool", path]
    with owned(above_stderr(os.open(os.devnull, os.O_RDWR))) as null:
        return run_command(words, env, [null, null, null]) in (os.EX_OK, None)


def socket_path(spool_fd: int, name: str = format.LAUNCHER) -> str:
    """A path that fits into the 108 bytes of a socket address, however long the spool's path is."""
    return f"/proc/self/fd/{spool_fd}/{name}"


def receive_line(connection: socket.socket) -> bytes:
    """
    Receive bytes up to a newline.

    Raises:
        OSError: If the other end has closed, or took too long.
    """
    pieces: list[bytes] = []
    while not (pieces and pieces[-1].endswith(b"\n")):
        piece = connection.recv(PIECE_BYTES)
        if not piece:
            raise ConnectionResetError("the other end has closed the connection")
        pieces.append(piece)
    return b"".join(pieces)
