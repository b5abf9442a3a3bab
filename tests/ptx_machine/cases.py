"""The grid of products: which kernels on which cases, and under which schedules."""

import itertools

import numpy as np
from products import KERNELS, Case

# dtype, the pool's, tf32.
ARITHMETIC = (
    *(("bf16", "bf16", False), ("bf16", "f32", False), ("f16", "f16", False), ("f16", "f32", False)),
    *(("f32", "f32", False), ("f32", "f32", True), ("f64", "f64", False), ("f64", "f32", False)),
)


def modes_of(number, work):
    """How check `number` runs: in order, with copies that land late; then as it is drawn, with an eye on races."""
    rng = np.random.default_rng([7, number])
    drawn = {name: int(rng.integers(limit)) for name, limit in (("late", 2), ("warps", 3), ("lanes", 3), ("blocks", 3))}
    if work < 20_000:
        drawn["lanes"] = int(rng.integers(4))  # each lane alone: slow
    return [{"late": 1}, {**drawn, "race": int(work <= 6_000_000), "seed": number}]


def drawn_cases():
    """Every pair of T and r for every arithmetic; the rest is drawn."""
    rng = np.random.default_rng(20)
    rows_and_ranks = itertools.product((1, 17, 64, 130, 200), (1, 8, 16, 17, 33, 64, 80))
    everything = itertools.product(ARITHMETIC, rows_and_ranks)
    for number, ((dtype, pool_dtype, tf32), (rows, rank)) in enumerate(everything):
        cols = int(rng.choice((64, 96, 128, 264, 512, 1024)))
        if rows * cols * rank > (3_000_000 if dtype in ("bf16", "f16") else 1_000_000):
            cols = int(rng.choice((64, 96, 128, 264)))
        l = int(rng.choice((1, 2, 4, 8, 3)))
        layouts = ({}, {}, {"pad": 8}, {"pad": 3}, {"shift": 1, "gap": 8}, {"gap": 1, "dx_pad": 1})
        layout = layouts[rng.integers(len(layouts))]
        p, planes, integers = float(rng.choice((0.0, 0.5))), int(rng.integers(1, 4)), bool(rng.integers(2))
        more = {"p": p, "planes": planes, "tf32": tf32, "integers": integers, "seed": number}
        yield Case(rows, cols, rank, l if cols % l == 0 else 1, dtype, pool_dtype, **layout, **more)


def corner_cases():
    """Shards that are not whole groups, ragged edges, alignment, odd dropout, several turns of every loop."""
    count = itertools.count(1000)

    def both(*shape, **options):
        for integers in (True, False):
            yield Case(*shape, **options, integers=integers, seed=next(count))

    for dtype, pool, tf32 in (("bf16", "f32", False), ("f16", "f16", False), *ARITHMETIC[4:7]):
        for shape, options in (
            ((1, 1, 1, 1), {}),
            ((3, 15, 2, 3), {"p": 0.5}),
            ((20, 91, 6, 7), {"p": 0.5, "pad": 1}),  # shards of 13
            ((20, 91, 70, 7), {"p": 0.5, "pad": 5, "planes": 3}),
            ((66, 72, 20, 6), {}),  # shards of 12, whole rows
            ((67, 144, 12, 9), {"p": 0.25, "pad": 3, "shift": 1}),
            ((33, 120, 70, 5), {"p": 0.5, "planes": 2}),
            ((9, 200, 5, 1), {"p": 0.999}),
            ((9, 200, 5, 1), {"p": 1.0}),
            ((9, 200, 5, 1), {"p": 1 / 65536}),
            ((5, 264, 17, 33), {"p": 0.1, "gap": 8}),
            ((70, 257, 3, 1), {"p": 0.5}),
            ((40, 64, 16, 8), {"p": 0.5, "planes": 9}),  # more planes than are read at once
            ((40, 64, 17, 8), {"p": 0.5, "planes": 9}),
            # Tables longer than what shrink keeps in shared memory; pools aligned or not.
            ((6, 528, 16, 66), {"p": 0.5}),
            ((6, 528, 33, 66), {}),
            ((6, 528, 16, 66), {"p": 0.5, "gap": 1}),
            ((6, 528, 33, 66), {"gap": 1}),
            ((6, 448, 16, 56), {"p": 0.5}),  # a table of seven elements a thread
            ((70, 131, 40, 1), {"p": 0.5, "gap": 5, "planes": 5}),
            ((70, 131, 40, 1), {"p": 0.5, "pad": 5, "planes": 5}),
        ):
            yield from both(*shape, dtype, pool, **options, tf32=tf32)
    for shape, options in (
        ((3, 6600, 3, 25, "bf16", "f32"), {"p": 0.5}),  # more than three tiles in a part of shrink
        ((3, 6600, 64, 25, "bf16", "bf16"), {"p": 0.5}),  # more entries than the table in shared memory
        ((2, 8640, 3, 24, "f16", "f32"), {"p": 0.5}),
        ((1, 18200, 3, 14, "f64", "f64"), {}),
        ((1, 18200, 3, 14, "f32", "f32"), {"tf32": True}),
        ((200, 4352, 3, 4, "bf16", "f32"), {}),  # two column tiles in a block of expand
        ((200, 4352, 16, 4, "f16", "f16"), {"planes": 3}),
        ((600, 512, 16, 4, "bf16", "bf16"), {"p": 0.5}),  # ten row tiles
        ((700, 128, 64, 4, "bf16", "f32"), {"p": 0.5}),
        ((700, 128, 33, 4, "f16", "f16"), {"p": 0.5}),
        ((700, 128, 5, 4, "f32", "f32"), {"p": 0.5}),
        ((8450, 136, 2, 1, "bf16", "bf16"), {}),  # two row tiles in a block of expand
    ):
        yield from both(*shape, **options)


def branch_cases():
    """(case, kernels): every variant and every branch that a kernel takes for good: alignment of activations and of
    pools, dropout, ranks of a block, planes, even and odd lengths of rows."""
    count = itertools.count(1)

    def case(number, *shape, integers, **options):
        return Case(*shape, **options, integers=integers, seed=2000 + number)

    layouts = itertools.product(((144, 0), (140, 4), (141, 3), (144, 1)), ((1, 0), (1, 1), (3, 0)), (0.0, 0.5), (5, 20, 68))  # fmt: skip
    for (dtype, pool, tf32), ((cols, pad), (l, gap), p, rank) in itertools.product(ARITHMETIC, list(layouts)):
        number = next(count)
        shape = (70 + number % 3 * 37, cols, rank, l if cols % l == 0 else 1, dtype, pool)
        options = {"p": p, "pad": pad, "gap": gap, "planes": (1, 2, 9)[number // 3 % 3], "tf32": tf32}
        yield case(number, *shape, **options, integers=number % 4 < 2), KERNELS
    # Several tiles in a part of shrink: stages are used again, with every kind of copy.
    styles = itertools.product(((0, 0), (3, 0), (0, 1), (3, 1)), ((0.5, 5), (0.0, 40), (0.5, 40), (0.0, 5)))
    for (dtype, pool, tf32), ((pad, gap), (p, rank)) in itertools.product(ARITHMETIC, list(styles)):
        number = next(count)
        cols = {"f64": 2112, "f32": 4224}.get(dtype, 8448)
        options = {"p": p, "pad": pad, "gap": gap, "tf32": tf32}
        yield case(number, 2, cols, rank, 8, dtype, pool, **options, integers=number % 3 > 0), ("shrink",)
    # Offsets beyond 32 bits, and infinities.
    for (dtype, pool, tf32), aligned, rank in itertools.product(ARITHMETIC, (True, False), (3, 40)):
        number = next(count)
        options = {"p": 0.5, "planes": 2, "tf32": tf32, "apart": 2**31 + (8 if aligned else 3)}
        yield case(number, 9, 72, rank, 3, dtype, pool, **options, integers=number % 2 > 0), KERNELS
        number = next(count)
        options = {"p": 0.5, "tf32": tf32, "infinite": True}
        yield case(number, 70, 150 if aligned else 151, rank, 1, dtype, pool, **options, integers=False), KERNELS
    # Nothing.
    nothing = ((0, 96, 5), (0, 96, 40), (7, 96, 0), (7, 0, 5), (0, 0, 0))
    for (dtype, pool, tf32), shape in itertools.product(ARITHMETIC, nothing):
        number = next(count)
        yield case(number, *shape, 3, dtype, pool, p=0.5, tf32=tf32, integers=True), KERNELS
    # Several column tiles in a block of expand, and in another two row tiles.
    for (dtype, pool, tf32), pad in itertools.product(ARITHMETIC, (0, 3)):
        number = next(count)
        wide = 2 * 8192 + 512 if dtype == pool and not pad else 8192 + 64
        options = {"pad": pad, "planes": 1 + number % 3, "tf32": tf32, "integers": number % 3 > 0}
        yield case(number, 450, wide, 2, 1, dtype, pool, **options), ("expand",)
        number = next(count)
        options = {"pad": pad, "gap": pad, "tf32": tf32, "integers": number % 3 > 0}
        yield case(number, 8450, 136, 1, 1, dtype, pool, **options), ("expand", "shrink")


def products(share):
    """(case, kernel, modes) of one in `share` of all."""
    everywhere = ((case, KERNELS) for case in itertools.chain(corner_cases(), drawn_cases()))
    for number, (case, kernels) in enumerate(itertools.chain(everywhere, branch_cases())):
        work = case.rows * case.cols * max(case.rank, 16)
        for k, kernel in enumerate(kernels):
            if (number + k) % share == 0 and (kernel != "expand dropout" or case.p):
                yield case, kernel, modes_of(number * 8 + k, work)
