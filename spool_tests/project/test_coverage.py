"""
The table of coverage, of files that are made up.
"""

import pytest

from spool_tests.support import coverage

pytestmark = pytest.mark.once
FILES = {
    "chaperone/spool/one.py": (90, 10, 90),
    "chaperone/spool/two.py": (900, 100, 960),
    "chaperone/model/hops/one.py": (10, 0, 9),
    "chaperone/hold/one.py": (100, 20, 30),
    "chaperone/hold/__init__.py": (0, 0, 0),
}


def test_table_has_a_line_for_each_folder():
    assert coverage.table(coverage.by_folder(FILES)) == (
        " lines branches covered%\n"
        "   100       20     25.0  chaperone/hold\n"
        "    10        0     90.0  chaperone/model/hops\n"
        "   990      110     95.5  chaperone/spool\n"
    )


def test_folder_that_must_be_covered_and_is_not_is_named():
    assert coverage.lacking(coverage.by_folder(FILES)) == [
        "chaperone/model/hops is covered by 90.0 %, want 95 %"
    ]
