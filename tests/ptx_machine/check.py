"""The kernels of csrc/cuda, as nvcc's PTX executed by the interpreter, against NumPy in float64.

    python check.py LIBRARY PART PARTS [--coverage FILE] [--only SUBSTRING] [--quick]

runs every PARTS-th check from PART on and prints one line for each that fails, then "N checks, M failed".
"""

import argparse
import ctypes as C
import hashlib
import itertools
import mmap
import sys
import time

import numpy as np

NUMBER = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}
STORAGE = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.float16}
# Half a unit in the last place of a result, relative; and of one addition of the sums.
OUT = {"f32": 2.0**-24, "f64": 2.0**-53, "bf16": 2.0**-8, "f16": 2.0**-11}
SUM = {"f32": 2.0**-24, "f64": 2.0**-53, "bf16": 2.0**-24, "f16": 2.0**-24}


def sums_of(dtype):
    return "f64" if dtype == "f64" else "f32"


def store(values, dtype):
    """float64 to the storage of a dtype, to nearest even. Once: float64 to bfloat16 through float32 would round twice."""
    values = np.asarray(values, np.float64)
    if dtype != "bf16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE[dtype])
    # To odd in float32, then to nearest even.
    single = values.astype(np.float32)
    bits = single.view(np.uint32).astype(np.int64)
    wide = single.astype(np.float64)
    toward_zero = np.abs(wide) > np.abs(values)
    bits = np.where(toward_zero, bits - 1, bits)
    inexact = wide != values
    bits = np.where(inexact, bits | 1, bits)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def value(stored, dtype):
    stored = np.asarray(stored)
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def rounded(values, dtype):
    return value(store(values, dtype), dtype)


def operand(values, dtype, tf32):
    """What a product sees of values that were stored in dtype."""
    if not tf32:
        return values
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def keep(rows, cols, p, seed):
    """mos_ext/reference.py's mask, by Python's integers: Philox4x32-7."""
    threshold = int(p * 65536 + 0.5)
    out = np.ones((rows, cols), bool)
    if not threshold or not out.size:
        return out
    groups = -(-cols // 8)
    row, group = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(groups, dtype=np.uint64), indexing="ij")
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = group, row & low, row >> np.uint64(32), np.zeros_like(row)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    bits = np.stack([w >> np.uint64(s) & np.uint64(0xFFFF) for w in (c0, c1, c2, c3) for s in (0, 16)], -1)
    return bits.reshape(rows, -1)[:, :cols] >= threshold


class Matrix(C.Structure):
    _fields_ = [
        ("data", C.c_void_p),
        ("dtype", C.c_int32),
        ("rows", C.c_int64),
        ("cols", C.c_int64),
        ("stride", C.c_int64),
    ]


class Factor(C.Structure):
    _fields_ = [
        ("pool", C.c_void_p),
        ("dtype", C.c_int32),
        ("shards", C.c_int64),
        ("shard", C.c_int64),
        ("stride", C.c_int64),
        ("index", C.c_void_p),
        ("rank", C.c_int64),
        ("l", C.c_int64),
    ]


class FactorGradient(C.Structure):
    _fields_ = [("grad", Matrix), ("index", C.c_void_p), ("l", C.c_int64)]


class Dropout(C.Structure):
    _fields_ = [("seed", C.c_void_p), ("threshold", C.c_uint32)]


class Planes(C.Structure):
    _fields_ = [("data", C.c_void_p), ("count", C.c_int64), ("rows", C.c_int64), ("cols", C.c_int64)]


class Options(C.Structure):
    _fields_ = [("bias", C.c_void_p), ("accumulate", C.c_bool), ("dropout", Dropout), ("s_sum", C.c_void_p)]


class Trouble(Exception):
    pass


GUARD = 256


class Device:
    """Memory and launches. Only registered bytes may be touched; around every buffer lie 256 bytes of a pattern, and so
    they do between the rows of strided matrices."""

    def __init__(self, path):
        self.lib = C.CDLL(path)
        self.lib.ptx_error.restype = C.c_char_p
        self.lib.mos_shrink_planes.restype = C.c_int64
        sizes = (C.c_int64 * 6)()
        self.lib.mos_struct_sizes(sizes)
        structs = (Matrix, Factor, FactorGradient, Dropout, Planes, Options)
        assert list(sizes) == [C.sizeof(s) for s in structs], "the structs of launch.h have changed"
        self.buffers, self.rows, self.kept = [], [], []
        self.mode(late=1)

    traffic = 0

    def mode(self, late=1, warps=0, lanes=0, blocks=0, race=0, seed=1):
        self.setting = dict(late=late, warps=warps, lanes=lanes, blocks=blocks, race=race, seed=seed)
        self.lib.ptx_config((C.c_int64 * 7)(late, warps, lanes, blocks, race, seed, self.traffic))

    def bytes(self, count, writable, shift=0):
        """A buffer of `count` bytes, `shift` bytes behind a multiple of 128."""
        frame = np.full(count + 2 * GUARD + 128 + shift, 0xA5, np.uint8)
        at = GUARD + (-(frame.ctypes.data + GUARD)) % 128 + shift
        self.buffers.append((frame, at, count, writable))
        return frame[at : at + count]

    def put(self, array, *, writable=False, shift=0):
        """A copy of a contiguous array; shift in elements."""
        array = np.ascontiguousarray(array)
        raw = self.bytes(array.nbytes, writable, shift * array.itemsize)
        out = raw.view(array.dtype).reshape(array.shape)
        out[...] = array
        return out

    def out(self, shape, dtype, *, shift=0):
        """An output, all ones: NaN in every type."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = self.bytes(size, True, shift * np.dtype(dtype).itemsize)
        raw[...] = 0xFF
        return raw.view(dtype).reshape(shape)

    def matrix(self, rows, cols, dtype, values=None, *, pad=0, shift=0, writable=False):
        """(Matrix, view); what lies between rows is checked by `call`."""
        size = np.dtype(STORAGE[dtype]).itemsize
        stride = cols + pad
        raw = self.bytes(max(rows * stride - pad, 0) * size if rows else 0, writable, shift * size)
        flat = raw.view(STORAGE[dtype])
        view = np.lib.stride_tricks.as_strided(flat, (rows, cols), (stride * size, size))
        if rows and cols:
            if values is None:
                np.lib.stride_tricks.as_strided(flat.view(f"u{size}"), (rows, cols), (stride * size, size))[...] = (
                    np.iinfo(f"u{size}").max
                )
            else:
                view[...] = values
        if pad and writable:
            gaps = np.ones(len(flat), bool)
            np.lib.stride_tricks.as_strided(gaps, (rows, cols), (stride, 1))[...] = False
            self.gaps.append((flat.view(f"u{size}"), gaps, flat.view(f"u{size}")[gaps].copy()))
        return Matrix(raw.ctypes.data, NUMBER[dtype], rows, cols, stride), view

    def sparse(self, rows, cols, dtype, values, stride, writable=False):
        """(Matrix, view) with rows so far apart that 32 bits do not count the elements between them. Only rows may be
        touched."""
        size = np.dtype(STORAGE[dtype]).itemsize
        memory = mmap.mmap(
            -1,
            ((rows - 1) * stride + cols) * size,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000),
        )
        flat = np.frombuffer(memory, STORAGE[dtype])
        view = np.lib.stride_tricks.as_strided(flat, (rows, cols), (stride * size, size))
        if values is None:
            np.lib.stride_tricks.as_strided(flat.view(f"u{size}"), (rows, cols), (stride * size, size))[...] = np.iinfo(
                f"u{size}"
            ).max
        else:
            view[...] = values
        self.kept.append(flat)
        for row in range(rows):
            at = flat.ctypes.data + row * stride * size
            self.rows.append((at, at + cols * size, writable))
        return Matrix(flat.ctypes.data, NUMBER[dtype], rows, cols, stride), view

    gaps = []
    hashes = None  # of products' results, where they are wanted

    def call(self, name, *arguments):
        lo, hi, writable = [], [], []
        for frame, at, count, w in self.buffers:
            if count:
                lo.append(frame.ctypes.data + at)
                hi.append(frame.ctypes.data + at + count)
                writable.append(int(w))
        for first, end, w in self.rows:
            lo.append(first)
            hi.append(end)
            writable.append(int(w))
        n = len(lo)
        self.lib.ptx_ranges(n, (C.c_uint64 * n)(*lo), (C.c_uint64 * n)(*hi), (C.c_int * n)(*writable))
        inputs = [(b, b[0].copy()) for b in self.buffers if not b[3]]
        passed = [
            C.byref(a) if isinstance(a, C.Structure) else C.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a
            for a in arguments
        ]
        status = getattr(self.lib, name)(*passed)
        error = self.lib.ptx_error().decode()
        if error:
            raise Trouble(error)
        if status:
            raise Trouble(f"{name} returned {status}")
        for (frame, *_), before in inputs:
            if not np.array_equal(frame, before):
                raise Trouble("an input was written")
        for frame, at, count, _ in self.buffers:
            if (frame[:at] != 0xA5).any() or (frame[at + count :] != 0xA5).any():
                raise Trouble("a guard was written")
        for flat, gaps, before in self.gaps:
            if not np.array_equal(flat[gaps], before):
                raise Trouble("what lies between rows was written")

    def done(self):
        self.buffers, self.rows, self.kept = [], [], []
        self.gaps = []


class Case:
    """One set of shapes and options, with its data."""

    def __init__(
        self,
        T,
        cols,
        r,
        l,
        dtype,
        pool_dtype=None,
        p=0.0,
        *,
        pad=0,
        shift=0,
        gap=0,
        dx_pad=0,
        planes=1,
        tf32=False,
        integers=True,
        seed=0,
        apart=0,
        infinite=False,
    ):
        assert cols % l == 0
        self.T, self.cols, self.r, self.l, self.dtype, self.pool_dtype = T, cols, r, l, dtype, pool_dtype or dtype
        self.p, self.pad, self.shift, self.gap, self.dx_pad, self.planes, self.tf32, self.integers = (
            p,
            pad,
            shift,
            gap,
            dx_pad,
            planes,
            tf32,
            integers,
        )
        self.number, self.apart, self.infinite = seed, apart, infinite
        self.name = (
            f"T={T} C={cols} r={r} l={l} {dtype}/{self.pool_dtype}{' tf32' if tf32 else ''} p={p} pad={pad}+{dx_pad} shift={shift} gap={gap} planes={planes} {'integers' if integers else 'reals'} data={seed}"
            + f" rows {apart} apart" * bool(apart)
            + " infinite" * infinite
        )
        rng = np.random.default_rng(
            [seed, T, cols, r, l, NUMBER[dtype], NUMBER[self.pool_dtype], int(p * 100), int(integers)]
        )

        def draw(dtype, *shape):
            if integers:
                return rng.integers(-2, 3, shape).astype(np.float64)
            return rounded(rng.standard_normal(shape), dtype)

        shards = 2 * r * l + 1
        self.index = 1 + rng.permutation(shards - 1)[: r * l].reshape(r, l).astype(np.int32)
        if r > 2:
            self.index[1] = self.index[0]  # shards are shared
        self.pool = np.full((shards, cols // l), np.nan)
        used = np.unique(self.index)
        self.pool[used] = draw(self.pool_dtype, len(used), cols // l)
        self.x, self.y, self.dy = (draw(dtype, T, cols) for _ in range(3))
        self.s = draw(sums_of(dtype), planes, T, r)
        self.bias = draw(dtype, cols)
        if infinite:
            self.x[0, 0] = self.dy[0, cols // 2] = np.inf
            self.y[T - 1, cols - 1] = -np.inf
        self.seed = int(rng.integers(2**62))
        self.scale = 0.5 if integers else float(np.float32(0.7312)) if dtype != "f64" else 0.7312
        self.factor = rounded(self.pool[self.index].reshape(r, cols), dtype)
        self.mask = keep(T, cols, p, self.seed)
        threshold = int(p * 65536 + 0.5)
        self.kept = 65536 / (65536 - threshold) if threshold < 65536 else 0.0

    # ------------------------------------------------------------------------------------ what is expected

    def expected(self, name):
        """Exact values of each output, and a bound of how far each may be off but for its last rounding."""
        o = lambda v: operand(v, self.dtype, self.tf32)
        sums, unit = sums_of(self.dtype), SUM[self.dtype]
        dropped = np.where(self.mask, self.x, 0.0)
        # Sums of planes are added in the sums' dtype, in order.
        s = np.zeros((self.T, self.r), STORAGE[sums])
        for plane in self.s:
            s = s + store(plane, sums)
        scaled = rounded(value(store(value(s, sums) * self.scale, sums), sums), self.dtype)
        plain = rounded(value(s, sums), self.dtype)

        def product(a, b, factor=1.0):
            n = max(a.shape[1], 1)
            return factor * (o(a) @ o(b)), abs(factor) * (np.abs(o(a)) @ np.abs(o(b))) * unit * (4 + 2 * np.sqrt(n))

        if name == "shrink":
            return {"s": product(dropped, self.factor.T, self.kept)}
        if name == "expand":
            v, e = product(scaled, self.factor)
            return {"y": (v + self.bias, e + unit * np.abs(self.bias)), "sum": (value(s, sums), 0 * value(s, sums))}
        if name == "expand accumulate":
            v, e = product(scaled, self.factor)
            return {"y": (v + self.y, e + unit * np.abs(self.y))}
        if name == "expand plain":
            return {"y": product(scaled, self.factor)}
        if name == "expand dropout":
            v, e = product(scaled, self.factor, self.kept)
            return {"y": (np.where(self.mask, v, 0.0), e)}
        if name == "expand_backward":
            return {"ds": product(self.dy, self.factor.T, self.scale), "grad": product(scaled.T, self.dy)}
        v, e = product(plain, self.factor, self.kept)
        v, e = np.where(self.mask, v, 0.0), np.where(self.mask, e, 0.0)
        if name == "shrink_backward accumulate":
            v, e = v + self.y, e + unit * np.abs(self.y)
        return {"dx": (v, e), "grad": product(plain.T, dropped, self.kept)}

    def compare(self, name, key, got, dtype, expected):
        """Integers: bits. Reals: the bound."""
        exact, bound = expected
        values = value(got, dtype)
        if self.infinite:
            # What is not finite stays in its row and its column, also where tiles are padded.
            if not np.array_equal(np.isfinite(values), np.isfinite(exact)):
                where = tuple(np.argwhere(np.isfinite(values) != np.isfinite(exact))[0])
                raise Trouble(f"{key}: an infinity spread or was lost, first at {where}")
            return
        if not np.isfinite(values).all():
            where = tuple(np.argwhere(~np.isfinite(values))[0])
            raise Trouble(f"{key} is not finite at {where}, {np.count_nonzero(~np.isfinite(values))} of {values.size}")
        if self.integers and self.kept in (0, 1, 2):  # other scales of dropout are not exact
            wanted = value(store(exact, dtype), dtype)
            if not np.array_equal(values, wanted):
                where = tuple(int(v) for v in np.argwhere(values != wanted)[0])
                raise Trouble(
                    f"{key}: {np.count_nonzero(values != wanted)} of {values.size} differ, first at {where}: {values[where]} for {wanted[where]}"
                )
            return
        allowed = bound + OUT[dtype] * np.abs(exact) * (1 + 2.0**-6) + (2.0**-25 if dtype == "f16" else 1e-37)
        off = np.abs(values - exact)
        if (off > allowed).any():
            where = tuple(int(v) for v in np.argwhere(off > allowed)[0])
            raise Trouble(
                f"{key}: {np.count_nonzero(off > allowed)} of {values.size} too far off, first at {where}: {values[where]} for {exact[where]}, allowed {allowed[where]:.3g}"
            )

    # ------------------------------------------------------------------------------------ the kernels

    def put_factor(self, d):
        rows, cols = self.pool.shape
        if self.apart:
            m, _ = d.sparse(rows, cols, self.pool_dtype, store(self.pool, self.pool_dtype), self.apart)
            return Factor(
                m.data, NUMBER[self.pool_dtype], rows, cols, m.stride, d.put(self.index).ctypes.data, self.r, self.l
            )
        m, _ = d.matrix(rows, cols, self.pool_dtype, store(self.pool, self.pool_dtype), pad=self.gap, shift=self.shift)
        return Factor(
            m.data, NUMBER[self.pool_dtype], rows, cols, m.stride, d.put(self.index).ctypes.data, self.r, self.l
        )

    def put_dropout(self, d):
        threshold = int(self.p * 65536 + 0.5)
        return Dropout(d.put(np.array([self.seed], np.int64)).ctypes.data if threshold else None, threshold)

    def put_planes(self, d):
        return Planes(d.put(store(self.s, sums_of(self.dtype)), shift=self.shift).ctypes.data, *self.s.shape)

    def activations(self, d, values):
        if self.apart:
            return d.sparse(self.T, self.cols, self.dtype, store(values, self.dtype), self.apart)[0]
        return d.matrix(self.T, self.cols, self.dtype, store(values, self.dtype), pad=self.pad, shift=self.shift)[0]

    def run(self, d, name):
        """{output: (stored, dtype)}; planes are summed by launch_sum."""
        sums = sums_of(self.dtype)
        tf32 = C.c_int(self.tf32)
        factor = self.put_factor(d)

        def target(accumulate):
            values = store(self.y, self.dtype) if accumulate else None
            if self.apart:
                return d.sparse(self.T, self.cols, self.dtype, values, self.apart, True)
            return d.matrix(
                self.T, self.cols, self.dtype, values, pad=self.pad + self.dx_pad, shift=self.shift, writable=True
            )

        def planes(count, rows, cols):
            array = d.out((count, rows, cols), STORAGE[sums])
            return Planes(array.ctypes.data, count, rows, cols), array

        def summed(struct, array):
            out = d.out(array.shape[1:], STORAGE[sums])
            if array.size:
                d.call("mos_sum", struct, out, C.c_int(NUMBER[sums]))
                in_order = np.zeros(array.shape[1:], STORAGE[sums])
                for plane in array:
                    in_order = in_order + plane
                if not np.array_equal(out, in_order, equal_nan=True):
                    raise Trouble("sum is not the sum in order")
            return out, sums

        if name == "shrink":
            x = self.activations(d, self.x)
            struct, array = planes(d.lib.mos_shrink_planes(C.byref(x), C.byref(factor)), self.T, self.r)
            d.call("mos_shrink", x, factor, self.put_dropout(d), struct, tf32)
            return {"s": summed(struct, array)}
        if name.startswith("expand") and not name.startswith("expand_"):
            accumulate = name == "expand accumulate"
            m, y = target(accumulate)
            total = d.out((self.T, self.r), STORAGE[sums])
            biased = name == "expand"
            bias = d.put(store(self.bias, self.dtype)).ctypes.data if biased else None
            dropout = self.put_dropout(d) if name == "expand dropout" else Dropout(None, 0)
            options = Options(bias, accumulate, dropout, total.ctypes.data if biased else None)
            d.call("mos_expand", self.put_planes(d), factor, C.c_double(self.scale), m, options, tf32)
            out = {"y": (y.copy(), self.dtype)}
            if biased:
                out["sum"] = total.copy(), sums
            return out
        counts = (C.c_int64 * 2)()
        if name == "expand_backward":
            dy = self.activations(d, self.dy)
            d.lib.mos_backward_planes(C.byref(dy), C.c_int64(self.r), counts)
            ds, grad = planes(counts[0], self.T, self.r), planes(counts[1], self.r, self.cols)
            d.call("mos_expand_backward", dy, self.put_planes(d), factor, C.c_double(self.scale), ds[0], grad[0], tf32)
            return {"ds": summed(*ds), "grad": summed(*grad)}
        x = self.activations(d, self.x)
        accumulate = name == "shrink_backward accumulate"
        m, dx = target(accumulate)
        d.lib.mos_backward_planes(C.byref(x), C.c_int64(self.r), counts)
        grad = planes(counts[1], self.r, self.cols)
        d.call(
            "mos_shrink_backward",
            x,
            self.put_planes(d),
            factor,
            self.put_dropout(d),
            m,
            C.c_int(accumulate),
            grad[0],
            tf32,
        )
        return {"dx": (dx.copy(), self.dtype), "grad": summed(*grad)}

    def check(self, d, name, modes):
        first = None
        for mode in modes:
            d.done()
            d.mode(**mode)
            try:
                got = {key: (stored.copy(), dtype) for key, (stored, dtype) in self.run(d, name).items()}
            finally:
                d.done()
            if first is None:
                expected = self.expected(name)
                for key, (stored, dtype) in got.items():
                    self.compare(name, key, stored, dtype, expected[key])
                first = got
                if d.hashes is not None:
                    for key, (stored, _) in got.items():
                        d.hashes[f"{name} {key}: {self.name}"] = hashlib.sha1(stored.tobytes()).hexdigest()
            else:
                for key, (stored, _) in got.items():
                    if stored.tobytes() != first[key][0].tobytes():
                        raise Trouble(f"{key}: other bits under {mode}")


KERNELS = (
    "shrink",
    "expand",
    "expand accumulate",
    "expand plain",
    "expand dropout",
    "expand_backward",
    "shrink_backward",
    "shrink_backward accumulate",
)


def divisor(cols, wanted):
    return wanted if cols % wanted == 0 else 1


def cases():
    """The grid of the brief, drawn, and what it would miss."""
    rng = np.random.default_rng(20)
    out = []
    types = [
        ("bf16", "bf16", False),
        ("bf16", "f32", False),
        ("f16", "f16", False),
        ("f16", "f32", False),
        ("f32", "f32", False),
        ("f32", "f32", True),
        ("f64", "f64", False),
        ("f64", "f32", False),
    ]

    def add(*a, **k):
        out.append(Case(*a, **k, seed=len(out)))

    # Every pair (T, r) for every arithmetic, the rest drawn.
    for (dtype, pool, tf32), T, r in itertools.product(types, (1, 17, 64, 130, 200), (1, 8, 16, 17, 33, 64, 80)):
        cols = int(rng.choice((64, 96, 128, 264, 512, 1024)))
        if T * cols * r > (3_000_000 if dtype in ("bf16", "f16") else 1_000_000):
            cols = int(rng.choice((64, 96, 128, 264)))
        l = divisor(cols, int(rng.choice((1, 2, 4, 8, 3))))
        style = int(rng.integers(6))
        options = [{}, {}, dict(pad=8), dict(pad=3), dict(shift=1, gap=8), dict(gap=1, dx_pad=1)][style]
        add(
            T,
            cols,
            r,
            l,
            dtype,
            pool,
            float(rng.choice((0.0, 0.5))),
            planes=int(rng.integers(1, 4)),
            tf32=tf32,
            integers=bool(rng.integers(2)),
            **options,
        )
    return out


def more_cases():
    """Corners: shards that are not whole groups, ragged edges, alignment, several tiles and steps of every loop."""
    out = []

    def add(*a, **k):
        for integers in (True, False):
            out.append(Case(*a, **k, integers=integers, seed=1000 + len(out)))

    for dtype, pool, tf32 in (
        ("bf16", "f32", False),
        ("f16", "f16", False),
        ("f32", "f32", False),
        ("f32", "f32", True),
        ("f64", "f64", False),
    ):
        t = dict(tf32=tf32)
        add(1, 1, 1, 1, dtype, pool, **t)
        add(3, 15, 2, 3, dtype, pool, 0.5, **t)
        add(20, 91, 6, 7, dtype, pool, 0.5, pad=1, **t)  # shards of 13
        add(20, 91, 70, 7, dtype, pool, 0.5, pad=5, planes=3, **t)
        add(66, 72, 20, 6, dtype, pool, **t)  # shards of 12, whole rows
        add(67, 144, 12, 9, dtype, pool, 0.25, pad=3, shift=1, **t)
        add(33, 120, 70, 5, dtype, pool, 0.5, planes=2, **t)
        add(9, 200, 5, 1, dtype, pool, 0.999, **t)
        add(9, 200, 5, 1, dtype, pool, 1.0, **t)
        add(9, 200, 5, 1, dtype, pool, 1 / 65536, **t)
        add(5, 264, 17, 33, dtype, pool, 0.1, gap=8, **t)
        add(70, 257, 3, 1, dtype, pool, 0.5, **t)
        add(40, 64, 16, 8, dtype, pool, 0.5, planes=9, **t)  # planes beyond a batch
        add(40, 64, 17, 8, dtype, pool, 0.5, planes=9, **t)
        # Tables longer than what shrink keeps in shared memory; pools aligned or not.
        for gap in (0, 1):
            add(6, 528, 16, 66, dtype, pool, 0.5, gap=gap, **t)
            add(6, 528, 33, 66, dtype, pool, gap=gap, **t)
        add(6, 448, 16, 56, dtype, pool, 0.5, **t)  # a table of seven elements a thread
        add(70, 131, 40, 1, dtype, pool, 0.5, gap=5, planes=5, **t)
        add(70, 131, 40, 1, dtype, pool, 0.5, pad=5, planes=5, **t)
    add(3, 6600, 3, 25, "bf16", "f32", 0.5)  # more than three tiles in a part of shrink
    add(3, 6600, 64, 25, "bf16", "bf16", 0.5)  # more entries than the table in shared memory
    add(2, 8640, 3, 24, "f16", "f32", 0.5)
    add(1, 18200, 3, 14, "f64", "f64")
    add(1, 18200, 3, 14, "f32", "f32", tf32=True)
    add(200, 4352, 3, 4, "bf16", "f32")  # two column tiles in a block of expand
    add(200, 4352, 16, 4, "f16", "f16", planes=3)
    add(600, 512, 16, 4, "bf16", "bf16", 0.5)  # ten row tiles
    add(700, 128, 64, 4, "bf16", "f32", 0.5)
    add(700, 128, 33, 4, "f16", "f16", 0.5)
    add(700, 128, 5, 4, "f32", "f32", 0.5)
    add(8450, 136, 2, 1, "bf16", "bf16")  # two row tiles in a block of expand
    return out


def styles():
    """Every variant and every branch that a kernel takes for good: alignment of activations and of pools, dropout, ranks
    of a block, one or more planes, even and odd lengths of rows."""
    types = (
        ("bf16", "bf16", False),
        ("bf16", "f32", False),
        ("f16", "f16", False),
        ("f16", "f32", False),
        ("f32", "f32", False),
        ("f32", "f32", True),
        ("f64", "f64", False),
        ("f64", "f32", False),
    )
    number = 0
    for (dtype, pool, tf32), (cols, pad), (l, gap), p, r in itertools.product(
        types, ((144, 0), (140, 4), (141, 3), (144, 1)), ((1, 0), (1, 1), (3, 0)), (0.0, 0.5), (5, 20, 68)
    ):
        l = l if cols % l == 0 else 1
        number += 1
        yield (
            Case(
                70 + number % 3 * 37,
                cols,
                r,
                l,
                dtype,
                pool,
                p,
                pad=pad,
                gap=gap,
                planes=(1, 2, 9)[number // 3 % 3],
                tf32=tf32,
                integers=number % 4 < 2,
                seed=2000 + number,
            ),
            KERNELS,
        )
    # Several tiles in a part of shrink: stages are used again, with every kind of copy.
    for (dtype, pool, tf32), (pad, gap), (p, r) in itertools.product(
        types, ((0, 0), (3, 0), (0, 1), (3, 1)), ((0.5, 5), (0.0, 40), (0.5, 40), (0.0, 5))
    ):
        number += 1
        cols = {"f64": 2112, "f32": 4224}.get(dtype, 8448)
        yield (
            Case(
                2, cols, r, 8, dtype, pool, p, pad=pad, gap=gap, tf32=tf32, integers=number % 3 > 0, seed=2000 + number
            ),
            ("shrink",),
        )
    # Offsets beyond 32 bits, and infinities.
    for (dtype, pool, tf32), aligned, r in itertools.product(types, (True, False), (3, 40)):
        number += 1
        yield (
            Case(
                9,
                72,
                r,
                3,
                dtype,
                pool,
                0.5,
                planes=2,
                tf32=tf32,
                integers=number % 2 > 0,
                apart=2**31 + (8 if aligned else 3),
                seed=2000 + number,
            ),
            KERNELS,
        )
        number += 1
        yield (
            Case(
                70,
                150 if aligned else 151,
                r,
                1,
                dtype,
                pool,
                0.5,
                tf32=tf32,
                integers=False,
                infinite=True,
                seed=2000 + number,
            ),
            KERNELS,
        )
    # Nothing.
    for (dtype, pool, tf32), (rows, cols, r) in itertools.product(
        types, ((0, 96, 5), (0, 96, 40), (7, 96, 0), (7, 0, 5), (0, 0, 0))
    ):
        number += 1
        yield Case(rows, cols, r, 3, dtype, pool, 0.5, tf32=tf32, seed=2000 + number), KERNELS
    # Several column tiles in a block of expand, and in another two row tiles.
    for (dtype, pool, tf32), pad in itertools.product(types, (0, 3)):
        number += 1
        wide = 2 * 8192 + 512 if dtype == pool and not pad else 8192 + 64
        yield (
            Case(
                450,
                wide,
                2,
                1,
                dtype,
                pool,
                pad=pad,
                planes=1 + number % 3,
                tf32=tf32,
                integers=number % 3 > 0,
                seed=2000 + number,
            ),
            ("expand",),
        )
        number += 1
        yield (
            Case(
                8450, 136, 1, 1, dtype, pool, pad=pad, gap=pad, tf32=tf32, integers=number % 3 > 0, seed=2000 + number
            ),
            ("expand", "shrink"),
        )


def modes_of(number, size, heavy):
    """The ways to run check `number`: always late copies in order; then one that is drawn, with races looked for."""
    rng = np.random.default_rng([7, number])
    second = dict(
        late=int(rng.integers(2)),
        warps=int(rng.integers(3)),
        lanes=int(rng.integers(3)),
        blocks=int(rng.integers(3)),
        race=1,
        seed=number,
    )
    if size < 20_000:
        second["lanes"] = int(rng.integers(4))
    if heavy:
        second["race"] = 0
    return [dict(late=1), second]


def gather_checks(d):
    """(name, function) for gather-concat, scatter-add and sum."""
    widths = (1, 2, 4, 6, 12, 24, 130, 256, 516, 1030)
    for number, (dtype, shard) in enumerate(itertools.product(("bf16", "f16", "f32", "f64"), widths)):
        for shift, gap in ((0, 0), (1, 0), (0, 8), (2, 1)):
            rng = np.random.default_rng([number, shift, gap])
            modes = modes_of(number * 8 + shift + gap, shard * 15, False)

            def gather(rng=rng, dtype=dtype, shard=shard, shift=shift, gap=gap, modes=modes):
                pool = store(rng.standard_normal((23, shard)), dtype)
                index = rng.integers(0, 23, (3, 5)).astype(np.int32)
                for mode in modes:
                    d.done()
                    d.mode(**mode)
                    m, _ = d.matrix(23, shard, dtype, pool, pad=gap, shift=shift)
                    out, got = d.matrix(3, 5 * shard, dtype, writable=True)
                    d.call(
                        "mos_gather_concat",
                        Factor(m.data, NUMBER[dtype], 23, shard, m.stride, d.put(index).ctypes.data, 3, 5),
                        out,
                    )
                    if got.tobytes() != pool[index].reshape(3, -1).tobytes():
                        raise Trouble("not the rows of the pool")

            yield f"gather {dtype} shard={shard} shift={shift} gap={gap}", gather

        for count, pad, shift in ((1, 0, 0), (3, 1, 0), (2, 4, 0), (2, 0, 1), (70 if shard in (4, 6) else 5, 0, 0)):
            rng = np.random.default_rng([number, count, pad, shift, 1])
            modes = modes_of(number * 8 + count, shard * 15, False)

            def scatter(rng=rng, dtype=dtype, shard=shard, count=count, pad=pad, shift=shift, modes=modes):
                indices = [rng.integers(0, 20, (1 + k % 9, 5)).astype(np.int32) for k in range(count)]
                grads = [store(rng.standard_normal((len(i), 5 * shard)), dtype) for i in indices]
                sums = STORAGE[sums_of(dtype)]
                expected = np.zeros((23, shard), sums)
                for grad, table in zip(grads, indices, strict=True):
                    for q, at in enumerate(table.reshape(-1)):
                        expected[at] += value(grad, dtype).reshape(-1, shard)[q].astype(sums)
                for mode in modes:
                    d.done()
                    d.mode(**mode)
                    modules = (FactorGradient * count)()
                    for module, grad, table in zip(modules, grads, indices, strict=True):
                        module.grad = d.matrix(*grad.shape, dtype, grad, pad=pad, shift=shift)[0]
                        module.index, module.l = d.put(table).ctypes.data, 5
                    out, got = d.matrix(23, shard, sums_of(dtype), writable=True)
                    d.call("mos_scatter_add", C.byref(modules), C.c_int(count), out)
                    if not np.array_equal(got, expected):
                        raise Trouble(f"{np.count_nonzero(got != expected)} of {got.size} sums differ")

            yield f"scatter {dtype} shard={shard} modules={count} pad={pad} shift={shift}", scatter

    def far_apart():
        rng = np.random.default_rng(6)
        for dtype, apart in itertools.product(("bf16", "f64"), (2**31 + 8, 2**31 + 3)):
            d.done()
            d.mode()
            pool = store(rng.standard_normal((5, 24)), dtype)
            index = rng.integers(0, 5, (3, 2)).astype(np.int32)
            m, _ = d.sparse(5, 24, dtype, pool, apart)
            out, got = d.matrix(3, 48, dtype, writable=True)
            d.call(
                "mos_gather_concat", Factor(m.data, NUMBER[dtype], 5, 24, apart, d.put(index).ctypes.data, 3, 2), out
            )
            if got.tobytes() != pool[index].reshape(3, -1).tobytes():
                raise Trouble("gather from shards far apart")
        for dtype, apart in itertools.product(("f32", "bf16", "f64"), (2**31 + 8, 2**31 + 3)):
            d.done()
            grad = store(rng.integers(-9, 10, (4, 24)), dtype)
            modules = (FactorGradient * 1)()
            modules[0].grad = d.sparse(4, 24, dtype, grad, apart)[0]
            modules[0].index, modules[0].l = d.put(np.array([[0, 2]] * 4, np.int32)).ctypes.data, 2
            out, got = d.matrix(3, 12, sums_of(dtype), writable=True)
            d.call("mos_scatter_add", C.byref(modules), C.c_int(1), out)
            sums = value(grad, dtype).sum(0)
            if not np.array_equal(got, np.stack([sums[:12], 0 * sums[:12], sums[12:]])):
                raise Trouble("scatter from rows far apart")

    yield "gather and scatter with rows far apart", far_apart

    def long_grids():
        rng = np.random.default_rng(5)
        d.done()
        d.mode()
        index = rng.integers(0, 66000, (1, 66000)).astype(np.int32)
        pool = rng.standard_normal((66000, 1)).astype(np.float32)
        m, _ = d.matrix(66000, 1, "f32", pool)
        out, got = d.matrix(1, 66000, "f32", writable=True)
        d.call("mos_gather_concat", Factor(m.data, 0, 66000, 1, 1, d.put(index).ctypes.data, 1, 66000), out)
        if not np.array_equal(got, pool[index].reshape(1, -1)):
            raise Trouble("gather of more segments than a grid has blocks")
        d.done()
        modules = (FactorGradient * 1)()
        modules[0].grad = d.matrix(1, 3, "f32", np.ones((1, 3), np.float32))[0]
        modules[0].index, modules[0].l = d.put(np.array([[0, 65999, 65999]], np.int32)).ctypes.data, 3
        out, got = d.matrix(66000, 1, "f32", writable=True)
        d.call("mos_scatter_add", C.byref(modules), C.c_int(1), out)
        if (got[0, 0], got[65999, 0], got.sum()) != (1, 2, 3):
            raise Trouble("scatter into more shards than a grid has blocks")

    yield "gather and scatter with long grids", long_grids

    for dtype in ("f32", "f64"):
        for number, (count, rows, cols, shift) in enumerate(
            (
                (1, 3, 5, 0),
                (2, 7, 4, 0),
                (3, 5, 7, 0),
                (8, 33, 16, 0),
                (9, 33, 16, 0),
                (17, 40, 30, 0),
                (32, 1, 8, 0),
                (5, 8, 8, 1),
                (7, 64, 64, 0),
            )
        ):
            rng = np.random.default_rng([number, 3])
            modes = modes_of(number, 1000, False)

            def total(rng=rng, dtype=dtype, count=count, rows=rows, cols=cols, shift=shift, modes=modes):
                other = rng.standard_normal((2, 10, 11)).astype(STORAGE[dtype])
                planes = rng.standard_normal((count, rows, cols)).astype(STORAGE[dtype])
                for mode, in_place in zip(modes * 2, (False, False, True, True), strict=True):
                    d.done()
                    d.mode(**mode)
                    given = [d.put(a, writable=True, shift=shift) for a in (planes, other)]
                    outs = (
                        [g[0] for g in given]
                        if in_place
                        else [d.out(a.shape[1:], a.dtype, shift=shift) for a in (planes, other)]
                    )
                    for order in ((0, 1),):
                        structs = [Planes(given[i].ctypes.data, *given[i].shape) for i in order]
                        d.call("mos_sums", *structs, *(outs[i] for i in order), C.c_int(NUMBER[dtype]))
                    for a, got in zip((planes, other), outs, strict=True):
                        expected = np.zeros(a.shape[1:], a.dtype)
                        for plane in a:
                            expected = expected + plane
                        if not np.array_equal(got, expected):
                            raise Trouble("not the sum in order")

            yield f"sum {dtype} {count} x {rows} x {cols} shift={shift}", total


def trap_checks(d):
    """An index out of range stops every kernel that reads it."""
    for wrong, dtype, r, gap in itertools.product((-1, 10**6), ("bf16", "f16", "f32", "f64"), (3, 40), (0, 1)):
        case = Case(9, 64, r, 2, dtype, "f32", gap=gap)
        case.index[2, 1] = wrong
        for name in ("shrink", "expand", "expand_backward", "shrink_backward"):

            def trapped(case=case, name=name):
                d.done()
                d.mode()
                try:
                    case.run(d, name)
                except Trouble as error:
                    if str(error).startswith("trap"):
                        return
                    raise
                raise Trouble("no trap")

            yield f"trap {name} {dtype} r={r} gap={gap} index {wrong}", trapped


def checks(d, quick):
    yield from gather_checks(d)
    yield from trap_checks(d)
    every = ((case, KERNELS) for case in itertools.chain(more_cases(), cases()))
    for number, (case, kernels) in enumerate(itertools.chain(every, styles())):
        work = case.T * case.cols * max(case.r, 16)
        for k, name in enumerate(kernels):
            if name == "expand dropout" and not case.p:
                continue
            if quick and (number + k) % 5:
                continue
            modes = modes_of(number * 8 + k, work, work > 6_000_000)
            yield f"{name}: {case.name}", lambda case=case, name=name, modes=modes: case.check(d, name, modes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    parser.add_argument("--coverage", help="write which instructions were executed to this file")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one in five of the products' checks")
    parser.add_argument(
        "--traffic", action="store_true", help="count cycles of shared and sectors of global memory into --coverage"
    )
    parser.add_argument("--hashes", help="write hashes of the products' results to this file")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--times", action="store_true", help="print the time of each check")
    arguments = parser.parse_args()
    d = Device(arguments.library)
    d.traffic = int(arguments.traffic)
    d.hashes = {} if arguments.hashes else None
    count = failed = 0
    for number, (name, check) in enumerate(checks(d, arguments.quick)):
        if number % arguments.parts != arguments.part or arguments.only not in name:
            continue
        count += 1
        start = time.perf_counter()
        try:
            check()
        except Trouble as error:
            failed += 1
            print(f"FAILED {name}: {error} | {d.setting}", flush=True)
            if arguments.stop:
                break
        if arguments.times:
            print(f"{time.perf_counter() - start:.3f} s {name}", flush=True)
    stats = (C.c_uint64 * 4)()
    d.lib.ptx_stats(stats)
    print(
        f"{stats[0]} launches, {stats[1] / 1e6:.0f} million instructions of warps; {stats[2]} copies never waited for; {stats[3]} bytes of shared memory read before anything was written there"
    )
    if arguments.coverage:
        d.lib.ptx_coverage(arguments.coverage.encode())
    if arguments.hashes:
        with open(arguments.hashes, "w") as file:
            file.writelines(f"{h} {name}\n" for name, h in d.hashes.items())
    print(f"{count} checks, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
