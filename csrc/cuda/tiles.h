// Tiles on their way between global and shared memory, in groups of eight columns.
//
// Everywhere: what lies outside a matrix is read as zeros and never written. Matrices whose address and rows are
// aligned to 16 bytes travel in vectors, others element by element; the arithmetic does not know the difference.
// Whole variants (variants.h) are compiled for nothing but whole, aligned groups.
#pragma once

#include "../common/philox.h"
#include "fragments.h"
#include "heuristics.h"
#include "variants.h"

namespace mos::cuda {

constexpr int kVector = 16;  // bytes

inline int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---------------------------------------------------------------------------------------------- activations

template <class E>
struct Rows {
  E* data;
  int64_t rows, cols, stride;
  bool aligned;  // every group of eight columns starts at a multiple of 16 bytes
  // Of rows in groups: places are counted, up to `rows`; place t is row map[t] of `mapped`, or row t.
  const int32_t* map = nullptr;
  int32_t mapped = 0;

  // For whole variants: rows are counted, and the rows of a tile reached, in 31 bits.
  bool whole() const {
    constexpr int64_t kReach = INT32_MAX / (2 * kTileRows * sizeof(E));
    return aligned && cols % kGroup == 0 && rows <= INT32_MAX - 2 * kTileRows && stride <= kReach;
  }
  MOS_DEVICE E* at(int64_t row, int64_t col) const { return data + row * stride + col; }

  // The row of a place below `rows`; -1 where there is none, for a map may be wrong.
  MOS_DEVICE int64_t row_of(int64_t place) const {
    if (!map) return place;
    const int32_t row = map[place];
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(mapped) ? row : -1;
  }
};
template <class E>
Rows<E> rows_of(const Matrix& m) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(m.data) | static_cast<uint64_t>(m.row_stride) * sizeof(E);
  return {static_cast<E*>(m.data), m.rows, m.cols, m.row_stride, bits % kVector == 0};
}

// A warp's share of a tile: kRows of its rows, each of kGroups groups of columns, dealt to the lanes so that eight
// lanes write eight different bank groups of shared memory: along a row where it fills them, else down the rows.
template <int kRows_, int kGroups>
struct Share {
  static constexpr int kRows = kRows_;
  static constexpr int kStep = kWarp / kGroups;  // rows between a lane's groups
  static constexpr int kOwn = kRows / kStep;     // groups of a lane
  static_assert(kWarp % kGroups == 0 && kRows % kStep == 0);

  int row, col;  // of the first, in the tile; the others are below it

  MOS_DEVICE Share(int first_row, int lane)
      : row(first_row + (kGroups < 8 ? lane % kStep : lane / kGroups)),
        col((kGroups < 8 ? lane / kStep : lane % kGroups) * kGroup) {}

  // Of the tile's groups, row by row, that of group j.
  MOS_DEVICE int number(int j) const { return (row + j * kStep) * kGroups + col / kGroup; }
};

// The rows of places `place` and on, kStep apart, of which `left` exist; -1 for those that do not. All are looked up
// before any is used, for their trips to L2 overlap.
template <int kOwn, int kStep, class E>
MOS_DEVICE void find_rows(int32_t (&row)[kOwn], const Rows<E>& m, int place, int left) {
#pragma unroll
  for (int j = 0; j < kOwn; ++j) row[j] = j * kStep < left ? m.map[place + j * kStep] : -1;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) row[j] = static_cast<uint32_t>(row[j]) < static_cast<uint32_t>(m.mapped) ? row[j] : -1;
}

// Columns [col, col + 8) of a row into shared memory, asynchronously where that is possible.
template <class E>
MOS_DEVICE void load_group(E* target, const Rows<const E>& m, int64_t row, int64_t col) {
  bool inside = row < m.rows && col < m.cols;
  if (inside) row = m.row_of(row), inside = row >= 0;
  const E* source = m.at(row, col);
  if (m.aligned && (col + kGroup <= m.cols || !inside)) {
    const uint32_t shared = shared_address(target);
    constexpr int kStep = kVector / sizeof(E);
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) {
      cp_async_16(shared + i * sizeof(E), inside ? source + i : m.data, inside ? kVector : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kGroup; ++i) target[i] = inside && col + i < m.cols ? source[i] : E{};
  }
}

// A share of the tile at (row0, col0) of a matrix into shared memory.
template <Variant kVariant, class Share, class E>
MOS_DEVICE void load_share(const SharedMatrix<E>& tile, const Share& share, const Rows<const E>& m, int64_t row0,
                           int64_t col0) {
  if constexpr (kVariant & kWhole) {
    // One address and one count of rows; what steps down from them is known when compiled, but for the stride.
    const int rows = static_cast<int>(m.rows) - (static_cast<int>(row0) + share.row);
    const bool inside = static_cast<int>(col0) + share.col < static_cast<int>(m.cols);
    const E* source = m.at(row0 + share.row, col0 + share.col);
    const int step = static_cast<int>(m.stride) * Share::kStep;
    const uint32_t target = shared_address(tile.at(share.row, share.col));
#pragma unroll
    for (int j = 0; j < Share::kOwn; ++j) {
      const int down = j * Share::kStep;
      cp_async_16(target + down * tile.pitch, source + static_cast<int64_t>(j) * step,
                  inside && down < rows ? kVector : 0);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Share::kOwn; ++j) {
      const int row = share.row + j * Share::kStep;
      load_group(tile.at(row, share.col), m, row0 + row, col0 + share.col);
    }
  }
}

// The same, whole, of rows that find_rows has found.
template <class Share, class E>
MOS_DEVICE void load_rows(const SharedMatrix<E>& tile, const Share& share, const Rows<const E>& m,
                          const int32_t (&row)[Share::kOwn], int64_t col0) {
  const bool inside = static_cast<int>(col0) + share.col < static_cast<int>(m.cols);
  const E* source = m.data + (col0 + share.col);
  const uint32_t target = shared_address(tile.at(share.row, share.col));
#pragma unroll
  for (int j = 0; j < Share::kOwn; ++j) {
    cp_async_16(target + j * Share::kStep * tile.pitch, source + int64_t{max(row[j], 0)} * m.stride,
                inside && row[j] >= 0 ? kVector : 0);
  }
}

// Eight elements between global and shared memory, either way; or as many as are left of a row of a global matrix.
template <class E>
MOS_DEVICE void copy_group(E* target, const E* source, bool aligned, int64_t left) {
  if (aligned && left >= kGroup) {
    constexpr int kStep = kVector / sizeof(E);
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) store_16(target + i, load_16(source + i));
  } else {
#pragma unroll 1
    for (int i = 0; i < min64(kGroup, left); ++i) target[i] = source[i];
  }
}

// What is in a global matrix already, into a share of a tile that will be added to it; kBatch loads in flight.
template <Variant kVariant, int kBatch, class Share, class E>
MOS_DEVICE void fetch_share(const SharedMatrix<E>& tile, const Share& share, const Rows<E>& m, int64_t row0,
                            int64_t col0) {
  const int64_t col = col0 + share.col;
  if constexpr (kVariant & kMapped) {
    const int place = static_cast<int>(row0) + share.row;
    int32_t row[Share::kOwn];
    find_rows<Share::kOwn, Share::kStep>(row, m, place, col < m.cols ? static_cast<int>(m.rows) - place : 0);
#pragma unroll
    for (int first = 0; first < Share::kOwn; first += kBatch) {
      uint4 old[kBatch] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (row[first + j] >= 0) old[j] = load_16(m.at(row[first + j], col));
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) store_16(tile.at(share.row + (first + j) * Share::kStep, share.col), old[j]);
    }
  } else if constexpr (kVariant & kWhole) {
    const int rows = col < m.cols ? static_cast<int>(m.rows) - (static_cast<int>(row0) + share.row) : 0;
    const E* source = m.at(row0 + share.row, col);
    const int step = static_cast<int>(m.stride) * Share::kStep;
#pragma unroll
    for (int first = 0; first < Share::kOwn; first += kBatch) {
      uint4 old[kBatch] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if ((first + j) * Share::kStep < rows) old[j] = load_16(source + static_cast<int64_t>(first + j) * step);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) store_16(tile.at(share.row + (first + j) * Share::kStep, share.col), old[j]);
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < Share::kOwn; ++j) {
      const int down = share.row + j * Share::kStep;
      if (row0 + down >= m.rows || col >= m.cols) continue;
      const int64_t row = m.row_of(row0 + down);
      if (row >= 0) copy_group(tile.at(down, share.col), m.at(row, col), m.aligned, m.cols - col);
    }
  }
}

// ---------------------------------------------------------------------------------------------- dropout

// The factor that kept elements are multiplied by: 1 / (1 - p), and 0 with p = 1.
inline double keep_scale(const DeviceDropout& d) { return Dropout{0, d.threshold}.keep_scale(); }

// Dropout as a kernel sees it: the seed, read once, and the threshold twice in one word, as its distance from 2^16.
struct DropoutRule {
  uint64_t seed;
  uint32_t distance;

  // threshold is not 0, or nobody asks.
  MOS_DEVICE DropoutRule(const int64_t* seed, uint32_t threshold)
      : seed(threshold ? static_cast<uint64_t>(*seed) : 0), distance((0x10000u - threshold) * 0x10001u) {}
};

// 16 ones for each kept element of a group, in order.
struct KeepMask {
  uint32_t word[4];
};

// Of the eight columns of a group of a row. An element is kept when its 16 bits and the distance carry into a 17th. Two
// elements at a time: the upper half of their sum, (a & b) + (a ^ b) / 2, carries into nothing, and its sign is the bit
// we want.
template <class Row>
MOS_DEVICE KeepMask keep_mask(const DropoutRule& rule, Row row, uint32_t group) {
  const PhiloxBlock block = philox(rule.seed, group, row);
  KeepMask mask;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t bits = block.word[w];
    mask.word[w] = spread_signs((bits & rule.distance) + (((bits ^ rule.distance) & 0xFFFEFFFEu) >> 1));
  }
  return mask;
}

// A mask in one word: byte i has the lower half from element i, the upper half from element i + 4.
MOS_DEVICE uint32_t packed(const KeepMask& mask) {
  return (odd_bytes(mask.word[0], mask.word[1]) & 0x0F0F0F0Fu) | (odd_bytes(mask.word[2], mask.word[3]) & 0xF0F0F0F0u);
}
MOS_DEVICE KeepMask unpacked(uint32_t mask) {
  const uint32_t low = mask << 4;
  return {{twice_signs_low(low), twice_signs_high(low), twice_signs_low(mask), twice_signs_high(mask)}};
}

// Zeroes the dropped elements of a group in shared memory; the scale of the kept ones goes onto the sums.
template <class E>
MOS_DEVICE void drop_group(E* group, const KeepMask& mask) {
  constexpr int kStep = kVector / sizeof(E);
#pragma unroll
  for (int i = 0; i < kGroup; i += kStep) {
    const uint4 v = load_16(group + i);
    uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int element = i + w * kStep / 4;
      const uint32_t half = element % 2 ? mask.word[element / 2] >> 16 : mask.word[element / 2] & 0xFFFFu;
      word[w] &= sizeof(E) == 2 ? mask.word[element / 2] : half * 0x10001u;
    }
    store_16(group + i, {word[0], word[1], word[2], word[3]});
  }
}

// Of a share of the tile at (row0, col0), kAtOnce groups at a time to hide each other's latency. Where `masks` is not
// null, a word of each group is left there for store_share. With kDrops false that is all.
template <Variant kVariant, int kAtOnce, bool kDrops = true, class Share, class E>
MOS_DEVICE void drop_share(const SharedMatrix<E>& tile, const Share& share, const DropoutRule& rule, int64_t row0,
                           int64_t col0, uint32_t* masks) {
  const uint32_t group = static_cast<uint32_t>(col0 + share.col) / kGroup;
#pragma unroll((kVariant & kWhole) ? kAtOnce : 1)
  for (int j = 0; j < Share::kOwn; ++j) {
    const int row = share.row + j * Share::kStep;
    // Rows counted in 32 bits spare the first rounds of Philox half their products.
    const KeepMask mask = kVariant & kWhole ? keep_mask(rule, static_cast<uint32_t>(row0) + row, group)
                                            : keep_mask(rule, static_cast<uint64_t>(row0 + row), group);
    if constexpr (kDrops) drop_group(tile.at(row, share.col), mask);
    if (masks) masks[share.number(j)] = packed(mask);
  }
}

// ---------------------------------------------------------------------------------------------- the way out

// Kept elements of a group, and the others' from another.
MOS_DEVICE uint4 merge(const uint4& kept, const KeepMask& mask, const uint4& other) {
  return {(kept.x & mask.word[0]) | (other.x & ~mask.word[0]), (kept.y & mask.word[1]) | (other.y & ~mask.word[1]),
          (kept.z & mask.word[2]) | (other.z & ~mask.word[2]), (kept.w & mask.word[3]) | (other.w & ~mask.word[3])};
}

// A share of a tile from shared memory into the tile at (row0, col0) of a matrix, in whole groups. With the `masks`
// that drop_share left, dropped elements leave as zeros, or, where the tile was added to what is there, as what is
// there.
template <Variant kVariant, class Share, class E>
MOS_DEVICE void store_share(const Rows<E>& m, int64_t row0, int64_t col0, const SharedMatrix<E>& tile,
                            const Share& share, const uint32_t* masks, bool accumulate) {
  const int64_t col = col0 + share.col;
  if constexpr (kVariant & kMapped) {
    const int place = static_cast<int>(row0) + share.row;
    int32_t row[Share::kOwn];
    find_rows<Share::kOwn, Share::kStep>(row, m, place, col < m.cols ? static_cast<int>(m.rows) - place : 0);
    static_assert(!(kVariant & kDropout), "a variant that nobody needs");
#pragma unroll
    for (int j = 0; j < Share::kOwn; ++j) {
      if (row[j] >= 0) store_16(m.at(row[j], col), load_16(tile.at(share.row + j * Share::kStep, share.col)));
    }
  } else if constexpr (kVariant & kWhole) {
    const int rows = col < m.cols ? static_cast<int>(m.rows) - (static_cast<int>(row0) + share.row) : 0;
    E* target = m.at(row0 + share.row, col);
    const int step = static_cast<int>(m.stride) * Share::kStep;
#pragma unroll((kVariant & kDropout) && (kVariant & (kAccumulate | kGrouped)) ? 2 : Share::kOwn)
    for (int j = 0; j < Share::kOwn; ++j) {
      if (j * Share::kStep >= rows) continue;
      E* to = target + static_cast<int64_t>(j) * step;
      uint4 v = load_16(tile.at(share.row + j * Share::kStep, share.col));
      if constexpr (kVariant & kDropout) {
        const bool adds = does<kVariant, kAccumulate>(accumulate);
        v = merge(v, unpacked(masks[share.number(j)]), adds ? load_16(to) : uint4{0, 0, 0, 0});
      }
      store_16(to, v);
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < Share::kOwn; ++j) {
      const int down = share.row + j * Share::kStep;
      if (row0 + down >= m.rows || col >= m.cols) continue;
      const int64_t row = m.row_of(row0 + down);
      if (row < 0) continue;
      E *source = tile.at(down, share.col), *target = m.at(row, col);
      if (masks) {
        const uint32_t mask = masks[share.number(j)];
#pragma unroll 1
        for (int i = 0; i < min64(kGroup, m.cols - col); ++i) {
          if (!(mask >> (i < 4 ? 8 * i : 8 * i - 28) & 1)) source[i] = accumulate ? target[i] : E{};
        }
      }
      copy_group(target, source, m.aligned, m.cols - col);
    }
  }
}

// Zeros in `rows` rows from row0 on, columns [col0, col0 + cols): all threads of the block together.
template <class E>
MOS_DEVICE void zero_rows(const Rows<E>& m, int64_t row0, int rows, int64_t col0, int cols) {
  const int groups = static_cast<int>(ceil_div(min64(cols, m.cols - col0), kGroup));
  for (int i = threadIdx.x; i < rows * groups; i += kThreads) {
    const int64_t col = col0 + i % groups * kGroup;
    E* target = m.at(row0 + i / groups, col);
    if (m.aligned && m.cols - col >= kGroup) {
      constexpr int kStep = kVector / sizeof(E);
#pragma unroll
      for (int k = 0; k < kGroup; k += kStep) store_16(target + k, {0, 0, 0, 0});
    } else {
#pragma unroll 1
      for (int k = 0; k < min64(kGroup, m.cols - col); ++k) target[k] = E{};
    }
  }
}

// ---------------------------------------------------------------------------------------------- groups

// Groups (params.h) as a kernel sees them, and how long a part of their rows is. Where there are none, ends is null.
struct GroupParams {
  const int32_t *ends, *rows, *ranks;
  const float* scales;
  int32_t count, places, part;
  Divider by_part;
  int64_t table;   // entries of a group's
  bool invariant;  // no sum may depend on how many rows there are
};
inline GroupParams group_params(const Groups& g, const Factor& f, int64_t part) {
  if (!g) return {};
  part = max64(1, min64(part, INT32_MAX));
  return {g.ends,
          g.rows,
          g.ranks,
          g.scales,
          static_cast<int32_t>(g.count),
          static_cast<int32_t>(g.places),
          static_cast<int32_t>(part),
          divider(static_cast<uint32_t>(part)),
          f.rank * f.shards_per_vector,
          g.invariant};
}

// The rows of a block: those of part `part` of a group, [first, last), of its rows [begin, end). Behind the last group
// is one more, `count`: nobody's.
struct GroupRows {
  int32_t group, begin, end, part, first, last;
};

// The last group that begins before row `row * part` or, with `numbered`, before row (row - its number) * part: of the
// blocks of a launch that of block `row` (group_blocks). 32 groups are looked at together, then those between two of
// them, so of a thousand groups twice. Each warp does it for itself, without a barrier.
//
// Ends that decrease, or leave the places, are taken for the nearest that do not: whatever they are, rows belong to one
// group, and each to one block.
MOS_DEVICE GroupRows find_group(const GroupParams& g, uint32_t row, bool numbered, int lane) {
  GroupRows found{0, 0, g.places, 0, 0, 0};
  int size = g.count + 1;
  do {
    const int step = (size + kWarp - 1) / kWarp, own = found.group + lane * step;
    const bool exists = lane * step < size;
    int begin = exists ? found.begin : found.end;
    if (exists && own > 0) begin = min(max(g.ends[own - 1], found.begin), found.end);
#pragma unroll
    for (int down = 1; down < kWarp; down *= 2) {
      const int before = __shfl_sync(0xFFFFFFFFu, begin, lane - down);
      if (lane >= down) begin = max(begin, before);
    }
    const uint32_t key = divide(static_cast<uint32_t>(begin), g.by_part) + (numbered ? static_cast<uint32_t>(own) : 0u);
    const int last = __popc(__ballot_sync(0xFFFFFFFFu, exists && key <= row)) - 1;
    const int next = __shfl_sync(0xFFFFFFFFu, begin, last + 1);
    found.begin = __shfl_sync(0xFFFFFFFFu, begin, last);
    if (last + 1 < kWarp) found.end = next;
    found.group += last * step;
    size = min(step, size - last * step);
  } while (size > 1);
  return found;
}

// Of block `block` of a launch. No rows: first == last.
MOS_DEVICE GroupRows rows_of_block(const GroupParams& g, uint32_t block, int lane) {
  GroupRows rows = find_group(g, block, true, lane);
  rows.part = static_cast<int>(block - divide(static_cast<uint32_t>(rows.begin), g.by_part)) - rows.group;
  rows.first = min(rows.begin + rows.part * g.part, rows.end);
  rows.last = min(rows.first + g.part, rows.end);
  return rows;
}

// How many ranks a group has, of the `rank` of its table; nobody's has none.
MOS_DEVICE int rank_of(const GroupParams& g, const GroupRows& rows, int rank) {
  if (rows.group == g.count) return 0;
  return g.ranks ? min(max(g.ranks[rows.group], 0), rank) : rank;
}

// What the scale is multiplied by.
template <class S>
MOS_DEVICE S scale_of(const GroupParams& g, const GroupRows& rows) {
  return g.scales && rows.group < g.count ? static_cast<S>(g.scales[rows.group]) : S(1);
}

// A matrix up to the last row of a block.
template <class E>
MOS_DEVICE void restrict_to(Rows<E>& m, const GroupParams& g, const GroupRows& rows) {
  m.map = g.rows;
  m.mapped = static_cast<int32_t>(min64(m.rows, INT32_MAX));
  m.rows = rows.last;
}

// ---------------------------------------------------------------------------------------------- factors

struct FactorParams {
  const void* pool;
  const int32_t* index;
  int64_t pool_stride;
  int64_t cols;
  uint32_t shards;  // that an index can name
  uint32_t shard_size;
  Divider by_shard_size;
  int32_t rank, shards_per_vector;
  int32_t pool_bytes;  // of an element: E's, or 4 for a float pool
  bool aligned;        // groups of eight columns never straddle shards and start at multiples of 16 bytes

  // For whole variants.
  bool whole() const {
    return aligned && pool_bytes == 4 && rank > 0 && rank % 4 == 0 && pool_stride <= UINT32_MAX / 4;
  }
};
inline FactorParams factor_params(const Factor& f) {
  const int size = size_of(f.dtype);
  const uint64_t bits = reinterpret_cast<uintptr_t>(f.pool) | static_cast<uint64_t>(f.pool_stride) * size;
  return {f.pool,
          f.index,
          f.pool_stride,
          f.cols(),
          static_cast<uint32_t>(min64(f.num_shards, int64_t{1} << 31)),
          static_cast<uint32_t>(f.shard_size),
          divider(static_cast<uint32_t>(f.shard_size)),
          static_cast<int32_t>(f.rank),
          static_cast<int32_t>(f.shards_per_vector),
          size,
          f.shard_size % kGroup == 0 && bits % kVector == 0};
}

// Of a block's kRanks ranks as many as products need where the group has `live` of them: they go in steps of 16.
template <int kRanks>
MOS_DEVICE int ranks_needed(int live) {
  return min(kRanks, max(16, (live + 15) / 16 * 16));
}

// The factor of a group: what lies beyond its rank is read as zeros.
MOS_DEVICE void restrict_to(FactorParams& f, const GroupParams& g, const GroupRows& rows) {
  f.rank = rank_of(g, rows, f.rank);
  f.index += rows.group * g.table;
}

// Where column `col` of rank vector `rank` is stored, as an element number of the pool. An index out of range sets
// `bad` and reads shard 0: the caller traps once it has issued its loads, for a branch between them would part them.
MOS_DEVICE int64_t pool_offset(const FactorParams& f, const int32_t* table, int rank, int64_t col, bool& bad) {
  const uint32_t part = divide(static_cast<uint32_t>(col), f.by_shard_size);
  uint32_t shard = static_cast<uint32_t>(table[rank * f.shards_per_vector + static_cast<int>(part)]);
  if (shard >= f.shards) {
    bad = true;
    shard = 0;
  }
  return shard * f.pool_stride + (static_cast<uint32_t>(col) - part * f.shard_size);
}

// A group as the pool stores it: E's, or floats.
template <class E>
struct RawGroup {
  static constexpr int kVectors = sizeof(E) == 8 ? 4 : 2;
  uint4 vector[kVectors];
};
template <class E>
MOS_DEVICE void load_raw(RawGroup<E>& raw, const void* source, int pool_bytes) {
#pragma unroll
  for (int v = 0; v < RawGroup<E>::kVectors; ++v) {
    if (v * kVector < kGroup * pool_bytes) raw.vector[v] = load_16(static_cast<const char*>(source) + v * kVector);
  }
}
// Converts it to E.
template <class E>
MOS_DEVICE void store_raw(E* target, const RawGroup<E>& raw, int pool_bytes) {
  constexpr int kStep = kVector / sizeof(E);
  if constexpr (sizeof(E) != 4) {
    if (pool_bytes == 4) {
#pragma unroll
      for (int v = 0; v < 2; ++v) store_floats(target + v * kGroup / 2, raw.vector[v]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup; i += kStep) store_16(target + i, raw.vector[i / kStep]);
}

// Columns [col, col + 8) of a rank vector, element by element.
template <class E>
MOS_DEVICE void load_factor_elements(E* target, const FactorParams& f, const int32_t* table, int rank, int64_t col,
                                     bool inside, bool& bad) {
#pragma unroll 1
  for (int i = 0; i < kGroup; ++i) {
    E value{};
    if (inside && col + i < f.cols) {
      const int64_t offset = pool_offset(f, table, rank, col + i, bad);
      value = sizeof(E) != 4 && f.pool_bytes == 4 ? from_sum<E>(static_cast<const float*>(f.pool)[offset])
                                                  : static_cast<const E*>(f.pool)[offset];
    }
    target[i] = value;
  }
}

// Rank vectors [rank0, rank0 + ranks) and columns [col0, col0 + cols) of a factor, cols a multiple of 64: all threads
// of the block together. Several loads are in flight, since nothing else hides the way to L2 and back.
template <Variant kVariant, class E>
MOS_DEVICE void load_factor(const SharedMatrix<E>& target, const FactorParams& f, int rank0, int ranks, int64_t col0,
                            int cols) {
  bool bad = false;
  if constexpr (kVariant & kWhole) {
    // Half a group of floats, 16 bytes, to a thread; the threads of a row are a power of two, and stay in their column:
    // its shard is found once.
    constexpr int kHalf = kGroup / 2, kBatch = 8;
    const int halves = cols / kHalf;
    int threads = 16;
    while (threads < halves) threads *= 2;
    const int half = threadIdx.x & (threads - 1), step = kThreads / threads;
    const int64_t col = col0 + half * kHalf;
    const bool inside = half < halves && col < f.cols;
    const uint32_t part = divide(static_cast<uint32_t>(col), f.by_shard_size);
    const float* pool = static_cast<const float*>(f.pool) + (static_cast<uint32_t>(col) - part * f.shard_size);
    const int32_t* table = f.index + part;
#pragma unroll 1
    for (int first = threadIdx.x / threads; first < ranks; first += kBatch * step) {
      uint4 v[kBatch] = {};
      int32_t shard[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b * step;
        shard[b] = -1;
        if (inside && rank < ranks && rank0 + rank < f.rank) shard[b] = table[(rank0 + rank) * f.shards_per_vector];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b * step;
        const bool exists = inside && rank < ranks && rank0 + rank < f.rank;
        const bool fits = static_cast<uint32_t>(shard[b]) < f.shards;
        if (exists && fits) v[b] = load_16(pool + shard[b] * f.pool_stride);
        bad = bad || (exists && !fits);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b * step;
        if (half < halves && rank < ranks) store_floats(target.at(rank, half * kHalf), v[b]);
      }
    }
  } else {
    constexpr int kStride = 64, kBatch = 4;
    for (int i = threadIdx.x; i < ranks * (kStride / kGroup); i += kThreads) {
      const int row = i / (kStride / kGroup), rank = rank0 + row;
      for (int first = i % (kStride / kGroup) * kGroup; first < cols; first += kBatch * kStride) {
        if (f.aligned) {
          RawGroup<E> raw[kBatch] = {};
          int64_t offset[kBatch];
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            const int col = first + b * kStride;
            const bool inside = rank < f.rank && col < cols && col0 + col < f.cols;
            offset[b] = inside ? pool_offset(f, f.index, rank, col0 + col, bad) : -1;
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            const char* pool = static_cast<const char*>(f.pool);
            if (offset[b] >= 0) load_raw(raw[b], pool + offset[b] * f.pool_bytes, f.pool_bytes);
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            if (first + b * kStride < cols) store_raw(target.at(row, first + b * kStride), raw[b], f.pool_bytes);
          }
        } else {
#pragma unroll 1
          for (int col = first; col < min(cols, first + kBatch * kStride); col += kStride) {
            const bool inside = rank < f.rank && col0 + col < f.cols;
            load_factor_elements(target.at(row, col), f, f.index, rank, col0 + col, inside, bad);
          }
        }
      }
    }
  }
  if (bad) trap();
}

// ---------------------------------------------------------------------------------------------- sums

// Two neighbouring sums of a row of `cols`, of which `left` columns are left; those that exist.
template <Variant kVariant, class S>
MOS_DEVICE void write_sums(S* target, int64_t left, S first, S second, int64_t cols) {
  if ((kVariant & kWhole) || cols % 2 == 0) {  // planes start at multiples of 16 bytes, so even rows keep pairs aligned
    if (left > 0) store_pair(target, first, second);
  } else {
    if (left > 0) target[0] = first;
    if (left > 1) target[1] = second;
  }
}

// Of a plane, the quads that exist, `step` elements apart; the others stay as they are.
template <int kQuads, class S, class F>
MOS_DEVICE void load_quads(uint4 (&quads)[kQuads], const S* source, int step, const F& exists) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (exists(i)) quads[i] = load_16(source + i * step);
  }
}

// sum[i] += that quad of each of `count` planes, in order. kBatch planes of all quads are in flight: one trip to L2
// takes as long as hundreds of additions. (An unroll pragma on a plain loop does not do it, nor do branches around what
// is beyond the last plane: nvcc then puts each load next to its addition. Planes beyond the last are read again and
// masked.)
template <int kBatch, int kQuads, class S, class F>
MOS_DEVICE void add_quads(S (&sum)[kQuads][kQuad], const S* source, int step, int64_t plane, int count,
                          const F& exists) {
  uint4 v[kBatch][kQuads] = {};
#pragma unroll 1
  for (int k = 0; k < count; k += kBatch) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) load_quads(v[b], source + min(k + b, count - 1) * plane, step, exists);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const uint32_t live = k + b < count ? 0xFFFFFFFFu : 0u;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        sum[i][0] += bit_cast<float>(v[b][i].x & live), sum[i][1] += bit_cast<float>(v[b][i].y & live);
        sum[i][2] += bit_cast<float>(v[b][i].z & live), sum[i][3] += bit_cast<float>(v[b][i].w & live);
      }
    }
  }
}

// sum += four sums of each of `count` planes, in order; only `live` of the four exist.
template <int kBatch, class S>
MOS_DEVICE void add_planes(S (&sum)[kQuad], const S* source, int64_t plane, int count, bool aligned, int64_t live) {
  if (sizeof(S) == 4 && aligned) {
    S quads[1][kQuad] = {{sum[0], sum[1], sum[2], sum[3]}};
    add_quads<kBatch>(quads, source, 0, plane, count, [](int) { return true; });
#pragma unroll
    for (int j = 0; j < kQuad; ++j) sum[j] = quads[0][j];
  } else {
    for (int k = 0; k < count; ++k) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (j < live) sum[j] += source[k * plane + j];
      }
    }
  }
}

template <class S>
struct PlaneParams {
  const S* data;
  int32_t count;
  int32_t rank;
  int64_t rows;
  bool aligned;  // four ranks start at a multiple of 16 bytes
};
template <class S>
PlaneParams<S> plane_params(const ConstPlanes& p) {
  return {static_cast<const S*>(p.data), static_cast<int32_t>(p.count), static_cast<int32_t>(p.cols), p.rows,
          p.cols % kQuad == 0 && reinterpret_cast<uintptr_t>(p.data) % kVector == 0};
}

// Four sums of a row, those that are `live`.
template <class S>
MOS_DEVICE void write_quad(S* target, const S (&sum)[kQuad], bool aligned, int64_t live) {
  if (sizeof(S) == 4 && aligned) {
    store_quad(target, sum[0], sum[1], sum[2], sum[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < live) target[j] = sum[j];
    }
  }
}

// kRows rows from first_row of a tile at row0, up to row `end`, and ranks [rank0, rank0 + kRanks), of the sum of all
// planes, times scale, rounded to E in shared memory. Where sum_out is not null the unscaled sum is written there too.
// The work of kWorkers threads, of which this is number `worker`.
template <Variant kVariant, int kRows, int kRanks, int kWorkers, class E, class S>
MOS_DEVICE void load_sums(const SharedMatrix<E>& target, const PlaneParams<S>& p, int64_t row0, int64_t end,
                          int first_row, int rank0, S scale, S* sum_out, int worker) {
  constexpr int kQuads = kRanks / kQuad, kOwn = kRows * kQuads / kWorkers;
  if constexpr (kVariant & kWhole) {
    // A few quads at a time, so that their trips to L2 overlap; where there are planes to add, two or four of each,
    // too. (With 64 ranks the sums of backward leave fewer registers.)
    constexpr int kAtOnce = kOwn < 4 || kWorkers == kWarp ? 2 : 4, kBatch = kOwn < 4 ? 4 : 2, kStep = kWorkers / kQuads;
    static_assert(kOwn % kAtOnce == 0);
    const int quad = worker % kQuads * kQuad, top = first_row + worker / kQuads;
    const int rows = rank0 + quad < p.rank ? static_cast<int>(end) - (static_cast<int>(row0) + top) : 0;
    const int64_t plane = p.rows * p.rank, at = (row0 + top) * p.rank + (rank0 + quad);
    const int step = kStep * p.rank;
#pragma unroll
    for (int first = 0; first < kOwn; first += kAtOnce) {
      S sum[kAtOnce][kQuad] = {};
      const S* source = p.data + at + first * step;
      const auto exists = [&](int i) { return (first + i) * kStep < rows; };
      if (p.count == 1) {
        uint4 v[kAtOnce] = {};
        load_quads(v, source, step, exists);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sum[i][0] = bit_cast<float>(v[i].x), sum[i][1] = bit_cast<float>(v[i].y);
          sum[i][2] = bit_cast<float>(v[i].z), sum[i][3] = bit_cast<float>(v[i].w);
        }
      } else {
        add_quads<kBatch>(sum, source, step, plane, p.count, exists);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int down = (first + i) * kStep;
        if (sum_out && down < rows) write_quad(sum_out + at + (first + i) * step, sum[i], true, kQuad);
        store_quad(target.at(top + down, quad), sum[i][0] * scale, sum[i][1] * scale, sum[i][2] * scale,
                   sum[i][3] * scale);
      }
    }
  } else {
    for (int i = worker; i < kRows * kQuads; i += kWorkers) {
      const int r = first_row + i / kQuads, quad = i % kQuads * kQuad;
      const int64_t row = row0 + r, at = row * p.rank + rank0 + quad;
      const int live = p.rank - rank0 - quad;
      S sum[kQuad] = {};
      if (row < end && live > 0) {
        add_planes<4>(sum, p.data + at, p.rows * p.rank, p.count, p.aligned, live);
        if (sum_out) write_quad(sum_out + at, sum, p.aligned, live);
      }
      store_quad(target.at(r, quad), sum[0] * scale, sum[1] * scale, sum[2] * scale, sum[3] * scale);
    }
  }
}

// The same of a whole block's tile with so few rows, as in decoding, that each thread would have less than half a quad
// of sums: several share one, each adds a range of planes, and the first of them adds these sums in order. `scratch`
// holds 16 bytes for each thread; nobody reads target or scratch yet, and all threads come.
template <int kRows, int kRanks, class E, class S>
MOS_DEVICE void load_few_sums(const SharedMatrix<E>& target, const PlaneParams<S>& p, int64_t row0, int rows, S scale,
                              S* sum_out, unsigned char* scratch) {
  const int quads = p.rank / kQuad, items = rows * quads;
  const int parts = kThreads / items, part = threadIdx.x / items, item = threadIdx.x % items;
  const int size = static_cast<int>(ceil_div(p.count, parts)), first = part * size;
  S sum[kQuad] = {};
  if (part < parts) {
    const int64_t plane = p.rows * p.rank;
    add_planes<8>(sum, p.data + row0 * p.rank + item * kQuad + first * plane, plane, min(size, p.count - first), true,
                  kQuad);
  }
  store_quad(reinterpret_cast<S*>(scratch) + threadIdx.x * kQuad, sum[0], sum[1], sum[2], sum[3]);
  for (int i = threadIdx.x; i < kRows * kRanks / kQuad; i += kThreads) {
    store_quad(target.at(i / (kRanks / kQuad), i % (kRanks / kQuad) * kQuad), S(0), S(0), S(0), S(0));
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < items) {
#pragma unroll 1
    for (int other = 1; other < parts; ++other) {
      const S* of_part = reinterpret_cast<const S*>(scratch) + (other * items + item) * kQuad;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum[j] += of_part[j];
    }
    if (sum_out) write_quad(sum_out + row0 * p.rank + item * kQuad, sum, true, kQuad);
    store_quad(target.at(item / quads, item % quads * kQuad), sum[0] * scale, sum[1] * scale, sum[2] * scale,
               sum[3] * scale);
  }
}

// Blocks of sums, side by side, into a plane (rows, cols) at (row0, col0), times scale. Whole variants have even
// columns. Of groups, what lies beyond the first live_rows and live_cols is zero: nobody computed it, but an infinity
// that met the zeros there is not one.
template <Variant kVariant, int kBlocks, class S>
MOS_DEVICE void store_blocks(const Block<S> (&blocks)[kBlocks], S* plane, int64_t rows, int64_t cols, int64_t row0,
                             int64_t col0, S scale, int lane, int64_t live_rows, int64_t live_cols) {
  constexpr bool kAsks = !(kVariant & kWhole) || (kVariant & kGrouped) != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row0 + block_row(lane, 2 * half), col = col0 + block_col(lane, 0, 0);
    if (row >= rows) continue;
    S* target = plane + row * cols + col;
    const int live = row < live_rows ? static_cast<int>(min64(live_cols - col, INT32_MAX)) : 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int right = 16 * n + 8 * j;
        const S first = blocks[n].sum[j][2 * half] * scale, second = blocks[n].sum[j][2 * half + 1] * scale;
        write_sums<kVariant>(target + right, cols - col - right, !kAsks || right < live ? first : S(0),
                             !kAsks || right + 1 < live ? second : S(0), cols);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- s F

// A warp's 16 rows of s as operands. Fragments of tensor cores are small, so they are loaded once for all columns;
// others are loaded where they are used.
template <class M, int kRanks>
struct RowsOf {
  static constexpr bool kHeld = sizeof(typename M::E) == 2;
  typename M::A held[kHeld ? kRanks / M::kStep : 1];

  MOS_DEVICE void load(const SharedMatrix<typename M::E>& s, int first_row, int lane) {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kRanks; k += M::kStep) held[k / M::kStep] = M::a_rows(s, first_row, k, lane);
    }
  }
};

// sums += the warp's rows of s times 16 * kBlocks columns of F, from `col` on; of `live` ranks.
template <class M, int kRanks, int kBlocks>
MOS_DEVICE void multiply_columns(Block<typename M::S> (&sums)[kBlocks], RowsOf<M, kRanks>& a,
                                 const SharedMatrix<typename M::E>& s, const SharedMatrix<typename M::E>& factor,
                                 int first_row, int col, int lane, int live) {
  constexpr bool kHeld = RowsOf<M, kRanks>::kHeld;
#pragma unroll(kHeld ? kRanks / M::kStep : 1)
  for (int k = 0; k < kRanks; k += M::kStep) {
    if (k > 0 && k >= live) break;
    if constexpr (!kHeld) a.held[0] = M::a_rows(s, first_row, k, lane);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      M::multiply(sums[n], a.held[kHeld ? k / M::kStep : 0], M::b_cols(factor, k, col + n * 16, lane));
    }
  }
}

// Writes them over columns from `col` on of the warp's rows of a tile; plus what is there, and plus a bias.
template <int kBlocks, class E, class S>
MOS_DEVICE void write_columns(const Block<S> (&sums)[kBlocks], const SharedMatrix<E>& tile, int first_row, int col,
                              int lane, bool accumulate, const S* bias) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    for_each_pair(sums[n], lane, [&](int r, int c, S first, S second) {
      E* target = tile.at(first_row + r, col + n * 16 + c);
      if (bias) {
        first += bias[n * 16 + c];
        second += bias[n * 16 + c + 1];
      }
      if (accumulate) add_pair(target, first, second);
      store_pair(target, first, second);
    });
  }
}

}  // namespace mos::cuda
