"""Every operator once or more on small shapes, for compute-sanitizer to watch; also checks the results coarsely.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize_cases

Shapes are chosen for the edges of tiles: a single row, rows and ranks beyond one tile, shards that 16-byte vectors do
not fit. Inputs are made on the CPU and results are compared there: few kernels but ours run.
"""

from __future__ import annotations

import argparse
import sys

import torch

import mos_ext
from mos_ext import MoSLinear, reference
from mos_ext.ops.checks import why_not_native
from mos_ext.routing import invert
from mos_ext.testing import random_case, relative_error

ops = torch.ops.mos_ext
# rows, in, out, r, l, dtype, dropout
CASES = (
    (70, 128, 192, 16, 4, torch.bfloat16, 0.0),
    (65, 264, 136, 5, 2, torch.bfloat16, 0.25),
    (130, 64, 1088, 72, 4, torch.bfloat16, 0.0),
    (33, 60, 84, 7, 3, torch.float16, 0.25),
    (1, 128, 64, 16, 4, torch.bfloat16, 0.0),
    (66, 96, 80, 12, 4, torch.float32, 0.25),
    (37, 40, 72, 20, 2, torch.float64, 0.0),
)
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_LIMIT = 5e-3


def compare(name: str, actual, plain, limit: float) -> None:
    actual = actual if isinstance(actual, tuple) else (actual,)
    plain = plain if isinstance(plain, tuple) else (plain,)
    for k, (got, want) in enumerate(zip(actual, plain, strict=True)):
        error = relative_error(got.cpu(), want)
        assert error <= limit, f"{name}, output {k}: relative error {error:.2e}, allowed {limit:.0e}"


def run(rows, fan_in, fan_out, r, l, dtype, p, device: str, tf32: bool = False) -> None:
    case = random_case(rows, fan_in, fan_out, r, l, dtype=dtype)
    limit = TF32_LIMIT if tf32 else LIMIT[dtype]
    generator = torch.Generator().manual_seed(2)
    wide = reference.accumulate_dtype(dtype)
    dy = torch.randn(rows, fan_out, generator=generator, dtype=torch.float64).to(dtype)
    s = torch.randn(rows, r, generator=generator, dtype=torch.float64).to(wide)
    y, dx = dy.flip(0).contiguous(), case.x.flip(0).contiguous()
    seed = torch.tensor([12345])
    bias, x = case.bias, case.x
    pool_a, index_a, pool_b, index_b = case.pool_a, case.index_a, case.pool_b, case.index_b

    def moved(*tensors):
        return tuple(t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in tensors)

    def check(name, arguments, expected, **options):
        compare(f"{name} {dtype} T={rows}", getattr(ops, name)(*moved(*arguments), **options), expected, limit)

    precision = {"tf32": tf32}
    shrunk = reference.shrink(x, pool_a, index_a, p, seed)
    check("gather_concat", (pool_a, index_a), reference.gather_concat(pool_a, index_a))
    check("shrink", (x, pool_a, index_a, p, seed), shrunk, **precision)
    expected = reference.expand(s, pool_b, index_b, 0.5, dtype)
    check("expand", (s, pool_b, index_b, 0.5, dtype), expected, **precision)
    expected = reference.expand_backward(dy, s, pool_b, index_b, 0.5)
    check("expand_backward", (dy, s, pool_b, index_b, 0.5), expected, **precision)
    expected = reference.shrink_backward(s, x, pool_a, index_a, p, seed)
    check("shrink_backward", (s, x, pool_a, index_a, p, seed), expected, **precision)

    factors = (pool_a, index_a, pool_b, index_b)
    low = reference.expand(shrunk, pool_b, index_b, 0.5, dtype)
    check("low_rank", (x, *factors, bias, 0.5, p, seed), (low + bias, shrunk), **precision)
    ds, grad_b = reference.expand_backward(dy, s, pool_b, index_b, 0.5)
    dx_low, grad_a = reference.shrink_backward(ds, x, pool_a, index_a, p, seed)
    check("low_rank_backward", (dy, s, x, *factors, 0.5, p, seed), (dx_low, grad_a, grad_b), **precision)
    # The forms that add to what is there.
    target = moved(y)[0]
    ops.low_rank_(target, *moved(x, *factors), 0.5, p, *moved(seed), **precision)
    compare(f"low_rank_ {dtype}", target, y + low, limit)
    target = moved(dx)[0]
    ops.low_rank_backward_(target, *moved(dy, s, x, *factors), 0.5, p, *moved(seed), **precision)
    compare(f"low_rank_backward_ {dtype}", target, dx + dx_low, limit)

    grads, indices = [grad_a, grad_a.flip(0).contiguous()], [index_a, index_a.flip(1).contiguous()]
    expected = reference.scatter_add(grads, indices, pool_a.shape[0])
    inverse = [torch.from_numpy(array).to(device) for array in invert([i.numpy() for i in indices], pool_a.shape[0])]
    for way in ((), inverse):
        got = ops.scatter_add([g.to(device) for g in grads], [i.to(device) for i in indices], pool_a.shape[0], *way)
        compare(f"scatter_add {dtype}", got, expected, limit)


def run_layer(device: str) -> None:
    """The layer, forward and backward through its pool."""
    config = mos_ext.MoSConfig(r=8, equivalent_rank=8, shards_per_vector=4, private_rank=0)
    layer = MoSLinear(64, 96, config=config, device=device, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    x = torch.randn(34, 64).to(device, torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    assert all(torch.isfinite(t.grad.cpu()).all() for t in (x, layer.pool.shards_a, layer.pool.shards_b))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for case in CASES:
        run(*case, device)
    if device == "cuda":
        run(*CASES[5], device, tf32=True)
        torch.cuda.synchronize()
    run_layer(device)
    python = [op for op in ("shrink", "expand", "scatter_add") if why_not_native(op, device)]
    if device == "cuda" and python:
        print(f"sanitize cases: no native kernels: {why_not_native(python[0], device)}")
        return 1
    print("sanitize cases: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
