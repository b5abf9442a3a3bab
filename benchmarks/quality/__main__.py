"""python -m benchmarks.quality OUT: all runs, then runs.csv, report.md and plots.

--tune: the learning rates instead. --experts: either of a mixture of experts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .experts import write_report as write_experts_report
from .methods import GRIDS, methods, rate
from .report import write_report
from .results import write_results
from .settings import EXPERTS, Settings
from .train import Job, OtherSettings, run_all, write_csv


def jobs_of(s: Settings) -> list[Job]:
    """Seed by seed, the main table's methods first: what an interrupted run has is worth most."""
    every = sorted(methods(s).values(), key=lambda m: "main" not in m.groups)
    return [
        Job(m, rate(s, m), seed, "test")
        for seed in range(max(s.seeds, s.sweep_seeds))
        for m in every
        if seed < (s.seeds if "main" in m.groups else s.sweep_seeds)
    ]


def measure(s: Settings, out: Path, workers: int, command: str) -> None:
    jobs = jobs_of(s)
    rows = run_all(s, jobs, out, "runs", workers)
    write_csv(out / "runs.csv", rows)
    write_results(s, jobs, rows, out / "results")
    (write_experts_report if s.base.experts else write_report)(s, rows, out, command)


def tune(s: Settings, out: Path, workers: int) -> None:
    """Each family's rates on the validation split, with the family's first method."""
    first = {}
    for method in methods(s).values():
        first.setdefault(method.family, method)
    jobs = [Job(first[f], lr, s.tune_seed, "validation") for f, grid in GRIDS.items() if f in first for lr in grid]
    rows = run_all(s, jobs, out, "tuning", workers)
    write_csv(out / "tuning.csv", rows)
    for family in dict.fromkeys(row["family"] for row in rows):
        tried = {row["lr"]: row["loss"] for row in rows if row["family"] == family}
        best = min(tried, key=tried.__getitem__)
        edge = ", at the edge of its grid" if best in (min(tried), max(tried)) else ""
        print(f'"{family}": {best:g},  # {", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried.items())}{edge}')


def main(argv: list[str] | None = None, s: Settings | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("out", type=Path, help="the directory for everything written; run again to go on")
    parser.add_argument("--experts", action="store_true", help="adapt the experts of a mixture of experts")
    parser.add_argument("--tune", action="store_true", help="the learning rates, to OUT/tuning.csv, and no results")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: in this process")
    options = parser.parse_args(argv)
    if options.workers < 0:
        parser.error(f"--workers must be at least 0, got {options.workers}")
    s = s or (EXPERTS if options.experts else Settings())
    start = time.perf_counter()
    try:
        if options.tune:
            tune(s, options.out, options.workers)
        else:
            experts = "--experts " if options.experts else ""
            command = f"python -m benchmarks.quality OUT {experts}--workers {options.workers}"
            measure(s, options.out, options.workers, command)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"wrote {options.out / ('tuning.csv' if options.tune else 'report.md')} in {time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
