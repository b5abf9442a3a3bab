"""Shard pools: the trainable parameters of an adapter, and the tables that say which layer reads which shards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel

from . import reference
from .config import MoSConfig
from .merging import version
from .ops.branch import Branch, Recipe
from .ops.checks import check_integer, check_number
from .ops.handles import Stash, Tables, factor_handles, run_last
from .ops.watch import without_autocast
from .planner import LinearType, shape_of, whole
from .routing import IndexTables, check_ranks, draw_tables, invert, origin


def _stream(pool: Tensor) -> int:
    """The CUDA stream that work is put on now, 0 elsewhere.

    Autograd runs a node on the stream it was made on, which must be the captured one while a graph is captured.
    """
    return torch.cuda.current_stream(pool.device).cuda_stream if pool.is_cuda else 0


class _Side(NamedTuple):
    """What layers use in place of a pool, and what it was made for."""

    pool: Tensor
    tables: Tables
    stream: int
    handles: tuple[Tensor, ...]
    stash: Stash
    requires_grad: bool


class ShardPool(nn.Module):
    """The A-pool and the B-pool that the L layers of one linear type share, with the index tables of all of them.

    A layer *calls* the pool, ``pool(layer, training)``, for what it needs of it: whatever sits on modules (offloading,
    casting, sharding, profilers) works on a pool as on any other.

    Args:
        config: ranks, sharding and pool dtype.
        in_features, out_features: of every layer that reads from this pool; divisible by ``config.shards_per_vector``.
        num_layers: L, the number of layers that share it.
        experts: how many matrices each layer stacks, which are as many layers to the pool; 0 for a linear layer. What
            is said of a layer below is said of a stack then: tables (E, r, l), factors (E, r, in) and (E, out, r).
        stream: names the random stream of the tables.
        ranks, scales: of each layer, where they differ from the configuration's r and scale.
        tables: ready-made tables instead of a draw, (L, max(ranks), l) int32 each.
        device: of pools and tables.

    Attributes:
        shards_a: parameter (n, in/l), U(-1/sqrt(in), 1/sqrt(in)) at first.
        shards_b: parameter (n, out/l), zeros at first, so a new adapter changes nothing.
        tables: the index tables in host memory, (L, r, l) int32 each; :meth:`set_tables` replaces them.
        index_a, index_b: the same on the device of the pools. Derived: no buffers and in no ``state_dict``, so nobody
            averages, filters or loses them; made anew wherever the pools move.
        ranks, scales: of each layer; :meth:`set_strength` changes the latter.
        stream: as given.

    Raises:
        ValueError, TypeError: features that l does not divide, ranks that L layers cannot have, scales that are not
            finite, tables out of range.

    Source: MoS (ICLR 2025); n = e * L * l shards.
    """

    index_a: Tensor
    index_b: Tensor
    _branches: dict[int, Branch]  # of calls without gradients
    _ddp: weakref.ref[DistributedDataParallel] | None = None  # the wrapper that forward last ran in
    _waits = False  # whether one gradient is put together from several backward passes, or for several processes
    _replaced = False  # whether somebody else, FSDP2 say, put other parameters here and collects their gradients

    def __init__(
        self,
        config: MoSConfig,
        in_features: int,
        out_features: int,
        num_layers: int = 1,
        *,
        experts: int = 0,
        stream: str = "linear",
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
        check_integer("experts", experts, 0)
        self.experts, matrices = experts, num_layers * max(1, experts)
        if ranks is None:  # before there are as many of them as layers
            check_ranks(config, in_features, out_features, matrices)
        self.ranks = (config.r,) * num_layers if ranks is None else tuple(ranks)
        self.scales = (config.scale,) * num_layers if scales is None else tuple(scales)
        for name, values in (("ranks", self.ranks), ("scales", self.scales)):
            if len(values) != num_layers:
                raise ValueError(f"{name} must have one entry for each of {num_layers} layers, got {len(values)}")
        for r, scale in zip(self.ranks, self.scales, strict=True):
            config.check_rank("ranks", r)
            check_number("scales", scale)
            check_ranks(config, in_features, out_features, matrices, r=r)
        self.scales = tuple(float(scale) for scale in self.scales)  # operators take no integer beyond 64 bits
        self._initial_scales, self._strengths = self.scales, [1.0] * num_layers
        self.config, self.in_features, self.out_features, self.num_layers = (
            config,
            in_features,
            out_features,
            num_layers,
        )
        l, n = config.shards_per_vector, config.num_shards(matrices)
        self._check_tables(tables)
        self.stream = stream
        self.tables = draw_tables(config, stream, self.matrix_ranks) if tables is None else tables
        self.shards_a = nn.Parameter(torch.empty(n, in_features // l, dtype=config.torch_pool_dtype, device=device))
        self.shards_b = nn.Parameter(torch.empty(n, out_features // l, dtype=config.torch_pool_dtype, device=device))
        self.reset_parameters()
        self._sides: dict[str, _Side] = {}
        self._renew()

    @property
    def matrix_ranks(self) -> tuple[int, ...]:
        """The rank of every matrix, experts one by one."""
        return tuple(r for r in self.ranks for _ in range(max(1, self.experts)))

    def _check_tables(self, tables: IndexTables | None) -> None:
        matrices = self.num_layers * max(1, self.experts)
        shape = (matrices, max(self.ranks), self.config.shards_per_vector)
        n = self.config.num_shards(matrices)
        for side, table in () if tables is None else (("index_a", tables.a), ("index_b", tables.b)):
            if table.shape != shape:
                raise ValueError(f"{side} must have the shape {shape}, got {table.shape}")
            if table.dtype != np.int32:
                raise TypeError(f"{side} must be int32, got {table.dtype}")
            low, high = int(table.min()), int(table.max())
            if low < 0 or high >= n:
                raise ValueError(f"{side} must be in [0, {n}), got {low if low < 0 else high}")

    def drawn_tables(self) -> IndexTables:
        """The index tables that follow from the configuration; those in use, mostly."""
        return self.tables if self.tables_are_drawn() else draw_tables(self.config, self.stream, self.matrix_ranks)

    def tables_are_drawn(self) -> bool:
        """Whether the index tables in use follow from the configuration, so that no file needs them."""
        return self.tables.drawn == origin(self.config, self.stream, self.matrix_ranks)

    def set_tables(self, tables: IndexTables) -> None:
        """Replaces the index tables of all layers, (L, r, l) int32 each.

        Raises:
            ValueError, TypeError: another shape or type, or entries that are no shards; nothing changes then.
        """
        self._check_tables(tables)
        self.tables = tables
        self._renew()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)) with the full ``in``, whatever l; B = 0."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.shards_a, -bound, bound)
        nn.init.zeros_(self.shards_b)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._renew()  # load_state_dict(assign=True) puts other parameters here, on another device perhaps

    @classmethod
    def of(cls, linear_type: LinearType, config: MoSConfig, device: torch.device | str | None) -> ShardPool:
        """The pool of a planned linear type."""
        kind = linear_type.kind
        return cls(
            kind.budget(config),
            kind.in_features,
            kind.out_features,
            len(linear_type.modules),
            experts=kind.experts,
            stream=linear_type.stream,
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
        self._branches = {}

    def table(self, side: str, layer: int) -> Tensor:
        """The (r, l) index table of a layer."""
        return self._table(self.index_a if side == "a" else self.index_b, layer)

    def _table(self, tables: Tensor, layer: int) -> Tensor:
        return tables[self._where(layer)].contiguous()

    def _where(self, layer: int) -> tuple[int | slice, slice]:
        """A layer's part of the tables of all."""
        last = slice(-self.ranks[layer], None)  # of the r rows: private ranks come last
        return slice(layer * self.experts, (layer + 1) * self.experts) if self.experts else layer, last

    def forward(self, layer: int, training: bool) -> Branch:
        """What a layer adds to its base, gradient handles included; in ``training`` with dropout."""
        if (known := self._for_inference(layer, training)) is not None:
            return known
        inside = self._inside_backward()
        # The only layer of a pool gives it its gradient itself, once a pass with handles has shown that nothing else
        # does: that saves a node, 10 us of a 64 x 64 layer's 84 on one core of an EPYC.
        # (Not looked at by a tracer, which would take the number of the last pass for a reason to compile anew.)
        direct = not torch.compiler.is_compiling() and self.num_layers == 1 and not self._waits
        direct = direct and self._sides["a"].stash.delivered_in != -1
        pool_a, handle_a, index_a = self._operand("a", self.shards_a, layer, inside, direct)
        pool_b, handle_b, index_b = self._operand("b", self.shards_b, layer, inside, direct)
        recipe = Recipe(index_a, index_b, self.scales[layer], self.config.dropout if training else 0.0)
        return Branch(pool_a, pool_b, handle_a, handle_b, recipe)

    def _for_inference(self, layer: int, training: bool) -> Branch | None:
        """The branch of a call that takes no gradient: the same every time, as long as nobody looks on or changes
        anything. Putting it together anew takes 4.2 us, a fifth of what a 64 x 64 layer adds to its base; this 0.7."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        pool_a, pool_b, sides = self._parameters["shards_a"], self._parameters["shards_b"], self._sides
        if (
            pool_a is not sides["a"].pool
            or pool_b is not sides["b"].pool
            or (training and self.config.dropout > 0.0)
            or self._forward_hooks
            or "forward" in self.__dict__
            or _has_any_global_hook()
            or DistributedDataParallel._active_ddp_module is not None
            or torch._C._current_graph_task_id() != -1
        ):
            return None
        if not self._waits:  # as of any pass without gradients, which may be that of reentrant checkpointing
            self._waits = True  # (1 us for a module)
        branch = self._branches.get(layer)
        if branch is None and type(pool_a) is type(pool_b) is nn.Parameter:  # and whole
            index_a, index_b = (sides[side].tables.indices[layer] for side in "ab")
            branch = Branch(pool_a, pool_b, None, None, Recipe(index_a, index_b, self.scales[layer]))
            self._branches[layer] = branch
        return branch

    def _operand(
        self, side: str, pool: Tensor, layer: int, inside: bool, direct: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The values of a pool, the handle that takes a layer's gradient instead (or None), and the layer's table."""
        if type(pool) is not nn.Parameter and hasattr(pool, "full_tensor"):
            raise RuntimeError(
                "a pool must be whole while layers use it, got a DTensor: call fully_shard on the blocks and then "
                "on the model, whose forward gathers the pools; not on the pools alone; and call the whole model"
            )
        handle = None if direct else self._handle(side, pool, layer, inside)
        # (Slicing costs an eager layer 3 us; a traced one would take each slice for an input of its graph.)
        traced = torch.compiler.is_compiling()
        table = self.table(side, layer) if traced else self._side(side, pool).tables.indices[layer]
        if self._forward_hooks or "forward" in self.__dict__ or _has_any_global_hook():
            # Hooks may put something else into the parameter before the layer is done (casts do), and hang something
            # on what they see (profilers do), though handles are for ever.
            pool = pool.view_as(pool)
            handle = None if handle is None else handle.view_as(handle)
        # Where a handle takes the gradient, the pool only gives its values.
        return (pool, None, table) if handle is None else (pool.detach(), handle, table)

    def _side(self, side: str, pool: Tensor) -> _Side:
        """What was made for a pool, with tables where its values are: offloading replaces parameters at every call."""
        made = self._sides[side]
        if made.pool is not pool and made.tables.indices[0].device != pool.device:
            self._renew()
            made = self._sides[side]
        return made

    def values(self, side: str) -> Tensor:
        """A pool as a whole tensor. Where it is sharded over ranks, that is a collective: every rank must ask."""
        return whole(getattr(self, f"shards_{side}"))

    def factors(self, layer: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a layer, assembled, in the pools' dtype: its LoRA matrices without the scale."""
        a, b = (
            reference.gather_concat(self.values(side), table.flatten(0, -2)).unflatten(0, table.shape[:-1])
            for side in "ab"
            for table in (self.table(side, layer),)
        )
        return a, b.mT

    @torch.no_grad()
    def delta_weight(self, layer: int, expert: int | None = None) -> Tensor:
        """scale * B A (out, in) of a layer, or of one expert of it, in the accumulation dtype of the pools."""
        a, b = (table if expert is None else table[expert] for table in (self.table(side, layer) for side in "ab"))
        with without_autocast(self.shards_a):  # what is merged inside of it must be what is taken out outside
            return reference.delta_weight(self.values("a"), a, self.values("b"), b, self.scales[layer])

    def marks(self) -> tuple[tuple[Any, int], ...]:
        """Tells later whether pools and tables are still these, unchanged in place: compare with :meth:`unchanged`."""
        return (self.tables, 0), *((pool, version(pool)) for pool in (self.shards_a, self.shards_b))

    def unchanged(self, marks: tuple[tuple[Any, int], ...]) -> bool:
        """Whether nothing has changed since :meth:`marks`. (Writing to ``.data`` cannot be seen.)"""
        return all(a is b and v == w for (a, v), (b, w) in zip(marks, self.marks(), strict=True))

    def handle(self, side: str, layer: int) -> Tensor | None:
        """Stand-in that carries a layer's factor gradient to pool ``side`` (``ops/handles.py``).

        None when no gradient is wanted, or when it must go to the pool itself: ``functional_call`` and ``torch.func``
        put other tensors here for one call, and a tracer that meets a replaced parameter must not keep what it makes.
        """
        return self._handle(side, getattr(self, f"shards_{side}"), layer, self._inside_backward())

    def _handle(self, side: str, pool: Tensor, layer: int, inside: bool) -> Tensor | None:
        wanted = torch.is_grad_enabled()
        if not ((wanted or inside) and pool.requires_grad) or not isinstance(pool, nn.Parameter):
            return None
        made = self._sides[side]
        stale = made.pool is not pool or not made.requires_grad
        if pool.is_cuda and not torch.compiler.is_compiling():
            stale = stale or made.stream != _stream(pool)
        if stale:
            if torch.compiler.is_compiling():
                return None
            self._look_for_others()
            self._renew()
            made = self._sides[side]
        # (Without gradients too: a nested checkpoint that is computed now will be computed again in a pass inside.)
        handles = made.stash.open(self._reducer()) if inside else made.handles
        return handles[layer] if wanted else None

    def _inside_backward(self) -> bool:
        """Whether a layer is recomputed inside a backward pass, and must not give the pool a gradient of its own."""
        if torch.compiler.is_compiling():
            return False
        ddp = self._reducer()
        if torch._C._current_graph_task_id() == -1:
            active = DistributedDataParallel._active_ddp_module
            if active is not None and active is not ddp:
                self._ddp, self._waits = weakref.ref(active), True
                run_last(self._sides["a"].handles, True)
            elif not (self._waits or torch.is_grad_enabled()):
                self._waits = True  # the forward pass of reentrant checkpointing, perhaps
            return False
        self._waits = True
        self._look_for_others()
        # FSDP2 reduces what has come together when a pass ends, and is done before any callback of ours. With a static
        # graph DDP itself counts how often a gradient is delivered.
        return not (self._collected() or (ddp is not None and ddp.static_graph))

    def _reducer(self) -> DistributedDataParallel | None:
        return None if self._ddp is None else self._ddp()

    def _look_for_others(self) -> None:
        if self._sides["a"].pool is not self.shards_a and distributed.is_available() and distributed.is_initialized():
            self._replaced = True

    def _collected(self) -> bool:
        """Whether FSDP2 collects this pool's gradients until the pass ends, so that each may come when it is there."""
        return self._replaced and self._ddp is None

    @torch.inference_mode(False)  # whoever moves a model inside of it wants to train it later
    def _renew(self) -> None:
        """Tables and handles for the parameters as they are now. Threads find the old ones, or the new.

        Called ahead of the first forward pass too, so that tracers find them.
        """
        # (Tensors that took a parameter's place, as in functional_call, get their gradients without handles.)
        pools = [pool if isinstance(pool, nn.Parameter) else pool.detach() for pool in (self.shards_a, self.shards_b)]

        def on_device(array: np.ndarray, pool: Tensor) -> Tensor:
            # (torch.tensor, since from_numpy would make real ones among fakes.)
            return torch.tensor(np.ascontiguousarray(array), dtype=torch.int32, device=pool.device)

        shapes = [shape_of(pool) for pool in (self.shards_a, self.shards_b)]
        indices, tables, layers = [], [], range(self.num_layers)
        for table, pool, (n, _) in zip((self.tables.a, self.tables.b), pools, shapes, strict=True):
            indices.append(on_device(table, pool))
            inverse = invert([table[self._where(k)] for k in layers], n)
            of_layers = tuple(self._table(indices[-1], k) for k in layers)
            tables.append(Tables(of_layers, *(on_device(array, pool) for array in inverse)))
        stashes = [Stash(*of) for of in zip(pools, shapes, tables, strict=True)]
        with torch.enable_grad():
            handles = factor_handles(pools, shapes, tables, stashes)
        run_last(handles[0], not self._collected())
        for handle in (*handles[0], *handles[1]):
            # torch.compile looks at .grad of every tensor it meets, and torch warns at that look for one that is not a
            # leaf unless the gradient is there. Nobody reads or accumulates this one, and like the handle it has no
            # storage of its own.
            handle.grad = handle.detach()
        self.index_a, self.index_b, self._branches = *indices, {}
        self._sides = {
            side: _Side(pool, of_layers, _stream(pool), standing_in, stash, pool.requires_grad)
            for side, pool, of_layers, standing_in, stash in zip("ab", pools, tables, handles, stashes, strict=True)
        }

    def _apply(self, fn, recurse=True):
        # .to(), .half(), ... may keep the Parameter and swap its data: handles of another device or dtype would refuse
        # gradients.
        super()._apply(fn, recurse)
        self._renew()
        return self

    def __getstate__(self) -> dict:
        # Handles belong to a graph of this very parameter: copies and pickles make their own.
        derived = ("index_a", "index_b", "_sides", "_branches", "_ddp")
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._sides = {}
        self._renew()

    def extra_repr(self) -> str:
        c, experts = self.config, f"experts={self.experts}, " if self.experts else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_layers={self.num_layers}, {experts}"
            f"num_shards={self.shards_a.shape[0]}, r={max(self.ranks)}, equivalent_rank={c.equivalent_rank}, "
            f"shards_per_vector={c.shards_per_vector}"
        )
