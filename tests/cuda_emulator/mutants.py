"""Do the tests of the CUDA kernels find bugs? Plants one after the other in a copy of csrc/cuda and looks.

    python mutants.py [--only NAME ...] [--flavour plain|asan|tsan] [--jobs 2]

Each mutant is built for the emulator and put through CASES, a part of grid.CASES that reaches every path, through
check_grouped, check_gather, check_chains and check_masks, and the test of tables out of range: plain, with one seed
of each schedule, first; where that finds nothing, asan; then tsan. One line per mutant: who found it, and what was
said. The exit status is 1 where one survives that EQUIVALENT does not explain.

After a change of a kernel or of the grid, run this by hand; it is not part of the test suite. It takes an hour or two
on two cores. A mutant whose text no longer occurs in the sources is an error: rewrite it.
"""

import argparse
import itertools
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import emulator
import grid
import pytest
from grid import Case
from kernels import Kernels

sys.path.insert(1, str(emulator.HERE.parent))
import test_cuda_kernels

SEEDS = {"plain": 4, "asan": 1, "tsan": 1}
LIMIT = 400  # seconds of a processor for one run; a mutant may hang

# The cheapest cases that reach every path, cheap ones first.
CASES = [
    Case("bf16", "f32", 1, 1, 1, 1),
    Case("f16", "f16", 3, 5, 3, 2),
    Case("bf16", "bf16", 17, 8, 4, 5),
    Case("f64", "f64", 9, 13, 3, 20),  # shards of any length under several blocks of ranks
    Case("f32", "f32", 64, 64, 2, 16),
    Case("f32", "f32", 67, 13, 9, 12, p=0.5, pad=3, tf32=True),
    Case("bf16", "bf16", 67, 16, 9, 12, p=0.5, pad=3),
    Case("f16", "f32", 66, 16, 9, 12, pad=8),
    Case("bf16", "f32", 20, 12, 6, 6),  # rows are whole groups, shards are not, and start aligned
    Case("bf16", "bf16", 20, 12, 6, 20),  # or not
    Case("bf16", "f32", 67, 16, 9, 12, p=0.5, shift=1, gap=8),
    Case("bf16", "bf16", 67, 16, 9, 12, p=0.5, gap=8, dx_pad=1),
    Case("f32", "f32", 67, 16, 9, 12, p=0.5, shift=1, gap=8),
    Case("bf16", "bf16", 67, 16, 9, 12, p=0.5, gap=1),
    Case("f64", "f64", 20, 13, 7, 6, p=0.5, pad=1),
    Case("bf16", "f32", 33, 8, 5, 70, p=0.5),
    Case("f64", "f32", 33, 8, 5, 70, p=0.5),
    Case("f16", "f16", 65, 257, 1, 3),
    Case("f32", "f32", 70, 24, 11, 17, p=0.5),
    Case("bf16", "f32", 70, 24, 11, 17, p=0.5),
    Case("f16", "f16", 33, 8, 24, 256),
    Case("bf16", "f32", 200, 40, 16, 8),
    Case("f64", "f32", 130, 136, 5, 33),
    Case("bf16", "f32", 130, 136, 5, 33),
    Case("bf16", "bf16", 16, 96, 16, 64),  # the longest index table that fits in shared memory
    Case("bf16", "f32", 67, 16, 9, 12, p=0.5, pad=8, gap=8),  # whole variants
    Case("bf16", "f32", 67, 16, 9, 12, p=0.5, pad=3),  # but for rows that are not aligned, planes, their sum, or dx
    Case("bf16", "f32", 67, 16, 9, 12, s_shift=1),
    Case("bf16", "f32", 67, 16, 9, 12, s_shift=4),
    Case("bf16", "f32", 67, 16, 9, 12, p=0.5, gap=8, dx_pad=1),
    Case("f16", "f32", 131, 24, 13, 40, p=0.5),
    Case("bf16", "f32", 131, 24, 13, 64),
    Case("bf16", "f32", 5, 8, 130, 12, p=0.5),  # an index table that does not fit in shared memory
    Case("bf16", "f32", 67, 16, 9, 12, p=0.5, gap=2),  # shards that are not aligned
    Case("bf16", "f32", 129, 24, 3, 100),
    Case("bf16", "f32", 3, 264, 25, 3, p=0.5),  # four tiles in each part of shrink: stages are used again
    Case("bf16", "f32", 5, 16, 9, 12, planes=33),  # few sums: parts of five planes, the last of them empty
    Case("f16", "f32", 16, 16, 2, 16, planes=17),  # more planes in a part than loads in flight
    Case("f64", "f64", 1, 1300, 14, 3),  # two column tiles in a block of expand
]


@dataclass(frozen=True)
class Mutant:
    file: str  # of csrc/cuda
    name: str
    edits: tuple  # (old, new) or (old, new, how often): what is replaced, everywhere

    def __str__(self):
        return f"{self.file.split('.')[0]}: {self.name}"

    def apply(self, text):
        for old, new, *times in self.edits:
            count, expected = text.count(old), times[0] if times else 1
            if count != expected:
                raise SystemExit(f"{self}: occurs {count} times in {self.file}, not {expected}:\n{old}")
            text = text.replace(old, new)
        return text


MUTANTS = []


def plant(file, name, *edits):
    MUTANTS.append(Mutant(file, name, edits))


# fmt: off

# ---------------------------------------------------------------------------------------------- variants.h

plant("variants.h", "whole: the dropout of the call is ignored", ("(dropout ? kDropout : 0)", "(dropout ? 0 : 0)"))
plant("variants.h", "whole: always with dropout", ("(dropout ? kDropout : 0)", "kDropout"))
plant("variants.h", "whole: the accumulation of the call is ignored", ("(accumulate ? kAccumulate : 0)", "(accumulate ? 0 : 0)"))
plant("variants.h", "whole: always accumulates", ("(accumulate ? kAccumulate : 0)", "kAccumulate"))
plant("variants.h", "whole: the bias of the call is ignored", ("(bias ? kBias : 0)", "(bias ? 0 : 0)"))
plant("variants.h", "whole: dropout for accumulation", ("(accumulate ? kAccumulate : 0) |", "(accumulate ? kDropout : 0) |"), ("(dropout ? kDropout : 0) |", "(dropout ? kAccumulate : 0) |"))
plant("variants.h", "whole: bias for accumulation", ("(accumulate ? kAccumulate : 0) | (bias ? kBias : 0)", "(accumulate ? kBias : 0) | (bias ? kAccumulate : 0)"))
plant("variants.h", "never asks at run time", ("return asks ? asked :", "return"))
plant("variants.h", "asks at run time for another part", ("asked : (kVariant & kPart) != 0", "asked : (kVariant & kPart) == 0"))
plant("variants.h", "the first variant instead of the one that asks", ("kAt == sizeof(kVariants) / sizeof(kVariants[0])) {\n    return f(std::integral_constant<Variant, kAny>{});", "kAt == sizeof(kVariants) / sizeof(kVariants[0])) {\n    return f(std::integral_constant<Variant, M::kWholeVariant ? kVariants[0] : kAny>{});"))
plant("variants.h", "the next variant of the list", ("wanted == kVariants[kAt] ?", "wanted != kVariants[kAt] ?"))

# ---------------------------------------------------------------------------------------------- shrink.cu

plant("shrink.cu", "no barrier after the index table", ("      table = copy;\n      __syncthreads();\n", "      table = copy;\n"))
plant("shrink.cu", "no barrier in the pipeline", ("    __syncthreads();  // this tile is complete", "    //"))
plant("shrink.cu", "no wait", ("    cp_async_wait<kStages - 2>();\n", ""))
plant("shrink.cu", "waits for a tile too few", ("cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"))
plant("shrink.cu", "no commit in the loop", ("load(tile + kStages - 1);  // its stage is free\n    cp_async_commit();", "load(tile + kStages - 1);"))
plant("shrink.cu", "no commit in the prologue", ("if (tile < tiles) load(tile);\n    cp_async_commit();", "if (tile < tiles) load(tile);"))
plant("shrink.cu", "x: a ring of one stage less", ("shared + tile % kStages * Shared::kXBytes", "shared + tile % (kStages - 1) * Shared::kXBytes"))
plant("shrink.cu", "factor: a ring of one stage less", ("(number & (kRawStages - 1)) * Shared::raw", "0 * Shared::raw"))
plant("shrink.cu", "loads before the barrier", ("    factor.convert(tile);\n", "    factor.convert(tile);\n    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);\n"), ("    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);  // its", "    // its"))
plant("shrink.cu", "converts after the barrier", ("    factor.convert(tile);\n", ""), ("    __syncthreads();  // this tile is complete", "    __syncthreads(); factor.convert(tile);  // this tile is complete"))
plant("shrink.cu", "converts into one buffer", ("(number & 1) * Shared::kFactorBytes", "0 * Shared::kFactorBytes"))
plant("shrink.cu", "converts the tile before", ("factor.convert(tile);", "factor.convert(tile ? tile - 1 : 0);"))
plant("shrink.cu", "drops by the row of the tile", ("rule, row0, (tile0 + tile) * kCols, nullptr", "rule, 0, (tile0 + tile) * kCols, nullptr"))
plant("shrink.cu", "drops by the column of the tile", ("rule, row0, (tile0 + tile) * kCols, nullptr", "rule, row0, 0, nullptr"))
plant("shrink.cu", "drops by the column of the part", ("rule, row0, (tile0 + tile) * kCols, nullptr", "rule, row0, tile * kCols, nullptr"))
plant("shrink.cu", "loads the columns of the first part", ("const int64_t col0 = (tile0 + tile) * kCols;", "const int64_t col0 = tile * int64_t{kCols};"))
plant("shrink.cu", "dropout scale forgotten", ("row, rank0, p.scale, lane", "row, rank0, S(1), lane"))
plant("shrink.cu", "writes rows beyond s", ("plane, x_rows.rows, p.factor.rank, row,", "plane, row + 16, p.factor.rank, row,"))
plant("shrink.cu", "whole: reads ranks beyond the table", ("inside = rank < ranks && col < static_cast<uint32_t>(f.cols)", "inside = col < static_cast<uint32_t>(f.cols)"))
plant("shrink.cu", "whole: reads columns beyond the factor", ("inside = rank < ranks && col < static_cast<uint32_t>(f.cols)", "inside = rank < ranks"))
plant("shrink.cu", "whole: reads a shard where there is no factor", ("inside && shard < f.shards ? kVector : 0", "shard < f.shards ? kVector : 0"))
plant("shrink.cu", "whole: reads a shard out of range", ("inside && shard < f.shards ? kVector : 0", "inside ? kVector : 0"))
plant("shrink.cu", "whole: bad entries are not noticed", ("        bad = bad || shard >= f.shards;\n", ""))
plant("shrink.cu", "whole: the first half of every group", ("threadIdx.x % kRowHalves * kHalf; }", "threadIdx.x % kRowHalves * kHalf / kGroup * kGroup; }"))
plant("shrink.cu", "whole: halves of the rank above", ("rank = half_rank() + h * kHalfStep;", "rank = half_rank() + h * (kHalfStep - 1);"))
plant("shrink.cu", "whole: halves to the rank above", ("target.at(half_rank() + h * kHalfStep, half_col())", "target.at(half_rank() + h * (kHalfStep - 1), half_col())"))
plant("shrink.cu", "whole: one copy of all halves", ("target + h * kThreads * kVector", "target + h * 0"))
plant("shrink.cu", "whole: one source of all halves", ("source + h * kThreads * kVector", "source + h * 0"))
plant("shrink.cu", "whole: offset in the shard", ("(col - part * f.shard_size)", "col"))
plant("shrink.cu", "reads ranks beyond the table", ("rank < ranks && col0 + col < f.cols", "col0 + col < f.cols"))
plant("shrink.cu", "reads columns beyond the factor", ("rank < ranks && col0 + col < f.cols", "rank < ranks"))
plant("shrink.cu", "reads a shard where there is no factor", ("v, inside ? kVector : 0", "v, kVector"))
plant("shrink.cu", "narrow elements of a float pool", ("} else if (f.pool_bytes == 4) {", "} else if (f.pool_bytes == 5) {"))
plant("shrink.cu", "table of the first block of ranks", ("f.index + static_cast<int64_t>(rank0) * f.shards_per_vector", "f.index"))
plant("shrink.cu", "table always in shared memory", ("|| entries <= kTableEntries)", "|| entries > 0)"))
plant("shrink.cu", "table of all ranks", ("ranks(min(kRanks, factor.rank - rank0))", "ranks(kRanks)"))
plant("shrink.cu", "writes all planes to the first", ("static_cast<int64_t>(blockIdx.y) * p.plane_rows", "static_cast<int64_t>(0) * p.plane_rows"))
plant("shrink.cu", "writes to the first block of ranks", ("row, rank0, p.scale", "row, 0, p.scale"))
plant("shrink.cu", "shared memory a row short", ("shared{shrink_shared(sizeof(E), kRanks, f.pool_bytes),", "shared{shrink_shared(sizeof(E), kRanks, f.pool_bytes) - 64,"))
plant("shrink.cu", "writes all row blocks of a warp to the first", ("row0 + first_row + m * 16;", "row0 + first_row;"))
plant("shrink.cu", "multiplies the first row block of a warp only", ("M::a_rows(x, first_row + m * 16, k", "M::a_rows(x, first_row, k"))
plant("shrink.cu", "bad entries are not noticed", ("  if (factor.bad) trap();\n", ""))
plant("shrink.cu", "whole: any matrix", ("params.x.whole() && f.whole()", "f.whole()"))
plant("shrink.cu", "whole: any pool", ("params.x.whole() && f.whole()", "params.x.whole()"))
plant("shrink.cu", "whole: any table", (" && min64(kRanks, f.rank) * f.shards_per_vector <= kTableEntries;", ";"))

# ---------------------------------------------------------------------------------------------- expand.cu

plant("expand.cu", "no barrier before a step", ("          __syncthreads();  // everyone is done with the step before\n", ""))
plant("expand.cu", "no barrier after loading a step", ("load_s(row0, rank0);\n          __syncthreads();", "load_s(row0, rank0);"))
plant("expand.cu", "no warp barrier before the sums", ("        __syncwarp();\n      }\n      if (drops)", "      }\n      if (drops)"))
plant("expand.cu", "no warp barrier after the sums", ("      __syncwarp();\n      store_share", "      store_share"))
plant("expand.cu", "no warp barrier after a tile", ("      __syncwarp();  // y may be", "      // y may be"))
plant("expand.cu", "bias of the first column tile", ("bias + tile_col : nullptr", "bias : nullptr"))
plant("expand.cu", "reads beyond the bias", ("bias[i] = col0 + i < p.y.cols ? to_sum(p.bias[col0 + i]) : S(0)", "bias[i] = to_sum(p.bias[col0 + i])"))
plant("expand.cu", "bias of the first block", ("to_sum(p.bias[col0 + i])", "to_sum(p.bias[i])"))
plant("expand.cu", "every block writes s_sum", ("blockIdx.x == 0 ? p.s_sum : nullptr", "p.s_sum"))
plant("expand.cu", "s_sum forgotten", ("blockIdx.x == 0 ? p.s_sum : nullptr", "nullptr"))
plant("expand.cu", "masks of the row of the tile", ("rule, row0, col0 + tile_col, masks)", "rule, 0, col0 + tile_col, masks)"))
plant("expand.cu", "masks of the first column tile", ("rule, row0, col0 + tile_col, masks)", "rule, row0, col0, masks)"))
plant("expand.cu", "masks of the column of the block", ("rule, row0, col0 + tile_col, masks)", "rule, row0, tile_col, masks)"))
plant("expand.cu", "masks of the first tile", ("if (drops) drop_share", "if (drops && tile == tile0) drop_share"))
plant("expand.cu", "dropout scale forgotten", ("scale * keep_scale(options.dropout)", "scale"))
plant("expand.cu", "scale forgotten", ("scale * keep_scale(options.dropout)", "keep_scale(options.dropout)"))
plant("expand.cu", "s of the first step", ("load_s(row0, rank0)", "load_s(row0, 0)"))
plant("expand.cu", "factor of the first step", ("of_rows, rank0, kRanks", "of_rows, 0, kRanks"))
plant("expand.cu", "factor of the first column tile", ("first_row, tile_col, lane", "first_row, 0, lane"))
plant("expand.cu", "steps of the first column tile", ("rank0, kRanks, col0 + tile_col, kExpandCols", "rank0, kRanks, col0, kExpandCols"))
plant("expand.cu", "part of the rows forgotten", ("tile0 + p.row_tiles_of_part", "tile0 + 1"))
plant("expand.cu", "visits column tiles beyond y", ("static_cast<int>(max64(1, min64(p.column_tiles, ceil_div(p.y.cols - col0, int64_t{kExpandCols}))))", "p.column_tiles"))
plant("expand.cu", "no barrier before s", ("      __syncthreads();  // everyone is done with s of the tile before\n", ""))
plant("expand.cu", "no barrier after s", ("      load_s(row0, 0);\n      __syncthreads();  // s is complete, and so are F and the bias\n", "      load_s(row0, 0);\n"))
plant("expand.cu", "no barrier after few sums", ("s_sum, y.data);\n      __syncthreads();  // s is complete, and so are F and the bias\n", "s_sum, y.data);\n"))
plant("expand.cu", "few sums: more than threads", ("few_sums(s_rows * p.s.rank)", "few_sums(s_rows * p.s.rank / 4)"))
plant("expand.cu", "adds to the columns of the first tile", ("fetch_share<kVariant, 4>(y, own, y_rows, row0, col0 + tile_col)", "fetch_share<kVariant, 4>(y, own, y_rows, row0, col0)"))
plant("expand.cu", "all ranks in one step", ("|| p.factor.rank <= kRanks", "|| p.factor.rank > 0"))
plant("expand.cu", "whole: any matrix", ("params.y.whole() && params.factor.whole()", "params.factor.whole()"))
plant("expand.cu", "whole: any pool", ("params.y.whole() && params.factor.whole()", "params.y.whole()"))
plant("expand.cu", "whole: any planes", ("params.factor.whole() && params.s.aligned", "params.factor.whole()"))
plant("expand.cu", "sums of planes start aligned", (" && reinterpret_cast<uintptr_t>(options.s_sum) % kVector == 0;", ";"))
plant("expand.cu", "whole: any rank", (" && factor.rank <= kRanks;", ";"))

# ---------------------------------------------------------------------------------------------- backward.cu

plant("backward.cu", "no barrier before s", ("    __syncthreads();  // nobody needs s", "    // nobody needs s"))
plant("backward.cu", "no barrier after a tile", ("      __syncthreads();  // the tile and s", "      // the tile and s"))
plant("backward.cu", "no barrier before dx", ("if (write_dx) __syncthreads();  // nobody reads x", "// nobody reads x"))
plant("backward.cu", "no warp barrier after reading dx", ("          __syncwarp();\n        }\n        RowsOf", "        }\n        RowsOf"))
plant("backward.cu", "no warp barrier before writing dx", ("        __syncwarp();\n        store_share", "        store_share"))
plant("backward.cu", "no warp barrier after writing dx", ("masks : nullptr, accumulate);\n        __syncwarp();\n", "masks : nullptr, accumulate);\n"))
plant("backward.cu", "no wait", ("      cp_async_wait<kAhead - 1>();\n", ""))
plant("backward.cu", "waits for a tile too few", ("cp_async_wait<kAhead - 1>()", "cp_async_wait<kAhead>()"))
plant("backward.cu", "no commit", ("    cp_async_commit();\n", ""))
plant("backward.cu", "loads into the stage in use", ("load_next(stage == 0 ? kStages - 1 : stage - 1)", "load_next(stage)"))
plant("backward.cu", "a stage beyond the last", ("stage = stage == kStages - 1 ?", "stage = stage == kStages ?"))
plant("backward.cu", "loads the first column tile", ("col0 + tile_ahead * kCols)", "col0)"))
plant("backward.cu", "loads the first row tile", ("row_of(row_ahead), col0", "row_of(tile0), col0"))
plant("backward.cu", "loads column tiles beyond the block", ("++tile_ahead == p.column_tiles", "++tile_ahead == kTiles"))
plant("backward.cu", "visits column tiles beyond the block", ("      if (t >= p.column_tiles) break;\n      const SharedMatrix", "      const SharedMatrix"))
plant("backward.cu", "writes column tiles beyond the block", ("    if (t >= p.column_tiles) break;\n#pragma", "#pragma"))
plant("backward.cu", "blocks as wide as their registers", ("static_cast<int64_t>(p.column_tiles) * kCols", "static_cast<int64_t>(kTiles) * kCols"))
plant("backward.cu", "drops after the barrier", ("      __syncthreads();  // the tile and s", "      // the tile and s"), ("      if (drops && active) drop_share", "      __syncthreads();\n      if (drops && active) drop_share"))
plant("backward.cu", "drops by the row of the tile", ("own, rule, row0, tile_col, masks", "own, rule, 0, tile_col, masks"))
plant("backward.cu", "drops by the column of the tile", ("own, rule, row0, tile_col, masks", "own, rule, row0, t * kCols, masks"))
plant("backward.cu", "masks are not kept", ("own, rule, row0, tile_col, masks", "own, rule, row0, tile_col, nullptr"))
plant("backward.cu", "dx is not dropped", ("tile, own, drops ? masks : nullptr", "tile, own, nullptr"))
plant("backward.cu", "drops in the dy pass", ("drops = kXPass && does", "drops = does"))
plant("backward.cu", "writes rows beyond ds", ("plane, end, p.factor.rank, row0 + first_row", "plane, row0 + kTileRows, p.factor.rank, row0 + first_row"))
plant("backward.cu", "writes ranks beyond the gradient", ("plane, p.factor.rank, p.in.cols, rank0", "plane, rank0 + kRanks, p.in.cols, rank0"))
plant("backward.cu", "writes all planes of ds to the first", ("static_cast<int64_t>(blockIdx.x) * p.s.rows", "static_cast<int64_t>(0) * p.s.rows"))
plant("backward.cu", "writes all planes of the gradient to the first", ("!grouped ? static_cast<int64_t>(blockIdx.y)", "!grouped ? int64_t{0}"))
plant("backward.cu", "dropout scale forgotten", ("kXPass ? keep_scale(dropout) : scale", "kXPass ? 1.0 : scale"))
plant("backward.cu", "scale of s forgotten", ("kXPass ? keep_scale(dropout) : scale", "kXPass ? keep_scale(dropout) : 1.0"))
plant("backward.cu", "scale of ds forgotten", ("static_cast<S>(scale),\n", "S(1),\n"))
plant("backward.cu", "scale of ds twice", ("rank0 + m * 16, col, S(1), lane", "rank0 + m * 16, col, p.out_scale, lane"))
plant("backward.cu", "factor of the first block of ranks", ("of_rows, rank0, ranks", "of_rows, 0, ranks"))
plant("backward.cu", "factor of the first column tile, ds", ("n * 16, t * kCols + k, lane", "n * 16, k, lane"))
plant("backward.cu", "factor of the first column tile, dx", ("first_row, t * kCols + col, lane", "first_row, col, lane"))
plant("backward.cu", "s of the first block of ranks", ("end, first_row, rank0, s_scale", "end, first_row, 0, s_scale"))
plant("backward.cu", "s of the first warp", ("end, first_row, rank0, s_scale", "end, 0, rank0, s_scale"))
plant("backward.cu", "gradient of the first warp's columns", ("t * kCols + warp * kWarpCols;", "t * kCols;"))
plant("backward.cu", "gradient of the first rank block", ("M::a_cols(s, k, m * 16, lane)", "M::a_cols(s, k, 0, lane)"))
plant("backward.cu", "fetches dx of the first column tile", ("(tile, own, dx, row0, tile_col)", "(tile, own, dx, row0, col0)"))
plant("backward.cu", "shared memory 16 bytes short", ("kBytes = BackwardShared<E, kRanks>::kBytes;", "kBytes = BackwardShared<E, kRanks>::kBytes - 16;"))
plant("backward.cu", "factor overlaps s", ("kSAt = kFactorAt + kRanks * kFactorPitch;", "kSAt = kFactorAt + (kRanks - 1) * kFactorPitch;"), ("  static_assert(kBytes == backward_shared(kSize, kRanks));\n", ""))
plant("backward.cu", "s overlaps the masks", ("kMasksAt = kSAt + kTileRows * kSPitch,", "kMasksAt = kSAt + (kTileRows - 1) * kSPitch,"), ("  static_assert(kBytes == backward_shared(kSize, kRanks));\n", ""))
plant("backward.cu", "dx in the first launch whatever the rank", ("fused = factor.rank > 0 && factor.rank <= shrink_backward_fused_rank(x.dtype)", "fused = factor.rank > 0"))
plant("backward.cu", "the launch for dx does not drop", ("  options.dropout = dropout;\n", ""))
plant("backward.cu", "the launch for dx does not accumulate", ("  options.accumulate = accumulate;\n", ""))
plant("backward.cu", "whole: any activations", ("params.in.whole() && params.factor.whole()", "params.factor.whole()"))
plant("backward.cu", "whole: any pool", ("params.in.whole() && params.factor.whole()", "params.in.whole()"))
plant("backward.cu", "whole: any planes", (" && params.s.aligned &&", " &&"))
plant("backward.cu", "whole: any dx", ("(dx && params.dx.whole())", "dx"))
plant("backward.cu", "whole: the x pass without dx", ("(dx && params.dx.whole())", "(!dx || params.dx.whole())"))
plant("backward.cu", "never writes dx of a variant that asks", ("kXPass && ((kVariant & kWhole) || p.write_dx)", "kXPass && (kVariant & kWhole)"))

# ---------------------------------------------------------------------------------------------- fragments.h

DOWN = "m.at(row + lane % 16, col + lane / 16 * 8)"
ACROSS = "m.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8)"
plant("fragments.h", "ldmatrix: across for down", (DOWN, ACROSS))
plant("fragments.h", "ldmatrix: down for across", (ACROSS, DOWN))
plant("fragments.h", "ldmatrix: a not transposed", ("ldmatrix_x4_trans(a.word", "ldmatrix_x4(a.word"))
plant("fragments.h", "ldmatrix: b not transposed", ("ldmatrix_x4_trans(b.word", "ldmatrix_x4(b.word"))
plant("fragments.h", "mma: halves of b mixed", ("half[2] = {b.word[2 * j], b.word[2 * j + 1]};\n      if constexpr", "half[2] = {b.word[j], b.word[j + 2]};\n      if constexpr"))
plant("fragments.h", "tf32: a_rows", ("row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4", "row + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4"))
plant("fragments.h", "tf32: a_cols", ("k + lane % 4 + i / 2 * 4, col + lane / 4 + i % 2 * 8", "k + lane % 4 + i % 2 * 4, col + lane / 4 + i / 2 * 8"))
plant("fragments.h", "tf32: b_rows", ("row + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4", "row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4"))
plant("fragments.h", "tf32: b_cols", ("k + lane % 4 + i % 2 * 4, col + lane / 4 + i / 2 * 8", "k + lane % 4 + i / 2 * 4, col + lane / 4 + i % 2 * 8"))
plant("fragments.h", "float: b_rows", ("*m.at(row + block_col(lane, i / 2, i), k + q)", "*m.at(row + block_col(lane, i % 2, i), k + q)"))
plant("fragments.h", "float: a_cols", ("*m.at(k + q, col + block_row(lane, 2 * i))", "*m.at(k + q, col + block_row(lane, i))"))
plant("fragments.h", "rows of sums", ("lane / 4 + 8 * (k / 2)", "lane / 4 + 8 * (k % 2)"))
plant("fragments.h", "pairs swapped", ("pack<E>(first, second)", "pack<E>(second, first)"))
plant("fragments.h", "pairs added swapped", ("    first += to_sum(E{static_cast<uint16_t>(both)});\n", "    first += to_sum(E{static_cast<uint16_t>(both >> 16)});\n"))
plant("fragments.h", "pairs added once", ("    first += to_sum(source[0]);\n", "    first += to_sum(source[1]);\n"))
plant("fragments.h", "quads: pairs swapped", ("{pack<E>(a, b), pack<E>(c, d)}", "{pack<E>(c, d), pack<E>(a, b)}"))
plant("fragments.h", "quads: the second pair of doubles", ("store_pair(target + 2, c, d)", "store_pair(target + 2, a, b)"))
plant("fragments.h", "floats: a word twice", ("bit_cast<float>(bits.z),\n             bit_cast<float>(bits.w)", "bit_cast<float>(bits.z),\n             bit_cast<float>(bits.z)"))
plant("fragments.h", "narrow ranks for every rank", ("rank <= narrow() ? f(arithmetic, narrow)", "rank > 0 ? f(arithmetic, narrow)"))
plant("fragments.h", "sums not cleared", ("block.sum[j][k] = S(0)", "(void)block"))

# ---------------------------------------------------------------------------------------------- tiles.h

plant("tiles.h", "all matrices are aligned", ("m.row_stride, bits % kVector == 0}", "m.row_stride, bits % kVector < kVector}"))
plant("tiles.h", "all shards are whole groups", ("f.shard_size % kGroup == 0 && bits", "bits"))
plant("tiles.h", "all pools are aligned", ("f.shard_size % kGroup == 0 && bits % kVector == 0", "f.shard_size % kGroup == 0 && bits % kVector < kVector"))
plant("tiles.h", "whole: any length of rows", ("return aligned && cols % kGroup == 0 &&", "return aligned &&"))
plant("tiles.h", "whole: rows at any address", ("return aligned && cols % kGroup == 0 &&", "return cols % kGroup == 0 &&"))
plant("tiles.h", "whole: shards of any length", ("return aligned && pool_bytes == 4", "return pool_bytes == 4"))
plant("tiles.h", "whole: pools of any type", ("aligned && pool_bytes == 4 && rank", "aligned && rank"))
plant("tiles.h", "whole: any rank", ("pool_bytes == 4 && rank > 0 && rank % 4 == 0 &&", "pool_bytes == 4 && rank > 0 &&"))
plant("tiles.h", "share: rows of lanes", ("kGroups < 8 ? lane % kStep : lane / kGroups", "lane % kStep"))
plant("tiles.h", "share: columns of lanes", ("kGroups < 8 ? lane / kStep : lane % kGroups", "lane % kGroups"))
plant("tiles.h", "share: rows and columns of lanes mixed", ("kGroups < 8 ? lane % kStep : lane / kGroups", "kGroups < 8 ? lane / kGroups : lane / kGroups"))
plant("tiles.h", "share: rows of the first warp", (": row(first_row + (kGroups", ": row(0 * first_row + (kGroups"))
plant("tiles.h", "share: numbers of the first group", ("(row + j * kStep) * kGroups + col", "row * kGroups + col"))
plant("tiles.h", "load: the last columns of a row", ("m.aligned && (col + kGroup <= m.cols || !inside)", "m.aligned"))
plant("tiles.h", "load: elements beyond a row", ("inside && col + i < m.cols ? source[i]", "inside ? source[i]"))
plant("tiles.h", "load: no zeros beyond the matrix", ("m.data, inside ? kVector : 0", "m.data, kVector"))
plant("tiles.h", "load: rows beyond the matrix", ("inside = row < m.rows && col < m.cols;", "inside = col < m.cols;"))
plant("tiles.h", "load: columns beyond the matrix", ("inside = row < m.rows && col < m.cols;", "inside = row < m.rows;"))
plant("tiles.h", "whole load: rows beyond the matrix", ("inside && down < rows ? kVector : 0", "inside ? kVector : 0"))
plant("tiles.h", "whole load: a row too many", ("inside && down < rows ? kVector : 0", "inside && down <= rows ? kVector : 0"))
plant("tiles.h", "whole load: a row too few", ("inside && down < rows ? kVector : 0", "inside && down < rows - 1 ? kVector : 0"))
plant("tiles.h", "whole load: columns beyond the matrix", ("inside && down < rows ? kVector : 0", "down < rows ? kVector : 0"))
plant("tiles.h", "whole load: a column too many", ("    const bool inside = static_cast<int>(col0) + share.col < static_cast<int>(m.cols)", "    const bool inside = static_cast<int>(col0) + share.col <= static_cast<int>(m.cols)"))
plant("tiles.h", "whole load: steps of a row", ("  const int step = static_cast<int>(m.stride) * Share::kStep;\n    const uint32_t target", "  const int step = static_cast<int>(m.stride);\n    const uint32_t target"))
plant("tiles.h", "whole load: rows as long as the matrix", ("  const int step = static_cast<int>(m.stride) * Share::kStep;\n    const uint32_t target", "  const int step = static_cast<int>(m.cols) * Share::kStep;\n    const uint32_t target"))
plant("tiles.h", "whole load: rows of shared memory", ("target + down * tile.pitch", "target + j * tile.pitch"))
plant("tiles.h", "copy: the last columns of a row", ("aligned && left >= kGroup", "aligned"))
plant("tiles.h", "copy: elements beyond a row", ("i < min64(kGroup, left)", "i < kGroup"))
FETCH = "    const E* source = m.at(row0 + share.row, col);\n    const int step = static_cast<int>(m.stride) * Share::kStep;\n"
FETCH_ROWS = "    const int rows = col < m.cols ? static_cast<int>(m.rows) - (static_cast<int>(row0) + share.row) : 0;\n    const E* source"
STORE_ROWS = "    const int rows = col < m.cols ? static_cast<int>(m.rows) - (static_cast<int>(row0) + share.row) : 0;\n    E* target"
plant("tiles.h", "whole fetch: rows beyond the matrix", ("if ((first + j) * Share::kStep < rows) old[j]", "if (rows) old[j]"))
plant("tiles.h", "whole fetch: a row too many", ("if ((first + j) * Share::kStep < rows) old[j]", "if ((first + j) * Share::kStep <= rows) old[j]"))
plant("tiles.h", "whole fetch: a row too few", ("if ((first + j) * Share::kStep < rows) old[j]", "if ((first + j) * Share::kStep < rows - 1) old[j]"))
plant("tiles.h", "whole fetch: columns beyond the matrix", (FETCH_ROWS, FETCH_ROWS.replace("col < m.cols", "col >= 0")))
plant("tiles.h", "whole fetch: steps of a row", (FETCH, FETCH.replace(" * Share::kStep", "")))
plant("tiles.h", "whole fetch: the first batch again", ("static_cast<int64_t>(first + j) * step", "static_cast<int64_t>(j) * step"))
plant("tiles.h", "whole fetch: over the first batch", ("store_16(tile.at(share.row + (first + j) * Share::kStep", "store_16(tile.at(share.row + j * Share::kStep", 2))
plant("tiles.h", "fetch: rows beyond the matrix", ("      if (row0 + down >= m.rows || col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row >= 0)", "      if (col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row >= 0)"))
plant("tiles.h", "fetch: columns beyond the matrix", ("      if (row0 + down >= m.rows || col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row >= 0)", "      if (row0 + down >= m.rows) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row >= 0)"))
plant("tiles.h", "whole store: rows beyond the matrix", ("      if (j * Share::kStep >= rows) continue;\n", "      if (!rows) continue;\n"))
plant("tiles.h", "whole store: a row too many", ("if (j * Share::kStep >= rows) continue", "if (j * Share::kStep > rows) continue"))
plant("tiles.h", "whole store: a row too few", ("if (j * Share::kStep >= rows) continue", "if (j * Share::kStep + 1 >= rows) continue"))
plant("tiles.h", "whole store: columns beyond the matrix", (STORE_ROWS, STORE_ROWS.replace("col < m.cols", "col >= 0")))
plant("tiles.h", "whole store: steps of a row", ("    E* target = m.at(row0 + share.row, col);\n    const int step = static_cast<int>(m.stride) * Share::kStep;", "    E* target = m.at(row0 + share.row, col);\n    const int step = static_cast<int>(m.stride);"))
plant("tiles.h", "whole store: masks of the first group", ("unpacked(masks[share.number(j)])", "unpacked(masks[share.number(0)])"))
plant("tiles.h", "whole store: dropped elements as they were", ("adds ? load_16(to) : uint4{0, 0, 0, 0}", "load_16(to)"))
plant("tiles.h", "whole store: dropped elements become zeros", ("adds ? load_16(to) : uint4{0, 0, 0, 0}", "uint4{0, 0, 0, 0}"))
plant("tiles.h", "whole store: a word that is not dropped", ("(kept.z & mask.word[2]) | (other.z & ~mask.word[2])", "kept.z"))
plant("tiles.h", "whole store: a word of another mask", ("(kept.w & mask.word[3])", "(kept.w & mask.word[2])"))
plant("tiles.h", "whole store: added to what was dropped", ("(other.y & ~mask.word[1])", "other.y"))
plant("tiles.h", "store: rows beyond the matrix", ("      if (row0 + down >= m.rows || col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row < 0)", "      if (col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row < 0)"))
plant("tiles.h", "store: columns beyond the matrix", ("      if (row0 + down >= m.rows || col >= m.cols) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row < 0)", "      if (row0 + down >= m.rows) continue;\n      const int64_t row = m.row_of(row0 + down);\n      if (row < 0)"))
plant("tiles.h", "store: dropped elements as they were", ("source[i] = accumulate ? target[i] : E{};", "source[i] = target[i];"))
plant("tiles.h", "store: dropped elements become zeros", ("source[i] = accumulate ? target[i] : E{};", "source[i] = E{};"))
plant("tiles.h", "store: keep bit off by one", ("i < 4 ? 8 * i : 8 * i - 28) & 1", "i < 4 ? 8 * i + 1 : 8 * i - 28) & 1"))
plant("tiles.h", "store: keep bits of the other half", ("i < 4 ? 8 * i : 8 * i - 28) & 1", "i < 4 ? 8 * i : 8 * i - 32) & 1"))
plant("tiles.h", "dropout: kept above the threshold only", ("(0x10000u - threshold) * 0x10001u", "(0xFFFFu - threshold) * 0x10001u"))
plant("tiles.h", "dropout: kept one below the threshold", ("(0x10000u - threshold) * 0x10001u", "(0x10001u - threshold) * 0x10001u"))
plant("tiles.h", "dropout: one distance for both halves", ("(0x10000u - threshold) * 0x10001u", "(0x10000u - threshold) * 0x10000u"))
plant("tiles.h", "dropout: the seed as 32 bits", ("static_cast<uint64_t>(*seed)", "static_cast<uint32_t>(*seed)"))
plant("tiles.h", "dropout: halves carry into each other", ("(((bits ^ rule.distance) & 0xFFFEFFFEu) >> 1)", "((bits ^ rule.distance) >> 1)"))
plant("tiles.h", "dropout: carries out of the lowest bit", ("(((bits ^ rule.distance) & 0xFFFEFFFEu) >> 1)", "(((bits ^ rule.distance) & 0xFFFCFFFCu) >> 1)"))
plant("tiles.h", "dropout: or for and", ("(bits & rule.distance) +", "(bits | rule.distance) +"))
plant("tiles.h", "dropout: words of the first", ("bits = block.word[w]", "bits = block.word[0]"))
plant("tiles.h", "dropout: row and group swapped", ("philox(rule.seed, group, row)", "philox(rule.seed, static_cast<uint32_t>(row), group)"))
plant("tiles.h", "masks: halves packed swapped", ("(odd_bytes(mask.word[0], mask.word[1]) & 0x0F0F0F0Fu) | (odd_bytes(mask.word[2], mask.word[3]) & 0xF0F0F0F0u)", "(odd_bytes(mask.word[0], mask.word[1]) & 0xF0F0F0F0u) | (odd_bytes(mask.word[2], mask.word[3]) & 0x0F0F0F0Fu)"))
plant("tiles.h", "masks: a word packed twice", ("odd_bytes(mask.word[2], mask.word[3])", "odd_bytes(mask.word[2], mask.word[2])"))
plant("tiles.h", "masks: lower halves not moved", ("low = mask << 4;", "low = mask;"))
plant("tiles.h", "masks: unpacked from the lower bytes", ("twice_signs_high(low), twice_signs_low(mask)", "twice_signs_low(low), twice_signs_low(mask)"))
plant("tiles.h", "masks: halves unpacked swapped", ("{{twice_signs_low(low), twice_signs_high(low), twice_signs_low(mask), twice_signs_high(mask)}}", "{{twice_signs_low(mask), twice_signs_high(mask), twice_signs_low(low), twice_signs_high(low)}}"))
plant("tiles.h", "drop: halves swapped", ("element % 2 ? mask", "element % 2 == 0 ? mask"))
plant("tiles.h", "drop: the first vector's mask", ("element = i + w * kStep / 4", "element = w * kStep / 4"))
plant("tiles.h", "drop: half of a wide element", ("half * 0x10001u", "half"))
plant("tiles.h", "drop: the first row of a share", ("drop_group(tile.at(row, share.col), mask)", "drop_group(tile.at(share.row, share.col), mask)"))
plant("tiles.h", "drop: masks of the row of the tile", ("keep_mask(rule, static_cast<uint32_t>(row0) + row, group)", "keep_mask(rule, static_cast<uint32_t>(row), group)"))
plant("tiles.h", "drop: any: masks of the row of the tile", (": keep_mask(rule, static_cast<uint64_t>(row0 + row), group)", ": keep_mask(rule, static_cast<uint64_t>(row), group)"))
plant("tiles.h", "drop: groups of the tile", ("static_cast<uint32_t>(col0 + share.col) / kGroup;\n#pragma unroll((", "static_cast<uint32_t>(share.col) / kGroup;\n#pragma unroll(("))
plant("tiles.h", "masks: a place for all groups", ("if (masks) masks[share.number(j)]", "if (masks) masks[share.number(0)]"))
plant("tiles.h", "drop: masks without a drop", ("if constexpr (kDrops) drop_group", "if constexpr (!kDrops) drop_group"))
plant("tiles.h", "pool: offset in the shard", ("return shard * f.pool_stride + (static_cast<uint32_t>(col) - part * f.shard_size)", "return shard * f.pool_stride + static_cast<uint32_t>(col)"))
plant("tiles.h", "pool: distance between shards", ("return shard * f.pool_stride", "return shard * f.shard_size"))
plant("tiles.h", "pool: bad entries are not noticed", ("    bad = true;\n", "    (void)bad;\n"))
plant("tiles.h", "whole factor: ranks beyond the table", ("if (inside && rank < ranks && rank0 + rank < f.rank) shard[b]", "if (inside && rank < ranks) shard[b]"), ("exists = inside && rank < ranks && rank0 + rank < f.rank;", "exists = inside && rank < ranks;"))
plant("tiles.h", "whole factor: columns beyond the table", ("half < halves && col < f.cols", "half < halves"))
plant("tiles.h", "whole factor: columns beyond the block", ("inside = half < halves && col < f.cols", "inside = col < f.cols"))
plant("tiles.h", "whole factor: writes beyond the block", ("if (half < halves && rank < ranks) store_floats", "if (rank < ranks) store_floats"))
plant("tiles.h", "whole factor: writes ranks beyond the block", ("if (half < halves && rank < ranks) store_floats", "if (half < halves) store_floats"))
plant("tiles.h", "whole factor: threads of a row are not a power of two", ("while (threads < halves) threads *= 2", "while (threads < halves) threads += 16"))
plant("tiles.h", "whole factor: too few threads of a row", ("while (threads < halves) threads *= 2", "while (threads * 2 < halves) threads *= 2"))
plant("tiles.h", "whole factor: a step for all rows", ("step = kThreads / threads;", "step = kThreads / 16;"))
plant("tiles.h", "whole factor: only the first batch", ("first < ranks; first += kBatch * step", "first < step; first += kBatch * step"))
plant("tiles.h", "whole factor: offset in the shard", ("static_cast<const float*>(f.pool) + (static_cast<uint32_t>(col) - part * f.shard_size)", "static_cast<const float*>(f.pool) + static_cast<uint32_t>(col)"))
plant("tiles.h", "whole factor: table of the first part", ("table = f.index + part;", "table = f.index;"))
plant("tiles.h", "whole factor: table of the first block of ranks", ("table[(rank0 + rank) * f.shards_per_vector]", "table[rank * f.shards_per_vector]"))
plant("tiles.h", "whole factor: distance between shards", ("pool + shard[b] * f.pool_stride", "pool + shard[b] * static_cast<int64_t>(f.shard_size)"))
plant("tiles.h", "whole factor: bad entries are read", ("if (exists && fits) v[b]", "if (exists) v[b]"))
plant("tiles.h", "whole factor: bad entries are not noticed", ("        bad = bad || (exists && !fits);\n", ""))
plant("tiles.h", "factor: ranks beyond the table", ("inside = rank < f.rank && col < cols && col0", "inside = col < cols && col0"))
plant("tiles.h", "factor: elements beyond a row", ("if (inside && col + i < f.cols)", "if (inside)"))
plant("tiles.h", "factor: bad entries are not noticed", ("  if (bad) trap();\n", ""))
plant("tiles.h", "raw: only half of a wide group", ("if (v * kVector < kGroup * pool_bytes) raw", "if (v * kVector < kGroup * 4) raw"))
plant("tiles.h", "raw: vectors beyond a narrow group", ("    if (v * kVector < kGroup * pool_bytes) raw", "    raw"))
plant("tiles.h", "raw: the first half twice", ("store_floats(target + v * kGroup / 2, raw.vector[v])", "store_floats(target + v * kGroup / 2, raw.vector[0])"))
plant("tiles.h", "factor: columns beyond the block", ("inside = rank < f.rank && col < cols && col0 + col < f.cols", "inside = rank < f.rank && col0 + col < f.cols"))
plant("tiles.h", "factor: columns beyond the table", ("rank < f.rank && col < cols && col0 + col < f.cols", "rank < f.rank && col < cols"))
plant("tiles.h", "factor: writes beyond the block", ("            if (first + b * kStride < cols) store_raw", "            store_raw"))
plant("tiles.h", "factor: only the first batch", ("first < cols; first += kBatch * kStride", "first < kBatch * kStride; first += kBatch * kStride"))
plant("tiles.h", "factor: any length: ranks beyond the table", ("inside = rank < f.rank && col0 + col < f.cols;\n            load", "inside = col0 + col < f.cols;\n            load"))
plant("tiles.h", "sums: pairs in odd rows", ("|| cols % 2 == 0) {", "|| cols > 0) {"))
plant("tiles.h", "sums: column beyond a row", ("    if (left > 1) target[1]", "    target[1]"))
plant("tiles.h", "sums: pairs beyond a row", ("    if (left > 0) store_pair", "    store_pair"))
plant("tiles.h", "planes: the first again and again", ("source + min(k + b, count - 1) * plane", "source + min(b, 0) * plane"))
plant("tiles.h", "planes: all are aligned", ("          p.cols % kQuad == 0 && reinterpret", "          reinterpret"))
plant("tiles.h", "planes: all start aligned", ("p.cols % kQuad == 0 && reinterpret_cast<uintptr_t>(p.data) % kVector == 0", "p.cols % kQuad == 0"))
plant("tiles.h", "planes: only the first batch", ("k < count; k += kBatch", "k < 1; k += kBatch"))
plant("tiles.h", "planes: one too many", ("min(k + b, count - 1) * plane", "min(k + b, count) * plane"))
plant("tiles.h", "planes: the last again and again", ("k + b < count ? 0xFFFFFFFFu : 0u", "0xFFFFFFFFu"))
plant("tiles.h", "planes: one quad for all", ("quads[i] = load_16(source + i * step)", "quads[i] = load_16(source)"))
plant("tiles.h", "planes: quads that do not exist", ("if (exists(i)) quads[i]", "quads[i]"))
plant("tiles.h", "planes: sums of the first quad", ("bit_cast<float>(v[b][i].y & live)", "bit_cast<float>(v[b][0].y & live)"))
plant("tiles.h", "planes: odd ones: only the first", ("for (int k = 0; k < count; ++k)", "for (int k = 0; k < 1; ++k)"))
plant("tiles.h", "planes: elements beyond a row", ("        if (j < live) sum[j]", "        sum[j]"))
plant("tiles.h", "quads: elements beyond a row", ("      if (j < live) target[j]", "      target[j]"))
plant("tiles.h", "s: rows beyond the planes", ("if (row < end && live > 0)", "if (live > 0)"))
plant("tiles.h", "s: ranks beyond the planes", ("if (row < end && live > 0)", "if (row < end)"))
plant("tiles.h", "s: not scaled", ("sum[2] * scale, sum[3] * scale);\n    }", "sum[2], sum[3]);\n    }"))
plant("tiles.h", "s_sum: any: scaled", ("write_quad(sum_out + at, sum, p.aligned, live)", "{ for (auto& one : sum) one *= scale; write_quad(sum_out + at, sum, p.aligned, live); }"))
plant("tiles.h", "whole s: ranks beyond the planes", ("rank0 + quad < p.rank ? static_cast<int>(end)", "rank0 + quad < p.rank + kRanks ? static_cast<int>(end)"))
plant("tiles.h", "whole s: rows beyond the planes", ("return (first + i) * kStep < rows;", "return rows > 0;"))
plant("tiles.h", "whole s: a row too few", ("return (first + i) * kStep < rows;", "return (first + i) * kStep < rows - 1;"))
plant("tiles.h", "whole s: the first plane only", ("if (p.count == 1) {", "if (p.count >= 1) {"))
plant("tiles.h", "whole s: quads of the first batch", ("p.data + at + first * step", "p.data + at"))
plant("tiles.h", "whole s: steps of a row", ("step = kStep * p.rank;", "step = p.rank;"))
plant("tiles.h", "whole s: not scaled", ("sum[i][2] * scale,\n                   sum[i][3] * scale", "sum[i][2],\n                   sum[i][3]"))
plant("tiles.h", "whole s_sum: rows beyond the planes", ("if (sum_out && down < rows) write_quad", "if (sum_out && rows > 0) write_quad"))
plant("tiles.h", "whole s_sum: of the first quad", ("sum_out + at + (first + i) * step", "sum_out + at + first * step"))
plant("tiles.h", "few sums: no barrier before they are added", ("  __syncthreads();\n  if (static_cast<int>(threadIdx.x) < items) {", "  if (static_cast<int>(threadIdx.x) < items) {"))
plant("tiles.h", "few sums: of the first part", ("other < parts; ++other", "other < 1; ++other"))
plant("tiles.h", "few sums: a part too many", ("other < parts; ++other", "other <= parts; ++other"))
plant("tiles.h", "few sums: parts of one plane", ("size = static_cast<int>(ceil_div(p.count, parts)), first = part * size", "size = 1, first = part * size"))
plant("tiles.h", "few sums: every part from the first plane", ("item * kQuad + first * plane", "item * kQuad"))
plant("tiles.h", "few sums: planes beyond the last", ("min(size, p.count - first), true", "size, true"))
plant("tiles.h", "few sums: no zeros beyond the planes", ("i < kRows * kRanks / kQuad; i += kThreads", "i < 0; i += kThreads"))
plant("tiles.h", "few sums: sums of the first item", ("(other * items + item) * kQuad", "other * items * kQuad"))
plant("tiles.h", "few sums: a row of all", ("target.at(item / quads, item % quads * kQuad)", "target.at(0, item % quads * kQuad)"))
plant("tiles.h", "few sums: not scaled", ("sum[2] * scale,\n               sum[3] * scale", "sum[2],\n               sum[3]"))
plant("tiles.h", "few sums: s_sum of the first item", ("p.rank + item * kQuad, sum, true", "p.rank, sum, true"))
plant("tiles.h", "blocks: rows beyond the plane", ("    if (row >= rows) continue;\n", ""))
plant("tiles.h", "blocks: the upper half twice", ("row = row0 + block_row(lane, 2 * half), col", "row = row0 + block_row(lane, 0), col"))
plant("tiles.h", "blocks: sums of the upper half", ("blocks[n].sum[j][2 * half + 1] * scale", "blocks[n].sum[j][1] * scale"))
plant("tiles.h", "blocks: columns of the first", ("right = 16 * n + 8 * j;", "right = 8 * j;"))
plant("tiles.h", "blocks: columns left of the first", ("cols - col - right, !kAsks", "cols - col, !kAsks"))
plant("tiles.h", "blocks: not scaled", ("blocks[n].sum[j][2 * half] * scale,", "blocks[n].sum[j][2 * half],"))
plant("tiles.h", "product: rows of the first rank fragment", ("a.held[kHeld ? k / M::kStep : 0], M::b_cols", "a.held[0], M::b_cols"))
plant("tiles.h", "product: columns of the first block", ("M::b_cols(factor, k, col + n * 16, lane)", "M::b_cols(factor, k, col, lane)"))
plant("tiles.h", "columns: bias off by one", ("second += bias[n * 16 + c + 1]", "second += bias[n * 16 + c]"))
plant("tiles.h", "columns: accumulates twice", ("if (accumulate) add_pair(target, first, second);", "if (accumulate) add_pair(target, first, second), add_pair(target, first, second);"))
plant("tiles.h", "columns: does not accumulate", ("if (accumulate) add_pair(target, first, second);", ""))

# ---------------------------------------------------------------------------------------------- heuristics.h

plant("heuristics.h", "rows of shared memory not aligned", ("{ return cols * size + 16; }", "{ return cols * size + 8; }"))
plant("heuristics.h", "rows of shared memory in the same banks", ("{ return cols * size + 16; }", "{ return cols * size; }"))
plant("heuristics.h", "shrink: no room for a wider pool", ("ranks * cols * pool_size +", "ranks * cols * size +"))
plant("heuristics.h", "shrink: table too small", ("         kTableEntries * 4;", "         kTableEntries * 2;"))
plant("heuristics.h", "expand: no room for the bias", ("columns * sum_size + mask", "columns + mask"))
plant("heuristics.h", "expand: no room for the masks", ("columns * sum_size + mask_bytes(kExpandCols)", "columns * sum_size"))
plant("heuristics.h", "last part forgotten", ("return {ceil_div(tiles, size), size}", "return {max64(1, tiles / size), size}"))
plant("heuristics.h", "shrink: last rows forgotten", ("return min64(rows, ceil_div(rows, tile) + in.count - 1);", "return max64(min64(1, rows), rows / tile + in.count - 1);"))
plant("heuristics.h", "backward: last columns forgotten", ("max64(1, ceil_div(cols, backward_cols(element_size)))", "max64(1, cols / backward_cols(element_size))"))
plant("heuristics.h", "backward: last column tiles forgotten", ("column_blocks = ceil_div(column_tiles, width)", "column_blocks = max64(1, column_tiles / width)"))
plant("heuristics.h", "expand: last columns forgotten", ("max64(1, ceil_div(column_tiles, tiles))", "max64(1, column_tiles / tiles)"))
plant("heuristics.h", "gather: address and distance ignored", ("static_cast<uint64_t>(segment_bytes) | static_cast<uint64_t>(pool_stride_bytes) | source | target;", "static_cast<uint64_t>(segment_bytes) | ((pool_stride_bytes | source | target) & 0);"))
plant("heuristics.h", "gather: always 16 bytes", ("if (all % width == 0) return width", "if (all % width < 16) return width"))
plant("heuristics.h", "divider: one too few", ("(power + d - 1) / d", "(power - 1) / d"))

# ---------------------------------------------------------------------------------------------- sum.cu, gather.cu

plant("sum.cu", "threads beyond the end", ("  if (first >= one.elements) return;\n", ""))
plant("sum.cu", "quads of any number of elements", ("elements % kQuad == 0 &&\n            (reinterpret", "(reinterpret"))
plant("sum.cu", "planes start aligned", ("(reinterpret_cast<uintptr_t>(p.data) | reinterpret_cast<uintptr_t>(sums[i].out))", "reinterpret_cast<uintptr_t>(sums[i].out)"))
plant("sum.cu", "results start aligned", ("(reinterpret_cast<uintptr_t>(p.data) | reinterpret_cast<uintptr_t>(sums[i].out))", "reinterpret_cast<uintptr_t>(p.data)"))
plant("sum.cu", "only the first sum", ("p.sum[blockIdx.y]", "p.sum[0]"))
plant("sum.cu", "planes at the distance of a row", ("first, one.elements, count", "first, 1, count"))
plant("gather.cu", "gather: words beyond a segment", ("  if (word >= p.segment_words) return;\n", ""))
plant("gather.cu", "gather: bad entries are not noticed", ("    if (shard < 0 || shard >= p.num_shards) trap();", "    //"))
plant("gather.cu", "gather: only the first block of words", ("word = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x", "word = threadIdx.x"))
plant("gather.cu", "gather: only as many segments as blocks", ("q < p.segments; q += gridDim.x", "q < gridDim.x; q += gridDim.x"))
plant("gather.cu", "scatter: entries beyond the table", ("index = first + lane < module.entries ? module.index[first + lane] : -1", "index = module.index[first + lane]"))
plant("gather.cu", "scatter: only the first of 32 entries", ("index == shard); bits; bits &= bits - 1", "index == shard); bits; bits = 0"))
plant("gather.cu", "scatter: in descending order", ("first + __ffs(static_cast<int>(bits)) - 1", "first + 31 - __builtin_clz(bits)"), ("index == shard); bits; bits &= bits - 1", "index == shard); bits; bits &= ~(1u << (31 - __builtin_clz(bits)))"))
plant("gather.cu", "scatter: modules in reverse", ("p.module[k];", "p.module[p.count - 1 - k];"))
plant("gather.cu", "scatter: columns beyond a shard", ("if (mine) add_segment<G>(sum, module,", "add_segment<G>(sum, module,"))
plant("gather.cu", "scatter: writes beyond a shard", ("      if (mine) out[", "      out["))
plant("gather.cu", "scatter: rows are contiguous", ("row * module.row_stride", "row * module.shards_per_vector * shard_size"))
plant("gather.cu", "scatter: the first modules again", ("modules[first + k];\n      params", "modules[k];\n      params"))
plant("gather.cu", "scatter: later launches overwrite", ("params.accumulate = first > 0", "params.accumulate = false"))
plant("gather.cu", "scatter: four columns of any shard", ("bool all = pool_grad.cols % 4 == 0;", "bool all = true;"))
plant("gather.cu", "scatter: only the first block of columns", ("(blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x) * kColumns", "threadIdx.x * kColumns"))
plant("gather.cu", "scatter: only as many shards as blocks", ("shard < p.num_shards; shard += gridDim.x", "shard < gridDim.x; shard += gridDim.x"))
plant("gather.cu", "scatter: bad entries are not noticed", ("          if (first + lane < module.entries && (index < 0 || index >= p.num_shards)) trap();\n", ""))
plant("gather.cu", "inverse: first entry missed", ("first = begin; first < end", "first = begin + 1; first < end"))
plant("gather.cu", "inverse: last entry missed", ("end = p.inverse.starts[shard + 1];", "end = p.inverse.starts[shard + 1] - 1;"))
plant("gather.cu", "inverse: only the first of 32 places", ("here); bits; bits &= bits - 1", "here); bits; bits = 0"))
plant("gather.cu", "inverse: only the first 32 places", ("first = begin; first < end; first += kWarp", "first = begin; first < end; first = end"))
plant("gather.cu", "inverse: in descending order", ("from = __ffs(static_cast<int>(bits)) - 1", "from = 31 - __builtin_clz(bits)"), ("here); bits; bits &= bits - 1", "here); bits; bits &= ~(1u << (31 - __builtin_clz(bits)))"))
plant("gather.cu", "inverse: places beyond the list", ("place = inside ? p.inverse.places[first + lane] : Place{}", "place = p.inverse.places[first + lane]"))
plant("gather.cu", "inverse: entries of the next shard", ("here = inside && k >= 0", "here = k >= 0"), ("place = inside ? p.inverse.places[first + lane] : Place{}", "place = p.inverse.places[min(first + lane, p.inverse.count - 1)]"), ("        if (here && !names(p.module[k], place.position, shard)) trap();\n", ""))
plant("gather.cu", "inverse: a lane's own module", ("p.module[module], position", "p.module[k < 0 ? 0 : k], position"))
plant("gather.cu", "inverse: the module before", ("p.module[module], position", "p.module[module ? module - 1 : 0], position"))
plant("gather.cu", "inverse: a lane's own position", ("__shfl_sync(kAll, place.position, from)", "place.position"))
plant("gather.cu", "inverse: modules of launches before", ("inside && k >= 0 && k < p.count", "inside && k < p.count"))
plant("gather.cu", "inverse: modules of launches to come", ("k >= 0 && k < p.count && p", "k >= 0 && p"))
plant("gather.cu", "inverse: every launch begins at module 0", ("params.first = first;", "params.first = 0;"))
plant("gather.cu", "inverse: modules without a gradient", (" && p.module[k].entries > 0;", ";"))
plant("gather.cu", "inverse: columns beyond a shard", ("if (mine) add_segment<G>(sum, p.module[module],", "add_segment<G>(sum, p.module[module],"))
plant("gather.cu", "inverse: bad starts are not noticed", ("      if (begin < 0 || end > p.inverse.count) trap();\n", ""))
plant("gather.cu", "inverse: bad modules are not noticed", ("        if (inside && (place.module < 0 || place.module >= p.total)) trap();\n", ""))
plant("gather.cu", "inverse: positions beyond a table", ("position >= 0 && position < module.entries && module", "module"))
plant("gather.cu", "inverse: entries of other shards are not noticed", (" && module.index[position] == shard;", ";"))
plant("gather.cu", "scatter: four columns at any address", ("reinterpret_cast<uintptr_t>(modules[k].grad.data) % kVector == 0 && modules", "modules"))
plant("gather.cu", "scatter: four columns of any row", (" && modules[k].grad.row_stride % 4 == 0", ""))

# ---------------------------------------------------------------------------------------------- early launches

LET = "  let_next_launch_start();\n"
WAIT = "  wait_for_launch_before();  // F and the bias are older than that; s is its work\n"
WAIT_DX = "  if (kXPass) wait_for_launch_before();\n"
plant("expand.cu", "early: waits after reading s", (WAIT + LET, ""), ("      load_s(row0, 0);\n", "      load_s(row0, 0);\n      wait_for_launch_before();\n"))
plant("expand.cu", "early: waits after the first tile", (WAIT + LET, ""), ("      __syncwarp();  // y may be", "      wait_for_launch_before();  // y may be"))
plant("expand.cu", "early: does not wait", (WAIT + LET, ""))
plant("expand.cu", "early: does not wait where there is no bias", (WAIT + LET, "  if (biased) wait_for_launch_before();\n"))
plant("expand.cu", "early: lets the next launch start before it waits", (WAIT + LET, LET + WAIT))
plant("backward.cu", "early: the x pass waits after reading ds", (WAIT_DX + LET, ""), ("    Block<S> projected[kXPass", "    wait_for_launch_before();\n    Block<S> projected[kXPass"))
plant("backward.cu", "early: the x pass waits after its first tile", (WAIT_DX + LET, ""), ("      stage = stage == kStages - 1 ? 0", "      wait_for_launch_before();\n      stage = stage == kStages - 1 ? 0"))
plant("backward.cu", "early: the x pass does not wait", (WAIT_DX + LET, ""))
plant("backward.cu", "early: the dy pass does not wait", ("  if (!kXPass) wait_for_launch_before();\n", ""), ("  if (kXPass) wait_for_launch_before();\n" + LET, "  if (kXPass) wait_for_launch_before();\n"))
plant("backward.cu", "early: lets the next launch start before it waits", (WAIT_DX + LET, LET + WAIT_DX))
plant("sum.cu", "early: waits after it has added", ("  wait_for_launch_before();\n" + LET, ""), ("  write_quad(out", "  wait_for_launch_before();\n  write_quad(out"), ("  if (first >= one.elements) return;\n", "  if (first >= one.elements) return wait_for_launch_before();\n"))
plant("sum.cu", "early: threads beyond the end do not wait", ("  wait_for_launch_before();\n" + LET, "  if (!kGrouped && first >= one.elements) return;\n  wait_for_launch_before();\n"))
plant("sum.cu", "early: does not wait", ("  wait_for_launch_before();\n" + LET, ""))

# ---------------------------------------------------------------------------------------------- rows in groups

plant("tiles.h", "groups: ends beyond the places", ("min(max(g.ends[own - 1], found.begin), found.end)", "max(g.ends[own - 1], found.begin)"))
plant("tiles.h", "groups: ends before the places", ("min(max(g.ends[own - 1], found.begin), found.end)", "min(g.ends[own - 1], found.end)"))
plant("tiles.h", "groups: ends may decrease", ("if (lane >= down) begin = max(begin, before);", "(void)before;"))
plant("tiles.h", "groups: the group before", ("__ballot_sync(0xFFFFFFFFu, exists && key <= row)) - 1;", "__ballot_sync(0xFFFFFFFFu, exists && (key < row || own == found.group))) - 1;"))
plant("tiles.h", "groups: the end of the group is that of 32", ("if (last + 1 < kWarp) found.end = next;", "if (last + 1 < kWarp && step > 1) found.end = next;"))
plant("tiles.h", "groups: blocks do not count groups", ("(numbered ? static_cast<uint32_t>(own) : 0u)", "0u"))
plant("tiles.h", "groups: rows of the part after", ("rows.last = min(rows.first + g.part, rows.end);", "rows.last = rows.end;"))
plant("tiles.h", "groups: all ranks", ("return g.ranks ? min(max(g.ranks[rows.group], 0), rank) : rank;", "return rank;"))
plant("tiles.h", "groups: scale of the first", ("g.scales[rows.group]", "g.scales[0]"))
plant("tiles.h", "groups: tables of the first", ("f.index += rows.group * g.table;", ""))
plant("tiles.h", "groups: rows of nobody are not cut off", ("  m.rows = rows.last;\n", ""))
plant("tiles.h", "groups: rows stand where they are", ("    const int32_t row = map[place];", "    const int32_t row = static_cast<int32_t>(place);"))
plant("tiles.h", "groups: rows that are none", ("return static_cast<uint32_t>(row) < static_cast<uint32_t>(mapped) ? row : -1;", "return row;"))
plant("tiles.h", "whole groups: rows that are none", ("static_cast<uint32_t>(row[j]) < static_cast<uint32_t>(m.mapped) ?", "row[j] >= 0 || j * kStep < left ?"))
plant("tiles.h", "groups: ranks beyond the group's are what they are", ("!kAsks || right < live ? first", "true ? first"))
plant("shrink.cu", "groups: nobody's rows of s", ("if (rows.first == rows.last) return;", "if (rows.first == rows.last || rows.group == p.groups.count) return;"))
plant("shrink.cu", "groups: the last warp sleeps", ("active = row0 + first_row < rows.last;", "active = row0 + first_row + 1 < rows.last;"))
plant("expand.cu", "groups: nobody's rows are not written", ("if (!accumulate && !p.groups.rows) zero_rows", "if (false) zero_rows"))
plant("expand.cu", "groups: nobody's rows are zeroed in what is accumulated into", ("if (!accumulate && !p.groups.rows) zero_rows", "if (!p.groups.rows) zero_rows"))
plant("expand.cu", "groups: nobody's rows are zeroed where rows stand elsewhere", ("if (!accumulate && !p.groups.rows) zero_rows", "if (!accumulate) zero_rows"))
plant("expand.cu", "groups: nobody's rows of the sum", ("      if (s_sum) {", "      if (false) {"))
plant("expand.cu", "groups: another order where nothing may depend on it", ("few_in_order = p.groups.invariant;", ""))
plant("expand.cu", "groups: the scale of all", ("scale *= scale_of<S>(p.groups, rows);", ""))
plant("expand.cu", "groups: early: surplus blocks do not wait", ("        wait_for_launch_before();\n        let_next_launch_start();\n", ""))
plant("backward.cu", "groups: the gradient of a group without rows", ("(rows.first == rows.last && rows.part > 0)", "rows.first == rows.last"))
plant("backward.cu", "groups: planes of the part before", ("+ rows.part - 1;", "+ rows.part - 1 - (rows.part > 1);"))
plant("backward.cu", "groups: every part is the first", ("if (rows.part > 0) {", "if (false) {"))
plant("backward.cu", "groups: a warp too many in the gradient", ("kWarpRows >= end) break;", "kWarpRows > end) break;"))
plant("backward.cu", "groups: scale of all", ("s_scale = out_scale = s_scale * scale_of<S>(p.groups, rows);", ""))
plant("backward.cu", "groups: nobody's dx", ("!p.groups.rows && nobody) {", "!p.groups.rows && !nobody) {"))
plant("backward.cu", "groups: dS is scaled twice", ("  unscaled.scales = nullptr;\n", ""))
plant("backward.cu", "groups: early: the x pass of nobody does not wait", ("        if (kXPass) wait_for_launch_before();\n        let", "        let"))
plant("sum.cu", "groups: the first plane alone", ("first, one.elements, count, one.aligned", "first, one.elements, 1, one.aligned"))
plant("sum.cu", "groups: planes of another", ("begin != blockIdx.z || count < 1", "count < 1"))
plant("sum.cu", "groups: not onto what is there", ("if constexpr (kGrouped) add_planes<8>", "if constexpr (false) add_planes<8>"))
plant("sum.cu", "groups: onto the first", (", out += rows.group * one.elements;", ";"))
plant("heuristics.h", "groups: a block too few", ("return ceil_div(rows, part) + groups;", "return ceil_div(rows, part) + groups - 1;"))
plant("heuristics.h", "groups: sums are cut by rows", ("in.invariant ? split(column_tiles, rank_blocks, kInvariantPlanes)", "false ? split(column_tiles, rank_blocks, kInvariantPlanes)"))

# fmt: on

assert len({str(m) for m in MUTANTS}) == len(MUTANTS)

# Mutants that change nothing that a test could observe, and why. They run in the first flavour only.
EQUIVALENT = {
    "expand: steps of the first column tile": "a block that takes steps has one (expand_geometry)",
    "expand: visits column tiles beyond y": "every access looks at its columns; saves time",
    "backward: no warp barrier after writing dx": "a barrier of the block comes before others touch the tile; for ldmatrix",
    "backward: drops in the dy pass": "it is launched without dropout; saves code",
    "backward: whole: the x pass without dx": "a matrix without rows is not written; saves its product",
    "tiles: whole: any length of rows": "all kernels also ask for whole, aligned shards, of which rows are made",
    "tiles: load: columns beyond the matrix": "not a whole group, so every element is looked at; saves time",
    "tiles: fetch: columns beyond the matrix": "copies what is left of a row, which is nothing; saves time",
    "tiles: store: columns beyond the matrix": "copies what is left of a row, which is nothing; saves time",
    "tiles: store: keep bit off by one": "four bits in a row are the same",
    "tiles: whole factor: columns beyond the block": "loads what is not stored; saves loads",
    "tiles: factor: columns beyond the block": "loads what is not stored; saves loads",
}

# ---------------------------------------------------------------------------------------------- builds

UNITS = [f"tests/cuda_emulator/{name}.cpp" for name in ("emulator", "bindings", "geometry")]
UNITS += ["csrc/cuda/launch.cpp"]
UNITS += [f"csrc/cuda/{path.name}" for path in sorted(emulator.CUDA.glob("*.cu"))]


def copy_sources(source, target):
    """All that builds and runs kernels: so that edits meanwhile do no harm, and messages name the usual paths."""
    only = shutil.ignore_patterns("*.md", "__pycache__")
    for folder in ("csrc/common", "csrc/cuda", "tests/cuda_emulator"):
        shutil.copytree(source / folder, target / folder, ignore=only)
    shutil.copy(source / "tests" / "test_cuda_kernels.py", target / "tests")


def compile_unit(root, unit, flavour):
    own = unit.endswith("emulator.cpp")
    flags = emulator.EMULATOR_FLAGS[flavour] + emulator._machine_flags() if own else emulator.KERNEL_FLAGS[flavour]
    target = root / f"{Path(unit).name}.{flavour}.o"
    fast = [] if own else ["-Og"]  # six times faster to compile, as fast to run
    command = [emulator.COMPILER, *emulator.FLAGS, "-w", *flags, *fast, "-x", "c++", "-c", unit, "-o", target]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[:2000])
    return target


def build(base, root, changed, flavour):
    """The library: units that contain `changed` from root, all others from base."""
    mine = UNITS[1:] if changed.endswith(".h") else [f"csrc/cuda/{changed}"] if changed else []
    objects = [
        compile_unit(root, unit, flavour) if unit in mine else base / f"{Path(unit).name}.{flavour}.o" for unit in UNITS
    ]
    link = [emulator.COMPILER, "-pthread", "-shared", *emulator.LINK_FLAGS[flavour], *objects]
    link += ["-o", root / f"{flavour}.so"]
    subprocess.run(link, check=True)


# ---------------------------------------------------------------------------------------------- runs


def examine(library, flavour):
    """In a process of its own: the first thing that is wrong with a library, on stdout."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 9))
    kernels = Kernels(library)
    seeds = range(SEEDS[flavour])
    try:
        for case in CASES[:12]:
            grid.check(kernels, case, seeds)
        resident = 2 if flavour == "tsan" else 6
        for case in grid.GROUPED:
            if flavour == "plain" or len(case[1].ends) < 100:
                grid.check_grouped(kernels, *case, seeds[:2], resident)
        case = "impossible ends"
        grid.check_impossible_ends(kernels, seeds[:1], resident)
        case = "wrong rows"
        grid.check_wrong_rows(kernels)
        case = "invariance"
        grid.check_invariance(kernels)
        case = "gather"
        grid.check_gather(kernels, seeds)
        case = "index out of range"
        for entry, aligned, dtype in itertools.product((-1, 8), (True, False), ("f32", "bf16")):
            test_cuda_kernels.test_an_index_out_of_range_stops_every_kernel(kernels, entry, aligned, dtype)
        case = "wrong inverse"
        for wrong in test_cuda_kernels.WRONG_INVERSES:
            test_cuda_kernels.test_a_wrong_inverse_stops_the_kernel(kernels, *wrong)
        for case in CASES[12:]:
            grid.check(kernels, case, seeds)
        case = "chains"
        grid.check_chains(kernels, seeds, resident)
        if flavour == "plain":
            case = "masks"
            grid.check_masks(kernels)
            for case in grid.LONG:
                grid.check(kernels, case, seeds[:1])
    except (Exception, pytest.fail.Exception) as error:
        said = str(error).removeprefix(f"{case} ")
        # The emulator's messages: which thread said it is of no interest here.
        print(f"{case}: {re.sub(r'status [0-9]+: |block .*? lane [0-9]+]: ', '', said)}".replace("\n", " "))
        sys.exit(1)


def verdict(root, flavour):
    """What a run in a flavour says of the library in root; empty where it finds nothing."""
    script = root / "tests" / "cuda_emulator" / Path(__file__).name
    command = [sys.executable, script, "--examine", root / f"{flavour}.so", "--flavour", flavour]
    done = emulator.run_sanitized(flavour, command)
    if done.returncode == 0:
        return ""
    if done.returncode == -signal.SIGXCPU:
        return "hangs"
    said = re.search(r"ERROR: (AddressSanitizer.*)|(runtime error:.*)|WARNING: (ThreadSanitizer: [^(\n]*)", done.stderr)
    if not said:
        return done.stdout.strip() or f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    place = re.search(r"csrc/cuda/(\w+\.\w+:\d+)", done.stderr[said.start() :])
    return " ".join([next(filter(None, said.groups())), place[1] if place else ""])


def try_mutant(base, scratch, mutant, flavours):
    """(flavour that found it or None, what it said)."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name) / "root"
        copy_sources(base, root)
        if mutant:
            path = root / "csrc" / "cuda" / mutant.file
            path.write_text(mutant.apply(path.read_text()))
        for flavour in flavours[:1] if str(mutant) in EQUIVALENT else flavours:
            try:
                build(base, root, mutant.file if mutant else "", flavour)
            except RuntimeError as error:  # a static_assert of the sources, say
                if mutant is None:
                    raise
                return "compiler", next((line for line in str(error).splitlines() if "error" in line), str(error))
            said = verdict(root, flavour)
            if said:
                return flavour, said
    return None, EQUIVALENT.get(str(mutant), "")


def main(only, flavours, jobs):
    start = time.time()
    emulator.SANITIZER_OPTIONS["tsan"]["TSAN_OPTIONS"] += ":halt_on_error=1"
    chosen = [mutant for mutant in MUTANTS if any(name in str(mutant) for name in only)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        base = Path(name) / "base"
        copy_sources(emulator.ROOT, base)
        for mutant in chosen:
            mutant.apply((base / "csrc" / "cuda" / mutant.file).read_text())
        list(pool.map(lambda job: compile_unit(base, *job), [(unit, f) for f in flavours for unit in UNITS]))
        sound = pool.map(lambda flavour: try_mutant(base, Path(name), None, [flavour]), flavours)
        for flavour, said in filter(lambda result: result[0], sound):
            sys.exit(f"the sources as they are do not pass in {flavour}: {said}")
        found, surviving = 0, []
        results = pool.map(lambda mutant: try_mutant(base, Path(name), mutant, flavours), chosen)
        for mutant, (flavour, said) in zip(chosen, results, strict=True):
            found += flavour is not None
            if flavour is None and str(mutant) not in EQUIVALENT:
                surviving.append(mutant)
            state = flavour or ("equivalent" if str(mutant) in EQUIVALENT else "SURVIVES")
            print(f"{mutant!s:58} {state:10} {said[:150]}", flush=True)
    print(f"{found} of {len(chosen)} found, {len(surviving)} survive unexplained; {time.time() - start:.0f} s")
    beyond = [str(case) for case in CASES if case not in grid.CASES]
    if beyond:
        print("not in grid.CASES, so the tests do not run them:", *beyond, sep="\n    ")
    return bool(surviving or beyond)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="mutants whose name contains this; may be given several times")
    parser.add_argument("--flavour", choices=emulator.FLAVOURS, help="this one alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--examine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        examine(options.examine, options.flavour)
    else:
        sys.exit(main(options.only or [""], [options.flavour] if options.flavour else emulator.FLAVOURS, options.jobs))
