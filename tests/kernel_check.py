"""Every CPU kernel against NumPy on small integers, where any order of summation gives the same bits. test_kernels.py runs it in a
process of its own: the instruction set is chosen once per process, and sanitizers must be loaded first."""

import mos_kernels as K
import numpy as np

rng = np.random.default_rng(0)


def to_bits(x, dtype):
    if dtype in ("f32", "f64"):
        return x.astype(np.float32 if dtype == "f32" else np.float64)
    if dtype == "f16":
        return x.astype(np.float16).view(np.uint16)
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(x, dtype):
    if dtype == "f16":
        return x.view(np.float16).astype(np.float64)
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def frame(dtype, rows, cols):
    """An array and the part of it that a kernel may write; the rest is 77."""
    outer = np.full((rows + 2, cols), 77.0, dtype)
    return outer, outer[1:-1]


def integers(*shape):
    # Small integers: every product and sum is exact in every type, so any order of summation gives the same bits.
    return rng.integers(-3, 4, shape).astype(np.float64)


# rows, shard, r, l
SHAPES = (
    (0, 3, 1, 1),
    (1, 32, 3, 3),
    (70, 64, 5, 2),
    (130, 544, 17, 2),
    (1, 1, 1, 1),
    (3, 5, 2, 3),
    (17, 257, 5, 1),
    (33, 24, 16, 4),
    (131, 65, 33, 8),
    (1030, 8, 3, 5),
)
# A sixteenth of the rows is a block, 2048 of a block are a chunk: less, one, one and a row, two and a row.
CHUNKS = ((32752, 3, 2, 1), (32768, 1, 1, 1), (32769, 3, 2, 1), (65537, 2, 17, 1))
CHUNKS_OF_TILES = ((32769, 513, 1, 1),)

cases = scattered = 0
for dtype in ("f32", "f64", "bf16", "f16"):
    for pool_dtype in {"f32", dtype}:
        more = CHUNKS + CHUNKS_OF_TILES * (dtype == "bf16") if pool_dtype == dtype else ()
        for rows, shard, r, l in SHAPES + more:
            d, n = shard * l, 2 * r * l
            sums = np.float64 if dtype == "f64" else np.float32
            pool = integers(n, shard)
            index = rng.permutation(n)[: r * l].reshape(r, l).astype(np.int32)
            factor = pool[index].reshape(r, d)
            x, s, y = integers(rows, d), integers(rows, r), integers(rows, d)
            common = {"pool": to_bits(pool, pool_dtype), "pool_dtype": pool_dtype, "index": index, "dtype": dtype}
            for reversed_ in (False, True):
                projected_frame, projected = frame(sums, rows, r)
                grad_frame, grad = frame(sums, r, d)
                wide = np.full((rows + 2, d + 3), to_bits(np.array([5.0]), dtype)[0])
                out = wide[1:-1, 1:-2]
                out[...] = to_bits(y, dtype)
                K.low_rank_pass(
                    **common,
                    input=to_bits(x, dtype),
                    s=s.astype(sums),
                    projected=projected,
                    factor_grad=grad,
                    out=out,
                    accumulate=True,
                    scale=2.0,
                    reversed=reversed_,
                )
                assert (projected == 2 * x @ factor.T).all(), (dtype, rows, r)
                assert (grad == 2 * s.T @ x).all()
                want = y + 2 * s @ factor
                assert (np.asarray(out) == to_bits(want, dtype)).all()
                assert (projected_frame[[0, -1]] == 77).all()
                assert (grad_frame[[0, -1]] == 77).all()
                edge = to_bits(np.array([5.0]), dtype)[0]
                assert (wide[[0, -1]] == edge).all()
                assert (wide[:, 0] == edge).all()
                assert (wide[:, -2:] == edge).all()
                K.low_rank_pass(**common, s=s.astype(sums), out=out, scale=1.0, reversed=reversed_)
                assert (np.asarray(out) == to_bits(s @ factor, dtype)).all()
                pool_grad = np.full((n, shard), 9.0, sums)
                K.scatter_add([grad, grad], "f64" if dtype == "f64" else "f32", [index, index], pool_grad, reversed_)
                want = np.zeros((n, shard))
                np.add.at(want, index.ravel(), 2 * (2 * s.T @ x).reshape(r * l, shard))
                assert (pool_grad == want).all()
                pool_frame, pool_grad = frame(
                    sums, n, shard
                )  # the pass itself, where it may: once, and zeros elsewhere
                if K.scatters(pool, index, rows):
                    K.low_rank_pass(
                        **common,
                        input=to_bits(x, dtype),
                        s=s.astype(sums),
                        factor_grad=pool_grad,
                        scatter=True,
                        reversed=reversed_,
                    )
                    assert (2 * 2 * pool_grad == want).all()
                    assert (pool_frame[[0, -1]] == 77).all()
                    scattered += 1
                cases += 1
            gathered = np.empty((r, d), common["pool"].dtype)
            K.gather_concat(common["pool"], pool_dtype, index, gathered)
            assert (gathered == common["pool"][index].reshape(r, d)).all()

            # Dropout keeps what the counter says, whatever the tile.
            ones, eye = to_bits(np.ones((rows, d)), dtype), np.zeros((r, d), sums)
            if rows and d <= 300:
                masked = np.zeros((rows, d))
                bits = np.empty((rows, d), np.int64)
                for t in range(rows if rows < 40 else 0):
                    for c in range(d):
                        word = K.philox(2**61 + 5, c // 8, t)[c % 8 // 2]
                        bits[t, c] = word >> 16 * (c % 2) & 0xFFFF
                if rows < 40:
                    keep = bits >= 32768
                    K.low_rank_pass(
                        **common, input=ones, s=np.ones((rows, r), sums), factor_grad=eye, dropout=0.5, seed=2**61 + 5
                    )
                    assert (eye[0] == 2 * keep.sum(0)).all()

# Few rows that share a factor, and as many as there are where results must not depend on them: the factor is read where
# it lies. Shards of whole vectors and of others, many and less than a tile of columns; every remainder of ranks.
for dtype, pool_dtype in (
    ("f32", "f32"),
    ("f64", "f32"),
    ("f64", "f64"),
    *((x, p) for x in ("bf16", "f16") for p in ("f32", x)),
):
    sums = np.float64 if dtype == "f64" else np.float32
    for shard, l in ((16, 3), (17, 5), (31, 2), (100, 1), (192, 4), (333, 7), (1024, 2), (1031, 3)):
        for r in (*range(1, 18), 64) if l in (2, 5) else (3, 64):
            counts = rng.permutation([0, 1, 2, 3, 5, 7, 70])[: 7 if r == 3 else 4]
            d, n, groups, places = shard * l, 2 * r * l, len(counts), counts.sum()
            pool, s = integers(n, shard + 3)[:, 1:-2], integers(places, r)  # rows of odd length
            index = np.stack([rng.permutation(n)[: r * l] for _ in counts]).reshape(groups, r, l).astype(np.int32)
            x, y = integers(places + 2, d + 5)[:, 2:-3], integers(places + 2, d + 1)[:, :-1]
            rows = rng.permutation(places + 2)[:places].astype(np.int32)
            ranks, scales = rng.integers(0, r + 1, groups, np.int32), rng.integers(1, 4, groups).astype(np.float32)
            ranks[0] = r
            ends = np.cumsum(counts).astype(np.int32)
            factors = pool[index].reshape(groups, r, d) * (np.arange(r) < ranks[:, None])[..., None]
            wide_pool = to_bits(np.pad(pool, ((0, 0), (1, 2)), constant_values=np.nan), pool_dtype)
            common = {
                "pool": wide_pool[:, 1:-2],
                "pool_dtype": pool_dtype,
                "index": index,
                "dtype": dtype,
                "ends": ends,
            }
            common |= {"rows": rows, "ranks": ranks, "scales": scales, "scale": 2.0}
            want_projected, added = np.zeros((places, r)), np.zeros(y.shape)
            for factor, scale, end, count in zip(factors, 2 * scales.astype(np.float64), ends, counts, strict=True):
                places_of = slice(end - count, end)
                want_projected[places_of] = scale * x[rows[places_of]] @ factor.T
                added[rows[places_of]] = scale * s[places_of] @ factor
            for invariant in (False, True):
                projected_frame, projected = frame(sums, places, r)
                wide_x = to_bits(np.pad(x, ((0, 0), (2, 3)), constant_values=np.nan), dtype)
                K.low_rank_pass(**common, input=wide_x[:, 2:-3], projected=projected, invariant=invariant)
                assert (projected == want_projected).all(), (dtype, pool_dtype, shard, l, r)
                assert (projected_frame[[0, -1]] == 77).all()
                for accumulate in (True, False):
                    wide = np.full((places + 4, d + 3), to_bits(np.array([5.0]), dtype)[0])
                    out = wide[1:-1, 1:-2]
                    out[...] = to_bits(y, dtype)
                    K.low_rank_pass(**common, s=s.astype(sums), out=out, accumulate=accumulate, invariant=invariant)
                    want = to_bits(y + added if accumulate else added, dtype)
                    assert (np.asarray(out) == want).all(), (dtype, pool_dtype, shard, l, r)
                    assert (wide[[0, -1]] == to_bits(np.array([5.0]), dtype)[0]).all()
                    assert (wide[:, [0, -1, -2]] == to_bits(np.array([5.0]), dtype)[0]).all()
                cases += 1

# Conversions: every half and bfloat16 survives, halfway cases go to even, and specials stay special.
every = np.arange(2**16, dtype=np.uint16)
for dtype in ("f16", "bf16"):
    values = to_float(every, dtype).astype(np.float32)
    back = K.round_trip(dtype, values)
    assert ((back == values) | (np.isnan(back) & np.isnan(values))).all()
    finite = np.sort(np.unique(values[np.isfinite(values)]))
    between = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    probes = np.concatenate(
        [
            between,
            np.nextafter(between.astype(np.float32), np.float32(np.inf)),
            [65519.9, 65520.0, 1e30, 3.3e38, 1e-45, -1e-30, np.inf],
        ]
    ).astype(np.float32)
    with np.errstate(over="ignore"):
        want = probes.astype(np.float16).astype(np.float32) if dtype == "f16" else None
    if want is not None:
        assert (K.round_trip(dtype, probes) == want).all()
    else:
        ties = (finite[1:].view(np.uint32) >> 16) & 1
        positive = finite[:-1] >= 0
        rounded = K.round_trip(dtype, between.astype(np.float32))
        expected = np.where(ties == 0, finite[1:], finite[:-1])
        assert (rounded[positive] == expected[positive]).all()
assert K.first_bad_index(np.array([0, 3, 2], np.int32), 3) == 1
assert K.first_bad_index(np.array([0, 1, 2], np.int32), 3) == -1
# One block of rows, vectors that do not straddle shards, no shard twice.
once, twice = np.array([[0, 1], [2, 3]], np.int32), np.array([[0, 1], [2, 1]], np.int32)
assert [K.scatters(np.zeros((5, 64), np.float32), once, rows) for rows in (0, 1, 512, 513)] == [
    False,
    True,
    True,
    False,
]
assert not K.scatters(np.zeros((5, 64), np.float32), twice, 1)
assert not K.scatters(np.zeros((5, 48), np.float32), once, 1)
assert scattered == 2 * 3 * 7  # in both orders, of three shapes, with every pair of dtypes
print(K.instruction_set(), cases)
