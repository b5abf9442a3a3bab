"""``python -m mos_ext`` says what was built and what was not, and tests it in two seconds.

``--json`` says the same as one object, for bug reports and programs. The exit code says whether the test passed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback

import torch

from .env import facts, report
from .testing import check_case, random_case


def self_test() -> int:
    """Forward and backward against the float64 reference on every device there is; the number of cases."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    count = 0
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for rows, fan_in, fan_out, r, l in ((1, 64, 96, 8, 4), (37, 120, 48, 5, 3), ((2, 65), 512, 256, 16, 4)):
                check_case(random_case(rows, fan_in, fan_out, r, l, dtype=dtype, device=device))
                count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mos_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    options = parser.parse_args(argv)
    if not options.json:
        print(report())
    start, count, problem = time.perf_counter(), 0, None
    try:
        count = self_test()
    except Exception:
        problem = traceback.format_exc()
    seconds = round(time.perf_counter() - start, 1)
    if options.json:
        test = {"passed": problem is None, "cases": count, "seconds": seconds, "problem": problem}
        print(json.dumps(facts() | {"self_test": test}, indent=2))
    elif problem:
        print(problem, file=sys.stderr)
        print("\nself-test      FAILED")
    else:
        print(f"\nself-test      passed: {count} cases, forward and backward, in {seconds} s")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
