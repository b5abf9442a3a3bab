"""What tests, benchmarks and the self-test share: random cases, and the rule for how wrong a kernel may be.

The rule: against the float64 reference, an operator's error is at most twice that of plain PyTorch
(``reference.py``) on the same inputs in the same dtype, plus a few units in the last place for results that plain
PyTorch happens to hit exactly. It is the rule of flash-attention's tests; it needs no per-shape tolerances, and it
catches a missing conversion or a lossy accumulation at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .functional import mos_linear

# Errors are ratios of 2-norms. The floors, in units of the dtype's eps, cover plain results that are exact by luck:
# one rounding costs at most eps/2, and four times that leaves room for a short sum. float64 has no wider oracle, so
# both sides round: a sum of K terms differs by about sqrt(K) eps, and 64 covers K = 4096.
ERROR_RATIO = 2.0
FLOOR_EPS = {torch.float64: 64.0, torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in 2-norms, in float64; 0 for equal tensors, inf for a difference from zero."""
    difference, norm = (actual.double() - exact.double()).norm().item(), exact.double().norm().item()
    return 0.0 if difference == 0.0 else difference / norm if norm else float("inf")


def error_floor(actual: Tensor, operands: torch.dtype) -> float:
    """What a result may differ by, however exact plain PyTorch happens to be.

    The floor of its own dtype; and where that is wider than ``operands``, the dtype of the activations, one eps of the
    latter for the two operands of a product, each rounded by at most eps/2. Plain PyTorch hits a few such sums by luck,
    many only on average: the allowance shrinks with the square root of their number.
    """
    own = FLOOR_EPS[actual.dtype] * torch.finfo(actual.dtype).eps
    eps = torch.finfo(operands).eps
    return own if eps <= torch.finfo(actual.dtype).eps else own + eps / max(1, actual.numel()) ** 0.5


def assert_error_ratio(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str = "result", operands: torch.dtype | None = None
) -> None:
    """AssertionError unless ``actual`` obeys the rule; ``plain`` is plain PyTorch's result, ``exact`` float64's.

    ``operands`` is the dtype of the activations, where sums of their products are returned in a wider one.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all() or not torch.isfinite(exact).all(), f"{what}: not finite"
    error, plain_error = relative_error(actual, exact), relative_error(plain, exact)
    allowed = ERROR_RATIO * plain_error + error_floor(actual, operands or actual.dtype)
    assert error <= allowed, f"{what}: error {error:.2e}, plain PyTorch {plain_error:.2e}, allowed {allowed:.2e}"


@dataclass
class Case:
    """Inputs of one MoS linear. ``dtype`` is that of x, weight and bias; ``exact()`` is the same case in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    pool_a: Tensor
    index_a: Tensor
    pool_b: Tensor
    index_b: Tensor
    scale: float

    def arguments(self) -> tuple:
        return self.x, self.weight, self.bias, self.pool_a, self.index_a, self.pool_b, self.index_b, self.scale

    def apply(self, f: Callable[[Tensor], Tensor]) -> Case:
        """The case with ``f`` of every floating-point tensor, detached."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                changed[name] = f(value.detach())
        return replace(self, **changed)

    def exact(self) -> Case:
        return self.apply(Tensor.double)

    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.pool_a, self.pool_b) if t is not None]

    def requires_grad_(self) -> Case:
        for t in self.differentiable():
            t.requires_grad_()
        return self


def random_case(
    rows: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    r: int,
    l: int,
    *,
    num_shards: int | None = None,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """A random case of activations with unit variance; ``pool_dtype`` defaults to float32 (float64 for float64)."""
    generator = torch.Generator().manual_seed(seed)
    pool_dtype = pool_dtype or reference.accumulate_dtype(dtype)
    n = num_shards or 2 * r * l

    def normal(*shape: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(to).to(device)

    def table() -> Tensor:
        return torch.randperm(n, generator=generator)[: r * l].reshape(r, l).to(torch.int32).to(device)

    return Case(
        normal(*(rows if isinstance(rows, tuple) else (rows,)), in_features),
        normal(out_features, in_features, std=in_features**-0.5),
        normal(out_features) if bias else None,
        normal(n, in_features // l, std=in_features**-0.5, to=pool_dtype),
        table(),
        normal(n, out_features // l, std=r**-0.5, to=pool_dtype),
        table(),
        0.5,
    )


def check_case(case: Case) -> None:
    """Forward and all gradients of ``functional.mos_linear`` by the rule; AssertionError where it is broken."""
    exact = case.exact().requires_grad_()
    results = []
    plain = case.apply(Tensor.clone).requires_grad_()
    case.requires_grad_()
    grad_y = None
    for function, inputs in ((mos_linear, case), (reference.mos_linear, plain), (reference.mos_linear, exact)):
        y = function(*inputs.arguments())
        if grad_y is None:
            generator = torch.Generator().manual_seed(1)
            grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)
        grads = torch.autograd.grad(y, inputs.differentiable(), grad_y.to(y.dtype))
        results.append((y.detach(), *grads))
    names = ["y", "dx", "dweight", *(["dbias"] if case.bias is not None else []), "dpool_a", "dpool_b"]
    for name, actual, plain_result, exact_result in zip(names, *results, strict=True):
        assert_error_ratio(actual, plain_result, exact_result, name, case.x.dtype)
