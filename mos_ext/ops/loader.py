"""Loads the native libraries, and keeps the reason when one is missing, stale or broken.

Importing mos_ext never fails for them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from .schema import INTERFACE

PACKAGE = Path(__file__).resolve().parent.parent
# library name -> the torch device type whose kernels it brings
DEVICE_OF = {"_C": "cpu", "_C_cuda": "cuda"}
# What _C_cuda was linked with, as CUDART_VERSION has it (csrc/cuda/ops.cpp).
RUNTIME = re.compile(rb"mos_ext interface \d+\. CUDA (\d+)\.")


@dataclass(frozen=True)
class Library:
    """One native library: its file, and why it serves nothing (``None`` when it is loaded)."""

    name: str
    path: Path
    problem: str | None

    @property
    def loaded(self) -> bool:
        return self.problem is None


def build_record() -> dict:
    """What setup.py wrote about the build; empty when there is no record."""
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _driver_version() -> int | None:
    """1000 * major + 10 * minor of the newest CUDA that the NVIDIA driver can run; None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # none, or a stub for linking
        return None
    return None if failed else version.value


def _driver_problem(name: str, content: bytes) -> str | None:
    """Why the driver cannot serve the CUDA runtime inside a library: every call of it would fail.

    A driver serves runtimes of its major version, newer ones too (NVIDIA: "minor version compatibility"), and older.
    """
    built, driver = RUNTIME.search(content), _driver_version()
    if built is None or driver is None:
        return None
    runtime = int(built[1])
    if driver // 1000 >= runtime // 1000:
        return None
    texts = [f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver)]
    return (
        f"built with CUDA {texts[0]}, for which the NVIDIA driver here, of CUDA {texts[1]}, is too old: update the "
        f"driver, or build {name} with CUDA {driver // 1000}"
    )


def _load(name: str) -> Library:
    path = PACKAGE / f"{name}.so"
    if os.environ.get("MOS_EXT_DISABLE_NATIVE") == "1":
        return Library(name, path, "MOS_EXT_DISABLE_NATIVE=1 is set")
    if not path.exists():
        reason = build_record().get("skipped", {}).get(name)
        return Library(
            name, path, f"not built: {reason}" if reason else "not built (installed with MOS_EXT_BUILD=python?)"
        )
    if DEVICE_OF[name] == "cuda" and torch.version.cuda is None:
        return Library(name, path, "built, but the installed torch is a CPU build")
    content = path.read_bytes()
    if b"mos_ext interface %d." % INTERFACE not in content:
        return Library(
            name, path, f"{path.name} is damaged or was built for another version of mos_ext: build it again"
        )
    if DEVICE_OF[name] == "cuda" and (problem := _driver_problem(name, content)):
        return Library(name, path, problem)
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return Library(name, path, f"does not load: {' '.join(str(error).split())}")
    return Library(name, path, None)


libraries: dict[str, Library] = {name: _load(name) for name in DEVICE_OF}


def _warn_of_failures() -> None:
    """Whoever wanted native kernels, or let the build choose, and gets none by mishap hears of it once."""
    record = build_record()
    for name, library in libraries.items():
        device = DEVICE_OF[name]
        mishap = library.path.exists() or (record.get("mode") == "auto" and name in record.get("skipped", {}))
        if library.loaded or not mishap or os.environ.get("MOS_EXT_DISABLE_NATIVE") == "1":
            continue
        # A CUDA build of torch is what pip gives to machines without a GPU, too.
        if device == "cpu" or (torch.version.cuda is not None and torch.cuda.device_count() > 0):
            warnings.warn(
                f"mos_ext runs plain PyTorch on {device} ({name}: {library.problem}). Mend that and install "
                "again, or choose it with MOS_EXT_BUILD=python; `python -m mos_ext` shows what serves what.",
                RuntimeWarning,
                stacklevel=2,
            )


_warn_of_failures()


def cpu_instruction_set() -> str | None:
    """The instruction set the CPU kernels run with here, "avx512" say; ``None`` without the library."""
    library = libraries["_C"]
    if not library.loaded:
        return None
    function = ctypes.CDLL(str(library.path)).mos_ext_cpu_instruction_set
    function.restype = ctypes.c_char_p
    return function().decode()
