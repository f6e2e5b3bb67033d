"""A comparison for people: lines of text, a page with a heat map, JUnit's XML."""

import html
import math
from collections.abc import Iterator
from xml.sax.saxutils import quoteattr

from flashinfer.oracle.compare import Comparison, Operation

SHOWN = 40  # positions of the heat map; more are put together
CELL = 14  # pixels
# Of the largest difference, as a share of what it may be: up to each of these, a colour.
COLOURS = (
    (0.5, "#2c7bb6"), (1.0, "#abd9e9"), (10.0, "#fdae61"), (float("inf"), "#d7191c"),
)  # fmt: skip
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;
color:#111;background:#fff}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2em .6em;text-align:left;border-bottom:1px solid #ccc}.wrong{color:#b00}
.key i{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em;vertical-align:-.15em}
@media(prefers-color-scheme:dark){body{color:#eee;background:#111}td,th{border-color:#444}
.wrong{color:#f88}}"""


def lines(found: Comparison) -> Iterator[str]:
    """What the command prints."""
    how = "each operation replayed" if found.replayed else "the run as a whole"
    yield f"{found.engine}, as {found.arithmetic}: {found.judged} operations judged ({how})"
    first = found.first
    if first is None:
        worst = max(found.operations, key=lambda o: o.noise)
        yield (
            f"conforms: at most {worst.noise:.2f} units of noise of {worst.limit:.2f}, in "
            f"{worst.name}"
        )
        return
    wrong = sum(o.verdict == "wrong" for o in found.operations)
    yield f"the first wrong operation is {first.name}"
    yield "  " + where(first)
    if wrong > 1:
        yield f"  {wrong - 1} more are wrong"


def where(o: Operation) -> str:
    """The element that is furthest off."""
    index = "".join(f"[{n}]" for n in o.index)
    expected = f"{o.expected:.9g}" if math.isfinite(o.expected) else "a finite number"
    layer = "" if o.layer is None else f"layer {o.layer}, "
    return (
        f"{layer}position {o.position}, element {index or '[0]'}: {o.other:.9g} instead of "
        f"{expected}, {o.ulp:.3g} ULP, {o.noise:.3g} units of noise (limit {o.limit:.2f}; "
        f"mean {o.mean:.3g} of {o.mean_limit:.2f}); {100 * o.share:.1f} % of the elements"
    )


def page(found: Comparison) -> str:
    """A self-contained page of HTML."""
    said = "<br>".join(html.escape(line) for line in lines(found))
    rows = "".join(_row(o) for o in found.operations if o.verdict in ("right", "wrong"))
    key = "".join(
        f'<i style="background:{colour}"></i>{_share_label(share)}' for share, colour in COLOURS
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Comparison</title><style>{STYLE}</style>'
        f"<h1>{html.escape(found.engine)}</h1><p>{said}</p>"
        f"<h2>Largest difference by operation and position</h2>"
        f'<p class="key">share of the limit:{key}</p>{_heat_map(found)}'
        "<h2>Operations</h2><table><tr><th>operation<th>verdict<th>units of noise<th>limit"
        f"<th>mean<th>ULP<th>position</tr>{rows}</table></html>\n"
    )


def _share_label(share: float) -> str:
    return "more" if share == float("inf") else f"up to {share:g}"


def _row(o: Operation) -> str:
    kind = ' class="wrong"' if o.verdict == "wrong" else ""
    return (
        f"<tr{kind}><td>{html.escape(o.name)}<td>{o.verdict}<td>{o.noise:.3g}<td>{o.limit:.2f}"
        f"<td>{o.mean:.3g}<td>{o.ulp:.3g}<td>{o.position}</tr>"
    )


def _heat_map(found: Comparison) -> str:
    """Rows are operations, columns positions."""
    judged = [o for o in found.operations if len(o.by_position) > 0]
    columns = min(SHOWN, max((len(o.by_position) for o in judged), default=0))
    cells, left = [], 26 * CELL
    for y, o in enumerate(judged):
        cells.append(
            f'<text x="{left - 4}" y="{(y + 0.8) * CELL}" text-anchor="end">'
            f"{html.escape(_short(o.name))}</text>"
        )
        n = len(o.by_position)
        for x in range(min(columns, n)):
            part = o.by_position[
                x * n // columns : max((x + 1) * n // columns, x * n // columns + 1)
            ]
            worst = max(part) / o.limit
            colour = next(c for share, c in COLOURS if worst <= share)
            cells.append(
                f'<rect x="{left + x * CELL}" y="{y * CELL}" width="{CELL - 1}" '
                f'height="{CELL - 1}" fill="{colour}"><title>{html.escape(o.name)}: '
                f"{max(part):.3g} units</title></rect>"
            )
    width, height = left + columns * CELL, len(judged) * CELL
    return (
        f'<div style="overflow:auto;max-height:36em"><svg role="img" aria-label="Heat map; the '
        f'table below has its figures" width="{width}" height="{height}" font-size="11" '
        f'fill="currentColor">{"".join(cells)}</svg></div>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 48 else "…" + name[-47:]


def junit(found: Comparison) -> str:
    """One test case an operation, as CI servers read them."""
    cases = []
    for o in found.operations:
        if o.verdict == "wrong":
            inner = f"<failure message={quoteattr(where(o))}/>"
        elif o.verdict == "right":
            inner = ""
        else:
            inner = f"<skipped message={quoteattr(o.verdict)}/>"
        name = quoteattr(o.name)
        cases.append(f'<testcase classname="flashinfer.compare" name={name}>{inner}</testcase>')
    wrong = sum(o.verdict == "wrong" for o in found.operations)
    skipped = len(found.operations) - found.judged
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<testsuite name={quoteattr(found.engine)} '
        f'tests="{len(cases)}" failures="{wrong}" skipped="{skipped}">'
        f"{''.join(cases)}</testsuite>\n"
    )
