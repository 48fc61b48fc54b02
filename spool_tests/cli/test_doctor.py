"""What doctor finds, where something is missing and where nothing is."""

import errno
import os
import shutil
import subprocess

import inotify_simple
import pytest

from chaperone.cli.verbs import doctor
from chaperone.follow import descriptors
from chaperone.launch import start
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import need, until


def found(path, far=None):
    """The findings by name; whatever is missing comes with how to mend it, in a line."""
    findings = list(doctor.examined(str(path), far))
    assert [finding for finding in findings if finding.fits is False and not finding.remedy] == []
    assert not any("\n" in f"{finding.says}{finding.remedy}" for finding in findings)
    return {finding.name: finding for finding in findings}


def test_a_good_spool_fits_in_everything(spool):
    findings = found(spool)
    assert {
        name: finding.fits
        for name, finding in findings.items()
        if name in ("spool", "filesystem", "inotify", "run", "guard")
    } == {
        "spool": True,
        "filesystem": True,
        "inotify": True,
        "run": True,
        "guard": True,
    }
    assert all(finding.remedy is None for finding in findings.values() if finding.fits)
    assert list(spool.iterdir()) == []


def test_a_spool_that_others_can_write_to_is_told_with_its_remedy(spool):
    spool.chmod(0o777)
    finding = found(spool)["spool"]
    assert (
        not finding.fits
        and finding.says
        == f"unable to use spool '{spool}': want it writable only by its owner, got mode 0777"
    )
    assert finding.remedy == "run as its owner, or make a spool of your own: chmod 700"


def test_a_spool_that_is_not_there_yet_is_no_fault(tmp_path):
    findings = found(tmp_path / "new")
    assert findings["spool"].fits is None and findings["run"].fits is True
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_can_not_be_made_is_told(tmp_path):
    finding = found(tmp_path / "no" / "new")["spool"]
    assert (
        not finding.fits
        and finding.says == f"it is not there, and can't be made in '{tmp_path / 'no'}'"
    )


@pytest.fixture
def untried(monkeypatch):
    """No run is started: what is looked at is not what runs would meet."""
    monkeypatch.setattr(doctor, "_tried", lambda place, far: iter(()))


def test_a_filesystem_that_keeps_silent_is_named(spool, monkeypatch, untried):
    monkeypatch.setattr(descriptors, "silent_filesystem", lambda fd: "nfs")
    finding = found(spool)["filesystem"]
    assert not finding.fits and finding.says.startswith("it is nfs, which other hosts can write to")


def test_a_kernel_that_tells_nothing_of_the_spool_is_told(spool, monkeypatch, untried):
    monkeypatch.setattr(doctor, "TELLS_S", 0)
    monkeypatch.setattr(inotify_simple.INotify, "read", lambda watch, timeout: [])
    assert (
        found(spool)["inotify"].says
        == "it did not report a change in the spool: followers would miss all changes"
    )


def test_inotify_instances_that_are_used_up_are_told(spool, monkeypatch, untried):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    finding = found(spool)["inotify"]
    assert not finding.fits and finding.says == "unable to watch the spool: Too many open files"


def test_a_machine_without_proc_is_told(spool, monkeypatch, untried):
    def refuse(watch, path, mask):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(inotify_simple.INotify, "add_watch", refuse)
    finding = found(spool)["inotify"]
    assert (finding.fits, finding.says, finding.remedy) == (
        False,
        "there is no /proc/self/fd to name it by: followers poll",
        "mount a /proc of this pid namespace",
    )


@pytest.mark.parametrize(
    ("blocks", "files", "wrong"),
    [
        (10**9, 10**6, set()),
        (0, 10**6, {"free room"}),
        (10**9, 5, {"free inodes"}),
        (10**9, 0, set()),
    ],
    ids=["enough", "no-room", "no-inodes", "no-inode-count"],
)
def test_little_room_is_told(spool, monkeypatch, untried, blocks, files, wrong):
    values = list(os.statvfs("/"))
    values[1], values[4], values[5], values[7] = 4096, blocks, files, files
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(values))
    assert {
        name
        for name, finding in found(spool).items()
        if finding.fits is False and name.startswith("free")
    } == wrong


# -- what is tried


@pytest.mark.root
def test_what_a_killed_chaperone_leaves_is_told_where_no_children_are_listed(chaperone, spool):
    need("unshare")
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"']
    done = subprocess.run([*hide, *CHAPERONE, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (os.EX_CONFIG, "")
    assert done.stdout.endswith(
        "ok  run: one was started and stopped\n"
        "BAD guard: a chaperone was killed, and what had left its program's process group ran on;"
        " mount a /proc of this pid namespace, which lists the children\n"
    )


def test_a_run_that_can_not_be_started_is_told(spool, monkeypatch):
    monkeypatch.setattr(start, "run_command", lambda argv, env, files: os.EX_SOFTWARE)
    findings = found(spool)
    assert findings["run"].fits is False and findings["guard"].fits is False
    assert findings["run"].says.endswith(": its chaperone exited with code 70")


def test_a_host_that_no_argv_can_name_is_refused(spool):
    finding = found(spool, {"remote": {"host": "-oProxyCommand=x"}})["far side"]
    assert not finding.fits and "remote.host: want " in finding.says


FAKE = 'for last; do :; done; eval "$last"'


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """An ssh that runs the last word here, so that a host can lack what this one has."""

    def make(text, host="there", **spec):
        path = tmp_path / "bin"
        path.mkdir()
        (path / "ssh").write_text(f"#!/bin/sh\n{text}\n")
        (path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
        return {"remote": {"host": host}, **spec}

    return make


def told(spool, far):
    """(name, whether it fits, what is said) of the far side's findings, in their order."""
    findings = found(spool, far).values()
    names = ("far side", "login noise", "setsid", "awk", "tracking")
    return [(one.name, one.fits, one.says) for one in findings if one.name in names]


STARTED = ("far side", True, "a run was started there, and its end was reported")
KERNEL = ("tracking", True, "the kernel hands what leaves the program's group to the far side")


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_a_far_side_that_has_it_all_is_told(spool, fake_ssh, life, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    far = fake_ssh(FAKE, on_disconnect=life)
    assert told(spool, far) == [STARTED, KERNEL]
    until(lambda: not list(tmp_path.glob(".chaperone/*")))


def test_a_far_side_is_told_with_what_it_lacks(spool, fake_ssh, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("sleep", "env", "dd", "rm", "sed", "ps"):
        (few / name).symlink_to(shutil.which(name))
    assert told(spool, fake_ssh(f"PATH={few}; {FAKE}")) == [
        STARTED,
        (
            "setsid",
            False,
            "the far side has no setsid: the program has no group of its own, and is stopped"
            " process by process",
        ),
        ("awk", False, "a killed program is reported as one that exited with 137"),
        ("tracking", False, "what leaves the program's group is not found"),
    ]


def test_startup_files_that_print_are_told(spool, fake_ssh):
    says = "startup files there print; it goes to a run's log, not to its output"
    far = fake_ssh(f"echo Welcome; {FAKE}")
    assert told(spool, far) == [STARTED, ("login noise", None, says), KERNEL]


def test_a_far_side_that_refuses_is_told_in_ssh_s_words(spool, fake_ssh):
    far = fake_ssh(
        "echo 'ssh: connect to host gone port 22: Connection refused' >&2; exit 255",
        timeouts={"connect": 0.1},
    )
    says = "unable to connect: ssh: connect to host gone port 22: Connection refused"
    assert told(spool, far) == [("far side", False, says)]


def test_far_side_of_a_spec_is_tried_by_its_hops(chaperone, spool, tmp_path):
    tried = tmp_path / "tried"
    script = tmp_path / "hop"
    script.write_text(f'#!/bin/sh\ntouch {tried}\nexec "$@"\n')
    script.chmod(0o755)
    spec = {
        "program": {"argv": ["no-such"], "env": {"TOKEN": "hunter2"}},
        "remote": {"hops": [{"exec": {"argv": [str(script)]}}]},
    }
    done = chaperone("doctor", "--spec", "-", spec=spec)
    assert done.stderr == "" and tried.exists()
    assert "\nok  far side: a run was started there, and its end was reported\n" in done.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["there", "--spec", "-"],
            "understand 'chaperone doctor': it takes HOST or --spec SPEC, not both",
        ),
        (["--spec", "-"], "try the far side of '-': it has no 'remote'"),
    ],
)
def test_doctor_refuses_what_has_no_far_side_or_two(chaperone, words, sentence):
    done = chaperone("doctor", *words, spec={"program": {"argv": ["true"]}})
    assert (done.returncode, done.stdout) == (os.EX_USAGE, "")
    assert done.stderr == f"chaperone: unable to {sentence}\n"
