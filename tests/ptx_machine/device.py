"""The machine from Python: memory that only registered bytes of may be touched, schedules, launches."""

import ctypes as C
import mmap

import numpy as np
from formats import NOT_A_NUMBER
from mirrors import DTYPES, STORAGE, STRUCTS, Matrix

GUARD = 256  # bytes of GUARDED around every buffer
GUARDED = 0xA5
CAPABILITY_MAJOR = 75  # cudaDevAttrComputeCapabilityMajor
INPUT, OUTPUT, PRODUCED = 0, 1, 2  # Access of machine.h: PRODUCED is an input that the launch before may be writing


class Trouble(Exception):
    """Something is wrong with a kernel."""


class Machine:
    """A library over the machine: configuration, what is registered, errors."""

    def __init__(self, path):
        self.library = C.CDLL(str(path))
        self.library.ptx_error.restype = C.c_char_p
        self.buffers = []  # (frame, start, bytes, access)
        self.sparse_rows = []  # (first address, address behind, access)
        self.gaps = []  # (bytes between rows of a matrix that may be written, what they were)
        self.alive = []
        self.traffic = 0
        self.mode = {}
        self.configure()

    def configure(self, **mode):
        """late, warps, lanes, blocks, early, race, seed: see Config in machine.h. What is not given is the default."""
        self.mode = mode
        default = {"late": 1, "warps": 0, "lanes": 0, "blocks": 0, "early": 0, "race": 0, "seed": 1}
        for name, value in {**default, "traffic": self.traffic, **mode}.items():
            if not self.library.ptx_config(name.encode(), C.c_int64(value)):
                raise ValueError(f"the machine has no option {name}")

    def statistics(self):
        values = (C.c_uint64 * 4)()
        self.library.ptx_statistics(values)
        return dict(zip(("launches", "instructions", "never_waited", "overlapped"), values, strict=True))

    def coverage(self, path):
        """Writes what was executed, for report.py."""
        if self.library.ptx_coverage(str(path).encode()):
            raise OSError(f"{path} cannot be written")

    # ------------------------------------------------------------------------------------ memory

    def free(self):
        """Forgets every buffer, and launches that wait for flush()."""
        self.library.ptx_discard()
        self.buffers, self.sparse_rows, self.gaps, self.alive = [], [], [], []

    def bytes(self, count, access, shift=0):
        """A buffer of `count` bytes, `shift` bytes behind a multiple of 128."""
        frame = np.full(count + 2 * GUARD + 128 + shift, GUARDED, np.uint8)
        start = GUARD + (-(frame.ctypes.data + GUARD)) % 128 + shift
        self.buffers.append((frame, start, count, access))
        return frame[start : start + count]

    def put(self, array, access=INPUT, *, shift=0):
        """A copy of an array, `shift` elements off the alignment."""
        array = np.ascontiguousarray(array)
        out = self.bytes(array.nbytes, access, shift * array.itemsize).view(array.dtype).reshape(array.shape)
        out[...] = array
        return out

    def out(self, shape, dtype, *, shift=0):
        """An output, NaN so far."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = self.bytes(size, OUTPUT, shift * np.dtype(dtype).itemsize)
        raw[...] = NOT_A_NUMBER
        return raw.view(dtype).reshape(shape)

    def matrix(self, rows, cols, dtype, values=None, access=INPUT, *, pad=0, shift=0):
        """(Matrix, its array): `pad` elements between rows, which nobody may write; NaN without values."""
        size, stride = np.dtype(STORAGE[dtype]).itemsize, cols + pad
        raw = self.bytes(max(rows * stride - pad, 0) * size if rows else 0, access, shift * size)
        array = _rows(raw.view(STORAGE[dtype]), rows, cols, stride, values)
        if pad and access == OUTPUT:
            elements = raw.view(f"u{size}")
            between = np.ones(len(elements), bool)
            np.lib.stride_tricks.as_strided(between, (rows, cols), (stride, 1))[...] = False
            self.gaps.append((elements, between, elements[between].copy()))
        return Matrix(raw.ctypes.data, DTYPES[dtype], rows, cols, stride), array

    def sparse_matrix(self, rows, cols, dtype, values, stride, access=INPUT):
        """As matrix(), with rows so far apart that 32 bits do not count the elements between them; memory that is not
        touched does not exist."""
        size = np.dtype(STORAGE[dtype]).itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = np.frombuffer(mmap.mmap(-1, ((rows - 1) * stride + cols) * size, flags=flags), STORAGE[dtype])
        self.alive.append(memory)
        array = _rows(memory, rows, cols, stride, values)
        for row in range(rows):
            first = memory.ctypes.data + row * stride * size
            self.sparse_rows.append((first, first + cols * size, access))
        return Matrix(memory.ctypes.data, DTYPES[dtype], rows, cols, stride), array

    # ------------------------------------------------------------------------------------ launches

    def call(self, name, *arguments):
        """Calls a host function that launches. With early=1, flush() runs what it launched."""
        self._run(name, lambda: getattr(self.library, name)(*map(_argument, arguments)))

    def flush(self):
        self._run("flush", self.library.ptx_flush)

    def load(self, text):
        """Adds the kernels of PTX text."""
        if self.library.ptx_load(text.encode()):
            raise Trouble(self.library.ptx_error().decode())

    def launch(self, name, params, *, grid=(1, 1, 1), block=(32, 1, 1), shared=0, programmatic=False):
        """Launches a kernel by its name in PTX; params are bytes."""
        dims = [(C.c_uint32 * 3)(*size) for size in (grid, block)]
        arguments = (C.c_uint64(shared), params, C.c_uint64(len(params)), C.c_int(programmatic))
        self._run(name, lambda: self.library.ptx_launch(name.encode(), *dims, *arguments))

    def _run(self, name, function):
        ranges = [
            *((frame.ctypes.data + start, frame.ctypes.data + start + count, access)
              for frame, start, count, access in self.buffers if count),
            *self.sparse_rows,
        ]  # fmt: skip
        n = len(ranges)
        begin, end, access = zip(*ranges, strict=True) if ranges else ((), (), ())
        self.library.ptx_ranges(n, (C.c_uint64 * n)(*begin), (C.c_uint64 * n)(*end), (C.c_int * n)(*access))
        before = [(frame, frame.copy()) for frame, _, _, access in self.buffers if access != OUTPUT]
        status = function()
        error = self.library.ptx_error().decode()
        if error or status:
            raise Trouble(error or f"{name} returned {status}")
        if not all(np.array_equal(frame, old) for frame, old in before):
            raise Trouble("an input was written")
        for frame, start, count, _ in self.buffers:
            if (frame[:start] != GUARDED).any() or (frame[start + count :] != GUARDED).any():
                raise Trouble("what lies around a buffer was written")
        for elements, between, old in self.gaps:
            if not np.array_equal(elements[between], old):
                raise Trouble("what lies between rows was written")


class Kernels(Machine):
    """A library of toolchain.build(): the host functions of csrc/cuda over their PTX."""

    def __init__(self, path):
        super().__init__(path)
        self.library.mos_shrink_planes.restype = C.c_int64
        self.library.mos_launch_early(C.c_int(1))  # what an operator may launch early always is
        sizes = (C.c_int64 * len(STRUCTS))()
        self.library.mos_struct_sizes(sizes)
        assert list(sizes) == [C.sizeof(struct) for struct in STRUCTS], "kernels.py does not mirror launch.h"

    def depends(self):
        """Whether the device knows programmatic dependent launches."""
        major = C.c_int()
        status = self.library.cudaDeviceGetAttribute(C.byref(major), C.c_int(CAPABILITY_MAJOR), C.c_int(0))
        assert status == 0
        return major.value >= 9


def _rows(flat, rows, cols, stride, values):
    """The array (rows, cols) in flat memory, filled."""
    size = flat.itemsize
    array = np.lib.stride_tricks.as_strided(flat, (rows, cols), (stride * size, size))
    if rows and cols:
        if values is None:
            bits = np.lib.stride_tricks.as_strided(flat.view(f"u{size}"), (rows, cols), (stride * size, size))
            bits[...] = np.iinfo(bits.dtype).max
        else:
            array[...] = values
    return array


def _argument(value):
    if isinstance(value, C.Structure):
        return C.byref(value)
    if isinstance(value, np.ndarray):
        return C.c_void_p(value.ctypes.data)
    return value
