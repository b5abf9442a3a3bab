"""Launches that follow each other, as csrc/cuda/ops.cpp makes them: what one writes the next reads. They wait in the
machine's queue until the flush, which overlaps those that are programmatic (griddepcontrol) as hard as may be."""

import ctypes as C
import itertools

import numpy as np
from device import PRODUCED, Trouble
from mirrors import DTYPES, STORAGE, Dropout, ExpandOptions, sums_type
from products import Case, Product

SCHEDULES = [{"early": 1, "late": late, "warps": warps, "blocks": 2, "race": 1, "seed": 5} for late, warps in ((1, 0), (0, 2))]  # fmt: skip


def flush(device, overlapping):
    """Runs a chain, of which so many launches must begin before the one before them is complete."""
    before = device.statistics()["overlapped"]
    device.flush()
    count, expected = device.statistics()["overlapped"] - before, overlapping if device.depends() else 0
    if count != expected:
        raise Trouble(f"{count} launches overlapped the one before, not {expected}")


def forward(a, b, accumulate):
    """shrink, expand: S travels as planes, and expand writes their sum."""

    def check(device):
        first, second = Product(a), Product(b)
        # Integers: S is exact, however many planes it comes in.
        s, _ = first.expected("shrink")["s"]
        second.s = s[None]
        expected = second.expected("expand accumulate" if accumulate else "expand plain")["y"]
        for mode in SCHEDULES:
            device.free()
            device.configure(**mode)
            factor, (x, _) = first.put_factor(device, PRODUCED), first.put_activations(device, first.x, PRODUCED)
            count = device.library.mos_shrink_planes(C.byref(x), C.byref(factor))
            planes, _ = first.new_planes(device, count, a.rows, a.rank)
            total = device.out((a.rows, a.rank), STORAGE[sums_type(a.dtype)])
            y, out = second.put_target(device, accumulate)
            device.call("mos_shrink", x, factor, first.put_dropout(device), planes, C.c_int(a.tf32))
            options = ExpandOptions(None, accumulate, Dropout(None, 0), total.ctypes.data)
            arguments = (planes, second.put_factor(device), C.c_double(second.scale), y, options, C.c_int(b.tf32))
            device.call("mos_expand", *arguments)
            flush(device, 1)
            second.compare("y", out, b.dtype, expected)
            second.compare("sum", total, sums_type(a.dtype), (s, np.zeros_like(s)))
        device.free()

    return f"chain forward {'accumulate' if accumulate else 'write'}: {a}; {b}", check


def backward(a, b, accumulate):
    """The dy pass, the x pass, and one sum of both gradients: dS travels as planes."""

    def check(device):
        second, first = Product(a), Product(b)
        ds, _ = first.expected("expand_backward")["ds"]
        second.s = ds[None]
        option = "accumulate" if accumulate else ""
        expected = second.expected(f"shrink_backward {option}".strip())
        wanted = {"grad_b": first.expected("expand_backward")["grad"], "dx": expected["dx"], "grad_a": expected["grad"]}
        for mode in SCHEDULES:
            device.free()
            device.configure(**mode)
            dy, _ = first.put_activations(device, first.dy, PRODUCED)
            x, _ = second.put_activations(device, second.x)
            dx, dx_out = second.put_target(device, accumulate)
            projected, grads_b = first.backward_planes(device, dy)
            planes, _ = first.new_planes(device, projected, b.rows, b.rank)
            grad_b, _ = first.new_planes(device, grads_b, b.rank, b.cols)
            grad_a, _ = second.new_planes(device, second.backward_planes(device, x)[1], a.rank, a.cols)
            arguments = (dy, first.put_planes(device), first.put_factor(device), C.c_double(first.scale), planes)
            device.call("mos_expand_backward", *arguments, grad_b, C.c_int(b.tf32))
            arguments = (x, planes, second.put_factor(device), second.put_dropout(device), dx, C.c_int(accumulate))
            device.call("mos_shrink_backward", *arguments, grad_a, C.c_int(a.tf32))
            outs = [device.out((p.rows, p.cols), STORAGE[sums_type(a.dtype)]) for p in (grad_a, grad_b)]
            device.call("mos_sums", grad_a, grad_b, *outs, C.c_int(DTYPES[sums_type(a.dtype)]))
            flush(device, 2)  # a launch of its own for dx, as many ranks need, is not early
            first.compare("grad_b", outs[1], sums_type(b.dtype), wanted["grad_b"])
            second.compare("dx", dx_out, a.dtype, wanted["dx"])
            second.compare("grad_a", outs[0], sums_type(a.dtype), wanted["grad_a"])
        device.free()

    return f"chain backward {'accumulate' if accumulate else 'write'}: {a}; {b}", check


def chain_checks():
    arithmetic = (("bf16", "f32", False), ("f16", "f16", False), ("f32", "f32", True), ("f64", "f64", False))
    # The blocks of all launches of a chain are kept: few, and of few registers.
    # With a float pool, whole variants but for the second shape; the last has few sums.
    options = itertools.product(arithmetic, ((70, 12, 0), (70, 5, 3), (70, 40, 0), (5, 12, 0)), (False, True))
    for number, ((dtype, pool, tf32), (rows, rank, pad), accumulate) in enumerate(options):
        if rank == 40 and dtype == "f64":
            continue
        more = {"tf32": tf32, "pad": pad, "seed": 9000 + number}
        a = Case(rows, 528, rank, 2, dtype, pool, p=0.5 * (number % 2), **more)
        b = Case(rows, 264, rank, 3, dtype, pool, **more)
        yield forward(a, b, accumulate)
        yield backward(a, b, accumulate)
