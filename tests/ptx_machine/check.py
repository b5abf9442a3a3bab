"""Runs checks on a library of toolchain.py, in a process of its own.

    python check.py LIBRARY [--part 0 --parts 1] [--share 1] [--only TEXT] [--stop] [--times] [--coverage FILE] [--traffic]
    python check.py LIBRARY --case 256,1024,16,4,bf16,f32,0.5 --traffic --coverage FILE
    python check.py LIBRARY --probes ARCHITECTURE

prints a line for each that fails, then "N checks, M failed".
"""

import argparse
import sys
import time

from checks import all_checks, case_checks
from device import Kernels, Machine, Trouble
from probes import probe_checks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("--part", type=int, default=0, help="which of the parts")
    parser.add_argument("--parts", type=int, default=1, help="every so many'th check is of one part")
    parser.add_argument("--share", type=int, default=1, help="of the products' checks, one in so many")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--times", action="store_true", help="print the time of each check")
    parser.add_argument("--coverage", help="write what was executed to this file, for report.py")
    parser.add_argument("--case", help="the products of this case alone: T, C, r, l, dtype, the pool's, dropout's p")
    parser.add_argument("--probes", type=int, help="the library is that of probes.cu, for this architecture")
    parser.add_argument("--traffic", action="store_true", help="count cycles of shared and sectors of global memory")
    options = parser.parse_args()
    device = Machine(options.library) if options.probes else Kernels(options.library)
    if options.probes:
        checks = probe_checks(options.probes)
    elif options.case:
        checks = case_checks(*options.case.split(","))
    else:
        checks = all_checks(options.share)
    device.traffic = int(options.traffic)
    count = failed = 0
    for number, (name, check) in enumerate(checks):
        if number % options.parts != options.part or options.only not in name:
            continue
        count += 1
        start = time.perf_counter()
        try:
            check(device)
        except Trouble as error:
            failed += 1
            print(f"FAILED {name}: {error} | {device.mode}", flush=True)
            if options.stop:
                break
        if options.times:
            print(f"{time.perf_counter() - start:.3f} s {name}", flush=True)
    statistics = device.statistics()
    if statistics["never_waited"]:
        failed += 1
        print(f"FAILED {statistics['never_waited']} copies were in flight when their kernel ended")
    if options.coverage:
        device.coverage(options.coverage)
    print(f"{statistics['launches']} launches, {statistics['instructions'] / 1e6:.0f} million instructions of warps")
    print(f"{count} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
