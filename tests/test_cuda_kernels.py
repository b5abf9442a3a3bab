"""The CUDA kernels, executed on the CPU (tests/cuda_emulator): results, memory, races; their launch geometry; their sources."""

import ctypes as C
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulator
import grid
import numpy as np
import pytest
from kernels import Kernels, encode, inverse_of

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which(emulator.COMPILER),
    reason="the emulator needs g++ on x86-64 Linux",
)

# Jobs per flavour, and seeds per case: each seed is another schedule, of which ThreadSanitizer needs only one.
JOBS = {"plain": (4, 4), "asan": (2, 1), "tsan": (6, 1)}


@pytest.fixture(scope="module")
def kernels():
    return Kernels(emulator.build("plain"))


@pytest.mark.parametrize(
    ("flavour", "job"), [(flavour, job) for flavour, (jobs, _) in JOBS.items() for job in range(jobs)]
)
def test_grid(flavour, job):
    """Bit-exact on integers, within the error-ratio rule on real numbers, the same under every schedule; no address out of bounds, no race."""
    jobs, seeds = JOBS[flavour]
    emulator.build(flavour)
    done = emulator.run_sanitized(
        flavour, [sys.executable, HERE / "cuda_emulator" / "grid.py", flavour, job, jobs, seeds]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_grid_reaches_every_instance(kernels):
    """Every arithmetic and block of ranks, planes in every direction, and the launch of its own for dx."""
    seen = set()
    for case in grid.CASES:
        size = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}[case.dtype]
        shrink = kernels.geometry("shrink", case.rows, case.cols, case.r, size)
        expand = kernels.geometry("expand", case.rows, case.cols, case.r, size)
        backward = kernels.geometry("backward", case.rows, case.cols, case.r, size)
        seen |= {(case.dtype, case.tf32, shrink[0])}
        seen |= {f"shrink planes {shrink[2] > 1}", f"shrink rank blocks {shrink[4] > 1}"}
        seen |= {f"backward columns {backward[1] > 1}", f"backward rows {backward[2] > 1}"}
        seen |= {f"backward row tiles {backward[3] > 1}", f"expand steps {case.r > expand[0]}"}
    assert seen >= {(dtype, False, ranks) for dtype in ("bf16", "f16") for ranks in (16, 64)}
    assert seen >= {("f32", False, 32), ("f32", True, 32), ("f64", False, 16)}
    names = ("shrink planes", "shrink rank blocks", "backward columns", "backward rows", "backward row tiles")
    assert seen >= {f"{name} {value}" for name in (*names, "expand steps") for value in (True, False)}


@pytest.mark.parametrize("entry", [-1, 8])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])  # with aligned shards, bf16 is whole variants
def test_an_index_out_of_range_stops_every_kernel(kernels, entry, aligned, dtype):
    """Tables are checked where they are made; one that slips through must not become a silent wrong result."""
    shard = 16 if aligned else 5
    pool, index = np.zeros((8, shard), np.float32), np.array([[0, entry], [1, 2], [3, 4], [5, 6]])
    x, s = encode(np.zeros((4, 2 * shard)), dtype), np.zeros((1, 4, 4), np.float32)
    factor, inverse = (pool, "f32", index), inverse_of([np.arange(8).reshape(4, 2)], 8)
    calls = {
        "shrink": lambda: kernels.shrink(x, dtype, *factor),
        "expand": lambda: kernels.expand(s, dtype, *factor, 1.0),
        "expand_backward": lambda: kernels.expand_backward(x, dtype, s, *factor, 1.0),
        "shrink_backward": lambda: kernels.shrink_backward(x, dtype, s, *factor),
        "gather_concat": lambda: kernels.gather_concat(pool, "f32", index),
        "scatter_add": lambda: kernels.scatter_add([x], dtype, [index], 8),
        "scatter_add by inverse": lambda: kernels.scatter_add([x], dtype, [index], 8, inverse=inverse),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="trap"):
            call()
        kernels.emulator.free()
        assert kernels.last_launch()[0] == name.removesuffix(" by inverse")


WRONG_INVERSES = [  # which of starts and places, where, and what stands there
    (0, 2, -1),
    (0, 2, 9),
    (0, 8, 9),
    (0, 3, 6),
    (1, (3, 0), -1),
    (1, (3, 0), 2),
    (1, (3, 1), -1),
    (1, (3, 1), 4),
    (1, (3, 1), 2),
]


@pytest.mark.parametrize(("array", "entry", "wrong"), WRONG_INVERSES)
def test_a_wrong_inverse_stops_the_kernel(kernels, array, entry, wrong):
    """One that leads beyond its places, the modules or a table, or to an entry of another shard."""
    indices = [np.array([[0, 1], [2, 3]]), np.array([[4, 5], [6, 7]])]
    grads = [np.ones((2, 10), np.float32)] * 2
    inverse = inverse_of(indices, 8)
    inverse[array][entry] = wrong
    with pytest.raises(RuntimeError, match="trap"):
        kernels.scatter_add(grads, "f32", indices, 8, inverse=inverse)
    kernels.emulator.free()


# What computes on tensors; the rest of the suite is about files, sources and builds.
SUITES = {
    "operators": ["test_ops.py", "test_functional.py", "test_grouped.py", "cuda_emulator/operator_tests.py"],
    "models": ["test_pools.py", "test_adapt.py", "test_checkpoint.py", "test_compile.py", "test_finetune.py"],
}


@pytest.mark.parametrize("suite", SUITES)
def test_the_library_on_emulated_kernels(suite):
    """The suite itself, from autograd down to the kernels: bindings (ops.cpp), operators, layers, models."""
    emulator.build_operators()
    # The CPU refuses a wrong index by its value, the kernels stop; the latter is tested above.
    other = "index_out_of_range_is_refused_before"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "operators", "-p", "no:cacheprovider", "-k", f"not {other}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *(str(HERE / file) for file in SUITES[suite])],
        env={**environment, "MOS_EXT_DISABLE_NATIVE": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ geometry


def test_division_by_multiplication_is_exact(kernels):
    rng = np.random.default_rng(0)
    for d in [*range(1, 300), 1024, 4096, 2**20 - 1, 2**31 - 1, *rng.integers(1, 2**31, 200)]:
        near = [q * int(d) + e for q in (0, 1, 7, (2**31 - 1) // int(d)) for e in (-1, 0, 1)]
        for n in [0, 2**31 - 1, *near, *map(int, rng.integers(0, 2**31, 20))]:
            if 0 <= n < 2**31:
                assert kernels.library.mos_divide(C.c_uint32(n), C.c_uint32(int(d))) == n // int(d), (n, d)


SHAPES = [
    (rows, cols, rank, size)
    for rows in (1, 16, 64, 65, 512, 2048, 8192, 1 << 20, 1 << 33)
    for cols in (1, 64, 513, 4096, 14336, 1 << 20)
    for rank in (1, 16, 17, 64, 256)
    for size in (2, 4, 8)
]
TARGET = 264  # kTargetBlocks


def width(size, ranks):
    """Columns of a tile of shrink."""
    return 32 if (size, ranks) == (2, 64) else 128 // size


def test_parts_cover_every_tile_once(kernels):
    for rows, cols, rank, size in SHAPES:
        where = (rows, cols, rank, size)
        row_tiles = -(-rows // 64)
        ranks, tiles, parts, per_part, rank_blocks = kernels.geometry("shrink", *where)
        assert tiles == -(-rows // (128 if (size, ranks) == (2, 64) else 64))
        assert (parts - 1) * per_part < -(-cols // width(size, ranks)) <= parts * per_part, where
        assert (rank_blocks - 1) * ranks < rank <= rank_blocks * ranks, where
        ranks, column_tiles, column_blocks, parts, per_part = kernels.geometry("expand", *where)
        assert (column_blocks - 1) * column_tiles < -(-cols // 64) <= column_blocks * column_tiles, where
        assert (parts - 1) * per_part < row_tiles <= parts * per_part, where
        assert ranks % 16 == 0
        ranks, column_blocks, parts, per_part, rank_blocks, wide = kernels.geometry("backward", *where)
        assert (parts - 1) * per_part < row_tiles <= parts * per_part, where
        tiles = -(-cols // (128 if size == 2 else 64))
        assert (column_blocks - 1) * wide < tiles <= column_blocks * wide, where
        assert (rank_blocks - 1) * ranks < rank <= rank_blocks * ranks, where


def test_grids_are_large_enough_and_legal(kernels):
    """Enough blocks to fill a GPU where the shape has them; y and z at most 65535, which is what CUDA allows."""
    for rows, cols, rank, size in SHAPES:
        where = (rows, cols, rank, size)
        ranks, tiles, parts, _, rank_blocks = kernels.geometry("shrink", *where)
        assert parts <= (128 if rows <= 4 else 32)
        assert tiles < 2**31
        assert rank_blocks <= 65535
        fills(parts, tiles * rank_blocks, min(32, -(-cols // width(size, ranks))), where)
        _, _, column_blocks, parts, _ = kernels.geometry("expand", *where)
        assert parts <= 65535
        fills(parts, column_blocks, -(-rows // 64), where)
        _, column_blocks, parts, _, rank_blocks, _ = kernels.geometry("backward", *where)
        assert parts <= 65535
        fills(parts, column_blocks * rank_blocks, max(1, -(-rows // 64) // 2), where)


def fills(parts, others, most, where):
    """Splitting makes no second wave, and leaves at most half of the first one empty."""
    assert parts == 1 or parts * others <= TARGET, where
    assert parts * others >= min(TARGET, most * others) / 2, where


def test_every_block_fits_every_architecture(kernels):
    for kernel, size in ((k, s) for k in range(3) for s in (2, 4, 8)):
        for ranks in {2: (16, 64), 4: (32,), 8: (16,)}[size]:
            assert 0 < kernels.library.mos_shared_bytes(kernel, size, ranks) <= 99 * 1024, (kernel, size, ranks)


def test_sums_get_a_launch_of_their_own_where_rereading_costs_more(kernels):
    def sum_first(planes, readers, rows, rank, shared=False):
        return bool(kernels.library.mos_sum_first(*map(C.c_int64, (planes, readers, rows * rank)), shared))

    assert not sum_first(1, 100, 8192, 16)  # nothing to add
    assert not sum_first(32, 64, 1, 16, shared=True)  # decode: a launch costs more than any reading
    assert sum_first(32, 64, 1, 16)  # but for a thread that reads one plane after the other
    assert not sum_first(15, 64, 1, 16)
    assert not sum_first(8, 8, 2048, 16)
    assert sum_first(16, 16, 8192, 64)
    assert sum_first(28, 8, 8192, 16)


def test_launches_do_not_know_where_groups_end(kernels):
    """A captured graph is replayed with other ends: as many blocks for any, one for each group beside those of all rows."""
    case = grid.Case("bf16", "f32", 0, 8, 2, 4)
    for places, count in ((512, 512), (300, 3)):
        launches = set()
        for at in (0, count // 2, count):
            groups = grid.Groups((0,) * at + (places,) * (count - at), places)
            given = grid.grouped_inputs(case, groups, False, 0)
            factor = (encode(given.pool, "f32"), "f32", given.index)
            kernels.low_rank(encode(given.x, "bf16"), "bf16", factor, factor, 1.0, early=False, groups=groups)
            launches.add(kernels.last_launch())
        ((name, size, _, _),) = launches
        _, _, column_blocks, _, tiles = kernels.geometry("expand", places, case.cols, case.r, 2)
        assert (name, size) == ("expand", (column_blocks, -(-places // (64 * tiles)) + count, 1))


def test_a_wrong_number_of_planes_is_refused(kernels):
    case = grid.Case("bf16", "f32", 8, 64, 8, 4)
    given = grid.inputs(case, True, 0)
    x = grid.encode(given.x, "bf16")
    planes = kernels._planes
    kernels._planes = lambda dtype, count, rows, cols: planes(dtype, count + 1, rows, cols)
    try:
        with pytest.raises(RuntimeError, match="status 1"):
            kernels.shrink(x, "bf16", grid.encode(given.pool, "f32"), "f32", given.index)
    finally:
        kernels._planes = planes
        kernels.emulator.free()


def test_the_last_launch_is_known(kernels):
    case = grid.Case("bf16", "f32", 70, 64, 8, 4)
    given = grid.inputs(case, True, 0)
    kernels.shrink(grid.encode(given.x, "bf16"), "bf16", grid.encode(given.pool, "f32"), "f32", given.index)
    name, launched, threads, shared = kernels.last_launch()
    ranks, tiles, parts, _, rank_blocks = kernels.geometry("shrink", 70, 512, 4, 2)
    assert (name, launched, threads) == ("shrink", (tiles, parts, rank_blocks), 128)
    assert shared == kernels.library.mos_shared_bytes(0, 2, ranks)


# ------------------------------------------------------------------------------------------------ sources

SEAM = re.compile(
    r"\basm\b|<<<|__shared__|\batomic\w*\(|cudaLaunch|cuda_bf16|cuda_fp16|__trap|\bmalloc|cudaMalloc|Synchronize"
)


SEAMS = ("device.h", "torch_device.h", "old_systems.cpp")  # the last has no kernel, and no place in the emulator


@pytest.mark.parametrize(
    "file", sorted(p for p in CUDA.iterdir() if p.suffix != ".md" and p.name not in SEAMS), ids=lambda p: p.name
)
def test_only_the_seams_know_the_machine(file):
    """What the emulator executes is what the GPU executes, because nothing else distinguishes them; and no launch allocates, synchronises or adds atomically."""
    code = re.sub(r"//.*", "", file.read_text())
    assert not SEAM.findall(code)
    assert not re.search(r"#\s*if", code), "no conditional compilation"
