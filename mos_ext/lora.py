"""LoRA, as PEFT lays it out in files: adapters expanded to it exactly, and LoRA read as an adapter like any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import files
from .adapt import adapter_of
from .checkpoint import (
    PREFIX,
    check_dtype,
    check_finite,
    check_in_memory,
    modules_beside,
    peft_config_of,
    read_config,
    read_mos,
    states_of,
    whole_of,
    writes,
)
from .config import MAX_RANK, POOL_DTYPES, by_pattern, matching_patterns
from .files import CONFIG, WEIGHTS
from .linear import AdaptedLayer
from .ops.checks import check_integer, check_number
from .planner import Base, Kind, LinearType, expert_stacks, group_modules, stacks_among, unwrap
from .pools import ShardPool
from .routing import IndexTables, streams
from .stored import StoredAdapter, StoredType

_FACTOR = {"A": ".lora_A.weight", "B": ".lora_B.weight"}  # what the names of a layer's tensors end in
_NESTED = ".base_layer"  # and what comes between where PEFT wraps a module more than once

# ------------------------------------------------------------------------------------------------ export


def lora_state_dict(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of :func:`export_lora`, without files: what a trainer hands to an inference engine after a step.

    They are where the pools are, share no memory with them, and nothing waits for the device. The engine's LoRA has the
    configuration of :func:`lora_config`. Where FSDP2 has sharded the pools, every rank must call, and all get them.

    Args:
        model: an adapted model, or a PEFT model with MoS adapters; merged or not makes no difference.
        adapter_name: which adapter of a PEFT model; None takes the active one.
        rank: zero-pads to this rank; None keeps the largest r.
        dtype: of the tensors; None keeps the pools'.

    Returns:
        ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``....lora_B.weight`` (out, rank) of every adapted
        module, experts as in :func:`export_lora`. Modules that are trained beside the pools are not among them.

    Raises:
        ValueError, TypeError: as :func:`export_lora`.
    """
    check_dtype(dtype)
    return dict(_lora_tensors(_exported(model, adapter_name, rank), dtype))


def lora_config(model: nn.Module, *, adapter_name: str | None = None, rank: int | None = None) -> dict[str, Any]:
    """The configuration of the LoRA that :func:`lora_state_dict` gives, as arguments of ``peft.LoraConfig``.

    ``r`` and ``lora_alpha`` are the rank, so that the scale, which is in the tensors, is 1 to every engine.

    Args:
        model, adapter_name, rank: as for :func:`lora_state_dict`.

    Raises:
        ValueError, TypeError: as :func:`export_lora`.
    """
    return _lora_config(_exported(model, adapter_name, rank))


def export_lora(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the adapter as a PEFT LoRA checkpoint, which PEFT and LoRA servers load; the logits are the same.

    ``lora_A = A``, ``lora_B = scale * B`` and ``lora_alpha = r``, so that the result does not depend on how a server
    scales; smaller ranks are zero-padded to the largest. Experts are exported as PEFT's ``target_parameters``: of a
    stack of E, A is (r*E, in) with the expert slowest and B (out, r*E) with the expert fastest. The file is as large as
    LoRA of rank r: use :func:`save_adapter` (or ``save_pretrained`` under PEFT) to keep an adapter.

    Args:
        model: an adapted model, or a PEFT model with MoS adapters; merged or not makes no difference.
        path: a directory, made if needed; replaced like in :func:`save_adapter`.
        adapter_name: which adapter of a PEFT model; None takes the active one.
        rank: zero-pads to this rank, which some servers want to be 8, 16, 32 or 64; None keeps the largest r.
        dtype: of the exported matrices; None keeps the pools'.

    Raises:
        ValueError: the model is not adapted, ``rank`` is below r, a PEFT model has several active adapters, or one that
            trains biases; or PEFT would take adapted linears for something else: those of a model with experts that
            are called like what experts were made of in transformers 4, and ``Conv1D`` beside adapted experts.
        TypeError: ``dtype`` is not a float type.
    """
    check_dtype(dtype)
    what = _exported(model, adapter_name, rank)
    config = _lora_config(what)
    tensors = {name: tensor.cpu() for name, tensor in _lora_tensors(what, dtype)}
    if what.peft_config is not None:
        config.update(_trained_beside(what.peft_config, what.model, str(what.adapter_name), tensors))
    else:
        beside = modules_beside(what.model, adapter_of(what.model), 3)
        config["modules_to_save"] = beside or None
        others = states_of(what.model, beside)
        tensors.update({f"{PREFIX}{name}": whole_of(name, value, None).cpu() for name, value in others.items()})
    check_finite(tensors)
    if writes(what.model):
        files.write(Path(path), {WEIGHTS: files.weights(tensors), CONFIG: files.json_content(config)})


@dataclass(frozen=True)
class _Exported:
    """An adapter that can be exported.

    Attributes:
        model: the base model it is on. adapter_name, peft_config: of one of PEFT's, else None.
        layers: the layers that have it. rank: to pad to. places, stacks: see :func:`_lora_places`.
    """

    model: nn.Module
    adapter_name: str | None
    peft_config: Any
    layers: Mapping[str, AdaptedLayer]
    rank: int
    places: Mapping[str, tuple[ShardPool, int]]
    stacks: Mapping[str, list[str]]


def _exported(model: nn.Module, adapter_name: str | None, rank: int | None) -> _Exported:
    model, peft_config = unwrap(model), None
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        peft_model: Any = model
        adapter_name = _peft_adapter(peft_model, adapter_name)
        peft_config, model = peft_model.peft_config[adapter_name], peft_model.get_base_model()
    else:
        adapter_of(model)
        if adapter_name is not None:
            raise ValueError(f"adapter_name must be None for a model of one adapter, got {adapter_name!r}")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and layer.has_adapter(adapter_name)
    }
    places, stacks = _lora_places(layers, adapter_name)
    r = max(pool.ranks[k] for pool, k in places.values())
    rank = r if rank is None else rank
    check_integer("rank", rank, 1)
    if rank < r:
        raise ValueError(f"rank must be at least r={r}, got {rank}")
    for name, (pool, _) in places.items():
        check_in_memory(name, pool)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer) and module.has_adapter(adapter_name) and name not in layers:
            raise ValueError(
                f"an exported module must have one name, got one that is also {name}: PEFT would adapt it once"
            )
    return _Exported(model, adapter_name, peft_config, layers, rank, places, stacks)


@torch.no_grad()
def _lora_tensors(what: _Exported, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each, made when it is asked for: a caller that copies them away has one at a time."""
    for name, (pool, k) in what.places.items():
        factors = _lora_factors(pool, k, what.rank, dtype)
        for end, factor in zip(_FACTOR.values(), factors, strict=True):
            yield f"{PREFIX}{name}{end}", factor


def _lora_config(what: _Exported) -> dict[str, Any]:
    modules = {name for name, _ in what.model.named_modules()}
    config: dict[str, Any] = {
        **peft_config_of("LORA", what.model),
        "r": what.rank,
        "lora_alpha": what.rank,
        "lora_dropout": 0.0,
        "target_modules": _lora_targets(modules, {n for n in what.layers if not what.stacks.get(n)}),
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in what.layers.values()),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    if any(what.stacks.values()):
        if config["fan_in_fan_out"]:
            raise ValueError("an export to LoRA must not have Conv1D beside experts, which PEFT refuses, got both")
        parameters = {name.replace(f"{_NESTED}.", ".") for name, _ in what.model.named_parameters()}
        config["target_parameters"] = _lora_targets(parameters, {n for of_one in what.stacks.values() for n in of_one})
    _check_read_as_meant(what.model, config)
    return config


def _peft_adapter(model: Any, adapter_name: str | None) -> str:
    """The name of a MoS adapter of a PEFT model."""
    names = [name for name, config in model.peft_config.items() if str(config.peft_type.value) == "MOS"]
    if adapter_name is None:
        active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given when not exactly one adapter is active, got active {active}")
        adapter_name = active[0]
    if adapter_name not in names:
        raise ValueError(f"adapter_name must be a MoS adapter, one of {names}, got {adapter_name!r}")
    return adapter_name


def _trained_beside(
    peft_config: Any, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Adds ``modules_to_save`` of a PEFT adapter to an export's tensors; returns what its configuration says of it."""
    if peft_config.bias != "none":
        raise ValueError(f"bias must be 'none' for an export to LoRA, got {peft_config.bias!r}")
    for name, wrapper in model.named_modules():
        copies = getattr(wrapper, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and adapter_name in copies:
            for key, value in copies[adapter_name].state_dict().items():
                tensors[f"{PREFIX}{name}.{key}"] = value.detach().cpu()
    saved = peft_config.modules_to_save
    return {"task_type": peft_config.task_type, "modules_to_save": None if saved is None else sorted(saved)}


def _lora_places(
    layers: Mapping[str, AdaptedLayer], adapter_name: str | None
) -> tuple[dict[str, tuple[ShardPool, int]], dict[str, list[str]]]:
    """What PEFT calls the LoRA layers that stand for adapters -> pool and number; and a layer's stacks of experts.

    PEFT wraps an experts module once for each of its parameters, in their order: the last one is outermost.
    """
    places, stacks = {}, {}
    for name, layer in layers.items():
        parts = layer.parts(adapter_name)
        stacks[name] = [f"{name}.{parameter}" for parameter, (pool, _) in parts.items() if pool.experts]
        for depth, part in enumerate(reversed(parts.values())):
            places[name + depth * _NESTED] = part
    return places, stacks


def _lora_factors(pool: ShardPool, layer: int, rank: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A and scale * B as PEFT has them, padded to a rank."""
    a, b = pool.factors(layer)
    r, target = a.shape[-2], dtype or a.dtype
    padded_a = a.new_zeros(*a.shape[:-2], rank, a.shape[-1], dtype=target)
    padded_b = b.new_zeros(*b.shape[:-1], rank, dtype=target)
    padded_a[..., :r, :], padded_b[..., :r] = a, pool.scales[layer] * b
    if pool.experts:
        return padded_a.flatten(0, 1), padded_b.permute(1, 2, 0).flatten(1)
    return padded_a, padded_b


def _check_read_as_meant(model: nn.Module, config: Mapping[str, Any]) -> None:
    """ValueError where PEFT would adapt experts in place of linears.

    In mixtures of experts it takes names of modules for what they were in transformers 4: ``gate_proj`` is a part of
    the experts' ``gate_up_proj`` then, also where it is a dense block's or a shared expert's. The installed PEFT is
    asked.
    """
    if not expert_stacks(model):
        return
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # no PEFT, or one that does not do so
        return
    targets, read = config["target_modules"], LoraConfig(target_modules=list(config["target_modules"]))
    try:
        convert_peft_config_for_transformers(read, model, None)
        lost = sorted(set(targets) - set(read.target_modules or ()))
    except ValueError:  # it misses other parts of the experts
        lost = targets
    if lost:
        raise ValueError(
            f"an export to LoRA must have modules that PEFT adapts, got {', '.join(lost)}, which PEFT takes for the "
            f"experts of a {type(model).__name__}: merge the adapter instead, or leave them out with exclude_modules"
        )


def _lora_targets(names: Iterable[str], adapted: set[str]) -> list[str]:
    """Last name components where they select exactly what is adapted (servers like them short), else full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name in names if name.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == adapted else adapted)


# ------------------------------------------------------------------------------------------------ read

# Fields of PEFT's LoraConfig that do not matter to what the tensors compute, or only beside one that is refused;
# and in the last line those that are read here. Any other must say nothing.
_HARMLESS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "fan_in_fan_out", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"),
)
_NONE = {"bias": "none"}  # how a field says that there is nothing, where that is not false
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights, those that leave the base as it is


def read_adapter(base: Base, folder: Path) -> StoredAdapter:
    """The MoS or LoRA adapter in a directory, see :func:`read_mos` and :func:`read_lora`."""
    of = {"MOS": read_mos, "LORA": read_lora}
    return of[read_config(folder / CONFIG, "MoS", "LoRA")["peft_type"]](base, folder)


def read_lora(base: Base, folder: Path) -> StoredAdapter:
    """The LoRA in a directory, as PEFT writes it, checked whole against the model that it is for.

    Its factors are pools of shards as long as a vector: all A of a linear type are one, all B transposed the other, and
    a layer's table counts its own rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files cannot be read, are damaged or for another model, or what they describe is not the sum of
            a base and low-rank products alone (DoRA, biases, modules saved whole, embeddings, a base that was changed).
    """
    config = read_config(folder / CONFIG, "LoRA")
    strength = _strength_of(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists() and (pickled := (folder / WEIGHTS).with_suffix(".bin")).exists():
        raise ValueError(
            f"{folder} must hold {WEIGHTS}, got {pickled.name}, a pickle, which could run code: never read"
        )
    tensors = files.read_weights(folder / WEIGHTS, None)
    factors = _factors_in(tensors, folder / WEIGHTS)
    stacked = _stacks_in(base, config.get("target_parameters"), folder / CONFIG)
    stacks = {stacked[name]: pair for name, pair in factors.items() if name in stacked}
    of_linears = {name: pair for name, pair in factors.items() if name not in stacked}
    if not factors or of_linears.keys() - base.modules.keys() or stacked.keys() - factors.keys():
        raise ValueError(
            f"{folder / WEIGHTS} must hold factors for modules of this model, a {type(base.modules['']).__name__}, and "
            f"for all that its configuration names as parameters; got {_few(of_linears.keys() - base.modules.keys())} "
            f"too many and {_few(stacked.keys() - factors.keys())} missing"
        )
    known = stacks_among(base.modules)
    try:
        kinds = group_modules(
            [(name, module) for name, module in base.modules.items() if name in of_linears],
            base.modules,
            {name: known[name] for name in known if name in stacks},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} must be an adapter for this model, got: {error}") from None
    factors = {**of_linears, **stacks}
    types = tuple(
        _type_of(kind, stream, modules, [factors[name] for name in modules], strength, folder)
        for stream, (kind, modules) in zip(streams(list(kinds)), kinds.items(), strict=True)
    )
    return StoredAdapter("LoRA", None, max(max(t.linear_type.ranks) for t in types), None, types)


def _few(names: Iterable[str]) -> str:
    """Some of the names, in words."""
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} others" if len(first) > 3 else "") or "none"


@dataclass(frozen=True)
class _Strength:
    """Rank and scale of the modules of a LoRA, by name. PEFT takes the first pattern that matches."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, name: str) -> int:
        return next(iter(matching_patterns(self.rank_pattern, name).values()), self.r)

    def scale(self, name: str) -> float:
        alpha, r = next(iter(matching_patterns(self.alpha_pattern, name).values()), self.alpha), self.rank(name)
        return alpha / sqrt(r) if self.use_rslora else alpha / r


def _strength_of(config: Mapping[str, Any], file: Path) -> _Strength:
    """What a configuration says of ranks and scales. ValueError where it says that something else is computed, too."""
    initial = config.get("init_lora_weights", True)
    if initial not in _INITIAL:
        raise ValueError(
            f"{file} must be of a LoRA whose base is the model's, got init_lora_weights={initial!r}, which changed it: "
            f"let PEFT convert the adapter (path_initial_model_for_weight_conversion)"
        )
    others = {k: v for k, v in config.items() if v and v != _NONE.get(k) and k not in _HARMLESS}
    if others:
        raise ValueError(
            f"{file} must be of a LoRA that adds low-rank products to a base, and nothing else, got "
            f"{', '.join(f'{k}={v!r}' for k, v in others.items())}: merge that adapter instead"
        )

    def rank(name: str, value: object) -> None:
        check_integer(name, value, 1)
        if value > MAX_RANK:  # type: ignore[operator]
            raise ValueError(f"{name} must be at most {MAX_RANK}, got {value}")

    try:
        r, alpha = config.get("r"), config.get("lora_alpha")
        rank("r", r)
        check_number("lora_alpha", alpha)
        return _Strength(
            *(r, alpha, bool(config.get("use_rslora"))),  # type: ignore[arg-type]
            by_pattern("rank_pattern", config.get("rank_pattern"), rank),
            by_pattern("alpha_pattern", config.get("alpha_pattern"), check_number),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold a valid LoRA configuration, got {error}") from None


def _factors_in(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each layer of a file, by PEFT's name of the layer."""
    sides = {
        side: {n.removeprefix(PREFIX).removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}
        for side, end in _FACTOR.items()
    }
    layers = sides["A"].keys() & sides["B"].keys()
    known = {f"{PREFIX}{layer}{end}" for layer in layers for end in _FACTOR.values()}
    if unknown := tensors.keys() - known:
        saved_along = any(f"{_NESTED}.weight" in name for name in unknown)
        remedy = " (PEFT leaves weights of the base out with save_embedding_layers=False)" if saved_along else ""
        raise ValueError(
            f"{file} must hold lora_A.weight and lora_B.weight of each layer, got also {_few(unknown)}{remedy}"
        )
    return {layer: (sides["A"][layer], sides["B"][layer]) for layer in sides["A"]}


def _stacks_in(base: Base, targets: object, file: Path) -> dict[str, str]:
    """PEFT's name of a layer -> that of the stack of experts it adapts, see :func:`_lora_places`."""
    if not isinstance(targets, (list, type(None))) or not all(isinstance(name, str) for name in targets or ()):
        raise ValueError(f"{file} must have a list of names as target_parameters, got {targets!r}")
    ends, known, layers = tuple(f".{name}" for name in targets or ()), stacks_among(base.modules), {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in known):
        of_module = [f"{module}.{own}" for own, value in base.modules[module]._parameters.items() if value is not None]
        targeted = [name for name in of_module if f".{name}".endswith(ends)]
        if others := [name for name in targeted if name not in known]:
            raise ValueError(f"{file} must have stacks of experts as target_parameters, got {_few(others)}")
        layers.update({module + depth * _NESTED: name for depth, name in enumerate(reversed(targeted))})
    return layers


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` in one thread.

    Transposing and copying the 160 MB of a LoRA of rank 16 for 7B parameters takes 0.2 s so, on two cores with work
    for seven; threads of torch's that wait for each other there took 1 to 7.
    """
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        return torch.cat(list(parts))
    (dtype,) = dtypes
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]  # NumPy has no bfloat16
    return torch.from_numpy(np.concatenate([part.view(integer).numpy() for part in parts])).view(dtype)


def _type_of(
    kind: Kind,
    stream: str,
    modules: tuple[str, ...],
    factors: Sequence[tuple[Tensor, Tensor]],
    strength: _Strength,
    folder: Path,
) -> StoredType:
    """One linear type: pools of all its factors, and tables that count."""
    file, count = folder / WEIGHTS, max(1, kind.experts)
    ranks = tuple(strength.rank(name) for name in modules)
    for name, r, pair in zip(modules, ranks, factors, strict=True):
        shapes = (r * count, kind.in_features), (kind.out_features, r * count)
        for side, shape, factor in zip(_FACTOR, shapes, pair, strict=True):
            if factor.shape != shape or factor.dtype not in POOL_DTYPES.values():
                raise ValueError(
                    f"{file} must hold lora_{side} of {name} as floats of shape {shape}, as rank {r} of its "
                    f"configuration and this model have it, got {factor.dtype} {tuple(factor.shape)}"
                )
            check_finite({f"{file}, lora_{side} of {name},": factor})
    # Of experts, A (r * E, in) has them slowest and B (out, r * E) fastest.
    pool_a = _rows([a for a, _ in factors])
    pool_b = _rows([b.unflatten(1, (-1, count)).permute(2, 1, 0).flatten(0, 1) for _, b in factors])
    of_matrices = np.repeat(ranks, count)
    ends = np.cumsum(of_matrices)
    counted = ends[:, None] - max(ranks) + np.arange(max(ranks))  # the last r_k rows of a table are a matrix's own
    table = np.maximum(counted, 0).astype(np.int32)[:, :, None]
    scales = tuple(strength.scale(name) for name in modules)
    return StoredType(LinearType(kind, stream, modules, ranks, scales, IndexTables(table, table)), pool_a, pool_b)
