"""The figures of ``bench.ablation`` and ``bench.end_to_end`` as PNGs (needs the ``plot`` extra)."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

READS, REST, FLOOR = "#c44e52", "#4c72b0", "#222222"


def plot_ablation(figures, path):
    """A bar a step: the time of a token, split into waiting for reads and the rest."""
    rows = figures["rows"][::-1]
    names = [row["step"] for row in rows]
    waiting = [1e3 * row["waiting"] for row in rows]
    rest = [1e3 * (row["seconds"] - row["waiting"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.barh(names, waiting, color=READS, label="waiting for reads")
    axes.barh(names, rest, left=waiting, color=REST, label="the rest")
    longest = max(a + b for a, b in zip(waiting, rest, strict=True))
    for place, row in enumerate(rows):
        text = f"{1e3 * row['seconds']:.0f} ms, {row['bytes_per_token'] / 1e6:,.0f} MB read"
        axes.text(1e3 * row["seconds"] + 0.01 * longest, place, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.28 * longest)
    axes.set_xlabel("milliseconds a token")
    axes.set_title(f"{figures['model']}, {figures['budget'] / 1e6:,.0f} MB of DRAM", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, axes, path)


def plot_end_to_end(figures, path):
    """Tokens/s by memory, a panel a number format, a line a disk; dashed: what the floors allow."""
    formats = list(dict.fromkeys(row["format"] for row in figures["rows"]))
    figure, panels = pyplot.subplots(
        1, len(formats), figsize=(4.2 * len(formats), 3.6), sharey=True, layout="constrained"
    )
    for axes, name in zip(panels if len(formats) > 1 else [panels], formats, strict=True):
        rows = [row for row in figures["rows"] if row["format"] == name and "says" not in row]
        for number, disk in enumerate(dict.fromkeys(row["disk"] for row in rows)):
            line = [row for row in rows if row["disk"] == disk]
            shares = [100 * row["share"] for row in line]
            floors = [1 / max(row["floor_by_reads"], row["floor_by_dram"]) for row in line]
            colour = f"C{number}"
            axes.plot(shares, [row["tokens_per_second"] for row in line], "o-", color=colour,
                      label=f"disk: {disk}")  # fmt: skip
            axes.plot(shares, floors, "--", color=colour, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([12.5, 25, 50, 100], ["12.5 %", "25 %", "50 %", "100 %"])
        axes.set_xlabel("memory, of the model's file")
        axes.set_title(f"{name}; dashed: what reads and DRAM allow", fontsize=9)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    (panels[0] if len(formats) > 1 else panels).set_ylabel("tokens/s")
    _save(figure, axes, path)


def _save(figure, axes, path):
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
