"""Shard pools: the trainable parameters of an adapter, and the tables that say which layer reads which shards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import reference
from .config import MoSConfig
from .ops.checks import check_index, check_integer, check_number
from .ops.handles import Stash, factor_handles, run_last
from .planner import LinearType
from .routing import IndexTables, check_ranks, draw_tables


def _stream(pool: Tensor) -> int:
    """The CUDA stream that work is put on now, 0 elsewhere.

    Autograd runs a node on the stream it was made on, which must be the captured one while a graph is captured.
    """
    return torch.cuda.current_stream(pool.device).cuda_stream if pool.is_cuda else 0


class _Side(NamedTuple):
    """What layers use in place of a pool, and what it was made for."""

    pool: Tensor
    table: Tensor
    stream: int
    tables: tuple[Tensor, ...]  # of each layer
    handles: tuple[Tensor, ...]
    stash: Stash
    requires_grad: bool


class ShardPool(nn.Module):
    """The A-pool and the B-pool that the L layers of one linear type share, with the index tables of all of them.

    Args:
        config: ranks, sharding and pool dtype.
        in_features, out_features: of every layer that reads from this pool; divisible by ``config.shards_per_vector``.
        num_layers: L, the number of layers that share it.
        linear_type: names the random stream of the tables.
        ranks, scales: of each layer, where they differ from the configuration's r and scale.
        tables: ready-made tables instead of a draw, (L, max(ranks), l) int32 each.
        device: of pools and tables.

    Attributes:
        a: parameter (n, in/l), U(-1/sqrt(in), 1/sqrt(in)) at first. b: parameter (n, out/l), zeros at first, so a new
            adapter changes nothing.
        index_a, index_b: buffers (L, r, l) int32; :meth:`table` is a layer's own.
        ranks, scales: of each layer; :meth:`set_strength` changes the latter.

    Raises:
        ValueError, TypeError: features that l does not divide, ranks that L layers cannot have, scales that are not
            finite, tables out of range.

    Source: MoS (ICLR 2025); n = e * L * l shards.
    """

    index_a: Tensor
    index_b: Tensor
    _ddp: weakref.ref[DistributedDataParallel] | None = None  # the wrapper that forward last ran in

    def __init__(
        self,
        config: MoSConfig,
        in_features: int,
        out_features: int,
        num_layers: int = 1,
        *,
        linear_type: str = "linear",
        ranks: Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        tables: IndexTables | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, MoSConfig):
            raise TypeError(f"config must be a MoSConfig, got {type(config).__name__}")
        for name, value in (("in_features", in_features), ("out_features", out_features), ("num_layers", num_layers)):
            check_integer(name, value, 1)
            if value >= 2**31:
                raise ValueError(f"{name} must be below 2^31, got {value}")
        if ranks is None:  # before there are as many of them as layers
            check_ranks(config, in_features, out_features, num_layers)
        self.ranks = (config.r,) * num_layers if ranks is None else tuple(ranks)
        self.scales = (config.scale,) * num_layers if scales is None else tuple(scales)
        for name, values in (("ranks", self.ranks), ("scales", self.scales)):
            if len(values) != num_layers:
                raise ValueError(f"{name} must have one entry for each of {num_layers} layers, got {len(values)}")
        for r, scale in zip(self.ranks, self.scales, strict=True):
            config.check_rank("ranks", r)
            check_number("scales", scale)
            check_ranks(config, in_features, out_features, num_layers, r=r)
        self.scales = tuple(float(scale) for scale in self.scales)  # operators take no integer beyond 64 bits
        self._initial_scales, self._strengths = self.scales, [1.0] * num_layers
        self.config, self.in_features, self.out_features, self.num_layers = (
            config,
            in_features,
            out_features,
            num_layers,
        )
        l, n = config.shards_per_vector, config.num_shards(num_layers)
        self.a = nn.Parameter(torch.empty(n, in_features // l, dtype=config.torch_pool_dtype, device=device))
        self.b = nn.Parameter(torch.empty(n, out_features // l, dtype=config.torch_pool_dtype, device=device))
        self.tables = draw_tables(config, linear_type, self.ranks) if tables is None else tables
        for side, table in (("index_a", self.tables.a), ("index_b", self.tables.b)):
            if table.shape != (num_layers, max(self.ranks), l):
                raise ValueError(f"{side} must have the shape {(num_layers, max(self.ranks), l)}, got {table.shape}")
            with torch.device("cpu"):
                check_index(side, torch.from_numpy(table), n)
            self.register_buffer(side, torch.empty(table.shape, dtype=torch.int32, device=self.a.device))
        self.reset_parameters()
        # The only layer of a pool gives it its gradient itself. Not under DDP, which must get one from all passes.
        self.uses_handles = num_layers > 1
        self._sides: dict[str, _Side] = {}
        self._renew()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)) with the full ``in``, whatever l; B = 0; the tables as at construction."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)
        for side, table in (("index_a", self.tables.a), ("index_b", self.tables.b)):
            getattr(self, side).copy_(torch.from_numpy(table))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for side in ("index_a", "index_b"):
            table = state_dict.get(prefix + side)
            if table is not None and table.shape == getattr(self, side).shape:  # torch tells of other shapes
                check_index(prefix + side, table, self.a.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def of(cls, linear_type: LinearType, config: MoSConfig, device: torch.device | str | None) -> ShardPool:
        """The pool of a planned linear type."""
        return cls(
            config,
            linear_type.in_features,
            linear_type.out_features,
            len(linear_type.modules),
            ranks=linear_type.ranks,
            scales=linear_type.scales,
            tables=linear_type.tables,
            device=device,
        )

    def strength(self, layer: int) -> float:
        """What :meth:`set_strength` made of a layer; 1 at first."""
        return self._strengths[layer]

    def set_strength(self, layer: int, strength: float) -> None:
        """Multiplies a layer's product by ``strength``, beside its scale at construction."""
        self._strengths[layer] = strength
        scales = zip(self._initial_scales, self._strengths, strict=True)
        self.scales = tuple(scale * of_layer for scale, of_layer in scales)

    def table(self, side: str, layer: int) -> Tensor:
        """The (r, l) index table of a layer."""
        return self._table(self.index_a if side == "a" else self.index_b, layer)

    def _table(self, tables: Tensor, layer: int) -> Tensor:
        return tables[layer, tables.shape[1] - self.ranks[layer] :]  # the last r rows: private ranks come last

    def operands(self, layer: int) -> dict[str, Any]:
        """What the fused operators need of this pool to compute a layer, gradient handles included."""
        ddp = self._reduced_by()
        pool_a, handle_a, index_a = self._operand("a", self.a, self.index_a, layer, ddp)
        pool_b, handle_b, index_b = self._operand("b", self.b, self.index_b, layer, ddp)
        return {
            "pool_a": pool_a,
            "pool_b": pool_b,
            "index_a": index_a,
            "index_b": index_b,
            "scale": self.scales[layer],
            "handle_a": handle_a,
            "handle_b": handle_b,
        }

    def _operand(
        self, side: str, pool: Tensor, index: Tensor, layer: int, ddp: DistributedDataParallel | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The values of a pool, the handle that takes a layer's gradient instead (or None), and the layer's table."""
        if type(pool) is not nn.Parameter and hasattr(pool, "full_tensor"):
            raise RuntimeError(
                "a pool must be whole while layers use it, got a DTensor: call fully_shard on the blocks and then "
                "on the model, whose forward gathers the pools; not on the pools alone; and call the whole model"
            )
        made = self._sides[side]
        # (Slicing costs an eager layer 3 us; a traced one would take each slice for an input of its graph.)
        known = made.table is index and not torch.compiler.is_compiling()
        table = made.tables[layer] if known else self._table(index, layer)
        handle = self._handle(side, pool, index, layer, ddp) if self.uses_handles else None
        # Where a handle takes the gradient, the pool only gives its values.
        return (pool, None, table) if handle is None else (pool.detach(), handle, table)

    def values(self, side: str) -> Tensor:
        """A pool as a whole tensor. Where FSDP2 has sharded it, that is a collective: every rank must ask."""
        pool = getattr(self, side)
        return pool.full_tensor() if hasattr(pool, "full_tensor") else pool

    def factors(self, layer: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a layer, assembled, in the pools' dtype: its LoRA matrices without the scale."""
        a = reference.gather_concat(self.values("a"), self.table("a", layer))
        return a, reference.gather_concat(self.values("b"), self.table("b", layer)).T

    @torch.no_grad()
    def delta_weight(self, layer: int) -> Tensor:
        """scale * B A (out, in) of a layer, in the accumulation dtype of the pools."""
        tables = (self.table("a", layer), self.values("b"), self.table("b", layer))
        return reference.delta_weight(self.values("a"), *tables, self.scales[layer])

    def marks(self) -> tuple[tuple[Tensor, int], ...]:
        """Tells later whether pools and tables are still these, unchanged in place: compare with :meth:`unchanged`."""
        return tuple((tensor, tensor._version) for tensor in (self.a, self.b, self.index_a, self.index_b))

    def unchanged(self, marks: tuple[tuple[Tensor, int], ...]) -> bool:
        """Whether nothing has changed since :meth:`marks`. (Writing to ``.data`` cannot be seen.)"""
        return all(a is b and v == w for (a, v), (b, w) in zip(marks, self.marks(), strict=True))

    def handle(self, side: str, layer: int) -> Tensor | None:
        """Stand-in that carries a layer's factor gradient to pool ``side`` (``ops/handles.py``).

        None when no gradient is wanted, or when it must go to the pool itself: ``functional_call`` and ``torch.func``
        put other tensors here for one call, and a tracer that meets a replaced parameter must not keep what it makes.
        """
        return self._handle(side, getattr(self, side), getattr(self, f"index_{side}"), layer, self._reduced_by())

    def _handle(
        self, side: str, pool: Tensor, index: Tensor, layer: int, ddp: DistributedDataParallel | None
    ) -> Tensor | None:
        if not (torch.is_grad_enabled() and pool.requires_grad) or not isinstance(pool, nn.Parameter):
            return None
        made = self._sides[side]
        stale = made.pool is not pool or made.table is not index or not made.requires_grad
        if pool.is_cuda and not torch.compiler.is_compiling():
            stale = stale or made.stream != _stream(pool)
        if stale:
            if torch.compiler.is_compiling():
                return None
            self._renew()
            made = self._sides[side]
        return made.handles[layer] if ddp is None else made.stash.open(ddp.find_unused_parameters)[layer]

    def _reduced_by(self) -> DistributedDataParallel | None:
        """The DDP that reduces this pool's gradient, for a layer that is recomputed inside a backward pass."""
        if torch.compiler.is_compiling():
            return None
        ddp = None if self._ddp is None else self._ddp()
        if torch._C._current_graph_task_id() == -1:
            active = DistributedDataParallel._active_ddp_module
            if active is not None and active is not ddp:
                self._ddp, self.uses_handles = weakref.ref(active), True
                run_last(self._sides["a"].handles, True)
            return None
        # With a static graph DDP itself counts how often a gradient is delivered.
        return None if ddp is None or ddp.static_graph else ddp

    def _renew(self) -> None:
        """Handles for the parameters as they are now. Threads find the old ones, or the new.

        Called ahead of the first forward pass too, so that tracers find them.
        """
        # (Tensors that took a parameter's place, as in functional_call, get their gradients without handles.)
        pools = [pool if isinstance(pool, nn.Parameter) else pool.detach() for pool in (self.a, self.b)]
        indices = self.index_a, self.index_b
        tables = [tuple(self._table(index, k) for k in range(self.num_layers)) for index in indices]
        stashes = [Stash(*of) for of in zip(pools, tables, strict=True)]
        with torch.enable_grad():
            handles = factor_handles(pools, tables, stashes)
        run_last(handles[0], self._ddp is not None)
        for handle in (*handles[0], *handles[1]):
            # torch.compile looks at .grad of every tensor it meets, and torch warns at that look for one that is not a
            # leaf unless the gradient is there. Nobody reads or accumulates this one, and like the handle it has no
            # storage of its own.
            handle.grad = handle.detach()
        self._sides = {
            side: _Side(pool, index, _stream(pool), of_layers, standing_in, stash, pool.requires_grad)
            for side, pool, index, of_layers, standing_in, stash in zip(
                "ab", pools, indices, tables, handles, stashes, strict=True
            )
        }

    def _apply(self, fn, recurse=True):
        # .to(), .half(), ... may keep the Parameter and swap its data: handles of another device or dtype would refuse
        # gradients.
        super()._apply(fn, recurse)
        self._renew()
        return self

    def __getstate__(self) -> dict:
        # Handles belong to a graph of this very parameter: copies and pickles make their own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_sides", "_ddp")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._sides = {}
        self._renew()

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_layers={self.num_layers}, "
            f"num_shards={self.a.shape[0]}, r={max(self.ranks)}, equivalent_rank={c.equivalent_rank}, "
            f"shards_per_vector={c.shards_per_vector}"
        )
