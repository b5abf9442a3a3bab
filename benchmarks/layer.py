"""What does an adapted layer cost over its frozen linear?

    python -m benchmarks.layer FILE.csv [--grid default|all|smoke] [--seconds N] [--only TEXT] [--providers file.py]

Time, peak memory, saved activations and calls of every provider, each a ratio to the frozen linear of the same run.
README.md says what the columns mean; `python -m benchmarks` runs this and the others, with tables and plots.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .harness import CPU, ROOT, SMOKE, Sizes, copy_ceiling, gemm_ceiling, launches, measure, release, saved_bytes
from .providers import PROVIDERS, Built, Case, Data, check_layer, make_ready, providers_of
from .rows import CASE, Rows, command_line

DTYPES = (torch.bfloat16, torch.float32)
R, L_SHARDS = 16, 4
SQUARES = {"tiny": (1024, 1024), "LLaMA-2 7B q_proj": (4096, 4096)}
MODELS = SQUARES | {
    "LLaMA-2 7B up_proj": (4096, 11008),
    "LLaMA-2 7B down_proj": (11008, 4096),
    "LLaMA-3 8B k_proj": (4096, 1024),
    "LLaMA-3 8B up_proj": (4096, 14336),
    "LLaMA-3 8B down_proj": (14336, 4096),
    "Qwen2.5 7B q_proj": (3584, 3584),
    "Qwen2.5 7B k_proj": (3584, 512),
    "Qwen2.5 7B up_proj": (3584, 18944),
    "Qwen2.5 7B down_proj": (18944, 3584),
}
LENGTHS = (1, 16, 256, 2048, 8192)
SHORT = ("frozen", "mos", "aten", "peft", "frozen_again")


def every(dtype: torch.dtype, kind: str, file: Iterable[str] = ()) -> tuple[str, ...]:
    """All providers of a CPU. mos_layer saves launches of a GPU; in float32 PEFT's two adapters are one."""
    left_out = {"mos_layer"} | ({"peft_fp32"} if dtype == torch.float32 else set())
    return tuple(dict.fromkeys(p for p in (*PROVIDERS, *file) if p not in left_out))


def grid(which: str, known: Iterable[str] = ()) -> list[Case]:
    """The most important first: time may run out."""

    def case(kind: str, rows: int, model: str, dtype: torch.dtype, providers: tuple[str, ...] | None = None) -> Case:
        providers = providers or every(dtype, kind, known)
        return Case(kind, rows, *MODELS[model], R, L_SHARDS, dtype, providers, model=model)

    if which == "smoke":
        kinds = ("full", "forward", "backward", "decode")
        # torch.compile takes seconds whatever the size.
        few = {d: tuple(p for p in every(d, "full", known) if not p.endswith("_compiled")) for d in DTYPES}
        return [Case(k, 24, 32, 64, 4, 2, d, few[d], model="smoke") for k in kinds for d in DTYPES]
    if which == "all":
        kinds = ("full", "decode", "forward", "backward")
        return [case(k, t, m, d) for k in kinds for d in DTYPES for m in MODELS for t in LENGTHS]
    out = [case("full", t, m, d) for t in (256, 2048, 16, 1) for m in SQUARES for d in DTYPES]
    out += [case("decode", t, "LLaMA-2 7B q_proj", d, SHORT) for t in (1, 16) for d in DTYPES]
    out += [case(k, 256, "tiny", d, SHORT) for k in ("forward", "backward") for d in DTYPES]
    shapes = [m for m in MODELS if m not in SQUARES]
    return out + [case("full", 256, m, torch.bfloat16, SHORT) for m in shapes]


def work(case: Case, adapted: bool) -> tuple[int, int]:
    """Useful flops, and bytes that must move: each input read once, each result written once."""
    t, n, m, item = case.rows, case.fan_in, case.fan_out, case.dtype.itemsize
    passes = 2 if case.kind == "full" else 1
    flops = passes * 2 * t * n * m
    # x, W and y; backward dy, W and dx.
    moved = passes * item * (t * (n + m) + n * m)
    if adapted:
        low_rank = 2 * t * case.r * (n + m)
        # Backward has four thin products: of dy with B and x with dS, and the two of the gradients.
        flops += low_rank * {"full": 3, "backward": 2}.get(case.kind, 1)
        factors = 4 * case.r * (n + m)
        moved += factors * {"full": 3, "backward": 2}.get(case.kind, 1)
        moved += item * t * n * (case.kind in ("full", "backward"))  # x again, for A's gradient
    return flops, moved


def ceilings(sizes: Sizes) -> dict[str, float]:
    """What this machine can do now: GB/s of a copy, GFLOP/s of a product by dtype."""
    found = {"copy": copy_ceiling(sizes, "cpu", sizes.copy_bytes)["gb_s"]}
    for dtype in DTYPES:
        found[str(dtype).removeprefix("torch.")] = round(1e3 * gemm_ceiling(sizes, "cpu", dtype)["tflop_s"], 1)
    return found


def provider_rows(case: Case, sizes: Sizes, known: Mapping, ceiling: Mapping[str, float]) -> list[dict]:
    """One case: built, checked, looked into, timed."""
    data = Data(case, "cpu")
    ready = make_ready(case, [data], known)
    checked = check_layer(data, ready)
    looked = {name: _look_into(data, ready.built[name][0], steps[0]) for name, steps in ready.steps.items()}
    release("cpu")
    rows = []
    for name, timing in measure(ready.steps, "cpu", sizes).items():
        flops, moved = work(case, not name.startswith("frozen"))
        gflop_s, gb_s = flops / timing.us / 1e3, moved / timing.us / 1e3
        error = (checked[name]["error"] or {}).values()
        rows.append(
            {
                "provider": name,
                "status": "ok" if checked[name]["error_ok"] else "wrong",
                **timing.row(),
                **looked[name],
                "error": "not finite" if "not finite" in error else max(error, default=None),
                "gflop_s": round(gflop_s, 2),
                "gb_s": round(gb_s, 2),
                # (A smoke run's ceilings may round to zero on a busy machine.)
                "of_gemm": round(gflop_s / (ceiling[case.dtype_name] or math.inf), 3),
                "of_copy": round(gb_s / (ceiling["copy"] or math.inf), 3),
            }
        )
    for status, causes in (("failed", ready.failed), ("absent", ready.absent)):
        rows += [{"provider": name, "status": status, "cause": why} for name, why in causes.items()]
    if any(name.endswith("_compiled") for name in case.providers):
        torch._dynamo.reset()  # or it stops compiling after a few layers
    return rows


def columns(case: Case) -> dict[str, object]:
    row = case.row()
    return {"question": "layer", "mode": row["kind"], "T": row["rows"], **{k: v for k, v in row.items() if k in CASE}}


def _look_into(data: Data, built: Built, step) -> dict[str, object]:
    names = launches(step, "cpu")
    found = {"aten_calls": sum(name.startswith(("aten::", "mos_ext::")) for name in names)}
    if data.case.kind in ("full", "forward"):
        found["saved_bytes"] = saved_bytes(built.forward, [data.weight, *built.state])
    found["gradient_bytes"] = sum(t.nbytes for t in built.trained)
    return found


def peaks(cases: Iterable[Case], providers_file: Path | None, seconds: float) -> dict[tuple[str, str], float]:
    """Peak MiB by case and provider, as benchmarks/memory.py measures them in a process of its own."""
    asked = json.dumps([{**vars(case), "dtype": case.dtype_name} for case in cases])
    # Blocks of 64 KiB and more are mapped, and unmapped when they are freed: what stays resident is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory"]
    if providers_file:
        command += ["--providers", str(providers_file.resolve())]
    options = {"cwd": ROOT, "env": environment, "input": asked, "timeout": seconds}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        lines = ran.stdout.splitlines()
    except subprocess.TimeoutExpired as expired:
        lines = (expired.stdout or b"").decode().splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"case"') and line.endswith("}")]
    return {(f["case"], f["provider"]): f["peak_mib"] for f in found}


def measured_in_memory(cases: Iterable[Case]) -> list[Case]:
    """Where a step holds megabytes; compiled and loaded libraries would count their own first calls."""
    return [
        replace(c, providers=tuple(p for p in c.providers if not p.endswith(("_again", "_compiled"))))
        for c in cases
        if c.kind == "full" and c.rows in (24, 256, 2048) and len(c.providers) > len(SHORT)
    ]


def run(
    which: str, seconds: float, providers_file: Path | None = None, only: str = ""
) -> Iterator[tuple[str, list[dict]]]:
    """(what was done, its rows), the most important first, in about ``seconds``."""
    end = time.monotonic() + seconds
    sizes = SMOKE if which == "smoke" else CPU
    known = providers_of(providers_file)
    cases = [case for case in grid(which, known) if only in case.name]
    if not cases:
        raise SystemExit(f"--only must be part of a case's name, as 'full T=256 1024->1024' is, got {only!r}")
    ceiling = ceilings(sizes)
    yield (
        "ceilings",
        [{"question": "ceiling", "case": k, "gb_s" if k == "copy" else "gflop_s": v} for k, v in ceiling.items()],
    )
    peak = peaks(measured_in_memory(cases), providers_file, seconds / 5)
    for case in cases:
        if time.monotonic() > end:
            rows = [{"status": "skipped", "cause": "no time left"}]
        else:
            try:
                rows = provider_rows(case, sizes, known, ceiling)
            except Exception as error:  # one case may not fit into memory
                rows = [{"status": "failed", "cause": f"{type(error).__name__}: {error}"}]
        peak_of = {row.get("provider"): peak.get((case.name, row.get("provider"))) for row in rows}
        yield case.name, [{**columns(case), "peak_mib": peak_of[row.get("provider")], **row} for row in rows]


def main(arguments: list[str] | None = None) -> int:
    options = command_line(__doc__, 370.0).parse_args(arguments)
    with Rows(options.file, "layer") as rows:
        for name, found in run(options.grid, options.seconds, options.providers, options.only):
            rows.add(name, found)
    return rows.status


if __name__ == "__main__":
    sys.exit(main())
