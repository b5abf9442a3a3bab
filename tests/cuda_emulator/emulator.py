"""Builds and calls kernels for the CPU emulator. README.md says how it works; NumPy arrays stand for device memory."""

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUTPUT = ROOT / "build" / "emulator"
CUDA = ROOT / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "g++")

FLAVOURS = ("plain", "asan", "tsan")
SCHEDULES = ("sequential", "reverse", "random", "priority")
STATISTICS = "launches blocks threads switches barriers warp_collectives mmas copies ldmatrix_matrices ldmatrix_cycles"

# Of every file. Uninitialised locals get a pattern; large stack frames touch the inaccessible page below the stack and
# do not jump over it; no fortification, whose longjmp takes the way out of a segmentation fault for a broken stack.
FLAGS = [
    *("-std=c++17", "-g", "-fPIC", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern"),
    *("-fstack-clash-protection", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DMOS_EMULATOR"),
    *("-I", str(HERE.relative_to(ROOT))),
]
KERNEL_FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
# ThreadSanitizer must not see the emulator itself, and loops turned into memcpy would be seen.
EMULATOR_FLAGS = {
    "plain": ["-O3"],
    "asan": ["-O2", "-fsanitize=address"],
    "tsan": ["-O2", "-DMOS_EMULATOR_TSAN", "-fno-tree-loop-distribute-patterns"],
}
LINK_FLAGS = {"plain": [], "asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}

SANITIZER_OPTIONS = {
    "plain": {},
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "tsan": {"TSAN_OPTIONS": "exitcode=66:history_size=2:atexit_sleep_ms=0"},
}


# ---------------------------------------------------------------------------------------------- builds


@cache
def _machine_flags():
    """Wide vectors for the emulator's own arithmetic, where the machine has them."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "f16c", "movbe"} <= flags else []


def _write(command, target):
    """Runs a compiler command, unless target is newer than what it was made from and made by the same command."""
    stamp = target.with_name(target.name + ".command")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    start = time.time()
    result = subprocess.run([*command, "-o", str(temporary)], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    os.utime(temporary, (start, start))  # older than an input that was edited meanwhile
    os.replace(temporary, target)
    stamp.write_text(" ".join(command))


def _is_current(target, command, inputs):
    stamp = target.with_name(target.name + ".command")
    if not target.exists() or not stamp.exists() or stamp.read_text() != " ".join(command):
        return False
    return target.stat().st_mtime > max(f.stat().st_mtime for f in inputs)


@contextmanager
def _lock(path):
    """One process at a time; the others then find everything built."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _link(target, sources, flavour, shared, *, more_flags=(), libraries=()):
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h")]
    folder = OUTPUT / flavour
    with _lock(folder / "lock"):
        pending, objects = [], []
        for source in sources:
            own = source.name == "emulator.cpp"
            flags = [*EMULATOR_FLAGS[flavour], *_machine_flags()] if own else KERNEL_FLAGS[flavour]
            # Relative paths, for messages; sources elsewhere leave their objects elsewhere.
            inside = source.is_relative_to(ROOT)
            if source.name == "ops.cpp":
                flags = [*flags, *more_flags]
            command = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source.relative_to(ROOT) if inside else source)]
            objects.append((folder if inside else source.parent) / f"{source.name}.o")
            if not _is_current(objects[-1], command, [source, *headers]):
                pending.append((command, objects[-1]))
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: _write(*job), pending))
        command = [COMPILER, "-pthread", *(["-shared"] if shared else []), *LINK_FLAGS[flavour], *map(str, objects)]
        command += libraries
        if not _is_current(target, command, objects):
            _write(command, target)
    return target


def build_library(sources, target, flavour="plain"):
    """The emulator and these sources, as a library for Emulator."""
    return _link(target, [HERE / "emulator.cpp", *sources], flavour, shared=True)


def build(flavour="plain"):
    """The library of every kernel of csrc/cuda, with bindings.cpp and geometry.cpp."""
    kernels = [*sorted(CUDA.glob("*.cu")), CUDA / "launch.cpp"]
    bindings = [HERE / "bindings.cpp", HERE / "geometry.cpp"]
    return build_library([*bindings, *kernels], OUTPUT / f"{flavour}.so", flavour)


def build_geometry():
    """The library of geometry.cpp alone, which needs neither the emulator nor a kernel."""
    return _link(OUTPUT / "geometry.so", [HERE / "geometry.cpp"], "plain", shared=True)


def build_operators():
    """torch's operators over the emulated kernels: csrc/cuda/ops.cpp, registered for CPU tensors. Load it into a process
    without mos_ext's own CPU library (operators.py does)."""
    from torch.utils import cpp_extension

    kernels = [*sorted(CUDA.glob("*.cu")), CUDA / "launch.cpp", CUDA / "ops.cpp"]
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unused-parameter", *includes]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    sources = [HERE / "emulator.cpp", *kernels]
    return _link(OUTPUT / "operators.so", sources, "plain", shared=True, more_flags=flags, libraries=libraries)


def build_program(source, flavour="plain"):
    """A program of one source of this folder: wrappers.cu or bugs.cu."""
    source = HERE / source
    return _link(OUTPUT / flavour / source.stem, [HERE / "emulator.cpp", source], flavour, shared=False)


# ---------------------------------------------------------------------------------------------- sanitizers


@cache
def _without_randomised_addresses():
    """Sanitizers of older compilers do not start on kernels that randomise addresses widely."""
    command = ["setarch", "-R"]
    available = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if available else []


def run_sanitized(flavour, argv, **options):
    """Runs a program; what a sanitizer reports makes its exit status nonzero. A Python script (argv starts with
    sys.executable) that loads a library of this flavour gets the sanitizer's runtime loaded before anything else."""
    environment = {**os.environ, **SANITIZER_OPTIONS[flavour], "OPENBLAS_NUM_THREADS": "1"}
    prefix = [] if flavour == "plain" else _without_randomised_addresses()
    if flavour != "plain" and argv[0] == sys.executable:
        runtime = subprocess.run(
            [COMPILER, f"-print-file-name=lib{flavour}.so"], capture_output=True, text=True, check=True
        )
        prefix = [*prefix, "env", f"LD_PRELOAD={os.path.realpath(runtime.stdout.strip())}"]
    return subprocess.run(
        [*prefix, *map(str, argv)], env=environment, capture_output=True, text=True, check=False, **options
    )


# ---------------------------------------------------------------------------------------------- calls


class Emulator:
    """A library made by build(): buffers in, kernels, buffers out. Buffers live until free()."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_last_error.restype = ctypes.c_char_p
        self.library.emulator_guarded_alloc.restype = ctypes.c_void_p
        self.library.emulator_guarded_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.library.emulator_guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._held = []

    def config(self, **options):
        """schedule, seed, resident_blocks, shuffle_blocks, max_shared_bytes, stack_bytes, timeout, early: see README.md."""
        text = ",".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in options.items())
        if self.library.emulator_config(text.encode()) != 0:
            raise ValueError(f"unknown option or value in {text!r}")

    def error(self):
        return self.library.emulator_last_error().decode()

    def stats(self):
        """Totals since the library was loaded."""
        names = STATISTICS.split()
        values = (ctypes.c_uint64 * len(names))()
        self.library.emulator_stats(values)
        return dict(zip(names, values, strict=True))

    def buffer(self, data=None, *, shape=None, dtype=None, align=16):
        """An array that ends where memory ends: a copy of data, or full of NaN (0xFF) with a shape and a dtype.
        Aligned to `align` bytes; bytes between its end and the next multiple of that are checked by free()."""
        if data is not None:
            data = np.asarray(data)
            shape, dtype = data.shape, data.dtype
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size == 0:
            return np.empty(shape, dtype)
        address = self.library.emulator_guarded_alloc(size, align)
        self._held.append((address, size, align))
        array = np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
        if data is not None:
            array[...] = data
        return array

    def free(self):
        """Frees every buffer; results must have been copied. Fails where a kernel wrote next to one."""
        held, self._held = self._held, []
        intact = [self.library.emulator_guarded_free(*block) for block in held]
        if not all(intact):
            raise RuntimeError(f"written outside buffer {intact.index(0)} of {len(held)}")

    def synchronize(self):
        """Runs what was launched under the option `early`."""
        self.call("emulator_synchronize")

    def call(self, name, *args):
        """Calls an extern "C" function that returns a cudaError_t. Arrays travel as their address, None as null, int
        as int64_t, float as double, anything else as ctypes takes it."""
        self.library.emulator_clear_error()
        status = getattr(self.library, name)(*map(_argument, args))
        if status != 0 or self.error():
            raise RuntimeError(f"{name}: status {status}: {self.error() or 'nothing was launched'}")


def _argument(value):
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, (int, np.integer)):
        return ctypes.c_int64(int(value))
    if isinstance(value, (float, np.floating)):
        return ctypes.c_double(float(value))
    return value
