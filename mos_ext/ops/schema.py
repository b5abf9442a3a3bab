"""The operators: each one's schema, fake (shapes for tracing) and default, the pure PyTorch of ``reference.py``.

This is the whole contract of the operator floor. Native libraries only add CPU and CUDA kernels to what is defined
here, so every operator works, a little slower, where no library could be built. Tensors in, tensors out; nothing here
knows a module or a configuration.

All activations are matrices: ``x``, ``dx`` (T, in); ``y``, ``dy`` (T, out); ``s``, ``ds`` (T, r) in the accumulation
dtype. ``pool`` (n, d/l) is float32 or of the activations' dtype; ``index`` (r, l) is int32 and in range. ``seed`` is
one int64 on the device of x. ``tf32`` lets CUDA kernels round float32 operands to TF32; the defaults go through ATen,
which follows torch's own switch. Where rows are in groups (``branch.Groups``), tables are (G, r, l), gradients of
factors (G, r, d), and ``s`` and ``ds`` have a row per place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference

NAMESPACE = "mos_ext"
# Bumped with every change of a schema; a library built for another number is refused (loader.py,
# csrc/common/interface.h).
INTERFACE = 4

library = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: list[str] = []  # the names of those that have native kernels


def _define(schema: str, default, fake, native: bool = True) -> None:
    name = schema.partition("(")[0]
    if native:
        OPERATORS.append(name)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def _sums(x: Tensor, *shape) -> Tensor:
    return x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype))


# ------------------------------------------------------------------------------------------------ gather and its
# adjoint

_define(
    "gather_concat(Tensor pool, Tensor index) -> Tensor",
    reference.gather_concat,
    lambda pool, index: pool.new_empty(index.shape[0], index.shape[1] * pool.shape[1]),
)

_define(
    "scatter_add(Tensor[] grads, Tensor[] indices, SymInt num_shards, Tensor? starts=None, Tensor? places=None)"
    " -> Tensor",
    reference.scatter_add,
    lambda grads, indices, num_shards, *_: _sums(grads[0], num_shards, grads[0].shape[1] // indices[0].shape[1]),
)

# ------------------------------------------------------------------------------------------------ one factor


def _product(schema: str, default, fake) -> None:
    """An operator with ``tf32``, which defaults and fakes have no use for."""

    def without_tf32(function):
        return lambda *arguments, tf32=False: function(*arguments)

    _define(schema.replace(") ->", ", *, bool tf32=False) ->"), without_tf32(default), without_tf32(fake))


def _factor(s: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    return s.new_empty(*index.shape[:-1], index.shape[-1] * pool.shape[1])


_product(
    "shrink(Tensor x, Tensor pool, Tensor index, float p, Tensor? seed) -> Tensor",
    reference.shrink,
    lambda x, pool, index, p, seed: _sums(x, x.shape[0], index.shape[0]),
)

_product(
    "expand(Tensor s, Tensor pool, Tensor index, float scale, ScalarType dtype) -> Tensor",
    reference.expand,
    lambda s, pool, index, scale, dtype: s.new_empty(s.shape[0], index.shape[1] * pool.shape[1], dtype=dtype),
)

_product(
    "expand_backward(Tensor dy, Tensor s, Tensor pool, Tensor index, float scale) -> (Tensor, Tensor)",
    reference.expand_backward,
    lambda dy, s, pool, index, scale: (s.new_empty(s.shape), _factor(s, pool, index)),
)

_product(
    "shrink_backward(Tensor ds, Tensor x, Tensor pool, Tensor index, float p, Tensor? seed) -> (Tensor, Tensor)",
    reference.shrink_backward,
    lambda ds, x, pool, index, p, seed: (x.new_empty(x.shape), _factor(ds, pool, index)),
)

# ------------------------------------------------------------------------------------------------ both factors

# What a layer adds to its base, and what that costs it in backward, each as one operator: partial sums of S and dS pass
# from one kernel to the next without ever being added up in memory. The first form writes, so that its result becomes
# the C of the base's product; the form with `_` adds to what a base of any kind has computed.

_FACTORS = "Tensor pool_a, Tensor index_a, Tensor pool_b, Tensor index_b"


def _factors(s: Tensor, pool_a: Tensor, index_a: Tensor, pool_b: Tensor, index_b: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _factor(s, pool_a, index_a), _factor(s, pool_b, index_b)


def _low_rank(x, pool_a, index_a, pool_b, index_b, bias, scale, p, seed) -> tuple[Tensor, Tensor]:
    """scale * S F_b + bias, and S."""
    s = reference.shrink(x, pool_a, index_a, p, seed)
    y = reference.expand(s, pool_b, index_b, scale, x.dtype)
    return y if bias is None else y.add_(bias), s


_product(
    f"low_rank(Tensor x, {_FACTORS}, Tensor? bias, float scale, float p, Tensor? seed) -> (Tensor, Tensor)",
    _low_rank,
    lambda x, pool_a, index_a, pool_b, index_b, bias, scale, p, seed: (
        x.new_empty(x.shape[0], index_b.shape[1] * pool_b.shape[1]),
        _sums(x, x.shape[0], index_a.shape[0]),
    ),
)


def _low_rank_(y, x, pool_a, index_a, pool_b, index_b, scale, p, seed) -> Tensor:
    """y += scale * S F_b; returns S."""
    s = reference.shrink(x, pool_a, index_a, p, seed)
    y.addmm_((s * scale).to(y.dtype), reference.gather_concat(pool_b, index_b).to(y.dtype))
    return s


_product(
    f"low_rank_(Tensor(a!) y, Tensor x, {_FACTORS}, float scale, float p, Tensor? seed) -> Tensor",
    _low_rank_,
    lambda y, x, pool_a, index_a, pool_b, index_b, scale, p, seed: _sums(x, x.shape[0], index_a.shape[0]),
)


def _low_rank_backward(dy, s, x, pool_a, index_a, pool_b, index_b, scale, p, seed) -> tuple[Tensor, Tensor, Tensor]:
    """dx of the low-rank branch, and the gradients of both factors."""
    ds, factor_b = reference.expand_backward(dy, s, pool_b, index_b, scale)
    dx, factor_a = reference.shrink_backward(ds, x, pool_a, index_a, p, seed)
    return dx, factor_a, factor_b


_product(
    f"low_rank_backward(Tensor dy, Tensor s, Tensor x, {_FACTORS}, float scale, float p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    _low_rank_backward,
    lambda dy, s, x, *operands: (x.new_empty(x.shape), *_factors(s, *operands)),
)


def _onto(backward):
    """``backward`` with its dx added to what is there; returns the gradients of both factors."""

    def onto(dx, *operands) -> tuple[Tensor, Tensor]:
        dx_low, factor_a, factor_b = backward(*operands)
        dx += dx_low
        return factor_a, factor_b

    return onto


_low_rank_backward_ = _onto(_low_rank_backward)

_product(
    f"low_rank_backward_(Tensor(a!) dx, Tensor dy, Tensor s, Tensor x, {_FACTORS}, float scale, float p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    _low_rank_backward_,
    lambda dx, dy, s, x, *operands: _factors(s, *operands),
)

# ------------------------------------------------------------------------------------------------ in groups of rows

# The same where rows are sorted by group and every group has factors of its own. The four above are the case of one
# group, and share every kernel with these.

_GROUPS = "Tensor ends, Tensor? rows, Tensor? ranks, Tensor? scales, bool invariant"


def _grouped_low_rank(x, *operands) -> tuple[Tensor, Tensor]:
    """The branch (T, out), zeros for rows that belong to nobody, and S."""
    *branch, ends, rows, ranks, scales, _ = operands  # (plain PyTorch computes group by group in any case)
    return reference.grouped_low_rank(x, *branch, ends=ends, rows=rows, ranks=ranks, scales=scales)


def _grouped_sums(x: Tensor, index: Tensor, rows: Tensor | None) -> Tensor:
    return _sums(x, x.shape[0] if rows is None else rows.shape[0], index.shape[1])


_product(
    f"grouped_low_rank(Tensor x, {_FACTORS}, float scale, float p, Tensor? seed, {_GROUPS}) -> (Tensor, Tensor)",
    _grouped_low_rank,
    lambda x, pool_a, index_a, pool_b, index_b, scale, p, seed, ends, rows, *_: (
        x.new_empty(x.shape[0], index_b.shape[2] * pool_b.shape[1]),
        _grouped_sums(x, index_a, rows),
    ),
)


def _grouped_low_rank_(y, *operands) -> Tensor:
    """y += the branch; returns S."""
    delta, s = _grouped_low_rank(*operands)
    y += delta
    return s


_product(
    f"grouped_low_rank_(Tensor(a!) y, Tensor x, {_FACTORS}, float scale, float p, Tensor? seed, {_GROUPS}) -> Tensor",
    _grouped_low_rank_,
    lambda y, x, pool_a, index_a, pool_b, index_b, scale, p, seed, ends, rows, *_: _grouped_sums(x, index_a, rows),
)


def _grouped_low_rank_backward(dy, s, x, *operands) -> tuple[Tensor, Tensor, Tensor]:
    """dx of the branch, and the gradients of the factors of all groups."""
    *branch, ends, rows, ranks, scales, _ = operands
    return reference.grouped_low_rank_backward(dy, s, x, *branch, ends=ends, rows=rows, ranks=ranks, scales=scales)


_product(
    f"grouped_low_rank_backward(Tensor dy, Tensor s, Tensor x, {_FACTORS}, float scale, float p, Tensor? seed,"
    f" {_GROUPS}) -> (Tensor, Tensor, Tensor)",
    _grouped_low_rank_backward,
    lambda dy, s, x, *operands: (x.new_empty(x.shape), *_factors(s, *operands)),
)


_product(
    f"grouped_low_rank_backward_(Tensor(a!) dx, Tensor dy, Tensor s, Tensor x, {_FACTORS}, float scale, float p,"
    f" Tensor? seed, {_GROUPS}) -> (Tensor, Tensor)",
    _onto(_grouped_low_rank_backward),
    lambda dx, dy, s, x, *operands: _factors(s, *operands),
)

# The product of experts without an adapter is ATen's: an operator only so that compilers take it, in every dtype.


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (T, k) by weight (G, k, n); rows beyond the last end are left as they come.

    By torch's ``grouped_mm`` where it takes the operands; group by group, with a look at ``ends``, where it does not.
    On one core of an EPYC both take the same time, 0.98 to 1.11 of each other at 64 to 128 rows a group.
    """
    if x.shape[0] == 0:
        return x.new_zeros(0, weight.shape[2])
    narrow = all(s * t.element_size() % 16 == 0 or s == 1 for t in (x, weight) for s in t.stride())
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, weight))
    if x.dtype in (torch.bfloat16, torch.float32, torch.float16) and narrow and aligned:
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return reference.grouped_mm(x, weight, ends)


_define(
    "grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _grouped_mm,
    lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[2]),
    native=False,
)

# ------------------------------------------------------------------------------------------------ the whole layer

# Base product and branch as one operator a direction: out of place, so that nothing needs to be copied where calls are
# made functional (torch.compile), and the base's product, ATen's, adds to what the branch wrote, or the branch to it.


def _low_rank_first(x: Tensor) -> bool:
    """How the low-rank branch and the base product meet.

    On CUDA the branch is written first and becomes the C of the base's product, which reads it in its epilogue while
    the tensor cores are busy: no pass over y of its own. On the CPU the branch is added to the finished product, which
    costs nothing more and rounds once.
    """
    return x.device.type == "cuda"


def _linear(x, weight, bias, pool_a, index_a, pool_b, index_b, scale, p, seed) -> tuple[Tensor, Tensor]:
    """x W^T + bias + scale * S F_b, and S."""
    factors = (pool_a, index_a, pool_b, index_b)
    if _low_rank_first(x):
        y, s = _low_rank(x, *factors, bias, scale, p, seed)
        y.addmm_(x, weight.t())
    else:
        y = torch.nn.functional.linear(x, weight, bias)
        s = _low_rank_(y, x, *factors, scale, p, seed)
    return y, s


_product(
    f"linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, float scale, float p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    _linear,
    lambda x, weight, bias, pool_a, index_a, pool_b, index_b, scale, p, seed: (
        x.new_empty(x.shape[0], weight.shape[0]),
        _sums(x, x.shape[0], index_a.shape[0]),
    ),
)


def _linear_backward(
    dy, s, x, weight, pool_a, index_a, pool_b, index_b, scale, p, seed, of_pools
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients of both factors, or with ``of_pools`` those of both pools.

    The latter, (n, d/l), are sums as well: what ``scatter_add`` would make of the factors'.
    """
    branch = (pool_a, index_a, pool_b, index_b, scale, p, seed)
    if _low_rank_first(x):
        dx, grad_a, grad_b = _low_rank_backward(dy, s, x, *branch)
        dx.addmm_(dy, weight)
    else:
        dx = dy @ weight
        grad_a, grad_b = _low_rank_backward_(dx, dy, s, x, *branch)
    if of_pools:
        grad_a = reference.scatter_add([grad_a], [index_a], pool_a.shape[0])
        grad_b = reference.scatter_add([grad_b], [index_b], pool_b.shape[0])
    return dx, grad_a, grad_b


_product(
    f"linear_backward(Tensor dy, Tensor s, Tensor x, Tensor weight, {_FACTORS}, float scale, float p, Tensor? seed,"
    " bool of_pools) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    lambda dy, s, x, weight, pool_a, index_a, pool_b, index_b, scale, p, seed, of_pools: (
        x.new_empty(x.shape),
        s.new_empty(pool_a.shape) if of_pools else _factor(s, pool_a, index_a),
        s.new_empty(pool_b.shape) if of_pools else _factor(s, pool_b, index_b),
    ),
)
