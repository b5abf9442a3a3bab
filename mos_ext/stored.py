"""What an adapter's files hold, MoS or LoRA, read and checked: a value that no model has anything to do with yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .config import MoSConfig
from .planner import LinearType


@dataclass(frozen=True)
class StoredType:
    """One linear type of an adapter in a file.

    Attributes:
        linear_type: kind, modules, ranks, scales, and tables (L, r, l) of shards.
        shards_a, shards_b: the pools, (n, in/l) and (n, out/l), floats, in the file's dtype, all finite.
    """

    linear_type: LinearType
    shards_a: Tensor
    shards_b: Tensor


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a file. A LoRA is one too: its shards are whole vectors, and each has one place.

    Attributes:
        method: "MoS" or "LoRA".
        config: the :class:`MoSConfig` of a MoS adapter, else None.
        r: the largest rank.
        equivalent_rank: e of a MoS adapter's linears, else None.
        types: its linear types, in the order of the model's modules.
        modules_to_save: what the configuration says was trained beside the adapter, as endings of names.
        beside: the tensors of that, under the model's names.
    """

    method: str
    config: MoSConfig | None
    r: int
    equivalent_rank: int | None
    types: tuple[StoredType, ...]
    modules_to_save: tuple[str, ...] = ()
    beside: Mapping[str, Tensor] = field(default_factory=dict)
