"""The layer PEFT puts in a model: a base layer of any kind, and any number of MoS adapters on it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ...functional import add
from ...linear import BASE_ALONE, AdaptedLayer, is_fresh
from ...ops.checks import check_number
from ...planner import device_of, features_of, is_conv1d, why_opaque
from ...pools import ShardPool

MIXED = "the rows of a batch use different adapters"  # a way through a layer, see mos_ext.explain


def _unknown_quantization() -> Any:
    """In place of torchao's configuration, for models that were not quantised through transformers."""
    raise ValueError("get_apply_tensor_subclass must be known to quantise a merged weight anew")


class MoSLayer(BaseTunerLayer, AdaptedLayer):
    """What PEFT asks of an adapted layer.

    The pools of all adapters belong to the tuner (:class:`MoSModel`), once each. A layer holds an *unregistered*
    reference to the ``ModuleDict`` of its linear type, adapter name -> :class:`mos_ext.ShardPool`: whatever walks
    ``adapter_layer_names`` reaches the pools, and whatever walks modules and parameters meets each pool once. It is
    the dictionary that is kept, never a parameter, so FSDP and checkpoints may replace those.

    Attributes:
        mos_pools: that dictionary. mos_layer: adapter name -> which layer of the adapter's pool this is.
    """

    adapter_layer_names = ("mos_pools",)
    other_param_names = ("mos_layer",)
    mos_pools: nn.ModuleDict
    base_layer: nn.Module
    cast_input_dtype_enabled = True  # what peft.helpers.disable_input_dtype_casting sets; nothing is cast here

    def __init__(self, pools: nn.ModuleDict, **quantization: Any) -> None:
        features = features_of(self.get_base_layer())
        assert features is not None  # the planner refused it otherwise
        self.in_features, self.out_features = features
        object.__setattr__(self, "mos_pools", pools)
        self.mos_layer: dict[str, int] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(),
            get_apply_tensor_subclass=quantization.get("get_apply_tensor_subclass") or _unknown_quantization,
        )
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merges = []
        self.paths = Counter()

    def update_layer(self, adapter_name: str, layer: int, *, inference_mode: bool) -> None:
        """Takes part in an adapter, whose pool the tuner has made."""
        self.mos_layer[adapter_name] = layer
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _get_available_adapters(self) -> set[str]:
        return set(self.mos_layer)  # the pools also serve adapters that leave this layer out

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """A pool lives where the tuner made it: it serves many layers."""

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        assert name is not None
        return self.mos_pools[name], self.mos_layer[name]  # type: ignore[return-value]

    def has_adapter(self, name: str | None) -> bool:
        return name in self.mos_layer

    @property
    def scaling(self) -> Mapping[str, float]:
        """Adapter name -> what its low-rank product is multiplied by. A view; :meth:`set_scale` changes it."""
        return _PerAdapter(self, "scales")

    @property
    def r(self) -> Mapping[str, int]:
        """Adapter name -> its rank here. A view."""
        return _PerAdapter(self, "ranks")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies an adapter's product by ``scale`` times what its configuration says; nothing for unknown names.

        Raises:
            ValueError: ``scale`` is not finite, or the adapter is merged.
        """
        check_number("scale", scale)
        if adapter in self.merged_adapters:
            raise ValueError(f"adapter {adapter} must not be merged while its scale changes: call unmerge first")
        if adapter in self.mos_layer:
            pool, layer = self.adapter(adapter)
            pool.set_strength(layer, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of all active adapters by ``scale``; errors as of :meth:`set_scale`."""
        self._rescale(lambda strength: strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of all active adapters by ``scale``; None resets it. Errors as of :meth:`set_scale`."""
        if scale == 0:
            raise ValueError("scale must not be 0, got 0")
        self._rescale(lambda strength: 1.0 if scale is None else strength / scale)

    def _rescale(self, change: Callable[[float], float]) -> None:
        for name in self.active_adapters:
            if name in self.mos_layer:
                pool, layer = self.adapter(name)
                self.set_scale(name, change(pool.strength(layer)))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base's weight, in that weight's shape and the pools' accumulation dtype."""
        return self.delta_of(adapter_name).to(device_of(self.get_base_layer()))

    def why_unmergeable(self) -> str | None:
        """Why nothing can be added to the base's weight; None when it can."""
        base, backend = self.get_base_layer(), self.quantization_backend
        if backend is None:
            # A forward that accelerate replaced is still that of a linear.
            return None if "forward" in vars(base) and isinstance(base, nn.Linear) else why_opaque(base)
        if not backend.supports_merge:
            return f"the base layer is a {type(base).__name__}, which PEFT cannot quantise anew"
        if getattr(backend, "get_apply_tensor_subclass", None) is _unknown_quantization:
            return "nothing says how it was quantised (get_apply_tensor_subclass of transformers' TorchAoConfig does)"
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes. ``mos_ext.export_lora`` is exact and instant; PEFT's conversion decomposes the product again."""
        return True


class _Kept:
    """A quantised base layer as it was before a merge, by reference: quantising anew would not give it back.

    Costs the memory of its quantised weight while merged.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        own = ("_parameters", "_buffers", "state")  # `state` is bitsandbytes', which writes to it
        attributes = {k: copy.copy(v) if k in own else v for k, v in vars(base).items()}
        self.attributes = {k: v for k, v in attributes.items() if k != "training"}
        # (PEFT marks the old weight as not quantised when it makes the new one.)
        self.weights = [(p, dict(vars(p))) for p in base.parameters(recurse=False)]

    def put_back(self, layer: Any) -> None:
        vars(self.base).update(self.attributes)
        for parameter, attributes in self.weights:
            vars(parameter).update(attributes)
        layer.base_layer = self.base


class _PerAdapter(Mapping[str, Any]):
    """A property of each adapter's pool at this layer, as it is when it is looked up."""

    def __init__(self, layer: MoSLayer, attribute: str) -> None:
        self.layer, self.attribute = layer, attribute

    def __getitem__(self, name: str) -> Any:
        if name not in self.layer.mos_layer:
            raise KeyError(name)
        pool, k = self.layer.adapter(name)
        return getattr(pool, self.attribute)[k]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.mos_layer)

    def __len__(self) -> int:
        return len(self.layer.mos_layer)


class MoSLinear(nn.Module, MoSLayer):
    """A linear base layer with MoS adapters. (PEFT's "all-linear" looks for "Linear" in the names of such classes.)"""

    def __init__(self, base_layer: nn.Module, pools: nn.ModuleDict, adapter_name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        MoSLayer.__init__(self, pools, **quantization)
        self._active_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            names: Sequence[str] = ()
        elif adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        else:
            names = () if self.merged else [name for name in self.active_adapters if name in self.mos_layer]
        if not names:
            if not torch.compiler.is_compiling():
                self.paths[BASE_ALONE] += 1
            return self.base_layer(x, *args, **kwargs)
        base: Any = self.base_layer
        adapters, cause = [self.adapter(name) for name in names], self.why_called(base, args, kwargs)
        if cause is None:
            weight = base.weight.T if self.fan_in_fan_out else base.weight
            return self.fuse(x, weight, base.bias, adapters, self.training)
        call = partial(base, x, *args, **kwargs)
        return self.add_to(call, x, adapters, self.training, cause=cause, fresh=is_fresh(base))

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        active = any(name in self.mos_layer for name in self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return None, None
        return self.base_layer, self.why_called(self.base_layer)

    def base_name(self) -> str:
        return type(self.get_base_layer()).__name__

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """One adapter per row of a batch; ``"__base__"`` for none."""
        # In PEFT's own words: users search for them.
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if not torch.compiler.is_compiling():
            self.count(MIXED, level=logging.INFO)
        y = self.base_layer(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.mos_layer:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                pool, layer = self.adapter(name)
                y[rows] = add(y[rows], x[rows], pool(layer, training=False))
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base's weight, rounded once; a quantised weight is quantised anew, with a warning.

        Raises:
            ValueError: the base's weight cannot be added to, or with ``safe_merge``, the merged weight would not be
                finite; nothing is merged then.
        """
        if (cause := self.why_unmergeable()) is not None:
            raise ValueError(f"a merged layer must have a weight that can be added to, got one of which {cause}")
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mos_layer]
        if names:
            weight, kept = self._readable_weight(), _Kept(self.base_layer)
            total, lost = self.sum_with(weight, names, check=safe_merge)
            self.set_base_weight(total)
            self.note_merge(names, lost if self.quantization_backend is None else kept, self.merged_weight())
            self.merged_adapters += names

    def merged_weight(self) -> Any:
        """What is looked at to tell whether somebody has changed the weight."""
        return getattr(self.get_base_layer(), "weight", None)

    def unmerge(self) -> None:
        """Takes merged adapters out of the weight again: it is what it was, to the bit, quantised or not.

        Raises:
            ValueError: an adapter's pools or tables, or the weight, have changed since the merge, so what was added is
                not known any more; nothing is unmerged then. (Writing to their ``.data`` cannot be seen.)
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_all_but(0)

    def unmerge_all_but(self, count: int) -> None:
        """Takes out what was merged after the first ``count`` adapters."""
        if len(self.merged_adapters) > count:
            self.check_unchanged(self.merged_weight())
        while len(self.merged_adapters) > count:
            merge = self._merges.pop()
            if isinstance(merge.undo, _Kept):
                merge.undo.put_back(self)
            else:
                self.set_base_weight(self.difference(self.get_base_weight(), merge))
            del self.merged_adapters[-len(merge.names) :]
            self.mark_merged(self.merged_weight())

    def _readable_weight(self) -> Tensor:
        """The base's weight, dequantised; with PEFT's warning that the merged one will be quantised anew."""
        backend = self.quantization_backend
        if backend is not None and "bnb" in backend.backend_name:
            warnings.warn(
                f"Merge mos module to {backend.backend_name} linear may get different generations due to rounding "
                "errors.",
                stacklevel=3,
            )
            # On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights at the first inference, and dequantises what it
            # packed wrongly; whoever asks for the state has it unpacked.
            self.get_base_layer().state_dict()
        return self.get_base_weight()

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._for_copies(self.merged_weight())}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_copies(self.merged_weight())

    def __repr__(self) -> str:
        return "mos." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
