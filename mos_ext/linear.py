"""The layer: a frozen (or trainable) linear and its low-rank product from a shared pool."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .config import MoSConfig
from .merging import Lost, add, subtract, version
from .ops.branch import Branch
from .ops.checks import check_integer, has_values, why_not_native
from .ops.watch import transforms_active, unseen
from .planner import device_of, features_of, is_conv1d, is_sharded, why_opaque, why_opaque_weight
from .pools import ShardPool

logger = logging.getLogger("mos_ext")
_logged: set[str] = set()

# Ways through a layer, as keys of `paths`; whatever else is there is the cause of a way that is slower than it must be.
FUSED, BASE_ALONE = "fused with the base layer", "the base layer alone"
GROUPED = "grouped with the experts"


@dataclass
class Merge:
    """Adapters that were added to a weight in one go, and how to take them out again.

    Attributes:
        names: of the adapters. pools: what each one's pools were then; None where they have changed since, in a copy.
        undo: what the weight was: :class:`merging.Lost`, or whatever else a kind of layer keeps.
        weights: the layer's weights after the merge (:func:`mark`), likewise None.
    """

    names: list[Any]
    pools: dict[Any, tuple[Any, ...] | None]
    undo: Any
    weights: tuple[Any, ...] | None


class AdaptedLayer:
    """How a base layer and the adapters on it are computed, and a count of the ways it went: for every layer class.

    Attributes:
        paths: calls in eager mode by way: ``FUSED``, ``BASE_ALONE``, or the cause of another way. ``mos_ext.explain``
            reads it.
    """

    paths: Counter[str]
    fan_in_fan_out: bool
    _merges: list[Merge]  # what is in the weight, oldest first

    def has_adapter(self, name: str | None) -> bool:
        """Whether the layer takes part in the adapter called so; None is that of a layer with one."""
        raise NotImplementedError

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        """The pool of an adapter, and the number of this layer in it."""
        raise NotImplementedError

    def parts(self, name: str | None) -> dict[str, tuple[ShardPool, int]]:
        """:meth:`adapter` of every parameter that an adapter adapts, in the layer's order: a linear layer has one."""
        return {"weight": self.adapter(name)}

    def fuse(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[tuple[ShardPool, int]], training: bool
    ) -> Tensor:
        """x W^T + bias plus the low-rank products of ``adapters``, each a pool and the layer's number in it.

        Base and first adapter are computed together.
        """
        return functional.linear(x, weight, bias, *self._branches(x, adapters, training, None))

    def add_to(
        self,
        base: Callable[[], Tensor],
        x: Tensor,
        adapters: Sequence[tuple[ShardPool, int]],
        training: bool,
        *,
        cause: str,
        fresh: bool,
    ) -> Tensor:
        """What ``base`` returns plus the low-rank products of ``adapters``. ``cause`` is why the base is called;
        ``fresh``, whether its result may be overwritten."""
        branches = self._branches(x, adapters, training, cause)
        return functional.add(base(), x, *branches, in_place=fresh)

    def _branches(
        self,
        x: Tensor,
        adapters: Sequence[tuple[ShardPool, int]],
        training: bool,
        cause: str | None,
        operator: str = "low_rank",
    ) -> list[Branch]:
        """What each adapter adds to the base, by ``operator``. The call is counted."""
        branches = [pool(layer, training) for pool, layer in adapters]
        for (pool, _), branch in zip(adapters, branches, strict=True):
            if pool._forward_hooks and branch.pool_a.untyped_storage().nbytes() == 0 < branch.pool_a.numel():
                raise RuntimeError(
                    "a pool must be whole until its layers are done, got one that was freed after it was called: "
                    "fully_shard(pool, reshard_after_forward=False), or leave the pools to the root"
                )
        if not torch.compiler.is_compiling():
            slow = _why_slow(x, branches, adapters, operator)
            self.count(slow or cause or FUSED, level=logging.WARNING if slow else logging.INFO)
        return branches

    def path(self) -> str:
        """The way that a call takes now, on the base's device, outside of tracing and transforms."""
        base, opaque = self.base_and_cause()
        if base is None:
            return BASE_ALONE
        device = device_of(base)
        return (_why_not_native("low_rank", device.type) if device else None) or opaque or FUSED

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        """The base layer (None while no adapter is in use) and why it is called rather than fused, if it is."""
        raise NotImplementedError

    def base_name(self) -> str:
        """The class of the base layer."""
        raise NotImplementedError

    def delta_of(self, name: str | None) -> Tensor:
        """scale * B A of an adapter, shaped like the base's weight, in the accumulation dtype of the pools."""
        pool, k = self.adapter(name)
        delta = pool.delta_weight(k)
        return delta.T if self.fan_in_fan_out else delta

    def _product(self, names: Sequence[Any], device: torch.device) -> Tensor:
        """The sum of the products of adapters."""
        delta, *others = (self.delta_of(name).to(device) for name in names)
        for other in others:
            delta = delta + other
        return delta

    @torch.no_grad()
    def sum_with(self, weight: Tensor, names: Sequence[Any], *, check: bool) -> tuple[Tensor, Lost]:
        """A base's weight plus the products of adapters, rounded once, and what that loses. Nothing is written.

        Raises:
            ValueError: with ``check``, the sum is not finite.
        """
        total, lost = add(weight, self._product(names, weight.device))
        if check:
            check_finite(total, names)
        return total, lost

    @torch.no_grad()
    def difference(self, weight: Tensor, merge: Merge) -> Tensor:
        """The base's weight without what was merged: what it was before, to the bit. Nothing is written."""
        lost = merge.undo
        return subtract(weight, None if lost.where is None else self._product(merge.names, weight.device), lost)

    def note_merge(self, names: Sequence[Any], undo: Any, *weights: Tensor) -> None:
        """Remembers a merge that was written to the layer's weights."""
        self._merges.append(Merge(list(names), {name: self._pool_marks(name) for name in names}, undo, None))
        self.mark_merged(*weights)

    def mark_merged(self, *weights: Tensor) -> None:
        """Remembers what the weights are now, after the last merge that is in them."""
        if self._merges:
            self._merges[-1].weights = tuple(mark(weight) for weight in weights)

    def _pool_marks(self, name: Any) -> tuple[Any, ...]:
        return tuple(pool.marks() for pool, _ in self.parts(name).values())

    def _are_still(self, name: Any, marks: tuple[Any, ...] | None) -> bool:
        """Whether an adapter's pools are what they were."""
        pools = [pool for pool, _ in self.parts(name).values()]
        return marks is not None and all(pool.unchanged(m) for pool, m in zip(pools, marks, strict=True))

    def check_unchanged(self, *weights: Tensor) -> None:
        """ValueError when a merge cannot be undone: pools, tables or a weight are not what they were."""
        for merge in self._merges:
            for name, marks in merge.pools.items():
                if not self._are_still(name, marks):
                    which = "" if name is None else f" of adapter {name}"
                    raise ValueError(f"the pools must not change between merge and unmerge, got changed pools{which}")
        if self._merges and not _is_still(self._merges[-1].weights, weights):
            raise ValueError("the weight must not change between merge and unmerge, got a changed or another weight")

    def _for_copies(self, *weights: Tensor) -> dict[str, Any]:
        """What a copy knows of merges: whether pools and weights were still the same. Its tensors count from anew."""
        merges = []
        for merge in self._merges:
            marks = {name: () if self._are_still(name, m) else None for name, m in merge.pools.items()}
            kept = bool(weights) and (merge is not self._merges[-1] or _is_still(merge.weights, weights))
            merges.append(replace(merge, pools=marks, weights=() if kept else None))
        return {"_merges": merges, "_compiled_call_impl": None}  # torch does not copy the latter either

    def _mark_copies(self, *weights: Tensor) -> None:
        for merge in self._merges:
            for name, marks in merge.pools.items():
                merge.pools[name] = None if marks is None else self._pool_marks(name)
            if merge.weights is not None:
                merge.weights = tuple(mark(weight) for weight in weights)

    @staticmethod
    def why_called(base: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> str | None:
        """Why a base must be called, hooks and arguments considered; None when it can be fused with an adapter."""
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return "the base layer has hooks"
        if _has_any_global_hook():
            return "modules have global hooks"
        return why_opaque(base) or ("the base layer takes more arguments than x" if args or kwargs else None)

    def count(self, path: str, level: int) -> None:
        """Counts a call, and logs a cause that was not met before."""
        self.paths[path] += 1
        if path not in (FUSED, GROUPED) and path not in _logged:
            _logged.add(path)
            logger.log(level, "a layer takes a slower way: %s (mos_ext.explain(model) tells more)", path)


def mark(weight: Tensor) -> tuple[Tensor, int, torch.dtype]:
    """Tells later whether a weight is still this one, unchanged in place, of the same dtype."""
    return weight, version(weight), weight.dtype


def _is_still(marks: tuple[Any, ...] | None, weights: Sequence[Tensor]) -> bool:
    if marks is None or len(marks) != len(weights):
        return False
    return all(m[0] is weight and m[1:] == mark(weight)[1:] for m, weight in zip(marks, weights, strict=True))


def check_finite(merged: Tensor, names: Sequence[Any]) -> None:
    """ValueError unless a weight that these adapters were added to is finite."""
    if has_values(merged) and not torch.isfinite(merged).all():
        if list(names) == [None]:
            raise ValueError("the weight must be finite after merge, got inf or NaN")
        broken = ", ".join(map(str, names))  # in PEFT's own words
        raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")


def is_fresh(base: nn.Module) -> bool:
    """Whether a base returns a tensor that nobody else holds and no backward needs, so that it may be overwritten.

    True of plain products: ``nn.Linear`` (also with a quantised weight), ``Conv1D``, the layers of bitsandbytes. Other
    modules may end in an activation, whose backward needs its result.
    """
    product = type(base) is nn.Linear or is_conv1d(base) or type(base).__module__.startswith("bitsandbytes.")
    return product and "forward" not in vars(base) and not base._forward_hooks and not _has_any_global_hook()


_why_not_native = cache(why_not_native)  # what was built and which GPU there is does not change


def _why_slow(
    x: Tensor, branches: Sequence[Branch], adapters: Sequence[tuple[ShardPool, int]], operator: str
) -> str | None:
    """What keeps a call from native kernels, from writing in place or from one gradient per pool and step; or None."""
    if (cause := _why_not_native(operator, x.device.type)) is not None:
        return cause
    if not unseen():
        if transforms_active():
            return "torch.func transforms or forward-mode differentiation are active"
        return "a TorchDispatchMode is active (selective checkpointing, say): no result is written to twice"
    if torch.is_grad_enabled():
        for branch, (pool, _) in zip(branches, adapters, strict=True):
            if pool.num_layers == 1:
                continue
            dense = branch.handle_a is None and pool.shards_a.requires_grad
            if dense or (branch.handle_b is None and pool.shards_b.requires_grad):
                return "pools were replaced by other tensors (functional_call, FSDP1): a dense gradient per layer"
    return None


def take_over(layer: nn.Module, base: nn.Module) -> None:
    """Gives a layer what its base has: the very same objects, in dictionaries of its own."""
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    layer.__dict__.update({k: v.copy() if k in own else v for k, v in vars(base).items()})


def check_own_forward(layer: nn.Module) -> None:
    """ValueError where somebody has put a forward onto an adapted layer, which would go on computing the adapter."""
    if "forward" in vars(layer):
        raise ValueError(
            "a layer must have no forward that was put there after it was adapted, got one (of a hook of "
            "accelerate, say): call accelerate.hooks.remove_hook_from_submodules(model) first"
        )


class MoSModule(nn.Module, AdaptedLayer):
    """What all adapted layers of :func:`mos_ext.adapt` have in common: one adapter, on a base of some kind.

    This is the kind that has the base's weight and bias as its own; :class:`CalledMoSLinear` has the base.

    Attributes:
        pool, layer: the shared pool, and which of its layers this is. enabled: False computes the base alone.
        opaque: why the base is called and the adapter added to what it returns; None when both are computed as one.
    """

    pool: ShardPool
    in_features: int
    out_features: int
    weight: Any
    bias: Any
    fan_in_fan_out = False  # whether the weight is stored as (in, out)

    def _attach(self, pool: ShardPool | None, layer: int, config: MoSConfig | None, register_pool: bool) -> None:
        """Puts the adapter on a layer that has its base."""
        features = self.in_features, self.out_features
        if config is not None and not isinstance(config, MoSConfig):
            raise TypeError(f"config must be a MoSConfig, got {type(config).__name__}")
        if pool is not None and not isinstance(pool, ShardPool):
            raise TypeError(f"pool must be a ShardPool, got {type(pool).__name__}")
        check_integer("layer", layer, 0)
        if pool is None:
            if config is None:
                raise ValueError("config must be given when there is no pool, got None")
            pool = ShardPool(config, *features, device=device_of(self))
        elif config is not None and config != pool.config:
            raise ValueError("config must be left out, or equal the pool's, when a pool is given")
        if (pool.in_features, pool.out_features) != features:
            raise ValueError(
                f"pool must be for {features[0]} -> {features[1]} features, got "
                f"{pool.in_features} -> {pool.out_features}"
            )
        if layer >= pool.num_layers:
            raise ValueError(f"layer must be in [0, {pool.num_layers}), got {layer}")
        self.layer = layer
        if register_pool:
            self.pool = pool.train(self.training)
        else:
            object.__setattr__(self, "pool", pool)  # past nn.Module: a reference, not a submodule
        self.enabled, self.paths, self._merges = True, Counter(), []

    def _take(self, base: nn.Module) -> None:
        """Becomes ``base`` with an adapter: its parameters and hooks, the very same objects, and whatever tools have
        set on it."""
        take_over(self, base)
        self.in_features, self.out_features = _features(base)

    def check_releasable(self) -> None:
        """ValueError when something that the layer got since it was adapted would go on computing the adapter."""
        if type(self) not in (MoSLinear, MoSConv1D, CalledMoSLinear):
            raise ValueError(
                f"a layer must have the class that adapt gave it, got a {type(self).__name__}: call "
                f"torch.nn.utils.parametrize.remove_parametrizations first, where those are the cause"
            )
        check_own_forward(self)

    def release(self) -> nn.Module:
        """The base layer without the adapter, with what is merged into it."""
        base = self._base_class.__new__(self._base_class)
        ours = {"in_features", "out_features", "layer", "pool", "enabled", "paths", "_merges", "_base_class"}
        ours -= {"in_features", "out_features"} if isinstance(self, nn.Linear) else set()
        base.__dict__.update({k: v for k, v in vars(self).items() if k not in ours})
        base._modules = {k: v for k, v in self._modules.items() if k != "pool"}
        return base

    _base_class: type[nn.Module] = nn.Linear

    @property
    def scale(self) -> float:
        """alpha / r, or what ``alpha_pattern`` and ``use_rslora`` make of it."""
        return self.pool.scales[self.layer]

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the weight."""
        return bool(self._merges)

    @property
    def opaque(self) -> str | None:
        return why_opaque_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight.T if self.fan_in_fan_out else self.weight
        if self._merges or not self.enabled:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            return nn.functional.linear(x, weight, self.bias)
        adapters = ((self.pool, self.layer),)
        if (cause := why_opaque_weight(weight)) is None:
            return self.fuse(x, weight, self.bias, adapters, self.training)
        if hasattr(weight, "full_tensor"):
            raise RuntimeError(
                "the weight of an adapted layer must be whole while it computes, got a DTensor: tensor-parallel layers "
                "cannot be adapted; under FSDP2 call the whole model"
            )
        # A weight that was quantised, say, after the layer was adapted.
        base: Any = partial(nn.functional.linear, x, weight, self.bias)
        return self.add_to(base, x, adapters, self.training, cause=cause, fresh=True)

    def has_adapter(self, name: str | None) -> bool:
        return name is None

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        return self.pool, self.layer

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        return (None, None) if self.merged or not self.enabled else (self, self.opaque)

    def base_name(self) -> str:
        return self._base_class.__name__

    def merged_into(self) -> list[Tensor]:
        """The parameters that :meth:`merge` writes to; none where it refuses."""
        return [] if self.opaque is not None else [self.weight]

    def check_mergeable(self) -> None:
        """ValueError where :meth:`merge` would be one. Nothing is written."""
        self.merged_weight()

    def check_unmergeable(self) -> None:
        """ValueError where :meth:`unmerge` would be one. Nothing is written."""
        self.check_unchanged(self.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), assembled, in the pools' dtype: the layer's LoRA matrices without the scale."""
        return self.pool.factors(self.layer)

    def delta_weight(self) -> Tensor:
        """scale * B A, shaped like ``weight``, in the accumulation dtype of the pools."""
        return self.delta_of(None)

    def merge(self) -> None:
        """Adds the adapter to ``weight``: the layer then costs what the base costs. Nothing happens when it is merged.

        Keeps what rounding loses, which is a few per cent of the weight's elements and their positions, or the weight.

        Raises:
            ValueError: the merged weight would not be finite, or the base's cannot be added to; nothing changes then.
        """
        if not self.merged:
            total, lost = self.merged_weight()
            self._set_weight(total)
            self.note_merge([None], lost, self.weight)

    def unmerge(self) -> None:
        """Takes the adapter out of ``weight`` again: it is what it was, to the bit.

        Raises:
            ValueError: pools, tables or the weight have changed since the merge, so what was added is not known any
                more. (Writing to their ``.data`` cannot be seen.)
        """
        if self.merged:
            self.check_unmergeable()
            self._set_weight(self.difference(self.weight, self._merges[0]))
            self._merges.clear()

    def merged_weight(self) -> tuple[Tensor, Lost]:
        """What :meth:`merge` makes of the weight, and what that loses; checked, nothing is written."""
        cause = self.opaque
        if (weight := self._parameters.get("weight")) is not None and is_sharded(weight):
            raise ValueError("a merged weight must be whole, got one that is sharded over ranks")
        if cause is None and "weight" not in self._parameters:
            cause = "the weight is computed from other parameters"
        if cause is not None:
            raise ValueError(
                f"a merged layer must have a plain weight, got one of which {cause}: export_lora keeps the "
                f"adapter apart, and PEFT's merge_adapter (mos_ext.integrations.peft) requantises what it can"
            )
        return self.sum_with(self.weight, [None], check=True)

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._for_copies(*self._own_weight())}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_copies(*self._own_weight())

    def _own_weight(self) -> list[Any]:
        return [weight for weight in (self._parameters.get("weight"),) if weight is not None]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged and f"{prefix}weight" in state_dict:
            raise ValueError(f"{prefix[:-1]} must not be merged while its weight is loaded: call unmerge first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        c = self.pool.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={c.r}, "
            f"equivalent_rank={c.equivalent_rank}, shards_per_vector={c.shards_per_vector}, "
            f"layer={self.layer} of {self.pool.num_layers}"
        )


class MoSLinear(MoSModule, nn.Linear):
    """``nn.Linear`` plus a Mixture-of-Shards adapter: ``y = x W^T + bias + (alpha/r) * (dropout(x) A^T) B^T``.

    It is an ``nn.Linear``, so that whatever looks for those (quantisation, pruning, FLOP counters) finds it.
    Works alone, or with others on one :class:`ShardPool`::

        layer = MoSLinear(512, 512, config=MoSConfig(r=4, equivalent_rank=4))     # a pool of its own
        pool = ShardPool(MoSConfig(r=16, equivalent_rank=4), 512, 512, num_layers=8)
        layers = [MoSLinear(512, 512, pool=pool, layer=k) for k in range(8)]        # eight layers, one pool

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        pool: the shared pool; None makes one for this layer alone, from ``config``.
        layer: which layer of the pool this is, 0 <= layer < pool.num_layers.
        config: only without ``pool``.
        register_pool: whether the pool is a submodule of this layer, so that ``parameters()`` and ``state_dict()`` of
            the layer include it. ``mos_ext.adapt`` registers each pool once on the model instead.

    Shape: x (..., in_features) -> (..., out_features), in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pool: ShardPool | None = None,
        layer: int = 0,
        config: MoSConfig | None = None,
        register_pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._attach(pool, layer, config, register_pool)

    @staticmethod
    def from_linear(
        linear: nn.Module,
        *,
        pool: ShardPool | None = None,
        layer: int = 0,
        config: MoSConfig | None = None,
        register_pool: bool = True,
    ) -> MoSModule:
        """The adapted form of a linear layer.

        Of an ``nn.Linear`` or a transformers ``Conv1D``, weight, bias, hooks and attributes are taken over: the same
        objects, not copies. Any other module with ``in_features``, ``out_features`` and a forward, a quantised linear
        say, becomes ``base_layer`` of a :class:`CalledMoSLinear`, is called as it is, and the adapter is added to what
        it returns.

        Raises:
            TypeError: a module that has no features.
            ValueError: a pool of other features.
        """
        _features(linear)
        kind = CalledMoSLinear if why_opaque(linear) is not None else MoSConv1D if is_conv1d(linear) else MoSLinear
        self = kind.__new__(kind)
        self._take(linear)
        self._attach(pool, layer, config, register_pool)
        return self


class MoSConv1D(MoSModule):
    """An adapted ``Conv1D`` of transformers: its weight is (in, out), so it must not pass for an ``nn.Linear``."""

    fan_in_fan_out = True

    def _take(self, base: nn.Module) -> None:
        super()._take(base)
        self._base_class = type(base)


class CalledMoSLinear(MoSModule):
    """An adapted layer whose base is called: it has the base's attributes, ``weight``, ``compute_dtype``, ...

    A class of its own, because a Python ``__getattr__`` would cost the others a microsecond per parameter they look up.
    """

    base_layer: nn.Module

    def _take(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base
        self.train(base.training)
        self.in_features, self.out_features = _features(base)
        self._why = why_opaque(base)

    def release(self) -> nn.Module:
        return self.base_layer

    @property
    def opaque(self) -> str | None:
        return self._why

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            return self.base_layer(x)
        base, adapters = partial(self.base_layer, x), ((self.pool, self.layer),)
        assert self._why is not None
        return self.add_to(base, x, adapters, self.training, cause=self._why, fresh=is_fresh(self.base_layer))

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        return (self.base_layer, self._why) if self.enabled else (None, None)

    def base_name(self) -> str:
        return type(self.base_layer).__name__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)


def _features(linear: nn.Module) -> tuple[int, int]:
    features = features_of(linear)
    if features is None:
        raise TypeError(
            f"linear must have in_features and out_features, as torch.nn.Linear has, got a {type(linear).__name__}"
        )
    return features
