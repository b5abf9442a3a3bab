"""What the CUDA kernels of an adapted layer should take. A model is called a model: nothing was measured on a GPU.

    python -m benchmarks.kernel_model --rows 8192 --in 4096 --out 4096 --rank 16 [--dropout] [--bias] [--accumulate]
                                      [--markdown]        # every launch of a layer: blocks, bytes, instructions, bound
    python -m benchmarks.kernel_model --table             # the table of csrc/README.md

Geometry is that of csrc/cuda/heuristics.h, called, not copied. Instructions of the inner loops, and blocks that fit
on a multiprocessor, are those of csrc/cuda/RESOURCES.md, counted in the machine code. All else is assumed, and stands
in `Machine` and `KERNELS`. bfloat16 activations, float32 pools, whole vectors, at most 64 ranks.

A kernel takes as long as the slower of two, and its launch: its bytes (of memory, or through L2, from where factors
and sums are read again), or its work. A block that is alone works through its instructions and latencies one after the
other; blocks of one multiprocessor hide each other's latencies, until as many instructions are issued as can be.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .harness import ROOT

RESOURCES = ROOT / "csrc" / "cuda" / "RESOURCES.md"
ARCHITECTURE = "sm_90"
SIZE, SUM = 2, 4  # bytes of an activation; of a sum, and of an element of a pool


@dataclass(frozen=True)
class Machine:
    """Assumed, of an H200. Times in microseconds, rates per microsecond."""

    multiprocessors: int = 132
    cycles: float = 1830.0
    memory_bytes: float = 4.3e6
    l2_bytes: float = 5.5e6
    products: float = 790e6  # floating-point operations of a large bf16 product
    # Instructions a cycle of one of a multiprocessor's four schedulers: with one warp, and at most.
    issue_alone: float = 0.35
    issue_most: float = 0.8
    overhead: float = 1.05  # what nothing below accounts for
    launch: float = 1.5  # start and end of a launch that waits for the one before
    dependent_launch: float = 0.7  # the same where the prologue runs beside the kernel before
    product_launch: float = 2.0  # start and end of a base product
    c_exposed: float = 0.25  # of the time to read C that a base product with beta = 1 does not hide
    # Latencies in cycles: planes come from L2, the factor from L2 through the index table.
    planes_latency: int = 700
    factor_latency: int = 1100
    # Groups of the factor that a thread loads at a time, and the instructions of that.
    factor_groups: int = 4
    factor_instructions: int = 150


ASSUMED = Machine()


class Kernel(NamedTuple):
    """One of the low-rank kernels; cycles and `once` are assumed."""

    name: str
    title: str
    tiling: int  # which geometry (tests/cuda_emulator/geometry.cpp)
    words: tuple[str, ...]  # that name it in RESOURCES.md
    planes_at_once: int  # kBatch of load_sums
    keeps_factor: bool  # loads it before its loop
    moves: int  # how often it goes through its matrix: reads x or dy, writes y or dx
    start: int  # cycles until the loop runs, without the factor
    tile: int  # cycles of a tile that nothing hides from a lone warp, beside its instructions
    once: int  # instructions outside of the loops


KERNELS = (
    Kernel("K1", "shrink", 0, ("shrink",), 1, False, 1, 2500, 120, 250),
    Kernel("K2", "expand", 1, ("expand",), 4, True, 1, 1200, 60, 0),
    Kernel("K3", "dy pass", 2, ("dy", "pass"), 4, True, 1, 1500, 250, 500),
    Kernel("K4", "x pass", 2, ("x", "pass"), 4, True, 2, 1500, 150, 500),
)
K1, K2, K3, K4 = KERNELS
# Launches whose prologue runs beside the kernel before (programmatic dependent launch): of K1 to K4, and "sum".
DEPENDENT: frozenset[str] = frozenset({"K2", "K4", "sum"})
SUM_BLOCK, SUM_PLANES = 1024, 8  # elements of a block of sum.cu, planes that it reads at a time
GROUP = 8  # columns of a group (heuristics.h)


@dataclass(frozen=True)
class Layer:
    """A shape, and what is asked of it. `accumulate`: the base has computed y itself, and a dx."""

    rows: int
    fan_in: int
    fan_out: int
    rank: int
    dropout: bool = False
    bias: bool = False
    accumulate: bool = False


class Tiling(NamedTuple):
    """How a kernel goes through a matrix, as geometry.cpp tells it."""

    ranks: int
    threads: int
    tile_rows: int
    tile_cols: int
    row_tiles: int  # of a block
    column_tiles: int  # of a block
    row_blocks: int
    column_blocks: int
    rank_blocks: int

    @property
    def blocks(self) -> int:
        return self.row_blocks * self.column_blocks * self.rank_blocks


@dataclass(frozen=True)
class Cost:
    """A launch: its size, what bounds it, and for how long."""

    name: str
    blocks: int
    instructions: float  # of one warp
    bytes: float  # of memory
    l2_bytes: float  # those included
    memory: float
    issue: float  # of all instructions, as fast as the warps that are there can issue them
    latency: float  # of all waits of a block
    work: float  # of both, as far as the one does not hide the other
    launch: float

    @property
    def us(self) -> float:
        return ASSUMED.overhead * max(self.memory, self.work) + self.launch

    @property
    def bound(self) -> str:
        """What to make less of: memory, issue, latency or launches."""
        if self.launch > max(self.memory, self.work):
            return "launch"
        if self.memory >= self.work:
            return "memory"
        return "issue" if self.issue >= self.latency else "latency"


# ------------------------------------------------------------------------------------------------ what is known


@functools.cache
def _geometry() -> ctypes.CDLL:
    sys.path.insert(0, str(ROOT / "tests" / "cuda_emulator"))
    import emulator

    return ctypes.CDLL(str(emulator.build_geometry()))


def tiling(kernel: Kernel, rows: int, cols: int, rank: int) -> Tiling:
    out = (ctypes.c_int64 * 9)()
    _geometry().mos_tiling(kernel.tiling, *map(ctypes.c_int64, (rows, cols, rank)), SIZE, out)
    return Tiling(*out)


def few_sums(elements: int) -> bool:
    return bool(_geometry().mos_few_sums(ctypes.c_int64(elements)))


def sum_first(planes: int, readers: int, elements: int, shared: bool) -> bool:
    return bool(_geometry().mos_sum_first(*map(ctypes.c_int64, (planes, readers, elements)), shared))


# kernel, flags, ranks -> instructions of a tile, and of a row of tiles for each batch of planes
Counts = dict[tuple[str, frozenset[str], int], tuple[int, int]]
FLAGS = frozenset({"accumulate", "dropout", "bias"})


class Resources(NamedTuple):
    """What RESOURCES.md knows."""

    instructions: Counts
    resident: dict[tuple[str, int], int]  # kernel, ranks -> blocks of a multiprocessor


def _tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a markdown text: rows, column -> cell."""
    tables: list[list[dict[str, str]]] = []
    head: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = [cell.lower() for cell in cells]
            tables.append([])
        elif not set(line) <= set("|-: "):
            tables[-1].append(dict(zip(head, cells, strict=True)))
    return tables


def _number(cell: str) -> int:
    found = re.search(r"\d+", cell)
    return int(found.group()) if found else 0


def read_resources(path: Path = RESOURCES) -> Resources:
    """Reads both tables by the names of their columns.

    Registers and blocks are the table with a column for each architecture. Instructions are the one with the columns
    kernel, variant (of the words accumulate, dropout and bias), dtype, ranks, and two that speak of a tile and of a row
    of tiles. Rows of other dtypes, of variants that take anything, and of those with groups, are passed over.
    """
    instructions: Counts = {}
    resident: dict[tuple[str, int], int] = {}
    for table in _tables(path.read_text()):
        for row in table:
            words = set(re.findall(r"\w+", " ".join(row.get(name, "") for name in ("kernel", "variant", "dtype"))))
            kernel = next((k for k in KERNELS if set(k.words) <= words or k.name in words), None)
            if kernel is None or "bfloat16" not in words or words & {"any", "groups"}:
                continue
            if "variant" in row:
                key = kernel.name, FLAGS & words, _number(row["ranks"])
                instructions[key] = (
                    _number(next(cell for name, cell in row.items() if "tile" in name and "row" not in name)),
                    _number(next(cell for name, cell in row.items() if "tile" in name and "row" in name)),
                )
            elif ARCHITECTURE in row:
                ranks = next((int(w) for w in sorted(words) if w.isdigit()), 0)  # 0: one kernel for all ranks
                blocks = _number(row[ARCHITECTURE].partition(",")[2])
                resident[kernel.name, ranks] = min(blocks, resident.get((kernel.name, ranks), blocks))
    return Resources(instructions, resident)


def _counted(resources: Resources, kernel: Kernel, flags: frozenset[str], ranks: int) -> tuple[float, float]:
    """Instructions of a tile and of a row of tiles; in proportion between two numbers of ranks that were counted."""
    known = {
        r: counts for (name, has, r), counts in resources.instructions.items() if (name, has) == (kernel.name, flags)
    }
    below = max((r for r in known if r <= ranks), default=None)
    above = min((r for r in known if r >= ranks), default=None)
    if below is None or above is None:
        variant = " ".join(sorted(flags)) or "plain"
        raise ValueError(f"{RESOURCES.name} must count the instructions of {kernel.title}, {variant}, {ranks} ranks")
    share = (ranks - below) / (above - below) if above > below else 0.0
    low, high = known[below], known[above]
    return low[0] + share * (high[0] - low[0]), low[1] + share * (high[1] - low[1])


# ------------------------------------------------------------------------------------------------ what follows


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _launch(name: str) -> float:
    return ASSUMED.dependent_launch if name in DEPENDENT else ASSUMED.launch


def _pass(resources: Resources, kernel: Kernel, layer: Layer, cols: int, flags: set[str], planes: int) -> Cost:
    """K1 to K4 over a matrix (rows, cols), reading `planes` planes of sums."""
    m, t = ASSUMED, tiling(kernel, layer.rows, cols, layer.rank)
    per_tile, per_row = _counted(resources, kernel, frozenset(flags), t.ranks)
    matrix, sums, factor = (SIZE * layer.rows * cols, SUM * layer.rows * layer.rank, SUM * layer.rank * cols)
    written = {
        "K1": t.column_blocks * sums,
        "K2": sums if planes > 1 else 0,  # their sum, for the backward pass
        "K3": t.column_blocks * sums + t.row_blocks * factor,
        "K4": t.row_blocks * factor,
    }[kernel.name]
    memory = (kernel.moves + ("accumulate" in flags)) * matrix + written
    again = t.row_blocks * factor + (t.column_blocks * planes * sums if kernel is not K1 else 0)
    tiles, rows_of_tiles = t.row_tiles * t.column_tiles, t.row_tiles if kernel is not K1 else 0
    each, at_once = max(planes, 1), kernel.planes_at_once
    if kernel is K2 and few_sums(layer.rows * layer.rank):  # so many threads share the planes of a sum: load_few_sums
        each, at_once = ceil_div(each, 4 * t.threads // (layer.rows * layer.rank)), 8
    batches = ceil_div(each, at_once)
    groups = t.ranks * t.column_tiles * t.tile_cols // GROUP if kernel.keeps_factor else 0
    loads = ceil_div(ceil_div(groups, t.threads), m.factor_groups)
    instructions = tiles * per_tile + rows_of_tiles * batches * per_row + loads * m.factor_instructions + kernel.once
    # A dependent launch has done its prologue when the kernel before is done.
    start = 0 if kernel.name in DEPENDENT else kernel.start + loads * m.factor_latency
    waits = start + rows_of_tiles * (batches * m.planes_latency) + tiles * kernel.tile
    here = ceil_div(t.blocks, m.multiprocessors)
    fitting = resources.resident.get((kernel.name, t.ranks)) or resources.resident[kernel.name, 0]
    waves, warps = ceil_div(here, fitting), min(here, fitting) * t.threads / 128  # at once, of each scheduler
    return Cost(
        kernel.name,
        t.blocks,
        instructions,
        memory,
        memory + again,
        memory=max(memory / m.memory_bytes, (memory + again) / m.l2_bytes),
        issue=waves * warps * instructions / min(m.issue_most, warps * m.issue_alone) / m.cycles,
        latency=waves * waits / m.cycles,
        work=waves * max(warps * instructions / m.issue_most, instructions / m.issue_alone + waits) / m.cycles,
        launch=_launch(kernel.name),
    )


def _sum(name: str, *planes: tuple[int, int]) -> list[Cost]:
    """A launch of sum.cu for (count, elements) planes; none where there is nothing to add."""
    m, several = ASSUMED, [(count, elements) for count, elements in planes if count > 1]
    if not several:
        return []
    moved = sum((count + 1) * elements * SUM for count, elements in several)
    trips = max(ceil_div(count, SUM_PLANES) for count, _ in several)
    blocks = len(several) * max(ceil_div(elements, SUM_BLOCK) for _, elements in several)
    latency = trips * m.planes_latency / m.cycles
    return [Cost(name, blocks, 0, moved, moved, moved / m.memory_bytes, 0, latency, latency, _launch("sum"))]


def costs(layer: Layer, resources: Resources) -> list[Cost]:
    """Every launch that MoS adds to a forward and a backward pass of a layer. (K5 is the pool's: once for all.)"""
    m, rows, rank = ASSUMED, layer.rows, layer.rank
    drop, add = {"dropout"} if layer.dropout else set(), {"accumulate"} if layer.accumulate else set()
    first = tiling(K1, rows, layer.fan_in, rank)
    dy, x = tiling(K3, rows, layer.fan_out, rank), tiling(K4, rows, layer.fan_in, rank)
    planes, readers = first.column_blocks, tiling(K2, rows, layer.fan_out, rank).column_blocks
    out = [Cost("seed", 1, 0, 0, 0, 0, 0, 0, 0, m.launch)] if layer.dropout else []
    out.append(_pass(resources, K1, layer, layer.fan_in, drop, 0))
    if sum_first(planes, readers, rows * rank, few_sums(rows * rank)):
        out += _sum("sum of S", (planes, rows * rank))
        planes = 1
    bias = {"bias"} if layer.bias and not layer.accumulate else set()
    out.append(_pass(resources, K2, layer, layer.fan_out, bias | add, planes))
    out.append(_pass(resources, K3, layer, layer.fan_out, set(), 1))
    planes = dy.column_blocks
    if sum_first(planes, x.column_blocks * x.rank_blocks, rows * rank, False):
        out += _sum("sum of dS", (planes, rows * rank))
        planes = 1
    out.append(_pass(resources, K4, layer, layer.fan_in, drop | add, planes))
    out += _sum("sum of dA, dB", (x.row_blocks, rank * layer.fan_in), (dy.row_blocks, rank * layer.fan_out))
    if not layer.accumulate:
        moved = SIZE * rows * (layer.fan_in + layer.fan_out)
        out.append(Cost("C of both products", 0, 0, moved, moved, m.c_exposed * moved / m.memory_bytes, 0, 0, 0, 0))
    return out


def frozen(layer: Layer) -> float:
    """The two products of the frozen layer: y, and dx."""
    m = ASSUMED
    moved = SIZE * (layer.fan_in * layer.fan_out + layer.rows * (layer.fan_in + layer.fan_out))
    operations = 2 * layer.rows * layer.fan_in * layer.fan_out
    return 2 * (max(operations / m.products, moved / m.memory_bytes) + m.product_launch)


# ------------------------------------------------------------------------------------------------ what is printed


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )


def one(layer: Layer, resources: Resources, form=aligned) -> str:
    """Every launch of a layer."""
    head = ["launch", "blocks", "instructions of a warp", "MB", "MB through L2"]
    head += ["memory us", "issue us", "latency us", "work us", "launch us", "us", "bound"]
    launches = costs(layer, resources)
    rows = [
        [c.name, str(c.blocks or ""), f"{c.instructions:.0f}", f"{c.bytes / 1e6:.1f}", f"{c.l2_bytes / 1e6:.1f}"]
        + [f"{value:.1f}" for value in (c.memory, c.issue, c.latency, c.work, c.launch, c.us)]
        + [c.bound]
        for c in launches
    ]
    added, base = sum(c.us for c in launches), frozen(layer)
    return (
        f"{form(head, rows)}\n\n"
        f"A model, nothing was measured: {added:.1f} us beside {base:.1f} of the frozen layer, a ratio of "
        f"{1 + added / base:.3f}."
    )


ROWS, SHAPES, RANKS = (1, 16, 256, 2048, 8192), ((4096, 4096), (4096, 14336), (14336, 4096)), (16, 64)


def table(resources: Resources) -> str:
    """The table of csrc/README.md: microseconds and bound of each kernel, and a layer's time over the frozen one's."""
    head = ["layer", "T", "r", *(f"{k.name} {k.title}" for k in KERNELS), "sums and C", "added", "frozen", "ratio"]
    rows = []
    for fan_in, fan_out in SHAPES:
        for count in ROWS:
            for rank in RANKS:
                layer = Layer(count, fan_in, fan_out, rank)
                launches, base = costs(layer, resources), frozen(layer)
                passes = {c.name: c for c in launches if c.name in [k.name for k in KERNELS]}
                added = sum(c.us for c in launches)
                cells = [f"{passes[k.name].us:.1f} {passes[k.name].bound}" for k in KERNELS]
                rest = added - sum(c.us for c in passes.values())
                where = [f"{fan_in} -> {fan_out}", str(count), str(rank)]
                rows.append([*where, *cells, f"{rest:.1f}", f"{added:.1f}", f"{base:.0f}", f"{1 + added / base:.2f}"])
    return markdown(head, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="T")
    parser.add_argument("--in", type=int, default=4096, dest="fan_in")
    parser.add_argument("--out", type=int, default=4096, dest="fan_out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--accumulate", action="store_true", help="a base of another kind, which computes itself")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--table", action="store_true", help="the table of csrc/README.md instead of one shape")
    parser.add_argument("--resources", type=Path, default=RESOURCES, help="another RESOURCES.md, to predict a change")
    options = vars(parser.parse_args(arguments))
    form = markdown if options.pop("markdown") else aligned
    whole, resources = options.pop("table"), read_resources(options.pop("resources"))
    if not 1 <= options["rank"] <= 64:
        parser.error(f"--rank must be 1 to 64, got {options['rank']}")
    if min(options[name] for name in ("rows", "fan_in", "fan_out")) < 1:
        parser.error("--rows, --in and --out must be at least 1")
    try:
        print(table(resources) if whole else one(Layer(**options), resources, form))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
