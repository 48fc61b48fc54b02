"""
Code blocks and tables of a page.
"""

import re


def table(page, head):
    """The rows of the simple table whose first column is called so; markup taken off."""
    edges = re.search(rf"^(=[= ]+)\n{head} .*\n\1\n((?:.+\n)+?)\1\n", page, re.M)
    assert edges, head
    columns = [(match.start(), match.end()) for match in re.finditer("=+", edges[1])]
    return [
        [line[start : end if end != columns[-1][1] else None].strip() for start, end in columns]
        for line in edges[2].splitlines()
    ]


def words(text):
    return re.findall(r"``([^`]+)``", text)
