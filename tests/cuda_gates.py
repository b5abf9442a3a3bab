"""What can be known about the compiled CUDA library without a GPU, and must hold: `make check-cuda`.

    python tests/cuda_gates.py LIBRARY [--write csrc/cuda/RESOURCES.md]

Every GPU from compute capability 8.0 finds code that it can run. For every architecture: no kernel spills registers or keeps a stack, every block fits, 16-bit and TF32 products are done
by tensor cores and the others are not, activations travel 16 bytes at a time. Prints registers, shared memory and
blocks per multiprocessor of every kernel. Reads the library with cuobjdump, of the CUDA toolkit or from PyPI
(nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

import argparse
import ctypes
import re
import shutil
import site
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_emulator"))
import emulator

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Of a multiprocessor: KiB of shared memory, threads, blocks. CUDA programming guide, "Compute capabilities".
LIMITS = {
    "sm_80": (164, 2048, 32),
    "sm_86": (100, 1536, 16),
    "sm_89": (100, 1536, 24),
    "sm_90": (228, 2048, 32),
    "sm_100": (228, 2048, 32),
    "sm_120": (100, 1536, 24),
}
# Compute capabilities from 8.0 that nvcc 13.0 knows. Jetsons run real code of their own or translated PTX, but no real code
# of another GPU: CUDA programming guide, "Binary compatibility".
CAPABILITIES = (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
JETSONS = (87, 110)
REGISTERS = 65536  # of a multiprocessor, everywhere; a warp takes them in units of 256
RESERVED = 1024  # bytes of shared memory that every block costs beyond its own
THREADS = {"shrink": 128, "expand": 128, "backward": 128, "scatter_add": 128, "sum": 256, "gather_concat": 256}
LOW_RANK = ("shrink", "expand", "backward")
ARITHMETIC = {
    "TensorCore<mos::bf16_t>": ("bfloat16", 2),
    "TensorCore<mos::f16_t>": ("float16", 2),
    "Tf32": ("tf32", 4),
    "MultiplyAdd<float>": ("float32", 4),
    "MultiplyAdd<double>": ("float64", 8),
}
KERNEL = re.compile(r"mos::cuda::\(anonymous namespace\)::(\w+)_kernel<(.*)>\(")


def cuobjdump():
    found = shutil.which("cuobjdump")
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    others = (str(p) for folder in folders for p in Path(folder).glob("nvidia/*/bin/cuobjdump"))
    path = found or next(others, None)
    if path is None:
        sys.exit("cuda_gates: cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return path


def dump(library, *options):
    text = subprocess.run([cuobjdump(), *options, str(library)], capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short_name(text):
    """("backward", "bfloat16", 64, "x pass whole") for a demangled kernel; details are None where a kernel has none.

    "whole" is the variant for aligned matrices and shards, "any" the one that takes everything.
    """
    kernel, arguments = KERNEL.search(text).groups()
    arguments = re.sub(r"mos::cuda::", "", arguments)
    if kernel not in LOW_RANK:
        return kernel, re.sub(r"mos::|unsigned ", "", arguments), None, None
    parts = [part.strip() for part in re.split(r", (?![^<]*>)", arguments)]
    flags = [part.endswith(("true", "1")) for part in parts[1:] if re.search(r"(true|false|\(bool\)[01])$", part)]
    ranks = int(re.sub(r"\(int\)", "", parts[1])) if kernel != "expand" else None
    which = [] if kernel != "backward" else ["x pass" if flags[0] else "dy pass"]
    return kernel, ARITHMETIC[parts[0]][0], ranks, " ".join([*which, "whole" if flags[-1] else "any"])


def has_code(capability, real, ptx):
    """Whether a GPU can run one of these images: real code of its major version and no newer minor one, or older PTX."""
    others = () if capability in JETSONS else real
    older = any(cc // 10 == capability // 10 and cc <= capability for cc in others)
    return capability in real or older or any(cc <= capability for cc in ptx)


def images(library):
    """The compute capabilities that a library has real code and PTX for."""
    listed = (dump(library, option) for option in ("--list-elf", "--list-ptx"))
    return [{int(cc) for cc in re.findall(r"\bsm_(\d+)\.(?:cubin|ptx)", text)} for text in listed]


def resources(library):
    """(architecture, kernel) -> (registers, bytes of stack)."""
    out, architecture, name = {}, None, None
    for line in dump(library, "--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            architecture = found.group(1)
        elif "Function " in line:
            name = short_name(line)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, _, local = map(int, found.groups())
            out[architecture, name] = registers, stack + local
    return out


def instructions(library, architecture):
    """kernel -> its instructions in order, without operands."""
    out, name = defaultdict(list), None
    for line in dump(library, "-sass", "-arch", architecture).splitlines():
        if "Function : " in line:
            name = short_name(line + "(") if KERNEL.search(line) else None
        elif name and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", line)):
            out[name].append(found.group(1))
    return out


def loads_in_flight(ops):
    """The most loads of 16 bytes that are issued without an addition, a store or a branch between them."""
    most = run = 0
    for op in ops:
        if op.startswith("LDG") and ".128" in op:
            run += 1
            most = max(most, run)
        elif op.startswith(("FADD", "STS", "BRA")):
            run = 0
    return most


def shared_bytes(kernel, arithmetic, ranks):
    if kernel not in LOW_RANK:
        return 0
    library = ctypes.CDLL(str(emulator.build_geometry()))
    size = dict(ARITHMETIC.values())[arithmetic]
    return library.mos_shared_bytes(LOW_RANK.index(kernel), size, ranks or 0)


def blocks_per_multiprocessor(architecture, registers, shared, threads):
    kibibytes, all_threads, all_blocks = LIMITS[architecture]
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = kibibytes * 1024 // (shared + RESERVED)
    return min(by_registers, by_shared, all_threads // threads, all_blocks)


def problems(library):
    """Every broken rule, in a sentence."""
    real, ptx = images(library)
    for capability in CAPABILITIES:
        if not has_code(capability, real, ptx):
            yield f"no code for compute capability {capability / 10}: real code is of {sorted(real)}, PTX of {sorted(ptx)}"
    used = resources(library)
    for architecture in ARCHITECTURES:
        kernels = {name: use for (arch, name), use in used.items() if arch == architecture}
        if not kernels:
            yield f"{architecture}: no kernel was compiled for it"
            continue
        sass = instructions(library, architecture)
        for name, (registers, stack) in kernels.items():
            kernel, arithmetic, ranks, which = name
            where = f"{architecture} {' '.join(str(part) for part in name if part is not None)}"
            if stack:
                yield f"{where}: {stack} bytes of stack: registers were spilled"
            shared = shared_bytes(kernel, arithmetic, ranks)
            if not blocks_per_multiprocessor(architecture, registers, shared, THREADS[kernel]):
                yield f"{where}: a block of {registers} registers and {shared} bytes of shared memory does not fit"
            ops = sass[name]
            adds_planes = kernel in ("expand", "backward", "sum") and arithmetic not in ("float64", "double")
            if adds_planes and loads_in_flight(ops) < 4:
                yield f"{where}: planes are added one load at a time"
            if kernel not in LOW_RANK:
                continue

            def has(*starts, ops=ops):
                return any(op.startswith(start) for op in ops for start in starts)

            tensor = arithmetic in ("bfloat16", "float16", "tf32")
            if has("HMMA") != tensor:
                yield f"{where}: tensor cores are {'not ' if tensor else ''}used"
            if arithmetic in ("bfloat16", "float16") and not has("LDSM"):
                yield f"{where}: no ldmatrix"
            wide = {"LDGSTS": kernel != "expand", "STG": kernel == "expand" or "x pass" in which, "LDG": True}
            for op, wanted in wide.items():
                vectors = [o for o in ops if o.startswith(op + ".") and ".128" in o]
                # shrink copies F with cp.async too, so it has nothing to load through registers.
                if wanted and not vectors and (kernel, op) != ("shrink", "LDG"):
                    yield f"{where}: no {op} of 16 bytes"


def table(library):
    used = resources(library)
    names = sorted({name for _, name in used}, key=lambda n: (LOW_RANK.index(n[0]) if n[0] in LOW_RANK else 9, str(n)))
    yield "| kernel | shared KiB | " + " | ".join(ARCHITECTURES) + " |"
    yield "|---|---|" + "---|" * len(ARCHITECTURES)
    for name in names:
        kernel, arithmetic, ranks, which = name
        shared = shared_bytes(kernel, arithmetic, ranks)
        cells = []
        for architecture in ARCHITECTURES:
            registers, _ = used[architecture, name]
            cells.append(f"{registers}, {blocks_per_multiprocessor(architecture, registers, shared, THREADS[kernel])}")
        label = " ".join(str(part) for part in (kernel, which, arithmetic, ranks) if part)
        yield f"| {label} | {shared / 1024:.1f} | " + " | ".join(cells) + " |"


def compiler():
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V[\d.]+", text).group(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", type=Path, help="keep the table in this file")
    arguments = parser.parse_args()
    lines = list(table(arguments.library))
    print("registers of a thread, blocks per multiprocessor (no kernel has a stack):", *lines, sep="\n")
    if arguments.write:
        head = [
            "# Registers, shared memory and occupancy",
            "",
            f"Written by `make cuda-resources` with nvcc {compiler()}. Cells: registers of a thread, blocks that fit on a",
            "multiprocessor. Shared memory is the most a block of the kernel asks for (float32 pools, all column tiles);",
            "blocks have 128 threads, those of `sum` and `gather_concat` up to 256. No kernel has a stack, so none spills.",
            "",
        ]
        arguments.write.write_text("\n".join([*head, *lines]) + "\n")
    found = list(problems(arguments.library))
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
