"""
The JSON objects of a spec and of a status, for type checkers.

Knows: which fields there are, and their types.  Must not know: what a field means: docs/spec.rst
and docs/spool-format.rst say it.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

# -- a spec, as a scheduler writes it: what is not given has a default


class SpecStdin(TypedDict):
    """A file as stdin."""

    file: str


class SpecProgram(TypedDict, total=False):
    """What to run: `argv` or `command`."""

    argv: list[str]
    command: str
    cwd: str | None
    env: dict[str, str]
    inherit_env: bool | list[str]
    stdin: str | SpecStdin | None
    umask: str | None
    rlimits: dict[str, Any]
    merge_stderr: bool


class _SpecSshHost(TypedDict):
    host: str


class SpecSsh(_SpecSshHost, total=False):
    """A hop to a host."""

    user: str | None
    port: int | None
    options: dict[str, Any] | None


class SpecSudo(TypedDict):
    """A hop to a user."""

    user: str


class SpecExec(TypedDict):
    """A hop by any command."""

    argv: list[str]


class SpecSrun(TypedDict, total=False):
    """A hop into a job of Slurm."""

    partition: str | None
    account: str | None
    time: str | None
    memory: str | None
    cpus: int | None
    gpus: int | str | None
    options: dict[str, Any] | None


class SpecContainer(TypedDict, total=False):
    """A hop into a container, of Docker or of Podman."""

    container: str | None
    image: str | None
    user: str | None
    workdir: str | None


class SpecHop(TypedDict, total=False):
    """A hop: exactly one of these."""

    ssh: SpecSsh
    sudo: SpecSudo
    srun: SpecSrun
    docker: SpecContainer
    podman: SpecContainer
    exec: SpecExec


class SpecRemote(TypedDict, total=False):
    """Where to run it: `host` and its kin, or `hops`."""

    host: str | None
    user: str | None
    port: int | None
    mode: Literal["ssh-as", "sudo-then-ssh", "ssh-then-sudo", "sudo"] | None
    options: dict[str, Any] | None
    hops: list[SpecHop] | None
    supervise: bool
    share: bool | None
    remote_dir: str | None


class SpecStop(TypedDict, total=False):
    """How it is stopped."""

    signal: str
    grace_period: float
    to: Literal["all", "program"]


class SpecTimeouts(TypedDict, total=False):
    """Limits of time, in seconds."""

    connect: float
    run: float | None
    idle: float | None


class SpecOutput(TypedDict, total=False):
    """What is kept of its output."""

    through: Literal["pipe", "file"]
    max_bytes: int | None
    on_full: Literal["drop", "stop"]
    timeline: bool


class _SpecCallbackUrl(TypedDict):
    url: str


class SpecCallback(_SpecCallbackUrl, total=False):
    """Where an agent posts the run: one of `token` and `token_file`."""

    method: Literal["POST", "GET"]
    token: str | None
    token_file: str | None
    ca: str | None


class SpecConfig(TypedDict, total=False):
    """How it posts: seconds and bytes."""

    retry_frequency: float
    timeout: float
    output_buffer: int
    output_latency: float


class _SpecRequired(TypedDict):
    program: SpecProgram


class SpecDict(_SpecRequired, total=False):
    """A spec as a JSON object, for annotations: a type checker then finds wrong fields."""

    id: str | None
    remote: SpecRemote | None
    on_disconnect: Literal["kill", "survive"]
    lease: float | None
    renew: float | None
    leftovers: Literal["stop", "leave"]
    stop: SpecStop
    timeouts: SpecTimeouts
    output: SpecOutput
    durable: bool
    keep_secrets: bool
    callback: SpecCallback | None
    config: SpecConfig | None
    labels: dict[str, str]


# -- a status, as a reader gets it: every field is there


class StatusProgram(TypedDict):
    """The program, without secrets."""

    argv: list[str] | None
    cwd: str | None
    env: list[str]


class _StatusConnected(TypedDict):
    argv: list[str] | None
    pid: int | None
    drops: int | None
    state: str | None
    since: str | None


class StatusConnection(_StatusConnected, total=False):
    """The connection to the far side; a `message` says why it waits, or is down."""

    message: str


class StatusException(TypedDict):
    """Why a run is an error or lost."""

    stage: str | None
    type: str | None
    errno: int | None
    message: str | None


class StatusRusage(TypedDict, total=False):
    """What the program used: times in seconds, `maxrss` in bytes, and counts."""

    utime: float | None
    stime: float | None
    maxrss: int | None
    minflt: int | None
    majflt: int | None
    inblock: int | None
    oublock: int | None
    nvcsw: int | None
    nivcsw: int | None


class StatusStop(TypedDict):
    """Who stopped it, and why."""

    signal: str | None
    reason: str | None
    by: str | None
    time: str | None


class StatusCounts(TypedDict):
    """The size of a stream, in bytes."""

    bytes: int | None
    dropped: int | None


class StatusDict(TypedDict):
    """A status as a JSON object: `Status.raw`, and what the verbs print."""

    version: int
    run_id: str
    state: str
    program: StatusProgram
    labels: dict[str, Any]
    chaperone_pid: int | None
    guard_pid: int | None
    chaperone_host: str | None
    boot_id: str | None
    pid: int | None
    connection: StatusConnection | None
    exception: StatusException | None
    status: int | None
    return_code: int | None
    signal: str | None
    core_dump: bool
    oom: bool | None
    rusage: StatusRusage | None
    stop: StatusStop | None
    started: bool | None
    complete: bool
    ambiguous: bool
    gone_by: str | None
    leftovers: int | None
    tracking: str | None
    stdout: StatusCounts
    stderr: StatusCounts
    create_time: str | None
    start_time: str | None
    end_time: str | None
    elapsed: float | None
