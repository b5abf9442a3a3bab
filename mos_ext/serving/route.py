"""Which rows of a batch belong to which adapter, and what its layers add: made once, used by every layer and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional
from ..experts import Routing, call_arguments, run_block
from ..ops.branch import Branch, Groups, Recipe
from ..ops.watch import autocast_dtype, below_autograd, unseen
from .arena import Arena, Tables

ops = torch.ops.mos_ext

# How many numbers of rows a route remembers the order of: more than one step has. A route lives as long as the same
# names come again, and prompts of 64 sequences of every length to 8192 would take 8 GB.
MAX_ROWS = 8

Tabled = Mapping[Arena, Tables]  # what an adapter in memory has, by linear type


# Modules whose linears are given (positions, sequences, features): nothing tells these rows from others'. By the class,
# or the module that it is defined in. In transformers.
POSITIONS_FIRST = (
    *("LongformerSelfAttention", "LEDEncoderSelfAttention", "XLNetFeedForward", "BridgeTowerResidualAttention"),
    *("Mask2FormerMaskedAttentionDecoderLayer", "OneFormerTransformerDecoder", "OneFormerTextEncoder"),
    "transformers.models.fsmt.modeling_fsmt",
)
_TORCHS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # where they say so


def positions_first(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The class of the module above a linear that gives it sequences side by side; or None."""
    parts = name.split(".")
    for above in (modules.get(".".join(parts[:depth])) for depth in range(len(parts))):
        cls, own = type(above), getattr(above, "self_attn", None)
        if (
            (issubclass(cls, _TORCHS) and not getattr(own, "batch_first", True))
            or cls.__name__ in POSITIONS_FIRST
            or cls.__module__ in POSITIONS_FIRST
        ):
            return cls.__name__
    return None


class Layer(NamedTuple):
    """A module of the model as an arena knows it: its number there. ``fresh``: nobody else holds what it returns."""

    arena: Arena
    number: int
    fresh: bool


class Rows(NamedTuple):
    """The rows of a batch, sorted by adapter. As of ``ops.branch.Groups``."""

    ends: Tensor
    rows: Tensor


class Route:
    """A batch whose sequences use different adapters.

    Args:
        adapters: what each sequence's adapter has in memory, or None for the base alone.
        arenas: all that adapters of the bank use, so that compiled models see the same of every route.
        rank: of the tables, at least that of every adapter, so that shapes do not change with routes.
        device: of the tables.

    Attributes:
        sequences: how many there are.
    """

    def __init__(
        self, adapters: Sequence[Tabled | None], arenas: Iterable[Arena], rank: int, device: torch.device
    ) -> None:
        self.sequences, self.device, self.rank = len(adapters), device, rank
        numbers: dict[int, int] = {}  # of each adapter, in the order in which they come
        groups = np.array([numbers.setdefault(id(adapter), len(numbers)) for adapter in adapters])
        self._members = list({id(adapter): adapter for adapter in adapters}.values())
        self._group = torch.from_numpy(groups).to(device)
        self._order = torch.from_numpy(np.argsort(groups, kind="stable")).to(device)
        counts = np.bincount(groups, minlength=self.sequences)  # as many groups as sequences: most have no rows
        self._ends = torch.from_numpy(np.cumsum(counts).astype(np.int32)).to(device)
        self._used = {arena for adapter in self._members if adapter is not None for arena in adapter}
        # Of linears as many groups as there are sequences, whatever the route; of experts, where a group has tables for
        # every expert (201 MB a side for 64 sequences of 48 layers of 128), a power of two.
        self._tables = {
            arena: self._stacked(arena, _power_of_two(len(self._members)) if arena.kind.experts else self.sequences)
            for arena in arenas
        }
        self._rows: dict[int, Rows] = {}
        self._operands: dict[Layer, tuple[Any, ...]] = {}
        self._last_rows = 0  # of a batch whose sequences can be told apart
        self._flat = 0  # rows of one that came before any such

    def _stacked(self, arena: Arena, groups: int) -> Tables:
        """The tables of all groups, (M, groups, r, l) and (M, groups)."""
        m, l, kind = arena.matrices, arena.shards_per_vector, {"dtype": torch.int32, "device": self.device}
        table = torch.zeros(m, self.rank, l, **kind)  # type: ignore[call-overload]
        none = Tables(table, table, torch.zeros(m, **kind), torch.ones(m, device=self.device))  # type: ignore[call-overload]
        own = [none if adapter is None else adapter.get(arena, none) for adapter in self._members]
        own += [none] * (groups - len(own))

        def padded(index: Tensor) -> Tensor:
            missing = self.rank - index.shape[1]
            return nn.functional.pad(index, (0, 0, 0, missing)) if missing else index

        sides = ([padded(t.index_a) for t in own], [padded(t.index_b) for t in own])
        ranks, scales = [t.ranks for t in own], [t.scales for t in own]
        return Tables(*(torch.stack(tensors, dim=1) for tensors in (*sides, ranks, scales)))

    def has(self, layer: Layer) -> bool:
        """Whether adapters of the batch may add something to a layer."""
        return layer.arena in (self._tables if torch.compiler.is_compiling() else self._used)

    # -------------------------------------------------------------------------------------------- rows

    def _sort(self, count: int) -> Rows:
        """``count`` rows, as many for each sequence, one sequence after the other."""
        each = count // self.sequences
        within = torch.arange(each, device=self.device)
        rows = (self._order.unsqueeze(1) * each + within).reshape(-1)
        return Rows(self._ends * each, rows.int())

    def _rows_of(self, x: Tensor) -> Rows:
        """How the rows of x are sorted; made once per number of rows.

        Raises:
            RuntimeError: x does not have the rows of this route's sequences.
        """
        shape = x.shape
        if torch.compiler.is_compiling():
            if shape[0] % self.sequences:
                raise RuntimeError("x must have rows for each of the route's sequences, got another number")
            return self._sort(x.numel() // shape[-1])  # a compiler sees that all layers do the same
        count = 1
        for size in shape[:-1]:
            count *= size
        if len(shape) > 2:
            if shape[0] % self.sequences:
                raise RuntimeError(
                    f"x must have rows for each of the route's {self.sequences} sequences, got {shape[0]} sequences"
                )
            if self._flat not in (0, count):
                flat, self._flat = self._flat, 0
                raise _not_all(count, flat)
            self._last_rows, self._flat = count, 0
        elif count % self.sequences or count != (self._last_rows or count):
            # Of rows that somebody has picked out of a batch, nobody knows whose they are.
            raise _not_all(self._last_rows or f"a multiple of {self.sequences}", count)
        elif not self._last_rows:
            self._flat = count
        if (rows := self._rows.get(count)) is None:
            if len(self._rows) == MAX_ROWS:
                self._rows.clear()
            rows = self._rows[count] = self._sort(count)
        return rows

    # -------------------------------------------------------------------------------------------- layers

    def add(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """y (..., out) plus what the adapters of its rows make of x (..., in). In place, where nobody else has y."""
        if not layer.fresh or torch.is_grad_enabled() or not unseen() or x.dtype != y.dtype or not y.is_contiguous():
            return self._add_differentiably(layer, x, y)
        ends, rows = self._rows_of(x)
        operands = self._operands.get(layer)
        if operands is None:
            operands = self._operands[layer] = self._operands_of(layer)
        *factors, ranks, scales = operands
        rows_of = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        with below_autograd(True):
            ops.grouped_low_rank_(
                y.view(-1, y.shape[-1]), rows_of, *factors, 1.0, 0.0, None, ends, rows, ranks, scales, True
            )
        return y

    def _add_differentiably(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """The same for whoever looks on: autograd, compilers, autocast, modes."""
        rows = self._rows_of(x)
        branch = self._branch(layer, lambda ranks, scales: Groups(rows.ends, rows.rows, ranks, scales, True))
        return functional.add(y, x, branch, in_place=layer.fresh and autocast_dtype(x) is None)

    def _operands_of(self, layer: Layer) -> tuple[Any, ...]:
        """(pool_a, index_a, pool_b, index_b, ranks, scales) of all groups."""
        arena, tables, experts = layer.arena, self._tables[layer.arena], layer.arena.kind.experts
        if experts:
            own = slice(layer.number * experts, (layer.number + 1) * experts)
            a, b, ranks, scales = (t[own].flatten(0, 1) for t in tables)  # expert by expert
        else:
            a, b, ranks, scales = (t[layer.number] for t in tables)
        return arena.shards_a, a, arena.shards_b, b, ranks, scales

    def _branch(self, layer: Layer, groups_of: Any) -> Branch:
        pool_a, a, pool_b, b, ranks, scales = self._operands_of(layer)
        return Branch(pool_a, pool_b, None, None, Recipe(a, b, 1.0, 0.0, None, groups_of(ranks, scales)))

    def run_experts(self, base: nn.Module, layers: Mapping[str, Layer], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """A block of experts with the adapters of its rows; ``layers`` are its parameters'."""
        x, top_k_index, top_k_weights = call_arguments(type(base), base, args, kwargs)
        each = top_k_index.shape[0] // self.sequences
        if top_k_index.shape[0] % self.sequences:
            raise RuntimeError(
                f"experts must be given rows for each of the route's {self.sequences} sequences, got "
                f"{top_k_index.shape[0]} rows"
            )
        used = {name: layer for name, layer in layers.items() if self.has(layer)}
        owners = _power_of_two(len(self._members))
        experts: Any = base.num_experts
        routing = Routing.of(top_k_index, experts, self._group.repeat_interleave(each), owners)
        branches = {
            name: (self._branch(layer, lambda r, s: Groups(routing.group_ends, None, r, s, True)),)
            for name, layer in used.items()
        }
        return run_block(base, x, top_k_weights, routing, branches)


def _not_all(expected: int | str, count: int) -> RuntimeError:
    return RuntimeError(
        f"x must have all rows of a batch, {expected}, got {count}: a layer that is given some of them, or others (one "
        f"expert among several modules, images of several sizes, say) cannot be routed"
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
