import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

# Setuptools' own, once setuptools is imported.
from distutils.command.install_data import install_data  # isort: skip

here = Path(__file__).resolve().parent


class Sdist(sdist):
    """The package and all that a distributor needs to read and to test it."""

    folders = ("bin", "docs", "spool_tests")
    files = ("CHANGELOG.rst", "LICENSE", ".importlinter", ".mypy.ini", ".plain-words")
    files += (".pre-commit-config.yaml", ".pytest.ini", ".ruff.toml")

    def make_release_tree(self, base_dir, files):
        # Not by MANIFEST.in: it leaves out links to directories, and the frozen spools have some.
        super().make_release_tree(base_dir, files)
        made = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache")
        for name in self.folders:
            shutil.copytree(
                here / name, Path(base_dir, name), symlinks=True, ignore=made, dirs_exist_ok=True
            )
        for name in self.files:
            shutil.copy2(here / name, Path(base_dir, name))


class ManPages(install_data):
    """What is installed beside the package: the man pages, made from docs/ when it is built."""

    def run(self):
        make = runpy.run_path(str(here / "docs/man.py"))["make"]
        made = make(self.distribution.get_version(), "build/man")
        self.data_files = [(f"share/man/{section}", paths) for section, paths in made.items()]
        super().run()


setup(
    name="chaperone-spool",
    version="0.2.0",
    description=(
        "A small process that stays with one program for its whole life"
        " and leaves its output and outcome in a directory"
    ),
    long_description=(here / "README.rst").read_text(),
    long_description_content_type="text/x-rst",
    author="The chaperone authors",
    license="MIT",
    packages=find_packages(include=["chaperone", "chaperone.*"]),
    package_data={"chaperone": ["py.typed", "*/*.sh", "*/*/*.sh", "cli/shells/*", "agent/page/*"]},
    # Not a console_scripts entry: its wrapper imports what a start can't afford.
    scripts=["bin/chaperone"],
    data_files=[("share/man", [])],
    setup_requires=["docutils"],
    python_requires=">=3.10",
    install_requires=["attrs>=22.2", "filelock>=3.12", "inotify-simple>=1.3"],
    # Pure Python, all that they need too: `chaperone deploy` sends them along. The last four are
    # what they need of an old Python, which the other host may have whatever is here.
    extras_require={
        "agent": [
            *("starlette>=1.0", "hypercorn>=0.18", "httpx>=0.28"),
            *("exceptiongroup>=1.2", "taskgroup>=0.2", "tomli>=2.0", "typing-extensions>=4.12"),
        ],
        # A trigger has `on_kill` since then; httpx is for the URL of an agent.
        "airflow": ["apache-airflow>=3.3", "httpx>=0.28"],
    },
    cmdclass={"sdist": Sdist, "install_data": ManPages},
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 16)),
        "Topic :: System :: Distributed Computing",
        "Topic :: System :: Systems Administration",
        "Typing :: Typed",
    ],
)
