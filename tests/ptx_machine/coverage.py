"""What check.py --coverage saw: python coverage.py FILE... [--missed] [--traffic]

One line a kernel: how many of its instructions were executed. --missed lists runs of more than eight that were not;
--traffic the instructions with bank conflicts, or more than the least sectors, costliest first (needs check.py
--traffic).
"""

import re
import subprocess
import sys
from collections import defaultdict


def short(name):
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    found = re.search(r"::(\w+)_kernel<(.*)>\(", text)
    return f"{found.group(1)}<{found.group(2)}>".replace("mos::cuda::", "").replace("mos::", "") if found else text


def main():
    counts, text = defaultdict(lambda: [0] * 5), {}
    for path in (a for a in sys.argv[1:] if not a.startswith("-")):
        for line in open(path):
            kernel, number, hits, where, *traffic, code = line.rstrip("\n").split("\t")
            counts[kernel, int(number)] = [
                a + int(b) for a, b in zip(counts[kernel, int(number)], (hits, *traffic), strict=True)
            ]
            text[kernel, int(number)] = int(where), code
    kernels = defaultdict(list)
    for kernel, number in sorted(counts):
        kernels[kernel].append((counts[kernel, number], *text[kernel, number]))
    done = total = 0
    for kernel, rows in sorted(kernels.items()):
        hit = sum(c[0] > 0 for c, _, _ in rows)
        done, total = done + hit, total + len(rows)
        print(f"{hit:6} of {len(rows):6} {100 * hit / len(rows):5.1f}%  {short(kernel)}")
        if "--missed" in sys.argv:
            run = []
            for c, where, code in [*rows, ([1], 0, "")]:
                if not c[0]:
                    run.append((where, code))
                else:
                    if len(run) > 8:
                        print(f"         {len(run)} from line {run[0][0]}: {'; '.join(code for _, code in run[:4])}")
                    run = []
        if "--traffic" in sys.argv:
            shared = [sum(c[k] for c, _, _ in rows) for k in (1, 2)]
            sectors = [sum(c[k] for c, _, _ in rows) for k in (3, 4)]
            print(
                f"         shared memory {shared[0]} cycles for {shared[1]}, global memory {sectors[0]} sectors for {sectors[1]}"
            )
            for more, least, unit in ((1, 2, "cycles"), (3, 4, "sectors")):
                for c, where, code in sorted(rows, key=lambda row: row[0][least] - row[0][more])[:4]:
                    if c[more] > 1.05 * c[least]:
                        print(f"         {c[more]} {unit} for {c[least]}, line {where}: {code}")
    print(f"{done} of {total} instructions of {len(kernels)} kernels were executed")


if __name__ == "__main__":
    main()
