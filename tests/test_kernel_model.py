"""The model of the CUDA kernels' times: its geometry is that of launches, its counts are those it is given."""

import platform
import re
import shutil
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest
from kernels import Kernels, encode

from benchmarks import kernel_model as model
from benchmarks.kernel_model import K1, K2, K3, K4, Layer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which(emulator.COMPILER),
    reason="the emulator needs g++ on x86-64 Linux",
)

# A review's counts of the machine code for sm_90: bfloat16, whole vectors; TILE of K1, K2, K3, K4 at 16 ranks, and what
# dropout adds to K1 and K4.
LONG, SLIM = (295, 518, 312, 958, 306, 1050), (155, 190, 220, 488, 240, 627)
TEXT = """
Blocks that fit:

| kernel | shared KiB | sm_80 | sm_90 |
|---|---|---|---|
| shrink any bfloat16 16 | 43.8 | 116, 3 | 118, 1 |
| shrink whole bfloat16 16 | 43.8 | 108, 3 | 102, 4 |
| shrink whole float16 16 | 43.8 | 108, 3 | 102, 1 |
| shrink whole bfloat16 64 | 61.0 | 150, 2 | 147, 3 |
| expand whole bfloat16 | 85.5 | 115, 1 | 112, 2 |
| backward dy pass whole bfloat16 16 | 71.2 | 147, 2 | 152, 3 |
| backward x pass whole bfloat16 16 | 71.2 | 162, 2 | 160, 3 |
| sum float | 0.0 | 46, 5 | 46, 5 |

Instructions:

| kernel | variant | dtype | ranks | instructions of a tile | of a row tile |
|---|---|---|---|---|---|
| shrink | plain | bfloat16 | 16 | {0} | |
| shrink | dropout | bfloat16 | 16 | {6} | |
| expand | write | bfloat16 | 16 | {1} | 180 |
| expand | write | bfloat16 | 64 | 600 | 720 |
| backward dy pass | plain | bfloat16 | 16 | {2} | 240 |
| backward x pass | write | bfloat16 | 16 | {3} | 150 |
| backward x pass | write, dropout | bfloat16 | 16 | {7} | 150 |
| backward x pass | write | float16 | 16 | 1 | 1 |
"""


@pytest.fixture
def resources(tmp_path):
    """RESOURCES.md with these counts, and rows beside them."""

    def write(counts=LONG, rows=""):
        path = tmp_path / "RESOURCES.md"
        path.write_text(TEXT.format(*counts, counts[0] + counts[4], counts[3] + counts[5]) + rows)
        return path

    return write


def costs(resources, layer):
    return {c.name: c for c in model.costs(layer, model.read_resources(resources))}


def test_blocks_are_those_of_launches():
    """K1 to K4, over one part and over several in each direction."""
    kernels = Kernels(emulator.build("plain"))
    for rows, shard, rank in ((70, 16, 4), (300, 136, 20), (5, 8, 64)):
        pool, index = np.zeros((8, shard), np.float32), np.zeros((rank, 8), np.int32)
        factor, cols = (encode(pool, "f32"), "f32", index), 8 * shard
        x = encode(np.zeros((rows, cols)), "bf16")
        s = np.zeros((1, rows, rank), np.float32)
        for kernel, name, arguments in (
            (K1, "shrink", (x, "bf16", *factor)),
            (K2, "expand", (s, "bf16", *factor, 1.0)),
            (K3, "expand_backward", (x, "bf16", s, *factor, 1.0)),
            (K4, "shrink_backward", (x, "bf16", s, *factor)),
        ):
            getattr(kernels, name)(*arguments)
            _, grid, threads, _ = kernels.last_launch()
            tiling = model.tiling(kernel, rows, cols, rank)
            assert (tiling.blocks, tiling.threads) == (np.prod(grid), threads), kernel
            covered = tiling.row_blocks * tiling.row_tiles * tiling.tile_rows
            assert covered - tiling.row_tiles * tiling.tile_rows < rows <= covered
            assert tiling.column_blocks * tiling.column_tiles * tiling.tile_cols >= cols


def test_bytes_are_those_of_the_matrices_and_planes(resources):
    """512 -> 1024, T = 256: in units of what the launches' own geometry makes of it."""
    layer, kilobyte = Layer(256, 512, 1024, 16), 1024
    found = costs(resources(), layer)
    x, dy, s, a, b = 256 * kilobyte, 512 * kilobyte, 16 * kilobyte, 32 * kilobyte, 64 * kilobyte
    first, second = model.tiling(K1, 256, 512, 16), model.tiling(K2, 256, 1024, 16)
    third, fourth = model.tiling(K3, 256, 1024, 16), model.tiling(K4, 256, 512, 16)
    assert found["K1"].bytes == x + first.column_blocks * s
    assert found["K2"].bytes == dy + s
    assert found["K3"].bytes == dy + third.column_blocks * s + third.row_blocks * b
    assert found["K4"].bytes == 2 * x + fourth.row_blocks * a
    assert found["K1"].l2_bytes - found["K1"].bytes == first.row_blocks * a
    read = second.column_blocks * first.column_blocks * s
    assert found["K2"].l2_bytes - found["K2"].bytes == second.row_blocks * b + read
    added = costs(resources(rows=ACCUMULATE), Layer(256, 512, 1024, 16, accumulate=True))
    assert added["K2"].bytes == found["K2"].bytes + dy
    assert added["K4"].bytes == found["K4"].bytes + x
    assert "C of both products" not in added


ACCUMULATE = """| expand | accumulate | bfloat16 | 16 | 600 | 180 |
| backward x pass | accumulate | bfloat16 | 16 | 1000 | 150 |
"""


def test_what_bounds_the_kernels(resources):
    """What a review found of long loops: K2, and all with dropout, are bound by instructions where memory could be."""
    large = Layer(8192, 4096, 4096, 16)
    long, slim = costs(resources(), large), costs(resources(SLIM), large)
    assert {k.name: long[k.name].bound for k in model.KERNELS} == {
        "K1": "issue",
        "K2": "issue",
        "K3": "memory",
        "K4": "memory",
    }
    assert {slim[k.name].bound for k in model.KERNELS} == {"memory"}
    dropped = costs(resources(), Layer(8192, 4096, 4096, 16, dropout=True))
    assert {dropped[k.name].bound for k in (K1, K4)} == {"issue"}
    assert dropped["seed"].bound == "launch"
    small = costs(resources(SLIM), Layer(1, 4096, 4096, 16))
    assert small["K1"].bound == "latency"
    # One row of tiles: nothing to add of gradients. K2's threads share the planes of S, K4's do not those of dS.
    assert set(small) == {"K1", "K2", "K3", "sum of dS", "K4", "C of both products"}


def test_more_instructions_never_take_less_time(resources):
    large, before = Layer(8192, 4096, 4096, 16), 0.0
    for factor in (1, 2, 4, 8):
        now = costs(resources([factor * count for count in SLIM]), large)
        assert now["K2"].us >= before
        before = now["K2"].us
    assert now["K2"].issue > 4 * costs(resources(SLIM), large)["K2"].issue


def test_a_row_is_enough(resources):
    """For another variant; one that is asked for and missing is named."""
    layer = Layer(256, 4096, 1024, 16, bias=True)
    with pytest.raises(ValueError, match="RESOURCES.md must count the instructions of expand, bias, 16 ranks"):
        costs(resources(), layer)
    plain = costs(resources(), Layer(256, 4096, 1024, 16))
    found = costs(resources(rows="| expand | write, bias | bfloat16 | 16 | 1518 | 180 |\n"), layer)
    tiling = model.tiling(K2, 256, 1024, 16)
    tiles = tiling.row_tiles * tiling.column_tiles
    assert found["K2"].instructions == plain["K2"].instructions + tiles * 1000
    assert found["K1"] == plain["K1"]
    with pytest.raises(ValueError, match="shrink, plain, 64 ranks"):
        costs(resources(), Layer(256, 4096, 1024, 17))


def test_what_is_read_of_the_resources(resources):
    found = model.read_resources(resources())
    assert found.resident == {("K1", 16): 4, ("K1", 64): 3, ("K2", 0): 2, ("K3", 16): 3, ("K4", 16): 3}
    assert found.instructions["K2", frozenset(), 16] == (518, 180)
    assert found.instructions["K4", frozenset({"dropout"}), 16] == (2008, 150)
    assert model._counted(found, K2, frozenset(), 32) == (518 + (600 - 518) / 3, 180 + (720 - 180) / 3)
    assert {key for key, _ in model.read_resources().resident.items()} >= {
        ("K1", 16),
        ("K1", 64),
        ("K3", 16),
        ("K4", 64),
    }


def test_a_dependent_launch_hides_its_prologue(resources, monkeypatch):
    layer = Layer(1, 4096, 4096, 16)
    monkeypatch.setattr(model, "DEPENDENT", frozenset())
    before = costs(resources(), layer)
    monkeypatch.setattr(model, "DEPENDENT", frozenset({"K2", "sum"}))
    after = costs(resources(), layer)
    assert (before["K2"].launch, after["K2"].launch) == (model.ASSUMED.launch, model.ASSUMED.dependent_launch)
    assert after["K2"].latency < before["K2"].latency
    assert after["K1"] == before["K1"]


def test_the_model_knows_which_launches_are_dependent():
    """Those of kernels that wait for the one before, in whatever file the instruction for it stands."""
    code = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.h"))
    assert bool(model.DEPENDENT) == bool(re.search("griddepcontrol|GridDependency", code))


def test_the_command(resources, capsys):
    path = str(resources())
    model.main(["--rows", "256", "--out", "1024", "--dropout", "--markdown", "--resources", path])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names == ["launch", "---", "seed", "K1", "sum of S", "K2", "K3", "K4", "sum of dA, dB", "C of both products"]
    assert "nothing was measured" in lines[-1]
    model.main(["--rows", "256", "--resources", path])
    assert "nothing was measured" in capsys.readouterr().out
    for arguments, message in (
        (["--rank", "65"], "--rank must be 1 to 64, got 65"),
        (["--rows", "0"], "--rows, --in and --out must be at least 1"),
        (["--rank", "64", "--resources", path], "must count the instructions of shrink, plain, 64 ranks"),
    ):
        with pytest.raises(SystemExit):
            model.main(arguments)
        assert message in capsys.readouterr().err


def test_the_table_of_the_readme_is_what_the_model_says_today():
    """Once the instructions are counted; without counts there is no table."""
    readme = (ROOT / "csrc" / "README.md").read_text()
    found = re.search(r"<!-- kernel-model -->\n(.*?)\n<!-- /kernel-model -->", readme, re.DOTALL)
    resources = model.read_resources()
    assert (found and found.group(1)) == (model.table(resources) if resources.instructions else None), (
        "make kernel-model ARGS=--table prints what belongs between the marks kernel-model of csrc/README.md"
    )
