"""What operators may be given, and who computes them: each rule once, as an error that names argument, rule, value."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import loader
from .branch import Branch, Groups
from .schema import NAMESPACE

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers to look at: it is neither on the meta device nor one of ``FakeTensorMode``."""
    return tensor.device.type != "meta" and type(tensor).__name__ != "FakeTensor"


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # False for NaN, and for integers no float holds
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple) -> None:
    """``None`` in ``shape`` is any size."""
    if tensor.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(tensor.shape)}")


def check_index(name: str, index: Tensor, num_shards: int) -> None:
    """An (r, l) int32 table with entries in [0, num_shards).

    Values are read once, and again after each change in place that torch counts: what is written to ``.data`` is not
    seen, nor what a replayed CUDA graph writes. While a stream is captured nothing may wait for it, so a table that was
    not read before passes. The kernels stop at an entry out of range in any case.
    """
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {index.dtype}")
    if index.dim() < 2:
        raise ValueError(f"{name} must have the shape (r, l), got {tuple(index.shape)}")
    if index.numel() == 0 or torch.compiler.is_compiling() or not has_values(index):
        return  # a traced call checks shapes and dtypes only
    entries = _range_of(index)
    if entries is not None and (entries[0] < 0 or entries[1] >= num_shards):
        raise ValueError(f"{name} must be in [0, {num_shards}), got {entries[0] if entries[0] < 0 else entries[1]}")


# Tensor that owns tables -> its version then, and the least and the largest entry of its views, by where they lie.
# (Users slice a table out of all layers' anew for each call; what they slice stays.)
_ranges: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _range_of(index: Tensor) -> tuple[int, int] | None:
    """The least and the largest entry of a table; None where reading them would break a capture."""
    counted = not index.is_inference()  # others do not count changes
    owner = index if index._base is None else index._base
    where = (index.storage_offset(), index.shape, index.stride())
    version, ranges = _ranges.get(owner, (None, {}))
    if counted and version == index._version and where in ranges:
        return ranges[where]
    if _is_capturing(index.device):
        return None
    low, high = torch.stack((index.min(), index.max())).tolist()  # waits once
    if counted:
        version, known = index._version, ranges if version == index._version else {}
        _ranges[owner] = version, {**known, where: (low, high)}
    return low, high


def _is_capturing(device: torch.device) -> bool:
    """Whether torch's stream of a device is recorded into a CUDA graph, so that nothing may wait for it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_activation(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch) -> None:
    """x (..., in) of a float dtype; weight and bias of the same; pools float32 or of the same; all on one device."""
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have {weight.shape[1]} features in its last dimension, got the shape {tuple(x.shape)}"
        )
    device, dtype = x.device, x.dtype  # each look costs
    for name, base in (("weight", weight), ("bias", bias)):
        if base is None:
            continue
        if base.device != device:
            raise ValueError(f"x must be on the device of the {name}, {base.device}, got {device}")
        if base.dtype != dtype:
            raise TypeError(f"x must have the dtype of the {name}, {base.dtype}, got {dtype}")
    check_pools(x, branch)


def check_pools(x: Tensor, branch: Branch) -> None:
    """Pools are float32, or of x's dtype, and where x is."""
    device, dtypes = x.device, (torch.float32, x.dtype)
    for pool in (branch.pool_a, branch.pool_b):
        if pool.device != device:
            raise ValueError(f"x must be on the device of the pool, {pool.device}, got {device}")
        if pool.dtype not in dtypes:
            raise TypeError(f"pool (pool_dtype) must be float32 or have the dtype of x, {x.dtype}, got {pool.dtype}")


def check_added(x: Tensor, y: Tensor, branch: Branch) -> None:
    """x (..., in) and what a base made of it, y (..., out), fit each other and the pools."""
    check_float("the output of the base layer", y)
    columns_of_x, columns_of_y = branch.features
    if x.dim() == 0 or x.shape[-1] != columns_of_x:
        raise ValueError(f"x must have {columns_of_x} features in its last dimension, got the shape {tuple(x.shape)}")
    if y.shape != (*x.shape[:-1], columns_of_y):
        raise ValueError(
            f"the output of the base layer must have the shape {(*x.shape[:-1], columns_of_y)}, got {tuple(y.shape)}"
        )
    check_pools(x, branch)


# Whether values of groups are read and checked at every call, which waits for the GPU; see `check_groups`.
DEBUG = os.environ.get("MOS_EXT_DEBUG", "") not in ("", "0")


def check_groups(groups: Groups, num_rows: int, num_groups: int, r: int) -> None:
    """Shapes and dtypes of what says which row belongs to which group; values too with ``MOS_EXT_DEBUG=1``."""
    ends, rows, ranks, scales, _ = groups
    of_groups = (("ends", ends, torch.int32), ("ranks", ranks, torch.int32), ("scales", scales, torch.float32))
    for name, tensor, dtype in of_groups:
        if tensor is not None:
            check_shape(name, tensor, (num_groups,))
            _check_dtype(name, tensor, dtype)
    if rows is not None:
        check_shape("rows", rows, (None,))
        _check_dtype("rows", rows, torch.int32)
    if not DEBUG or torch.compiler.is_compiling() or not has_values(ends) or _is_capturing(ends.device):
        return
    places, previous = num_rows if rows is None else rows.shape[0], 0
    for g, end in enumerate(ends.tolist()):
        if not previous <= end <= places:
            raise ValueError(f"ends[{g}] must be in [{previous}, {places}], got {end}")
        previous = end
    if rows is not None and rows.numel():
        low, high, different = int(rows.min()), int(rows.max()), rows.unique().numel()
        if low < 0 or high >= num_rows:
            raise ValueError(f"rows must be in [0, {num_rows}), got {low if low < 0 else high}")
        if different < rows.numel():
            raise ValueError(f"rows must be different, got {rows.numel()} of {different} values")
    for g, rank in enumerate([] if ranks is None else ranks.tolist()):
        if not 0 <= rank <= r:
            raise ValueError(f"ranks[{g}] must be in [0, {r}], got {rank}")


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")


CUDA_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled for (setup.py)


def why_not_native(op: str, device_type: str) -> str | None:
    """Why operator ``op`` cannot use a native kernel on a device type, in one sentence; None when it does.

    Every float dtype, shape, stride and rank up to 256 has one, so the reasons are only ever the library's or the
    GPU's. For reports, not for every call: it asks the GPU.
    """
    if device_type == "meta":
        return None  # nothing is computed but shapes
    name = next((name for name, kind in loader.DEVICE_OF.items() if kind == device_type), None)
    if name is None:
        return f"there are no native kernels for {device_type} tensors"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device_type.upper()):
        problem = loader.libraries[name].problem
        return f"{name}: {problem}" if problem else f"{name} has no kernel for {op}"
    if device_type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < CUDA_CAPABILITY:
            return (
                f"the GPU has compute capability {major}.{minor}, _C_cuda needs "
                f"{CUDA_CAPABILITY[0]}.{CUDA_CAPABILITY[1]} or newer (MOS_EXT_DISABLE_NATIVE=1 runs plain PyTorch)"
            )
    return None
