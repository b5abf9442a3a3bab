"""Experts: modules of transformers 5 whose parameters stack one matrix per expert, with an adapter for each matrix.

Tokens are sorted by expert once per block. The products of the base are grouped, and the adapters of all experts are
one grouped operator on top of each. All experts of all layers with one role and one shape read from one pool.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .linear import BASE_ALONE, GROUPED, AdaptedLayer, check_finite, check_own_forward, take_over
from .merging import add, subtract
from .ops import fused
from .ops.branch import Branch, Groups
from .ops.checks import why_not_native
from .ops.gradients import first_order
from .ops.watch import autocast, below_autograd, unseen, without_autocast
from .planner import device_of, why_opaque_weight
from .pools import ShardPool

ops = torch.ops.mos_ext


class Routing(NamedTuple):
    """Which rows of a block go to which expert.

    Attributes:
        order: (P,) the pairs of token and choice, sorted by expert. place: (P,) where each pair stands in that order.
        token: (P,) the row of x at each place. expert: (P,) its expert. ends: (E,) int32, where each expert's places
            end. choices: how many experts each token has. group_ends: where those of each expert and owner end, the
            same as ``ends`` where tokens have no owners.
    """

    order: Tensor
    place: Tensor
    token: Tensor
    expert: Tensor
    ends: Tensor
    choices: int
    group_ends: Tensor

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int, owner: Tensor | None = None, owners: int = 1) -> Routing:
        """Of the experts (T, k) that a router chose. Nothing is read on the host.

        With ``owner`` (T,), below ``owners``, an expert's pairs are sorted by their token's owner: groups that have
        factors of their own are ``expert * owners + owner`` then.
        """
        choices, key = top_k_index.shape[-1], top_k_index.reshape(-1)
        if owner is not None:
            key = key * owners + owner.repeat_interleave(choices)
        key, order = torch.sort(key, stable=True)
        numbers = torch.arange(num_experts * owners, device=key.device, dtype=key.dtype)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        group_ends = torch.searchsorted(key, numbers, right=True, out_int32=True)
        expert, ends = key, group_ends
        if owners > 1:
            expert, ends = key // owners, group_ends[owners - 1 :: owners].contiguous()
        return cls(order, place, order // choices, expert, ends, choices, group_ends)

    def combine(self, rows: Tensor) -> Tensor:
        """(T, d): the sum of the rows (P, d) of every token's choices, in the order of the choices."""
        return rows[self.place].unflatten(0, (-1, self.choices)).sum(dim=1)


class Stack(NamedTuple):
    """One of the two products of a block: (E, in, out) weights, biases (E, out) or None, and any number of adapters."""

    weight: Tensor
    bias: Tensor | None
    branches: tuple[Branch, ...]

    def cast(self, dtype: torch.dtype) -> Stack:
        """In the dtype of the activations, as autocast would have it; the adapters keep their own."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def base(self, x: Tensor, routing: Routing) -> Tensor:
        """The product without adapters, a new tensor that nobody else holds."""
        y = ops.grouped_mm(x, self.weight, routing.ends)
        return y if self.bias is None else y.add_(self.bias[routing.expert])

    def add(self, y: Tensor, x: Tensor, pools: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Adds every adapter, with its pools, to y; S of each."""
        branches = zip(self.branches, pools, strict=True)
        return [fused.low_rank_(y, x, *of_branch, branch.recipe) for branch, of_branch in branches]

    def gradients(self, needs: Sequence[Sequence[bool]], dx: Tensor, dy: Tensor, x: Tensor, kept: Any) -> list[Any]:
        """Those of (pool_a, pool_b, handle_a, handle_b) of every adapter, of its S and pools; that of x goes to dx."""
        out: list[Any] = []
        for branch, of_branch, (sums, pools) in zip(self.branches, needs, kept, strict=True):
            out += fused.branch_gradients(of_branch, branch.recipe, dx, dy, sums, x, *pools)
        return out


class Block(NamedTuple):
    """What a call of an experts module computes: up, gate, down, and the weighted sum over a token's choices."""

    up: Stack
    down: Stack
    gate: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None

    def composed(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        """By differentiable operators, for whoever looks into a call."""
        rows = x[routing.token]
        for stack, then in ((self.up, self.gate), (self.down, self.norm)):
            y = functional.add(stack.base(rows, routing), rows, *stack.branches, in_place=True)
            rows = y if then is None else then(y)
        return routing.combine(rows * weights.reshape(-1)[routing.order].unsqueeze(-1))


class _ExpertsBlock(torch.autograd.Function):
    """A block as one node: saves x, the result of ``up``, every S, and what the router's gradient needs.

    That is less than the frozen block keeps: rows per choice are gathered again, and the gate is computed again.
    Its last operands are the pools and handles of every adapter, four each, those of ``up`` first.
    """

    @staticmethod
    def forward(ctx, block: Block, routing: Routing, x, weights, *operands):
        pools = list(zip(operands[::4], operands[1::4], strict=True))
        with below_autograd(unseen()):
            rows = x[routing.token]
            hidden = block.up.base(rows, routing)
            sums = block.up.add(hidden, rows, pools[: len(block.up.branches)])
            del rows  # here and in backward, that takes a peak of 15.6 MiB to 11.2 (E=32, h=512, m=192, bf16)
            gated = block.gate(hidden)
            y = block.down.base(gated, routing)
            sums += block.down.add(y, gated, pools[len(block.up.branches) :])
            del gated
            own = weights.reshape(-1)[routing.order].unsqueeze(-1)
            out = routing.combine(y * own)
        ctx.block, ctx.routing, ctx.shape = block, routing, weights.shape
        kept = [t for s, of_branch in zip(sums, pools, strict=True) for t in (s, *of_branch)]
        ctx.save_for_backward(x, hidden, own, y if ctx.needs_input_grad[3] else None, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        with without_autocast(dout):
            return _gradients(ctx, dout)


def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    block, routing = ctx.block, ctx.routing
    x, hidden, own, y, *tensors = ctx.saved_tensors
    kept = [(tensors[i], tensors[i + 1 : i + 3]) for i in range(0, len(tensors), 3)]
    _, _, need_x, need_weights, *flags = ctx.needs_input_grad
    needs, ups = [flags[i : i + 4] for i in range(0, len(flags), 4)], len(block.up.branches)
    dweights = None
    with below_autograd(unseen()):
        dy = dout[routing.token]
        if need_weights:
            dweights = torch.linalg.vecdot(dy, y.to(dy.dtype))[routing.place].view(ctx.shape).to(own.dtype)
        dy = dy.mul_(own) if dy.dtype == own.dtype == hidden.dtype else (dy * own).to(hidden.dtype)
        del y
        dgated = ops.grouped_mm(dy, block.down.weight.mT, routing.ends)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        gated = block.gate(leaf)
    with below_autograd(unseen()):
        of_down = block.down.gradients(needs[ups:], dgated, dy, gated.detach(), kept[ups:])
    del dy
    (dhidden,) = torch.autograd.grad(gated, leaf, dgated)
    del gated, leaf, dgated
    dx, of_up = None, []
    if need_x or ups:
        with below_autograd(unseen()):
            rows = x[routing.token]
            drows = ops.grouped_mm(dhidden, block.up.weight.mT, routing.ends) if need_x else torch.zeros_like(rows)
            of_up = block.up.gradients(needs[:ups], drows, dhidden, rows, kept[:ups])
            del rows, dhidden
            dx = routing.combine(drows) if need_x else None
    return None, None, dx, dweights, *of_up, *of_down


def _compute(block: Block, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """One node of autograd where nobody looks and the experts themselves are frozen; else operators."""
    trained = any(t is not None and t.requires_grad for s in (block.up, block.down) for t in (s.weight, s.bias))
    if trained or block.norm is not None or not unseen() or not torch.is_grad_enabled():
        return block.composed(x, weights, routing)
    seeded = [[fused.seeded(branch, x) for branch in stack.branches] for stack in (block.up, block.down)]
    operands = [t for branches in seeded for branch in branches for t in branch[:4]]
    # Pools and handles are operands of the node, which must not hold them beside what it saves.
    up, down = (tuple(branch._replace(**_NOTHING) for branch in branches) for branches in seeded)
    bare = block._replace(up=block.up._replace(branches=up), down=block.down._replace(branches=down))
    return _ExpertsBlock.apply(bare, routing, x, weights, *operands)


_NOTHING: dict[str, Any] = dict.fromkeys(("pool_a", "pool_b", "handle_a", "handle_b"))


class AdaptedExperts(AdaptedLayer):
    """An experts module of transformers 5 with adapters on its stacks: how it computes and merges.

    Whoever holds the parameters, this class' heirs say: the layer itself, or a module in it.
    """

    fan_in_fan_out = False  # of linears: `is_transposed` says it of experts

    def experts(self) -> Any:
        """The module that has the parameters."""
        raise NotImplementedError

    def experts_class(self) -> type[nn.Module]:
        """The class of the experts without adapters."""
        return type(self.experts())

    def compute(
        self,
        adapters: Mapping[str, Sequence[tuple[ShardPool, int]]],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The block with adapters on its parameters, each a pool and the layer's number in it. The call is counted."""
        base = self.experts()
        x, top_k_index, top_k_weights = call_arguments(self.experts_class(), base, args, kwargs)
        routing, names = Routing.of(top_k_index, base.num_experts), _stack_names(base)
        flat = [adapter for name in names for adapter in adapters.get(name, ())]
        branches = iter(self._branches(x, flat, training, GROUPED, "grouped_low_rank"))
        groups = Groups(routing.ends)
        of_stacks = {
            name: [
                branch._replace(recipe=branch.recipe._replace(groups=groups))
                for branch in islice(branches, len(adapters.get(name, ())))
            ]
            for name in names
        }
        return run_block(base, x, top_k_weights, routing, of_stacks)

    def path(self) -> str:
        base, _ = self.base_and_cause()
        device = None if base is None else device_of(base)
        if base is None:
            return BASE_ALONE
        return (why_not_native("grouped_low_rank", device.type) if device else None) or GROUPED

    def base_name(self) -> str:
        return self.experts_class().__name__

    # -------------------------------------------------------------------------------------------- merging

    def merged_weights(self) -> list[Tensor]:
        """The parameters that adapters are merged into."""
        merged = {parameter for merge in self._merges for parameter in merge.undo}
        return [getattr(self.experts(), name) for name in _stack_names(self.experts()) if name in merged]

    def _matrices(self, name: str) -> list[Tensor]:
        """The weights of every expert, (out, in), as views."""
        weight = getattr(self.experts(), name).detach()
        return list((weight.mT if self.experts().is_transposed else weight).unbind())

    def _parameters_of(self, names: Sequence[Any]) -> list[str]:
        adapted = {parameter for name in names for parameter in self.parts(name)}
        return [name for name in _stack_names(self.experts()) if name in adapted]

    def _delta(self, names: Sequence[Any], parameter: str, expert: int, device: torch.device) -> Tensor:
        """The sum of the products of adapters of one expert."""
        parts = [part for name in names if (part := self.parts(name).get(parameter)) is not None]
        delta, *others = (pool.delta_weight(layer, expert).to(device) for pool, layer in parts)
        for other in others:
            delta = delta + other
        return delta

    def why_unmergeable(self) -> str | None:
        """Why nothing can be added to the weights; None when it can."""
        for name in _stack_names(self.experts()):
            if (why := why_opaque_weight(getattr(self.experts(), name))) is not None:
                return f"{name}: {why}"
        return None

    @torch.no_grad()
    def check_sums(self, names: Sequence[Any]) -> None:
        """ValueError where weights with these adapters would not be finite. Nothing is written."""
        for parameter in self._parameters_of(names):
            for e, weight in enumerate(self._matrices(parameter)):
                check_finite((weight + self._delta(names, parameter, e, weight.device)).to(weight.dtype), names)

    @torch.no_grad()
    def add_to_weights(self, names: Sequence[Any], check: bool) -> None:
        """Adds adapters, expert by expert: no second copy of the weights. Keeps what rounding loses.

        With ``check``, after :meth:`check_sums`.
        """
        if check:
            self.check_sums(names)
        undo: dict[str, list[Any]] = {}
        for parameter in self._parameters_of(names):
            undo[parameter] = []
            for e, weight in enumerate(self._matrices(parameter)):
                total, lost = add(weight, self._delta(names, parameter, e, weight.device))
                weight.copy_(total)
                undo[parameter].append(lost)
        self.note_merge(names, undo)
        self.mark_merged(*self.merged_weights())

    @torch.no_grad()
    def take_out_of_weights(self) -> None:
        """Takes the last merge out of the weights again, which are then what they were, to the bit."""
        merge = self._merges.pop()
        for parameter, lost in merge.undo.items():
            for e, (weight, of_expert) in enumerate(zip(self._matrices(parameter), lost, strict=True)):
                known = of_expert.where is None
                delta = None if known else self._delta(merge.names, parameter, e, weight.device)
                weight.copy_(subtract(weight, delta, of_expert))
        self.mark_merged(*self.merged_weights())


def call_arguments(cls: type[nn.Module], base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """(x, top_k_index, top_k_weights) of a call of experts, which are of a class. RuntimeError where they are spread
    over ranks."""
    if kwargs:  # models call them top_k_index or router_indices
        args = inspect.signature(cls.forward).bind(base, *args, **kwargs).args[1:]
    if base._is_expert_parallel:
        raise RuntimeError("adapted experts must all be on one rank, got a module under expert parallelism")
    return args


def run_block(
    base: Any, x: Tensor, top_k_weights: Tensor, routing: Routing, branches: Mapping[str, Sequence[Branch]]
) -> Tensor:
    """What experts compute with branches, in the groups of ``routing``, on the parameters that these are named by."""
    names = _stack_names(base)
    (rows,) = autocast(x.reshape(-1, x.shape[-1]))
    if rows.dtype == x.dtype:  # no autocast: as the base does it
        rows = rows.to(getattr(base, names[0]).dtype)
    with without_autocast(rows):
        up, down = (_stack(base, name, branches.get(name, ())).cast(rows.dtype) for name in names)
        norm: Any = base.post_expert_norm if getattr(base, "has_post_expert_norm", False) else None
        gate: Any = base._apply_gate if base.has_gate else base.act_fn
        out = _compute(Block(up, down, gate, norm), rows, top_k_weights, routing)
    return out.view(x.shape).to(x.dtype)


def _stack_names(base: Any) -> tuple[str, str]:
    """What the parameters of the two products are called."""
    return ("gate_up_proj" if base.has_gate else "up_proj"), "down_proj"


def _stack(base: Any, name: str, branches: Sequence[Branch]) -> Stack:
    weight, bias = getattr(base, name), getattr(base, f"{name}_bias") if base.has_bias else None
    if (why := why_opaque_weight(weight)) is not None:
        raise RuntimeError(f"the weights of adapted experts must be whole while they compute, got {name}: {why}")
    return Stack(weight if base.is_transposed else weight.mT, bias, tuple(branches))


class MoSExperts(AdaptedExperts, nn.Module):
    """An experts module of transformers 5 with an adapter on one or both of its stacks of matrices.

    Its class is also one of the base's class, and its parameters are the base's, under their names. Made by
    :func:`adapted_experts`.

    Attributes:
        adapters: name of the parameter -> its pool, and which layer of it this is. enabled: False computes the base
            alone.
    """

    adapters: dict[str, tuple[ShardPool, int]]
    enabled: bool
    _base_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or not self.enabled:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            return self._base_class.forward(self, *args, **kwargs)
        return self.compute({name: (adapter,) for name, adapter in self.adapters.items()}, self.training, args, kwargs)

    def experts(self) -> MoSExperts:
        return self

    def experts_class(self) -> type[nn.Module]:
        return self._base_class

    def has_adapter(self, name: str | None) -> bool:
        return name is None

    def parts(self, name: str | None) -> dict[str, tuple[ShardPool, int]]:
        return {parameter: self.adapters[parameter] for parameter in self._parameters if parameter in self.adapters}

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        return (None, None) if self.merged or not self.enabled else (self, None)

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the weights."""
        return bool(self._merges)

    def merged_into(self) -> list[Tensor]:
        """The parameters that :meth:`merge` writes to."""
        return [getattr(self, name) for name in self.adapters]

    def check_mergeable(self) -> None:
        """ValueError where a merged weight would not be finite, or cannot be added to. Nothing is written."""
        if (why := self.why_unmergeable()) is not None:
            raise ValueError(f"a merged layer must have plain weights, got {why}")
        self.check_sums([None])

    def merge(self) -> None:
        """Adds the adapters to the weights, expert by expert: no second copy of them. Keeps what rounding loses."""
        if not self.merged:
            self.add_to_weights([None], check=False)

    def check_unmergeable(self) -> None:
        """ValueError when a merge cannot be undone: pools, tables or weights are not what they were."""
        self.check_unchanged(*self.merged_weights())

    def unmerge(self) -> None:
        """Takes the adapters out of the weights again, which are then what they were, to the bit."""
        if self.merged:
            self.check_unmergeable()
            self.take_out_of_weights()

    def check_releasable(self) -> None:
        check_own_forward(self)

    def release(self) -> nn.Module:
        """The base module without the adapter, with what is merged into it."""
        base = self._base_class.__new__(self._base_class)
        ours = {"adapters", "enabled", "paths", "_merges"}
        base.__dict__.update({k: v for k, v in vars(self).items() if k not in ours})
        return base

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._base_class,), self.__getstate__()

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._for_copies(*self.merged_weights())}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_copies(*self.merged_weights())

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged and any(f"{prefix}{name}" in state_dict for name in self.adapters):
            raise ValueError(f"{prefix[:-1]} must not be merged while its weights are loaded: call unmerge first")
        super()._load_from_state_dict(state_dict, prefix, *args)


_classes: dict[type[nn.Module], type[MoSExperts]] = {}


def _class_of(base: type[nn.Module]) -> type[MoSExperts]:
    if base not in _classes:
        _classes[base] = type(f"MoS{base.__name__}", (MoSExperts, base), {"__module__": __name__, "_base_class": base})
    return _classes[base]


def _blank(base: type[nn.Module]) -> MoSExperts:
    """What copies and pickles are made of: classes that are made at run time have no place to be found at."""
    cls = _class_of(base)
    return cls.__new__(cls)


def adapted_experts(base: nn.Module, adapters: dict[str, tuple[ShardPool, int]]) -> MoSExperts:
    """A module with the parameters, hooks and attributes of ``base``, the very same objects, and with adapters.

    Raises:
        ValueError: the base's forward was replaced.
    """
    if "forward" in vars(base):
        raise ValueError(
            f"target_parameters must select experts with the forward of their class, got a {type(base).__name__} whose "
            f"forward was replaced (by a hook of accelerate, say)"
        )
    self = _blank(type(base))
    take_over(self, base)
    # (A plain dictionary: pools belong to the model, once each, and are no submodules of this.)
    self.adapters, self.enabled, self.paths, self._merges = dict(adapters), True, Counter(), []
    return self
