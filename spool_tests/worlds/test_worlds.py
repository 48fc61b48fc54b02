"""
Each world of the table, and in it the same short battery of checks, here and on a far side.

Knows: the table, the battery.  Must not know: what a world is made of.
"""

import pathlib
import shutil
import tempfile

import pytest

from spool_tests.support.battery import ALSO_FAR, CHECKS, FAR, NEAR, Battery
from spool_tests.support.world import Worlds
from spool_tests.worlds.table import WORLDS

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def worlds():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="chaperone-worlds-"))
    made = Worlds(directory)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def cells(worlds):
    """(world, check), far or not; the id is what the summary counts by."""
    found = []
    for world in worlds:
        near = [*NEAR, *world.more] if world.near else []
        far = [*FAR, *(name for name in world.more if name in ALSO_FAR)] if world.far else []
        checks = [(name, name) for name in near] + [(name, f"far_{name}") for name in far]
        for check in (check for name, check in checks if name not in world.but):
            found.append(pytest.param(world, check, id=f"{world.name}:{check}"))
    return found


@pytest.fixture
def here(worlds, world, check, spool):
    battery = Battery(world, worlds.get(world), spool, check.startswith("far_"))
    try:
        yield battery
    finally:
        battery.close()


@pytest.mark.parametrize("world, check", cells(world for world in WORLDS if world.short))
def test_world_in_short(here, check):
    CHECKS[check.removeprefix("far_")](here)


@pytest.mark.tier("worlds")
@pytest.mark.parametrize("world, check", cells(WORLDS))
def test_world(here, check):
    CHECKS[check.removeprefix("far_")](here)
