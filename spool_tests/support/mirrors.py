"""
Mirrors that tests start: a real `chaperone mirror` of the spool of a served agent.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import subprocess
import threading

from chaperone.agent.mirror import Mirror
from spool_tests.support.places import CHAPERONE


class Mirrored:
    """
    A mirror of an agent's spool.

    Args:
        agent (Served): Of whose spool `etl`.
        spool (Path): Of this host.
        url (str): Of the agent's spool, if that is not the agent's own.
    Attributes:
        log (Path): Its stderr.
    """

    def __init__(self, agent, spool, right="run", url=None):
        self.agent, self.spool, self._url = agent, spool, url
        self.log = pathlib.Path(f"{spool}.mirror.log")
        self.environ = {
            "CHAPERONE_TOKEN_FILE": str(agent.token_files[right]),
            "CHAPERONE_CA": str(agent.ca),
        }
        self.process = None

    @property
    def url(self):
        return self._url or self.agent.spool_url

    def start(self, words=()):
        command = [*words, *CHAPERONE, "mirror", self.url, "--spool", self.spool]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **self.environ},
            )

    def is_alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """SIGKILL, as out of memory."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout=60):
        """SIGTERM: the exit code."""
        self.process.terminate()
        return self.process.wait(timeout)

    def lines(self):
        """What it has said, without the times."""
        return [line.split(" ", 2)[2] for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def mirrored(agent, spool, right="run", url=None):
    """A mirror that runs; it is killed at the end."""
    mirror = Mirrored(agent, spool, right, url)
    mirror.start()
    try:
        yield mirror
    finally:
        if mirror.is_alive():
            mirror.kill()


@contextlib.contextmanager
def mirrored_here(url, spool):
    """A mirror in a thread of this process, with the token and the authority of its environment."""
    said, begun, loops = [], threading.Event(), []
    mirror, end = Mirror(url, str(spool), said.append), asyncio.Event()

    async def work():
        loops.append(asyncio.get_running_loop())
        begun.set()
        await mirror.run(end)

    # `asyncio.run` closes the connections that the client keeps.
    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    try:
        yield said
    finally:
        begun.wait()
        loops[0].call_soon_threadsafe(end.set)
        thread.join()


def same(far, near, run_id):
    """What differs between a run at its agent and the copy of it; nothing if they are the same."""
    return [
        name
        for name in ("stdout", "stderr", "status.json")
        if digest(far / run_id / name) != digest(near / run_id / name)
    ]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
