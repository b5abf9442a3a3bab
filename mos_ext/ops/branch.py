"""The operands of a low-rank branch, as the one value that travels from a layer down to the operators."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Recipe(NamedTuple):
    """How a branch is made of its pools; nothing here has a gradient.

    Attributes:
        index_a, index_b: (r, l) int32, the shards of both factors. scale: alpha / r.
        dropout: probability in [0, 1), 0 for evaluation.
        seed: (1,) int64, determines the dropout mask; None draws one from torch's generator.
    """

    index_a: Tensor
    index_b: Tensor
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None


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
