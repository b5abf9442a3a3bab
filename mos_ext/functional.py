"""The operators for users: arguments are checked, autocast is honoured, shapes are free; ``ops/`` computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import fused
from .ops.branch import Branch, Groups, Recipe
from .ops.checks import (
    check_activation,
    check_added,
    check_float,
    check_groups,
    check_index,
    check_number,
    check_pools,
    check_shape,
    check_tensor,
)
from .ops.watch import autocast, unseen

__all__ = ["gather_concat", "grouped_low_rank", "mos_linear"]  # the rest is for layers, which have checked their tables


def gather_concat(pool: Tensor, index: Tensor) -> Tensor:
    """Assembles a low-rank factor from shards: ``pool[index]``, the l shards of a row concatenated left to right.

    Args:
        pool: (n, d/l) shards, float.
        index: (r, l) int32, entries in [0, n). Read once, and again when it has changed.

    Returns:
        (r, d) in the pool's dtype. Differentiable in ``pool``; the gradient is a deterministic ordered scatter-add.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Source: MoS (ICLR 2025): ``A = pool_a[I_a].reshape(r, in)``, ``B = pool_b[I_b].reshape(r, out).T``.
    """
    check_tensor("pool", pool)
    check_tensor("index", index)
    check_float("pool", pool)
    check_shape("pool", pool, (None, None))
    if index.device != pool.device:
        raise ValueError(f"index must be on the device of the pool, {pool.device}, got {index.device}")
    check_index("index", index, pool.shape[0])
    check_shape("index", index, (None, None))
    return torch.ops.mos_ext.gather_concat(pool, index)


def mos_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + scale * (dropout(x) A^T) B^T`` with A and B read from shard pools: the operator itself.

    Args:
        x: (..., in), float64, float32, bfloat16 or float16; any leading shape, any strides; a nested tensor gives one.
        weight: (out, in), of x's dtype.
        bias: (out,) or None.
        pool_a: (n_a, in/l): float32, or x's dtype. float32 pools under bf16/fp16 x are converted inside the kernel.
        pool_b: (n_b, out/l), likewise.
        index_a, index_b: (r, l) int32, entries in [0, n); 1 <= r <= 256. Read once, and again when they have changed,
            which waits for the GPU; not while a CUDA graph is captured: kernels themselves stop at an entry out of
            range.
        scale: alpha / r.
        dropout: probability in [0, 1), applied to the low-rank branch only; 0 for evaluation. Rounded to the nearest
            1/65536.
        seed: (1,) int64 on x's device that determines the dropout mask; None draws one from torch's generator.

    Returns:
        (..., out) in x's dtype (autocast's dtype under autocast). Differentiable in x, weight, bias and both pools;
        bitwise deterministic. Sums are kept in float32 (float64 for float64). float32 products are exact,
        unless torch's own switches allow TF32 on CUDA.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    tensors = {"weight": weight, "pool_a": pool_a, "index_a": index_a, "pool_b": pool_b, "index_b": index_b}
    _check_tensors(x, tensors, {"bias": bias, "seed": seed})
    check_float("weight", weight)
    check_shape("weight", weight, (None, None))
    out_features, in_features = weight.shape
    if bias is not None:
        check_shape("bias", bias, (out_features,))
    check_shape("index_a", index_a, (None, None))
    _check_factors(pool_a, index_a, in_features, pool_b, index_b, out_features)
    _check_numbers(scale, dropout, seed)
    recipe = Recipe(index_a, index_b, float(scale), dropout, seed)
    return linear(x, weight, bias, Branch(pool_a, pool_b, None, None, recipe))


def grouped_low_rank(
    x: Tensor,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    ends: Tensor,
    *,
    rows: Tensor | None = None,
    ranks: Tensor | None = None,
    scales: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``scale * (dropout(x) A^T) B^T`` where rows are sorted by group and every group has A and B of its own.

    Groups are the experts of a layer, or the adapters that the sequences of a batch use. Nothing of ``ends``, ``rows``,
    ``ranks`` and ``scales`` is read on the host, so a CUDA graph replays with others. With ``MOS_EXT_DEBUG=1`` in the
    environment they are read and checked at every call; without it, ends that decrease or exceed the rows give wrong
    numbers, and nothing out of bounds is touched.

    Args:
        x: (T, in), float64, float32, bfloat16 or float16.
        pool_a, pool_b: (n_a, in/l) and (n_b, out/l), as of :func:`mos_linear`.
        index_a, index_b: (G, r, l) int32, the tables of all groups.
        scale: alpha / r.
        ends: (G,) int32, where the rows of each group end, as torch's ``grouped_mm`` has it: group g has the rows from
            ``ends[g - 1]`` (0 for the first) up to ``ends[g]``. Rows from the last end on belong to nobody.
        rows: (P,) int32, the row of x and of the result at each place of the sorted order, each at most once, where
            x is not sorted itself; ``ends`` counts places then.
        ranks: (G,) int32, how many of its r rows a group's tables have; the rest is not computed.
        scales: (G,) float32, each group's own factor of the scale.
        dropout, seed: as of :func:`mos_linear`; the mask belongs to places.
        batch_invariant: the result of a row is the same, to the bit, whichever and however many rows come along.

    Returns:
        (T, out) in x's dtype (autocast's under autocast), zeros for rows that belong to nobody. Differentiable in x and
        both pools; bitwise deterministic.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    tensors = {"pool_a": pool_a, "index_a": index_a, "pool_b": pool_b, "index_b": index_b, "ends": ends}
    _check_tensors(x, tensors, {"rows": rows, "ranks": ranks, "scales": scales, "seed": seed})
    check_shape("x", x, (None, None))
    check_shape("index_a", index_a, (None, None, None))
    groups = Groups(ends, rows, ranks, scales, batch_invariant)
    check_groups(groups, x.shape[0], index_a.shape[0], index_a.shape[1])
    _check_factors(pool_a, index_a, x.shape[1], pool_b, index_b, None)
    _check_numbers(scale, dropout, seed)
    (x,) = autocast(x)
    recipe = Recipe(index_a, index_b, float(scale), dropout, seed, groups)
    branch = Branch(pool_a, pool_b, None, None, recipe)
    check_pools(x, branch)
    return fused.linear(x, None, None, branch)


def _check_tensors(x: Tensor, tensors: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    check_tensor("x", x)
    check_float("x", x)
    for name, tensor in (*tensors.items(), *((n, t) for n, t in optional.items() if t is not None)):
        check_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _check_factors(
    pool_a: Tensor, index_a: Tensor, in_features: int, pool_b: Tensor, index_b: Tensor, out_features: int | None
) -> None:
    """Pools and tables of both sides; ``index_a`` has its number of dimensions. None is any number of features."""
    for side, pool, index, features in (("a", pool_a, index_a, in_features), ("b", pool_b, index_b, out_features)):
        check_float(f"pool_{side}", pool)
        check_shape(f"pool_{side}", pool, (None, None))
        check_index(f"index_{side}", index, pool.shape[0])
        check_shape(f"index_{side}", index, tuple(index_a.shape))
        if features is not None and index.shape[-1] * pool.shape[1] != features:
            raise ValueError(
                f"pool_{side} must have shards of {features}/{index.shape[-1]} elements, got the "
                f"shape {tuple(pool.shape)}"
            )
    if not 1 <= index_a.shape[-2] <= 256:
        raise ValueError(f"index_a must have 1 to 256 rows, the rank, got {index_a.shape[-2]}")


def _check_numbers(scale: float, dropout: float, seed: Tensor | None) -> None:
    for name, value in (("scale", scale), ("dropout", dropout)):
        check_number(name, value)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch, *others: Branch) -> Tensor:
    """:func:`mos_linear` without what a layer has checked once; any number of branches, the first with the base."""
    # Under autocast x is cast once: every branch keeps the same copy for its backward.
    x, weight, bias = autocast(x, weight, bias)
    if x.is_nested:
        return _nested_like(x, linear(_rows(x), weight, bias, branch, *others))
    check_activation(x, weight, bias, branch)
    y = fused.linear(_matrix(x), weight, bias, branch)
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], y.shape[-1])  # a view in any case
    return add(y, x, *others, in_place=True) if others else y


def add(y: Tensor, x: Tensor, *branches: Branch, in_place: bool = False) -> Tensor:
    """y plus ``scale * (dropout(x) A^T) B^T`` of every branch, for a base that has computed y (..., out) itself.

    Computed in x's dtype, after autocast, and added in y's. ``in_place`` permits to overwrite y: nobody else holds it,
    nor did its base save it for its backward. It is done where autograd allows it, for contiguous y that are no views.
    """
    check_tensor("the output of the base layer", y)
    (x,) = autocast(x)
    if x.is_nested and y.is_nested:
        return _nested_like(y, add(_rows(y), _rows(x), *branches, in_place=in_place))
    for branch in branches:
        check_added(x, y, branch)
        # (Tracers, transforms and dispatch modes must see no mutation.)
        if in_place and unseen() and y.dtype == x.dtype and y.is_contiguous() and not y._is_view():
            y = fused.add_(y, _matrix(x), branch)
        else:
            y = y + fused.linear(_matrix(x), None, None, branch).reshape(y.shape).to(y.dtype)
    return y


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """The elements of a nested tensor, one after the other."""
    return x.values() if x.layout == torch.jagged else torch.cat(x.unbind())


def _nested_like(x: Tensor, rows: Tensor) -> Tensor:
    """What was computed of :func:`_rows` of a nested tensor, as a nested tensor; of the same raggedness if jagged."""
    if x.layout == torch.jagged:
        structure: Any = x  # torch does not declare what only these tensors have
        lengths, dim = structure.lengths(), structure._ragged_idx
        return torch.nested.nested_tensor_from_jagged(rows, structure.offsets(), lengths, jagged_dim=dim)
    return torch.nested.as_nested_tensor(list(rows.split([len(part) for part in x.unbind()])))
