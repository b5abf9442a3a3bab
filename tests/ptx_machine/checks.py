"""Every check: (name, function of a Kernels, which throws Trouble). Products are in products.py, the others here."""

import ctypes as C
import itertools

import numpy as np
from cases import modes_of, products
from chains import chain_checks
from device import OUTPUT, PRODUCED, Trouble
from formats import load, store
from groups import group_checks
from mirrors import DTYPES, STORAGE, Factor, FactorGradient, Inverse, Planes, inverse_of, sums_type
from products import KERNELS, Case, Product, in_order


def differ(got, expected):
    return f"{np.count_nonzero(got != expected)} of {got.size} differ"


def gather(dtype, shard, shift, gap, number):
    rng = np.random.default_rng([number, shift, gap])
    pool = store(rng.standard_normal((23, shard)), dtype)
    index = rng.integers(0, 23, (3, 5)).astype(np.int32)

    def check(device):
        for mode in modes_of(number * 8 + shift + gap, shard * 15):
            device.free()
            device.configure(**mode)
            m, _ = device.matrix(23, shard, dtype, pool, pad=gap, shift=shift)
            out, got = device.matrix(3, 5 * shard, dtype, access=OUTPUT)
            factor = Factor(m.data, DTYPES[dtype], 23, shard, m.row_stride, device.put(index).ctypes.data, 3, 5)
            device.call("mos_gather_concat", factor, out)
            if got.tobytes() != pool[index].reshape(3, -1).tobytes():
                raise Trouble("not the rows of the pool")

    return f"gather {dtype} shard={shard} shift={shift} gap={gap}", check


def inverse(device, indices, num_shards):
    starts, places = inverse_of(indices, num_shards)
    return Inverse(device.put(starts).ctypes.data, device.put(places).ctypes.data, len(places))


def scatter(dtype, shard, modules, pad, shift, number):
    """By looking at the tables, and by their inverse, where every third module has no gradient."""
    rng = np.random.default_rng([number, modules, pad, shift, 1])
    indices = [rng.integers(0, 20, (1 + k % 9, 5)).astype(np.int32) for k in range(modules)]
    grads = [store(rng.standard_normal((len(i), 5 * shard)), dtype) for i in indices]
    sums = STORAGE[sums_type(dtype)]
    some = [grad[:0] if k % 3 == 1 else grad for k, grad in enumerate(grads)]

    def sums_of(given):
        expected = np.zeros((23, shard), sums)
        for grad, table in zip(given, indices, strict=True):
            for part, at in zip(load(grad, dtype).reshape(-1, shard), table.reshape(-1), strict=False):
                expected[at] += part.astype(sums)
        return expected

    ways = [(grads, False, sums_of(grads)), (some, True, sums_of(some))]

    def check(device):
        for mode, (given, inverted, expected) in itertools.product(modes_of(number * 8 + modules, shard * 15), ways):
            device.free()
            device.configure(**mode)
            views = (FactorGradient * modules)()
            for view, grad, table in zip(views, given, indices, strict=True):
                view.grad = device.matrix(*grad.shape, dtype, grad, PRODUCED, pad=pad, shift=shift)[0]
                view.index, view.shards_per_vector = device.put(table).ctypes.data, 5
            out, got = device.matrix(23, shard, sums_type(dtype), access=OUTPUT)
            by = inverse(device, indices, 23) if inverted else Inverse()
            device.call("mos_scatter_add", C.byref(views), C.c_int(modules), by, out)
            if not np.array_equal(got, expected):
                raise Trouble(differ(got, expected))

    return f"scatter {dtype} shard={shard} modules={modules} pad={pad} shift={shift}", check


def gather_and_scatter_checks():
    widths = (1, 2, 4, 6, 12, 24, 130, 256, 516, 1030)
    for number, (dtype, shard) in enumerate(itertools.product(("bf16", "f16", "f32", "f64"), widths)):
        for shift, gap in ((0, 0), (1, 0), (0, 8), (2, 1)):
            yield gather(dtype, shard, shift, gap, number)
        many = 70 if shard in (4, 6) else 5  # more modules than one launch takes
        for modules, pad, shift in ((1, 0, 0), (3, 1, 0), (2, 4, 0), (2, 0, 1), (many, 0, 0)):
            yield scatter(dtype, shard, modules, pad, shift, number)


def gather_far_apart(device):
    rng = np.random.default_rng(6)
    for dtype, apart in itertools.product(("bf16", "f64"), (2**31 + 8, 2**31 + 3)):
        device.free()
        device.configure()
        pool, index = store(rng.standard_normal((5, 24)), dtype), rng.integers(0, 5, (3, 2)).astype(np.int32)
        m, _ = device.sparse_matrix(5, 24, dtype, pool, apart)
        out, got = device.matrix(3, 48, dtype, access=OUTPUT)
        factor = Factor(m.data, DTYPES[dtype], 5, 24, apart, device.put(index).ctypes.data, 3, 2)
        device.call("mos_gather_concat", factor, out)
        if got.tobytes() != pool[index].reshape(3, -1).tobytes():
            raise Trouble("not the rows of the pool")


def scatter_far_apart(device):
    rng = np.random.default_rng(6)
    for dtype, apart, inverted in itertools.product(("f32", "bf16", "f64"), (2**31 + 8, 2**31 + 3), (False, True)):
        device.free()
        device.configure()
        grad = store(rng.integers(-9, 10, (4, 24)), dtype)
        table = np.array([[0, 2]] * 4, np.int32)
        views = (FactorGradient * 1)()
        views[0].grad = device.sparse_matrix(4, 24, dtype, grad, apart)[0]
        views[0].index = device.put(table).ctypes.data
        views[0].shards_per_vector = 2
        out, got = device.matrix(3, 12, sums_type(dtype), access=OUTPUT)
        by = inverse(device, [table], 3) if inverted else Inverse()
        device.call("mos_scatter_add", C.byref(views), C.c_int(1), by, out)
        sums = load(grad, dtype).sum(0)
        expected = np.stack([sums[:12], 0 * sums[:12], sums[12:]])
        if not np.array_equal(got, expected):
            raise Trouble(differ(got, expected))


def long_grids(device):
    """More segments and shards than a grid has blocks."""
    rng = np.random.default_rng(5)
    device.free()
    device.configure()
    index = rng.integers(0, 66000, (1, 66000)).astype(np.int32)
    pool = rng.standard_normal((66000, 1)).astype(np.float32)
    m, _ = device.matrix(66000, 1, "f32", pool)
    out, got = device.matrix(1, 66000, "f32", access=OUTPUT)
    factor = Factor(m.data, DTYPES["f32"], 66000, 1, 1, device.put(index).ctypes.data, 1, 66000)
    device.call("mos_gather_concat", factor, out)
    if not np.array_equal(got, pool[index].reshape(1, -1)):
        raise Trouble("gather: not the rows of the pool")
    for inverted in (False, True):
        device.free()
        table = np.array([[0, 65999, 65999]], np.int32)
        views = (FactorGradient * 1)()
        views[0].grad = device.matrix(1, 3, "f32", np.ones((1, 3), np.float32))[0]
        views[0].index = device.put(table).ctypes.data
        views[0].shards_per_vector = 3
        out, got = device.matrix(66000, 1, "f32", access=OUTPUT)
        by = inverse(device, [table], 66000) if inverted else Inverse()
        device.call("mos_scatter_add", C.byref(views), C.c_int(1), by, out)
        if (got[0, 0], got[65999, 0], got.sum()) != (1, 2, 3):
            raise Trouble("scatter: wrong sums")


def total(dtype, number, count, rows, cols, shift):
    rng = np.random.default_rng([number, 3])
    given = [rng.standard_normal(shape).astype(STORAGE[dtype]) for shape in ((count, rows, cols), (2, 10, 11))]
    expected = [in_order(planes, planes.shape[1:]) for planes in given]

    def check(device):
        for mode, in_place in itertools.product(modes_of(number, 1000), (False, True)):
            device.free()
            device.configure(**mode)
            put = [device.put(planes, OUTPUT, shift=shift) for planes in given]
            outs = [
                planes[0] if in_place else device.out(planes.shape[1:], planes.dtype, shift=shift) for planes in put
            ]
            structs = [Planes(planes.ctypes.data, *planes.shape) for planes in put]
            device.call("mos_sums", *structs, *outs, C.c_int(DTYPES[dtype]))
            for out, wanted in zip(outs, expected, strict=True):
                if not np.array_equal(out, wanted):
                    raise Trouble("not the sum in order")

    return f"sum {dtype} {count} x {rows} x {cols} shift={shift}", check


def sum_checks():
    shapes = ((1, 3, 5, 0), (2, 7, 4, 0), (3, 5, 7, 0), (8, 33, 16, 0), (9, 33, 16, 0), (17, 40, 30, 0), (32, 1, 8, 0), (5, 8, 8, 1), (7, 64, 64, 0))  # fmt: skip
    for dtype, (number, shape) in itertools.product(("f32", "f64"), list(enumerate(shapes))):
        yield total(dtype, number, *shape)


def trap(kernel, case, wrong):
    """An index out of range stops every kernel that reads it."""

    def check(device):
        device.free()
        device.configure()
        product = Product(case)
        product.index[2, 1] = wrong
        try:
            product.run(device, kernel)
        except Trouble as error:
            if str(error).startswith("trap"):
                return
            raise
        raise Trouble("no trap")

    return f"trap {kernel} {case} index {wrong}", check


def trap_checks():
    options = itertools.product((-1, 10**6), ("bf16", "f16", "f32", "f64"), (3, 40), (0, 1))
    for wrong, dtype, rank, gap in options:
        for kernel in ("shrink", "expand", "expand_backward", "shrink_backward"):
            yield trap(kernel, Case(9, 64, rank, 2, dtype, "f32", gap=gap), wrong)


def product(case, kernel, modes):
    # Data is drawn when the check runs.
    return f"{kernel}: {case}", lambda device: Product(case).check(device, kernel, modes)


def product_checks(share):
    for case, kernel, modes in products(share):
        yield product(case, kernel, modes)


def case_checks(rows, cols, rank, l, dtype, pool_dtype, p="0"):
    """Every kernel once on a case, given as text."""
    case = Case(int(rows), int(cols), int(rank), int(l), dtype, pool_dtype, float(p))
    for kernel in KERNELS:
        if kernel != "expand dropout" or case.p:
            yield product(case, kernel, [{}])


def all_checks(share):
    """One product in `share`, and everything else."""
    yield from chain_checks()
    yield from group_checks()
    yield from gather_and_scatter_checks()
    yield "gather with rows far apart", gather_far_apart
    yield "scatter with rows far apart", scatter_far_apart
    yield "gather and scatter with long grids", long_grids
    yield from sum_checks()
    yield from trap_checks()
    yield from product_checks(share)
