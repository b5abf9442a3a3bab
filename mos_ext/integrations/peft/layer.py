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

from ...experts import AdaptedExperts
from ...functional import add
from ...linear import BASE_ALONE, AdaptedLayer, is_fresh
from ...ops.checks import check_number
from ...planner import Kind, device_of, features_of, is_conv1d, role_of, stack_of, why_opaque
from ...pools import ShardPool

MIXED = "the rows of a batch use different adapters"  # a way through a layer, see mos_ext.explain


def _unknown_quantization() -> Any:
    """In place of torchao's configuration, for models that were not quantised through transformers."""
    raise ValueError("get_apply_tensor_subclass must be known to quantise a merged weight anew")


class MoSLayer(BaseTunerLayer, AdaptedLayer):
    """What PEFT asks of an adapted layer.

    The pools of all adapters belong to the tuner (:class:`MoSModel`), once each. A layer holds an *unregistered*
    reference to the ``ModuleDict`` of a linear type, adapter name -> :class:`mos_ext.ShardPool`: whatever walks
    ``adapter_layer_names`` reaches the pools, and whatever walks modules and parameters meets each pool once. It is
    the dictionary that is kept, never a parameter, so FSDP and checkpoints may replace those.

    Attributes:
        mos_layer: adapter name -> which layer of the adapter's pool this is; of experts, of each parameter's.
    """

    other_param_names = ("mos_layer",)
    base_layer: nn.Module
    cast_input_dtype_enabled = True  # what peft.helpers.disable_input_dtype_casting sets; nothing is cast here

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mos_layer: dict[str, Any] = {}
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merges = []
        self.paths = Counter()

    def planned(self, name: str) -> dict[str, str]:
        """What the planner calls that of this layer, called ``name``, which can have adapters -> the parameter."""
        raise NotImplementedError

    def kind_of(self, planned: str) -> Kind:
        """Role and shape of one of these."""
        raise NotImplementedError

    def pools_of(self, parameter: str) -> nn.ModuleDict:
        """The pools of a parameter's linear type, of all adapters."""
        raise NotImplementedError

    def names_in_use(self) -> Sequence[str]:
        """The adapters that a call adds to the base; none while they are merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return ()
        return [name for name in self.active_adapters if name in self.mos_layer]

    def base_alone(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base computes, counted."""
        if not torch.compiler.is_compiling():
            self.paths[BASE_ALONE] += 1
        return self.base_layer(*args, **kwargs)

    def _is_used(self) -> bool:
        active = any(name in self.mos_layer for name in self.active_adapters)
        return active and not (self.disable_adapters or self.merged)

    def _get_available_adapters(self) -> set[str]:
        return set(self.mos_layer)  # the pools also serve adapters that leave this layer out

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """A pool lives where the tuner made it: it serves many layers."""

    def has_adapter(self, name: str | None) -> bool:
        return name in self.mos_layer

    @property
    def scaling(self) -> Mapping[str, float]:
        """Adapter name -> what its low-rank product is multiplied by; of experts, parameter -> that. A view;
        :meth:`set_scale` changes it."""
        return _PerAdapter(self, "scales")

    @property
    def r(self) -> Mapping[str, int]:
        """Adapter name -> its rank here; of experts, parameter -> that. A view."""
        return _PerAdapter(self, "ranks")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies an adapter's product by ``scale`` times what its configuration says; nothing for unknown names.

        Raises:
            ValueError: ``scale`` is not finite, or the adapter is merged.
        """
        self._rescale(adapter, lambda strength: scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of all active adapters by ``scale``; errors as of :meth:`set_scale`."""
        for name in self.active_adapters:
            self._rescale(name, lambda strength: strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of all active adapters by ``scale``; None resets it. Errors as of :meth:`set_scale`."""
        if scale == 0:
            raise ValueError("scale must not be 0, got 0")
        for name in self.active_adapters:
            self._rescale(name, lambda strength: 1.0 if scale is None else strength / scale)

    def _rescale(self, name: str, change: Callable[[float], float]) -> None:
        for pool, layer in self.parts(name).values() if name in self.mos_layer else ():
            strength = change(pool.strength(layer))
            check_number("scale", strength)
            if name in self.merged_adapters:
                raise ValueError(f"adapter {name} must not be merged while its scale changes: call unmerge first")
            pool.set_strength(layer, strength)

    # -------------------------------------------------------------------------------------------- merging

    def why_unmergeable(self) -> str | None:
        """Why nothing can be added to the base's weight; None when it can."""
        raise NotImplementedError

    def merged_into(self) -> list[Any]:
        """The parameters that a merge adds to; none of a quantised base, which gets another."""
        raise NotImplementedError

    def merged_weights(self) -> list[Any]:
        """What is looked at to tell whether somebody has changed the weight."""
        raise NotImplementedError

    def add_to_weights(self, names: Sequence[str], check: bool) -> None:
        """Adds adapters to the base's weight; with ``check``, after a look whether that stays finite."""
        raise NotImplementedError

    def take_out_of_weights(self) -> None:
        """Undoes the last merge."""
        raise NotImplementedError

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
            self.add_to_weights(names, safe_merge)
            self.merged_adapters += names

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
            self.check_unchanged(*self.merged_weights())
        while len(self.merged_adapters) > count:
            names = self._merges[-1].names
            self.take_out_of_weights()
            del self.merged_adapters[-len(names) :]

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._for_copies(*self.merged_weights())}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._mark_copies(*self.merged_weights())

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


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
        values = {part: getattr(pool, self.attribute)[k] for part, (pool, k) in self.layer.parts(name).items()}
        return values.get("weight", values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.mos_layer)

    def __len__(self) -> int:
        return len(self.layer.mos_layer)


class MoSLinear(MoSLayer, nn.Module):
    """A linear base layer with MoS adapters. (PEFT's "all-linear" looks for "Linear" in the names of such classes.)

    Attributes:
        mos_pools: adapter name -> the pool of the layer's linear type.
    """

    adapter_layer_names = ("mos_pools",)
    mos_pools: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, pools: nn.ModuleDict, adapter_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, adapter_name)
        features = features_of(self.get_base_layer())
        assert features is not None  # the planner refused it otherwise
        self.in_features, self.out_features = features
        object.__setattr__(self, "mos_pools", pools)
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(),
            get_apply_tensor_subclass=quantization.get("get_apply_tensor_subclass") or _unknown_quantization,
        )
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())

    def update_layer(self, adapter_name: str, layer: int, *, inference_mode: bool) -> None:
        """Takes part in an adapter, whose pool the tuner has made."""
        self.mos_layer[adapter_name] = layer
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapter(self, name: str | None) -> tuple[ShardPool, int]:
        assert name is not None
        return self.mos_pools[name], self.mos_layer[name]  # type: ignore[return-value]

    def planned(self, name: str) -> dict[str, str]:
        return {name: "weight"}

    def kind_of(self, planned: str) -> Kind:
        return Kind(role_of(planned), self.in_features, self.out_features)

    def pools_of(self, parameter: str) -> nn.ModuleDict:
        return self.mos_pools

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        names = self.names_in_use()
        if not names:
            return self.base_alone(x, *args, **kwargs)
        base: Any = self.base_layer
        adapters, cause = [self.adapter(name) for name in names], self.why_called(base, args, kwargs)
        if cause is None:
            weight = base.weight.T if self.fan_in_fan_out else base.weight
            return self.fuse(x, weight, base.bias, adapters, self.training)
        call = partial(base, x, *args, **kwargs)
        return self.add_to(call, x, adapters, self.training, cause=cause, fresh=is_fresh(base))

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        return (self.base_layer, self.why_called(self.base_layer)) if self._is_used() else (None, None)

    def base_name(self) -> str:
        return type(self.get_base_layer()).__name__

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
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

    def merged_into(self) -> list[Any]:
        return [] if self.quantization_backend is not None else self.merged_weights()

    def merged_weights(self) -> list[Any]:
        weight = getattr(self.get_base_layer(), "weight", None)
        return [] if weight is None else [weight]

    def add_to_weights(self, names: Sequence[str], check: bool) -> None:
        weight, kept = self._readable_weight(), _Kept(self.base_layer)
        total, lost = self.sum_with(weight, names, check=check)
        self.set_base_weight(total)
        self.note_merge(names, lost if self.quantization_backend is None else kept, *self.merged_weights())

    def take_out_of_weights(self) -> None:
        merge = self._merges.pop()
        if isinstance(merge.undo, _Kept):
            merge.undo.put_back(self)
        else:
            self.set_base_weight(self.difference(self.get_base_weight(), merge))
        self.mark_merged(*self.merged_weights())

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

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class MoSExperts(AdaptedExperts, MoSLayer, nn.Module):
    """An experts module of transformers 5 with MoS adapters on its stacks of matrices, one layer for all of them.

    Attributes:
        mos_pools_<parameter>: adapter name -> the pool of the parameter's linear type.
    """

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)

    def update_layer(
        self, adapter_name: str, parameter: str, pools: nn.ModuleDict, layer: int, *, inference_mode: bool
    ) -> None:
        """Takes part in an adapter with one of its parameters, whose pool the tuner has made."""
        attribute = f"mos_pools_{parameter}"
        if attribute not in self.adapter_layer_names:
            object.__setattr__(self, attribute, pools)
            self.adapter_layer_names += (attribute,)
        self.mos_layer.setdefault(adapter_name, {})[parameter] = layer
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def parts(self, name: str | None) -> dict[str, tuple[ShardPool, int]]:
        layers = self.mos_layer[str(name)]
        in_order = [parameter for parameter in self.base_layer._parameters if parameter in layers]
        return {p: (self.pools_of(p)[str(name)], layers[p]) for p in in_order}  # type: ignore[misc]

    def planned(self, name: str) -> dict[str, str]:
        parameters = [attribute.removeprefix("mos_pools_") for attribute in self.adapter_layer_names]
        return {f"{name}.{parameter}": parameter for parameter in parameters}

    def kind_of(self, planned: str) -> Kind:
        shape = stack_of(self.base_layer, planned.rpartition(".")[2])
        assert shape is not None  # the planner refused it otherwise
        return Kind(role_of(planned), *shape[1:], shape[0])

    def pools_of(self, parameter: str) -> nn.ModuleDict:
        return getattr(self, f"mos_pools_{parameter}")

    def experts(self) -> nn.Module:
        return self.base_layer

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        mixed = adapter_names is not None and not self.disable_adapters
        if mixed and (self.merged or any(name in self.mos_layer for name in adapter_names or ())):
            raise ValueError(
                f"adapter_names must be None where experts are adapted, since a router mixes the rows of a batch, got "
                f"{adapter_names}: use set_adapter and one batch for each adapter"
            )
        names = () if mixed else self.names_in_use()
        if not names:
            return self.base_alone(*args, **kwargs)
        check_experts(self.base_layer)
        adapters: dict[str, list[tuple[ShardPool, int]]] = {}
        for name in names:
            for parameter, part in self.parts(name).items():
                adapters.setdefault(parameter, []).append(part)
        return self.compute(adapters, self.training, args, kwargs)

    def base_and_cause(self) -> tuple[nn.Module | None, str | None]:
        return (self.base_layer, None) if self._is_used() else (None, None)

    def merged_into(self) -> list[Any]:
        return [getattr(self.base_layer, name) for name in self.planned("").values()]

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.down_proj.device, base_layer.down_proj.dtype


def check_experts(base: nn.Module) -> None:
    """ValueError where others have a part in calling an experts module, which its adapted layer does not do."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    if hooks or "forward" in vars(base):
        raise ValueError(
            f"adapted experts must have no hooks and the forward of their class, got a {type(base).__name__} with "
            f"others (of accelerate's offloading, say): put hooks on the module around it, or use mos_ext.adapt"
        )
