"""Rows in groups: the launches of a grouped operator one after the other, as csrc/cuda/ops.cpp makes them, on cases of
the emulator's grid and against its oracle."""

import ctypes as C

import grid
import numpy as np
from chains import SCHEDULES
from device import INPUT, PRODUCED, Trouble
from formats import load, store
from grid import ALL, Case, grouped
from mirrors import DTYPES, STORAGE, Dropout, ExpandOptions, Factor, Groups, Planes, sums_type

# In order with copies that land late, and through the queue.
MODES = [{"late": 1}, *SCHEDULES]

# Every variant with groups, ranks of both sizes, and the arithmetic that asks; several parts of a group, none, nobody.
CASES = [
    (Case("bf16", "f32", 0, 24, 3, 16), grouped([0, 5, 0, 0, 9, 0], beyond=70)),
    (Case("bf16", "f32", 0, 24, 3, 16, p=0.5), grouped([150, 0, 1], beyond=2)),
    (Case("f16", "f32", 0, 24, 3, 40, p=0.5), grouped([0, 140, 0], beyond=2, optional=("ranks", "scales"), r=40)),
    (Case("bf16", "f32", 0, 24, 3, 40), grouped([0, 140, 3], beyond=2, optional=ALL, r=40, invariant=True)),
    (Case("bf16", "f32", 0, 72, 8, 12), grouped([3, 33, 0, 70, 1], optional=ALL, r=12)),
    (Case("f16", "f32", 0, 16, 9, 12, p=0.5, pad=3), grouped([0, 33, 80, 5], beyond=1, optional=ALL, r=12)),
    (Case("bf16", "bf16", 0, 8, 5, 70, p=0.5), grouped([20, 0, 2], beyond=3, optional=ALL, r=70)),
    (Case("f32", "f32", 0, 13, 3, 17, p=0.5), grouped([0, 40, 1, 30], beyond=3, optional=ALL, r=17)),
    (Case("f32", "f32", 0, 16, 4, 12, tf32=True), grouped([20, 0, 64, 7], optional=("scales",))),
    (Case("f64", "f32", 0, 8, 5, 20, p=0.5), grouped([10, 0, 70], beyond=1, optional=ALL, r=20)),
    (Case("bf16", "f32", 0, 8, 2, 4), grouped([0, 1] * 40)),
    *((Case("bf16", "f32", 0, 8, 2, 4), grid.Groups(ends, 9)) for ends in grid.IMPOSSIBLE[:3]),
]


class Operands:
    """What both directions are given, on the device."""

    def __init__(self, device, case, groups, given):
        self.device, self.case, self.groups, self.given = device, case, groups, given

    def activations(self, values, access=INPUT):
        stored = None if values is None else store(values, self.case.dtype)
        shape = self.given.x.shape
        return self.device.matrix(*shape, self.case.dtype, stored, access, pad=self.case.pad)

    def target(self, accumulate):
        values = self.given.y if accumulate else None
        if values is None and self.groups.rows is not None:
            values = np.zeros(self.given.x.shape)  # the operator does this first
        return self.activations(values, access=1)

    def factor(self, access=INPUT):
        case, stored = self.case, store(self.given.pool, self.case.pool_dtype)
        pool, _ = self.device.matrix(*stored.shape, case.pool_dtype, stored, access)
        index = self.device.put(self.given.index.astype(np.int32), access).ctypes.data
        return Factor(pool.data, DTYPES[case.pool_dtype], *stored.shape, pool.row_stride, index, case.r, case.l)

    def dropout(self):
        threshold = int(self.case.p * 65536 + 0.5)
        seed = self.device.put(np.array([self.given.seed], np.int64)).ctypes.data if threshold else None
        return Dropout(seed, threshold)

    def planes(self, count, rows, cols):
        array = self.device.out((count, rows, cols), STORAGE[sums_type(self.case.dtype)])
        return Planes(array.ctypes.data, count, rows, cols)

    def tell_groups(self, access, grads=(None, None)):
        """Launches from now on are in the groups, whose description the launch before may be writing, or not."""
        arrays = [
            None if value is None else self.device.put(np.array(value, dtype), access)
            for value, dtype in zip(vars(self.groups).values(), ("i4", "", "i4", "i4", "f4", ""), strict=True)
            if not isinstance(value, (int, bool))
        ]
        addresses = (None if a is None else a.ctypes.data for a in arrays)
        view = Groups(*addresses, len(self.groups.ends), self.groups.places, self.groups.invariant)
        pointers = (C.c_void_p(g.ctypes.data if g is not None else None) for g in grads)
        self.device.library.mos_in_groups(C.byref(view), *pointers)


def compare(case, key, stored, dtype, exact, plain):
    values = load(stored, dtype)
    if not np.isfinite(values).all():
        raise Trouble(f"{key}: not finite")
    error, allowed = grid.relative_error(values, exact), 2 * grid.relative_error(plain, exact)
    if error > allowed + grid.FLOOR["tf32" if case.tf32 else case.dtype]:
        raise Trouble(f"{key}: error {error:.2e}")


def forward(device, operands, accumulate):
    case, groups = operands.case, operands.groups
    operands.tell_groups(PRODUCED)
    factor, (x, _) = operands.factor(PRODUCED), operands.activations(operands.given.x, PRODUCED)
    count = device.library.mos_shrink_planes(C.byref(x), C.byref(factor))
    planes = operands.planes(count, groups.places, case.r)
    total = device.out((groups.places, case.r), STORAGE[sums_type(case.dtype)])
    y, out = operands.target(accumulate)
    device.call("mos_shrink", x, factor, operands.dropout(), planes, C.c_int(case.tf32))
    operands.tell_groups(INPUT)
    options = ExpandOptions(None, accumulate, Dropout(None, 0), total.ctypes.data)
    device.call("mos_expand", planes, operands.factor(), C.c_double(grid.SCALE), y, options, C.c_int(case.tf32))
    device.flush()
    return {"y +=" if accumulate else "y": (out, case.dtype), "s": (total, sums_type(case.dtype))}


def backward(device, operands, accumulate):
    case, groups, sums = operands.case, operands.groups, sums_type(operands.case.dtype)
    grads = [device.out((len(groups.ends), case.r, case.cols), STORAGE[sums]) for _ in range(2)]
    operands.tell_groups(PRODUCED, grads)
    (dy, _), (x, _) = operands.activations(operands.given.dy, PRODUCED), operands.activations(operands.given.x)
    s = device.put(store(operands.given.s, sums), PRODUCED)
    dx, out = operands.target(accumulate)
    counts = (C.c_int64 * 3)()
    device.library.mos_backward_planes(C.byref(dy), C.c_int64(case.r), counts)
    projected, count, part = counts
    ds = operands.planes(projected, groups.places, case.r)
    of_dy, of_x = (operands.planes(count, case.r, case.cols) for _ in range(2))
    arguments = (Planes(s.ctypes.data, *s.shape), operands.factor(PRODUCED), C.c_double(grid.SCALE), ds, of_dy)
    device.call("mos_expand_backward", dy, *arguments, C.c_int(case.tf32))
    operands.tell_groups(INPUT, grads)
    arguments = (ds, operands.factor(), operands.dropout(), dx, C.c_int(accumulate), of_x)
    device.call("mos_shrink_backward", x, *arguments, C.c_int(case.tf32))
    if count:
        parts = (C.c_int64(part), C.c_int64(part))
        device.call("mos_sums_of_groups", of_x, of_dy, *parts, C.c_int(DTYPES[sums]))
    device.flush()
    return {"dx +=" if accumulate else "dx": (out, case.dtype), "grad_b": (grads[0], sums), "grad_a": (grads[1], sums)}


def chain(direction, case, groups, accumulate):
    def check(device):
        given = grid.grouped_inputs(case, groups, False, number=0)
        exact = grid.grouped_products(case, groups, given, lambda values, dtype: values)
        plain = grid.grouped_products(case, groups, given, lambda values, dtype: load(store(values, dtype), dtype))
        first = {}
        try:
            for mode in MODES:
                device.free()
                device.configure(**mode)
                for key, (stored, dtype) in direction(
                    device, Operands(device, case, groups, given), accumulate
                ).items():
                    compare(case, key, stored, dtype, exact[key], plain[key])
                    if first.setdefault(key, stored.tobytes()) != stored.tobytes():
                        raise Trouble(f"{key}: other bits than in order")
        finally:
            device.library.mos_in_groups(None, None, None)
            device.free()

    how = "accumulate" if accumulate else "write"
    return f"groups {direction.__name__} {how}: {case} {groups}", check


def group_checks():
    for number, (case, groups) in enumerate(CASES):
        for direction in (forward, backward):
            yield chain(direction, case, groups, number % 2 == 0)
            if number < 3:
                yield chain(direction, case, groups, number % 2 == 1)
