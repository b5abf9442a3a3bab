"""Which modules are adapted, and which of them share a pool. One plan serves every way of building an adapted model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from .config import MoSConfig
from .routing import IndexTables, check_ranks, draw_tables


@dataclass(frozen=True)
class LinearType:
    """The modules that share one A-pool and one B-pool: one role, one shape.

    Attributes:
        role: the modules' name with every number replaced by ``*``: ``model.layers.*.self_attn.q_proj``.
        in_features, out_features: the shape they have in common.
        modules: their names, in the model's order; position k is layer k of the tables.
        tables: the index tables, (L, r, l) each.
    """

    role: str
    in_features: int
    out_features: int
    modules: tuple[str, ...]
    tables: IndexTables

    @property
    def name(self) -> str:
        """Role and shape, unique within a plan: ``model.layers.*.self_attn.q_proj[4096->4096]``."""
        return type_name(self.role, self.in_features, self.out_features)


def type_name(role: str, in_features: int, out_features: int) -> str:
    return f"{role}[{in_features}->{out_features}]"


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer that can be adapted, else None.

    Exact types only: a subclass (a quantised linear, ``MultiheadAttention.out_proj``) may compute something else than
    ``x W^T + b``, or not be called at all. ``Conv1D`` of transformers is recognised by name, because transformers is
    not a dependency.
    """
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None  # pruned, weight-normed: the weight is computed from other parameters
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if is_conv1d(module):
        fan_in, fan_out = cast(Tensor, module.weight).shape
        return fan_in, fan_out
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear, transformers' ``Conv1D``, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _output_head(model: nn.Module) -> nn.Module | None:
    """The module that maps to logits, where the model says which; transformers models do."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile(model)`` returns; any other model itself."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that can be adapted, by its first name, in the model's order."""
    for name, module in model.named_modules():
        if features_of(module) is not None:
            yield name, module


def select_modules(model: nn.Module, config: MoSConfig) -> list[tuple[str, nn.Module]]:
    """The modules that ``target_modules`` and ``exclude_modules`` select, in the model's order.

    Raises:
        ValueError: nothing matches (the message lists what exists).
        TypeError: a selected module cannot be adapted.
    """
    every_linear, head = config.target_modules == "all-linear", _output_head(model)
    if every_linear:
        named = [(n, m) for n, m in linear_modules(model) if "*" in _role(n).split(".") and m is not head]
    else:
        named = [(n, m) for n, m in model.named_modules() if n and _matches(config.target_modules, n)]
    named = [(n, m) for n, m in named if not _matches(config.exclude_modules, n)]
    if not named:
        existing = sorted({_role(n) for n, _ in linear_modules(model)})
        rule = "match at least one linear module"
        if every_linear:
            rule += " inside a numbered block (name the modules to adapt others)"
        raise ValueError(
            f"target_modules must {rule}, got {config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r}; "
            f"the model has: {', '.join(existing) or 'no linear module'}"
        )
    for name, module in named:
        if "forward" in vars(module):
            raise TypeError(
                f"target_modules must select modules with the forward of their class, got {name}, whose forward was "
                f"replaced (by a hook of accelerate, say)"
            )
        if features_of(module) is None:
            raise TypeError(
                f"target_modules must select torch.nn.Linear or transformers Conv1D modules, got {name}, "
                f"a {type(module).__name__}"
            )
    return named


def group_modules(model: nn.Module, config: MoSConfig) -> dict[tuple[str, int, int], tuple[str, ...]]:
    """The selected modules by (role, in_features, out_features), in the model's order."""
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name, module in select_modules(model, config):
        features = features_of(module)
        assert features is not None  # select_modules raised otherwise
        groups.setdefault((_role(name), *features), []).append(name)
    return {key: tuple(names) for key, names in groups.items()}


def plan(model: nn.Module, config: MoSConfig) -> list[LinearType]:
    """Groups the selected modules by role and shape and draws each group's tables. Reads the model, changes nothing.

    Raises:
        ValueError, TypeError: nothing to adapt, l does not divide a module's features, or a group is too small for the
            ranks.
    """
    types = []
    for (role, fan_in, fan_out), modules in group_modules(model, config).items():
        name = type_name(role, fan_in, fan_out)
        check_ranks(config, fan_in, fan_out, len(modules), module=modules[0], linear_type=name)
        types.append(LinearType(role, fan_in, fan_out, modules, draw_tables(config, name, len(modules))))
    return types
