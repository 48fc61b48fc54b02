"""
Starts a run from a scheduler: with a chaperone of its own, which the scheduler need not wait for.

Knows: specs, what must not happen in a scheduler's process.  Must not know: how a program is held,
or a file name.
"""

from __future__ import annotations

import errno
import os

from ..errors import ChaperoneError, RunExistsError, SpecError, SpoolError
from ..hold.begin import new_id
from ..model import checks, jsontext
from ..model import spec as specs
from ..program.fds import above_stderr, contents
from ..program.spawn import encoded
from ..spool import look
from .process import KEY_MARK, run_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..types import SpecDict


def start(
    spool_path: str,
    spec: SpecDict | dict[str, Any],
    warm: bool = False,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    key: str | None = None,
) -> str:
    """
    Start a chaperone for a run, which goes on by itself. The cost does not grow with the memory of
    the scheduler.

    Args:
        spool_path (str): Made if it is missing.
        spec (dict): As in docs/spec.rst; not changed.
        warm (bool): Use the spool's launcher, and start it if there is none; start cold if that
            does not work.
        env (dict): The environment that the program inherits, as text; None for that of this
            process.
        cwd (str): The directory for relative paths of the spec; None for that of this process.
        key (str): Of the run, 32 hexadecimal digits: a run with this id and this key is the one to
            be started, so that a start can be repeated. None for a new key.
    Returns:
        str: The run id; the run directory is visible.
    Raises:
        SpecError: If the spec is invalid.
        RunExistsError: If there is a run with that id, and not with that key.
        SpoolError: If the run directory can't be created.
        ChaperoneError: If no chaperone could be started.
    """
    cwd = os.getcwd() if cwd is None else os.path.abspath(cwd)
    try:
        canonical = specs.checked(spec, cwd)  # and so it means the same wherever it is read
        run_id = str(canonical["id"] or new_id())
        text = jsontext.dumps({**canonical, "id": run_id}).encode()
        environ = _environment(env)
    except (ValueError, TypeError) as error:
        raise SpecError(f"unable to start a run: {error}") from error
    path = os.path.join(cwd, spool_path)

    def cold() -> None:
        try:
            _start_cold(path, run_id, text, environ, key)
        except RunExistsError:
            if key is None or look.key_at(path, run_id) != key:
                raise

    if warm:
        from . import client

        # A launcher that is started inside of a run would die with that run, and runs must not.
        on_demand = b"CHAPERONE_RUN_ID" not in os.environb
        given = {"env": client.decoded(environ), "umask": _umask()}
        client.start_warm(path, run_id, text, given, cold, on_demand, key)
    else:
        cold()
    return run_id


def _environment(env: dict[str, str] | None) -> dict[bytes, bytes]:
    """
    What the program inherits, in UTF-8 whatever the locale.

    Raises:
        SpecError: If execve(2) could not pass it on.
    """
    if env is None:
        return dict(os.environb)
    for name in checks.object_of_strings(env, "env"):
        if not name or "=" in name:
            checks.fail(checks.at("env", name), "a non-empty name without '='", name)
    return {encoded(name): encoded(value) for name, value in env.items()}


def _umask() -> int:
    """Our umask; read from /proc, because umask(2) would change it for other threads."""
    try:
        found = contents("/proc/self/status").partition(b"\nUmask:")[2].split(None, 1)
        return int(found[0], 8)
    except (OSError, LookupError):
        umask = os.umask(0o077)
        os.umask(umask)
        return umask


def _start_cold(
    path: str, run_id: str, text: bytes, env: dict[bytes, bytes], key: str | None
) -> None:
    """
    Run `chaperone run --detach` with the spec on its stdin, and the key behind it. Its streams are
    files in memory: a pipe would need a reader meanwhile.
    """
    files = [above_stderr(os.memfd_create(name)) for name in ("spec", "stdout", "stderr")]
    try:
        os.pwrite(files[0], text if key is None else text + KEY_MARK + key.encode(), 0)
        code = run_command(["run", "--detach", "--spool", path, "-"], env, files)
        printed, said = (
            os.pread(fd, 1 << 16, 0).decode("utf-8", "surrogateescape") for fd in files[1:]
        )
    finally:
        for fd in files:
            os.close(fd)
    if printed.strip() != run_id:
        raise _failure(code, path, run_id, said.strip().removeprefix("chaperone: "))


def _failure(code: int | None, path: str, run_id: str, sentence: str) -> ChaperoneError:
    """The message of `chaperone run`, as the same error that it had there."""
    sentence = sentence or f"unable to start run {run_id!r}: its chaperone exited with code {code}"
    if code == os.EX_DATAERR:
        return SpecError(sentence)
    if code in (os.EX_CANTCREAT, None):
        return (
            RunExistsError(sentence, errno.EEXIST)
            if look.key_at(path, run_id) is not None
            else SpoolError(sentence)
        )
    return ChaperoneError(sentence)
