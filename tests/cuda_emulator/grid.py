"""Every CUDA kernel against NumPy over a grid of shapes, dtypes, alignments and schedules.

    python grid.py FLAVOUR FIRST STEP SEEDS

runs every STEP-th case from FIRST on, in a process of its own: sanitizers must be loaded before Python. Two questions
are asked of each case. On small integers, where every product and every sum is exact in every type, the bits must be
NumPy's, whatever the order of the sums. On real numbers the error against float64 must obey the rule of
mos_ext/testing.py: at most twice that of the same computation in plain NumPy, plus its floors: two units in the last
place of the dtype that operands are rounded to, 64 in float64.
"""

import itertools
import sys
from dataclasses import dataclass, replace

import emulator
import numpy as np
from kernels import STORAGE, Kernels, decode, encode, inverse_of, sums_type

SCALE = 0.5
FLOOR = {"f32": 2 * 2.0**-23, "f64": 64 * 2.0**-52, "bf16": 2 * 2.0**-7, "f16": 2 * 2.0**-10, "tf32": 2 * 2.0**-10}
SCHEDULES = emulator.SCHEDULES


@dataclass(frozen=True)
class Case:
    dtype: str
    pool_dtype: str
    rows: int
    shard: int  # elements
    l: int
    r: int
    p: float = 0.0
    pad: int = 0
    tf32: bool = False
    shift: int = 0  # elements by which what kernels read is off the alignment of vectors
    gap: int = 0  # elements between two shards of the pool
    dx_pad: int = 0  # more of `pad` for dx than for x
    s_shift: int = 0  # more of `shift` for planes that are read; half of it for their sums
    planes: int = 0  # that kernels read; 0: drawn, one to three

    @property
    def cols(self):
        return self.shard * self.l

    def __str__(self):
        return "-".join(str(v) for v in vars(self).values())


def cases():
    """Single elements; every remainder of the tiles (64 rows; groups of 8, tiles of 64 and 128 columns; 16 ranks);
    several tiles, parts and planes in every direction; shards of any length; more ranks than a block has."""
    shapes = [  # rows, shard, l, r
        (1, 1, 1, 1),
        (3, 5, 3, 2),
        (17, 8, 4, 5),
        (64, 64, 2, 16),
        (70, 24, 11, 17),
        (130, 136, 5, 33),
        (65, 257, 1, 3),
        (200, 40, 16, 8),
        (16, 96, 16, 64),
        (129, 24, 3, 100),
        (33, 8, 24, 256),
        (0, 16, 4, 4),
        (5, 0, 4, 4),
    ]
    for (rows, shard, l, r), dtype in itertools.product(shapes, ("bf16", "f16", "f32", "f64")):
        heavy = rows * shard * l * r > 600_000
        for pool_dtype in sorted({dtype, "f32"}, reverse=True):
            # Doubles and floats share their code with each other; the heavy shapes are there for the tensor cores.
            if heavy and dtype in ("f32", "f64") and pool_dtype == dtype != "f64":
                continue
            yield Case(dtype, pool_dtype, rows, shard, l, r)
    for dtype in ("bf16", "f16", "f32", "f64"):
        yield Case(dtype, "f32", 70, 24, 11, 17, p=0.5)
        yield Case(dtype, "f32", 33, 8, 5, 70, p=0.5)  # ranks in two launches, both with dropout
        yield Case(dtype, dtype, 67, 16, 9, 12, p=0.5, pad=3)  # rows that are not aligned
        yield Case(dtype, "f32", 66, 16, 9, 12, pad=8)  # rows that are, at a distance
        yield Case(dtype, dtype, 20, 13, 7, 6, p=0.5, pad=1)
    for shape in ((64, 64, 2, 16), (70, 24, 11, 17), (33, 8, 24, 40)):
        yield Case("f32", "f32", *shape, tf32=True)
    yield Case("f32", "f32", 67, 13, 9, 12, p=0.5, pad=3, tf32=True)
    # Rows are whole groups and shards are not, whether they start aligned or not.
    yield Case("bf16", "f32", 20, 12, 6, 6)
    yield Case("bf16", "bf16", 20, 12, 6, 20)
    yield Case("f32", "f32", 20, 12, 6, 6)
    # Shards of any length under several blocks of ranks.
    yield Case("bf16", "f32", 9, 13, 3, 70)
    yield Case("f64", "f64", 9, 13, 3, 20)
    # Four tiles and more in each part of shrink: stages are used again.
    yield Case("bf16", "f32", 3, 264, 25, 3, p=0.5)
    yield Case("f64", "f64", 1, 1300, 14, 3)  # and two column tiles in a block of expand
    yield Case("f64", "f32", 16897, 8, 1, 3)  # two row tiles in a block of expand
    yield Case("f64", "f32", 16897, 8, 1, 17, p=0.5)  # and two steps in each
    yield Case("bf16", "bf16", 20, 13, 7, 6, p=0.5, pad=5)  # aligned rows that end within a group
    for dtype in ("bf16", "f16", "f32", "f64"):
        for pool_dtype in sorted({dtype, "f32"}):
            yield Case(dtype, pool_dtype, 67, 16, 9, 12, p=0.5, shift=1, gap=8)
            yield Case(dtype, pool_dtype, 67, 16, 9, 12, p=0.5, gap=8, dx_pad=1)
            yield Case(dtype, pool_dtype, 67, 16, 9, 12, p=0.5, gap=1)
    # Whole variants (variants.h), each at its edges: rows, columns and ranks that do not fill a tile, rows at a distance.
    for dtype in ("bf16", "f16"):
        yield Case(dtype, "f32", 67, 16, 9, 12, p=0.5, pad=8, gap=8)
        yield Case(dtype, "f32", 131, 24, 13, 40, p=0.5)
    yield Case("bf16", "f32", 131, 24, 13, 64)
    yield Case("bf16", "f32", 67, 16, 9, 12, p=0.5, pad=3)  # but for rows that are not aligned
    yield Case("bf16", "f32", 67, 16, 9, 12, s_shift=1)  # but for planes
    yield Case("bf16", "f32", 67, 16, 9, 12, s_shift=4)  # but for their sum
    # Few sums of many planes: parts of five, the last of them empty; more in a part than loads in flight.
    yield Case("bf16", "f32", 5, 16, 9, 12, planes=33)
    yield Case("f16", "f32", 16, 16, 2, 16, planes=17)
    yield Case("bf16", "f32", 5, 8, 130, 12, p=0.5)  # an index table that does not fit in shared memory
    yield Case("bf16", "f32", 67, 16, 9, 12, p=0.5, gap=2)  # shards that are not aligned
    # Two column tiles in a block of backward, of which the last has one.
    yield Case("bf16", "f32", 3, 1064, 32, 4, p=0.5)
    yield Case("f16", "f32", 3, 1064, 32, 20)
    yield Case("f32", "f32", 3, 8, 537, 100)


CASES = list(cases())
LONG = [case for case in CASES if case.rows > 10_000 or case.cols * case.r > 130_000]  # minutes under a sanitizer

# ---------------------------------------------------------------------------------------------- what is expected


def keep_mask(rows, cols, p, seed):
    """mos_ext/reference.py's dropout_mask, in NumPy."""
    low = np.uint64(0xFFFFFFFF)
    group, row = np.meshgrid(np.arange((cols + 7) // 8, dtype=np.uint64), np.arange(rows, dtype=np.uint64))
    c = [group, row & low, row >> np.uint64(32), np.zeros_like(row)]
    key = [np.uint64(seed) & low, np.uint64(seed) >> np.uint64(32)]
    for _ in range(7):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ key[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ key[1], p0 & low]
        key = [np.uint64((int(k) + bump) & 0xFFFFFFFF) for k, bump in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    bits = np.stack([word >> np.uint64(shift) & np.uint64(0xFFFF) for word in c for shift in (0, 16)], axis=-1)
    return bits.reshape(rows, -1)[:, :cols] >= int(p * 65536 + 0.5)


@dataclass
class Inputs:
    """Values (float64) that the dtypes of the case hold exactly."""

    x: np.ndarray
    y: np.ndarray
    dy: np.ndarray
    s: np.ndarray  # planes
    bias: np.ndarray
    pool: np.ndarray
    index: np.ndarray
    seed: int

    @property
    def factor(self):
        return self.pool[self.index].reshape(len(self.index), self.index.shape[1] * self.pool.shape[1])


def inputs(case, integers, number):
    rng = np.random.default_rng(number)
    shards = 2 * case.r * case.l

    def draw(dtype, *shape):
        if integers:
            return rng.integers(-2, 3, shape).astype(np.float64)
        return decode(encode(rng.standard_normal(shape), dtype), dtype)

    shape = (case.rows, case.cols)
    # Shards that no entry names must not matter, whatever they hold; the first is one of them.
    index = 1 + rng.permutation(shards - 1)[: case.r * case.l].reshape(case.r, case.l)
    pool = np.full((shards, case.shard), np.nan)
    pool[index] = draw(case.pool_dtype, *index.shape, case.shard)
    return Inputs(
        *(draw(case.dtype, *shape) for _ in range(3)),
        s=draw(sums_type(case.dtype), case.planes or 1 + number % 3, case.rows, case.r),
        bias=draw(case.dtype, case.cols),
        pool=pool,
        index=index,
        seed=int(rng.integers(2**62)),
    )


def products(case, given, rounded):
    """What every kernel should return. ``rounded(values, dtype)`` is what plain PyTorch would do where values pass
    through memory in that dtype; the identity makes this the float64 oracle."""
    sums = sums_type(case.dtype)
    keep = keep_mask(case.rows, case.cols, case.p, given.seed) if case.p else np.ones((case.rows, case.cols), bool)
    dropped = rounded(np.where(keep, given.x / (1 - case.p), 0.0), case.dtype)
    factor = rounded(given.factor, case.dtype)
    s = given.s.sum(0)
    scaled, plain = rounded(s * SCALE, case.dtype), rounded(s, case.dtype)
    delta = scaled @ factor
    low = np.where(keep, rounded(plain @ factor, case.dtype) / (1 - case.p), 0.0)
    return {
        "shrink": rounded(rounded(dropped @ factor.T, case.dtype), sums),
        "expand": rounded(rounded(delta, case.dtype) + given.bias, case.dtype),
        "expand sum": rounded(s, sums),
        "expand without bias": rounded(delta, case.dtype),
        "expand accumulate": rounded(given.y + rounded(delta, case.dtype), case.dtype),
        "expand dropped": rounded(given.y + np.where(keep, rounded(delta, case.dtype) / (1 - case.p), 0.0), case.dtype),
        "expand_backward ds": rounded(rounded(given.dy @ factor.T, case.dtype) * SCALE, sums),
        "expand_backward grad": rounded(scaled.T @ given.dy, case.dtype),
        "shrink_backward dx": rounded(low, case.dtype),
        "shrink_backward grad": rounded(plain.T @ dropped, case.dtype),
        "shrink_backward accumulate": rounded(given.y + rounded(low, case.dtype), case.dtype),
    }


def results(kernels, case, given):
    """The same from the kernels, as stored."""
    dtype, more = case.dtype, {"tf32": case.tf32, "pad": case.pad}
    x, y, dy, bias = (encode(v, dtype) for v in (given.x, given.y, given.dy, given.bias))
    s = encode(given.s, sums_type(dtype))
    factor = (encode(given.pool, case.pool_dtype), case.pool_dtype, given.index)
    out = {"shrink": kernels.sum(kernels.shrink(x, dtype, *factor, case.p, given.seed, **more))}
    out["expand"], out["expand sum"] = kernels.expand(s, dtype, *factor, SCALE, bias=bias, want_sum=True, **more)
    out["expand without bias"] = kernels.expand(s, dtype, *factor, SCALE, **more)
    out["expand accumulate"] = kernels.expand(s, dtype, *factor, SCALE, y=y, **more)
    if case.p:
        out["expand dropped"] = kernels.expand(s, dtype, *factor, SCALE, y=y, p=case.p, seed=given.seed, **more)
    ds, grad = kernels.expand_backward(dy, dtype, s, *factor, SCALE, **more)
    out["expand_backward ds"], out["expand_backward grad"] = kernels.sum(ds), kernels.sum(grad)
    dx, grad = kernels.shrink_backward(x, dtype, s, *factor, case.p, given.seed, **more)
    out["shrink_backward dx"], out["shrink_backward grad"] = dx, kernels.sum(grad)
    dx, again = kernels.shrink_backward(x, dtype, s, *factor, case.p, given.seed, dx=y, dx_pad=case.dx_pad, **more)
    out["shrink_backward accumulate"] = dx
    assert np.array_equal(grad, again, equal_nan=True), "the factor gradient depends on whether dx is accumulated"
    return out


def relative_error(values, exact):
    norm = np.linalg.norm(exact)
    return np.linalg.norm(values - exact) / norm if norm else float(np.abs(values).max(initial=0.0))


def check(kernels, case, seeds):
    """AssertionError unless the case is right under every seed, bit for bit the same under all of them."""
    for integers in (True, False):
        given = inputs(case, integers, number=int(integers))
        exact = products(case, given, lambda values, dtype: values)
        plain = products(case, given, lambda values, dtype: decode(encode(values, dtype), dtype))
        first = None
        for seed in seeds:
            kernels.emulator.config(seed=seed, schedule=SCHEDULES[seed % 4])
            kernels.shift, kernels.gap, kernels.s_shift = case.shift, case.gap, case.s_shift
            got = results(kernels, case, given)
            for name, stored in got.items():
                where = f"{case} {name} seed {seed}"
                dtype = "f64" if stored.dtype == np.float64 else "f32" if stored.dtype == np.float32 else case.dtype
                values = decode(stored, dtype)
                assert np.isfinite(values).all(), f"{where}: not finite"
                if integers:
                    expected = encode(exact[name], dtype)
                    wrong = np.argwhere(stored != expected)
                    assert not len(wrong), f"{where}: {len(wrong)} of {stored.size} differ, first at {wrong[0]}"
                else:
                    error, allowed = relative_error(values, exact[name]), 2 * relative_error(plain[name], exact[name])
                    allowed += FLOOR["tf32" if case.tf32 else case.dtype]
                    assert error <= allowed, f"{where}: error {error:.2e}, allowed {allowed:.2e}"
                if first is not None:
                    assert np.array_equal(stored, first[name]), f"{where}: differs from the first seed"
            first = first or got
    check_isolation(kernels, case)
    stats = kernels.emulator.stats()
    assert stats["ldmatrix_cycles"] == stats["ldmatrix_matrices"], f"{case}: bank conflicts"


def check_isolation(kernels, case):
    """What is not finite stays in its row and its column, also where tiles are padded with something."""
    if not case.rows or not case.cols:
        return
    given = inputs(case, False, number=0)
    given.x[0, 0] = given.dy[0, 0] = given.pool[given.index[0, 0], 0] = np.inf
    with np.errstate(invalid="ignore"):
        exact = products(case, given, lambda values, dtype: values)
    for name, stored in results(kernels, case, given).items():
        dtype = "f64" if stored.dtype == np.float64 else "f32" if stored.dtype == np.float32 else case.dtype
        finite = np.isfinite(decode(stored, dtype))
        assert np.array_equal(finite, np.isfinite(exact[name])), f"{case} {name}: an infinity spreads"


# ---------------------------------------------------------------------------------------------- rows in groups


@dataclass(frozen=True)
class Groups:
    """What kernels are told of groups (csrc/common/params.h)."""

    ends: tuple
    places: int
    rows: tuple | None = None
    ranks: tuple | None = None
    scales: tuple | None = None
    invariant: bool = False

    def __str__(self):
        given = [name for name in ("rows", "ranks", "scales", "invariant") if getattr(self, name) not in (None, False)]
        return f"{len(self.ends)} groups to {self.ends[:3]} of {self.places} {' '.join(given)}".strip()

    @property
    def own(self):
        """The row of x at each place."""
        return np.arange(self.places) if self.rows is None else np.array(self.rows, int)

    def ranges(self):
        """(group, its places) of every group that has some. Ends that cannot be are taken for the nearest that can."""
        begin = 0
        for g, end in enumerate(self.ends):
            end = min(max(end, begin), self.places)
            if begin < end:
                yield g, slice(begin, end)
            begin = end


def grouped(counts, beyond=0, *, optional=(), r=0, invariant=False, seed=0):
    """Groups of so many rows, and rows beyond that belong to nobody; ``optional``: of rows, ranks, scales."""
    rng, places = np.random.default_rng(seed), sum(counts) + beyond
    return Groups(
        tuple(np.cumsum(counts).tolist()),
        places,
        tuple(rng.permutation(places + 3)[:places].tolist()) if "rows" in optional else None,
        tuple(rng.integers(0, r + 1, len(counts)).tolist()) if "ranks" in optional else None,
        tuple(rng.choice((0.5, 1.0, 2.0), len(counts)).tolist()) if "scales" in optional else None,
        invariant,
    )


ALL = ("rows", "ranks", "scales")
# Groups without rows at every place, one row in each, all rows in one, several parts of a group, rows of nobody; whole
# variants and others; tables searched in one step and in two; more ranks than a block has.
GROUPED = [
    (Case("bf16", "f32", 0, 24, 11, 16), grouped([0, 5, 0, 0, 9, 0], beyond=70)),
    (Case("bf16", "f32", 0, 24, 11, 16, p=0.5), grouped([1] * 24)),
    (Case("f16", "f32", 0, 24, 11, 40, p=0.5), grouped([0, 0, 200, 0], beyond=2, optional=ALL, r=40)),
    (Case("bf16", "f32", 0, 40, 5, 16), grouped([3, 129, 17, 1, 64], optional=ALL, r=16, invariant=True)),
    (Case("bf16", "f32", 0, 16, 9, 12, p=0.5), grouped([300, 0, 250, 131, 48], beyond=9)),
    (Case("bf16", "f32", 0, 16, 9, 12, p=0.5, pad=3), grouped([0, 32, 130, 5], beyond=1, optional=ALL, r=12)),
    (Case("bf16", "f32", 0, 8, 3, 64), grouped([200, 0, 141], beyond=3, optional=("ranks",), r=64)),
    (Case("bf16", "f32", 0, 8, 5, 144), grouped([33, 0, 70], beyond=1, optional=("ranks",), r=144)),
    (Case("bf16", "bf16", 0, 8, 5, 70, p=0.5), grouped([33, 0, 2], beyond=3, optional=ALL, r=70)),
    (Case("f32", "f32", 0, 13, 3, 17, p=0.5), grouped([0, 150, 1, 30], beyond=3, optional=ALL, r=17)),
    (Case("f32", "f32", 0, 16, 4, 12, tf32=True), grouped([20, 0, 64, 7], optional=("scales",))),
    (Case("f64", "f32", 0, 8, 5, 20, p=0.5), grouped([10, 0, 70], beyond=1, optional=ALL, r=20)),
    (Case("bf16", "f32", 0, 8, 2, 4), grouped([0, 1] * 40, optional=("ranks", "rows"), r=4)),
    (Case("bf16", "f32", 0, 8, 1, 4), grouped([1] * 512)),
    (Case("bf16", "f32", 0, 8, 2, 4), grouped([7])),
    (Case("bf16", "f32", 0, 8, 2, 4), grouped([], beyond=7)),
    (Case("f32", "f32", 0, 8, 2, 4), grouped([0, 0], optional=ALL, r=4)),
    (Case("bf16", "f32", 0, 72, 8, 12), grouped([0, 2, 0, 70, 1], beyond=3, optional=ALL, r=12, invariant=True)),
]
IMPOSSIBLE = [(5, 3, 9), (-4, 2, 40), (40, 40, 40), (-1, -1, -1), (2**31 - 1, 0, -(2**31)), (9, 0, 4), (300, 7, 299)]


@dataclass
class GroupedInputs:
    x: np.ndarray
    y: np.ndarray
    dy: np.ndarray
    s: np.ndarray
    pool: np.ndarray
    index: np.ndarray
    seed: int


def grouped_inputs(case, groups, integers, number):
    rng = np.random.default_rng([number, groups.places])
    rows, count = groups.places + (3 if groups.rows is not None else 0), len(groups.ends)

    def draw(dtype, *shape):
        if integers:
            return rng.integers(-2, 3, shape).astype(np.float64)
        return decode(encode(rng.standard_normal(shape), dtype), dtype)

    shards = 2 * case.r * case.l + 1
    tables = [rng.permutation(shards - 1)[: case.r * case.l] for _ in range(count)]
    given = GroupedInputs(
        *(draw(case.dtype, rows, case.cols) for _ in range(3)),
        s=draw(sums_type(case.dtype), 1, groups.places, case.r),
        pool=draw(case.pool_dtype, shards, case.shard),
        index=1 + np.array(tables, np.int64).reshape(count, case.r, case.l),
        seed=int(rng.integers(2**62)),
    )
    given.pool[0] = np.nan
    # What belongs to nobody must not matter, whatever it holds.
    nobody = np.ones(rows, bool)
    for _, where in groups.ranges():
        nobody[groups.own[where]] = False
    given.x[nobody] = given.dy[nobody] = np.nan
    return given


def grouped_products(case, groups, given, rounded):
    """What the chains of ops.cpp should return: y, y +=, S, dx, dx +=, and the gradients of all groups' factors."""
    sums, (rows, cols) = sums_type(case.dtype), given.x.shape
    own = groups.own
    keep = keep_mask(groups.places, cols, case.p, given.seed) if case.p else np.ones((groups.places, cols), bool)
    s, delta = np.zeros((groups.places, case.r)), np.zeros((rows, cols))
    dx, grads = np.zeros((rows, cols)), np.zeros((2, len(groups.ends), case.r, cols))
    for g, where in groups.ranges():
        r = case.r if groups.ranks is None else groups.ranks[g]
        scale = SCALE * (1.0 if groups.scales is None else groups.scales[g])
        factor = rounded(given.pool[given.index[g, :r]].reshape(r, cols), case.dtype)
        dropped = rounded(np.where(keep[where], given.x[own[where]] / (1 - case.p), 0.0), case.dtype)
        s[where, :r] = rounded(rounded(dropped @ factor.T, case.dtype), sums)
        delta[own[where]] = rounded(rounded(s[where, :r] * scale, case.dtype) @ factor, case.dtype)
        ds = rounded(rounded(given.dy[own[where]] @ factor.T, case.dtype) * scale, sums)
        grads[1, g, :r] = rounded(
            rounded(given.s[0, where, :r] * scale, case.dtype).T @ given.dy[own[where]], case.dtype
        )
        low = rounded(rounded(ds, case.dtype) @ factor, case.dtype)
        dx[own[where]] = np.where(keep[where], low / (1 - case.p), 0.0)
        grads[0, g, :r] = rounded(rounded(ds, case.dtype).T @ dropped, case.dtype)
    return {
        "y": rounded(delta, case.dtype),
        "y +=": rounded(given.y + rounded(delta, case.dtype), case.dtype),
        "s": s,
        "dx": rounded(dx, case.dtype),
        "dx +=": rounded(given.y + rounded(dx, case.dtype), case.dtype),
        "grad_a": grads[0],
        "grad_b": grads[1],
    }


def grouped_results(kernels, case, groups, given, early, sum_first):
    x, y, dy = (encode(v, case.dtype) for v in (given.x, given.y, given.dy))
    factor = (encode(given.pool, case.pool_dtype), case.pool_dtype, given.index)
    more = {"tf32": case.tf32, "pad": case.pad, "groups": groups, "early": early, "sum_first": sum_first}
    forward = (x, case.dtype, factor, factor, SCALE, case.p, given.seed)
    backward = (dy, case.dtype, encode(given.s, sums_type(case.dtype)), x, factor, factor, SCALE, case.p, given.seed)
    out = {}
    out["y"], out["s"] = kernels.low_rank(*forward, **more)
    out["y +="], again = kernels.low_rank(*forward, y=y, **more)
    assert np.array_equal(out["s"], again)
    out["dx"], out["grad_a"], out["grad_b"] = kernels.low_rank_backward(*backward, **more)
    out["dx +="], *again = kernels.low_rank_backward(*backward, dx=y, **more)
    assert np.array_equal(out["grad_a"], again[0])
    assert np.array_equal(out["grad_b"], again[1])
    return out


def check_grouped(kernels, case, groups, seeds, resident_blocks=6):
    """As check(), of chains of launches with rows in groups: those of the first seed one after the other, then early."""
    kernels.shift = kernels.gap = kernels.s_shift = 0
    for integers in (True, False):
        given = grouped_inputs(case, groups, integers, number=int(integers))
        exact = grouped_products(case, groups, given, lambda values, dtype: values)
        plain = grouped_products(case, groups, given, lambda values, dtype: decode(encode(values, dtype), dtype))
        first = None
        for number, seed in enumerate(seeds):
            kernels.emulator.config(seed=seed, schedule=SCHEDULES[seed % 4], resident_blocks=resident_blocks)
            # Where groups of few rows add planes in another order, a launch for that has other bits.
            sum_first = number == 1 and groups.invariant
            got = grouped_results(kernels, case, groups, given, early=number > 0, sum_first=sum_first)
            for name, stored in got.items():
                where = f"{case} {groups} {name} seed {seed}"
                dtype = "f64" if stored.dtype == np.float64 else "f32" if stored.dtype == np.float32 else case.dtype
                values = decode(stored, dtype)
                assert np.isfinite(values).all(), f"{where}: not finite"
                # S and dS are rounded on their way to the second product, which is not exact then.
                if integers and name in ("s", "grad_b"):
                    wrong = np.argwhere(values != exact[name])
                    assert not len(wrong), f"{where}: {len(wrong)} of {stored.size} differ, first at {wrong[0]}"
                elif not integers:
                    error, allowed = relative_error(values, exact[name]), 2 * relative_error(plain[name], exact[name])
                    allowed += FLOOR["tf32" if case.tf32 else case.dtype]
                    assert error <= allowed, f"{where}: error {error:.2e}, allowed {allowed:.2e}"
                    nothing = exact[name.split()[0]] == 0
                    there = given.y[nothing] if name.endswith("=") else 0
                    assert (values[nothing] == there).all(), f"{where}: something where there is nothing"
                if first is not None:
                    assert np.array_equal(stored, first[name]), f"{where}: differs from the first seed"
            first = first or got
    kernels.emulator.config(resident_blocks=2)


def check_impossible_ends(kernels, seeds, resident_blocks=6):
    """They are taken for the nearest possible, by every block alike: nothing is out of bounds, nothing computed twice."""
    for ends, seed in itertools.product(IMPOSSIBLE, seeds):
        for case, places in ((Case("bf16", "f32", 0, 8, 2, 4), 9), (Case("f32", "f32", 0, 3, 3, 5), 300)):
            groups = Groups(ends, places)
            check_grouped(kernels, case, groups, [seed], resident_blocks)
    # Of more groups than a warp looks at at once, which end is the nearest depends on which it looks at.
    for ends in (range(290, 0, -4), [-5 if i % 3 == 2 else 4 * i for i in range(70)]):
        groups = Groups(tuple(ends), 300)
        given = replace(grouped_inputs(case, groups, False, 0), **dict.fromkeys(("x", "dy"), np.ones((300, case.cols))))
        for stored in grouped_results(kernels, case, groups, given, early=False, sum_first=False).values():
            assert np.isfinite(stored).all(), groups


def check_wrong_rows(kernels):
    """A row that does not exist is read as zeros, and nothing is written for it."""
    for case in (Case("bf16", "f32", 0, 8, 2, 4), Case("f32", "f32", 0, 3, 3, 5, p=0.5)):
        groups = grouped([3, 0, 70], beyond=2, optional=("rows",))
        given = grouped_inputs(case, groups, False, number=0)
        rows, wrong = list(groups.rows), {1: -1, 40: len(given.x), 72: 2**31 - 1}
        for place in wrong:
            given.x[rows[place]] = given.dy[rows[place]] = 0
        expected = grouped_results(kernels, case, groups, given, early=False, sum_first=False)
        for place, row in wrong.items():
            expected["y +="][rows[place]] = encode(given.y[rows[place]], case.dtype)
            expected["dx +="][rows[place]] = encode(given.y[rows[place]], case.dtype)
            expected["y"][rows[place]] = expected["dx"][rows[place]] = 0
            rows[place] = row
        got = grouped_results(kernels, case, replace(groups, rows=tuple(rows)), given, early=False, sum_first=False)
        for name, stored in got.items():
            assert np.array_equal(stored, expected[name]), f"{case} {name}"


def check_invariance(kernels):
    """A row's result has the same bits alone and among others, in another place, wherever sums are cut."""
    case = Case("bf16", "f32", 0, 264, 16, 12)
    many = grouped([21, 0, 130, 1], optional=("scales",), invariant=True)
    given = grouped_inputs(case, many, False, number=0)
    among = grouped_results(kernels, case, many, given, early=False, sum_first=False)
    for place, ends in ((20, (1, 1, 1, 1)), (21, (0, 0, 1, 1)), (150, (0, 0, 1, 1)), (151, (0, 0, 0, 1))):
        one = replace(many, ends=ends, places=1)
        own = {name: getattr(given, name)[place : place + 1] for name in ("x", "y", "dy")}
        alone = replace(given, s=given.s[:, place : place + 1], **own)
        got = grouped_results(kernels, case, one, alone, early=False, sum_first=False)
        for name in ("y", "s", "dx"):
            assert np.array_equal(got[name][0], among[name][place]), f"{name} of row {place} depends on others"


# ---------------------------------------------------------------------------------------------- chains

# Launches that follow each other: whole variants and others, several planes, dropout, ranks whose dx is a launch of its
# own.
CHAINS = [
    Case("bf16", "f32", 130, 136, 5, 16, p=0.5),
    Case("f16", "f32", 70, 24, 11, 40),
    Case("bf16", "bf16", 67, 16, 9, 12, p=0.5, pad=3),
    Case("f32", "f32", 70, 24, 11, 17, p=0.5),
    Case("f32", "f32", 64, 64, 2, 16, tf32=True),
    Case("f64", "f32", 33, 8, 5, 20),
    Case("bf16", "f32", 33, 8, 5, 70, p=0.5),
]


def check_chains(kernels, seeds, resident_blocks=6):
    """Whether launches that start as early as they may make what launches one after the other make."""
    kernels.shift = kernels.gap = kernels.s_shift = 0
    for case, seed in itertools.product(CHAINS, seeds):
        kernels.emulator.config(seed=seed, schedule=SCHEDULES[seed % 4], resident_blocks=resident_blocks)
        given, more = inputs(case, False, number=seed), {"tf32": case.tf32, "pad": case.pad}
        x, y, dy, bias = (encode(v, case.dtype) for v in (given.x, given.y, given.dy, given.bias))
        factor, s = (encode(given.pool, case.pool_dtype), case.pool_dtype, given.index), given.s
        forward = (x, case.dtype, factor, factor, SCALE, case.p, given.seed)
        backward = (dy, case.dtype, encode(s, sums_type(case.dtype)), x, factor, factor, SCALE, case.p, given.seed)
        for sum_first in (False, True):
            more["sum_first"] = sum_first
            for chain, given_to_it, options in (
                (kernels.low_rank, forward, {"bias": bias}),
                (kernels.low_rank, forward, {"y": y}),
                (kernels.low_rank_backward, backward, {}),
                (kernels.low_rank_backward, backward, {"dx": y}),
            ):
                early, one_by_one = (chain(*given_to_it, **options, **more, early=on) for on in (True, False))
                for got, expected in zip(early, one_by_one, strict=True):
                    same = np.array_equal(got.view(np.uint8), expected.view(np.uint8))
                    assert same, f"{case} {chain.__name__} {[*options]} {sum_first=} seed {seed}: differs when early"
                    kind = "f64" if got.dtype == np.float64 else "f32" if got.dtype == np.float32 else case.dtype
                    assert np.isfinite(decode(got, kind)).all(), f"{case} {chain.__name__}: not finite"
    kernels.emulator.config(resident_blocks=2)


def check_masks(kernels):
    """Every decision of dropout at the edges of thresholds, in whole variants and in others: enough elements that each
    of the 65536 values of their bits occurs a few times."""
    rows, seed = 2600, 5**25
    pool, index = np.ones((1, 16), np.float32), np.zeros((4, 8), np.int64)
    keep_scale = {65536: 0.0, **{t: 65536 / (65536 - t) for t in (1, 2, 32767, 32768, 65535)}}
    kernels.shift = kernels.gap = kernels.s_shift = 0
    kernels.emulator.config(seed=1, schedule="sequential")
    for dtype, (threshold, scale) in itertools.product(("bf16", "f32"), keep_scale.items()):
        p = threshold / 65536
        keep = keep_mask(rows, 128, p, seed)
        x, s = encode(np.ones(keep.shape), dtype), np.full((1, rows, 4), 0.25, np.float32)
        sums = kernels.sum(kernels.shrink(x, dtype, pool, "f32", index, p, seed))
        assert np.array_equal(sums, np.repeat(np.float32(keep.sum(1, keepdims=True) * scale), 4, 1)), (dtype, threshold)
        for dx in (None, np.full_like(x, encode(3, dtype))):
            got, grad = kernels.shrink_backward(x, dtype, s, pool, "f32", index, p, seed, dx=dx)
            base, kept = (0 if dx is None else 3), decode(encode(0.25 * scale, dtype), dtype)
            expected = encode(np.where(keep, base + 4 * kept, base), dtype)
            assert np.array_equal(got, expected), (dtype, threshold, dx is None)
            exact = kept * keep.sum(0)
            assert (np.abs(kernels.sum(grad) - exact) <= 1e-6 * exact).all(), (dtype, threshold)


def sums_in_order(grads, dtype, indices, num_shards):
    """One sum after the other, in the order of modules and positions: the bits must be the same."""
    shard = grads[0].shape[1] // indices[0].shape[1]
    expected = np.zeros((num_shards, shard), STORAGE[sums_type(dtype)])
    for grad, table in zip(grads, indices, strict=True):
        parts = decode(grad, dtype).reshape(-1, shard).astype(expected.dtype)
        np.add.at(expected, table.reshape(-1)[: len(parts)], parts)
    return expected


def check_gather(kernels, seeds):
    """Gather-concat and scatter-add: every copy width, tables longer than a warp, several modules and launches; by the
    inverse of the tables as well, with shards used by more entries than a warp, and modules without a gradient."""
    rng = np.random.default_rng(0)
    widths = (1, 2, 4, 12, 130, 256, 516, 1030)
    for (dtype, shard), seed in itertools.product(itertools.product(("bf16", "f16", "f32", "f64"), widths), seeds):
        kernels.emulator.config(seed=seed, schedule=SCHEDULES[seed % 4])
        kernels.shift, kernels.gap = seed % 3, seed // 2 % 2
        pool = encode(rng.integers(-2, 3, (23, shard)), dtype)
        index = rng.integers(0, 23, (3, 5))
        assert np.array_equal(kernels.gather_concat(pool, dtype, index), pool[index].reshape(3, -1))
        for count, pad in ((1, 0), (3, 1), (2, 2), (70, 0) if shard == 4 else (2, 4)):
            indices = [rng.integers(0, 20, (1 + k % 9, 5)) for k in range(count)]
            grads = [encode(rng.standard_normal((len(i), 5 * shard)), dtype) for i in indices]
            got = kernels.scatter_add(grads, dtype, indices, 23, pad=pad)
            assert np.array_equal(got, sums_in_order(grads, dtype, indices, 23)), (dtype, shard, count, pad, seed)
            inverse = inverse_of(indices, 23)
            assert np.array_equal(kernels.scatter_add(grads, dtype, indices, 23, pad=pad, inverse=inverse), got)
            for given in (lambda k: k % 3 == 0, lambda k: k > 64):  # the first launch may have none at all
                some = [g if given(k) else g[:0] for k, g in enumerate(grads)]
                got = kernels.scatter_add(some, dtype, indices, 23, pad=pad, inverse=inverse)
                assert np.array_equal(got, sums_in_order(some, dtype, indices, 23)), (dtype, shard, count, pad, seed)
    kernels.shift = kernels.gap = kernels.s_shift = 0
    # More segments, and more shards, than a grid has blocks.
    index = rng.integers(0, 70000, (1, 70000))
    pool = encode(rng.integers(-2, 3, (70000, 1)), "f32")
    assert np.array_equal(kernels.gather_concat(pool, "f32", index), pool[index].reshape(1, -1))
    table = np.array([[0, 69999, 69999]])
    for inverse in (None, inverse_of([table], 70000)):
        got = kernels.scatter_add([encode(np.ones((1, 3)), "f32")], "f32", [table], 70000, inverse=inverse)
        assert (got[0, 0], got[69999, 0], got.sum()) == (1, 2, 3)
    # Two sums of different sizes in a launch.
    planes = [encode(rng.integers(-2, 3, shape), "f32") for shape in ((3, 5, 7), (2, 40, 30))]
    for given in (planes, planes[::-1]):
        for got, one in zip(kernels.sums(given), given, strict=True):
            assert np.array_equal(got, one.sum(0))


if __name__ == "__main__":
    flavour, first, step, seeds = sys.argv[1], *map(int, sys.argv[2:])
    kernels = Kernels(emulator.build(flavour))
    # Some cases are large only to give a block two tiles; sanitizers would take a minute for each.
    chosen = [case for case in CASES if flavour == "plain" or case not in LONG]
    for case in chosen[first::step]:
        check(kernels, case, range(1 if case in LONG else seeds))
    if first == 0:
        check_gather(kernels, range(seeds))
    if first == 0 and flavour == "plain":
        check_masks(kernels)
    if first == 1:
        # ThreadSanitizer knows no more than 8128 threads.
        check_chains(kernels, range(seeds), 2 if flavour == "tsan" else 6)
    resident = 2 if flavour == "tsan" else 6
    for case, groups in GROUPED[first::step]:
        if flavour == "plain" or len(groups.ends) < 100:
            check_grouped(kernels, case, groups, range(min(seeds, 2)), resident)
    if first == min(1, step - 1):
        check_impossible_ends(kernels, range(1), resident)
        check_wrong_rows(kernels)
    if first == 0 and flavour == "plain":
        check_invariance(kernels)
