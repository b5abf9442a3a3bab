"""The kernels of csrc/cuda as NumPy functions, executed by the emulator.

Every argument is copied into memory that ends at an inaccessible page, and every output starts as NaN, so that what a
kernel reads or writes beyond its arrays, or forgets to write, is seen. bfloat16 travels as uint16 bit patterns; see
``encode`` and ``decode``.
"""

import ctypes as C
from contextlib import contextmanager

import numpy as np
from emulator import Emulator

DTYPES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}
STORAGE = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.float16}


def sums_type(dtype):
    return "f64" if dtype == "f64" else "f32"


def encode(values, dtype):
    """Values in the storage of a dtype, rounded to nearest even."""
    if dtype != "bf16":
        return np.asarray(values).astype(STORAGE[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored, dtype):
    """The float64 values of stored numbers."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


class Matrix(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("rows", C.c_int64), ("cols", C.c_int64), ("row_stride", C.c_int64)]  # fmt: skip


class Factor(C.Structure):
    _fields_ = [("pool", C.c_void_p), ("dtype", C.c_int32), ("num_shards", C.c_int64), ("shard_size", C.c_int64), ("pool_stride", C.c_int64), ("index", C.c_void_p), ("rank", C.c_int64), ("shards_per_vector", C.c_int64)]  # fmt: skip


class FactorGradient(C.Structure):
    _fields_ = [("grad", Matrix), ("index", C.c_void_p), ("shards_per_vector", C.c_int64)]


class Inverse(C.Structure):
    _fields_ = [("starts", C.c_void_p), ("places", C.c_void_p), ("count", C.c_int64)]


class Dropout(C.Structure):
    _fields_ = [("seed", C.c_void_p), ("threshold", C.c_uint32)]


class Planes(C.Structure):
    _fields_ = [("data", C.c_void_p), ("count", C.c_int64), ("rows", C.c_int64), ("cols", C.c_int64)]


class ExpandOptions(C.Structure):
    _fields_ = [
        ("bias", C.c_void_p),
        ("accumulate", C.c_bool),
        ("dropout", Dropout),
        ("s_sum", C.c_void_p),
        ("early", C.c_bool),
    ]


class Groups(C.Structure):
    _fields_ = [
        *((name, C.c_void_p) for name in ("ends", "rows", "ranks", "scales")),
        *(("count", C.c_int64), ("places", C.c_int64), ("invariant", C.c_bool)),
    ]


STRUCTS = (Matrix, Factor, FactorGradient, Dropout, Planes, ExpandOptions, Groups, Inverse)


def inverse_of(indices, num_shards):
    """The inverse of tables: starts (num_shards + 1,), and places (entries, 2), a module and a position each."""
    uses = [(shard, k, q) for k, table in enumerate(indices) for q, shard in enumerate(table.reshape(-1))]
    uses = np.array(sorted(uses), np.int32).reshape(-1, 3)
    starts = np.searchsorted(uses[:, 0], np.arange(num_shards + 1)).astype(np.int32)
    return starts, np.ascontiguousarray(uses[:, 1:])


class Kernels:
    """The functions of launch.h. ``pad`` extra elements between rows make matrices strided, and, odd, unaligned."""

    def __init__(self, path):
        self.emulator = Emulator(path)
        self.shift = self.gap = self.s_shift = 0  # see grid.Case
        self.library = self.emulator.library
        self.library.mos_shrink_planes.restype = C.c_int64
        self.library.mos_last_kernel.restype = C.c_char_p
        sizes = (C.c_int64 * len(STRUCTS))()
        self.library.mos_struct_sizes(sizes)
        assert list(sizes) == [C.sizeof(s) for s in STRUCTS], "kernels.py does not mirror launch.h"

    def _buffer(self, data=None, shape=None, dtype=None, more=0):
        """A buffer that starts `shift` and `more` elements behind a multiple of 16 bytes."""
        if data is not None:
            shape, dtype = data.shape, data.dtype
        size = int(np.prod(shape))
        off = self.shift + more
        array = self.emulator.buffer(shape=(size + off,), dtype=dtype)[off:] if size else np.empty(0, dtype)
        array = array.reshape(shape)
        if data is not None:
            array[...] = data
        return array

    def _matrix(self, values, dtype, pad=0, fill=None):
        """A view and its array (rows, cols); ``values`` None asks for NaN of shape ``fill``."""
        rows, cols = fill if values is None else values.shape
        frame = self._buffer(shape=(max(rows * (cols + pad) - pad, 0),), dtype=STORAGE[dtype])
        # The last row ends where memory ends: no padding behind it.
        size = frame.itemsize
        array = np.lib.stride_tricks.as_strided(frame, (rows, cols), ((cols + pad) * size, size))
        if values is not None and array.size:
            array[...] = values
        return Matrix(frame.ctypes.data, DTYPES[dtype], rows, cols, cols + pad), array

    def _factor(self, pool, dtype, index):
        rows, cols = pool.shape
        frame = self._buffer(shape=(rows * (cols + self.gap) - self.gap,), dtype=pool.dtype)
        np.lib.stride_tricks.as_strided(frame, pool.shape, ((cols + self.gap) * frame.itemsize, frame.itemsize))[
            ...
        ] = pool
        table = self.emulator.buffer(index.astype(np.int32))
        stride = cols + self.gap
        return Factor(frame.ctypes.data, DTYPES[dtype], rows, cols, stride, table.ctypes.data, *index.shape[-2:])

    def _dropout(self, p, seed):
        threshold = int(p * 65536 + 0.5)
        return Dropout(self.emulator.buffer(np.array([seed], np.int64)).ctypes.data if threshold else None, threshold)

    def _planes(self, dtype, count, rows, cols):
        array = self.emulator.buffer(shape=(count, rows, cols), dtype=STORAGE[sums_type(dtype)])
        return Planes(array.ctypes.data, count, rows, cols), array

    def _given_planes(self, s):
        array = self._buffer(s, more=self.s_shift)
        return Planes(array.ctypes.data, *s.shape)

    def _call(self, name, *arguments):
        self.emulator.call(name, *(C.byref(a) if isinstance(a, C.Structure) else a for a in arguments))

    def _done(self, *results):
        results = tuple(r.copy() for r in results)
        self.emulator.free()
        return results[0] if len(results) == 1 else results

    @contextmanager
    def _chain(self, early):
        """Launches inside run at the end, each as early as it may start; or, where not `early`, at once."""
        self.emulator.config(early=early)
        self.library.mos_launch_early(C.c_int(early))
        try:
            yield
            self.emulator.synchronize()
        finally:
            self.emulator.config(early=False)
            self.library.mos_launch_early(C.c_int(0))
            self.library.emulator_synchronize()  # what a refused launch has left behind

    @contextmanager
    def _in_groups(self, groups, a, b, sums):
        """Launches inside are of rows in ``groups`` (grid.Groups), or of rows without; yields the gradients of all groups'
        factors, whose shapes are those of the tables and the columns of ``a`` and ``b``: (pool, its dtype, tables)."""
        if groups is None:
            yield None
            return
        array = {
            name: None if value is None else self.emulator.buffer(np.asarray(value, dtype))
            for name, dtype in (("ends", "i4"), ("rows", "i4"), ("ranks", "i4"), ("scales", "f4"))
            for value in (getattr(groups, name),)
        }
        addresses = (None if a is None else a.ctypes.data for a in array.values())
        view = Groups(*addresses, len(groups.ends), groups.places, groups.invariant)
        grads = [
            self.emulator.buffer(shape=(*index.shape[:2], index.shape[2] * pool.shape[1]), dtype=STORAGE[sums])
            for pool, _, index in (a, b)
        ]
        self.library.mos_in_groups(C.byref(view), *(C.c_void_p(g.ctypes.data) for g in reversed(grads)))
        try:
            yield grads
        finally:
            self.library.mos_in_groups(None, None, None)

    def last_launch(self):
        """The last kernel's name, grid, threads and bytes of shared memory."""
        out = (C.c_int64 * 5)()
        return self.library.mos_last_kernel(out).decode(), tuple(out[:3]), out[3], out[4]

    def geometry(self, kernel, rows, cols, rank, size):
        out = (C.c_int64 * (6 if kernel == "backward" else 5))()
        getattr(self.library, f"mos_{kernel}_geometry")(*map(C.c_int64, (rows, cols, rank)), size, out)
        return tuple(out)

    # ------------------------------------------------------------------------------------------ K1 to K4

    def shrink(self, x, dtype, pool, pool_dtype, index, p=0.0, seed=0, *, tf32=False, pad=0):
        """Planes of s, (count, T, r)."""
        (matrix, _), factor = self._matrix(x, dtype, pad), self._factor(pool, pool_dtype, index)
        count = self.library.mos_shrink_planes(C.byref(matrix), C.byref(factor))
        planes, out = self._planes(dtype, count, len(x), len(index))
        self._call("mos_shrink", matrix, factor, self._dropout(p, seed), planes, C.c_int(tf32))
        return self._done(out)

    def expand(self, s, dtype, pool, pool_dtype, index, scale, *, y=None, bias=None, p=0.0, seed=0, want_sum=False, tf32=False, pad=0):  # fmt: skip
        """y (T, C), and the sum of the planes s (count, T, r) where it is wanted; accumulates into ``y`` if given."""
        factor = self._factor(pool, pool_dtype, index)
        matrix, out = self._matrix(y, dtype, pad, fill=(s.shape[1], index.shape[1] * pool.shape[1]))
        total = self._buffer(shape=s.shape[1:], dtype=s.dtype, more=self.s_shift // 2)
        options = ExpandOptions(
            None if bias is None else self.emulator.buffer(bias).ctypes.data,
            y is not None,
            self._dropout(p, seed),
            total.ctypes.data if want_sum else None,
        )
        self._call("mos_expand", self._given_planes(s), factor, float(scale), matrix, options, C.c_int(tf32))
        return self._done(out, total) if want_sum else self._done(out)

    def _backward_planes(self, matrix, rank):
        return self._backward_parts(matrix, rank)[:2]

    def _backward_parts(self, matrix, rank):
        """Planes of ds, of the factor gradient, and the rows of one of those."""
        out = (C.c_int64 * 3)()
        self.library.mos_backward_planes(C.byref(matrix), C.c_int64(rank), out)
        return tuple(out)

    def expand_backward(self, dy, dtype, s, pool, pool_dtype, index, scale, *, tf32=False, pad=0):
        """Planes of ds (count, T, r) and of the factor gradient (count, r, C)."""
        (matrix, _), factor = self._matrix(dy, dtype, pad), self._factor(pool, pool_dtype, index)
        projected, grads = self._backward_planes(matrix, len(index))
        ds, ds_out = self._planes(dtype, projected, len(dy), len(index))
        grad, grad_out = self._planes(dtype, grads, len(index), dy.shape[1])
        self._call("mos_expand_backward", matrix, self._given_planes(s), factor, float(scale), ds, grad, C.c_int(tf32))
        return self._done(ds_out, grad_out)

    def shrink_backward(
        self, x, dtype, ds, pool, pool_dtype, index, p=0.0, seed=0, *, dx=None, tf32=False, pad=0, dx_pad=0
    ):
        """dx (T, C), accumulated where it is given, and planes of the factor gradient (count, r, C)."""
        (matrix, _), factor = self._matrix(x, dtype, pad), self._factor(pool, pool_dtype, index)
        target, out = self._matrix(dx, dtype, pad + dx_pad, fill=x.shape)
        grad, grad_out = self._planes(dtype, self._backward_planes(matrix, len(index))[1], len(index), x.shape[1])
        self._call(
            "mos_shrink_backward",
            *(matrix, self._given_planes(ds), factor, self._dropout(p, seed), target, C.c_int(dx is not None), grad),
            C.c_int(tf32),
        )
        return self._done(out, grad_out)

    def sum(self, planes):
        out = self._buffer(shape=planes.shape[1:], dtype=planes.dtype, more=self.s_shift // 2)
        dtype = "f64" if planes.dtype == np.float64 else "f32"
        self._call("mos_sum", self._given_planes(planes), out, C.c_int(DTYPES[dtype]))
        return self._done(out)

    def sums(self, planes):
        """Two sums in one launch."""
        outs = [self._buffer(shape=p.shape[1:], dtype=p.dtype, more=self.s_shift // 2) for p in planes]
        given = [self._given_planes(p) for p in planes]
        self._call("mos_sums", *given, *outs, C.c_int(DTYPES["f64" if planes[0].dtype == np.float64 else "f32"]))
        return self._done(*outs)

    # ------------------------------------------------------------------------------------------ as ops.cpp calls them

    def low_rank(self, x, dtype, a, b, scale, p=0.0, seed=0, *, y=None, bias=None, sum_first=False, early=True, tf32=False, pad=0, groups=None):  # fmt: skip
        """y (T, C) and s (T, r): shrink, a launch that adds its planes if ``sum_first``, and expand. The factors ``a``
        and ``b`` are (pool, its dtype, index), with a table for each of the ``groups`` where there are some."""
        with self._in_groups(groups, a, b, sums_type(dtype)):
            (matrix, _), factor_a, factor_b = self._matrix(x, dtype, pad), self._factor(*a), self._factor(*b)
            count = self.library.mos_shrink_planes(C.byref(matrix), C.byref(factor_a))
            planes, s = self._planes(dtype, count, groups.places if groups else len(x), a[2].shape[-2])
            target, out = self._matrix(y, dtype, pad, fill=(len(x), b[2].shape[-1] * b[0].shape[1]))
            if groups and groups.rows is not None and y is None:
                out[...] = 0  # the operator does this first
            total = self.emulator.buffer(shape=s.shape[1:], dtype=s.dtype)
            options = ExpandOptions(None if bias is None else self.emulator.buffer(bias).ctypes.data, y is not None)
            with self._chain(early):
                self._call("mos_shrink", matrix, factor_a, self._dropout(p, seed), planes, C.c_int(tf32))
                if sum_first:
                    self._call("mos_sum", planes, total, C.c_int(DTYPES[sums_type(dtype)]))
                    planes = Planes(total.ctypes.data, 1, *total.shape)
                else:
                    options.s_sum = total.ctypes.data
                self._call("mos_expand", planes, factor_b, float(scale), target, options, C.c_int(tf32))
        return self._done(out, total)

    def low_rank_backward(self, dy, dtype, s, x, a, b, scale, p=0.0, seed=0, *, dx=None, sum_first=False, early=True, tf32=False, pad=0, groups=None):  # fmt: skip
        """dx (T, C) and both factor gradients (r, C): dy pass, a launch that adds the planes of ds into the first if
        ``sum_first``, x pass, and the sums of both gradients, of all ``groups`` where there are some."""
        with self._in_groups(groups, a, b, sums_type(dtype)) as grads:
            rank = a[2].shape[-2]
            (dy_matrix, _), (x_matrix, _) = self._matrix(dy, dtype, pad), self._matrix(x, dtype, pad)
            factor_a, factor_b = self._factor(*a), self._factor(*b)
            target, out = self._matrix(dx, dtype, pad, fill=x.shape)
            if groups and groups.rows is not None and dx is None:
                out[...] = 0
            count, b_count, b_part = self._backward_parts(dy_matrix, rank)
            _, a_count, a_part = self._backward_parts(x_matrix, rank)
            ds, ds_planes = self._planes(dtype, count, *s.shape[1:])
            grad_b, _ = self._planes(dtype, b_count, rank, dy.shape[1])
            grad_a, _ = self._planes(dtype, a_count, rank, x.shape[1])
            sums = grads or [self.emulator.buffer(shape=(g.rows, g.cols), dtype=s.dtype) for g in (grad_a, grad_b)]
            of_sums = C.c_int(DTYPES[sums_type(dtype)])
            with self._chain(early):
                self._call(
                    "mos_expand_backward",
                    *(dy_matrix, self._given_planes(s), factor_b, float(scale), ds, grad_b, C.c_int(tf32)),
                )
                if sum_first:
                    self._call("mos_sum", ds, ds_planes, of_sums)
                    ds = Planes(ds.data, 1, ds.rows, ds.cols)
                self._call(
                    "mos_shrink_backward",
                    *(x_matrix, ds, factor_a, self._dropout(p, seed), target, C.c_int(dx is not None), grad_a),
                    C.c_int(tf32),
                )
                if not groups:
                    self._call("mos_sums", grad_a, grad_b, *sums, of_sums)
                elif a_count or b_count:
                    self._call("mos_sums_of_groups", grad_a, grad_b, a_part, b_part, of_sums)
        return self._done(out, *sums)

    # ------------------------------------------------------------------------------------------ K5

    def gather_concat(self, pool, dtype, index):
        factor = self._factor(pool, dtype, index)
        matrix, out = self._matrix(None, dtype, fill=(len(index), index.shape[1] * pool.shape[1]))
        self._call("mos_gather_concat", factor, matrix)
        return self._done(out)

    def scatter_add(self, grads, dtype, indices, num_shards, *, pad=0, inverse=None):
        """``inverse`` is starts and places, or None: the kernel looks at the tables themselves."""
        modules = (FactorGradient * len(grads))()
        for module, grad, index in zip(modules, grads, indices, strict=True):
            table = self.emulator.buffer(index.astype(np.int32))
            module.grad, module.index, module.shards_per_vector = self._matrix(grad, dtype, pad)[0], table.ctypes.data, index.shape[1]  # fmt: skip
        shard = grads[0].shape[1] // indices[0].shape[1]
        matrix, out = self._matrix(None, sums_type(dtype), fill=(num_shards, shard))
        given = [self.emulator.buffer(array).ctypes.data for array in inverse or ()]
        by = Inverse(*given, len(inverse[1])) if inverse else Inverse()
        self._call("mos_scatter_add", C.byref(modules), C.c_int(len(grads)), by, matrix)
        return self._done(out)
