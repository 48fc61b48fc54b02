"""
The hops that engines offer: a job of Slurm, a container of Docker or of Podman.

Knows: the words of srun, docker and podman.  Must not know: files, processes, what the command
does.
"""

from __future__ import annotations

from ...errors import SpecError
from .. import checks
from .kinds import Kind, name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .kinds import Table


_count = checks.Number(1, whole=True)


def _gpus(value: Any, path: str) -> Any:
    return name(value, path) if isinstance(value, str) else _count(value, path)


# What the far side's text relies on: one process, and its three streams as they are.
OURS = ("ntasks", "unbuffered", "input", "output", "error", "label", "pty", "multi-prog")


def _options(value: Any, path: str) -> dict[str, Any]:
    """
    Long options of srun(1) without their dashes: the value a text, a number, true for one that
    takes none (false leaves it out), or a list for one that may stand several times.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        checks.fail(path, "an object of srun options", value)
    for option, given in value.items():
        if not option.isascii() or not option.replace("-", "").isalnum() or option.startswith("-"):
            checks.fail(path, "names of long options without '--'", option)
        if option in OURS:
            checks.fail(
                path, "options that don't change the streams or the number of tasks", option
            )
        for one in given if isinstance(given, list) else [given]:
            if not isinstance(one, (str, int, float)) or "\0" in str(one):
                checks.fail(f"{path}.{option}", "a text, a number, true or false", given)
            checks.bytes_or_text(str(one), f"{path}.{option}")
    return dict(value)


class Srun(Kind):
    """
    A job of Slurm, one task on one node. When srun is killed, Slurm ends the step and all that is
    in it.
    """

    table: Table = {
        "partition": (checks.OrNull(name), None),
        "account": (checks.OrNull(name), None),
        "time": (checks.OrNull(name), None),
        "memory": (checks.OrNull(name), None),
        "cpus": (checks.OrNull(_count), None),
        "gpus": (checks.OrNull(_gpus), None),
        "options": (_options, checks.OBJECT),
    }
    may_be_killed = True
    dies_with_client = "srun, because the job step ends when srun ends"
    early_codes = (1,)
    refusals = (
        ("auth", ("Access/permission denied", "User's group not permitted", "Invalid account")),
        (
            "usage",
            (
                "Unable to allocate resources: Invalid",
                "Requested node configuration is not available",
                "unrecognized option",
                "Invalid --",
                "invalid partition specified",
            ),
        ),
        ("connect", ("has been revoked", "Job has been cancelled")),
    )
    queueing = ("queued and waiting for resources",)
    queued = ("has been allocated resources",)

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """srun, its resources, the user's options, ours: the last one counts."""
        fields = self.fields
        words = [
            f"--{option}={fields[field]}"
            for field, option in (
                ("partition", "partition"),
                ("account", "account"),
                ("time", "time"),
                ("memory", "mem"),
                ("cpus", "cpus-per-task"),
                ("gpus", "gpus"),
            )
            if fields[field] is not None
        ]
        for option, given in fields["options"].items():
            for one in given if isinstance(given, list) else [given]:
                if one is not False:
                    words.append(f"--{option}" if one is True else f"--{option}={one}")
        return ["srun", *words, "--nodes=1", "--ntasks=1", "--unbuffered", "--", *argv]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Slurm chooses the node; the user stays."""
        partition = self.fields["partition"]
        return "in a Slurm job" + (f" of {partition}" if partition else ""), user


def _directory(value: Any, path: str) -> str:
    if not checks.text(value, path).startswith("/"):
        checks.fail(path, "an absolute path", value)
    return str(value)


def _image(value: Any, path: str) -> str:
    """A reference such as `registry:5000/team/etl:3@sha256:...`."""
    if not isinstance(value, str) or not value or value.startswith("-") or not value.isprintable():
        checks.fail(path, "an image that does not begin with '-'", value)
    if " " in value:
        checks.fail(path, "an image without white space", value)
    return value


class Container(Kind):
    """
    A container: one that is there, by `exec`, or a new one of an image for this run alone, which is
    removed at its end. When the client is killed, the end of its input reaches the far side.
    """

    table: Table = {
        "container": (checks.OrNull(name), None),
        "image": (checks.OrNull(_image), None),
        "user": (checks.OrNull(name), None),
        "workdir": (checks.OrNull(_directory), None),
    }
    may_be_killed = True
    early_codes = (1, 125, 126, 127, 255)
    refusals = (
        ("name", ("No such container", "no such container", "no container with name")),
        ("name", ("manifest unknown", "pull access denied", "repository does not exist")),
        ("name", ("no such host", "initializing source")),
        ("auth", ("permission denied while trying to connect",)),
        (
            "usage",
            ("chdir to cwd", "chdir to `", "unable to find user", "invalid reference format"),
        ),
        ("far-side", ("executable file not found", "executable file `/bin/sh` not found")),
    )
    queueing = ("Unable to find image", "Trying to pull")
    queued = ("Status: Downloaded", "Status: Image is up to date", "Writing manifest")
    program = ""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        if fields["container"] is None:
            client = f"{self.program} run"
            self.dies_with_client = f"{client}, because the container ends when {client} ends"

    @classmethod
    def checked(cls, value: Any, path: str) -> dict[str, Any]:
        """Exactly one of `container` and `image`."""
        fields = super().checked(value, path)
        if (fields["container"] is None) == (fields["image"] is None):
            got = "neither" if fields["image"] is None else "both"
            raise SpecError(f"{path}: want either container or image, got {got}")
        return fields

    def argv(self, argv: Sequence[str], log: str | None) -> list[str]:
        """`exec`, or `run` with the command in place of the image's entry point."""
        fields = self.fields
        chosen = ["--user", fields["user"]] if fields["user"] is not None else []
        chosen += ["--workdir", fields["workdir"]] if fields["workdir"] is not None else []
        if fields["container"] is not None:
            return [self.program, "exec", "--interactive", *chosen, fields["container"], *argv]
        words = [self.program, "run", "--rm", "--interactive", *chosen, "--entrypoint", argv[0]]
        return [*words, fields["image"], *argv[1:]]

    def leads(self, where: str, user: str) -> tuple[str, str]:
        """Into the container, as the user of its image if none is given."""
        fields = self.fields
        what = fields["container"] or f"of {fields['image']}"
        return f"in container {what}", fields["user"] or "whom the image names"


class Docker(Container):
    """A container of Docker."""

    program = "docker"


class Podman(Container):
    """A container of Podman."""

    program = "podman"
