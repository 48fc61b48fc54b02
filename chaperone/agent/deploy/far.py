"""
What runs first on the host of an agent. `deploy` sends its text; that host has Python and nothing
of ours, so it imports the standard library alone.

Knows: the agent's directory, its locks, how it is started.  Must not know: this package.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import socket
import stat
import sys
import time
import zipfile
from typing import Any, NoReturn

CUT = 97  # the exit code for a text that was cut; nothing was done
DIGITS = 8  # the size before each counted part
READY_S = 60.0  # for the agent to listen: it compiles 400 modules first
LOG_BYTES = 2_000  # of the agent's last words, in a message

# The start of an agent: its code, and the descriptor with its settings.
AGENT = (
    "import sys; sys.path.append(sys.argv[1]);"
    " from chaperone.agent.deploy.hosted import main; main(int(sys.argv[2]))"
)


class Refused(Exception):
    """Nothing was started; the message says why."""


def counted() -> bytes:
    """The next part of what is sent; a part that was cut ends all, before anything is done."""
    digits = sys.stdin.buffer.read(DIGITS)
    size = int(digits) if len(digits) == DIGITS and digits.isdigit() else -1
    data = sys.stdin.buffer.read(size) if size >= 0 else b""
    if len(data) != size:
        os._exit(CUT)
    return data


def main() -> None:
    """Read all that is sent, then find the agent of this user and host, or start it."""
    settings = json.loads(counted())
    packed = counted()
    settings["umask"] = os.umask(0o077)
    try:
        answer = agent(settings, packed)
    except Refused as error:
        answer = {"error": str(error)}
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        answer = {"error": f"{where}{error.strerror}"}
    sys.stdout.write(f"\n{settings['word']} {json.dumps(answer)}\n")
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        sweep(directory(settings), settings)


def agent(settings: dict[str, Any], packed: bytes) -> dict[str, Any]:
    """What a client needs to reach the agent, and `found`: whether it ran already."""
    lacks = [name for name, minor in settings["lacks"].items() if sys.version_info < (3, minor)]
    if lacks:
        version = f"Python 3.{sys.version_info[1]}"
        mend = "pip install 'chaperone-spool[agent]' here"
        raise Refused(f"{version} there also needs {', '.join(sorted(lacks))} ({mend})")
    place = directory(settings)
    while True:
        make(place)
        with contextlib.ExitStack() as stack:
            # One at a time comes in or, as an agent that ends, goes out. It removes the directory:
            # then the one we have opened is no longer there.
            try:
                door_fd = locked(stack, f"{place}/.door", fcntl.LOCK_EX)
                if not is_at(door_fd, f"{place}/.door"):
                    continue
                lock_fd = locked(stack, f"{place}/.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            if lock_fd is not None:
                return {**start(settings, packed, place, lock_fd), "found": False}
            admit(place, settings["token"])
            return {**facts(place), "found": True}


def directory(settings: dict[str, Any]) -> str:
    """
    The directory of the agent of this user and this host; one home may be seen by many hosts.

    No variable but HOME takes part: others differ between a login and a sudo of one user.
    """
    home = os.environ.get("HOME") or ""
    if not home.startswith("/"):
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
    base = os.path.join(home, settings["directory"].removeprefix("~/"))
    host = os.uname().nodename.replace("/", "_") or "localhost"
    return f"{base}/agent-{host}{settings['suffix']}"


def make(place: str) -> None:
    """
    Make the directory and those above it.

    Raises:
        Refused: If another user can reach into it.
    """
    while True:
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
            found = os.lstat(place)
            break
        except FileNotFoundError:  # an agent that ends removes what it leaves empty
            continue
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise Refused(f"{place!r}: want a directory of this user alone")


def locked(stack: contextlib.ExitStack, path: str, how: int) -> int | None:
    """A descriptor that holds the lock of a file; None where another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return None
    return fd


def is_at(fd: int | None, path: str) -> bool:
    """Whether a path leads to the file of a descriptor."""
    try:
        return fd is not None and os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def admit(place: str, token: str) -> None:
    """
    Add a line to the tokens; the agent reads the file again when it has changed, and takes that for
    a sign of life of its clients.
    """
    path = f"{place}/.tokens"
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        lines = [line for line in file.read().splitlines() if line != token]
    with open(f"{path}.new", "w") as file:
        file.writelines(f"{line}\n" for line in [*lines, token])
    os.rename(f"{path}.new", path)


def facts(place: str) -> dict[str, Any]:
    """What the agent wrote for its clients when it began to listen."""
    end = time.monotonic() + READY_S
    while True:
        try:
            with open(f"{place}/.agent.json") as file:
                found: dict[str, Any] = json.load(file)
                return found
        except FileNotFoundError:  # what started it was killed meanwhile; no event comes of that
            if time.monotonic() > end:
                raise Refused(f"the agent at {place!r} does not listen") from None
            time.sleep(0.05)


# -- a new agent


def start(settings: dict[str, Any], packed: bytes, place: str, lock_fd: int) -> dict[str, Any]:
    """Unpack the code and start the agent, which keeps the lock; its facts when it listens."""
    clear(place)  # of an agent that was killed; its runs have in memory what they need
    above, name = os.path.split(place)
    for each in os.listdir(above):  # of one that was killed when it removed itself
        if each.startswith(f"{name}.gone-"):
            shutil.rmtree(f"{above}/{each}", ignore_errors=True)
    code = f"{place}/.code-{settings['digest']}"
    try:
        zipfile.ZipFile(io.BytesIO(packed)).extractall(code)
        admit(place, settings["token"])
        run(settings, place, code, lock_fd)
        return facts(place)
    except OSError as error:
        leave(place)
        raise Refused(f"unable to write to {place!r}: {error.strerror}") from error
    except Refused:
        leave(place)
        raise


def leave(place: str) -> None:
    """Remove all but runs that are there from before."""
    clear(place)
    with contextlib.suppress(OSError):  # it is not empty
        os.rmdir(f"{place}/spool")
    if not os.path.exists(f"{place}/spool"):
        shutil.rmtree(place)


def sweep(place: str, settings: dict[str, Any]) -> None:
    """Remove what agents for one run have left that were killed: no later one has their name."""
    above, name = os.path.split(place)
    first = f"{name.removesuffix(settings['suffix'])}."
    for other in os.listdir(above):
        path, suffix = f"{above}/{other}", other.removeprefix(first)
        # No other name: it may be an agent's of another host that sees the same home.
        if other == name or len(suffix) != 8 or set(suffix) - set("0123456789abcdef"):
            continue
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            locks = [
                locked(stack, f"{path}/{lock}", fcntl.LOCK_EX | fcntl.LOCK_NB)
                for lock in (".door", ".lock")
            ]
            if None in locks or is_needed(path, settings):
                continue
            gone = f"{path}.gone-{os.urandom(4).hex()}"
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def is_needed(place: str, settings: dict[str, Any]) -> bool:
    """Whether an agent that lives would stay: a run lives there, or it was asked not long ago."""
    live, ended = (listed(f"{place}/spool/{name}") for name in (".running", ".ended"))
    times = [
        os.stat(f"{place}/{name}").st_mtime for name in listed(place) if name in (".log", ".tokens")
    ]
    quiet_s = time.time() - max(times, default=0)
    return bool(live) or quiet_s < settings["lease_s" if ended else "idle_s"]


def listed(path: str) -> list[str]:
    """The names in a directory; none where there is no such directory."""
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def clear(place: str) -> None:
    """Remove all but the spool and the locks."""
    for name in os.listdir(place):
        path = f"{place}/{name}"
        if name.startswith(".code-"):
            shutil.rmtree(path)
        elif name not in ("spool", ".door", ".lock"):
            os.unlink(path)


def address(settings: dict[str, Any]) -> tuple[str, str | None]:
    """
    Where to listen, "" for everywhere; and the address of this host that clients can use, None if
    it is not known.

    An ssh session knows by which address of this host it came, and no other is needed.
    """
    came = (os.environ.get("SSH_CONNECTION") or "").split() if settings["ssh"] else []
    # With a % it is of one link alone, whose name is another on the other side.
    reached = came[2] if len(came) == 4 and "%" not in came[2] else None
    if settings["listen"] is not None:
        return settings["listen"][0], reached or outward()
    if reached is not None:
        return reached, reached
    return ("" if settings["ssh"] else "127.0.0.1"), None


def outward() -> str | None:
    """The address of this host, or this container, towards others; None if it has no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no host, RFC 5737; and nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def run(settings: dict[str, Any], place: str, code: str, lock_fd: int) -> None:
    """
    Start the agent in a session of its own, and wait until it listens.

    Raises:
        Refused: With its last words, if it does not.
    """
    host, told = address(settings)
    given = {name: settings[name] for name in ("idle_s", "lease_s", "single", "server_name", "pem")}
    given.update(place=place, host=host, port=(settings["listen"] or [0, 0])[1], address=told)
    reading, writing = os.pipe()
    given.update(lock_fd=lock_fd, ready_fd=writing)
    given["pem_fd"] = in_memory("pem", settings["pem"])
    given["key_fd"] = in_memory("key", settings["key"])  # on no disk
    settings_fd = in_memory("settings", json.dumps(given))
    kept = [settings_fd, *(given[name] for name in given if name.endswith("_fd"))]
    log = os.open(f"{place}/.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    pid = os.fork()
    if not pid:
        become(code, settings_fd, kept, log, settings["umask"])
    os.close(writing)
    ready = select.select([reading], [], [], READY_S)[0]
    if ready and os.read(reading, 1):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    with open(f"{place}/.log", errors="replace") as file:
        said = file.read()[-LOG_BYTES:].strip().splitlines()
    raise Refused(f"the agent did not start: {said[-1] if said else 'it said nothing'}")


def become(code: str, settings_fd: int, kept: list[int], log: int, umask: int) -> NoReturn:
    """Be the agent, with these descriptors, and none of the hop's."""
    try:
        os.setsid()
        os.umask(umask)  # what programs inherit
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number, fd in ((0, null), (1, null), (2, log)):
            os.dup2(fd, number)
        for fd in kept:
            os.set_inheritable(fd, True)
        os.chdir("/")
        python = sys.executable
        os.execv(python, [python, "-I", "-S", "-c", AGENT, code, str(settings_fd)])
    finally:
        os._exit(127)


def in_memory(name: str, text: str) -> int:
    """A descriptor of a file in memory with that text."""
    fd = os.memfd_create(name)
    with open(fd, "w", closefd=False) as file:
        file.write(text)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


if __name__ == "__main__":
    main()
