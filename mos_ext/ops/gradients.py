"""Gradients of single operators, registered with torch.

``gather_concat``, ``scatter_add``, ``shrink`` and ``expand`` are differentiable; ``shrink`` and ``expand`` return a
dense gradient of the whole pool. What computes both factors at once says that it is not: ``fused.py`` is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from .schema import NAMESPACE, library

ops = torch.ops.mos_ext


def _gather_concat_setup(ctx, inputs, output):
    pool, index = inputs
    ctx.save_for_backward(index)
    ctx.num_shards, ctx.dtype = pool.shape[0], pool.dtype


def _gather_concat_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return ops.scatter_add([grad], [index], ctx.num_shards).to(ctx.dtype), None


def _shrink_setup(ctx, inputs, keyword_only_inputs, output):
    x, pool, index, ctx.p, seed = inputs
    ctx.tf32 = keyword_only_inputs["tf32"]
    ctx.save_for_backward(x, pool, index, seed)


def _shrink_backward(ctx, ds):
    x, pool, index, seed = ctx.saved_tensors
    dx, factor_grad = ops.shrink_backward(ds, x, pool, index, ctx.p, seed, tf32=ctx.tf32)
    return dx, ops.scatter_add([factor_grad], [index], pool.shape[0]).to(pool.dtype), None, None, None


def _expand_setup(ctx, inputs, keyword_only_inputs, output):
    s, pool, index, ctx.scale, _ = inputs
    ctx.tf32 = keyword_only_inputs["tf32"]
    ctx.save_for_backward(s, pool, index)


def _expand_backward(ctx, dy):
    s, pool, index = ctx.saved_tensors
    ds, factor_grad = ops.expand_backward(dy, s, pool, index, ctx.scale, tf32=ctx.tf32)
    return ds, ops.scatter_add([factor_grad], [index], pool.shape[0]).to(pool.dtype), None, None, None


def _scatter_add_setup(ctx, inputs, output):
    grads, indices, *_ = inputs
    ctx.save_for_backward(*(index[: grad.shape[0]] for grad, index in zip(grads, indices, strict=True)))
    ctx.dtype = grads[0].dtype


def _scatter_add_backward(ctx, grad):
    indices = ctx.saved_tensors
    grads = [ops.gather_concat(grad, index).to(ctx.dtype) for index in indices]
    # (The dispatcher drops arguments that are their defaults, and torch wants no gradients of those.)
    return grads, [None] * len(indices), *[None] * (len(ctx.needs_input_grad) - 2)


def _grouped_mm_setup(ctx, inputs, output):
    x, weight, ends = inputs
    of_x, of_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None, ends)


def _grouped_mm_backward(ctx, dy):
    x, weight, ends = ctx.saved_tensors
    dx = None if weight is None else ops.grouped_mm(dy, weight.mT, ends)
    return dx, None if x is None else _outer_products(x, dy, ends), None


def _outer_products(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """(G, k, n): x^T dy of every group. Only for experts that are trained themselves."""
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    rows = torch.arange(x.shape[0], device=x.device)
    own = (rows >= begins.unsqueeze(1)) & (rows < ends.unsqueeze(1))
    return torch.stack([x.T @ (dy * where.unsqueeze(1)) for where in own])


def _no_setup(ctx, inputs, keyword_only_inputs, output):
    pass


_SECOND_ORDER = (
    "mos_ext: gradients of gradients are not implemented, nor is a gradient of low_rank or linear: mos_linear has one"
)


def no_derivative(ctx, *grads):
    raise NotImplementedError(_SECOND_ORDER)


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward whose results raise when they are differentiated.

    torch's ``once_differentiable`` lets results pass for constants when the incoming gradient requires none, as that of
    a sum does: a gradient penalty would then be silently wrong, for the results depend on x and the pools as well.
    """

    @wraps(backward)
    def once(ctx, *grads):
        if not torch.is_grad_enabled():  # create_graph=True enables them
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return results
        depends = [None if r is None else r.detach().requires_grad_() for r in results]
        return torch._C._functions.DelayedError(_SECOND_ORDER.encode(), len(depends))(*depends)

    return once


for _name, _setup, _backward in (
    ("gather_concat", _gather_concat_setup, _gather_concat_backward),
    ("scatter_add", _scatter_add_setup, _scatter_add_backward),
    ("grouped_mm", _grouped_mm_setup, _grouped_mm_backward),
    ("shrink", _shrink_setup, _shrink_backward),
    ("expand", _expand_setup, _expand_backward),
    # Without these, torch would take their results for constants: a derivative through them would be silently wrong.
    ("shrink_backward", _no_setup, no_derivative),
    ("expand_backward", _no_setup, no_derivative),
    ("low_rank", _no_setup, no_derivative),
    ("low_rank_backward", _no_setup, no_derivative),
    ("grouped_low_rank", _no_setup, no_derivative),
    ("grouped_low_rank_backward", _no_setup, no_derivative),
    ("linear", _no_setup, no_derivative),
    ("linear_backward", _no_setup, no_derivative),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=library)


def _in_place(name: str) -> None:
    """What autograd must know of an in-place operator: the first argument has changed, and nothing flows through."""
    op = getattr(ops, name).default

    def kernel(keyset, out, *args, **kwargs):
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (out, *args)):
            raise RuntimeError(f"mos_ext::{name} must be called without gradients, got an argument that requires one")
        torch.autograd.graph.increment_version(out)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, out, *args, **kwargs)

    library.impl(name, kernel, "Autograd", with_keyset=True)


for _name in ("low_rank_", "low_rank_backward_", "grouped_low_rank_", "grouped_low_rank_backward_"):
    _in_place(_name)
