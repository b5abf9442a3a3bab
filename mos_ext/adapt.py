"""Whole models: adapt, switch off, merge, take out again, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import MoSConfig
from .experts import MoSExperts, adapted_experts
from .linear import AdaptedLayer, MoSLinear, MoSModule
from .planner import Base, LinearType, by_role, device_of, keep_calling, left_out, plan, stop_calling, type_keys, unwrap
from .pools import ShardPool
from .ranks import same_on_every_rank
from .routing import IndexTables

POOLS = "mos_pools"  # the attribute of an adapted model that owns its pools
Layer = MoSModule | MoSExperts
after_install: list[Callable[[nn.Module], None]] = []  # what layers above do to every model that was adapted


class Adapter(nn.Module):
    """The pools of an adapted model, at ``model.mos_pools``: one :class:`ShardPool` per linear type, in plan order.

    Attributes:
        config: the :class:`MoSConfig`; of ``"all-linear"`` with the ranks that modules have, in ``rank_pattern``.
        linear_types: which modules share which pool. left_out: see :class:`ParameterReport`.
        modules_to_save: modules that the adapter was saved or loaded with; they stay part of it when they are frozen.
    """

    modules_to_save: frozenset[str] = frozenset()

    def __init__(
        self,
        config: MoSConfig,
        linear_types: Sequence[LinearType],
        pools: Sequence[ShardPool],
        left_out: dict[str, str],
    ) -> None:
        super().__init__()
        self.config, self.linear_types, self.left_out = config, tuple(linear_types), left_out
        for key, pool in zip(type_keys([t.name for t in linear_types]), pools, strict=True):
            self.add_module(key, pool)

    def forward(self, x):
        """x itself: an adapted ``nn.Sequential`` holds the adapter as its last child, and calls it."""
        return x

    @property
    def pools(self) -> list[ShardPool]:
        return [pool for pool in self.children() if isinstance(pool, ShardPool)]

    @property
    def tables(self) -> dict[str, IndexTables]:
        """Stream -> index tables, of every linear type."""
        return {pool.stream: pool.tables for pool in self.pools}


class _Installed:
    """What :func:`install` did to a model, as a hook of its forward: layers that were replaced are noticed there.

    Converters swap modules by ``isinstance(module, nn.Linear)`` (torchao's to float8, say), and an adapter that goes
    with its layer would be lost without a word. A look at each layer takes 0.05 us (28 of them, 0.08 % of a
    forward pass of a four-layer model of width 64). The hook belongs to the model, not to the adapter, so that copies
    of the pools copy no model.

    Attributes:
        places: (parent, key, layer) wherever a layer was put. before: (module, attribute, value before) of whatever
            else was set. added: attributes that the model got.
    """

    def __init__(self) -> None:
        self.places: list[tuple[nn.Module, str, Layer]] = []
        self.before: list[tuple[nn.Module, str, Any]] = []
        self.added: set[str] = set()

    @staticmethod
    def of(model: nn.Module) -> Iterator[tuple[int, _Installed]]:
        """The hook of an adapted model, and its key among the hooks; nothing where somebody took it away."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, _Installed):
                yield key, hook

    def __call__(self, model: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for parent, key, layer in self.places:
            if parent._modules.get(key) is not layer:
                self.check(model, merged=True)
                break

    def check(self, model: nn.Module, *, merged: bool = False) -> None:
        """ValueError when other modules are in the place of adapted layers, and do not hold them.

        ``merged`` permits it of layers whose adapter was in their weight, and so in what that was converted to.
        """
        elsewhere = [
            (parent, key, layer)
            for parent, key, layer in self.places
            if not _holds(parent._modules.get(key), layer) and not (merged and layer.merged)
        ]
        names = {module: name for name, module in model.named_modules()} if elsewhere else {}
        lost = [(parent, key) for parent, key, layer in elsewhere if layer not in names]
        if lost:
            parent, key = lost[0]
            name = f"{names.get(parent, '')}.{key}".lstrip(".")
            others = f" (and {len(lost) - 1} others)" if len(lost) > 1 else ""
            raise ValueError(
                f"model must keep its adapted layers, got a {type(parent._modules.get(key)).__name__} in place of "
                f"{name}{others}, whose adapter is lost: convert the base before it is adapted, or call "
                f"mos_ext.unload(model) first"
            )


def _holds(module: nn.Module | None, layer: nn.Module) -> bool:
    """Whether a module is an adapted layer, or a wrapper of it."""
    return module is layer or (module is not None and layer in module.modules())


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of an adapted model. ValueError for any other, and for one whose layers were replaced."""
    adapter = _adapter_of(model)
    for _, installed in _Installed.of(unwrap(model)):
        installed.check(unwrap(model))
    return adapter


def _adapter_of(model: nn.Module) -> Adapter:
    adapter = getattr(unwrap(model), POOLS, None)
    if not isinstance(adapter, Adapter):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "model must be adapted with mos_ext.adapt or mos_ext.load_adapter, got a PEFT model: use its "
                "own merge_adapter, disable_adapter, save_pretrained, ...; explain and export_lora work for both"
            )
        kind = type(model).__name__
        raise ValueError(f"model must be adapted with mos_ext.adapt or mos_ext.load_adapter, got a plain {kind}")
    return adapter


def mos_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The adapted layers of a model, by name."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, Layer):
            yield name, module


def adapt(model: nn.Module, config: MoSConfig) -> nn.Module:
    """Puts a MoS adapter on a model, in place.

    Freezes every parameter, swaps the target linears for :class:`MoSLinear` and adds the pools. Afterwards the
    trainable parameters are the pools (``model.mos_pools``) and nothing else, and the outputs are those of the base
    model until the pools are trained.

    Args:
        model: any module; LLaMA-, GPT-2- (``Conv1D``), BERT- and ViT-style transformers are tested.
        config: see :class:`MoSConfig`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is adapted already, no module matches ``target_modules`` (the message lists what exists),
            the modules of a linear type are on several devices; or of modules that ``target_modules`` names,
            ``shards_per_vector`` does not divide the features, or a linear type has too few for the ranks (with the
            nearest valid values). In distributed runs also when ranks disagree on ``config``; then every rank raises.
        TypeError: an argument or a selected module of the wrong type, or a model that is a bare container.
            The model is unchanged after any error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, MoSConfig):
        of_peft = hasattr(config, "peft_type")
        meant = ", which peft.get_peft_model takes (from mos_ext import MoSConfig)" if of_peft else ""
        got = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config must be a mos_ext.MoSConfig, got a {got}{meant}")
    base = unwrap(model)
    with same_on_every_rank() as say:
        check_unadapted(base)
        config, linear_types = plan(base, config)
        say(config.to_dict())
    install(base, config, linear_types)
    return model


def check_unadapted(model: nn.Module) -> None:
    """ValueError for a model with an adapter, TypeError for one that cannot hold one."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise TypeError(f"model must be a module with a forward of its own, got a {type(model).__name__}")
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise TypeError(f"model must be adapted before it is wrapped, got a {type(module).__name__}")
    for name, module in model.named_modules():
        # PEFT's layers, of any method, have a list of merged adapters.
        if isinstance(module, AdaptedLayer) or hasattr(module, "merged_adapters"):
            got = f"one where {name} is a {type(module).__name__}"
            remedy = "call mos_ext.unload(model)" if isinstance(module, Layer) else "call unload() of the PEFT model"
            raise ValueError(f"model must not be adapted yet, got {got}: start from the base model, or {remedy} first")
    if hasattr(model, POOLS):
        raise ValueError(f"model must have no attribute {POOLS}, which holds the adapter, got one of its own")


def install(model: nn.Module, config: MoSConfig, linear_types: Sequence[LinearType]) -> nn.Module:
    """Builds the pools and layers of a plan. Everything that can fail happens before the model is touched."""
    modules = dict(model.named_modules())
    pools: list[ShardPool] = []
    layers: dict[nn.Module, Layer] = {}
    stacks: dict[nn.Module, dict[str, tuple[ShardPool, int]]] = {}
    for linear_type in linear_types:
        places = [(name, "") for name in linear_type.modules]
        if linear_type.kind.experts:
            places = [(parent, own) for parent, _, own in (name.rpartition(".") for name in linear_type.modules)]
        pool = ShardPool.of(linear_type, config, device_of(modules[places[0][0]]))
        pools.append(pool)
        for k, (name, parameter) in enumerate(places):
            module = modules[name]
            if parameter:
                stacks.setdefault(module, {})[parameter] = pool, k
            else:
                layers[module] = MoSLinear.from_linear(module, pool=pool, layer=k, register_pool=False)
    layers.update({module: adapted_experts(module, adapters) for module, adapters in stacks.items()})
    adapter = Adapter(config, linear_types, pools, left_out(Base.of(model), config))

    model.requires_grad_(False)
    installed = _Installed()
    for parent in modules.values():
        # By identity, wherever it occurs: a module tied to two places is replaced in both.
        found = {key: layers[child] for key, child in parent._modules.items() if child in layers}
        for key, layer in found.items():
            setattr(parent, key, layer)
            installed.places.append((parent, key, layer))
    installed.before = keep_calling(model, set(layers.values()))
    model.register_forward_pre_hook(installed)
    model.add_module(POOLS, adapter)
    before = set(vars(model))
    for act in after_install:
        act(model)
    installed.added = vars(model).keys() - before
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """``with mos_ext.disabled(model):`` the adapted model computes what the base model computes, bit for bit.

    Raises:
        ValueError: the model is not adapted, or is merged.
    """
    adapter_of(model)
    layers = [layer for _, layer in mos_layers(model)]
    if any(layer.merged for layer in layers):
        raise ValueError("model must not be merged inside disabled(): call mos_ext.unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge(model: nn.Module) -> nn.Module:
    """Adds every adapter to its weight, in place, exact to the rounding of one addition: no cost over the base.

    What rounding loses is kept beside it, so that :func:`unmerge` gives back the very weights: a few per cent of their
    elements with their positions, twice (bfloat16: three times) as large as these, or whole weights where that is less.
    Merged layers have no trainable parameters in use, and ``state_dict()`` holds the merged weights until ``unmerge``.

    Raises:
        ValueError: the model is not adapted, is switched off by ``disabled``, uses an adapted weight in another place
            too (tied embeddings), or a merged weight would not be finite. Nothing is merged then.
    """
    adapter_of(model)
    layers = dict(mos_layers(model))
    for name, layer in layers.items():
        if not layer.enabled:
            raise ValueError(f"model must not be merged inside disabled(), got {name} switched off")
    check_sole_owners(unwrap(model), [(layer, weight) for layer in layers.values() for weight in layer.merged_into()])
    todo = {name: layer for name, layer in layers.items() if not layer.merged}
    _for_each(todo, lambda layer: layer.check_mergeable())
    _for_each(todo, lambda layer: layer.merge())
    return model


def check_sole_owners(model: nn.Module, weights: Sequence[tuple[nn.Module, Any]]) -> None:
    """ValueError unless each module's weight is its own: merging into a tied weight would change another module too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for module, weight in weights:
        names = owners.get(id(weight), [])
        if {model.get_submodule(name.rpartition(".")[0]) for name in names} - {module}:
            raise ValueError(f"a merged weight must belong to one module alone, got one that is {', '.join(names)}")


def unmerge(model: nn.Module) -> nn.Module:
    """Takes the adapters out of the weights again, which are then what they were, to the bit.

    Raises:
        ValueError: the model is not adapted, or pools or weights have changed since the merge. Nothing is unmerged
            then.
    """
    adapter_of(model)
    merged = {name: layer for name, layer in mos_layers(model) if layer.merged}
    _for_each(merged, lambda layer: layer.check_unmergeable())
    _for_each(merged, lambda layer: layer.unmerge())
    return model


def unload(model: nn.Module) -> nn.Module:
    """Takes every adapter out again, in place: the base layers come back, and the pools are gone.

    They are of their class of before, with the same parameters, hooks and attributes, those that were set since
    included, but for what was set on a layer whose base is called: that goes with the layer. Merged layers keep what is
    merged in. Parameters stay frozen, as :func:`adapt` left them.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is not adapted, or a layer has parametrizations or a forward (of a hook of accelerate,
            say) that it got since, and which know the adapted layer. Nothing changes then.
    """
    _adapter_of(model)
    base = unwrap(model)
    layers = dict(mos_layers(model))
    _for_each(layers, lambda layer: layer.check_releasable())
    released = {layer: layer.release() for layer in layers.values()}
    for parent in list(base.modules()):
        for key, child in list(parent._modules.items()):
            if child in released:
                setattr(parent, key, released[child])
    for hook, installed in _Installed.of(base):
        for module, attribute, before in installed.before:
            setattr(module, attribute, before)
        for attribute in installed.added:
            vars(base).pop(attribute, None)
        for module in released.values():
            stop_calling(module)
        del base._forward_pre_hooks[hook]
    delattr(base, POOLS)
    return model


def _for_each(layers: dict[str, Layer], do: Callable[[Layer], object]) -> None:
    for name, layer in layers.items():
        try:
            do(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclass(frozen=True)
class TypeReport:
    """One linear type in a :class:`ParameterReport`. ``trainable`` counts both pools; ``ranks`` are its modules'."""

    name: str
    num_layers: int
    num_shards: int
    trainable: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class ParameterReport:
    """What an adapter costs: ``print`` it for a table.

    Attributes:
        trainable: parameters with ``requires_grad``.
        total: all parameters, pools included.
        equivalent_rank: the LoRA rank with as many trainable parameters.
        r: the LoRA rank that the adapter expands to.
        expert_equivalent_rank: the same of experts, where they are adapted with a budget of their own; else None.
        lora_parameters: what LoRA of rank r would train on the same modules.
        types: per linear type.
        left_out: modules that ``"all-linear"`` stands for and that cannot be adapted: name -> why.
    """

    trainable: int
    total: int
    equivalent_rank: int
    r: int
    lora_parameters: int
    types: tuple[TypeReport, ...]
    left_out: dict[str, str]
    expert_equivalent_rank: float | None = None

    def __str__(self) -> str:
        width = max(len(t.name) for t in self.types)
        lines = [f"{'linear type':<{width}}  layers  shards       r   trainable"]
        for t in self.types:
            ranks = "-".join(map(str, sorted({min(t.ranks), max(t.ranks)})))
            lines.append(f"{t.name:<{width}}  {t.num_layers:>6}  {t.num_shards:>6} {ranks:>7}  {t.trainable:>10,}")
        lines += [f"not adapted: {text}" for text in by_role(self.left_out)]
        of_experts = self.expert_equivalent_rank
        own = "" if of_experts is None else f" (of experts: rank {of_experts:g})"
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} parameters "
            f"({100 * self.trainable / self.total:.3f}%): the budget of LoRA "
            f"rank {self.equivalent_rank}{own}, the rank of LoRA rank {self.r} ({self.lora_parameters:,} parameters)"
        )
        return "\n".join(lines)


def parameter_report(model: nn.Module) -> ParameterReport:
    """Counts an adapted model's parameters, per linear type and in all; also on the meta device.

    Raises:
        ValueError: the model is not adapted.
    """
    adapter = adapter_of(model)
    types = tuple(
        TypeReport(
            t.name, t.num_matrices, pool.shards_a.shape[0], pool.shards_a.numel() + pool.shards_b.numel(), t.ranks
        )
        for t, pool in zip(adapter.linear_types, adapter.pools, strict=True)
    )
    config = adapter.config
    return ParameterReport(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        equivalent_rank=config.equivalent_rank,
        r=config.r,
        lora_parameters=sum(
            sum(t.ranks) * max(1, t.kind.experts) * (t.kind.in_features + t.kind.out_features)
            for t in adapter.linear_types
        ),
        types=types,
        left_out=adapter.left_out,
        expert_equivalent_rank=config.expert_equivalent_rank,
    )
