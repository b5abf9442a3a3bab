"""sdist and wheel as an index takes them: `make wheel`.

    python tests/release.py FOLDER

The wheel is built from the sdist, both libraries where there is nvcc and _C alone where there is none. auditwheel tags
it for the systems that torch's own wheels are for, or refuses; twine reads what an index would show; and no file may
name a folder of this machine.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = f"manylinux_2_28_{platform.machine()}"  # of every torch >= 2.11
# An absolute path of a source or a library, such as __FILE__ and line information bring.
SOURCE = re.compile(rb"(?<![\w./+-])(?:/[\w.+-]{2,}){2,}\.(?:cc?|cpp|cuh?|h|hpp|inl|o|a|so)\b")


def named_folders(content, folders=()):
    """Which files and folders of a machine a file's content names: sources anywhere, and what is in these folders."""
    found = {name.decode() for name in SOURCE.findall(content)}
    return sorted(found | {str(folder) for folder in folders if str(folder).encode() in content})


def build(source, folder, mode):
    """Builds, tags and checks; the paths of the sdist and the wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mos_ext-release-") as scratch:

        def run(*command):
            out = subprocess.run(
                [sys.executable, "-m", *map(str, command)],
                cwd=scratch,
                env={**os.environ, "MOS_EXT_BUILD": mode, "TMPDIR": scratch},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if out.returncode:
                sys.exit(f"{out.stdout}\nrelease: {' '.join(map(str, command[:2]))} failed")

        run("build", "--no-isolation", "--outdir", scratch, source)
        (sdist,), (linux,) = Path(scratch).glob("*.tar.gz"), Path(scratch).glob("*.whl")
        # torch's library comes with torch; nothing is copied in, so nothing is patched.
        tag = ["--plat", PLATFORM, "--only-plat", "--exclude", "libtorch_cpu.so", "--patcher", "none"]
        run("auditwheel", "repair", "--strip", *tag, "--wheel-dir", folder, linux)
        sdist = Path(shutil.copy(sdist, folder))
        wheel = folder / linux.name.replace(linux.stem.rpartition("-")[2], PLATFORM)
        run("twine", "check", "--strict", sdist, wheel)
        folders = [source, scratch, Path.home(), sys.prefix, sys.base_prefix]
        folders = [f for f in map(str, folders) if len(f) > 4 and f not in ("/usr", "/usr/local")]  # anybody's
    with zipfile.ZipFile(wheel) as archive:
        named = {name: named_folders(archive.read(name), folders) for name in archive.namelist()}
    if any(named.values()):
        sys.exit(f"release: files name folders of this machine: { {k: v for k, v in named.items() if v} }")
    return sdist, wheel


if __name__ == "__main__":
    mode = "cuda" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "cpu"
    for path in build(ROOT, Path(sys.argv[1]).resolve(), os.environ.get("MOS_EXT_BUILD", mode)):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
