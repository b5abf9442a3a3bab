"""Times the operators and the layer against the frozen linear, plain ATen, the PyTorch reference and PEFT's LoRA.

    python -m benchmarks.kernels --json FILE [--device cuda|cpu] [--section ceilings,layers,operators,launches]

Every result is checked against the float64 reference before it is timed. On a CPU everything runs on tiny shapes: a
test of this file, not a measurement. README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import mos_ext
from mos_ext import MoSConfig, MoSLinear, ShardPool, reference
from mos_ext.ops import loader
from mos_ext.ops.checks import why_not_native
from mos_ext.ops.schema import OPERATORS
from mos_ext.testing import ERROR_RATIO, error_floor, relative_error

from .harness import (
    Sizes,
    Timing,
    environment,
    gpu_state,
    importable,
    input_sets,
    launches,
    measure,
    on_stream,
    peak_extra_bytes,
    read_json,
    release,
    scrub,
    sizes_for,
    synchronize,
    write_json,
)
from .tables import bench_tables, problems

ops = torch.ops.mos_ext
SECTIONS = ("ceilings", "layers", "operators", "launches")
# Providers that compute the same with other roundings or other dropout masks: a wrong one is far above this.
LOOSE_ERROR = 0.05


def normal(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).mul_(std).to(dtype)


# ------------------------------------------------------------------------------------------------ errors


def errors(
    actual: Sequence[Tensor],
    plain: Sequence[Tensor] | None,
    exact: Sequence[Tensor],
    names: Sequence[str],
    operands: torch.dtype,
) -> dict[str, object]:
    """Relative errors against float64, and whether they are allowed:

    by the rule of ``mos_ext.testing`` where plain PyTorch's results are given, else below ``LOOSE_ERROR``.
    """
    row: dict[str, object] = {"error": {}, "error_ok": True}
    for k, name in enumerate(names):
        got = actual[k]
        error = relative_error(got, exact[k]) if torch.isfinite(got).all() else math.inf
        allowed = LOOSE_ERROR
        if plain is not None:
            allowed = ERROR_RATIO * relative_error(plain[k], exact[k]) + error_floor(got, operands)
        row["error"][name] = float(f"{error:.3g}") if math.isfinite(error) else "not finite"
        row["error_ok"] = bool(row["error_ok"] and got.shape == exact[k].shape and error <= allowed)
    return row


# ------------------------------------------------------------------------------------------------ ceilings


def ceilings(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    yield "copy", lambda: _copy(sizes, device)
    yield "gemm", lambda: _gemm(sizes, device)
    yield "launch", lambda: _launch(sizes, device)
    for rows in (sizes.long, sizes.medium, *sizes.decode):
        for shape in sizes.shapes:
            yield f"beta T={rows} {shape[0]}->{shape[1]}", functools.partial(_beta, sizes, device, rows, *shape)


def _copy(sizes: Sizes, device: str) -> list[dict]:
    rows = []
    for size in (sizes.copy_bytes, sizes.copy_bytes // 8):
        count = input_sets(2 * size, device)
        source = [normal(size // 2, dtype=torch.bfloat16, device=device) for _ in range(count)]
        target = [torch.empty_like(s) for s in source]
        steps = [functools.partial(t.copy_, s) for t, s in zip(target, source, strict=True)]
        timing = measure({"copy": steps}, device, sizes)["copy"]
        rows.append({"what": "copy", "bytes": 2 * size, "gb_s": round(2 * size / timing.us / 1e3, 1), **timing.row()})
    return rows


def _gemm(sizes: Sizes, device: str) -> list[dict]:
    n = sizes.gemm
    a, b = (normal(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure({"gemm": [lambda: torch.mm(a, b.t(), out=out)]}, device, sizes)["gemm"]
    return [{"what": "gemm", "n": n, "tflop_s": round(2 * n**3 / timing.us / 1e6, 1), **timing.row()}]


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
        lambda d: ops.scatter_add(d.grads, d.indices[: d.q.modules], d.shards),
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


@dataclass(frozen=True)
class Case:
    """One measurement of the layer. ``train``: forward and backward (y, dx, adapter gradients); ``decode``: forward."""

    kind: str
    role: str  # long, medium or decode: the row of the table of goals
    rows: int
    shape: int  # position in Sizes.shapes
    fan_in: int
    fan_out: int
    r: int
    l: int
    dropout: float
    dtype: torch.dtype
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.bfloat16 else f" {str(self.dtype).removeprefix('torch.')}"
        dropout = f" p={self.dropout}" if self.dropout else ""
        ranks = " ranks" if any("r=" in p for p in self.providers) else f" r={self.r}"
        return f"{self.kind} T={self.rows} {self.fan_in}->{self.fan_out}{ranks}{dropout}{dtype}"

    def row(self) -> dict[str, object]:
        dtype = str(self.dtype).removeprefix("torch.")
        row = {k: v for k, v in vars(self).items() if k not in ("fan_in", "fan_out", "dtype", "providers")}
        return {"what": "layer", "case": self.name, **row, "in": self.fan_in, "out": self.fan_out, "dtype": dtype}


@dataclass
class Data:
    """One set of inputs of a case. Pools of one layer each, whose values are never zero, by rank."""

    case: Case
    device: str
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    pools: dict[int, ShardPool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        c = self.case
        make = functools.partial(normal, dtype=c.dtype, device=self.device)
        self.x = make(c.rows, c.fan_in).requires_grad_(c.kind == "train")
        self.dy = make(c.rows, c.fan_out)
        self.weight = make(c.fan_out, c.fan_in, std=c.fan_in**-0.5)

    def pool(self, r: int) -> ShardPool:
        if r not in self.pools:
            c = self.case
            config = MoSConfig(r=r, equivalent_rank=r, shards_per_vector=c.l, private_rank=0, dropout=c.dropout)
            pool = ShardPool(config, c.fan_in, c.fan_out, device=self.device)
            with torch.no_grad():
                # U(-1/sqrt(in), ...) is A's own start; B such that the product is as large as the base's.
                pool.b.copy_(normal(*pool.b.shape, dtype=torch.float32, device=self.device, std=r**-0.5))
            self.pools[r] = pool
        return self.pools[r]

    def linear(self) -> nn.Linear:
        base = nn.Linear(self.case.fan_in, self.case.fan_out, bias=False, device="meta", dtype=self.case.dtype)
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        return base


def draw_seed(device: str) -> Tensor:
    """As mos_ext.functional draws it, so that the same generator state gives the same mask."""
    return torch.randint(0, 2**62, (1,), device=device)


def _step(d: Data, forward: Callable[[], Tensor], *trained: Tensor):
    """Forward, and in training backward to x and ``trained``."""

    def decode():
        with torch.no_grad():
            return (forward(),)

    def train():
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, (d.x, *trained), d.dy))

    return decode if d.case.kind == "decode" else train


def frozen(d: Data):
    return _step(d, lambda: nn.functional.linear(d.x, d.weight))


def mos(d: Data, r: int | None = None):
    """The layer as users have it, with a pool of its own: two more launches than a layer that shares one."""
    pool = d.pool(r or d.case.r)
    layer = MoSLinear.from_linear(d.linear(), pool=pool).train(d.case.kind == "train")
    return _step(d, lambda: layer(d.x), pool.a, pool.b)


def mos_layer(d: Data):
    """The layer without its pools' scatter_add, which runs once for all layers that share them."""
    pool = d.pool(d.case.r)
    layer = MoSLinear.from_linear(d.linear(), pool=pool).train(d.case.kind == "train")
    return _step(d, lambda: layer(d.x), pool.handle("a", 0), pool.handle("b", 0))


class ATen(torch.autograd.Function):
    """The layer by ATen alone in the best order: the base's product accumulates into the low-rank one."""

    @staticmethod
    def forward(ctx, x, weight, pool_a, pool_b, index_a, index_b, scale, p):
        a = pool_a[index_a].reshape(index_a.shape[0], -1).to(x.dtype)
        b = pool_b[index_b].reshape(index_b.shape[0], -1).to(x.dtype)
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        s = dropped @ a.t()
        y = torch.addmm(x.new_empty(()), s, b, beta=0, alpha=scale)
        y.addmm_(x, weight.t())
        ctx.save_for_backward(dropped, mask, weight, a, b, s, index_a, index_b, pool_a, pool_b)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, a, b, s, index_a, index_b, pool_a, pool_b = ctx.saved_tensors
        nothing = dy.new_empty(())
        ds = torch.addmm(nothing, dy, b.t(), beta=0, alpha=ctx.scale)
        grad_b = torch.addmm(nothing, s.t(), dy, beta=0, alpha=ctx.scale)
        grad_a = ds.t() @ dropped
        dx = ds @ a
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - ctx.p))
        dx.addmm_(dy, weight)
        grads = [
            torch.zeros_like(pool).index_add_(0, index.flatten(), grad.reshape(-1, pool.shape[1]).to(pool.dtype))
            for pool, index, grad in ((pool_a, index_a, grad_a), (pool_b, index_b, grad_b))
        ]
        return dx, None, *grads, None, None, None, None


def aten(d: Data):
    pool = d.pool(d.case.r)
    index_a, index_b = pool.index_a[0].long(), pool.index_b[0].long()
    p = d.case.dropout if d.case.kind == "train" else 0.0
    arguments = (d.weight, pool.a, pool.b, index_a, index_b, pool.config.scale, p)
    return _step(d, lambda: ATen.apply(d.x, *arguments), pool.a, pool.b)


def mos_reference(d: Data):
    """``mos_ext.reference`` under plain autograd."""
    pool = d.pool(d.case.r)
    p = d.case.dropout if d.case.kind == "train" else 0.0
    factors = (pool.a, pool.index_a[0], pool.b, pool.index_b[0], pool.config.scale)

    def forward():
        seed = draw_seed(d.device) if p else None
        return reference.mos_linear(d.x, d.weight, None, *factors, p, seed)

    return _step(d, forward, pool.a, pool.b)


class _One(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def peft(d: Data, fp32: bool):
    """PEFT's LoRA of equal rank with the same A and B: adapter in the base's dtype, or PEFT's default, float32."""
    from peft import LoraConfig, get_peft_model

    pool, c = d.pool(d.case.r), d.case
    config = LoraConfig(r=c.r, lora_alpha=pool.config.alpha, lora_dropout=c.dropout, target_modules=["proj"])
    model = get_peft_model(_One(d.linear()), config, autocast_adapter_dtype=fp32).to(d.device)
    lora = model.base_model.model.proj
    linear_a, linear_b = lora.lora_A["default"], lora.lora_B["default"]
    for linear in (linear_a, linear_b):
        linear.to(torch.float32 if fp32 else c.dtype)
    a, b = linear_a.weight, linear_b.weight
    with torch.no_grad():
        a.copy_(reference.gather_concat(pool.a, pool.index_a[0]))
        b.copy_(reference.gather_concat(pool.b, pool.index_b[0]).t())
    model.train(c.kind == "train")

    def forward():
        if not fp32:
            return model(d.x)
        # As users train: without autocast the base's and the adapter's dtypes would not meet.
        with torch.autocast(d.device, dtype=c.dtype):
            return model(d.x)

    return _step(d, forward, a, b)


def rank_providers(sizes: Sizes) -> dict[str, Callable]:
    return {f"mos r={r}": functools.partial(mos, r=r) for r in sizes.ranks}


PROVIDERS: dict[str, Callable[[Data], Callable]] = {
    "frozen": frozen,
    "mos": mos,
    "mos_layer": mos_layer,
    "aten": aten,
    "peft": functools.partial(peft, fp32=False),
    "peft_fp32": functools.partial(peft, fp32=True),
    "frozen_again": frozen,  # how far apart two measurements of the same thing are
    "reference": mos_reference,  # last: a failed capture can spoil those behind it
}


def cases(sizes: Sizes) -> list[Case]:
    """The most important first: time may run out."""

    def case(kind, role, rows, shape, providers, dropout=0.0, dtype=torch.bfloat16):
        fan_in, fan_out = sizes.shapes[shape]
        return Case(kind, role, rows, shape, fan_in, fan_out, sizes.r, sizes.l, dropout, dtype, tuple(providers))

    shapes = range(len(sizes.shapes))
    every = tuple(PROVIDERS)
    out = [case("train", role, getattr(sizes, role), k, every) for role in ("long", "medium") for k in shapes]
    decode = tuple(p for p in every if p != "mos_layer")
    out += [case("decode", "decode", rows, k, decode) for rows in sizes.decode for k in shapes]
    out += [case("train", "long", sizes.long, k, ("frozen", *rank_providers(sizes))) for k in shapes]
    for role in ("long", "medium"):
        out += [case("train", role, getattr(sizes, role), k, every, dropout=sizes.dropout) for k in shapes]
    # PEFT has no say here: with float32 weights its two adapters are one, and autocast would make it bfloat16.
    tf32 = ("frozen", "mos", "mos_layer", "aten", "frozen_again", "reference")
    out.append(case("train", "long", sizes.long, 0, tf32, dtype=torch.float32))
    return out


@contextlib.contextmanager
def tf32_allowed(case: Case) -> Iterator[None]:
    """float32 is measured with torch's TF32 switch on: that is what it is for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or case.dtype == torch.float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact_layer(d: Data, r: int, seed: Tensor | None) -> tuple[Tensor, ...]:
    """y, and in training dx, dA, dB in float64, with the gradients of factors rather than pools."""
    pool = d.pool(r)
    a, b = (
        reference.gather_concat(p.detach(), index[0]).double().requires_grad_()
        for p, index in ((pool.a, pool.index_a), (pool.b, pool.index_b))
    )
    x, weight = d.x.detach().double().requires_grad_(), d.weight.double()
    p = d.case.dropout if seed is not None else 0.0
    y = x @ weight.t() + pool.config.scale * (reference.dropout(x, p, seed) @ a.t()) @ b
    grads = torch.autograd.grad(y, (x, a, b), d.dy.double()) if d.case.kind == "train" else ()
    return (y.detach(), *grads)


def check_layer(d: Data, providers: Mapping[str, Callable[[], tuple]], device: str) -> dict[str, dict]:
    """Errors of every provider's first step; those whose dropout masks are their own are not comparable."""
    case = d.case
    checked, plain = {}, {}
    names = ("y", "dx", "grad_a", "grad_b") if case.kind == "train" else ("y",)

    def results(name: str, r: int) -> list[Tensor]:
        torch.manual_seed(1)
        out = [t.detach() for t in providers[name]()]
        if len(out) == 4 and not name.startswith("peft") and name != "mos_layer":
            pool = d.pool(r)  # pool gradients, brought to what the oracle has: each shard here is used once
            out[2] = reference.gather_concat(out[2], pool.index_a[0])
            out[3] = reference.gather_concat(out[3], pool.index_b[0])
        elif len(out) == 4 and name.startswith("peft"):
            out[3] = out[3].t()
        return out

    dropping = case.dropout > 0.0 and case.kind == "train"
    torch.manual_seed(1)
    seed = draw_seed(device) if dropping else None
    exact = exact_layer(d, case.r, seed)
    if "reference" in providers:
        plain[case.r] = results("reference", case.r)
    for name in providers:
        if name.startswith("frozen"):
            y = nn.functional.linear(d.x.detach().double(), d.weight.double())
            checked[name] = errors(results(name, case.r)[:1], None, (y,), ("y",), d.x.dtype)
        elif "r=" in name:
            r = int(name.partition("r=")[2])
            truth = exact_layer(d, r, seed)
            at_rank = replace_rank(d, r)
            torch.manual_seed(1)
            simple = [t.detach() for t in mos_reference(at_rank)()]
            simple[2] = reference.gather_concat(simple[2], d.pool(r).index_a[0])
            simple[3] = reference.gather_concat(simple[3], d.pool(r).index_b[0])
            checked[name] = errors(results(name, r), simple, truth, names, d.x.dtype)
        elif dropping and name not in ("mos", "mos_layer", "reference"):
            checked[name] = {"error": None, "error_ok": True}
        else:
            ours = name in ("mos", "mos_layer") and case.r in plain
            checked[name] = errors(results(name, case.r), plain[case.r] if ours else None, exact, names, d.x.dtype)
    return checked


def replace_rank(d: Data, r: int) -> Data:
    """The same inputs for a case of another rank."""
    other = object.__new__(Data)
    other.__dict__.update(vars(d), case=replace(d.case, r=r))
    return other


def _builders(case: Case, sizes: Sizes) -> tuple[dict[str, Callable], dict[str, str]]:
    """Providers that can be built here, and why the others cannot."""
    known = PROVIDERS | rank_providers(sizes)
    missing = importable("peft") if any(p.startswith("peft") for p in case.providers) else None
    absent = {p: missing for p in case.providers if missing and p.startswith("peft")}
    return {p: known[p] for p in case.providers if p not in absent}, absent


def layer(case: Case, sizes: Sizes, device: str) -> list[dict]:
    traffic = 2 * case.dtype.itemsize * (case.rows * (case.fan_in + case.fan_out) + case.fan_in * case.fan_out)
    builders, absent = _builders(case, sizes)
    with tf32_allowed(case):
        sets = [Data(case, device) for _ in range(input_sets(traffic / (1 if case.kind == "train" else 2), device))]
        failed: dict[str, str] = {}
        steps: dict[str, list[Callable]] = {}
        for name, build in builders.items():
            try:
                steps[name] = [build(d) for d in sets]
                steps[name][0]()
                synchronize(device)
            except Exception as error:  # one provider's trouble (a new PEFT, say) must not cost the others
                steps.pop(name, None)
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                synchronize(device)
        checked = check_layer(sets[0], {name: s[0] for name, s in steps.items()}, device)
        release(device)
        peaks = {name: peak_extra_bytes(s[0], device) for name, s in steps.items()}
        timing: dict[str, Timing] = measure(steps, device, sizes)
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
    rows += [{**case.row(), "provider": name, "failed": why} for name, why in failed.items()]
    return rows + [{**case.row(), "provider": name, "absent": why} for name, why in absent.items()]


def layers(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    for case in cases(sizes):
        yield case.name, functools.partial(layer, case, sizes, device)


# ------------------------------------------------------------------------------------------------ launch counts


def count_launches(case: Case, sizes: Sizes, device: str) -> list[dict]:
    builders, _ = _builders(case, sizes)
    data, rows = Data(case, device), []
    with tf32_allowed(case):
        for name, build in builders.items():
            if name == "frozen_again":
                continue
            try:
                step = build(data)
                for _ in range(2):
                    step()
                names = launches(step, device)
            except Exception as error:
                rows.append({**case.row(), "what": "launches", "provider": name, "failed": str(error)[:300]})
                continue
            rows.append(
                {
                    **case.row(),
                    "what": "launches",
                    "provider": name,
                    "launches": len(names),
                    "kernels": dict(Counter(n[:80] for n in names)),
                }
            )
    return rows


def launch_counts(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Last of all: once the profiler was on, launches may cost more."""
    launches(lambda: torch.zeros(1, device=device).add_(1.0), device)  # the first profile of a process is incomplete
    for case in cases(sizes):
        yield f"launches {case.name}", functools.partial(count_launches, case, sizes, device)


# ------------------------------------------------------------------------------------------------ running


ITEMS = {"ceilings": ceilings, "layers": layers, "operators": operators, "launches": launch_counts}


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
    if "layers" in sections or "launches" in sections:
        importable("peft")
    gc.collect()
    gc.freeze()
    with on_stream(device):
        for section in sections:
            for name, measure_item in ITEMS[section](sizes, device):
                if name in items and items[name]["status"] != "skipped":
                    continue
                if time.perf_counter() > deadline:
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
