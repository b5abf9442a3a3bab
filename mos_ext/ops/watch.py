"""Who is watching a call, and under which of torch's switches it runs: tracers, transforms, modes, autocast, TF32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products on the device of x in; None where it is off, or unknown (meta)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    # Named first because torch 2.11 cannot trace is_autocast_available.
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def without_autocast(x: Tensor):
    """Where autocast is off for products on the device of x."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What autocast does to the arguments of ``F.linear``: x and the others in its dtype, float64 untouched.

    Not for pools, which keep theirs.
    """
    if (dtype := autocast_dtype(x)) is None:
        return x, *others

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), *(cast(t) for t in others)


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is running: both look into what is called."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a ``TorchDispatchMode`` sees every operator.

    Selective checkpointing is one: it keeps results and hands them out a second time, so nobody may write to them.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def unseen() -> bool:
    """Whether nobody looks into what is called: no tracer, no transform, no dispatch mode.

    One check for all of them, because checks are a good part of what a small layer costs.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def below_autograd(hidden: bool):
    """Where ``hidden``, operators called inside skip autograd's kernels.

    For ours those are Python, and cost a small layer dearly. Only for code that is a derivative formula, or needs none.
    ``hidden`` is :func:`unseen`: whoever looks must see plain calls.
    """
    return torch._C._AutoDispatchBelowAutograd() if hidden else contextlib.nullcontext()


@torch.compiler.assume_constant_result  # a compiled graph keeps what was set when it was compiled
def _tf32_allowed() -> bool:
    # The one getter that understands torch's old switches and its new ones; allow_tf32 raises once a new one was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32(x: Tensor) -> bool:
    """Whether torch's switches let products of x be computed in TF32: float32 on CUDA, and asked for."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and _tf32_allowed()
