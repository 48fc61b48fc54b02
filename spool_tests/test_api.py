"""
The public names as a caller sees them: which spool `chaperone.Spool` is.
"""

import pickle

import chaperone
from chaperone import api


def test_spool_of_a_path_is_one_on_this_host(spool):
    for place in (str(spool), spool):
        found = chaperone.Spool(place)
        assert isinstance(found, chaperone.Spool) and isinstance(found, api.Spool)
        assert isinstance(found, chaperone.SpoolLike)
        assert (found.path, repr(found)) == (str(spool), f"Spool({str(spool)!r})")
    assert chaperone.Spool(path="https:").path.endswith("/https:")
    assert not isinstance(str(spool), chaperone.SpoolLike)


def test_spool_can_be_sent_to_another_process(spool):
    sent = pickle.loads(pickle.dumps(chaperone.Spool(spool)))
    assert isinstance(sent, chaperone.Spool) and sent.path == str(spool)


def test_spool_can_be_derived_from(spool):
    class Mine(chaperone.Spool):
        def __init__(self, path, name):
            super().__init__(path)
            self.name = name

    assert (Mine(spool, "etl").path, Mine(spool, "etl").name) == (str(spool), "etl")
