"""Plots of a CSV: python -m benchmarks.plots FILE.csv FOLDER"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from .drawing import Label, color, label_points, pyplot, ratio_axis
from .rows import read_rows
from .summary import cells, growth

LEFT_OUT = ("frozen_again",)


def _panels(groups: dict, draw: Callable, file: Path, across: int = 2) -> None:
    """One panel for each group."""
    plt = pyplot()
    across = min(across, len(groups))
    down = -(-len(groups) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.8 * down), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (name, group) in zip(axes.flat, groups.items(), strict=False):
        draw(axis, group)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _ratio(axis, group: dict[str, list[dict]]) -> None:
    for provider, rows in group.items():
        rows.sort(key=lambda r: r["T"])
        low_high = [[abs(r["ratio"] - r[q]) for r in rows] for q in ("ratio_q20", "ratio_q80")]
        dashes = "--" if provider.endswith("_compiled") else ":" if provider.endswith("_fp32") else "-"
        line = {"linewidth": 2.5 if provider == "mos" else 1.0, "color": color(provider), "linestyle": dashes}
        axis.errorbar([r["T"] for r in rows], [r["ratio"] for r in rows], low_high, marker="o", markersize=4, **line)
    axis.axhline(1.0, color="gray", linestyle=":")
    ratios = [r[q] for rows in group.values() for r in rows for q in ("ratio_q20", "ratio_q80")]
    tokens = sorted({r["T"] for rows in group.values() for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xlim(tokens[0] / 32, tokens[-1] * 2)
    axis.set_xticks(tokens, [f"{t:,}" for t in tokens])
    ratio_axis(axis, min(0.97, *ratios), 1.03 * max(ratios))
    axis.set_xlabel("T")
    axis.set_ylabel("time over the frozen linear")
    first = [(rows[0]["T"], rows[0]["ratio"], provider, color(provider)) for provider, rows in group.items()]
    label_points(axis, [Label(*of) for of in first if of[0] == tokens[0]])


def _memory(axis, by: dict[str, dict]) -> None:
    axis.barh(list(by), [row["peak_mib"] for row in by.values()], color=[color(p) for p in by], alpha=0.55)
    axis.barh(list(by), [(row["saved_bytes"] or 0) / 2**20 for row in by.values()], height=0.3, color="white")
    axis.set_xlabel("MiB: peak, and in white saved for backward")
    axis.invert_yaxis()


def _growth(axis, points: dict[int, tuple[float, float]]) -> None:
    lines = {
        "frozen and MoS": [1e3 * us for us, _ in points.values()],
        "MoS": [1e3 * own for _, own in points.values()],
    }
    for (label, values), shade in zip(lines.items(), ("tab:gray", "black"), strict=True):
        axis.plot(list(points), values, marker="o", color=shade)
        axis.annotate(
            label, (next(iter(points)), values[0]), (4, 6), textcoords="offset points", color=shade, fontsize=8
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(points), [f"{x:,}" for x in points])
    low = min(0.0, *(own for _, own in points.values()))
    axis.set_ylim(1.1e3 * low, 1.15e3 * max(us for us, _ in points.values()))
    axis.set_ylabel("ns per module and token")


NAMES = {
    "e": "pool size e",
    "layers": "layers that share a pool, L",
    "rows": "tokens T",
    "l": "shards l",
    "r": "rank r",
}


def plot(file: Path, folder: Path) -> list[Path]:
    """Writes what the rows allow, and says what it wrote."""
    rows, written = read_rows(file), []
    folder.mkdir(parents=True, exist_ok=True)
    measured = cells(rows)
    ratios: dict[str, dict[str, list[dict]]] = {}
    for by in measured.values():
        for provider, row in by.items():
            if row["mode"] == "full" and provider not in (*LEFT_OUT, "frozen"):
                name = f"{row['in']} -> {row['out']}, {row['dtype']}"
                ratios.setdefault(name, {}).setdefault(provider, []).append(row)
    # Shapes of which there is a single T make no line.
    lines = {name: by for name, by in ratios.items() if any(len(r) > 1 for r in by.values())} or ratios
    memory = {}
    for by in measured.values():
        known = {p: row for p, row in by.items() if row["peak_mib"] is not None and p not in LEFT_OUT}
        if known:
            row = next(iter(known.values()))
            memory[f"T={row['T']}, {row['in']} -> {row['out']}, {row['dtype']}"] = known
    scaling = {NAMES[what]: points for what, points in growth(rows).items()}
    for name, groups, draw in (("ratio", lines, _ratio), ("memory", memory, _memory), ("scaling", scaling, _growth)):
        if groups:
            written.append(folder / f"{name}.png")
            _panels(groups, draw, written[-1])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for path in plot(options.file, options.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
