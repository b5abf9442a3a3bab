"""The layer: a frozen (or trainable) linear and its low-rank product from a shared pool."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .config import MoSConfig
from .functional import accumulate, fused
from .ops.autograd import autocast, transforms_active, unseen
from .ops.checks import check_integer, why_not_native
from .planner import device_of, features_of, is_conv1d, why_opaque
from .pools import ShardPool

logger = logging.getLogger("mos_ext")
_logged: set[str] = set()

# Ways through a layer, as keys of `paths`; whatever else is there is the cause of a way that is slower than it must be.
FUSED, BASE_ALONE = "fused with the base layer", "the base layer alone"


class AdaptedLayer:
    """How a base layer and the adapters on it are computed, and a count of the ways it went: for every layer class.

    Attributes:
        paths: calls in eager mode by way: ``FUSED``, ``BASE_ALONE``, or the cause of another way. ``mos_ext.explain``
            reads it.
    """

    paths: Counter[str]
    fan_in_fan_out: bool
    # Adapter -> what its pool was when it was merged; None for a pool that has changed since.
    _merged_from: dict[str | None, tuple | None]

    def has_adapter(self, name: str | None) -> bool:
        """Whether the layer takes part in the adapter called so; None is that of a layer with one."""
        raise NotImplementedError

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        """The pool of an adapter, and the number of this layer in it."""
        raise NotImplementedError

    def compute(
        self,
        base: nn.Module,
        x: Tensor,
        adapters: Sequence[tuple[ShardPool, int]],
        *,
        opaque: str | None,
        transposed: bool,
        training: bool,
        arguments: tuple[tuple, dict[str, Any]] = ((), {}),
    ) -> Tensor:
        """base(x) plus the low-rank products of ``adapters``, each a pool and the layer's number in it.

        ``opaque`` is why the base is called, and added to; None when its weight and bias are all there is to it, and
        base and first adapter are computed together. ``transposed`` weights are (in, out). ``arguments`` are more of
        the base's.
        """
        todo = [(pool(layer), pool.config.dropout if training else 0.0, pool) for pool, layer in adapters]
        if not torch.compiler.is_compiling():
            slow = _why_slow(x, todo)
            self.count(slow or opaque or FUSED, level=logging.WARNING if slow else logging.INFO)
        # Under autocast x is cast once: every adapter keeps the same copy for its backward.
        if opaque is None:
            (operands, dropout, _), *todo = todo
            weight: Any = base.weight.T if transposed else base.weight  # type: ignore[operator]
            x, weight, bias = autocast(x, weight, base.bias)  # type: ignore[arg-type]
            y = fused(x, weight, bias, **operands, dropout=dropout)
        else:
            y = base(x, *arguments[0], **arguments[1])
            (x,) = autocast(x)
        fresh = opaque is None or _is_fresh(base)
        for operands, dropout, _ in todo:
            y = accumulate(y, x, **operands, dropout=dropout, in_place=fresh)
        return y

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

    @torch.no_grad()
    def sum_with(self, weight: Tensor, names: Sequence[str | None], sign: float, *, check: bool) -> Tensor:
        """A base's weight plus, or minus, the products of adapters: rounded once, at the end. Nothing is written.

        Raises:
            ValueError: adapters are taken out whose pools have changed since they were merged, so what was added is not
                known any more; with ``check``, the sum is not finite.
        """
        for name in names if sign < 0 else ():
            marks, pool = self._merged_from.get(name), self.adapter(name)[0]
            if marks is None or not pool.unchanged(marks):
                which = "" if name is None else f" of adapter {name}"
                raise ValueError(f"the pools must not change between merge and unmerge, got changed pools{which}")
        delta, *others = (self.delta_of(name).to(weight.device) for name in names)
        for other in others:
            delta = delta + other
        wide = weight.to(torch.promote_types(weight.dtype, delta.dtype))
        total = wide.add(delta, alpha=sign).to(weight.dtype)
        if check and total.device.type != "meta" and not torch.isfinite(total).all():
            if names == [None]:
                raise ValueError(
                    f"the weight must be finite after {'merge' if sign > 0 else 'unmerge'}, got inf or NaN"
                )
            broken = ", ".join(map(str, names))  # in PEFT's own words
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
        return total

    def mark_merged(self, names: Sequence[str | None]) -> None:
        """Remembers what the pools of adapters are, now that they are merged."""
        for name in names:
            self._merged_from[name] = self.adapter(name)[0].marks()

    def _for_copies(self) -> dict[str, Any]:
        """What a copy knows of merges: whether their pools were still the same. Its tensors count changes anew."""
        marks = {
            name: () if marks is not None and self.adapter(name)[0].unchanged(marks) else None
            for name, marks in self._merged_from.items()
        }
        return {"_merged_from": marks, "_compiled_call_impl": None}  # torch does not copy the latter either

    def _mark_copies(self) -> None:
        self._merged_from = {
            name: None if marks is None else self.adapter(name)[0].marks() for name, marks in self._merged_from.items()
        }

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
        if path != FUSED and path not in _logged:
            _logged.add(path)
            logger.log(level, "a layer takes a slower way: %s (mos_ext.explain(model) tells more)", path)


def _is_fresh(base: nn.Module) -> bool:
    """Whether a base returns a tensor that nobody else holds and no backward needs, so that it may be overwritten.

    True of plain products: ``nn.Linear`` (also with a quantised weight), ``Conv1D``, the layers of bitsandbytes. Other
    modules may end in an activation, whose backward needs its result.
    """
    product = type(base) is nn.Linear or is_conv1d(base) or type(base).__module__.startswith("bitsandbytes.")
    return product and "forward" not in vars(base) and not base._forward_hooks and not _has_any_global_hook()


_why_not_native = cache(why_not_native)  # what was built and which GPU there is does not change


def _why_slow(x: Tensor, todo: Sequence[tuple[dict[str, Any], float, ShardPool]]) -> str | None:
    """What keeps a call from native kernels, from writing in place or from one gradient per pool and step; or None."""
    if (cause := _why_not_native("low_rank", x.device.type)) is not None:
        return cause
    if not unseen():
        if transforms_active():
            return "torch.func transforms or forward-mode differentiation are active"
        return "a TorchDispatchMode is active (selective checkpointing, say): no result is written to twice"
    if torch.is_grad_enabled():
        for operands, _, pool in todo:
            if not pool.uses_handles:
                continue
            without = [side for side in "ab" if operands[f"handle_{side}"] is None]
            if without and any(getattr(pool, f"shards_{side}").requires_grad for side in without):
                return "pools were replaced by other tensors (functional_call, FSDP1): a dense gradient per layer"
    return None


class MoSLinear(nn.Module, AdaptedLayer):
    """``nn.Linear`` plus a Mixture-of-Shards adapter: ``y = x W^T + bias + (alpha/r) * (dropout(x) A^T) B^T``.

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

    weight: nn.Parameter
    bias: nn.Parameter | None
    pool: ShardPool

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
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(base, pool, layer, config, register_pool)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        pool: ShardPool | None = None,
        layer: int = 0,
        config: MoSConfig | None = None,
        register_pool: bool = True,
    ) -> MoSLinear:
        """The adapted form of a linear layer.

        Of an ``nn.Linear`` or a transformers ``Conv1D``, weight, bias and the hooks of forward and backward are taken
        over: the same objects, not copies. Any other module with ``in_features``, ``out_features`` and a forward, a
        quantised linear say, becomes ``base_layer``, is called as it is, and the adapter is added to what it returns.

        Raises:
            TypeError: a module that has no features. ValueError: a pool of other features.
        """
        chosen = cls if why_opaque(linear) is None else _CalledMoSLinear
        self = chosen.__new__(chosen)
        nn.Module.__init__(self)
        self._setup(linear, pool, layer, config, register_pool)
        return self

    def _setup(
        self, linear: Any, pool: ShardPool | None, layer: int, config: MoSConfig | None, register_pool: bool
    ) -> None:
        features = features_of(linear)
        if features is None:
            raise TypeError(
                f"linear must have in_features and out_features, as torch.nn.Linear has, got a {type(linear).__name__}"
            )
        self.in_features, self.out_features = features
        self.fan_in_fan_out = is_conv1d(linear)  # the weight is stored as (in, out)
        self.opaque = why_opaque(linear)
        if self.opaque is None:
            self.register_parameter("weight", linear.weight)
            self.register_parameter("bias", linear.bias)
        else:
            self.base_layer = linear
        if config is not None and not isinstance(config, MoSConfig):
            raise TypeError(f"config must be a MoSConfig, got {type(config).__name__}")
        if pool is not None and not isinstance(pool, ShardPool):
            raise TypeError(f"pool must be a ShardPool, got {type(pool).__name__}")
        check_integer("layer", layer, 0)
        if pool is None:
            if config is None:
                raise ValueError("config must be given when there is no pool, got None")
            pool = ShardPool(config, *features, device=device_of(linear))
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
            self.pool = pool
        else:
            object.__setattr__(self, "pool", pool)  # past nn.Module: a reference, not a submodule
        self.enabled, self.merged = True, False
        self.train(linear.training)
        self.paths, self._merged_from = Counter(), {}
        # What is hooked to the base keeps firing, and its handles keep removing: the very same dictionaries.
        for name in vars(linear) if self.opaque is None else ():
            if name.startswith(("_forward", "_backward", "_is_full_backward")):
                setattr(self, name, getattr(linear, name))

    @property
    def scale(self) -> float:
        """alpha / r, or what ``alpha_pattern`` and ``use_rslora`` make of it."""
        return self.pool.scales[self.layer]

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            if self.opaque is not None:
                return self.base_layer(x)
            return nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        return self.compute(
            self if self.opaque is None else self.base_layer,
            x,
            ((self.pool, self.layer),),
            opaque=self.opaque,
            transposed=self.fan_in_fan_out,
            training=self.training,
        )

    def has_adapter(self, name: str | None) -> bool:
        return name is None

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        return self.pool, self.layer

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        if self.merged or not self.enabled:
            return None, None
        return (self, None) if self.opaque is None else (self.base_layer, self.opaque)

    def base_name(self) -> str:
        if self.opaque is not None:
            return type(self.base_layer).__name__
        return "Conv1D" if self.fan_in_fan_out else "Linear"

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), assembled, in the pools' dtype: the layer's LoRA matrices without the scale."""
        return self.pool.factors(self.layer)

    def delta_weight(self) -> Tensor:
        """scale * B A, shaped like ``weight``, in the accumulation dtype of the pools."""
        return self.delta_of(None)

    def merge(self) -> None:
        """Adds the adapter to ``weight``: the layer then costs what the base costs. Nothing happens when it is merged.

        Raises:
            ValueError: the merged weight would not be finite, or the base's cannot be added to; nothing changes then.
        """
        if not self.merged:
            self._set_weight(self.merged_weight())
            self.mark_merged([None])
            self.merged = True

    def unmerge(self) -> None:
        """Takes the adapter out of ``weight`` again, exact to the rounding of one addition in the weight's dtype.

        Raises:
            ValueError: pools or tables have changed since the merge, so what was added is not known any more.
                (Writing to their ``.data`` cannot be seen.)
        """
        if self.merged:
            self._set_weight(self.merged_weight())
            self.merged = False

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What ``merge`` (or, on a merged layer, ``unmerge``) makes of the weight; checked, nothing is written."""
        if self.opaque is not None:
            raise ValueError(
                f"a merged layer must have a plain weight, got one of which {self.opaque}: export_lora keeps the "
                f"adapter apart, and PEFT's merge_adapter (mos_ext.integrations.peft) requantises what it can"
            )
        if hasattr(self.weight, "full_tensor"):
            raise ValueError("a merged weight must be whole, got one that is sharded over ranks")
        return self.sum_with(self.weight, [None], -1.0 if self.merged else 1.0, check=True)

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._for_copies()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_copies()

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


class _CalledMoSLinear(MoSLinear):
    """A :class:`MoSLinear` whose base layer is called: it has the base's attributes, ``weight``, ``compute_dtype``, ...

    A class of its own, because a Python ``__getattr__`` would cost the others a microsecond per parameter they look up.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    def _get_name(self) -> str:
        return "MoSLinear"
