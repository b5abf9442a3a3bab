"""Do the tests of the CUDA kernels find bugs? Plants one after the other in a copy of csrc/cuda and looks.

    python mutants.py [--only NAME ...] [--flavour plain|asan|tsan] [--jobs 2]

Each mutant is built for the emulator and put through CASES, a part of grid.CASES that reaches every path, and
check_gather, and the test of tables out of range: plain, with one seed of each schedule, first; where that finds
nothing, asan; then tsan. One line per mutant: who found it, and what was said. The exit status is 1 where one survives
that EQUIVALENT does not explain.

After a change of a kernel or of the grid, run this by hand; it is not part of the test suite. It takes a quarter of an
hour on two cores. A mutant whose text no longer occurs in the sources is an error: rewrite it.
"""

import argparse
import itertools
import re
import shutil
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
TIMEOUT = 400  # seconds of one run; a mutant may hang

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
    Case("bf16", "f32", 3, 264, 25, 3, p=0.5),  # four tiles in each part of shrink: stages are used again
    Case("f64", "f64", 1, 1300, 14, 3),  # two column tiles in a block of expand
    Case("f64", "f32", 16897, 8, 1, 3),  # two row tiles in a block of expand
    Case("f64", "f32", 16897, 8, 1, 17, p=0.5),  # and two steps in each
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

# ---------------------------------------------------------------------------------------------- shrink.cu

plant("shrink.cu", "no barrier after the index table", ("    table = shared_table;\n    __syncthreads();", "    table = shared_table;"))
plant("shrink.cu", "no barrier in the pipeline", ("    __syncthreads();  // this tile is complete", "    //"))
plant("shrink.cu", "no wait", ("    cp_async_wait<kStages - 2>();\n", ""))
plant("shrink.cu", "waits for a tile too few", ("cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"))
plant("shrink.cu", "no commit in the loop", ("load(tile + kStages - 1);  // its stage is free\n    cp_async_commit();", "load(tile + kStages - 1);"))
plant("shrink.cu", "no commit in the prologue", ("if (tile < tiles) load(tile);\n    cp_async_commit();", "if (tile < tiles) load(tile);"))
plant("shrink.cu", "a ring of one stage less", ("tile % kStages * ", "tile % (kStages - 1) * ", 2))
plant("shrink.cu", "loads before the barrier", ("    finish(tile);\n", "    finish(tile);\n    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);\n"), ("    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);  // its", "    // its"))
plant("shrink.cu", "narrows after the barrier", ("    finish(tile);\n", ""), ("    __syncthreads();  // this tile is complete", "    __syncthreads(); finish(tile);  // this tile is complete"))
plant("shrink.cu", "narrows elements that already are", ("p.factor.pool_bytes == 4 && (kWhole || p.factor.aligned)) {", "p.factor.pool_bytes == 4) {"))
plant("shrink.cu", "drops by the row of the tile", ("p.threshold, row0 + row, col0 + col)", "p.threshold, row, col0 + col)"))
plant("shrink.cu", "drops by the column of the tile", ("p.threshold, row0 + row, col0 + col)", "p.threshold, row0 + row, col)"))
plant("shrink.cu", "dropout scale forgotten", ("rank0 + n * 16, p.scale, lane", "rank0 + n * 16, S(1), lane"))
plant("shrink.cu", "writes rows beyond s", ("plane, p.x.rows, p.factor.rank, row,", "plane, row + 16, p.factor.rank, row,"))
plant("shrink.cu", "reads ranks beyond the table", ("rank < ranks && col0 + col", "col0 + col"))
plant("shrink.cu", "reads columns beyond the factor", ("rank < ranks && col0 + col < p.factor.cols", "rank < ranks"))
plant("shrink.cu", "reads a shard where there is no factor", ("v, inside ? kVector : 0", "v, kVector"))
plant("shrink.cu", "table of the first block of ranks", ("p.factor.index + static_cast<int64_t>(rank0) * p.factor.shards_per_vector", "p.factor.index"))
plant("shrink.cu", "table always in shared memory", ("if (entries <= kTableEntries)", "if (entries > 0)"))
plant("shrink.cu", "writes all planes to the first", ("static_cast<int64_t>(blockIdx.y) * p.x.rows", "static_cast<int64_t>(0) * p.x.rows"))
plant("shrink.cu", "writes to the first block of ranks", ("row, rank0 + n * 16, p.scale", "row, n * 16, p.scale"))
plant("shrink.cu", "shared memory a row short", ("shrink_shared(sizeof(E), kRanks, group);", "shrink_shared(sizeof(E), kRanks, group) - kTableEntries * 4 - 64;"))
plant("shrink.cu", "writes all row blocks of a warp to the first", ("first_row + m * 16;", "first_row;"))
plant("shrink.cu", "multiplies the first row block of a warp only", ("M::a_rows(x, first_row + m * 16, k", "M::a_rows(x, first_row, k"))
plant("shrink.cu", "bad entries are not noticed", ("  if (bad) trap();\n", ""))
plant("shrink.cu", "whole vectors of any matrix", ("params.x.whole() && f.aligned", "f.aligned"))
plant("shrink.cu", "whole vectors of any pool", ("params.x.whole() && f.aligned", "params.x.whole()"))

# ---------------------------------------------------------------------------------------------- expand.cu

plant("expand.cu", "no barrier before a step", ("          __syncthreads();  // everyone is done with the step before\n", ""))
plant("expand.cu", "no barrier after loading a step", ("load_s(row0, rank0);\n          __syncthreads();", "load_s(row0, rank0);"))
plant("expand.cu", "no warp barrier before the sums", ("      __syncwarp();\n#pragma unroll\n      for (int n", "#pragma unroll\n      for (int n"))
plant("expand.cu", "no warp barrier after the sums", ("      __syncwarp();\n#pragma unroll\n      for (int j", "#pragma unroll\n      for (int j"))
plant("expand.cu", "bias off by one", ("second += bias[column_tile * kExpandCols + col + 1]", "second += bias[column_tile * kExpandCols + col]"))
plant("expand.cu", "bias of the first column tile", ("bias[column_tile * kExpandCols + col", "bias[col", 2))
plant("expand.cu", "reads beyond the bias", ("bias[i] = col0 + i < p.y.cols ? to_sum(p.bias[col0 + i]) : S(0)", "bias[i] = to_sum(p.bias[col0 + i])"))
plant("expand.cu", "accumulates twice", ("first += to_sum(target[0])", "first += to_sum(target[0]) + to_sum(target[0])"))
plant("expand.cu", "reads rows beyond y", ("p.accumulate && row0 + row < p.y.rows &&", "p.accumulate &&"))
plant("expand.cu", "reads columns beyond y", ("row0 + row < p.y.rows && at < p.y.cols) {\n          copy_group<kWhole>(y", "row0 + row < p.y.rows) {\n          copy_group<kWhole>(y"))
plant("expand.cu", "writes rows beyond y", ("if (row0 + row < p.y.rows && at < p.y.cols) {\n          copy_group<kWhole>(p", "if (at < p.y.cols) {\n          copy_group<kWhole>(p"))
plant("expand.cu", "writes columns beyond y", ("if (row0 + row < p.y.rows && at < p.y.cols) {\n          copy_group<kWhole>(p", "if (row0 + row < p.y.rows) {\n          copy_group<kWhole>(p"))
plant("expand.cu", "every block writes s_sum", ("blockIdx.x == 0 ? p.s_sum : nullptr", "p.s_sum"))
plant("expand.cu", "s_sum forgotten", ("blockIdx.x == 0 ? p.s_sum : nullptr", "nullptr"))
plant("expand.cu", "keep byte of the tile before", ("          keep[row * kExpandGroups + group] =", "          if (tile == tile0) keep[row * kExpandGroups + group] ="))
plant("expand.cu", "keep bit off by one", (">> col % kGroup;", ">> (col + 1) % kGroup;"))
plant("expand.cu", "keep bits of the row of the tile", ("p.threshold, row0 + row, at)", "p.threshold, row, at)"))
plant("expand.cu", "dropout scale forgotten", ("first * p.keep_scale", "first"))
plant("expand.cu", "s of the first step", ("load_s(row0, rank0)", "load_s(row0, 0)"))
plant("expand.cu", "factor of the first step", ("p.factor, rank0, p.ranks", "p.factor, 0, p.ranks"))
plant("expand.cu", "factor of the first column tile", ("k, column_tile * kExpandCols + n * 16", "k, n * 16"))
plant("expand.cu", "part of the rows forgotten", ("tile0 + p.row_tiles_of_part", "tile0 + 1"))
plant("expand.cu", "visits column tiles beyond y", ("      if (col_y >= p.y.cols && column_tile > 0) break;\n", ""))
plant("expand.cu", "no barrier before s", ("      __syncthreads();  // everyone is done with s of the tile before\n", ""))
plant("expand.cu", "no barrier after s", ("      __syncthreads();  // s is complete, and so are F and the bias\n", ""))
plant("expand.cu", "whole vectors of any matrix", ("params.y.whole() && params.factor.aligned", "params.factor.aligned"))
plant("expand.cu", "whole vectors of any pool", ("params.y.whole() && params.factor.aligned", "params.y.whole()"))

# ---------------------------------------------------------------------------------------------- backward.cu

plant("backward.cu", "no barrier before s", ("    __syncthreads();  // nobody needs s", "    // nobody needs s"))
plant("backward.cu", "no barrier after a tile", ("      __syncthreads();  // the tile and s", "      // the tile and s"))
plant("backward.cu", "no barrier before dx", ("        __syncthreads();  // nobody reads x", "        // nobody reads x"))
plant("backward.cu", "no warp barrier after reading dx", ("          }\n          __syncwarp();\n        }", "          }\n        }"))
plant("backward.cu", "no warp barrier before writing dx", ("lane, finish);\n        __syncwarp();\n", "lane, finish);\n"))
plant("backward.cu", "no wait", ("      cp_async_wait<kAhead - 1>();\n", ""))
plant("backward.cu", "waits for a tile too few", ("cp_async_wait<kAhead - 1>()", "cp_async_wait<kAhead>()"))
plant("backward.cu", "no commit in the loop", ("(t + kAhead) % kTiles);\n        cp_async_commit();", "(t + kAhead) % kTiles);"))
plant("backward.cu", "loads into the stage in use", ("load(stage_ahead, row_ahead", "load(stage, row_ahead"))
plant("backward.cu", "a stage beyond the last", ("stage = stage == kStages - 1 ?", "stage = stage == kStages ?"))
plant("backward.cu", "loads the wrong column tile", ("row_ahead, (t + kAhead) % kTiles", "row_ahead, t % kTiles"))
plant("backward.cu", "loads the wrong row tile", ("row_tile + (t + kAhead) / kTiles", "row_tile"))
plant("backward.cu", "drops after the barrier", ("      __syncthreads();  // the tile and s", "      // the tile and s"), ("      if (kXPass && p.threshold) {\n", "      __syncthreads();\n      if (kXPass && p.threshold) {\n"))
plant("backward.cu", "keep byte of the column tile before", ("          keep[row * kGroups + group] = static_cast", "          if (t == 0) keep[row * kGroups + group] = static_cast"))
plant("backward.cu", "drops by the row of the tile", ("p.threshold, row0 + row, tile_col", "p.threshold, row, tile_col"))
plant("backward.cu", "drops by the column of the tile", ("p.threshold, row0 + row, tile_col + group", "p.threshold, row0 + row, group"))
plant("backward.cu", "keep bit off by one", ("second = kept & 2 ?", "second = kept & 1 ?"))
plant("backward.cu", "writes rows beyond ds", ("plane, p.in.rows, p.factor.rank, row0 + first_row", "plane, row0 + kTileRows, p.factor.rank, row0 + first_row"))
plant("backward.cu", "writes ranks beyond the gradient", ("plane, p.factor.rank, p.in.cols, rank0", "plane, rank0 + kRanks, p.in.cols, rank0"))
plant("backward.cu", "reads rows beyond dx", ("if (row0 + row < p.dx.rows && at < p.dx.cols) {\n              copy", "if (at < p.dx.cols) {\n              copy"))
plant("backward.cu", "reads columns beyond dx", ("if (row0 + row < p.dx.rows && at < p.dx.cols) {\n              copy", "if (row0 + row < p.dx.rows) {\n              copy"))
plant("backward.cu", "writes rows beyond dx", ("if (row0 + row < p.dx.rows && at < p.dx.cols) {\n            copy", "if (at < p.dx.cols) {\n            copy"))
plant("backward.cu", "writes columns beyond dx", ("if (row0 + row < p.dx.rows && at < p.dx.cols) {\n            copy", "if (row0 + row < p.dx.rows) {\n            copy"))
plant("backward.cu", "writes all planes of ds to the first", ("static_cast<int64_t>(blockIdx.x) * p.in.rows", "static_cast<int64_t>(0) * p.in.rows"))
plant("backward.cu", "writes all planes of the gradient to the first", ("static_cast<int64_t>(blockIdx.y) * p.factor.rank", "static_cast<int64_t>(0) * p.factor.rank"))
plant("backward.cu", "dropout scale of dx forgotten", ("kXPass ? kept : static_cast<S>(scale)", "kXPass ? S(1) : static_cast<S>(scale)"))
plant("backward.cu", "dropout scale of the gradient forgotten", ("kXPass ? kept : S(1)", "S(1)"))
plant("backward.cu", "scale of s forgotten", ("static_cast<S>(kXPass ? 1.0 : scale)", "S(1)"))
plant("backward.cu", "accumulates twice", ("first += to_sum(target[0])", "first += to_sum(target[0]) + to_sum(target[0])"))
plant("backward.cu", "factor of the first block of ranks", ("p.factor, rank0, kRanks", "p.factor, 0, kRanks"))
plant("backward.cu", "s of the first block of ranks", ("kWarpRows, rank0, kRanks", "kWarpRows, 0, kRanks"))
plant("backward.cu", "shared memory 16 bytes short", ("kBytes = BackwardShared<E, kRanks>::kBytes;", "kBytes = BackwardShared<E, kRanks>::kBytes - 16;"))
plant("backward.cu", "factor overlaps s", ("kSAt = kFactorAt + kRanks * kFactorPitch;", "kSAt = kFactorAt + (kRanks - 1) * kFactorPitch;"), ("  static_assert(kBytes == backward_shared(kSize, kRanks));\n", ""))
plant("backward.cu", "dx in the first launch whatever the rank", ("fused = factor.rank > 0 && factor.rank <= shrink_backward_fused_rank(x.dtype)", "fused = factor.rank > 0"))
plant("backward.cu", "the launch for dx does not drop", ("  options.dropout = dropout;\n", ""))
plant("backward.cu", "the launch for dx does not accumulate", ("  options.accumulate = accumulate;\n", ""))
plant("backward.cu", "s of the first warp", ("row0, first_row, kWarpRows,", "row0, 0, kWarpRows,"))
plant("backward.cu", "dx of the first rank fragment", ("a[kHoist ? k / M::kStep : 0], M::b_cols", "a[0], M::b_cols"))
plant("backward.cu", "dx of the first columns of the factor", ("M::b_cols(factor, k, factor_col + n, lane)", "M::b_cols(factor, k, n, lane)"))
plant("backward.cu", "whole vectors of any activations", ("params.in.whole() && params.factor.aligned && (", "params.factor.aligned && ("))
plant("backward.cu", "whole vectors of any pool", ("params.in.whole() && params.factor.aligned && (", "params.in.whole() && ("))
plant("backward.cu", "whole vectors of any dx", (" && (!dx || params.dx.aligned)", ""))

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
plant("fragments.h", "distance between groups ignored", ("col / 8 * group)", "col / 8 * static_cast<int>(8 * sizeof(E)))"))
plant("fragments.h", "sums not cleared", ("block.sum[j][k] = S(0)", "(void)block"))

# ---------------------------------------------------------------------------------------------- tiles.h

plant("tiles.h", "all matrices are aligned", ("m.row_stride, bits % kVector == 0}", "m.row_stride, bits % kVector < kVector}"))
plant("tiles.h", "all shards are whole groups", ("f.shard_size % kGroup == 0 && bits", "bits"))
plant("tiles.h", "all pools are aligned", ("f.shard_size % kGroup == 0 && bits % kVector == 0", "f.shard_size % kGroup == 0 && bits % kVector < kVector"))
plant("tiles.h", "load: the last columns of a row", ("m.aligned && (col + kGroup <= m.cols || !inside)", "m.aligned"))
plant("tiles.h", "load: elements beyond a row", ("inside && col + i < m.cols ? source[i]", "inside ? source[i]"))
plant("tiles.h", "load: no zeros beyond the matrix", ("m.data, inside ? kVector : 0", "m.data, kVector"))
plant("tiles.h", "keep bits of the wrong group", ("static_cast<uint32_t>(col / kDropoutGroup)", "static_cast<uint32_t>(col)"))
plant("tiles.h", "keep bits in reverse", ("<< (2 * w);", "<< (2 * (3 - w));"))
plant("tiles.h", "keeps above the threshold only", ("(threshold - 1) << 16 | 0xFFFFu", "threshold << 16 | 0xFFFFu"))
plant("tiles.h", "drop: halves swapped", ("element % 2 ? mask", "element % 2 == 0 ? mask"))
plant("tiles.h", "pool: offset in the shard", (" + (static_cast<uint32_t>(col) - part * f.shard_size)", " + static_cast<uint32_t>(col)"))
plant("tiles.h", "pool: distance between shards", ("shard * f.pool_stride", "shard * f.shard_size"))
plant("tiles.h", "pool: bad entries are not noticed", ("    bad = true;\n", "    (void)bad;\n"))
plant("tiles.h", "converts in place, writing first", ("bit_cast<float>(word[i]), bit_cast<float>(word[i + 1])", "reinterpret_cast<const float*>(target)[i], bit_cast<float>(word[i + 1])"))
plant("tiles.h", "factor: ranks beyond the table", ("inside = rank < f.rank && col < cols && col0", "inside = col < cols && col0"))
plant("tiles.h", "factor: elements beyond a row", ("if (inside && col + i < f.cols)", "if (inside)"))
plant("tiles.h", "sums: pairs in odd rows", ("if (cols % 2 == 0) {", "if (cols > 0) {"))
plant("tiles.h", "sums: column beyond a row", ("    if (col + 1 < cols) row[col + 1]", "    row[col + 1]"))
plant("tiles.h", "sums: pairs beyond a row", ("    if (col < cols) store_pair", "    store_pair"))
plant("tiles.h", "planes: the first again and again", ("min(k + b, count - 1) * plane", "min(b, 0) * plane"))
plant("tiles.h", "planes: all are aligned", ("          p.cols % kQuad == 0 && reinterpret", "          reinterpret"))
plant("tiles.h", "planes: all start aligned", ("p.cols % kQuad == 0 && reinterpret_cast<uintptr_t>(p.data) % kVector == 0", "p.cols % kQuad == 0"))
plant("tiles.h", "s: rows beyond the planes", ("if (row < p.rows && live > 0)", "if (live > 0)"))
plant("tiles.h", "s: ranks beyond the planes", ("if (row < p.rows && live > 0)", "if (row < p.rows)"))
plant("tiles.h", "s_sum: elements beyond a row", ("          if (j < live) sum_out", "          sum_out"))
plant("tiles.h", "s_sum: scaled", ("sum_out[at + j] = sum[j]", "sum_out[at + j] = sum[j] * scale"))
plant("tiles.h", "s: not scaled", ("sum[2] * scale, sum[3] * scale", "sum[2], sum[3]"))
plant("tiles.h", "load: rows beyond the matrix", ("inside = row < m.rows && col < m.cols;", "inside = col < m.cols;"))
plant("tiles.h", "load: columns beyond the matrix", ("inside = row < m.rows && col < m.cols;", "inside = row < m.rows;"))
plant("tiles.h", "whole: any length of rows", ("return aligned && cols % kGroup == 0;", "return aligned;"))
plant("tiles.h", "copy: the last columns of a row", ("kWhole || (aligned && left >= kGroup)", "kWhole || aligned"))
plant("tiles.h", "copy: elements beyond a row", ("i < min64(kGroup, left)", "i < kGroup"))
plant("tiles.h", "keep bits: halves swapped", ("(word[w] & 1u) | (word[w] >> 30 & 2u)", "(word[w] << 1 & 2u) | (word[w] >> 31)"))
plant("tiles.h", "drops by the lower half of the other element", ("last = (threshold - 1) << 16 | 0xFFFFu", "last = (threshold - 1) << 16"))
plant("tiles.h", "drop: the first vector's mask", ("element = i + w * kStep / 4", "element = w * kStep / 4"))
plant("tiles.h", "drop: half of a wide element", ("half * 0x10001u", "half"))
plant("tiles.h", "factor: bad entries are not noticed", ("  if (bad) trap();\n", ""))
plant("tiles.h", "raw: only half of a wide group", ("if (v * kVector < kGroup * pool_bytes) raw", "if (v * kVector < kGroup * 4) raw"))
plant("tiles.h", "raw: vectors beyond a narrow group", ("    if (v * kVector < kGroup * pool_bytes) raw", "    raw"))
plant("tiles.h", "factor: columns beyond the block", ("inside = rank < f.rank && col < cols && col0 + col < f.cols", "inside = rank < f.rank && col0 + col < f.cols"))
plant("tiles.h", "factor: columns beyond the table", ("rank < f.rank && col < cols && col0 + col < f.cols", "rank < f.rank && col < cols"))
plant("tiles.h", "factor: writes beyond the block", ("          if (first + b * kStride < cols) store_raw", "          store_raw"))
plant("tiles.h", "factor: only the first batch", ("first < cols; first += kBatch * kStride", "first < kBatch * kStride; first += kBatch * kStride"))
plant("tiles.h", "factor: any length: ranks beyond the table", ("inside = rank < f.rank && col0 + col < f.cols;\n          load", "inside = col0 + col < f.cols;\n          load"))
plant("tiles.h", "planes: only the first batch", ("k < count; k += kBatch", "k < 1; k += kBatch"))
plant("tiles.h", "planes: one too many", ("min(k + b, count - 1) * plane", "min(k + b, count) * plane"))
plant("tiles.h", "planes: the last again and again", ("k + b < count ? 0xFFFFFFFFu : 0u", "0xFFFFFFFFu"))
plant("tiles.h", "planes: odd ones: only the first", ("for (int k = 0; k < count; ++k)", "for (int k = 0; k < 1; ++k)"))
plant("tiles.h", "planes: elements beyond a row", ("        if (j < live) sum[j]", "        sum[j]"))

# ---------------------------------------------------------------------------------------------- heuristics.h

plant("heuristics.h", "rows of shared memory not aligned", ("{ return cols * size + 16; }", "{ return cols * size + 8; }"))
plant("heuristics.h", "rows of shared memory in the same banks", ("{ return cols * size + 16; }", "{ return cols * size; }"))
plant("heuristics.h", "shrink: no room for a wider pool", ("kGroup * (size > pool_size ? size : pool_size)", "kGroup * size"))
plant("heuristics.h", "shrink: table too small", ("+ kTableEntries * 4;", "+ kTableEntries * 2;"))
plant("heuristics.h", "expand: no room for the bias", ("kExpandCols / kGroup) + columns * sum_size", "kExpandCols / kGroup)"))
plant("heuristics.h", "last part forgotten", ("return {ceil_div(tiles, size), size}", "return {max64(1, tiles / size), size}"))
plant("heuristics.h", "shrink: last rows forgotten", ("ceil_div(rows, shrink_rows(element_size, ranks)), rank", "max64(1, rows / shrink_rows(element_size, ranks)), rank"))
plant("heuristics.h", "backward: last columns forgotten", ("max64(1, ceil_div(cols, width))", "max64(1, cols / width)"))
plant("heuristics.h", "expand: last columns forgotten", ("max64(1, ceil_div(column_tiles, tiles))", "max64(1, column_tiles / tiles)"))
plant("heuristics.h", "gather: address and distance ignored", ("static_cast<uint64_t>(segment_bytes) | static_cast<uint64_t>(pool_stride_bytes) | source | target;", "static_cast<uint64_t>(segment_bytes) | ((pool_stride_bytes | source | target) & 0);"))
plant("heuristics.h", "gather: always 16 bytes", ("if (all % width == 0) return width", "if (all % width < 16) return width"))
plant("heuristics.h", "divider: one too few", ("(power + d - 1) / d", "(power - 1) / d"))

# ---------------------------------------------------------------------------------------------- sum.cu, gather.cu

plant("sum.cu", "threads beyond the end", ("  if (first >= one.elements) return;\n", ""))
plant("sum.cu", "writes beyond the end", ("    if (i < live) one.out", "    one.out"))
plant("sum.cu", "all planes are aligned", ("elements % kQuad == 0 && reinterpret", "reinterpret"))
plant("sum.cu", "all planes start aligned", ("elements % kQuad == 0 && reinterpret_cast<uintptr_t>(p.data) % kVector == 0", "elements % kQuad == 0"))
plant("sum.cu", "only the first sum", ("p.sum[blockIdx.y]", "p.sum[0]"))
plant("sum.cu", "planes at the distance of a row", ("first, one.elements, one.count", "first, 1, one.count"))
plant("gather.cu", "gather: words beyond a segment", ("  if (word >= p.segment_words) return;\n", ""))
plant("gather.cu", "gather: bad entries are not noticed", ("    if (shard < 0 || shard >= p.num_shards) trap();", "    //"))
plant("gather.cu", "gather: only the first block of words", ("word = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x", "word = threadIdx.x"))
plant("gather.cu", "gather: only as many segments as blocks", ("q < p.segments; q += gridDim.x", "q < gridDim.x; q += gridDim.x"))
plant("gather.cu", "scatter: entries beyond the table", ("index = first + lane < module.entries ? module.index[first + lane] : -1", "index = module.index[first + lane]"))
plant("gather.cu", "scatter: only the first of 32 entries", ("bits; bits &= bits - 1", "bits; bits = 0"))
plant("gather.cu", "scatter: in descending order", ("first + __ffs(static_cast<int>(bits)) - 1", "first + 31 - __builtin_clz(bits)"), ("bits &= bits - 1", "bits &= ~(1u << (31 - __builtin_clz(bits)))"))
plant("gather.cu", "scatter: modules in reverse", ("p.module[k];", "p.module[p.count - 1 - k];"))
plant("gather.cu", "scatter: columns beyond a shard", ("          if (!mine) continue;\n", ""))
plant("gather.cu", "scatter: writes beyond a shard", ("      if (mine) out[", "      out["))
plant("gather.cu", "scatter: rows are contiguous", ("row * module.row_stride", "row * module.shards_per_vector * p.shard_size"))
plant("gather.cu", "scatter: the first modules again", ("modules[first + k];\n      params", "modules[k];\n      params"))
plant("gather.cu", "scatter: later launches overwrite", ("params.accumulate = first > 0", "params.accumulate = false"))
plant("gather.cu", "scatter: four columns of any shard", ("bool all = pool_grad.cols % 4 == 0;", "bool all = true;"))
plant("gather.cu", "scatter: only the first block of columns", ("(blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x) * kColumns", "threadIdx.x * kColumns"))
plant("gather.cu", "scatter: only as many shards as blocks", ("shard < p.num_shards; shard += gridDim.x", "shard < gridDim.x; shard += gridDim.x"))
plant("gather.cu", "scatter: bad entries are not noticed", ("        if (first + lane < module.entries && (index < 0 || index >= p.num_shards)) trap();\n", ""))
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
plant("backward.cu", "early: the dy pass does not wait", ("  if (!kXPass) wait_for_launch_before();\n", ""), (LET, ""))
plant("backward.cu", "early: lets the next launch start before it waits", (WAIT_DX + LET, LET + WAIT_DX))
plant("sum.cu", "early: waits after it has added", ("  wait_for_launch_before();\n" + LET, ""), ("  write_quad(one", "  wait_for_launch_before();\n  write_quad(one"), ("  if (first >= one.elements) return;\n", "  if (first >= one.elements) return wait_for_launch_before();\n"))
plant("sum.cu", "early: threads beyond the end do not wait", ("  wait_for_launch_before();\n" + LET + "  if (first >= one.elements) return;\n", "  if (first >= one.elements) return;\n  wait_for_launch_before();\n"))
plant("sum.cu", "early: does not wait", ("  wait_for_launch_before();\n" + LET, ""))

# fmt: on

assert len({str(m) for m in MUTANTS}) == len(MUTANTS)

# Mutants that change nothing that a test could observe, and why. They run in the first flavour only.
EQUIVALENT = {
    "expand: visits column tiles beyond y": "every access looks at its columns; saves time",
    "tiles: whole: any length of rows": "all kernels also ask for whole, aligned shards, of which rows are made",
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
    kernels = Kernels(library)
    seeds = range(SEEDS[flavour])
    try:
        case = "gather"
        grid.check_gather(kernels, seeds)
        case = "chains"
        grid.check_chains(kernels, seeds, 2 if flavour == "tsan" else 6)
        case = "index out of range"
        for entry, aligned in itertools.product((-1, 8), (True, False)):
            test_cuda_kernels.test_an_index_out_of_range_stops_every_kernel(kernels, entry, aligned)
        for case in CASES if flavour == "plain" else CASES[:-2]:  # the last ones are long
            grid.check(kernels, case, seeds)
    except (Exception, pytest.fail.Exception) as error:
        said = str(error).removeprefix(f"{case} ")
        # The emulator's messages: which thread said it is of no interest here.
        print(f"{case}: {re.sub(r'status [0-9]+: |block .*? lane [0-9]+]: ', '', said)}".replace("\n", " "))
        sys.exit(1)


def verdict(root, flavour):
    """What a run in a flavour says of the library in root; empty where it finds nothing."""
    script = root / "tests" / "cuda_emulator" / Path(__file__).name
    command = [sys.executable, script, "--examine", root / f"{flavour}.so", "--flavour", flavour]
    try:
        done = emulator.run_sanitized(flavour, command, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return ""
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
            build(base, root, mutant.file if mutant else "", flavour)
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
