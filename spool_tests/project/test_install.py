"""
The package as a user installs it: a wheel in a fresh environment, and the command that comes with
it.

Knows: pip, the wheels that bin/venv laid by.  Must not know: the source tree, once the wheel is
made.
"""

import email
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile

import filelock
import pytest

from spool_tests.support.places import ROOT
from spool_tests.support.waiting import absent, need, until

pytestmark = pytest.mark.once
WHEELS = pathlib.Path(sys.prefix, "wheels")
# What a source distribution has of the checkout.
SHIPPED = ["setup.py", "README.rst", "LICENSE", "CHANGELOG.rst", "chaperone", "bin", "docs"]
SHIPPED += ["spool_tests", ".importlinter", ".mypy.ini", ".plain-words", ".pytest.ini"]
SHIPPED += [".pre-commit-config.yaml", ".ruff.toml"]


def run(*argv, **keywords):
    result = subprocess.run([*map(str, argv)], capture_output=True, text=True, **keywords)
    assert result.returncode == 0, result.stderr
    return result.stdout


def once_for_all_workers(tmp_path_factory, name, make):
    """A directory that `make(path)` has filled, in one process of this test run."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # the workers' places lie in the run's
    with filelock.FileLock(place / f"{name}.lock"):
        if not (place / name).exists():
            make(place / f"{name}.new")
            os.rename(place / f"{name}.new", place / name)
    return place / name


def built(source, place):
    """The wheel of a source tree or an sdist; nothing is fetched."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", place, source)
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """
    A directory with the source's copy in `tree`, its sdist in `sdist`, its wheel in `wheel` and the
    wheel of the sdist in `again`.

    They are built from a copy, because a build leaves files where it is made.
    """
    if not WHEELS.exists():
        absent(f"no wheels in {WHEELS}: bin/venv lays them by")

    def make(place):
        tree = place / "tree"
        tree.mkdir(parents=True)
        for name in SHIPPED:
            if os.path.isfile(f"{ROOT}/{name}"):
                shutil.copy(f"{ROOT}/{name}", tree)
            else:
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache")
                shutil.copytree(f"{ROOT}/{name}", tree / name, symlinks=True, ignore=ignored)
        shutil.copytree(tree, place / "building", symlinks=True)
        run(
            *(sys.executable, "setup.py", "-q", "sdist", "-d", place / "sdist"),
            cwd=place / "building",
        )
        (sdist,) = (place / "sdist").glob("*.tar.gz")
        built(sdist, place / "again")
        built(place / "building", place / "wheel")

    return once_for_all_workers(tmp_path_factory, "distributions", make)


@pytest.fixture(scope="module")
def wheel(distributions):
    (made,) = (distributions / "wheel").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment's bin/, with the wheel installed; no network is asked for."""

    def make(place):
        run(sys.executable, "-m", "venv", "--without-pip", place)
        run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            place / "bin/python",
            "install",
            "-q",
            "--no-index",
            "--find-links",
            WHEELS,
            wheel,
        )

    return once_for_all_workers(tmp_path_factory, "installed", make) / "bin"


def test_wheel_holds_all_that_runs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    parts = {name.partition("/")[2] for name in names if name.startswith("chaperone/")}
    package = pathlib.Path(ROOT, "chaperone")
    shipped = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.suffix in (".py", ".sh", ".typed") or path.parent.name in ("shells", "page")
    }
    assert wheel.name == "chaperone_spool-0.2.0-py3-none-any.whl"
    assert parts == shipped
    assert {
        name
        for name in names
        if "/" in name and ".dist-info" not in name and not name.startswith("chaperone/")
    } == {
        "chaperone_spool-0.2.0.data/scripts/chaperone",
        "chaperone_spool-0.2.0.data/data/share/man/man1/chaperone.1",
        "chaperone_spool-0.2.0.data/data/share/man/man5/chaperone-spec.5",
        "chaperone_spool-0.2.0.data/data/share/man/man5/chaperone-spool.5",
    }


def test_man_pages_are_installed_and_man_shows_them(installed):
    need("man")
    manuals = installed.parent / "share/man"
    shown = {
        page: run("man", "-M", manuals, page, env={**os.environ, "MANWIDTH": "80"})
        for page in ("chaperone", "chaperone-spec", "chaperone-spool")
    }
    for page, text in shown.items():
        assert f"{page} - " in text and "chaperone 0.2.0" not in text.partition("\n")[0], page
        lines = [line for line in text.splitlines() if '{"' not in line]  # JSON stays as printed
        assert max(map(len, lines)) <= 120, page
    assert "--detach" in shown["chaperone"] and "chaperone-spool(5)" in shown["chaperone"]


def test_sdist_holds_the_docs_and_the_tests(distributions):
    tree = distributions / "tree"
    (sdist,) = (distributions / "sdist").iterdir()
    assert sdist.name == "chaperone-spool-0.2.0.tar.gz"
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        files = {name for name, member in members.items() if not member.isdir()}
        assert {name for name in files if not re.match(r"chaperone_spool\.egg-info/", name)} == {
            *("PKG-INFO", "setup.cfg"),
            *(str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_symlink() or p.is_file()),
        }
        for name in files & {str(path.relative_to(tree)) for path in tree.rglob("*")}:
            member, path = members[name], tree / name
            assert member.mode & 0o700 == path.lstat().st_mode & 0o700, name
            if path.is_symlink():
                assert member.linkname == os.readlink(path)
            else:
                assert archive.extractfile(member).read() == path.read_bytes(), name


def test_wheel_of_the_sdist_is_the_wheel_of_the_tree(distributions):
    def content(place):
        (wheel,) = (distributions / place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return wheel.name, {
                info.filename: (info.external_attr, archive.read(info))
                for info in archive.infolist()
            }

    assert content("again") == content("wheel")


def test_package_needs_three_others_and_names_its_pythons(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("chaperone_spool-0.2.0.dist-info/METADATA").decode()
    said = email.message_from_string(metadata)
    needed = [line for line in said.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match("[a-z-]+", line)[0] for line in needed}
    assert names == {"attrs", "filelock", "inotify-simple"}
    assert said["Requires-Python"] == ">=3.10"
    assert [line for line in said.get_all("Classifier") if "Python :: 3." in line] == [
        f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 16)
    ]


def test_installed_command_is_the_one_of_the_source(installed):
    assert (installed / "chaperone").read_bytes() == pathlib.Path(
        ROOT, "bin/chaperone"
    ).read_bytes()
    assert run(installed / "chaperone", "--version", cwd="/") == "chaperone 0.2.0\n"


def test_installed_command_holds_a_run_and_shows_it(installed, spool):
    spec = {"id": "first", "program": {"command": "echo out; echo err >&2; exit 3"}}
    assert run(installed / "chaperone", "run", "-", input=json.dumps(spec), cwd="/") == "first\n"
    status = json.loads(run(installed / "chaperone", "status", "first", cwd="/"))
    assert (status["state"], status["return_code"], status["stdout"]["bytes"]) == (
        "terminated",
        3,
        4,
    )
    assert subprocess.run([installed / "chaperone", "wait", "first"], cwd="/").returncode == 3


def test_installed_package_starts_and_follows_from_python(installed, spool):
    text = """if True:
        import chaperone, sys
        spool = chaperone.Spool(sys.argv[1])
        run = spool.start({"program": {"argv": ["echo", "hello"]}})
        print(run.wait(60).return_code, run.read())
    """
    assert run(installed / "python", "-c", text, spool, cwd="/") == "0 b'hello\\n'\n"


def test_command_is_found_through_a_symlink_and_by_a_relative_path(installed, tmp_path):
    os.symlink(installed / "chaperone", tmp_path / "linked")
    os.symlink("linked", tmp_path / "again")
    assert run("./again", "--version", cwd=tmp_path) == "chaperone 0.2.0\n"
    assert run("sh", "chaperone", "--version", cwd=installed) == "chaperone 0.2.0\n"


def test_command_starts_without_site(installed, spool, tmp_path):
    """
    Half of the time of a start; only where nothing else finds the package does it go the long way.
    """
    program = {
        "argv": [
            str(installed / "python"),
            "-c",
            "import os; print(open(f'/proc/{os.getppid()}/cmdline').read())",
        ]
    }
    run(
        installed / "chaperone",
        "run",
        "--id",
        "a",
        "-",
        input=json.dumps({"program": program}),
        cwd="/",
    )
    words = (spool / "a" / "stdout").read_text().split("\0")
    assert words[1:4] == ["-I", "-S", str(installed / "chaperone")]


def test_command_of_an_editable_install_goes_the_long_way(tmp_path):
    """
    Beside such a command there is no package: `site` knows where it is; and a ./chaperone of the
    caller's is not taken for it.
    """
    place = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    shutil.copy(f"{ROOT}/bin/chaperone", place / "bin")
    (site_packages,) = place.glob("lib/python*/site-packages")
    (site_packages / "editable.pth").write_text(f"{ROOT}\n")
    (tmp_path / "chaperone").mkdir()
    (tmp_path / "chaperone" / "__main__.py").write_text("print('planted')")
    assert run(place / "bin/chaperone", "--version", cwd=tmp_path) == "chaperone 0.2.0\n"


def test_entry_works_by_module_and_by_path(spool, tmp_path):
    main = f"{ROOT}/chaperone/__main__.py"
    for argv in (["-m", "chaperone"], [main], ["-I", "-S", main]):
        assert (
            run(sys.executable, *argv, "--version", cwd=ROOT if "-m" in argv else tmp_path)
            == "chaperone 0.2.0\n"
        )
        assert "usage: chaperone tail" in run(sys.executable, *argv, "tail", "--help", cwd=ROOT)
        assert run(sys.executable, *argv, "ls", "--json", cwd=ROOT) == ""


COMPILE = ["-m", "compileall", "-q", "--invalidation-mode"]
CACHES = {
    "none": [],
    "its own": ["timestamp"],
    "by the hash of the source": ["checked-hash"],
    "that nothing checks": ["unchecked-hash"],
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("then", ["", "changed", "torn"])
def test_module_comes_from_its_cache_only_if_that_is_of_its_source(tmp_path, cache, then):
    package = tmp_path / "chaperone"
    shutil.copytree(f"{ROOT}/chaperone", package, ignore=shutil.ignore_patterns("__pycache__"))
    main, roof = package / "__main__.py", package / "__init__.py"
    for mode in CACHES[cache]:
        run(sys.executable, *COMPILE, mode, package)
    version = "0.2.0"
    if then == "changed":
        roof.write_text(roof.read_text().replace('"0.2.0"', '"0.2.10"'))
        version = "0.2.0" if cache == "that nothing checks" else "0.2.10"
    elif then == "torn":
        for path in package.rglob("*.pyc"):
            path.write_bytes(path.read_bytes()[:9])
    for _ in range(2):
        assert run(sys.executable, "-I", "-S", main, "--version") == f"chaperone {version}\n"


# -- what goes on when the package goes

WAITS = "echo out; until [ -e {go} ]; do sleep 0.01; done; echo more; (setsid sleep 600 &); exit 9"
SURVIVES = {"on_disconnect": "survive", "lease": 100}


def removed(place):
    """The package with its environment, `site-packages` and all."""
    shutil.rmtree(place)


def upgraded(place):
    """
    Another version, that shares no word with the one that runs, in the same files; and nothing else
    is in `site-packages`.
    """
    (site_packages,) = place.glob("lib/python*/site-packages")
    for path in site_packages.rglob("*"):
        if path.is_file():
            path.unlink()
            path.write_text(
                "raise SystemExit('the new version was imported')\n"
                if path.suffix == ".py"
                else "exit 99\n"
            )


@pytest.mark.parametrize("change", [removed, upgraded])
def test_every_run_outlives_its_installation(installed, spool, tmp_path, sshd, monkeypatch, change):
    """
    Whoever upgrades or removes the package harms nothing that runs: cold, warm, over ssh,
    surviving, cut and connected again, adopted, stopped.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    place, go = tmp_path / "venv", tmp_path / "go"
    shutil.copytree(installed.parent, place, symlinks=True)
    command = place / "bin/chaperone"
    over_ssh = {"remote": sshd.remote(remote_dir=str(tmp_path / "far"))}
    runs = {
        "cold": {},
        "stopped": {"program": {"command": "trap '' TERM; echo out; while :; do sleep 0.05; done"}},
        "timeout": {"program": {"command": "echo out; exec sleep 600"}, "timeouts": {"run": 4}},
        "warm": {},
        "ssh": over_ssh,
        "survive": SURVIVES,
        "survive-ssh": {**over_ssh, **SURVIVES},
        "adopted": SURVIVES,
        "adopted-ssh": {**over_ssh, **SURVIVES},
    }
    launcher = subprocess.Popen([command, "launcher"], stdin=subprocess.DEVNULL, cwd="/")
    until((spool / ".launcher").exists)
    for run_id, fields in runs.items():
        spec = {
            "id": run_id,
            "program": {"command": WAITS.format(go=go)},
            "stop": {"grace_period": 5},
            **fields,
        }
        run(
            command,
            "run",
            "--warm" if run_id == "warm" else "--detach",
            "-",
            input=json.dumps(spec),
            cwd="/",
        )
    for run_id in runs:
        until(lambda run_id=run_id: (spool / run_id / "stdout").read_bytes() == b"out\n")
    for run_id in ("adopted", "adopted-ssh"):
        os.kill(live(spool, run_id)["chaperone_pid"], signal.SIGKILL)
        until(
            lambda run_id=run_id: (
                json.loads(run(command, "status", run_id))["state"] == "unattended"
            )
        )
        run(command, "adopt", "--detach", run_id, cwd="/")
    up = {
        run_id: connected(spool, run_id)
        for run_id in runs
        if run_id not in ("cold", "stopped", "timeout", "warm")
    }

    change(place)

    for run_id, status in up.items():
        if run_id != "ssh":  # of that one the connection is the life
            os.kill(status["connection"]["pid"], signal.SIGKILL)
    for run_id, status in up.items():
        if run_id != "ssh":
            until(
                lambda run_id=run_id, status=status: (
                    connected(spool, run_id)["connection"]["drops"] > status["connection"]["drops"]
                )
            )
    (spool / "stopped" / "control").write_text("nonsense\nsignal USR9\nstop 0.1 by=test\n")
    go.touch()
    for run_id in runs:
        until((spool / run_id / "status.json").exists, what=f"{run_id} has ended")
    launcher.kill()
    launcher.wait()
    ends = {run_id: json.loads((spool / run_id / "status.json").read_text()) for run_id in runs}
    for run_id, signum, reason in (
        ("stopped", "SIGKILL", "request"),
        ("timeout", "SIGTERM", "timeout"),
    ):
        assert (
            ends[run_id]["signal"],
            ends[run_id]["stop"]["reason"],
            ends[run_id]["complete"],
        ) == (signum, reason, True)
        del ends[run_id]
    for run_id, status in ends.items():
        log = spool / run_id / "log"
        assert (
            status["state"],
            status["return_code"],
            status["complete"],
            status["leftovers"],
        ) == ("terminated", 9, True, 1), (run_id, log.read_text())
        assert (spool / run_id / "stdout").read_bytes() == b"out\nmore\n"
    until(lambda: not os.listdir(spool / ".running"))
    for far in (tmp_path / ".chaperone", tmp_path / "far"):
        until(lambda far=far: not os.listdir(far))


def live(spool, run_id):
    return json.loads((spool / run_id / "running.json").read_text())


def connected(spool, run_id):
    """Its status, when its connection is up."""
    return until(
        lambda: (
            (status := live(spool, run_id))["connection"]
            and status["connection"]["state"] == "up"
            and status["pid"]
            and status
        )
    )
