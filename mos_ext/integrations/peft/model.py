"""The tuner: plans an adapter on the model it wraps, owns its pools, and answers PEFT's questions about them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ...adapt import check_sole_owners
from ...checkpoint import (
    POOLS,
    TABLES,
    check_digest,
    check_names,
    digest_name,
    read_tables,
    tables_to_keep,
    take_digest,
)
from ...config import matching_patterns
from ...linear import AdaptedLayer
from ...planner import (
    Base,
    LinearType,
    adaptable,
    device_of,
    every_linear,
    fit_ranks,
    is_conv1d,
    keep_calling,
    plan_modules,
    select_stacks,
    shape_of,
    stacks_left_out,
    tell_of_fitting,
    type_keys,
)
from ...pools import ShardPool
from ...ranks import same_on_every_rank
from ...routing import table_digest
from .config import MoSConfig, note
from .layer import MoSExperts, MoSLayer, MoSLinear, check_experts


class MoSModel(BaseTuner):
    """A model with MoS adapters, as ``peft.get_peft_model`` wraps it.

    Each linear type (role and shape, ``mos_ext.planner``) is one ``ModuleDict`` on this module, adapter name ->
    :class:`mos_ext.ShardPool`, named ``mos_`` and the type:
    ``mos_model_layers_self_attn_q_proj_64_64.default.shards_a``. Here, at the root, FSDP shards them with the root's
    parameters and checkpoints hold them once.
    """

    prefix: str = "mos_"
    tuner_layer_cls = MoSLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    uses_shared_state: bool = True
    left_out: dict[str, str]  # experts that "all-linear" did not reach: parameter -> which argument would include it

    # ---------------------------------------------------------------------------------------------- injection

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See ``BaseTuner``. A base with an adapter shares its configurations; after an error they are as before."""
        shared = getattr(model, "peft_config", {})
        before = dict(shared)
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            shared.clear()
            shared.update(before)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See ``BaseTuner.inject_adapter``. Pools are planned and made before a first layer is replaced, in
        ``_prepare_model``: the number of layers that share a pool must be known. After an error there are none.
        """
        if state_dict is not None:
            raise ValueError(
                "state_dict must be None for MoS: its entries do not name the adapted modules; the config does"
            )
        if adapter_name in POOLS + TABLES:
            raise ValueError(
                f"adapter_name must not be one of {', '.join(POOLS + TABLES)}, which name the tensors of a pool: PEFT "
                f"would take those of other adapters for this one's, got {adapter_name!r}"
            )
        self._adopt(model)
        earlier = {key: dict(pools) for key, pools in self._pool_dicts()}
        # BaseTuner restores requires_grad of parameters that were there before, but looks for them below self.model.
        before = [(p, p.requires_grad) for _, pool in self._named_pools() for p in pool.parameters()]
        self._injected = adapter_name, torch.device("meta") if low_cpu_mem_usage else None
        # Name of a module or parameter -> its pools' attribute, its number in them.
        self._placed: dict[str, tuple[str, int]] = {}
        self._aside: dict[str, Any] = {}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        except Exception:
            for key, pools in self._pool_dicts():
                pools.clear()
                pools.update(earlier.get(key, {}))
            raise
        finally:
            vars(self.peft_config[adapter_name]).update(self._aside)
            del self._injected, self._placed, self._aside
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        keep_calling(model, {module for module in model.modules() if isinstance(module, MoSLayer)})

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """What "all-linear", or PEFT's choice for an architecture, stands for in this model; ranks that are too large
        for a type are lowered. Both are written into the configuration, and so into files.
        """
        targets, kind_of_model = peft_config.target_modules, model_config.get("model_type")
        if targets is None and peft_config.target_parameters and kind_of_model not in self.target_module_mapping:
            peft_config.target_modules = targets = set()
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        if not all_linear and targets is not None:
            return peft_config
        base = Base.of(self.model)
        bases = base.modules
        if all_linear:
            peft_config.target_modules = set(every_linear(bases.items(), base.head))
        named = [(n, m) for n, m in bases.items() if n and self._check_target_module_exists(peft_config, n)]
        if named:  # if not, PEFT says so
            method = peft_config.method()
            named, others = adaptable(method, named, bases)
            fitted = fit_ranks(method, named, bases)
            if others:
                peft_config.target_modules = {name for name, _ in named}
            peft_config.rank_pattern = dict(fitted.rank_pattern)
            if all_linear:
                self.left_out = stacks_left_out(bases, method)
                others = {**others, **self.left_out}
            tell_of_fitting(method, fitted, named, others)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        adapter_name, device = self._injected
        for name, module in model.named_modules():
            if isinstance(module, AdaptedLayer) and not isinstance(module, MoSLayer):
                raise ValueError(
                    f"model must not be adapted with mos_ext.adapt, got one where {name} is a {type(module).__name__}: "
                    f"start from the base model, or call mos_ext.unload(model) first"
                )
        bases = Base.of(model).modules
        with same_on_every_rank() as say:
            named = [(n, m) for n, m in bases.items() if n and self._check_target_module_exists(peft_config, n)]
            stacks = self._stacks(peft_config, bases)
            targets = [name for name, _ in named]
            method = peft_config.method(targets if targets or stacks else ("none",), list(stacks))
            linear_types = plan_modules(method, named, bases, stacks)
            say(method.to_dict())
        for module, _ in stacks.values():
            check_experts(module)
        self._check_earlier(model, adapter_name, {name for t in linear_types for name in t.modules})
        pools = [self._make_pool(peft_config, method, t, bases, device) for t in linear_types]
        names = [t.name for t in linear_types]
        keys = [self.prefix + key for key in type_keys(names)]
        for key, name in zip(keys, names, strict=True):
            if key.endswith("_"):  # what type_keys does to the second of two; layers need to find their pools by type
                raise ValueError(f"linear types must differ in more than punctuation, got {name} and another one")
        for key, linear_type, pool in zip(keys, linear_types, pools, strict=True):
            if not hasattr(self, key):
                self.add_module(key, nn.ModuleDict())
            getattr(self, key)[adapter_name] = pool
            for k, name in enumerate(linear_type.modules):
                self._placed[name] = key, k

    @staticmethod
    def _stacks(peft_config: Any, bases: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
        """The stacks of experts to adapt; those in a module that is saved whole are not, like modules in one."""
        whole = peft_config.modules_to_save or ()
        stacks = select_stacks(bases, peft_config.method())
        return {n: s for n, s in stacks.items() if not any(re.match(rf"(^|.*\.){m}($|\..*)", n) for m in whole)}

    def _adopt(self, model: nn.Module) -> None:
        """Takes over the pools of an earlier tuner, whose layers are still in the model: a base that gets a second
        adapter, as in a notebook cell that runs again. PEFT's other methods have their adapters in the layers.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, MoSLayer):
                for planned, parameter in layer.planned(name).items():
                    (key,) = type_keys([layer.kind_of(planned).name])
                    if not hasattr(self, self.prefix + key):
                        self.add_module(self.prefix + key, layer.pools_of(parameter))

    def _check_earlier(self, model: nn.Module, adapter_name: str, targets: set[str]) -> None:
        """ValueError where adapters on the model would come to be something else: LoRA's mix silently there."""
        for name, layer in model.named_modules():
            if not isinstance(layer, MoSLayer):
                continue
            if adapter_name in layer.merged_adapters:
                raise ValueError(
                    f"adapter_name must not be that of a merged adapter, got {adapter_name!r}, merged in {name}: call "
                    f"unmerge_adapter() or merge_and_unload() on the earlier model first"
                )
            parts = layer.parts(adapter_name) if adapter_name in layer.mos_layer else ()
            left = [p for p, parameter in layer.planned(name).items() if parameter in parts and p not in targets]
            if left:
                raise ValueError(
                    f"target_modules must have all modules of the earlier adapter {adapter_name!r} that is still on "
                    f"the model, or they would go on computing that, got none for {left[0]}: call unload() on the "
                    f"earlier model first, or choose another adapter_name"
                )

    @staticmethod
    def _make_pool(
        config: MoSConfig,
        method: Any,
        linear_type: LinearType,
        bases: Mapping[str, nn.Module],
        device: torch.device | None,
    ) -> ShardPool:
        first = linear_type.modules[0]
        device = device or device_of(bases[first.rpartition(".")[0] if linear_type.kind.experts else first])
        pool = ShardPool.of(linear_type, method, device)
        if not config.init_weights:
            bound = 1.0 / math.sqrt(pool.out_features)
            nn.init.uniform_(pool.shards_b, -bound, bound)
        return pool

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key, k = self._placed[current_key]
        layer, pools, inference_mode = cast(Any, target), getattr(self, key), peft_config.inference_mode
        if parameter_name is not None:
            layer = target if isinstance(target, MoSExperts) else MoSExperts(target, adapter_name)
            layer.update_layer(adapter_name, parameter_name, pools, k, inference_mode=inference_mode)
        else:
            if not isinstance(target, MoSLayer):
                peft_config.fan_in_fan_out = is_conv1d(target)  # a fact about the base, whatever was said
                layer = MoSLinear(target, pools, adapter_name, **get_quantization_kwargs(self))
            layer.update_layer(adapter_name, k, inference_mode=inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """The stacks that were planned, one layer for all of a module, where PEFT nests a wrapper for each."""
        names = [name for name, (key, _) in self._placed.items() if getattr(self, key)[adapter_name].experts]
        for name in names:
            module, _, parameter = name.rpartition(".")
            outer, _, target = module.rpartition(".")
            base, parent = model.get_submodule(module), model.get_submodule(outer)
            self._create_and_replace(peft_config, adapter_name, base, target, parent, name, parameter)
        for field in ("rank_pattern", "alpha_pattern"):
            # PEFT looks for them among modules alone, and would warn that they were ignored.
            patterns = self._aside[field] = getattr(peft_config, field)
            of_stacks = {pattern for name in names for pattern in matching_patterns(patterns, name)}
            setattr(peft_config, field, {pattern: patterns[pattern] for pattern in patterns.keys() - of_stacks})
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """See ``BaseTuner._replace_module``, which looks for a weight where experts have none of that name."""
        if isinstance(child, MoSExperts) or isinstance(new_module, MoSExperts):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ---------------------------------------------------------------------------------------------- the pools

    def _pool_dicts(self) -> Iterator[tuple[str, nn.ModuleDict]]:
        """(attribute, adapter name -> pool) of every linear type."""
        for key, child in self.named_children():
            if key.startswith(self.prefix) and isinstance(child, nn.ModuleDict):
                yield key, child

    def _named_pools(self) -> Iterator[tuple[str, ShardPool]]:
        """(adapter name, pool) of all of them."""
        for _, pools in self._pool_dicts():
            yield from pools.items()  # type: ignore[misc]

    def _drop_pools(self, adapter_name: str) -> None:
        for _, pools in self._pool_dicts():
            if adapter_name in pools:
                del pools[adapter_name]

    def _check_merge_allowed(self) -> None:
        """Every layer is asked before the first is merged."""
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, MoSLayer) and (cause := layer.why_unmergeable()) is not None:
                raise ValueError(
                    f"{name}: a merged layer must have a weight that can be added to, got one of which {cause}"
                )
        layers = [layer for layer in self.model.modules() if isinstance(layer, MoSLayer)]
        check_sole_owners(
            self.model, [(layer.get_base_layer(), weight) for layer in layers for weight in layer.merged_into()]
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """See ``BaseTuner.merge_adapter``. After an error nothing is merged that was not before."""
        layers = [module for module in self.modules() if isinstance(module, MoSLayer)]
        before = {layer: len(layer.merged_adapters) for layer in layers}
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer, count in before.items():
                layer.unmerge_all_but(count)
            raise

    def unmerge_adapter(self) -> None:
        """See ``BaseTuner.unmerge_adapter``. After an error nothing is unmerged."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, MoSLayer):
                try:
                    layer.check_unchanged(*layer.merged_weights())
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        super().unmerge_adapter()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for MoS: NotImplementedError says what to do instead."""
        raise NotImplementedError(
            "MoS adapters cannot be combined into one, since each has tables of its own: activate several at once, or "
            "combine their exports to LoRA (mos_ext.export_lora)"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._drop_pools(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Pools are float32; without ``autocast_adapter_dtype`` they follow the base, unless ``pool_dtype`` says."""
        config: Any = self.peft_config[adapter_name]
        if autocast_adapter_dtype or config.pool_dtype is not None:
            return
        layers = [m for m in self.modules() if isinstance(m, MoSLayer) and adapter_name in m.mos_layer]
        # One layer of each pool tells: they have one shape, and a model's blocks one dtype.
        for pool, layer in {pool: m for m in layers for pool, _ in m.parts(adapter_name).values()}.items():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is not None and dtype.is_floating_point:
                pool.to(dtype)

    # ---------------------------------------------------------------------------------------------- forward

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """``adapter_names=`` of forward and generate, one adapter per row; PEFT drops it silently without this."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if callable(getattr(self.model, "get_encoder", None)) else None
        # generate repeats rows for beam search in the decoder only.
        single = set(encoder.modules()) if beams > 1 and encoder is not None and encoder is not self.model else set()
        handles = []
        for module in self.modules():
            # modules_to_save (an AuxiliaryTrainingWrapper) has a copy per adapter to choose from, too.
            if isinstance(module, (MoSLayer, AuxiliaryTrainingWrapper)):
                rows = [name for name in names for _ in range(1 if module in single else beams)]
                insert = partial(_with_adapter_names, adapter_names=rows)
                handles.append(module.register_forward_pre_hook(insert, with_kwargs=True))  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---------------------------------------------------------------------------------------------- files

    @classmethod
    def _pools_of(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ShardPool]]:
        """(state_dict prefix without the adapter's name, pool) of an adapter, wherever the tuner is in ``model``."""
        for root, tuner in model.named_modules():
            if isinstance(tuner, cls):
                for key, pools in tuner._pool_dicts():
                    if adapter_name in pools:
                        yield f"{root}.{key}" if root else key, pools[adapter_name]  # type: ignore[misc]

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The adapter's tensors; with its index tables where they are not its configuration's, and their digest."""
        out = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        pools = dict(cls._pools_of(model, adapter_name))
        layers: Any = [
            (n, m) for n, m in model.named_modules() if isinstance(m, MoSLayer) and m.has_adapter(adapter_name)
        ]
        known = set(pools.values())
        if unknown := [n for n, m in layers if any(pool not in known for pool, _ in m.parts(adapter_name).values())]:
            raise ValueError(
                f"model must have all pools of adapter {adapter_name!r}, got none for {unknown[0]}: another model was "
                f"made of its base since, with modules that this one does not know; save that one"
            )
        for prefix, pool in pools.items():
            for side in POOLS:
                value = out.get(f"{prefix}.{adapter_name}.{side}")
                if value is not None and value.shape != shape_of(getattr(pool, side)):
                    raise ValueError(
                        f"{prefix}.{side} must be whole, got a parameter that ZeRO-3 has partitioned: save inside of "
                        "deepspeed.zero.GatheredParameters(list(model.parameters())), on every rank, or give a "
                        "state_dict"
                    )
            out.update({f"{prefix}.{adapter_name}.{side}": table for side, table in tables_to_keep(pool).items()})
        digest = table_digest({pool.stream: pool.tables for pool in pools.values()})
        out[f"base_model.{digest_name(digest)}.{adapter_name}"] = torch.empty(0, device="cpu")
        remove = partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        note(config, digest, {remove(key): value for key, value in out.items()})
        return out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The adapter's tensors under the model's keys; index tables go to the pools.

        Raises:
            ValueError: they are not those of this model's linear types, or were trained with other index tables.
        """
        pools, state_dict = dict(cls._pools_of(model, adapter_name)), dict(state_dict)
        there = {key for key in state_dict if f".{cls.prefix}" in key and key.rpartition(".")[2] in POOLS}
        check_names({f"{prefix}.{side}" for prefix in pools for side in POOLS}, there, "the adapter")
        digest = take_digest(state_dict) or config.table_digest
        tables = {}
        for prefix, pool in pools.items():
            stored = {side: state_dict.pop(f"{prefix}.{side}", None) for side in TABLES}
            try:
                tables[prefix] = read_tables(stored, pool.config, pool.matrix_ranks) or pool.drawn_tables()
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from None
        check_digest(digest, {pool.stream: tables[prefix] for prefix, pool in pools.items()})
        out = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for prefix, pool in pools.items():
            if pool.tables is not tables[prefix]:
                pool.set_tables(tables[prefix])
        return out


def _with_adapter_names(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}
