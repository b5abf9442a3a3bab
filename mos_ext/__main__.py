"""``python -m mos_ext`` says what was built and what was not, and tests it in two seconds.

The exit code says whether the test passed.
"""

from __future__ import annotations

import sys
import time
import traceback

import torch

from .env import report
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


def main() -> int:
    print(report())
    start = time.perf_counter()
    try:
        count = self_test()
    except Exception:
        traceback.print_exc()
        print("\nself-test      FAILED")
        return 1
    print(f"\nself-test      passed: {count} cases, forward and backward, in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
