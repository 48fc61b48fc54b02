"""
schemathesis asks an agent what its OpenAPI document describes, and compares the answers with it.
"""

import pathlib
import subprocess
import sys

import pytest

from chaperone import Spool
from spool_tests.support.agents import TOKENS, served
from spool_tests.support.waiting import absent

CHECKS = (
    "not_a_server_error,content_type_conformance,response_schema_conformance,"
    "status_code_conformance,ignored_auth"
)
# The run is there and has ended, so nothing that is generated is started.
PARAMETERS = '[parameters]\nspool = "etl"\nrun_id = "r"\nstream = "stdout"\n'


@pytest.mark.tier("agents")
@pytest.mark.parametrize("right", TOKENS)
def test_answers_are_as_the_document_says(tmp_path, right):
    tool = pathlib.Path(sys.executable).with_name("schemathesis")
    if not tool.exists():
        absent("needs schemathesis: bin/test --long agents")
    config = tmp_path / "schemathesis.toml"
    config.write_text(PARAMETERS)
    with served(tmp_path) as agent:
        run = Spool(agent.spool).start({"id": "r", "program": {"argv": ["/bin/echo", "hi"]}})
        run.wait()
        words = [tool, "--config-file", config, "run", f"{agent.api}/openapi.json"]
        words += ["--tls-verify", agent.ca, "-H", f"Authorization: Bearer {TOKENS[right]}"]
        words += ["--phases", "coverage,fuzzing", "--max-examples", "50", "--checks", CHECKS]
        # A stream of events has no end, and a run that is deleted could be started again.
        words += ["--exclude-method", "DELETE", "--exclude-path-regex", "events$", "--no-color"]
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, timeout=900, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
        assert run.status().return_code == 0
