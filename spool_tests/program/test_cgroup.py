"""Which file counts the OOM kills of our cgroup: v1, v2, and where a part of the tree is shown."""

import pytest

from chaperone.program import cgroup
from spool_tests.support.cgroups import FAKES, fake


@pytest.mark.parametrize("kind", FAKES)
def test_file_that_counts_is_found(kind, tmp_path, monkeypatch):
    places, file = fake(tmp_path, kind)
    real = cgroup._lines
    monkeypatch.setattr(cgroup, "_lines", lambda path: real(places.get(path, path)))
    monkeypatch.setattr(cgroup, "ROOT", places["/sys/fs/cgroup"])
    assert cgroup.counter() == (str(file) if file else None)
    assert cgroup.oom_kills(cgroup.counter()) == (3 if file else None)
