"""Everything a CPU is asked, with tables and plots: what `make bench` runs.

python -m benchmarks FOLDER [--grid default|all|smoke] [--seconds N] [--providers file.py]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from . import layer, scaling
from .harness import importable
from .plots import plot
from .rows import Rows, command_line
from .summary import write_summary

SECONDS = 420.0  # no case starts after them: with imports, the last case and the plots still under eight minutes
SCALING = 0.12  # of the time


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, SECONDS)
    for action in parser._actions:
        if action.dest == "file":
            action.metavar, action.help = "FOLDER", "for bench.csv, bench.md and the plots"
    options = parser.parse_args(arguments)
    folder: Path = options.file
    seconds = options.seconds
    known = layer.providers_of(options.providers)
    steps = sum(options.only in c.name for c in layer.grid(options.grid, known)) + 1 + scaling.STEPS
    with (
        tqdm(total=steps, unit="case", dynamic_ncols=True) as bar,
        Rows(folder / "bench.csv", "", show=lambda line: bar.set_postfix_str(line[-60:])) as rows,
    ):
        questions = (
            scaling.run(options.grid, seconds * SCALING),
            layer.run(options.grid, seconds * (1 - SCALING), options.providers, options.only),
        )
        for question in questions:
            for name, found in question:
                rows.add(name, found)
                bar.update()
    print(write_summary(rows.file, folder / "bench.md"))
    if cause := importable("matplotlib"):
        print(f"no plots: {cause}")
    else:
        plot(rows.file, folder)
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return rows.status


if __name__ == "__main__":
    sys.exit(main())
