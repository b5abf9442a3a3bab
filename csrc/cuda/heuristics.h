// Tile sizes and launch geometry. Pure functions of shapes, so that a machine without a GPU can test them, and so that
// a result does not depend on which GPU computed it.
#pragma once

#include <cstdint>

#include "../common/numeric.h"
#include "../common/params.h"

namespace mos::cuda {

constexpr int kWarp = 32;

// The low-rank kernels: four warps, each owning 16 of a tile's 64 rows.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kWarpRows = 16;
constexpr int kTileRows = kWarps * kWarpRows;
// Columns travel in groups of eight: one 16-byte vector of 16-bit elements, and one Philox block of dropout bits.
constexpr int kGroup = 8;

// The most blocks that splitting makes of a launch: two for each of an H200's 132 multiprocessors, for more would wait
// for a second wave. A constant, since the sums of a split must not depend on the GPU.
constexpr int64_t kTargetBlocks = 264;

// Rows in groups are cut into parts of at most `part` rows, each of one group. Part j of the group that begins at row b
// is block b / part + g + j: no two are the same, whatever the ends, and ceil(rows / part) + groups are enough. Where
// groups are few or even, some of them have nothing to do.
constexpr int64_t kMaxGroups = 65000, kMaxPlaces = int64_t{1} << 30;
inline int64_t group_blocks(int64_t rows, int64_t part, int64_t groups) { return ceil_div(rows, part) + groups; }

// shrink: rows and columns of a tile of x, 8 KiB; cp.async stages in flight. With 64 ranks the way of F through L2 and
// shared memory costs more than that of x: twice the rows share it.
MOS_HOST_DEVICE constexpr int shrink_rows(int element_size, int ranks) {
  return element_size == 2 && ranks == 64 ? 128 : kTileRows;
}
MOS_HOST_DEVICE constexpr int shrink_cols(int element_size, int ranks) {
  return 128 / element_size * kTileRows / shrink_rows(element_size, ranks);
}
constexpr int kShrinkStages = 3;
// Stages of F as the pool stores it: who copied it converts it before the next copy but one.
constexpr int kRawStages = 2;
// Planes cost expand a read each, for every block of columns. Of the few rows of decoding they are small, and what
// counts is that many multiprocessors fetch the factor.
constexpr int64_t max_shrink_planes(int64_t rows) { return rows <= 4 ? 128 : 32; }
// Entries of the index table that shrink keeps in shared memory; longer tables are read through L1.
constexpr int kTableEntries = 1024;

// expand: columns of a tile of y, and the most tiles that one block keeps the factor of.
constexpr int kExpandCols = 64;
MOS_HOST_DEVICE constexpr int max_expand_tiles(int element_size) { return element_size == 8 ? 4 : 8; }

// backward: columns of a tile, the ranks that a block handles (more ranks take more blocks) and the column tiles whose
// gradient it keeps in registers. 16-bit elements have two sizes of rank: the wide one would waste three quarters of
// its products on the usual r <= 16.
MOS_HOST_DEVICE constexpr int backward_cols(int element_size) { return element_size == 2 ? 128 : 64; }
MOS_HOST_DEVICE constexpr int backward_tiles(int element_size, int ranks) {
  return element_size == 2 ? (ranks == 16 ? 4 : 2) : element_size == 4 ? 2 : 1;
}
MOS_HOST_DEVICE constexpr int backward_stages(int element_size) { return element_size == 8 ? 2 : 3; }
// A part of fewer row tiles would write more partial gradients than it reads activations.
constexpr int64_t kMinBackwardTiles = 2;

// Ranks of a block.
MOS_HOST_DEVICE constexpr int wide_ranks(int element_size) {
  return element_size == 2 ? 64 : element_size == 4 ? 32 : 16;
}
MOS_HOST_DEVICE constexpr int narrow_ranks(int element_size) {
  return element_size == 2 ? 16 : wide_ranks(element_size);
}
inline int ranks_for(int64_t rank, int element_size) {
  return rank <= narrow_ranks(element_size) ? narrow_ranks(element_size) : wide_ranks(element_size);
}

// `tiles` tiles dealt to parts of equal size, but for the last.
struct Parts {
  int64_t count;
  int64_t tiles;  // of a part
};
// At most kTargetBlocks blocks when every part exists `others` times, and max_parts parts of at least min_tiles.
inline Parts split(int64_t tiles, int64_t others, int64_t max_parts, int64_t min_tiles = 1) {
  if (tiles <= 0) return {1, 0};
  const int64_t wanted = max64(1, kTargetBlocks / max64(1, others));
  const int64_t parts = min64(min64(wanted, max_parts), max64(1, tiles / min_tiles));
  const int64_t size = ceil_div(tiles, parts);
  return {ceil_div(tiles, size), size};
}

// The pitch in bytes of a matrix in shared memory with `cols` (a multiple of 16) columns of `size` bytes: an odd
// multiple of 16, so that the eight rows of an ldmatrix fall into different banks.
MOS_HOST_DEVICE constexpr int pitch_of(int cols, int size) { return cols * size + 16; }

// Shared memory of a block, in bytes. All stay below the 99 KiB that sm_86, sm_89 and sm_120 allow.
constexpr int max_pool_bytes(int size) { return size > 4 ? size : 4; }
// shrink: stages of x, stages of F as a pool of `pool_size` bytes stores it, two of F as E, and the index table.
constexpr int shrink_shared(int size, int ranks, int pool_size) {
  const int cols = shrink_cols(size, ranks), pitch = pitch_of(cols, size);
  return kShrinkStages * shrink_rows(size, ranks) * pitch + kRawStages * ranks * cols * pool_size + 2 * ranks * pitch +
         kTableEntries * 4;
}
// A word of dropout decisions for each group of a tile.
MOS_HOST_DEVICE constexpr int mask_bytes(int cols) { return kTileRows * cols / kGroup * 4; }
// expand: F, s, y, the bias and masks.
constexpr int expand_shared(int size, int ranks, int column_tiles) {
  const int columns = column_tiles * kExpandCols, sum_size = size == 8 ? 8 : 4;
  return ranks * pitch_of(columns, size) + kTileRows * (pitch_of(ranks, size) + pitch_of(kExpandCols, size)) +
         columns * sum_size + mask_bytes(kExpandCols);
}
// backward: stages of activations, F, s and masks.
constexpr int backward_shared(int size, int ranks) {
  const int cols = backward_cols(size);
  return backward_stages(size) * kTileRows * pitch_of(cols, size) +
         ranks * pitch_of(backward_tiles(size, ranks) * cols, size) + kTileRows * pitch_of(ranks, size) +
         mask_bytes(cols);
}

// What geometry may know of rows in groups: how many groups there are, never where one ends. One group is cut as rows
// without groups are.
struct Grouping {
  int64_t count = 1;
  bool invariant = false;  // sums of a row are cut by columns and ranks alone
};
inline Grouping grouping_of(const Groups& groups) {
  return groups ? Grouping{max64(1, groups.count), groups.invariant} : Grouping{};
}
// Rows of S for a matrix.
inline int64_t places_of(const Matrix& m, const Groups& groups) { return groups ? groups.places : m.rows; }
// The most tiles with rows: every group may begin a new one, and each has a row.
inline int64_t busy_tiles(int64_t rows, int64_t tile, const Grouping& in) {
  return min64(rows, ceil_div(rows, tile) + in.count - 1);
}
// Where a row's result may not depend on others its sums over columns are cut into so many parts, for one row and for
// thousands: enough that a few sequences keep a GPU busy, and few enough that many do not drown in planes.
constexpr int64_t kInvariantPlanes = 8;

struct ShrinkGeometry {
  int ranks;            // of a block
  int64_t row_tiles;    // grid x
  Parts columns;        // grid y, in tiles of shrink_cols
  int64_t rank_blocks;  // grid z
};
inline ShrinkGeometry shrink_geometry(int64_t rows, int64_t cols, int64_t rank, int element_size,
                                      const Grouping& in = {}) {
  const int ranks = ranks_for(rank, element_size);
  const int64_t rank_blocks = ceil_div(rank, ranks);
  const int64_t row_tiles = busy_tiles(rows, shrink_rows(element_size, ranks), in);
  const int64_t column_tiles = ceil_div(cols, shrink_cols(element_size, ranks));
  const Parts columns = in.invariant ? split(column_tiles, rank_blocks, kInvariantPlanes)
                                     : split(column_tiles, row_tiles * rank_blocks, max_shrink_planes(rows));
  return {ranks, row_tiles, columns, rank_blocks};
}

struct ExpandGeometry {
  int ranks;         // of one step of the sum over ranks
  int column_tiles;  // of a block
  int64_t column_blocks;
  Parts rows;  // in tiles of kTileRows
};
inline ExpandGeometry expand_geometry(int64_t rows, int64_t cols, int64_t rank, int element_size,
                                      const Grouping& in = {}) {
  const int ranks = ranks_for(rank, element_size);
  const int64_t row_tiles = ceil_div(rows, kTileRows), column_tiles = ceil_div(cols, kExpandCols);
  // Wide blocks share the sums of s; but first there must be blocks for every multiprocessor. A factor of more ranks
  // than one step is read again for every tile, so there sharing is of no use.
  const int64_t shared = rank > ranks ? 1
                                      : min64(max_expand_tiles(element_size),
                                              ceil_div(column_tiles * busy_tiles(rows, kTileRows, in), kTargetBlocks));
  const int64_t tiles = max64(1, shared), column_blocks = max64(1, ceil_div(column_tiles, tiles));
  return {ranks, static_cast<int>(tiles), column_blocks, split(row_tiles, column_blocks, row_tiles)};
}

struct BackwardGeometry {
  int ranks;              // of a block
  int column_tiles;       // of a block
  int64_t column_blocks;  // grid x: planes of dS
  Parts rows;             // grid y, in tiles of kTileRows: planes of dF
  int64_t rank_blocks;    // grid z
};
inline BackwardGeometry backward_geometry(int64_t rows, int64_t cols, int64_t rank, int element_size,
                                          const Grouping& in = {}) {
  const int ranks = ranks_for(rank, element_size);
  const int64_t column_tiles = max64(1, ceil_div(cols, backward_cols(element_size)));
  const int64_t row_tiles = ceil_div(rows, kTileRows), rank_blocks = ceil_div(rank, ranks);
  // A block as wide as its registers allow writes the fewest planes of dS and reads the fewest of S. Where that leaves
  // multiprocessors idle, the width shrinks before the rows are cut: a plane of dS weighs rows * rank, one of dF
  // cols * rank, and there are fewer rows.
  int64_t width = backward_tiles(element_size, ranks);
  const int64_t most_parts = max64(1, row_tiles / kMinBackwardTiles) + in.count - 1;
  while (!in.invariant && width > 1 && 2 * ceil_div(column_tiles, width) * most_parts * rank_blocks <= kTargetBlocks) {
    width /= 2;
  }
  const int64_t column_blocks = ceil_div(column_tiles, width);
  return {ranks, static_cast<int>(width), column_blocks,
          split(row_tiles, column_blocks * rank_blocks, max64(1, row_tiles), kMinBackwardTiles), rank_blocks};
}

constexpr int kQuad = 4;  // sums that a thread adds at a time
// Whether so few sums are read that the threads of a block of expand share the planes of each.
MOS_HOST_DEVICE constexpr bool few_sums(int64_t elements) { return 2 * elements <= kThreads * kQuad; }

// Whether `planes` planes of `elements` sums are better added by a launch of their own than by each of their `readers`.
// A launch costs about 2.5 us. In that time a large GPU moves about 12 MB through L2, and a thread that reads planes
// two or four at a time goes through 16 of them, unless they are `shared` (estimates, not measured yet).
constexpr int64_t kLaunchBytes = 12 << 20, kLaunchPlanes = 16;
inline bool sum_first(int64_t planes, int64_t readers, int64_t elements, bool shared) {
  const int64_t here = planes * readers, there = planes + readers;
  return planes > 1 && ((planes >= kLaunchPlanes && !shared) || (here - there) * elements * 4 > kLaunchBytes);
}

// n / d for n < 2^31 by a multiplication: with 2^(s-1) < d <= 2^s and m = ceil(2^(31+s) / d), n * m / 2^(31+s) exceeds
// n / d by less than n / 2^(31+s) < 1 / d.
struct Divider {
  uint32_t multiplier;
  int32_t shift;
};
inline Divider divider(uint32_t d) {
  int32_t shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  return {static_cast<uint32_t>(d ? (power + d - 1) / d : 0), 31 + shift};
}
MOS_HOST_DEVICE uint32_t divide(uint32_t n, const Divider& by) {
  return static_cast<uint32_t>(static_cast<uint64_t>(n) * by.multiplier >> by.shift);
}

// Columns are counted in 31 bits within a row; rows and pools in 64. In groups, rows are counted in 31 bits too, as
// their ends are, and a block for each must fit in a grid beside those of split rows.
inline bool representable(const Factor& f, const Groups& groups = {}) {
  return f.cols() <= INT32_MAX && f.rank <= 65535 && groups.count <= kMaxGroups && groups.places <= kMaxPlaces;
}

// Threads of a block that walks `elements` contiguous elements, one each: whole warps, 64 to 256. Below 64 a block no
// longer hides the latency of its first load; above 256 the last, partly idle block costs more than the wider ones
// save.
inline int threads_for(int64_t elements) {
  if (elements <= 64) return 64;
  if (elements >= 256) return 256;
  return static_cast<int>(round_up(elements, kWarp));
}

// Bytes that one thread copies at a time: the widest of 16, 8, 4, 2 that divides the segment, the distance between two
// shards and both addresses.
inline int copy_width(int64_t segment_bytes, int64_t pool_stride_bytes, uint64_t source, uint64_t target) {
  const uint64_t all =
      static_cast<uint64_t>(segment_bytes) | static_cast<uint64_t>(pool_stride_bytes) | source | target;
  for (int width = 16; width > 2; width /= 2) {
    if (all % width == 0) return width;
  }
  return 2;
}

}  // namespace mos::cuda
