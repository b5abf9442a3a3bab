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


INVARIANT = r"""
import numpy as np, mos_kernels as K
rng = np.random.default_rng(2)
counts = [1, 2, 3, 7, 64, 200]
ends, groups, places = np.cumsum(counts).astype(np.int32), len(counts), sum(counts)

def bits(x, dtype):
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else x.astype(dtype.replace("f", "float"))

for dtype, pool_dtype in (("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("f64", "f64")):
    sums = np.float64 if dtype == "f64" else np.float32
    for shard, l, r in ((533, 4, 16), (40, 5, 7), (1024, 3, 17), (3, 200, 4)):
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        d, n = shard * l, 2 * r * l
        index = np.stack([rng.permutation(n)[: r * l] for _ in counts]).reshape(groups, r, l).astype(np.int32)
        x, y, s = bits(normal(places, d), dtype), bits(normal(places, d), dtype), normal(places, r).astype(sums)
        pool, rows = bits(normal(n, shard), pool_dtype), rng.permutation(places).astype(np.int32)
        common = {"pool": pool, "pool_dtype": pool_dtype, "dtype": dtype, "scale": 0.7, "invariant": True}

        def both(x, y, s, **groups):
            projected, out = np.full(s.shape, 9, sums), y.copy()
            K.low_rank_pass(**common, **groups, input=x, projected=projected)
            K.low_rank_pass(**common, **groups, s=s, out=out, accumulate=True)
            return projected, out

        projected, out = both(x, y, s, index=index, ends=ends, rows=rows)
        one = np.ones(1, np.int32)
        for g, (begin, end) in enumerate(zip(ends - counts, ends)):
            for t in {*range(begin, end)} if end - begin < 70 else {*range(begin, end, 9), end - 1}:
                row = rows[t : t + 1]
                alone = both(x[row], y[row], s[t : t + 1], index=index[g : g + 1], ends=one)
                assert (alone[0] == projected[t]).all() and (alone[1] == out[row]).all(), (dtype, pool_dtype, shard, g, t)
"""


@pytest.mark.parametrize("isa", ["best", "avx512", "avx2", "baseline", "wide"])
def test_rows_have_the_same_bits_alone_and_among_others(plain, isa):
    """Where batch invariance is asked for: groups of 1 to 200 rows, whatever registers their rows and ranks share."""
    folder = build("wide", "-O2", "-DMOS_EXT_TEST_WIDE") if isa == "wide" else plain
    limit = {"best": {}, "wide": {"MOS_EXT_CPU_ISA": "avx2"}}.get(isa, {"MOS_EXT_CPU_ISA": isa})
    environment = {**os.environ, "PYTHONPATH": str(folder), **limit}
    subprocess.run([sys.executable, "-c", INVARIANT], env=environment, check=True)
