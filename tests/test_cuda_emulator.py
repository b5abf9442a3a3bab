"""The emulator that executes the CUDA kernels on a CPU (tests/cuda_emulator): it must do what the hardware does where a
kernel is right, and notice where it is wrong."""

import platform
import shutil
import sys

import emulator
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which(emulator.COMPILER),
    reason="the emulator needs g++ on x86-64 Linux",
)


@pytest.mark.parametrize("flavour", emulator.FLAVOURS)
def test_wrappers_do_what_plain_code_does(flavour):
    program = emulator.build_program("wrappers.cu", flavour)
    seeds = {"plain": 200, "asan": 10, "tsan": 5}[flavour]  # times four schedules
    result = emulator.run_sanitized(flavour, [program, seeds])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "wrappers: ok\n"


CORRECT = ["correct_reduction", "correct_pipeline", "correct_matrices", "correct_chain"]

# What the message says about each bug; in the plain flavour every one of 20 seeds finds it.
PLAIN = {
    "shared_reused": "result",
    "never_written": "result -?nan",
    "shared_written_past_the_end": "shared memory written after the 8 bytes",
    "shared_written_before_the_start": "shared memory written before the 8 bytes",
    "missing_syncwarp": "result",
    "lost_update": "result",
    "no_wait": "result -?nan",
    "wait_for_one_too_few": "result -?nan",
    "no_commit": "result -?nan",
    "no_barrier_before_reading": "result -?nan",
    "no_barrier_before_overwriting": "result -?nan",
    "copy_past_the_end": r"invalid address 0x\w+ in cp.async at \S+bugs.cu:\d+",
    "shuffle_in_branch": "deadlock",
    "shuffle_without_caller": r"bugs.cu:\d+: mask 0000ffff does not name the calling lane",
    "shuffle_from_exited": "result -?nan",
    "barrier_in_branch": "divergent __syncthreads",
    "barrier_in_loop": "divergent __syncthreads",
    "deadlock": "deadlock",
    "deadlock_of_a_block": r"block \(1,0,0\):\s+threads 0 to 0: waiting in __syncwarp",
    "half_warp_mma": r"mma.bf16 at \S+bugs.cu:\d+",
    "mma_after_exit": r"mma.bf16 at \S+bugs.cu:\d+",
    "uninitialised_sum": "result",
    "ldmatrix_row_outside": "byte 512 is outside the 512 bytes of shared memory",
    "launch_without_a_wait": "ends without wait_for_launch_before",
    "read_before_the_wait": "result -?nan",
    "copy_before_the_wait": "result -?nan",
    "wait_in_half_the_threads": r"thread \(\d+,0,0\) .*: ends without wait_for_launch_before",
    "next_launch_before_the_wait": r"let_next_launch_start at \S+bugs.cu:\d+ before its own wait_for_launch_before",
    "read_past_the_end": r"thread \(63,0,0\) .*: invalid address",
    "write_past_the_end": r"thread \(63,0,0\) .*: invalid address",
    "misaligned_vector": r"load_16 at \S+bugs.cu:\d+: address 0x\w+ is not a multiple of 16",
    "stack_overflow": "stack overflow",
    "division_by_zero": "division by zero",
    "endless": "no end after",
}
ADDRESSES = {
    "shared_written_past_the_end": "use-after-poison",
    "shared_written_before_the_start": "use-after-poison",
    "copy_past_the_end": "heap-buffer-overflow",
    "read_past_the_end": "heap-buffer-overflow",
    "write_past_the_end": "heap-buffer-overflow",
    "stack_overflow": "stack-overflow",
    "overflowing_index": "signed integer overflow",
    "division_by_zero": "division by zero",
}
RACES = [
    "shared_reused",
    "missing_syncwarp",
    "lost_update",
    "no_barrier_before_reading",
    "no_barrier_before_overwriting",
    "blocks_race",
    "read_before_the_wait",
    "copy_before_the_wait",
]


def run_bug(name, flavour, seeds):
    return emulator.run_sanitized(flavour, [emulator.build_program("bugs.cu", flavour), name, seeds])


def test_every_bug_is_expected_somewhere():
    names = set(run_bug("list", "plain", 0).stdout.split())
    assert names == {*CORRECT, *PLAIN, *ADDRESSES, *RACES}


@pytest.mark.parametrize("flavour", emulator.FLAVOURS)
def test_correct_kernels_are_silent(flavour):
    for name in CORRECT:
        seeds = {"plain": 1000, "asan": 50, "tsan": 20}[flavour]
        result = run_bug(name, flavour, seeds)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"{name} detected 0/{seeds}" in result.stdout


@pytest.mark.parametrize("name", PLAIN)
def test_bugs_are_detected(name):
    output = run_bug(name, "plain", 20).stdout
    assert output.startswith(f"{name} detected "), output
    detected = int(output.split()[2].split("/")[0])
    # What depends on who comes first may need more than one schedule.
    assert detected >= (10 if name in RACES else 20), output
    assert_matches(PLAIN[name], output)


def assert_matches(pattern, text):
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(text)


@pytest.mark.parametrize("name", ADDRESSES)
def test_bugs_are_reported_by_the_address_sanitizer(name):
    result = run_bug(name, "asan", 1)
    assert result.returncode != 0
    assert_matches(ADDRESSES[name], result.stderr)
    assert "bugs.cu:" in result.stderr


@pytest.mark.parametrize("name", RACES)
def test_races_are_reported_by_the_thread_sanitizer(name):
    result = run_bug(name, "tsan", 4)
    assert result.returncode == 66
    assert_matches(r"SUMMARY: ThreadSanitizer: data race \S*bugs.cu:\d+", result.stderr)


def test_a_deadlock_says_where_every_thread_waits():
    message = run_bug("deadlock", "plain", 1).stdout
    lines = (emulator.HERE / "bugs.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if "__syncwarp(3u)" in line)
    assert f"threads 0 to 0: waiting in __syncwarp at tests/cuda_emulator/bugs.cu:{first}, mask 00000003" in message
    assert f"threads 1 to 31: waiting in __syncthreads at tests/cuda_emulator/bugs.cu:{first + 1}\n" in message
    assert f"threads 32 to 63: waiting in __syncthreads at tests/cuda_emulator/bugs.cu:{first + 1}\n" in message


# ---------------------------------------------------------------------------------------------- from Python

KERNELS = """
#include "../../csrc/cuda/device.h"
using namespace mos::cuda;
__global__ void add_kernel(const float* x, float* y, int n, float a) {
  MOS_DYNAMIC_SHARED(shared);
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i < n) y[i] = x[i] + a;
  (void)shared;
}
extern "C" int add(const float* x, float* y, int64_t n, double a, int64_t shared_bytes) {
  KernelState state;
  const size_t bytes = static_cast<size_t>(shared_bytes);
  return start_kernel(state, add_kernel, dim3((n + 31) / 32), dim3(32), SharedBytes{bytes, bytes}, false, nullptr, x, y,
                      static_cast<int>(n), static_cast<float>(a));
}
extern "C" int refuse() { return cudaErrorInvalidValue; }
"""

SCRIPT = """
import sys
import numpy as np
from emulator import Emulator
library = Emulator(sys.argv[1])
x, y = library.buffer(np.arange(100, dtype=np.float32)), library.buffer(shape=100, dtype=np.float32)
library.call("add", x, y, 100 + int(sys.argv[2]), 0.5, 0)
assert (y == np.arange(100) + 0.5).all()
library.free()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    def build(flavour):
        folder = tmp_path_factory.mktemp(flavour)
        source = folder / "add.cu"
        source.write_text(KERNELS.replace("../../csrc", str(emulator.ROOT / "csrc")))
        return emulator.build_library([source], folder / "add.so", flavour)

    return build


@pytest.fixture
def plain(library):
    return emulator.Emulator(library("plain"))


def test_kernels_are_called_from_python(plain):
    before = plain.stats()
    for schedule in emulator.SCHEDULES:
        plain.config(schedule=schedule, seed=3, resident_blocks=4, shuffle_blocks=True)
        x, y = plain.buffer(np.arange(100, dtype=np.float32)), plain.buffer(shape=(10, 10), dtype=np.float32)
        assert np.isnan(y).all()
        plain.call("add", x, y, 100, 0.5, 0)
        np.testing.assert_array_equal(y.ravel(), np.arange(100) + 0.5)
        plain.free()
    after = plain.stats()
    assert after["launches"] - before["launches"] == 4
    assert after["threads"] - before["threads"] == 4 * 128


@pytest.mark.parametrize("align", [4, 16, 256])
def test_an_overrun_is_reported(plain, align):
    x, y = plain.buffer(np.zeros(96, np.float32), align=align), plain.buffer(shape=96, dtype=np.float32, align=align)
    assert x.ctypes.data % align == 0
    if align < 256:  # nothing between the array and the page
        with pytest.raises(RuntimeError, match=r"block \(3,0,0\) thread \(\d,0,0\) .*: invalid address 0x"):
            plain.call("add", x, y, 97, 0.5, 0)
        plain.free()
    else:
        plain.call("add", x, y, 97, 0.5, 0)
        with pytest.raises(RuntimeError, match="written outside buffer 1 of 2"):
            plain.free()
    x, y = plain.buffer(np.zeros(96, np.float32)), plain.buffer(shape=96, dtype=np.float32)
    plain.call("add", x, y, 96, 0.5, 0)  # as if nothing had happened
    plain.free()


def test_early_launches_run_when_they_are_waited_for(plain):
    x, y, z = (plain.buffer(data) for data in np.float32([np.zeros(96), np.full(96, np.nan), np.full(96, np.nan)]))
    plain.config(early=True)
    plain.call("add", x, y, 96, 0.5, 0)
    plain.call("add", y, z, 96, 0.5, 0)
    assert np.isnan(y).all()
    with pytest.raises(RuntimeError, match="invalid launch: grid"):
        plain.call("add", x, y, 0, 0.5, 0)
    plain.synchronize()
    assert (z == 1).all()
    plain.call("add", x, y, 97, 0.5, 0)
    plain.call("add", x, z, 96, 7.5, 0)
    with pytest.raises(RuntimeError, match="invalid address"):
        plain.synchronize()
    assert (z == 1).all()  # nothing runs behind a launch that failed
    plain.synchronize()
    plain.config(early=False)
    plain.free()


def test_bad_launches_are_refused(plain):
    x, y = plain.buffer(np.zeros(32, np.float32)), plain.buffer(shape=32, dtype=np.float32)
    plain.call("add", x, y, 32, 0.5, 99 * 1024)
    with pytest.raises(RuntimeError, match="101377 bytes of shared memory, of at most 101376"):
        plain.call("add", x, y, 32, 0.5, 99 * 1024 + 1)
    plain.config(max_shared_bytes=227 * 1024)
    plain.call("add", x, y, 32, 0.5, 227 * 1024)
    plain.config(max_shared_bytes=99 * 1024)
    with pytest.raises(RuntimeError, match="invalid launch: grid"):
        plain.call("add", x, y, 0, 0.5, 0)
    with pytest.raises(RuntimeError, match="refuse: status 1: nothing was launched"):
        plain.call("refuse")
    plain.free()


def test_bad_options_are_refused(plain):
    for options in [{"sched": 1}, {"schedule": "fair"}, {"seed": "x"}, {"seed": -1}]:
        with pytest.raises(ValueError, match="unknown option"):
            plain.config(**options)


@pytest.mark.parametrize(("flavour", "report"), [("asan", "heap-buffer-overflow"), ("tsan", None)])
def test_sanitized_libraries_are_called_from_python(library, flavour, report):
    path = library(flavour)
    command = [sys.executable, "-c", SCRIPT, path]
    good = emulator.run_sanitized(flavour, [*command, 0], cwd=emulator.HERE)
    assert good.returncode == 0, good.stderr
    if report:
        bad = emulator.run_sanitized(flavour, [*command, 1], cwd=emulator.HERE)
        assert bad.returncode != 0
        assert report in bad.stderr
