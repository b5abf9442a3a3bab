"""What this installation can do, measured rather than assumed. Every probe is guarded: a report must not fail."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from ._version import __version__
from .ops import loader
from .ops.checks import why_not_native
from .ops.schema import OPERATORS

OPTIONAL = ("safetensors", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "trl")


def _guarded(probe: Callable[[], object]) -> str:
    try:
        return str(probe())
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_device() -> str:
    if torch.version.cuda is None:
        return "none (torch is a CPU build)"
    if not torch.cuda.is_available():
        return f"none visible (torch is built for CUDA {torch.version.cuda})"
    return f"{torch.cuda.get_device_name()} (torch CUDA {torch.version.cuda})"


def environment() -> dict[str, str]:
    """Versions and hardware, name -> value; benchmarks put it in every row."""
    return {
        "mos_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{_guarded(torch.backends.cpu.get_cpu_capability)}, {torch.get_num_threads()} threads",
        "gpu": _guarded(_cuda_device),
        **{name: _version(name) for name in OPTIONAL},
    }


def facts() -> dict[str, Any]:
    """What this installation is, as data that JSON can hold: ``environment``, ``build``, ``libraries``, ``operators``.

    ``build`` is the record of the build, None without one. ``libraries`` say where they were loaded from, or why not;
    ``operators`` of each device, by name, None where a native kernel serves it, else why plain PyTorch does.
    """
    libraries = {
        name: {"loaded": library.loaded, "path": str(library.path), "problem": library.problem}
        for name, library in loader.libraries.items()
    }
    return {
        "environment": environment(),
        "build": loader.build_record() or None,
        "libraries": libraries,
        "cpu_kernels": _guarded(loader.cpu_instruction_set) if loader.libraries["_C"].loaded else None,
        "operators": {
            device: {op: why_not_native(op, device) for op in OPERATORS}
            for device in dict.fromkeys(loader.DEVICE_OF.values())
        },
    }


def report() -> str:
    """The text of ``python -m mos_ext`` without its self-test: :func:`facts` for people."""
    found = facts()
    lines = [f"{name:<14} {value}" for name, value in found["environment"].items()]
    record = found["build"]
    build = (
        f"MOS_EXT_BUILD={record['mode']}, against torch {record['torch']}"
        if record
        else "no record (nothing was built here)"
    )
    lines += ["", f"build          {build}"]
    for name, library in found["libraries"].items():
        lines.append(f"{name:<14} {library['problem'] or 'loaded from ' + library['path']}")
    if found["cpu_kernels"]:
        lines.append(f"{'cpu kernels':<14} {found['cpu_kernels']}")
    lines.append("")
    for device, operators in found["operators"].items():
        python = {op: reason for op, reason in operators.items() if reason}
        native = [op for op in operators if op not in python]
        lines.append(f"{f'{device} native':<14} {', '.join(native) or 'none'}")
        for reason in dict.fromkeys(python.values()):
            missing = [op for op in python if python[op] == reason]
            which = ", ".join(missing) if len(missing) < len(operators) else "all operators"
            lines.append(f"{f'{device} python':<14} {which}: {reason}")
    return "\n".join(lines)
