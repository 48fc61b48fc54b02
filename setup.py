from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent

setup(
    name="chaperone-spool",
    version="0.2.0",
    description="A small process that stays with one program for its whole life and leaves its output and outcome in a directory",
    long_description=(here / "README.rst").read_text() if (here / "README.rst").exists() else "",
    long_description_content_type="text/x-rst",
    author="The chaperone authors",
    license="MIT",
    packages=find_packages(include=["chaperone", "chaperone.*"]),
    package_data={"chaperone": ["py.typed", "*/*.sh"]},
    # Not a console_scripts entry: its wrapper imports what a start can't afford.
    scripts=["bin/chaperone"],
    python_requires=">=3.10",
    install_requires=["attrs>=22.2", "filelock>=3.12", "inotify-simple>=1.3"],
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: System :: Distributed Computing",
        "Topic :: System :: Systems Administration",
        "Typing :: Typed",
    ],
)
