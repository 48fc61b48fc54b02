"""
The figures in docs/performance.rst, made of the JSON that a run of the bench has written.

Knows: the page's marks, the table.  Must not know: what was measured.
"""

import json
import os

from .growth import picture
from .table import Row

BEGIN, END = ".. the table: bin/bench --page", ".. the end of the table"
CURVES = {
    "growth-history": ("growth-history.svg", "ended and collected runs"),
    "growth-live": ("growth-live.svg", "live runs"),
    "growth-ended": ("growth-ended.svg", "ended runs, not collected"),
}


def table(found):
    """
    What stands between the marks.

    Args:
        found (dict): As `--json` writes it.
    """
    lines = [
        f"Measured on {found['date']} with ``bin/bench{found['words']}``;"
        f" the spools were on {found['disk']}.",
        "The ratios of a row are relative to its first line.",
        "``SHORT`` marks a target that was missed.",
        "",
        ".. code-block:: text",
        "",
        f"    {found['machine']}",
    ]
    for value in found["rows"]:
        lines.append("")
        lines += [f"    {line}".rstrip() for line in Row.of(value).as_text().split("\n")]
    return "\n".join(lines)


def write(json_path, page_path):
    """Put the table into the page, and the curves beside it."""
    with open(json_path) as file:
        found = json.load(file)
    with open(page_path) as file:
        text = file.read()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with open(page_path, "w") as file:
        file.write(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")
    for value in found["rows"]:
        if value.get("curves"):
            name, across = CURVES[value["row"]]
            with open(os.path.join(os.path.dirname(page_path), name), "w") as file:
                file.write(picture(value["curves"], across))
