"""
`chaperone deploy`: an agent on a host where nothing is installed, and the file by which clients
reach it.

Knows: what is made here and what comes back.  Must not know: how a connection is made, what the
agent does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import secrets
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ...errors import AgentError, SpecError
from ...model.hops import remote as remotes
from ...model.hops.route import Route
from ...spool import format
from .. import tls
from .bundle import Bundle, bundle
from .certificate import certificate
from .sending import send

IDLE_S = 600.0  # a user who deployed it and now writes a spec
LEASE_S = 2_400.0  # as the lease of a run that survives
DIRECTORY = "~/.chaperone"  # on the other host, as that of runs that survive
SPOOL = "spool"  # the name of its only spool
KNOCK_S = 10.0  # for one address: a firewall may swallow what comes
TRIES = 3  # an agent that was found running may end at that moment


@attrs.frozen(kw_only=True)
class Place:
    """
    Where an agent is wanted.

    Attributes:
        hops (list): As `model.hops.remote.hops` has them; at least one.
        directory (str): On that host, for all of the agent; `~/` is its user's home.
        listen (tuple): Host and port to listen at; None for the address that ssh came to, and any
            port.
        single (bool): Whether it is an agent of its own, for one run.
        idle_s, lease_s (float): As for `Lifetime`.
    """

    hops: Sequence[dict[str, dict[str, Any]]]
    directory: str = DIRECTORY
    listen: tuple[str, int] | None = None
    single: bool = False
    idle_s: float = IDLE_S
    lease_s: float = LEASE_S

    @classmethod
    def of(cls, remote: Mapping[str, Any], **fields: Any) -> Place:
        """
        The place that a spec's `remote` means.

        Raises:
            SpecError: If it is invalid.
        """
        hops = remotes.hops({name: remote.get(name) for name in remotes.HOP_FIELDS}, "remote")
        return cls(hops=hops, directory=remote.get("remote_dir") or DIRECTORY, **fields)

    def route(self) -> Route:
        """The hops, one after the other."""
        return Route.of(self.hops)

    def host(self) -> str | None:
        """The host of the last ssh, as its user names it; None without ssh."""
        hosts = [hop["ssh"]["host"] for hop in self.hops if "ssh" in hop]
        return str(hosts[-1]) if hosts else None

    def name(self) -> str:
        """Of the file for clients: the same for the same place, a new one for a single run."""
        text = json.dumps([self.hops, self.directory], sort_keys=True)
        shown = "".join(c if c.isalnum() or c in "-." else "_" for c in self.host() or "here")
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{shown[:60]}-{digest}" + (f"-{secrets.token_hex(4)}" if self.single else "")


def deploy(place: Place) -> str:
    """
    Have an agent run at a place: a new one, or the one that this user has there already.

    Args:
        place (Place): Where.
    Returns:
        str: The path of a file, 0600, that replaces a URL as `agent:PATH`.
    Raises:
        SpecError: If no agent can outlive the hops.
        AgentError: If no agent could be started, or it can't be reached.
    """
    route = place.route()
    if route.dies_with_client:
        raise SpecError(f"unable to deploy an agent: it can't outlive {route.dies_with_client}")
    where = route.place(pwd.getpwuid(os.geteuid()).pw_name)
    path = os.path.join(_directory(), f"{place.name()}.json")
    token = _token(path) or secrets.token_urlsafe(32)
    code = bundle()
    for left in reversed(range(TRIES)):
        found = send(route, where, _settings(place, token, code), code.data)
        try:
            url = _reached(place, where, found)
        except AgentError:
            if not found["found"] or not left:
                raise
            continue
        break
    names = ("ca", "server_name")
    _write(path, {"url": url, "token": token, **{name: found[name] for name in names}})
    return path


def _settings(place: Place, token: str, code: Bundle) -> dict[str, Any]:
    """What `far.main` reads."""
    made = certificate()
    digest = hashlib.sha256(token.encode()).hexdigest()
    return {
        "directory": place.directory,
        "suffix": f".{secrets.token_hex(4)}" if place.single else "",
        "listen": place.listen,
        "ssh": place.host() is not None,
        "single": place.single,
        "idle_s": place.idle_s,
        "lease_s": place.lease_s,
        "digest": code.digest,
        "lacks": code.lacks,
        "token": f"{_requester()} run {digest}",
        "server_name": made.name,
        "pem": made.pem,
        "key": made.key,
    }


def _requester() -> str:
    """The name of this user and host, as a token may have it."""
    name = f"{pwd.getpwuid(os.geteuid()).pw_name}-{os.uname().nodename}"
    return "deploy-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:100]


# -- is it there


def _reached(place: Place, where: str, found: dict[str, Any]) -> str:
    """
    The URL of an agent, by the first of its addresses that leads to it.

    Raises:
        AgentError: If none does.
    """
    listen = place.listen and place.listen[0]
    asked = listen if listen not in (None, "", "0.0.0.0", "::") else None
    hosts = [asked] if asked else [place.host() or "127.0.0.1", found["address"]]
    context = tls.client_context(pem=found["ca"])
    whys = []
    for host in dict.fromkeys(host for host in hosts if host):
        try:
            _knock(host, found["port"], context, found["server_name"])
        except OSError as error:
            why = tls.refusal(error) or error.strerror or str(error) or type(error).__name__
            whys.append(f"{host}: {why}")
            continue
        shown = f"[{host}]" if ":" in host else host
        return f"https://{shown}:{found['port']}/{SPOOL}"
    raise AgentError(
        f"unable to reach the agent {where} at port {found['port']}: {'; '.join(whys)}"
        " (use --listen to choose an address and a port that this host can reach)"
    )


def _knock(host: str, port: int, context: ssl.SSLContext, name: str) -> None:
    with (
        socket.create_connection((host, port), KNOCK_S) as plain,
        context.wrap_socket(plain, server_hostname=name),
    ):
        pass


# -- the file for clients


def _directory() -> str:
    """Where the files are: 0700, below the home of this user."""
    home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    path = os.path.join(home, ".chaperone", "agents")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise format.failure(f"make directory {path!r}", error) from error
    return path


def _token(path: str) -> str | None:
    """The token of the file that is there, so that it stays valid; None if there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError), open(path) as file:
        return str(json.load(file)["token"])
    return None


def _write(path: str, value: dict[str, str]) -> None:
    new = f"{path}.{secrets.token_hex(4)}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            json.dump(value, file)
        os.rename(new, path)
    except OSError as error:
        raise format.failure(f"write {path!r}", error) from error
