"""The layer rule: which file may know what, and which symbols the libraries may need."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from release import named_folders

from mos_ext.ops.checks import CUDA_CAPABILITY

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mos_ext"

# A module may import modules of a smaller number only.
LEVEL = {
    "_version": 0,
    "ranks": 0,
    "reference": 0,
    "files": 0,
    "ops.schema": 1,
    "ops.loader": 2,
    "ops.checks": 3,
    "ops.branch": 0,
    "ops.watch": 0,
    "ops.gradients": 2,
    "ops.flops": 3,
    "ops.fused": 3,
    "ops.handles": 3,
    "ops": 4,
    "functional": 5,
    "config": 5,
    "routing": 6,
    "merging": 4,
    "planner": 7,
    "stored": 8,
    "pools": 8,
    "linear": 9,
    "experts": 9.5,
    "adapt": 10,
    "integrations.peft.registration": 0,
    "integrations.peft.config": 6,
    "integrations.peft.layer": 10,
    "integrations.peft.model": 12,
    "integrations.peft": 13,
    "integrations": 13,
    "explain": 11,
    "env": 10,
    "testing": 10,
    "checkpoint": 11,
    "serving.arena": 10,
    "serving.tiles": 0,
    "serving.route": 11,
    "serving.members": 11,
    "serving.hooks": 11.5,
    "serving.bank": 11.6,
    "serving": 11.7,
    "lora": 11.5,
    "__main__": 11,
    "__init__": 12,
}


def imported(file):
    """Modules of this package that a file imports, as keys of LEVEL."""
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    package = name.split(".")[:-1] if file.name != "__init__.py" else name.split(".") if name != "__init__" else []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*module, alias.name])
                yield full if full in LEVEL else ".".join(module)
        else:
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in getattr(node, "names", [])]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(n == "mos_ext" or n.startswith("mos_ext.") for n in names), f"{file}: import relatively"


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), file


def test_every_module_has_a_level():
    assert {name for name, _ in modules()} == set(LEVEL)


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_down(name, file):
    for other in imported(file):
        assert LEVEL[other] < LEVEL[name] or other == name, f"{name} imports {other}"


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
KNOWS_TORCH = {"common/stable.h", "cpu/ops.cpp", "cuda/ops.cpp", "cuda/torch_device.h"}
KNOWS_PYTHON = {"testing/bindings.cpp"}


@pytest.mark.parametrize(
    "file",
    sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")),
    ids=lambda p: p.name,
)
def test_kernel_files_know_neither_torch_nor_python(file):
    name = file.relative_to(ROOT / "csrc").as_posix()
    for include in INCLUDE.findall(file.read_text()):
        assert name in KNOWS_TORCH or not include.startswith(("torch/", "ATen/", "c10/")), include
        assert name in KNOWS_TORCH or not include.endswith("stable.h"), include
        assert name in KNOWS_PYTHON or not include.startswith(("pybind11", "Python.h", "numpy")), include
        assert not include.startswith(("ATen/", "c10/", "torch/extension.h", "torch/all.h")), "stable ABI only"
        if name.startswith(("cpu/", "common/")):
            assert "cuda" not in include, include


def libraries():
    # build/check-cuda is what `make check-cuda` linked, beside a CPU-only torch or not.
    found = [*PACKAGE.glob("*.so"), *(ROOT / "build" / "check-cuda" / "mos_ext").glob("*.so")]
    return found or [
        pytest.param(None, marks=pytest.mark.xfail(reason="no library was built", run=False, strict=False))
    ]


@pytest.mark.parametrize("library", libraries(), ids=lambda p: p.relative_to(ROOT).as_posix() if p else "none")
def test_symbols(library):
    """No CPython symbol (py3-none wheels), no unstable torch symbol (one binary for every torch >= 2.11)."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in out.splitlines()]
    assert any(
        s.startswith(("aoti_torch_", "torch_")) for s in symbols
    )  # the stable C interface, or this test sees nothing
    bad = [
        s
        for s in symbols
        if s.startswith(("Py", "_Py")) or re.search(r"(c10|2at|5torch|3c10)\d", s) or "N3c10" in s or "N2at" in s
    ]
    assert not bad


# manylinux_2_28, which torch's wheels are for: what PEP 600 and auditwheel allow there.
NEWEST = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}


@pytest.mark.parametrize("library", libraries(), ids=lambda p: p.relative_to(ROOT).as_posix() if p else "none")
def test_systems_that_run_torch_load_it(library):
    """csrc/*/old_systems.cpp keeps versions of symbols from growing with the compiler's and the linker's."""
    text = subprocess.run(["readelf", "--version-info", "--wide", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"Name: ([A-Z]+)_([\d.]+)  Flags", text.stdout)
    assert {name for name, _ in needed} == set(NEWEST)

    def number(version):
        return tuple(map(int, version.split(".")))

    assert [f"{name}_{version}" for name, version in needed if number(version) > number(NEWEST[name])] == []


def test_no_folder_of_the_building_machine():
    """Errors name csrc/... and torch/include/...: where somebody else built is nothing to a user. (Beside the sources, the
    CUDA kernels have line numbers for profilers, which name them.)"""
    for library in [*PACKAGE.glob("_C.so"), *(ROOT / "build" / "check-cuda" / "mos_ext").glob("*.so")]:
        content = library.read_bytes()
        assert re.search(rb"csrc/(common|cpu|cuda)/../common/stable.h", content)
        assert named_folders(content, [ROOT]) == []
        assert b"/torch/include" not in content


@pytest.mark.parametrize("library", libraries(), ids=lambda p: p.relative_to(ROOT).as_posix() if p else "none")
def test_nothing_but_kernels_is_exported(library):
    """Two extensions in one process must not see each other's functions, nor templates of libstdc++ that one defines."""
    out = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in out.splitlines()} <= {
        "mos_ext_cpu_instruction_set",
        "mos_ext_cpu_interface",
        "mos_ext_cuda_interface",
    }


def test_architectures_are_the_same_everywhere():
    """What setup.py compiles for is what the gates look at, and what the oldest GPU with kernels is taken to be."""
    text = re.search(r'CUDA_ARCHITECTURES = "(.+)"', (ROOT / "setup.py").read_text()).group(1)
    compiled = [tuple(map(int, number.split("."))) for number in text.replace("+PTX", "").split(";")]
    assert min(compiled) == CUDA_CAPABILITY
    gates = (ROOT / "tests" / "cuda_gates.py").read_text()
    checked = re.findall(r'"sm_(\d+)"', re.search(r"ARCHITECTURES = \((.*?)\)", gates).group(1))
    assert [f"{major}{minor}" for major, minor in compiled] == checked


def test_docstrings_begin_with_a_whole_sentence():
    """What tools show of a name is the first paragraph of its docstring; one that ends in a colon goes on elsewhere."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    torn = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            first = (ast.get_docstring(node) or "").split("\n\n")[0] if isinstance(node, kinds) else ""
            if first and not first.endswith((".", ".)")):
                torn.append(f"{file.relative_to(PACKAGE)}:{getattr(node, 'name', '')}: {first}")
    assert not torn
