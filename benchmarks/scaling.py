"""What does the cost grow with?

    python -m benchmarks.scaling FILE.csv [--grid default|smoke] [--seconds N]

Time per module and token over the size of the pools (e), the number of layers that share them, tokens, l and r: flat
but for what r adds. And what is paid once: adapting a model of 7B's shape, loading an adapter, drawing index tables.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import mos_ext
from mos_ext import MoSConfig, MoSLinear
from mos_ext.checkpoint import load_adapter, save_adapter
from mos_ext.routing import draw_tables

from .harness import CPU, SMOKE, Sizes, importable, measure, release
from .layer import columns
from .providers import LOOSE_ERROR, Case, Data
from .rows import Rows, command_line


@dataclass(frozen=True)
class Scale:
    """One point is varied at a time about ``base``."""

    base: Case
    points: dict[str, tuple[int, ...]]


FULL = Scale(
    Case("full", 128, 1024, 1024, 16, 4, torch.bfloat16, ("frozen", "mos"), layers=16, e=16),
    {
        "e": (1, 4, 16, 64),
        "layers": (1, 4, 16, 64),
        "rows": (16, 64, 256, 1024, 4096),
        "l": (1, 2, 4, 8, 16),
        "r": (4, 8, 16, 32, 64),
    },
)
TINY = Scale(
    replace(FULL.base, rows=4, fan_in=32, fan_out=32, r=4, l=2, layers=4, e=4),
    {"e": (1, 4), "layers": (1, 4), "rows": (2, 4), "l": (1, 2), "r": (2, 4)},
)
# Few layers where the point itself makes steps long, so that a round of all points stays short.
STEPS = 3 + len(FULL.points)  # that run() yields
LAYERS = {"rows": 2, "l": 4, "r": 4}


def cases(scale: Scale) -> list[tuple[str, Case]]:
    out = []
    for varied, points in scale.points.items():
        layers = min(LAYERS.get(varied, scale.base.layers), scale.base.layers)
        out += [(varied, replace(scale.base, **({"layers": layers} | {varied: p}))) for p in points]
    return out


def chain(data: Data) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Steps through ``layers`` linears, one after the other: frozen, and with MoS on all of them from one pool."""
    case, pool = data.case, data.pool(data.case.r)
    with torch.no_grad():
        pool.shards_b.mul_(0.1)  # or activations double from layer to layer
    # A weight for each, so that caches hold as little of them as in a model.
    linears = [data.linear()]
    for _ in range(case.layers - 1):
        linear = data.linear()
        linear.weight = nn.Parameter(data.weight.clone(), requires_grad=False)
        linears.append(linear)
    layers = [MoSLinear.from_linear(linear, pool=pool, layer=k) for k, linear in enumerate(linears)]

    def full(modules, trained):
        def step():
            y = data.x
            for module in modules:
                y = module(y)
            return (y.detach(), *torch.autograd.grad(y, (data.x, *trained), data.dy))

        return step

    steps = {"frozen": full(linears, ()), "mos": full(layers, (pool.shards_a, pool.shards_b))}
    exact = data.x.detach().double()
    for k in range(case.layers):
        a, b = (f.detach().double() for f in pool.factors(k))
        exact = exact @ data.weight.double().t() + pool.config.scale * (exact @ a.t()) @ b.t()
    error = (steps["mos"]()[0].double() - exact).norm() / exact.norm()
    # Errors of bfloat16 add up through the layers.
    if not error < LOOSE_ERROR * max(1, case.layers) ** 0.5:
        raise AssertionError(f"{case.layers} layers of MoS are wrong by {error:.2g}")
    return steps


def growth(scale: Scale, sizes: Sizes) -> Iterator[tuple[str, list[dict]]]:
    """One round holds all points of one sweep, so that they are compared at the same speed of the machine."""
    for varied in scale.points:
        ready = {f"{varied}={getattr(case, varied)}": case for v, case in cases(scale) if v == varied}
        steps = {}
        for point, case in ready.items():
            steps |= {f"{provider} {point}": [step] for provider, step in chain(Data(case, "cpu")).items()}
        timing = measure(steps, "cpu", sizes, base=lambda name: f"frozen {name.partition(' ')[2]}")
        rows = []
        for name, t in timing.items():
            provider, point = name.split(" ")
            row, case = t.row(), ready[point]
            row |= {k: round(row[k] / case.layers, 3) for k in ("us", "us_q20", "us_q80")}
            what = {"question": "scaling", "case": varied, "provider": provider}
            rows.append({**columns(case), **what, **row})
        release("cpu")
        yield f"growth with {varied}", rows


# ------------------------------------------------------------------------------------------------ what is paid once


class Block(nn.Module):
    """The linears of a block of LLaMA, without their values."""

    def __init__(self, hidden: int, inner: int, device: str) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            fan_in, fan_out = (inner if name == "down_proj" else hidden), (inner if name[0] in "gu" else hidden)
            linear = nn.Linear(fan_in, fan_out, bias=False, device="meta", dtype=torch.bfloat16)
            if device != "meta":  # pages that nothing touches take no memory
                linear.to_empty(device=device)
            setattr(self, name, linear)


class Model(nn.Module):
    def __init__(self, blocks: int, hidden: int, inner: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden, inner, device) for _ in range(blocks))


def _seconds(call: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found)


def _row(case: str, seconds: list[float], **more) -> dict:
    us = [1e6 * s for s in (seconds[len(seconds) // 2], seconds[0], seconds[-1])]
    times = dict(zip(("us", "us_q20", "us_q80"), (round(u, 1) for u in us), strict=True))
    return {"question": "setup", "case": case, "provider": "mos", **times, "samples": len(seconds), **more}


def setup(smoke: bool) -> Iterator[tuple[str, list[dict]]]:
    config = MoSConfig()
    blocks, hidden, inner = (4, 64, 128) if smoke else (32, 4096, 11008)
    repeats = 2 if smoke else 5
    model = f"{7 * blocks} linears, {hidden} and {inner} wide"

    def timed_adapt() -> float:
        base = Model(blocks, hidden, inner, "meta")
        began = time.perf_counter()
        mos_ext.adapt(base, config)
        return time.perf_counter() - began

    times = sorted(timed_adapt() for _ in range(repeats))
    yield "adapt", [_row("adapt on meta", times, model=model)]

    wide, layers = (64, 8) if smoke else (8192, 80)
    types = [f"model.layers.*.{name}[{wide}->{wide}]" for name in "qkvogud"]
    draw = _seconds(lambda: [draw_tables(config, t, (config.r,) * layers) for t in types], repeats)
    yield "tables", [_row(f"tables of {layers} layers, 7 types", draw, model=f"{layers} layers", layers=layers)]

    if cause := importable("safetensors"):
        yield "load", [{"question": "setup", "case": "load an adapter", "status": "absent", "cause": cause}]
        return
    # A quarter of the width: the adapter, not the base, is what is read.
    shape = (blocks, hidden // 4, inner // 4, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(mos_ext.adapt(Model(*shape), config), folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        bases = [Model(*shape) for _ in range(repeats)]
        load = _seconds(lambda: load_adapter(bases.pop(), folder), repeats)
    model = f"{7 * blocks} linears, {shape[1]} and {shape[2]} wide; {size / 2**20:.1f} MiB"
    yield "load", [_row("load an adapter", load, model=model)]


def run(which: str, seconds: float) -> Iterator[tuple[str, list[dict]]]:
    smoke = which == "smoke"
    yield from setup(smoke)
    scale = TINY if smoke else FULL
    # Five sweeps; a sweep's chains are built and checked in a few seconds.
    sizes = SMOKE if smoke else replace(CPU, seconds=max(1.0, seconds / 5 - 4), sample_us=0.0)
    yield from growth(scale, sizes)


def main(arguments: list[str] | None = None) -> int:
    options = command_line(__doc__, 60.0).parse_args(arguments)
    with Rows(options.file, "scaling") as rows:
        for name, found in run(options.grid, options.seconds):
            rows.add(name, found)
    return rows.status


if __name__ == "__main__":
    sys.exit(main())
