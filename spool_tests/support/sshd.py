"""
A real sshd on a free port of loopback, with keys of its own and throw-away users, and nothing left
of it at the end.

Knows: sshd, useradd.  Must not know: chaperone.
"""

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile

import pytest

from spool_tests.support.processes import SERVERS
from spool_tests.support.shells import in_place_of_sh, path_of
from spool_tests.support.waiting import need, until

CONFIG = """\
ListenAddress {address}:{port}
HostKey {directory}/host
PidFile none
AuthorizedKeysFile {directory}/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PermitUserEnvironment no
PrintMotd no
PrintLastLog no
UseDNS no
{more}
"""


class Sshd:
    """
    A server, up from the start.

    Args:
        directory (str): Its own, empty.
        more (str): Lines of its configuration.
        prefix (tuple): Words before its argv.
        shell (str): What its /bin/sh is, None for the machine's.

    Attributes:
        port (int): On 127.0.0.1.
        options (dict): For a spec's `remote.options`: no file of the user's ssh is read or written,
            and the key is known.
        pid (int): The listener's.
    """

    def __init__(self, directory, more="", address="127.0.0.1", prefix=(), shell=None):
        self.directory, self.address = directory, address
        self._users = []
        os.chmod(directory, 0o755)
        self._prefix = (*prefix, *(in_place_of_sh(shell, directory) if shell else ()))
        for name in ("host", "client"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}"],
                check=True,
            )
        shutil.copy(f"{directory}/client.pub", f"{directory}/authorized")
        os.chmod(f"{directory}/authorized", 0o644)
        self._more = more
        self.start()

    def start(self):
        for _ in range(20):  # a port that is free now may be taken in a moment
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            with open(f"{self.directory}/config", "w") as file:
                file.write(
                    CONFIG.format(
                        address=self.address,
                        port=self.port,
                        directory=self.directory,
                        more=self._more,
                    )
                )
            if os.geteuid() == 0:
                os.makedirs("/run/sshd", exist_ok=True)
            argv = [
                *self._prefix,
                shutil.which("sshd", path="/usr/sbin:/usr/bin"),
                "-D",
                "-e",
                "-f",
                f"{self.directory}/config",
            ]
            with open(f"{self.directory}/log", "ab") as log:
                env = {
                    name: value
                    for name, value in os.environ.items()
                    if name not in ("TEST_TOKEN", "CHAPERONE_SPOOL")
                }
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=env,
                )
            self.pid = self._process.pid
            SERVERS.add(self.pid)
            if (
                until(lambda: self._answers() or self._process.poll() is not None) is True
                and self._process.poll() is None
            ):
                break
        with (
            open(f"{self.directory}/host.pub") as key,
            open(f"{self.directory}/known", "w") as known,
        ):
            known.write(f"[{self.address}]:{self.port} {key.read()}")
        self.options = {
            "IdentityFile": f"{self.directory}/client",
            "IdentitiesOnly": True,
            "UserKnownHostsFile": f"{self.directory}/known",
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": True,
            "KexAlgorithms": "curve25519-sha256",  # half the time of the default one
        }

    def _answers(self):
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self.address, self.port), 1) as connection,
        ):
            return connection.recv(4) == b"SSH-"

    def remote(self, user=None, **fields):
        """A spec's `remote` for this server."""
        options = {**self.options, **fields.pop("options", {})}
        return {
            "host": self.address,
            "port": self.port,
            "user": user or me(),
            "options": options,
            **fields,
        }

    def argv(self, user=None):
        """ssh itself, for comparisons."""
        words = ["ssh", "-F", "none", "-T", "-p", str(self.port), "-l", user or me()]
        for name, value in self.options.items():
            words += ["-o", f"{name}={ {True: 'yes', False: 'no'}.get(value, value) }"]
        return [*words, self.address]

    def user(self, shell):
        """
        A user with this login shell; as root alone. Made when first asked for, removed at the end.
        """
        name = f"chap{os.getpid()}{shell[:6]}"
        if name not in self._users:
            path = path_of(shell)
            if shell == "busybox":
                path = f"{self.directory}/ash"
                if not os.path.islink(path):
                    os.symlink(path_of(shell), path)
            home = f"{self.directory}/home-{shell}"
            changed_users("useradd", "-M", "-N", "-d", home, "-s", path, "-p", "*", name)
            self._users.append(name)
            os.mkdir(home, 0o755)
            os.chown(home, pwd.getpwnam(name).pw_uid, -1)
        return name

    def others(self):
        """
        What shares a /bin/sh of its own with this server and is none of its processes: {pid:
        command}.
        """
        found = {}
        here = os.stat(f"/proc/{self.pid}/ns/mnt").st_ino
        assert here != os.stat("/proc/self/ns/mnt").st_ino, "this server lives where we do"
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/mnt").st_ino == here:
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        found[int(pid)] = file.read().replace(b"\0", b" ").decode(errors="replace")
        return {pid: command for pid, command in found.items() if command and "sshd" not in command}

    def sessions(self):
        """The pids of the processes that serve one connection each."""
        return [
            int(pid)
            for pid in subprocess.run(
                ["pgrep", "-P", str(self.pid)], capture_output=True, text=True
            ).stdout.split()
        ]

    def kill_sessions(self):
        """SIGKILL, the unprivileged half included: the connection is gone at once."""
        for pid in self.sessions():
            below = subprocess.run(
                ["pgrep", "-P", str(pid), "sshd"], capture_output=True, text=True
            ).stdout.split()
            for one in (*map(int, below), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)

    def stop(self):
        self._process.terminate()
        self._process.wait()

    def close(self):
        self.kill_sessions()
        self.stop()
        for name in self._users:
            uid = pwd.getpwnam(name).pw_uid
            for pid in subprocess.run(
                ["pgrep", "-U", str(uid)], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            changed_users("userdel", name)


def changed_users(*argv):
    """
    Run useradd or userdel: they give up while another one is at work, here or in another suite,
    and the latter while a killed process of that user has not ended yet.
    """
    with open(os.path.join(tempfile.gettempdir(), "chaperone-test-passwd.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        until(lambda: not subprocess.run(argv, stderr=subprocess.DEVNULL).returncode, what=argv)


def me():
    return pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="session")
def sshd():
    need("sshd", "ssh", "ssh-keygen", "pgrep")
    directory = tempfile.mkdtemp(prefix="chaperone-sshd-")
    server = Sshd(directory)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def sshd_with():
    """Servers where /bin/sh is another shell, each made when first asked for: as root alone."""
    need("sshd", "ssh", "ssh-keygen", "pgrep", "unshare")
    servers = Servers()
    try:
        yield servers.get
    finally:
        servers.close()


class Servers:
    """One for each /bin/sh that was asked for."""

    def __init__(self, **keywords):
        self._keywords, self._made = keywords, {}

    def get(self, shell):
        if shell not in self._made:
            directory = tempfile.mkdtemp(prefix="chaperone-sshd-")
            try:
                self._made[shell] = Sshd(directory, shell=shell, **self._keywords)
            except BaseException:
                shutil.rmtree(directory)
                raise
        return self._made[shell]

    def close(self):
        for one in self._made.values():
            one.close()
            shutil.rmtree(one.directory, ignore_errors=True)


class Network:
    """
    Another host, as far as the network goes: a namespace with an sshd in it, whose cable can be
    pulled.

    Attributes:
        address (str): Of that host.
        words (tuple): Before an argv that is started there.
    """

    def __init__(self, directory):
        number = os.getpid() % 65_536  # four addresses each, of 10.212.0.0/14
        self._name = f"chap{number}"
        near, far = (
            f"10.{212 + number // 16_384}.{number // 64 % 256}.{number % 64 * 4 + last}"
            for last in (1, 2)
        )
        for line in (
            f"netns add {self._name}",
            f"link add {self._name}n type veth peer name {self._name}f netns {self._name}",
            f"addr add {near}/30 dev {self._name}n",
            f"link set {self._name}n up",
            f"-n {self._name} addr add {far}/30 dev {self._name}f",
            f"-n {self._name} link set {self._name}f up",
            f"-n {self._name} link set lo up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        self.address, self.words = far, ("ip", "netns", "exec", self._name)
        there = {"address": self.address, "prefix": self.words}
        self.sshd = Sshd(directory, **there)
        self._servers = Servers(**there)
        self.sshd_with = self._servers.get

    def cut(self, port=None):
        """
        No packet comes through any more, and neither side is informed; with a near port none of
        that one connection.
        """
        rules = ["add table ip chaperone"]
        for hook, end in (("input", "sport"), ("output", "dport")):
            rules.append(
                f"add chain ip chaperone {hook} {{ type filter hook {hook} priority "
                f"0; policy {'accept' if port else 'drop'}; }}"
            )
            rules += [f"add rule ip chaperone {hook} tcp {end} {port} drop"] if port else []
        subprocess.run(["ip", "netns", "exec", self._name, "nft", "; ".join(rules)], check=True)

    def heal(self):
        subprocess.run(
            ["ip", "netns", "exec", self._name, "nft", "delete table ip chaperone"], check=True
        )

    def close(self):
        self._servers.close()
        self.sshd.close()
        subprocess.run(["ip", "netns", "del", self._name], check=True)


@pytest.fixture(scope="session")
def network():
    need("sshd", "ssh", "ssh-keygen", "pgrep", "ip", "nft")
    directory = tempfile.mkdtemp(prefix="chaperone-network-")
    try:
        there = Network(directory)
        try:
            yield there
        finally:
            there.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
