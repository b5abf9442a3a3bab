"""Builds the machine, and over it the kernels as nvcc compiles them to PTX. Incremental, into build/ptx_machine."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "cuda_emulator"))
from emulator import COMPILER, CUDA, ROOT, _is_current, _lock, _machine_flags, _write  # noqa: E402

OUTPUT = ROOT / "build" / "ptx_machine"
MACHINE = HERE / "machine"
JOBS = 2  # processes at a time
# One for each front end of nvcc, and the first with griddepcontrol.
ARCHITECTURES = (80, 90, 100)
DEPENDENT_LAUNCHES = 90
HOST_SOURCES = (CUDA / "launch.cpp", HERE.parent / "cuda_emulator" / "bindings.cpp")  # beside the kernels
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def nvcc():
    """The CUDA compiler, or None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def compile_all(units):
    """Runs the compilers of (command, object, inputs) whose object is not current; returns the objects."""
    pending = [(command, target) for command, target, inputs in units if not _is_current(target, command, inputs)]
    for _, target in pending:
        target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: _write(*job), pending))
    return [target for _, target, _ in units]


def machine_units():
    """The interpreter itself: it needs no CUDA toolkit."""
    # No contraction: what PTX rounds twice must be rounded twice.
    flags = ["-O2", "-std=c++20", "-fPIC", "-ffp-contract=off", *_machine_flags(), *WARNINGS]
    headers = list(MACHINE.glob("*.h"))
    for source in sorted(MACHINE.glob("*.cpp")):
        if source.name != "runtime.cpp":
            target = OUTPUT / "machine" / f"{source.name}.o"
            yield [COMPILER, "-c", *flags, str(source.relative_to(ROOT))], target, [source, *headers]


def host_units():
    """What lies between the kernels and Python, compiled by nvcc, which knows where its headers are."""
    inputs = [*MACHINE.glob("*.h"), *(ROOT / "csrc").rglob("*.h")]
    for source in (MACHINE / "runtime.cpp", *HOST_SOURCES):
        command = [nvcc(), "-c", "-O1", "-std=c++20", "-Xcompiler=-fPIC", str(source.relative_to(ROOT))]
        yield command, OUTPUT / "host" / f"{source.name}.o", [source, *inputs]


def kernel_units(architecture, sources, root=ROOT, output=OUTPUT):
    """Sources of `root` as PTX for an architecture, in objects with their host code."""
    headers = list((root / "csrc").rglob("*.h"))
    # -no-compress: the stand-in for the runtime reads the PTX out of the objects.
    generate = ["-gencode", f"arch=compute_{architecture},code=compute_{architecture}", "-no-compress"]
    for source in sources:
        command = [nvcc(), "-c", "-O3", "-std=c++17", "-Xcompiler=-fPIC", *generate, str(source)]
        yield command, output / str(architecture) / f"{source.name}.o", [source, *headers]


def link(target, objects):
    # Symbolic: a CUDA runtime that the process may have loaded stays out of it.
    command = [COMPILER, "-shared", "-Wl,-Bsymbolic", *map(str, objects)]
    if not _is_current(target, command, objects):
        _write(command, target)
    return target


def build_machine():
    """The library of the machine alone, for PTX text."""
    with _lock(OUTPUT / "lock"):
        return link(OUTPUT / "machine.so", compile_all(list(machine_units())))


def build(architectures=ARCHITECTURES):
    """({architecture: library of every kernel of csrc/cuda}, {architecture: library of probes.cu}), over the machine."""
    with _lock(OUTPUT / "lock"):
        sources = sorted(CUDA.glob("*.cu"))
        kernels = {a: list(kernel_units(a, sources)) for a in architectures}
        probes = {a: list(kernel_units(a, [HERE / "probes.cu"])) for a in architectures if a >= DEPENDENT_LAUNCHES}
        machine, host = list(machine_units()), list(host_units())
        # The longest first.
        of_nvcc = (unit for units in (*kernels.values(), *probes.values()) for unit in units)
        compile_all([*of_nvcc, *machine, *host])

        def linked(name, units, more):
            return {
                a: link(OUTPUT / str(a) / name, [target for _, target, _ in (*own, *more, *machine)])
                for a, own in units.items()
            }

        return linked("kernels.so", kernels, host), linked("probes.so", probes, host[:1])
