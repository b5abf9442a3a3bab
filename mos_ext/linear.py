"""The layer: a frozen (or trainable) linear and its low-rank product from a shared pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .config import MoSConfig
from .functional import fused
from .ops.checks import check_integer
from .planner import features_of, is_conv1d
from .pools import ShardPool


class MoSLinear(nn.Module):
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
        """The adapted form of an ``nn.Linear`` or a transformers ``Conv1D``.

        Weight, bias and the hooks of forward and backward are the same objects, not copies.

        Raises:
            TypeError: any other module. ValueError: a pool of other features.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._setup(linear, pool, layer, config, register_pool)
        return self

    def _setup(
        self, linear: Any, pool: ShardPool | None, layer: int, config: MoSConfig | None, register_pool: bool
    ) -> None:
        features = features_of(linear)
        if features is None:
            raise TypeError(f"linear must be a torch.nn.Linear or a transformers Conv1D, got {type(linear).__name__}")
        self.in_features, self.out_features = features
        self.fan_in_fan_out = is_conv1d(linear)  # the weight is stored as (in, out)
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        if config is not None and not isinstance(config, MoSConfig):
            raise TypeError(f"config must be a MoSConfig, got {type(config).__name__}")
        if pool is not None and not isinstance(pool, ShardPool):
            raise TypeError(f"pool must be a ShardPool, got {type(pool).__name__}")
        check_integer("layer", layer, 0)
        if pool is None:
            if config is None:
                raise ValueError("config must be given when there is no pool, got None")
            pool = ShardPool(config, *features, device=linear.weight.device)
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
        # What is hooked to the base keeps firing, and its handles keep removing: the very same dictionaries.
        for name in vars(linear):
            if name.startswith(("_forward", "_backward", "_is_full_backward")):
                setattr(self, name, getattr(linear, name))

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.pool.config.scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        if self.merged or not self.enabled:
            return nn.functional.linear(x, weight, self.bias)
        pool, layer = self.pool, self.layer
        handle_a, handle_b = pool.handle("a", layer), pool.handle("b", layer)
        return fused(
            x,
            weight,
            self.bias,
            # Where a handle takes the gradient, the pool only gives its values.
            pool.a if handle_a is None else pool.a.detach(),
            pool.b if handle_b is None else pool.b.detach(),
            pool.index_a[layer],
            pool.index_b[layer],
            self.scale,
            handle_a=handle_a,
            handle_b=handle_b,
            dropout=pool.config.dropout if self.training else 0.0,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), assembled, in the pools' dtype: the layer's LoRA matrices without the scale."""
        pool, k = self.pool, self.layer
        a = reference.gather_concat(pool.a, pool.index_a[k])
        return a, reference.gather_concat(pool.b, pool.index_b[k]).T

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """(alpha/r) * B A, shaped like ``weight``, in the accumulation dtype of the pools."""
        pool, k = self.pool, self.layer
        delta = reference.delta_weight(pool.a, pool.index_a[k], pool.b, pool.index_b[k], self.scale)
        return delta.T if self.fan_in_fan_out else delta

    def merge(self) -> None:
        """Adds the adapter to ``weight``: the layer then costs what the base costs. Nothing happens when it is merged.

        Raises:
            ValueError: the merged weight would not be finite; the layer stays as it was.
        """
        if not self.merged:
            self._set_weight(self.merged_weight())
            self.merged, self._merged_from = True, self._pool_versions()

    def unmerge(self) -> None:
        """Takes the adapter out of ``weight`` again, exact to the rounding of one addition in the weight's dtype.

        Raises:
            ValueError: the pools have changed since the merge, so what was added is not known any more.
        """
        if self.merged:
            self._set_weight(self.merged_weight())
            self.merged = False

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What ``merge`` (or, on a merged layer, ``unmerge``) makes of the weight; checked, nothing is written."""
        if self.merged and self._merged_from != self._pool_versions():
            raise ValueError("the pools must not change between merge and unmerge, got pools changed in place")
        delta = self.delta_weight()
        # One rounding, at the end: the sum is formed in the wider of both dtypes.
        wide = self.weight.to(torch.promote_types(self.weight.dtype, delta.dtype))
        weight = wide.add(delta, alpha=-1.0 if self.merged else 1.0).to(self.weight.dtype)
        if weight.device.type != "meta" and not torch.isfinite(weight).all():
            raise ValueError(f"the weight must be finite after {'unmerge' if self.merged else 'merge'}, got inf or NaN")
        return weight

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def _pool_versions(self) -> tuple[int, int]:
        """Counts every change of a pool in place, by an optimizer say."""
        return self.pool.a._version, self.pool.b._version

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.merged:  # a copy's tensors count anew
            self._merged_from = self._pool_versions()

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
