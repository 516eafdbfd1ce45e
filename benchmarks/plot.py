"""The table as a picture: one panel a part, the range of the repeats as a line, what was expected as a mark."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.rows import Row


def write_plot(rows: list[Row], path: Path, baseline: list[Row] | None = None) -> None:
    """Draw every row, and the baseline's value of it where there is one."""
    parts = list(dict.fromkeys(row.part for row in rows))
    counts = [sum(row.part == part for row in rows) for part in parts]
    figure = Figure(figsize=(11, 1.2 * len(parts) + 0.28 * len(rows)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[count + 2 for count in counts])[:, 0]
    before = {row.key: row.value for row in baseline or []}
    for panel, part in zip(panels, parts, strict=True):
        shown = [row for row in rows if row.part == part]
        places = range(len(shown))
        panel.barh(places, [row.value for row in shown], color="#9ecae1")
        for place, row in zip(places, shown, strict=True):
            panel.plot([row.low, row.high], [place, place], color="black", linewidth=1)
            if row.expected is not None:
                panel.plot(row.expected, place, "|", color="#d62728", markersize=14)
            if row.key in before:
                panel.plot(before[row.key], place, "o", color="#555555", markersize=4)
        panel.set_yticks(places, [f"{row.name}, {row.case}" for row in shown], fontsize=7)
        panel.invert_yaxis()
        panel.set_title(f"{part} ({', '.join(dict.fromkeys(row.unit for row in shown))})", fontsize=9, loc="left")
    figure.suptitle("bar: median, line: range, red: bar or theory" + (", dot: baseline" if before else ""), fontsize=9)
    figure.savefig(path, dpi=120)
