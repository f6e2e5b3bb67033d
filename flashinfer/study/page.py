"""Findings as one page of HTML: nothing is loaded from elsewhere, and without a script."""

import html
from collections.abc import Iterator, Sequence

from flashinfer.study.charts import key, svg
from flashinfer.study.findings import Chart, Finding, Table, shown

STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#595959;--line:#d0d0d0;--paper:#fff;
--c0:#1f5fa8;--c1:#b8470b;--c2:#1b7a3d;--c3:#8a2b8f;--c4:#7a6000;--c5:#0b7a86;--c6:#a3195b;
--c7:#555}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a8a8a8;--line:#444;--paper:#141414;
--c0:#7ab6f5;--c1:#f5a26b;--c2:#7fd69a;--c3:#d79be0;--c4:#e0c65c;--c5:#6fd3de;--c6:#f28bb8;
--c7:#bbb}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:46em;margin:0 auto;padding:1em}
h1{font-size:1.6em}h2{margin-top:2.2em;border-top:1px solid var(--line);padding-top:.8em}
nav ul{columns:2 14em;padding-left:1.2em}a{color:var(--c0)}
.question{font-style:italic}.paper,figcaption,.made{color:var(--soft);font-size:.9em}
figure{margin:1.4em 0}svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.key{list-style:none;padding:0;margin:.3em 0;display:flex;flex-wrap:wrap;gap:.2em 1.1em;
font-size:.9em}.key svg{width:12px;height:12px;display:inline-block;margin-right:.4em}
.grid{stroke:var(--line);stroke-width:.6}.axis{stroke:var(--soft);fill:none}
.mark{stroke:var(--soft);stroke-dasharray:2 3}text.mark{stroke:none}
.line{fill:none;stroke-width:1.8}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9em;margin:.4em 0 1em}
caption{text-align:left;font-weight:600;padding:.4em 0}
th,td{padding:.2em .7em;border-bottom:1px solid var(--line);text-align:right;
font-variant-numeric:tabular-nums}th{vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
summary{cursor:pointer;color:var(--soft);font-size:.9em}
@media(max-width:32em){svg text{font-size:17px}}
@media print{details{display:none}}
""" + "".join(f".s{i}{{fill:var(--c{i})}}.l{i}{{stroke:var(--c{i})}}" for i in range(8))


def page(title: str, made: str, findings: Sequence[Finding]) -> str:
    """A self-contained page; made: a line that says of what, where and when."""
    contents = "".join(
        f'<li><a href="#{html.escape(one.name)}">{html.escape(one.title)}</a></li>'
        for one in findings
    )
    sections = "".join(part for one in findings for part in _section(one))
    links = f'<nav aria-label="Experiments"><ul>{contents}</ul></nav>' if len(findings) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="made">{html.escape(made)}</p>'
        f"{links}{sections}</main></body></html>\n"
    )


def _section(found: Finding) -> Iterator[str]:
    yield (
        f'<section aria-labelledby="{html.escape(found.name)}">'
        f'<h2 id="{html.escape(found.name)}">{html.escape(found.title)}</h2>'
        f'<p class="question">{html.escape(found.question)}</p>'
        f'<p class="paper">{html.escape(found.paper)}</p>'
    )
    for sentence in found.answer:
        yield f"<p>{html.escape(sentence)}</p>"
    for chart in found.charts:
        yield (
            f"<figure>{key(chart)}{svg(chart)}<figcaption>{html.escape(chart.title)}</figcaption>"
            f"<details><summary>The figures</summary>{_table(figures_of(chart))}</details></figure>"
        )
    for table in found.tables:
        yield _table(table)
    yield "</section>"


def figures_of(chart: Chart) -> Table:
    """The points of a chart as a Table, a row an x."""
    across = sorted({point[0] for series in chart.series.values() for point in series})
    known = [dict(series) for series in chart.series.values()]
    first = chart.x
    rows = []
    for x in across:
        label = chart.labels[int(x)] if chart.kind == "bars" else shown(float(x))
        rows.append([label, *(one.get(x) for one in known)])
    return Table(f"{chart.title}: {chart.y}", [first, *chart.series], rows)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(cell))}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{html.escape(table.title, quote=True)}"><table>'
        f"<caption>{html.escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
