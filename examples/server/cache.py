"""Keys and values of sequences that join and leave, and which models can be served from them.

transformers has continuous batching of its own (``generate_batch``), and it is not used: it lays the tokens of all
requests into one row of the order its scheduler likes, which nothing outside learns before the forward, so no route can
be entered for it; its seed and its cache are the whole batch's. A row per sequence asks for nothing private.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Unservable(ValueError):
    """A model that would get wrong answers here, and why."""


class Slots(Cache):
    """Rows of keys and values, (rows, heads, length, width) in every layer, and how many tokens each row has.

    ``forward`` computes tokens of the sequences in neighbouring rows; sequences in use are kept in the first rows, so a
    step reads a view of the cache and copies nothing. Memory is taken by the first forward, all of it.
    """

    def __init__(self, model: nn.Module, rows: int, length: int) -> None:
        super().__init__(layers=[])
        self.rows, self.length = rows, length
        self._model, self._argument = model, cache_argument(model)
        self._short = {"logits_to_keep": 1} if "logits_to_keep" in parameters(model) else {}
        weight = model.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._used = [0] * rows
        # Of the forward at hand: where its tokens go, and what they see.
        self._row = self._column = torch.empty(0)
        self._read, self._width, self._before = slice(0), 0, 0

    def forward(self, first: int, tokens: list[list[int]]) -> Tensor:
        """Float32 logits (n, vocabulary) of the last of ``tokens`` (n, T), of the n sequences from row ``first`` on."""
        rows, new = range(first, first + len(tokens)), len(tokens[0])
        before = [self._used[row] for row in rows]
        for row in rows:
            self._used[row] += new
        where = torch.tensor(before, device=self._device)[:, None] + torch.arange(new, device=self._device)
        self._row, self._column = torch.tensor(rows, device=self._device)[:, None], where
        self._before, self._width, self._read = max(before), max(before) + new, slice(rows.start, rows.stop)
        hidden = torch.arange(self._width, device=self._device) > where[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._device),
            attention_mask=mask[:, None],
            position_ids=where,
            use_cache=True,
            **{self._argument: self},
            **self._short,
        )
        return output.logits[:, -1].float()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores what a layer computed, and gives what it attends to."""
        if layer_idx not in self._stored:
            self._stored[layer_idx] = (self._new(keys), self._new(values))
        found = []
        for store, new in zip(self._stored[layer_idx], (keys, values), strict=True):
            store.transpose(1, 2)[self._row, self._column] = new.transpose(1, 2)
            found.append(store[self._read, :, : self._width])
        return found[0], found[1]

    def _new(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.rows, like.shape[1], self.length, like.shape[3])

    def move(self, source: int, target: int) -> None:
        """The sequence of one row goes on in another, whose own is gone; then the first is empty."""
        self.clear(target)
        length = self._used[target] = self._used[source]
        for store in self._stores():
            store[target, :, :length] = store[source, :, :length]
        self.clear(source)

    def clear(self, row: int) -> None:
        """Forgets a row. What is masked must be finite all the same: a NaN that the last guest left would spread."""
        for store in self._stores():
            store[row, :, : self._used[row]] = 0
        self._used[row] = 0

    def _stores(self) -> list[Tensor]:
        return [store for layer in self._stored.values() for store in layer]

    @property
    def bytes(self) -> int:
        """What it has taken."""
        return sum(store.nbytes for store in self._stores())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest sequence, before the forward at hand; masks and positions do not come from it."""
        return self._before

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """As a cache of one length would answer; a mask that is there is taken as it is."""
        return self._width, 0


def parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Of the model's forward."""
    return dict(inspect.signature(model.forward).parameters)


def cache_argument(model: nn.Module) -> str:
    """What the forward calls a cache: ``past_key_values``, or ``cache`` in newer versions."""
    return "cache" if "cache" in parameters(model) else "past_key_values"


def check(model: nn.Module, length: int) -> None:
    """Unservable if sequences of up to ``length`` tokens, in the rows of one cache, would not be computed right."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise Unservable(f"model must be a decoder that generates, got {type(model).__name__}")
    if getattr(model, "_is_stateful", False):
        raise Unservable(f"model must keep keys and values, got {type(model).__name__}, which keeps a state")
    missing = {"position_ids", "attention_mask", cache_argument(model)} - set(parameters(model))
    if missing:
        raise Unservable(f"model must take {', '.join(sorted(missing))}, got {type(model).__name__}, which does not")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise Unservable(
            f'model must be loaded with attn_implementation="sdpa" or "eager", got "{config._attn_implementation}", '
            "which takes no mask of ours"
        )
    for number, layer in enumerate(DynamicCache(config=model.config).layers):
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        if type(layer) is not DynamicLayer and (window is None or window < length):
            raise Unservable(
                f"model must attend to all tokens in every layer, got a {type(layer).__name__} in layer {number}"
                + (f"; sequences of at most {window} tokens can be served" if window else "")
            )
    trained = getattr(config, "max_position_embeddings", None) or length
    if length > trained:
        raise Unservable(f"length must be at most the model's max_position_embeddings, {trained}, got {length}")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for found in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        limit = found.get("original_max_position_embeddings") or trained
        if found.get("rope_type") in ("dynamic", "longrope") and length > limit:
            raise Unservable(
                f"length must be at most {limit}, got {length}: beyond it a {found['rope_type']} rotation of one "
                "sequence depends on its neighbours' lengths"
            )


@torch.no_grad()
def rehearse(model: nn.Module, length: int) -> None:
    """Unservable unless two sequences of two lengths, in pieces and side by side, get the logits they get alone.

    It finds what no list of architectures has: positions that come from a mask, a cache that is expected to be of one
    length.
    """
    total = min(length, 12)
    slots = Slots(model, 2, total)
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(1, model.get_input_embeddings().num_embeddings, (2, total), generator=draw)
    before = (total // 3, total - 2)  # tokens that are there when they meet for two steps
    for row, (text, count) in enumerate(zip(texts.tolist(), before, strict=True)):
        for part in (text[: count // 2], text[count // 2 : count]):
            slots.forward(row, [part])
    for step in range(2):
        found = slots.forward(0, [text[count + step :][:1] for text, count in zip(texts.tolist(), before, strict=True)])
        for row, count in enumerate(before):
            ids = texts[row : row + 1, : count + step + 1].to(found.device)
            alone = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            error = ((found[row] - alone).norm() / alone.norm()).item()
            # Orders of sums: 1e-6 in float32. In 16 bits a token may go to another expert, hence the room.
            if not error <= (1e-3 if model.dtype == torch.float32 else 0.2):
                raise Unservable(
                    f"model must compute sequences side by side as it computes them alone, got logits that differ by "
                    f"{error:.1e} of their size from {type(model).__name__}"
                )
