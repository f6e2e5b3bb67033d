"""A chart as SVG, to stand in a page: its colours are the page's, light or dark, and its figures
are a table for who cannot see it."""

import html
import math
from collections.abc import Sequence

from flashinfer.study.findings import Chart, Point, shown

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44  # room around the axes
COLOURS = 8  # --c0 to --c7 of the page
MARKERS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-4L4 3H-4z", "M0 4L4-3H-4z")
TICKS = 6  # about so many on an axis


class Axis:
    """Maps values to pixels."""

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float) -> None:
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        self.log, self.begin, self.end = log, begin, end
        self.ticks = _powers(min(finite), max(finite)) if log else _steps(min(finite), max(finite))
        low, high = (min(*finite, self.ticks[0]), max(*finite, self.ticks[-1]))
        self.low, self.high = self._scale(low), self._scale(high)

    def __call__(self, value: float) -> float:
        """The pixel of a value; one that has none on a logarithmic axis lies on its end."""
        at = self._scale(max(value, 1e-300)) if self.log else value
        share = (at - self.low) / ((self.high - self.low) or 1.0)
        return self.begin + min(1.0, max(0.0, share)) * (self.end - self.begin)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


def svg(chart: Chart) -> str:
    """The chart as an ``<svg>`` element, with a key above it where there are several series."""
    points = [point for series in chart.series.values() for point in series]
    bars = chart.kind == "bars"
    across = [p[0] for p in points] or [0.0]
    if bars:
        across = [-0.5, len(chart.labels) - 0.5]
    x = Axis([*across, *chart.marks.values()], chart.log_x, LEFT, WIDTH - RIGHT)
    tall = [p[1] for p in points] or [1.0]
    y = Axis(tall if chart.log_y else [0.0, *tall], chart.log_y, HEIGHT - BOTTOM, TOP)
    if bars:
        x.low, x.high = -0.5, len(chart.labels) - 0.5
    parts = [_grid(chart, x, y)]
    for number, (name, series) in enumerate(chart.series.items()):
        draw = _bars if bars else _line
        parts.append(draw(chart, number, name, series, x, y))
    for name, at in chart.marks.items():
        place = x(at)
        parts.append(
            f'<path class="mark" d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<text class="mark" transform="translate({place - 3:.1f} {TOP + 4}) rotate(-90)" '
            f'text-anchor="end">{html.escape(name)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(chart.title, quote=True)}: {html.escape(chart.y, quote=True)} '
        f'by {html.escape(chart.x, quote=True)}; the figures follow as a table">'
        f"{''.join(parts)}</svg>"
    )


def key(chart: Chart) -> str:
    """The names of the series beside their colours; nothing where there is one."""
    if len(chart.series) < 2:
        return ""
    names = "".join(
        f'<li><svg viewBox="-6 -6 12 12" aria-hidden="true"><path class="s{i % COLOURS}" '
        f'd="{MARKERS[i % len(MARKERS)]}"/></svg>{html.escape(name)}</li>'
        for i, name in enumerate(chart.series)
    )
    return f'<ul class="key">{names}</ul>'


def _grid(chart: Chart, x: Axis, y: Axis) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y.ticks:
        at = y(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        )
    places = enumerate(chart.labels) if chart.kind == "bars" else ((t, _tick(t)) for t in x.ticks)
    for tick, label in places:
        parts.append(
            f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(chart.x)}</text>"
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(chart.y)}</text>"
    )
    return "".join(parts)


def _line(chart: Chart, number: int, name: str, series: Sequence[Point], x: Axis, y: Axis) -> str:
    """A series as a line with a marker at each point, which tells its figures."""
    places = [(x(px), y(py)) for px, py in series]
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
    marker, colour = MARKERS[number % len(MARKERS)], f"s{number % COLOURS}"
    dots = ""
    if len(series) <= 64:
        dots = "".join(
            f'<path class="{colour}" transform="translate({px:.1f} {py:.1f})" d="{marker}">'
            f"<title>{html.escape(name)}: {shown(float(a))}, {shown(float(b))}</title></path>"
            for (px, py), (a, b) in zip(places, series, strict=True)
        )
    return f'<path class="line l{number % COLOURS}" d="M{path}"/>{dots}' if series else ""


def _bars(chart: Chart, number: int, name: str, series: Sequence[Point], x: Axis, y: Axis) -> str:
    """A series as bars, beside those of the other series."""
    room = 0.8 * (x(1) - x(0)) / len(chart.series)
    parts = []
    for at, value in series:
        left = x(at) + (number - len(chart.series) / 2) * room
        top, foot = y(value), HEIGHT - BOTTOM
        parts.append(
            f'<rect class="s{number % COLOURS}" x="{left:.1f}" y="{top:.1f}" '
            f'width="{max(1.0, room - 1):.1f}" height="{max(0.0, foot - top):.1f}">'
            f"<title>{html.escape(name)}: {shown(float(value))}</title></rect>"
        )
    return "".join(parts)


def _steps(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high``."""
    width = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(width / TICKS))
    step *= next(times for times in (1, 2, 5, 10) if width / (times * step) <= TICKS)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [n * step for n in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, or of two where there are few of them."""
    base = 10.0 if high / low >= 1000 else 2.0
    first = math.floor(math.log(low, base) + 1e-9)
    last = math.ceil(math.log(high, base) - 1e-9)
    every = max(1, -(-(last - first) // 10))
    return [base**n for n in range(first, max(last, first + 1) + every, every)]


def _tick(value: float) -> str:
    """A tick's label, short: 65,536 as 66k."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor / (10 if factor > 1e3 else 1):
            return f"{value / factor:.3g}{suffix}"
    return f"{value:,.4g}"
