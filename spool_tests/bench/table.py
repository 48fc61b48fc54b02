"""
What was measured, and how it is printed: figures, what they must reach, the table.

Knows: numbers.  Must not know: what was measured, or how.
"""

import math
import random
import statistics


def interleaved(rounds, variants):
    """
    Measure variants in turns, in another order each round, so that other work of the machine hits
    all of them alike.

    Args:
        rounds (int): After one that is thrown away.
        variants (dict): Label to a function that measures once and returns a float.
    Returns:
        dict: Label to a list of floats.
    """
    found = {label: [] for label in variants}
    for count in range(rounds + 1):
        for label in random.sample(list(variants), len(variants)):
            value = variants[label]()
            if count:
                found[label].append(value)
    return found


def median(values):
    return statistics.median(values)


def percentile(values, percent):
    """The smallest value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Row:
    """
    One row of the table.

    Attributes:
        name (str): As given to bin/bench.
        what (str): What is measured, for people.
        figures (list): (label, unit, n, median, p99).
        claims (list): (label, value, "<=" or ">=", bound).
        notes (list): Sentences.
        curves (dict): Of a row about growth: call to [(size, seconds)].
    """

    def __init__(self, name, what):
        self.name, self.what = name, what
        self.figures, self.claims, self.notes = [], [], []
        self.curves = {}

    @classmethod
    def of(cls, value):
        """The row that `as_json` was made of."""
        row = cls(value["row"], value["what"])
        row.figures = [tuple(figure.values()) for figure in value["figures"]]
        row.claims = [tuple(claim.values())[:4] for claim in value["claims"]]
        row.notes, row.curves = value["notes"], value["curves"]
        return row

    def figure(self, label, values, unit, scale=1.0):
        """Keep a series; returns its median, unscaled."""
        self.figures.append(
            (label, unit, len(values), median(values) * scale, percentile(values, 99) * scale)
        )
        return median(values)

    def figures_of(self, found, unit, scale=1.0):
        return {
            label: self.figure(label, values, unit, scale)
            for label, values in found.items()
            if values
        }

    def claim(self, label, value, relation, bound):
        self.claims.append((label, value, relation, bound))

    def note(self, sentence):
        self.notes.append(sentence)

    def short(self):
        """The claims that were not reached."""
        return [claim for claim in self.claims if not reached(claim)]

    def as_json(self):
        return {
            "row": self.name,
            "what": self.what,
            "figures": [
                dict(zip(("label", "unit", "n", "median", "p99"), figure, strict=True))
                for figure in self.figures
            ],
            "claims": [
                dict(
                    zip(("label", "value", "relation", "bound"), claim, strict=True),
                    reached=reached(claim),
                )
                for claim in self.claims
            ],
            "notes": self.notes,
            "curves": self.curves,
        }

    def as_text(self):
        lines = [f"{self.name}: {self.what}"]
        width = max((len(figure[0]) for figure in self.figures), default=0)
        first = self.figures[0][3] if self.figures else 0
        if self.figures:
            lines.append(f"  {'':{width}}  {'n':>5}  {'median':>10}  {'p99':>10}            ratio")
        for label, unit, n, middle, worst in self.figures:
            ratio = f"{middle / first:8.2f}" if first else ""
            lines.append(
                f"  {label:{width}}  {n:5}  {number(middle):>10}  {number(worst):>10} "
                f" {unit:6}  {ratio}"
            )
        for claim in self.claims:
            label, value, relation, bound = claim
            lines.append(
                f"  {'reached  ' if reached(claim) else 'SHORT    '}{label}: "
                f"{number(value)}, to reach {relation} {number(bound)}"
            )
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


def reached(claim):
    _, value, relation, bound = claim
    return value <= bound if relation == "<=" else value >= bound


def number(value):
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - int(math.floor(math.log10(abs(value)))))}f}"
