"""What an experiment found: tables and charts, for the terminal, as JSON and on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Cell = str | float | int | None
Point = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``; a float is shown with three figures, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def lines(self) -> list[str]:
        """The table for a terminal, its columns aligned."""
        rows = [list(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        left = [not any(isinstance(row[i], (int, float)) for row in self.rows)
                for i in range(len(self.columns))]  # fmt: skip
        return [
            "  ".join(
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(row, widths, left, strict=True)
            ).rstrip()
            for row in rows
        ]


@dataclass(frozen=True)
class Chart:
    """Series of points over a common pair of axes.

    x, y      what the axes show, with the unit; log_x, log_y: they are logarithmic
    series    {name: points (x, y), ascending in x}
    marks     {name: x} of values worth knowing
    kind      "line", or "bars": the x of each point is the number of one of ``labels``
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["line", "bars"] = "line"
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    name      of the experiment; title: the same for people
    question  that it answers; paper: where that stands in the paper
    answer    sentences with the figures that were measured
    """

    name: str
    title: str
    question: str
    paper: str
    answer: Sequence[str]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()

    def as_dict(self) -> dict[str, Any]:
        """The figures, as ``--json`` has them."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The finding for a terminal."""
        found = [self.title, "", *self.answer]
        for table in self.tables:
            found += ["", table.title, *table.lines()]
        return found


def shown(cell: Cell) -> str:
    """A cell for people."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 999.5:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"


def percent(share: float) -> str:
    """A share, for people."""
    return f"{100 * share:.1f} %" if share < 0.9995 or share == 1 else f"{100 * share:.3f} %"
