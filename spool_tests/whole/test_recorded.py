"""
The same specs give the same files as version 0.1 gave: names, modes, and bytes, but for what
differs from run to run and for fields that are new.

Knows: what 0.1 left, recorded once and never edited.  Must not know: this version's code.
"""

import json
import pathlib

import pytest

from spool_tests.support import recorded
from spool_tests.support.places import MAIN, ROOT

# 0.1 set CHAPERONE_COOKIE for a local program too; the kernel knows now what belongs to a run. What
# was there, what is there, and the bytes between.
COOKIES = {
    "env": ("CHAPERONE_COOKIE\n", "", 17),
    "env-alone": ("CHAPERONE_COOKIE=COOKIE\n", "CHAPERONE_COOKIE=mine\n", 28),
}
# 0.1 did not know the request `renew`.
REQUESTS = ("signal NAME or kill\n", "signal NAME, kill or renew\n")
RUNS = json.loads(pathlib.Path(ROOT, "spool_tests", "data", "runs-of-0.1.json").read_text())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["spec"]["id"])
def test_run_leaves_the_files_that_it_left_in_version_0_1(spool, tmp_path, run):
    recorded.make_place(tmp_path)
    if "config" in run["spec"]:
        without_config(run)
    made = recorded.result(MAIN, tmp_path, spool, run)
    run_id = run["spec"]["id"]
    if run_id in COOKIES:
        without_cookie(run["files"], run_id, *COOKIES[run_id])
    if run["control"] and "nonsense" in run["control"]:
        refusal = run["files"][f"{run_id}/log"]
        assert refusal["text"].endswith(REQUESTS[0])
        refusal["text"] = refusal["text"].replace(*REQUESTS)
    assert made["exit"] == run["exit"]
    assert made["files"].keys() == run["files"].keys()
    for name, told in run["files"].items():
        assert recorded.known(made["files"][name], told) == told, name


def without_config(run):
    """0.1 took anything for `config`, and wrote into the log that it did nothing with it."""
    run_id = run["spec"]["id"]
    config = run["spec"].pop("config")
    assert list(config) == ["timeout", "a"]
    assert run["files"].pop(f"{run_id}/log")["text"].endswith("nothing is posted yet\n")
    spec = run["files"][f"{run_id}/spec.json"]["text"]
    spec[[name for name, _ in spec].index("config")] = ["config", None]


def without_cookie(files, run_id, before, now, fewer):
    stdout = files[f"{run_id}/stdout"]
    assert stdout["text"].count(before) == 1
    stdout["text"] = stdout["text"].replace(before, now)
    (counts,) = [
        value for name, value in files[f"{run_id}/status.json"]["text"] if name == "stdout"
    ]
    counts[0][1] -= fewer
