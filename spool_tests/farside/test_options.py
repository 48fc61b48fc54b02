"""What a user's own ssh configuration, and the age of their client, change: nothing."""

import json
import shutil

import pytest

from chaperone.model.hops.remote import build_command
from spool_tests.support.far import held, log
from spool_tests.support.runs import sh, stdout

# Options of OpenSSH 8.7: each would take the far side's input or its command away.
BREAKING = ["StdinNull yes", "SessionType none", "ForkAfterAuthentication yes"]

CLIENT = """#!/bin/sh
# ssh with a configuration of ours, as if it were the user's.
exec {ssh} -F {config} "$@"
"""
OLD_CLIENT = """#!/bin/sh
# An ssh before 8.7, which ends at the first option that it does not know.
echo "$@" >>"$0.calls"
for word; do
  case $word in
  StdinNull=* | SessionType=* | ForkAfterAuthentication=*)
    name=$(echo "${{word%%=*}}" | tr A-Z a-z)
    echo "command-line: line 0: Bad configuration option: $name" >&2
    exit 255
    ;;
  esac
done
exec {ssh} "$@"
"""


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Put a script in ssh's place: client(text, **names) returns its path."""

    def put(text, **names):
        path = tmp_path / "bin" / "ssh"
        ssh = shutil.which("ssh")
        path.parent.mkdir()
        path.write_text(text.format(ssh=ssh, **names))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=":")
        return path

    return put


def configured(client, tmp_path, *lines):
    config = tmp_path / "config"
    config.write_text("".join(f"{line}\n" for line in lines))
    client(CLIENT, config=config)


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize("line", BREAKING)
def test_user_s_configuration_takes_nothing_from_the_far_side(
    spool, sshd, client, tmp_path, line, life
):
    configured(client, tmp_path, line)
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    status = held(spool, sshd, sh("cat; exit 7", stdin="in"), remote=remote, on_disconnect=life)
    assert (status["state"], status["return_code"], status["complete"]) == ("terminated", 7, True)
    assert stdout(spool) == b"in" and log(spool) == ""


@pytest.mark.parametrize("line", BREAKING)
def test_user_s_configuration_takes_nothing_from_an_unsupervised_program(
    spool, sshd, client, tmp_path, line
):
    configured(client, tmp_path, line)
    status = held(spool, sshd, sh("cat; exit 7", stdin="in"), remote=sshd.remote(supervise=False))
    assert (status["state"], status["return_code"]) == ("terminated", 7)
    assert stdout(spool) == b"in"


@pytest.mark.parametrize("supervise", [True, False])
def test_old_client_is_asked_again_without_the_options_that_it_refuses(
    spool, sshd, client, supervise
):
    path = client(OLD_CLIENT)
    status = held(spool, sshd, sh("exit 7"), remote=sshd.remote(supervise=supervise))
    assert (status["state"], status["return_code"]) == ("terminated", 7)
    assert "SessionType=default" not in status["connection"]["argv"]
    calls = path.with_name("ssh.calls").read_text().splitlines()
    assert ["StdinNull=no" in call for call in calls] == [True, False]
    assert [line.partition(" ")[2] for line in log(spool).splitlines()] == [
        "said before the program's own output: command-line: line 0:"
        " Bad configuration option: stdinnull",
        "connecting again, without what an old client does not know",
    ]


def test_option_of_the_user_that_a_client_refuses_is_an_error_at_once(spool, sshd, client):
    path = client(OLD_CLIENT)
    remote = sshd.remote(options={"StdinNull": "no"})
    status = held(spool, sshd, sh("exit 7"), remote=remote)
    assert (status["exception"]["stage"], status["exception"]["message"]) == (
        "usage",
        "unable to connect: command-line: line 0: Bad configuration option: stdinnull",
    )
    assert len(path.with_name("ssh.calls").read_text().splitlines()) == 2


def test_old_client_behind_another_hop_is_found_by_its_words(spool, sshd, client):
    client(OLD_CLIENT)
    remote = {"hops": [{"exec": {"argv": ["env"]}}, {"ssh": {**sshd.remote()}}]}
    assert held(spool, sshd, sh("exit 7"), remote=remote)["return_code"] == 7
    remote["supervise"] = False
    assert held(spool, sshd, sh("exit 7"), "bare", remote=remote)["return_code"] == 7
    remote["hops"][0] = {"ssh": {**sshd.remote()}}
    assert held(spool, sshd, sh("exit 7"), "two", remote=remote)["return_code"] == 7


def test_doctor_asks_an_old_client_again(chaperone, client, sshd):
    path = client(OLD_CLIENT)
    spec = {"program": {"argv": ["true"]}, "remote": sshd.remote()}
    said = chaperone("doctor", "--spec", "-", spec=spec).stdout
    assert "Bad configuration option" not in said and "ok  tracking: " in said
    assert len(path.with_name("ssh.calls").read_text().splitlines()) >= 2


def test_caller_s_own_argv_is_one_for_each_client():
    assert "SessionType" not in json.dumps(build_command("true", host="db3"))
