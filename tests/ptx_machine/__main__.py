"""`make check-ptx`: what nvcc makes of csrc/cuda, executed on this CPU and compared with NumPy. README.md explains.

python tests/ptx_machine [--grid ci|full] [--traffic] [--missed]
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from report import report
from toolchain import ARCHITECTURES, HERE, JOBS, OUTPUT, build, nvcc

# Of the products' checks, one in so many. compute_90 is what Hopper runs, with its programmatic launches; compute_80
# differs from it in nothing else, and nvcc compiles for compute_100 with another front end.
SHARES = {80: 30, 90: 1, 100: 10}
PARTS = 4  # processes of the largest share


def run(architecture, library, name, arguments):
    """(lines to print, checks, failures, the file of what was executed) of a process of check.py."""
    executed = OUTPUT / str(architecture) / f"{name}.tsv"
    executed.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "check.py", library, "--coverage", executed, *arguments]
    done = subprocess.run(
        map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    last = re.search(r"^(\d+) checks, (\d+) failed\n\Z", done.stdout, re.MULTILINE)
    # A crash is a failure.
    checks, failed = (int(last[1]), int(last[2])) if last else (1, 1)
    lines = [line for line in done.stdout.splitlines() if not last or "FAILED" in line]
    return [f"compute_{architecture}: {line}" for line in lines], checks, failed, executed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("ci", "full"), default="ci", help="full: every check on every architecture")
    parser.add_argument("--traffic", action="store_true", help="count what accesses cost, and print it for each kernel")
    parser.add_argument("--missed", action="store_true", help="print what was not executed")
    options = parser.parse_args()
    if not nvcc():
        print("check-ptx: nothing checked, nvcc was not found")
        return 0
    start = time.perf_counter()
    libraries, probes = build()
    print(f"check-ptx: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    more = ["--traffic"] if options.traffic else []
    jobs = [(a, library, "probes", ["--probes", a]) for a, library in probes.items()]
    for architecture in sorted(libraries, key=SHARES.__getitem__):
        share = 1 if options.grid == "full" else SHARES[architecture]
        parts = PARTS if share == min(SHARES.values()) or options.grid == "full" else 1
        for part in range(parts):
            arguments = ["--part", part, "--parts", parts, "--share", share, *more]
            jobs.append((architecture, libraries[architecture], f"executed.{part}", arguments))
    checks = failed = executed = instructions = 0
    files = {architecture: [] for architecture in ARCHITECTURES}
    with ThreadPoolExecutor(JOBS) as pool:
        for job, (lines, done, wrong, file) in zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True):
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
            checks, failed = checks + done, failed + wrong
            if file.exists() and job[2] != "probes":
                files[job[0]].append(file)
    for architecture, paths in files.items():
        lines, (done, everything, kernels) = report(paths, show_missed=options.missed, show_traffic=options.traffic)
        if options.missed or options.traffic:
            print(*lines, sep="\n")
        print(f"check-ptx: compute_{architecture}: {done} of {everything} instructions of {kernels} kernels executed")
        executed, instructions = executed + done, instructions + everything
    print(
        f"check-ptx: {', '.join(f'compute_{a}' for a in ARCHITECTURES)} in {time.perf_counter() - start:.0f} s: "
        f"{checks} checks, {failed} failed, {executed} of {instructions} instructions executed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
