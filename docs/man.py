#!/usr/bin/env python3
"""
Make the man pages from the pages beside this file: docs/man.py VERSION DIRECTORY.

`bin/docs` calls it, and setup.py for a wheel. It needs docutils.
"""

import pathlib
import re
import sys

from docutils import core, nodes

HERE = pathlib.Path(__file__).resolve().parent
# Each man page: its source, and what it is in a few words.
PAGES = {
    "chaperone.1": ("command-line", "stays with one program for its whole life"),
    "chaperone-spec.5": ("spec", "what chaperone is to run, and how"),
    "chaperone-spool.5": ("spool-format", "the format of chaperone's spool on disk"),
}
MANUALS = {source: page for page, (source, _) in PAGES.items()}


def man_page(page, version):
    """The text of one man page; `page` is a key of PAGES."""
    source, summary = PAGES[page]
    name, _, section = page.rpartition(".")
    document = core.publish_doctree(
        (HERE / f"{source}.rst").read_text(),
        settings_overrides={"halt_level": 2, "syntax_highlight": "none"},
    )
    (title,) = [node for node in document.children if isinstance(node, nodes.title)]
    title.replace_self(
        [
            nodes.title("", name),
            nodes.subtitle("", summary),
            nodes.docinfo(
                "",
                nodes.version("", version),
                _field("manual_section", section),
                _field("manual_group", "chaperone"),
            ),
        ]
    )
    for literal in [*document.findall(nodes.literal)]:
        other = re.fullmatch(r"docs/([\w-]+)\.rst", literal.astext())
        if other and other[1] in MANUALS:
            other_name, _, other_section = MANUALS[other[1]].rpartition(".")
            literal.replace_self([nodes.strong("", other_name), nodes.Text(f"({other_section})")])
    for table in [*document.findall(nodes.table)]:
        table.replace_self(_definitions(table))
    return core.publish_from_doctree(document, writer="manpage").decode()


def _definitions(table):
    """
    A table as a list of terms, which any terminal is wide enough for: the first cell of a row is
    the term. The others are one sentence; from the third on a cell comes with its column's head.
    """
    head, *rows = [[*row.children] for row in table.findall(nodes.row)]
    if not [*table.findall(nodes.thead)]:
        rows = [head, *rows]
    definitions = nodes.definition_list()
    for first, *others in rows:
        text = nodes.paragraph()
        for name, cell in zip(head[1:], others, strict=True):
            if text.children and cell.children:
                title = name.astext()
                text += nodes.Text(": " if title == "means" else f"; {title}: ")
            text += [inline for paragraph in cell.children for inline in paragraph.children]
        body = nodes.definition("", text)
        term = nodes.term("", "", *(inline for cell in first.children for inline in cell.children))
        definitions += nodes.definition_list_item("", term, body)
    return definitions


def _field(name, value):
    body = nodes.field_body("", nodes.paragraph("", value))
    return nodes.field("", nodes.field_name("", name), body)


def make(version, directory):
    """
    Write all man pages.

    Args:
        version (str): Of the package; it stands at the foot of each page.
        directory (str): Made if it is not there.
    Returns:
        dict: {"man1": [path, ...], "man5": [path, ...]}
    """
    made = {}
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        path = pathlib.Path(directory, page)
        path.write_text(man_page(page, version))
        made.setdefault(f"man{path.suffix[1:]}", []).append(str(path))
    return made


if __name__ == "__main__":
    make(*sys.argv[1:])
