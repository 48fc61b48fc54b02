"""
Starting chaperones: by `chaperone run`, in this process or in children, and from a scheduler.

Knows: processes, exit codes.  Must not know: how a program is held, or a file name.
"""

from __future__ import annotations

import _signal
import fcntl
import os
import sys

from . import jsontext, spool
from . import spec as specs
from .errors import ChaperoneError, NoRunError, RunExistsError, SpecError, SpoolError
from .prologue import announce, checked, held, new_id, settle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .prologue import Visible

    Call = Callable[[Visible], int]

FORWARDED = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)


# -- `chaperone run`


def run(texts: list[tuple[str, bytes]], spool_path: str, run_id: str | None, detach: bool, cwd: str, visible: Visible = announce, warm: bool = False) -> int:
    """
    Make this process the chaperone of a run and stay to its end; of several runs, or where it can't be one, make children that do.

    In such a child it returns, or raises, as well: the caller exits with what comes, and does nothing else.

    Args:
        texts (list): Specs: (name for messages, JSON).
        spool_path (str): Made if it is not there; relative to `cwd`.
        run_id (str): Instead of the spec's; None for the spec's own, or a new one.
        detach (bool): Return when the run directory is visible.
        cwd (str): Absolute; relative paths of a spec start there.
        visible: Called with the run id in the moment when the run directory is there.
        warm (bool): Let the spool's launcher do it, if there is one, and return when the run directory is there.
    Returns:
        int: The exit code: of several the first that is not 0.
    Raises:
        SpecError: If a spec, or the id, can't be meant so; there is no run directory.
        RunExistsError, SpoolError: If the run directory can't be created.
    """
    if run_id is not None and len(texts) > 1:
        raise SpecError(f"unable to start {len(texts)} runs as {run_id!r}: an id names one run")
    inherited = settle()
    path = os.path.join(cwd, spool_path)

    def held_of(name: str, text: bytes) -> Call:
        if warm:
            return lambda tell: _asked(name, text, cwd, path, run_id, inherited, tell)
        return lambda tell: held(checked(name, text, cwd), path, run_id, inherited, tell)

    return _each([held_of(name, text) for name, text in texts], detach or warm, visible)


def adopt(spool_path: str, run_ids: list[str], detach: bool, visible: Visible = announce) -> int:
    """
    Make this process the chaperone of a run that outlived its own, as `run` does for a new one; of several, children.

    Args:
        spool_path (str): Absolute.
        run_ids (list): Of runs that are unattended.
        detach (bool): Return when their locks are taken.
        visible: Called with the run id when its lock is taken.
    Raises:
        SpoolError: If a run can't be taken over.
    """
    from . import adopt as adopting

    inherited = settle()

    def held_of(run_id: str) -> Call:
        return lambda tell: adopting.held(spool_path, run_id, inherited, tell)

    return _each([held_of(run_id) for run_id in run_ids], detach, visible)


def _each(calls: list[Call], detach: bool, visible: Visible) -> int:
    """Hold a run in this process; of several, or where it can't be held here, each in a child."""
    if not detach and len(calls) == 1 and not _leads_a_group():
        return calls[0](visible)
    children: list[tuple[int, int]] = []
    for call in calls:
        reading, telling = os.pipe()
        pid = os.fork()
        if not pid:
            for _, fd in (*children, (0, reading)):
                os.close(fd)
            return call(_both(visible, telling))
        os.close(telling)
        children.append((pid, reading))
    codes = visible_or_ended(children) if detach else _ended(children)
    return next((code for code in codes if code), os.EX_OK)


def _asked(name: str, text: bytes, cwd: str, path: str, run_id: str | None, inherited: dict[str, Any], visible: Visible) -> int:
    """Let the launcher hold it, or do so ourselves."""
    from . import launcher

    spec = checked(name, text, cwd)
    spec["id"] = run_id if run_id is not None else spec["id"] or new_id()
    given = {"env": dict(os.environ), "umask": inherited["umask"]}
    codes: list[int] = []
    request = jsontext.dumps(spec).encode()
    if launcher.started(path, spec["id"], request, given, lambda: codes.append(held(spec, path, None, inherited, visible)), on_demand=False):
        visible(spec["id"])
        return os.EX_OK
    return codes[0]


def _both(visible: Visible, telling: int) -> Visible:
    """Tell whoever waits for the run directory, and the process that made us."""

    def tell(run_id: str) -> None:
        visible(run_id)
        try:
            os.write(telling, b"\n")
        except OSError:  # it has gone; the run goes on
            pass
        os.close(telling)

    return tell


def _leads_a_group() -> bool:
    """Whether it is a job of an interactive shell: it may not make a session, and the shell waits for just this pid."""
    return os.getpgrp() == os.getpid() != os.getsid(0)


# -- the process that waits for its chaperones


def visible_or_ended(children: list[tuple[int, int]]) -> list[int]:
    """For each child 0 when its run is visible, else what it exited with."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    return [os.EX_OK if os.read(reading, 1) else _code(os.waitpid(pid, 0)[1]) for pid, reading in children]


def _ended(children: list[tuple[int, int]]) -> list[int]:
    """What each child exited with; what is asked of this process by a signal is asked of them."""
    living = {pid for pid, _ in children}

    def forward(number: int, frame: object) -> None:
        for pid in living:
            os.kill(pid, number)

    for number in FORWARDED:
        _signal.signal(number, forward)
    _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)  # as the chaperone itself: a terminal's death is not the run's
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    codes = []
    for pid, _ in children:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        living.discard(pid)  # before it is reaped: from then on the pid may be someone else's
        codes.append(_code(os.waitpid(pid, 0)[1]))
    return codes


def _code(wait_status: int) -> int:
    """As a shell tells it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


# -- the scheduler's side


def start(spool_path: str, spec: dict[str, Any], warm: bool = False, env: dict[str, str] | None = None, cwd: str | None = None) -> str:
    """
    Start a chaperone for a run and leave it to itself; it costs the same from a scheduler of any size.

    Args:
        spool_path (str): Made if it is not there.
        spec (dict): As in docs/spec.rst; left as it is.
        warm (bool): By the spool's launcher, which is started if there is none; cold if that does not work.
        env (dict): What the program inherits; None for ours.
        cwd (str): Where relative paths of the spec start; None for ours.
    Returns:
        str: The run id; the run directory is visible.
    Raises:
        SpecError: If the spec can't be meant so.
        RunExistsError: If there is a run of that id.
        SpoolError: If the run directory can't be created.
        ChaperoneError: If no chaperone could be started.
    """
    cwd = os.getcwd() if cwd is None else os.path.abspath(cwd)
    try:
        canonical = specs.checked(spec, cwd)  # and so it means the same wherever it is read
        run_id = str(canonical["id"] or new_id())
        text = jsontext.dumps({**canonical, "id": run_id}).encode()
    except (ValueError, TypeError) as error:
        raise SpecError(f"unable to start a run: {error}") from error
    path = os.path.join(cwd, spool_path)
    environ = dict(os.environ) if env is None else env

    def cold() -> None:
        _start_cold(path, run_id, text, environ)

    if warm:
        from . import launcher

        launcher.started(path, run_id, text, {"env": environ, "umask": _umask()}, cold, on_demand=True)
    else:
        cold()
    return run_id


def _umask() -> int:
    """Ours, looked up without changing it for other threads, where the kernel tells."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))
    except (OSError, StopIteration):
        umask = os.umask(0o077)
        os.umask(umask)
        return umask


def _start_cold(path: str, run_id: str, text: bytes, env: dict[str, str]) -> None:
    """By `chaperone run --detach`, the spec on its stdin. Files in memory, not pipes: nobody has to read them meanwhile."""
    files = [_memory_file(name) for name in ("spec", "stdout", "stderr")]
    try:
        os.pwrite(files[0], text, 0)
        code = spawned(["run", "--detach", "--spool", path, "-"], env, files)
        told, said = (os.pread(fd, 1 << 16, 0).decode("utf-8", "surrogateescape") for fd in files[1:])
    finally:
        for fd in files:
            os.close(fd)
    if told.strip() != run_id:
        raise _failure(code, path, run_id, said.strip().removeprefix("chaperone: "))


def _memory_file(name: str) -> int:
    """An fd that is none of 0, 1, 2, so that it can be moved there in any order."""
    fd = os.memfd_create(name)
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def spawned(words: list[str], env: dict[str, str], fds: list[int]) -> int | None:
    """
    Run the command `chaperone` to its end.

    posix_spawn, because a fork copies page tables: 41 ms for each GB of the scheduler's heap, while its loop stands still.

    Args:
        words (list): The command line after `chaperone`.
        fds (list): Its stdin, stdout and stderr; none of them is 0, 1 or 2.
    Returns:
        int: Its exit code, 128+n for a signal; None where the host takes its children's ends for itself (SIGCHLD ignored, say).
    """
    python = _interpreter()
    main = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    moves = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
    try:
        pid = os.posix_spawn(python, [python, "-I", "-S", main, *words], env, file_actions=moves)
    except OSError as error:
        raise ChaperoneError(f"unable to start a chaperone by {python!r}: {error.strerror}") from error
    try:
        return _code(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None
    except BaseException:  # a signal handler of the host raised; a zombie is not what it asked for, and it takes milliseconds
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        raise


def _interpreter() -> str:
    """The interpreter we run in. A program that embeds Python names itself there, and would be started in its place."""
    path = sys.executable
    if not path or not os.path.basename(path).startswith("python"):
        raise ChaperoneError(f"unable to start a chaperone: want a Python interpreter in sys.executable, got {path!r} (is Python embedded? set it)")
    return path


def _failure(code: int | None, path: str, run_id: str, sentence: str) -> ChaperoneError:
    """What `chaperone run` said, as the error that it was there."""
    sentence = sentence or f"unable to start run {run_id!r}: its chaperone ended with {code}"
    if code == os.EX_DATAERR:
        return SpecError(sentence)
    if code in (os.EX_CANTCREAT, None):
        return RunExistsError(sentence) if key_of(path, run_id) is not None else SpoolError(sentence)
    return ChaperoneError(sentence)


def key_of(path: str, run_id: str) -> str | None:
    """The random key of a run, "" where it can't be read; None if there is no such run, or no spool."""
    try:
        spool_fd = spool.open_spool(path)
    except SpoolError:
        return None
    try:
        run_fd = spool.open_run(spool_fd, run_id)
    except NoRunError:
        return None
    finally:
        os.close(spool_fd)
    try:
        return str(spool.read_spec(run_fd).get("key", ""))
    finally:
        os.close(run_fd)
