"""The one CSV of the CPU benchmarks: its columns, its writer and reader, and the command line of its questions."""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .harness import environment, scrub

# What was measured; the result; where.
CASE = ("question", "case", "model", "mode", "T", "in", "out", "dtype", "r", "l", "e", "layers", "dropout", "provider")
TIME = ("us", "us_q20", "us_q80", "ratio", "ratio_q20", "ratio_q80", "samples", "steps_per_sample", "timer")
LOOK = (
    "trainable",
    "bytes",
    "peak_mib",
    "saved_bytes",
    "gradient_bytes",
    "aten_calls",
    "gflop_s",
    "gb_s",
    "of_gemm",
    "of_copy",
    "error",
)
WHERE = ("device", "threads", "cpu", "cpu_cores", "torch", "peft", "python", "platform", "commit", "modified", "date")
COLUMNS = (*CASE, "status", "cause", *TIME, *LOOK, *WHERE)
NUMBERS = {
    *("T", "in", "out", "r", "l", "e", "layers", "dropout", "threads", "cpu_cores"),
    *(c for c in (*TIME, *LOOK) if c != "timer"),
}


def where() -> dict[str, object]:
    """Machine, versions and commit, for every row."""
    found = environment()
    found |= {"device": "cpu", "threads": torch.get_num_threads(), "peft": found["packages"]["peft"]}
    return {k: found[k] for k in WHERE}


class Rows:
    """Writes rows as they come, so that nothing measured is lost, and says so on the screen.

    ``status`` is 1 when a provider was wrong or failed: a missing one, or a slow one, is not an error.
    """

    def __init__(self, file: Path, what: str, show=print) -> None:
        self.file, self.what, self.show, self.status = file, what, show, 0
        self.where = where()

    def __enter__(self) -> Rows:
        warnings.simplefilter("ignore")  # other packages' own
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stream = self.file.open("w", newline="")
        self.writer = csv.DictWriter(self.stream, COLUMNS)
        self.writer.writeheader()
        return self

    def __exit__(self, *_) -> None:
        self.stream.close()

    def add(self, name: str, rows: Iterable[dict]) -> None:
        bad = []
        for row in rows:
            row = {"status": "ok", **row, **self.where}
            self.writer.writerow({k: v for k, v in scrub(row).items() if k in COLUMNS})
            if row["status"] in ("wrong", "failed"):
                bad.append(f"{row.get('provider')} {row['status']}: {row.get('cause', row.get('error'))}")
        self.stream.flush()
        self.status |= bool(bad)
        self.show(f"{self.what}: {name}{''.join(f', {b}' for b in bad)}")


def read_rows(file: Path) -> list[dict]:
    """Numbers as numbers, empty cells as None. ValueError: not such a file."""
    try:
        with file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            if missing := [c for c in (*CASE, *TIME) if c not in (reader.fieldnames or ())]:
                raise ValueError(f"{file.name} must have the columns of benchmarks/rows.py, lacks {', '.join(missing)}")
            return [{c: _value(c, row.get(c)) for c in COLUMNS} for row in reader]  # some came after older files
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error


def _value(column: str, text: str | None) -> object:
    if not text:
        return None
    if column not in NUMBERS:
        return text
    try:
        return float(text) if any(c in text for c in ".en") else int(text)
    except ValueError:
        return None  # an error that is "not finite"


def command_line(doc: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("file", type=Path, help="the CSV to write")
    parser.add_argument("--grid", choices=("default", "all", "smoke"), default="default")
    parser.add_argument("--seconds", type=float, default=seconds, help="no measurement starts after them")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases of a layer whose name contains it")
    parser.add_argument("--providers", type=Path, help="a file of more providers, PROVIDERS = {name: build}")
    return parser


def answer(options: argparse.Namespace, what: str, run: Callable, tables: Callable[[Sequence[dict]], str]) -> int:
    """Writes the rows of ``run(grid, seconds, only)`` to a file, and their tables beside it: the exit status."""
    with Rows(options.file, what) as rows:
        for name, found in run(options.grid, options.seconds, options.only):
            rows.add(name, found)
    text = tables(read_rows(options.file))
    options.file.with_suffix(".md").write_text(text)
    print(text)
    return rows.status
