"""
The package as a user installs it: a wheel in a fresh environment, and the command that comes with it.

Knows: pip, the wheels that bin/venv laid by.  Must not know: the source tree, once the wheel is made.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import filelock
import pytest

from spool_tests.conftest import ROOT, absent, until

pytestmark = pytest.mark.once
WHEELS = pathlib.Path(sys.prefix, "wheels")


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves its traces where it is made."""
    if not WHEELS.exists():
        absent(f"no wheels in {WHEELS}: bin/venv lays them by")

    def make(place):
        (place / "tree").mkdir(parents=True)
        for name in ("setup.py", "README.rst", "LICENSE"):
            shutil.copy(f"{ROOT}/{name}", place / "tree")
        for name in ("chaperone", "bin"):
            shutil.copytree(f"{ROOT}/{name}", place / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", place, place / "tree")

    (made,) = once_for_all_workers(tmp_path_factory, "wheel", make).glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment's bin/, with the wheel installed; no network is asked for."""

    def make(place):
        run(sys.executable, "-m", "venv", "--without-pip", place)
        run(sys.executable, "-m", "pip", "--python", place / "bin/python", "install", "-q", "--no-index", "--find-links", WHEELS, wheel)

    return once_for_all_workers(tmp_path_factory, "installed", make) / "bin"


def test_wheel_holds_all_that_runs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    parts = {name.partition("/")[2] for name in names if name.startswith("chaperone/")}
    shipped = {path.name for path in pathlib.Path(ROOT, "chaperone").iterdir() if path.suffix in (".py", ".sh", ".typed")}
    assert wheel.name == "chaperone_spool-0.1.0-py3-none-any.whl"
    assert parts == shipped
    assert {name for name in names if "/" in name and ".dist-info" not in name and not name.startswith("chaperone/")} == {
        "chaperone_spool-0.1.0.data/scripts/chaperone"
    }


def test_installed_command_is_the_one_of_the_source(installed):
    assert (installed / "chaperone").read_bytes() == pathlib.Path(ROOT, "bin/chaperone").read_bytes()
    assert run(installed / "chaperone", "--version", cwd="/") == "chaperone 0.1.0\n"


def test_installed_command_holds_a_run_and_shows_it(installed, spool):
    spec = {"id": "first", "program": {"command": "echo out; echo err >&2; exit 3"}}
    assert run(installed / "chaperone", "run", "-", input=json.dumps(spec), cwd="/") == "first\n"
    status = json.loads(run(installed / "chaperone", "status", "first", cwd="/"))
    assert (status["state"], status["return_code"], status["stdout"]["bytes"]) == ("terminated", 3, 4)
    assert subprocess.run([installed / "chaperone", "wait", "first"], cwd="/").returncode == 3


def test_installed_package_starts_and_follows_from_python(installed, spool):
    text = """if True:
        import chaperone, sys
        spool = chaperone.Spool(sys.argv[1])
        run = spool.start({"program": {"argv": ["echo", "hello"]}})
        print(run.wait(10).return_code, run.read())
    """
    assert run(installed / "python", "-c", text, spool, cwd="/") == "0 b'hello\\n'\n"


def test_command_is_found_through_a_symlink_and_by_a_relative_path(installed, tmp_path):
    os.symlink(installed / "chaperone", tmp_path / "linked")
    os.symlink("linked", tmp_path / "again")
    assert run("./again", "--version", cwd=tmp_path) == "chaperone 0.1.0\n"
    assert run("sh", "chaperone", "--version", cwd=installed) == "chaperone 0.1.0\n"


def test_command_starts_without_site(installed, spool, tmp_path):
    """Half of the time of a start; only where nothing else finds the package does it go the long way."""
    program = {"argv": [str(installed / "python"), "-c", "import os; print(open(f'/proc/{os.getppid()}/cmdline').read())"]}
    run(installed / "chaperone", "run", "--id", "a", "-", input=json.dumps({"program": program}), cwd="/")
    words = (spool / "a" / "stdout").read_text().split("\0")
    assert words[1:4] == ["-I", "-S", str(installed / "chaperone")]


def test_command_of_an_editable_install_goes_the_long_way(tmp_path):
    """Beside such a command there is no package: `site` knows where it is; and a ./chaperone of the caller's is not taken for it."""
    place = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    shutil.copy(f"{ROOT}/bin/chaperone", place / "bin")
    (site_packages,) = place.glob("lib/python*/site-packages")
    (site_packages / "editable.pth").write_text(f"{ROOT}\n")
    (tmp_path / "chaperone").mkdir()
    (tmp_path / "chaperone" / "__main__.py").write_text("print('planted')")
    assert run(place / "bin/chaperone", "--version", cwd=tmp_path) == "chaperone 0.1.0\n"


def test_entry_works_by_module_and_by_path(spool, tmp_path):
    main = f"{ROOT}/chaperone/__main__.py"
    for argv in (["-m", "chaperone"], [main], ["-I", "-S", main]):
        assert run(sys.executable, *argv, "--version", cwd=ROOT if "-m" in argv else tmp_path) == "chaperone 0.1.0\n"
        assert "usage: chaperone tail" in run(sys.executable, *argv, "tail", "--help", cwd=ROOT)
        assert run(sys.executable, *argv, "ls", "--json", cwd=ROOT) == ""


def test_held_run_outlives_its_installation(installed, spool, tmp_path):
    """Whoever upgrades or removes the package must not harm what runs (a chaperone imports nothing once its program has started)."""
    place = tmp_path / "venv"
    shutil.copytree(installed.parent, place, symlinks=True)
    spec = {"id": "last", "program": {"command": f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exit 9"}}
    run(place / "bin/chaperone", "run", "--detach", "-", input=json.dumps(spec), cwd="/")
    until(lambda: '"running"' in (spool / "last" / "running.json").read_text())
    shutil.rmtree(place)
    (tmp_path / "go").touch()
    until(lambda: (spool / "last" / "status.json").exists())
    assert json.loads((spool / "last" / "status.json").read_text())["return_code"] == 9
