"""Times the operators and the layer against the frozen linear, plain ATen, the PyTorch reference and PEFT's LoRA.

    python -m benchmarks.kernels --json FILE [--device cuda|cpu] [--section ceilings,layers,serving,operators,...]

Every result is checked against the float64 reference before it is timed. On a CPU everything runs on tiny shapes: a
test of this file, not a measurement. README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import mos_ext
from mos_ext import reference
from mos_ext.ops import loader
from mos_ext.ops.checks import why_not_native
from mos_ext.ops.schema import OPERATORS
from mos_ext.routing import invert

from .harness import (
    Sizes,
    copy_ceiling,
    environment,
    gemm_ceiling,
    gpu_state,
    importable,
    input_sets,
    launches,
    measure,
    normal,
    on_stream,
    peak_extra_bytes,
    read_json,
    release,
    scrub,
    sizes_for,
    synchronize,
    write_json,
)
from .providers import PEERS, PROVIDERS, Case, Data, check_layer, errors, make_ready, rank_providers, tf32_allowed
from .serving import Served
from .tables import bench_tables, problems

ops = torch.ops.mos_ext
SECTIONS = ("ceilings", "layers", "serving", "operators", "launches", "peers")
# Seconds that an item of a section may need, where that is more than the caller keeps in reserve: compilers are slow.
NEEDS = {"peers": 60.0}


# ------------------------------------------------------------------------------------------------ ceilings


def ceilings(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    sources = (sizes.copy_bytes, sizes.copy_bytes // 8)
    yield "copy", lambda: [copy_ceiling(sizes, device, size) for size in sources]
    yield "gemm", lambda: [gemm_ceiling(sizes, device, torch.bfloat16)]
    yield "launch", lambda: _launch(sizes, device)
    for rows in (sizes.long, sizes.medium, *sizes.decode):
        for shape in sizes.shapes:
            yield f"beta T={rows} {shape[0]}->{shape[1]}", functools.partial(_beta, sizes, device, rows, *shape)


def _launch(sizes: Sizes, device: str) -> list[dict]:
    """The slope between graphs of few and of many launches: what one launch more costs."""
    few, many = 50, 450
    one = torch.zeros(1, device=device)
    kinds = {"add to one element": functools.partial(one.add_, 1.0)}
    if device == "cuda":
        kinds["empty"] = functools.partial(torch.cuda._sleep, 0)
    rows = []
    for kind, call in kinds.items():

        def chain(count: int, call=call) -> None:
            for _ in range(count):
                call()

        providers = {str(n): [functools.partial(chain, n)] for n in (few, many)}
        # One chain per sample: repeats would add chains, not launches.
        timing = measure(providers, device, replace(sizes, sample_us=0.0))
        slope = (timing[str(many)].us - timing[str(few)].us) / (many - few)
        rows.append({"what": "launch", "kind": kind, "us_per_launch": round(slope, 3), **timing[str(many)].row()})
    return rows


def _beta(sizes: Sizes, device: str, rows: int, fan_in: int, fan_out: int) -> list[dict]:
    """C = A B against C += A B, as forward (x W^T) and as backward (dy W)."""
    out = []
    for direction, (inner, outer) in {"forward": (fan_in, fan_out), "backward": (fan_out, fan_in)}.items():
        count = input_sets(2 * (rows * (inner + outer) + inner * outer), device)
        sets = []
        for _ in range(count):
            a = normal(rows, inner, dtype=torch.bfloat16, device=device)
            w = normal(fan_out, fan_in, dtype=torch.bfloat16, device=device, std=fan_in**-0.5)
            c = normal(rows, outer, dtype=torch.bfloat16, device=device)
            sets.append((a, w.t() if direction == "forward" else w, c))
        timing = measure(
            {
                "mm": [functools.partial(torch.mm, a, w, out=c) for a, w, c in sets],
                # Small alpha: c is added to over and over, and must stay a finite random matrix.
                "addmm_": [functools.partial(c.addmm_, a, w, beta=1, alpha=2**-12) for a, w, c in sets],
            },
            device,
            sizes,
        )
        out.append(
            {
                "what": "beta",
                "direction": direction,
                "rows": rows,
                "in": fan_in,
                "out": fan_out,
                "input_sets": count,
                "mm_us": round(timing["mm"].us, 3),
                "addmm_us": round(timing["addmm_"].us, 3),
                "extra_us": round(timing["addmm_"].us - timing["mm"].us, 3),
                "ratio": round(timing["addmm_"].us / timing["mm"].us, 4),
                "timer": timing["addmm_"].timer,
            }
        )
    return out


# ------------------------------------------------------------------------------------------------ operators


@dataclass(frozen=True)
class Product:
    """One size of the operators: activations (T, C), as input and as output."""

    rows: int
    cols: int
    r: int
    l: int
    p: float = 0.0
    modules: int = 1


class Operands:
    """One set of inputs. ``exact()`` is the same in float64."""

    def __init__(self, q: Product, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.q, self.dtype = q, dtype
        shards = 8 * q.modules * q.l
        self.x, self.dy = (normal(q.rows, q.cols, dtype=dtype, device=device) for _ in range(2))
        self.s, self.ds = (normal(q.rows, q.r, dtype=torch.float32, device=device) for _ in range(2))
        self.pool_a, self.pool_b = (
            normal(shards, q.cols // q.l, dtype=torch.float32, device=device, std=q.cols**-0.5) for _ in range(2)
        )
        self.grads = [normal(q.r, q.cols, dtype=torch.float32, device=device) for _ in range(q.modules)]
        self.indices = [
            torch.randint(shards, (q.r, q.l), device=device, dtype=torch.int32) for _ in range(q.modules + 1)
        ]
        self.seed = torch.randint(0, 2**62, (1,), device=device) if q.p else None
        of_modules = [index.cpu().numpy() for index in self.indices[: q.modules]]
        self.inverse = [torch.from_numpy(array).to(device) for array in invert(of_modules, shards)]
        self.shards, self.scale = shards, 0.5

    def exact(self) -> Operands:
        other = object.__new__(Operands)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.double()
            elif name == "grads":
                value = [g.double() for g in value]
            setattr(other, name, value)
        other.dtype = torch.float64
        return other


def _tuple(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _plain_low_rank(d: Operands):
    s = reference.shrink(d.x, d.pool_a, d.indices[0], d.q.p, d.seed)
    return reference.expand(s, d.pool_b, d.indices[1], d.scale, d.dtype), s


def _plain_low_rank_backward(d: Operands):
    ds, grad_b = reference.expand_backward(d.dy, d.s, d.pool_b, d.indices[1], d.scale)
    dx, grad_a = reference.shrink_backward(ds, d.x, d.pool_a, d.indices[0], d.q.p, d.seed)
    return dx, grad_a, grad_b


@dataclass(frozen=True)
class Operator:
    native: Callable[[Operands], object]
    plain: Callable[[Operands], object]
    outputs: tuple[str, ...]
    activations: int  # (T, C) matrices of 2 bytes that must be read or written
    sums: int  # (T, r) matrices of 4 bytes
    factors: int  # (r, C) matrices of 4 bytes, pools read through the tables or factor gradients

    def bytes(self, q: Product) -> int:
        return self.activations * q.rows * q.cols * 2 + self.sums * q.rows * q.r * 4 + self.factors * q.r * q.cols * 4


# What must move: each input read once, each output written once. Partial sums that kernels pass on do not count.
BY_NAME: dict[str, Operator] = {
    "shrink": Operator(
        lambda d: ops.shrink(d.x, d.pool_a, d.indices[0], d.q.p, d.seed),
        lambda d: reference.shrink(d.x, d.pool_a, d.indices[0], d.q.p, d.seed),
        ("s",),
        1,
        1,
        1,
    ),
    "expand": Operator(
        lambda d: ops.expand(d.s, d.pool_b, d.indices[1], d.scale, d.dtype),
        lambda d: reference.expand(d.s, d.pool_b, d.indices[1], d.scale, d.dtype),
        ("y",),
        1,
        1,
        1,
    ),
    "expand_backward": Operator(
        lambda d: ops.expand_backward(d.dy, d.s, d.pool_b, d.indices[1], d.scale),
        lambda d: reference.expand_backward(d.dy, d.s, d.pool_b, d.indices[1], d.scale),
        ("ds", "grad_b"),
        1,
        2,
        2,
    ),
    "shrink_backward": Operator(
        lambda d: ops.shrink_backward(d.ds, d.x, d.pool_a, d.indices[0], d.q.p, d.seed),
        lambda d: reference.shrink_backward(d.ds, d.x, d.pool_a, d.indices[0], d.q.p, d.seed),
        ("dx", "grad_a"),
        2,
        1,
        2,
    ),
    "low_rank": Operator(
        lambda d: ops.low_rank(d.x, d.pool_a, d.indices[0], d.pool_b, d.indices[1], None, d.scale, d.q.p, d.seed),
        _plain_low_rank,
        ("y", "s"),
        2,
        1,
        2,
    ),
    "low_rank_backward": Operator(
        lambda d: ops.low_rank_backward(
            d.dy, d.s, d.x, d.pool_a, d.indices[0], d.pool_b, d.indices[1], d.scale, d.q.p, d.seed
        ),
        _plain_low_rank_backward,
        ("dx", "grad_a", "grad_b"),
        3,
        1,
        4,
    ),
    "gather_concat": Operator(
        lambda d: ops.gather_concat(d.pool_a, d.indices[0]),
        lambda d: reference.gather_concat(d.pool_a, d.indices[0]),
        ("factor",),
        0,
        0,
        2,
    ),
    "scatter_add": Operator(
        lambda d: ops.scatter_add(d.grads, d.indices[: d.q.modules], d.shards, *d.inverse),
        lambda d: reference.scatter_add(d.grads, d.indices[: d.q.modules], d.shards),
        ("pool_grad",),
        0,
        0,
        0,  # see operator_bytes
    ),
}


def operator_bytes(name: str, q: Product) -> int:
    if name == "scatter_add":  # every module's gradient read, the pool's written
        return 4 * q.cols * (q.modules * q.r + 8 * q.modules)
    return BY_NAME[name].bytes(q)


def operators(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    narrow, wide = sizes.shapes[0][0], sizes.shapes[1][1]
    r, l = sizes.r, sizes.l
    passes = list(BY_NAME)[:6]
    for name in passes:
        cases = [
            Product(sizes.long, narrow, r, l),
            Product(sizes.long, wide, r, l),
            Product(sizes.medium, narrow, r, l),
            Product(sizes.decode[0], narrow, r, l),
            Product(sizes.long, narrow, sizes.ranks[1], l),
        ]
        if name in ("shrink", "shrink_backward"):
            cases.append(Product(sizes.long, narrow, r, l, sizes.dropout))
        for q in cases:
            yield f"{name} T={q.rows} C={q.cols} r={q.r} p={q.p}", functools.partial(_operator, name, q, sizes, device)
    for cols in (narrow, wide):
        # Rows are of no use to these two; one keeps the operands small.
        q = Product(1, cols, r, l)
        yield f"gather_concat C={cols} r={r}", functools.partial(_operator, "gather_concat", q, sizes, device)
        q = Product(1, cols, r, l, modules=sizes.modules)
        yield (
            f"scatter_add C={cols} r={r} modules={q.modules}",
            functools.partial(_operator, "scatter_add", q, sizes, device),
        )


def _operator(name: str, q: Product, sizes: Sizes, device: str) -> list[dict]:
    op, size = BY_NAME[name], operator_bytes(name, q)
    with torch.no_grad():
        sets = [Operands(q, device) for _ in range(input_sets(size, device, most=256))]
        exact = _tuple(op.plain(sets[0].exact()))
        plain = _tuple(op.plain(sets[0]))
        results = {"mos": _tuple(op.native(sets[0])), "plain": plain}
        checks = {
            "mos": errors(results["mos"], plain, exact, op.outputs, sets[0].x.dtype),
            "plain": errors(plain, None, exact, op.outputs, sets[0].x.dtype),
        }
        del exact, plain, results
        timing = measure(
            {
                "mos": [functools.partial(op.native, d) for d in sets],
                "plain": [functools.partial(op.plain, d) for d in sets],
            },
            device,
            sizes,
        )
    return [
        {
            "what": "operator",
            "operator": name,
            "provider": provider,
            "native": provider == "mos" and why_not_native(name, device) is None,
            "rows": q.rows,
            "cols": q.cols,
            "r": q.r,
            "l": q.l,
            "dropout": q.p,
            "modules": q.modules,
            "bytes": size,
            "input_sets": len(sets),
            "gb_s": round(size / t.us / 1e3, 1),
            **checks[provider],
            **t.row(),
        }
        for provider, t in timing.items()
    ]


# ------------------------------------------------------------------------------------------------ the layer


def cases(sizes: Sizes) -> list[Case]:
    """The most important first: time may run out."""

    def case(kind, role, rows, shape, providers, dropout=0.0, dtype=torch.bfloat16):
        sides = sizes.shapes[shape]
        return Case(kind, rows, *sides, sizes.r, sizes.l, dtype, tuple(providers), dropout, role, shape)

    shapes = range(len(sizes.shapes))
    every = tuple(p for p in PROVIDERS if p not in PEERS)
    out = [case("full", role, getattr(sizes, role), k, every) for role in ("long", "medium") for k in shapes]
    decode = tuple(p for p in every if p != "mos_layer")
    out += [case("decode", "decode", rows, k, decode) for rows in sizes.decode for k in shapes]
    out += [case("full", "long", sizes.long, k, ("frozen", *rank_providers(sizes))) for k in shapes]
    for role in ("long", "medium"):
        out += [case("full", role, getattr(sizes, role), k, every, dropout=sizes.dropout) for k in shapes]
    # PEFT has no say here: with float32 weights its two adapters are one, and autocast would make it bfloat16.
    tf32 = ("frozen", "mos", "mos_layer", "aten", "frozen_again", "reference")
    out.append(case("full", "long", sizes.long, 0, tf32, dtype=torch.float32))
    return out


def layer(case: Case, sizes: Sizes, device: str) -> list[dict]:
    traffic = 2 * case.dtype.itemsize * (case.rows * (case.fan_in + case.fan_out) + case.fan_in * case.fan_out)
    with tf32_allowed(case):
        sets = [Data(case, device) for _ in range(input_sets(traffic / (1 if case.kind == "full" else 2), device))]
        ready = make_ready(case, sets, PROVIDERS | rank_providers(sizes))
        checked = check_layer(sets[0], ready)
        release(device)
        peaks = {name: peak_extra_bytes(s[0], device) for name, s in ready.steps.items()}
        timing = measure(ready.steps, device, sizes)
    rows = [
        {
            **case.row(),
            "provider": name,
            "input_sets": len(sets),
            "peak_extra_mib": None if peaks[name] is None else round(peaks[name] / 2**20, 1),
            **checked[name],
            **t.row(),
        }
        for name, t in timing.items()
    ]
    rows += [{**case.row(), "provider": name, "failed": why} for name, why in ready.failed.items()]
    return rows + [{**case.row(), "provider": name, "absent": why} for name, why in ready.absent.items()]


def peers(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The less common competitors, each beside the frozen linear and MoS, in whatever time is left."""
    for peer in sizes.peers:
        sides = sizes.shapes[0]
        providers = ("frozen", "mos", peer)
        case = Case("full", sizes.medium, *sides, sizes.r, sizes.l, torch.bfloat16, providers, role="peers")
        yield case.name, functools.partial(layer, case, sizes, device)


def layers(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    for case in cases(sizes):
        yield case.name, functools.partial(layer, case, sizes, device)


# ------------------------------------------------------------------------------------------------ many adapters


def serving(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """A decode step whose rows use several adapters, at shapes whose weights no cache holds."""
    for k in range(1, len(sizes.shapes)):
        name = f"serving T={sizes.adapters[-1]} {sizes.shapes[k][0]}->{sizes.shapes[k][1]}"
        yield name, functools.partial(_serving, name, k, sizes, device)


def _serving(name: str, shape: int, sizes: Sizes, device: str) -> list[dict]:
    sides, rows, dtype = sizes.shapes[shape], sizes.adapters[-1], torch.bfloat16
    served = Served(sides, dtype, sizes.adapters, rows, device)
    x = normal(rows, sides[0], dtype=dtype, device=device)
    case = {"what": "serving", "case": name, "rows": rows, "in": sides[0], "out": sides[1], "shape": shape}
    with torch.no_grad(), served.providers(x) as providers:
        checks = {
            name: errors((step(),), None, (served.exact(x, adapters),), ("y",), dtype)
            for name, (step, adapters) in providers.items()
        }
        timing = measure({name: [step] for name, (step, _) in providers.items()}, device, sizes)
    found = [{**case, "provider": name, "adapters": providers[name][1], **checks[name]} for name in timing]
    found = [{**row, **timing[row["provider"]].row()} for row in found]
    return found + ([{**case, "provider": "peft", "absent": served.absent}] if served.absent else [])


# ------------------------------------------------------------------------------------------------ launch counts


def count_launches(case: Case, sizes: Sizes, device: str) -> list[dict]:
    case = replace(case, providers=tuple(p for p in case.providers if p != "frozen_again"))
    with tf32_allowed(case):
        ready = make_ready(case, [Data(case, device)], PROVIDERS | rank_providers(sizes))
        rows = []
        for name, (step,) in ready.steps.items():
            step()
            names = launches(step, device)
            rows.append({"provider": name, "launches": len(names), "kernels": dict(Counter(n[:80] for n in names))})
    rows += [{"provider": name, "failed": why} for name, why in ready.failed.items()]
    return [{**case.row(), "what": "launches", **row} for row in rows]


def launch_counts(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Last of all: once the profiler was on, launches may cost more."""
    launches(lambda: torch.zeros(1, device=device).add_(1.0), device)  # the first profile of a process is incomplete
    for case in cases(sizes):
        yield f"launches {case.name}", functools.partial(count_launches, case, sizes, device)


# ------------------------------------------------------------------------------------------------ running


ITEMS = {
    "ceilings": ceilings,
    "layers": layers,
    "serving": serving,
    "operators": operators,
    "launches": launch_counts,
    "peers": peers,
}


def run(path: Path, device: str, sections: Sequence[str], seconds: float, resume: bool) -> dict:
    """Runs item after item, writing ``path`` before and after each, so that nothing measured is lost.

    After a crash, ``resume`` goes on behind the item that crashed.
    """
    sizes, deadline = sizes_for(device), time.perf_counter() + seconds
    result = (read_json(path) if resume else None) or {}
    items: dict[str, dict] = result.setdefault("items", {})
    for item in items.values():
        if item["status"] == "running":
            item["status"] = "crashed"
    result["environment"] = environment()
    result["device"] = device
    result["mos_ext"] = {
        "version": mos_ext.__version__,
        "libraries": {name: library.problem or "loaded" for name, library in loader.libraries.items()},
        "native": [op for op in OPERATORS if why_not_native(op, device) is None],
    }
    result.setdefault("gpu_before", gpu_state())
    if device == "cpu":
        torch.set_num_threads(1)
    # Capturing a graph collects garbage; what was imported need not be looked at each time.
    if {"layers", "serving", "launches", "peers"} & set(sections):
        importable("peft")
    gc.collect()
    gc.freeze()
    with on_stream(device):
        for section in sections:
            for name, measure_item in ITEMS[section](sizes, device):
                if name in items and items[name]["status"] != "skipped":
                    continue
                if time.perf_counter() + NEEDS.get(section, 0.0) > deadline:
                    items[name] = {"section": section, "status": "skipped", "why": "no time left", "rows": []}
                    continue
                items[name] = {"section": section, "status": "running", "rows": []}
                write_json(path, scrub(result))
                began = time.perf_counter()
                try:
                    items[name] |= {"rows": measure_item(), "status": "done"}
                except Exception as error:
                    traceback.print_exc()
                    items[name] |= {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:600]}"}
                items[name]["seconds"] = round(time.perf_counter() - began, 2)
                write_json(path, scrub(result))
                print(f"{name}: {items[name]['status']}, {items[name]['seconds']} s", flush=True)
                # Raises where the device is broken for this process; the caller may start another.
                synchronize(device)
                release(device)
    result["gpu_after"] = gpu_state()
    result["complete"] = True
    write_json(path, scrub(result))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--section", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="no measurement starts after them")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds, skip what crashed")
    options = parser.parse_args()
    sections = options.section.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--section must name some of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")  # optional packages' own
    result = run(options.json, options.device, sections, options.seconds, options.resume)
    print(bench_tables(result))
    for problem in (found := problems(result)):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
