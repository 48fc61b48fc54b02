"""
The verbs of agents: serve, mirror, token, agent, deploy.

Knows: what their words mean.  Must not know: HTTP, TLS.
"""

from __future__ import annotations

import os
import time

from ...errors import AgentError, SpecError
from ...model import jsontext
from ..command import place
from ..common import add_site_packages
from ..verb import SPOOL, Argument, UsageError, read_spec, spool_path, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..terminal import Terminal
    from ..verb import Given

TOKENS = Argument("--tokens", metavar="FILE", required=True, help="the tokens, as hashes; 0600")


def _log(terminal: Terminal, line: str) -> None:
    terminal.note(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}")


@verb(
    "serve the spools in a directory over HTTPS",
    Argument("directory", metavar="DIR", help="each spool directly below it is served"),
    Argument("--listen", metavar="HOST:PORT", required=True, help="where; port 0 is any free one"),
    Argument("--cert", metavar="FILE", required=True, help="the certificate, as PEM"),
    Argument("--key", metavar="FILE", required=True, help="its private key, as PEM"),
    TOKENS,
    Argument("--receive", action="store_true", help="take what agents post about runs"),
)
def serve(given: Given, terminal: Terminal) -> int:
    add_site_packages(terminal)
    import asyncio

    try:
        from ...agent.server import serving
        from ...agent.server.application import Agent
        from ...agent.server.receiving import Receptions
        from ...agent.server.tokens import Tokens
        from ...agent.tls import Certificate
    except ModuleNotFoundError as error:
        raise _lacking("serve", error) from error

    if not os.path.isdir(given.directory):
        raise UsageError(f"unable to serve {given.directory!r}: want a directory")
    agent = Agent(given.directory, Tokens(given.tokens), lambda line: _log(terminal, line))
    certificate = Certificate(given.cert, given.key)
    listening = serving.listen(given.listen)
    url = serving.url(listening)
    receptions = Receptions(agent)

    def ready() -> None:
        if given.receive:
            receptions.open_all()
        terminal.line(url)

    routes = [*serving.ROUTES, *(receptions.routes() if given.receive else ())]
    asyncio.run(serving.serve(agent, listening, certificate, ready, routes))
    # A thread that waits for a disk must not keep us: an agent holds nothing.
    os._exit(os.EX_OK)


@verb(
    "copy the runs of an agent's spool into a spool of this host",
    Argument("url", metavar="URL", help="of the agent's spool, or agent:FILE"),
    SPOOL,
)
def mirror(given: Given, terminal: Terminal) -> int:
    add_site_packages(terminal)
    import asyncio
    import resource
    import signal

    from ...agent.client.place import client_room

    client_room(given.url, "aio")  # it says so where a package is missing
    from ...agent.mirror import Mirror

    # Each run takes eight, and the usual soft limit is 1,024.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def run() -> None:
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, end.set)
        await Mirror(given.url, spool_path(given), lambda line: _log(terminal, line)).run(end)

    asyncio.run(run())
    return os.EX_OK


@verb(
    "make a token for an agent, or revoke one",
    Argument("name", metavar="NAME", help="of who uses it: the name is in the log and in `by`"),
    Argument("--right", metavar="RIGHT", choices=("look", "run"), help="look or run"),
    Argument("--revoke", action="store_true", help="make it invalid"),
    TOKENS,
)
def token(given: Given, terminal: Terminal) -> int:
    if given.revoke == (given.right is not None):
        raise UsageError("unable to understand 'chaperone token': want --right or --revoke")
    add_site_packages(terminal)
    from ...agent.server import tokens

    if given.revoke:
        tokens.revoke(given.tokens, given.name)
    else:
        terminal.line(tokens.add(given.tokens, given.name, given.right))
    return os.EX_OK


@verb("run the program.json on stdin, and post its output and its end", SPOOL)
def agent(given: Given, terminal: Terminal) -> int:
    path = os.path.abspath(spool_path(given))
    text = read_spec("-")
    add_site_packages(terminal)
    try:
        from ...agent.callback import poster, program
    except ModuleNotFoundError as error:
        raise _lacking("agent", error) from error
    spec = program.spec_of(text, os.getcwd())
    outcome = program.run(path, spec, lambda line: _print_and_close(terminal, line))
    if outcome == poster.ACKNOWLEDGED:
        return os.EX_OK
    timeout_s = spec["config"]["timeout"]
    code, why = {
        poster.REFUSED: (os.EX_PROTOCOL, "the receiver refuses it"),
        poster.TIMED_OUT: (os.EX_TEMPFAIL, f"nothing was acknowledged for {timeout_s:g} s"),
        poster.DELETED: (os.EX_NOINPUT, "it was deleted"),
    }[outcome]
    terminal.note(f"unable to post all of run {spec['id']!r}: {why}")
    return code


def _lacking(verb: str, error: ModuleNotFoundError) -> ModuleNotFoundError | AgentError:
    """The error to raise where a package of the extra is not installed."""
    from ...agent import missing

    why = missing(error)
    return error if why is None else AgentError(f"unable to perform {verb!r}: {why}")


def _print_and_close(terminal: Terminal, line: str) -> None:
    """
    Print the one line, and close stdout: a caller may read to its end. Whatever stdout takes, the
    run must be posted.
    """
    try:
        os.write(1, f"{line}\n".encode())
    except OSError as error:
        terminal.note(f"unable to write to stdout: {error.strerror}")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


@verb(
    "start an agent on a host that has Python alone",
    Argument("host", metavar="[USER@]HOST[:PORT]", nargs="?", help="the host, reached by ssh"),
    Argument("--spec", metavar="SPEC", help="a file with `remote`, as in a spec; - is stdin"),
    Argument("--single", action="store_true", help="an agent of its own, for one run"),
    Argument("--listen", metavar="HOST:PORT", help="where; default: the address ssh came to"),
)
def deploy(given: Given, terminal: Terminal) -> int:
    if (given.host is None) == (given.spec is None):
        raise UsageError("unable to understand 'chaperone deploy': want either HOST or --spec")
    add_site_packages(terminal)
    from ...agent.deploy import deploy as deploying

    remote = place(given.host, "HOST") if given.spec is None else _remote(given.spec)
    path = deploying.deploy(
        deploying.Place.of(remote, single=given.single, listen=_address(given.listen))
    )
    terminal.line(f"agent:{path}")
    return os.EX_OK


def _remote(name: str) -> dict[str, object]:
    """The `remote` of a spec; what it has besides is not looked at."""
    try:
        spec = jsontext.loads(read_spec(name))
    except ValueError as error:
        raise SpecError(f"unable to read spec {name!r}: {error}") from error
    remote = spec.get("remote") if isinstance(spec, dict) else None
    if not isinstance(remote, dict):
        raise SpecError(f"unable to deploy by spec {name!r}: remote: required field is missing")
    return remote


def _address(text: str | None) -> tuple[str, int] | None:
    """A host and a port; None for what was not given."""
    if text is None:
        return None
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise UsageError(f"unable to understand '--listen': want HOST:PORT, got {text!r}")
    return host, int(port)
