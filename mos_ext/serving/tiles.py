"""Products with a weight in tiles of always as many rows, so that no row's bits depend on how many others there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Libraries choose their loops by the shapes of a product: float32 products of MKL differ between 1, 2 and 16 rows, and
# are the same for multiples of 16. Every product of one weight has one shape here, and so one choice.
TILE = 16


class in_tiles(TorchFunctionMode):
    """``with in_tiles():`` the products of linears are made tile by tile."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.addmm and not kwargs:  # transformers' Conv1D
            bias, x, weight = args
            return _linear(x, weight.T, bias)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    count = rows.shape[0]
    padded = nn.functional.pad(rows, (0, 0, 0, -count % TILE))
    tiles = [nn.functional.linear(tile, weight, bias) for tile in padded.split(TILE)]
    y = torch.cat(tiles)[:count] if tiles else nn.functional.linear(rows, weight, bias)
    return y.reshape(*input.shape[:-1], weight.shape[0])
