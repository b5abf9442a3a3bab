"""Installing: every way of building, and every way in which a build or a library can fail, each in a fresh copy of the sources."""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import check_install
import cuda_gates
import pytest
import release
from bare import bare_environment

import mos_ext
from mos_ext.ops import loader
from mos_ext.ops.schema import INTERFACE, OPERATORS

ROOT = Path(__file__).resolve().parent.parent
CURRENT = b"mos_ext interface %d." % INTERFACE  # what the loader looks for in a library
TREE = [
    "csrc",
    "mos_ext",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]


def run(*command, cwd, check=True, **env):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOS_EXT_WERROR")}
    out = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**environment, "MAX_JOBS": "2", **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    text = out.stdout + out.stderr
    assert not check or out.returncode == 0, text
    return out.returncode, text


@pytest.fixture
def tree(tmp_path):
    """A copy of what is in the sdist, with no build in it."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
            )
        else:
            shutil.copy(source, folder / name)
    return folder


def wheel(tree, **env):
    """Builds a wheel without isolation and unpacks it; the wheel's name, where it is, and the record of the build."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
        "-w",
        "out",
        ".",
        cwd=tree,
        **env,
    )
    (built,) = (tree / "out").glob("*.whl")
    site = tree / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    record = site / "mos_ext" / "_build_info.json"
    return built.name, site, json.loads(record.read_text()) if record.exists() else {}


def report(site, check=True, **env):
    """`python -m mos_ext` of an unpacked wheel."""
    return run(sys.executable, "-m", "mos_ext", cwd=site, check=check, **env)


def import_warnings(site, **env):
    """What `import mos_ext`, twice in one process, warns of."""
    _, text = run(sys.executable, "-c", "import mos_ext, mos_ext.ops.loader, mos_ext", cwd=site, **env)
    return [line for line in text.splitlines() if "Warning: " in line]


ADAPTER = """
import importlib.util, torch, mos_ext

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

base, x = Model(), torch.randn(5, 32)
weights = base.state_dict()
model = mos_ext.adapt(base, mos_ext.MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
losses = []
for _ in range(20):
    losses.append(model(x).square().mean())
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
mos_ext.save_adapter(model, "adapter")
fresh = Model()
fresh.load_state_dict(weights, strict=False)
assert torch.equal(mos_ext.load_adapter(fresh, "adapter")(x), model(x))
print("bare:", [name for name in ("peft", "transformers") if importlib.util.find_spec(name)])
"""


def test_release(tree, tmp_path):
    """What goes to an index: the sdist, without tests, and its wheel, which serves every Python 3 where torch's own do,
    names no folder of this machine (see release.py) and trains, saves and loads an adapter in a bare environment."""
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    _, text = run(sys.executable, tree / "tests" / "release.py", tree / "dist", cwd=tree, MOS_EXT_BUILD="cpu")
    sdist, wheel = sorted((tree / "dist").iterdir(), key=lambda path: path.suffix)
    assert [line.partition(" (")[0] for line in text.splitlines()] == [str(sdist), str(wheel)]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if "test" in name.split("/")[0] or name.startswith("csrc/testing")]
    assert wheel.name == f"mos_ext-{mos_ext.__version__}-py3-none-manylinux_2_28_{platform.machine()}.whl"

    python, site = bare_environment(tmp_path / "bare", "torch", "numpy", "safetensors")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", f"{wheel}[io]", cwd=tmp_path)
    record = json.loads((site / "mos_ext" / "_build_info.json").read_text())
    assert record["built"] == ["_C"]
    assert record["skipped"] == {"_C_cuda": "MOS_EXT_BUILD=cpu"}
    _, text = run(python, "-m", "mos_ext", cwd=tmp_path)
    assert f"loaded from {site / 'mos_ext' / '_C.so'}" in text
    assert "cpu native     gather_concat, scatter_add, shrink" in text
    assert "self-test      passed" in text
    assert run(python, "-c", ADAPTER, cwd=tmp_path)[1] == "bare: []\n"
    assert (site / "mos_ext" / "py.typed").exists()
    assert not list((site / "mos_ext").rglob("*.cpp"))


def test_links_on_an_index(tree):
    """Nothing on its page is beside the files that README links to; code stays as it is."""
    readme = (
        '[a](docs/a.md) [![b](b/c.png)](d) [e](https://e.org/f) [g](#g) <img src="b/c.svg">\n```python\nh[i](j)\n```\n'
    )
    (tree / "README.md").write_text(readme)
    run(sys.executable, "setup.py", "egg_info", cwd=tree, MOS_EXT_BUILD="python")
    page = (tree / "mos_ext.egg-info" / "PKG-INFO").read_text().partition("\n\n")[2]
    files, pictures = (f"https://github.com/mos-ext/mos_ext/{kind}/HEAD" for kind in ("blob", "raw"))
    assert page == (
        f"[a]({files}/docs/a.md) [![b]({pictures}/b/c.png)]({files}/d) [e](https://e.org/f) [g](#g) "
        f'<img src="{pictures}/b/c.svg">\n```python\nh[i](j)\n```\n'
    )


def test_what_names_a_folder():
    assert release.named_folders(
        b"\0/opt/cuda/include/cub.cuh\0csrc/cuda/../common/stable.h\0a//b.h /proc/self/maps"
    ) == ["/opt/cuda/include/cub.cuh"]
    assert release.named_folders(b'{"why": "nothing in /opt/cuda/bin"}', [Path("/opt/cuda"), "/home"]) == ["/opt/cuda"]


def test_python_only(tree):
    name, site, record = wheel(tree, MOS_EXT_BUILD="python")
    assert name.endswith("-py3-none-any.whl")
    assert record == {}
    assert not list(site.rglob("*.so"))
    assert import_warnings(site) == []
    _, text = report(site)
    assert "_C             not built (installed with MOS_EXT_BUILD=python?)" in text
    assert "cpu python     all operators: _C: not built" in text
    assert "self-test      passed" in text


@pytest.fixture
def no_compiler(tmp_path):
    """PATH with ninja and nothing that compiles."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("ninja", "sh", "bash", "tar", "uname", "env", "which"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CUDA_HOME": "", "CXX": "c++"}


def test_auto_without_a_compiler(tree, no_compiler):
    """A working install and a truthful report."""
    _, site, record = wheel(tree, MOS_EXT_BUILD="auto", **no_compiler)
    assert record["built"] == []
    assert set(record["skipped"]) == {"_C", "_C_cuda"}
    _, text = report(site)
    assert "_C             not built: " in text
    assert record["skipped"]["_C"] == "there is no C++ compiler: c++ was not found"
    assert "self-test      passed" in text
    (warning,) = import_warnings(site)
    assert (
        "RuntimeWarning: mos_ext runs plain PyTorch on cpu (_C: not built: there is no C++ compiler: c++ was not found). "
        "Mend that and install again, or choose it with MOS_EXT_BUILD=python" in warning
    )
    assert import_warnings(site, MOS_EXT_DISABLE_NATIVE=1) == []


def test_the_last_line_of_a_failed_build(tree, no_compiler):
    """What pip -v shows last of the build, and nothing of the sort where the build did what was expected."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "out", "."]
    _, text = run(*pip, cwd=tree, MOS_EXT_BUILD="auto", **no_compiler)
    last = text.strip().splitlines()[-1].strip()  # pip shows the build's lines on stderr, its own on stdout
    assert last == "mos_ext: _C is not built: there is no C++ compiler: c++ was not found"
    _, text = run(*pip, cwd=tree, MOS_EXT_BUILD="python", **no_compiler)
    assert "is not built" not in text


def test_cuda_that_could_not_be_built_warns_where_there_is_a_gpu(tree, no_compiler, tmp_path):
    """torch's CUDA builds are installed on machines without a GPU, too: no word there."""
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '13.0'\n")
    _, site, record = wheel(tree, MOS_EXT_BUILD="auto", PYTHONPATH=machine, **no_compiler)
    assert record["skipped"]["_C_cuda"] == "no CUDA toolkit was found (nvcc is not on PATH and CUDA_HOME is not set)"
    (warning,) = import_warnings(site, PYTHONPATH=machine)
    assert "on cpu (_C: not built" in warning
    with open(machine / "sitecustomize.py", "a") as file:
        file.write("torch.cuda.device_count = lambda: 1\n")
    assert "on cuda (_C_cuda: not built: no CUDA toolkit" in import_warnings(site, PYTHONPATH=machine)[1]


def test_cpu_without_a_compiler_fails(tree, no_compiler):
    code, text = run(sys.executable, "setup.py", "build_ext", cwd=tree, check=False, MOS_EXT_BUILD="cpu", **no_compiler)
    assert code != 0
    assert "there is no C++ compiler: c++ was not found" in text


def test_every_situation_of_readme_has_its_check():
    """`make check-install` runs what stands in the table of docs/install.md, and nothing stands there that it does not run."""
    listed = check_install.commands()
    *situations, last = listed
    assert {row for row in situations for case in check_install.CASES if case.row in row} == set(situations)
    assert all(len(listed[row]) == 2 for row in situations)
    assert listed[last] == listed[situations[0]][:1]  # the report, which is asked for after each


def test_no_cross_compiler(no_compiler):
    """`make check-aarch64` says that it checked nothing."""
    code, text = run(sys.executable, "tests/aarch64.py", cwd=ROOT, check=False, **no_compiler)
    assert code != 0
    assert text.strip() == (
        "check-aarch64: nothing was checked, there is no aarch64-linux-gnu-g++ here: apt-get install g++-aarch64-linux-gnu "
        "qemu-user-static, on Debian or Ubuntu"
    )


@pytest.mark.parametrize(
    ("home", "reason"),
    [
        ("", "no CUDA toolkit was found (nvcc is not on PATH and CUDA_HOME is not set)."),
        ("/nowhere", "there is no bin/nvcc in /nowhere, where CUDA_HOME or PATH say that the CUDA toolkit is."),
    ],
)
def test_cuda_without_nvcc_fails(tree, no_compiler, home, reason):
    env = {**no_compiler, "CUDA_HOME": home, "MOS_EXT_BUILD": "cuda"}
    code, text = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=tree, check=False, **env)
    assert code != 0
    assert text.strip() == f"MOS_EXT_BUILD=cuda cannot build _C_cuda: {reason}"


def test_a_compile_error_is_recorded(tree):
    file = tree / "csrc" / "cpu" / "gather.cpp"
    file.write_text(file.read_text() + "\nnonsense;\n")
    _, site, record = wheel(tree, MOS_EXT_BUILD="auto")
    assert (
        record["skipped"]["_C"]
        == "it did not compile; MOS_EXT_BUILD=cpu pip install -v shows why (Error compiling objects for extension)"
    )
    assert "self-test      passed" in report(site)[1]


def test_auto_removes_a_library_it_could_not_rebuild(tree, no_compiler):
    """In place: a stale library must not outlive the sources it was built from."""
    (tree / "mos_ext" / "_C.so").write_bytes(b"old")
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **no_compiler)
    assert not (tree / "mos_ext" / "_C.so").exists()


@pytest.mark.parametrize(
    "command",
    [["setup.py", "build_ext", "--inplace"], ["-c", "from setuptools import build_meta as b; b.build_editable('.')"]],
    ids=["in place", "editable"],
)
def test_python_only_removes_a_library_beside_the_sources(tree, command):
    package = tree / "mos_ext"
    for name in ("_C.so", "_C_cuda.so", "_build_info.json"):
        (package / name).write_bytes(b"old")
    run(sys.executable, *command, cwd=tree, MOS_EXT_BUILD="python")
    assert not [f.name for f in package.iterdir() if f.suffix in (".so", ".json")]


@pytest.fixture
def read_only(tree):
    """The tree without a right to write, and what withholds it from root, who needs no right."""
    folders = [tree, *(f for f in tree.rglob("*") if f.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_tree(tree, read_only, tmp_path):
    before = sorted(tree.rglob("*"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree]
    run(*read_only, *pip, cwd=tmp_path, MOS_EXT_BUILD="cpu")
    (built,) = tmp_path.glob("*.whl")
    assert "mos_ext/_C.so" in zipfile.ZipFile(built).namelist()
    assert sorted(tree.rglob("*")) == before
    code, text = run(*read_only, sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, check=False)
    assert code != 0
    assert text.strip() == (
        f"mos_ext's libraries belong beside the sources of an editable install, and {tree / 'mos_ext'} cannot be written: "
        "install without --editable, or from a copy, or with MOS_EXT_BUILD=python."
    )


def test_an_old_setuptools(tree, tmp_path):
    """One clear sentence."""
    (tmp_path / "sitecustomize.py").write_text("import setuptools\nsetuptools.__version__ = '65.5.1'\n")
    code, text = run(sys.executable, "setup.py", "bdist_wheel", cwd=tree, check=False, PYTHONPATH=tmp_path)
    assert code != 0
    assert text.strip() == (
        "mos_ext needs setuptools 77 or newer to be built, and 65.5.1 is installed: run `pip install 'setuptools>=77'`, or leave out --no-build-isolation."
    )


def test_a_mismatched_nvcc(tree, tmp_path):
    """torch for CUDA 11.8 beside whatever toolkit this machine has: _C is built, _C_cuda is not, and the reason says why."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '11.8'\n")
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, MOS_EXT_BUILD="auto", PYTHONPATH=tmp_path)
    record = json.loads((tree / "mos_ext" / "_build_info.json").read_text())
    assert record["built"] == ["_C"]
    expected = (
        "mismatches the version" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "no CUDA toolkit was found"
    )
    assert expected in record["skipped"]["_C_cuda"]


@pytest.mark.parametrize(
    "command",
    [["setup.py", "build_ext"], ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "out", "."]],
)
def test_without_torch(tree, tmp_path, command):
    """One clear sentence."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "torch.py").write_text("raise ImportError('hidden')\n")
    code, text = run(sys.executable, *command, cwd=tree, check=False, PYTHONPATH=tmp_path / "hide")
    assert code != 0
    assert (
        "mos_ext needs torch to build its native libraries: run `pip install torch` and then `pip install --no-build-isolation .`"
        in text
    )


def test_every_gpu_finds_code_that_it_can_run():
    """Those that the gates know and those that this machine's nvcc knows, from the oldest that the kernels are for."""
    entries = re.search(r'CUDA_ARCHITECTURES = "(.+)"', (ROOT / "setup.py").read_text()).group(1).split(";")
    number = {entry: int(entry.removesuffix("+PTX").replace(".", "")) for entry in entries}
    real, ptx = set(number.values()), {number[entry] for entry in entries if entry.endswith("+PTX")}
    known = set(cuda_gates.CAPABILITIES)
    if nvcc := shutil.which("nvcc"):
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        known |= {cc for cc in map(int, re.findall(r"compute_(\d+)\b", listed)) if cc >= min(real)}
    assert [cc for cc in sorted(known) if not cuda_gates.has_code(cc, real, ptx)] == []


def test_what_code_a_gpu_can_run():
    assert cuda_gates.has_code(103, {100}, ())
    assert not cuda_gates.has_code(100, {103}, ())
    assert not cuda_gates.has_code(87, {80, 86}, ())
    assert cuda_gates.has_code(87, {87}, ())
    assert cuda_gates.has_code(110, {100}, {100})
    assert not cuda_gates.has_code(110, {100, 120}, {120})


def test_unknown_mode(tree):
    code, text = run(sys.executable, "setup.py", "build_ext", cwd=tree, check=False, MOS_EXT_BUILD="fast")
    assert code != 0
    assert "MOS_EXT_BUILD must be one of auto, python, cpu, cuda, got 'fast'" in text


# ------------------------------------------------------------------------------------------------ libraries that do not serve


def copied_package(tmp_path, library):
    """This installation's package with another _C.so."""
    package = tmp_path / "mos_ext"
    shutil.copytree(Path(mos_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    if library is None:
        (package / "_C.so").unlink()
    else:
        (package / "_C.so").write_bytes(library((package / "_C.so").read_bytes()))
    return tmp_path


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (None, "not built"),
        (lambda good: CURRENT + b" but no library", "does not load: "),
        (
            lambda good: good[: len(good) // 8],
            "_C.so is damaged or was built for another version of mos_ext: build it again",
        ),
        (
            lambda good: good.replace(CURRENT, b"mos_ext interface 0."),
            "_C.so is damaged or was built for another version of mos_ext: build it again",
        ),
    ],
    ids=["missing", "garbage", "truncated", "another version"],
)
def test_fallback(tmp_path, library, reason):
    site = copied_package(tmp_path, library)
    _, text = report(site)
    assert f"_C             {reason}" in text
    assert "cpu native     none" in text
    # A library that was taken away leaves no trace; MOS_EXT_BUILD=python looks the same.
    expected = [] if library is None else [f"RuntimeWarning: mos_ext runs plain PyTorch on cpu (_C: {reason}"]
    found = import_warnings(site)
    assert len(found) == len(expected)
    assert all(text in warning for text, warning in zip(expected, found, strict=True))
    assert "self-test      passed" in text


def stand_in_driver(folder, answer):
    """A libcuda.so.1 that answers so when it is asked for its version."""
    source = f"int cuDriverGetVersion(int* version) {{ {answer} }}"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, input=source, text=True, check=True)
    return folder / "libcuda.so.1"


BUILT_WITH_13_1 = CURRENT + b" CUDA 13010. but no library"


def test_a_driver_older_than_the_runtime_that_is_linked_in(tmp_path):
    """One sentence wherever it is asked for, and plain PyTorch, instead of an error at every call."""
    site = copied_package(tmp_path, lambda good: good)
    (site / "mos_ext" / "_C_cuda.so").write_bytes(BUILT_WITH_13_1)
    machine = site / "machine"
    machine.mkdir()
    lines = ["import torch", "torch.version.cuda = '12.8'", "torch.cuda.device_count = lambda: 1"]
    (machine / "sitecustomize.py").write_text("\n".join(lines))
    stand_in_driver(machine, "*version = 12080; return 0;")
    environment = {"PYTHONPATH": machine, "LD_LIBRARY_PATH": machine}
    why = (
        "_C_cuda: built with CUDA 13.1, for which the NVIDIA driver here, of CUDA 12.8, is too old: update the driver, or "
        "build _C_cuda with CUDA 12"
    )
    (warned,) = import_warnings(site, **environment)
    assert warned.partition("Warning: ")[2] == (
        f"mos_ext runs plain PyTorch on cuda ({why}). Mend that and install again, or choose it with MOS_EXT_BUILD=python; "
        "`python -m mos_ext` shows what serves what."
    )
    _, text = report(site, **environment)
    assert f"_C_cuda        {why.removeprefix('_C_cuda: ')}" in text
    assert f"cuda python    all operators: {why}" in text
    assert "self-test      passed" in text


@pytest.mark.parametrize(
    ("answer", "content", "problem"),
    [
        (
            "*version = 12090; return 0;",
            BUILT_WITH_13_1,
            "built with CUDA 13.1, for which the NVIDIA driver here, of CUDA 12.9,",
        ),
        ("*version = 13000; return 0;", BUILT_WITH_13_1, None),
        ("*version = 14020; return 0;", BUILT_WITH_13_1, None),
        ("*version = 12090; return 0;", CURRENT, None),
        ("return 100;", BUILT_WITH_13_1, None),
        (None, BUILT_WITH_13_1, None),
    ],
    ids=["older", "of the same major version", "newer", "an unknown runtime", "a driver that cannot say", "no driver"],
)
def test_drivers_that_serve(tmp_path, monkeypatch, answer, content, problem):
    """A machine without a driver is not at fault: whoever computes there uses the CPU."""
    driver = tmp_path / "none" if answer is None else stand_in_driver(tmp_path, answer)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(driver if name == "libcuda.so.1" else name))
    found = loader._driver_problem("_C_cuda", content)
    assert found == problem if problem is None else found.startswith(problem)


def test_a_wrong_result_fails_the_self_test(tmp_path):
    """The exit code is worth something: a reference that computes something else is noticed."""
    site = copied_package(tmp_path, lambda good: good)
    file = site / "mos_ext" / "reference.py"
    file.write_text(
        file.read_text().replace(
            "return (dropout(x, p, seed) @ factor.T)", "return 1.01 * (dropout(x, p, seed) @ factor.T)"
        )
    )
    code, text = report(site, check=False)
    assert code == 1
    assert "self-test      FAILED" in text


def test_the_suite_without_native_kernels():
    """What users without a compiler get passes the same tests of the operator, the pools and the models."""
    files = ["tests/test_functional.py", "tests/test_pools.py", "tests/test_adapt.py"]
    _, text = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        *files,
        cwd=ROOT,
        MOS_EXT_DISABLE_NATIVE="1",
    )
    assert " passed" in text


def test_report_of_this_installation():
    code, text = run(sys.executable, "-m", "mos_ext", cwd=ROOT)
    assert code == 0
    assert f"mos_ext        {mos_ext.__version__}" in text
    assert "self-test      passed: " in text


@pytest.mark.parametrize("disabled", ["", "1"])
def test_report_as_json(disabled):
    """Every line of the text is in it, for programs: who serves each operator, or why plain PyTorch does."""
    command = [sys.executable, "-m", "mos_ext", "--json"]
    environment = os.environ | {"MOS_EXT_DISABLE_NATIVE": disabled}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["environment"]["mos_ext"] == mos_ext.__version__
    assert found["self_test"] == {"passed": True, "cases": 9, "problem": None} | {
        "seconds": found["self_test"]["seconds"]
    }
    assert set(found["operators"]["cpu"]) == set(OPERATORS)
    served = {why is None for why in found["operators"]["cpu"].values()}
    assert served == {not disabled}
    assert found["libraries"]["_C"]["loaded"] == (not disabled)
    assert (found["libraries"]["_C"]["problem"] is None) == (not disabled)
