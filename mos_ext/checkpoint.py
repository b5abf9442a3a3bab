"""Adapters on disk: MoS checkpoints of a few megabytes, and exact exports to standard LoRA.

A checkpoint is a directory as PEFT writes it, and the same for both: ``adapter_config.json`` with ``peft_type`` MOS,
and ``adapter_model.safetensors`` with each pool once. Index tables follow from the configuration, which holds their
digest; a file carries those that do not, in the smallest integer type. ``docs/format.md`` is the format. What :func:`save_adapter` writes has more in the header of the safetensors file: the
configuration again, so that a directory whose two files do not belong together, after an interrupted save say, is
refused; and the modules of every linear type.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._version import __version__
from .adapt import adapter_of, check_unadapted, install, mos_layers
from .config import POOL_DTYPES, MoSConfig
from .linear import AdaptedLayer
from .ops.checks import check_integer
from .planner import LinearType, device_of, group_modules, select_modules, type_keys, type_name, unwrap
from .pools import ShardPool
from .routing import IndexTables, check_ranks, check_tables, draw_tables, streams, table_digest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT_VERSION = 2
_HEADER_KEY = "mos_ext"  # of the safetensors file
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
POOLS, TABLES = ("shards_a", "shards_b"), ("index_a", "index_b")  # what a file holds of a ShardPool; tables rarely
# What PEFT's configuration has beside MoSConfig's fields, with the values that load_adapter can do with.
_PEFT_DEFAULTS: dict[str, Any] = {"modules_to_save": None, "bias": "none"}
_PEFT_FIELDS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "init_weights", "table_digest", *_PEFT_DEFAULTS),
)


# Only tasks for which PEFT adds no trained head of its own: with SEQ_CLS, say, it would look for a classifier in the
# file.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def _tensor_name(type_key: str, tensor: str) -> str:
    """The name that a tensor of a pool has in a PEFT checkpoint."""
    return f"base_model.mos_{type_key}.{tensor}"


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("adapter files need safetensors: pip install 'mos_ext[io]'") from None
    return safetensors


# ------------------------------------------------------------------------------------------------ save


def save_adapter(model: nn.Module, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Writes the adapter of ``model`` to the directory ``path``.

    Args:
        model: an adapted model; merged or not makes no difference. When FSDP2 has sharded it, every rank must call, and
            the first writes.
        path: a directory, made if needed. Files of an earlier save are replaced only once the new ones are complete on
            disk.
        dtype: what the pools are stored in; None keeps theirs. bfloat16 halves the file.

    Raises:
        ValueError: the model is not adapted, or its pools are on the meta device. TypeError: ``dtype`` is not a float
            type.
    """
    _check_dtype(dtype)
    adapter, model = adapter_of(model), unwrap(model)
    config = {
        **_peft_config("MOS", model),
        **adapter.config.to_dict(),
        "table_digest": table_digest(adapter.tables),
        **_PEFT_DEFAULTS,
        "fan_in_fan_out": any(layer.fan_in_fan_out for _, layer in mos_layers(model)),
        "init_weights": True,
    }
    header = {
        "format_version": FORMAT_VERSION,
        "mos_ext_version": __version__,
        "base_model": type(model).__name__,
        "linear_types": [
            {"role": t.role, "in_features": t.in_features, "out_features": t.out_features, "modules": list(t.modules)}
            for t in adapter.linear_types
        ],
        "adapter_config": config,
    }
    tensors = {}
    names = [t.name for t in adapter.linear_types]
    for name, key, pool in zip(names, type_keys(names), adapter.pools, strict=True):
        _check_in_memory(name, pool)
        for side in POOLS:
            value = pool.values(side[-1]).detach()
            tensors[_tensor_name(key, side)] = value.to("cpu", dtype or value.dtype)
        for side, table in tables_to_keep(pool).items():
            tensors[_tensor_name(key, side)] = table
    _check_finite(tensors)
    if _writes(adapter):
        _save(path, tensors, config, {_HEADER_KEY: json.dumps(header, sort_keys=True)})


def _writes(pools: nn.Module) -> bool:
    """Whether this process writes files: of ranks that hold one sharded adapter together, the first."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in pools.parameters())
    return not sharded or torch.distributed.get_rank() == 0


def _peft_config(peft_type: str, model: nn.Module) -> dict[str, Any]:
    """What every PEFT configuration says of an adapter for ``model``."""
    class_name = type(model).__name__
    return {
        "peft_type": peft_type,
        "task_type": next((task for suffix, task in _TASKS.items() if class_name.endswith(suffix)), None),
        "base_model_name_or_path": _name_or_path(model),
        "inference_mode": True,
    }


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in POOL_DTYPES.values():
        names = ", ".join(f"torch.{name}" for name in POOL_DTYPES)
        raise TypeError(f"dtype must be one of {names} or None, got {dtype!r}")


def _check_in_memory(name: str, pool: ShardPool) -> None:
    if pool.shards_a.device.type == "meta":
        raise ValueError(f"model must have its values in memory, got {name} on the meta device")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite in {tensor.dtype}, got inf or NaN")


def tables_to_keep(pool: ShardPool) -> dict[str, Tensor]:
    """Those of a pool's tables that do not follow from its configuration, in the smallest integer type."""
    if pool.tables.drawn:
        return {}
    largest = pool.shards_a.shape[0] - 1
    smallest = torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32
    tables = (pool.tables.a, pool.tables.b)
    return {side: torch.from_numpy(table).to(smallest) for side, table in zip(TABLES, tables, strict=True)}


def _name_or_path(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _save(path: str | os.PathLike, tensors: dict[str, Tensor], config: dict, header: dict[str, str]) -> None:
    """Both files of a checkpoint: complete under temporary names first, then moved over the old ones.

    ``header`` has one entry: safetensors writes several in random order, and equal adapters should be equal files.
    """
    torch_io = _safetensors().torch
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a directory, got the file {folder}")
    for name in (WEIGHTS, CONFIG):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} must be a file, got a directory")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {k: v.contiguous().clone() for k, v in tensors.items()}
    writers: dict[str, Callable[[Path], Any]] = {
        # save, not save_file: that one makes the file unreadable for everybody else, whatever the umask.
        WEIGHTS: lambda file: file.write_bytes(torch_io.save(whole, metadata=header)),
        CONFIG: lambda file: file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n"),
    }
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name, written in temporary.items():
            os.replace(written, folder / name)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ load


def load_adapter(base_model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Adapts ``base_model`` with a saved adapter, in place, ready for inference or for further training.

    Args:
        base_model: a model that is not adapted, with the modules that the adapter was trained on.
        path: a directory written by :func:`save_adapter`, or by PEFT's ``save_pretrained`` for a MoS adapter that
            trains nothing beside itself (``modules_to_save``, ``bias``).

    Returns:
        ``base_model`` itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are truncated, of another format version, of two different saves, or for another model,
            or their index tables contradict their configuration. Nothing is loaded in part: after an error the model
            is unchanged.
    """
    if not isinstance(base_model, nn.Module):
        raise TypeError(f"base_model must be a torch.nn.Module, got {type(base_model).__name__}")
    model = unwrap(base_model)
    check_unadapted(model)
    folder = Path(path)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path must hold {name}, got {folder}")
    stored = _read_config(folder / CONFIG)
    tensors, header = _read_tensors(folder / WEIGHTS, stored)
    try:
        config = _method_config(stored)
        types = None if header is None else _types_of(header)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} must hold a valid MoS configuration, got {error}") from None
    types = _check_model(model, config, types, folder)
    keys = type_keys([type_name(*key) for key in types])
    linear_types = [
        _stored_type(key, t, stream, modules, config, tensors, folder)
        for key, stream, (t, modules) in zip(keys, streams(list(types)), types.items(), strict=True)
    ]
    _check_pools(keys, linear_types, config, tensors, folder)
    check_digest(stored.get("table_digest"), {t.stream: t.tables for t in linear_types})

    install(model, config, linear_types)
    with torch.no_grad():
        for key, pool in zip(keys, adapter_of(model).pools, strict=True):
            for side in POOLS:
                getattr(pool, side).copy_(tensors[_tensor_name(key, side)])
    return base_model


_Types = dict[tuple[str, int, int], tuple[str, ...]]  # (role, in_features, out_features) -> modules


def _read_config(file: Path) -> dict:
    try:
        stored = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got {error}") from None
    if not isinstance(stored, dict) or stored.get("peft_type") != "MOS":
        got = (
            f"a {stored['peft_type']} adapter"
            if isinstance(stored, dict) and "peft_type" in stored
            else "something else"
        )
        raise ValueError(f"{file} must describe a MoS adapter, got {got}")
    return stored


def _read_tensors(file: Path, stored: dict) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors and our header; None for a file that PEFT wrote, which has none."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_HEADER_KEY)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} must be a complete safetensors file, got {error}") from None
    if text is None:
        return tensors, None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("adapter_config") != stored:
        raise ValueError(
            f"{file} must come from the same save as {CONFIG} beside it, got another configuration in its header"
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} must have format_version {FORMAT_VERSION}, got {header.get('format_version')}")
    return tensors, header


def _method_config(stored: dict) -> MoSConfig:
    """The MoSConfig in a PEFT configuration."""
    for name, only in _PEFT_DEFAULTS.items():
        if stored.get(name, only) != only:
            raise ValueError(
                f"{name} must be {only!r}, got {stored[name]!r}: load this adapter with PEFT "
                f"(peft.PeftModel.from_pretrained, after import mos_ext.integrations.peft), which can train more than "
                f"the adapter"
            )
    values = {name: stored[name] for name in MoSConfig().to_dict() if name in stored}
    values["exclude_modules"] = values.get("exclude_modules") or ()
    if values.get("pool_dtype", ...) is None:  # PEFT's rule: float32, unless told otherwise at every load
        values["pool_dtype"] = "float32"
    unknown = {k: v for k, v in stored.items() if v and k not in values and k not in _PEFT_FIELDS}
    if unknown:
        raise ValueError(f"a MoS configuration must only have fields that this version knows, got {unknown}")
    return MoSConfig.from_dict(values)


def _types_of(header: dict) -> _Types:
    stored = header["linear_types"]
    types = {(t["role"], t["in_features"], t["out_features"]): tuple(t["modules"]) for t in stored}
    if len(types) != len(stored):
        raise ValueError("a linear type that occurs twice")
    return types


def _check_model(model: nn.Module, config: MoSConfig, types: _Types | None, folder: Path) -> _Types:
    """The types that the configuration selects in this model; they must be those of the file, where it names them."""
    try:
        here = group_modules(select_modules(model, config), dict(model.named_modules()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} must be an adapter for this model, a {type(model).__name__}, got: {error}"
        ) from None
    places = {device_of(model.get_submodule(modules[0])) for modules in here.values()}
    if any(place is not None and place.type == "meta" for place in places):
        raise ValueError("base_model must have its values in memory, got parameters on the meta device")
    if types is not None and here != types:
        different = sorted({type_name(*key) for key in set(here) ^ set(types)})
        if not different:
            key = next(key for key in types if here[key] != types[key])
            different = [f"{type_name(*key)} with {len(types[key])} modules where this model has {len(here[key])}"]
        raise ValueError(
            f"{folder} must be an adapter for this model, a {type(model).__name__}, got one "
            f"that differs in {', '.join(different)}"
        )
    return here


def _stored_type(
    type_key: str,
    key: tuple[str, int, int],
    stream: str,
    modules: tuple[str, ...],
    config: MoSConfig,
    tensors: dict[str, Tensor],
    folder: Path,
) -> LinearType:
    """A linear type with the tables of the file, which must fit the configuration, or else the configuration's."""
    name = type_name(*key)
    ranks = tuple(config.rank_of(module) for module in modules)
    for module, r in zip(modules, ranks, strict=True):
        check_ranks(config, key[1], key[2], len(modules), r=r, module=module, linear_type=name)
    scales = tuple(config.scale_of(module) for module in modules)
    stored = {side: tensors.get(_tensor_name(type_key, side)) for side in TABLES}
    try:
        tables = read_tables(stored, config, ranks) or draw_tables(config, stream, ranks)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS}, {name}: {error}") from None
    return LinearType(*key, stream, modules, ranks, scales, tables)


def read_tables(stored: Mapping[str, Tensor | None], config: MoSConfig, ranks: Sequence[int]) -> IndexTables | None:
    """The tables that a file carries for a linear type, of any integer type; None when it carries none.

    Raises:
        ValueError: there is one of two, or they could not be tables of this configuration.
    """
    if all(table is None for table in stored.values()):
        return None
    found = []
    for side, table in stored.items():
        if table is None or table.dtype not in INTEGERS:
            got = "none" if table is None else table.dtype
            raise ValueError(f"{side} must be an integer tensor, like the table of the other side, got {got}")
        found.append(table.cpu().numpy())
    a, b = found
    check_tables(config, IndexTables(a, b), ranks)
    return IndexTables(a.astype(np.int32), b.astype(np.int32))


def check_digest(stored: object, tables: Mapping[str, IndexTables]) -> None:
    """ValueError unless the digest in a configuration is that of these tables, stream -> tables. None passes."""
    if stored is None or stored == (here := table_digest(tables)):
        return
    generator = stored.partition(":")[0] if isinstance(stored, str) else stored
    if generator == here.partition(":")[0]:
        raise ValueError(
            f"table_digest must be that of the index tables that the configuration gives here, {here}, got {stored}: "
            f"the adapter was made with other ranks, another seed, or for modules that are called otherwise"
        )
    raise ValueError(
        f"table_digest must be of generator {here.partition(':')[0]}, the one that this version of mos_ext draws tables "
        f"with, got {stored!r}"
    )


def _check_pools(
    keys: list[str], linear_types: list[LinearType], config: MoSConfig, tensors: dict[str, Tensor], folder: Path
) -> None:
    expected = {_tensor_name(key, tensor) for key in keys for tensor in POOLS}
    allowed = expected | {_tensor_name(key, tensor) for key in keys for tensor in TABLES}
    if not expected <= set(tensors) <= allowed:
        raise ValueError(
            f"{folder / WEIGHTS} must hold the tensors of its configuration, got a difference "
            f"in {sorted((expected - set(tensors)) | (set(tensors) - allowed))}"
        )
    for key, t in zip(keys, linear_types, strict=True):
        n, l = config.num_shards(len(t.modules)), config.shards_per_vector
        for side, features in zip(POOLS, (t.in_features, t.out_features), strict=True):
            name = _tensor_name(key, side)
            pool = tensors[name]
            if pool.shape != (n, features // l) or pool.dtype not in POOL_DTYPES.values():
                raise ValueError(
                    f"{folder / WEIGHTS} must hold {name} as floats of shape {(n, features // l)}, "
                    f"got {pool.dtype} {tuple(pool.shape)}"
                )
            _check_finite({name: pool.to(config.torch_pool_dtype)})


# ------------------------------------------------------------------------------------------------ export


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
    scales; smaller ranks are zero-padded to the largest. The file is as large as LoRA of rank r: use
    :func:`save_adapter` (or ``save_pretrained`` under PEFT) to keep an adapter.

    Args:
        model: an adapted model, or a PEFT model with MoS adapters; merged or not makes no difference.
        path: a directory, made if needed; replaced like in :func:`save_adapter`.
        adapter_name: which adapter of a PEFT model; None takes the active one.
        rank: zero-pads to this rank, which some servers want to be 8, 16, 32 or 64; None keeps the largest r.
        dtype: of the exported matrices; None keeps the pools'.

    Raises:
        ValueError: the model is not adapted, ``rank`` is below r, or a PEFT model has several active adapters, or one
            that trains biases. TypeError: ``dtype`` is not a float type.
    """
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
    pools = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    r = max(pool.ranks[k] for pool, k in pools.values())
    rank = r if rank is None else rank
    check_integer("rank", rank, 1)
    if rank < r:
        raise ValueError(f"rank must be at least r={r}, got {rank}")
    _check_dtype(dtype)
    for name, (pool, _) in pools.items():
        _check_in_memory(name, pool)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer) and module.has_adapter(adapter_name) and name not in layers:
            raise ValueError(
                f"an exported module must have one name, got one that is also {name}: PEFT would adapt it once"
            )
    tensors = {}
    with torch.no_grad():
        for name, (pool, k) in pools.items():
            a, b = pool.factors(k)
            target = dtype or a.dtype
            padded_a, padded_b = (
                a.new_zeros(rank, a.shape[1], dtype=target),
                b.new_zeros(b.shape[0], rank, dtype=target),
            )
            padded_a[: len(a)], padded_b[:, : len(a)] = a, pool.scales[k] * b
            tensors[f"base_model.model.{name}.lora_A.weight"] = padded_a.cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = padded_b.cpu()
    config: dict[str, Any] = {
        **_peft_config("LORA", model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _lora_targets(model, set(layers)),
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    if peft_config is not None:
        config.update(_trained_beside(peft_config, model, str(adapter_name), tensors))
    _check_finite(tensors)
    if all(_writes(pool) for pool, _ in pools.values()):
        _save(path, tensors, config, {"format": "pt"})


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
                tensors[f"base_model.model.{name}.{key}"] = value.detach().cpu()
    saved = peft_config.modules_to_save
    return {"task_type": peft_config.task_type, "modules_to_save": None if saved is None else sorted(saved)}


def _lora_targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last name components where they select exactly the adapted modules (servers like them short), else full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == adapted else adapted)
