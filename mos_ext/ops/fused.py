"""The fused layer: base product and low-rank branch as one node of autograd.

Two passes over activations forward, two backward, nothing saved but x and S (T, r). Gradients of A and B go to handles
(``handles.py``) where there are any, else densely to the pools. Everything is a matrix here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .branch import Branch, Recipe
from .gradients import first_order, no_derivative
from .schema import NAMESPACE, library
from .watch import autocast_dtype, below_autograd, tf32, transforms_active, unseen, watched, without_autocast

ops = torch.ops.mos_ext

# Of tensors that outlived a torch.func transform; their gradients would be lost.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, branch: Branch) -> Tensor:
    """x W^T + bias + scale * (dropout(x) A^T) B^T: (T, in) -> (T, out), differentiable where anything is.

    Without a weight, the branch alone.
    """
    if branch.recipe.dropout > 0.0:
        branch = seeded(branch, x)
    hidden = unseen()
    if hidden:  # what the shorter way to apply asks for
        pool_a, pool_b, handle_a, handle_b, recipe = branch
        x, pool_a, pool_b = _unwrap_if_dead(x), _unwrap_if_dead(pool_a), _unwrap_if_dead(pool_b)
        weight = None if weight is None else _unwrap_if_dead(weight)
        bias = None if bias is None else _unwrap_if_dead(bias)
        operands = (x, weight, bias, pool_a, pool_b, handle_a, handle_b, recipe)
    else:
        operands = (x, weight, bias, *branch)
        if transforms_active():
            return _TransformedLinear.apply(*operands)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands[:-1]):
        # Without the Python of Function.apply, which takes longer than all checks of a layer.
        apply = super(torch.autograd.Function, _FusedLinear).apply if hidden else _FusedLinear.apply
        return apply(*operands)
    return _forward(x, weight, bias, *operands[3:5], operands[-1], hidden)[0]


def add_(y: Tensor, x: Tensor, branch: Branch) -> Tensor:
    """y += scale * (dropout(x) A^T) B^T in place: what an adapter adds to a base that has computed y itself.

    x (T, in) is a matrix; y (..., out) must be contiguous, and nothing that the base saved for its own backward. Not
    while anybody is watching.
    """
    branch = seeded(branch, x)
    if torch.is_grad_enabled():
        return _AddedBranch.apply(y, x, *branch)
    low_rank_(y, x, branch.pool_a, branch.pool_b, branch.recipe)
    return y


def seeded(branch: Branch, x: Tensor) -> Branch:
    """The branch with a seed, where it needs one."""
    recipe = branch.recipe
    if recipe.dropout == 0.0 or recipe.seed is not None:
        return branch
    # A tensor, not a number: no synchronisation, and every replay of a captured CUDA graph draws anew.
    return branch._replace(recipe=recipe._replace(seed=torch.randint(0, 2**62, (1,), device=x.device)))


# ------------------------------------------------------------------------------------------------ forward


def _operands(pool_a: Tensor, pool_b: Tensor, recipe: Recipe) -> tuple:
    """What every operator of both factors is given last."""
    index_a, index_b, scale, dropout, seed, groups = recipe
    return pool_a, index_a, pool_b, index_b, scale, dropout, seed, *(groups or ())


def _forward(x, weight, bias, pool_a, pool_b, recipe: Recipe, hidden: bool) -> tuple[Tensor, Tensor]:
    """y (T, out) and what backward needs of the forward pass, S (T, r)."""
    operands = _operands(pool_a, pool_b, recipe)
    with below_autograd(hidden):
        if recipe.groups is not None:
            return ops.grouped_low_rank(x, *operands, tf32=tf32(x))
        if weight is None:
            return ops.low_rank(x, *operands[:4], None, *operands[4:], tf32=tf32(x))
        product = _linear_apart if not hidden and watched() else ops.linear
        return product(x, weight, bias, *operands, tf32=tf32(x))


def low_rank_(y: Tensor, x: Tensor, pool_a: Tensor, pool_b: Tensor, recipe: Recipe) -> Tensor:
    """S (T, r); y += the branch. For code that is a node of autograd, or needs none."""
    product = ops.low_rank_ if recipe.groups is None else ops.grouped_low_rank_
    return product(y.view(-1, y.shape[-1]), x, *_operands(pool_a, pool_b, recipe), tf32=tf32(x))


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


# ------------------------------------------------------------------------------------------------ backward


def _of_pool(grad: Tensor, index: Tensor, pool: Tensor) -> Tensor:
    """The gradient of a pool, of that of a factor or of those of groups, (G, r, d)."""
    return ops.scatter_add([grad.reshape(-1, grad.shape[-1])], [index.reshape(-1, index.shape[-1])], pool.shape[0])


def _gradients(needs, recipe: Recipe, dy, x, weight, s, pool_a, pool_b) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, pool_a, pool_b, handle_a, handle_b), None for those that nobody needs."""
    if not torch.compiler.is_compiling() and autocast_dtype(dy) is not None:
        # Backward was called inside of it: it is not meant for these products.
        with without_autocast(dy):
            return _gradients(needs, recipe, dy, x, weight, s, pool_a, pool_b)
    need_x, need_weight, need_bias, need_pool_a, need_pool_b, *_ = needs
    operands = _operands(pool_a, pool_b, recipe)
    hidden, scattered = unseen(), False
    with below_autograd(hidden):
        if recipe.groups is not None:
            dx, grad_a, grad_b = ops.grouped_low_rank_backward(dy, s, x, *operands, tf32=tf32(x))
        elif not need_x or weight is None:
            dx, grad_a, grad_b = ops.low_rank_backward(dy, s, x, *operands, tf32=tf32(x))
        elif not hidden and watched():
            dx = dy @ weight
            grad_a, grad_b = ops.low_rank_backward_(dx, dy, s, x, *operands, tf32=tf32(x))
        else:
            scattered = need_pool_a and need_pool_b
            dx, grad_a, grad_b = ops.linear_backward(dy, s, x, weight, *operands, scattered, tf32=tf32(x))
        return (
            dx if need_x else None,
            dy.T @ x if need_weight else None,
            dy.sum(0) if need_bias else None,
            *_of_pools_and_handles(needs[3:], recipe, pool_a, pool_b, grad_a, grad_b, scattered),
        )


def _of_pools_and_handles(
    needs, recipe: Recipe, pool_a: Tensor, pool_b: Tensor, grad_a: Tensor, grad_b: Tensor, scattered: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of (pool_a, pool_b, handle_a, handle_b), of those of the factors; or of the pools, where scattered."""
    need_pool_a, need_pool_b, need_handle_a, need_handle_b = needs
    if not scattered:  # the factors one by one, so that not all four are there at once
        grad_a = _of_pool(grad_a, recipe.index_a, pool_a) if need_pool_a else grad_a
        grad_b = _of_pool(grad_b, recipe.index_b, pool_b) if need_pool_b else grad_b
    return (
        grad_a.to(pool_a.dtype) if need_pool_a else None,
        grad_b.to(pool_b.dtype) if need_pool_b else None,
        grad_a if need_handle_a else None,
        grad_b if need_handle_b else None,
    )


def branch_gradients(needs, recipe: Recipe, dx: Tensor, dy, s, x, pool_a, pool_b) -> tuple[Tensor | None, ...]:
    """Gradients of (pool_a, pool_b, handle_a, handle_b) of rows in groups; that of x is added to dx."""
    grad_a, grad_b = ops.grouped_low_rank_backward_(dx, dy, s, x, *_operands(pool_a, pool_b, recipe), tf32=tf32(x))
    return _of_pools_and_handles(needs, recipe, pool_a, pool_b, grad_a, grad_b)


# ------------------------------------------------------------------------------------------------ nodes


def _keep(ctx, recipe: Recipe, *tensors: Tensor | None) -> None:
    """Keeps what backward needs. Tables never change, and need no version to check."""
    ctx.recipe = recipe if recipe.seed is None else recipe._replace(seed=None)
    ctx.save_for_backward(recipe.seed, *tensors)


def _kept(ctx) -> tuple:
    """What :func:`_keep` was given."""
    seed, *tensors = ctx.saved_tensors
    return ctx.recipe if seed is None else ctx.recipe._replace(seed=seed), *tensors


class _FusedLinear(torch.autograd.Function):
    """:func:`linear` as a node."""

    # forward takes ctx itself: with a separate setup_context torch inspects the signature anew at every call. This and
    # below_autograd took forward + backward of a 64 x 64 layer from 618 to 444 us (torch 2.13, one core of an EPYC).
    @staticmethod
    def forward(ctx, x, weight, bias, pool_a, pool_b, handle_a, handle_b, recipe):
        y, s = _forward(x, weight, bias, pool_a, pool_b, recipe, unseen())
        _keep(ctx, recipe, x, weight, s, pool_a, pool_b)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        recipe, *tensors = _kept(ctx)
        return *_gradients(ctx.needs_input_grad[:7], recipe, dy, *tensors), None


class _AddedBranch(torch.autograd.Function):
    """:func:`add_` as a node."""

    @staticmethod
    def forward(ctx, y, x, pool_a, pool_b, handle_a, handle_b, recipe):
        with below_autograd(unseen()):
            s = low_rank_(y, x, pool_a, pool_b, recipe)
            torch.autograd.graph.increment_version(y)  # what a base saved after all must not pass for unchanged
        ctx.mark_dirty(y)
        _keep(ctx, recipe, x, None, s, pool_a, pool_b)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        recipe, *tensors = _kept(ctx)
        need_y, need_x, *need_others = ctx.needs_input_grad[:6]
        needs = (need_x, False, False, *need_others)
        dx, _, _, *others = _gradients(needs, recipe, dy.reshape(-1, dy.shape[-1]), *tensors)
        return dy if need_y else None, dx, *others, None


class _TransformedLinear(torch.autograd.Function):
    """The same for ``torch.func``, which wants ``setup_context``: first derivatives in reverse mode."""

    @staticmethod
    def forward(x, weight, bias, pool_a, pool_b, handle_a, handle_b, recipe):
        return _forward(x, weight, bias, pool_a, pool_b, recipe, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, pool_a, pool_b, _, _, recipe = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        _keep(ctx, recipe, x, weight, s, pool_a, pool_b)

    @staticmethod
    def backward(ctx, dy, _ds):
        needs = ctx.needs_input_grad[:7]
        recipe, *tensors = _kept(ctx)
        grads = iter(_FirstDerivative.apply(needs, recipe, dy, *tensors))
        return *(next(grads) if need else None for need in needs), None


class _FirstDerivative(torch.autograd.Function):
    """Those of ``_gradients`` that are needed, as a node without a derivative.

    torch.func always asks for one, and mostly does not use it.
    """

    @staticmethod
    def forward(*arguments):
        return tuple(grad for grad in _gradients(*arguments) if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(no_derivative)
