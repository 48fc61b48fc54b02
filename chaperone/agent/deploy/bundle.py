"""
What an agent needs on a host that has nothing but Python: the package, and the packages that it
imports, in one zip file.

Knows: files, installed distributions.  Must not know: how it is sent, what is done with it there.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator
from importlib import metadata

import attrs

from ...errors import AgentError
from ...launch.process import PACKAGE

# What setup.py requires, with its extra `agent`.
DISTRIBUTIONS = ("attrs", "filelock", "inotify-simple", "starlette", "hypercorn", "httpx")
# What these import before a minor version of Python: the other host may have an older one.
FOR_OLD_PYTHONS = {"exceptiongroup": 11, "taskgroup": 11, "tomli": 11, "typing-extensions": 13}
SUFFIXES = (".py", ".pem")  # nothing compiled: the other host may be of another kind
# Modules of theirs that nothing of ours imports, and that import what is not sent.
UNUSED = ("anyio/_backends/_trio.py", "anyio/pytest_plugin.py", "hypercorn/trio/")


@attrs.frozen(kw_only=True)
class Bundle:
    """
    A zip file.

    Attributes:
        data (bytes): Of the file.
        digest (str): Sixteen hexadecimal digits of its contents; the same for the same files.
        lacks (dict): Those of `FOR_OLD_PYTHONS` that are not installed here.
    """

    data: bytes = attrs.field(repr=False)
    digest: str
    lacks: dict[str, int]


def bundle() -> Bundle:
    """
    Pack the package and what it needs.

    Raises:
        AgentError: If a package that it needs is not installed here.
    """
    others, lacks = _of_others()
    names = {**others, **_of_package()}
    digest = hashlib.sha256()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(names):
            with open(names[name], "rb") as source:
                data = source.read()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return Bundle(data=file.getvalue(), digest=digest.hexdigest()[:16], lacks=lacks)


def _of_package() -> dict[str, str]:
    """Each file of this package: its name in the zip file, and its path."""
    found = {}
    for directory, below, files in os.walk(PACKAGE):
        below[:] = [name for name in below if name != "__pycache__"]
        for name in files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, os.path.dirname(PACKAGE))] = path
    return found


def _of_others() -> tuple[dict[str, str], dict[str, int]]:
    """The same for all that it needs, and for what that needs; and as `Bundle.lacks`."""
    found: dict[str, str] = {}
    lacks: dict[str, int] = {}
    seen: set[str] = set()
    wanted = list(DISTRIBUTIONS)
    optional = list(FOR_OLD_PYTHONS)
    while wanted or optional:
        is_required = bool(wanted)
        name = (wanted or optional).pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            if not is_required:
                lacks.update({name: FOR_OLD_PYTHONS[name]} if name in FOR_OLD_PYTHONS else {})
                continue
            raise AgentError(
                f"unable to deploy an agent: the package {name} is required here"
                " (pip install 'chaperone-spool[agent]')"
            ) from error
        found.update(_files(distribution))
        for requirement, has_marker in _requirements(distribution):
            (optional if has_marker else wanted).append(requirement)
    return found, lacks


def _files(distribution: metadata.Distribution) -> Iterator[tuple[str, str]]:
    for file in distribution.files or ():
        name = file.as_posix()
        is_outside = name.startswith(("..", "/"))
        if name.endswith(SUFFIXES) and not is_outside and not name.startswith(UNUSED):
            yield name, str(file.locate())


def _requirements(distribution: metadata.Distribution) -> Iterator[tuple[str, bool]]:
    """What a distribution requires without an extra, and whether it does so on some hosts alone."""
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
        if name and "extra" not in marker:
            yield re.sub(r"[-_.]+", "-", name[0]).lower(), bool(marker.strip())
