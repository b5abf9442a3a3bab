"""Results as Markdown: benchmarks, the table of goals, the whole report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Ratios to reach, by role of the rows and position of the shape in Sizes.shapes; (must, aim). Training is forward and
# backward against the frozen linear, decode is forward.
FROZEN = {
    "long": ((1.17, 1.08), (1.10, 1.05), (1.12, 1.06)),
    "medium": ((1.22, 1.12), (1.12, 1.06), (1.14, 1.08)),
    "decode": ((1.40, 1.20), (1.15, 1.07), (1.15, 1.07)),
}
# At least: how much slower others are. (role, must by shape)
AT_LEAST = {
    "peft": ("long", (1.18, 1.15, 1.08)),
    "peft_fp32": ("long", (1.6, 1.5, 1.35)),
    "reference": ("medium", (1.4, 1.2, 1.2)),
}
# At most, of as many rows as there are adapters, each with its own, over no adapter, by position of the shape.
SERVING = {1: 1.25}
RANKS = (1.03, 1.02, 1.02)  # t(high rank) / t(low rank), at most, on long rows


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join('' if v is None else str(v) for v in row)} |" for row in rows]
    return "\n".join(lines)


def _rows(result: dict, what: str) -> list[dict]:
    return [row for item in result.get("items", {}).values() for row in item["rows"] if row["what"] == what]


def _cases(result: dict) -> dict[str, dict[str, dict]]:
    """case -> provider -> row, of what was timed."""
    found: dict[str, dict[str, dict]] = {}
    for row in _rows(result, "layer"):
        if "us" in row:
            found.setdefault(row["case"], {})[row["provider"]] = row
    return found


def goals(result: dict) -> list[dict]:
    """Every measured ratio with its goal, the worst first. ``of_must`` above 1 misses the goal."""
    out = []

    def add(what: str, case: str, ratio: float, must: float, aim: float | None, at_least: bool = False) -> None:
        of_must = must / ratio if at_least else ratio / must
        sign = ">=" if at_least else "<="
        out.append(
            {
                "what": what,
                "case": case,
                "ratio": round(ratio, 4),
                "must": f"{sign} {must}",
                "aim": None if aim is None else f"{sign} {aim}",
                "of_must": round(of_must, 4),
                "met": of_must <= 1.0,
            }
        )

    for case, by in _cases(result).items():
        row = next(iter(by.values()))
        role, shape = row["role"], row["shape"]
        low_high = sorted((p for p in by if "r=" in p), key=lambda p: int(p.partition("r=")[2]))
        if len(low_high) == 2:
            low, high = low_high
            add(f"{high} / {low}", case, by[high]["us"] / by[low]["us"], RANKS[shape], None)
        if row["role"] not in FROZEN or row["dropout"] or row["dtype"] != "bfloat16" or "mos" not in by:
            continue
        ours = by["mos"]["us"]
        if "frozen" in by:
            add("mos / frozen", case, ours / by["frozen"]["us"], *FROZEN[role][shape])
        for provider, (of_role, musts) in AT_LEAST.items():
            if provider in by and role == of_role:
                add(f"{provider} / mos", case, by[provider]["us"] / ours, musts[shape], None, at_least=True)
    for row in _rows(result, "serving"):
        if row["provider"].startswith("mos,") and row["adapters"] == row["rows"] and row["shape"] in SERVING:
            add(f"{row['provider']} / frozen", row["case"], row["ratio"], SERVING[row["shape"]], None)
    return sorted(out, key=lambda g: -g["of_must"])


def problems(result: dict) -> list[str]:
    """What makes a benchmark fail: items that did not end, wrong results. Slow is not wrong."""
    out = [] if result.get("complete") else ["the benchmarks did not end"]
    for name, item in result.get("items", {}).items():
        if item["status"] not in ("done", "skipped"):
            out.append(f"{name}: {item['status']} {item.get('why', '')}".strip())
        for row in item["rows"]:
            who = row.get("provider", "")
            if row.get("failed"):
                out.append(f"{name}, {who}: {row['failed']}")
            if row.get("error_ok") is False:
                out.append(f"{name}, {who}: wrong by {row['error']}")
    return out


def bench_tables(result: dict) -> str:
    parts = []
    ceilings = [
        *([f"copy {r['bytes'] >> 20} MiB", f"{r['gb_s']} GB/s", r["timer"]] for r in _rows(result, "copy")),
        *([f"bf16 GEMM n={r['n']}", f"{r['tflop_s']} TFLOP/s", r["timer"]] for r in _rows(result, "gemm")),
        *([f"one launch more, {r['kind']}", f"{r['us_per_launch']} us", r["timer"]] for r in _rows(result, "launch")),
    ]
    parts += ["### Ceilings", table(("what", "measured", "timer"), ceilings)]
    beta: dict[tuple, list] = {}
    for r in _rows(result, "beta"):
        cells = beta.setdefault((r["rows"], f"{r['in']}->{r['out']}"), [])
        cells += [f"{r['mm_us']:.1f}", f"{r['extra_us']:+.1f}", f"{r['ratio']:.3f}"]
    head = ("T", "shape", "x W^T us", "extra", "ratio", "dy W us", "extra", "ratio")
    parts += ["### Cost of beta = 1", table(head, [(*key, *cells) for key, cells in beta.items()])]

    copies = [r["gb_s"] for r in _rows(result, "copy")]
    lines = []
    for r in _rows(result, "operator"):
        if r["provider"] != "mos":
            continue
        plain = next((o["us"] for o in _rows(result, "operator") if _twin(o, r)), None)
        name = r["operator"] + (f" p={r['dropout']}" if r["dropout"] else "") + ("" if r["native"] else " (python)")
        rate = f"{r['gb_s'] / max(copies):.2f}" if copies and max(copies) else None
        sizes = (r["rows"], r["cols"], r["r"], f"{r['us']:.1f}", r["gb_s"], rate)
        lines.append((name, *sizes, f"{plain:.1f}" if plain else None))
    head = ("operator", "T", "C", "r", "us", "GB/s", "of copy", "plain us")
    parts += ["### Operators", table(head, lines)]

    counts = {(r["case"], r["provider"]): r.get("launches") for r in _rows(result, "launches")}
    cases = _cases(result)
    others = list(dict.fromkeys(p for by in cases.values() for p in by if p != "frozen"))
    lines = []
    for case, by in cases.items():
        base = by.get("frozen", {}).get("us")
        lines.append([case, f"{base:.1f}" if base else None, *(_layer_cell(by, p, base, counts) for p in others)])
    parts += [
        "### Layer",
        "Ratios to the frozen linear, launches in brackets; e: timed by events, no graph could be captured.",
        table(("case", "frozen us", *others), lines),
    ]

    of_serving: dict[tuple, dict[str, str]] = {}
    for r in _rows(result, "serving"):
        if r.get("adapters"):
            cell = f"{r['ratio']:.3f}{'e' if r['timer'] == 'events' else ''}"
            of_serving.setdefault((r["case"], r["adapters"]), {})[r["provider"].partition(",")[0]] = cell
    names = ("mos", "mos_same", "peft", "loop")
    lines = [[*key, *(by.get(name) for name in names)] for key, by in of_serving.items()]
    parts += ["### Many adapters, over none", table(("case", "adapters", *names), lines)]

    memory = [
        [case, *(by[p].get("peak_extra_mib") if p in by else None for p in ("frozen", *others))]
        for case, by in cases.items()
        if by.get("mos", {}).get("role") == "long"
    ]
    parts += ["### Peak memory of a step beyond its inputs, MiB", table(("case", "frozen", *others), memory)]

    lines = [(g["what"], g["case"], g["ratio"], g["must"], g["aim"], f"{g['of_must']:.3f}") for g in goals(result)]
    parts += ["### Goals, the worst first", table(("ratio", "case", "measured", "must", "aim", "of must"), lines)]
    skipped = [name for name, item in result.get("items", {}).items() if item["status"] == "skipped"]
    if skipped:
        parts.append(f"Not measured, no time left: {', '.join(skipped)}")
    if result.get("device") == "cpu":
        parts.append("On a CPU with tiny shapes: a test of the benchmarks, not a measurement.")
    return "\n\n".join(parts)


def _layer_cell(by: dict[str, dict], provider: str, base: float | None, counts: dict) -> str | None:
    row = by.get(provider)
    if row is None or not base:
        return None
    count = counts.get((row["case"], provider))
    return f"{row['us'] / base:.3f}{'e' if row['timer'] == 'events' else ''}{f' ({count})' if count else ''}"


def _twin(other: dict, row: dict) -> bool:
    """Whether ``other`` is plain PyTorch's measurement of the same operator and sizes."""
    same = ("operator", "rows", "cols", "r", "dropout", "modules")
    return other["provider"] == "plain" and all(other[k] == row[k] for k in same)


def _summary(name: str, part: dict) -> str:
    if name == "test" and part.get("pytest"):
        counts = ", ".join(f"{n} {outcome}" for outcome, n in part["pytest"]["outcomes"].items())
        on_gpu = part["pytest"]["on_cuda"]
        return f"{counts}; {on_gpu} on CUDA; wrappers {part['wrappers']['status']}"
    if name == "sanitize" and part.get("runs"):
        return "; ".join(f"{tool} {run['status']}" for tool, run in part["runs"].items())
    if name == "bench" and part.get("items"):
        done = sum(i["status"] == "done" for i in part["items"].values())
        return f"{done} of {len(part['items'])} items"
    return ""


def report_text(report: dict) -> str:
    """The whole report as Markdown."""
    env = report["environment"]
    gpu = env.get("gpu") or {}
    where = ", ".join(str(gpu[k]) for k in ("name", "driver_version", "clocks.max.sm") if gpu.get(k)) or "no GPU"
    modified = " (modified)" if env.get("modified") else ""
    lines = [
        "# GPU report",
        f"{where}; torch {env['torch']}, CUDA {env['torch_cuda']}; commit {env['commit']}{modified}; {env['date']}",
    ]
    parts = report["parts"]
    if parts.get("bench", {}).get("items"):
        lines.append(bench_tables(parts["bench"]))
    rows = [(name, p["status"], p.get("seconds"), _summary(name, p)) for name, p in parts.items()]
    lines += ["### Parts", table(("part", "status", "seconds", ""), rows)]
    found = [f"* {name}: {problem}" for name, p in parts.items() for problem in p.get("problems", [])]
    if found:
        lines += ["### Problems", "\n".join(f[:300] for f in found[:25])]
    return "\n\n".join(lines)
