"""
An agent that serves the spools of a test, and a client that asks it.
"""

import pytest

from spool_tests.support.agents import served


@pytest.fixture
def agent(spool, tmp_path):
    with served(tmp_path) as agent:
        yield agent


@pytest.fixture
def client(agent):
    with agent.client() as client:
        yield client
