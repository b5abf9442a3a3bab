"""Which modules are adapted, and which of them share a pool. One plan serves every way of building an adapted model."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .config import MoSConfig, matching_patterns
from .routing import IndexTables, check_ranks, draw_tables, largest_rank, streams

logger = logging.getLogger("mos_ext")

_MAMBA_1, _MAMBA_2 = ("x_proj", "dt_proj", "out_proj"), ("out_proj",)
_QKV = ("q_proj", "k_proj", "v_proj")
# Children whose weights their parents read instead of calling them, always or on some way only: in a fused kernel, in
# one direction of a cache. An adapter would be passed by there. By the parent's class, or one it is derived from; with
# its module where the name alone is anybody's.
READ_BY_PARENT: dict[str, tuple[str, ...]] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "fairseq.modules.multihead_attention.MultiheadAttention": (*_QKV, "out_proj"),
    "mamba_ssm.modules.mamba_simple.Mamba": ("in_proj", *_MAMBA_1),
    "mamba_ssm.modules.mamba2.Mamba2": _MAMBA_2,
    "mamba_ssm.modules.mamba2_simple.Mamba2Simple": _MAMBA_2,
    # OpenAI's CLIP and OpenCLIP.
    "AttentionPool2d": (*_QKV, "c_proj"),
    # transformers, and models of the Hub that bring their code along.
    "MambaMixer": _MAMBA_1,
    "FalconMambaMixer": _MAMBA_1,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": _MAMBA_2,
    "BambaMixer": _MAMBA_2,
    "FalconH1Mixer": _MAMBA_2,
    "GraniteMoeHybridMambaLayer": _MAMBA_2,
    "NemotronHMamba2Mixer": _MAMBA_2,
    "Zamba2MambaMixer": _MAMBA_2,
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "LSHSelfAttention": ("query_key", "value"),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": (*_QKV, "out_proj"),
}

# Linears by their class whose result is another than a linear's: scores and indices, more features, blocks. In
# transformers.
NO_LINEARS = ("DeepseekV4GroupedLinear", "IdeficsDecoupledLinear", "Llama4Router", "PhimoeTopKRouter")


def reader_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The class of the parent that reads a module's weight instead of calling it (``READ_BY_PARENT``); or None."""
    parent, _, child = name.rpartition(".")
    for cls in type(modules.get(parent)).__mro__:
        if child in (
            *READ_BY_PARENT.get(cls.__name__, ()),
            *READ_BY_PARENT.get(f"{cls.__module__}.{cls.__name__}", ()),
        ):
            return cls.__name__
    return None


def keep_calling(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Makes torch's transformer encoders call those of ``layers`` that they hold in eval mode too.

    There an ``nn.TransformerEncoderLayer`` reads the weights of its children, unless one has a hook: it gets one that
    does nothing, and goes with the layer. And ``nn.TransformerEncoder`` makes nested tensors of padded batches, for
    which attention has no other way than the one without gradients.

    Returns:
        (module, attribute, value before) of what was set.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.children():
                if child in layers and _called not in child._forward_pre_hooks.values():
                    child.register_forward_pre_hook(_called)
        elif isinstance(module, nn.TransformerEncoder) and any(child in layers for child in module.modules()):
            before.append((module, "use_nested_tensor", module.use_nested_tensor))
            module.use_nested_tensor = False
    return before


def stop_calling(module: nn.Module) -> None:
    """Takes the hook of :func:`keep_calling` away from a module that is no adapted layer any more."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _called]:
        del module._forward_pre_hooks[key]


def _called(module: nn.Module, args: Any) -> None:
    """A hook, see :func:`keep_calling`; not a lambda, which could not be pickled."""


class Kind(NamedTuple):
    """What the modules of a linear type have in common: their role and their shape.

    Attributes:
        role: the modules' name with every number replaced by ``*``: ``model.layers.*.self_attn.q_proj``.
        in_features, out_features: of each matrix. experts: how many matrices a parameter stacks; 0 for a linear module.
    """

    role: str
    in_features: int
    out_features: int
    experts: int = 0

    @property
    def name(self) -> str:
        """Role and shape, unique within a plan: ``model.layers.*.self_attn.q_proj[4096->4096]``."""
        count = f"{self.experts} x " if self.experts else ""
        return f"{self.role}[{count}{self.in_features}->{self.out_features}]"

    def budget(self, config: MoSConfig) -> MoSConfig:
        """The configuration of this type's pools: experts have an equivalent rank of their own."""
        return config.for_experts() if self.experts else config


@dataclass(frozen=True)
class LinearType:
    """The modules that share one A-pool and one B-pool: one role, one shape.

    Attributes:
        kind: role and shape.
        stream: names the random stream of the tables.
        modules: their names, in the model's order; position k is layer k of the tables. Of experts, the names of the
            parameters that stack them; expert e of position k is matrix k * experts + e.
        ranks, scales: of each module.
        tables: the index tables, (L, r, l) each, L the number of matrices.
    """

    kind: Kind
    stream: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    tables: IndexTables

    @property
    def name(self) -> str:
        """That of :class:`Kind`."""
        return self.kind.name

    @property
    def num_matrices(self) -> int:
        """How many matrices share the pools."""
        return len(self.modules) * max(1, self.kind.experts)


# ------------------------------------------------------------------------------------------------ experts

EXPERT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers 5 whose parameters stack experts (``use_experts_implementation``)."""
    flags = all(isinstance(getattr(module, name, None), bool) for name in EXPERT_FLAGS)
    return (
        flags and type(getattr(module, "num_experts", None)) is int and callable(getattr(module, "_apply_gate", None))
    )


def stack_of(module: nn.Module, parameter: str) -> tuple[int, int, int] | None:
    """(experts, in_features, out_features) of a parameter of a module that stacks experts; None of any other."""
    if not is_experts(module) or parameter not in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        return None
    weight = module._parameters.get(parameter)
    shape = () if weight is None else shape_of(weight)
    if len(shape) != 3 or shape[0] != module.num_experts:
        return None
    return shape if module.is_transposed else (shape[0], shape[2], shape[1])  # type: ignore[return-value]


def expert_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter of a model that stacks experts, by its name: the module, and its name there."""
    return stacks_among(dict(model.named_modules()))


def stacks_among(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """:func:`expert_stacks` of a model's modules."""
    return {
        f"{name}.{parameter}": (module, parameter)
        for name, module in modules.items()
        for parameter in (module._parameters if name and is_experts(module) else ())
        if stack_of(module, parameter) is not None
    }


def select_stacks(modules: Mapping[str, nn.Module], config: MoSConfig) -> dict[str, tuple[nn.Module, str]]:
    """The stacks of experts in a model's modules that ``target_parameters`` selects, as of :func:`expert_stacks`.

    Raises:
        ValueError: nothing matches. TypeError: a parameter that matches is no stack of experts.
    """
    if not config.target_parameters:
        return {}
    stacks = stacks_among(modules)
    named = [(f"{name}.{own}", p) for name, m in modules.items() if name for own, p in m._parameters.items()]
    selected = [
        name
        for name, parameter in named
        if parameter is not None
        and _matches(config.target_parameters, name)
        and in_layers(config, name)
        and not (_matches(config.exclude_modules, name) or _matches(config.exclude_modules, name.rpartition(".")[0]))
    ]
    for name in selected:
        module = modules[name.rpartition(".")[0]]
        weight: Any = module._parameters[name.rpartition(".")[2]]
        if name not in stacks:
            raise TypeError(
                f"target_parameters must select parameters that stack experts, of a module with the experts interface "
                f"of transformers 5, got {name} {shape_of(weight)} of a {type(module).__name__}"
            )
        if why := why_opaque_weight(weight) or _why_not_plain(weight, module):
            raise TypeError(f"target_parameters must select plain floating-point weights, got {name}: {why}")
    if not selected:
        existing = sorted({role_of(name) for name in stacks})
        raise ValueError(
            f"target_parameters must match at least one parameter that stacks experts, got "
            f"{config.target_parameters!r}; the model has: {', '.join(existing) or 'none'}"
        )
    return {name: stacks[name] for name in selected}


def _why_not_plain(weight: Tensor, module: nn.Module) -> str | None:
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its dtype is {weight.dtype}"
    if type(weight.data).__name__ == "DTensor":
        return "it is a DTensor: adapt the model before fully_shard; tensor-parallel experts cannot be adapted"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over ranks (expert parallelism), where they cannot be adapted"
    return None


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None.

    Anything with these two attributes and a forward: ``nn.Linear``, quantised linears, a user's own. ``Conv1D`` of
    transformers is recognised by name, because transformers is not a dependency.
    """
    if is_conv1d(module):
        fan_in, fan_out = shape_of(cast(Tensor, module.weight))
        return fan_in, fan_out
    if type(module).__name__ in NO_LINEARS:
        return None
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return features if all(type(f) is int and f > 0 for f in features) else None  # type: ignore[return-value]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape; of a parameter that DeepSpeed's ZeRO-3 has partitioned, and left empty, that of the whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor: FSDP2 or DeepSpeed's ZeRO-3 has put the rest on other ranks."""
    return hasattr(tensor, "full_tensor") or shape_of(tensor) != tuple(tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered where it is sharded. That is a collective: every rank must ask."""
    if not is_sharded(tensor):
        return tensor
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    from deepspeed import zero

    with zero.GatheredParameters(tensor):
        return tensor.detach().clone()


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


@dataclass(frozen=True)
class Base:
    """What an adapter of a model needs to know of it, whether it carries adapters of PEFT's or none.

    Attributes:
        modules: its modules by name, without any adapter's: an adapted layer stands for its base.
        head: see :func:`output_head`.
    """

    modules: Mapping[str, nn.Module]
    head: nn.Module | None
    _kinds: dict[tuple, dict[Kind, tuple[str, ...]]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        """That of a model, compiled or not; of a PEFT model with the names that its base model has."""
        model = unwrap(model)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
        modules: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not (inside and name.startswith(inside)):
                modules[name] = base = _base_layer(module)
                if base is not module:
                    inside += (f"{name}.",)
        head = output_head(model)
        return cls(modules, None if head is None else _base_layer(head))


def _base_layer(module: nn.Module) -> nn.Module:
    """What a layer of PEFT's adapts; any other module itself."""
    getter = getattr(module, "get_base_layer", None)
    return getter() if callable(getter) else module


def linear_modules(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Every ``nn.Linear`` (quantised ones are subclasses) and ``Conv1D`` among named modules."""
    return [(n, m) for n, m in named if isinstance(m, nn.Linear) or is_conv1d(m)]


def every_linear(named: Iterable[tuple[str, nn.Module]], head: nn.Module | None) -> list[str]:
    """The modules that ``target_modules="all-linear"`` stands for: in numbered blocks, and not the output head.

    In a model without numbered blocks it is every linear but that head.

    Raises:
        ValueError: there is none.
    """
    names = [n for n, m in linear_modules(named) if m is not head]
    if not names:
        raise ValueError(
            "target_modules must match at least one linear module beside the output head, got 'all-linear'; the model "
            "has: no linear module"
        )
    return [n for n in names if "*" in role_of(n).split(".")] or names


def left_out(base: Base, config: MoSConfig) -> dict[str, str]:
    """The modules that ``"all-linear"`` stands for and that cannot be adapted: name -> why."""
    return select_modules(base, config)[1]


def select_modules(base: Base, config: MoSConfig) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    """The modules that ``target_modules`` and ``exclude_modules`` select, in the model's order, and those left out.

    Of ``"all-linear"`` those that can be adapted; the others are what :func:`left_out` has.

    Raises:
        ValueError: nothing matches (the message lists what exists).
    """
    modules = base.modules
    all_linear = config.target_modules == "all-linear"
    if not config.target_modules:
        return [], {}
    if all_linear:
        names = set(every_linear(modules.items(), base.head))
    else:
        names = {n for n in modules if n and _matches(config.target_modules, n) and in_layers(config, n)}
    named = [(n, m) for n, m in modules.items() if n in names and not _matches(config.exclude_modules, n)]
    if not named:
        existing = sorted({role_of(n) for n, _ in linear_modules(modules.items())})
        raise ValueError(
            f"target_modules must match at least one linear module, got {config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r}; the model has: {', '.join(existing) or 'no linear module'}"
        )
    if not all_linear:
        return named, {}
    named, others = adaptable(config, named, modules)
    return named, {**others, **stacks_left_out(modules, config)}


def stacks_left_out(modules: Mapping[str, nn.Module], config: MoSConfig) -> dict[str, str]:
    """The stacks of experts that ``"all-linear"`` leaves out: name -> why."""
    chosen = select_stacks(modules, config)
    return {
        name: f"it stacks experts, which target_parameters=[{role_of(name).rpartition('*.')[2]!r}] includes"
        for name in stacks_among(modules)
        if name not in chosen
    }


def adaptable(
    config: MoSConfig, named: Sequence[tuple[str, nn.Module]], modules: Mapping[str, nn.Module]
) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    """Of modules that the user did not name, those that can be adapted; and why the others cannot, by name.

    ``modules`` are all of the model. Where none can be, it is all of them: planning then says what is wrong.
    """
    out, others = [], {}
    for name, module in named:
        features, l = features_of(module), config.shards_per_vector
        if (reader := reader_of(name, modules)) is not None:
            others[name] = f"{reader} reads its weight instead of calling it"
        elif features is None:
            others[name] = f"it is a {type(module).__name__}"
        elif features[0] % l or features[1] % l:
            others[name] = f"shards_per_vector={l} does not divide {features[0]}->{features[1]}"
        else:
            out.append((name, module))
    return (out, others) if out else (list(named), {})


def by_role(modules: Mapping[str, str]) -> list[str]:
    """Modules and what is said of each, those of one role together: ``["layers.*.gate (2 modules: why)"]``."""
    roles: dict[tuple[str, str], int] = {}
    for name, said in modules.items():
        key = role_of(name), said
        roles[key] = roles.get(key, 0) + 1
    return [f"{role} ({f'{count} modules: ' if count > 1 else ''}{said})" for (role, said), count in roles.items()]


def fit_ranks(config: MoSConfig, named: Iterable[tuple[str, nn.Module]], modules: Mapping[str, nn.Module]) -> MoSConfig:
    """``config`` with a ``rank_pattern`` that gives modules of types too small for r the largest rank they can have.

    For modules that the user did not name. Where a pattern gives a module its rank, that is what it has. So the
    configuration in a file says which rank each module has, whoever reads it.
    """
    lowered: dict[str, int] = {}
    for members in group_modules(named, modules).values():
        largest = largest_rank(config, len(members))
        if largest < config.r:
            lowered.update((m, largest) for m in members if not matching_patterns(config.rank_pattern, m))
    if not lowered:
        return config
    patterns = {f"^{re.escape(name)}": r for name, r in lowered.items()}  # ^: not the end of a longer name
    return replace(config, rank_pattern={**config.rank_pattern, **patterns})


def tell_of_fitting(
    before: MoSConfig, after: MoSConfig, named: Iterable[tuple[str, nn.Module]], others: Mapping[str, str]
) -> None:
    """Logs, in one line, what of ``"all-linear"`` is left out and where :func:`fit_ranks` lowered r."""
    lowered: dict[str, str] = {}
    for name, module in named:
        if (r := after.rank_of(name)) != before.rank_of(name):
            fan_in, fan_out = cast(tuple[int, int], features_of(module))
            lowered[Kind(role_of(name), fan_in, fan_out).name] = f"r={r} instead of {before.r}"
    parts = [f"left out {', '.join(by_role(others))}"] if others else []
    if lowered:
        parts.append(f"too few modules for the rank: {', '.join(f'{name} ({r})' for name, r in lowered.items())}")
    if parts:
        logger.warning("adapting without named modules: %s", "; ".join(parts))


def group_modules(
    named: Iterable[tuple[str, nn.Module]],
    modules: Mapping[str, nn.Module],
    stacks: Mapping[str, tuple[nn.Module, str]] | None = None,
) -> dict[Kind, tuple[str, ...]]:
    """The selected modules, and stacks of experts, by kind, in the model's order. ``modules`` are all of it.

    Raises:
        TypeError: a selected module cannot be adapted. ValueError: those of one group are on several devices.
    """
    groups: dict[Kind, dict[str, torch.device | None]] = {}
    for name, module in named:
        features = features_of(module)
        if features is None:
            raise TypeError(
                f"target_modules must select modules with in_features and out_features (torch.nn.Linear, a quantised "
                f"linear, transformers Conv1D), got {name}, a {type(module).__name__}"
            )
        if (reader := reader_of(name, modules)) is not None:
            raise TypeError(
                f"target_modules must select modules that are called, got {name}, whose weight {reader} reads instead, "
                f"past an adapter: exclude the module (exclude_modules)"
            )
        weight = module._parameters.get("weight")
        if weight is not None and type(weight.data).__name__ == "DTensor":
            raise TypeError(
                f"target_modules must select modules with whole weights, got {name}, whose weight is a DTensor: adapt "
                f"the model before fully_shard; tensor-parallel layers cannot be adapted"
            )
        groups.setdefault(Kind(role_of(name), *features), {})[name] = device_of(module)
    for name, (module, parameter) in (stacks or {}).items():
        experts, fan_in, fan_out = cast(tuple[int, int, int], stack_of(module, parameter))
        groups.setdefault(Kind(role_of(name), fan_in, fan_out, experts), {})[name] = device_of(module)
    for kind, members in groups.items():
        places: dict[torch.device, str] = {}
        for name, device in members.items():
            if device is not None:
                places.setdefault(device, name)
        if len(places) > 1:
            got = ", ".join(f"{name} on {device}" for device, name in places.items())
            raise ValueError(
                f"the modules of a linear type, {kind.name}, must be on one device, since they share a pool, got "
                f"{got}: load the model on one device (device_map={{'': 0}}), or exclude the modules on the others"
            )
    return {kind: tuple(members) for kind, members in groups.items()}


_FEW = 64  # selections that a base remembers


def kinds_of(base: Base, config: MoSConfig) -> Mapping[Kind, tuple[str, ...]]:
    """What ``config`` selects in a model, by kind. Errors as of :func:`group_modules` and of what selects.

    A base remembers it: of 32 blocks of a Llama it takes 2.3 ms, and most adapters of one base select the same.
    """
    names = config.target_modules, config.target_parameters, config.exclude_modules
    selection = *names, config.layers_to_transform, config.layers_pattern, config.shards_per_vector
    found = base._kinds.get(selection)
    if found is None:
        named, _ = select_modules(base, config)
        found = group_modules(named, base.modules, select_stacks(base.modules, config))
        if len(base._kinds) >= _FEW:
            base._kinds.clear()
        base._kinds[selection] = found
    return found


def plan_modules(
    config: MoSConfig,
    named: Iterable[tuple[str, nn.Module]],
    modules: Mapping[str, nn.Module],
    stacks: Mapping[str, tuple[nn.Module, str]] | None = None,
) -> list[LinearType]:
    """Groups selected modules by role and shape and draws each group's tables. Reads the modules, changes nothing.

    Raises:
        ValueError, TypeError: l does not divide a module's features, a group is too small for the ranks, or a module
            cannot be adapted.
    """
    groups = group_modules(named, modules, stacks)
    return [
        linear_type(kind, stream, members, config, lambda budget, ranks: None)
        for stream, (kind, members) in zip(streams(list(groups)), groups.items(), strict=True)
    ]


def linear_type(
    kind: Kind,
    stream: str,
    members: tuple[str, ...],
    config: MoSConfig,
    tables_of: Callable[[MoSConfig, tuple[int, ...]], IndexTables | None],
) -> LinearType:
    """A linear type with the tables that ``tables_of`` gives for its budget and the ranks of its matrices, or drawn.

    Raises:
        ValueError: the ranks do not fit.
    """
    budget, count = kind.budget(config), max(1, kind.experts)
    ranks = tuple(config.rank_of(module) for module in members)
    for module, r in zip(members, ranks, strict=True):
        fan_in, fan_out = kind.in_features, kind.out_features
        check_ranks(budget, fan_in, fan_out, count * len(members), r=r, module=module, linear_type=kind.name)
    of_matrices = tuple(r for r in ranks for _ in range(count))
    tables = tables_of(budget, of_matrices) or draw_tables(budget, stream, of_matrices)
    return LinearType(kind, stream, members, ranks, tuple(config.scale_of(module) for module in members), tables)


def plan(model: nn.Module, config: MoSConfig) -> tuple[MoSConfig, list[LinearType]]:
    """The linear types of the modules that ``config`` selects, and the configuration with the ranks that they have."""
    base = Base.of(model)
    modules = base.modules
    named, others = select_modules(base, config)
    fitted, stacks = config, select_stacks(modules, config)
    if config.target_modules == "all-linear":
        fitted = fit_ranks(config, named, modules)
    types = plan_modules(fitted, named, modules, stacks)
    tell_of_fitting(config, fitted, named, others)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {p for name in (*(n for n, _ in named), *stacks) for p in matching_patterns(patterns, name)}
        if unused := [pattern for pattern in patterns if pattern not in used]:  # PEFT warns itself
            warnings.warn(f"{field} should match adapted modules, got {unused}, which match none", stacklevel=3)
    return fitted, types


def type_keys(names: Sequence[str]) -> list[str]:
    """One identifier per name of a linear type, for state_dict keys that every tool can handle.

    ``model_layers_self_attn_q_proj_4096_4096``, say.
    """
    keys: list[str] = []
    for name in names:
        key = re.sub(r"\W+", "_", name).strip("_")
        while key in keys:
            key += "_"
        keys.append(key)
    return keys
