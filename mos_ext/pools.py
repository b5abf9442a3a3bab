"""Shard pools: the trainable parameters of an adapter, and the tables that say which layer reads which shards."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import MoSConfig
from .ops.autograd import factor_handles
from .ops.checks import check_index
from .routing import IndexTables, check_ranks, draw_tables


class ShardPool(nn.Module):
    """The A-pool and the B-pool that the L layers of one linear type share, with the index tables of all of them.

    Args:
        config: ranks, sharding and pool dtype.
        in_features, out_features: of every layer that reads from this pool; divisible by ``config.shards_per_vector``.
        num_layers: L, the number of layers that share it.
        linear_type: names the random stream of the tables.
        tables: ready-made tables instead of a draw, (L, r, l) int32 each.
        device: of pools and tables.

    Attributes:
        a: parameter (n, in/l), U(-1/sqrt(in), 1/sqrt(in)) at first. b: parameter (n, out/l), zeros at first, so a new
            adapter changes nothing.
        index_a, index_b: buffers (L, r, l) int32.

    Raises:
        ValueError, TypeError: features that l does not divide, ranks that L layers cannot have, tables out of range.

    Source: MoS (ICLR 2025); n = e * L * l shards.
    """

    index_a: Tensor
    index_b: Tensor

    def __init__(
        self,
        config: MoSConfig,
        in_features: int,
        out_features: int,
        num_layers: int = 1,
        *,
        linear_type: str = "linear",
        tables: IndexTables | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_ranks(config, in_features, out_features, num_layers)
        self.config, self.in_features, self.out_features, self.num_layers = (
            config,
            in_features,
            out_features,
            num_layers,
        )
        l, n = config.shards_per_vector, config.num_shards(num_layers)
        if tables is None:
            tables = draw_tables(config, linear_type, num_layers)
        for side, table in (("index_a", tables.a), ("index_b", tables.b)):
            tensor = torch.from_numpy(table)
            check_index(side, tensor, n)
            if tensor.shape != (num_layers, config.r, l):
                raise ValueError(f"{side} must have the shape {(num_layers, config.r, l)}, got {tuple(tensor.shape)}")
            self.register_buffer(side, tensor.to(device) if device is not None else tensor.clone())
        dtype = config.torch_pool_dtype
        self.a = nn.Parameter(torch.empty(n, in_features // l, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.empty(n, out_features // l, dtype=dtype, device=device))
        self.reset_parameters()
        self._renew_handles()

    def reset_parameters(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)) with the full ``in``, whatever l; B = 0."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)

    def handle(self, side: str, layer: int) -> Tensor | None:
        """Stand-in that carries a layer's factor gradient to pool ``side`` (``ops/autograd.py``); None if unwanted."""
        pool: Tensor = getattr(self, side)
        if not (torch.is_grad_enabled() and pool.requires_grad):
            return None
        handles = self._handles[side]
        if self._handles_of[side] is pool and handles[layer].requires_grad:
            return handles[layer]
        if torch.compiler.is_compiling() or not isinstance(pool, nn.Parameter):
            # Nothing to keep: a traced handle belongs to its graph, and functional_call puts other tensors here for
            # one call only.
            return factor_handles(pool, [getattr(self, f"index_{side}")[layer]])[0]
        self._renew_handles()
        return self._handles[side][layer]

    def _renew_handles(self) -> None:
        """One set of handles for the parameters as they are now.

        Made ahead of the first forward pass, so that tracers find them.
        """
        with torch.enable_grad():
            self._handles = {
                side: factor_handles(getattr(self, side), list(getattr(self, f"index_{side}"))) for side in "ab"
            }
        for handle in (*self._handles["a"], *self._handles["b"]):
            # torch.compile looks at .grad of every tensor it meets, and torch warns at that look for one that is not a
            # leaf unless the gradient is there. Nobody reads or accumulates this one, and like the handle it has no
            # storage of its own.
            handle.grad = handle.detach()
        self._handles_of = {side: getattr(self, side) for side in "ab"}

    def _apply(self, fn, recurse=True):
        # .to(), .half(), ... may keep the Parameter and swap its data: handles of another device or dtype would refuse
        # gradients.
        super()._apply(fn, recurse)
        self._renew_handles()
        return self

    def __getstate__(self) -> dict:
        # Handles belong to a graph of this very parameter: copies and pickles make their own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_handles_of")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._renew_handles()

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_layers={self.num_layers}, "
            f"num_shards={self.a.shape[0]}, r={c.r}, equivalent_rank={c.equivalent_rank}, "
            f"shards_per_vector={c.shards_per_vector}"
        )
