"""report.md and the plots, from rows alone: every sentence about results is computed, so it says what came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mos_ext import MoSConfig
from mos_ext.routing import draw_tables

from ..drawing import Label, color, label_points, pyplot
from .methods import methods
from .settings import Settings

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; of 10 and more the last, which is too careful.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


DRAWS = "rank r and draw"  # the question that is asked in pairs


@dataclass(frozen=True)
class Claim:
    """Of the paper: ``better`` beats ``worse``. ``numbers`` are its averages over benchmarks, higher is better."""

    text: str
    better: str
    worse: str
    numbers: str


def claims(s: Settings) -> tuple[Claim, ...]:
    lora, ceiling = f"lora-r{s.equivalent_rank}", f"lora-r{s.equivalent_rank * s.ceiling}"
    return (
        Claim("MoS beats LoRA at one budget", "mos", lora, "36.39 > 34.98 (5.00M)"),
        Claim("pure sharing is worse than LoRA", lora, "pure", "34.98 > 34.33 (5.00M)"),
        Claim("subset selection improves pure sharing", "subset", "pure", "36.12 > 34.33 (5.00M)"),
        Claim("the other strategies add to subset selection", "mos", "subset", "36.39 > 36.12 (5.00M)"),
        Claim("privatization helps", "mos", "mos-public", "+1.09 (19.99M)"),
        Claim("pair dissociation helps", "mos", "mos-paired", "+1.09 (19.99M)"),
        Claim("vector sharding helps", "mos", "mos-whole", "+0.41 (19.99M)"),
        Claim("MoS does not reach LoRA of 8 times the budget", ceiling, "mos", "36.97 (39.98M) > 36.39 (5.00M)"),
    )


@dataclass(frozen=True)
class Difference:
    """Of two methods' losses on the same seeds, hence the same batches."""

    mean: float
    error: float  # standard error; nan with a single seed
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether zero is outside the 95 % interval. Never with a single seed."""
        if self.seeds < 2:
            return False
        return abs(self.mean) > STUDENT[min(self.seeds - 2, len(STUDENT) - 1)] * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


class Results:
    """Losses by method and seed."""

    def __init__(self, s: Settings, rows: Sequence[dict]) -> None:
        self.settings, self.rows, self.methods = s, rows, methods(s)
        self.losses: dict[str, dict[int, float]] = {}
        self.trainable: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        for row in rows:
            self.losses.setdefault(row["method"], {})[row["seed"]] = row["loss"]
            self.trainable[row["method"]], self.rates[row["method"]] = row["trainable"], row["lr"]
        self.base = rows[0]["base_loss"]
        self.ceiling = f"lora-r{s.equivalent_rank * s.ceiling}"
        self.lora = f"lora-r{s.equivalent_rank}"

    def of_group(self, group: str) -> list[str]:
        return [name for name, m in self.methods.items() if group in m.groups]

    def values(self, name: str, seeds: int | None = None) -> list[float]:
        return [loss for seed, loss in sorted(self.losses[name].items()) if seeds is None or seed < seeds]

    def gap(self, name: str) -> list[float]:
        """Share of the way from the frozen base to the ceiling of the same seed."""
        ceiling = self.losses[self.ceiling]
        return [(self.base - v) / (self.base - ceiling[k]) for k, v in self.losses[name].items() if k in ceiling]

    def difference(self, name: str, reference: str, seeds: int | None = None) -> Difference:
        """Positive where ``name`` is worse. Of the seeds that both have, or of the first ``seeds`` of them."""
        a, b = self.losses[name], self.losses[reference]
        values = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())[:seeds]]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Difference(statistics.fmean(values), error, len(values))


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


# ------------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True)
class Draw:
    """Whose shards are counted: a model's linear types, L layers, and the ranks."""

    name: str
    layers: int
    r: int
    e: int
    l: int
    p: int

    @property
    def formula(self) -> float:
        """The probability that the paper's draw leaves a public shard unused."""
        return (1 - (self.r - self.p) / ((self.e - self.p) * self.layers)) ** self.layers

    def uses(self, routing: str, seed: int, types: Iterable[str]) -> np.ndarray:
        """(types x sides, public shards): how many layers use each."""
        config = MoSConfig(
            r=self.r,
            equivalent_rank=self.e,
            shards_per_vector=self.l,
            private_rank=self.p,
            routing=routing,
            seed=seed,
        )
        public, rows = config.num_public_shards(self.layers), []
        for name in types:
            tables = draw_tables(config, name, [self.r] * self.layers)
            for table in (tables.a, tables.b):
                rows.append(np.bincount(table[:, : self.r - self.p].ravel(), minlength=public))
        return np.stack(rows)


def draws(s: Settings) -> list[Draw]:
    here = [Draw("this model", s.base.layers, r, s.equivalent_rank, s.l, s.p) for r in s.routing_sweep]
    return [*here, Draw("LLaMA-2 7B", 32, 16, 8, 4, 1)]


def shard_table(s: Settings, seeds: int = 20) -> list[str]:
    lines = ["| pool | never used: formula | paper's draw | balanced | layers per shard: paper's | balanced |"]
    lines.append("|---|---|---|---|---|---|")
    for d in draws(s):
        cells = [f"{d.name}: L={d.layers}, e={d.e}, r={d.r}, l={d.l}, p={d.p}", f"{d.formula:.1%}"]
        found = {
            routing: np.stack([d.uses(routing, seed, s.base.types) for seed in range(seeds)])
            for routing in ("random", "balanced")
        }
        cells += [f"{(uses == 0).mean():.1%}" for uses in found.values()]
        cells += [f"{uses.min()} to {uses.max()}" for uses in found.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ------------------------------------------------------------------------------------------------ plots


def plot_losses(results: Results, file: Path) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.5))
    s = results.settings
    big = s.p_equivalent_rank
    curves = {
        "LoRA": [results.lora, f"lora-r{big}", results.ceiling],
        "MoS": ["mos", f"mos-e{big}-p{s.p}"],
    }
    for label, names in curves.items():
        names = [n for n in names if n in results.losses]
        means, shade = [statistics.fmean(results.values(n)) for n in names], color(label.lower())
        errors = [spread(results.values(n)) for n in names]
        sizes = [results.trainable[n] for n in names]
        axis.errorbar(sizes, means, errors, fmt="o-", color=shade, capsize=3)
        axis.annotate(label, (sizes[-1], means[-1]), (8, 6), textcoords="offset points", color=shade)
    others = [n for n in results.of_group("main") if n not in (*curves["LoRA"], *curves["MoS"])]
    axis.set_xscale("log")
    labels = []
    for i, name in enumerate(others):
        # Side by side: at one budget all stand on one spot.
        x = results.trainable[name] * 1.035 ** (i - len(others) - 1)
        mean, error = statistics.fmean(results.values(name)), spread(results.values(name))
        axis.errorbar([x], [mean], [error], fmt="s", color=color(name), capsize=3, markersize=4)
        labels.append(Label(x, mean, results.methods[name].label, color(name)))
    axis.set_xlim(results.trainable["mos"] / 5, 1.5 * max(results.trainable.values()))
    ticks = sorted({results.trainable[n] for names in curves.values() for n in names if n in results.trainable})
    axis.set_xticks(ticks, [f"{t:,}" for t in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.set(xlabel="trainable parameters (points of one budget are moved apart)", ylabel="test loss, nats per token")
    axis.set_title(f"mean and standard deviation over seeds; frozen base {results.base:.3f}", fontsize=10)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    label_points(axis, labels, size=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


class Line(NamedTuple):
    """Methods that a plot joins, from the smallest to the largest, and the label beside the last."""

    label: str
    names: Sequence[str]
    color: str


def plot_sizes(results: Results, lines: Sequence[Line], file: Path) -> None:
    """Loss against trainable parameters, labels beside the points."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5))
    for line in lines:
        means = [statistics.fmean(results.values(n)) for n in line.names]
        errors = [spread(results.values(n)) for n in line.names]
        sizes = [results.trainable[n] for n in line.names]
        axis.errorbar(sizes, means, errors, fmt="o-", color=line.color, capsize=3)
        where = {"xytext": (8, 6), "textcoords": "offset points"}
        axis.annotate(line.label, (sizes[-1], means[-1]), color=line.color, **where)
    sizes = sorted({results.trainable[n] for line in lines for n in line.names})
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=20, minor=False)
    axis.set_xticks([], minor=True)
    axis.margins(x=0.18)
    axis.set(xlabel="trainable parameters", ylabel="test loss, nats per token")
    axis.set_title(f"mean and standard deviation over seeds; frozen base {results.base:.3f}", fontsize=10)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _panels(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Per question: (label on the axis, method). Of options in rising order."""
    s = results.settings

    def ordered(group: str, option: str) -> list[tuple[int, str]]:
        names = [n for n in results.of_group(group) if results.methods[n].kind == "mos"]
        return sorted((results.methods[n].options[option], n) for n in names)

    routing = [(f"{r}\n{results.methods[n].options['routing']}", n) for r, n in ordered("routing", "r")]
    return {
        f"shards per vector l (r={s.r}, p={s.p})": [(str(l), n) for l, n in ordered("l", "shards_per_vector")],
        f"r / e (e={s.equivalent_rank}, l={s.l}, p={s.p})": [
            (f"{r / s.equivalent_rank:g}", n) for r, n in ordered("r", "r")
        ],
        f"private ranks p (e={s.p_equivalent_rank}, r={s.r}, l={s.l})": [
            (str(p), n) for p, n in ordered("p", "private_rank")
        ],
        DRAWS: routing,
    }


def plot_sweeps(results: Results, file: Path) -> None:
    plt = pyplot()
    seeds = results.settings.sweep_seeds
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    for axis, (title, points) in zip(axes.flat, _panels(results).items(), strict=True):
        labels, names = [p[0] for p in points], [p[1] for p in points]
        values = [results.values(n, seeds) for n in names]
        paired = title == DRAWS  # points of different ranks are not joined
        joined = [slice(k, k + 2) for k in range(0, len(names), 2)] if paired else [slice(None)]
        for part in joined:
            for line in zip(*values[part], strict=True):  # a seed: the same batches at every point
                axis.plot(labels[part], line, color="tab:gray", linewidth=0.8, alpha=0.7)
        means, errors = [statistics.fmean(v) for v in values], [spread(v) for v in values]
        style = "o" if paired else "o-"
        axis.errorbar(labels, means, errors, fmt=style, color=color("mos"), capsize=3)
        lora = f"lora-r{results.settings.p_equivalent_rank}" if title.startswith("private") else results.lora
        level = statistics.fmean(results.values(lora, seeds))
        axis.axhline(level, color=color("lora"), linestyle=":")
        text = f"{results.methods[lora].label}, the same budget"
        where = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        axis.annotate(text, (1, level), (-4, -3), ha="right", va="top", fontsize=7, color=color("lora"), **where)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("test loss")
        axis.grid(alpha=0.3)
    figure.suptitle("black: MoS, mean and standard deviation; thin lines: one seed each", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_shards(s: Settings, file: Path) -> None:
    plt = pyplot()
    rows = draws(s)
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 2.3 * len(rows)), squeeze=False)
    labels = [f"{t.removesuffix('_proj')} {side}" for t in s.base.types for side in "AB"]
    for line, d in zip(axes, rows, strict=True):
        found = {routing: d.uses(routing, 0, s.base.types) for routing in ("random", "balanced")}
        top = max(uses.max() for uses in found.values())
        for axis, (routing, uses) in zip(line, found.items(), strict=True):
            image = axis.imshow(uses, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top)
            axis.set_yticks(range(len(labels)), labels, fontsize=5)
            axis.set_xlabel("public shard", fontsize=7)
            name = "paper's draw" if routing == "random" else "balanced draw"
            unused = f"{(uses == 0).mean():.1%} never used"
            axis.set_title(f"{d.name}, L={d.layers}, e={d.e}, r={d.r}: {name}, {unused}", fontsize=8)
            figure.colorbar(image, ax=axis).set_label("layers", fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ the report


def main_table(results: Results) -> list[str]:
    lines = ["| method | trainable | of the budget | rate | seeds | test loss | share of the gap | loss - MoS's |"]
    lines += ["|---|---|---|---|---|---|---|---|", f"| frozen base | 0 | 0 | | | {results.base:.4f} | 0 % | |"]
    names = results.of_group("main")
    for name in sorted(names, key=lambda n: statistics.fmean(results.values(n))):
        values, gap, trainable = results.values(name), results.gap(name), results.trainable[name]
        cells = [results.methods[name].label, f"{trainable:,}", f"{trainable / results.settings.budget:.3f}"]
        cells += [
            f"{results.rates[name]:g}",
            str(len(values)),
            f"{statistics.fmean(values):.4f} ± {spread(values):.4f}",
        ]
        cells += [f"{100 * statistics.fmean(gap):.1f} ± {100 * spread(gap):.1f} %"]
        cells += ["" if name == "mos" else str(results.difference(name, "mos"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(difference: Difference) -> str:
    """Of worse minus better."""
    if not difference.clear:
        return "not shown"
    return "agrees" if difference.mean > 0 else "disagrees"


def _claims_table(results: Results) -> list[str]:
    lines = ["| the paper | its numbers | here: loss of the worse - of the better | verdict |", "|---|---|---|---|"]
    for claim in claims(results.settings):
        difference = results.difference(claim.worse, claim.better)
        lines.append(f"| {claim.text} | {claim.numbers} | {difference} | {verdict(difference)} |")
    return lines


def _sweep_tables(results: Results) -> list[str]:
    lines = []
    s = results.settings
    for title, points in _panels(results).items():
        routing = title == DRAWS
        names = [name for _, name in points]
        if routing:
            random = {results.methods[n].options["r"]: n for n in names if "balanced" not in n}
            reference = {n: random[results.methods[n].options["r"]] for n in names}
            against = "the paper's draw of the same rank"
        else:
            middle = f"mos-e{s.p_equivalent_rank}-p{s.p}" if title.startswith("private") else "mos"
            reference = dict.fromkeys(names, middle)
            against = results.methods[middle].label
        lines += [f"### {title}", "", f"| | rate | test loss | loss - that of {against} |", "|---|---|---|---|"]
        for label, name in points:
            values = results.values(name, s.sweep_seeds)
            text = f"{statistics.fmean(values):.4f} ± {spread(values):.4f}"
            difference = (
                "" if reference[name] == name else str(results.difference(name, reference[name], s.sweep_seeds))
            )
            lines.append(f"| {label.replace(chr(10), ', ')} | {results.rates[name]:g} | {text} | {difference} |")
        if title.startswith("private"):
            lora = f"lora-r{s.p_equivalent_rank}"
            values = results.values(lora, s.sweep_seeds)
            text = f"{statistics.fmean(values):.4f} ± {spread(values):.4f}"
            cells = f"{results.rates[lora]:g} | {text} | {results.difference(lora, middle, s.sweep_seeds)}"
            lines.append(f"| {results.methods[lora].label} | {cells} |")
        lines.append("")
    return lines


def conclusions(results: Results) -> list[str]:
    """What the numbers say, and no more."""
    s, lines = results.settings, []
    by_verdict: dict[str, list[str]] = {"agrees": [], "disagrees": [], "not shown": []}
    for claim in claims(s):
        by_verdict[verdict(results.difference(claim.worse, claim.better))].append(claim.text)
    for name, texts in by_verdict.items():
        count = f"{len(texts)} of {len(claims(s))} claims of the paper"
        meaning = {
            "agrees": "have the paper's sign, beyond the 95 % interval of the paired difference",
            "disagrees": "have the opposite sign, beyond that interval",
            "not shown": "are within it: these runs cannot tell",
        }[name]
        lines.append(f"* {count} {meaning}{': ' + '; '.join(texts) if texts else ''}.")
    names = [n for n in results.of_group("main") if n != results.ceiling]
    best = min(names, key=lambda n: statistics.fmean(results.values(n)))
    gap = {n: 100 * statistics.fmean(results.gap(n)) for n in (best, "mos", results.lora)}
    lines.append(
        f"* Lowest mean loss at the budget: {results.methods[best].label}, {gap[best]:.1f} % of the gap between the "
        f"frozen base and LoRA at {s.ceiling} times the budget. MoS closes {gap['mos']:.1f} %, "
        f"{results.methods[results.lora].label} {gap[results.lora]:.1f} %."
    )
    for title, points in list(_panels(results).items())[:3]:
        ranked = sorted(points, key=lambda p: statistics.fmean(results.values(p[1], s.sweep_seeds)))
        (first, a), (last, b) = ranked[0], ranked[-1]
        difference = results.difference(b, a, s.sweep_seeds)
        lines.append(
            f"* {title}: lowest at {first}, highest at {last}, apart by {difference} "
            f"({'clear' if difference.clear else 'not clear'}; the extremes of a sweep are chosen after the fact)."
        )
    for r in s.routing_sweep:
        pair = {
            results.methods[n].options["routing"]: n
            for n in results.of_group("routing")
            if results.methods[n].options["r"] == r
        }
        difference = results.difference(pair["balanced"], pair["random"], s.sweep_seeds)
        word = ("better" if difference.mean < 0 else "worse") if difference.clear else "not shown to differ"
        lines.append(f"* Balanced draw at r={r}: {difference} against the paper's, {word}.")
    return lines


def origin(rows: Sequence[dict]) -> str:
    """Where and when rows were made."""

    def every(column: str) -> str:
        return ", ".join(dict.fromkeys(str(row[column]) for row in rows))

    seconds = sum(row["seconds"] for row in rows)
    return (
        f"Commit {every('commit')} (tracked files changed: {every('modified')}), {min(r['date'] for r in rows)} to "
        f"{max(r['date'] for r in rows)}. {every('cpu')}, {every('threads')} thread per run, torch {every('torch')}, "
        f"PEFT {every('peft')}, Python {every('python')}. {len(rows)} runs, {seconds:.0f} core-seconds without the "
        "base model."
    )


def write_report(s: Settings, rows: Sequence[dict], out: Path, command: str) -> None:
    results = Results(s, rows)
    plot_losses(results, out / "loss.png")
    plot_sweeps(results, out / "sweeps.png")
    plot_shards(s, out / "shards.png")

    lines = [
        "# The paper in miniature",
        "",
        f"`{command}`",
        "",
        origin(rows),
        "",
        f"A Llama of {s.base.layers} layers and hidden size {s.base.hidden}, trained on the source of Python's "
        f"standard library and adapted to the English of its manual: {s.steps} steps of {s.batch} x {s.base.length} "
        f"tokens, all linears. Budget {s.budget:,} trainable parameters (LoRA r={s.equivalent_rank}). "
        "Losses are nats per token of the test split, ± the standard deviation over seeds; differences are paired by "
        "seed, ± their standard error. "
        "A seed sets batches, initial values and draw; the base model and the texts are one.",
        "",
        "## Conclusions",
        "",
        *conclusions(results),
        "",
        "Why it may differ from the paper is in the README beside the code: scale, data, steps, a float32 base.",
        "",
        "## One budget",
        "",
        *main_table(results),
        "",
        "VB-LoRA's parameters are those trained, its logits included; stored are fewer.",
        "",
        "![loss](loss.png)",
        "",
        "## The paper's claims",
        "",
        *_claims_table(results),
        "",
        f'"Not shown": the difference is within its 95 % interval. Were none of the {len(claims(s))} claims true, '
        f"{0.05 * len(claims(s)):.2g} of them would look clear, one way or the other, by chance.",
        "",
        f"## Sweeps ({s.sweep_seeds} seeds)",
        "",
        *_sweep_tables(results),
        "![sweeps](sweeps.png)",
        "",
        "## Shards",
        "",
        "How many layers use each public shard (7 linear types, A and B; 20 seeds). Formula: (1 - (r-p)/((e-p)L))^L.",
        "",
        *shard_table(s),
        "",
        "![shards](shards.png)",
    ]
    temporary = out / "report.md.part"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(out / "report.md")
