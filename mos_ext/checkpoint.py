"""Adapters on disk: MoS checkpoints of a few megabytes, and exact exports to standard LoRA.

A checkpoint is a directory with ``adapter_model.safetensors`` (each pool once, the index tables in the smallest
integer type, so that no file depends on a generator) and ``adapter_config.json``. The same configuration is in the
safetensors header: a directory whose two files do not belong together, after an interrupted save say, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._version import __version__
from .adapt import adapter_of, check_unadapted, install, mos_layers
from .config import POOL_DTYPES, MoSConfig
from .linear import MoSLinear
from .ops.checks import check_integer
from .planner import LinearType, group_modules, select_modules, type_name, unwrap
from .pools import ShardPool
from .routing import IndexTables, check_ranks, check_tables

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT, FORMAT_VERSION = "mos_ext", 1
_CONFIG_KEY = "adapter_config"  # of the safetensors header
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TENSORS = ("pool_a", "pool_b", "index_a", "index_b")


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
        model: an adapted model; merged or not makes no difference.
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
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mos_ext_version": __version__,
        "base_model": {"class": type(model).__name__, "name_or_path": _name_or_path(model)},
        "config": adapter.config.to_dict(),
        "linear_types": [
            {"role": t.role, "in_features": t.in_features, "out_features": t.out_features, "modules": list(t.modules)}
            for t in adapter.linear_types
        ],
    }
    tensors = {}
    for linear_type, pool in zip(adapter.linear_types, adapter.pools, strict=True):
        _check_in_memory(linear_type.name, pool)
        smallest = smallest_integer(pool.a.shape[0] - 1)
        for name, tensor, target in (
            ("pool_a", pool.a, dtype),
            ("pool_b", pool.b, dtype),
            ("index_a", pool.index_a, smallest),
            ("index_b", pool.index_b, smallest),
        ):
            tensors[f"{linear_type.name}.{name}"] = tensor.detach().to("cpu", target or tensor.dtype)
    _check_finite(tensors)
    _save(path, tensors, config, {_CONFIG_KEY: json.dumps(config, sort_keys=True)})


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in POOL_DTYPES.values():
        names = ", ".join(f"torch.{name}" for name in POOL_DTYPES)
        raise TypeError(f"dtype must be one of {names} or None, got {dtype!r}")


def _check_in_memory(name: str, pool: ShardPool) -> None:
    if pool.a.device.type == "meta":
        raise ValueError(f"model must have its values in memory, got {name} on the meta device")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite in {tensor.dtype}, got inf or NaN")


def smallest_integer(largest: int) -> torch.dtype:
    """The smallest torch integer type that holds 0 .. largest."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


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
        path: a directory written by :func:`save_adapter`.

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
    try:
        config = MoSConfig.from_dict(stored["config"])
        types = {(t["role"], t["in_features"], t["out_features"]): tuple(t["modules"]) for t in stored["linear_types"]}
        if len(types) != len(stored["linear_types"]):
            raise ValueError("a linear type that occurs twice")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} must hold a valid MoS configuration, got {error}") from None
    tensors = _read_tensors(folder / WEIGHTS, stored)
    _check_model(model, config, types, folder)
    linear_types = [_stored_type(key, modules, config, tensors, folder) for key, modules in types.items()]
    _check_pools(linear_types, config, tensors, folder)

    install(model, config, linear_types)
    with torch.no_grad():
        for linear_type, pool in zip(linear_types, adapter_of(model).pools, strict=True):
            pool.a.copy_(tensors[f"{linear_type.name}.pool_a"])
            pool.b.copy_(tensors[f"{linear_type.name}.pool_b"])
    return base_model


def _read_config(file: Path) -> dict:
    try:
        stored = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got {error}") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        got = (
            f"a {stored['peft_type']} adapter of PEFT"
            if isinstance(stored, dict) and "peft_type" in stored
            else "something else"
        )
        raise ValueError(f"{file} must describe a mos_ext adapter, got {got}")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} must have format_version {FORMAT_VERSION}, got {stored.get('format_version')}")
    return stored


def _read_tensors(file: Path, stored: dict) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get(_CONFIG_KEY)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} must be a complete safetensors file, got {error}") from None
    try:
        same = header is not None and json.loads(header) == stored
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(
            f"{file} must come from the same save as {CONFIG} beside it, got another configuration in its header"
        )
    return tensors


def _check_model(model: nn.Module, config: MoSConfig, types: dict, folder: Path) -> None:
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError("base_model must have its values in memory, got parameters on the meta device")
    try:
        here = group_modules(select_modules(model, config))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} must be an adapter for this model, a {type(model).__name__}, got: {error}"
        ) from None
    if here != types:
        different = sorted({type_name(*key) for key in set(here) ^ set(types)})
        if not different:
            key = next(key for key in types if here[key] != types[key])
            different = [f"{type_name(*key)} with {len(types[key])} modules where this model has {len(here[key])}"]
        raise ValueError(
            f"{folder} must be an adapter for this model, a {type(model).__name__}, got one "
            f"that differs in {', '.join(different)}"
        )


def _stored_type(
    key: tuple[str, int, int], modules: tuple[str, ...], config: MoSConfig, tensors: dict, folder: Path
) -> LinearType:
    """A linear type with the tables of the file, which must fit the configuration."""
    name = type_name(*key)
    ranks = tuple(config.rank_of(module) for module in modules)
    for module, r in zip(modules, ranks, strict=True):
        check_ranks(config, key[1], key[2], len(modules), r=r, module=module, linear_type=name)
    tables = []
    for side in ("index_a", "index_b"):
        table = tensors.get(f"{name}.{side}")
        if table is None or table.dtype not in _INTEGERS:
            got = "none" if table is None else table.dtype
            raise ValueError(f"{folder / WEIGHTS} must hold an integer tensor {name}.{side}, got {got}")
        tables.append(table.numpy())
    try:
        check_tables(config, IndexTables(*tables), ranks)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}, {name}: {error}") from None
    scales = tuple(config.scale_of(module) for module in modules)
    return LinearType(*key, modules, ranks, scales, IndexTables(*(table.astype(np.int32) for table in tables)))


def _check_pools(linear_types: list[LinearType], config: MoSConfig, tensors: dict, folder: Path) -> None:
    expected = {f"{t.name}.{tensor}" for t in linear_types for tensor in _TENSORS}
    if set(tensors) != expected:
        raise ValueError(
            f"{folder / WEIGHTS} must hold the tensors of its configuration, got a difference "
            f"in {sorted(set(tensors) ^ expected)}"
        )
    for t in linear_types:
        n, l = config.num_shards(len(t.modules)), config.shards_per_vector
        for side, features in (("pool_a", t.in_features), ("pool_b", t.out_features)):
            pool = tensors[f"{t.name}.{side}"]
            if pool.shape != (n, features // l) or pool.dtype not in POOL_DTYPES.values():
                raise ValueError(
                    f"{folder / WEIGHTS} must hold {t.name}.{side} as floats of shape {(n, features // l)}, "
                    f"got {pool.dtype} {tuple(pool.shape)}"
                )
    _check_finite({name: t.to(config.torch_pool_dtype) for name, t in tensors.items() if ".pool_" in name})


# ------------------------------------------------------------------------------------------------ export

# Only tasks for which PEFT adds no trained head of its own: with SEQ_CLS, say, it would look for a classifier in the
# file.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def export_lora(
    model: nn.Module, path: str | os.PathLike, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes the adapter as a PEFT LoRA checkpoint, which PEFT and LoRA servers load; the logits are the same.

    ``lora_A = A``, ``lora_B = (alpha/r) * B`` and ``lora_alpha = r``, so that the result does not depend on how a
    server scales. The file is as large as LoRA of rank r: use :func:`save_adapter` to keep an adapter.

    Args:
        model: an adapted model; merged or not makes no difference.
        path: a directory, made if needed; replaced like in :func:`save_adapter`.
        rank: zero-pads to this rank, which some servers want to be 8, 16, 32 or 64; None keeps r.
        dtype: of the exported matrices; None keeps the pools'.

    Raises:
        ValueError: the model is not adapted, or ``rank`` is below r. TypeError: ``dtype`` is not a float type.
    """
    adapter, model = adapter_of(model), unwrap(model)
    r = max(max(t.ranks) for t in adapter.linear_types)
    rank = r if rank is None else rank
    check_integer("rank", rank, 1)
    if rank < r:
        raise ValueError(f"rank must be at least r={r}, got {rank}")
    _check_dtype(dtype)
    for linear_type, pool in zip(adapter.linear_types, adapter.pools, strict=True):
        _check_in_memory(linear_type.name, pool)
    tensors, layers = {}, dict(mos_layers(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MoSLinear) and name not in layers:
            raise ValueError(
                f"an exported module must have one name, got one that is also {name}: PEFT would adapt it once"
            )
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.factors()
            target = dtype or a.dtype
            padded_a, padded_b = (
                a.new_zeros(rank, a.shape[1], dtype=target),
                b.new_zeros(b.shape[0], rank, dtype=target),
            )
            padded_a[: len(a)], padded_b[:, : len(a)] = a, layer.scale * b
            tensors[f"base_model.model.{name}.lora_A.weight"] = padded_a.cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = padded_b.cpu()
    class_name = type(model).__name__
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next((task for suffix, task in _TASKS.items() if class_name.endswith(suffix)), None),
        "base_model_name_or_path": _name_or_path(model),
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
        "inference_mode": True,
    }
    _check_finite(tensors)
    _save(path, tensors, config, {"format": "pt"})


def _lora_targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last name components where they select exactly the adapted modules (servers like them short), else full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == adapted else adapted)
