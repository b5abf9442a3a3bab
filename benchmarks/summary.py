"""The Markdown of a CPU run: goals, ratios, memory, rates, growth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .rows import read_rows
from .tables import table

# At most, of a full step over the frozen linear, for r = 16 and float32 pools: (dtype, features, T) -> ratio.
GOALS = {
    ("bfloat16", 1024, 256): 1.12,
    ("bfloat16", 1024, 2048): 1.08,
    ("bfloat16", 4096, 256): 1.03,
    ("bfloat16", 4096, 2048): 1.025,
    ("float32", 1024, 256): 1.10,
    ("float32", 1024, 2048): 1.08,
    ("float32", 4096, 256): 1.03,
    ("float32", 4096, 2048): 1.03,
    **{(dtype, 4096, t): 1.10 for dtype in ("bfloat16", "float32") for t in (1, 16)},
}
LORA = ("peft", "peft_fp32")  # the faster of the two is the one to beat
# Of time per module and token, the largest over that of the first point; and seconds.
FLAT, PAID_ONCE = 1.15, {"adapt": 10.0, "load": 0.5, "tables": 1.0}
CELL = ("mode", "T", "in", "out", "dtype", "dropout", "r", "l")


def cells(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """cell -> provider -> row, of what was measured of layers."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["question"] == "layer" and row["ratio"]:
            found.setdefault(tuple(row[c] for c in CELL), {})[row["provider"]] = row
    return found


def title(by: dict[str, dict]) -> str:
    row = next(iter(by.values()))
    return f"{row['mode']} T={row['T']} {row['in']}->{row['out']} {row['dtype']}"


def growth(rows: Iterable[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """what varies -> point -> (us per module and token, of which MoS's own share)."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["question"] == "scaling":
            point = row["T" if row["case"] == "rows" else row["case"]]
            found.setdefault(row["case"], {}).setdefault(point, {})[row["provider"]] = row["us"] / row["T"]
    return {
        what: {p: (by["mos"], by["mos"] - by["frozen"]) for p, by in sorted(points.items())}
        for what, points in found.items()
    }


def goals(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, goal, met)."""
    out = []

    def add(what: str, value: float, limit: float, unit: str = "") -> None:
        out.append((what, f"{value:.3f}{unit}", f"<= {limit:.3f}{unit}", value <= limit))

    measured = cells(rows)
    for cell, by in measured.items():
        mode, t, fan_in, fan_out, dtype, dropout, r, _ = cell
        if "mos" not in by:
            continue
        limit = GOALS.get((dtype, fan_in, t))
        if limit and mode == "full" and fan_in == fan_out and r == 16 and not dropout:
            add(f"mos / frozen, {title(by)}", by["mos"]["ratio"], limit)
        if loras := [by[p]["ratio"] for p in LORA if p in by]:
            add(f"mos / PEFT LoRA, {title(by)}", by["mos"]["ratio"] / min(loras), 1.0)
        peaks = [by[p]["peak_mib"] if p in by else None for p in ("frozen", "mos")]
        if None not in peaks and t >= 256:  # below, pages and stacks are most of what is seen
            allowed = 1.05 * peaks[0] + (4 * t * r + by["mos"]["gradient_bytes"]) / 2**20
            add(f"peak of mos, {title(by)}", peaks[1], allowed, " MiB")
    for what, points in growth(rows).items():
        # Short T do not fill a matrix product, whatever the adapter; r is meant to cost.
        ratios = [us for p, (us, _) in points.items() if what != "rows" or p >= 256]
        if what != "r" and len(ratios) > 1:
            add(f"growth over {what} = {min(points)}..{max(points)}", max(ratios) / ratios[0], FLAT)
    for row in rows:
        if row["question"] == "setup" and row["us"]:
            limit = PAID_ONCE[row["case"].partition(" ")[0]]
            add(f"{row['case']}: {row['model']}", row["us"] / 1e6, limit, " s")
    return out


EXCERPT = {  # provider -> heading
    "mos": "MoS",
    "peft": "PEFT LoRA, adapter in the base's dtype",
    "peft_fp32": "PEFT LoRA, default",
    "vblora": "PEFT VB-LoRA, default",
    "aten": "MoS in plain ATen",
    "frozen_again": "noise: the frozen linear again",
}


def excerpt(rows: list[dict]) -> str:
    """The table of docs/performance.md: full steps of square layers, goals and peers."""
    lines = []
    for (mode, t, fan_in, fan_out, dtype, *_), by in cells(rows).items():
        if mode == "full" and fan_in == fan_out and "vblora" in by:
            goal = _number(GOALS.get((dtype, fan_in, t)))
            ratios = {p: f"{by[p]['ratio']:.3f}" if p in by else None for p in EXCERPT}
            if dtype == "float32":  # where the two are one
                ratios["peft_fp32"] = ratios["peft"]
            mos, *peers = ratios.values()
            lines.append((f"{dtype} {fan_in} x {fan_out}, T={t}", mos, goal, *peers))
    mos, *names = EXCERPT.values()
    return table(("", mos, "goal", *names), lines)


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _by_provider(measured: dict, column: str, digits: int, scale: float = 1.0) -> str:
    names = list(dict.fromkeys(p for by in measured.values() for p in by if any(row[column] for row in by.values())))
    lines = []
    for by in measured.values():
        values = {p: row[column] for p, row in by.items() if row[column] is not None}
        if any(values.values()):
            cells_of = (_number(values[p] * scale, digits) if p in values else None for p in names)
            lines.append((title(by), *cells_of))
    return table(("case", *names), lines)


def summary(rows: list[dict]) -> str:
    env, measured = rows[0], cells(rows)
    modified = " (modified)" if env["modified"] == "True" else ""
    where = f"{env['cpu']}, {env['threads']} threads; torch {env['torch']}, PEFT {env['peft']}"
    parts = ["# Benchmarks on a CPU", f"{where}; commit {env['commit']}{modified}; {env['date']}"]

    found = goals(rows)
    met = sum(ok for *_, ok in found)
    lines = [(what, value, goal, "met" if ok else "missed") for what, value, goal, ok in found]
    parts += [f"### Goals: {met} of {len(found)} met", table(("what", "measured", "goal", ""), lines)]

    names = list(dict.fromkeys(p for by in measured.values() for p in by if p != "frozen"))
    lines = []
    for by in measured.values():
        ratios = {p: f"{row['ratio']:.3f}" for p, row in by.items()}
        if "mos" in by:
            ratios["mos"] += f" [{by['mos']['ratio_q20']:.3f}, {by['mos']['ratio_q80']:.3f}]"
        base = by.get("frozen", {}).get("us")
        lines.append((title(by), _number(base, 1), *(ratios.get(p) for p in names)))
    parts += ["### Time over the frozen linear", table(("case", "frozen us", *names), lines)]
    parts += ["### Peak memory of a full step beyond its inputs, MiB", _by_provider(measured, "peak_mib", 1)]
    parts += ["### Saved for backward, KiB", _by_provider(measured, "saved_bytes", 1, 2**-10)]
    parts += ["### ATen calls of a step", _by_provider(measured, "aten_calls", 0)]

    lines = [
        (title(by), *(by["mos"][c] for c in ("gflop_s", "of_gemm", "gb_s", "of_copy")))
        for by in measured.values()
        if "mos" in by
    ]
    ceilings = ", ".join(
        f"{r['case']} {r['gb_s'] or r['gflop_s']:.0f} {'GB/s' if r['gb_s'] else 'GFLOP/s'}"
        for r in rows
        if r["question"] == "ceiling"
    )
    head = ("case", "GFLOP/s", "of GEMM", "GB/s", "of copy")
    parts += ["### What MoS achieves", f"Ceilings of this run: {ceilings}.", table(head, lines)]

    lines = [
        (what, point, f"{1e3 * us:.2f}", f"{1e3 * own:.2f}")
        for what, points in growth(rows).items()
        for point, (us, own) in points.items()
    ]
    head = ("over", "point", "ns per module and token", "more than frozen")
    parts += ["### Growth", table(head, lines)]
    lines = [
        (row["case"], row["mode"], row["T"], row["dtype"], row["provider"], row["status"], row["cause"] or row["error"])
        for row in rows
        if row["status"] != "ok"
    ]
    if lines:
        parts += ["### Not measured, or wrong", table(("case", "mode", "T", "dtype", "provider", "", "cause"), lines)]
    return "\n\n".join(parts) + "\n"


def write_summary(file: Path, to: Path) -> str:
    text = summary(read_rows(file))
    to.write_text(text)
    return text
