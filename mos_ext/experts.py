"""Experts: modules of transformers 5 whose parameters stack one matrix per expert, with an adapter for each matrix.

Tokens are sorted by expert once per block. The products of the base are grouped, and the adapters of all experts are
one grouped operator on top of each. All experts of all layers with one role and one shape read from one pool.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .linear import BASE_ALONE, GROUPED, AdaptedLayer, mark
from .merging import Lost, add, subtract
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
            end. choices: how many experts each token has.
    """

    order: Tensor
    place: Tensor
    token: Tensor
    expert: Tensor
    ends: Tensor
    choices: int

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> Routing:
        """Of the experts (T, k) that a router chose. Nothing is read on the host."""
        expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        choices = top_k_index.shape[-1]
        return cls(order, place, order // choices, expert, ends, choices)

    def combine(self, rows: Tensor) -> Tensor:
        """(T, d): the sum of the rows (P, d) of every token's choices, in the order of the choices."""
        return rows[self.place].unflatten(0, (-1, self.choices)).sum(dim=1)


class Stack(NamedTuple):
    """One of the two products of a block: (E, in, out) weights, biases (E, out) or None, and the adapter or None."""

    weight: Tensor
    bias: Tensor | None
    branch: Branch | None

    def cast(self, dtype: torch.dtype) -> Stack:
        """In the dtype of the activations, as autocast would have it; the adapter keeps its own."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def base(self, x: Tensor, routing: Routing) -> Tensor:
        """The product without the adapter, a new tensor that nobody else holds."""
        y = ops.grouped_mm(x, self.weight, routing.ends)
        return y if self.bias is None else y.add_(self.bias[routing.expert])


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
            y = stack.base(rows, routing)
            y = y if stack.branch is None else functional.add(y, rows, stack.branch, in_place=True)
            rows = y if then is None else then(y)
        return routing.combine(rows * weights.reshape(-1)[routing.order].unsqueeze(-1))


class _ExpertsBlock(torch.autograd.Function):
    """A block as one node: saves x, the result of ``up``, both S, and what the router's gradient needs.

    That is less than the frozen block keeps: rows per choice are gathered again, and the gate is computed again.
    """

    @staticmethod
    def forward(ctx, block: Block, routing: Routing, x, weights, *pools_and_handles):
        tensors = [*pools_and_handles]
        with below_autograd(unseen()):
            rows, sums = x[routing.token], []
            hidden = block.up.base(rows, routing)
            sums.append(_add(block.up, hidden, rows, *tensors[:2]))
            gated = block.gate(hidden)
            y = block.down.base(gated, routing)
            sums.append(_add(block.down, y, gated, *tensors[4:6]))
            own = weights.reshape(-1)[routing.order].unsqueeze(-1)
            out = routing.combine(y * own)
        ctx.block, ctx.routing, ctx.shape = block, routing, weights.shape
        ctx.save_for_backward(
            x, hidden, own, y if ctx.needs_input_grad[3] else None, *sums, *tensors[:2], *tensors[4:6]
        )
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        with without_autocast(dout):
            return _gradients(ctx, dout)


def _add(stack: Stack, y: Tensor, x: Tensor, pool_a: Tensor, pool_b: Tensor) -> Tensor | None:
    """Adds a stack's adapter to y; S, or None without an adapter."""
    return None if stack.branch is None else fused.low_rank_(y, x, pool_a, pool_b, stack.branch.recipe)


def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    block, routing = ctx.block, ctx.routing
    x, hidden, own, y, s_up, s_down, *pools = ctx.saved_tensors
    _, _, need_x, need_weights, *needs = ctx.needs_input_grad
    dweights = None
    with below_autograd(unseen()):
        dy = dout[routing.token]
        if need_weights:
            dweights = (dy * y).sum(-1)[routing.place].view(ctx.shape).to(own.dtype)
        dy = (dy * own).to(hidden.dtype)
        dgated = ops.grouped_mm(dy, block.down.weight.mT, routing.ends)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        gated = block.gate(leaf)
    of_down: tuple[Tensor | None, ...] = (None,) * 4
    of_up = of_down
    if block.down.branch is not None:
        with below_autograd(unseen()):
            down = (dgated, dy, s_down, gated.detach(), *pools[2:])
            of_down = fused.branch_gradients(needs[4:], block.down.branch.recipe, *down)
    (dhidden,) = torch.autograd.grad(gated, leaf, dgated)
    dx = None
    if need_x or block.up.branch is not None:
        with below_autograd(unseen()):
            rows = x[routing.token]
            drows = ops.grouped_mm(dhidden, block.up.weight.mT, routing.ends) if need_x else torch.zeros_like(rows)
            if block.up.branch is not None:
                up = (drows, dhidden, s_up, rows, *pools[:2])
                of_up = fused.branch_gradients(needs[:4], block.up.branch.recipe, *up)
            dx = routing.combine(drows) if need_x else None
    return None, None, dx, dweights, *of_up, *of_down


class MoSExperts(AdaptedLayer, nn.Module):
    """An experts module of transformers 5 with an adapter on one or both of its stacks of matrices.

    Its class is also one of the base's class, and its parameters are the base's, under their names. Made by
    :func:`adapted_experts`.

    Attributes:
        adapters: name of the parameter -> its pool, and which layer of it this is. enabled: False computes the base
            alone.
    """

    fan_in_fan_out = False  # of linears: `is_transposed` says it of experts
    adapters: dict[str, tuple[ShardPool, int]]
    enabled: bool
    _base_class: type[nn.Module]
    num_experts: int
    is_transposed: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or not self.enabled:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            return self._base_class.forward(self, *args, **kwargs)
        if kwargs:  # models call them top_k_index or router_indices
            args = inspect.signature(self._base_class.forward).bind(self, *args, **kwargs).args[1:]
        x, top_k_index, top_k_weights = args
        if self._is_expert_parallel:
            raise RuntimeError("adapted experts must all be on one rank, got a module under expert parallelism")
        routing = Routing.of(top_k_index, self.num_experts)
        branches = self._branches(x, list(self.adapters.values()), self.training, GROUPED, "grouped_low_rank")
        of_stack = dict(zip(self.adapters, branches, strict=True))
        names, groups = (self.up_name, "down_proj"), Groups(routing.ends)
        (flat,) = autocast(x.reshape(-1, x.shape[-1]))
        if flat.dtype == x.dtype:  # no autocast: as the base does it
            flat = flat.to(getattr(self, names[0]).dtype)
        with without_autocast(flat):
            up, down = (self._stack(name, of_stack.get(name), groups).cast(flat.dtype) for name in names)
            norm: Any = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
            gate: Any = self._apply_gate if self.has_gate else self.act_fn
            out = _compute(Block(up, down, gate, norm), flat, top_k_weights, routing)
        return out.view(x.shape).to(x.dtype)

    @property
    def up_name(self) -> str:
        """What the parameter of the first product is called."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _stack(self, name: str, branch: Branch | None, groups: Groups) -> Stack:
        branch = None if branch is None else branch._replace(recipe=branch.recipe._replace(groups=groups))
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None
        if (why := why_opaque_weight(weight)) is not None:
            raise RuntimeError(f"the weights of adapted experts must be whole while they compute, got {name}: {why}")
        return Stack(weight if self.is_transposed else weight.mT, bias, branch)

    def has_adapter(self, name: str | None) -> bool:
        return name is None

    def path(self) -> str:
        device = device_of(self)
        if self.merged or not self.enabled:
            return BASE_ALONE
        return (why_not_native("grouped_low_rank", device.type) if device else None) or GROUPED

    def base_name(self) -> str:
        return self._base_class.__name__

    # -------------------------------------------------------------------------------------------- merging

    _merged: dict[str, list[Lost]]
    _marks: dict[str, tuple]

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the weights."""
        return bool(self._merged)

    def merged_into(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.adapters]

    def _matrices(self, name: str) -> list[Tensor]:
        """The weights of every expert, (out, in), as views."""
        weight = getattr(self, name).detach()
        return list((weight.mT if self.is_transposed else weight).unbind())

    def check_mergeable(self) -> None:
        """ValueError where a merged weight would not be finite, or cannot be added to. Nothing is written."""
        for name, (pool, layer) in self.adapters.items():
            if (why := why_opaque_weight(getattr(self, name))) is not None:
                raise ValueError(f"a merged layer must have plain weights, got {name}: {why}")
            for e, weight in enumerate(self._matrices(name)):
                delta = pool.delta_weight(layer, e).to(weight.device)
                if not weight.is_meta and not torch.isfinite((weight + delta).to(weight.dtype)).all():
                    raise ValueError("the weight must be finite after merge, got inf or NaN")

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapters to the weights, expert by expert: no second copy of them. Keeps what rounding loses."""
        if self.merged:
            return
        for name, (pool, layer) in self.adapters.items():
            lost = []
            for e, weight in enumerate(self._matrices(name)):
                total, of_expert = add(weight, pool.delta_weight(layer, e).to(weight.device))
                weight.copy_(total)
                lost.append(of_expert)
            self._merged[name] = lost
        self._marks = {name: self._mark(name) for name in self.adapters}

    def _mark(self, name: str) -> tuple:
        return mark(getattr(self, name)), self.adapters[name][0].marks()

    def check_unmergeable(self) -> None:
        """ValueError when a merge cannot be undone: pools, tables or weights are not what they were."""
        for name in self._merged:
            weight, pools = self._marks.get(name, (None, None))
            if pools is None or not self.adapters[name][0].unchanged(pools):
                raise ValueError("the pools must not change between merge and unmerge, got changed pools")
            now = mark(getattr(self, name))
            if weight is None or weight[0] is not now[0] or weight[1:] != now[1:]:
                raise ValueError(f"the weight must not change between merge and unmerge, got a changed {name}")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapters out of the weights again, which are then what they were, to the bit."""
        self.check_unmergeable()
        for name, lost in self._merged.items():
            pool, layer = self.adapters[name]
            for e, (weight, of_expert) in enumerate(zip(self._matrices(name), lost, strict=True)):
                delta = None if of_expert.where is None else pool.delta_weight(layer, e).to(weight.device)
                weight.copy_(subtract(weight, delta, of_expert))
        self._merged, self._marks = {}, {}

    def check_releasable(self) -> None:
        if "forward" in vars(self):
            raise ValueError(
                "a layer must have no forward that was put there after it was adapted, got one (of a hook of "
                "accelerate, say): call accelerate.hooks.remove_hook_from_submodules(model) first"
            )

    def release(self) -> nn.Module:
        """The base module without the adapter, with what is merged into it."""
        base = self._base_class.__new__(self._base_class)
        ours = {"adapters", "enabled", "paths", "_merged", "_marks"}
        base.__dict__.update({k: v for k, v in vars(self).items() if k not in ours})
        return base

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._base_class,), self.__getstate__()

    def __getstate__(self) -> dict:
        kept = {name: self._still(name) for name in self._merged}  # a copy's tensors count changes anew
        return {**self.__dict__, "_marks": kept, "_compiled_call_impl": None}

    def _still(self, name: str) -> bool:
        try:
            self.check_unmergeable()
        except ValueError:
            return False
        return True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._marks = {name: self._mark(name) for name, unchanged in self._marks.items() if unchanged}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged and any(f"{prefix}{name}" in state_dict for name in self.adapters):
            raise ValueError(f"{prefix[:-1]} must not be merged while its weights are loaded: call unmerge first")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _compute(block: Block, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """One node of autograd where nobody looks and the experts themselves are frozen; else operators."""
    trained = any(t is not None and t.requires_grad for s in (block.up, block.down) for t in (s.weight, s.bias))
    if trained or block.norm is not None or not unseen() or not torch.is_grad_enabled():
        return block.composed(x, weights, routing)
    up, down = (s if s.branch is None else s._replace(branch=fused.seeded(s.branch, x)) for s in (block.up, block.down))
    tensors = [t for s in (up, down) for t in (s.branch[:4] if s.branch is not None else (None,) * 4)]
    # Pools and handles are tensors of the node, which must not hold them beside what it saves.
    bare = [s if s.branch is None else s._replace(branch=s.branch._replace(**_NOTHING)) for s in (up, down)]
    return _ExpertsBlock.apply(block._replace(up=bare[0], down=bare[1]), routing, x, weights, *tensors)


_NOTHING: dict[str, Any] = dict.fromkeys(("pool_a", "pool_b", "handle_a", "handle_b"))


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
            f"target_parameters must select experts whose forward is their class', got a {type(base).__name__} whose "
            f"forward was replaced (by a hook of accelerate, say)"
        )
    self = _blank(type(base))
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    self.__dict__.update({k: v.copy() if k in own else v for k, v in vars(base).items()})
    # (A plain dictionary: pools belong to the model, once each, and are no submodules of this.)
    self.adapters, self.enabled, self.paths = dict(adapters), True, Counter()
    self._merged, self._marks = {}, {}
    return self
