"""How L layers share a pool at a cost that does not grow with it.

A dense pool gradient per layer would cost L times the pool in memory traffic every step. Instead each layer
differentiates with respect to a *handle*: a (r, d) tensor without storage that stands for its factor. Its gradient is
the factor's, r * d elements. All handles of a pair of pools leave one autograd node, which runs once per backward pass,
after the last layer, and sums all factor gradients into each pool with one ordered ``scatter_add``. A handle holds no
values and its node saves none, so one set serves every step for as long as the parameters and their tables live: there
is nothing in it that could become stale. Layers called twice, not at all, or alone, gradient accumulation and both
kinds of checkpointing are autograd's ordinary business. What is not, is one delivery for all the backward passes that
reentrant checkpointing runs inside another: :class:`Stash`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import reference
from .gradients import first_order, ops
from .watch import below_autograd, unseen


class Tables(NamedTuple):
    """The tables of all layers of a pool, and where its shards are used.

    Attributes:
        indices: (r, l) int32 of each layer, (E, r, l) of a stack of experts.
        starts, places: their inverse, as ``scatter_add`` wants it. Going by it costs what the gradients do; looking for
            each shard in all tables costs (shards x entries), 24,576 x 393,216 where 48 layers have 128 experts.
    """

    indices: tuple[Tensor, ...]
    starts: Tensor
    places: Tensor


class _FactorHandles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        shapes: Sequence[tuple[int, ...]],
        tables: Sequence[Tables],
        stashes: Sequence[Stash | None],
        *pools: Tensor,
    ):
        ctx.set_materialize_grads(False)
        # Attributes, not save_for_backward: integer tables never change, and a node that saves nothing can run in
        # every step.
        ctx.pools, handles = [], []
        for (n, width), of_pool, stash, pool in zip(shapes, tables, stashes, pools, strict=True):
            flat = tuple(index.reshape(-1, index.shape[-1]) for index in of_pool.indices)
            ctx.pools.append((of_pool._replace(indices=flat), stash, n, pool.dtype))
            origin = pool.new_zeros((), dtype=reference.accumulate_dtype(pool.dtype))
            handles += [origin.expand(*i.shape[:-1], i.shape[-1] * width) for i in of_pool.indices]
        return tuple(handles)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        pool_grads, of_layers = [], iter(grads)
        with below_autograd(unseen()):
            for (indices, starts, places), stash, num_shards, dtype in ctx.pools:
                given = [next(of_layers) for _ in indices]
                pool_grad = None
                if (some := next((grad for grad in given if grad is not None), None)) is not None:
                    nothing = some.new_empty(0, some.shape[-1])
                    flat = [nothing if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in given]
                    pool_grad = ops.scatter_add(flat, indices, num_shards, starts, places)
                    if stash is not None and (stashed := stash.take()) is not None:
                        pool_grad += stashed
                    pool_grad = pool_grad.to(dtype)
                pool_grads.append(pool_grad)
        return None, None, None, *pool_grads


def factor_handles(
    pools: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    tables: Sequence[Tables],
    stashes: Sequence[Stash | None],
) -> list[tuple[Tensor, ...]]:
    """For each pool, one handle per layer: a storage-free (r, d) stand-in for its factor, whose gradient flows to the
    pool. ``shapes`` are the pools': ZeRO-3 leaves a parameter empty while no layer uses it."""
    handles = iter(_FactorHandles.apply(shapes, tables, stashes, *pools))
    return [tuple(next(handles) for _ in of_pool.indices) for of_pool in tables]


def run_last(handles: Sequence[Tensor], last: bool) -> None:
    """Whether the pools' node waits until nothing else is left to run in a backward pass, or runs once it can.

    At once is better: DDP can reduce the gradient while backward goes on, and FSDP2 reduces those of a unit when the
    gradient of the unit's input is there, whatever is still to come. (Autograd runs the youngest of the nodes that are
    ready first, and this node is older than any of a forward pass.)
    """
    node = handles[0].grad_fn
    if node is not None:
        node._set_sequence_nr(0 if last else 2**62)  # type: ignore[attr-defined]


class Stash:
    """Holds back a pool's gradient until the outermost backward pass ends.

    A block under reentrant checkpointing runs a backward pass of its own inside the outer one, and would deliver to the
    parameter each time. DDP takes the first delivery for the whole gradient, ZeRO forbids a second, and an optimiser
    that steps in a hook of the parameter would step once per block. So layers that are recomputed inside a backward
    pass use the ``handles`` here. They lead to ``proxy``, a leaf without storage that stands for the pool,
    where gradients add up. The outer graph's own node of the pool adds what is there when it runs, after everything
    else (:func:`run_last`); where there is no such node, a callback at the end of the outer pass delivers. The
    parameter sees one gradient.
    """

    def __init__(self, pool: Tensor, shape: tuple[int, ...], tables: Tables) -> None:
        self.pool, self.delivered_in = pool, -1
        self._delivery: Callable[[], _Delivery | None] = _none
        # Ahead of time: while a layer is recomputed, selective checkpointing watches for operators that are new to it.
        with torch.enable_grad():
            origin = torch.zeros((), dtype=reference.accumulate_dtype(pool.dtype), device=pool.device)
            self.proxy = origin.expand(shape).requires_grad_()
            (self.handles,) = factor_handles([self.proxy], [shape], [tables], [None])

    def open(self, ddp: DistributedDataParallel | None) -> tuple[Tensor, ...]:
        """The handles, for a layer that is recomputed inside a backward pass; ``ddp`` reduces the gradient."""
        if self._delivery() is None:
            self.proxy.grad = None  # of a pass that failed
            delivery = _Delivery(self, None if ddp is None else ddp.find_unused_parameters)
            # The engine alone owns it, so that it dies with its pass, however that ends. The first pass that sees a
            # layer is the outermost: what a nested checkpoint recomputes ran in the enclosing recomputation before.
            self._delivery = weakref.ref(delivery)
            torch.autograd.Variable._execution_engine.queue_callback(delivery)
        return self.handles

    def take(self) -> Tensor | None:
        """What has come together in this pass so far."""
        self.delivered_in = torch._C._current_graph_task_id()
        grad, self.proxy.grad = self.proxy.grad, None
        return None if self._delivery() is None else grad  # else of a pass that failed

    def deliver(self, find_unused_parameters: bool | None) -> None:
        """The end of a backward pass: gives the parameter what the outer graph's node did not take.

        ``find_unused_parameters`` is DDP's, None without it.
        """
        late = self.delivered_in == torch._C._current_graph_task_id()
        grad, self._delivery = self.take(), _none
        if grad is None or not self.pool.requires_grad:
            return
        if find_unused_parameters is not None and (late or find_unused_parameters):
            raise RuntimeError(
                "DistributedDataParallel must reduce the gradient of a shared pool after all layers under reentrant "
                "checkpointing, got one that was reduced before"
                + ("" if late else " (find_unused_parameters=True takes the pool for unused)")
                + ": use checkpoint(..., use_reentrant=False)"
                + ("" if late else " or find_unused_parameters=False")
            )
        torch.autograd.backward(self.pool, grad.to(self.pool.dtype))


class _Delivery:
    def __init__(self, stash: Stash, find_unused_parameters: bool | None) -> None:
        self.stash, self.find_unused_parameters = stash, find_unused_parameters

    def __call__(self) -> None:
        self.stash.deliver(self.find_unused_parameters)


def _none() -> None:
    """A reference to nothing."""
