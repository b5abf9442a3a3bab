"""The operators: each one's schema, fake (shapes for tracing) and default, the pure PyTorch of ``reference.py``.

This is the whole contract of the operator floor. Native libraries only add CPU and CUDA kernels to what is defined
here, so every operator works, a little slower, where no library could be built. Tensors in, tensors out; nothing here
knows a module or a configuration.

All activations are matrices: ``x``, ``dx`` (T, in); ``y``, ``dy`` (T, out); ``s``, ``ds`` (T, r) in the accumulation
dtype. ``pool`` (n, d/l) is float32 or of the activations' dtype; ``index`` (r, l) is int32 and in range. ``seed`` is
one int64 on the device of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference

NAMESPACE = "mos_ext"
# Bumped with every change of a schema; a library built for another number is refused (loader.py,
# csrc/common/interface.h).
INTERFACE = 1

library = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: list[str] = []  # the names of all of them


def _define(schema: str, default, fake) -> None:
    name = schema.partition("(")[0]
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
    "scatter_add(Tensor[] grads, Tensor[] indices, SymInt num_shards) -> Tensor",
    reference.scatter_add,
    lambda grads, indices, num_shards: _sums(grads[0], num_shards, grads[0].shape[1] // indices[0].shape[1]),
)

# ------------------------------------------------------------------------------------------------ forward

_define(
    "shrink(Tensor x, Tensor pool, Tensor index, float p, Tensor? seed) -> Tensor",
    reference.shrink,
    lambda x, pool, index, p, seed: _sums(x, x.shape[0], index.shape[0]),
)

_define(
    "expand(Tensor s, Tensor pool, Tensor index, float scale, ScalarType dtype) -> Tensor",
    reference.expand,
    lambda s, pool, index, scale, dtype: s.new_empty(s.shape[0], index.shape[1] * pool.shape[1], dtype=dtype),
)


def _expand_(y: Tensor, s: Tensor, pool: Tensor, index: Tensor, scale: float) -> None:
    """y += scale * S F."""
    y.addmm_((s * scale).to(y.dtype), reference.gather_concat(pool, index).to(y.dtype))


_define(
    "expand_(Tensor(a!) y, Tensor s, Tensor pool, Tensor index, float scale) -> ()",
    _expand_,
    lambda y, s, pool, index, scale: None,
)

# ------------------------------------------------------------------------------------------------ backward

_define(
    "expand_backward(Tensor dy, Tensor s, Tensor pool, Tensor index, float scale) -> (Tensor, Tensor)",
    reference.expand_backward,
    lambda dy, s, pool, index, scale: (
        s.new_empty(s.shape),
        s.new_empty(index.shape[0], index.shape[1] * pool.shape[1]),
    ),
)

_define(
    "shrink_backward(Tensor ds, Tensor x, Tensor pool, Tensor index, float p, Tensor? seed) -> (Tensor, Tensor)",
    reference.shrink_backward,
    lambda ds, x, pool, index, p, seed: (
        x.new_empty(x.shape),
        ds.new_empty(index.shape[0], index.shape[1] * pool.shape[1]),
    ),
)


def _shrink_backward_(
    dx: Tensor, ds: Tensor, x: Tensor, pool: Tensor, index: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    """dx += dropout'(dS F); returns dF."""
    dx_low, factor_grad = reference.shrink_backward(ds, x, pool, index, p, seed)
    dx += dx_low
    return factor_grad


_define(
    "shrink_backward_(Tensor(a!) dx, Tensor ds, Tensor x, Tensor pool, Tensor index, float p, Tensor? seed) -> Tensor",
    _shrink_backward_,
    lambda dx, ds, x, pool, index, p, seed: ds.new_empty(index.shape[0], index.shape[1] * pool.shape[1]),
)
