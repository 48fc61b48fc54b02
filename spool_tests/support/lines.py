"""
What tests of batches share.
"""

import json

import pytest


@pytest.fixture
def file(spool):
    return str(spool.parent / "cursor.json")


def objects(lines):
    return [json.loads(line) for line in lines]
