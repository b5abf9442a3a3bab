"""The libraries against other versions of torch: `make check-oldest`, and every version in `make test-all`.

    python tests/torch_versions.py 2.11              # the oldest supported
    python tests/torch_versions.py 2.11 --to-newest  # and every minor version that pip finds, one on the disk at a time

For each: torch's wheel without dependencies into build/torch/<version> (kept for the first version, so that a second
run downloads nothing), both libraries compiled and linked (_C alone where there is no nvcc), each of them and the
library of the working tree loaded and run beside both torches, and the core of the suite.

On Linux the wheel is a CUDA build that needs gigabytes of NVIDIA's libraries to be imported. Nothing of them is
called on a machine without a GPU, so a library of their names takes their place, whose every function answers "no
device". torch then is what it is on such a machine with all of them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ["layers", "reference", "routing", "ops", "functional", "pools", "config", "planner"]
NVIDIA = re.compile(r"(__)?(cu|nv|nccl)")
NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
# Any toolkit compiles and links: nothing is run, so torch need not insist on the CUDA version it was built with.
SETUP = "import runpy, sys, torch; torch.version.cuda = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, text=True, **options)


def stand_ins(libraries, folder):
    """Shared libraries in place of NVIDIA's that those in `libraries` need: one file, under the names of all."""
    files = list(libraries.glob("*.so*"))
    needed, symbols = set(), defaultdict(set)  # version -> names
    for file in files:
        dynamic = run("readelf", "--dynamic", "--wide", file, stdout=subprocess.PIPE).stdout
        needed |= set(re.findall(r"\(NEEDED\).*\[lib((?:cu|nv|nccl).*)\]", dynamic))
        undefined = run("nm", "--dynamic", "--undefined-only", file, stdout=subprocess.PIPE).stdout
        for line in undefined.splitlines():
            name, _, version = line.split()[-1].partition("@")
            if NVIDIA.match(name):
                symbols[version].add(name)
    if not needed:
        return
    folder.mkdir(parents=True)
    with open(folder / "stand_in.c", "w") as source:
        for name in sorted(set().union(*symbols.values())):
            text = name.endswith(("ErrorString", "ErrorName"))
            head, answer = ("const char*", '"no device"') if text else ("int", NO_DEVICE)
            source.write(f"{head} {name}(void) {{ return {answer}; }}\n")
    versions = [f"{version} {{ {'; '.join(sorted(names))}; }};" for version, names in symbols.items() if version]
    (folder / "versions.map").write_text("\n".join(versions))
    options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,--version-script={folder / 'versions.map'}"]
    run("cc", *options, folder / "stand_in.c", "-o", folder / "stand_in.so")
    for name in needed:
        (folder / f"lib{name}").symlink_to("stand_in.so")


def fetch(version, folder):
    """torch without its dependencies in folder/site, and what it takes to import it."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    run(*pip, "--target", folder / "site", f"torch=={version}.*")
    stand_ins(folder / "site" / "torch" / "lib", folder / "stand_ins")
    (folder / "ready").touch()


def check(version):
    started = time.perf_counter()
    folder, build = ROOT / "build" / "torch" / version, ROOT / "build" / "check-cuda"
    fetch(version, folder)
    mode = "cuda" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "cpu"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOS_EXT_DISABLE_NATIVE")}

    def beside(package, other=True, **more):
        """The environment in which `package` is imported beside the other torch, or the installed one."""
        path = [package, folder / "site"] if other else [package]
        libraries = {"LD_LIBRARY_PATH": f"{folder / 'stand_ins'}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        return {**clean, "PYTHONPATH": os.pathsep.join(map(str, path)), **(libraries if other else {}), **more}

    about = "import torch; print(torch.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", about], env=beside(ROOT), cwd=build.parent, capture_output=True, text=True
    )
    if found.returncode:
        sys.exit(f"torch_versions: torch {version} cannot be imported here, nothing was checked: {found.stderr}")
    compiled = time.perf_counter()
    into = ["--build-lib", build, "--build-temp", build / "objects"]
    environment = beside(ROOT, MOS_EXT_BUILD=mode, MOS_EXT_WERROR="1")
    run(sys.executable, "-c", SETUP, "--quiet", "build", *into, cwd=ROOT, env=environment)
    linked = time.perf_counter()
    for package, other in ((build, True), (ROOT, True), (build, False)):
        run(sys.executable, ROOT / "tests" / "torch_link.py", cwd=package, env=beside(package, other))
    tests = [ROOT / "tests" / f"test_{name}.py" for name in CORE]
    options = ["-q", "-n", "auto", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    run(sys.executable, "-m", "pytest", *options, *tests, cwd=build, env=beside(build))
    print(
        f"torch_versions: torch {found.stdout.strip()}: {'_C and _C_cuda' if mode == 'cuda' else '_C (no nvcc)'} compiled "
        f"and linked in {linked - compiled:.0f} s, loaded and tested; {time.perf_counter() - started:.0f} s in all",
        flush=True,
    )


def newest():
    """The newest version that pip would install."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = run(*pip, "--report", "-", "torch", stdout=subprocess.PIPE).stdout
    return json.loads(report)["install"][0]["metadata"]["version"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="major.minor")
    parser.add_argument("--to-newest", action="store_true")
    arguments = parser.parse_args()
    check(arguments.version)
    major, minor = map(int, arguments.version.split("."))
    last = int(newest().split(".")[1]) if arguments.to_newest else minor
    for other in range(minor + 1, last + 1):
        check(f"{major}.{other}")
        shutil.rmtree(ROOT / "build" / "torch" / f"{major}.{other}")
