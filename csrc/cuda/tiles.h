// Tiles on their way between global and shared memory, in groups of eight columns.
//
// Everywhere: what lies outside a matrix is read as zeros and never written. Matrices whose address and rows are
// aligned to 16 bytes travel in vectors, others element by element; the arithmetic does not know the difference.
#pragma once

#include "../common/philox.h"
#include "fragments.h"
#include "heuristics.h"

namespace mos::cuda {

constexpr int kVector = 16;  // bytes

// Vectors in a group of eight elements.
template <class E>
constexpr int kGroupVectors = kGroup * static_cast<int>(sizeof(E)) / kVector;

// ---------------------------------------------------------------------------------------------- parameters, from views

template <class E>
struct Rows {
  E* data;
  int64_t rows, cols, stride;
  bool aligned;  // every group of eight columns starts at a multiple of 16 bytes
};
template <class E>
Rows<E> rows_of(const Matrix& m) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(m.data) | static_cast<uint64_t>(m.row_stride) * sizeof(E);
  return {static_cast<E*>(m.data), m.rows, m.cols, m.row_stride, bits % kVector == 0};
}

struct FactorParams {
  const void* pool;
  const int32_t* index;
  int64_t num_shards, pool_stride;
  int64_t cols;
  uint32_t shard_size;
  int32_t rank, shards_per_vector;
  int32_t pool_bytes;  // of an element: E's, or 4 for a float pool
  bool aligned;        // groups of eight columns never straddle shards and start at multiples of 16 bytes
};
inline FactorParams factor_params(const Factor& f) {
  const int size = f.dtype == DType::f64 ? 8 : f.dtype == DType::f32 ? 4 : 2;
  const uint64_t bits = reinterpret_cast<uintptr_t>(f.pool) | static_cast<uint64_t>(f.pool_stride) * size;
  return {f.pool,
          f.index,
          f.num_shards,
          f.pool_stride,
          f.cols(),
          static_cast<uint32_t>(f.shard_size),
          static_cast<int32_t>(f.rank),
          static_cast<int32_t>(f.shards_per_vector),
          size,
          f.shard_size % kGroup == 0 && bits % kVector == 0};
}

inline int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---------------------------------------------------------------------------------------------- activations

// Columns [col, col + 8) of a row into shared memory, asynchronously where that is possible.
template <class E>
MOS_DEVICE void load_group(E* target, const Rows<const E>& m, int64_t row, int64_t row_end, int64_t col) {
  const bool inside = row < row_end && col < m.cols;
  const E* source = m.data + row * m.stride + col;
  if (m.aligned && (col + kGroup <= m.cols || !inside)) {
    const uint32_t shared = shared_address(target);
#pragma unroll
    for (int v = 0; v < kGroupVectors<E>; ++v) {
      cp_async_16(shared + v * kVector, inside ? source + v * (kVector / sizeof(E)) : m.data, inside ? kVector : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) target[i] = inside && col + i < m.cols ? source[i] : E{};
  }
}

// The same at once, of a row and a column that exist; columns beyond the matrix are left alone.
template <class E>
MOS_DEVICE void read_group(E* target, const Rows<E>& m, int64_t row, int64_t col) {
  const E* source = m.data + row * m.stride + col;
  if (m.aligned && col + kGroup <= m.cols) {
#pragma unroll
    for (int v = 0; v < kGroupVectors<E>; ++v) {
      constexpr int step = kVector / sizeof(E);
      store_16(target + v * step, load_16(source + v * step));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i < m.cols) target[i] = source[i];
    }
  }
}

// The other way.
template <class E>
MOS_DEVICE void store_group(const Rows<E>& m, int64_t row, int64_t col, const E* source) {
  E* target = m.data + row * m.stride + col;
  if (m.aligned && col + kGroup <= m.cols) {
#pragma unroll
    for (int v = 0; v < kGroupVectors<E>; ++v) {
      constexpr int step = kVector / sizeof(E);
      store_16(target + v * step, load_16(source + v * step));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i < m.cols) target[i] = source[i];
    }
  }
}

// ---------------------------------------------------------------------------------------------- dropout

// The factor that kept elements are multiplied by: 1 / (1 - p), and 0 with p = 1.
inline double keep_scale(const DeviceDropout& d) { return Dropout{0, d.threshold}.keep_scale(); }

// Bit i: element col + i of a row is kept.
MOS_DEVICE uint32_t keep_bits(uint64_t seed, uint32_t threshold, int64_t row, int64_t col) {
  const PhiloxBlock block = philox(seed, static_cast<uint32_t>(col / kDropoutGroup), static_cast<uint64_t>(row));
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(dropout_bits(block, i) >= threshold) << i;
  return bits;
}

// Zeroes the dropped elements of a group in shared memory; the scale of the kept ones goes onto the sums.
template <class E>
MOS_DEVICE void drop_group(E* group, uint32_t keep) {
  constexpr int kElements = sizeof(E) < 4 ? 4 / sizeof(E) : 1, kWords = sizeof(E) > 4 ? sizeof(E) / 4 : 1;
#pragma unroll
  for (int v = 0; v < kGroupVectors<E>; ++v) {
    E* p = group + v * (kVector / sizeof(E));
    uint4 vector = load_16(p);
    uint32_t* word[4] = {&vector.x, &vector.y, &vector.z, &vector.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int first = v * (kVector / static_cast<int>(sizeof(E))) + w * kElements / kWords;
      if constexpr (kElements == 2) {
        *word[w] &= (keep >> first & 1 ? 0x0000FFFFu : 0u) | (keep >> (first + 1) & 1 ? 0xFFFF0000u : 0u);
      } else {
        *word[w] &= keep >> first & 1 ? 0xFFFFFFFFu : 0u;
      }
    }
    store_16(p, vector);
  }
}

// ---------------------------------------------------------------------------------------------- factors

// Where column `col` of rank vector `rank` is stored, as an element number of the pool.
MOS_DEVICE int64_t pool_offset(const FactorParams& f, const int32_t* table, int rank, int64_t col) {
  const uint32_t part = static_cast<uint32_t>(col) / f.shard_size;
  const int64_t shard = table[rank * f.shards_per_vector + static_cast<int>(part)];
  if (shard < 0 || shard >= f.num_shards) trap();
  return shard * f.pool_stride + (static_cast<uint32_t>(col) - part * f.shard_size);
}

// Eight elements, as they are stored in the pool, to E.
template <class E>
MOS_DEVICE void narrow_group(E* target, const float* source) {
  if constexpr (sizeof(E) == 2) {
    uint32_t word[4];
    const uint4 low = load_16(source), high = load_16(source + 4);
    word[0] = pack<E>(bit_cast<float>(low.x), bit_cast<float>(low.y));
    word[1] = pack<E>(bit_cast<float>(low.z), bit_cast<float>(low.w));
    word[2] = pack<E>(bit_cast<float>(high.x), bit_cast<float>(high.y));
    word[3] = pack<E>(bit_cast<float>(high.z), bit_cast<float>(high.w));
    store_16(target, {word[0], word[1], word[2], word[3]});
  } else {
    E value[kGroup];  // all read before any is written: target and source may be one
#pragma unroll
    for (int i = 0; i < kGroup; ++i) value[i] = static_cast<E>(source[i]);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) target[i] = value[i];
  }
}

// Columns [col, col + 8) of a rank vector into shared memory, converted to E. Synchronous.
template <class E>
MOS_DEVICE void load_factor_group(E* target, const FactorParams& f, int rank, int64_t col) {
  const bool inside = rank < f.rank && col < f.cols;
  if (f.aligned && inside) {
    const int64_t offset = pool_offset(f, f.index, rank, col);
    if (sizeof(E) != 4 && f.pool_bytes == 4) {
      narrow_group(target, static_cast<const float*>(f.pool) + offset);
    } else {
      const E* source = static_cast<const E*>(f.pool) + offset;
#pragma unroll
      for (int v = 0; v < kGroupVectors<E>; ++v) {
        constexpr int step = kVector / sizeof(E);
        store_16(target + v * step, load_16(source + v * step));
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kGroup; ++i) {
      E value{};
      if (inside && col + i < f.cols) {
        const int64_t offset = pool_offset(f, f.index, rank, col + i);
        value = sizeof(E) != 4 && f.pool_bytes == 4 ? from_sum<E>(static_cast<const float*>(f.pool)[offset])
                                                    : static_cast<const E*>(f.pool)[offset];
      }
      target[i] = value;
    }
  }
}

// Rank vectors [rank, rank + ranks) and columns [col, col + cols) of a factor: all threads of the block together.
template <class E>
MOS_DEVICE void load_factor(const SharedMatrix<E>& target, const FactorParams& f, int rank, int ranks, int64_t col,
                            int cols) {
  const int groups = cols / kGroup;
  for (int i = threadIdx.x; i < ranks * groups; i += kThreads) {
    const int row = i / groups, group = i % groups;
    load_factor_group(target.at(row, group * kGroup), f, rank + row, col + group * kGroup);
  }
}

// ---------------------------------------------------------------------------------------------- low-rank sums

template <class S>
struct PlaneParams {
  const S* data;
  int32_t count;
  int32_t rank;
  int64_t plane;  // elements of one
  bool aligned;   // four ranks start at a multiple of 16 bytes
};
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

template <class S>
PlaneParams<S> plane_params(const ConstPlanes& p) {
  return {static_cast<const S*>(p.data), static_cast<int32_t>(p.count), static_cast<int32_t>(p.cols), p.rows * p.cols,
          p.cols % 4 == 0 && reinterpret_cast<uintptr_t>(p.data) % kVector == 0};
}

template <class S>
MOS_DEVICE void add_four(S (&sum)[4], const S* source) {
  if constexpr (sizeof(S) == 4) {
    const uint4 v = load_16(source);
    sum[0] += bit_cast<float>(v.x), sum[1] += bit_cast<float>(v.y);
    sum[2] += bit_cast<float>(v.z), sum[3] += bit_cast<float>(v.w);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += source[i];
  }
}

// The 16 rows of one warp and ranks [rank, rank + ranks) of the sum of all planes, times scale, rounded to E in shared
// memory. Where `sum_out` is not null the unscaled sum is written there too. For one warp: the rows are its own.
template <class E, class S>
MOS_DEVICE void load_sums(const SharedMatrix<E>& target, const PlaneParams<S>& p, int64_t row0, int64_t row_end,
                          int rank0, int ranks, S scale, S* sum_out, int first_row, int lane) {
  const int quads = ranks / 4;
  for (int i = lane; i < kWarpRows * quads; i += kWarp) {
    const int r = first_row + i / quads, quad = i % quads * 4;
    const int64_t row = row0 + r;
    const int rank = rank0 + quad;
    S sum[4] = {S(0), S(0), S(0), S(0)};
    if (row < row_end && rank < p.rank) {
      const S* source = p.data + row * p.rank + rank;
      for (int k = 0; k < p.count; ++k, source += p.plane) {
        if (p.aligned) {
          add_four(sum, source);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (rank + j < p.rank) sum[j] += source[j];
          }
        }
      }
      if (sum_out) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (rank + j < p.rank) sum_out[row * p.rank + rank + j] = sum[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) *target.at(r, quad + j) = from_sum<E>(sum[j] * scale);
  }
}

}  // namespace mos::cuda
