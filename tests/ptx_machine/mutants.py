"""Does `make check-ptx` find bugs? Plants one after the other in a copy of csrc/cuda, compiles it with nvcc, and looks.

    python mutants.py [--only NAME ...] [--jobs 2]

Most are bugs that tests/cuda_emulator cannot see, because it replaces device.h's PTX and nvcc's host code: constraints
of inline assembly, orders of operands, address spaces, launch attributes. One line per mutant: what was said. The exit
status is 1 where one survives that EQUIVALENT does not explain. Part of `make mutants`. A mutant whose text no longer
occurs in the sources is an error: rewrite it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from toolchain import (
    CUDA,
    DEPENDENT_LAUNCHES,
    HERE,
    JOBS,
    ROOT,
    build,
    compile_all,
    host_units,
    kernel_units,
    link,
    machine_units,
    nvcc,
)

SHARE = 3  # of the products' checks, one in so many
TIMEOUT = 600  # seconds of a run; a mutant may hang


@dataclass(frozen=True)
class Mutant:
    name: str
    source: str  # the .cu that is compiled anew
    only: str  # what the names of the checks contain
    edits: tuple  # (old, new): replaced everywhere
    file: str  # of csrc/cuda
    architecture: int

    def apply(self, folder):
        path = folder / self.file
        text = path.read_text()
        for old, new in self.edits:
            if old not in text:
                raise SystemExit(f"{self.name}: does not occur in {self.file}, rewrite it:\n{old}")
            text = text.replace(old, new)
        path.write_text(text)


MUTANTS = []


def plant(name, source, only, *edits, file="device.h", architecture=DEPENDENT_LAUNCHES):
    MUTANTS.append(Mutant(name, source, only, edits, file, architecture))


# fmt: off
# Operands and constraints of inline assembly.
plant("mma: a[1] and a[2] swapped", "shrink.cu", "shrink:", ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'))
plant("mma: b[0] and b[1] swapped", "expand.cu", "expand", ('"r"(b[0]), "r"(b[1])', '"r"(b[1]), "r"(b[0])'))
plant("mma: b[0] twice", "shrink.cu", "shrink:", ('"r"(b[0]), "r"(b[1])', '"r"(b[0]), "r"(b[0])'))
plant("mma: sums are only written", "shrink.cu", "shrink:", ('"+f"(d[0]), "+f"(d[1])', '"=f"(d[0]), "+f"(d[1])'))
plant("mma: sums are only read", "shrink.cu", "shrink:", ('"+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \\\n                 : "r"', '\\\n                 : "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]), "r"'))
plant("mma: C is another sum", "shrink.cu", "shrink:", ('{%8,%9}, {%0,%1,%2,%3};', '{%8,%9}, {%0,%1,%3,%2};'))
plant("mma: bf16 for f16", "shrink.cu", "f16/f16", ('MOS_MMA(mma_f16, "m16n8k16", "f16")', 'MOS_MMA(mma_f16, "m16n8k16", "bf16")'))
plant("ldmatrix: matrices 1 and 2 swapped", "shrink.cu", "shrink:", ('.x4.shared.b16 {%0,%1,%2,%3}', '.x4.shared.b16 {%0,%2,%1,%3}'))
plant("ldmatrix.trans does not transpose", "expand.cu", "expand", ("m8n8.x4.trans", "m8n8.x4"))
plant("bf16x2: halves swapped", "expand.cu", "bf16", ('asm("cvt.rn.bf16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(high), "f"(low));', 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(low), "f"(high));'))
plant("f16x2: halves swapped", "expand.cu", "f16", ('asm("cvt.rn.f16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(high), "f"(low));', 'asm("cvt.rn.f16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(low), "f"(high));'))
plant("tf32: operands as they are", "shrink.cu", "tf32", ("cvt.rna.tf32.f32 %0, %1", "mov.b32 %0, %1"))

# cp.async and addresses.
plant("cp.async: always reads", "shrink.cu", "shrink:", ('"r"(bytes)', '"r"(16)'))
plant("cp.async: 8 bytes of 16", "shrink.cu", "shrink:", ('cp.async.cg.shared.global [%0], [%1], 16, %2', 'cp.async.ca.shared.global [%0], [%1], 8, %2'))
plant("cp.async: the size says nothing", "shrink.cu", "shrink:", ('[%1], 16, %2;', '[%1], 16;'))
plant("cp.async: groups are not closed", "shrink.cu", "shrink:", ('asm volatile("cp.async.commit_group;\\n" ::: "memory")', 'asm volatile("" ::: "memory")'))
plant("cp.async: waits for a group too few", "shrink.cu", "shrink:", ('::"n"(kPending)', '::"n"(kPending + 1)'))
plant("shared addresses are generic ones cut off", "shrink.cu", "shrink:", ("static_cast<uint32_t>(__cvta_generic_to_shared(p))", "static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p))"))

# Clobbers.
plant("ldmatrix: no clobber, not volatile", "expand.cu", "expand", ('asm volatile("ldmatrix', 'asm("ldmatrix'), ('               : "r"(address)\n               : "memory");', '               : "r"(address));'))
plant("cp.async: waits do not order memory", "shrink.cu", "shrink:", ('"n"(kPending) : "memory")', '"n"(kPending))'))

# Launches, as nvcc's host code and the runtime see them.
plant("no shared memory beyond 48 KiB", "backward.cu", "_backward", ("shared_bytes > 48 * 1024", "shared_bytes > 480 * 1024"))
plant("shared memory is not asked for", "shrink.cu", "shrink:", ("  config.dynamicSmemBytes = static_cast<size_t>(shared.bytes);\n", ""))
plant("parameters of another kernel", "sum.cu", "sum", ("void* arguments[] = {&p...};", "void* arguments[] = {&grid};"))
plant("fewer threads than are launched", "shrink.cu", "shrink:", ("__launch_bounds__(kThreads, kRanks == 64 ? 3 : 4)", "__launch_bounds__(kThreads / 2)"), file="shrink.cu")

# Bugs that both machines find, one of each kind, to see this one's detectors at work on what nvcc makes of kernels.
plant("a barrier is missing", "shrink.cu", "shrink:", ("__syncthreads();  // this tile", "// this tile"), file="shrink.cu")
plant("a row of x too many", "shrink.cu", "shrink:", ("const bool inside = row < m.rows", "const bool inside = row <= m.rows"), file="tiles.h")
plant("sum: four where fewer are", "sum.cu", "sum", ("if (j < live) target[j]", "target[j]"), file="tiles.h")

# Dependent launches: what device.h makes of them, and the kernels' waits.
LET = "  let_next_launch_start();\n"
WAIT = "  wait_for_launch_before();  // F and the bias are older than that; s is its work\n"
WAIT_DY, WAIT_DX = "  if (!kXPass) wait_for_launch_before();\n", "  if (kXPass) wait_for_launch_before();\n"
plant("wait: no instruction", "expand.cu", "chain forward", ('asm volatile("griddepcontrol.wait;\\n" ::: "memory")', 'asm volatile("" ::: "memory")'))
plant("wait: lets the next start instead", "expand.cu", "chain forward", ("griddepcontrol.wait", "griddepcontrol.launch_dependents"))
plant("wait: not for the first architecture that has it", "sum.cu", "chain backward", ("__CUDA_ARCH__ >= 900", "__CUDA_ARCH__ > 900"))
plant("wait: does not order memory", "sum.cu", "chain backward", ('asm volatile("griddepcontrol.wait;\\n" ::: "memory")', 'asm("griddepcontrol.wait;\\n")'))
plant("let: no instruction", "shrink.cu", "chain forward", ('asm volatile("griddepcontrol.launch_dependents;\\n");', ""))
plant("let: waits instead", "shrink.cu", "chain forward", ("griddepcontrol.launch_dependents", "griddepcontrol.wait"))
plant("early: kernels that do not wait", "expand.cu", "chain forward", ("attributes.ptxVersion >= 90", "attributes.ptxVersion >= 80"), architecture=80)
plant("early: no kernel at its first launch", "expand.cu", "chain forward", ("  early = attributes.ptxVersion >= 90;\n", "  const bool able = attributes.ptxVersion >= 90;\n"), ("  if (early) state.early", "  if (able) state.early"))
plant("early: every kernel at its first launch only", "expand.cu", "chain forward", ("  if (early) state.early.fetch_or(bit, std::memory_order_relaxed);\n", ""))
plant("early: serialization is not allowed", "expand.cu", "chain forward", ("programmaticStreamSerializationAllowed = 1", "programmaticStreamSerializationAllowed = 0"))
plant("early: who did not ask", "shrink.cu", "chain forward", ("early && able ? 1 : 0", "able ? 1 : 0"))
plant("early: nobody", "expand.cu", "chain forward", ("early && able ? 1 : 0", "0"))
plant("early: shrink, which does not wait", "shrink.cu", "chain forward", ("/*early=*/false", "/*early=*/true"), file="shrink.cu")
plant("shrink: does not let the next start", "shrink.cu", "chain forward", (LET, ""), file="shrink.cu")
plant("expand: does not wait", "expand.cu", "chain forward", (WAIT + LET, ""), file="expand.cu")
plant("expand: waits after reading s", "expand.cu", "chain forward", (WAIT + LET, ""), ("      load_s(row0, 0);\n", "      load_s(row0, 0);\n      wait_for_launch_before();\n"), file="expand.cu")
plant("expand: waits after reading few sums", "expand.cu", "chain forward", (WAIT + LET, ""), ("  for (int tile = tile0;", "  wait_for_launch_before();\n  for (int tile = tile0;"), file="expand.cu")
plant("expand: lets the next start before it waits", "expand.cu", "chain", (WAIT + LET, LET + WAIT), file="expand.cu")
plant("dy pass: does not wait", "backward.cu", "chain backward", (WAIT_DY, ""), (LET, ""), file="backward.cu")
plant("dy pass: waits after it has asked for dy", "backward.cu", "chain backward", (WAIT_DY, ""), (WAIT_DX, "  wait_for_launch_before();\n"), file="backward.cu")
plant("x pass: does not wait", "backward.cu", "chain backward", (WAIT_DX + LET, ""), file="backward.cu")
plant("x pass: waits after reading ds", "backward.cu", "chain backward", (WAIT_DX + LET, ""), ("    Block<S> projected[kXPass", "    if (kXPass) wait_for_launch_before();\n    Block<S> projected[kXPass"), file="backward.cu")
plant("x pass: lets the next start before it waits", "backward.cu", "chain backward", (WAIT_DX + LET, LET + WAIT_DX), file="backward.cu")
plant("passes: do not let the next start", "backward.cu", "chain backward", (WAIT_DX + LET, WAIT_DX), file="backward.cu")
plant("sum: does not wait", "sum.cu", "chain backward", ("  wait_for_launch_before();\n", ""), file="sum.cu")
plant("sum: waits after it has read", "sum.cu", "chain backward", ("  wait_for_launch_before();\n" + LET, ""), ("  write_quad(one", "  wait_for_launch_before();\n  write_quad(one"), file="sum.cu")
plant("sum: lets the next start before it waits", "sum.cu", "chain backward", ("  wait_for_launch_before();\n" + LET, LET + "  wait_for_launch_before();\n"), file="sum.cu")

# fmt: on

# Mutants of which nvcc 13.0 makes the same PTX, and why. They run all the same: another nvcc may not.
EQUIVALENT = {
    "cp.async: waits do not order memory": "nvcc moves no access of memory over an asm volatile",
    "wait: does not order memory": "nor over an asm without results, which is volatile",
}


def examine(mutant, scratch, objects):
    """What the checks say of a mutant; empty where they find nothing."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        shutil.copytree(ROOT / "csrc", root / "csrc")
        mutant.apply(root / "csrc" / "cuda")
        changed = compile_all(
            list(kernel_units(mutant.architecture, [root / "csrc" / "cuda" / mutant.source], root, root))
        )
        rest = [path for path in objects[mutant.architecture] if path.name != f"{mutant.source}.o"]
        library = link(root / "kernels.so", [*changed, *rest])
        command = [sys.executable, HERE / "check.py", library, "--stop", "--share", str(SHARE), "--only", mutant.only]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "hangs"
    if done.returncode == 0:
        return ""
    said = (done.stdout + done.stderr).splitlines()
    return next((line for line in said if line.startswith(("FAILED", "ptx:"))), said[-1] if said else "crashed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="mutants whose name contains this; may be given several times")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes at a time")
    options = parser.parse_args()
    if not nvcc():
        print("mutants of the PTX: none planted, nvcc was not found")
        return 0
    start = time.perf_counter()
    chosen = [mutant for mutant in MUTANTS if any(name in mutant.name for name in options.only or [""])]
    architectures = sorted({mutant.architecture for mutant in chosen})
    build(architectures)
    sources, shared = sorted(CUDA.glob("*.cu")), (*machine_units(), *host_units())
    objects = {a: [target for _, target, _ in (*kernel_units(a, sources), *shared)] for a in architectures}
    found, surviving = 0, []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda mutant: examine(mutant, scratch, objects), chosen)
        for mutant, said in zip(chosen, results, strict=True):
            found += bool(said)
            if not said and mutant.name not in EQUIVALENT:
                surviving.append(mutant)
            state = "found" if said else "equivalent" if mutant.name in EQUIVALENT else "SURVIVES"
            said = said.removeprefix("FAILED ") or EQUIVALENT.get(mutant.name, "")
            print(f"{mutant.name:42} {state:10} {said[:150]}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{found} of {len(chosen)} found, {len(surviving)} survive unexplained; {seconds:.0f} s")
    return 1 if surviving else 0


if __name__ == "__main__":
    sys.exit(main())
