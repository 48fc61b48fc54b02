"""
What `deploy` sends: a bundle of pure Python, a certificate, a text that is counted.
"""

import io
import os
import pathlib
import runpy
import ssl
import subprocess
import sys
import zipfile

import attrs
import pytest

from chaperone.agent.deploy import bundle, far
from chaperone.agent.deploy import deploy as deploying
from chaperone.agent.deploy.certificate import certificate
from chaperone.agent.deploy.sending import payload
from chaperone.errors import AgentError
from chaperone.farside.payload import CONSTANT, READY
from spool_tests.support.deployed import Far
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import need


@pytest.fixture(scope="module")
def packed():
    return bundle.bundle()


def test_bundle_has_the_package_and_what_setup_names(packed, monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: given.update(keywords))
    runpy.run_path(f"{ROOT}/setup.py")
    named = [*given["install_requires"], *given["extras_require"]["agent"]]
    names = [name.partition(">")[0] for name in named]
    assert sorted(names) == sorted([*bundle.DISTRIBUTIONS, *bundle.FOR_OLD_PYTHONS])
    files = zipfile.ZipFile(io.BytesIO(packed.data)).namelist()
    ours = [path for path in pathlib.Path(ROOT, "chaperone").rglob("*") if path.is_file()]
    there = {str(path.relative_to(ROOT)) for path in ours if "__pycache__" not in path.parts}
    assert {name for name in files if name.startswith("chaperone/")} == there
    assert len(packed.data) < 2_000_000  # as docs/agents.rst says
    assert not [name for name in files if "__pycache__" in name or name.endswith((".so", ".pyc"))]


def test_bundle_is_the_same_for_the_same_files(packed):
    assert bundle.bundle() == packed


def test_bundle_of_a_package_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(bundle, "DISTRIBUTIONS", ("attrs", "no-such-package"))
    with pytest.raises(AgentError) as caught:
        bundle.bundle()
    assert str(caught.value) == (
        "unable to deploy an agent: the package no-such-package is required here"
        " (pip install 'chaperone-spool[agent]')"
    )


# -- the certificate


def test_certificate_is_trusted_by_its_name_alone():
    need("openssl")
    made, other = certificate(), certificate()
    assert _handshake(made, made.pem, made.name) is None
    assert _handshake(made, made.pem, other.name) == (
        f"Hostname mismatch, certificate is not valid for '{other.name}'."
    )
    assert _handshake(made, other.pem, made.name) == "self-signed certificate"
    assert made.key not in repr(made)


def _handshake(made, pem, name):
    """What a client that pins `pem` says to a server with this certificate; None if it is good."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _memory(made.pem) as cert, _memory(made.key) as key:
        server.load_cert_chain(*(f"/proc/self/fd/{file.fileno()}" for file in (cert, key)))
    client = ssl.create_default_context(cadata=pem)
    client.verify_flags |= getattr(ssl, "VERIFY_X509_STRICT", 0)
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(*wires, server_hostname=name),
        server.wrap_bio(*reversed(wires), server_side=True),
    )
    try:
        for end in ends * 2:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return None


def _memory(text):
    file = open(os.memfd_create("test"), "w+")
    file.write(text)
    file.flush()
    return file


def test_certificate_is_valid_since_yesterday(tmp_path):
    need("openssl")
    (tmp_path / "pem").write_text(certificate().pem)
    words = ["openssl", "x509", "-in", tmp_path / "pem", "-noout"]
    day = ["-checkend", str(9 * 365 * 86_400)]
    assert subprocess.run([*words, *day], capture_output=True, check=False).returncode == 0
    dates = subprocess.run([*words, "-dates"], capture_output=True, check=True, text=True).stdout
    begin, end = (ssl.cert_time_to_seconds(line.partition("=")[2]) for line in dates.splitlines())
    assert end - begin == 3651 * 86_400


def test_missing_openssl_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AgentError) as caught:
        certificate()
    assert str(caught.value) == (
        "unable to make a certificate: the command openssl is required: No such file or directory"
    )


def test_address_for_a_container_is_its_own_towards_others():
    listen, address = far.address({"ssh": False, "listen": ["0.0.0.0", 8470]})
    assert listen == "0.0.0.0"
    assert address is None or not address.startswith("127.")  # None without a way to others
    assert far.address({"ssh": False, "listen": None}) == ("127.0.0.1", None)


def test_address_for_ssh_is_the_one_that_it_came_to(monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "2001:db8::2 5 2001:db8::1 22")
    assert far.address({"ssh": True, "listen": None}) == ("2001:db8::1", "2001:db8::1")
    assert far.address({"ssh": True, "listen": ["::", 1]}) == ("::", "2001:db8::1")
    assert far.address({"ssh": False, "listen": None}) == ("127.0.0.1", None)
    for other in ("", "fe80::2%eth0 5 fe80::1%eth0 22"):
        monkeypatch.setenv("SSH_CONNECTION", other)
        assert far.address({"ssh": True, "listen": None}) == ("", None)


# -- the text


def _sent(packed):
    """A whole payload, for an agent that would listen."""
    made = certificate()
    return payload(
        {
            "word": "WORD",
            "directory": "~/.chaperone",
            "suffix": "",
            "listen": None,
            "ssh": False,
            "single": False,
            "idle_s": 60,
            "lease_s": 60,
            "digest": packed.digest,
            "lacks": {},
            "token": f"name run {'0' * 64}",
            "server_name": made.name,
            "pem": made.pem,
            "key": made.key,
        },
        packed.data,
    )


def test_cut_text_runs_nothing_and_leaves_nothing(packed, tmp_path):
    need("openssl")
    there = Far(tmp_path)
    data = _sent(packed)
    line = data.index(b"\n") + 1
    source = line + far.DIGITS + os.path.getsize(far.__file__)
    settings = len(data) - len(packed.data) - far.DIGITS
    places = {0, 1, line // 2, line - 1, line, line + 3, line + far.DIGITS, source - 1, source}
    places |= {source + 4, source + far.DIGITS, settings - 1, settings, settings + 5}
    places |= {settings + far.DIGITS, settings + far.DIGITS + 1, len(data) // 2, len(data) - 1}
    argv = [*there.hop["exec"]["argv"], *CONSTANT]
    started = [
        subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in places
    ]
    for process, place in zip(started, sorted(places), strict=True):
        said, words = process.communicate(data[:place])
        assert (said, words) == (b"", READY), place
        # Of a line that is cut the shell runs nothing; Python has a code for it.
        assert process.returncode == (1 if place < line else far.CUT), place
    assert there.is_clean()


def test_packages_of_an_old_python_that_are_missing_here_are_named(packed, tmp_path, monkeypatch):
    need("openssl")
    there = Far(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "near"))
    lacking = attrs.evolve(packed, lacks={"two": 99, "one": 99, "old": 1})
    monkeypatch.setattr(deploying, "bundle", lambda: lacking)
    with pytest.raises(AgentError) as caught:
        there.deploy()
    assert str(caught.value) == (
        f"unable to deploy an agent here, behind env, as whom env makes us: Python"
        f" 3.{sys.version_info[1]} there also needs one, two"
        " (pip install 'chaperone-spool[agent]' here)"
    )
    assert there.is_clean()


@pytest.mark.parametrize("python", ["", "exit 1", "exec python3.9"])
def test_host_without_a_new_python_is_one_sentence(python, tmp_path, monkeypatch):
    there = Far(tmp_path, python=())
    monkeypatch.setenv("HOME", str(tmp_path / "near"))
    names = ["python3"] if python else []
    for name in names:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for tool in ("sh", "env", "echo"):
        os.symlink(f"/bin/{tool}", tmp_path / "bin" / tool)
    hop = {"exec": {"argv": ["env", "-i", f"HOME={there.home}", f"PATH={tmp_path}/bin"]}}
    monkeypatch.setattr(Far, "hop", hop)
    with pytest.raises(AgentError) as caught:
        there.deploy()
    assert str(caught.value) == (
        "unable to deploy an agent here, behind env, as whom env makes us: python3 of 3.10 or"
        " later is required there; to run a program over ssh on a host without it, use `remote`"
        " in a spec"
    )
    assert there.is_clean()
