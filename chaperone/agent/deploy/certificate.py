"""
The certificate of a deployed agent, made here by the command openssl.

Knows: openssl, memory files.  Must not know: where the agent runs, how it is sent.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import attrs

from ...errors import AgentError
from ...program.fds import owned

AGE = timedelta(days=1)  # it is valid from a day ago: the clocks of two hosts differ
LIFE = timedelta(days=3650)  # an agent lives shorter; what ends it is its lease
# Not a CA: the one certificate is trusted itself, and its key can vouch for no other.
# `openssl req -x509` would do without a file, but only openssl 3.4 can date it back by `req`.
CONFIG = """\
[ca]
default_ca = agent
[agent]
database = {directory}/index
new_certs_dir = {directory}
rand_serial = yes
policy = policy
default_md = sha256
x509_extensions = extensions
[policy]
commonName = supplied
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = DNS:{name}
[req]
distinguished_name = subject
[subject]
"""


@attrs.frozen(kw_only=True)
class Certificate:
    """
    A key, and a certificate that is signed by it.

    Attributes:
        name (str): `agent-` and random digits: the only name that it is valid for.
        pem (str): The certificate.
        key (str): Its private key, PEM.
    """

    name: str
    pem: str
    key: str = attrs.field(repr=False)


def certificate() -> Certificate:
    """
    Make a key and a certificate for one agent: P-256, valid from yesterday on for ten years.

    Raises:
        AgentError: If there is no openssl, or it fails.
    """
    name = f"agent-{os.urandom(8).hex()}"
    key = _openssl(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"])
    with (
        tempfile.TemporaryDirectory(prefix="chaperone-") as directory,
        owned(os.memfd_create("key")) as key_fd,  # a key in a file would outlive a crash
    ):
        os.pwrite(key_fd, key, 0)
        config, request = f"{directory}/config", f"{directory}/request"
        with open(config, "w") as file:
            file.write(CONFIG.format(directory=directory, name=name))
        with open(f"{directory}/index", "w"):
            pass
        using = ["-config", config]
        key_path = f"/proc/self/fd/{key_fd}"
        subject = ["-subj", f"/CN={name}"]
        asked = _openssl(["req", "-new", *using, "-key", key_path, *subject], fds=[key_fd])
        with open(request, "wb") as file:
            file.write(asked)
        now = datetime.now(timezone.utc)
        dates = ["-startdate", _date(now - AGE), "-enddate", _date(now + LIFE)]
        signing = ["ca", "-selfsign", "-batch", "-notext", *using, "-keyfile", key_path]
        pem = _openssl([*signing, "-in", request, *dates], fds=[key_fd])
    return Certificate(name=name, pem=pem.decode(), key=key.decode())


def _date(when: datetime) -> str:
    return when.strftime("%Y%m%d%H%M%SZ")


def _openssl(words: Sequence[str], fds: Sequence[int] = ()) -> bytes:
    """What openssl writes; no configuration of this host takes part."""
    try:
        ran = subprocess.run(
            ["openssl", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=fds,
            env={**os.environ, "OPENSSL_CONF": "/dev/null"},
            check=False,
        )
    except OSError as error:
        raise AgentError(
            f"unable to make a certificate: the command openssl is required: {error.strerror}",
            error.errno,
        ) from error
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").split("\n", 1)[0]
        raise AgentError(f"unable to make a certificate: openssl {words[0]} failed: {said}")
    return ran.stdout
