"""The CPU kernels without torch: NumPy in, NumPy out, in every instruction set this machine has, and under sanitizers."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "csrc/testing/bindings.cpp", ROOT / "csrc/cpu/gather.cpp", ROOT / "csrc/cpu/low_rank.cpp"]


def build(name, *flags):
    """Compiles the test module to build/testing/<name>/ unless it is newer than every source."""
    import pybind11

    folder = ROOT / "build" / "testing" / name
    target = folder / f"mos_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    inputs = [*SOURCES, *(ROOT / "csrc").rglob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(f.stat().st_mtime for f in inputs):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.so")
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            *flags,
            *includes,
        ]
        subprocess.run([*command, *map(str, SOURCES), "-o", str(temporary)], check=True)
        os.replace(temporary, target)
    return folder


CHECK = Path(__file__).with_name("kernel_check.py")


def check(folder, **env):
    out = subprocess.run(
        [sys.executable, str(CHECK)],
        env={**os.environ, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout.split()


@pytest.fixture(scope="module")
def plain():
    return build("plain", "-O2")


@pytest.mark.parametrize("isa", ["best", "avx512", "avx2", "baseline"])
def test_exact_on_integers(plain, isa):
    """Every dtype, remainder and product, bit for bit, in two orders of tasks."""
    used, cases = check(plain, **({} if isa == "best" else {"MOS_EXT_CPU_ISA": isa}))
    assert int(cases) > 50
    # A machine without it falls through to a lesser one, which is then what is tested.
    assert isa in ("best", used) or used in ("avx2", "baseline")


def test_the_tiles_of_avx512_on_lesser_machines():
    """64-byte vectors, which the compiler splits: the source that AVX-512 runs, if not its instructions."""
    check(build("wide", "-O2", "-DMOS_EXT_TEST_WIDE"), MOS_EXT_CPU_ISA="avx2")


@pytest.mark.parametrize("limit", ["", "AVX2", "avx512_bf16", "avx512", "avx2"])
def test_instruction_set_limit(plain, limit):
    """The variable is an upper bound; a name that is no instruction set limits nothing."""

    def chosen(**env):
        script = "import mos_kernels as K; print(K.instruction_set())"
        environment = {k: v for k, v in os.environ.items() if k != "MOS_EXT_CPU_ISA"}
        command = [sys.executable, "-c", script]
        environment |= {"PYTHONPATH": str(plain), **env}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    best, order = chosen(), ["baseline", "avx2", "avx512", "avx512_bf16"]
    expected = min(best, limit, key=order.index) if limit in order else best
    assert chosen(MOS_EXT_CPU_ISA=limit) == expected
    assert chosen(MOS_EXT_CPU_ISA="baseline") == "baseline"


def test_address_and_undefined_behaviour_sanitizers():
    folder = build("asan", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    check(folder, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.parametrize(("rows", "cols"), [(2500, 520), (40000, 12)], ids=["columns are split", "chunks"])
def test_relative_order_of_sums_does_not_leak(plain, rows, cols):
    """Random floats, tasks forwards and backwards: the same bits, because every sum has one owner and one order."""
    script = r"""
import sys, numpy as np, mos_kernels as K
rows, cols = map(int, sys.argv[1:])
rng = np.random.default_rng(1)
pool = rng.standard_normal((64, cols // 4)).astype(np.float32)
index = rng.permutation(64)[:64].reshape(16, 4).astype(np.int32)
x, s = rng.standard_normal((rows, cols)).astype(np.float32), rng.standard_normal((rows, 16)).astype(np.float32)
results = []
for reversed_ in (False, True):
    p, g, o = (np.empty(shape, np.float32) for shape in ((rows, 16), (16, cols), (rows, cols)))
    K.low_rank_pass(pool=pool, pool_dtype="f32", index=index, dtype="f32", input=x, s=s, projected=p, factor_grad=g, out=o,
                    dropout=0.3, seed=7, reversed=reversed_)
    results.append((p, g, o))
assert all((a == b).all() for a, b in zip(*results))
"""
    command = [sys.executable, "-c", script, str(rows), str(cols)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(plain)}, check=True)
