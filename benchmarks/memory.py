"""What does one full step hold at its peak? In a process of its own.

Of benchmarks/layer.py, cases come as JSON on standard input, results go out as a line each; other benchmarks have their
own steps, and ``ask_for_peaks`` calls them. Of a CPU's peak the system's record is taken
(VmHWM), which has what kernels and libraries allocate past torch; the caller sets malloc up so that freed blocks leave.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .harness import ROOT, Step, release
from .providers import Case, Data, make_ready, providers_of

STEPS = 2


def _resident(line: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return 1024 * int(re.search(rf"^{line}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def peak_bytes(step: Step) -> int | None:
    """The most that a step held beyond what was there before, results included; None where the system does not tell.

    Of a step that ran before.
    """
    found = []
    for _ in range(STEPS):
        before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the record starts anew, from what is resident now
        except OSError:
            return None
        step()
        found.append(max(0, _resident("VmHWM") - before))
    return min(found)  # another thread's pages only add


def ask_for_peaks(module: str, arguments: Sequence[str], seconds: float) -> dict[str, dict[str, float | None]]:
    """Peak MiB by case and provider that ``python -m module --peaks arguments`` tells, as far as it comes in time.

    In a process where freed memory leaves.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, "--peaks", *arguments]
    options = {"cwd": ROOT, "env": environment, "timeout": seconds}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        text = done.stdout
        if done.returncode:  # what was told before it ended stands
            print(f"{module} --peaks ended with {done.returncode}: {done.stderr[-300:].strip()}", file=sys.stderr)
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode()
    found: dict[str, dict[str, float | None]] = {}
    for line in text.splitlines():
        if line.startswith(_MARK) and line.endswith("]"):
            case, provider, mib = json.loads(line.removeprefix(_MARK))
            found.setdefault(case, {})[provider] = mib
    return found


def tell_peaks(tell: Callable[..., None], *arguments: str) -> int:
    """What a program does when ``ask_for_peaks`` calls it: the exit status."""
    warnings.simplefilter("ignore")  # optional packages' own
    tell(*arguments)
    return 0


def tell_peak(case: str, provider: str, step: Step) -> None:
    """Prints a line for :func:`ask_for_peaks`; nothing where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return
    step()
    release("cpu")
    peak = peak_bytes(step)
    print(_MARK + json.dumps([case, provider, None if peak is None else round(peak / 2**20, 1)]), flush=True)


_MARK = "peak: "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--providers", type=Path)
    known = providers_of(parser.parse_args().providers)
    warnings.simplefilter("ignore")
    if not Path("/proc/self/status").exists():
        return 0
    for asked in json.load(sys.stdin):
        asked |= {"dtype": getattr(torch, asked["dtype"]), "providers": tuple(asked["providers"])}
        case = Case(**asked)
        data = Data(case, "cpu")
        for name in case.providers:
            ready = make_ready(Case(**(asked | {"providers": (name,)})), [data], known)
            for steps in ready.steps.values():
                release("cpu")
                peak = peak_bytes(steps[0])
                mib = None if peak is None else round(peak / 2**20, 2)
                print(json.dumps({"case": case.name, "provider": name, "peak_mib": mib}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
