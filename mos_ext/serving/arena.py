"""Where the shards of many adapters lie: for every linear type, one tensor a side, and who has which rows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..planner import Kind
from ..stored import StoredType


class Tables(NamedTuple):
    """How the matrices of a linear type are made of an arena's shards, for one adapter.

    Attributes:
        index_a, index_b: (M, r, l) int32, rows of the arena. ranks: (M,) int32, how many of the r rows a matrix has,
            the first ones; 0 where the adapter leaves it alone. scales: (M,) float32.
    """

    index_a: Tensor
    index_b: Tensor
    ranks: Tensor
    scales: Tensor


class Part(NamedTuple):
    """What an adapter has of one linear type, in shards of the arena's size, wherever they will lie.

    Attributes:
        shards_a, shards_b: (n, in/l) and (n, out/l). index_a, index_b: (M', r, l') tables into shards of the adapter's
            own size, l/l' of the arena's each. matrices: (M',) which of the arena's M these are.
        ranks, scales: (M',).
    """

    shards_a: Tensor
    shards_b: Tensor
    index_a: np.ndarray
    index_b: np.ndarray
    matrices: np.ndarray
    ranks: np.ndarray
    scales: np.ndarray


class Arena:
    """The shards of all adapters on one linear type, side by side.

    A shard is the unit of allocation. Tables say where each one lies, so any free rows do: nothing is ever moved, and
    there are no gaps that are too small. An adapter with longer shards is cut into several of the arena's.

    Args:
        kind: role and shape. modules: the names of all that there are in the model.
        shards_per_vector: l. capacity: shards at most, allocated at once; None grows, by half at least.

    Attributes:
        shards_a, shards_b: (n, in/l) and (n, out/l). A tensor that grows is replaced by a longer one that begins with
            the same values; who has the old one may go on with it.
    """

    @torch.inference_mode(False)  # here and below: what is made in inference mode could not be written to outside
    def __init__(
        self,
        kind: Kind,
        modules: Sequence[str],
        shards_per_vector: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None,
    ) -> None:
        self.kind, self.modules, self.capacity = kind, tuple(modules), capacity
        self.shards_per_vector = shards_per_vector
        self.positions = {name: k for k, name in enumerate(self.modules)}
        n = capacity or 0
        self.shards_a = torch.zeros(n, kind.in_features // shards_per_vector, dtype=dtype, device=device)
        self.shards_b = torch.zeros(n, kind.out_features // shards_per_vector, dtype=dtype, device=device)
        self._free = np.arange(n)

    @property
    def matrices(self) -> int:
        """M: all matrices of the type, experts one by one."""
        return len(self.modules) * max(1, self.kind.experts)

    @property
    def shard_bytes(self) -> int:
        """Of a shard of both sides."""
        return (self.shards_a.shape[1] + self.shards_b.shape[1]) * self.shards_a.element_size()

    @property
    def free(self) -> int:
        """Shards that nobody has; of an arena that grows, those that need no growth."""
        return len(self._free)

    def part_of(self, stored: StoredType) -> Part:
        """A linear type of an adapter, cut for this arena, in its dtype.

        Raises:
            ValueError: the adapter has modules that the arena lacks, l does not divide the arena's, or values are too
                large for its dtype.
        """
        t, l = stored.linear_type, stored.linear_type.tables.a.shape[2]
        if unknown := [name for name in t.modules if name not in self.positions]:
            raise ValueError(f"path must be an adapter for the bank's modules, got one with {unknown[0]}")
        if self.shards_per_vector % l:
            raise ValueError(
                f"shards_per_vector of an adapter must divide the bank's for {t.name}, {self.shards_per_vector}, got "
                f"{l}: AdapterBank(shards_per_vector={math.lcm(self.shards_per_vector, l)})"
            )
        count = max(1, t.kind.experts)
        first = np.array([self.positions[name] for name in t.modules]) * count
        ranks = np.repeat(np.array(t.ranks, dtype=np.int32), count)
        a, b = (_first_ranks(table, ranks) for table in (t.tables.a, t.tables.b))
        dtype, (width_a, width_b) = self.shards_a.dtype, (self.shards_a.shape[1], self.shards_b.shape[1])
        shards_a, shards_b = stored.shards_a.to(dtype), stored.shards_b.to(dtype)
        if dtype == torch.float16 and not all(bool(shards.isfinite().all()) for shards in (shards_a, shards_b)):
            raise ValueError(
                f"path must be an adapter whose values fit into the bank's dtype, float16, got larger ones for "
                f"{t.name}: AdapterBank(dtype=torch.float32)"
            )
        return Part(
            shards_a.reshape(-1, width_a),
            shards_b.reshape(-1, width_b),
            a,
            b,
            (first[:, None] + np.arange(count)).ravel(),
            ranks,
            np.repeat(np.array(t.scales, dtype=np.float32), count),
        )

    def take(self, count: int) -> np.ndarray:
        """``count`` free rows, ascending, which are the caller's from now on. There must be as many, or the arena
        grows."""
        if (missing := count - len(self._free)) > 0:
            if self.capacity is not None:
                raise RuntimeError(f"an arena must have {count} free shards, got {len(self._free)}")
            self._grow(missing)
        rows, self._free = self._free[:count], self._free[count:]
        return rows

    def give_back(self, rows: np.ndarray) -> None:
        """Rows of :meth:`take` are free again."""
        self._free = np.sort(np.concatenate((self._free, rows)))

    @torch.inference_mode(False)
    def write(self, rows: np.ndarray, part: Part) -> Tables:
        """Puts an adapter's shards into rows that are its own; where its matrices find them."""
        where = torch.from_numpy(rows).to(self.shards_a.device)
        for shards, values in ((self.shards_a, part.shards_a), (self.shards_b, part.shards_b)):
            if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
                shards[rows[0] : rows[0] + len(rows)].copy_(values)
            else:
                shards.index_copy_(0, where, values.to(shards.device))
        return self._tables(rows, part)

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What lies in some rows, in host memory."""
        where = torch.from_numpy(rows).to(self.shards_a.device)
        return self.shards_a[where].cpu(), self.shards_b[where].cpu()

    def _tables(self, rows: np.ndarray, part: Part) -> Tables:
        cut = self.shards_per_vector // part.index_a.shape[2]
        of_shard = rows.astype(np.int32).reshape(-1, cut)  # an adapter's own shard is these of the arena
        device, matrices = self.shards_a.device, self.matrices

        def spread(values: np.ndarray) -> Tensor:
            out = np.zeros((matrices, *values.shape[1:]), dtype=values.dtype)
            out[part.matrices] = values
            return torch.from_numpy(out).to(device)

        def table(index: np.ndarray) -> Tensor:
            return spread(of_shard[index].reshape(*index.shape[:2], self.shards_per_vector))

        return Tables(table(part.index_a), table(part.index_b), spread(part.ranks), spread(part.scales))

    @torch.inference_mode(False)
    def _grow(self, missing: int) -> None:
        n = self.shards_a.shape[0]
        more = max(missing, n // 2)
        longer = [torch.cat((t, t.new_zeros(more, t.shape[1]))) for t in (self.shards_a, self.shards_b)]
        self.shards_a, self.shards_b = longer
        self._free = np.concatenate((self._free, np.arange(n, n + more)))


def _first_ranks(table: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Tables (M, r, l) of which each matrix uses its last rows, turned so that these come first, in their order."""
    r = table.shape[1]
    if (ranks == r).all():
        return table
    turned = (np.arange(r) + r - ranks[:, None]) % r
    return np.take_along_axis(table, turned[:, :, None], axis=1)
