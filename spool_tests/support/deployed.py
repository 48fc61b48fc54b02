"""
Agents that tests deploy: to another home directory of this host, or through a real sshd.

Knows: how one is reached and asked.  Must not know: what a test asks.
"""

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import ssl
import sys
import urllib.parse

from chaperone.agent.deploy.deploy import Place, deploy
from spool_tests.support.processes import processes_with
from spool_tests.support.waiting import until

BARE = (os.path.realpath(sys.executable),)  # started with -I -S, so that it finds no package


class Far:
    """
    A home directory that is another host's, as far as an agent can see.

    Args:
        path (pathlib.Path): Everything is below it: `home`, `near` and `bin`.
        python (tuple): The argv of its python3; () for none.
    """

    def __init__(self, path, python=BARE):
        self.path, self.home = path, path / "home"
        for each in (self.home, path / "near", path / "bin"):
            each.mkdir()
        if python:
            script = path / "bin/python3"
            script.write_text(f'#!/bin/sh\nexec {shlex.join(python)} "$@"\n')
            script.chmod(0o755)

    @property
    def hop(self):
        """To that home, with nothing of our environment."""
        words = [f"HOME={self.home}", f"PATH={self.path}/bin:/usr/bin:/bin"]
        return {"exec": {"argv": ["env", "-i", *words]}}

    def deploy(self, *hops, **fields):
        """Deploy; the agent."""
        return Agent(deploy(Place(hops=[*hops, self.hop], **fields)))

    def places(self):
        """The directories of agents."""
        return sorted(self.home.glob(".chaperone/*"))

    def left(self):
        """All files and processes of it: [path], {pid: command}."""
        token = str(self.home).encode()  # in HOME, or in the command of a launcher
        walked = os.walk(self.home)  # unlike rglob, it takes what is removed meanwhile
        found = [f"{top}/{name}" for top, below, files in walked for name in (*below, *files)]
        return found, processes_with(token)

    def is_clean(self):
        """Whether nothing of it is left."""
        files, processes = self.left()
        return not processes and files in ([], [f"{self.home}/.chaperone"])

    def end(self):
        """Kill what still runs."""
        until(self._killed)

    def _killed(self):
        found = self.left()[1]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found


class Agent:
    """An agent, by the file that `deploy` wrote."""

    def __init__(self, path):
        self.path = path
        with open(path) as file:
            self.file = json.load(file)
        url = urllib.parse.urlsplit(self.file["url"])
        self.host, self.port = url.hostname, url.port

    def ask(self, method, route, body=None, name=None, ca=None):
        """(HTTP status, JSON) of one request."""
        context = ssl.create_default_context(cadata=ca or self.file["ca"])
        name = name or self.file["server_name"]
        with (
            socket.create_connection((self.host, self.port), 20) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            connection = http.client.HTTPConnection(self.host)
            connection.sock = secure
            headers = {"Authorization": f"Bearer {self.file['token']}"}
            connection.request(
                method,
                f"/api/v1{route}",
                body if isinstance(body, str) else json.dumps(body),
                headers,
            )
            answer = connection.getresponse()
            data = answer.read()
        return answer.status, json.loads(data) if data else None

    def start(self, run_id, *argv, **spec):
        """Start a run."""
        spec = {"program": {"argv": [*argv]}, **spec}
        body = {"spec": spec, "key": os.urandom(16).hex(), "warm": False}
        status, said = self.ask("PUT", f"/spool/runs/{run_id}", body)
        assert status == 201, said

    def status(self, run_id, wait=0):
        """The status of a run."""
        status, said = self.ask("GET", f"/spool/runs/{run_id}?wait={wait}")
        assert status == 200, said
        return said

    def spec(self, run_id):
        """The spec of a run."""
        status, said = self.ask("GET", f"/spool/runs/{run_id}/spec")
        assert status == 200, said
        return said["spec"]

    def fetch(self, *run_ids):
        """Collect runs that have ended."""
        for run_id in run_ids:
            until(lambda run_id=run_id: self.status(run_id, wait=10)["state"] == "terminated")
        body = {"runs": dict.fromkeys(run_ids)}
        until(lambda: self.ask("POST", "/spool/collect", body)[1]["waiting"] == [])

    def pid(self, far):
        """Of its process."""
        (found,) = [
            pid for pid, command in far.left()[1].items() if "agent.deploy.hosted" in command
        ]
        return found
