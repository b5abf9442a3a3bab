"""Plants bugs in a copy of csrc/cuda and shows what the interpreter finds: python mutants.py CHECKOUT BUILD [NAME...]

BUILD is a folder of build.sh with compute_80 in it; only the sources that a bug touches are compiled again.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# name: (file, old, new, sources to compile, checks to run)
MUTANTS = {
    "shrink waits for one copy too few": (
        "shrink.cu",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        "shrink",
        "shrink:",
    ),
    "shrink without its barrier": ("shrink.cu", "__syncthreads();  // this tile", "// this tile", "shrink", "shrink:"),
    "shrink's table without a barrier": (
        "shrink.cu",
        "table = shared_table;\n    __syncthreads();",
        "table = shared_table;",
        "shrink",
        "shrink:",
    ),
    "backward waits for one copy too few": (
        "backward.cu",
        "cp_async_wait<kAhead - 1>",
        "cp_async_wait<kAhead>",
        "backward",
        "_backward",
    ),
    "backward writes dx over what others read": (
        "backward.cu",
        "__syncthreads();  // nobody reads x",
        "// nobody reads x",
        "backward",
        "shrink_backward",
    ),
    "backward without the barrier before s": (
        "backward.cu",
        "__syncthreads();  // nobody needs s",
        "// nobody needs s",
        "backward",
        "_backward",
    ),
    "backward accumulates without __syncwarp": (
        "backward.cu",
        "          }\n          __syncwarp();\n        }",
        "          }\n        }",
        "backward",
        "shrink_backward acc",
    ),
    "expand leaves without __syncwarp": (
        "expand.cu",
        "      __syncwarp();\n#pragma unroll\n      for (int j = 0; j < kOwn; ++j) {",
        "#pragma unroll\n      for (int j = 0; j < kOwn; ++j) {",
        "expand",
        "expand",
    ),
    "expand's sums without __syncwarp": (
        "expand.cu",
        "      __syncwarp();\n#pragma unroll\n      for (int n",
        "#pragma unroll\n      for (int n",
        "expand",
        "expand acc",
    ),
    "mma: a[1] and a[2] swapped": ("device.h", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', "shrink", "shrink:"),
    "mma: sums only written": ("device.h", '"+f"(d[0])', '"=f"(d[0])', "shrink", "shrink:"),
    "ldmatrix.trans does not": ("device.h", "m8n8.x4.trans", "m8n8.x4", "backward", "_backward"),
    "halves of bf16x2 swapped": (
        "device.h",
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(high), "f"(low));',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;\\n" : "=r"(bits) : "f"(low), "f"(high));',
        "expand",
        "expand:",
    ),
    "tf32 operands as they are": ("device.h", "cvt.rna.tf32.f32 %0, %1", "mov.b32 %0, %1", "shrink", "tf32"),
    "cp.async always reads": ("device.h", '"r"(bytes)', '"r"(16)', "shrink", "shrink:"),
    "ldmatrix may move": (
        "device.h",
        ': "r"(address)\n               : "memory");',
        ': "r"(address));',
        "shrink backward",
        "_backward",
    ),
    "waits do not order memory": (
        "device.h",
        '"n"(kPending) : "memory")',
        '"n"(kPending))',
        "shrink backward",
        "shrink",
    ),
    "no shared memory beyond 48 KiB": (
        "device.h",
        "shared_bytes > 48 * 1024",
        "shared_bytes > 480 * 1024",
        "shrink backward",
        "_backward",
    ),
    "sum writes four where fewer are": ("sum.cu", "if (i < live) one.out", "one.out", "sum", "sum"),
    "a row of x too many": (
        "tiles.h",
        "const bool inside = row < m.rows",
        "const bool inside = row <= m.rows",
        "shrink",
        "shrink:",
    ),
}


def main():
    checkout, build, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    found = 0
    chosen = {k: v for k, v in MUTANTS.items() if not wanted or any(w in k for w in wanted)}
    for name, (file, old, new, sources, only) in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            shutil.copytree(checkout / "csrc", root / "csrc")
            path = root / "csrc" / "cuda" / file
            text = path.read_text()
            assert old in text, f"{name}: {file} has changed"
            path.write_text(text.replace(old, new))
            objects = {p.name: p for p in (build / "80").glob("*.o")}
            for source in sources.split():
                objects[f"{source}.o"] = root / f"{source}.o"
                subprocess.run(
                    [
                        "nvcc",
                        "-c",
                        "-O3",
                        "-std=c++17",
                        "-Xcompiler=-fPIC",
                        "-gencode",
                        "arch=compute_80,code=compute_80",
                        "-no-compress",
                        "-o",
                        root / f"{source}.o",
                        root / "csrc" / "cuda" / f"{source}.cu",
                    ],
                    check=True,
                )
            library = root / "kernels.so"
            extra = (build / "launch_and_bindings.o", *build.glob("*.o"))
            subprocess.run(["g++", "-shared", "-o", library, *objects.values(), *{str(p) for p in extra}], check=True)
            done = subprocess.run(
                [sys.executable, HERE / "check.py", library, "0", "1", "--stop", "--quick", "--only", only],
                capture_output=True,
                text=True,
            )
            first = next(
                (line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("FAILED", "ptx:"))), ""
            )
            found += bool(first)
            print(
                f"{'found    ' if first else 'NOT FOUND'} {name}"
                + (f"\n          {first[:300]}" if first else f" | {done.stdout[-200:]}"),
                flush=True,
            )
    print(f"{found} of {len(chosen)} found")


if __name__ == "__main__":
    main()
