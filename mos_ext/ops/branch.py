"""The operands of a low-rank branch, as the one value that travels from a layer down to the operators."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Groups(NamedTuple):
    """Rows that are sorted by group, where every group has factors of its own: experts, or adapters of a batch.

    The rows of group g are ``ends[g - 1]`` (0 for the first) to ``ends[g]``; rows beyond the last end belong to nobody,
    get nothing and give nothing.

    Attributes:
        ends: (G,) int32 on x's device, the cumulative number of rows, as of torch's ``grouped_mm``: none below the one
            before, the last at most the number of rows.
        rows: (P,) int32, the row of x and of y that stands at each place of the sorted order, each row at most once;
            None where they are sorted themselves. Everything that has a row per place, ``ends``, S, the dropout mask,
            then counts places.
        ranks: (G,) int32, how many of the r rows of its tables a group uses, the first ones; None for all.
        scales: (G,) float32, what the scale is multiplied by; None for 1.
        invariant: whether what is computed of a row must not depend, to the bit, on which and how many others there
            are.
    """

    ends: Tensor
    rows: Tensor | None = None
    ranks: Tensor | None = None
    scales: Tensor | None = None
    invariant: bool = False


class Recipe(NamedTuple):
    """How a branch is made of its pools; nothing here has a gradient.

    Attributes:
        index_a, index_b: (r, l) int32, the shards of both factors; (G, r, l) with ``groups``. scale: alpha / r.
        dropout: probability in [0, 1), 0 for evaluation.
        seed: (1,) int64, determines the dropout mask; None draws one from torch's generator.
        groups: of rows with factors of their own; None where all rows have the same.
    """

    index_a: Tensor
    index_b: Tensor
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None
    groups: Groups | None = None


class Branch(NamedTuple):
    """What an adapter adds to what its base computes: ``scale * (dropout(x) A^T) B^T``.

    Attributes:
        pool_a, pool_b: (n, d/l) shards, float. handle_a, handle_b: what takes the gradient of a factor in place of the
            pool (``handles.py``); None where the pool takes its own, densely. recipe: the rest.
    """

    pool_a: Tensor
    pool_b: Tensor
    handle_a: Tensor | None
    handle_b: Tensor | None
    recipe: Recipe

    @property
    def features(self) -> tuple[int, int]:
        """Columns of A and of B: of x and of y."""
        return (
            self.pool_a.shape[1] * self.recipe.index_a.shape[-1],
            self.pool_b.shape[1] * self.recipe.index_b.shape[-1],
        )
