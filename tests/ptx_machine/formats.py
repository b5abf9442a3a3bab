"""How numbers are stored, and what becomes of them on the way: the oracle's own arithmetic, in float64."""

import numpy as np
from mirrors import STORAGE

# Half a unit in the last place of a result, relative; and of one addition of the sums.
HALF_UNIT = {"f32": 2.0**-24, "f64": 2.0**-53, "bf16": 2.0**-8, "f16": 2.0**-11}
ADDITION = {"f32": 2.0**-24, "f64": 2.0**-53, "bf16": 2.0**-24, "f16": 2.0**-24}
NOT_A_NUMBER = 0xFF  # in every byte: NaN in every dtype


def store(values, dtype):
    """float64 in the storage of a dtype, to nearest even."""
    values = np.asarray(values, np.float64)
    if dtype != "bf16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE[dtype])
    # Through float32 to nearest, the value would be rounded twice: to odd first, then to nearest even.
    single = values.astype(np.float32)
    bits, wide = single.view(np.uint32).astype(np.int64), single.astype(np.float64)
    bits = np.where(np.abs(wide) > np.abs(values), bits - 1, bits)
    bits = np.where(wide != values, bits | 1, bits)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def load(stored, dtype):
    """The float64 values of stored numbers."""
    stored = np.asarray(stored)
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def round_to(values, dtype):
    return load(store(values, dtype), dtype)


def round_to_tf32(values):
    """10 bits of fraction, to nearest, ties away from zero, as cvt.rna has it."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def threshold_of(p):
    return int(p * 65536 + 0.5)


def dropout_mask(rows, cols, p, seed):
    """True where an element is kept: Philox4x32-7 of (group of eight columns, row), as mos_ext/reference.py has it."""
    threshold = threshold_of(p)
    if not threshold or not rows or not cols:
        return np.ones((rows, cols), bool)
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    row, group = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(-(-cols // 8), dtype=np.uint64), indexing="ij")
    counter = [group, row & word, row >> half, np.zeros_like(row)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(7):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (second >> half) ^ counter[1] ^ np.uint64(key[0]),
            second & word,
            (first >> half) ^ counter[3] ^ np.uint64(key[1]),
            first & word,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.stack([c >> np.uint64(shift) & np.uint64(0xFFFF) for c in counter for shift in (0, 16)], -1)
    return bits.reshape(rows, -1)[:, :cols] >= threshold
