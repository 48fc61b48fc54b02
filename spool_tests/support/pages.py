"""
Code blocks, transcripts and tables of a page.
"""

import re
import textwrap


def blocks(path, language):
    """The code blocks of a language in a page, dedented."""
    found = re.findall(
        rf"^\.\. code-block:: {language}\n((?:\n|    .*\n)+)", path.read_text() + "\n", re.M
    )
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found]


def typed(block):
    """
    A transcript as [(command, what it printed)]; a command goes on in lines that begin with "> ".
    """
    found = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append([line[2:], ""])
        elif line.startswith("> ") and not found[-1][1]:
            found[-1][0] += "\n" + line[2:]
        else:
            found[-1][1] += line + "\n"
    return found


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
