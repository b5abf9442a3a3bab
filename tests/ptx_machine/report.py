"""What was executed, from the files that check.py --coverage wrote.

    python report.py FILE... [--missed] [--traffic]

One line for each kernel: how many of its PTX instructions were executed. --missed lists runs of more than eight that
were not. --traffic (of check.py --traffic) says what its accesses cost, and which instructions cost more than they
have to.
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass

RUN = 8  # instructions that were missed together, to be worth a line
WORST = 4  # instructions of a kernel


@dataclass
class Executed:
    line: int
    text: str
    hits: int = 0
    cycles: int = 0
    least_cycles: int = 0
    sectors: int = 0
    least_sectors: int = 0


def read(paths):
    """{kernel: its instructions in order}, added up over files."""
    kernels = defaultdict(dict)
    for path in paths:
        with open(path) as file:
            for row in file:
                kernel, number, hits, line, *traffic, text = row.rstrip("\n").split("\t")
                one = kernels[kernel].setdefault(int(number), Executed(int(line), text))
                one.hits += int(hits)
                for name, value in zip(("cycles", "least_cycles", "sectors", "least_sectors"), traffic, strict=True):
                    setattr(one, name, getattr(one, name) + int(value))
    return {kernel: [rows[i] for i in sorted(rows)] for kernel, rows in kernels.items()}


def short_names(kernels):
    """{kernel: shrink<TensorCore<bf16_t>, 16, true> or so}."""
    plain = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    names = {}
    for kernel, name in zip(kernels, plain.splitlines(), strict=True):
        found = re.search(r"::(\w+)_kernel<(.*)>\(", name)
        names[kernel] = re.sub(r"mos::(cuda::)?", "", f"{found[1]}<{found[2]}>") if found else name
    return names


def missed(rows):
    run = []
    for one in [*rows, Executed(0, "", hits=1)]:
        if not one.hits:
            run.append(one)
            continue
        if len(run) > RUN:
            yield f"{len(run)} from line {run[0].line}: {'; '.join(other.text for other in run[:4])}"
        run = []


def traffic(rows):
    for more, least, what, unit in (
        ("cycles", "least_cycles", "shared memory", "cycles"),
        ("sectors", "least_sectors", "global memory", "sectors"),
    ):
        sums = [sum(getattr(one, name) for one in rows) for name in (more, least)]
        yield f"{what}: {sums[0]} {unit} for {sums[1]}"
        for one in sorted(rows, key=lambda one: getattr(one, least) - getattr(one, more))[:WORST]:
            if getattr(one, more) > 1.05 * getattr(one, least):
                yield f"    {getattr(one, more)} {unit} for {getattr(one, least)}, line {one.line}: {one.text}"


def report(paths, *, show_missed=False, show_traffic=False):
    """Lines, and (executed, instructions, kernels)."""
    kernels = read(paths)
    names = short_names(kernels)
    lines, done, everything = [], 0, 0
    for kernel, rows in sorted(kernels.items(), key=lambda item: names[item[0]]):
        hit = sum(one.hits > 0 for one in rows)
        done, everything = done + hit, everything + len(rows)
        if show_traffic and not hit:
            continue
        lines.append(f"{hit:6} of {len(rows):6} {100 * hit / len(rows):5.1f}%  {names[kernel]}")
        details = [*(missed(rows) if show_missed else []), *(traffic(rows) if show_traffic and hit else [])]
        lines += [f"         {line}" for line in details]
    return lines, (done, everything, len(kernels))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--missed", action="store_true")
    parser.add_argument("--traffic", action="store_true")
    options = parser.parse_args()
    lines, (done, everything, kernels) = report(options.files, show_missed=options.missed, show_traffic=options.traffic)
    print(*lines, f"{done} of {everything} instructions of {kernels} kernels were executed", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
