"""Gradients of the operators, and the fused layer that everything above is built on.

Two differentiable pieces:

* ``gather_concat``, ``shrink`` and ``expand`` carry registered gradients of their own. Each returns a dense gradient
  of the whole pool.
* :class:`MoSLinear` is base product and low-rank product as one autograd node: two passes over activations forward,
  two backward, nothing saved but x and S (T, r). :class:`MoSAccumulate` is the low-rank product on top of a base that
  was computed elsewhere. Their gradients of A and B go to handles (``handles.py``) where there are any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .schema import NAMESPACE, library

ops = torch.ops.mos_ext


# ------------------------------------------------------------------------------------------------ single operators


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
    grads, indices, _ = inputs
    ctx.save_for_backward(*indices)
    ctx.dtype = grads[0].dtype


def _scatter_add_backward(ctx, grad):
    indices = ctx.saved_tensors
    return [ops.gather_concat(grad, index).to(ctx.dtype) for index in indices], [None] * len(indices), None


def _no_setup(ctx, inputs, keyword_only_inputs, output):
    pass


_SECOND_ORDER = (
    "mos_ext: gradients of gradients are not implemented, nor is a gradient of low_rank or linear: mos_linear has one"
)


def _no_backward(ctx, *grads):
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
    ("shrink", _shrink_setup, _shrink_backward),
    ("expand", _expand_setup, _expand_backward),
    # Without these, torch would take their results for constants: a derivative through them would be silently wrong.
    ("shrink_backward", _no_setup, _no_backward),
    ("expand_backward", _no_setup, _no_backward),
    ("low_rank", _no_setup, _no_backward),
    ("low_rank_backward", _no_setup, _no_backward),
    ("linear", _no_setup, _no_backward),
    ("linear_backward", _no_setup, _no_backward),
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


for _name in ("low_rank_", "low_rank_backward_"):
    _in_place(_name)


# ------------------------------------------------------------------------------------------------ the fused layer


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products on the device of x in; None where it is off, or unknown (meta)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    # Named first because torch 2.11 cannot trace is_autocast_available.
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def without_autocast(x: Tensor):
    """Where autocast is off for products on the device of x."""
    return contextlib.nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What autocast does to the arguments of ``F.linear``: x and the others in its dtype, float64 untouched.

    Not for pools, which keep theirs.
    """
    if (dtype := _autocast_dtype(x)) is None:
        return x, *others

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), *(cast(t) for t in others)


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is running: both look into what is called."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a ``TorchDispatchMode`` sees every operator.

    Selective checkpointing is one: it keeps results and hands them out a second time, so nobody may write to them.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def unseen() -> bool:
    """Whether nobody looks into what is called: no tracer, no transform, no dispatch mode.

    One check for all of them, because checks are a good part of what a small layer costs.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def below_autograd(hidden: bool):
    """Where ``hidden``, operators called inside skip autograd's kernels, which for ours are Python and cost a small
    layer dearly.

    Only for code that is a derivative formula, or needs none. ``hidden`` is :func:`unseen`: whoever looks must see
    plain calls.
    """
    return torch._C._AutoDispatchBelowAutograd() if hidden else contextlib.nullcontext()


@torch.compiler.assume_constant_result  # a compiled graph keeps what was set when it was compiled
def _tf32_allowed() -> bool:
    # The one getter that understands torch's old switches and its new ones; allow_tf32 raises once a new one was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32(x: Tensor) -> bool:
    """Whether torch's switches let products of x be computed in TF32: float32 on CUDA, and asked for."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and _tf32_allowed()


def _linear_apart(x, weight, bias, *branch, tf32: bool) -> tuple[Tensor, Tensor]:
    """``ops.linear`` by pure operators of the names that checkpointing policies know: low_rank, and addmm or mm."""
    *factors, scale, p, seed = branch
    delta, s = ops.low_rank(x, *factors, None, scale, p, seed, tf32=tf32)
    y = x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return y + delta, s


def _linear_under_policy(mode, function, types, args=(), kwargs=None) -> tuple[Tensor, Tensor]:
    """``ops.linear`` where a selective checkpoint looks on: its policy is asked for base and branch one by one.

    That happens in compiled graphs, whose Python no mode sees when it runs; elsewhere :func:`watched` does it.
    """
    with mode:
        return _linear_apart(*args, **{"tf32": False, **(kwargs or {})})


for _mode in create_selective_checkpoint_contexts([]):
    torch.library.register_torch_dispatch(f"{NAMESPACE}::linear", type(_mode), _linear_under_policy, lib=library)


def mos_linear_forward(
    x, weight, bias, pool_a, pool_b, index_a, index_b, scale, p, seed, hidden: bool
) -> tuple[Tensor, Tensor]:
    """y (T, out) and what backward needs of the forward pass, S (T, r). Without a weight, y is the branch alone."""
    factors = (pool_a, index_a, pool_b, index_b)
    with below_autograd(hidden):
        if weight is None:
            y, s = ops.low_rank(x, *factors, None, scale, p, seed, tf32=tf32(x))
        else:
            linear = _linear_apart if not hidden and watched() else ops.linear
            y, s = linear(x, weight, bias, *factors, scale, p, seed, tf32=tf32(x))
    return y, s


def _gradients(needs, scale, p, dy, x, weight, s, pool_a, pool_b, index_a, index_b, seed) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, pool_a, pool_b, handle_a, handle_b), None for those that ``needs`` does not ask
    for."""
    if not torch.compiler.is_compiling() and _autocast_dtype(dy) is not None:
        # Backward was called inside of it: it is not meant for these products.
        with without_autocast(dy):
            return _gradients(needs, scale, p, dy, x, weight, s, pool_a, pool_b, index_a, index_b, seed)
    need_x, need_weight, need_bias, need_pool_a, need_pool_b, need_handle_a, need_handle_b = needs
    branch = (pool_a, index_a, pool_b, index_b, scale, p, seed)
    hidden, scattered = unseen(), False
    with below_autograd(hidden):
        if not need_x or weight is None:
            dx, grad_a, grad_b = ops.low_rank_backward(dy, s, x, *branch, tf32=tf32(x))
        elif not hidden and watched():
            dx = dy @ weight
            grad_a, grad_b = ops.low_rank_backward_(dx, dy, s, x, *branch, tf32=tf32(x))
        else:
            scattered = need_pool_a and need_pool_b
            dx, grad_a, grad_b = ops.linear_backward(dy, s, x, weight, *branch, scattered, tf32=tf32(x))
        if not scattered:  # the factors one by one, so that not all four are there at once
            grad_a = ops.scatter_add([grad_a], [index_a], pool_a.shape[0]) if need_pool_a else grad_a
            grad_b = ops.scatter_add([grad_b], [index_b], pool_b.shape[0]) if need_pool_b else grad_b
        return (
            dx if need_x else None,
            dy.T @ x if need_weight else None,
            dy.sum(0) if need_bias else None,
            grad_a.to(pool_a.dtype) if need_pool_a else None,
            grad_b.to(pool_b.dtype) if need_pool_b else None,
            grad_a if need_handle_a else None,
            grad_b if need_handle_b else None,
        )


_NO_MORE = (None,) * 5  # gradients of index_a, index_b, scale, p, seed


def apply(function: type[torch.autograd.Function], *arguments) -> Tensor:
    """``function.apply`` where :func:`unseen`, without its Python, which takes longer than all checks of a layer.

    That looks for tensors that outlived a torch.func transform, which the caller must have unwrapped.
    """
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class MoSLinear(torch.autograd.Function):
    """y = x W^T + bias + scale * (dropout(x) A^T) B^T on matrices; see ``functional.mos_linear`` for the arguments.

    Gradients of A and B go to ``handle_a`` and ``handle_b`` where given, else densely to the pools. Without a weight, y
    is the branch alone. ``hidden`` is :func:`unseen`.
    """

    # forward takes ctx itself: with a separate setup_context torch inspects the signature anew at every call. This and
    # below_autograd took forward + backward of a 64 x 64 layer from 618 to 444 us (torch 2.13, one core of an EPYC).
    @staticmethod
    def forward(ctx, x, weight, bias, pool_a, pool_b, handle_a, handle_b, index_a, index_b, scale, p, seed, hidden):
        y, s = mos_linear_forward(x, weight, bias, pool_a, pool_b, index_a, index_b, scale, p, seed, hidden)
        ctx.scale, ctx.p = scale, p
        ctx.save_for_backward(x, weight, s, pool_a, pool_b, index_a, index_b, seed)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return *_gradients(ctx.needs_input_grad[:7], ctx.scale, ctx.p, dy, *ctx.saved_tensors), *_NO_MORE, None


class MoSAccumulate(torch.autograd.Function):
    """y += scale * (dropout(x) A^T) B^T in place: what an adapter adds to a base that has computed y (..., out) itself.

    x (T, in) is a matrix. y must be contiguous, and nothing that the base saved for its own backward.
    """

    @staticmethod
    def forward(ctx, y, x, pool_a, pool_b, handle_a, handle_b, index_a, index_b, scale, p, seed):
        with below_autograd(unseen()):
            flat = y.view(-1, y.shape[-1])
            s = ops.low_rank_(flat, x, pool_a, index_a, pool_b, index_b, scale, p, seed, tf32=tf32(x))
            torch.autograd.graph.increment_version(y)  # what a base saved after all must not pass for unchanged
        ctx.mark_dirty(y)
        ctx.scale, ctx.p = scale, p
        ctx.save_for_backward(x, s, pool_a, pool_b, index_a, index_b, seed)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, s, *rest = ctx.saved_tensors
        need_y, need_x, *need_others = ctx.needs_input_grad[:6]
        needs = (need_x, False, False, *need_others)
        dx, _, _, *others = _gradients(needs, ctx.scale, ctx.p, dy.reshape(-1, dy.shape[-1]), x, None, s, *rest)
        return dy if need_y else None, dx, *others, *_NO_MORE


class MoSLinearTransformed(torch.autograd.Function):
    """The same for ``torch.func``, which wants ``setup_context``: first derivatives in reverse mode."""

    @staticmethod
    def forward(x, weight, bias, pool_a, pool_b, handle_a, handle_b, index_a, index_b, scale, p, seed):
        return mos_linear_forward(x, weight, bias, pool_a, pool_b, index_a, index_b, scale, p, seed, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, pool_a, pool_b, _, _, index_a, index_b, ctx.scale, ctx.p, seed = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        ctx.save_for_backward(x, weight, s, pool_a, pool_b, index_a, index_b, seed)

    @staticmethod
    def backward(ctx, dy, _ds):
        needs = ctx.needs_input_grad[:7]
        grads = iter(_FirstDerivative.apply(needs, ctx.scale, ctx.p, dy, *ctx.saved_tensors))
        return *(next(grads) if need else None for need in needs), *_NO_MORE


class _FirstDerivative(torch.autograd.Function):
    """Those of ``_gradients`` that are needed, as a node without a derivative: torch.func always asks for one, and
    mostly does not use it."""

    @staticmethod
    def forward(*arguments):
        return tuple(grad for grad in _gradients(*arguments) if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_no_backward)
