"""
Branch coverage by folder, from what pytest-cov has measured.

    COVERAGE_FILE=FILE python -m spool_tests.support.coverage      as bin/test --coverage does

Only what the tests' own processes ran is counted. A chaperone is a process of its own, which is
started without site (`-I -S`) and ends by _exit(2), so nothing in it measures: of the folders that
chaperones run in, the table shows only what tests call directly.

Knows: the form of a coverage report, which folders must be covered.  Must not know: a test.
"""

import json
import os
import sys
import tempfile

MUST = ("chaperone/model", "chaperone/spool", "chaperone/follow")
LEAST = 95.0  # percent of lines and branches together


def by_folder(files):
    """
    Args:
        files (dict): Path to (lines, branches, how many of both were run).
    Returns:
        dict: Folder to the same, for all of its files.
    """
    folders = {}
    for path, numbers in sorted(files.items()):
        folder = os.path.dirname(path)
        sums = folders.get(folder, (0, 0, 0))
        folders[folder] = tuple(map(sum, zip(sums, numbers, strict=True)))
    return folders


def percent(lines, branches, run):
    """How much was run; an empty folder is covered."""
    return 100 * run / (lines + branches) if lines + branches else 100.0


def table(folders):
    """The lines of the table, as text."""
    rows = [
        f"{lines:>6,} {branches:>8,} {percent(lines, branches, run):>8.1f}  {folder}\n"
        for folder, (lines, branches, run) in folders.items()
    ]
    return " lines branches covered%\n" + "".join(rows)


def lacking(folders):
    """A sentence for each folder that must be covered and is not."""
    return [
        f"{folder} is covered by {percent(*numbers):.1f} %, want {LEAST:g} %"
        for folder, numbers in folders.items()
        if folder.startswith(MUST) and percent(*numbers) < LEAST
    ]


def measured():
    """The files of the package, as `by_folder` takes them."""
    import coverage

    data = coverage.Coverage(config_file=False)
    data.load()
    with tempfile.NamedTemporaryFile() as report:
        data.json_report(outfile=report.name)
        files = json.load(report)["files"]
    names = ("num_statements", "num_branches", "covered_lines", "covered_branches")
    found = {path: [file["summary"][name] for name in names] for path, file in files.items()}
    return {path: (a, b, c + d) for path, (a, b, c, d) in found.items()}


if __name__ == "__main__":
    folders = by_folder(measured())
    sys.stdout.write(table(folders))
    for sentence in lacking(folders):
        sys.stdout.write(f"{sentence}\n")
    sys.exit(bool(lacking(folders)))
