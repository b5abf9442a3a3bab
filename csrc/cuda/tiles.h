// Tiles on their way between global and shared memory, in groups of eight columns.
//
// Everywhere: what lies outside a matrix is read as zeros and never written. Matrices whose address and rows are
// aligned to 16 bytes travel in vectors, others element by element; the arithmetic does not know the difference.
// kWhole promises that there is nothing but whole, aligned groups: the usual case, compiled without the other.
#pragma once

#include "../common/philox.h"
#include "fragments.h"
#include "heuristics.h"

namespace mos::cuda {

constexpr int kVector = 16;  // bytes

inline int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---------------------------------------------------------------------------------------------- activations

template <class E>
struct Rows {
  E* data;
  int64_t rows, cols, stride;
  bool aligned;  // every group of eight columns starts at a multiple of 16 bytes

  bool whole() const { return aligned && cols % kGroup == 0; }
  MOS_DEVICE E* at(int64_t row, int64_t col) const { return data + row * stride + col; }
};
template <class E>
Rows<E> rows_of(const Matrix& m) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(m.data) | static_cast<uint64_t>(m.row_stride) * sizeof(E);
  return {static_cast<E*>(m.data), m.rows, m.cols, m.row_stride, bits % kVector == 0};
}

// Columns [col, col + 8) of a row into shared memory, asynchronously where that is possible.
template <bool kWhole, class E>
MOS_DEVICE void load_group(E* target, const Rows<const E>& m, int64_t row, int64_t col) {
  const bool inside = row < m.rows && col < m.cols;
  const E* source = m.at(row, col);
  if (kWhole || (m.aligned && (col + kGroup <= m.cols || !inside))) {
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

// Eight elements between global and shared memory, either way; or as many as are left of a row of a global matrix.
template <bool kWhole, class E>
MOS_DEVICE void copy_group(E* target, const E* source, bool aligned, int64_t left) {
  if (kWhole || (aligned && left >= kGroup)) {
    constexpr int kStep = kVector / sizeof(E);
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) store_16(target + i, load_16(source + i));
  } else {
#pragma unroll 1
    for (int i = 0; i < min64(kGroup, left); ++i) target[i] = source[i];
  }
}

// ---------------------------------------------------------------------------------------------- dropout

// The factor that kept elements are multiplied by: 1 / (1 - p), and 0 with p = 1.
inline double keep_scale(const DeviceDropout& d) { return Dropout{0, d.threshold}.keep_scale(); }

// 16 ones for each kept element of a group, in order.
struct KeepMask {
  uint32_t word[4];

  // Bit i: element i is kept.
  MOS_DEVICE uint32_t bits() const {
    uint32_t out = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) out |= ((word[w] & 1u) | (word[w] >> 30 & 2u)) << (2 * w);
    return out;
  }
};

// Of columns [col, col + 8) of a row. threshold is not 0.
MOS_DEVICE KeepMask keep_mask(const int64_t* seed, uint32_t threshold, int64_t row, int64_t col) {
  const PhiloxBlock block =
      philox(static_cast<uint64_t>(*seed), static_cast<uint32_t>(col / kDropoutGroup), static_cast<uint64_t>(row));
  // An element is dropped when its 16 bits are below the threshold. Compared as the upper half of a word whose lower
  // half is anything: at most threshold - 1 followed by ones.
  const uint32_t last = (threshold - 1) << 16 | 0xFFFFu;
  KeepMask mask;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    mask.word[w] = (block.word[w] << 16 > last ? 0x0000FFFFu : 0u) | (block.word[w] > last ? 0xFFFF0000u : 0u);
  }
  return mask;
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

// ---------------------------------------------------------------------------------------------- factors

struct FactorParams {
  const void* pool;
  const int32_t* index;
  int64_t num_shards, pool_stride;
  int64_t cols;
  uint32_t shard_size;
  Divider by_shard_size;
  int32_t rank, shards_per_vector;
  int32_t pool_bytes;  // of an element: E's, or 4 for a float pool
  bool aligned;        // groups of eight columns never straddle shards and start at multiples of 16 bytes
};
inline FactorParams factor_params(const Factor& f) {
  const int size = size_of(f.dtype);
  const uint64_t bits = reinterpret_cast<uintptr_t>(f.pool) | static_cast<uint64_t>(f.pool_stride) * size;
  return {f.pool,
          f.index,
          f.num_shards,
          f.pool_stride,
          f.cols(),
          static_cast<uint32_t>(f.shard_size),
          divider(static_cast<uint32_t>(f.shard_size)),
          static_cast<int32_t>(f.rank),
          static_cast<int32_t>(f.shards_per_vector),
          size,
          f.shard_size % kGroup == 0 && bits % kVector == 0};
}

// Where column `col` of rank vector `rank` is stored, as an element number of the pool. An index out of range sets
// `bad` and reads shard 0: the caller traps once it has issued its loads, for a branch between them would part them.
MOS_DEVICE int64_t pool_offset(const FactorParams& f, const int32_t* table, int rank, int64_t col, bool& bad) {
  const uint32_t part = divide(static_cast<uint32_t>(col), f.by_shard_size);
  int64_t shard = table[rank * f.shards_per_vector + static_cast<int>(part)];
  if (shard < 0 || shard >= f.num_shards) {
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
  if (sizeof(E) == 4 || pool_bytes != 4) {
    constexpr int kStep = kVector / sizeof(E);
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) store_16(target + i, raw.vector[i / kStep]);
  } else if constexpr (sizeof(E) != 4) {
    const uint4 &low = raw.vector[0], &high = raw.vector[1];
    const uint32_t word[kGroup] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) store_pair(target + i, bit_cast<float>(word[i]), bit_cast<float>(word[i + 1]));
  }
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
// of the block together, four groups in flight each, since nothing else hides the way to L2 and back.
template <bool kWhole, class E>
MOS_DEVICE void load_factor(const SharedMatrix<E>& target, const FactorParams& f, int rank0, int ranks, int64_t col0,
                            int cols) {
  constexpr int kStride = 64, kBatch = 4;
  bool bad = false;
  for (int i = threadIdx.x; i < ranks * (kStride / kGroup); i += kThreads) {
    const int row = i / (kStride / kGroup), rank = rank0 + row;
    for (int first = i % (kStride / kGroup) * kGroup; first < cols; first += kBatch * kStride) {
      if (kWhole || f.aligned) {
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
  if (bad) trap();
}

// ---------------------------------------------------------------------------------------------- sums

// Two neighbouring sums of a row of a plane with `cols` columns; those that exist.
template <class S>
MOS_DEVICE void write_sums(S* row, int64_t col, int64_t cols, S first, S second) {
  if (cols % 2 == 0) {  // planes start at multiples of 16 bytes, so that even rows keep pairs aligned
    if (col < cols) store_pair(row + col, first, second);
  } else {
    if (col < cols) row[col] = first;
    if (col + 1 < cols) row[col + 1] = second;
  }
}

constexpr int kQuad = 4;  // sums that a thread adds at a time

// sum += four sums of each of `count` planes, in order; only `live` of the four exist. kBatch loads are in flight: one
// trip to L2 takes as long as hundreds of additions. (An unroll pragma on the plain loop does not do it, nor do
// branches around what is beyond the last plane: nvcc then puts each load next to its addition. Planes beyond the last
// are read again and masked.)
template <int kBatch, class S>
MOS_DEVICE void add_planes(S (&sum)[kQuad], const S* source, int64_t plane, int count, bool aligned, int64_t live) {
  if (sizeof(S) == 4 && aligned) {
    for (int k = 0; k < count; k += kBatch) {
      uint4 v[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) v[b] = load_16(source + min(k + b, count - 1) * plane);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t live = k + b < count ? 0xFFFFFFFFu : 0u;
        sum[0] += bit_cast<float>(v[b].x & live), sum[1] += bit_cast<float>(v[b].y & live);
        sum[2] += bit_cast<float>(v[b].z & live), sum[3] += bit_cast<float>(v[b].w & live);
      }
    }
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

// `rows` rows from first_row of a tile at row0, and ranks [rank0, rank0 + ranks), of the sum of all planes, times
// scale, rounded to E in shared memory. Where sum_out is not null the unscaled sum is written there too. The work of
// `workers` threads, of which this is number `worker`.
template <int kBatch, class E, class S>
MOS_DEVICE void load_sums(const SharedMatrix<E>& target, const PlaneParams<S>& p, int64_t row0, int first_row, int rows,
                          int rank0, int ranks, S scale, S* sum_out, int worker, int workers) {
  const int quads = ranks / kQuad;
  for (int i = worker; i < rows * quads; i += workers) {
    const int r = first_row + i / quads, quad = i % quads * kQuad;
    const int64_t row = row0 + r, at = row * p.rank + rank0 + quad;
    const int live = p.rank - rank0 - quad;
    S sum[kQuad] = {};
    if (row < p.rows && live > 0) {
      add_planes<kBatch>(sum, p.data + at, p.rows * p.rank, p.count, p.aligned, live);
      if (sum_out) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (j < live) sum_out[at + j] = sum[j];
        }
      }
    }
    store_pair(target.at(r, quad), sum[0] * scale, sum[1] * scale);
    store_pair(target.at(r, quad + 2), sum[2] * scale, sum[3] * scale);
  }
}

// A block of sums into a plane (rows, cols) at (row0, col0), times scale.
template <class S>
MOS_DEVICE void store_block(const Block<S>& block, S* plane, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                            S scale, int lane) {
  for_each_pair(block, lane, [&](int r, int c, S first, S second) {
    if (row0 + r < rows) write_sums(plane + (row0 + r) * cols, col0 + c, cols, first * scale, second * scale);
  });
}

}  // namespace mos::cuda
