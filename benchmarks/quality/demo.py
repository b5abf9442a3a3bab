"""python -m benchmarks.quality.demo OUT: MoS, LoRA of the same budget, LoRA of eight times it, in at most four minutes.

A small edition of the study beside it: the same model, texts and rates, three methods, three seeds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..drawing import color
from .methods import methods, rate
from .report import Line, Results, plot_sizes
from .settings import Settings
from .train import Job, OtherSettings, run_all, write_csv

SEEDS = 3


def names(s: Settings) -> tuple[str, str, str]:
    """LoRA of the budget, MoS, and LoRA of eight times the budget."""
    return f"lora-r{s.equivalent_rank}", "mos", f"lora-r{s.equivalent_rank * s.ceiling}"


def table(results: Results) -> list[str]:
    lines = [f"{'':<22} {'trainable':>10} {'test loss, nats per token':>27}"]
    lines.append(f"{'frozen base':<22} {0:>10} {results.base:>18.4f}")
    for name in names(results.settings):
        values = results.values(name)
        loss = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
        lines.append(f"{results.methods[name].label:<22} {results.trainable[name]:>10,} {loss:>27}")
    return lines


def sentences(results: Results) -> list[str]:
    """What is shown, from the numbers, and what is not."""
    s = results.settings
    lora, mos, ceiling = names(s)
    difference = results.difference(lora, mos)
    gap = {name: 100 * statistics.fmean(results.gap(name)) for name in (lora, mos)}
    label = {name: results.methods[name].label.partition(" (")[0] for name in (lora, mos, ceiling)}
    word, where = "lower" if difference.mean > 0 else "higher", "outside" if difference.clear else "inside"
    shown = "Shown" if difference.clear else "Seen, but not shown"
    return [
        f"{shown}: with 1/{s.ceiling} of the parameters of {label[ceiling]}, MoS comes {gap[mos]:.0f} % of the way "
        f"from the frozen base to it, and {label[lora]} {gap[lora]:.0f} %; MoS's loss is {word} by "
        f"{abs(difference.mean):.4f} ± {difference.error:.4f} (paired by seed; zero is {where} the 95 % interval).",
        "Not shown: that it is so for your model, your text, or a budget that is not tight "
        "(benchmarks/results/quality/report.md has more methods, more budgets and where MoS does not win).",
    ]


def text(results: Results) -> str:
    return "\n".join([*table(results), "", *sentences(results)])


def main(argv: list[str] | None = None, s: Settings | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.demo", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory for everything written; run again to go on")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: in this process")
    options = parser.parse_args(argv)
    s, start = replace(s or Settings(), seeds=SEEDS), time.perf_counter()
    known = methods(s)
    jobs = [Job(known[name], rate(s, known[name]), seed, "test") for seed in range(SEEDS) for name in names(s)]
    logging.disable(logging.WARNING)  # other packages about themselves
    try:
        rows: Sequence[dict] = run_all(s, jobs, options.out, "runs", options.workers)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    write_csv(options.out / "runs.csv", rows)
    results = Results(s, rows)
    lora, mos, ceiling = names(s)
    plot_sizes(
        results,
        [Line("LoRA", (lora, ceiling), color("lora")), Line("MoS", (mos,), color("mos"))],
        options.out / "loss.png",
    )
    print(f"\n{text(results)}\n")
    print(f"wrote {options.out / 'loss.png'} in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
