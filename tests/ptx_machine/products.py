"""The low-rank kernels K1 to K4 on drawn data, and what their results must be: computed in float64 from operands that
are rounded exactly where the kernels should round them."""

import ctypes as C
from dataclasses import dataclass

import numpy as np
from device import INPUT, OUTPUT, PRODUCED, Trouble
from formats import ADDITION, HALF_UNIT, dropout_mask, load, round_to, round_to_tf32, store, threshold_of
from mirrors import DTYPES, STORAGE, Dropout, ExpandOptions, Factor, Planes, sums_type

KERNELS = (
    *("shrink", "expand", "expand accumulate", "expand plain", "expand dropout", "expand_backward"),
    *("shrink_backward", "shrink_backward accumulate"),
)


@dataclass(frozen=True)
class Case:
    """Shapes and options of a product."""

    rows: int
    cols: int
    rank: int
    l: int  # shards of a row of the factor
    dtype: str
    pool_dtype: str
    p: float = 0.0  # of dropout
    pad: int = 0  # elements between rows of activations
    dx_pad: int = 0  # more of them for what is written
    shift: int = 0  # elements off the alignment of vectors
    gap: int = 0  # elements between shards of the pool
    planes: int = 1  # of S or dS
    tf32: bool = False
    integers: bool = True  # small integers, whose products and sums are exact; else real numbers
    seed: int = 0
    apart: int = 0  # elements between the starts of rows and of shards, if many
    infinite: bool = False

    def __str__(self):
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        more = [f"{name}={value}" for name, value in vars(self).items() if value != defaults[name] and name in MORE]
        kind = "integers" if self.integers else "reals"
        shape = f"T={self.rows} C={self.cols} r={self.rank} l={self.l} {self.dtype}/{self.pool_dtype}"
        return " ".join([shape, kind, f"data={self.seed}", *more])


MORE = ("p", "pad", "dx_pad", "shift", "gap", "planes", "tf32", "apart", "infinite")


class Product:
    """The data of a case: expected(), run() and check() of each kernel."""

    def __init__(self, case):
        self.case = case
        dtype, rank = case.dtype, case.rank
        assert case.cols % case.l == 0
        numbers = [case.seed, case.rows, case.cols, rank, case.l, DTYPES[dtype], DTYPES[case.pool_dtype]]
        rng = np.random.default_rng([*numbers, int(case.p * 100), int(case.integers)])

        def draw(dtype, *shape):
            if case.integers:
                return rng.integers(-2, 3, shape).astype(np.float64)
            return round_to(rng.standard_normal(shape), dtype)

        shards = 2 * rank * case.l + 1
        self.index = 1 + rng.permutation(shards - 1)[: rank * case.l].reshape(rank, case.l).astype(np.int32)
        if rank > 2:
            self.index[1] = self.index[0]  # shards are shared
        self.pool = np.full((shards, case.cols // case.l), np.nan)  # NaN where nobody should look
        used = np.unique(self.index)
        self.pool[used] = draw(case.pool_dtype, len(used), case.cols // case.l)
        self.x, self.y, self.dy = (draw(dtype, case.rows, case.cols) for _ in range(3))
        self.s = draw(sums_type(dtype), case.planes, case.rows, rank)
        self.bias = draw(dtype, case.cols)
        if case.infinite:
            self.x[0, 0] = self.dy[0, case.cols // 2] = np.inf
            self.y[case.rows - 1, case.cols - 1] = -np.inf
        self.seed = int(rng.integers(2**62))
        self.scale = 0.5 if case.integers else 0.7312 if dtype == "f64" else float(np.float32(0.7312))
        self.factor = round_to(self.pool[self.index].reshape(rank, case.cols), dtype)
        self.mask = dropout_mask(case.rows, case.cols, case.p, self.seed)
        kept = 65536 - threshold_of(case.p)
        self.keep_scale = 65536 / kept if kept else 0.0

    # ------------------------------------------------------------------------------------ what is expected

    def expected(self, name):
        """{output: (exact values, how far each may be off before its last rounding)}."""
        dtype, sums = self.case.dtype, sums_type(self.case.dtype)
        unit = ADDITION[dtype]
        operand = round_to_tf32 if self.case.tf32 else lambda values: values
        dropped = np.where(self.mask, self.x, 0.0)
        # Planes are added in the sums' dtype, in order; products see the sum in the activations' dtype.
        s = in_order(store(self.s, sums), (self.case.rows, self.case.rank))

        # All scales of a product of s go onto s before it is rounded.
        def times(scale):
            scale = scale if sums == "f64" else float(np.float32(scale))
            return round_to(load(store(load(s, sums) * scale, sums), sums), dtype)

        scaled = times(self.scale)

        def product(a, b, scale=1.0):
            a, b = operand(a), operand(b)
            additions = 4 + 2 * np.sqrt(max(a.shape[1], 1))
            return scale * (a @ b), abs(scale) * (np.abs(a) @ np.abs(b)) * unit * additions

        def plus(result, other):
            return result[0] + other, result[1] + unit * np.abs(other)

        def masked(result):
            return tuple(np.where(self.mask, values, 0.0) for values in result)

        if name == "shrink":
            return {"s": product(dropped, self.factor.T, self.keep_scale)}
        if name == "expand":
            total = load(s, sums)
            return {"y": plus(product(scaled, self.factor), self.bias), "sum": (total, np.zeros_like(total))}
        if name == "expand accumulate":
            return {"y": plus(product(scaled, self.factor), self.y)}
        if name == "expand plain":
            return {"y": product(scaled, self.factor)}
        if name == "expand dropout":
            return {"y": masked(product(times(self.scale * self.keep_scale), self.factor))}
        if name == "expand_backward":
            return {"ds": product(self.dy, self.factor.T, self.scale), "grad": product(scaled.T, self.dy)}
        kept = times(self.keep_scale)
        dx = masked(product(kept, self.factor))
        if name == "shrink_backward accumulate":
            dx = plus(dx, self.y)
        return {"dx": dx, "grad": product(kept.T, dropped)}

    def compare(self, key, stored, dtype, expected):
        """Integers: bit for bit. Reals: half a unit in the last place of the result, and the bound."""
        exact, bound = expected
        values = load(stored, dtype)
        if self.case.infinite:
            # What is not finite stays in its row and its column, also where tiles are padded.
            wrong, problem = np.isfinite(values) != np.isfinite(exact), "an infinity spread or was lost"
        elif not np.isfinite(values).all():
            wrong, problem = ~np.isfinite(values), "not finite"
        elif self.case.integers and self.keep_scale in (0, 1, 2):  # by other scales integers are not exact
            wrong, problem = values != round_to(exact, dtype), "other bits"
        else:
            tiny = 2.0**-25 if dtype == "f16" else 1e-37  # half a unit of subnormal numbers
            allowed = bound + HALF_UNIT[dtype] * np.abs(exact) * (1 + 2.0**-6) + tiny
            wrong, problem = np.abs(values - exact) > allowed, "too far off"
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            count = f"{np.count_nonzero(wrong)} of {wrong.size}"
            raise Trouble(f"{key}: {problem}: {count}, first at {where}: {values[where]} for {exact[where]}")

    # ------------------------------------------------------------------------------------ the kernels

    def put_factor(self, device, access=INPUT):
        case, (shards, size) = self.case, self.pool.shape
        stored = store(self.pool, case.pool_dtype)
        if case.apart:
            pool, _ = device.sparse_matrix(shards, size, case.pool_dtype, stored, case.apart, access)
        else:
            pool, _ = device.matrix(shards, size, case.pool_dtype, stored, access, pad=case.gap, shift=case.shift)
        index = device.put(self.index).ctypes.data
        return Factor(pool.data, DTYPES[case.pool_dtype], shards, size, pool.row_stride, index, case.rank, case.l)

    def put_dropout(self, device):
        threshold = threshold_of(self.case.p)
        return Dropout(device.put(np.array([self.seed], np.int64)).ctypes.data if threshold else None, threshold)

    def put_planes(self, device):
        """S or dS, as the launch before writes it."""
        array = device.put(store(self.s, sums_type(self.case.dtype)), PRODUCED, shift=self.case.shift)
        return Planes(array.ctypes.data, *array.shape)

    def put_activations(self, device, values, access=INPUT, *, dx_pad=0):
        """(Matrix, array) of (T, C) values, or NaN."""
        case = self.case
        stored = None if values is None else store(values, case.dtype)
        if case.apart:
            return device.sparse_matrix(case.rows, case.cols, case.dtype, stored, case.apart, access)
        pad = case.pad + dx_pad
        return device.matrix(case.rows, case.cols, case.dtype, stored, access, pad=pad, shift=case.shift)

    def put_target(self, device, accumulate):
        return self.put_activations(device, self.y if accumulate else None, OUTPUT, dx_pad=self.case.dx_pad)

    def new_planes(self, device, count, rows, cols):
        array = device.out((count, rows, cols), STORAGE[sums_type(self.case.dtype)])
        return Planes(array.ctypes.data, count, rows, cols), array

    def summed(self, device, planes, array):
        """The sum of planes by launch_sum, which must be the sum in order."""
        dtype = sums_type(self.case.dtype)
        out = device.out(array.shape[1:], STORAGE[dtype])
        if array.size:
            device.call("mos_sum", planes, out, C.c_int(DTYPES[dtype]))
            if not np.array_equal(out, in_order(array, array.shape[1:]), equal_nan=True):
                raise Trouble("sum is not the sum in order")
        return out, dtype

    def backward_planes(self, device, activations):
        counts = (C.c_int64 * 3)()
        device.library.mos_backward_planes(C.byref(activations), C.c_int64(self.case.rank), counts)
        return counts[0], counts[1]

    def run(self, device, name):
        """{output: (stored, dtype)} of a kernel; planes are summed."""
        kernel, _, option = name.partition(" ")
        return getattr(self, kernel)(device, option)

    def shrink(self, device, _):
        # The first of a layer: the launch before may have written anything.
        factor, (x, _) = self.put_factor(device, PRODUCED), self.put_activations(device, self.x, PRODUCED)
        count = device.library.mos_shrink_planes(C.byref(x), C.byref(factor))
        s = self.new_planes(device, count, self.case.rows, self.case.rank)
        device.call("mos_shrink", x, factor, self.put_dropout(device), s[0], C.c_int(self.case.tf32))
        return {"s": self.summed(device, *s)}

    def expand(self, device, option):
        case, sums = self.case, sums_type(self.case.dtype)
        biased = not option  # and with the sum of the planes
        y, array = self.put_target(device, option == "accumulate")
        total = device.out((case.rows, case.rank), STORAGE[sums])
        options = ExpandOptions(
            device.put(store(self.bias, case.dtype)).ctypes.data if biased else None,
            option == "accumulate",
            self.put_dropout(device) if option == "dropout" else Dropout(None, 0),
            total.ctypes.data if biased else None,
        )
        arguments = (self.put_planes(device), self.put_factor(device), C.c_double(self.scale), y, options)
        device.call("mos_expand", *arguments, C.c_int(case.tf32))
        return {"y": (array, case.dtype), **({"sum": (total, sums)} if biased else {})}

    def expand_backward(self, device, _):
        case = self.case
        dy, _ = self.put_activations(device, self.dy, PRODUCED)
        projected, grads = self.backward_planes(device, dy)
        ds = self.new_planes(device, projected, case.rows, case.rank)
        grad = self.new_planes(device, grads, case.rank, case.cols)
        arguments = (dy, self.put_planes(device), self.put_factor(device), C.c_double(self.scale), ds[0], grad[0])
        device.call("mos_expand_backward", *arguments, C.c_int(case.tf32))
        return {"ds": self.summed(device, *ds), "grad": self.summed(device, *grad)}

    def shrink_backward(self, device, option):
        case, accumulate = self.case, option == "accumulate"
        x, _ = self.put_activations(device, self.x)
        dx, array = self.put_target(device, accumulate)
        grad = self.new_planes(device, self.backward_planes(device, x)[1], case.rank, case.cols)
        arguments = (x, self.put_planes(device), self.put_factor(device), self.put_dropout(device), dx)
        device.call("mos_shrink_backward", *arguments, C.c_int(accumulate), grad[0], C.c_int(case.tf32))
        return {"dx": (array, case.dtype), "grad": self.summed(device, *grad)}

    def check(self, device, name, modes):
        """Right in the first mode, and the same bits in all others."""
        first = {}
        for mode in modes:
            device.free()
            device.configure(**mode)
            results = {key: (stored.copy(), dtype) for key, (stored, dtype) in self.run(device, name).items()}
            if not first:
                first, expected = results, self.expected(name)
                for key, (stored, dtype) in results.items():
                    self.compare(key, stored, dtype, expected[key])
            for key, (stored, _) in results.items():
                if stored.tobytes() != first[key][0].tobytes():
                    raise Trouble(f"{key}: other bits than in order")
        device.free()


def in_order(planes, shape):
    """The sum of planes in their dtype, one after the other."""
    total = np.zeros(shape, planes.dtype)
    for plane in planes:
        total = total + plane
    return total
