"""The page of performance is made of its figures, and names every row of the bench."""

import argparse
import contextlib
import json
import pathlib
import re

import pytest

from spool_tests.bench import machine, page
from spool_tests.bench.__main__ import FIGURES, PAGE, ROWS, measured
from spool_tests.bench.growth import picture, slope
from spool_tests.support.places import ROOT

pytestmark = pytest.mark.once


def test_page_is_made_of_the_figures():
    found = json.loads(pathlib.Path(ROOT, FIGURES).read_text())
    text = pathlib.Path(ROOT, PAGE).read_text()
    assert f"{page.BEGIN}\n\n{page.table(found)}\n\n{page.END}\n" in text
    drawn = [row for row in found["rows"] if row["curves"]]
    assert {row["row"] for row in drawn} == set(page.CURVES)
    for row in drawn:
        name, across = page.CURVES[row["row"]]
        svg = pathlib.Path(ROOT, "docs", name).read_text()
        assert svg == picture(row["curves"], across)
        assert f".. image:: {name}\n" in text


def test_page_explains_every_row():
    text = pathlib.Path(ROOT, PAGE).read_text()
    named = re.findall(r"^([a-z-]+(?:, [a-z-]+)*)\n    \S", text, re.M)
    words = [word for line in named for word in line.split(", ")]
    assert [row for row in ROWS if not any(row.startswith(word) for word in words)] == []
    found = json.loads(pathlib.Path(ROOT, FIGURES).read_text())
    assert {row["row"] for row in found["rows"]} == set(ROWS)


def test_row_that_fails_is_no_row_that_reached_its_bounds(monkeypatch, capsys):
    def failing(lab, rounds):
        raise OSError("no agent")

    monkeypatch.setattr(machine, "journaled", lambda _: contextlib.nullcontext((None, "a disk")))
    monkeypatch.setitem(ROWS, "cold", failing)
    assert measured(argparse.Namespace(json=None, dir=None, rounds=None, rows=[]), ["cold"]) == 1
    assert capsys.readouterr().out.endswith("\nfalls short: cold (not measured)\n")


def test_slope_is_that_of_the_logarithms():
    assert slope([(0, 5.0), (10, 1.0), (100, 10.0), (1_000, 100.0)]) == pytest.approx(1)
    assert slope([(10, 3.0), (100, 3.0)]) == pytest.approx(0)
