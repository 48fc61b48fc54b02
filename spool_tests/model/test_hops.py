import json
import os
import subprocess

import pytest
from hypothesis import given, strategies

from chaperone.model import checks
from chaperone.model import spec as specs
from chaperone.model.hops import kinds
from chaperone.model.hops import remote as remotes
from chaperone.model.hops import route as routes
from chaperone.model.hops.route import Route
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, sh, start, stdout
from spool_tests.support.shells import path_of
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

WORDS = strategies.text(
    strategies.characters(blacklist_characters="\0", blacklist_categories=("Cs",))
)


def ssh(**fields):
    return {"ssh": {"host": "db3", "user": None, "port": None, "options": {}, **fields}}


KEYS = "'ssh' or 'sudo' or 'srun' or 'docker' or 'podman' or 'exec'"


@pytest.mark.parametrize(
    "remote, hops",
    [
        ({"host": "db3"}, [ssh()]),
        ({"host": "db3", "user": "etl", "port": 22}, [ssh(user="etl", port=22)]),
        (
            {"host": "db3", "user": "etl", "mode": "sudo-then-ssh"},
            [{"sudo": {"user": "etl"}}, ssh()],
        ),
        (
            {"host": "db3", "user": "etl", "mode": "ssh-then-sudo"},
            [ssh(), {"sudo": {"user": "etl"}}],
        ),
        ({"user": "etl", "mode": "sudo"}, [{"sudo": {"user": "etl"}}]),
        (
            {"hops": [{"ssh": {"host": "db3"}}, {"ssh": {"host": "db4", "port": 2}}]},
            [ssh(), ssh(host="db4", port=2)],
        ),
    ],
)
def test_hops_are_what_the_mode_means(remote, hops):
    assert remotes.hops(remote) == hops
    assert remotes.hops({"hops": hops}) == hops


@pytest.mark.parametrize(
    "remote, sentence",
    [
        ({}, "host: want a non-empty name that does not begin with '-', got null"),
        (
            {"host": "-oProxyCommand=x"},
            "host: want a non-empty name that does not begin with '-', got '-oProxyCommand=x'",
        ),
        (
            {"host": "a b"},
            "host: want a name without white space, quotes or shell characters, got 'a b'",
        ),
        (
            {"host": "a\0"},
            "host: want a name without white space, quotes or shell characters, got 'a\\x00'",
        ),
        (
            {"host": "a;b"},
            "host: want a name without white space, quotes or shell characters, got 'a;b'",
        ),
        ({"host": "a@b"}, "host: want a host's name without '@', got 'a@b'"),
        (
            {"host": "a", "user": "-u"},
            "user: want a non-empty name that does not begin with '-', got '-u'",
        ),
        ({"host": "a", "port": 0}, "port: want a port from 1 to 65535, got 0"),
        ({"host": "a", "port": True}, "port: want a port from 1 to 65535, got true"),
        (
            {"host": "a", "mode": "telnet"},
            "mode: want 'ssh-as' or 'sudo-then-ssh' or 'ssh-then-sudo' or 'sudo', got 'telnet'",
        ),
        (
            {"host": "a", "mode": "sudo", "user": "b"},
            "host: want none, because mode 'sudo' stays on this host, got 'a'",
        ),
        ({"mode": "sudo"}, "user: want a non-empty name that does not begin with '-', got null"),
        (
            {"mode": "sudo", "user": "b", "port": 0},
            "port: want none, because mode 'sudo' stays on this host, got 0",
        ),
        ({"host": "\ud800"}, "host: want a name that is valid UTF-8, got '\\ud800'"),
        (
            {"host": "\udc80😀"},
            "host: want a name that is valid UTF-8, got '\\udc80😀'",
        ),
        (
            {"host": "a", "options": {"X": "b\ud800"}},
            (
                "options.X: want text, or bytes as '\\udc80' to '\\udcff', "
                "got another surrogate at character 1"
            ),
        ),
        (
            {"hops": [{"exec": {"argv": [""]}}]},
            "hops[0].exec.argv[0]: want a non-empty string, got ''",
        ),
        (
            {"host": "a", "options": {"a b": 1}},
            "options: want option names of letters and digits, as in ssh_config, got 'a b'",
        ),
        (
            {"host": "a", "options": {"A": "x\ny"}},
            "options.A: want one line of text, a number, true or false, got 'x\\ny'",
        ),
        (
            {"host": "a", "hops": [{"ssh": {"host": "b"}}]},
            "host: want either hops or host, user, port, mode, options, got hops and host",
        ),
        ({"hops": []}, "hops: want a non-empty list of hops, got a list"),
        (
            {"hops": [{"telnet": {}}]},
            f"hops[0]: want an object with one key, {KEYS}, got 'telnet'",
        ),
        (
            {"hops": [{"ssh": {}, "sudo": {}}]},
            f"hops[0]: want an object with one key, {KEYS}, got 'ssh' and 'sudo'",
        ),
        (
            {"hops": ["db3"]},
            f"hops[0]: want an object with one key, {KEYS}, got 'db3'",
        ),
        ({"hops": [{"ssh": {}}]}, "hops[0].ssh.host: required field is missing"),
        (
            {"hops": [{"exec": {"argv": []}}]},
            "hops[0].exec.argv: want a non-empty list of strings, got an empty one",
        ),
        ({"hops": [{"ssh": "db3"}]}, "hops[0].ssh: want an object, got a string"),
        (
            {"hops": [{"ssh": {"host": "-x"}}]},
            "hops[0].ssh.host: want a non-empty name that does not begin with '-', got '-x'",
        ),
        (
            {"hops": [{"sudo": {"user": "a", "x": 1}}]},
            "hops[0].sudo.x: unknown field; want one of user",
        ),
        (
            {"speed": 1},
            "speed: unknown field; want one of hops, host, mode, options, port, user",
        ),
    ],
)
def test_a_wrong_remote_is_refused_in_one_sentence(remote, sentence):
    with pytest.raises(ValueError) as caught:
        remotes.hops(remote)
    assert str(caught.value) == sentence


def test_ssh_hop_keeps_what_must_be_before_and_what_may_differ_behind_the_users_options():
    options = {"ConnectTimeout": 3, "BatchMode": False, "SendEnv": ["A", "B"]}
    words = Route.of([ssh(user="etl", port=22, options=options)]).argv(["true"], "/log")
    options = [word for before, word in zip(words, words[1:], strict=False) if before == "-o"]
    assert words[:4] == ["ssh", "-T", "-E", "/log"]
    assert options.index("BatchMode=yes") < options.index("BatchMode=no")
    assert options.index("ConnectTimeout=3") < options.index("ConnectTimeout=15")
    assert {
        "SendEnv=A",
        "SendEnv=B",
        "ForwardAgent=no",
        "EscapeChar=none",
        "ServerAliveInterval=15",
    } <= set(options)
    assert words[-7:] == ["-p", "22", "-l", "etl", "--", "db3", "exec true"]


def test_hops_nest_nearest_first_and_only_the_first_gets_the_log():
    hops = [{"sudo": {"user": "u"}}, ssh(), {"sudo": {"user": "v"}}]
    words = Route.of(hops).argv(["id", "-u n"], log="/log")
    assert words[:7] == ["sudo", "-n", "-H", "-u", "u", "--", "ssh"]
    assert "-E" not in words
    assert words[-3:] == ["--", "db3", "exec sudo -n -H -u v -- id '-u n'"]
    assert Route.of([]).argv(["a", "b"]) == ["a", "b"]


def test_route_is_known_by_its_hops():
    sudo = {"sudo": {"user": "v"}}
    here, over, up, both = (
        Route.of(hops) for hops in ([], [ssh(port=2)], [sudo], [sudo, ssh(user="etl")])
    )
    assert [one.place("me") for one in (here, over, up, both)] == [
        "here, as me",
        "on db3, as whom ssh makes us",
        "here, as v",
        "on db3, as etl",
    ]
    assert [one.may_be_killed for one in (here, over, up, both)] == [False, True, False, False]
    assert [one.own_codes for one in (here, over, up, both)] == [(), (255,), (), (255,)]
    assert [one.slot_name for one in (here, over, up, both)] == [None, "db3,2", None, "db3,"]
    assert [one.farewell is None for one in (here, over, up, both)] == [True, False, True, True]
    assert [one.announcing("w") is None for one in (here, over, up, both)] == [
        True,
        False,
        True,
        True,
    ]
    assert "LocalCommand=echo w >&2" in over.announcing("w").argv(["true"])
    assert over.announcing("w").slot_name == "db3,2"


@pytest.mark.parametrize(
    "hops, words, refusal",
    [
        ([ssh()], "Host key verification failed.", ("host-key", False)),
        ([ssh()], "etl@db3: Permission denied (publickey).", ("auth", False)),
        ([ssh()], "Could not resolve hostname db3: Name or service not known", ("name", False)),
        (
            [ssh()],
            "Could not resolve hostname db3: Temporary failure in name resolution",
            ("name", True),
        ),
        ([ssh()], "Connection refused", (None, True)),
        ([ssh()], "sudo: a password is required", (None, True)),
        ([ssh(), {"sudo": {"user": "v"}}], "sudo: a password is required", ("auth", False)),
        ([], "Permission denied", (None, True)),
    ],
)
def test_words_of_the_hops_mean_a_stage(hops, words, refusal):
    assert Route.of(hops).refusal(words) == refusal


def test_prefix_is_a_hop_as_it_is():
    hops = [{"exec": {"argv": ["unshare", "-n"]}}, ssh(), {"exec": {"argv": ["a b", "'"]}}]
    route = Route.of(hops)
    words = route.argv(["id", "-u"], "/log")
    assert words[:3] == ["unshare", "-n", "ssh"] and "/log" not in words
    assert words[-1] == "exec 'a b' \"'\" id -u"
    assert [Route.of(hops[:count]).place("me") for count in range(4)] == [
        "here, as me",
        "here, behind unshare, as whom unshare makes us",
        "on db3, as whom ssh makes us",
        "on db3, behind 'a b', as whom 'a b' makes us",
    ]
    assert (route.may_be_killed, route.farewell, route.slot_name) == (False, None, "db3,")


PREFIXES = {
    "env": ["env", "HOP=there"],
    "setpriv": ["setpriv", "--no-new-privs"],
    "unshare": ["unshare", "--net", "--uts"],
    "chroot": ["chroot", "/"],
    "nsenter": ["nsenter", "--net=/proc/self/ns/net"],
}


@pytest.mark.parametrize(
    "name, prefix",
    [
        pytest.param(name, prefix, marks=[pytest.mark.root] if name in list(PREFIXES)[2:] else [])
        for name, prefix in PREFIXES.items()
    ],
    ids=PREFIXES,
)
@pytest.mark.parametrize("behind", ["alone", "behind ssh"])
def test_program_behind_a_prefix_is_recorded(spool, sshd, name, prefix, behind):
    hops = [{"exec": {"argv": prefix}}]
    if behind == "behind ssh":
        hops.insert(0, {"ssh": sshd.remote()})
    script = 'echo "$HOP"; cat; readlink /proc/self/ns/net; echo err >&2; kill -HUP $$'
    chaperone = start(spool, sh(script, stdin="in\n"), remote={"hops": hops})
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["ambiguous"], status["leftovers"]) == (
        "terminated",
        "SIGHUP",
        False,
        0,
    ), (status, (spool / "r" / "log").read_text())
    hop, line, net = stdout(spool).decode().splitlines()
    assert (hop, line) == ("there" if name == "env" else "", "in")
    assert (net == os.readlink("/proc/self/ns/net")) is (name != "unshare")
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"


@pytest.mark.parametrize("behind", ["alone", "behind ssh"])
def test_stop_reaches_a_program_behind_a_prefix(spool, sshd, chaperone, behind):
    hops = [{"exec": {"argv": ["env", "HOP=there"]}}]
    if behind == "behind ssh":
        hops.insert(0, {"ssh": sshd.remote()})
    script = "trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.05; done"
    process = start(spool, sh(script), remote={"hops": hops}, stop={"grace_period": 0.4})
    until(lambda: stdout(spool) == b"up\n")
    assert chaperone("stop", "r").returncode == 0
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["complete"]) == (
        "terminated",
        "SIGKILL",
        True,
    )
    key = json.loads((spool / "r" / "spec.json").read_text())["key"]
    assert processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode()) == {}


def test_run_behind_a_prefix_ends_with_its_chaperone(spool):
    hops = [{"exec": {"argv": ["env", "HOP=there"]}}]
    process = start(spool, sh("echo up; exec sleep 1000"), remote={"hops": hops})
    until(lambda: stdout(spool) == b"up\n")
    key = json.loads((spool / "r" / "spec.json").read_text())["key"]
    assert processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode())
    process.kill()
    process.wait()
    until(lambda: processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode()) == {})


def test_run_survives_behind_a_prefix(spool, chaperone, tmp_path):
    hops = [{"exec": {"argv": ["env", f"HOME={tmp_path}"]}}]
    script = f"echo up; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 3"
    process = start(spool, sh(script), remote={"hops": hops}, on_disconnect="survive")
    until(lambda: stdout(spool) == b"up\n")
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    assert chaperone("adopt", "r").returncode == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == ("terminated", 3, True)


def test_prefix_that_can_not_be_run_is_an_error(spool):
    for run_id, prefix, message in (
        ("none", "/no/such", "unable to run '/no/such': No such file or directory"),
        (
            "false",
            "false",
            "unable to reach a shell on the far side: the last hop's login ended with code 1",
        ),
    ):
        remote = {"hops": [{"exec": {"argv": [prefix]}}]}
        assert start(spool, sh("exit 0"), run_id, remote=remote).wait(60) == 0
        status = final(spool, run_id)
        assert (status["state"], status["started"], status["exception"]["message"]) == (
            "error",
            False,
            message,
        )


class Job(kinds.Kind):
    """A kind that differs from the others in all that a kind may say."""

    table = {"job": (checks.text, checks.REQUIRED)}
    dies_with_client = "job, which is short-lived"

    def argv(self, argv, log):
        return ["enter", self.fields["job"], *argv]

    def leads(self, where, user):
        return f"in job {self.fields['job']}", user


def test_further_kind_is_one_class(monkeypatch):
    monkeypatch.setitem(routes.KINDS, "job", Job)
    remote = {"hops": [{"ssh": {"host": "db3"}}, {"job": {"job": "7"}}]}
    spec = {"program": {"argv": ["true"]}, "remote": remote}
    hops = specs.checked(spec, "/")["remote"]["hops"]
    assert hops == [ssh(), {"job": {"job": "7"}}]
    route = Route.of(hops)
    assert route.argv(["a b"])[-1] == "exec enter 7 'a b'"
    assert route.place("me") == "in job 7, as whom ssh makes us"
    assert route.dies_with_client == "job, which is short-lived"
    with pytest.raises(ValueError) as caught:
        specs.checked({**spec, "on_disconnect": "survive"}, "/")
    assert str(caught.value) == (
        "on_disconnect: want 'kill' behind job, which is short-lived, got 'survive'"
    )


def test_build_program_and_build_command_make_argv_only():
    assert remotes.build_program(["ls", "a b", "it's", ""]) == "exec ls 'a b' 'it'\"'\"'s' ''"
    assert remotes.build_command("exec ls") == ["/bin/sh", "-c", "exec ls"]
    assert remotes.build_command("exec ls", user="etl") == [
        "sudo",
        "-n",
        "-H",
        "-u",
        "etl",
        "--",
        "/bin/sh",
        "-c",
        "exec ls",
    ]
    words = remotes.build_command(
        "exec ls", "db3", "etl", {"port": 2, "mode": "ssh-then-sudo", "ConnectTimeout": 3}
    )
    assert words[-1] == "exec sudo -n -H -u etl -- /bin/sh -c 'exec ls'"
    assert "ConnectTimeout=3" in words and words[-5:-1] == ["-p", "2", "--", "db3"]
    for wrong in ([], "ls", ["a\0b"]):
        with pytest.raises(
            ValueError, match="argv: want a non-empty list of strings without NUL bytes"
        ):
            remotes.build_program(wrong)


@given(strategies.lists(WORDS, min_size=1, max_size=5))
def test_quoted_words_come_back_from_sh(words):
    text = (
        kinds.quoted("sh")
        + " -c "
        + kinds.quoted(" ".join(["printf '%s\\0'", *map(kinds.quoted, words)]))
    )
    printed = subprocess.run(["/bin/sh", "-c", text], stdout=subprocess.PIPE, check=True).stdout
    assert printed == b"".join(word.encode() + b"\0" for word in words)


@pytest.mark.parametrize("shell", ["bash", "dash", "fish", "ksh93", "mksh", "tcsh", "zsh"])
def test_odd_words_come_back_from_every_login_shell(shell):
    words = [
        "a\\b",
        "x'",
        "\\'",
        "!",
        "a!b",
        "$(id)",
        "`id`",
        '"',
        "~",
        "*",
        "-n",
        "",
        "a=b",
        "{a,b}",
        "é",
        " ",
        "#",
        "^x^y",
    ]
    words += [] if shell == "tcsh" else ["a\nb"]
    text = kinds.shell_command(["printf", "%s\\0", *words])
    printed = subprocess.run(
        [path_of(shell), "-c", text], stdout=subprocess.PIPE, check=True
    ).stdout
    assert printed == b"".join(word.encode() + b"\0" for word in words)


def test_ssh_shares_a_connection_with_what_has_its_options():
    one, other = Route.of([ssh(user="etl")]), Route.of([ssh(user="etl", options={"Port": 2})])
    assert one.share_key == Route.of([ssh(user="etl")]).share_key not in ("", other.share_key)
    assert [
        Route.of(hops).share_key
        for hops in (
            [],
            [{"sudo": {"user": "u"}}],
            [{"sudo": {"user": "u"}}, ssh()],
            [ssh(options={"controlpath": "/x"})],
        )
    ] == ["", "", "", ""]
    master = one.master("/spool/100%", "/spool/log")
    assert master[:4] == ["ssh", "-T", "-E", "/spool/log"]
    assert master[-6:] == ["-o", "ControlPersist=60", "-N", "-f", "--", "db3"]
    assert master.index("ControlPath=/spool/100%%") < master.index("ControlPath=none")
    shared = Route.of([ssh(user="etl"), {"sudo": {"user": "u"}}]).shared("/spool/m").argv(["true"])
    assert shared.index("ControlPath=/spool/m") < shared.index("ControlPath=none")
    assert "ProxyCommand=false" in shared
    assert shared[-1] == "exec sudo -n -H -u u -- true"


def test_messages_of_ssh_say_what_to_do_next():
    full = "mux_client_request_session: session request failed: Session open refused by peer"
    old = "command-line: line 0: Bad configuration option: stdinnull"
    route = Route.of([ssh(), {"sudo": {"user": "u"}}])
    assert (route.is_full(full), route.is_full(old), route.is_too_new(old)) == (True, False, True)
    assert not Route.of([{"sudo": {"user": "u"}}, ssh()]).is_full(full)
    older = route.older()
    assert "StdinNull=no" in route.argv(["true"]) and "StdinNull=no" not in older.argv(["true"])
    assert not older.is_too_new(old)
