"""The mathematics of every operator in readable PyTorch: the oracle of tests and benchmarks, the operators' default.

Shapes: ``pool`` (n, d/l) shards; ``index`` (r, l) integers below n; a *factor* is the (r, d) matrix they assemble.
A of the paper is a factor with d = in, B is the transpose of one with d = out. ``x`` (T, in), ``y`` (T, out).
Called with float64 tensors these functions are the oracle; called with a model's own dtypes they are what plain
PyTorch would do, and the error that native kernels may not exceed twofold.

Source: Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DROPOUT_LEVELS = 1 << 16  # dropout probabilities are multiples of 1 / DROPOUT_LEVELS


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_concat(pool: Tensor, index: Tensor) -> Tensor:
    """The factor ``pool[index]``: l consecutive entries of a row, concatenated left to right, form one rank vector.

    pool (n, d/l), index (r, l) -> (r, d), in the pool's dtype.
    """
    return pool[index.long()].reshape(index.shape[0], index.shape[1] * pool.shape[1])


def scatter_add(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    num_shards: int,
    starts: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Adjoint of :func:`gather_concat` for all modules of one pool: every segment is added to the shard it came from.

    grads: (r_k, d) each, or (0, d) of a module that got none, indices: (r_k, l) each -> (num_shards, d/l) in the
    accumulation dtype. ``starts`` (num_shards + 1,) and ``places`` (entries, 2), int32 both, are the inverse of all
    tables, for kernels alone: shard m is used at places[starts[m]] to places[starts[m + 1]], each a module and a
    position in its table, in ascending order.
    """
    shard_size = grads[0].shape[1] // indices[0].shape[1] if indices[0].shape[1] else 0
    out = grads[0].new_zeros(num_shards, shard_size, dtype=accumulate_dtype(grads[0].dtype))
    for grad, index in zip(grads, indices, strict=True):
        out.index_put_(
            (index[: grad.shape[0]].long().flatten(),), grad.to(out.dtype).reshape(-1, shard_size), accumulate=True
        )
    return out


def philox(seed: Tensor, column_group: Tensor, row: Tensor) -> list[Tensor]:
    """Four words of 32 bits, in int64: Philox4x32-7 (Salmon et al., SC 2011).

    The counter is (column_group, row_lo, row_hi, 0).
    """
    low = 0xFFFFFFFF
    c = [
        column_group + 0 * row,
        (row & low) + 0 * column_group,
        (row >> 32) + 0 * column_group,
        0 * (row + column_group),
    ]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(7):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right once they are masked.
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [((p1 >> 32) & low) ^ c[1] ^ key[0], p1 & low, ((p0 >> 32) & low) ^ c[3] ^ key[1], p0 & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """(rows, cols) booleans, True where an element is kept.

    Depends on seed and position alone: 16 bits of Philox each.
    """
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange((cols + 7) // 8, device=device).unsqueeze(0)
    words, threshold = philox(seed, group, row), dropout_threshold(p)
    # Compared before they are stacked: bits in int64 would take 8 bytes an element.
    kept = torch.stack([(word >> shift & 0xFFFF) >= threshold for word in words for shift in (0, 16)], dim=-1)
    return kept.flatten(1)[:, :cols]


def dropout_threshold(p: float) -> int:
    """The number of 1/65536 steps nearest to p: an element is dropped when its 16 random bits are below it."""
    return int(p * DROPOUT_LEVELS + 0.5)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x with a fraction p of its elements zeroed and the others divided by 1 - p, p rounded to the nearest 1/65536."""
    threshold = dropout_threshold(p)
    if threshold == 0:
        return x
    if seed is None:
        raise ValueError(f"seed must be given for dropout with p={p}, got None")
    keep_scale = DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold) if threshold < DROPOUT_LEVELS else 0.0
    return torch.where(dropout_mask(x.shape[0], x.shape[1], p, seed), x * keep_scale, 0.0)


def shrink(x: Tensor, pool: Tensor, index: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """S = dropout(x) F^T with F = gather_concat(pool, index): (T, d) -> (T, r) in the accumulation dtype."""
    factor = gather_concat(pool, index).to(x.dtype)
    return (dropout(x, p, seed) @ factor.T).to(accumulate_dtype(x.dtype))


def expand(s: Tensor, pool: Tensor, index: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * S F: (T, r) -> (T, d) in ``dtype``."""
    factor = gather_concat(pool, index).to(dtype)
    return (s * scale).to(dtype) @ factor


def expand_backward(dy: Tensor, s: Tensor, pool: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`expand`.

    dS = scale * dy F^T (T, r) and dF = scale * S^T dy (r, d), both in the accumulation dtype.
    """
    factor = gather_concat(pool, index).to(dy.dtype)
    ds = (dy @ factor.T).to(s.dtype) * scale
    return ds, ((s * scale).to(dy.dtype).T @ dy).to(s.dtype)


def shrink_backward(
    ds: Tensor, x: Tensor, pool: Tensor, index: Tensor, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`shrink`.

    dx = dropout'(dS F) (T, d) in x's dtype and dF = dS^T dropout(x) (r, d) in the accumulation dtype.
    """
    factor = gather_concat(pool, index).to(x.dtype)
    ds_x = ds.to(x.dtype)
    return dropout(ds_x @ factor, p, seed), (ds_x.T @ dropout(x, p, seed)).to(ds.dtype)


def low_rank(
    x: Tensor,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """delta = scale * (dropout(x) A^T) B^T: (T, in) -> (T, out)."""
    return expand(shrink(x, pool_a, index_a, p, seed), pool_b, index_b, scale, x.dtype)


def grouped_low_rank(
    x: Tensor,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    *,
    ends: Tensor,
    rows: Tensor | None = None,
    ranks: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """delta (T, out) and S (P, r) of rows that are sorted by group, each group with factors of its own.

    index_a and index_b are (G, r, l) here. Group g has the places from ends[g - 1] to ends[g]; place t is row rows[t]
    of x and of delta, or row t. It uses the first ranks[g] rows of its tables, and scale * scales[g]. Rows that belong
    to nobody, and columns of S beyond the rank, are zero. With one group this is ``low_rank``.
    """
    places = dropout(x if rows is None else x[rows.long()], p, seed)
    delta = x.new_zeros(x.shape[0], index_b.shape[-1] * pool_b.shape[1])
    s = places.new_zeros(places.shape[0], index_a.shape[-2], dtype=accumulate_dtype(x.dtype))
    for g, where, own, r, factor in _groups(places.shape[0], index_a.shape[-2], ends, rows, ranks, scales):
        s[where, :r] = shrink(places[where], pool_a, index_a[g, :r])
        delta[own] = expand(s[where, :r], pool_b, index_b[g, :r], scale * factor, x.dtype)
    return delta, s


def grouped_low_rank_backward(
    dy: Tensor,
    s: Tensor,
    x: Tensor,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    *,
    ends: Tensor,
    rows: Tensor | None = None,
    ranks: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`grouped_low_rank`.

    dx (T, in) in x's dtype, those of the factors (G, r, in) and (G, r, out) in the accumulation dtype.
    """
    places = dropout(x if rows is None else x[rows.long()], p, seed)
    dx_places, dx = torch.zeros_like(places), torch.zeros_like(x)
    grad_a = s.new_zeros(*index_a.shape[:-1], x.shape[1])
    grad_b = s.new_zeros(*index_b.shape[:-1], dy.shape[1])
    for g, where, own, r, factor in _groups(places.shape[0], index_a.shape[-2], ends, rows, ranks, scales):
        ds, grad_b[g, :r] = expand_backward(dy[own], s[where, :r], pool_b, index_b[g, :r], scale * factor)
        dx_places[where], grad_a[g, :r] = shrink_backward(ds, places[where], pool_a, index_a[g, :r])
    dx[slice(None) if rows is None else rows.long()] = dropout(dx_places, p, seed)
    return dx, grad_a, grad_b


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(T, n): the rows of group g of x (T, k) times weight[g], of (G, k, n); zeros for rows that belong to nobody.

    Of ends that are in order: what experts compute without an adapter.
    """
    y, begin = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for g, end in enumerate(ends.tolist()):
        if begin < end:
            y[begin:end] = x[begin:end] @ weight[g]
        begin = end
    return y


def _groups(
    places: int, r: int, ends: Tensor, rows: Tensor | None, ranks: Tensor | None, scales: Tensor | None
) -> Iterator[tuple[int, slice, slice | Tensor, int, float]]:
    """Of every group that has rows: its number, places, rows of x, rank and factor of the scale.

    Ends beyond the places are cut off, those below the one before make an empty group.
    """
    begin = 0
    for g, end in enumerate(ends.tolist()):
        where = slice(max(begin, 0), min(end, places))
        begin = end
        if where.start < where.stop:
            own = where if rows is None else rows[where].long()
            rank = r if ranks is None else min(max(int(ranks[g]), 0), r)
            yield g, where, own, rank, 1.0 if scales is None else float(scales[g])


def delta_weight(pool_a: Tensor, index_a: Tensor, pool_b: Tensor, index_b: Tensor, scale: float) -> Tensor:
    """scale * B A, the dense (out, in) matrix that an adapter adds to a weight, in the pools' accumulation dtype."""
    dtype = accumulate_dtype(pool_a.dtype)
    b = gather_concat(pool_b, index_b).to(dtype)
    return scale * (b.T @ gather_concat(pool_a, index_a).to(dtype))


def mos_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool_a: Tensor,
    index_a: Tensor,
    pool_b: Tensor,
    index_b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * (dropout(x) A^T) B^T for x of any leading shape, differentiable by plain autograd."""
    flat = x.reshape(-1, x.shape[-1])
    delta = low_rank(flat, pool_a, index_a, pool_b, index_b, scale, p, seed)
    return torch.nn.functional.linear(x, weight, bias) + delta.reshape(*x.shape[:-1], weight.shape[0])
