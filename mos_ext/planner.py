"""Which modules are adapted, and which of them share a pool. One plan serves every way of building an adapted model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from .config import MoSConfig
from .routing import IndexTables, check_ranks, draw_tables, streams


@dataclass(frozen=True)
class LinearType:
    """The modules that share one A-pool and one B-pool: one role, one shape.

    Attributes:
        role: the modules' name with every number replaced by ``*``: ``model.layers.*.self_attn.q_proj``.
        in_features, out_features: the shape they have in common.
        stream: names the random stream of the tables.
        modules: their names, in the model's order; position k is layer k of the tables.
        ranks, scales: of each module.
        tables: the index tables, (L, r, l) each.
    """

    role: str
    in_features: int
    out_features: int
    stream: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    tables: IndexTables

    @property
    def name(self) -> str:
        """Role and shape, unique within a plan: ``model.layers.*.self_attn.q_proj[4096->4096]``."""
        return type_name(self.role, self.in_features, self.out_features)


def type_name(role: str, in_features: int, out_features: int) -> str:
    return f"{role}[{in_features}->{out_features}]"


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None.

    Anything with these two attributes and a forward: ``nn.Linear``, quantised linears, a user's own. (Not the output
    projection of ``nn.MultiheadAttention``, which is never called: only its weight is read.) ``Conv1D`` of transformers
    is recognised by name, because transformers is not a dependency.
    """
    if is_conv1d(module):
        fan_in, fan_out = cast(Tensor, module.weight).shape
        return fan_in, fan_out
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    return features if all(type(f) is int and f > 0 for f in features) else None  # type: ignore[return-value]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear, transformers' ``Conv1D``, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def device_of(module: nn.Module) -> torch.device | None:
    """Where a layer computes, and its adapter belongs: the device of its first parameter or buffer; None without any.

    An offloaded layer's weights are elsewhere, and accelerate's hook knows where they are brought.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), None)


def why_opaque(module: nn.Module) -> str | None:
    """Why a layer must be called as it is, rather than computed as ``x W^T + b`` in one go with its adapter; or None.

    Exact types only: a subclass (a quantised linear, say) may compute something else.
    """
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"the base layer is a {type(module).__name__}"
    if "forward" in vars(module):
        return "the forward of the base layer was replaced (by a hook of accelerate, say)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "the weight of the base layer is computed from other parameters"
    return why_opaque_weight(weight)


def why_opaque_weight(weight: Tensor) -> str | None:
    """Why a product with a weight is not an ordinary one, whose operands are numbers in memory; or None."""
    kind = type(weight)
    if kind is nn.Parameter or kind is Tensor or kind.__name__ == "FakeTensor":
        return None
    return f"the weight of the base layer is a {kind.__name__}"


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def in_layers(config: MoSConfig, name: str) -> bool:
    """Whether a module lies in one of the blocks that ``layers_to_transform`` counts; read as PEFT does."""
    if config.layers_to_transform is None or name in config.target_modules:
        return True
    if config.layers_pattern is None:
        matches = [re.match(r".*?\.[^.]*\.(\d+)\.", name)]
    else:
        matches = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in config.layers_pattern]
    number = next((int(m.group(1)) for m in matches if m), None)
    return number in cast(Sequence[int], config.layers_to_transform)


def role_of(name: str) -> str:
    """A module's name with every number replaced by ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that maps to logits, where the model says which; transformers models do."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile(model)`` returns; any other model itself."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def linear_modules(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Every ``nn.Linear`` (quantised ones are subclasses) and ``Conv1D`` among named modules."""
    return [(n, m) for n, m in named if (isinstance(m, nn.Linear) or is_conv1d(m)) and features_of(m) is not None]


def every_linear(named: Iterable[tuple[str, nn.Module]], head: nn.Module | None) -> list[str]:
    """The modules that ``target_modules="all-linear"`` stands for: in numbered blocks, and not the output head.

    Raises:
        ValueError: there is none; the message lists what exists.
    """
    linear = linear_modules(named)
    names = [n for n, m in linear if "*" in role_of(n).split(".") and m is not head]
    if not names:
        _raise_nothing_matches(
            "match at least one linear module inside a numbered block (name the modules to adapt others), "
            "got 'all-linear'",
            linear,
        )
    return names


def _raise_nothing_matches(rule: str, linear: Sequence[tuple[str, nn.Module]]) -> None:
    existing = sorted({role_of(n) for n, _ in linear})
    raise ValueError(f"target_modules must {rule}; the model has: {', '.join(existing) or 'no linear module'}")


def select_modules(model: nn.Module, config: MoSConfig) -> list[tuple[str, nn.Module]]:
    """The modules that ``target_modules`` and ``exclude_modules`` select, in the model's order.

    Raises:
        ValueError: nothing matches (the message lists what exists).
    """
    every = list(model.named_modules())
    if config.target_modules == "all-linear":
        names = set(every_linear(every, output_head(model)))
        named = [(n, m) for n, m in every if n in names]
    else:
        named = [(n, m) for n, m in every if n and _matches(config.target_modules, n) and in_layers(config, n)]
    named = [(n, m) for n, m in named if not _matches(config.exclude_modules, n)]
    if not named:
        _raise_nothing_matches(
            f"match at least one linear module, got {config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r}",
            linear_modules(every),
        )
    return named


def group_modules(named: Iterable[tuple[str, nn.Module]]) -> dict[tuple[str, int, int], tuple[str, ...]]:
    """The selected modules by (role, in_features, out_features), in the model's order.

    Raises:
        TypeError: a selected module cannot be adapted.
    """
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name, module in named:
        features = features_of(module)
        if features is None:
            raise TypeError(
                f"target_modules must select modules with in_features and out_features (torch.nn.Linear, a quantised "
                f"linear, transformers Conv1D), got {name}, a {type(module).__name__}"
            )
        weight = module._parameters.get("weight")
        if weight is not None and type(weight.data).__name__ == "DTensor":
            raise TypeError(
                f"target_modules must select modules with whole weights, got {name}, whose weight is a DTensor: adapt "
                f"the model before fully_shard; tensor-parallel layers cannot be adapted"
            )
        groups.setdefault((role_of(name), *features), []).append(name)
    return {key: tuple(names) for key, names in groups.items()}


def plan_modules(config: MoSConfig, named: Iterable[tuple[str, nn.Module]]) -> list[LinearType]:
    """Groups selected modules by role and shape and draws each group's tables. Reads the modules, changes nothing.

    Raises:
        ValueError, TypeError: l does not divide a module's features, a group is too small for the ranks, or a module
            cannot be adapted.
    """
    types, groups = [], group_modules(named)
    for stream, ((role, fan_in, fan_out), modules) in zip(streams(list(groups)), groups.items(), strict=True):
        name, ranks = type_name(role, fan_in, fan_out), tuple(config.rank_of(module) for module in modules)
        for module, r in zip(modules, ranks, strict=True):
            check_ranks(config, fan_in, fan_out, len(modules), r=r, module=module, linear_type=name)
        scales = tuple(config.scale_of(module) for module in modules)
        tables = draw_tables(config, stream, ranks)
        types.append(LinearType(role, fan_in, fan_out, stream, modules, ranks, scales, tables))
    return types


def plan(model: nn.Module, config: MoSConfig) -> list[LinearType]:
    """The linear types of the modules that ``config`` selects; :func:`select_modules` and :func:`plan_modules`."""
    return plan_modules(config, select_modules(model, config))


def type_keys(names: Sequence[str]) -> list[str]:
    """One identifier per name of a linear type, for state_dict keys that every tool can handle:

    ``model_layers_self_attn_q_proj_4096_4096``.
    """
    keys: list[str] = []
    for name in names:
        key = re.sub(r"\W+", "_", name).strip("_")
        while key in keys:
            key += "_"
        keys.append(key)
    return keys
