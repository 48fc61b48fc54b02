"""
Each engine once for a worker, brought up when the first test asks for it.
"""

import os
import shutil

import pytest

from spool_tests.support import engines

WAYS = (
    "exec",
    "srun",
    "docker exec debian",
    "docker exec busybox",
    "docker run debian",
    "docker run busybox",
    "podman exec debian",
    "podman exec busybox",
    "podman run debian",
    "podman run busybox",
)


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """Where the images' files are: shared by all workers of one run."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "images"
    path.mkdir(exist_ok=True)
    return path


def started(kind, tmp_path_factory, *rest):
    directory = tmp_path_factory.mktemp(kind.__name__.lower())
    engine = kind(directory, *rest)
    try:
        engine.begin_all()
        yield engine
    finally:
        engine.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    yield from started(engines.Slurm, tmp_path_factory)


@pytest.fixture(scope="session")
def docker(tmp_path_factory, archives):
    yield from started(engines.Docker, tmp_path_factory, archives)


@pytest.fixture(scope="session")
def podman(tmp_path_factory, archives):
    yield from started(engines.Podman, tmp_path_factory, archives)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    made = engines.way_of(request.param, request)
    for name, value in made.engine.env.items() if made.engine else ():
        monkeypatch.setenv(name, value)
    return made
