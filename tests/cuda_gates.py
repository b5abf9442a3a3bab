"""What can be known about the compiled CUDA library without a GPU, and must hold: `make check-cuda`.

    python tests/cuda_gates.py LIBRARY [--write csrc/cuda/RESOURCES.md]

Every GPU from compute capability 8.0 finds code that it can run. For every architecture: no kernel spills registers or
keeps a stack, every block fits, 16-bit and TF32 products are done by tensor cores and the others are not, activations
travel 16 bytes at a time; for one of them, no inner loop exceeds its budget of instructions. Prints registers, shared
memory and blocks per multiprocessor of every kernel, and the instructions of inner loops. Reads the library with cuobjdump, of the CUDA toolkit or from PyPI
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


PARTS = {1: "whole", 2: "dropout", 4: "accumulate", 8: "bias", 16: "groups", 32: "rows"}  # csrc/cuda/variants.h


def short_name(text):
    """("backward", "bfloat16", 64, "x pass whole dropout") for a demangled kernel; details are None where a kernel has
    none.

    "whole" is a variant for aligned matrices and shards, "any" the one that takes everything.
    """
    kernel, arguments = KERNEL.search(text).groups()
    arguments = re.sub(r"mos::cuda::", "", arguments)
    if kernel not in LOW_RANK:
        arguments = re.sub(r"mos::|unsigned |, (false|\(bool\)0)$", "", arguments)
        return kernel, re.sub(r", (true|\(bool\)1)$", " groups", arguments), None, None
    arithmetic, ranks, *others = (part.strip() for part in re.split(r", (?![^<]*>)", arguments))
    bits = int(re.search(r"(\d+)u?$", others[-1]).group(1))
    which = [] if kernel != "backward" else ["x pass" if re.search(r"true|1$", others[0]) else "dy pass"]
    parts = [name for bit, name in PARTS.items() if bits & bit] or ["any"]
    return kernel, ARITHMETIC[arithmetic][0], int(re.sub(r"\(int\)", "", ranks)), " ".join([*which, *parts])


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
    """kernel -> its instructions in order: address, name, operands."""
    out, name = defaultdict(list), None
    line_of_code = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?);")
    for line in dump(library, "-sass", "-arch", architecture).splitlines():
        if "Function : " in line:
            name = short_name(line + "(") if KERNEL.search(line) else None
        elif name and (found := line_of_code.match(line)):
            out[name].append((int(found.group(1), 16), found.group(2), found.group(3)))
    return out


# ------------------------------------------------------------------------------------------------ inner loops

COUNTED = "sm_90"  # the architecture whose loops are counted, and have budgets
PHILOX = "-0x2daee0ad"  # a constant of its products (csrc/common/philox.h)
GROUPS = 8  # of eight columns, of a lane in a tile of backward
TILES = {16: 4, 64: 2}  # of columns, unrolled in a block of backward (backward_tiles)


class Loop:
    """A loop of a kernel: what lies between its first instruction and its branch back."""

    def __init__(self, code, low, high):
        self.low, self.high = low, high
        self.code = [one for one in code if low <= one[0] <= high]

    def count(self, name, operand=""):
        return sum(op.startswith(name) and operand in operands for _, op, operands in self.code)

    def holds(self, other):
        return self is not other and self.low <= other.low and other.high <= self.high


def loops(code):
    """All loops; one whose branch back is not the last is two to us, of which the longer holds the other."""
    back = {}
    for address, op, operands in code:
        found = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if op.startswith("BRA") and found and (target := int(found.group(1), 16)) < address:
            back[target] = max(address, back.get(target, 0))
    return [Loop(code, low, high) for low, high in sorted(back.items())]


def tile_counts(name, code):
    """Warp instructions of a whole variant for each tile, and for each tile of rows beside that (None: no such part).

    Everything between a loop's ends is counted, executed or not, but: loops that add planes stand for one batch of them
    in the count of rows; products and dropout that are not unrolled count as often as they run. Of the loops that a
    variant with groups has for writing and for accumulating, the longer.
    """
    kernel, _, ranks, _ = name
    every = loops(code)
    products = [loop for loop in every if loop.count("HMMA")]
    outer = [loop for loop in products if not any(other.holds(loop) for other in products)]
    if kernel == "expand":
        tiles = [loop for loop in products if not any(loop.holds(other) for other in products)]
        rows = max(outer, key=lambda loop: len(loop.code))
        inside = sum(len(tile.code) for tile in tiles if rows.holds(tile))
        return max(len(tile.code) for tile in tiles), len(rows.code) - inside
    main = max(outer, key=lambda loop: len(loop.code))
    if kernel == "shrink":
        return len(main.code), None
    # Tiles begin where a warp waits for its copies; what is before that happens once for all of them.
    first_tile = next(address for address, op, _ in main.code if op == "DEPBAR.LE")
    inner = [
        loop
        for loop in every
        if main.holds(loop) and not any(other.holds(loop) for other in every if main.holds(other))
    ]
    rows = sum(address < first_tile for address, _, _ in main.code)
    tiles = len(main.code) - rows
    for loop in inner:
        if loop.count("HMMA"):
            times = ranks / loop.count("HMMA")  # each product of a tile takes as many as there are ranks
        elif loop.count("IMAD.WIDE.U32", PHILOX):
            times = GROUPS / loop.count("STS.128")
        else:
            continue
        tiles += (times - 1) * len(loop.code)
    return round(tiles / TILES[ranks]), rows


def loads_in_flight(ops):
    """The most loads of 16 bytes that are issued without an addition, a store or a branch between them."""
    most = run = 0
    for op in ops:
        if op.startswith("LDG.") and ".128" in op:
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


# Of a whole variant: the most warp instructions for each tile, 8 KiB of x or y for shrink and expand, 16 KiB for the two
# passes of backward; and what a tile took before these variants were compiled apart, counted by hand along the path
# that ran (for 64 ranks nobody counted). Budgets of 64 ranks are what was reached, and a twentieth.
BUDGETS = {
    ("shrink", 16, "whole"): (165, 295),
    ("shrink", 16, "whole dropout"): (345, 601),
    ("shrink", 64, "whole"): (207, None),
    ("shrink", 64, "whole dropout"): (456, None),
    ("expand", 16, "whole"): (200, 518),
    ("expand", 16, "whole bias"): (200, 518),
    ("expand", 16, "whole accumulate"): (200, 518),
    ("expand", 64, "whole"): (140, None),
    ("expand", 64, "whole bias"): (245, None),
    ("expand", 64, "whole accumulate"): (345, None),
    ("backward", 16, "dy pass whole"): (230, 312),
    ("backward", 64, "dy pass whole"): (416, None),
    ("backward", 16, "x pass whole"): (500, 958),
    ("backward", 16, "x pass whole accumulate"): (500, 958),
    ("backward", 16, "x pass whole dropout"): (950, 2008),
    ("backward", 16, "x pass whole dropout accumulate"): (1060, 2008),
    ("backward", 64, "x pass whole"): (481, None),
    ("backward", 64, "x pass whole accumulate"): (888, None),
    ("backward", 64, "x pass whole dropout"): (1197, None),
    ("backward", 64, "x pass whole dropout accumulate"): (1319, None),
    # With groups: what was reached, and a twentieth. Both ways are counted where a tile is written or accumulated.
    ("shrink", 16, "whole groups"): (159, None),
    ("shrink", 16, "whole groups rows"): (176, None),
    ("shrink", 16, "whole dropout groups"): (364, None),
    ("shrink", 64, "whole groups"): (296, None),
    ("shrink", 64, "whole groups rows"): (313, None),
    ("shrink", 64, "whole dropout groups"): (515, None),
    ("expand", 16, "whole groups"): (256, None),
    ("expand", 16, "whole groups rows"): (320, None),
    ("expand", 64, "whole groups"): (312, None),
    ("expand", 64, "whole groups rows"): (369, None),
    ("backward", 16, "dy pass whole groups"): (228, None),
    ("backward", 64, "dy pass whole groups"): (597, None),
    ("backward", 16, "x pass whole groups"): (642, None),
    ("backward", 64, "x pass whole groups"): (966, None),
    ("backward", 16, "x pass whole dropout groups"): (1161, None),
    ("backward", 64, "x pass whole dropout groups"): (1566, None),
}


def over_budget(name, code):
    kernel, arithmetic, ranks, which = name
    counted, _ = tile_counts(name, code)
    budget, _ = BUDGETS[kernel, ranks, which]
    if counted > budget:
        yield f"{COUNTED} {kernel} {which} {arithmetic} {ranks}: {counted} instructions for each tile, {budget} allowed"


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
            ops = [op for _, op, _ in sass[name]]
            adds_planes = kernel in ("expand", "backward", "sum") and arithmetic.split()[0] not in ("float64", "double")
            if adds_planes and loads_in_flight(ops) < 4:
                yield f"{where}: planes are added one load at a time"
            if kernel not in LOW_RANK:
                continue
            if architecture == COUNTED and "whole" in which:
                yield from over_budget(name, sass[name])

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


def counts_table(library):
    yield "| kernel | variant | dtype | ranks | per tile | per row of tiles | budget | before |"
    yield "|---|---|---|---|---|---|---|---|"
    sass = instructions(library, COUNTED)
    for name in sorted((n for n in sass if "whole" in (n[3] or "")), key=lambda n: (LOW_RANK.index(n[0]), n[1:])):
        kernel, arithmetic, ranks, which = name
        found = re.match(r"(dy pass|x pass)? ?whole ?(.*)", which)
        (tile, rows), (budget, before) = tile_counts(name, sass[name]), BUDGETS[kernel, ranks, which]
        cells = (found.group(1) or kernel, found.group(2) or "write", arithmetic, ranks, tile, rows, budget, before)
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def compiler():
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V[\d.]+", text).group(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", type=Path, help="keep the table in this file")
    arguments = parser.parse_args()
    lines, counts = list(table(arguments.library)), list(counts_table(arguments.library))
    print("registers of a thread, blocks per multiprocessor (no kernel has a stack):", *lines, sep="\n")
    print(f"warp instructions of the inner loops, {COUNTED}:", *counts, sep="\n")
    if arguments.write:
        head = [
            "# Registers, shared memory, occupancy, and the instructions of inner loops",
            "",
            f"Written by `make cuda-resources` with nvcc {compiler()}. Cells: registers of a thread, blocks that fit on a",
            "multiprocessor. Shared memory is the most a block of the kernel asks for (float32 pools, all column tiles);",
            "blocks have 128 threads, those of `sum` and `gather_concat` up to 256. No kernel has a stack, so none spills.",
            "",
        ]
        middle = [
            "",
            f"Warp instructions of the whole variants' inner loops in the machine code of {COUNTED}, counted, not timed: for",
            "each tile (8 KiB of x or y; 16 KiB in the two passes of backward), and for each row of a block's tiles beside",
            "that, one batch of planes included. With groups, writing and accumulating are both counted, and every rank; finding",
            "the group is beside that. `make check-cuda` fails above the budget; before: see tests/cuda_gates.py.",
            "",
        ]
        arguments.write.write_text("\n".join([*head, *lines, *middle, *counts]) + "\n")
    found = list(problems(arguments.library))
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
