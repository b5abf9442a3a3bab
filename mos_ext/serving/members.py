"""What a bank says of its adapters: one version of each, as it lies, and reports."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..stored import StoredAdapter
from .arena import Arena, Part, Tables


@dataclass(eq=False)
class Member:
    """One version of an adapter. Beside its name, what is said of it stays; where it lies changes.

    Attributes:
        parts: what it is made of, by arena; shards are empty while it is in memory. rows: of each arena, its own.
        tables: where it lies; None while it is evicted. leases: how many hold it. used: when it was held last.
        named: whether the bank's name still means this version.
    """

    name: str
    stored: StoredAdapter
    parts: dict[Arena, Part]
    rows: dict[Arena, np.ndarray] = field(default_factory=dict)
    tables: dict[Arena, Tables] | None = None
    leases: int = 0
    pinned: bool = False
    used: int = 0
    named: bool = False

    def __post_init__(self) -> None:
        self.counts = {arena: len(part.shards_a) for arena, part in self.parts.items()}
        self.bytes = sum(arena.shard_bytes * n for arena, n in self.counts.items())
        item = next(iter(self.parts)).shards_a.element_size()
        self.lora_bytes = sum(
            int(part.ranks.sum()) * (arena.kind.in_features + arena.kind.out_features) * item
            for arena, part in self.parts.items()
        )
        # As they lie in memory: tables of both sides, ranks and scales, for every matrix of a type.
        self.table_bytes = sum(
            4 * arena.matrices * (2 * part.index_a.shape[1] * arena.shards_per_vector + 2)
            for arena, part in self.parts.items()
        )
        self.stored = replace(self.stored, types=())  # without the shards, which lie elsewhere


class Withdrawn(NamedTuple):
    """A member that nobody may get any more, and where it was: what lies there is still to be carried out."""

    member: Member
    rows: dict[Arena, np.ndarray]
    tables: dict[Arena, Tables] | None


@dataclass(frozen=True)
class MemberReport:
    """One adapter in a :class:`BankReport`.

    Attributes:
        name: its name. kind: "MoS" or "LoRA". r: its largest rank. equivalent_rank: of MoS, the LoRA rank with as
            many parameters; else None. bytes: of its shards. table_bytes: of its tables. lora_bytes: of LoRA of its
            ranks.
        resident: whether it is in the bank's memory, rather than evicted. pinned: whether it stays there.
        leases: how many hold it.
    """

    name: str
    kind: str
    r: int
    equivalent_rank: float | None
    bytes: int
    table_bytes: int
    lora_bytes: int
    resident: bool
    pinned: bool
    leases: int


@dataclass(frozen=True)
class BankReport:
    """What is in a bank: ``print`` it for a table.

    Attributes:
        adapters: those that have names. capacity: bytes for shards, None where the bank grows. used: bytes of
            shards in use, those of versions without a name included. free: the rest; None where the bank grows.
        evictions: how often the bank has evicted an adapter.
    """

    adapters: tuple[MemberReport, ...]
    capacity: int | None
    used: int
    free: int | None
    evictions: int

    def __str__(self) -> str:
        width = max([len(m.name) for m in self.adapters] + [7])
        lines = [f"{'adapter':<{width}}  method     r  budget       bytes      tables  LoRA of r  where"]
        for m in self.adapters:
            where = (
                ("memory" if m.resident else "evicted")
                + ", pinned" * m.pinned
                + f", {m.leases} in use" * bool(m.leases)
            )
            budget = "" if m.equivalent_rank is None else f"{m.equivalent_rank:g}"
            lines.append(
                f"{m.name:<{width}}  {m.kind:<6} {m.r:>5} {budget:>7} {m.bytes:>11,} {m.table_bytes:>11,} "
                f"{m.lora_bytes / m.bytes:>9.1f}x  {where}"
            )
        of = "" if self.capacity is None else f" of {self.capacity:,}"
        lora = sum(m.lora_bytes for m in self.adapters if m.resident)
        lines.append(
            f"{self.used:,}{of} bytes in use; as LoRA of the same ranks, adapters in memory would take {lora:,}"
        )
        return "\n".join(lines)
