"""
An agent that `deploy` started, on its host: it serves its one spool until its lifetime is over, and
then removes itself.

Knows: its directory and locks, how it is served.  Must not know: how it came there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import secrets
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import ChaperoneError, SpoolError
from ...program.fds import owned
from ...spool import format, locks
from ...spool import gc as collection
from ..server import serving
from ..server.application import Agent
from ..server.tokens import Tokens
from ..tls import Certificate
from .lifetime import Lifetime

UPKEEP_S = 60.0  # at most, between two looks for fetched runs that are old
LAUNCHER_S = 5.0  # for a launcher to end
LOG_BYTES = 1 << 20  # nothing reads it as long as all is well
SPOOL = "spool"


def main(settings_fd: int) -> None:
    """
    Be the agent, to its end.

    Args:
        settings_fd (int): A file with the settings, as `far.run` gives them.
    """
    gc.enable()
    with open(settings_fd) as file:
        given = json.load(file)
    for name in ("lock_fd", "ready_fd", "pem_fd", "key_fd"):
        os.set_inheritable(given[name], False)  # no run may hold our lock, or have our key
    try:
        # First: where it can't listen it makes nothing.
        with listening(given["host"], given["port"]) as sock:
            asyncio.run(Hosted(given).live(sock))
    except ChaperoneError as error:
        raise SystemExit(str(error)) from None


def note(sentence: str) -> None:
    """Write a line into the log of the agent; the log begins again where it gets too long."""
    if os.fstat(2).st_size > LOG_BYTES:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    os.write(2, f"{now} {sentence}\n".encode(errors="backslashreplace"))


class Hosted:
    """
    The agent of one user and host.

    Args:
        given (dict): Its settings.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._given, self._place = given, given["place"]
        self._spool, tokens = f"{self._place}/{SPOOL}", f"{self._place}/.tokens"
        self._lifetime = Lifetime(
            self._spool, tokens, given["idle_s"], given["lease_s"], given["single"]
        )
        self._agent = Agent(self._place, Tokens(tokens), note, given={"renew": given["lease_s"]})

    async def live(self, sock: socket.socket) -> None:
        """
        Serve until the lifetime is over or SIGTERM comes, which leaves all to the next agent.

        Args:
            sock (Socket): Where it listens.
        """
        pem, key = (f"/proc/self/fd/{self._given[name]}" for name in ("pem_fd", "key_fd"))
        certificate = Certificate(pem, key)
        upkeep = asyncio.create_task(self._keep_tidy())
        self._announce(sock.getsockname()[1])
        while True:
            threads = ThreadPoolExecutor()
            asyncio.get_running_loop().set_default_executor(threads)
            end = asyncio.Event()
            watch = asyncio.create_task(self._watch(end))
            await serving.serve(self._agent, sock.dup(), certificate, _ready, end=end)
            if not watch.done():
                watch.cancel()
                break
            with owned(watch.result()):  # the door: no `deploy` comes in
                threads.shutdown()  # what one still does, it does in the spool
                if self._lifetime.has_changed():  # by a request that we still answered
                    continue
                upkeep.cancel()
                self._remove()
                break

    def _announce(self, port: int) -> None:
        """Write what clients need; then whoever started us may go."""
        facts = {name: self._given[name] for name in ("address", "server_name")}
        path = f"{self._place}/.agent.json"
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            json.dump({"port": port, "ca": self._given["pem"], **facts}, file)
        os.rename(f"{path}.new", path)
        with owned(self._given["ready_fd"]) as ready_fd, contextlib.suppress(OSError):
            os.write(ready_fd, b"\n")

    # -- its end

    async def _watch(self, end: asyncio.Event) -> int:
        """Set `end` when the lifetime is over; a descriptor that holds the lock of the door."""
        while True:
            await asyncio.sleep(self._lifetime.pause_s)
            if self._is_over():
                door_fd = os.open(f"{self._place}/.door", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                # A `deploy` that was here a moment ago has changed the tokens.
                if locks.try_take(door_fd) and self._is_over():
                    end.set()
                    return door_fd
                os.close(door_fd)

    def _is_over(self) -> bool:
        agent = self._agent
        return self._lifetime.is_over(time.monotonic(), agent.asked_at, agent.streams > 0)

    def _remove(self) -> None:
        """
        Leave no process and no file. What it is in stays: runs that survive have theirs there too.
        """
        end_launcher(self._spool)
        # By another name first: a `deploy` that comes now makes a directory of its own.
        gone = f"{self._place}.gone-{secrets.token_hex(4)}"
        os.rename(self._place, gone)
        shutil.rmtree(gone, ignore_errors=True)

    async def _keep_tidy(self) -> None:
        """Delete what was fetched a lease ago: until then a client may want to look again."""
        while True:
            lease_s = self._given["lease_s"]
            await asyncio.sleep(min(lease_s / 10, UPKEEP_S))
            with contextlib.suppress(ChaperoneError):
                async with self._agent.alone(self._spool):
                    await asyncio.to_thread(collection.gc, self._spool, lease_s)


def _ready() -> None:
    """Nothing: what comes before the first answer waits at our socket."""


def listening(host: str, port: int) -> socket.socket:
    """
    A listening socket.

    Args:
        host (str): An address or a name; "" for all addresses.
    """
    if host:
        return serving.listen(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        return serving.listen(f"[::]:{port}")  # IPv4 too
    except SpoolError:  # without IPv6
        return serving.listen(f"0.0.0.0:{port}")


def end_launcher(spool_path: str) -> None:
    """End the launcher of a spool, which would end by itself after a minute."""
    try:
        fd = os.open(f"{spool_path}/{format.LAUNCHER_LOCK}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with owned(fd):
        pid = os.pread(fd, 20, 0).strip()
        deadline = time.monotonic() + LAUNCHER_S
        with contextlib.suppress(ProcessLookupError, ValueError):
            with owned(os.pidfd_open(int(pid))) as pidfd:
                # It holds the lock, so that is its pid.
                while not locks.try_take_for_process(fd) and time.monotonic() < deadline:
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                    time.sleep(locks.LAST_PAUSE_S)
