"""Builds the native libraries of mos_ext; everything declarative is in pyproject.toml.

Two shared libraries, each of which only adds kernels to operators that Python already defines:

    mos_ext/_C.so       CPU kernels      (csrc/cpu)
    mos_ext/_C_cuda.so  CUDA kernels     (csrc/cuda)

Both use torch's stable ABI and no CPython symbol, so one binary serves every torch >= 2.11 and every Python 3: the
wheel is tagged py3-none-<platform>. MOS_EXT_BUILD chooses what to build:

    auto    (default) what this machine can build; a failure is the last line of the build, is recorded in
            mos_ext/_build_info.json, which the first import warns of and `python -m mos_ext` replays, and the Python
            implementation serves instead
    python  nothing, and what an earlier build left in the sources of an editable install goes
    cpu     _C, and fail if it fails
    cuda    _C and _C_cuda, and fail if either fails, even beside a CPU-only torch (it compiles and links)

Also read: CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS, as everywhere in the torch world; MOS_EXT_WERROR=1 makes
compiler warnings errors.
"""

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # the license field of pyproject.toml; wheels without `wheel`
    sys.exit(
        f"mos_ext needs setuptools 77 or newer to be built, and {setuptools.__version__} is installed: run "
        "`pip install 'setuptools>=77'`, or leave out --no-build-isolation."
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "python", "cpu", "cuda")
MODE = os.environ.get("MOS_EXT_BUILD", "auto")
if MODE not in MODES:
    sys.exit(f"MOS_EXT_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")

# Real code for every architecture the kernels are tuned or tested for, and PTX that others translate: Jetsons (8.7 and
# 11.0), which run no other GPU's real code, and whatever comes after 12. The library has 8 MB; with lines, 21.
CUDA_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0;10.0+PTX;12.0"
EXPORTS = "csrc/common/exports.map"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest supported
NO_TORCH = (
    "mos_ext needs torch to build its native libraries: run `pip install torch` and then "
    "`pip install --no-build-isolation .` (or set MOS_EXT_BUILD=python to install without them)."
)


def cuda_home():
    """The CUDA toolkit's folder, or None. nvcc on PATH may be a wrapper script, so it is asked rather than resolved."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top.group(1)).resolve()) if top else str(Path(nvcc).resolve().parent.parent)


def gencode_flags(architectures):
    """nvcc flags for a TORCH_CUDA_ARCH_LIST.

    Spelled out here because torch, left to itself, asks the GPU, and there may be none.
    """
    flags = []
    for entry in re.split(r"[;\s]+", architectures.strip()):
        number, _, ptx = entry.partition("+")
        cc = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{cc},code=sm_{cc}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{cc},code=compute_{cc}")
    return flags


def why_cpu_only():
    """Why nobody expects _C_cuda, or None."""
    if MODE == "auto" and torch.version.cuda is None:
        return "the installed torch is a CPU build"
    return "MOS_EXT_BUILD=cpu" if MODE == "cpu" else None


def why_no_cuda():
    """Why _C_cuda cannot be built, or None."""
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit was found (nvcc is not on PATH and CUDA_HOME is not set)"
    if not Path(home, "bin", "nvcc").exists():
        return f"there is no bin/nvcc in {home}, where CUDA_HOME or PATH say that the CUDA toolkit is"
    return None


def description():
    """README for a page that is not beside the files it links to: an index's."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE).group(1)

    def absolute(link):
        before, target = link.groups()
        kind = "raw" if target.endswith((".png", ".svg")) else "blob"
        return f"{before}{repository}/{kind}/HEAD/{target}"

    parts = re.split(
        r"(^```.*?^```$)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    link = re.compile(r"""(\]\(|\b(?:src|href)=")(?!\w+:|#)([^)"\s]+)""")
    return "".join(part if part.startswith("```") else link.sub(absolute, part) for part in parts)


def forget(package, files):
    """What an earlier build left must not outlive its source."""
    for name in files:
        (package / name).unlink(missing_ok=True)


def sources(folder, *suffixes):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes)


def extension(name, *, cuda):
    warnings = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("MOS_EXT_WERROR") == "1" else [])
    # torch's headers as system headers: their warnings are not ours.
    system = [f for path in cpp_extension.include_paths() for f in ("-isystem", path)]
    # Errors name csrc/... and torch/include/..., not folders of the machine that built; gcc resolves links in
    # the names of system headers.
    site = Path(torch.__file__).parent.parent
    relative = [f"-ffile-prefix-map={path}/=" for path in dict.fromkeys((ROOT, site, site.resolve()))]
    cxx = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", STABLE_ABI, *relative, *warnings, *system]
    # What this torch lacks is missed here, not when the library is loaded.
    link = ["-Wl,--no-undefined", "-Xlinker", f"--version-script={ROOT / EXPORTS}"]
    if not cuda:
        return Extension(
            name,
            sources("common", ".cpp") + sources("cpu", ".cpp"),
            depends=[EXPORTS, *sources("cpu", ".h"), *sources("common", ".h")],
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
            language="c++",
        )
    home = cuda_home() or ""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    return Extension(
        name,
        sources("common", ".cpp") + sources("cuda", ".cpp", ".cu"),
        depends=[EXPORTS, *sources("cuda", ".h", ".cuh"), *sources("common", ".h")],
        include_dirs=[f"{home}/include"],
        library_dirs=[*cpp_extension.library_paths(), f"{home}/lib64", f"{home}/lib"],
        # The runtime is linked in: the library must load whatever CUDA minor version torch brought.
        libraries=["torch_cpu", "cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            "cxx": [*cxx, "-DUSE_CUDA"],
            # Compressed: the library of all architectures would be five times as large.
            "nvcc": [
                *("-O3", "-std=c++17", "-Xfatbin=-compress-all", "-Xcompiler=-fvisibility=hidden"),
                f"-Xcompiler={relative[0]}",  # no .cu knows torch
                *gencode_flags(architectures),
            ],
        },
        extra_link_args=link,
        language="c++",
    )


class NoTorch(build_ext):
    """Only the build itself needs torch; metadata and sdist do not."""

    def run(self):
        sys.exit(NO_TORCH)


def native_build():
    """torch's BuildExtension, one library at a time, with a record of what happened."""

    class NativeBuild(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def run(self):
            self.record = {"mode": MODE, "torch": torch.__version__, "built": [], "skipped": {}}
            if why_cpu_only():
                self.record["skipped"]["_C_cuda"] = why_cpu_only()
            if MODE == "cuda" and why_no_cuda():
                sys.exit(f"MOS_EXT_BUILD=cuda cannot build _C_cuda: {why_no_cuda()}.")
            beside_sources = self.inplace or self.editable_mode
            package = ROOT / "mos_ext" if beside_sources else Path(self.build_lib) / "mos_ext"
            if beside_sources and not os.access(package, os.W_OK):
                sys.exit(
                    f"mos_ext's libraries belong beside the sources of an editable install, and {package} cannot be "
                    "written: install without --editable, or from a copy, or with MOS_EXT_BUILD=python."
                )
            if beside_sources:  # for profilers; elsewhere these would be folders that nobody else has
                for ext in self.extensions:
                    ext.extra_compile_args.get("nvcc", []).append("-lineinfo")
            super().run()
            package.mkdir(parents=True, exist_ok=True)
            forget(package, [f"{name}.so" for name in self.record["skipped"]])
            (package / "_build_info.json").write_text(json.dumps(self.record, indent=1) + "\n")

        def build_extensions(self):
            built, every = [], list(self.extensions)
            for ext in every:
                name = ext.name.rpartition(".")[2]
                try:
                    if name == "_C_cuda" and why_no_cuda():
                        raise RuntimeError(why_no_cuda())
                    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
                        raise RuntimeError(
                            f"there is no C++ compiler: {cpp_extension.get_cxx_compiler()} was not found"
                        )
                    if name == "_C_cuda":
                        cpp_extension.CUDA_HOME = cuda_home()
                    self.extensions = [ext]
                    super().build_extensions()
                except Exception as error:
                    if MODE != "auto":
                        raise
                    reason = " ".join(str(error).split())
                    if "Error compiling" in reason:  # torch prints the compiler's words and raises these
                        mode = "cuda" if name == "_C_cuda" else "cpu"
                        reason = f"it did not compile; MOS_EXT_BUILD={mode} pip install -v shows why ({reason})"
                    self.record["skipped"][name] = reason
                    # At exit: above the hundreds of lines that setuptools has yet to print, nobody would see it.
                    atexit.register(print, f"mos_ext: {name} is not built: {reason}", file=sys.stderr, flush=True)
                else:
                    built.append(ext)
                    self.record["built"].append(name)
            self.extensions = built

    return NativeBuild


class NoLibraries(build_ext):
    """MOS_EXT_BUILD=python beside the sources, where an earlier build may have left libraries."""

    def run(self):
        if self.inplace:
            forget(ROOT / "mos_ext", ("_C.so", "_C_cuda.so", "_build_info.json"))


class PythonOnly(build_py):
    """An editable install runs no build_ext where there is nothing to compile."""

    def run(self):
        super().run()
        if self.editable_mode:
            self.reinitialize_command("build_ext", inplace=True)
            self.run_command("build_ext")


class PlatformWheel(bdist_wheel):
    """No CPython symbol inside: any Python 3 of this platform."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


options = {"long_description": description(), "long_description_content_type": "text/markdown"}
if not os.access(ROOT, os.W_OK):  # a read-only source tree, which pip builds in all the same
    scratch = tempfile.TemporaryDirectory(prefix="mos_ext-build-")
    options["options"] = {"egg_info": {"egg_base": scratch.name}, "build": {"build_base": scratch.name}}

if MODE == "python":
    setup(**options, cmdclass={"build_ext": NoLibraries, "build_py": PythonOnly})
elif torch is None:
    setup(
        **options,
        ext_modules=[Extension("mos_ext._C", [])],
        cmdclass={"build_ext": NoTorch, "bdist_wheel": PlatformWheel},
    )
else:
    extensions = [extension("mos_ext._C", cuda=False)]
    if not why_cpu_only():
        extensions.append(extension("mos_ext._C_cuda", cuda=True))
    setup(
        **options,
        ext_modules=extensions,
        cmdclass={"build_ext": native_build(), "bdist_wheel": PlatformWheel},
    )
