"""
What a benchmark finds: figures with their spread, in tables, and curves, in plots.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import attrs


@attrs.frozen
class Figure:
    """
    The median and the quartiles of samples.

    :ivar form: how a number is written.
    """

    median: float
    low: float
    high: float
    form: str = "{:,.0f}"

    @classmethod
    def of(cls, samples: Sequence[float], form: str = "{:,.0f}") -> Figure:
        """
        The figure that samples give; a single one has no spread.
        """
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], form)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, form)

    def __str__(self) -> str:
        median, low, high = (self.form.format(each) for each in (self.median, self.low, self.high))
        return median if low == median == high else f"{median} ({low} to {high})"


def ratio(over: Sequence[float], under: Sequence[float], form: str = "{:.3f}") -> Figure:
    """
    The ratio of samples that were taken in turn.
    """
    return Figure.of([a / b for a, b in zip(over, under, strict=True)], form)


@attrs.frozen
class Verdict:
    """
    Whether a figure is what it is meant to be.
    """

    aim: str
    met: bool
    figure: Figure

    def __str__(self) -> str:
        return f"{self.aim}: {'met' if self.met else 'missed'}"


@attrs.frozen
class Aim:
    """
    What a figure is meant to be.

    :ivar sense: ``>=`` or ``<=``.
    """

    sense: str
    bound: float

    def judge(self, figure: Figure) -> Verdict:
        """
        Whether the median is that.
        """
        met = figure.median >= self.bound if self.sense == ">=" else figure.median <= self.bound
        return Verdict(f"{self.sense} {self.bound:g}", met, figure)


def at_least(bound: float) -> Aim:
    """
    An aim that is met by the bound and all above.
    """
    return Aim(">=", bound)


def at_most(bound: float) -> Aim:
    """
    An aim that is met by the bound and all below.
    """
    return Aim("<=", bound)


Cell = str | Figure | Verdict


@attrs.define
class Table:
    """
    Rows of figures.

    :ivar name: what its file is called.
    :ivar caption: what is compared, in which unit.
    :ivar named: how many columns at the beginning of a row say what it is about.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = attrs.field(factory=list)
    named: int = 1

    def __str__(self) -> str:
        lines = [self.columns, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = (
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([self.caption, *texts, ""])


@attrs.frozen
class Curve:
    """
    One line of a plot.
    """

    x: Sequence[float]
    y: Sequence[float]


@attrs.frozen
class Plot:
    """
    Panels side by side with the same axes, each with curves by their labels.

    :ivar name: what its file is called.
    """

    name: str
    caption: str
    x: str
    y: str
    panels: Mapping[str, Mapping[str, Curve]]

    def __str__(self) -> str:
        return f"{self.caption} (a plot: see --write)\n"


@attrs.frozen
class Note:
    """
    A sentence: what was left out, or what a table does not tell.
    """

    text: str

    def __str__(self) -> str:
        return f"{self.text}\n"


Result = Table | Plot | Note


def comparison(
    name: str,
    caption: str,
    unit: str,
    reports: Mapping[str, Sequence[Mapping[str, float]]],
    aims: Mapping[str, Aim],
    scale: float = 1,
    subject: str = "connlimit",
) -> Table:
    """
    The rate of each server, and how many times that of each the subject's is.

    The ratios are of what is done in a second of the servers' CPU, of which other programs take nothing; a
    server that is loaded as it should be uses its CPU entirely, and then that is what it does in a second.

    :param reports: what the load reported of each server, taken in turn.
    :param aims: what the subject's rate is meant to be, in those of others.
    :param scale: by what the rates are divided.
    """
    columns = ["", unit, "CPU used", f"{subject}, times that"]
    table = Table(name, caption, columns + ["aim"] * bool(aims))
    by_cpu = {
        way: [report["rate"] * report["seconds"] / report["cpu"] for report in each]
        for way, each in reports.items()
    }
    for way, each in reports.items():
        used = sum(report["cpu"] for report in each) / sum(report["seconds"] for report in each)
        rate = Figure.of([report["rate"] / scale for report in each])
        cells: list[Cell] = [way, rate, f"{used:.2f}", "", ""]
        if way != subject:
            cells[3] = times = ratio(by_cpu[subject], by_cpu[way])
            if way in aims:
                cells[4] = aims[way].judge(times)
        table.rows.append(cells[: len(table.columns)])
    return table
