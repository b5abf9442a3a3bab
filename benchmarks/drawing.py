"""What all plots share: one colour for each provider, plain numbers on ratio axes, labels beside lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# By provider of the benchmarks and method of the quality study. What torch.compile made of one is drawn dashed.
COLORS = {
    "frozen": "silver",
    "mos": "black",
    "lora": "tab:gray",
    "vera": "tab:blue",
    "vblora": "tab:purple",
    "unilora": "tab:brown",
    "aten": "tab:orange",
    "reference": "tab:red",
    "shared-outer": "tab:red",
    "pure": "tab:orange",
    "subset": "tab:green",
    "mos-all": "tab:red",
    "mos-paired": "tab:olive",
    "mos-whole": "tab:cyan",
    "mos-public": "tab:pink",
}
STEPS = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def color(name: str) -> str:
    """The same for a provider wherever it is drawn, compiled or in float32 too; MoS's for any setting of it."""
    base = name.removesuffix("_compiled").removesuffix("_fp32")
    base = "lora" if base == "peft" or base.startswith("lora") else base
    return COLORS.get(base, COLORS["mos"] if base.startswith("mos") else "tab:olive")


def ratio_axis(axis, low: float, high: float) -> None:
    """A logarithmic axis from ``low`` to ``high`` whose ticks are 1, 1.1, 1.5, 2, as many as fit."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.set_yscale("log")
    axis.set_ylim(low, high)
    inside = [step for step in STEPS if low <= step <= high]
    ticks: list[float] = []
    for step in inside:  # 1 / 14 of the height apart at least
        if not ticks or step / ticks[-1] > (high / low) ** (1 / 14):
            ticks.append(step)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


class Label(NamedTuple):
    """Of the point (x, y)."""

    x: float
    y: float
    text: str
    color: str


def label_points(axis, labels: Sequence[Label], size: float = 7) -> None:
    """Writes labels left of all their points, apart as far as their height asks for. After limits are set."""
    points = [axis.transData.transform((label.x, label.y)) for label in labels]
    height = 1.25 * size * axis.figure.dpi / 72
    bottom, top = axis.bbox.y0 + height / 2, axis.bbox.y1 - height / 2
    order = sorted(range(len(labels)), key=lambda k: points[k][1])
    places: list[float] = []
    for k in order:
        places.append(max(points[k][1], places[-1] + height if places else bottom))
    for i in reversed(range(len(places))):  # down again from the top
        places[i] = min(places[i], top if i == len(places) - 1 else places[i + 1] - height)
    left = min(x for x, _ in points) - 22 * axis.figure.dpi / 72
    for k, place in zip(order, places, strict=True):
        line = {"arrowstyle": "-", "color": labels[k].color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
        line |= {"relpos": (1, 0.5)}  # from the text's end
        axis.annotate(
            labels[k].text,
            (labels[k].x, labels[k].y),
            xytext=axis.transAxes.inverted().transform((left, place)),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=size,
            color=labels[k].color,
            arrowprops=line,
        )
