"""What doctor finds, where something is missing and where nothing is."""

import errno
import os
import subprocess

import inotify_simple
import pytest

from chaperone.cli.verbs import doctor
from chaperone.follow import descriptors


def found(path, host=None):
    """The findings by name; whatever is missing comes with how to mend it, in a line."""
    findings = list(doctor.examined(str(path), host))
    assert [finding for finding in findings if finding.fits is False and not finding.remedy] == []
    assert not any("\n" in f"{finding.says}{finding.remedy}" for finding in findings)
    return {finding.name: finding for finding in findings}


def test_a_good_spool_fits_in_everything(spool):
    findings = found(spool)
    assert {
        name: finding.fits
        for name, finding in findings.items()
        if name in ("spool", "filesystem", "inotify", "locks", "guard")
    } == {
        "spool": True,
        "filesystem": True,
        "inotify": True,
        "locks": True,
        "guard": True,
    }
    assert all(finding.remedy is None for finding in findings.values() if finding.fits)


def test_a_spool_that_others_can_write_to_is_told_with_its_remedy(spool):
    spool.chmod(0o777)
    finding = found(spool)["spool"]
    assert (
        not finding.fits
        and finding.says
        == f"unable to use spool '{spool}': want it writable by nobody else, got mode 0777"
    )
    assert finding.remedy == "run as its owner, or make a spool of your own: chmod 700"


def test_a_spool_that_is_not_there_yet_is_no_fault(tmp_path):
    findings = found(tmp_path / "new")
    assert findings["spool"].fits is None and findings["locks"].fits is True
    assert not (tmp_path / "new").exists()


def test_a_spool_that_can_not_be_made_is_told(tmp_path):
    finding = found(tmp_path / "no" / "new")["spool"]
    assert (
        not finding.fits
        and finding.says == f"it is not there, and can't be made in '{tmp_path / 'no'}'"
    )


def test_a_filesystem_that_keeps_silent_is_named(spool, monkeypatch):
    monkeypatch.setattr(descriptors, "silent_filesystem", lambda fd: "nfs")
    finding = found(spool)["filesystem"]
    assert not finding.fits and finding.says.startswith("it is nfs, which other hosts can write to")


def test_a_kernel_that_tells_nothing_of_the_spool_is_told(spool, monkeypatch):
    monkeypatch.setattr(doctor, "TELLS_S", 0)
    monkeypatch.setattr(inotify_simple.INotify, "read", lambda watch, timeout: [])
    assert (
        found(spool)["inotify"].says
        == "nothing was told of a change in it: followers would hear of nothing"
    )


def test_inotify_instances_that_are_used_up_are_told(spool, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    finding = found(spool)["inotify"]
    assert not finding.fits and finding.says == "unable to watch it: Too many open files"


def test_a_machine_without_proc_is_told(spool, monkeypatch):
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
def test_little_room_is_told(spool, monkeypatch, blocks, files, wrong):
    values = list(os.statvfs("/"))
    values[1], values[4], values[5], values[7] = 4096, blocks, files, files
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(values))
    assert {
        name
        for name, finding in found(spool).items()
        if finding.fits is False and name.startswith("free")
    } == wrong


def test_a_host_that_no_argv_can_name_is_refused(spool):
    finding = found(spool, "-oProxyCommand=x")["far side"]
    assert not finding.fits and finding.says.startswith("host: want ")


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """An ssh that runs the last word here, so that a host can lack what this one has."""

    def make(text):
        path = tmp_path / "bin"
        path.mkdir()
        (path / "ssh").write_text(f"#!/bin/sh\n{text}\n")
        (path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")

    return make


def test_a_far_side_is_told_with_what_it_lacks(spool, fake_ssh, tmp_path):
    fake_ssh(
        f"for last; do :; done\nmkdir -p {tmp_path}/few; "
        f'ln -sf "$(command -v sleep)" {tmp_path}/few/\nPATH={tmp_path}/few; '
        'eval "$last"'
    )
    findings = found(spool, "little")
    assert findings["far side"].fits is True and findings["login noise"].says == "none"
    assert {name: findings[name].fits for name in ("awk", "setsid", "grep")} == {
        "awk": False,
        "setsid": False,
        "grep": False,
    }
    assert findings["awk"].says == "there is none: signals are told as 128+n, ambiguous"


def test_startup_files_that_print_are_told(spool, fake_ssh):
    fake_ssh('for last; do :; done\necho Welcome; eval "$last"')
    findings = found(spool, "noisy")
    assert findings["far side"].fits is True and findings["awk"].fits in (True, False)
    assert (
        findings["login noise"].says
        == "startup files there print; it goes to a run's log, not to its output"
    )


def test_a_far_side_that_says_nothing_is_told(spool, fake_ssh, monkeypatch):
    def late(argv, **keywords):
        if argv[0] == "ssh" and argv[1] != "-V":
            raise subprocess.TimeoutExpired(argv, keywords["timeout"])
        return real(argv, **keywords)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", late)
    finding = found(spool, "silent")["far side"]
    assert not finding.fits and finding.says == "unable to reach 'silent': no answer within 20 s"


def test_a_far_side_that_refuses_is_told_in_ssh_s_words(spool, fake_ssh):
    fake_ssh("echo 'ssh: connect to host gone port 22: Connection refused' >&2; exit 255")
    finding = found(spool, "gone")["far side"]
    assert (
        not finding.fits
        and finding.says
        == "unable to run a shell on 'gone': ssh: connect to host gone port 22: Connection refused"
    )
