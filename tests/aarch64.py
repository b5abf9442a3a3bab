"""The CPU kernels on aarch64, from another machine: `make check-aarch64`.

Compiles what is in _C with Debian's cross compiler, warnings as errors, and runs kernel_check.py under qemu-user with
Debian's Python and NumPy for aarch64, which are downloaded into build/aarch64 (36 MB; nothing is installed).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "aarch64"
SYSTEM = BUILD / "system"
PACKAGES = ("python3-dev", "python3-numpy", "libstdc++6")


def run(*command, **options):
    subprocess.run([str(c) for c in command], check=True, cwd=ROOT, **options)


def tool(*names):
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        wanted = "apt-get install g++-aarch64-linux-gnu qemu-user-static, on Debian or Ubuntu"
        sys.exit(f"check-aarch64: nothing was checked, there is no {names[0]} here: {wanted}")
    return path


def fetch():
    """Debian's packages for aarch64 and what they depend on, unpacked into SYSTEM."""
    if (BUILD / "ready").exists():
        return
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "lists" / "partial").mkdir(parents=True)
    (BUILD / "cache" / "archives" / "partial").mkdir(parents=True)
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::Cache": BUILD / "cache",
        "Dir::State::Lists": BUILD / "lists",
        "Dir::State::status": "/dev/null",
    }
    apt = [tool("apt-get"), "--quiet=2", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    run(*apt, "install", "--download-only", "--no-install-recommends", "--yes", *PACKAGES, stdout=subprocess.DEVNULL)
    for package in (BUILD / "cache" / "archives").glob("*.deb"):
        run(tool("dpkg-deb"), "--extract", package, SYSTEM)
    shutil.rmtree(BUILD / "lists")
    shutil.rmtree(BUILD / "cache")
    (BUILD / "ready").touch()


if __name__ == "__main__":
    compiler, qemu = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64-static", "qemu-aarch64")
    fetch()
    flags = [*("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")]
    stable = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py
    headers = Path(torch.__file__).parent / "include"
    torch_headers = ["-isystem", headers, "-isystem", headers / "torch" / "csrc" / "api" / "include"]
    for source in (*(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "csrc" / "common").glob("*.cpp")):
        run(compiler, *flags, stable, *torch_headers, "-c", source, "-o", BUILD / f"{source.stem}.o")
    (include,) = (SYSTEM / "usr" / "include").glob("python3.*")
    module = ["-isystem", include, "-isystem", include.parent, "-isystem", pybind11.get_include()]
    objects = [BUILD / "gather.o", BUILD / "low_rank.o"]
    run(compiler, *flags, "-shared", *module, "csrc/testing/bindings.cpp", *objects, "-o", BUILD / "mos_kernels.so")
    libraries = SYSTEM / "usr" / "lib" / "aarch64-linux-gnu"
    environment = ["-E", f"LD_LIBRARY_PATH={libraries / 'blas'}:{libraries / 'lapack'}", "-E", f"PYTHONPATH={BUILD}"]
    python = SYSTEM / "usr" / "bin" / "python3"
    run(qemu, "-L", SYSTEM, *environment, python, "-W", "ignore", "tests/kernel_check.py")
    print("check-aarch64: csrc/cpu and csrc/common compiled, and their kernels are exact under qemu")
