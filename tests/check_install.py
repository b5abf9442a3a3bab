"""Every situation of the table of docs/install.md, by the very commands that stand there: `make check-install`.

    python tests/check_install.py [WORD ...]   # those that have one of these words in them

Each gets a clone, a new virtual environment as Python makes it, torch, and a PATH with or without compilers; "torch for
CUDA" is the oldest supported (torch_versions.py fetches it). What `python -m mos_ext` says afterwards is in the table
that is printed, and has to be what is expected. CUDA kernels are compiled for one architecture.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch_versions
from bare import bare_environment

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.11"
COMPILERS = re.compile(r"(.*-)?(c\+\+|cc|g\+\+|gcc|clang|clang\+\+|nvcc)(-[\d.]+)?")
NVCC = re.compile("nvcc")
NINJA = re.compile("ninja(-build)?")
NOTHING = re.compile("(?!)")
NO_NVCC = "no CUDA toolkit was found"
NO_COMPILER = "there is no C++ compiler"
CPU_TORCH = "the installed torch is a CPU build"
CHOSEN = "MOS_EXT_BUILD="


@dataclass
class Case:
    """A row of the table, a machine, and what its libraries, in order, have to be called in the report."""

    row: str
    machine: str
    hidden: re.Pattern  # tools
    expected: tuple[str, str] | str  # the last line where it has to fail
    cuda: bool = False  # the torch
    all_packages: bool = False


CASES = [
    Case("nothing to compile", "no compiler", COMPILERS, ("loaded from", "")),
    Case("with a C++ compiler", "no nvcc, torch for CPUs", NVCC, ("loaded from", CPU_TORCH)),
    Case("with a C++ compiler", "no nvcc, torch for CUDA", NVCC, ("loaded from", NO_NVCC), cuda=True),
    Case("with a C++ compiler", "nvcc, torch for CUDA", NOTHING, ("loaded from", "loaded from"), cuda=True),
    Case("with a C++ compiler", "no compiler after all", COMPILERS, (NO_COMPILER, CPU_TORCH)),
    Case("no compiler", "no compiler", COMPILERS, (CHOSEN, CHOSEN)),
    Case("CPU kernels only", "nvcc, torch for CPUs", NOTHING, ("loaded from", CHOSEN)),
    Case("CPU kernels only", "no compiler", COMPILERS, NO_COMPILER),
    Case("CUDA kernels or fail", "nvcc, torch for CPUs, no ninja", NINJA, ("loaded from", CPU_TORCH)),
    Case("CUDA kernels or fail", "no nvcc", NVCC, NO_NVCC),
    Case("to work on it", "no nvcc, torch for CPUs", NVCC, ("loaded from", CPU_TORCH), all_packages=True),
]


def commands():
    """situation -> what stands above the table, and in its row, to be run."""
    section = (ROOT / "docs" / "install.md").read_text().partition("\n## ")[0]
    first = re.search("`(pip install [^`]+)`", section).group(1)
    rows = re.findall(r"^\| (.+?) \| (.*`.*) \|$", section, re.MULTILINE)
    return {situation: [first, *re.findall(r"`([^`]*pip install[^`]+)`", cell)] for situation, cell in rows}


def path_without(hidden, folder):
    """One folder of links to every program there is but those."""
    folder.mkdir()
    for program in (p for d in os.environ["PATH"].split(os.pathsep) if os.path.isdir(d) for p in os.scandir(d)):
        link = folder / program.name
        if not hidden.fullmatch(program.name) and not link.is_symlink():
            link.symlink_to(program.path)
    return folder


def environment(case, scratch):
    """A virtual environment with the case's torch, and the variables under which it is used."""
    folder = scratch / "venv"
    names = [d.name for d in metadata.distributions() if d.name != "mos_ext"] if case.all_packages else []
    python, _ = bare_environment(folder, "numpy", "safetensors", "torch", *names, pip=True)
    version, libraries = torch.__version__.partition("+")[0], []
    if case.cuda:
        other = ROOT / "build" / "torch" / OLDEST
        torch_versions.fetch(OLDEST, other)
        links = folder.with_name("venv-links")
        for old in [*links.glob("torch*"), *links.glob("functorch*")]:
            old.unlink()
        for new in (other / "site").iterdir():
            if not new.name.endswith(".dist-info"):
                (links / new.name).symlink_to(new)
                continue
            version = new.name.removesuffix(".dist-info").split("-")[1]
            (links / new.name).mkdir()  # without the NVIDIA libraries that stand-ins take the place of
            lines = (new / "METADATA").read_text().splitlines(keepends=True)
            needs_gpu = re.compile(r"Requires-Dist: (cuda|nvidia|triton)")
            (links / new.name / "METADATA").write_text("".join(x for x in lines if not needs_gpu.match(x)))
        libraries = [str(other / "stand_ins")]
    constraint = scratch / "constraint.txt"  # or the isolated build would fetch a torch for CUDA
    constraint.write_text(f"torch=={version.partition('+')[0]}\n")
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("MOS_EXT_", "CUDA_", "PYTHON")) and k not in ("CC", "CXX")
    }
    path = path_without(case.hidden, scratch / "programs")
    return python, {
        **kept,
        "PATH": f"{python.parent}{os.pathsep}{path}",
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }


def clone(folder):
    """What git has, and what `make wheel` put into dist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "dist", folder / "dist")
    return folder


def check(case, scratch):
    """What happened: the row of the table, and whether it is what was expected."""
    started = time.perf_counter()
    ((situation, listed),) = [row for row in commands().items() if case.row in row[0]]
    python, variables = environment(case, scratch)
    tree = clone(scratch / "clone")
    for command in listed:
        out = subprocess.run(["bash", "-c", command], cwd=tree, env=variables, capture_output=True, text=True)
        if out.returncode:
            break
    if out.returncode:
        found = [
            line for line in (out.stdout + out.stderr).splitlines() if "MOS_EXT_BUILD=" in line or NO_COMPILER in line
        ]
        result = [f"refused: {found[0].strip()}" if found else (out.stdout + out.stderr)[-600:], "", ""]
        good = isinstance(case.expected, str) and case.expected in result[0]
    else:
        empty = scratch / "elsewhere"
        empty.mkdir()
        report = subprocess.run([python, "-m", "mos_ext"], cwd=empty, env=variables, capture_output=True, text=True)
        said = dict(re.findall(r"^(_C|_C_cuda|self-test) +(.+)$", report.stdout, re.MULTILINE))
        nothing = (report.stderr.strip().splitlines() or ["?"])[-1]
        result = [said.get(name, nothing).replace(str(scratch), "...") for name in ("_C", "_C_cuda", "self-test")]
        words = case.expected if isinstance(case.expected, tuple) else ("refused", "refused")
        good = result[2].startswith("passed") and all(w in r for w, r in zip(words, result, strict=False))
    return [situation, case.machine, *result, f"{time.perf_counter() - started:.0f}"], good


if __name__ == "__main__":
    chosen = [c for c in CASES if not sys.argv[1:] or any(word in f"{c.row}, {c.machine}" for word in sys.argv[1:])]
    failed = 0
    print("| situation | machine | _C | _C_cuda | self-test | seconds | |\n|---|---|---|---|---|---|---|")
    for case in chosen:
        with tempfile.TemporaryDirectory(prefix="mos_ext-install-") as scratch:
            row, good = check(case, Path(scratch))
        failed += not good
        print("| " + " | ".join([*row, "as expected" if good else "NOT as expected"]) + " |", flush=True)
    sys.exit(f"check-install: {failed} of {len(chosen)} not as expected" if failed else 0)
