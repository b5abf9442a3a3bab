"""Adapters on disk: MoS checkpoints of a few megabytes, and exact exports to standard LoRA.

A checkpoint is a directory as PEFT writes it, and the same for both: ``adapter_config.json`` with ``peft_type`` MOS,
and ``adapter_model.safetensors`` with each pool once, and with the modules that were trained beside the pools. Index
tables follow from the configuration, which holds their digest; a file carries those that do not, in the smallest
integer type. ``docs/format.md`` is the format.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import files
from .adapt import POOLS as ADAPTER
from .adapt import Adapter, adapter_of, after_install, check_unadapted, install, mos_layers
from .config import POOL_DTYPES, MoSConfig
from .files import CONFIG, FORMAT_VERSION, WEIGHTS
from .linear import AdaptedLayer
from .planner import (
    Base,
    Kind,
    LinearType,
    device_of,
    is_sharded,
    kinds_of,
    linear_type,
    type_keys,
    unwrap,
    whole,
)
from .pools import ShardPool
from .routing import IndexTables, check_tables, streams, table_digest
from .stored import StoredAdapter, StoredType

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
POOLS, TABLES = ("shards_a", "shards_b"), ("index_a", "index_b")  # what a file holds of a ShardPool; tables rarely
_EXPONENTS = {  # the integers to read floats as, and there the bits of their exponents, all of them set in inf and NaN
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
DIGEST = "index_tables"  # an empty tensor of a file is called so, and after the digest of its tables
PREFIX = "base_model.model."  # what PEFT puts before the name of a module of the model
# What PEFT's configuration has beside MoSConfig's fields.
_PEFT_FIELDS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "init_weights", "modules_to_save", "bias"),
    *("format_version", "table_digest", "tensor_digest"),
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


# ------------------------------------------------------------------------------------------------ save


def save_adapter(model: nn.Module, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Writes the adapter of ``model`` to the directory ``path``, with every module that is trained beside the pools.

    Such a module (a norm, a head: whatever has a parameter with ``requires_grad``) is saved whole, as PEFT's
    ``modules_to_save`` are, and so are those that were loaded with the adapter. A warning names trained parameters that
    no module holds which could be saved so: those of adapted layers and of the model itself.

    Args:
        model: an adapted model; merged or not makes no difference. When FSDP2 or ZeRO-3 has sharded it, every rank must
            call, and the first writes.
        path: a directory, made if needed. Files of an earlier save are replaced only once the new ones are complete on
            disk. Saves of several threads leave the files of one of them; loading refuses a mixture that other
            processes, or a crash, have left. A README.md (a model card) is made, or gets a few lines on loading.
        dtype: what the pools are stored in; None keeps theirs. bfloat16 halves the file.

    Raises:
        ValueError: the model is not adapted, or its pools are on the meta device.
        TypeError: ``dtype`` is not a float type.
    """
    contents = _contents(model, Path(path), dtype)
    if contents is not None:
        files.write(Path(path), contents)


def _contents(
    model: nn.Module, folder: Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
) -> dict[str, bytes] | None:
    """Name -> content of an adapter's files; None on ranks that write nothing.

    Values are those of ``state`` where it has them, a ``state_dict()`` that was gathered from a sharded model, say.
    """
    check_dtype(dtype)
    adapter, model = adapter_of(model), unwrap(model)
    names = [t.name for t in adapter.linear_types]
    for name, pool in zip(names, adapter.pools, strict=True):
        check_in_memory(name, pool)
    beside = modules_beside(model, adapter, 4)
    # FSDP2 shards again what it has gathered when a module is asked for its state: all of them before a value is read.
    pools, others = adapter.state_dict(keep_vars=True), states_of(model, beside)
    tensors = {}
    for key, pool in zip(type_keys(names), adapter.pools, strict=True):
        for side in POOLS:
            value = whole_of(f"{ADAPTER}.{key}.{side}", pools[f"{key}.{side}"], state)
            tensors[_tensor_name(key, side)] = value.to("cpu", dtype or value.dtype)
        for side, table in tables_to_keep(pool).items():
            tensors[_tensor_name(key, side)] = table
    digest = table_digest(adapter.tables)
    tensors[f"base_model.{digest_name(digest)}"] = torch.empty(0, device="cpu")
    tensors.update({f"{PREFIX}{name}": whole_of(name, value, state).cpu() for name, value in others.items()})
    check_finite(tensors)
    if state is None and not writes(model):
        return None
    weights = files.weights(tensors)
    config = {
        **peft_config_of("MOS", model),
        **adapter.config.to_dict(),
        "modules_to_save": beside or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for _, layer in mos_layers(model)),
        "init_weights": True,
        "format_version": FORMAT_VERSION,
        "table_digest": digest,
        "tensor_digest": files.tensor_digest(weights),
    }
    adapter.modules_to_save = frozenset(beside)
    return files.with_card(folder, {WEIGHTS: weights, CONFIG: files.json_content(config)})


def digest_name(digest: str) -> str:
    """What a file calls the empty tensor that says which tables its pools were trained with.

    Only tensors get everywhere: to a live model that reads another adapter, or through tools that hand on a dictionary
    of them. And only an empty one stays what it is when they are averaged.
    """
    return f"{DIGEST}.{digest.replace(':', '-')}"


def take_digest(tensors: dict[str, Tensor]) -> str | None:
    """Removes the tensor of :func:`digest_name` from a file's and returns the digest; None when there is none."""
    for name in [name for name in tensors if f".{DIGEST}." in name]:
        del tensors[name]
        return name.rpartition(f".{DIGEST}.")[2].replace("-", ":")
    return None


def whole_of(name: str, value: Tensor, state: Mapping[str, Tensor] | None) -> Tensor:
    """A tensor of a model, whole. Where it is sharded and ``state`` has no copy, that is a collective."""
    if state is not None:
        value = state.get(name, value)
        if is_sharded(value):
            raise ValueError(f"state_dict must have the whole of {name}, whose shards are on several ranks")
    return whole(value).detach()


def modules_beside(model: nn.Module, adapter: Adapter, level: int) -> list[str]:
    """The modules to save with an adapter. Warns, ``level`` frames up, of trained parameters that none of them has."""
    pools = {id(parameter) for parameter in adapter.parameters()}
    named = dict(model.named_modules(remove_duplicate=False))
    adapted = [name for name, module in named.items() if isinstance(module, AdaptedLayer)]

    def separate(name: str) -> bool:
        return bool(name) and not any(f"{a}.".startswith(f"{name}.") or _is_inside(name, [a]) for a in adapted)

    modules: list[str] = []
    lost = []
    for name, module in named.items():
        own = dict(module.named_parameters(name, recurse=False))
        trained = [n for n, parameter in own.items() if parameter.requires_grad and id(parameter) not in pools]
        if (not trained and name not in adapter.modules_to_save) or _is_inside(name, modules):
            continue
        if separate(name):
            modules.append(name)
        else:
            lost += trained
    if lost:
        warnings.warn(
            f"an adapter must be trained alone or with whole modules beside it, got trained {', '.join(lost)}, which "
            f"{'is' if len(lost) == 1 else 'are'} not saved: save the values yourself, or freeze them",
            stacklevel=level,
        )
    # PEFT reads these names as endings: a "norm" of the root is also every other "...norm", which it looks for in the
    # file.
    also = [name for name in named if name.endswith(tuple(modules)) and separate(name)]
    return [name for name in also if not _is_inside(name, also)]


def states_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """What some modules of a model hold, under the model's names."""
    states = {name: model.get_submodule(name).state_dict(keep_vars=True) for name in modules}
    return {
        f"{name}.{key}": value
        for name, values in states.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def writes(model: nn.Module) -> bool:
    """Whether this process writes files: of ranks that hold one sharded model together, the first."""
    sharded = any(map(is_sharded, model.parameters()))
    return not sharded or torch.distributed.get_rank() == 0


class SavePretrained:
    """``model.save_pretrained`` of a model that ``mos_ext.adapt`` or ``mos_ext.load_adapter`` adapted.

    It saves the adapter, as that of a PEFT model does, so that checkpoints of ``transformers.Trainer`` are megabytes.
    ``model.safetensors`` has the same values again under the model's own names: what Trainer resumes from. A *merged*
    model saves itself, as a model that needs no mos_ext.
    """

    # Of a whole model in several files. (A model's own save_pretrained has had more or fewer of them.)
    _NO_MATTER = ("max_shard_size", "safe_serialization", "save_function", "save_peft_format", "save_original_format")

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # a cycle would keep weights in memory until the garbage collector comes

    def __reduce__(self) -> tuple:
        return type(self), (self._model(),)  # a copy belongs to the copy of the model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """See the class.

        Args:
            save_directory, is_main_process, state_dict: as for any transformers model.
            kwargs: those that say how a whole model is laid out in files are ignored.

        Raises:
            ValueError: ``push_to_hub``, ``variant`` or another argument that adapters cannot follow.
        """
        model: Any = self._model()
        if any(layer.merged for _, layer in mos_layers(model)):
            whole = model.state_dict() if state_dict is None else state_dict
            plain = {name: value for name, value in whole.items() if not name.startswith(f"{ADAPTER}.")}
            type(model).save_pretrained(model, save_directory, is_main_process, plain, **kwargs)
            return
        unknown = {name: value for name, value in kwargs.items() if value and name not in self._NO_MATTER}
        if unknown or kwargs.get("safe_serialization", True) is False:
            raise ValueError(
                f"save_pretrained of an adapted model must be called with arguments for adapters, got "
                f"{unknown or {'safe_serialization': False}}"
            )
        folder = Path(save_directory)
        contents = _contents(model, folder, state=state_dict)
        if contents is not None and is_main_process:
            tensors = files.tensors_of(contents[WEIGHTS], folder / WEIGHTS)
            take_digest(tensors)
            types = type_keys([t.name for t in adapter_of(model).linear_types])
            own = {_tensor_name(key, side): f"{ADAPTER}.{key}.{side}" for key in types for side in POOLS}
            own.update({name: name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)})
            resumed = {own[name]: tensor for name, tensor in tensors.items() if name in own}
            files.write(folder, {**contents, "model.safetensors": files.weights(resumed)})


def _give_save_pretrained(model: nn.Module) -> None:
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]


after_install.append(_give_save_pretrained)


def peft_config_of(peft_type: str, model: nn.Module) -> dict[str, Any]:
    """What every PEFT configuration says of an adapter for ``model``."""
    class_name = type(model).__name__
    return {
        "peft_type": peft_type,
        "task_type": next((task for suffix, task in _TASKS.items() if class_name.endswith(suffix)), None),
        "base_model_name_or_path": _name_or_path(model),
        "inference_mode": True,
    }


def check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in POOL_DTYPES.values():
        names = ", ".join(f"torch.{name}" for name in POOL_DTYPES)
        raise TypeError(f"dtype must be one of {names} or None, got {dtype!r}")


def check_in_memory(name: str, pool: ShardPool) -> None:
    if pool.shards_a.device.type == "meta":
        raise ValueError(f"model must have its values in memory, got {name} on the meta device")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ValueError(f"{name} must be finite in {tensor.dtype}, got inf or NaN")


def _is_finite(tensor: Tensor) -> bool:
    """Of tensors in host memory by their exponents, in one thread.

    23 MB of float32 take 1.2 ms so, and 13 with ``torch.isfinite`` on two cores; far more while a model computes there.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in _EXPONENTS or not tensor.numel():
        return bool(torch.isfinite(tensor).all())
    integer, exponent = _EXPONENTS[tensor.dtype]
    return int((tensor.view(integer).numpy() & exponent).max()) != exponent


def tables_to_keep(pool: ShardPool) -> dict[str, Tensor]:
    """Those of a pool's tables that do not follow from its configuration, in the smallest integer type."""
    if pool.tables_are_drawn():
        return {}
    largest = pool.shards_a.shape[0] - 1
    smallest = torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32
    tables = (pool.tables.a, pool.tables.b)
    return {side: torch.from_numpy(table).to(smallest) for side, table in zip(TABLES, tables, strict=True)}


def _name_or_path(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


# ------------------------------------------------------------------------------------------------ load


def load_adapter(base_model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Adapts ``base_model`` with a saved adapter, in place, ready for inference or for further training.

    Args:
        base_model: a model that is not adapted, with the modules that the adapter was trained on.
        path: a directory written by :func:`save_adapter`, or by PEFT's ``save_pretrained`` for a MoS adapter that
            trains no ``bias``.

    Returns:
        ``base_model`` itself. The pools are trainable, and so are the modules that were saved beside them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files cannot be read, are damaged, of another format version, of two different saves (which may
            be under way), or for another model, or their index tables contradict their configuration. Nothing is
            loaded in part: after an error the model is unchanged.
    """
    if not isinstance(base_model, nn.Module):
        raise TypeError(f"base_model must be a torch.nn.Module, got {type(base_model).__name__}")
    model = unwrap(base_model)
    check_unadapted(model)
    folder = Path(path)
    stored = read_mos(Base.of(model), folder)
    config = cast(MoSConfig, stored.config)
    _check_base_in_memory(model, stored)
    values, modules = _check_beside(model, stored, folder)

    install(model, config, [t.linear_type for t in stored.types])
    adapter = adapter_of(model)
    with torch.no_grad():
        for t, pool in zip(stored.types, adapter.pools, strict=True):
            for side in POOLS:
                getattr(pool, side).copy_(getattr(t, side))
        for target, value in values:
            target.copy_(value)
    adapter.modules_to_save = frozenset(modules)
    for name in modules:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return base_model


def read_mos(base: Base, folder: Path) -> StoredAdapter:
    """The adapter in a directory, checked whole against the model that it is for. Nothing happens to the model.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter`.
    """
    stored = read_config(folder / CONFIG, "MoS")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} must have format_version {FORMAT_VERSION}, got {stored.get('format_version')}"
        )
    tensors = files.read_weights(folder / WEIGHTS, stored.get("tensor_digest"))
    try:
        config = _method_config(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} must hold a valid MoS configuration, got {error}") from None
    types = _types_here(base, config, folder)
    keys = type_keys([kind.name for kind in types])
    digest = take_digest(tensors)
    beside = {name: tensors.pop(name) for name in [name for name in tensors if name.startswith(PREFIX)]}
    check_names(
        {_tensor_name(key, side) for key in keys for side in POOLS},
        {name for name in tensors if name.endswith(POOLS)},
        folder / WEIGHTS,
    )
    linear_types = [
        _stored_type(key, t, stream, modules, config, tensors, folder)
        for key, stream, (t, modules) in zip(keys, streams(list(types)), types.items(), strict=True)
    ]
    _check_pools(keys, linear_types, config, tensors, folder)
    for said in (digest, stored.get("table_digest")):
        check_digest(said, {t.stream: t.tables for t in linear_types})
    patterns = stored.get("modules_to_save")
    if not isinstance(patterns, (list, type(None))) or not all(isinstance(name, str) for name in patterns or ()):
        raise ValueError(f"{folder / CONFIG} must have a list of names as modules_to_save, got {patterns!r}")
    return StoredAdapter(
        method="MoS",
        config=config,
        r=max(max(t.ranks) for t in linear_types),
        equivalent_rank=config.equivalent_rank,
        types=tuple(
            StoredType(t, *(tensors[_tensor_name(key, side)] for side in POOLS))
            for key, t in zip(keys, linear_types, strict=True)
        ),
        modules_to_save=tuple(patterns or ()),
        beside={name.removeprefix(PREFIX): value for name, value in beside.items()},
    )


def _check_base_in_memory(model: nn.Module, stored: StoredAdapter) -> None:
    first = [(t.linear_type.kind, t.linear_type.modules[0]) for t in stored.types]
    places = {device_of(model.get_submodule(n.rpartition(".")[0] if kind.experts else n)) for kind, n in first}
    if any(place is not None and place.type == "meta" for place in places):
        raise ValueError("base_model must have its values in memory, got parameters on the meta device")


def _check_beside(
    model: nn.Module, stored: StoredAdapter, folder: Path
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """What a file has beside the adapter: (tensor of the model, its value) pairs, and the modules to train again.

    Raises:
        ValueError: something is missing, or is not for this model.
    """
    here, beside = model.state_dict(keep_vars=True), stored.beside
    # As PEFT reads them.
    modules = [name for name, _ in model.named_modules() if name and name.endswith(stored.modules_to_save)]
    wanted = {name for name, value in here.items() if _is_inside(name, modules) and isinstance(value, Tensor)}
    if (missing := wanted - set(beside)) or (missing := set(beside) - set(here)):
        raise ValueError(
            f"{folder / WEIGHTS} must hold the modules that were trained beside the adapter, and be for this model, a "
            f"{type(model).__name__}; got a difference in {sorted(missing)}"
        )
    for name, value in beside.items():
        target = here[name]
        if value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            raise ValueError(
                f"{folder / WEIGHTS} must hold {name} as in this model, {target.dtype} {tuple(target.shape)}, got "
                f"{value.dtype} {tuple(value.shape)}"
            )
        if target.is_meta:
            raise ValueError(f"base_model must have its values in memory, got {name} on the meta device")
        check_finite({name: value.to(target.dtype)})
    return [(here[name], value) for name, value in beside.items()], modules


def read_config(file: Path, *methods: str) -> dict[str, Any]:
    """The configuration in a file, which must be of one of these methods.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter`.
    """
    try:
        stored = json.loads(files.read(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got {error}") from None
    there = stored.get("peft_type", ...) if isinstance(stored, dict) else ...
    if there not in [method.upper() for method in methods]:
        got = "something else" if there is ... else f"a {there} adapter"
        raise ValueError(f"{file} must describe a {' or '.join(methods)} adapter, got {got}")
    return stored


def _method_config(stored: dict) -> MoSConfig:
    """The MoSConfig in a PEFT configuration."""
    if (bias := stored.get("bias", "none")) != "none":
        raise ValueError(
            f"bias must be 'none', got {bias!r}: load this adapter with PEFT (peft.PeftModel.from_pretrained, after "
            f"import mos_ext.integrations.peft), which can train biases of the base"
        )
    values = {name: stored[name] for name in MoSConfig().to_dict() if name in stored}
    for name in ("exclude_modules", "target_modules", "target_parameters"):
        values[name] = values.get(name) or ()
    if values.get("pool_dtype", ...) is None:  # PEFT's rule: float32, unless told otherwise at every load
        values["pool_dtype"] = "float32"
    unknown = {k: v for k, v in stored.items() if v and k not in values and k not in _PEFT_FIELDS}
    if unknown:
        raise ValueError(f"a MoS configuration must only have fields that this version knows, got {unknown}")
    return MoSConfig.from_dict(values)


def _types_here(base: Base, config: MoSConfig, folder: Path) -> Mapping[Kind, tuple[str, ...]]:
    """The linear types that the configuration selects in this model."""
    try:
        return kinds_of(base, config)
    except (ValueError, TypeError) as error:
        name = type(base.modules[""]).__name__
        raise ValueError(f"{folder} must be an adapter for this model, a {name}, got: {error}") from None


def check_names(expected: set[str], there: set[str], what: object) -> None:
    """ValueError unless the pools of a file, ``there``, are those of a model. It tells a prefix from another model."""
    if there == expected:
        return
    if prefixes := _prefixes(expected, there):
        was, here = prefixes
        raise ValueError(
            f"{what} must be for this model, got an adapter for one whose modules have the prefix {was!r} where these "
            f"have {here!r}, another class (a base model or ...ForCausalLM, say) or a wrapped one: load it on a model "
            f"like that, or let PEFT rename, with key_mapping={{{f'^mos_{was}'!r}: {f'mos_{here}'!r}}}"
        )
    raise ValueError(
        f"{what} must be for this model, got an adapter without {sorted(expected - there)} and with "
        f"{sorted(there - expected)}"
    )


def _prefixes(expected: set[str], there: set[str]) -> tuple[str, str] | None:
    """(what the types of a file begin with, what those of a model begin with in its place), where that is all."""
    stored, here = ({name.partition("mos_")[2] for name in names} for names in (there, expected))
    for first in sorted(stored)[:1]:
        for other in sorted(here):
            common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first[::-1], other[::-1], strict=False))))
            was, now = first[: len(first) - common], other[: len(other) - common]
            if {now + name.removeprefix(was) for name in stored if name.startswith(was)} == here:
                return was, now
    return None


def _stored_type(
    type_key: str,
    kind: Kind,
    stream: str,
    modules: tuple[str, ...],
    config: MoSConfig,
    tensors: dict[str, Tensor],
    folder: Path,
) -> LinearType:
    """A linear type with the tables of the file, which must fit the configuration, or else the configuration's."""
    stored = {side: tensors.get(_tensor_name(type_key, side)) for side in TABLES}

    def tables_of(budget: MoSConfig, ranks: tuple[int, ...]) -> IndexTables | None:
        try:
            return read_tables(stored, budget, ranks)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / WEIGHTS}, {kind.name}: {error}") from None

    return linear_type(kind, stream, modules, config, tables_of)


def read_tables(stored: Mapping[str, Tensor | None], config: MoSConfig, ranks: Sequence[int]) -> IndexTables | None:
    """The tables that a file carries for a linear type, of any integer type; None when it carries none.

    Raises:
        ValueError: there is one of two, or they could not be tables of this configuration.
    """
    if all(table is None for table in stored.values()):
        return None
    found = {}
    for side, table in stored.items():
        if table is None or table.dtype not in INTEGERS:
            got = "none" if table is None else table.dtype
            raise ValueError(f"{side} must be an integer tensor, like the table of the other side, got {got}")
        found[side] = table.cpu().numpy()
    a, b = (found[side] for side in TABLES)
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
            f"the adapter was made with other ranks, another seed, or for more, fewer or other modules"
        )
    raise ValueError(
        f"table_digest must be of generator {here.partition(':')[0]}, the one that this version of mos_ext draws "
        f"tables with, got {stored!r}"
    )


def _check_pools(
    keys: list[str], linear_types: list[LinearType], config: MoSConfig, tensors: dict[str, Tensor], folder: Path
) -> None:
    allowed = {_tensor_name(key, tensor) for key in keys for tensor in POOLS + TABLES}
    if not set(tensors) <= allowed:
        raise ValueError(
            f"{folder / WEIGHTS} must hold the tensors of its configuration, got also {sorted(set(tensors) - allowed)}"
        )
    for key, t in zip(keys, linear_types, strict=True):
        budget, l = t.kind.budget(config), config.shards_per_vector
        n = budget.num_shards(t.num_matrices)
        for side, features in zip(POOLS, (t.kind.in_features, t.kind.out_features), strict=True):
            name = _tensor_name(key, side)
            pool = tensors[name]
            per_module = budget.equivalent_rank * l * max(1, t.kind.experts)
            if pool.dim() == 2 and pool.shape[1] == features // l and len(pool) % per_module == 0 and len(pool) != n:
                raise ValueError(
                    f"{folder} must be an adapter for this model, got one with {t.name} of {len(pool) / per_module:g} "
                    f"modules where this model has {len(t.modules)}"
                )
            if pool.shape != (n, features // l) or pool.dtype not in POOL_DTYPES.values():
                raise ValueError(
                    f"{folder / WEIGHTS} must hold {name} as floats of shape {(n, features // l)}, "
                    f"got {pool.dtype} {tuple(pool.shape)}"
                )
            check_finite({name: pool.to(config.torch_pool_dtype)})
