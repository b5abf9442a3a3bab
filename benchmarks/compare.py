"""Is MoS slower than it was?

    python -m benchmarks.compare OLD.csv NEW.csv [--provider mos]

Compares ratios to the frozen linear, which other machines' speeds do not change, row by row. A row has regressed where
its ratio rose by more than the noise that both files measured: exit status 1. Files without a row in common: 2.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from .rows import CASE, read_rows
from .tables import table

# Standard errors that a rise must exceed. Of 100 rows by chance alone one does once in about 300 runs (normal tail,
# one-sided: 3e-5 per row), were the errors normal; medians of few samples are near enough.
SIGMAS = 4.0
# On top: two runs of one build differ by as much, by where their memory lies, which no sample of one run shows.
LEAST = 0.02
# From the 20 % to the 80 % quantile a normal distribution takes 1.683 standard deviations; the standard error of a
# median is sqrt(pi / 2) of the mean's.
SPREAD, MEDIAN = 1.683, math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class Pair:
    """One row in both files. ``rise``: by how much of the old ratio the new one is larger."""

    what: str
    old: float
    new: float
    tolerance: float

    @property
    def rise(self) -> float:
        return self.new / self.old - 1.0

    @property
    def regressed(self) -> bool:
        return self.rise > self.tolerance


def _key(row: dict) -> tuple:
    return tuple(row[c] for c in CASE)


def relative_error(row: dict, again: dict | None) -> float:
    """Standard error of a row's median ratio, relative to it.

    Samples of one run are not independent: how far the second measurement of the frozen linear (``again``) came out
    from 1, beyond what its own spread explains, is common to the case and counts too.
    """
    own = _spread_error(row)
    if again is None:
        return own
    return math.hypot(own, max(0.0, abs(again["ratio"] - 1.0) - _spread_error(again)))


def _spread_error(row: dict) -> float:
    spread = (row["ratio_q80"] - row["ratio_q20"]) / row["ratio"]
    # Quantiles of few samples lie too close together.
    samples = max(2, row["samples"])
    return MEDIAN * spread / SPREAD / math.sqrt(samples) * (1 + 2 / samples)


def _timed(file: Path) -> dict[tuple, dict]:
    rows = {_key(r): r for r in read_rows(file) if r["status"] == "ok" and r["ratio"] and r["samples"]}
    if not rows:
        raise ValueError(f"{file.name} holds no ratio")
    return rows


def compare(old_file: Path, new_file: Path, provider: str = "mos") -> list[Pair]:
    """Every row of the provider that both files hold, the worst first. ValueError where there is none."""
    old, new = _timed(old_file), _timed(new_file)
    pairs = []
    for key in old.keys() & new.keys():
        if old[key]["provider"] != provider:
            continue
        error = 0.0
        for rows in (old, new):
            error = math.hypot(error, relative_error(rows[key], rows.get((*key[:-1], "frozen_again"))))
        row = old[key]
        what = f"{row['question']} {row['mode']} {row['in']}->{row['out']} T={row['T']} {row['dtype']}"
        if row["question"] == "scaling":
            what += f" r={row['r']} l={row['l']} e={row['e']} L={row['layers']}"
        pairs.append(Pair(what, row["ratio"], new[key]["ratio"], LEAST + SIGMAS * error))
    if not pairs:
        raise ValueError(f"{old_file.name} and {new_file.name} have no row of {provider!r} in common")
    return sorted(pairs, key=lambda p: p.tolerance - p.rise)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--provider", default="mos")
    parser.add_argument("--rows", type=int, default=15, help="of the table, the worst")
    options = parser.parse_args(arguments)
    try:
        pairs = compare(options.old, options.new, options.provider)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    lines = []
    for p in pairs[: options.rows]:
        numbers = (f"{p.old:.3f}", f"{p.new:.3f}", f"{p.rise:+.1%}", f"{p.tolerance:.1%}")
        lines.append((p.what, *numbers, "REGRESSED" if p.regressed else ""))
    print(table(("row", "old", "new", "change", "noise", ""), lines))
    found = sum(p.regressed for p in pairs)
    print(f"{len(pairs)} rows of {options.provider} compared, {found} regressed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
