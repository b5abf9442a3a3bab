"""`make check-ptx`: builds, runs every check in two processes, and says how much of the kernels was executed."""

import argparse
import os
import re
import subprocess
import sys
import time

from build import HERE, OUTPUT, build, nvcc

# compute_80 serves sm_80 to sm_90; nvcc compiles for sm_100 and later with another front end.
ARCHITECTURES = (80, 100)
PROCESSES = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", choices=("ci", "full"), default="ci", help="full: every check on every architecture")
    options = parser.parse_args()
    if not nvcc():
        print("check-ptx: nothing checked, nvcc was not found")
        return 0
    start = time.perf_counter()
    libraries = build(ARCHITECTURES)
    print(f"check-ptx: built in {time.perf_counter() - start:.0f} s", flush=True)
    checks = failed = 0
    for architecture, library in libraries.items():
        quick = [] if architecture == ARCHITECTURES[0] or options.grid == "full" else ["--quick"]
        coverage = [OUTPUT / str(architecture) / f"coverage.{part}.tsv" for part in range(PROCESSES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "check.py"), str(library)]
        running = [
            subprocess.Popen(
                [*command, str(part), str(PROCESSES), *quick, "--coverage", str(coverage[part])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for part in range(PROCESSES)
        ]
        for process in running:
            output, _ = process.communicate()
            print(*(f"compute_{architecture}: {line}" for line in output.splitlines()), sep="\n")
            last = re.search(r"^(\d+) checks, (\d+) failed\n\Z", output, re.MULTILINE)
            # A crash is a failure.
            checks, failed = checks + int(last[1] if last else 1), failed + int(last[2] if last else 1)
        text = subprocess.run(
            [sys.executable, str(HERE / "coverage.py"), *map(str, coverage)], capture_output=True, text=True, check=True
        ).stdout
        print(f"compute_{architecture}: {text.splitlines()[-1]}", flush=True)
    print(f"{checks} checks, {failed} failed; {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
