"""
Real engines, each from nothing in a directory of its own: Slurm on loopback, Docker and Podman with
two images made here; nothing is left of them at the end.

Knows: munge, Slurm, dockerd, podman, debootstrap.  Must not know: chaperone.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid

from spool_tests.support.processes import SERVERS, processes_with
from spool_tests.support.waiting import need, until

PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
SLURM = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,batch_sched_delay=1
ReturnToService=2
KillWait=2
OverTimeLimit=0
SlurmdTimeout=20
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def run(*argv, check=True, **more):
    """What a command says: (exit code, stdout and stderr)."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    assert not check or done.returncode == 0, (argv, done.stdout)
    return done.returncode, done.stdout


class Servers:
    """The processes of an engine."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(mode=0o755, exist_ok=True)
        self._processes = {}

    def begin_all(self):
        """Bring it up; `close` is called afterwards, however this ended."""

    def begin(self, name, *argv):
        """Start one, with a log of its own and nothing of the test in its environment."""
        env = {k: v for k, v in os.environ.items() if k not in ("TEST_TOKEN", "CHAPERONE_SPOOL")}
        with open(self.directory / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                [shutil.which(argv[0], path=PATH), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**env, "PATH": PATH},
                start_new_session=True,
            )
        SERVERS.add(process.pid)
        self._processes[name] = process
        return process

    def pid(self, name):
        return self._processes[name].pid

    def end(self, name):
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        SERVERS.discard(process.pid)

    def close(self):
        for name in reversed(list(self._processes)):
            self.end(name)


class Slurm(Servers):
    """
    munged, slurmctld and one slurmd with eight CPUs.

    Attributes:
        env (dict): What srun and its friends need.
    """

    def __init__(self, directory):
        need("munged", "slurmctld", "slurmd", "srun")
        super().__init__(directory)
        munge = self.directory / "munge"
        munge.mkdir(mode=0o755)
        for name in ("state", "spool"):
            (self.directory / name).mkdir(mode=0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], two.getsockname()[1]
        conf = self.directory / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(SLURM.format(host=host, directory=self.directory, ports=ports))
        self.env = {"SLURM_CONF": str(conf)}
        self._conf = str(conf)

    def begin_all(self):
        munge = self.directory / "munge"
        files = {f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")}
        self.begin(
            "munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", *files
        )
        until((munge / "socket").exists)
        self.begin("slurmctld", "slurmctld", "-D", "-f", self._conf)
        self.begin_slurmd()
        until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"))

    def begin_slurmd(self):
        self.begin("slurmd", "slurmd", "-D", "-f", self._conf)

    def ask(self, *argv):
        """What one of Slurm's commands says."""
        return run(*argv, check=False, env={**os.environ, **self.env})[1]

    def jobs(self):
        """The ids of all jobs that are there."""
        return self.ask("squeue", "-h", "-o", "%A").split()

    def close(self):
        for job in self.jobs():
            self.ask("scancel", "--signal=KILL", job)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.jobs())
        super().close()


def busybox_tree(directory):
    """A root filesystem whose tools are all busybox's."""
    need("busybox")
    root = pathlib.Path(directory)
    for name in ("bin", "tmp", "etc", "root", "proc", "dev", "sys"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    busybox = shutil.which("busybox", path=PATH)
    copy_program(busybox, directory)
    if busybox != "/bin/busybox":
        shutil.copy(busybox, root / "bin/busybox")
    for name in run(busybox, "--list")[1].split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\netl:x:1000:1000::/tmp:/bin/sh\n")


def debian_tree(directory):
    """A minimal Debian, by debootstrap, with the user etl."""
    need("debootstrap")
    run("debootstrap", "--variant=minbase", "bookworm", str(directory))
    with open(f"{directory}/etc/passwd", "a") as file:
        file.write("etl:x:1000:1000::/tmp:/bin/sh\n")


def python_tree(directory):
    """That of busybox, with this Python where it is here."""
    busybox_tree(directory)
    program, library = os.path.realpath(sys.executable), sysconfig.get_path("stdlib")
    out = shutil.ignore_patterns("test", "dist-packages", "site-packages", "__pycache__")
    shutil.copytree(library, f"{directory}{library}", ignore=out, dirs_exist_ok=True)
    for path in (program, *map(str, pathlib.Path(library).glob("lib-dynload/*.so"))):
        copy_program(path, directory)
    os.symlink(program, f"{directory}/bin/python3")


def copy_program(path, directory):
    """A program or a library, and those that it needs, where they are here."""
    words = run("ldd", path, check=False)[1].split()  # none of a static one
    for each in (path, *{word for word in words if word.startswith("/")}):
        there = pathlib.Path(f"{directory}{each}")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(each, there)


TREES = {"busybox": busybox_tree, "debian": debian_tree, "python": python_tree}


def archive(directory, name):
    """The tar file of a tree, made once; others that want it meanwhile wait."""
    from filelock import FileLock

    path = pathlib.Path(directory) / f"{name}.tar"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            tree = pathlib.Path(directory) / name
            TREES[name](tree)
            run("tar", "-C", str(tree), "-cf", f"{path}.new", ".")
            shutil.rmtree(tree)
            os.rename(f"{path}.new", path)
    return path


class Containers(Servers):
    """
    An engine of containers, with the images `busybox:1`, `debian:1` and `python:1` on demand.

    Attributes:
        env (dict): What its client needs.
    """

    program = ""

    def __init__(self, directory, archives):
        need(self.program)
        super().__init__(directory)
        self._archives, self._images, self._names = archives, set(), []
        self.env = {}

    def ask(self, *argv, check=True):
        """What the client says."""
        return run(self.program, *argv, check=check, env={**os.environ, **self.env})[1]

    def image(self, name):
        """An image, made if it is not there."""
        if name not in self._images:
            self.ask("import", str(archive(self._archives, name)), f"{name}:1")
            self._images.add(name)
        return f"{name}:1"

    def container(self, name, network="none"):
        """
        The name of a new container of an image, which runs until `close`. Its first process reaps
        nothing, as that of many an image.
        """
        called = f"box{os.getpid()}-{len(self._names)}"
        self.ask(
            "run",
            "--detach",
            "--network",
            network,
            "--name",
            called,
            self.image(name),
            "sleep",
            "100000",
        )
        self._names.append(called)
        return called

    def close(self):
        names = self.ask("ps", "--all", "--quiet", check=False).split()
        for name in names:
            self.ask("rm", "--force", name, check=False)
        super().close()
        for _ in range(50):  # a mount of a container that has just ended
            shutil.rmtree(self.directory, ignore_errors=True)
            if not self.directory.exists():
                break
            time.sleep(0.1)


class Docker(Containers):
    """A dockerd of its own."""

    program = "docker"

    def __init__(self, directory, archives):
        need("dockerd")
        super().__init__(directory, archives)
        # A socket's path has at most 107 bytes, and containerd's lies deep in this directory.
        self._sockets = tempfile.mkdtemp(prefix="dockerd-", dir="/tmp")
        self._host = f"unix://{self._sockets}/socket"
        self.env = {"DOCKER_HOST": self._host, "DOCKER_CONFIG": str(self.directory / "client")}

    def begin_all(self):
        at = self.directory
        self.begin(
            "dockerd",
            "dockerd",
            "--host",
            self._host,
            "--data-root",
            str(at / "data"),
            "--exec-root",
            f"{self._sockets}/exec",
            "--pidfile",
            str(at / "pid"),
            "--bridge",
            "none",
            "--iptables=false",
            "--storage-driver",
            "overlay2",
        )
        until(lambda: "Server Version" in self.ask("info", check=False), 120)

    def close(self):
        super().close()
        # dockerd leaves the network of containers that shared the host's mounted here.
        subprocess.run(["umount", f"{self._sockets}/exec/netns/default"], capture_output=True)
        shutil.rmtree(self._sockets, ignore_errors=True)


class Podman(Containers):
    """Podman with a storage of its own."""

    program = "podman"

    def __init__(self, directory, archives):
        super().__init__(directory, archives)
        at = self.directory
        (at / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{at}/data"\nrunroot = "{at}/run"\n'
        )
        # crun takes no hybrid cgroups; limits above this machine's are refused.
        limits = '"nofile=1024:1024", "nproc=1024:1024"'
        (at / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = [{limits}]\nnetns = "none"\n'
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
            f'tmp_dir = "{at}/tmp"\n'
        )
        self.env = {
            "CONTAINERS_STORAGE_CONF": str(at / "storage.conf"),
            "CONTAINERS_CONF": str(at / "containers.conf"),
        }


class Way:
    """
    A way to run something by an engine.

    Attributes:
        name (str): Such as `srun`, `docker exec busybox` or `exec`, the hop that has no engine.
        engine: As in this module; None without one.
        remote (dict): Of a spec.
        image (str): Of a container; None without one.
        survives (bool): Whether it can outlive its client.
    """

    def __init__(self, name, engine, hop, image=None, container=None):
        self.name, self.engine, self.image, self.container = name, engine, image, container
        self.remote = {"hops": [hop]}
        self.survives = container is not None or name == "exec"


def way_of(name, request):
    if name == "exec":
        return Way(name, None, {"exec": {"argv": ["unshare", "--net", "--fork"]}})
    kind, *rest = name.split()
    engine = request.getfixturevalue("slurm" if kind == "srun" else kind)
    if kind == "srun":
        return Way(name, engine, {"srun": {}})
    how, image = rest
    if how == "run":
        return Way(name, engine, {kind: {"image": engine.image(image)}}, image)
    container = engine.container(image)
    return Way(name, engine, {kind: {"container": container}}, image, container)


def word():
    """Seconds of a sleep that belong to one test alone."""
    return f"{90000 + uuid.uuid4().int % 9000}.{os.getpid()}"


def sleepers(name):
    return {
        pid: command
        for pid, command in processes_with(f"sleep\0{name}".encode()).items()
        if command.startswith("sleep")
    }
