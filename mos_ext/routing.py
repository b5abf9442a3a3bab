"""The router of MoS: static index tables, which follow from seed and configuration, the same everywhere.

The generator is SplitMix64 used as a counter-based hash: shard m gets the key mix(base + (m + 1) * golden) with a base
that names the seed, the linear type, the layer and the side, and a permutation is the order of the keys. NumPy
supplies sorting and wrapping uint64 arithmetic, nothing random. ``docs/format.md`` says it for other programs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .config import MoSConfig

# Of the draw. It changes when one seed and configuration would give other tables than before; files name it.
GENERATOR = 1
_OF_EXPERTS = "expert_equivalent_rank"
_SORTED = 512  # keys that are sorted whole where a few are wanted
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _keys(names: str | Sequence[str], count: int) -> np.ndarray:
    """``count`` 64-bit keys of the stream called so, or of each (SplitMix64; Steele, Lea & Flood, OOPSLA 2014)."""
    if isinstance(names, str):
        return _keys([names], count)[0]
    hashes = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    with np.errstate(over="ignore"):
        z = np.frombuffer(hashes, "<u8")[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def largest_rank(config: MoSConfig, num_layers: int) -> int:
    """The largest r of a layer whose pool num_layers layers share: no public shard occurs twice in a layer."""
    return config.private_rank + config.num_public_shards(num_layers) // config.shards_per_vector


def check_ranks(
    config: MoSConfig,
    in_features: int,
    out_features: int,
    num_layers: int,
    *,
    r: int | None = None,
    module: str = "the layer",
    linear_type: str = "",
) -> None:
    """ValueError where a rule that needs a shape and a number of layers is broken.

    It names a module and the nearest values that would do. ``r`` is the module's, None the configuration's.
    """
    l, r = config.shards_per_vector, config.r if r is None else r
    for side, features in (("in_features", in_features), ("out_features", out_features)):
        if features % l:
            divisors = [
                d
                for d in range(1, math.gcd(in_features, out_features) + 1)
                if math.gcd(in_features, out_features) % d == 0
            ]
            near = {
                max((d for d in divisors if d < l), default=1),
                min((d for d in divisors if d > l), default=divisors[-1]),
            }
            raise ValueError(
                f"shards_per_vector must divide {side}={features} of {module}, got {l}; "
                f"nearest valid: {' or '.join(map(str, sorted(near)))}, or exclude the module"
            )
    n, named = config.num_shards(num_layers), "equivalent_rank" if type(config.equivalent_rank) is int else _OF_EXPERTS
    if n >= 2**31:
        raise ValueError(
            f"{named} * layers * shards_per_vector must be below 2^31, since shards are numbered in int32, got "
            f"{config.equivalent_rank} * {num_layers} * {l}"
        )
    wanted = config.equivalent_rank * num_layers * l
    if abs(n - wanted) > 1e-9 * wanted:
        raise ValueError(
            f"{named} * experts * layers * shards_per_vector must be a whole number of shards for {module}, got "
            f"{config.equivalent_rank} * {num_layers} * {l} = {wanted:g}; nearest valid: {named}={n}/{num_layers * l}"
        )
    if r > (largest := largest_rank(config, num_layers)):
        needed: float = config.private_rank - (-(r - config.private_rank) // num_layers)
        if named == _OF_EXPERTS:
            needed = config.private_rank + (r - config.private_rank) / num_layers
        of_type = f", whose linear type {linear_type}" if linear_type else ", whose pool"
        raise ValueError(
            f"r must be at most {largest} for {module}{of_type} has {num_layers} adapted "
            f"module{'s' if num_layers > 1 else ''}, "
            f"got {r}; nearest valid: r={largest}, or {named}={needed:g}, or exclude the module"
        )


@dataclass(frozen=True)
class IndexTables:
    """The tables of all layers of one linear type: ``a`` and ``b``, each (L, r, l) int32, entries below the number of
    shards. r is the largest rank among the layers; a layer of rank r_k uses the last r_k rows of its table.

    ``drawn`` is what the tables follow from (:func:`origin`), so that files leave them out; None if they were given.
    """

    a: np.ndarray
    b: np.ndarray
    drawn: tuple | None = None


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """The positions of the smallest keys, in the order of the keys; the first of equal ones first.

    Without sorting all of them: the tables of 48 layers of 128 experts (n = 24,576) took 32 s so, and take 0.9.
    """
    if not 0 < count < len(keys):
        return np.argsort(keys, kind="stable")[:count]
    limit = np.partition(keys, count - 1)[count - 1]
    candidates = np.flatnonzero(keys <= limit)
    return candidates[np.argsort(keys[candidates], kind="stable")][:count]


def _public_draws(config: MoSConfig, stream: str, ranks: Sequence[int]) -> np.ndarray:
    """(L, (r-p)*l) public shards without repetition in a layer; across layers independent or level."""
    num_layers, p, l = len(ranks), config.private_rank, config.shards_per_vector
    n_public, wanted = config.num_public_shards(num_layers), (max(ranks) - p) * l
    draws = np.empty((num_layers, wanted), dtype=np.int32)
    if config.routing == "random" and n_public <= _SORTED:
        # All layers at once: the 448 tables of a Llama of 32 blocks take 1.5 ms so, and 5.9 one by one.
        keys = _keys([f"{config.seed}/{stream}/{layer}" for layer in range(num_layers)], n_public)
        draws[:] = np.argsort(keys, axis=1, kind="stable")[:, :wanted]
        return draws
    uses = np.zeros(n_public, dtype=np.int64)
    for layer, rank in enumerate(ranks):
        keys = _keys(f"{config.seed}/{stream}/{layer}", n_public)
        if config.routing == "random":
            draws[layer] = _smallest(keys, wanted)
        else:
            # The least used shards, ties broken at random: use counts never differ by more than one. Those that the
            # layer uses come last.
            chosen, used = np.lexsort((keys, uses))[:wanted], (rank - p) * l
            uses[chosen[:used]] += 1
            halves = (chosen[used:], chosen[:used])
            draws[layer] = np.concatenate([half[np.argsort(keys[half], kind="stable")] for half in halves])
    return draws


def draw_tables(config: MoSConfig, linear_type: str, ranks: Sequence[int]) -> IndexTables:
    """The index tables of a linear type whose adapted modules have these ranks.

    Private vectors are the last p ranks of a layer and stay paired: both sides hold the same range. ``linear_type``
    names the random stream (:func:`streams`).
    """
    r, num_layers, p, l = max(ranks), len(ranks), config.private_rank, config.shards_per_vector
    n_public = config.num_public_shards(num_layers)
    private = n_public + np.arange(num_layers * p * l, dtype=np.int32).reshape(num_layers, p * l)

    def side(name: str) -> np.ndarray:
        public = _public_draws(config, f"{linear_type}/{name}", ranks)
        return np.concatenate([public, private], axis=1).reshape(num_layers, r, l)

    a = side("a")
    return IndexTables(a, side("b") if config.pair_dissociation else a.copy(), origin(config, linear_type, ranks))


def invert(tables: Sequence[np.ndarray], num_shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each shard is used: ``starts`` (num_shards + 1,) and ``places`` (entries, 2), int32.

    Shard m is at places[starts[m]] to places[starts[m + 1]], each the number of a table and a position in it, in
    ascending order.
    """
    entries = np.concatenate([table.ravel() for table in tables])
    sizes = [table.size for table in tables]
    module = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
    position = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    # Sorting keys that say both takes 2 ms for 393,216 entries, a stable argsort of the entries 40.
    order = np.sort(entries.astype(np.int64) << 32 | np.arange(len(entries))) & 0xFFFFFFFF
    starts = np.concatenate(([0], np.cumsum(np.bincount(entries, minlength=num_shards)))).astype(np.int32)
    return starts, np.stack((module[order], position[order]), axis=1)


def origin(config: MoSConfig, stream: str, ranks: Sequence[int]) -> tuple:
    """All that a draw depends on."""
    shape = config.equivalent_rank, config.private_rank, config.shards_per_vector, tuple(ranks)
    return stream, config.seed, config.routing, config.pair_dissociation, shape


def streams(types: Sequence[tuple]) -> list[str]:
    """The random stream of each linear type (role, in_features, out_features, ...) of a plan.

    It is named after the part of the role inside the numbered block, ``self_attn.q_proj[64->64]``: what the blocks hang
    on may be called otherwise where an adapter is loaded. A name that occurs again, as a decoder's after an encoder's,
    gets its number.
    """
    names: list[str] = []
    for role, fan_in, fan_out, *_ in types:
        name = f"{role.partition('*.')[2] or role}[{fan_in}->{fan_out}]"
        count = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{count}" if count else name)
    return names


def table_digest(tables: Mapping[str, IndexTables]) -> str:
    """What a file says of the tables of its adapter, stream -> tables: the generator's version and a SHA-256."""
    digest = hashlib.sha256()
    for stream in sorted(tables):
        for side in (tables[stream].a, tables[stream].b):
            digest.update(f"{stream} {side.shape}\n".encode())
            digest.update(np.ascontiguousarray(side, dtype="<i4").tobytes())
    return f"{GENERATOR}:{digest.hexdigest()}"


def check_tables(config: MoSConfig, tables: IndexTables, ranks: Sequence[int]) -> None:
    """ValueError unless the tables could have come from this configuration, of any generator.

    Shapes, ranges, no repetition, private ranks, pairing.
    """
    r, num_layers, p, l = max(ranks), len(ranks), config.private_rank, config.shards_per_vector
    n_public = config.num_public_shards(num_layers)
    for side, table in (("index_a", tables.a), ("index_b", tables.b)):
        if table.shape != (num_layers, r, l):
            raise ValueError(
                f"{side} must have the shape {(num_layers, r, l)} of its configuration, got {tuple(table.shape)}"
            )
        public, private = table[:, : r - p].reshape(num_layers, -1), table[:, r - p :].reshape(num_layers, -1)
        if public.size and not (public.min() >= 0 and public.max() < n_public):
            raise ValueError(f"{side} must use public shards in [0, {n_public}), got {public.min()} to {public.max()}")
        ordered = np.sort(public, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"{side} must not use a public shard twice in one layer")
        if not np.array_equal(private.ravel(), n_public + np.arange(num_layers * p * l)):
            raise ValueError(f"{side} must end with the {p} private ranks of each layer, in order")
    if not config.pair_dissociation and not np.array_equal(tables.a, tables.b):
        raise ValueError("index_b must equal index_a when pair_dissociation is False")
