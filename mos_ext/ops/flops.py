"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: 2 per multiply-add of their products.

Registered when the package is imported, because a counter looks at the registry when it is made; importing
torch's module takes 2 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from . import schema  # noqa: F401  (defines the operators)

ops = torch.ops.mos_ext
Shape = Sequence[int]


def _product(tokens: int, pool: Shape, index: Shape) -> int:
    """Of (T, r) with (r, d), whose rows are l shards of d/l elements."""
    return 2 * tokens * index[0] * index[1] * pool[1]


@register_flop_formula([ops.shrink, ops.expand])
def _factor(x: Shape, pool: Shape, index: Shape, *_, **__) -> int:
    return _product(x[0], pool, index)


@register_flop_formula(ops.expand_backward)
def _expand_backward(dy: Shape, s: Shape, pool: Shape, index: Shape, *_, **__) -> int:
    return 2 * _product(dy[0], pool, index)  # ds, and the gradient of the factor


@register_flop_formula(ops.shrink_backward)
def _shrink_backward(ds: Shape, x: Shape, pool: Shape, index: Shape, *_, **__) -> int:
    return 2 * _product(x[0], pool, index)


def _both(x: Shape, pool_a: Shape, index_a: Shape, pool_b: Shape, index_b: Shape, *rest, **__) -> int:
    # (Where rows are in groups, a counter sees no ends and no ranks: every place counts, at the full rank.)
    rows = rest[4] if len(rest) > 4 else None
    places = x[0] if rows is None else rows[0]
    return _product(places, pool_a, index_a[-2:]) + _product(places, pool_b, index_b[-2:])


@register_flop_formula(ops.low_rank)
def _low_rank(x: Shape, *operands, **_) -> int:
    return _both(x, *operands[:4])


register_flop_formula(ops.grouped_low_rank)(_both)


@register_flop_formula([ops.low_rank_, ops.grouped_low_rank_])
def _low_rank_(y: Shape, *operands, **_) -> int:
    return _both(*operands)


@register_flop_formula([ops.low_rank_backward, ops.grouped_low_rank_backward])
def _low_rank_backward(dy: Shape, s: Shape, *operands, **_) -> int:
    return 2 * _both(*operands)


@register_flop_formula([ops.low_rank_backward_, ops.grouped_low_rank_backward_])
def _low_rank_backward_(dx: Shape, dy: Shape, s: Shape, *operands, **_) -> int:
    return 2 * _both(*operands)


def _base(x: Shape, weight: Shape) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(ops.linear)
def _linear(x: Shape, weight: Shape, bias: Shape | None, *factors, **_) -> int:
    return _base(x, weight) + _both(x, *factors)


@register_flop_formula(ops.linear_backward)
def _linear_backward(dy: Shape, s: Shape, x: Shape, weight: Shape, *factors, **_) -> int:
    return _base(x, weight) + 2 * _both(x, *factors)  # of the base, dx alone
